"""What a sweep is: its runs, from lists on the command line or a Python file, and what they share.

runs = lj.sweep.grid(Run(rank=4), learning_rate=[1e-3, 3e-3], seed=range(3))
config.of_run(runs[0])      # what `lora-jax finetune` would train
"""

from __future__ import annotations

import dataclasses
import functools
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from lora_jax.cli import run_config
from lora_jax.cli.failures import CliError
from lora_jax.cli.options import (
    AdapterOptions,
    DataOptions,
    EvaluationOptions,
    LogOptions,
    LoopOptions,
    ModelOptions,
    RunOptions,
    ScoringOptions,
    TrainingOptions,
    at_least,
)
from lora_jax.sweep import grid

Schedule = Literal["cosine", "linear", "constant"]


@dataclasses.dataclass(frozen=True)
class Run:
    """What may differ from run to run; every field is an option of `lora-jax finetune`.

    What is not a number (targets, rslora, schedule) is the same for all runs of a program, and so
    is `lora_plus_ratio`; the numbers differ within one.
    """

    targets: str = AdapterOptions.targets
    rank: int = AdapterOptions.rank
    alpha: float = AdapterOptions.alpha
    rslora: bool = AdapterOptions.rslora
    dropout: float = AdapterOptions.dropout
    init_scale: float = AdapterOptions.init_scale
    learning_rate: float = TrainingOptions.learning_rate
    schedule: Schedule = TrainingOptions.schedule
    warmup: float = TrainingOptions.warmup
    weight_decay: float = TrainingOptions.weight_decay
    clip: float = TrainingOptions.clip
    lora_plus_ratio: float = TrainingOptions.lora_plus_ratio
    seed: int = TrainingOptions.seed


def _listed(parse: Callable[[str], list[Any]], metavar: str) -> PrimitiveConstructorSpec:
    """One word on the command line, and several values: `1,2,4`."""

    def values(words: list[str]) -> tuple[Any, ...]:
        return tuple(value for part in words[0].split(",") if part for value in parse(part.strip()))

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=values,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(_text, value))],
    )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _whole_numbers(text: str) -> list[int]:
    first, colon, end = text.partition(":")
    return list(range(int(first), int(end))) if colon else [int(first)]


def _truths(text: str) -> list[bool]:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return [text.lower() == "true"]


Integers = Annotated[tuple[int, ...], _listed(_whole_numbers, "INT,...")]
Floats = Annotated[tuple[float, ...], _listed(lambda text: [float(text)], "FLOAT,...")]
Truths = Annotated[tuple[bool, ...], _listed(_truths, "BOOL,...")]


@dataclasses.dataclass(frozen=True)
class GridOptions:
    """What differs: lists such as 1,2,4, of which every combination is a run.

    Whole numbers may be a range, 0:3 for 0,1,2. A file of runs takes the place of all of these.
    """

    rank: Integers = (Run.rank,)
    """Rank of each adapter."""
    alpha: Floats = (Run.alpha,)
    """The update is scaled by alpha / rank."""
    learning_rate: Annotated[Floats, arg(aliases=("--lr",))] = (Run.learning_rate,)
    """At its highest."""
    warmup: Floats = (Run.warmup,)
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: Floats = (Run.weight_decay,)
    """Decoupled, times the learning rate."""
    dropout: Floats = (Run.dropout,)
    """Probability with which an input of an adapter is dropped in training."""
    init_scale: Floats = (Run.init_scale,)
    """How many times as large as usual adapters start; A alone, for B starts at zero."""
    clip: Floats = (Run.clip,)
    """Largest norm of the gradient."""
    lora_plus_ratio: Floats = (Run.lora_plus_ratio,)
    """How many times as fast B learns (LoRA+, arXiv:2402.12354)."""
    rslora: Truths = (Run.rslora,)
    """Whether to scale by alpha / sqrt(rank) instead (arXiv:2312.03732): false,true for both."""
    targets: tuple[Annotated[str, arg(metavar="REGEX")], ...] = (Run.targets,)
    """The weights to adapt, regular expressions side by side: for they may hold commas."""
    schedule: tuple[Schedule, ...] = (Run.schedule,)
    """How the learning rate falls after the warm-up, side by side."""
    seed: Integers = (Run.seed,)
    """Of the adapters' start, dropout, noise and the order of the data."""

    def runs(self) -> list[Run]:
        """Every combination; the last option changes fastest.

        Raises:
          ValueError: if one of them has no value.
        """
        return grid(Run(), **vars(self))


