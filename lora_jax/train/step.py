"""One step of training, as one program: gradient, guard, update.

    step = make_step(loss_fn, tx)
    state = init_state(key, adapters, tx)
    for batch in batches:
        state, metrics = step(state, base, batch)

Shapes: B rows of a batch, k microbatches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.train.loss import LossFn

# From a key and a batch to another batch of the same shapes: noise, masking, augmentation.
Transform = Callable[[jax.Array, Any], Any]
# From a state, the base and a batch to the next state and the step's numbers.
StepFn = Callable[["State", Any, Any], tuple["State", dict[str, jax.Array]]]

COUNTS = ("weight", "tokens")  # metrics that are sums over a batch; all others are means


class State(NamedTuple):
    """What a step changes.

    Invariant: once `diverged` is set nothing else changes any more. So it may be looked at late,
    and a loop need not wait for each step.

    Attributes:
      step: int32 [], steps done.
      adapters: the tree that is trained.
      opt_state: the optimizer's.
      key: PRNG key of the run; step s uses `fold_in(key, s)`.
      last_good: the adapters that gave the last finite loss. An update may be finite and yet lead
        to where the loss is not: then these are the ones before it.
      diverged: bool [], whether a loss or a gradient was not finite.
    """

    step: jax.Array
    adapters: Any
    opt_state: Any
    key: jax.Array
    last_good: Any
    diverged: jax.Array


class Diverged(ArithmeticError):  # noqa: N818 - says what happened, as StopIteration does
    """The loss or its gradient is no longer finite.

    Attributes:
      step: the step whose update was refused, from 1 on.
      adapters: the last ones whose loss was finite; None if none was.
      loss: the loss at that step.
    """

    def __init__(self, step: int, adapters: Any, loss: float):
        super().__init__(
            f"the loss is {loss} at step {step}, or its gradient is not finite; "
            "write a smaller learning rate"
        )
        self.step = step
        self.adapters = adapters
        self.loss = loss


def init_state(key: jax.Array, adapters: Any, tx: optax.GradientTransformation) -> State:
    """The state before the first step.

    Args:
      key: a JAX PRNG key; everything random in the run follows from it.
      adapters: the tree to start from. It is copied, for a step gives its state's memory away.
      tx: the optimizer.

    Returns:
      The state, on the device or devices where the adapters are.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    adapters = jax.tree.map(jnp.copy, adapters)
    state = State(
        step=jnp.zeros((), jnp.int32),
        adapters=adapters,
        opt_state=jax.tree.map(jnp.copy, tx.init(adapters)),
        key=jnp.copy(key),
        last_good=jax.tree.map(jnp.copy, adapters),
        diverged=jnp.zeros((), bool),
    )
    mesh = _mesh_of(adapters)
    if mesh is None:
        return state
    # What lies on one device is compiled for anew once a step has spread it over all of them.
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(
        lambda x: x if len(x.sharding.device_set) > 1 else jax.device_put(x, everywhere), state
    )


def _mesh_of(tree: Any) -> Any:
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)  # a traced array has none
        if isinstance(sharding, jax.sharding.NamedSharding) and len(sharding.device_set) > 1:
            return sharding.mesh
    return None


