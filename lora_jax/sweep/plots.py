"""The pictures of a sweep: its metric against rank, rank × learning rate, and loss curves.

Each function takes what `results` gives and writes a PNG. Colours are told apart by people who are
colour-blind, and by everybody in grey: they run from dark to light with the value that they show.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lora_jax.sweep.results import Cell, Row, best

INK, FAINT, GRID, ACCENT = "#1f2933", "#9aa5b1", "#e4e7eb", "#c2410c"
DPI = 160
PANELS = 6  # of loss curves; more ranks than that are not told apart at a glance

Path = str | os.PathLike[str]


def plot_against(path: Path, cells: Sequence[Cell], *, x: str, label: str, by: str = "") -> None:
    """Draws means over seeds against a hyperparameter, with their 95 % intervals, as a PNG.

    Args:
      path: the file to write.
      cells: as of `results.cells`; of those that differ in anything else the best is shown.
      x: the hyperparameter, a number.
      label: of the metric, with its unit.
      by: another hyperparameter, for each value of which there is a line beside the best one's.
    """
    figure, axes = _figure(6.4, 4.2)
    others = [name for name in cells[0].values if name not in (x, by)]
    lines = sorted({cell.values[by] for cell in cells}) if by in cells[0].values else []
    for value, colour in zip(lines, _colours(len(lines)), strict=True):
        own = [cell for cell in cells if cell.values[by] == value]
        _line(axes, _best_of_each(own, x), x, color=colour, linewidth=1.2, label=shown(value))
    winners = _best_of_each(cells, x)
    _line(axes, winners, x, color=INK, linewidth=2.2, label="best" if lines else "mean")
    for cell in winners:
        finite = [score for score in cell.scores if math.isfinite(score)]
        axes.plot(
            [cell.values[x]] * len(finite), finite, "o", color="white", markersize=2.5, zorder=6
        )
        axes.lines[-1].set_markeredgecolor(INK)
    _number_axis(axes.xaxis, [cell.values[x] for cell in cells])
    axes.set_xlabel(_words(x))
    axes.set_ylabel(label)
    seeds = max(len(cell.scores) for cell in cells)
    note = f"mean of {seeds} seeds, 95 % interval; dots are runs" if seeds > 1 else "one seed"
    _title(axes, f"{label} against {_words(x)}", _note(note, others))
    if lines:
        axes.legend(title=_words(by), frameon=False, fontsize=8, title_fontsize=8)
    _save(figure, path)


def plot_heat_map(
    path: Path, cells: Sequence[Cell], *, x: str = "learning_rate", y: str = "rank", label: str
) -> None:
    """Draws means over seeds on a grid of two hyperparameters, as a PNG.

    The best of each row has a frame; one at the edge of what was tried has an arrow that points to
    where a better one may lie.

    Args:
      path: the file to write.
      cells: as for `plot_against`.
      x: the hyperparameter that is chosen, from left to right.
      y: that for each value of which it is, from below.
      label: of the metric, with its unit.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    columns, lines = (sorted({cell.values[name] for cell in cells}) for name in (x, y))
    others = [name for name in cells[0].values if name not in (x, y)]
    grid: dict[tuple[Any, Any], Cell] = {}
    for value in lines:
        for cell in _best_of_each([cell for cell in cells if cell.values[y] == value], x):
            grid[cell.values[x], value] = cell
    means = np.array(
        [[grid[a, b].interval.mean if (a, b) in grid else np.nan for a in columns] for b in lines]
    )
    finite = means[np.isfinite(means)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    # Bad cells differ by far more than good ones, which are what is to be told apart.
    shares = np.sqrt((np.where(np.isfinite(means), means, high) - low) / ((high - low) or 1))
    figure, axes = _figure(2.2 + 1.05 * len(columns), 1.7 + 0.62 * len(lines))
    colours = colormaps["YlGnBu"](0.92 - 0.87 * shares)
    colours[~np.isfinite(means)] = (1, 1, 1, 1)
    axes.imshow(colours, aspect="auto", origin="lower")
    axes.grid(visible=False)
    for (row, column), mean in np.ndenumerate(means):
        if np.isnan(mean):
            text, colour = "not run", FAINT
        elif math.isinf(mean):
            text, colour = "diverged", ACCENT
        else:
            text, colour = f"{mean:.3f}", "white" if shares[row, column] < 0.45 else INK
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    tidy = [Cell({x: a, y: b}, cell.scores, cell.rows) for (a, b), cell in grid.items()]
    for cell, edge in best(tidy, over=x):
        if not math.isfinite(cell.interval.mean):
            continue
        column, row = columns.index(cell.values[x]), lines.index(cell.values[y])
        corner = (column - 0.46, row - 0.44)
        axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor=ACCENT, linewidth=2.5))
        if edge:  # in a tone that is seen on dark and on light
            arrow, place = ("◀", -0.36) if edge == "low" else ("▶", 0.36)
            axes.text(column + place, row, arrow, ha="center", va="center", color="#fb923c")
    axes.set_xticks(range(len(columns)), list(map(shown, columns)))
    axes.set_yticks(range(len(lines)), list(map(shown, lines)))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(_words(x))
    axes.set_ylabel(_words(y))
    note = f"frame: best of each {_words(y)}; arrow: it is at the edge of what was tried"
    _title(axes, label, _note(note, others))
    _save(figure, path)


