"""How a sweep goes: one table of its runs on a terminal, and a few lines anywhere else."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import math
import time
from collections.abc import Callable, Iterator, Sequence

from rich.live import Live
from rich.table import Table
from rich.text import Text

from lora_jax.cli.report import LINES, Reporter
from lora_jax.cli.sweep_config import Run
from lora_jax.sweep.plots import shown

RECENT = 20  # steps by which speed is told
STYLES = {"diverged": "bold red", "done": "green", "training": "bold", "waiting": "dim"}


@dataclasses.dataclass
class Tick:
    """A step of the runs side by side, which are told of one after the other.

    Attributes:
      moment: in seconds, when the first of them was.
      runs: their numbers.
      tokens: of all of them.
    """

    moment: float
    runs: set[int] = dataclasses.field(default_factory=set)
    tokens: float = 0.0


@dataclasses.dataclass
class Standing:
    """Where a run is.

    Attributes:
      values: of what differs between the runs.
      step: steps done.
      train, validation: its last losses.
      state: "waiting", "training", "done", or why it ended.
      seconds: from its first to its last step, those of the runs beside it included.
    """

    values: Sequence[str]
    step: int = 0
    train: float | None = None
    validation: float | None = None
    state: str = "waiting"
    seconds: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether there are steps to come."""
        return self.state in ("waiting", "training")


class Board:
    """Keeps the standings, and shows them.

    Speed is that of the last steps, the compilation before the first one left out; the time that is
    left is for the steps of all runs that have not ended, at this speed.
    """

    def __init__(self, reporter: Reporter, runs: Sequence[Run], steps: int, names: Sequence[str]):
        self.reporter, self.steps, self.names = reporter, steps, names
        values = [[shown(getattr(run, name)) for name in names] for run in runs]
        self.standings = [Standing(own) for own in values]
        self._recent: collections.deque[Tick] = collections.deque(maxlen=RECENT)
        self._begun: dict[int, float] = {}
        self._live: Live | None = None
        self._told = 0

    @contextlib.contextmanager
    def shown(self) -> Iterator[Callable[[int, int, dict[str, float]], None]]:
        """Shows the table while in here; gives what is to be told of each run's numbers."""
        if not self.reporter.live:
            yield self.on_metrics
            return
        with Live(
            get_renderable=self.table, console=self.reporter.console, refresh_per_second=4
        ) as self._live:
            yield self.on_metrics
        self._live = None

    def on_metrics(self, number: int, step: int, metrics: dict[str, float]) -> None:
        """Notes the numbers of a run's step, or of an evaluation."""
        own, now = self.standings[number], time.perf_counter()
        name = "step" if "loss" in metrics else "validation"
        self.reporter.event(name, run=number, step=step, **metrics)
        if name == "validation":
            own.validation = metrics["validation/loss"]
            return
        own.step, own.train = step, metrics["loss"]
        own.seconds = now - self._begun.setdefault(number, now)
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        own.state = "training" if finite else "diverged"
        if not finite:
            own.step -= 1
            self.reporter.say(f"run {number} ({self._described(own)}) diverged at step {step}.")
        if step == self.steps and finite:
            own.state = "done"
        if not self._recent or number in self._recent[-1].runs:
            self._recent.append(Tick(now))
        self._recent[-1].runs.add(number)
        self._recent[-1].tokens += metrics.get("tokens", 0.0)
        self._say_how_far()

    def _say_how_far(self) -> None:
        """Prints a line now and then, where there is no terminal."""
        done = sum(one.step for one in self.standings)
        share = done * LINES // (self.steps * len(self.standings))
        if share > self._told and not self.reporter.live:
            self._told = share
            self.reporter.say(self.summary())

    def speed(self) -> tuple[float, float] | None:
        """Steps and tokens a second, of all runs together; None as long as nobody knows."""
        if len(self._recent) < 2:
            return None
        # What the last one took is not known before the next.
        ticks = list(self._recent)[:-1]
        seconds = self._recent[-1].moment - ticks[0].moment
        return sum(len(x.runs) for x in ticks) / seconds, sum(x.tokens for x in ticks) / seconds

    def summary(self) -> str:
        """The sweep in a line."""
        done, total = sum(one.step for one in self.standings), self.steps * len(self.standings)
        losses = [one.train for one in self.standings if one.state == "training"]
        parts = [f"training {done:,}/{total:,}"]
        if finite := [loss for loss in losses if loss is not None]:
            low, high = f"{min(finite):.3f}", f"{max(finite):.3f}"
            parts.append(f"{len(finite)} runs at loss {low}" + (f" to {high}" * (high != low)))
        if ended := sum(not one.is_open for one in self.standings):
            parts.append(f"{ended} of {len(self.standings)} have ended")
        if (speed := self.speed()) is not None:
            left = sum(self.steps - one.step for one in self.standings if one.is_open)
            parts += [f"{speed[1]:,.0f} tokens/s", f"ETA {_duration(left / speed[0])}"]
        return "  ".join(parts)

    def table(self) -> Table:
        """As many runs as there is room for: those that train first, and those that wait last."""
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        columns = ("run", *self.names, "step", "train loss", "validation loss", "tokens/s", "ETA")
        for name in columns:
            table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        rank = {"training": 0, "waiting": 2}
        order = sorted(
            range(len(self.standings)), key=lambda k: rank.get(self.standings[k].state, 1)
        )
        room = max(3, self.reporter.console.height - 5)
        speed = self.speed()
        training = sum(one.state == "training" for one in self.standings)
        for number in sorted(order[:room]):
            one = self.standings[number]
            of_run = ["", ""]
            if one.state == "training" and speed is not None:
                left = (self.steps - one.step) * training / speed[0]
                of_run = [f"{speed[1] / training:,.0f}", _duration(left)]
            table.add_row(
                *(str(number), *one.values, f"{one.step}/{self.steps}"),
                *("" if x is None else f"{x:.4f}" for x in (one.train, one.validation)),
                *of_run,
                Text(one.state, style=STYLES.get(one.state, "yellow")),
            )
        hidden = len(order) - min(room, len(order))
        table.caption = self.summary() + (f"  ({hidden} runs not shown)" if hidden else "")
        table.caption_justify = "left"
        return table

    def end(self, stopped: Sequence[str]) -> None:
        """Notes why each run ended."""
        for one, why in zip(self.standings, stopped, strict=True):
            one.state = why

    def _described(self, one: Standing) -> str:
        pairs = zip(self.names, one.values, strict=True)
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in pairs)


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