def make_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    transform: Transform | None = None,
    shardings: Any = None,
) -> StepFn:
    """One step, compiled; it takes over the memory of the state that it is given.

    Args:
      loss_fn: of adapters, base, batch and key, to the loss, or to the loss and a dict of scalars.
      tx: the optimizer of the adapters.
      accumulate: k, in how many parts the batch is run, one after the other, so that it needs the
        memory of one. Every array of the batch is cut along its first axis: part j has the rows
        j, j + k, ..., which leaves rows on the devices where they are. Parts count by their
        "weight" metric if the loss gives one, else equally: with a loss that is a mean over that
        weight, the step equals the step of the whole batch. Metrics are averaged in the same way,
        except for the counts "weight" and "tokens", which are summed.
      transform: from a key and a batch to the batch that is trained on.
      shardings: of the state, such as `jax.tree.map(lambda x: x.sharding, state)`; to be given
        where it lies on several devices, so that the compiler leaves it there.

    Returns:
      A jitted function of state, base and batch, to the next state and the metrics: the loss
      function's own, "loss" and "grad_norm". See `State` for what happens at NaN.

    Raises:
      ValueError: when called, if the batch cannot be cut into k equal parts.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}, expected at least 1")
    step = functools.partial(
        train_step, loss_fn=loss_fn, tx=tx, accumulate=accumulate, transform=transform
    )
    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def train_step(
    state: State,
    base: Any,
    batch: Any,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    transform: Transform | None = None,
) -> tuple[State, dict[str, jax.Array]]:
    """What `make_step` compiles, for steps within a larger program: a pure function."""
    transform_key, loss_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    if transform is not None:
        batch = transform(transform_key, batch)
    gradient = functools.partial(_gradient, loss_fn, state.adapters, base)
    if accumulate == 1:
        loss, metrics, grads = gradient(batch, loss_key)
    else:
        loss, metrics, grads = _accumulated(gradient, batch, loss_key, accumulate)
    norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.adapters)
    adapters = optax.apply_updates(state.adapters, updates)

    loss_is_good = ~state.diverged & jnp.isfinite(loss)
    good = loss_is_good & jnp.isfinite(norm)
    state = State(
        step=state.step + good,
        adapters=_where(good, adapters, state.adapters),
        opt_state=_where(good, opt_state, state.opt_state),
        key=state.key,
        last_good=_where(loss_is_good, state.adapters, state.last_good),
        diverged=~good,
    )
    return state, {**metrics, "loss": loss, "grad_norm": norm}


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def _gradient(
    loss_fn: LossFn, adapters: Any, base: Any, batch: Any, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Loss, metrics, and the gradient by the adapters."""

    def objective(adapters: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        result = loss_fn(adapters, base, batch, key)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        for name, value in metrics.items():
            if jnp.shape(value):
                raise ValueError(
                    f"the metric {name!r} has shape {jnp.shape(value)}, expected a scalar; "
                    "write its mean"
                )
        return loss, metrics

    (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(adapters)
    return loss, metrics, grads


def _accumulated(
    gradient: Callable, batch: Any, key: jax.Array, number: int
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """The same as `gradient` of the whole batch, from `number` parts of it."""

    def cut(x: jax.Array) -> jax.Array:
        rows = jnp.shape(x)[:1]
        if not rows or rows[0] % number:
            raise ValueError(
                f"accumulate is {number}, and an array of the batch has shape {jnp.shape(x)}; "
                f"expected a first axis that is a multiple of {number} in all of them"
            )
        return jnp.swapaxes(jnp.reshape(x, (rows[0] // number, number, *x.shape[1:])), 0, 1)

    def body(total: Any, part: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        index, microbatch = part
        loss, metrics, grads = gradient(microbatch, jax.random.fold_in(key, index))
        weight = jnp.asarray(metrics.get("weight", 1.0), jnp.float32)
        total = jax.tree.map(lambda total, g: total + weight * g, total, grads)
        return total, (weight, {**metrics, "loss": loss})

    parts = (jnp.arange(number), jax.tree.map(cut, batch))
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, first[1], key)[2]
    # Sums in float32, also of gradients in bfloat16.
    wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
    total, (weights, metrics) = jax.lax.scan(body, jax.tree.map(wide, shapes), parts)
    weight = weights.sum()
    divisor = jnp.where(weight == 0, 1, weight)
    means = {
        name: value.sum() if name in COUNTS else (weights * value).sum() / divisor
        for name, value in metrics.items()
    }
    grads = jax.tree.map(lambda x, like: (x / divisor).astype(like.dtype), total, shapes)
    return means.pop("loss"), means, grads