def plot_curves(
    path: Path, rows: Sequence[Row], history: Sequence[Row], *, by: str, colour: str, label: str
) -> None:
    """Draws the loss of each run against its steps, as a PNG.

    Args:
      path: the file to write.
      rows: as of `results.result_rows`.
      history: as of `results.history_rows`; what was computed on validation is drawn as dots.
      by: the hyperparameter of which each value has a panel.
      colour: that by which lines are coloured.
      label: of the loss, with its unit.
    """
    values = sorted({row[by] for row in rows}, key=_order)
    if len(values) > PANELS:  # the least, the greatest, and as many as there is room for between
        values = [values[k] for k in np.linspace(0, len(values) - 1, PANELS).round().astype(int)]
    tones = sorted({row[colour] for row in rows}, key=_order)
    palette = dict(zip(tones, _colours(len(tones)), strict=True))
    width = min(3, len(values))
    height = math.ceil(len(values) / width)
    figure, panels = _figure(3.1 * width + 1.2, 2.5 * height + 0.9, height, width)
    by_run: dict[int, list[Row]] = {}
    for row in history:
        by_run.setdefault(row["run"], []).append(row)
    for axes, value in zip(np.ravel(panels), values, strict=False):
        for row in rows:
            if row[by] == value:
                _curve(axes, row, by_run.get(row["run"], []), palette[row[colour]])
        axes.set_title(f"{_words(by)} {shown(value)}", fontsize=9, color=INK, loc="left")
    for place, axes in enumerate(np.ravel(panels)):
        axes.set_visible(place < len(values))
        axes.tick_params(labelbottom=place + width >= len(values))  # nothing is below
    first = np.ravel(panels)[0]
    finite = [row["loss"] for row in history if math.isfinite(row.get("loss", math.nan))]
    if finite:  # a run on its way to infinity would leave the others a line at the bottom
        first.set_ylim(0, 1.15 * float(np.quantile(finite, 0.99)))
    figure.supxlabel("step", fontsize=9, color=INK)
    figure.supylabel(label, fontsize=9, color=INK)
    for tone in tones:
        first.plot([], [], color=palette[tone], label=shown(tone))
    first.plot([], [], "o", color=FAINT, markersize=3.5, label="validation")
    if any(row["stopped"] == "diverged" for row in rows):
        first.plot([], [], "X", color=ACCENT, markersize=6, label="diverged")
    figure.legend(
        *first.get_legend_handles_labels(),
        title=_words(colour),
        loc="outside right upper",
        frameon=False,
        fontsize=8,
        title_fontsize=8,
    )
    _save(figure, path)


def _curve(axes: Any, row: Row, history: Sequence[Row], colour: Any) -> None:
    steps = [line for line in history if math.isfinite(line.get("loss", math.nan))]
    if steps:
        x, y = (np.array([line[name] for line in steps]) for name in ("step", "loss"))
        axes.plot(x, _smooth(y, max(1, len(y) // 12)), color=colour, linewidth=1.1, alpha=0.85)
        if row["stopped"] == "diverged":
            axes.plot(x[-1], y[-1], "X", color=ACCENT, markersize=6, zorder=5)
    points = [line for line in history if math.isfinite(line.get("validation_loss", math.nan))]
    if points:
        x, y = (np.array([line[name] for line in points]) for name in ("step", "validation_loss"))
        axes.plot(x, y, "o", color=colour, markersize=3.5, markeredgecolor="white", zorder=4)


def _line(axes: Any, cells: Sequence[Cell], x: str, **style: Any) -> None:
    known = [cell for cell in cells if math.isfinite(cell.interval.mean)]
    means = [cell.interval.mean for cell in known]
    halves = [0.0 if math.isnan(cell.interval.half) else cell.interval.half for cell in known]
    places = [cell.values[x] for cell in known]
    axes.errorbar(places, means, halves, marker="o", markersize=4.5, capsize=3, **style)


def _best_of_each(cells: Sequence[Cell], x: str) -> list[Cell]:
    """For each value of a hyperparameter, in order, the cell that is best in all others."""
    parts: dict[Any, list[Cell]] = {}
    for cell in cells:
        parts.setdefault(cell.values[x], []).append(cell)
    return [min(parts[k], key=lambda cell: cell.interval.mean) for k in sorted(parts)]


def _colours(number: int) -> list[Any]:
    """From dark to light, without the yellow end that white paper swallows."""
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0.05, 0.8, max(number, 2))))[:number]


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True)
    for axes in np.ravel(panels):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(labelsize=8.5, color=FAINT, labelcolor=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def _title(axes: Any, title: str, note: str) -> None:
    axes.set_title(note, loc="left", fontsize=8, color="#52606d")
    axes.annotate(
        title,
        (0, 1),
        xytext=(0, 22),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=11,
        fontweight="bold",
        color=INK,
    )


def _save(figure: Any, path: Path) -> None:
    # Nothing of when and by which version: the same sweep gives the same bytes.
    figure.savefig(path, metadata={"Software": None})


def _number_axis(axis: Any, values: Iterable[float]) -> None:
    """Ticks at the values themselves, on a logarithmic axis if they are several times apart."""
    from matplotlib.ticker import NullLocator

    values = sorted(set(values))
    if values[0] > 0 and values[-1] / values[0] >= 4:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(values, labels=list(map(shown, values)))
    axis.set_minor_locator(NullLocator())


def _note(note: str, others: Sequence[str]) -> str:
    return note + (f"; best over {', '.join(map(_words, others))}" if others else "")


def _order(value: Any) -> Any:
    """Numbers by size, everything else by its text."""
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def _words(name: str) -> str:
    return name.replace("_", " ")


def shown(value: Any) -> str:
    """A value of a hyperparameter, as people write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the `width` values up to each, of fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
