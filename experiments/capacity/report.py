"""The table and the picture of what `study.py` wrote: table.md and capacity.png.

    python experiments/capacity/report.py [RESULTS [FOLDER]]

A rank breaks at the N where it recalls 90 % of the pairs, read off the line between the two N next
to it, over log N. How that grows with the rank is fitted by least squares over all seeds,

    log2(N at 90 %) = c + slope · log2(rank)
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.sweep.plots import DPI, FAINT, GRID, INK
from lora_jax.sweep.results import Interval, interval

HERE = Path(__file__).parent
RECALL = 0.9


class Fit(NamedTuple):
    """A line through points of log2 against log2, and the standard error of its slope."""

    start: float
    slope: float
    error: float


def main(results: Path, out: Path) -> None:
    """Writes both."""
    found = json.loads((results / "capacity.json").read_text())
    text = table(found["rows"], found["config"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    plot(out / "capacity.png", found["rows"], found["config"])
    print(text)


# What is read off.


def breaks_at(rows: Sequence[dict[str, Any]]) -> float:
    """The N at which runs of one rank and seed recall 90 %; NaN if that is not among those tried.

    The first N counts at which less is recalled, should recall rise again.
    """
    points = sorted((row["pairs"], row.get("recall", 0.0)) for row in rows)
    for (few, above), (many, below) in itertools.pairwise(points):
        if above >= RECALL > below:
            share = (above - RECALL) / (above - below)
            return few * (many / few) ** share
    return math.nan


def breaks(rows: Sequence[dict[str, Any]]) -> dict[int, list[float]]:
    """For each rank the N at which each seed breaks."""
    ranks, seeds = (sorted({row[name] for row in rows}) for name in ("rank", "seed"))
    return {
        rank: [
            breaks_at([row for row in rows if (row["rank"], row["seed"]) == (rank, seed)])
            for seed in seeds
        ]
        for rank in ranks
    }


def line_through(points: dict[int, list[float]]) -> Fit | None:
    """The fit, over what is known; None if that is less than three points."""
    pairs = [(rank, n) for rank, all_n in points.items() for n in all_n if not math.isnan(n)]
    if len(pairs) < 3 or len({rank for rank, _ in pairs}) < 2:
        return None
    x, y = np.log2(np.array(pairs, np.float64)).T
    slope, start = np.polyfit(x, y, 1)
    residual = y - start - slope * x
    spread = math.sqrt((residual**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    return Fit(float(start), float(slope), spread)


def most_bits(rows: Sequence[dict[str, Any]], rank: int) -> Interval:
    """Bits a parameter, at the N where a rank holds most of them."""
    by_pairs: dict[int, list[float]] = {}
    for row in rows:
        if row["rank"] == rank:
            by_pairs.setdefault(row["pairs"], []).append(row.get("bits", 0) / row["parameters"])
    return max(map(interval, by_pairs.values()), key=lambda found: found.mean)


def table(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> str:
    """A line for each rank, and the fit."""
    bits, found = math.log2(config["vocabulary"]), breaks(rows)
    lines = [
        "Written by report.py. Means of seeds ± half of their 95 % interval.",
        "",
        "| rank | parameters | learning rate | N at 90 % recall | its bits a parameter | "
        "most bits a parameter, at any N |",
        "|---|---|---|---|---|---|",
    ]
    for rank, all_n in found.items():
        first = next(row for row in rows if row["rank"] == rank)
        n, size = interval(all_n), first["parameters"]
        if math.isfinite(n.mean):
            where, share = shown(n, 0), f"{n.mean * bits / size:.2f}"
        else:
            where, share = "not among those tried", ""
        most = most_bits(rows, rank)
        lines.append(
            f"| {rank} | {size:,} | {first['learning_rate']:g} | {where} | {share} | "
            f"{shown(most, 2)} |"
        )
    if (fit := line_through(found)) is not None:
        lines += [
            "",
            f"N at 90 % recall grows as rank to the power {fit.slope:.2f} ± {fit.error:.2f} "
            "(standard error of the fit).",
        ]
    return "\n".join(lines)


def shown(found: Interval, digits: int) -> str:
    """A mean, and its interval if there is one."""
    half = "" if math.isnan(found.half) else f" ± {found.half:,.{digits}f}"
    return f"{found.mean:,.{digits}f}{half}"


# The picture.


def plot(path: Path, rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> None:
    """Draws recall against N for each rank, and where ranks break."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.6, 4.3), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.45, 1))
    found = breaks(rows)
    tones = colormaps["viridis"](np.linspace(0.05, 0.85, len(found)))
    colours = dict(zip(found, tones, strict=True))
    for rank, colour in colours.items():
        _recall_line(left, [row for row in rows if row["rank"] == rank], colour)
    left.axhline(100 * RECALL, color=FAINT, linestyle="--", linewidth=1)
    left.set_ylim(-3, 104)
    left.set_xlabel("N, pairs to memorize", color=INK)
    left.set_ylabel("recalled (%)", color=INK)
    left.legend(title="rank", frameon=False, fontsize=8, title_fontsize=8)
    seeds = len(config["seeds"])
    _title(left, "What is recalled", f"mean of {seeds} seeds; bars: the least and the most")

    for rank, all_n in found.items():
        known = [n for n in all_n if not math.isnan(n)]
        right.plot([rank] * len(known), known, "o", color=colours[rank], markersize=5, alpha=0.8)
    if (fit := line_through(found)) is not None:
        ranks = np.array([min(found), max(found)])
        label = f"rank to the power {fit.slope:.2f} ± {fit.error:.2f}"
        right.plot(ranks, 2**fit.start * ranks**fit.slope, color=INK, linewidth=1.2, label=label)
    sizes = {row["rank"]: row["parameters"] for row in rows}
    one_bit = [size / math.log2(config["vocabulary"]) for size in sizes.values()]
    style = {"color": FAINT, "linestyle": "--", "linewidth": 1}
    right.plot(list(sizes), one_bit, label="one bit a parameter", **style)
    right.legend(frameon=False, fontsize=8, loc="upper left")
    right.set_yscale("log", base=2)
    right.set_xlabel("rank", color=INK)
    right.set_ylabel(f"N at {100 * RECALL:.0f} % recall", color=INK)
    _title(right, "Where each rank breaks", f"{seeds} seeds, and a line of least squares")
    _powers(right.xaxis, list(found))
    _powers(left.xaxis, sorted({row["pairs"] for row in rows}))
    low, high = right.get_ylim()
    _powers(right.yaxis, [2**k for k in range(20) if low <= 2**k <= high])
    figure.savefig(path, metadata={"Software": None})


