"""A group's training as a task: what may be done by another thread, process or machine.

fit      ──► tasks: a group, its runs as they are, and the step that they go to
executor ──► `map(work, tasks)`, wherever it likes
fit      ◄── the runs as they arrived
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import jax

from lora_jax.sweep.groups import Plan
from lora_jax.sweep.places import Batches, Entry, Evaluation, Round
from lora_jax.sweep.program import Program, without_keys
from lora_jax.sweep.progress import IDENTITY, Progress
from lora_jax.train import LossFn, Transform

T = TypeVar("T")
R = TypeVar("R")


class Executor(Protocol):
    """What runs tasks, in whatever order: those of `concurrent.futures` are such, and Ray's."""

    def map(self, fn: Callable[[T], R], tasks: Iterable[T], /) -> Iterable[R]:
        """The results, in the order of the tasks."""
        ...


class Task(NamedTuple):
    """A group that is to be brought to a step.

    Attributes:
      group: its number in the plan.
      entries: those of its runs that go on.
      until: the step.
      is_last: whether they are done then.
    """

    group: int
    entries: Sequence[Entry]
    until: int
    is_last: bool


@dataclasses.dataclass
class Work:
    """Trains groups: all that a worker has to know. Attributes are those of `fit`.

    Attributes:
      tell: called with a run that has something new in its history.
      programs: by group, since what is compiled for a stage serves the next.
    """

    plan: Plan
    loss_fn: LossFn
    base: Any
    batches: Batches
    make_key: Callable[[Any], jax.Array]
    evaluation: Evaluation
    accumulate: int
    transform: Transform | None
    folder: Path | None
    save_every: int | None
    tell: Callable[[Entry], None] | None
    programs: dict[int, Program] = dataclasses.field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # What is compiled stays where it is.
        return {**self.__dict__, "programs": {}}

    def __call__(self, task: Task) -> list[Entry]:
        """The runs of a task, as they arrive; its own are left as they are, for a second try."""
        program = self._program(task.group)
        entries = [dataclasses.replace(x, history=list(x.history)) for x in task.entries]
        progress = self._progress(task, program)
        return Round(
            *(program, self.base, self.batches, self.make_key, self.evaluation),
            until=task.until,
            is_last=task.is_last,
            tell=self.tell or (lambda entry: None),
            save=None if progress is None else progress.save,
            save_every=self.save_every,
        ).run(entries, None if progress is None else progress.find())

    def _program(self, group: int) -> Program:
        if group not in self.programs:
            self.programs[group] = Program(
                *(self.plan, self.plan.groups[group], self.loss_fn),
                shared=not callable(self.batches),
                accumulate=self.accumulate,
                transform=self.transform,
            )
        return self.programs[group]

    def _progress(self, task: Task, program: Program) -> Progress | None:
        if self.folder is None:
            return None
        if not (self.folder / IDENTITY).is_file():
            raise ValueError(
                f"{self.folder} is not on the machine of this worker; write a folder that all "
                "machines share"
            )
        anyone, adapters = task.entries[0], program.group.like

        @functools.cache
        def like() -> dict[str, Any]:
            start = lambda: program.start(anyone.number, self.make_key(anyone.run))  # noqa: E731
            state = jax.eval_shape(lambda: without_keys(start()))
            return {"state": state, "last": adapters, "best": adapters}

        folder = self.folder / f"until-{task.until}" / f"group-{task.group}"
        return Progress(folder, task.entries, like)
