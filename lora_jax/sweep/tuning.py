"""A grid that grows until its best is inside: where an optimum at the edge is none.

rows = tune(train, lj.sweep.grid(Run(), rank=[1, 8], learning_rate=[1e-3, 2e-3, 4e-3]), ...)

rank 1   1e-3   2e-3 [4e-3]             best at the edge: 8e-3 is tried, and so on
rank 8   1e-3  [2e-3] 4e-3              done
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lora_jax.sweep.fields import fields_of
from lora_jax.sweep.results import Best, Row, best, cells

R = TypeVar("R")


def tune(
    train: Callable[[Sequence[R], int], Sequence[Row]],
    runs: Sequence[R],
    *,
    metric: str,
    over: str = "learning_rate",
    seed: str = "seed",
    factor: float = 2.0,
    most: int = 8,
) -> list[Row]:
    """Trains a grid, and goes on beyond its edge wherever the best of a value is there.

    Args:
      train: from runs, and the number of the round, to a row for each, as `results.result_rows`
        gives them. All that a round adds is trained together.
      runs: the grid, frozen dataclasses.
      metric: the column that is compared, by its mean over seeds; less is better.
      over: the field that is tuned, a positive number, for each combination of the others.
      seed: the field that is averaged over.
      factor: how far beyond the edge the next value is.
      most: rounds after the first.

    Returns:
      The rows of all rounds.

    Raises:
      ValueError: if there is a best at the edge still after so many rounds.
    """
    names = list(fields_of(runs[0]))
    rows = list(train(runs, 0))
    for number in itertools.count(1):
        at_edge = [x for x in chosen(rows, names, metric=metric, over=over, seed=seed) if x.edge]
        if not at_edge:
            break
        if number > most:
            values = ", ".join(f"{name} {x:g}" for name, x in at_edge[0].cell.values.items())
            raise ValueError(
                f"the best {over} is at the edge of what was tried after {most} rounds more: "
                f"{values}; expected a minimum inside, so look at why there is none"
            )
        rows += train(beyond(runs[0], at_edge, over=over, factor=factor), number)
    return rows


def chosen(
    rows: Sequence[Row], names: Sequence[str], *, metric: str, over: str, seed: str = "seed"
) -> list[Best]:
    """The best value of one field for each combination of the others."""
    return best(cells(rows, metric, names=names, seed=seed), over=over)


def beyond(like: R, at_edge: Sequence[Best], *, over: str, factor: float) -> list[R]:
    """The runs that come next: for each best at an edge the value beyond it, with its seeds."""
    further: list[Any] = []
    for found in at_edge:
        step = factor if found.edge == "high" else 1 / factor
        for row in found.cell.rows:
            fields = {name: row[name] for name in fields_of(like)}
            fields[over] *= step
            further.append(dataclasses.replace(like, **fields))  # type: ignore[type-var]
    return further
