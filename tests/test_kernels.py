"""The GPU kernels, interpreted on the CPU, against the XLA path; and which of the two is taken.

What the interpreter cannot run, the look-up in assembly, is run by an interpreter of its own. The
XLA path itself is compared with bitsandbytes and GGUF elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax import kernels
from lora_jax.core.codebooks import KINDS, codebook
from lora_jax.kernels import dispatch, gpu, xla
from lora_jax.kernels.lookup import lane_assembly

RNG = np.random.default_rng(5)


def weight(
    kind: str, block: int, double: bool, shape: tuple[int, ...], dtype: str
) -> lj.QuantizedArray:
    """A quantized normal matrix, or a stack of them."""
    w = jnp.asarray(RNG.normal(size=shape)).astype(dtype)
    layout = " ".join(["b"] * (len(shape) - 2) + ["o", "i"])
    return lj.quantize_array(w, kind, block_size=block, double_quant=double, layout=layout)


def assert_same_bits(got: jax.Array, want: jax.Array) -> None:
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8))


def wide(q: lj.QuantizedArray) -> np.ndarray:
    """The values before they are rounded to the weight's dtype, in float64."""
    return np.asarray(xla.decode(dataclasses.replace(q, dtype=np.dtype(np.float32))), np.float64)


def distance(got: jax.Array, want: np.ndarray) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


# Rows that do not fill the last tile, rows of a single block, several kinds of scales.
WEIGHTS = [
    ("nf4", 64, True, (100, 192), "bfloat16"),
    ("fp4", 32, True, (300, 32), "float32"),
    ("int4", 128, False, (70, 256), "float16"),
    ("af4", 64, False, (64, 64), "bfloat16"),
    ("q4_0", 32, False, (33, 96), "bfloat16"),
    ("q4_1", 256, False, (16, 512), "float32"),
]


@pytest.mark.parametrize("case", WEIGHTS, ids=lambda case: case[0])
def test_decode_gives_the_same_bits(case):
    q = weight(*case)
    with kernels.use("pallas"):
        assert_same_bits(kernels.decode(q), xla.decode(q))


@pytest.mark.parametrize(("number", "rank"), [(0, 8), (2, 20), (5, 1)])
def test_folded_update(number, rank):
    q = weight(*WEIGHTS[number])
    out, inn = q.matrix_shape
    a, b = jnp.asarray(RNG.normal(size=(rank, inn))), jnp.asarray(RNG.normal(size=(out, rank)))
    with kernels.use("pallas"):
        got = kernels.decode_folded(q, a, b, 0.5, np.float32)
        start = kernels.decode_folded(q, a, 0 * b, 0.5)
    update = 0.5 * np.asarray(b, np.float64) @ np.asarray(a, np.float64)
    assert distance(got, wide(q) + update) < 5e-4
    assert distance(np.asarray(got, np.float64) - wide(q), update) < 1e-3
    assert_same_bits(start, xla.decode(q))


def test_folded_update_keeps_the_sign_of_zero():
    q = weight("q4_0", 32, False, (32, 32), "float32")
    q = dataclasses.replace(q, codes=jnp.full_like(q.codes, 0x88), scales=-jnp.abs(q.scales))
    a, b = jnp.ones((4, 32)), jnp.zeros((32, 4))
    assert np.signbit(np.asarray(xla.decode(q))).all()
    for path in ("xla", "pallas"):
        with kernels.use(path):
            assert_same_bits(kernels.decode_folded(q, a, b, 1.0), xla.decode(q))


@pytest.mark.parametrize(
    ("number", "rows", "dtype"),
    [(0, (), None), (0, (2, 3), "float32"), (3, (17,), None), (4, (1,), None), (2, (64,), None)],
)
def test_product_of_few_rows(number, rows, dtype):
    q = weight(*WEIGHTS[number])
    x = jnp.asarray(RNG.normal(size=(*rows, q.matrix_shape[1]))).astype(q.dtype)
    with kernels.use("pallas"):
        got = kernels.matmul(x, q, dtype)
    assert got.dtype == np.dtype(dtype or q.dtype)
    want = np.asarray(x, np.float64) @ wide(q).T
    assert got.shape == want.shape
    # Levels are rounded to x's 16 bits, and so is the result unless it is asked for in float32.
    assert distance(got, want) < 4e-3
    with kernels.use("xla"):
        assert distance(kernels.matmul(x, q, dtype), want) < 4e-3


@pytest.mark.parametrize("tiling", [gpu.Tiling(64, 2), gpu.Tiling(32, 4, 2)])
@pytest.mark.parametrize("product", [gpu.matmul, gpu.matvec])
def test_other_tilings_of_the_product(tiling, product):
    q = weight("nf4", 64, True, (80, 512), "bfloat16")
    x = jnp.asarray(RNG.normal(size=(3, 512)), jnp.bfloat16)
    run = functools.partial(product, dtype=jnp.float32, tiling=tiling, interpret=True)
    assert distance(jax.jit(run)(x, q), np.asarray(x, np.float64) @ wide(q).T) < 3e-3


