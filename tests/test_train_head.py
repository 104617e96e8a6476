"""The loss through every kind of head: in reverse and forward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax as lj
from lora_jax.data import Batch
from lora_jax.models.decoder import Decoder, DecoderConfig
from lora_jax.train import next_token_loss
from lora_jax.train.loss import shifted

pytestmark = pytest.mark.compiled_quickly

HEADS = {
    "plain": (None, [], ()),
    "adapted": (None, [lj.LoraRule("lm_head", rank=4)], ()),
    "in 4 bits": ("lm_head", [], ()),
    "in 4 bits, adapted": ("lm_head", [lj.LoraRule("lm_head", rank=4)], ()),
    "trained whole": (None, [], "lm_head"),
}


@pytest.mark.parametrize(("pattern", "rules", "train"), HEADS.values(), ids=HEADS)
def test_gradient_through_every_head(pattern, rules, train):
    """As through the whole logits; where the head is a plain array, a rule of its own is used."""
    config = DecoderConfig(
        *(160, 64, 64, 1, 2, 1, 32),  # vocabulary, widths, layers, heads
        scan_layers=False,
    )
    model, key = Decoder(config), jax.random.key(0)
    tokens = jax.random.randint(key, (2, 12), 0, 160)
    params = model.init(key, tokens)["params"]
    weights = (jax.random.uniform(key, tokens.shape) > 0.3).astype(jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    batch = Batch(tokens, weights, positions, jnp.ones((2, 12), jnp.int32))
    base = lj.quantize(params, pattern) if pattern else params
    rules = [*rules, lj.LoraRule("q_proj/kernel", rank=2)]
    adapters = lj.init_adapters(key, base, rules, train=train)
    adapters = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(key, x.shape), adapters)
    of_batch = next_token_loss(model, chunk=8)

    def whole(adapters):
        logits = lj.adapt(model.apply)({"params": lj.combine(base, adapters)}, tokens)
        targets, weights = shifted(batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return (losses * weights).sum() / weights.sum()

    got, wanted = (
        jax.jit(jax.value_and_grad(fn))(adapters)
        for fn in (lambda adapters: of_batch(adapters, base, batch)[0], whole)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert jnp.abs(a - b).max() <= 1e-5 * jnp.abs(b).max()
    direction = jax.tree.map(jnp.cos, adapters)
    forward = jax.jvp(
        lambda adapters: of_batch(adapters, base, batch)[0], (adapters,), (direction,)
    )
    products = jax.tree.map(jnp.vdot, wanted[1], direction)
    assert forward[1] == pytest.approx(float(sum(jax.tree.leaves(products))), rel=1e-4)
