"""Tables and pictures of what `study.py` wrote: tables.md, ranks.png, learning_rates.png.

    python experiments/rank_ablation/report.py [RESULTS [FOLDER]]

RESULTS is where the study wrote its numbers, FOLDER where tables and pictures go. What is not there
is left out.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_jax.sweep.plots import DPI, FAINT, GRID, INK, plot_heat_map
from lora_jax.sweep.results import Interval, cells, interval

HERE = Path(__file__).parent
FIELDS = ["rank", "learning_rate", "seed"]
# Tables of the study by what people call them; the first is what the others are compared with.
TABLES = {"main": "bfloat16", "nf4": "NF4", "q4_1": "Q4_1, as in the file"}
COLOURS = {"main": INK, "nf4": "#c2410c", "q4_1": "#0f766e"}
SCORES = {
    "validation_loss": "validation loss (nats a token)",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
}

Found = dict[str, dict[str, Any]]


def main(folder: Path, out: Path) -> None:
    """Writes what there is."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    rows = {name: scored(found, name) for name in (*TABLES, "full") if name in found}
    text = "\n\n".join(sections(found, rows))
    (out / "tables.md").write_text(text + "\n")
    if rows.get("main"):
        plot_ranks(out / "ranks.png", rows)
    if tuning := last_tuning(found):
        plot_heat_map(
            out / "learning_rates.png",
            cells(tuning["rows"], "validation_loss", names=FIELDS),
            label=f"validation loss after {tuning['epochs']:g} epochs (nats a token)",
        )
    print(text)


def scored(found: Found, name: str) -> list[dict[str, Any]]:
    """The runs of a table, each with its scores on the test."""
    tested = {
        tuple(row[field] for field in FIELDS): row
        for row in found.get("test", {}).get("rows", [])
        if row["table"] == name and "rank" in row
    }
    return [
        {**tested.get(tuple(row[field] for field in FIELDS), {}), **row}
        for row in found[name]["rows"]
    ]


def last_tuning(found: Found) -> dict[str, Any] | None:
    """Of the comparisons of learning rates for adapters, the one over most epochs."""
    tunings = [x for name, x in found.items() if name.startswith("tune_") and "full" not in name]
    return max(tunings, key=lambda tuning: tuning["epochs"], default=None)


def by_rank(rows: Sequence[dict], score: str) -> dict[int, list[float]]:
    """A score of all seeds; ranks without it are left out."""
    ranks = dict.fromkeys(row["rank"] for row in rows if row.get(score) is not None)
    return {rank: [row[score] for row in rows if row["rank"] == rank] for rank in ranks}


# Tables.


def sections(found: Found, rows: dict[str, list[dict]]) -> Iterator[str]:
    """The parts of tables.md."""
    yield "Written by report.py from results/. Means of seeds ± half of their 95 % interval."
    before = {
        row["table"]: row for row in found.get("test", {}).get("rows", []) if "rank" not in row
    }
    for name, title in TABLES.items():
        if name in rows:
            yield f"## Base in {title}\n\n{table(rows[name], before.get(name))}"
    if "full" in rows:
        yield f"## Full fine-tuning\n\n{table(rows['full'], None)}"
    if {"speed_main", "speed_serial"} <= found.keys():
        yield f"## Speed\n\n{speed(found['speed_main'], found['speed_serial'])}"