def test_batch_axes_and_vmap():
    q = weight("nf4", 64, True, (2, 16, 64), "bfloat16")
    one = jax.tree.map(lambda leaf: leaf[0], q)
    x = jnp.asarray(RNG.normal(size=(2, 3, 64)), jnp.bfloat16)
    ab = [jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((2, 4, 64), (2, 16, 4))]
    scales = jnp.asarray([0.5, 2.0])

    @jax.jit
    def run(q, x):
        scanned = jax.lax.scan(lambda carry, q: (carry, kernels.decode(q)), None, q)[1]
        of_one = jax.vmap(kernels.matmul, (0, None))(x, one)
        folded = jax.vmap(kernels.decode_folded)(q, *ab, scales)
        return scanned, jax.vmap(kernels.decode)(q), kernels.matmul(x, q), of_one, folded

    with kernels.use("pallas"):
        scanned, mapped, product, of_one, folded = run(q, x)
    for values in (scanned, mapped):
        assert_same_bits(values, xla.decode(q))
    assert distance(product, np.einsum("bmi,boi->bmo", np.float64(x), wide(q))) < 4e-3
    assert distance(of_one, np.einsum("bmi,oi->bmo", np.float64(x), wide(one))) < 4e-3
    update = np.einsum("b,bor,bri->boi", *map(np.float64, (scales, ab[1], ab[0])))
    assert distance(folded, wide(q) + update) < 3e-3


def test_gradients_do_not_need_the_decoded_weight():
    q = weight("nf4", 64, True, (48, 128), "bfloat16")
    x = jnp.asarray(RNG.normal(size=(3, 128)), jnp.bfloat16)
    dy = jnp.asarray(RNG.normal(size=(3, 48)), jnp.bfloat16)
    dense = np.asarray(xla.decode(q), np.float64)
    for path in ("xla", "pallas"):
        with kernels.use(path):
            _, pullback = jax.vjp(lambda x: kernels.matmul(x, q), x)
            (dx,) = pullback(dy)
        assert distance(dx, np.asarray(dy, np.float64) @ dense) < 4e-3
        residuals = [leaf.shape for leaf in jax.tree.leaves(pullback) if leaf.ndim]
        assert not [shape for shape in residuals if np.prod(shape) == q.size], residuals


