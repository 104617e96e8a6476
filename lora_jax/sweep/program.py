"""One step of many runs, as one program: `vmap` over what is small, the base beside it.

    state    [N, ...]   adapters, optimizer, key and step of each run ┐
    numbers  [N, ...]   learning rate, scale, rank, ... of each run   ├─► state, metrics [N]
    base                shared                                        │
    batch               shared, or [N, ...]                           ┘

No operation crosses the runs, so that whatever one of them holds, be it NaN, the others' values
are the same to the last bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lora_jax.sweep import padding
from lora_jax.sweep.fields import fields_of, with_fields
from lora_jax.sweep.groups import Group, Plan
from lora_jax.train import LossFn, State, Transform, init_state, train_step
from lora_jax.train.checkpoints import is_key


class RunNumbers(NamedTuple):
    """What differs by a number between runs.

    Attributes:
      fields: of the configs, by name.
      adapters: a tree of `padding.LeafNumbers`.
    """

    fields: dict[str, Any]
    adapters: Any


class Program:
    """The compiled functions of a group; places of the group are counted from 0 to N - 1."""

    def __init__(
        self,
        plan: Plan,
        group: Group,
        loss_fn: LossFn,
        *,
        shared: bool,
        accumulate: int = 1,
        transform: Transform | None = None,
    ):
        self.plan, self.group = plan, group
        drops = any(x.drops for k in group.runs for x in padding.adapters_in(plan.own[k]))
        example = plan.runs[group.runs[0]]

        def optimizer(numbers: RunNumbers) -> optax.GradientTransformation:
            tx = plan.make_tx(with_fields(example, numbers.fields))
            # Zeros stay zeros without it, unless an optimizer adds noise of its own.
            mask = lambda updates, _: padding.without_padding(updates, numbers.adapters)  # noqa: E731
            return optax.chain(tx, optax.stateless(mask))

        def loss_of_run(numbers: RunNumbers) -> LossFn:
            def loss(adapters: Any, base: Any, batch: Any, key: Any) -> Any:
                own = padding.of_run(adapters, numbers.adapters, drops=drops)
                return loss_fn(own, base, batch, key)

            return loss

        def step(state: State, numbers: RunNumbers, base: Any, batch: Any) -> tuple[State, dict]:
            state, metrics = train_step(
                *(state, base, batch),
                loss_fn=loss_of_run(numbers),
                tx=optimizer(numbers),
                accumulate=accumulate,
                transform=transform,
            )
            return _strong(state), metrics

        def evaluate(state: State, numbers: RunNumbers, base: Any, batch: Any) -> dict:
            result = loss_of_run(numbers)(state.adapters, base, batch, None)
            loss, metrics = result if isinstance(result, tuple) else (result, {})
            return {**metrics, "loss": loss}

        def start(key: jax.Array, adapters: Any, numbers: RunNumbers) -> State:
            padded = padding.pad(adapters, group.like)
            return _strong(init_state(key, padded, optimizer(numbers)))

        batches = None if shared else 0
        self.step = jax.jit(jax.vmap(step, (0, 0, None, batches)), donate_argnums=0)
        self.evaluate = jax.jit(jax.vmap(evaluate, (0, 0, None, None)))
        self._start = jax.jit(start)

    def start(self, run: int, key: jax.Array) -> State:
        """The state of a run before its first step, of the group's shapes."""
        adapters = self.plan.make_adapters(self.plan.runs[run])
        return self._start(key, adapters, self._numbers(run))

    def numbers(self, runs: Sequence[int]) -> RunNumbers:
        """Those of the runs in all places, each `[N]`."""
        return _stacked([self._numbers(run) for run in runs])

    def _numbers(self, run: int) -> RunNumbers:
        values = fields_of(self.plan.runs[run])
        fields = {name: values[name] for name in self.plan.traced}
        return RunNumbers(fields, padding.numbers_of(self.plan.own[run], self.group.like))


def _strong(state: State) -> State:
    """A state without weak types, which an array that has been on the host does not have."""
    return jax.tree.map(lambda x: x if is_key(x) else lax.convert_element_type(x, x.dtype), state)


@jax.jit
def _stacked(trees: Sequence[Any]) -> Any:
    # Of Python numbers, hence weakly typed: bfloat16 stays what it is, as for a run alone.
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@functools.partial(jax.jit, static_argnums=1)
def spread(tree: Any, places: int) -> Any:
    """One run's tree as `[N, ...]`, the same in all places."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (places, *x.shape)), tree)


@jax.jit
def take(tree: Any, place: Any) -> Any:
    """One run's part of a tree `[N, ...]`."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, place, keepdims=False), tree)


@functools.partial(jax.jit, donate_argnums=0)
def put(tree: Any, place: Any, of_run: Any) -> Any:
    """A tree `[N, ...]` with another run in one place."""
    update = functools.partial(lax.dynamic_update_index_in_dim, index=place, axis=0)
    return jax.tree.map(update, tree, of_run)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["impl"])
@dataclasses.dataclass(frozen=True)
class KeyData:
    """PRNG keys where there are none: as numbers."""

    data: Any
    impl: Any


def without_keys(tree: Any) -> Any:
    """A tree with `KeyData` for its PRNG keys."""
    return jax.tree.map(
        lambda x: KeyData(jax.random.key_data(x), jax.random.key_impl(x)) if is_key(x) else x, tree
    )


def on_host(tree: Any) -> Any:
    """A tree as arrays of NumPy. All are on their way before one of them is waited for."""
    return jax.device_get(without_keys(tree))


def from_host(tree: Any) -> Any:
    """Undoes `on_host`, but for what JAX does when it meets the arrays."""
    return jax.tree.map(
        lambda x: jax.random.wrap_key_data(x.data, impl=x.impl) if isinstance(x, KeyData) else x,
        tree,
        is_leaf=lambda x: isinstance(x, KeyData),
    )
