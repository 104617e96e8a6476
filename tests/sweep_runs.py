"""A network of two matrices for sweeps, and the loop that trains one of its runs alone."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj

IN, HIDDEN, OUT, ROWS = 8, 12, 4, 6


@dataclasses.dataclass(frozen=True)
class Run:
    rank: int = 2
    alpha: float = 4.0
    rslora: bool = False
    dropout: float = 0.0
    targets: str = "kernel"
    init_scale: float = 1.0
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    warmup: int = 4
    seed: int = 0


def make_base(dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(0)
    kernel = lambda *shape: jnp.asarray(rng.normal(size=shape) / 3, dtype)  # noqa: E731
    return {"up": {"kernel": kernel(IN, HIDDEN)}, "down": {"kernel": kernel(HIDDEN, OUT)}}


@lj.adapt
def network(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def loss_fn(adapters: Any, base: Any, batch: Any, key: Any) -> Any:
    x, y = batch
    return ((network(lj.combine(base, adapters, dropout_key=key), x) - y) ** 2).mean()


def maker(base: Any, dtype: Any = jnp.float32) -> Any:
    """`make_adapters`, whose B is no zero, so that every gradient has something to say at once."""

    @functools.partial(jax.jit, static_argnums=0)
    def made(run: Run) -> Any:
        options = {"alpha": run.alpha, "rslora": run.rslora, "dropout": run.dropout}
        rule = lj.LoraRule(run.targets, rank=run.rank, **options)
        adapters = lj.init_adapters(jax.random.key(run.seed), base, rule, dtype=dtype)
        return jax.tree.map(lambda x: run.init_scale * (x + 0.1 * (x == 0)), adapters)

    # One program, where eagerly it is ten, for all runs that differ in their optimizer alone.
    return lambda run: made(dataclasses.replace(run, learning_rate=0.0, weight_decay=0.0, warmup=1))


def make_tx(run: Run) -> optax.GradientTransformation:
    rate = lambda step: run.learning_rate * jnp.minimum(1, (step + 1) / run.warmup)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(rate, weight_decay=run.weight_decay)
    )


def sgd(run: Run) -> optax.GradientTransformation:
    """Where it does not matter which optimizer it is."""
    return optax.sgd(run.learning_rate)


def make_key(run: Run) -> jax.Array:
    return jax.random.key(run.seed + 100)


def batches(steps: int, seed: int = 0, dtype: Any = np.float32) -> list[Any]:
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.normal(size=(ROWS, n)).astype(dtype)  # noqa: E731
    return [(draw(IN), draw(OUT)) for _ in range(steps)]


def train_alone(
    loss_fn: Any, base: Any, adapters: Any, tx: Any, key: jax.Array, data: Any
) -> tuple[Any, list[Any]]:
    """Adapters and metrics of the README's loop, in which there is nothing of a sweep."""

    def with_metrics(adapters, batch, key):
        result = loss_fn(adapters, base, batch, key)
        return result if isinstance(result, tuple) else (result, {})

    @jax.jit
    def train_step(adapters, opt_state, batch, step):
        # The key of a step is that of `lj.train`.
        step_key = jax.random.split(jax.random.fold_in(key, step))[1]
        gradient = jax.value_and_grad(with_metrics, has_aux=True)
        (loss, metrics), grads = gradient(adapters, batch, step_key)
        updates, opt_state = tx.update(grads, opt_state, adapters)
        row = {**metrics, "loss": loss, "grad_norm": optax.tree.norm(grads)}
        return optax.apply_updates(adapters, updates), opt_state, row

    opt_state, rows = jax.jit(tx.init)(adapters), []
    for step, batch in enumerate(data):
        adapters, opt_state, row = train_step(adapters, opt_state, batch, step)
        rows.append({name: float(x) for name, x in row.items()})
    return adapters, rows


def assert_as_alone(fitted: Any, alone: tuple[Any, list[Any]], rel: float) -> None:
    """The metrics of each step, and the adapters after the last one."""
    adapters, rows = alone
    found = [(step, metrics) for step, metrics in fitted.history if "loss" in metrics]
    assert [step for step, _ in found] == list(range(1, len(rows) + 1))
    for (_, metrics), row in zip(found, rows, strict=True):
        assert metrics == pytest.approx(row, rel=rel)
    assert_trees_close(fitted.last, adapters, rel)


def assert_trees_close(actual: Any, expected: Any, rel: float) -> None:
    """To a share of the largest entry of each leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rel * np.abs(y).max())