def _recall_line(axes: Any, rows: Sequence[dict[str, Any]], colour: Any) -> None:
    pairs = sorted({row["pairs"] for row in rows})
    shares = [[100 * row.get("recall", 0) for row in rows if row["pairs"] == n] for n in pairs]
    means = [statistics.fmean(x) for x in shares]
    down = [mean - min(x) for mean, x in zip(means, shares, strict=True)]
    up = [max(x) - mean for mean, x in zip(means, shares, strict=True)]
    style = {"marker": "o", "markersize": 4, "capsize": 2.5, "linewidth": 1.6}
    axes.errorbar(pairs, means, [down, up], color=colour, label=str(rows[0]["rank"]), **style)


def _powers(axis: Any, values: Sequence[int]) -> None:
    """A logarithmic axis with these ticks."""
    from matplotlib.ticker import NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(values, labels=[f"{value:,}" for value in values])
    axis.set_minor_locator(NullLocator())
    axis.axes.tick_params(labelsize=8.5, color=FAINT, labelcolor=INK)
    if len(values) > 9:
        axis.axes.tick_params(axis=axis.axis_name, rotation=35)


def _title(axes: Any, title: str, note: str) -> None:
    axes.set_title(note, loc="left", fontsize=8, color="#52606d")
    place = {"xytext": (0, 22), "xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(title, (0, 1), **place, fontsize=11, fontweight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(*(given + [HERE / "results", HERE][len(given) :]))
