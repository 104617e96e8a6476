"""State dicts of bitsandbytes 0.50, and ours: the same bits from the same bytes, both ways.

bitsandbytes on a CPU has several kernels, which do not always agree with one another:
  - With AVX-512 and rows that 16 divides and the block size does not, it takes the scales of other
    blocks than those it quantized with. The same bytes seen as a single row it decodes rightly.
  - Without AVX-512, or where rows are even and 16 does not divide them, fp4's code 8 becomes -0.0;
    in its other kernels, as in its codebook, it is 0.0.
"""

from __future__ import annotations

import bitsandbytes as bnb
import bitsandbytes.functional as functional
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes_weights import bits, in_numpy, random_state

import lora_jax as lj
from lora_jax.formats.bitsandbytes import from_tensors, to_tensors


def decoded(codes: torch.Tensor, state: functional.QuantState) -> np.ndarray:
    """What bitsandbytes decodes it to, where its kernels agree with its codebook and encoding."""
    out, inn = state.shape
    if inn % 16 == 0 and inn % state.blocksize:
        state.shape = torch.Size((1, out * inn))
    values = in_numpy(functional.dequantize_4bit(codes, state)).ravel()
    state.shape = torch.Size((out, inn))
    if state.quant_type == "fp4":
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        nibbles = np.ascontiguousarray(in_numpy(codes)).view(np.uint8).ravel()
        eights = np.stack([nibbles >> 4, nibbles & 15], -1).ravel()[: out * inn] == 8
        zeros = (state.code[8] * scales).numpy().repeat(state.blocksize)[: out * inn]
        values = np.where(eights, zeros.astype(values.dtype), values)
    return values.reshape(out, inn)


@pytest.mark.parametrize("batch", range(10))
def test_two_hundred_random_weights(batch):
    differences = crossing = odd = 0
    for seed in range(20 * batch, 20 * batch + 20):
        codes, state, tensors = random_state(seed)
        q = from_tensors(tensors)
        ours = jax.jit(lj.dequantize)(q)
        theirs = decoded(codes, state)
        assert ours.dtype == theirs.dtype
        differences += np.count_nonzero(bits(ours) != bits(theirs))
        crossing += q.is_flat
        odd += q.size % 2

        written = to_tensors(q)
        assert set(written) == set(tensors)
        linear = bnb.nn.Linear4bit(q.shape[1], q.shape[0], bias=False, device="cpu")
        stats = {name: torch.tensor(values) for name, values in written.items()}
        linear.weight = bnb.nn.Params4bit.from_prequantized(
            stats.pop("weight"), stats, device="cpu", module=linear
        )
        again = decoded(linear.weight.data, linear.weight.quant_state)
        differences += np.count_nonzero(bits(again) != bits(theirs))
    assert differences == 0
    assert crossing >= 5
    assert odd >= 1


def test_what_we_quantize_they_decode():
    """Codes and scales of ours, blocks over row ends and an incomplete last one among them."""
    for shape, kind, dtype in [((33, 130), "nf4", "float32"), ((7, 65), "fp4", "bfloat16")]:
        w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        theirs = torch.from_numpy(w).to(getattr(torch, dtype))
        codes, state = functional.quantize_4bit(theirs, quant_type=kind, compress_statistics=False)
        options = {"kind": kind, "layout": "o i", "flat": True}
        plain = lj.quantize_array(jnp.asarray(w).astype(dtype), double_quant=False, **options)
        np.testing.assert_array_equal(np.ravel(plain.codes), codes.numpy().ravel())
        np.testing.assert_array_equal(np.ravel(plain.scales), state.absmax.numpy())
        q = lj.quantize_array(jnp.asarray(w).astype(dtype), **options)
        stats = {name: torch.tensor(values) for name, values in to_tensors(q).items()}
        weight = bnb.nn.Params4bit.from_prequantized(stats.pop("weight"), stats, device="cpu")
        theirs = decoded(weight.data, weight.quant_state)
        np.testing.assert_array_equal(bits(jax.jit(lj.dequantize)(q)), bits(theirs))


def test_a_linear_layer():
    """Through `Linear4bit`'s own state dict, and its product."""
    torch.manual_seed(0)
    there = bnb.nn.Linear4bit(128, 24, bias=False, quant_type="nf4", device="cpu")
    there.weight = bnb.nn.Params4bit(there.weight.data, quant_type="nf4").to("cpu")
    state = {name: in_numpy(values) for name, values in there.state_dict().items()}
    q = from_tensors(state)
    x = np.random.default_rng(0).normal(size=(5, 128)).astype(np.float32)
    ours = lj.adapt(lambda w, x: x @ w.T)(q, x)
    np.testing.assert_allclose(ours, there(torch.from_numpy(x)).detach().numpy(), atol=1e-5)
