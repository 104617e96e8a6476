"""`lora-jax sweep`: many LoRA runs in as few programs as there can be, and what is best of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

from lora_jax.cli.failures import CliError, on_interrupt, sentences
from lora_jax.cli.parsing import from_values, given, to_json
from lora_jax.cli.report import Reporter, peak_gib
from lora_jax.cli.run_config import SATIRE
from lora_jax.cli.sweep_board import Board
from lora_jax.cli.sweep_config import Config, GridOptions, Run, read_file, shared_with
from lora_jax.cli.sweep_folder import SweepFolder
from lora_jax.cli.sweep_problem import SweepProblem, halving
from lora_jax.cli.sweep_report import Findings, draw, write_report
from lora_jax.sweep import results

__all__ = ["Config", "Run", "run", "start"]

FIELDS = [field.name for field in dataclasses.fields(Run)]


def start(argv: Sequence[str]) -> Config | None:
    """What the options are that are not given: the file's, the default run's, or their own."""
    words = itertools.pairwise(["", *argv])
    path = next((y for x, y in words if y.endswith(".py") and not x.startswith("-")), None)
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
        values = {**to_json(shared_with(SATIRE)), **values}
    return from_values(Config, json.loads(json.dumps(values, default=str)), Path(path))


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
        tested = problem.test(fitted, reporter)
        rows = [
            {
                **row,
                "seconds": round(board.standings[k].seconds, 2),
                **{f"test_{name}": value for name, value in tested.get(k, {}).items()},
            }
            for k, row in enumerate(results.result_rows(fitted))
        ]
        for number, arrived in enumerate(fitted):
            if arrived.adapters is not None:
                own, rules = problem.config.of_run(runs[number]), problem.rules(runs[number])
                folder.save_run(number, own, arrived.adapters, rules)
        found = Findings.of(rows, FIELDS)
        history = results.history_rows(fitted)
        folder.write_tables(rows, history)
        with folder.writing():
            pictures = draw(folder.path, found, rows, history)
        summary = {
            **found.summary(),
            "stopped": {str(k): row["stopped"] for k, row in enumerate(rows)},
            "seconds": round(time.perf_counter() - started, 1),
            "peak_gib": peak_gib(),
        }
        with folder.writing():
            write_report(folder.path, found, rows, pictures, summary)
        folder.write_json("result.json", summary)
    reporter.say()
    reporter.table(*found.table())
    reporter.event("done", folder=folder.path, **summary)
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    reporter.say()
    reporter.say(f"Done in {minutes} min {seconds} s; {folder.path} holds:")
    reporter.say(folder.contents())
    return 0
