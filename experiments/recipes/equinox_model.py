"""An adapter for an Equinox model, in the same loop: nothing in it knows what a language model is.

A network that has learned to tell two spirals apart meets them turned by 90 degrees. Its 4-bit
weights stay as they are; an adapter of 644 numbers learns the turn. Equinox keeps weights as
`[out, in]`, hence the layout; `eqx.partition` takes the activation function out of the tree, for
`jax.jit` wants arrays.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj

MODEL = eqx.nn.MLP(2, "scalar", 64, 3, activation=jnp.sin, key=jax.random.key(0))
PARAMS, STATIC = eqx.partition(MODEL, eqx.is_array)
apply = lj.adapt(lambda params, x: jax.vmap(eqx.combine(params, STATIC))(x))


def loss_fn(adapters, base, batch, key):
    """The loss, and the share of points on the right side."""
    points, label = batch  # [B, 2], [B]
    logits = apply(lj.combine(base, adapters), points)  # [B]
    losses = optax.sigmoid_binary_cross_entropy(logits, label)
    return losses.mean(), {"accuracy": ((logits > 0) == label).mean()}


def spirals(rng, turn, rows=256):
    """Points of two spirals that are turned by `turn` radians, [B, 2], and which spiral, [B]."""
    label, radius = rng.integers(2, size=rows), rng.uniform(0.3, 2, rows)
    angle = 3 * radius + np.pi * label + turn
    points = np.stack([np.cos(angle), np.sin(angle)], -1) * radius[:, None]
    return (points + rng.normal(0, 0.05, (rows, 2))).astype(np.float32), label


def fit(base, adapters, turn, steps):
    """The adapters after training on turned spirals."""
    rng, key = np.random.default_rng(0), jax.random.key(1)
    batches = (spirals(rng, turn) for _ in range(steps))
    tx = optax.adam(3e-3)
    return lj.train.fit(loss_fn, base, adapters, tx, batches, key=key, steps=steps).adapters


def main(steps=300):
    """Trains a network, then its adapter; returns accuracies on the turned spirals."""
    everything = lj.init_adapters(jax.random.key(2), PARAMS, [], train="")  # no LoRA: all of it
    pretrained = lj.merge(PARAMS, fit(PARAMS, everything, 0.0, steps))
    base = lj.quantize(pretrained, r"layers/[12]/weight", layout="o i")
    rule = lj.LoraRule(r"layers/[012]/weight", rank=2, layout="o i")
    adapters = lj.init_adapters(jax.random.key(3), base, rule)
    trained = fit(base, adapters, np.pi / 2, steps)
    turned = spirals(np.random.default_rng(1), np.pi / 2)
    accuracy = jax.jit(lambda adapters: loss_fn(adapters, base, turned, None)[1]["accuracy"])
    before, after = accuracy(adapters), accuracy(trained)
    print(f"turned points on the right spiral: {before:.1%} -> {after:.1%}")
    return before, after


if __name__ == "__main__":
    main()
