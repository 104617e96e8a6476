"""The state of a run while steps are under way, never lost to an exception."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.train.checkpoints import is_key
from lora_jax.train.step import State, train_step

PROGRAMS_KEPT = 8  # compiled steps, for calls of `fit` with the same loss and optimizer


class Device:
    """The state as a flat tuple of arrays, and the program that moves it.

    Invariant: whenever Python can be interrupted, the newest entry of `outputs` is alive. A step
    gives its input's memory away; were its result to be assigned by Python, an exception raised by
    a signal handler just then would leave neither. So the call and the append happen within one
    call of C. That holds for programs that JAX calls without Python: of plain arrays alone, hence
    keys as their data, and no pytree nodes that Python code would rebuild.
    """

    def __init__(self, state: State, loss_fn: Any, tx: Any, accumulate: int, transform: Any):
        self._treedef = jax.tree.structure(state)
        self._options = (loss_fn, tx, accumulate, transform)
        self.load(state)

    def load(self, state: State) -> None:
        """Goes on from another state of the same structure."""
        leaves = jax.tree.leaves(state)
        self._keys = tuple(jax.random.key_impl(x) if is_key(x) else None for x in leaves)
        plain = tuple(jax.random.key_data(x) if is_key(x) else x for x in leaves)
        spread = any(len(x.sharding.device_set) > 1 for x in plain)
        shardings = tuple(x.sharding for x in plain) if spread else None
        arguments = (*self._options, self._treedef, self._keys, shardings)
        try:
            self._program = _program(*arguments)
        except TypeError:  # a loss function or optimizer that cannot be hashed
            self._program = _program.__wrapped__(*arguments)
        # Of the last two steps: the one that is running, and the one to be reported.
        self.outputs: collections.deque[tuple] = collections.deque([(plain, {})], maxlen=2)

    def advance(self, base: Any, batch: Any) -> None:
        """Dispatches a step."""
        leaves = self.outputs[-1][0]
        self.outputs.extend(map(self._program, (leaves,), (base,), (batch,)))

    @property
    def state(self) -> State:
        """The newest state; to be copied if it is to outlive the next step."""
        return _state(self._treedef, self._keys, self.outputs[-1][0])


def _state(treedef: Any, keys: tuple, leaves: tuple) -> State:
    wrapped = (
        x if impl is None else jax.random.wrap_key_data(x, impl=impl)
        for x, impl in zip(leaves, keys, strict=True)
    )
    return jax.tree.unflatten(treedef, wrapped)


@functools.lru_cache(maxsize=PROGRAMS_KEPT)
def _program(
    loss_fn: Any, tx: Any, accumulate: int, transform: Any, treedef: Any, keys: Any, shardings: Any
) -> Callable:
    def step(leaves: tuple, base: Any, batch: Any) -> tuple[tuple, dict]:
        state = _state(treedef, keys, leaves)
        options = {"accumulate": accumulate, "transform": transform}
        state, metrics = train_step(state, base, batch, loss_fn=loss_fn, tx=tx, **options)
        plain = (jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(state))
        return tuple(plain), metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
