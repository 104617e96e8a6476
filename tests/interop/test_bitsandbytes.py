"""4-bit codes and decoding against bitsandbytes 0.50, value for value on ten million of them."""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lora_jax as lj
from lora_jax.core.codebooks import scale_codebook


@pytest.fixture(scope="module")
def gaussian():
    return np.random.default_rng(0).standard_normal((9_766, 1_024), np.float32)  # 10,000,384


def both(w: np.ndarray, dtype: str) -> tuple[jax.Array, torch.Tensor]:
    return jnp.asarray(w).astype(dtype), torch.from_numpy(w).to(getattr(torch, dtype))


def of_torch(x: torch.Tensor) -> np.ndarray:
    return (
        x.view(torch.uint16).numpy().view(jnp.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ten_million_values(gaussian, dtype, kind):
    ours, theirs = both(gaussian, dtype)
    codes, plain = bnb.quantize_4bit(theirs, quant_type=kind, compress_statistics=False)
    q = lj.quantize_array(ours, kind, layout="o i", double_quant=False)
    assert np.count_nonzero(np.asarray(q.codes).ravel() != codes.numpy().ravel()) == 0
    np.testing.assert_array_equal(np.ravel(q.scales), plain.absmax.numpy())
    # Of double quantization the decoding of its bytes is promised, not the bytes themselves.
    _, nested = bnb.quantize_4bit(theirs, quant_type=kind, compress_statistics=True)
    q = lj.QuantizedArray(
        q.codes,
        jnp.asarray(nested.absmax.numpy()).reshape(q.scales.shape),
        jnp.asarray(nested.state2.absmax.numpy()),
        jnp.asarray(nested.offset.numpy()),
        kind=kind,
        dtype=q.dtype,
        layout="o i",
        axis_sizes=q.axis_sizes,
    )
    expected = of_torch(bnb.dequantize_4bit(codes, nested))
    np.testing.assert_array_equal(np.asarray(lj.dequantize(q)), expected)
    np.testing.assert_array_equal(np.asarray(jax.jit(lj.dequantize)(q)), expected)
    with jax.disable_jit():
        np.testing.assert_array_equal(np.asarray(lj.dequantize(q)), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_block_sizes(block_size, kind):
    w = np.random.default_rng(1).standard_normal((48, 4096), np.float32)
    codes, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=block_size, quant_type=kind)
    q = lj.quantize_array(w, kind, block_size=block_size, layout="o i", double_quant=False)
    np.testing.assert_array_equal(np.ravel(q.codes), codes.numpy().ravel())
    np.testing.assert_array_equal(np.ravel(q.scales), state.absmax.numpy())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_ties_and_their_neighbours(kind):
    """Values on the middle between two levels, and one float32 to either side of it."""
    levels = np.unique(bnb.get_4bit_type(kind, device="cpu").numpy())
    middles = (levels[1:] + levels[:-1]) / np.float32(2)
    towards = [np.nextafter(middles, np.float32(x)) for x in (-np.inf, np.inf)]
    for absmax in (1.0, 0.5, 3.0, 0.1):
        w = np.zeros(64, np.float32)
        w[: 3 * middles.size] = np.concatenate([middles, *towards]) * np.float32(absmax)
        w[-1] = absmax
        codes, _ = bnb.quantize_4bit(torch.from_numpy(w[None]), quant_type=kind)
        q = lj.quantize_array(w[None], kind, layout="o i")
        np.testing.assert_array_equal(np.ravel(q.codes), codes.numpy().ravel())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_zeros(kind):
    codes, _ = bnb.quantize_4bit(torch.zeros(4, 64), quant_type=kind)
    q = lj.quantize_array(jnp.zeros((4, 64)), kind, layout="o i")
    np.testing.assert_array_equal(np.ravel(q.codes), codes.numpy().ravel())


def test_scale_levels():
    np.testing.assert_array_equal(scale_codebook(), bnb.create_dynamic_map().numpy())
