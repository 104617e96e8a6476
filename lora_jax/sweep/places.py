"""The loop around a program: its places, the runs in them, and those that wait.

    waiting   run 4, run 5, ...
    places    run 0 | run 1 | run 2 | run 3      one program, compiled once
    finished  done, diverged, out of patience: the place is taken by the next that waits

A place that nobody waits for goes on computing what nobody reads: that costs no more than a program
of another size, which had to be compiled. What runs leave behind lies on the host: there are many
of them, and the device has room for those in places.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.sweep.program import Program, from_host, on_host, put, spread, take
from lora_jax.train import State
from lora_jax.train.step import COUNTS
from lora_jax.train.stream import Stream

Stopped = Literal["done", "diverged", "patience", "halved", "data"]
Metrics = dict[str, float]
# One stream of batches for all runs, or what makes each run its own.
Batches = Iterable[Any] | Callable[[Any], Iterable[Any]]
BEGINNING = {"step": 0, "state": None}  # of a `Stream`


@dataclasses.dataclass
class Entry:
    """A run on its way. Its arrays are on the host.

    Attributes:
      number: its number in the plan.
      run: its config.
      step: steps that were begun; of a run that diverged, those before it did.
      stopped: why it ended, or None.
      history: as in `Fitted`.
      position: where its batches are, as `Stream` has it.
      state: where it waits between two stages; else None.
      last, best: adapters, padded; None before there are any. Those of `state` are no `last`.
      best_step, best_metrics: of the best evaluation.
      validation_loss: of the last evaluation; infinite if it was not finite.
      waited: evaluations since the best one.
    """

    number: int
    run: Any
    step: int = 0
    stopped: Stopped | None = None
    history: list[tuple[int, Metrics]] = dataclasses.field(default_factory=list)
    position: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(BEGINNING))
    state: Any = None
    last: Any = None
    best: Any = None
    best_step: int | None = None
    best_metrics: Metrics = dataclasses.field(default_factory=dict)
    validation_loss: float = math.inf
    waited: int = 0


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


class Saved(NamedTuple):
    """A round at some clock.

    Attributes:
      clock: batches drawn.
      placed: the runs in places, by place, each with the state that it has there.
      left: the runs that have been in one.
    """

    clock: int
    placed: dict[int, Entry]
    left: list[Entry]


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
        tell: Callable[[Entry], None],
        save: Callable[[Saved], None] | None = None,
        save_every: int | None = None,
    ):
        self.program, self.base, self.batches, self.make_key = program, base, batches, make_key
        self.evaluation, self.until, self.is_last = evaluation, until, is_last
        self.tell, self.save, self.save_every = tell, save, save_every
        self.clock = 0
        self.places: list[Entry | None] = [None] * program.group.at_once
        self.left: list[Entry] = []
        self.states: Any = None  # [N, ...]
        self.numbers: Any = None
        self.streams: dict[int, Stream] = {}  # by place; one for all, where all see the same
        self.pending: collections.deque = collections.deque()  # steps that were not told of yet

    @property
    def taken(self) -> list[tuple[int, Entry]]:
        """The places that someone has."""
        return [(k, entry) for k, entry in enumerate(self.places) if entry is not None]

    def run(self, entries: Iterable[Entry], saved: Saved | None = None) -> list[Entry]:
        """Trains them all.

        Args:
          entries: the runs.
          saved: where some of them are already; None at the start.

        Returns:
          The runs, as they arrived.
        """
        if saved is not None:
            self.clock, self.left = saved.clock, list(saved.left)
            self._enter(saved.placed)
        known = {entry.number for entry in [*self.left, *(x for _, x in self.taken)]}
        queue = collections.deque(x for x in entries if x.number not in known)
        interval = self.evaluation.every or 1
        while queue or self.taken:
            own = callable(self.batches)
            if queue and (self.clock % interval == 0 if own else not self.taken):
                free = [k for k, entry in enumerate(self.places) if entry is None]
                self._enter({k: queue.popleft() for k in free[: len(queue)]})
            batch = self._draw()
            if self.taken:
                self._step(batch)
            self.clock += 1
            if self.save_every is not None and self.clock % self.save_every == 0:
                self._save()
        self._save()
        return self.left

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

    def _enter(self, entering: dict[int, Entry]) -> None:
        """Runs go to places, from where they are: the start, another stage, or a save."""
        if not entering:
            return
        for place, entry in entering.items():
            self.places[place] = entry
        if callable(self.batches):
            for place, entry in entering.items():
                self.streams[place] = _stream(self.batches(entry.run), entry)
        else:
            self.streams = dict.fromkeys(entering, _stream(self.batches, self.taken[0][1]))
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
        return from_host(state)

    def _draw(self) -> Any:
        """The next batch; runs whose batches have ended leave."""
        own, drawn = callable(self.batches), {}
        for place, _ in self.taken if own else self.taken[:1]:
            try:
                drawn[place] = self.streams[place].draw()
            except StopIteration:
                self._out_of_data([place] if own else [place for place, _ in self.taken])
        if not drawn:
            return None
        anyone = next(iter(drawn.values()))
        if not own:
            return anyone
        return stacked([drawn.get(place, anyone) for place in range(len(self.places))])

    def _out_of_data(self, places: Sequence[int]) -> None:
        self._report()
        for place, entry in self.taken:
            if place in places:
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
                self._note(entry, step, row)
                if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                    entry.stopped, entry.step = "diverged", step - 1
                    good = step > 1 or math.isfinite(row["loss"])
                    self._leave(place, entry, keep=good)

    def _evaluate(self) -> None:
        due = [(k, x) for k, x in self.taken if self.evaluation.is_due(x, self.until)]
        if not due:
            return
        values = self.evaluation.metrics(self.program, self.states, self.numbers, self.base)
        improved = []
        for place, entry in due:
            metrics = {name: float(x[place]) for name, x in values.items()}
            self._note(entry, entry.step, {f"validation/{name}": x for name, x in metrics.items()})
            entry.validation_loss = metrics["loss"] if math.isfinite(metrics["loss"]) else math.inf
            if metrics["loss"] < entry.best_metrics.get("loss", math.inf):
                improved.append((place, entry))
                entry.best_step, entry.best_metrics, entry.waited = entry.step, metrics, 0
            else:
                entry.waited += 1
            if self.evaluation.patience is not None and entry.waited >= self.evaluation.patience:
                entry.stopped = "patience"
        found = on_host([take(self.states.adapters, place) for place, _ in improved])
        for (_, entry), adapters in zip(improved, found, strict=True):
            entry.best = adapters

    def _note(self, entry: Entry, step: int, metrics: Metrics) -> None:
        entry.history.append((step, metrics))
        self.tell(entry)

    def _leave(self, place: int, entry: Entry, keep: bool = True) -> None:
        """Frees a place."""
        if entry.stopped is None:
            entry.position = self._position(place, entry)
            entry.state = on_host(take(self.states, place))
        elif keep:
            diverged = entry.stopped == "diverged"
            adapters = self.states.last_good if diverged else self.states.adapters
            entry.last = on_host(take(adapters, place))
        self.places[place] = None
        self.left.append(entry)

    def _position(self, place: int, entry: Entry) -> dict[str, Any]:
        self.streams[place].mark(entry.step)
        return self.streams[place].position

    def _save(self) -> None:
        if self.save is None:
            return
        self._report()  # which may free places
        placed = {}
        if self.taken:
            states = on_host(self.states)
            for place, entry in self.taken:
                state = jax.tree.map(lambda x, place=place: x[place], states)
                position = self._position(place, entry)
                placed[place] = dataclasses.replace(entry, state=state, position=position)
        self.save(Saved(self.clock, placed, self.left))


def _stream(batches: Iterable[Any], entry: Entry) -> Stream:
    """Batches from where a run is."""
    stream = Stream(batches)
    stream.resume(entry.position, entry.step)
    return stream


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
