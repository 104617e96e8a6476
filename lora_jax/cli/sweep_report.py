"""What a sweep found, for people: a table, pictures, and both in one page for a browser.

The page is a single file, without a script and without anything that it would have to fetch.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.cli.parsing import read_object
from lora_jax.cli.report import shown
from lora_jax.sweep import plots, results
from lora_jax.sweep.results import Best, Cell, Interval, Row

EDGES = {"low": "at the low edge: try lower", "high": "at the high edge: try higher", None: ""}


class Findings(NamedTuple):
    """What there is to compare.

    Attributes:
      metric: the column by which runs are compared; less is better.
      label: what it is called, with its unit.
      names: the hyperparameters that differ.
      cells: runs that differ by their seed alone.
      best: for each of the other hyperparameters the best learning rate.
      tests: the columns that a test has left.
    """

    metric: str
    label: str
    names: list[str]
    cells: list[Cell]
    best: list[Best]
    tests: list[str]

    @classmethod
    def of(cls, rows: Sequence[Row], fields: Sequence[str]) -> Findings:
        """Those of a table of runs, by validation where there is one."""
        validated = any(row.get("validation_loss") is not None for row in rows)
        metric = "validation_loss" if validated else "train_loss"
        names = results.varying(rows, fields)
        cells = results.cells(rows, metric, names=fields)
        tests = [name for row in rows for name in row if name.startswith("test_")]
        label = f"{metric.replace('_', ' ')} (nats)"
        return cls(metric, label, names, cells, results.best(cells), list(dict.fromkeys(tests)))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The best, as columns and rows of text."""
        names = list(self.best[0].cell.values)
        columns = [*names, "runs", self.label, *self.tests, "learning rate is"]
        rows = []
        for cell, edge in self.best:
            tests = [_shown(name, _of_test(cell, name)) for name in self.tests]
            values = [plots.shown(cell.values[name]) for name in names]
            rows.append([*values, str(len(cell.scores)), str(cell.interval), *tests, EDGES[edge]])
        if not any(row[-1] for row in rows):
            columns, rows = columns[:-1], [row[:-1] for row in rows]
        return [column.replace("_", " ") for column in columns], rows

    def summary(self) -> dict[str, Any]:
        """The best, as JSON has it."""
        return {
            "metric": self.metric,
            "best": [
                {
                    **cell.values,
                    self.metric: _as_json(cell.interval),
                    **{name: _as_json(_of_test(cell, name)) for name in self.tests},
                    "edge": edge,
                    "runs": [row["run"] for row in cell.rows],
                }
                for cell, edge in self.best
            ],
        }


def _of_test(cell: Cell, name: str) -> Interval | None:
    values = [row[name] for row in cell.rows if row.get(name) is not None]
    return results.interval(values) if values else None


def _shown(name: str, found: Interval | None) -> str:
    if found is None:
        return "-"
    if not name.endswith("accuracy"):
        return str(found)
    half = "" if math.isnan(found.half) else f" ± {100 * found.half:.1f}"
    return f"{100 * found.mean:.1f}{half} %"


def _as_json(found: Interval | None) -> dict[str, Any] | None:
    """Without what JSON has no word for."""
    if found is None:
        return None
    return {k: x if math.isfinite(x) else None for k, x in found._asdict().items()}


def draw(
    folder: Path, found: Findings, rows: Sequence[Row], history: Sequence[Row]
) -> dict[str, str]:
    """Draws what there is something to see of.

    Returns:
      The names of the files, and what each shows.
    """
    label, names = found.label, found.names
    pictures = {}
    if any(math.isfinite(cell.interval.mean) for cell in found.cells):
        for x, by in (("rank", "learning_rate"), ("learning_rate", "rank")):
            if x in names:
                plots.plot_against(folder / f"{x}.png", found.cells, x=x, by=by, label=label)
                pictures[f"{x}.png"] = f"{label} against {x.replace('_', ' ')}"
        if {"rank", "learning_rate"} <= set(names):
            plots.plot_heat_map(folder / "heat_map.png", found.cells, label=label)
            pictures["heat_map.png"] = f"{label} by rank and learning rate"
    by = "rank" if "rank" in names else (names or ["seed"])[0]
    colour = next((name for name in ("learning_rate", *names) if name in names), by)
    curves = {"by": by, "colour": colour, "label": "loss (nats)"}
    plots.plot_curves(folder / "curves.png", rows, history, **curves)
    return {**pictures, "curves.png": "loss of each run against its steps"}