def test_gradients_of_an_update_that_is_zero():
    q = weight("nf4", 64, True, (48, 64), "float32")
    a, b = jnp.asarray(RNG.normal(size=(4, 64)), jnp.float32), jnp.zeros((48, 4))

    def loss(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.square(kernels.decode_folded(q, a, b, 0.5)).sum()

    for path in ("xla", "auto"):
        with kernels.use(path):
            of_a, of_b = jax.grad(loss, (0, 1))(a, b)
        assert not np.any(np.asarray(of_a))
        assert distance(of_b, wide(q) @ np.asarray(a, np.float64).T) < 1e-5


# The look-up in assembly.


def run_assembly(text: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """What a warp of 32 threads computes: registers are arrays of one word a thread."""
    values = {f"${outputs + k}": words for k, words in enumerate(inputs)}
    values["%laneid"] = np.arange(32, dtype=np.uint32)

    def read(name: str) -> np.ndarray:
        return values[name] if name in values else np.full(32, int(name, 0), np.uint32)

    body = re.fullmatch(r"\{ (?:\.reg \.(?:pred|b32) [\w, ]+; )+(.*) \}", text)
    assert body
    for line in filter(None, body[1].split(";")):
        operation, operands = line.split(maxsplit=1)
        result, *names = operands.replace(" ", "").split(",")
        x, y, z, last = (*map(read, names), *[read("0")] * 4)[:4]
        if operation == "mov.u32":
            value = x
        elif operation == "shr.u32":
            value = x >> y
        elif operation == "and.b32":
            value = x & y
        elif operation == "setp.ne.u32":
            value = (x != y).astype(np.uint32)
        elif operation == "selp.b32":
            value = np.where(z != 0, x, y)
        elif operation == "shfl.sync.idx.b32":
            assert set(last) == {0xFFFFFFFF}
            lane, segment = np.arange(32, dtype=np.uint32), z >> 8 & 31
            source = (lane & segment) | (y & 31 & ~segment)
            assert (source <= ((lane & segment) | (z & 31 & ~segment))).all()
            value = x[source]
        else:
            assert operation == "prmt.b32"
            source = np.stack([v >> 8 * k & 0xFF for v in (x, y) for k in range(4)])
            value = np.zeros(32, np.uint32)
            for k in range(4):
                chosen = source[z >> 4 * k & 7, np.arange(32)]
                value |= np.where(z >> 4 * k & 8, 0xFF * (chosen >> 7), chosen) << 8 * k
        values[result] = value.astype(np.uint32)
    return [values[f"${k}"] for k in range(outputs)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32], ids=str)
def test_lookup_in_assembly(kind, dtype):
    levels = codebook(kind, 64).astype(dtype)
    size = levels.dtype.itemsize
    fours = RNG.integers(0, 256, (32, 4), dtype=np.uint8)
    for nibble, shift in (("high", 4), ("low", 0)):
        text = lane_assembly(levels.tobytes(), size, nibble)
        found = run_assembly(text, [fours.view("<u4")[:, 0]], size)
        want = levels[(fours >> shift) & 15]
        assert np.stack(found, axis=1).tobytes() == want.tobytes()


# The choice.


def text_for(platform: str, fn, *args) -> str:
    """The program that JAX gives to XLA for another platform."""
    traced = jax.jit(lambda *args: fn(*args)).trace(*args)  # anew: the platform's GPUs may differ
    return traced.lower(lowering_platforms=(platform,)).as_text()


def operations():
    """Each operation and its arguments."""
    q = weight("nf4", 64, True, (48, 128), "bfloat16")
    x = jnp.ones((3, 128), jnp.bfloat16)
    return [
        (kernels.decode, (q,)),
        (kernels.matmul, (x, q)),
        (kernels.decode_folded, (q, jnp.ones((4, 128)), jnp.ones((48, 4)), 1.0)),
    ]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_programs_exported_without_a_gpu_have_no_kernel(platform):
    for fn, args in operations():
        exported = jax.export.export(jax.jit(fn), platforms=(platform,))(*args)
        assert exported.platforms == (platform,)
        assert "triton" not in exported.mlir_module()


def test_kernels_are_for_one_modern_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_kernels", lambda: True)
    for fn, args in operations():
        assert "triton" in text_for("cuda", fn, *args)
        assert "triton" not in text_for("tpu", fn, *args)
        with kernels.use("xla"):
            assert "triton" not in text_for("cuda", fn, *args)
    (q,) = operations()[0][1]
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("d"))
    q = dataclasses.replace(
        q, **{k: jax.device_put(getattr(q, k), rows) for k in ("codes", "scales")}
    )
    assert "triton" not in text_for("cuda", kernels.decode, q)

    def local(codes: jax.Array, scales: jax.Array) -> jax.Array:
        part = dataclasses.replace(
            q, codes=codes, scales=scales, group_scales=q.group_scales[:1], axis_sizes=(24, 128)
        )
        return kernels.decode(part)

    spec = PartitionSpec("d")
    whole = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    assert "triton" in text_for("cuda", whole, q.codes, q.scales)


def test_older_gpus_and_other_shapes_take_the_xla_path(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_kernels", lambda: False)
    for fn, args in operations():
        assert "triton" not in text_for("cuda", fn, *args)
    monkeypatch.setattr(dispatch, "_has_kernels", lambda: True)
    many = jnp.ones((65, 128), jnp.bfloat16)
    q = operations()[0][1][0]
    assert text_for("cuda", kernels.matmul, many, q).count("triton") == 1  # decoding alone
    flat = lj.quantize_array(jnp.ones((8, 40)), "nf4", block_size=64, layout="o i", flat=True)
    assert "triton" not in text_for("cuda", kernels.decode, flat)


def test_sharded_weights_are_decoded_where_they_lie():
    q = weight("nf4", 64, True, (64, 128), "float32")
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("d"))
    placed = dataclasses.replace(
        q, **{k: jax.device_put(getattr(q, k), rows) for k in ("codes", "scales")}
    )
    program = jax.jit(kernels.decode).lower(placed).compile()
    assert not re.search("all-gather|all-to-all|collective", program.as_text())
    assert_same_bits(program(placed), xla.decode(q))


def test_use_is_part_of_the_key_of_jit():
    q = weight("nf4", 64, True, (48, 128), "bfloat16")
    traced = []

    @jax.jit
    def fn(q):
        traced.append(dispatch._path.value)
        return kernels.decode(q)

    fn(q)
    with kernels.use("xla"):
        fn(q)
        fn(q)
    fn(q)
    assert traced == ["auto", "xla"]


def test_what_cannot_be_forced():
    q = weight("nf4", 64, True, (48, 128), "bfloat16")
    with kernels.use("pallas"):
        with pytest.raises(ValueError, match=r"decode_matmul does not take 65 rows of x.*\"auto\""):
            kernels.matmul(jnp.ones((65, 128), jnp.bfloat16), q)
        with pytest.raises(ValueError, match=r"does not take x in float32"):
            kernels.matmul(jnp.ones((2, 128)), q)
        with pytest.raises(ValueError, match=r"decode has no Pallas kernel for tpu.*\"auto\""):
            text_for("tpu", kernels.decode, q)
    with pytest.raises(ValueError, match=r"path 'triton' is unknown; write one of 'auto', 'xla'"):
        kernels.use("triton")
