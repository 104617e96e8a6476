"""The folder of a sweep: everything that it leaves behind, as `CONTENTS` lists it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.checkpoint import save_adapters
from lora_jax.cli import run_config
from lora_jax.cli.environment import environment
from lora_jax.cli.failures import CliError
from lora_jax.cli.parsing import read_object, to_json
from lora_jax.cli.run_folder import RunFolder
from lora_jax.cli.sweep_config import Config, GridOptions, Run
from lora_jax.cli.training import UNIDENTIFYING
from lora_jax.core.rules import LoraRule
from lora_jax.sweep import results

CONTENTS = {
    "report.html": "all of it, for a browser",
    "rank.png": "the loss against the rank",
    "learning_rate.png": "the loss against the learning rate",
    "heat_map.png": "the loss by rank and learning rate",
    "curves.png": "the losses of all runs",
    "results.csv": "a row for each run; the same in results.parquet",
    "history.csv": "a row for each run and step; the same in history.parquet",
    "runs": "each run's adapter and options, for --adapter and finetune --config",
    "result.json": "the best of them in a few numbers",
    "config.json": "options, runs, commit, versions and hardware",
    "state": "where the same command goes on",
}
# The runs are compared as a whole, wherever they come from.
UNCOMPARED = {
    *UNIDENTIFYING,
    *(field.name for field in dataclasses.fields(GridOptions)),
    *("file", "device_memory", "dry_run"),
}


class SweepFolder(RunFolder):
    """Writes what a sweep produces; whatever cannot be written is a `CliError`."""

    @classmethod
    def opened(cls, config: Config, runs: Sequence[Run]) -> SweepFolder:
        """A new folder, or the one in which the same sweep was begun.

        Raises:
          CliError: if there is something else in it, or it cannot be written.
        """
        out = config.sweep.out
        if out is None or not (out / "config.json").is_file():
            return cls.create(out, "sweep")
        folder = cls(out, "sweep")
        folder._check(config, runs)
        return folder

    @property
    def resume(self) -> str:
        """The command that goes on from here."""
        return f"the same command with --out {shlex.quote(str(self.path))}"

    def outcome(self) -> str:
        """What an interruption leaves, and the command that goes on from here."""
        return f"what had been saved is in {self.path}. Write {self.resume} to go on."

    def at_once(self) -> list[int] | None:
        """Of each program the runs at once, as the sweep was begun; None if it was not."""
        path = self.path / "config.json"
        return read_object(path)["at_once"] if path.is_file() else None

    def begin(self, config: Config, runs: Sequence[Run], at_once: Sequence[int]) -> None:
        """Writes `config.json`, if the sweep begins here."""
        if not self.is_run:
            self.write_json(
                "config.json",
                {**described(config, runs), "at_once": at_once, "environment": environment()},
            )

    def _check(self, config: Config, runs: Sequence[Run]) -> None:
        before, now = read_object(self.path / "config.json"), described(config, runs)
        if before.get("command") != "sweep":
            raise CliError(f"{self.path} is no sweep's folder; write another --out.")
        for name, value in now["options"].items():
            was = before["options"].get(name)
            if name not in UNCOMPARED and was != value:
                flag = f"--{name.replace('_', '-')}"
                raise CliError(
                    f"{self.path} is of a sweep whose {flag} is {json.dumps(was)}, and here it is "
                    f"{json.dumps(value)}; write another --out to begin anew."
                )
        if before["runs"] != now["runs"]:
            raise CliError(
                f"{self.path} is of a sweep of {len(before['runs'])} runs, which are not these "
                f"{len(runs)}; write another --out to begin anew."
            )

    def write_tables(self, rows: Sequence[results.Row], history: Sequence[results.Row]) -> None:
        """Writes both tables in both forms."""
        with self.writing():
            for name, table in (("results", rows), ("history", history)):
                results.write_csv(self.path / f"{name}.csv", table)
                results.write_parquet(self.path / f"{name}.parquet", table)

    def save_run(
        self, number: int, config: run_config.Config, adapters: Any, rules: Sequence[LoraRule]
    ) -> None:
        """Saves a run's adapter and options, as a folder of `finetune` has them."""
        folder = RunFolder(self.path / run_name(number), "finetune")
        with self.writing():
            folder.path.mkdir(parents=True, exist_ok=True)
            save_adapters(folder.path / "checkpoint", adapters, rules=rules)
        folder.write_config(config)

    def contents(self) -> str:
        """What is in the folder, a line each."""
        return "\n".join(
            f"  {name:<18} {what}" for name, what in CONTENTS.items() if (self.path / name).exists()
        )


def described(config: Config, runs: Sequence[Run]) -> dict[str, Any]:
    """A sweep as JSON has it."""
    values = {"command": "sweep", "options": to_json(config), "runs": list(map(vars, runs))}
    return json.loads(json.dumps(values, default=str))


def run_name(number: int) -> Path:
    """Where a run is in the sweep's folder."""
    return Path("runs") / f"{number:03d}"
