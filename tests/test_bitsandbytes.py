"""State dicts of bitsandbytes, read and written: kept ones, with what it decodes them to."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.formats.bitsandbytes import from_tensors, to_tensors

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "bitsandbytes_states.npz"))
CASES = sorted({name.split("/")[0] for name in GOLDEN if "/" in name})
NESTED, PLAIN = "nf4_float32_6x128_64_nested", "fp4_bfloat16_4x128_128"
STATE = "weight.quant_state.bitsandbytes__"


def state_dict(case: str) -> dict[str, np.ndarray]:
    found = {}
    for key, values in GOLDEN.items():
        if key.startswith(f"{case}/"):
            name, _, half = key.removeprefix(f"{case}/").partition("!")
            found[name] = values.view(jnp.bfloat16) if half else values
    return found


def bits(x) -> np.ndarray:
    """Told apart from all else, zeros of either sign included; half precision is exact here."""
    return np.asarray(jnp.asarray(x).astype(jnp.float32)).view(np.uint32)


@pytest.mark.parametrize("case", CASES)
def test_decodes_to_the_bits_of_bitsandbytes(case):
    q = from_tensors(state_dict(case))
    kind, dtype, shape = case.split("_")[:3]
    assert (q.kind, q.dtype, q.layout) == (kind, dtype, "o i")
    assert "x".join(map(str, q.shape)) == shape
    decoded = jax.jit(lj.dequantize)(q)
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(bits(decoded), GOLDEN[f"{case}!decoded"].view(np.uint32))


@pytest.mark.parametrize("case", CASES)
def test_writes_what_was_read(case):
    """The same bytes, tensor for tensor; and the same facts in JSON."""
    read = state_dict(case)
    written = to_tensors(from_tensors(read))
    assert set(written) == set(read)
    for name, values in read.items():
        ours = written[name]
        if name.startswith(STATE):
            assert json.loads(ours.tobytes()) == json.loads(values.tobytes())
        else:
            assert ours.tobytes() == values.tobytes(), name
            assert ours.dtype == (np.uint8 if name == "weight" else values.dtype)


def test_scales_in_half_precision():
    """As a model leaves them that was saved after it ran on some CPUs; widened, as there."""
    tensors = state_dict(PLAIN)
    half = tensors["weight.absmax"].astype(jnp.bfloat16)
    q = from_tensors(tensors | {"weight.absmax": half})
    assert q.scales.dtype == np.float32
    np.testing.assert_array_equal(q.scales.ravel(), half.astype(np.float32))


def test_layouts_of_a_model():
    """A Flax kernel is written as the matrix that torch has; of a stack, one layer at a time."""
    w = np.random.default_rng(0).normal(size=(2, 64, 5)).astype(np.float32)
    stacked = lj.quantize_array(w, layout="b i o")
    one = jax.tree.map(lambda x: x[1], stacked)
    back = from_tensors(to_tensors(one, "q.weight"), "q.weight")
    assert back.shape == (5, 64)
    np.testing.assert_array_equal(lj.dequantize(back), lj.dequantize(one).T)
    with pytest.raises(ValueError, match=r"weight holds 2 matrices, shape .* one by one"):
        to_tensors(stacked)


def test_kinds_that_bitsandbytes_lacks():
    with pytest.raises(ValueError, match=r"q\.weight is stored as int4, which bitsandbytes"):
        to_tensors(lj.quantize_array(np.ones((64, 4), np.float32), "int4"), "q.weight")


def changed(part: str, change):
    def edit(tensors):
        tensors[f"weight{part}"] = change(tensors[f"weight{part}"].copy())

    return edit


def without(part: str):
    return lambda tensors: tensors.pop(f"weight{part}")


def said(kind: str = "nf4", **fields):
    """The JSON with other fields."""

    def edit(tensors):
        described = json.loads(tensors[f"{STATE}{kind}"].tobytes()) | fields
        tensors[f"{STATE}{kind}"] = np.frombuffer(json.dumps(described).encode(), np.uint8)

    return edit


def renamed(tensors):
    tensors[f"{STATE}nf5"] = tensors.pop(f"{STATE}nf4")


def doubled(tensors):
    tensors[f"{STATE}fp4"] = tensors[f"{STATE}nf4"]


def spoilt(value):
    def change(x):
        x.flat[-1] = value
        return x

    return change


REFUSED = [
    (NESTED, changed(".quant_map", spoilt(0.9)), ["weight.quant_map", "levels of nf4"]),
    (NESTED, changed(".nested_quant_map", spoilt(0.9)), ["nested_quant_map", "dynamic map"]),
    (NESTED, said(nested_blocksize=128), ["nested_blocksize: 128, expected 256"]),
    (NESTED, said(nested_dtype="float16"), ["nested_dtype: 'float16'"]),
    (NESTED, said(nested_offset="0"), ["nested_offset: '0', expected a number"]),
    (NESTED, said(nested_offset=10**400), ["nested_offset: 1000000000", "expected a number"]),
    (NESTED, said(nested_offset=-3.5e38), ["scales of weight are NaN or infinite"]),
    (NESTED, changed(".quant_map", lambda x: x[:-1]), ["quant_map is float32 of 15", "of 16"]),
    (NESTED, changed(".nested_quant_map", lambda x: x[:-1]), ["float32 of 255 elements"]),
    (NESTED, said(nested_offset=float("nan")), ["scales of weight are NaN"]),
    (NESTED, changed(".nested_absmax", spoilt(np.inf)), ["scales of weight are NaN or infinite"]),
    (PLAIN, changed(".absmax", spoilt(np.nan)), ["scales of weight are NaN"]),
    (NESTED, said(blocksize=48), ["blocksize: 48, expected one of (32, 64"]),
    (NESTED, said(blocksize=[64]), ["blocksize: [64]"]),
    (
        NESTED,
        said(blocksize=32),
        ["absmax is uint8 of 12 elements", "needs uint8 of 24"],
    ),
    (NESTED, said(dtype="float64"), ["dtype: 'float64'", "float32, bfloat16, float16"]),
    (NESTED, said(shape=[6, 2, 64]), ["shape: [6, 2, 64], expected two sizes"]),
    (NESTED, said(shape=[6, 127]), ["weight is uint8 of 384 elements", "(6, 127)", "of 381"]),
    (
        NESTED,
        said(shape=[2**40, 2**40]),
        ["weight is uint8 of 384", "(1099511627776, 1099511627776)"],
    ),
    (NESTED, said(quant_type="fp4"), ["quant_type: 'fp4', expected 'nf4'"]),
    (NESTED, renamed, ["nf5"]),
    (NESTED, doubled, ["nf4, weight.quant_state", "expected one of"]),
    (NESTED, without(".quant_state.bitsandbytes__nf4"), ["weight has no quant_state beside it"]),
    (NESTED, without(".nested_absmax"), ["weight.nested_absmax is missing"]),
    (PLAIN, without(".absmax"), ["weight.absmax is missing"]),
    (NESTED, changed("", lambda x: x[:-1]), ["weight is uint8 of 383"]),
    (NESTED, changed(".absmax", lambda x: x.astype(np.float32)), ["absmax is float32 of 12"]),
    (
        PLAIN,
        lambda tensors: tensors.update({"weight.nested_absmax": np.ones(1, np.float32)}),
        ["weight.nested_absmax is there", "no nested_offset"],
    ),
    (
        NESTED,
        changed(".quant_state.bitsandbytes__nf4", lambda x: x[:-1]),
        ["bitsandbytes__nf4 is no JSON"],
    ),
    (
        NESTED,
        changed(".quant_state.bitsandbytes__nf4", lambda _: np.frombuffer(b"[]", np.uint8)),
        ["holds a list"],
    ),
]


@pytest.mark.parametrize(("case", "edit", "words"), REFUSED)
def test_refuses_what_it_would_decode_wrongly(case, edit, words):
    tensors = state_dict(case)
    edit(tensors)
    with pytest.raises(ValueError, match="weight") as caught:
        from_tensors(tensors)
    assert all(word in str(caught.value) for word in words), str(caught.value)
