"""A network of two matrices for sweeps, and the loop that trains one of its runs alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

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

    def made(run: Run) -> Any:
        options = {"alpha": run.alpha, "rslora": run.rslora, "dropout": run.dropout}
        rule = lj.LoraRule(run.targets, rank=run.rank, **options)
        adapters = lj.init_adapters(jax.random.key(run.seed), base, rule, dtype=dtype)
        return jax.tree.map(lambda x: run.init_scale * (x + 0.1 * (x == 0)), adapters)

    return lambda run: jax.jit(lambda: made(run))()  # one program, where eagerly it is ten


def make_tx(run: Run) -> optax.GradientTransformation:
    rate = lambda step: run.learning_rate * jnp.minimum(1, (step + 1) / run.warmup)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(rate, weight_decay=run.weight_decay)
    )


def make_key(run: Run) -> jax.Array:
    return jax.random.key(run.seed + 100)


def batches(steps: int, seed: int = 0, dtype: Any = np.float32) -> list[Any]:
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.normal(size=(ROWS, n)).astype(dtype)  # noqa: E731
    return [(draw(IN), draw(OUT)) for _ in range(steps)]


def train_alone(run: Run, base: Any, adapters: Any, data: list[Any], tx: Any = None) -> Any:
    """Adapters and losses of the README's loop, in which there is nothing of a sweep."""
    tx = tx or make_tx(run)

    @jax.jit
    def train_step(adapters, opt_state, batch, step):
        # The key of a step is that of `lj.train`.
        key = jax.random.split(jax.random.fold_in(make_key(run), step))[1]
        loss, grads = jax.value_and_grad(loss_fn)(adapters, base, batch, key)
        updates, opt_state = tx.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state, loss

    opt_state, losses = tx.init(adapters), []
    for step, batch in enumerate(data):
        adapters, opt_state, loss = train_step(adapters, opt_state, batch, step)
        losses.append(float(loss))
    return adapters, losses


def losses(fitted: Any) -> list[float]:
    return [metrics["loss"] for _, metrics in fitted.history if "loss" in metrics]
