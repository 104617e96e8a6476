"""A linear model with one adapter: the smallest thing that can be trained, and its calculus."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj

SCALE = 1.5


def make(dropout: float = 0.0) -> tuple[Any, Any]:
    """A base and adapters."""
    rng = np.random.default_rng(0)
    base = {"w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
    rule = lj.LoraRule("w", rank=2, alpha=2 * SCALE, dropout=dropout)
    return base, lj.init_adapters(jax.random.key(0), base, [rule])


def batches(number: int, rows: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [
        {
            "x": rng.normal(size=(rows, 6)).astype(np.float32),
            "y": rng.normal(size=(rows, 5)).astype(np.float32),
            "weight": rng.choice([0.0, 0.5, 1.0, 2.0], rows).astype(np.float32),
        }
        for _ in range(number)
    ]


def loss_fn(adapters: Any, base: Any, batch: Any, key: Any) -> Any:
    """Weighted mean of squared errors, and numbers beside it."""

    def squared(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.square(x @ params["w"] - y).sum(-1)

    tree = lj.combine(base, adapters, dropout_key=key)
    errors = lj.adapt(squared)(tree, batch["x"], batch["y"])
    weight = batch["weight"].sum()
    loss = (errors * batch["weight"]).sum() / weight
    return loss, {"weight": weight, "mean_x": (batch["x"].sum(-1) * batch["weight"]).sum() / weight}


def in_numpy(w: Any, a: Any, b: Any, batch: Any) -> tuple[float, Any, Any]:
    """Loss and its gradients by a and b, in float64."""
    x, y, weight = (np.float64(batch[name]) for name in ("x", "y", "weight"))
    error = x @ (w + SCALE * (b @ a).T) - y  # w is [in, out], b @ a is [out, in]
    share = weight / weight.sum()
    slope = x.T @ (2 * error * share[:, None])  # of the loss by w
    loss = ((error**2).sum(-1) * share).sum()
    return loss, SCALE * b.T @ slope.T, SCALE * slope.T @ a.T
