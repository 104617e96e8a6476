"""Batches, and the way back to where they were."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

from lora_jax.train.checkpoints import as_json


class Stream:
    """Batches of a run, drawn one after the other.

    A position is what the iterator said at some step, and that step: from there on, what was drawn
    until the checkpoint's own step is drawn again. So a run that ends anywhere, while drawing for
    instance, needs nothing from its iterator any more.
    """

    def __init__(self, batches: Iterable[Any]):
        self._iterator = iter(batches)
        self._can_tell = all(hasattr(self._iterator, x) for x in ("get_state", "set_state"))
        self.position: dict[str, Any] = {"step": 0, "state": None}

    def draw(self) -> Any:
        """The next batch; raises StopIteration."""
        return next(self._iterator)

    def mark(self, step: int) -> None:
        """Remembers where the iterator is, before the batch of step `step + 1`."""
        if self._can_tell:
            state = self._iterator.get_state()  # type: ignore[attr-defined]
            if isinstance(state, bytes):
                state = {"base64": base64.b64encode(state).decode()}
            state = as_json("the position of the batches' iterator", state)
            self.position = {"step": step, "state": state}

    def resume(self, position: dict[str, Any], step: int) -> None:
        """Goes to the batch of step `step + 1`."""
        state = position["state"]
        if state is not None and not self._can_tell:
            raise ValueError(
                "the checkpoint knows a position in the data, and the iterator of these batches "
                "has no set_state; give the batches that the run was begun with"
            )
        if state is not None:
            if isinstance(state, dict) and set(state) == {"base64"}:
                state = base64.b64decode(state["base64"])
            self._iterator.set_state(state)  # type: ignore[attr-defined]
        for drawn in range(position["step"], step):
            if next(self._iterator, self) is self:
                raise ValueError(
                    f"the batches end after {drawn}, and the checkpoint is of step {step}; give "
                    "the batches that the run was begun with"
                )
        self.position = position
