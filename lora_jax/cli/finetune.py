"""`lora-jax finetune`: LoRA and QLoRA of a language model, from model and data to picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from lora_jax import train
from lora_jax.cli.failures import on_interrupt, sentences
from lora_jax.cli.parsing import from_file, given
from lora_jax.cli.plot import plot_curves
from lora_jax.cli.report import Reporter, peak_gib
from lora_jax.cli.run_config import SATIRE, Config
from lora_jax.cli.run_folder import RunFolder
from lora_jax.cli.training import Problem, fit, summary, test

__all__ = ["Config", "run", "start"]


def start(argv: Sequence[str]) -> Config | None:
    """What the options are that are not given: a file's, the default run's, or their own."""
    if (folder := given(argv, "resume")) is not None:
        return from_file(Config, RunFolder.existing(Path(folder), "finetune").path / "config.json")
    if (path := given(argv, "config")) is not None:
        return from_file(Config, Path(path))
    return SATIRE if given(argv, "data") in (None, SATIRE.data.data) else None


def run(config: Config) -> int:
    """Runs the command.

    Args:
      config: its options.

    Returns:
      The exit status.

    Raises:
      CliError: if something asked for cannot be had, or the training diverges.
      Interrupted: on Ctrl-C or SIGTERM; the sentence says what was saved.
    """
    started, reporter = time.perf_counter(), Reporter(config.run.log)
    with sentences(ValueError):  # before anything is read
        _ = config.rule, train.make_optimizer(config.optimizer)
    if config.run.resume is not None:
        folder = RunFolder.existing(config.run.resume, "finetune")
    else:
        folder = RunFolder.create(config.run.out, "finetune")
        folder.write_config(config)
    if folder.is_finished:
        again = f"lora-jax finetune --config {folder.path / 'config.json'}"
        reporter.say(f"{folder.path} is finished; {again} runs it again.")
        return 0
    with on_interrupt(folder.outcome):
        problem = Problem.load(config, reporter)
        fitted = fit(problem, folder, reporter)
        result = {
            **summary(problem, folder, fitted),
            "test": test(problem, folder, reporter, fitted.adapters),
            "seconds": round(time.perf_counter() - started, 1),
            "peak_gib": peak_gib(),
        }
        with folder.writing():
            title = f"{Path(config.model.model).name}, {config.model.base}, r={config.adapter.rank}"
            majority = (result["test"] or {}).get("majority")
            plot_curves(
                folder.path / "curves.png", folder.records(), title=title, majority=majority
            )
        folder.write_json("result.json", result)
    minutes, seconds = divmod(round(result["seconds"]), 60)
    reporter.event("done", folder=folder.path, **result)
    reporter.say()
    reporter.say(f"Done in {minutes} min {seconds} s; {folder.path} holds:")
    reporter.say(folder.contents())
    return 0
