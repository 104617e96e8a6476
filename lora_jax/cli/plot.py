"""The picture of a run: loss and accuracy against the examples seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

INK, FAINT, ACCENT = "#1f2933", "#9aa5b1", "#d64545"


def plot_curves(
    path: Path,
    steps: Sequence[dict[str, Any]],
    *,
    title: str,
    majority: float,
    before: tuple[float, float],
    after: tuple[float, float],
) -> None:
    """Draws a run as a PNG.

    Each training example is seen once, and is scored before it is trained on; so the curves, too,
    are about sentences that the model has not seen.

    Args:
      path: the file to write.
      steps: one record a step, with `examples` (seen so far), `loss` and `accuracy`.
      title: above the picture.
      majority: share of the largest class among the held-out examples.
      before: accuracy and NLL on the held-out examples, untrained.
      after: the same, trained.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    seen = np.array([record["examples"] for record in steps])
    figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK, fontweight="bold")
    panels = figure.subplots(1, 2)
    for axes, name, label, (start, end) in (
        (panels[0], "loss", "loss (nats)", (before[1], after[1])),
        (panels[1], "accuracy", "accuracy", (before[0], after[0])),
    ):
        values = np.array([record[name] for record in steps])
        axes.plot(
            seen,
            values,
            color=FAINT,
            linewidth=0.8,
            alpha=0.7,
            label="each batch, before its update",
        )
        axes.plot(seen, _smooth(values), color=INK, linewidth=1.8, label="mean of 15 batches")
        axes.plot(
            [0, seen[-1]],
            [start, end],
            "o",
            color=ACCENT,
            markersize=7,
            label="held-out examples",
            zorder=5,
            clip_on=False,
        )
        first = (6, 11 if name == "loss" else -17)  # where the curve does not go
        for x, y, offset in ((0, start, first), (seen[-1], end, (8, -4))):
            axes.annotate(
                f"{100 * y:.1f} %" if name == "accuracy" else f"{y:.2f}",
                (x, y),
                xytext=offset,
                textcoords="offset points",
                color=ACCENT,
                fontweight="bold",
                bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8},
                zorder=6,
            )
        axes.set_xlabel("training examples seen", color=INK)
        axes.set_ylabel(label, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlim(0, seen[-1])
        axes.xaxis.set_major_formatter("{x:,.0f}")
    panels[0].set_ylim(0, None)
    panels[1].set_ylim(0, 1)
    panels[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[1].axhline(majority, color=FAINT, linestyle="--", linewidth=1, label="majority class")
    panels[1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)


def _smooth(values: np.ndarray, width: int = 15) -> np.ndarray:
    """Mean of the `width` values around each, of fewer at the ends."""
    kernel = np.ones(min(width, len(values)))
    total = np.convolve(values, kernel, mode="same")
    return total / np.convolve(np.ones(len(values)), kernel, mode="same")
