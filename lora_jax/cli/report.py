"""What a run says while it goes: the plan, its progress, the outcome.

On a terminal there is a progress bar; anywhere else plain lines, and no control characters.
"""

from __future__ import annotations

import collections
import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lora_jax.core.leaves import AdaptedArray, QuantizedArray
from lora_jax.core.rules import LoraRule
from lora_jax.core.tree import combine, count_params, named_leaves
from lora_jax.data import Example
from lora_jax.train import Scores

LINES = 20  # about as many lines of progress, where there is no terminal


class Reporter:
    """Writes to the standard output."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.live = self.console.is_terminal
        if not self.live:
            self.console.width = 120  # of a log, which is not cut at 80 columns

    def say(self, text: str = "") -> None:
        """Prints a line."""
        self.console.print(text, markup=False, soft_wrap=True)

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

    def plan(self, base: Any, adapters: Any, rule: LoraRule) -> None:
        """Prints which weights are trained, how all are stored, and what that takes."""
        rows, matched = [], 0
        for path, leaf in named_leaves(combine(base, adapters)):
            stored, rank, trained = leaf, "-", "-"
            if isinstance(leaf, AdaptedArray):
                stored, matched = leaf.base, matched + 1
                rank = f"r={leaf.adapter.rank}"
                trained = f"{count_params(stored, leaf.adapter).trainable:,}"
            kind = stored.kind if isinstance(stored, QuantizedArray) else str(stored.dtype)
            rows.append((path, "x".join(map(str, stored.shape)), kind, rank, trained))
        self.say()
        self.say(
            f"Rule {rule.pattern!r}, rank {rule.rank}, alpha {rule.alpha:g}: "
            f"{matched} of {len(rows)} weights match."
        )
        self.table(("weight", "shape", "stored as", "adapter", "trained"), rows)
        self.say(str(count_params(base, adapters)))
        self.say()

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Any]:
        """Shows how far a loop has come; gives a function to be called after each round.

        That function takes the tokens of the round and, by name, numbers to show. The first round
        compiles, so it counts for neither the speed nor the time that is left.
        """
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        ) as bar:
            task = bar.add_task(what, total=total, shown="")
            recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=21)
            done = 0

            def advance(tokens: int, **numbers: float) -> None:
                nonlocal done
                done += 1
                recent.append((time.perf_counter(), tokens))
                seconds = recent[-1][0] - recent[0][0]
                speed = sum(n for _, n in list(recent)[1:]) / seconds if seconds else math.nan
                parts = [f"{name} {value:.3f}" for name, value in numbers.items()]
                parts += [f"{speed:.0f} tokens/s"] if seconds else []
                bar.update(task, advance=1, shown="  ".join(parts))
                if not self.live and (done % max(1, total // LINES) == 0 or done == total):
                    left = (total - done) * seconds / max(1, len(recent) - 1)
                    self.say("  ".join((f"{what} {done}/{total}", *parts, f"ETA {left:.0f} s")))

            yield advance

    def scores(self, majority: float, before: Scores, after: Scores, number: int) -> None:
        """Prints accuracy and negative log-likelihood before and after."""
        self.say()
        rows = [("majority class", f"{100 * majority:.1f} %", f"{_entropy(majority):.3f}")]
        for name, scores in (("before", before), ("after", after)):
            rows.append((name, f"{100 * scores.accuracy:.1f} %", f"{scores.nll:.3f}"))
        self.table((f"{number} held-out examples", "accuracy", "NLL (nats)"), rows)

    def examples(
        self, examples: Sequence[Example], answers: Sequence[str], before: Scores, after: Scores
    ) -> None:
        """Prints the first held-out examples with what the model makes of them."""
        rows = []
        for example, old, new in zip(
            examples, before.probabilities, after.probabilities, strict=False
        ):
            text = example.text if len(example.text) <= 72 else example.text[:71] + "…"
            guess = [f"{answers[p.argmax()].strip()} {100 * p.max():.0f} %" for p in (old, new)]
            rows.append((text, answers[example.label].strip(), *guess))
        self.say()
        self.table((f"the first {len(rows)} of them", "truth", "before", "after"), rows)


def _entropy(share: float) -> float:
    """NLL in nats of answering with the classes' own shares."""
    return -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)
