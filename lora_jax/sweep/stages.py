"""`fit`: all runs of a plan trained, stage by stage where successive halving is asked for."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lora_jax.files import shown
from lora_jax.sweep import padding, progress
from lora_jax.sweep.groups import Plan
from lora_jax.sweep.places import Batches, Entry, Evaluation, Metrics, Stopped
from lora_jax.sweep.work import Executor, Task, Work
from lora_jax.train import LossFn, Transform


class Fitted(NamedTuple):
    """What a run arrived at. Its arrays are NumPy's, on the host.

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
    folder: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    identity: Mapping[str, Any] | None = None,
    executor: Executor | None = None,
) -> list[Fitted]:
    """Trains all runs of a plan, each as `lj.train.fit` would train it alone.

    Args:
      loss_fn: as for `lj.train.fit`: of adapters, base, batch and key. It is given adapters whose
        `scale` is a traced value and whose factors are zero beyond the run's own rank.
      base: the frozen tree, shared by all runs.
      plan: the runs, from `plan`.
      batches: one iterable, of which all runs see the same batch at the same time; or a function
        from a run to its own, all of the same shapes. With their own, a run that waits begins as
        soon as a place is free; with the same, when all places are, at the first batch. They are
        in an order that is the same each time. Where a run goes on after a stage or a kill, an
        iterator with `get_state` and `set_state`, as grain's, is told to; from others is drawn
        again what was drawn before.
      make_key: from a run to its PRNG key, for dropout and transforms.
      steps: updates of each run.
      accumulate: in how many parts a batch is run, as for `lj.train.fit`.
      transform: from a key and a batch to the batch that is trained on.
      validation: batches on which `loss_fn` is evaluated, with None for a key. Metrics are averaged
        by "weight" if the loss gives one; the counts "weight" and "tokens" are summed.
      evaluate_every: steps between evaluations; None for one at the end alone.
      patience: a run ends after this many evaluations in a row without a lower loss.
      halving: when the worst of all runs end.
      on_metrics: called with the run, its step and the step's numbers: once, and in order, with
        each row of its history, also with those that an earlier call left in the folder. They are
        told of as they come; with an executor, when it has brought the group to its step.
      folder: where progress is kept, for this sweep alone; nothing is written if None. What was
        computed before the last save there is not computed again: the same call goes on.
      save_every: steps between two saves of a group; None for one when it is done, and at each
        step of `halving`. Keeping it small costs time: a save waits for the device and the disk.
      identity: what else makes this sweep the one it is (model, data), as JSON has it. A folder of
        a sweep with another identity is refused, as is one of other runs or options.
      executor: what trains the groups, on other machines for instance. Its `map` is called with a
        function and a task for each group, once for each step of `halving` and the last step;
        None trains one after the other, here.

    Returns:
      What each run arrived at, in the order of the plan. A run that diverges is frozen there; the
      others go on, and their values are to the last bit those they would have had without it. So
      are, on the same machine's CPU, those of a sweep that was killed and went on from its folder.

    Raises:
      ValueError: before anything is compiled, if options contradict each other, there is only one
        pass through batches that are needed again, or the folder is another sweep's; later, if two
        runs' batches differ in shape, or a file in the folder is damaged.
      OSError: if the folder cannot be read or written. What was there before still is.
    """
    _check(steps, validation, evaluate_every, patience, halving)
    _check_folder(folder, save_every, identity, executor)
    stages = [*(halving.at if halving else ()), steps]
    _check_passes(plan, batches, stages, executor)
    if folder is not None:
        options = {
            "steps": steps,
            "batches": "of each run" if callable(batches) else "the same for all",
            "accumulate": accumulate,
            "transform": transform is not None,
            "validation": len(validation),
            "evaluate_every": evaluate_every,
            "patience": patience,
            "halving": None if halving is None else [list(halving.at), halving.keep],
            "identity": identity or {},
        }
        folder = Path(folder).absolute()
        progress.begin(folder, plan, options)
    entries = [Entry(k, run) for k, run in enumerate(plan.runs)]
    told = [0] * len(entries)

    def tell(entry: Entry) -> None:
        """Tells of what is new in a run's history."""
        rows = entry.history[told[entry.number] :]
        told[entry.number] += len(rows)
        for step, metrics in rows:
            if on_metrics is not None:
                on_metrics(entry.run, step, dict(metrics))

    work = Work(
        *(plan, loss_fn, base, batches, make_key),
        evaluation=Evaluation(validation, evaluate_every, patience),
        accumulate=accumulate,
        transform=transform,
        folder=folder,
        save_every=save_every,
        tell=tell if executor is None else None,
    )
    for until in stages:
        tasks = [
            Task(number, going_on, until, until == steps)
            for number, group in enumerate(plan.groups)
            if (going_on := [entries[k] for k in group.runs if entries[k].stopped is None])
        ]
        for arrived in (map if executor is None else executor.map)(work, tasks):
            for entry in arrived:
                entries[entry.number] = entry
                tell(entry)
        if halving is not None and until < steps:
            _halve([entry for entry in entries if entry.stopped is None], halving.keep)
    return [_fitted(entry, plan) for entry in entries]


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
            raise ValueError(f"{name} is {value}, but there are no validation batches; give some")
    if halving is not None and halving.at[-1] >= steps:
        raise ValueError(f"halving is at step {halving.at[-1]}, expected one before steps={steps}")


def _check_folder(folder: Any, save_every: int | None, identity: Any, executor: Any) -> None:
    if save_every is not None and save_every < 1:
        raise ValueError(f"save_every is {save_every}, expected at least 1")
    for name, value in {"save_every": save_every, "identity": identity}.items():
        if folder is None and value is not None:
            raise ValueError(
                f"{name} is {shown(value)}, but there is no folder to save to; give one"
            )
    if folder is None and getattr(executor, "needs_folder", False):
        raise ValueError(
            "the executor has a group whose worker died go on from its last save, and there is no "
            "folder; give one that all machines share"
        )


def _check_passes(
    plan: Plan, batches: Batches, stages: list[int], executor: Executor | None
) -> None:
    if callable(batches) or iter(batches) is not batches:
        return
    rounds = sum(math.ceil(len(x.runs) / x.at_once) for x in plan.groups)
    if rounds > 1 or len(stages) > 1 or executor is not None:
        raise ValueError(
            "batches is an iterator, which can be gone through once, and the runs need them more "
            "often; give a list, or another iterable that begins anew"
        )


def _halve(entries: list[Entry], keep: float) -> None:
    """Ends the runs that are not among the best; of equal ones the first go on."""
    ranked = sorted(entries, key=lambda entry: entry.validation_loss)
    for entry in ranked[math.ceil(keep * len(ranked)) :]:
        entry.last = entry.state.adapters
        entry.stopped, entry.state = "halved", None


def _fitted(entry: Entry, plan: Plan) -> Fitted:
    assert entry.stopped is not None
    own = plan.own[entry.number]
    last, best = (None if x is None else padding.cut(x, own) for x in (entry.last, entry.best))
    return Fitted(
        run=entry.run,
        adapters=last if best is None else best,
        last=last,
        best_step=entry.best_step,
        best_metrics=entry.best_metrics,
        step=entry.step,
        stopped=entry.stopped,
        history=entry.history,
    )