def write_report(
    folder: Path,
    found: Findings,
    rows: Sequence[Row],
    pictures: Mapping[str, str],
    summary: Mapping[str, Any],
) -> None:
    """Writes `report.html`, with everything in it."""
    config = read_object(folder / "config.json")
    options, where = config["options"], config["environment"]
    model, source = Path(options["model"]).name, Path(options["data"]).name
    counts = {why: [row["stopped"] for row in rows].count(why) for why in ("done", "diverged")}
    counts["ended early"] = len(rows) - sum(counts.values())
    ends = ", ".join(f"{number} {why}" for why, number in counts.items() if number)
    facts = {
        "runs": f"{len(rows)}: {ends}",
        "steps": f"{options['steps']} of {options['rows']} rows of {options['length']} tokens",
        "base": options["base"],
        "time": f"{summary['seconds'] / 60:.1f} min",
        "on": f"{where['devices']}, {where['processor'] or where['system']}",
        "commit": where["commit"] or "-",
    }
    columns, best = found.table()
    edges = [edge for _, edge in found.best if edge]
    warning = (
        '<p class="warning">The best learning rate is at the edge of what was tried for '
        f"{len(edges)} of {len(found.best)}: a better one may lie beyond.</p>"
        if edges
        else ""
    )
    figures = "\n".join(
        f'<figure><img alt="{html.escape(text)}" src="{_data_uri(folder / name)}">'
        f"<figcaption>{html.escape(text)}</figcaption></figure>"
        for name, text in pictures.items()
    )
    page = PAGE.format(
        title=html.escape(f"Sweep of {model} on {source}"),
        facts="".join(f"<dt>{k}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items()),
        best=_table(columns, best),
        warning=warning,
        figures=figures,
        runs=_table(*_all_runs(found, rows)),
        options=_table(["option", "value"], [[k, _json(v)] for k, v in options.items()]),
        environment=_table(["what", "value"], [[k, str(v)] for k, v in where.items()]),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def _all_runs(found: Findings, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    measured = ("train_loss", "validation_loss", "validation_accuracy", "best_step")
    columns = ["run", *found.names, "stopped", "steps", *measured, *found.tests, "seconds"]
    columns = [name for name in columns if any(row.get(name) is not None for row in rows)]
    text = [[_cell(name, row.get(name)) for name in columns] for row in rows]
    return [name.replace("_", " ") for name in columns], text


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("accuracy"):
        return shown(name, value)
    return f"{value:.4f}" if name.endswith(("loss", "nll", "perplexity")) else plots.shown(value)


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --paper: #ffffff; --raised: #f7f9fb;
  --accent: #c2410c; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e9ed; --soft: #9fb0c0; --line: #323f4b;
  --paper: #14191f; --raised: #1c232b; --accent: #fb923c; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }}
h2 {{ font-size: 1.15rem; margin: 2.5rem 0 0.75rem; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; margin: 0;
  overflow-wrap: anywhere; }}
dt {{ color: var(--soft); }}
dd {{ margin: 0; }}
.wide {{ overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.875rem;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.4rem 0.8rem; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ background: var(--raised); color: var(--soft); font-weight: 600; }}
tbody tr {{ border-top: 1px solid var(--line); }}
details td:last-child, details th:last-child {{ text-align: left; white-space: normal;
  overflow-wrap: anywhere; }}
.warning {{ border-left: 4px solid var(--accent); margin: 1rem 0 0; padding: 0.2rem 0.8rem; }}
.figures {{ display: flex; flex-wrap: wrap; gap: 1.25rem; align-items: flex-start; }}
figure {{ flex: 1 1 24rem; max-width: min(36rem, 100%); min-width: 0; margin: 0; }}
figure:last-child {{ flex-basis: 100%; max-width: 100%; }}
img {{ display: block; width: 100%; height: auto; background: #ffffff; border-radius: 8px;
  border: 1px solid var(--line); padding: 0.5rem; }}
figcaption {{ color: var(--soft); font-size: 0.875rem; margin-top: 0.35rem; }}
summary {{ cursor: pointer; margin: 1rem 0 0.5rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<dl>{facts}</dl>
<h2>The best</h2>
{best}
{warning}
<p>The learning rate with the least mean over seeds, for all other hyperparameters; ± is the 95 %
interval of the mean by Student's t. Runs were chosen on validation; the test decided nothing.</p>
<h2>Pictures</h2>
<div class="figures">
{figures}
</div>
<h2>All runs</h2>
{runs}
<details><summary>Options</summary>{options}</details>
<details><summary>Where it was run</summary>{environment}</details>
</body>
</html>
"""
