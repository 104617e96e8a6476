"""The loop around the programs: places, the runs in them, and those that wait.

    waiting   run 4, run 5, ...
    places    run 0 | run 1 | run 2 | run 3      one program, compiled once
    finished  done, diverged, out of patience, halved: the place is taken by the next that waits

A place that nobody waits for goes on computing what nobody reads: it costs no more than a program
of another size would, which had to be compiled.
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

from lora_jax.sweep import stack
from lora_jax.sweep.plan import Plan
from lora_jax.sweep.program import Program, put, take
from lora_jax.train import LossFn, State, Transform

Stopped = Literal["done", "diverged", "patience", "halved", "data"]
Metrics = dict[str, float]
# One stream of batches for all runs, or what makes each run its own.
Batches = Iterable[Any] | Callable[[Any], Iterable[Any]]


class Fitted(NamedTuple):
    """What a run arrived at.

    Attributes:
      run: its config.
      adapters: the best on validation; the last, if there was none. They have the run's own rank
        and scale, as those of the run alone. None if not even the first loss was finite.
      last: those after the last step; of a run that diverged, those that gave the last finite loss.
      best_step: the step of the best evaluation, or None.
      best_metrics: what it gave; empty if there was none.
      step: steps done.
      stopped: "done" after all steps; "diverged" when a loss or gradient was not finite; "patience"
        when evaluations ceased to improve; "halved" by successive halving; "data" if the batches
        ended first.
      history: (step, metrics) of each step, and of each evaluation with "validation/" before names.
    """

    run: Any
    adapters: Any
    last: Any
    best_step: int | None
    best_metrics: Metrics
    step: int
    stopped: Stopped
    history: list[tuple[int, Metrics]]


@dataclasses.dataclass(frozen=True)
class Halving:
    """Successive halving (arXiv:1502.07943): at some steps only the best on validation go on.

    Attributes:
      at: the steps, in order.
      keep: the share that goes on, of the runs that got there, rounded up.
    """

    at: Sequence[int]
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not self.at or list(self.at) != sorted(set(self.at)) or self.at[0] < 1:
            raise ValueError(
                f"at is {self.at!r}, expected steps in rising order, such as (100, 200)"
            )
        if not 0 < self.keep < 1:
            raise ValueError(
                f"keep is {self.keep!r}, expected a share between 0 and 1, such as 0.5"
            )


def fit(
    loss_fn: LossFn,
    base: Any,
    plan: Plan,
    batches: Batches,
    *,
    make_key: Callable[[Any], jax.Array],
    steps: int,
    accumulate: int = 1,
    transform: Transform | None = None,
    validation: Sequence[Any] = (),
    evaluate_every: int | None = None,
    patience: int | None = None,
    halving: Halving | None = None,
    on_metrics: Callable[[Any, int, Metrics], None] | None = None,
) -> list[Fitted]:
    """Trains all runs of a plan, each as `lj.train.fit` would train it alone.

    Args:
      loss_fn: as for `lj.train.fit`: of adapters, base, batch and key. It is given adapters whose
        `scale` is a traced value and whose factors are zero beyond the run's own rank.
      base: the frozen tree, shared by all runs.
      plan: the runs, from `plan`.
      batches: one iterable, of which all runs see the same batch at the same time; or a function
        from a run to its own, all of the same shapes. With their own, a run that waits begins as
        soon as a place is free; with the same, when all places are, at the first batch.
      make_key: from a run to its PRNG key, for dropout and transforms.
      steps: updates of each run.
      accumulate: in how many parts a batch is run, as for `lj.train.fit`.
      transform: from a key and a batch to the batch that is trained on.
      validation: batches on which `loss_fn` is evaluated, with None for a key. Metrics are averaged
        by "weight" if the loss gives one.
      evaluate_every: steps between evaluations; None for one at the end alone.
      patience: a run ends after this many evaluations in a row without a lower loss.
      halving: when the worst of all runs end.
      on_metrics: called with the run, its step and the step's numbers, as they come.

    Returns:
      What each run arrived at, in the order of the plan. A run that diverges is frozen there; the
      others go on, and their values are to the last bit those they would have had without it.

    Raises:
      ValueError: before anything is compiled, if options contradict each other, or there is only
        one pass through batches that several rounds need.
    """
    _check(steps, validation, evaluate_every, patience, halving)
    stages = [*(halving.at if halving else ()), steps]
    _check_passes(plan, batches, stages)
    evaluation = _Evaluation(validation, evaluate_every, patience)
    tell = on_metrics or (lambda run, step, metrics: None)
    own = callable(batches)
    programs = [
        Program(plan, x, loss_fn, shared=not own, accumulate=accumulate, transform=transform)
        for x in plan.groups
    ]
    entries = [_Entry(k, run, tell) for k, run in enumerate(plan.runs)]
    for until in stages:
        for program in programs:
            waiting = [entries[k] for k in program.group.runs if entries[k].stopped is None]
            _Round(program, base, batches, make_key, evaluation, until).run(waiting)
        going = [entry for entry in entries if entry.stopped is None]
        if until == steps:
            for entry in going:
                entry.stopped = "done"
        elif halving is not None:
            _halve(going, halving.keep)
    return [entry.fitted(plan) for entry in entries]


def _check(
    steps: int,
    validation: Sequence[Any],
    evaluate_every: int | None,
    patience: int | None,
    halving: Halving | None,
) -> None:
    given = {"evaluate_every": evaluate_every, "patience": patience, "halving": halving}
    for name, value in {"steps": steps, **given}.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
        if name != "steps" and value is not None and not validation:
            raise ValueError(f"{name} is {value}, but there are no validation batches")
    if halving is not None and halving.at[-1] >= steps:
        raise ValueError(f"halving is at step {halving.at[-1]}, expected one before steps={steps}")


def _check_passes(plan: Plan, batches: Batches, stages: list[int]) -> None:
    if callable(batches) or iter(batches) is not batches:
        return
    rounds = sum(math.ceil(len(x.runs) / x.at_once) for x in plan.groups)
    if rounds > 1 or len(stages) > 1:
        raise ValueError(
            "batches is an iterator, which can be gone through once, and the runs need them "
            f"{max(rounds, len(stages))} times; give a list, or another iterable that begins anew"
        )


def _halve(entries: list[_Entry], keep: float) -> None:
    """Ends the runs that are not among the best; of equal ones the first go on."""
    ranked = sorted(entries, key=lambda entry: entry.validation_loss)
    for entry in ranked[math.ceil(keep * len(ranked)) :]:
        entry.stopped, entry.state = "halved", None


@dataclasses.dataclass
class _Entry:
    """A run on its way."""

    number: int
    run: Any
    tell: Callable[[Any, int, Metrics], None]
    step: int = 0
    stopped: Stopped | None = None
    history: list[tuple[int, Metrics]] = dataclasses.field(default_factory=list)
    state: Any = None  # where it waits between two stages, on the host
    stream: Iterator[Any] | None = None  # its own batches
    last: Any = None
    best: Any = None
    best_step: int | None = None
    best_metrics: Metrics = dataclasses.field(default_factory=dict)
    validation_loss: float = math.inf
    waited: int = 0  # evaluations since the best one

    def note(self, step: int, metrics: Metrics) -> None:
        self.history.append((step, metrics))
        self.tell(self.run, step, dict(metrics))

    def fitted(self, plan: Plan) -> Fitted:
        assert self.stopped is not None
        own = plan.own[self.number]
        last, best = (None if x is None else stack.cut(x, own) for x in (self.last, self.best))
        return Fitted(
            run=self.run,
            adapters=last if best is None else best,
            last=last,
            best_step=self.best_step,
            best_metrics=self.best_metrics,
            step=self.step,
            stopped=self.stopped,
            history=self.history,
        )


class _Evaluation(NamedTuple):
    """When runs are evaluated, and on what."""

    batches: Sequence[Any]
    every: int | None
    patience: int | None

    def is_due(self, entry: _Entry, until: int) -> bool:
        at_interval = self.every is not None and entry.step % self.every == 0
        return bool(self.batches) and (at_interval or entry.step == until)

    def metrics(self, program: Program, lanes: Any, numbers: Any, base: Any) -> dict[str, Any]:
        """Means over the batches, each `[N]`."""
        rows = [program.evaluate(lanes, numbers, base, batch) for batch in self.batches]
        stacked = {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}
        weight = np.asarray(stacked.get("weight", np.ones_like(stacked["loss"])), np.float64)
        total = np.where(weight.sum(0) == 0, 1, weight.sum(0))
        return {name: (weight * value).sum(0) / total for name, value in stacked.items()}


class _Round:
    """Runs of one program, brought to one step."""

    def __init__(
        self,
        program: Program,
        base: Any,
        batches: Batches,
        make_key: Callable[[Any], jax.Array],
        evaluation: _Evaluation,
        until: int,
    ):
        self.program, self.base, self.batches, self.make_key = program, base, batches, make_key
        self.evaluation, self.until = evaluation, until
        self.places: list[_Entry | None] = [None] * program.group.at_once
        self.lanes: Any = None  # the states [N, ...]
        self.numbers: Any = None
        self.stream: Iterator[Any] = iter(())  # of the batches that all see
        self.pending: collections.deque = collections.deque()  # steps that were not told of yet

    @property
    def taken(self) -> list[tuple[int, _Entry]]:
        """The places that someone has."""
        return [(k, entry) for k, entry in enumerate(self.places) if entry is not None]

    def run(self, waiting: Iterable[_Entry]) -> None:
        """Trains all that wait."""
        queue = collections.deque(waiting)
        # All places are then at multiples of the interval together, so that one evaluation serves
        # them all.
        interval = self.evaluation.every or 1
        for clock in itertools.count():
            begins = clock % interval == 0 if callable(self.batches) else not self.taken
            if queue and begins:
                self._fill(queue)
            if not self.taken and not queue:
                return
            if not self.taken:
                continue
            batch = self._draw()
            if not self.taken:
                continue
            self.lanes, metrics = self.program.step(self.lanes, self.numbers, self.base, batch)
            for _, entry in self.taken:
                entry.step += 1
            self.pending.append((metrics, [(k, x, x.step) for k, x in self.taken]))
            # The step before this one is told of while this one is under way.
            self._report(but=1)
            if any(self._is_due(entry) for _, entry in self.taken):
                self._report()
                self._evaluate()
                for place, entry in self.taken:
                    if entry.stopped or entry.step == self.until:
                        self._leave(place, entry)

    def _is_due(self, entry: _Entry) -> bool:
        return entry.step == self.until or self.evaluation.is_due(entry, self.until)

    def _fill(self, queue: collections.deque[_Entry]) -> None:
        new = []
        for place, entry in enumerate(self.places):
            if entry is None and queue:
                self.places[place] = queue.popleft()
                new.append(place)
        if not callable(self.batches):
            (step,) = {entry.step for _, entry in self.taken}
            self.stream = itertools.islice(self.batches, step, None)
        states = {place: self._state(self.places[place]) for place in new}
        if self.lanes is None:
            first = states[new[0]]
            places = (states.get(place, first) for place in range(len(self.places)))
            self.lanes = jax.tree.map(lambda *x: jnp.stack(x), *places)
        else:
            for place, state in states.items():
                self.lanes = put(self.lanes, place, state)
        anyone = self.taken[0][1]
        self.numbers = self.program.numbers([(entry or anyone).number for entry in self.places])

    def _state(self, entry: Any) -> State:
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
        return _stacked([present.get(place, anyone) for place in range(len(self.places))])

    def _out_of_data(self, entries: list[_Entry]) -> None:
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
        values = self.evaluation.metrics(self.program, self.lanes, self.numbers, self.base)
        for place, entry in due:
            metrics = {name: float(x[place]) for name, x in values.items()}
            entry.note(entry.step, {f"validation/{name}": x for name, x in metrics.items()})
            entry.validation_loss = metrics["loss"]
            if metrics["loss"] < entry.best_metrics.get("loss", math.inf):
                entry.best = take(self.lanes.adapters, place)
                entry.best_step, entry.best_metrics, entry.waited = entry.step, metrics, 0
            else:
                entry.waited += 1
            if self.evaluation.patience is not None and entry.waited >= self.evaluation.patience:
                entry.stopped = "patience"

    def _leave(self, place: int, entry: _Entry, keep: bool = True) -> None:
        """Frees a place."""
        state = take(self.lanes, place)
        self.places[place] = None
        if keep:
            entry.last = state.last_good if entry.stopped == "diverged" else state.adapters
        if entry.stopped is None:
            # A state is several times its adapters, and many may wait for their next stage.
            entry.state = jax.tree.map(np.asarray, state._replace(key=None))


def _stacked(batches: list[Any]) -> Any:
    """Batches of several runs, `[N, ...]`."""

    def one(*arrays: Any) -> Any:
        shapes = {np.shape(x) for x in arrays}
        if len(shapes) > 1:
            raise ValueError(
                f"the runs' batches have arrays of shapes {', '.join(map(str, sorted(shapes)))}; "
                "expected the same from all runs of a program"
            )
        return np.stack(arrays) if isinstance(arrays[0], np.ndarray) else jnp.stack(arrays)

    return jax.tree.map(one, *batches)
