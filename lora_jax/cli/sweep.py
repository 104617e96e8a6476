"""`lora-jax sweep`: many LoRA runs in as few programs as there can be, and what is best of them."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.cli.failures import CliError, on_interrupt, sentences
from lora_jax.cli.parsing import from_values, given, to_json
from lora_jax.cli.report import Reporter, peak_gib
from lora_jax.cli.run_config import SATIRE
from lora_jax.cli.sweep_board import Board
from lora_jax.cli.sweep_config import Config, GridOptions, Run, read_file, shared_with
from lora_jax.cli.sweep_folder import SweepFolder
from lora_jax.cli.sweep_problem import SweepProblem, halving
from lora_jax.cli.sweep_report import Findings, draw, write_report
from lora_jax.sweep import Fitted, results

__all__ = ["Config", "Run", "run", "start"]

FIELDS = [field.name for field in dataclasses.fields(Run)]


def start(argv: Sequence[str]) -> Config | None:
    """What the options are that are not given: the file's, the default run's, or their own."""
    path = next((word for word in argv if word.endswith(".py")), None)
    if path is None:
        own_data = given(argv, "data") not in (None, SATIRE.data.data)
        return None if own_data else shared_with(SATIRE)
    options = read_file(Path(path)).options
    for name in (*(field.name for field in dataclasses.fields(GridOptions)), "lr"):
        if name in options or given(argv, name) is not None:
            raise CliError(f"{path} has the runs; write {name} in these, and nowhere else.")
    chosen = {name: given(argv, name) or options.get(name) for name in ("data", "task")}
    values = {**options, **{name: value for name, value in chosen.items() if value is not None}}
    if chosen["data"] in (None, SATIRE.data.data):
        values = {**json.loads(json.dumps(to_json(shared_with(SATIRE)))), **values}
    return from_values(Config, values, Path(path))


def run(config: Config) -> int:
    """Runs the command.

    Args:
      config: its options.

    Returns:
      The exit status.

    Raises:
      CliError: if something asked for cannot be had.
      Interrupted: on Ctrl-C or SIGTERM; the sentence says how to go on.
    """
    started, reporter = time.perf_counter(), Reporter(config.sweep.log)
    with sentences(ValueError):  # before anything is read
        runs = config.runs()
        for one in runs:
            _ = config.of_run(one).rule, config.of_run(one).optimizer
    halving(config)
    if not runs:
        raise CliError(f"{config.sweep.file} has an empty list of runs; write at least one.")
    if config.sweep.dry_run:
        problem = SweepProblem.load(config, runs, reporter)
        problem.show(problem.fitting(problem.plan()), reporter)
        return 0
    folder = SweepFolder.opened(config, runs)
    if folder.is_finished:
        reporter.say(f"{folder.path} is finished; write another --out to run it again.")
        return 0
    with on_interrupt(folder.outcome):
        problem = SweepProblem.load(config, runs, reporter)
        plan = problem.plan()
        if (at_once := folder.at_once()) is None:
            plan = problem.fitting(plan)
            folder.begin(config, runs, [group.at_once for group in plan.groups])
        else:  # what is free may have changed, and the programs must not
            pairs = zip(plan.groups, at_once, strict=True)
            groups = tuple(dataclasses.replace(group, at_once=n) for group, n in pairs)
            plan = dataclasses.replace(plan, groups=groups)
        problem.show(plan, reporter)
        reporter.say()
        names = results.varying([vars(one) for one in runs], FIELDS)
        board = Board(reporter, runs, config.training.steps, names)
        fitted = problem.fit(plan, folder, board)
        rows = table_of(fitted, problem.test(fitted, reporter), board)
        save_runs(fitted, rows, problem, folder)
        history = results.history_rows(fitted)
        folder.write_tables(rows, history)
        found = Findings.of(rows, FIELDS)
        summary = {
            **found.summary(),
            "stopped": [row["stopped"] for row in rows],
            "seconds": round(time.perf_counter() - started, 1),
            "peak_gib": peak_gib(),
        }
        with folder.writing():
            pictures = draw(folder.path, found, rows, history)
            write_report(folder.path, found, rows, pictures, summary)
        folder.write_json("result.json", summary)
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    reporter.say()
    reporter.table(*found.table())
    reporter.event("done", folder=folder.path, **summary)
    reporter.say()
    reporter.say(f"Done in {minutes} min {seconds} s; {folder.path} holds:")
    reporter.say(folder.contents())
    return 0


def table_of(
    fitted: Sequence[Fitted], tests: Mapping[int, Mapping[str, float]], board: Board
) -> list[dict[str, Any]]:
    """A row for each run, with its time and its test."""
    rows = results.result_rows(fitted)
    for number, row in enumerate(rows):
        row["seconds"] = round(board.standings[number].seconds, 2)
        row |= {f"test_{name}": value for name, value in tests.get(number, {}).items()}
    return rows


def save_runs(
    fitted: Sequence[Fitted],
    rows: Sequence[results.Row],
    problem: SweepProblem,
    folder: SweepFolder,
) -> None:
    """Saves each run that has an adapter."""
    for one, row in zip(fitted, rows, strict=True):
        if one.adapters is not None:
            rules = problem.rules(one.run)
            folder.save_run(row, problem.config.of_run(one.run), one.adapters, rules)
