"""Leaves whose blocks run over row ends, against NumPy, through all that leaves go through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import reference
from cases import LAYERS, SWAPPED, X, check_values_and_gradients, same, trees
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.core.codebooks import scale_codebook
from lora_jax.kernels import decode_rows


def decoded(q: lj.QuantizedArray) -> np.ndarray:
    """The matrices `[b..., out, in]` in float32, from the documented fields of a flat leaf."""
    out, inn = q.matrix_shape
    scales = np.repeat(reference.scales(q, scale_codebook()), q.block_size, -1)
    codes = reference.unpack(q.codes)
    values = reference.LEVELS[q.kind][codes][..., : out * inn] * scales[..., : out * inn]
    return values.reshape(*q.batch_shape, out, inn)


def quantized(shape, layout="o i", seed=0, dtype="float32", **options):
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return lj.quantize_array(jnp.asarray(w).astype(dtype), layout=layout, flat=True, **options)


@pytest.mark.parametrize(
    ("shape", "layout", "kind", "double_quant"),
    [
        ((33, 100), "o i", "nf4", True),
        ((5, 7), "i o", "fp4", False),  # odd, and less than a block
        ((1, 129), "o i", "nf4", False),
        ((2, 3, 20, 45), "b b i o", "nf4", True),
        ((3, 50, 3, 5), "b i o o", "int4", False),
    ],
)
def test_against_numpy(shape, layout, kind, double_quant):
    q = quantized(shape, layout, kind=kind, double_quant=double_quant)
    out, inn = q.matrix_shape
    assert q.is_flat
    assert q.shape == shape
    assert q.codes.shape == (*q.batch_shape, 1, -(-out * inn // 2))
    assert q.scales.shape == (*q.batch_shape, 1, -(-out * inn // 64))
    assert q.nbytes == sum(x.nbytes for x in jax.tree.leaves(q))
    assert "flat" in repr(q)
    expected = reference.parameter(decoded(q), q.layout, shape)
    np.testing.assert_array_equal(lj.dequantize(q), expected)
    np.testing.assert_array_equal(jax.jit(lambda q: -lj.dequantize(q))(q), -expected)

    # The nearest level of the block's largest magnitude, whatever row a value is in.
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32).astype(np.float64)
    w = reference.matrix(w, q.layout).reshape(*q.batch_shape, -1)
    padding = [(0, 0)] * (w.ndim - 1) + [(0, -w.shape[-1] % 64)]
    blocks = np.pad(w, padding).reshape(*q.batch_shape, -1, 64)
    absmax = np.abs(blocks).max(-1, keepdims=True)
    levels = reference.LEVELS[kind][1:] if kind == "int4" else reference.LEVELS[kind]
    scaled = (blocks / absmax).reshape(*q.batch_shape, -1)[..., : w.shape[-1], None]
    chosen = reference.LEVELS[kind][reference.unpack(q.codes)][..., 0, : w.shape[-1]]
    error = np.abs(chosen - scaled[..., 0])
    np.testing.assert_allclose(error, np.abs(levels - scaled).min(-1), atol=2e-7)
    if not double_quant:
        np.testing.assert_array_equal(q.scales[..., 0, :], absmax[..., 0].astype(np.float32))


def test_half_precision():
    q = quantized((9, 100), dtype="bfloat16")
    assert q.dtype == jnp.bfloat16
    np.testing.assert_array_equal(lj.dequantize(q), decoded(q).astype(q.dtype))


def test_rows_that_blocks_divide_are_stored_as_ever():
    """`flat` is leave to run over row ends; the bytes are the same where none is crossed."""
    w = np.random.default_rng(0).normal(size=(6, 128)).astype(np.float32)
    plain, flat = (lj.quantize_array(w, layout="o i", flat=flat) for flat in (False, True))
    assert jax.tree.structure(plain) == jax.tree.structure(flat)
    assert plain.codes.shape == (6, 64)
    assert not plain.is_flat
    jax.tree.map(np.testing.assert_array_equal, plain, flat)


def test_a_stack_is_as_each_of_its_matrices():
    """Under vmap, scan and slices, bit for bit: no static field knows of the leading axes."""
    w = np.random.default_rng(0).normal(size=(3, 301, 100)).astype(np.float32)
    options = {"layout": "o i", "flat": True}
    stacked = lj.quantize_array(w, **options | {"layout": "b o i"})
    mapped = jax.vmap(functools.partial(lj.quantize_array, **options))(w)
    jax.tree.map(np.testing.assert_array_equal, mapped, stacked)
    expected = decoded(stacked)
    _, scanned = jax.lax.scan(lambda _, q: (None, lj.dequantize(q)), None, stacked)
    np.testing.assert_array_equal(scanned, expected)
    np.testing.assert_array_equal(jax.vmap(lj.dequantize)(stacked), expected)
    for index in range(3):
        alone = lj.quantize_array(w[index], **options)
        part = jax.tree.map(lambda x, index=index: x[index], stacked)
        assert jax.tree.structure(alone) == jax.tree.structure(part)
        jax.tree.map(np.testing.assert_array_equal, part, alone)


def test_rows_are_those_of_the_whole():
    q = quantized((30, 100))
    rows = np.array([[0, 29], [7, 7]])
    np.testing.assert_array_equal(jax.jit(decode_rows)(q, rows), decoded(q)[rows])


def look_up(_, w, rows):
    return w[rows]


CASES = {
    "embedding": same("o i", SWAPPED, (np.array([[0, 5], [2, 2]]),), look_up),
    "layers": same("b i o", LAYERS, (X,), lambda np, w, x: np.einsum("bio,ti->bto", w, x)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_adapted(case):
    check_values_and_gradients(case, "flat")


def test_in_every_tree_function(tmp_path):
    case = CASES["layers"]
    base, adapters = trees(case, "flat")
    assert base["w"].is_flat
    report = lj.explain(lambda tree, x: case.fn(tree["w"], x))(lj.combine(base, adapters), X)
    assert report.status("w") == "factored"
    np.testing.assert_allclose(
        lj.merge(base, adapters)["w"],
        reference.dense(base["w"], adapters["w"]),
        rtol=1e-5,
        atol=1e-6,
    )
    count = lj.count_params(base, adapters)
    assert (count.frozen, count.frozen_bytes) == (3 * 32 * 6, base["w"].nbytes)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", base)
        how = ocp.checkpoint_utils.construct_restore_args(base)
        restored = checkpointer.restore(tmp_path / "base", item=base, restore_args=how)
    jax.tree.map(np.testing.assert_array_equal, restored, base)
    lj.save_adapters(tmp_path / "adapters", adapters)
    loaded = lj.load_adapters(tmp_path / "adapters", base)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


def test_abstract():
    w = jax.ShapeDtypeStruct((3, 50, 7), jnp.bfloat16)
    abstract = jax.eval_shape(lambda w: lj.quantize_array(w, layout="b i o", flat=True), w)
    assert (abstract.shape, abstract.codes.shape) == (w.shape, (3, 1, 175))
    dense = jax.eval_shape(lj.dequantize, abstract)
    assert (dense.shape, dense.dtype) == (w.shape, w.dtype)


def test_on_a_mesh():
    """Whole matrices may lie on different devices; one matrix cannot be divided."""
    base = {"w": quantized((4, 50, 6), "b i o")}
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    placed = lj.shard(base, mesh, [("w", P("model"))])
    np.testing.assert_array_equal(lj.dequantize(placed["w"]), lj.dequantize(base["w"]))
    assert lj.shardings(base, mesh, [("w", P())])["w"].codes.is_fully_replicated
    for spec in (P(None, "model"), P(None, None, "model")):
        with pytest.raises(ValueError, match=r"w is stored in blocks of 64 that run over .* of 50"):
            lj.shardings(base, mesh, [("w", spec)])


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((96, 4), "write block_size=32, or write flat=True"),
        ((33, 4), "pattern, or write flat=True"),
    ],
)
def test_is_not_stored_so_unless_asked(shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        lj.quantize({"w": np.ones(shape, np.float32)}, "w")
    assert lj.quantize({"w": np.ones(shape, np.float32)}, "w", flat=True)["w"].is_flat