def table(rows: Sequence[dict], before: dict | None) -> str:
    """A line for each rank."""
    lines = [
        "| rank | parameters | learning rate | validation loss | BLEU | ROUGE-L |",
        "|---|---|---|---|---|---|",
    ]
    if before is not None:
        lines.append(
            f"| before training | 0 | | | {before['bleu']:.1f} | {before['rouge_l']:.1f} |"
        )
    scores = {
        score: {rank: interval(values) for rank, values in by_rank(rows, score).items()}
        for score in SCORES
    }
    for rank, loss in scores["validation_loss"].items():
        first = next(row for row in rows if row["rank"] == rank)
        texts = [tenths(scores[name].get(rank)) for name in ("bleu", "rouge_l")]
        cells = [f"{first['parameters']:,}", f"{first['learning_rate']:g}", str(loss), *texts]
        lines.append(f"| {rank or 'all weights'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tenths(found: Interval | None) -> str:
    """A score from 0 to 100 and its interval."""
    if found is None:
        return ""
    return f"{found.mean:.1f}" + ("" if math.isnan(found.half) else f" ± {found.half:.1f}")


def speed(packed: dict[str, Any], serial: dict[str, Any]) -> str:
    """What the runs take together, and what they would take one after another."""
    steps, seeds = packed["steps"], serial["seeds"]
    alone = [row for row in serial["rows"] if "seconds_a_step_mean" in row]
    together = steps * packed["seconds_a_step_mean"]
    one_by_one = steps * seeds * sum(row["seconds_a_step_mean"] for row in alone)
    of_ranks = ", ".join(f"{row['rank']}: {1e3 * row['seconds_a_step_mean']:.1f}" for row in alone)
    return "\n".join(
        [
            f"{packed['runs']} runs of {steps:,} steps, {packed['tokens']:,} tokens without",
            "padding; training alone, without compiling and evaluating, by the mean time of "
            f"{packed['steps_timed']:,} steps.",
            "",
            "| | seconds a step | in all | tokens a second |",
            "|---|---|---|---|",
            f"| side by side | {packed['seconds_a_step_mean']:.4f} | {minutes(together)} | "
            f"{packed['tokens'] / together:,.0f} |",
            f"| one after another | see below | {minutes(one_by_one)} | "
            f"{packed['tokens'] / one_by_one:,.0f} |",
            "",
            f"The ratio is {one_by_one / together:.2f}. One after another is reckoned from "
            f"{alone[0]['steps_timed']} steps of each rank alone, milliseconds a step by rank: "
            f"{of_ranks}.",
        ]
    )


def minutes(seconds: float) -> str:
    """Such as 12 min 5 s."""
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


# The picture.


def plot_ranks(path: Path, rows: dict[str, list[dict]]) -> None:
    """Draws each score against rank, a line for each base, full fine-tuning as a level."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [score for score in SCORES if by_rank(rows["main"], score)]
    figure = Figure(figsize=(4.4 * len(shown), 3.9), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, score in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        tables = [name for name in TABLES if name in rows]
        for place, name in enumerate(tables):
            found = by_rank(rows[name], score)
            # Side by side, where bars would hide one another.
            ranks = [rank * 1.07 ** (place - (len(tables) - 1) / 2) for rank in found]
            means = [statistics.fmean(values) for values in found.values()]
            pairs = list(zip(means, found.values(), strict=True))
            bars = [[mean - min(x) for mean, x in pairs], [max(x) - mean for mean, x in pairs]]
            style = {"marker": "o", "markersize": 4, "capsize": 2.5, "linewidth": 1.4}
            color, label = COLOURS[name], TABLES[name]
            axes.errorbar(ranks, means, bars, color=color, label=label, **style)
        for values in by_rank(rows.get("full", []), score).values():
            mean = statistics.fmean(values)
            axes.axhline(mean, color=FAINT, linestyle="--", label="full fine-tuning")
            axes.axhspan(min(values), max(values), color=GRID, alpha=0.6)
        ticks = list(by_rank(rows["main"], score))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.minorticks_off()
        axes.set_xlabel("rank", color=INK)
        axes.set_title(SCORES[score], loc="left", fontsize=10, fontweight="bold", color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(labelsize=8.5, color=FAINT, labelcolor=INK)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    title = "base; bars: least and most of seeds"
    figure.axes[0].legend(frameon=False, fontsize=8, title=title, title_fontsize=8)
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(*(given + [HERE / "results", HERE][len(given) :]))