@dataclasses.dataclass(frozen=True)
class SweepOptions(LogOptions):
    """The sweep: which runs, how many at once, and where everything goes."""

    file: Positional[Annotated[Path | None, arg(metavar="FILE.py")]] = None
    """A Python file that has `runs`, a list of `Run`, and may have `options`, a dictionary of the
    options below."""
    whole: tuple[Annotated[str, arg(metavar="REGEX")], ...] = ()
    """Weights that every run trains whole beside its adapters, such as norm/scale."""
    at_once: int | None = None
    """Runs that a program trains side by side; as many as fit, if not given, and on a CPU at most
    8, beyond which it gains little."""
    device_memory: Annotated[str | None, arg(metavar="SIZE")] = None
    """Such as 80GB or 23.5GiB; if not given, the GPU's own, or what this machine has free."""
    halving: Annotated[tuple[int, ...], arg(metavar="STEP")] = ()
    """Steps at which only the best on validation go on (successive halving, arXiv:1502.07943)."""
    halving_keep: float = 0.5
    """The share of the runs that goes on."""
    out: Path | None = None
    """The folder for everything; runs/sweep-TIME, if not given. The same command with the same
    folder goes on where it was stopped."""
    save_every: int = 50
    """Steps between saves, from which a sweep that was stopped goes on."""
    dry_run: bool = False
    """Print the plan, and stop before anything is compiled."""

    def __post_init__(self) -> None:
        at_least(self, 1, "at_once", "save_every")


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains many LoRA runs beside each other, in as few programs as there can be, and compares.

        lora-jax sweep --rank 1,2,4,8,16 --lr 1e-3,3e-3 --seed 0:3 --out runs/ranks
        lora-jax sweep ranks.py --data mine.jsonl --task completion --out runs/mine

    Every combination is a run, and equals `lora-jax finetune` with its options. Without --data it
    is the default run of that. A file has runs that are no grid:

        from dataclasses import replace
        import lora_jax as lj
        from lora_jax.cli.sweep import Run

        runs = [replace(Run(), rank=r, alpha=2.0 * r, seed=s) for r in (4, 16) for s in range(3)]
        runs += lj.sweep.grid(Run(rslora=True), rank=[64], learning_rate=[1e-4, 3e-4])
        options = {"data": "mine.jsonl", "task": "completion", "steps": 200}

    The plan comes first. A run that diverges ends there, and the others do not notice. What is
    left: tables (CSV, Parquet), pictures, a report for the browser, and each run's adapter in a
    folder that generate, evaluate and convert take.
    """

    sweep: SweepOptions
    grid: GridOptions
    model: ModelOptions
    data: DataOptions
    training: LoopOptions
    evaluation: ScoringOptions

    def runs(self) -> list[Run]:
        """The runs, of the file or of the grid.

        Raises:
          CliError: if the file has none.
          ValueError: if the grid is empty.
        """
        path = self.sweep.file
        return self.grid.runs() if path is None else list(read_file(path).runs)

    def of_run(self, run: Run) -> run_config.Config:
        """What `lora-jax finetune` would train."""
        own = vars(run)
        names = {field.name for field in dataclasses.fields(AdapterOptions)}
        adapter = {name: value for name, value in own.items() if name in names}
        training = {name: value for name, value in own.items() if name not in names}
        return run_config.Config(
            self.model,
            self.data,
            AdapterOptions(**adapter, whole=self.sweep.whole),
            TrainingOptions(**vars(self.training), **training),
            EvaluationOptions(**vars(self.evaluation)),
            RunOptions(),
        )


def shared_with(config: run_config.Config) -> Config:
    """The sweep of this one run."""
    own = {**vars(config.adapter), **vars(config.training)}
    lists = {field.name: (own[field.name],) for field in dataclasses.fields(GridOptions)}
    kept = lambda kind, group: kind(  # noqa: E731
        **{field.name: getattr(group, field.name) for field in dataclasses.fields(kind)}
    )
    return Config(
        SweepOptions(),
        GridOptions(**lists),
        config.model,
        config.data,
        kept(LoopOptions, config.training),
        kept(ScoringOptions, config.evaluation),
    )


@dataclasses.dataclass(frozen=True)
class SweepFile:
    """What a Python file says of a sweep.

    Attributes:
      runs: its runs, in order.
      options: those of the command line, by name.
    """

    runs: Sequence[Run]
    options: dict[str, Any]


@functools.cache  # it is run once, although its options are needed before those of the command line
def read_file(path: Path) -> SweepFile:
    """Runs a file.

    Raises:
      CliError: if there is none, it raises, or it has no list of runs.
    """
    if not path.is_file():
        raise CliError(f"there is no file {str(path)!r}; write a Python file that has runs.")
    try:
        values = runpy.run_path(str(path))
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        place = f", line {line.lineno}" if line.filename == str(path) else ""
        raise CliError(f"{path}{place}: {type(error).__name__}: {error}.") from error
    runs, options = values.get("runs"), values.get("options", {})
    if not isinstance(runs, list | tuple) or not all(isinstance(run, Run) for run in runs):
        what = "no runs" if runs is None else f"runs = {runs!r:.80}"
        raise CliError(
            f"{path} has {what}; write runs = [Run(rank=4), Run(rank=8)], with Run from "
            "lora_jax.cli.sweep."
        )
    if not isinstance(options, dict):
        raise CliError(f"{path} has options = {options!r:.80}, expected a dictionary by name.")
    return SweepFile(runs, options)
