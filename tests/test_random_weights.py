"""Random weights made packed: the tree that quantizing would give, and values of their size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder, by_layout, parameter_shapes
from lora_jax.models.random_weights import KERNELS, random_base

pytestmark = pytest.mark.compiled_quickly

CONFIG = DecoderConfig(
    vocab_size=96,
    dim=64,
    mlp_dim=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    dtype=jnp.bfloat16,
    param_dtype=jnp.bfloat16,
)
EXPERTS = dataclasses.replace(CONFIG, num_experts=3, experts_per_token=2)
KINDS = [("nf4", 64, True), ("int4", 32, False), ("q4_0", 32, False), ("q4_1", 32, False)]


@pytest.mark.parametrize(("kind", "block_size", "double_quant"), KINDS, ids=[k[0] for k in KINDS])
@pytest.mark.parametrize("config", [CONFIG, EXPERTS], ids=["dense", "experts"])
def test_as_quantized(config, kind, block_size, double_quant):
    options = {"block_size": block_size, "double_quant": double_quant}
    base = random_base(jax.random.key(0), config, kind, **options)

    def quantized(params):
        for layout, pattern in by_layout(KERNELS, params).items():
            params = lj.quantize(params, pattern, kind=kind, layout=layout, **options)
        return params

    like = jax.eval_shape(quantized, parameter_shapes(config))
    assert jax.tree.structure(base) == jax.tree.structure(like)
    for made, wanted in zip(jax.tree.leaves(base), jax.tree.leaves(like), strict=True):
        assert (made.shape, made.dtype) == (wanted.shape, wanted.dtype)
    up = base["layers"]["mlp"]["experts" if config.num_experts else "up_proj"]
    up = up["up_proj"] if config.num_experts else up
    assert np.std(np.asarray(lj.dequantize(up["kernel"]), np.float32)) == pytest.approx(
        0.02, rel=0.1
    )


def test_runs_and_repeats():
    """The same key gives the same weights, another key others; the model runs on them."""
    base, again, other = (random_base(jax.random.key(k), CONFIG) for k in (0, 0, 1))
    same = [bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (base, again)), strict=True)]
    assert all(same)
    kernel = lambda base: base["layers"]["mlp"]["up_proj"]["kernel"].codes  # noqa: E731
    assert (kernel(base) != kernel(other)).any()
    assert (kernel(base)[0] != kernel(base)[1]).any()
    logits = lj.adapt(Decoder(CONFIG).apply)({"params": base}, jnp.zeros((1, 8), int))
    assert jnp.isfinite(logits).all()
