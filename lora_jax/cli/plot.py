"""The picture of a run: loss and accuracy against the steps, in training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

INK, FAINT, BLUE, ACCENT = "#1f2933", "#9aa5b1", "#2f6fb0", "#d64545"
# Of each panel: its name in a step, its name in an evaluation, and its label.
PANELS = (("loss", "nll", "loss (nats)"), ("accuracy", "accuracy", "accuracy"))


def plot_curves(
    path: Path, records: Sequence[dict[str, Any]], *, title: str, majority: float | None = None
) -> None:
    """Draws a run as a PNG.

    Args:
      path: the file to write.
      records: the lines of `metrics.jsonl`: steps with `loss` and `accuracy`, evaluations with
        `validation/nll` and `validation/accuracy`, tests with `test`, `nll` and `accuracy`.
      title: above the picture.
      majority: share of the most frequent label, to be told from what was learned.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "validation/nll" in record]
    tests = {record["test"]: record for record in records if "test" in record}
    last = steps[-1]["step"]
    width = max(1, min(15, len(steps) // 8))
    figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK, fontweight="bold")
    panels = figure.subplots(1, 2)
    for axes, (name, evaluated, label) in zip(panels, PANELS, strict=True):
        x = np.array([record["step"] for record in steps])
        y = np.array([record[name] for record in steps])
        axes.plot(x, y, color=FAINT, linewidth=0.8, alpha=0.7, label="each batch")
        axes.plot(x, _smooth(y, width), color=INK, linewidth=1.8, label=f"mean of {width} batches")
        if evaluations:
            points = [record[f"validation/{evaluated}"] for record in evaluations]
            x = np.array([record["step"] for record in evaluations])
            axes.plot(x, points, "o-", color=BLUE, markersize=4, label="validation")
        if tests:
            places = {"before": 0, "after": last}
            x = np.array([places[when] for when in tests])
            y = np.array([record[evaluated] for record in tests.values()])
            axes.plot(x, y, "o", color=ACCENT, markersize=7, label="test", zorder=5, clip_on=False)
            for a, b in zip(x, y, strict=True):
                below = name == "accuracy" and b > 0.1  # out of the curve's way, above the axis
                axes.annotate(
                    f"{100 * b:.1f} %" if name == "accuracy" else f"{b:.2f}",
                    (a, b),
                    xytext=(8 if a else 6, -4 if a else -17 if below else 11),
                    textcoords="offset points",
                    color=ACCENT,
                    fontweight="bold",
                    bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8},
                    zorder=6,
                )
        axes.set_xlabel("step", color=INK)
        axes.set_ylabel(label, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlim(0, last)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylim(0, None)
    panels[1].set_ylim(0, 1)
    panels[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if majority is not None:
        panels[1].axhline(
            majority, color=FAINT, linestyle="--", linewidth=1, label="majority class"
        )
    panels[1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the `width` values around each, of fewer at the ends."""
    kernel = np.ones(width)
    total = np.convolve(values, kernel, mode="same")
    return total / np.convolve(np.ones(len(values)), kernel, mode="same")
