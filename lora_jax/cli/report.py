"""What a command says while it goes: the plan, its progress, the outcome.

For people there is a progress bar on a terminal, and plain lines anywhere else, without control
characters. For programs there is one JSON object a line, and nothing beside it.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from lora_jax.core.leaves import AdaptedArray, QuantizedArray
from lora_jax.core.tree import combine, count_params, named_leaves

LINES = 20  # about as many lines of progress, where there is no terminal


class Reporter:
    """Writes to the standard output."""

    def __init__(self, mode: Literal["progress", "json", "quiet"] = "progress") -> None:
        self.json = mode == "json"
        self.console = Console(highlight=False, quiet=mode != "progress")
        self.live = self.console.is_terminal and mode == "progress"
        if not self.console.is_terminal:
            self.console.width = 120  # of a log, which is not cut at 80 columns

    def say(self, text: str = "") -> None:
        """Prints a line, for people."""
        self.console.print(text, markup=False, soft_wrap=True)

    def event(self, name: str, /, **values: Any) -> None:
        """Prints a JSON object, for programs."""
        if self.json:
            print(json.dumps({"event": name, **values}, default=str), flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table of text on the left and numbers on the right.

        Where the terminal is too narrow, it is the text that is cut.
        """
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        table.add_column(columns[0], no_wrap=True, overflow="ellipsis")
        for number, column in enumerate(columns[1:], 1):
            width = max(len(cell) for cell in (column, *(row[number] for row in rows)))
            table.add_column(column, justify="right", no_wrap=True, min_width=width)
        for row in rows:
            table.add_row(*row)
        self.console.print(table, markup=False)

    def facts(self, title: str, pairs: Iterable[tuple[str, Any]]) -> None:
        """Prints names and values, one below the other."""
        self.say()
        self.say(title)
        pairs = list(pairs)
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            text = f"{value:.4g}" if isinstance(value, float) else value
            self.say(f"  {name:<{width}}  {text}")

    def plan(self, base: Any, adapters: Any) -> None:
        """Prints which weights are trained, how all are stored, and what that takes."""
        rows = list(map(_described, named_leaves(combine(base, adapters))))
        count = count_params(base, adapters)
        trained = sum(row[-1] != "-" for row in rows)
        self.say()
        self.table(("weight", "shape", "stored as", "bits", "MiB", "adapter", "trained"), rows)
        self.say(f"{trained} of {len(rows)} weights are adapted: {count}.")
        self.say()
        self.event("plan", trainable=count.trainable, total=count.total)

    def scores(
        self, number: int, scores: Mapping[str, Mapping[str, float]], majority: float | None = None
    ) -> None:
        """Prints what came out of the test.

        Args:
          number: of records.
          scores: metrics before and after training.
          majority: share of the most frequent label, if there are labels.
        """
        names = list(next(iter(scores.values())))
        rows = [(when, *(shown(n, one[n]) for n in names)) for when, one in scores.items()]
        if majority is not None:
            shares = [shown(n, majority) if n == "accuracy" else "-" for n in names]
            rows.insert(0, ("majority class", *shares))
        self.say()
        self.table((f"{number:,} test records", *names), rows)

    @contextlib.contextmanager
    def progress(
        self, what: str, total: int, *, done: int = 0, lines: int = LINES
    ) -> Iterator[Rounds]:
        """Shows how far a loop has come.

        Args:
          what: happens in the loop.
          total: rounds in all.
          done: rounds before this one began.
          lines: about how many to print, where there is no terminal.
        """
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            console=self.console,
            disable=not self.live,
            transient=True,
        ) as bar:
            task = bar.add_task(what, total=total, completed=done, shown="")

            def show(rounds: int, shown: str) -> None:
                bar.update(task, completed=rounds, shown=shown)
                if not self.live and (rounds % max(1, total // lines) == 0 or rounds == total):
                    self.say(f"{what} {rounds}/{total}  {shown}")

            yield Rounds(show, total, done)


class Rounds:
    """The rounds of a loop as they are done: how fast they go, and how long it will take.

    The first round compiles, so it counts for neither.
    """

    def __init__(self, show: Callable[[int, str], None], total: int, done: int):
        self._show = show
        self._total, self._done = total, done
        self._recent: collections.deque[tuple[float, float]] | None = None
        self._moment = time.perf_counter()

    def advance(self, tokens: float = 0, **numbers: float) -> float:
        """One round more.

        Args:
          tokens: of the round, if it is one of tokens.
          **numbers: to show, by name.

        Returns:
          The seconds that it took.
        """
        seconds = self.pause()
        self._done += 1
        if self._recent is None:
            self._recent = collections.deque(maxlen=20)
        else:
            self._recent.append((seconds, tokens))
        parts = [f"{name} {value:.3f}" for name, value in numbers.items()]
        spent, seen = (sum(column) for column in zip((0.0, 0.0), *self._recent, strict=True))
        parts += [f"{seen / spent:,.0f} tokens/s"] if seen else []
        parts += [f"{memory:.1f} GiB"] if (memory := peak_gib()) else []
        if self._recent:
            left = (self._total - self._done) * spent / len(self._recent)
            parts += [f"ETA {datetime.timedelta(seconds=round(left))}"]
        self._show(self._done, "  ".join(parts))
        return seconds

    def pause(self) -> float:
        """Says that the time since the last round was for something else, and how much it was."""
        last, self._moment = self._moment, time.perf_counter()
        return self._moment - last


def _described(named: tuple[str, Any]) -> tuple[str, ...]:
    """A row of the plan: a weight's path and shape, how it is stored and what is trained of it.

    Bits are those of a parameter, with its share of the scales.
    """
    path, leaf = named
    base, adapter, trained = leaf, "-", "-"
    if isinstance(leaf, AdaptedArray):
        base = leaf.base
        trained = f"{count_params(base, leaf.adapter).trainable:,}"
        adapter = "whole" if leaf.is_replaced else f"r={leaf.adapter.rank}"
    kind = base.kind if isinstance(base, QuantizedArray) else str(base.dtype)
    count = count_params(base, None)
    bits = f"{8 * count.frozen_bytes / count.frozen:.4g}"
    size = mebibytes(count.frozen_bytes)
    return path, "x".join(map(str, base.shape)), kind, bits, size, adapter, trained


def shown(name: str, value: float) -> str:
    """A metric, as people write it."""
    return f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.3f}"


def mebibytes(count: int) -> str:
    """Bytes in MiB, for a column of them."""
    return f"{count / 2**20:,.2f}"


def peak_gib() -> float | None:
    """The most memory occupied so far, in GiB: the device's, else the process's where known."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return round(statistics["peak_bytes_in_use"] / 2**30, 2)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)
