"""The loop around a program: its places, the runs in them, and those that wait.

    waiting   run 4, run 5, ...
    places    run 0 | run 1 | run 2 | run 3      one program, compiled once
    finished  done, diverged, out of patience: the place is taken by the next that waits

A place that nobody waits for goes on computing what nobody reads: that costs no more than a program
of another size, which had to be compiled.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.sweep.program import Program, put, spread, take
from lora_jax.train import State
from lora_jax.train.step import COUNTS

Stopped = Literal["done", "diverged", "patience", "halved", "data"]
Metrics = dict[str, float]
# One stream of batches for all runs, or what makes each run its own.
Batches = Iterable[Any] | Callable[[Any], Iterable[Any]]


@dataclasses.dataclass
class Entry:
    """A run on its way.

    Attributes:
      number: its number in the plan.
      run: its config.
      tell: called with the run, a step and its numbers.
      step: steps that were begun; of a run that diverged, those before it did.
      stopped: why it ended, or None.
      history: as in `Fitted`.
      state: where it waits between two stages, on the host; else None.
      stream: its own batches, once it has begun.
      last, best: adapters, padded; None before there are any.
      best_step, best_metrics: of the best evaluation.
      validation_loss: of the last evaluation; infinite if it was not finite.
      waited: evaluations since the best one.
    """

    number: int
    run: Any
    tell: Callable[[Any, int, Metrics], None]
    step: int = 0
    stopped: Stopped | None = None
    history: list[tuple[int, Metrics]] = dataclasses.field(default_factory=list)
    state: Any = None
    stream: Iterator[Any] | None = None
    last: Any = None
    best: Any = None
    best_step: int | None = None
    best_metrics: Metrics = dataclasses.field(default_factory=dict)
    validation_loss: float = math.inf
    waited: int = 0

    def note(self, step: int, metrics: Metrics) -> None:
        """Adds to the history, and tells whoever listens."""
        self.history.append((step, metrics))
        self.tell(self.run, step, dict(metrics))


class Evaluation(NamedTuple):
    """When runs are evaluated, and on what."""

    batches: Sequence[Any]
    every: int | None
    patience: int | None

    def is_due(self, entry: Entry, until: int) -> bool:
        """Whether a run that goes to the step `until` is evaluated where it is."""
        at_interval = self.every is not None and entry.step % self.every == 0
        return bool(self.batches) and (at_interval or entry.step == until)

    def metrics(self, program: Program, states: Any, numbers: Any, base: Any) -> dict[str, Any]:
        """Means over the batches, and sums of counts, each `[N]`."""
        rows = [program.evaluate(states, numbers, base, batch) for batch in self.batches]
        stacked = {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}
        weight = np.asarray(stacked.get("weight", np.ones_like(stacked["loss"])), np.float64)
        total = np.where(weight.sum(0) == 0, np.nan, weight.sum(0))  # of nothing there is no mean
        return {
            name: value.sum(0) if name in COUNTS else (weight * value).sum(0) / total
            for name, value in stacked.items()
        }


class Round:
    """Runs of one program, brought to one step: `until`, at which they are done if it is the last.

    Invariant: the runs in places are evaluated together, for they enter at the same step, and with
    batches of their own only when the round has gone on for a multiple of `evaluation.every`.
    """

    def __init__(
        self,
        program: Program,
        base: Any,
        batches: Batches,
        make_key: Callable[[Any], jax.Array],
        evaluation: Evaluation,
        *,
        until: int,
        is_last: bool,
    ):
        self.program, self.base, self.batches, self.make_key = program, base, batches, make_key
        self.evaluation, self.until, self.is_last = evaluation, until, is_last
        self.places: list[Entry | None] = [None] * program.group.at_once
        self.states: Any = None  # [N, ...]
        self.numbers: Any = None
        self.stream: Iterator[Any] = iter(())  # of the batches that all see
        self.pending: collections.deque = collections.deque()  # steps that were not told of yet

    @property
    def taken(self) -> list[tuple[int, Entry]]:
        """The places that someone has."""
        return [(k, entry) for k, entry in enumerate(self.places) if entry is not None]

    def run(self, waiting: Iterable[Entry]) -> None:
        """Trains all that wait."""
        queue = collections.deque(waiting)
        interval = self.evaluation.every or 1
        for clock in itertools.count():
            if not queue and not self.taken:
                return
            may_enter = clock % interval == 0 if callable(self.batches) else not self.taken
            if queue and may_enter and None in self.places:
                self._fill(queue)
            batch = self._draw()
            if self.taken:
                self._step(batch)

    def _step(self, batch: Any) -> None:
        self.states, metrics = self.program.step(self.states, self.numbers, self.base, batch)
        for _, entry in self.taken:
            entry.step += 1
        self.pending.append((metrics, [(k, x, x.step) for k, x in self.taken]))
        # The step before this one is told of while this one is under way.
        self._report(but=1)
        arrived = [x for _, x in self.taken if x.step == self.until]
        if arrived or any(self.evaluation.is_due(x, self.until) for _, x in self.taken):
            self._report()
            self._evaluate()
            for place, entry in self.taken:
                if entry.step == self.until and self.is_last:
                    entry.stopped = "done"
                if entry.step == self.until or entry.stopped:
                    self._leave(place, entry)

    def _fill(self, queue: collections.deque[Entry]) -> None:
        entering: dict[int, Entry] = {}
        for place, entry in enumerate(self.places):
            if entry is None and queue:
                self.places[place] = entering[place] = queue.popleft()
        if not callable(self.batches):
            (step,) = {entry.step for _, entry in self.taken}
            self.stream = itertools.islice(self.batches, step, None)
        states = {place: self._state_of(entry) for place, entry in entering.items()}
        if self.states is None:
            self.states = spread(next(iter(states.values())), len(self.places))
        for place, state in states.items():
            self.states = put(self.states, place, state)
        anyone = self.taken[0][1]
        self.numbers = self.program.numbers([(entry or anyone).number for entry in self.places])

    def _state_of(self, entry: Entry) -> State:
        if entry.state is None:
            return self.program.start(entry.number, self.make_key(entry.run))
        state, entry.state = entry.state, None
        return state._replace(key=self.make_key(entry.run))

    def _draw(self) -> Any:
        """The next batch; runs whose batches have ended leave."""
        if not callable(self.batches):
            batch = next(self.stream, None)
            if batch is None:
                self._out_of_data([entry for _, entry in self.taken])
            return batch
        drawn: dict[int, Any] = {}
        for place, entry in self.taken:
            if entry.stream is None:
                entry.stream = iter(self.batches(entry.run))
            drawn[place] = next(entry.stream, None)
        self._out_of_data([entry for place, entry in self.taken if drawn[place] is None])
        present = {place: batch for place, batch in drawn.items() if batch is not None}
        if not present:
            return None
        anyone = next(iter(present.values()))
        return stacked([present.get(place, anyone) for place in range(len(self.places))])

    def _out_of_data(self, entries: list[Entry]) -> None:
        if not entries:
            return
        self._report()
        for place, entry in self.taken:
            if entry in entries:
                entry.stopped = "data"
                self._leave(place, entry)

    def _report(self, but: int = 0) -> None:
        """Tells of the steps that are pending, `but` for the last; runs that diverged leave."""
        while len(self.pending) > but:
            metrics, steps = self.pending.popleft()
            values = {name: np.asarray(x) for name, x in metrics.items()}
            for place, entry, step in steps:
                if entry.stopped:
                    continue
                row = {name: float(x[place]) for name, x in values.items()}
                entry.note(step, row)
                if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                    entry.stopped, entry.step = "diverged", step - 1
                    good = step > 1 or math.isfinite(row["loss"])
                    self._leave(place, entry, keep=good)

    def _evaluate(self) -> None:
        due = [(k, x) for k, x in self.taken if self.evaluation.is_due(x, self.until)]
        if not due:
            return
        values = self.evaluation.metrics(self.program, self.states, self.numbers, self.base)
        for place, entry in due:
            metrics = {name: float(x[place]) for name, x in values.items()}
            entry.note(entry.step, {f"validation/{name}": x for name, x in metrics.items()})
            entry.validation_loss = metrics["loss"] if math.isfinite(metrics["loss"]) else math.inf
            if metrics["loss"] < entry.best_metrics.get("loss", math.inf):
                entry.best = take(self.states.adapters, place)
                entry.best_step, entry.best_metrics, entry.waited = entry.step, metrics, 0
            else:
                entry.waited += 1
            if self.evaluation.patience is not None and entry.waited >= self.evaluation.patience:
                entry.stopped = "patience"

    def _leave(self, place: int, entry: Entry, keep: bool = True) -> None:
        """Frees a place."""
        state = take(self.states, place)
        self.places[place] = None
        if keep:
            entry.last = state.last_good if entry.stopped == "diverged" else state.adapters
        if entry.stopped is None:
            # A state is several times its adapters, and many may wait for their next stage.
            entry.state = jax.tree.map(np.asarray, state._replace(key=None))


def stacked(batches: list[Any]) -> Any:
    """Batches of several runs, `[N, ...]`."""

    def one(*arrays: Any) -> Any:
        shapes = {np.shape(x) for x in arrays}
        if len(shapes) > 1:
            raise ValueError(
                f"the runs' batches have arrays of shapes {', '.join(map(str, sorted(shapes)))}; "
                "expected the same from all runs of a program; pad them"
            )
        return np.stack(arrays) if isinstance(arrays[0], np.ndarray) else jnp.stack(arrays)

    return jax.tree.map(one, *batches)
