"""The 4-bit kinds of GGUF against the gguf package, which reads and writes them in NumPy."""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from gguf_blocks import (
    IN,
    KINDS,
    OUT,
    nasty,
    of_blocks,
    random_blocks,
    rows_of,
    stored_as,
    write_blocks,
)
from jax.sharding import AxisType, PartitionSpec

import lora_jax as lj
from lora_jax.kernels import decode_rows, decode_scales


def assert_bits_equal(actual, expected) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_decodes_as_gguf_does(kind):
    """Bit for bit, also where XLA may contract, reassociate, or decode a constant."""
    blocks = random_blocks()
    expected = gguf.dequantize(write_blocks(kind, *blocks), stored_as(kind))
    assert np.isfinite(expected).all()
    q, rows = of_blocks(kind, *blocks), jnp.array([[0, 63], [7, 14]])
    with jax.disable_jit():
        assert_bits_equal(lj.dequantize(q), expected)
        assert_bits_equal(decode_rows(q, rows), expected[rows])
    assert_bits_equal(lj.dequantize(q), expected)
    fused = jax.jit(lambda q, x: (lj.dequantize(q).T, lj.dequantize(q) @ x))
    assert_bits_equal(fused(q, jnp.ones(IN))[0].T, expected)
    constant = jax.jit(lambda: (lj.dequantize(q), decode_rows(q, rows)))()
    assert_bits_equal(constant[0], expected)
    assert_bits_equal(constant[1], expected[rows])
    assert decode_scales(q).dtype == jnp.float32
    for dtype in (jnp.bfloat16, jnp.float16):
        assert_bits_equal(
            lj.dequantize(of_blocks(kind, *blocks, dtype=dtype)),
            jnp.asarray(expected).astype(dtype),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_leading_axes_are_free(kind):
    """Layers that are stacked decode under vmap and scan as each alone."""
    layers = [of_blocks(kind, *random_blocks(seed)) for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    assert stacked.shape == (3, OUT, IN)
    expected = np.stack([lj.dequantize(q) for q in layers])
    assert_bits_equal(lj.dequantize(stacked), expected)
    assert_bits_equal(jax.vmap(lj.dequantize)(stacked), expected)
    assert_bits_equal(jax.lax.scan(lambda c, q: (c, lj.dequantize(q)), 0, stacked)[1], expected)


@pytest.mark.parametrize("gather", [(), ("d",)], ids=["divided", "gathered at use"])
@pytest.mark.parametrize("spec", [("d", None), (None, "d")], ids=["over out", "over in"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_mesh(kind, spec, gather):
    """Scales and minimum lie where their codes do."""
    q = of_blocks(kind, *random_blocks())
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    placed = lj.shard({"w": q}, mesh, [("w", PartitionSpec(*spec))], gather=gather)["w"]
    for x in jax.tree.leaves(placed):
        assert x.addressable_shards[0].data.size == x.size // 4
    assert_bits_equal(jax.jit(lj.dequantize)(placed), lj.dequantize(q))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_encodes_as_gguf_does(kind, dtype):
    """Codes, scales and minimum, eagerly, jitted, and within another program."""
    w = jnp.asarray(nasty()).astype(dtype)
    data = gguf.quantize(np.asarray(w).astype(np.float32), stored_as(kind))
    expected = gguf.dequantize(data, stored_as(kind))
    quantized = functools.partial(lj.quantize_array, kind=kind, block_size=32, layout="o i")
    for run in (quantized, jax.jit(quantized), lambda w: jax.vmap(quantized)(w[None])):
        q = jax.tree.map(lambda x: x.reshape(OUT, -1), run(w))
        assert_bits_equal(rows_of(q), data)
        assert q.dtype == w.dtype
        assert_bits_equal(
            lj.dequantize(q, jnp.float32), jnp.asarray(expected).astype(dtype).astype(jnp.float32)
        )
    with jax.disable_jit():
        eager = quantized(w)
    for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(quantized(w)), strict=True):
        assert_bits_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_below_what_float32_holds(kind):
    """They decode to nothing, and no value becomes NaN on the way."""
    w = np.full((2, 64), 1e-40, np.float32) * np.linspace(-1, 1, 64, dtype=np.float32)
    q = lj.quantize_array(w, kind, block_size=32, layout="o i")
    assert (np.asarray(lj.dequantize(q)) == 0).all()


@pytest.mark.parametrize("block_size", [64, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_other_block_sizes(kind, block_size):
    """No value is further off than half a step and what float16 rounds, but for the sixteenth."""
    w = np.random.default_rng(0).normal(size=(3, block_size, 2)).astype(np.float32)
    q = lj.quantize_array(w, kind, block_size=block_size, layout="b i o")
    error = np.abs(np.asarray(lj.dequantize(q), np.float64) - w)
    largest, spread = np.abs(w).max(1, keepdims=True), np.ptp(w, axis=1, keepdims=True)
    if kind == "q4_1":
        assert (error <= spread / 30 + 2e-3 * spread).all()
    else:  # whose levels end one short of the largest magnitude with the other sign
        assert (error <= largest / 8 * 1.001).all()
        assert np.median(error / largest) < 1 / 24


@pytest.mark.parametrize(("kind", "bits"), [("q4_0", 4.5), ("q4_1", 5.0)])
def test_storage(kind, bits):
    """Never double-quantized, whatever the default; counted as stored."""
    params = {"kernel": jax.ShapeDtypeStruct((3, 64, 96), jnp.bfloat16)}
    quantized = functools.partial(lj.quantize, pattern="kernel", kind=kind, layout="b i o")
    base = jax.eval_shape(functools.partial(quantized, block_size=32), params)
    q = base["kernel"]
    assert (q.scales.dtype, q.group_scales, q.offset) == (jnp.float16, None, None)
    assert 8 * q.nbytes / q.size == bits
    assert lj.count_params(base, None).frozen_bytes == 3 * 64 * 96 * bits / 8
    assert "block_size=32, float16 scales" in repr(q)
    assert (
        8 * jax.eval_shape(quantized, params)["kernel"].nbytes / q.size == (bits + 4) / 2
    )  # of 64


@pytest.mark.parametrize("kind", KINDS)
def test_orbax_keeps_a_base(kind, tmp_path):
    base = {"w": of_blocks(kind, *random_blocks()), "norm": jnp.ones(4)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", base)
        checkpointer.wait_until_finished()
        loaded = checkpointer.restore(tmp_path / "base", base)
    assert jax.tree.structure(loaded) == jax.tree.structure(base)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(base), strict=True):
        assert_bits_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("largest", [65536.0, np.inf, np.nan])
def test_refuses_what_float16_does_not_hold(kind, largest):
    w = np.ones((64, 32), np.float32)
    w[3, 4] = -largest
    with pytest.raises(ValueError, match="head holds values that are NaN, infinite or above 65504"):
        lj.quantize_array(w, kind, block_size=32, name="head")
