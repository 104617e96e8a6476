"""What a sweep found: tidy tables of its runs, means over seeds, and the best of a grid.

    rows = result_rows(fitted)                      # one for each run
    found = best(cells(rows, "validation_loss"))    # for each rank the best learning rate

A mean over seeds comes with its 95 % interval by Student's t: mean ± t · s / √n, where s is the
standard deviation with n - 1.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lora_jax.sweep.fields import fields_of
from lora_jax.train.step import COUNTS

if TYPE_CHECKING:
    from lora_jax.sweep import Fitted

Row = Mapping[str, Any]
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and how well it is known.

    Attributes:
      mean: infinite if a value is not finite.
      half: half the width of its 95 % interval; NaN if there is one value, or one is not finite.
      n: how many values there are.
    """

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        half = "" if math.isnan(self.half) else f" ± {self.half:.4f}"
        return f"{self.mean:.4f}{half}"


def interval(values: Iterable[float]) -> Interval:
    """The mean of independent values, such as those of several seeds."""
    values = list(values)
    if not all(map(math.isfinite, values)):
        return Interval(math.inf, math.nan, len(values))
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Interval(mean, math.nan, n)
    spread = statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, t_quantile(0.5 + CONFIDENCE / 2, n - 1) * spread, n)


def t_quantile(probability: float, degrees: int) -> float:
    """Where Student's distribution function, of whole degrees of freedom, is `probability` >= 0.5.

    The function has a closed form then (Abramowitz and Stegun, 26.7.3 and 26.7.4), which is cut in
    halves until floats are too coarse.
    """
    low, high = 0.0, 1.0
    while _t_distribution(high, degrees) < probability:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (
            (middle, high) if _t_distribution(middle, degrees) < probability else (low, middle)
        )
    return high


def _t_distribution(t: float, degrees: int) -> float:
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine, odd = math.sin(angle), math.cos(angle), degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + inside / 2  # `inside` is the probability of [-t, t]


# Tables.


def result_rows(fitted: Sequence[Fitted]) -> list[dict[str, Any]]:
    """One row for each run: its config, and what it arrived at.

    `train_loss` is the mean over the last tenth of its steps; `validation_...` is of its best
    evaluation, and `last_validation_loss` of its last. What there is none of is None.
    """
    rows = []
    for number, one in enumerate(fitted):
        steps = [metrics for _, metrics in one.history if "loss" in metrics]
        evaluations = [metrics for _, metrics in one.history if "validation/loss" in metrics]
        last = [metrics["loss"] for metrics in steps][-max(1, len(steps) // 10) :]
        rows.append(
            {
                "run": number,
                **fields_of(one.run),
                "stopped": one.stopped,
                "steps": one.step,
                "tokens": int(sum(metrics.get("tokens", 0) for metrics in steps)),
                "train_loss": statistics.fmean(last) if last else None,
                "best_step": one.best_step,
                **{f"validation_{k}": x for k, x in one.best_metrics.items() if k not in COUNTS},
                "last_validation_loss": evaluations[-1]["validation/loss"] if evaluations else None,
            }
        )
    return rows


def history_rows(fitted: Sequence[Fitted]) -> list[dict[str, Any]]:
    """One row for each run and step: its numbers, those of an evaluation included."""
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for number, one in enumerate(fitted):
        for step, metrics in one.history:
            row = rows.setdefault((number, step), {"run": number, "step": step})
            row |= {name.replace("/", "_"): value for name, value in metrics.items()}
    return list(rows.values())


def write_csv(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Writes rows under the names of all their columns; what a row does not have is empty."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _columns(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Writes rows as `write_csv`, with their types; needs pyarrow."""
    import pyarrow
    import pyarrow.parquet

    columns = {name: [row.get(name) for row in rows] for name in _columns(rows)}
    pyarrow.parquet.write_table(pyarrow.table(columns), os.fspath(path))


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


# Comparisons.


class Cell(NamedTuple):
    """Runs that differ by their seed alone.

    Attributes:
      values: the fields that differ within the sweep, without the seed.
      scores: of each run; infinite for one that diverged or has none.
      rows: the runs themselves.
    """

    values: dict[str, Any]
    scores: tuple[float, ...]
    rows: tuple[Row, ...]

    @property
    def interval(self) -> Interval:
        """Of the scores."""
        return interval(self.scores)


class Best(NamedTuple):
    """The best of several cells that differ by one field.

    Attributes:
      cell: it.
      edge: whether it is at the `"low"` or `"high"` end of what was tried, so that a better one
        may lie beyond; None if it is in between, or nothing else was tried.
    """

    cell: Cell
    edge: Literal["low", "high"] | None


def varying(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Which of these columns hold more than one value."""
    return [name for name in names if len({row[name] for row in rows}) > 1]


def cells(
    rows: Sequence[Row], metric: str, *, names: Sequence[str], seed: str = "seed"
) -> list[Cell]:
    """Runs that differ by their seed alone, put together.

    Args:
      rows: as of `result_rows`.
      metric: the column of the scores, of which less is better.
      names: the columns that are hyperparameters.
      seed: which of them is the seed.
    """
    shown = [name for name in varying(rows, names) if name != seed]
    parts: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(row[name] for name in shown), []).append(row)
    return [
        Cell(
            dict(zip(shown, key, strict=True)),
            tuple(_score(row, metric) for row in part),
            tuple(part),
        )
        for key, part in parts.items()
    ]


def _score(row: Row, metric: str) -> float:
    value = row.get(metric)
    if row["stopped"] == "diverged" or value is None or not math.isfinite(value):
        return math.inf
    return float(value)


def best(cells: Sequence[Cell], *, over: str = "learning_rate") -> list[Best]:
    """For all other hyperparameters the value of one, by the mean over seeds.

    Args:
      cells: as of `cells`.
      over: the hyperparameter that is chosen.

    Returns:
      The best of each part, in order; of equal ones the first.
    """
    parts: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        others = tuple(value for name, value in cell.values.items() if name != over)
        parts.setdefault(others, []).append(cell)
    found = []
    for part in parts.values():
        chosen = min(part, key=lambda cell: cell.interval.mean)
        tried = sorted(cell.values[over] for cell in part if over in cell.values)
        edge: Literal["low", "high"] | None = None
        if len(tried) > 1 and chosen.values[over] in (tried[0], tried[-1]):
            edge = "low" if chosen.values[over] == tried[0] else "high"
        found.append(Best(chosen, edge))
    return found
