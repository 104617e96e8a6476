"""The folder of one run: everything that it leaves behind, as `CONTENTS` lists it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lora_jax.checkpoint import save_adapters
from lora_jax.cli.failures import CliError, uninterrupted, writing
from lora_jax.cli.parsing import to_json
from lora_jax.core.rules import LoraRule
from lora_jax.files import parse_object
from lora_jax.formats.peft import write_peft
from lora_jax.train import Checkpoints

CONTENTS = {
    "curves.png": "loss and accuracy",
    "checkpoint": "the best adapter, for lj.load_adapters and --adapter",
    "adapter": "the same for peft and transformers",
    "metrics.jsonl": "every step and every evaluation",
    "result.json": "the run in a few numbers",
    "config.json": "its options, for --config",
    "state": "where --resume goes on",
}
NEEDED = 64 * 2**20  # bytes; adapters of a small model several times over, and plenty


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Writes what a run produces; whatever cannot be written is a `CliError`.

    Attributes:
      path: the folder.
      command: whose run it is.
    """

    path: Path
    command: str

    @classmethod
    def create(cls, out: Path | None, command: str) -> Self:
        """Makes the folder, before anything costs time.

        Args:
          out: the folder; `runs/<command>-<time>`, if None.
          command: whose run it is.

        Raises:
          CliError: if the folder holds something already, or cannot be written, or the disk is
            all but full.
        """
        folder = cls(out or Path("runs") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}", command)
        path, remedy = folder.path, "write --out with a folder on another disk."
        with writing(path, f"make room, or {remedy}"):
            # The options alone are what a run leaves that never came to train: take its place.
            if path.is_dir() and any(x.name != "config.json" for x in path.iterdir()):
                raise CliError(
                    f"{path} is not empty; write --out with a new folder"
                    + (f", or {folder.resume} to go on." if folder.is_run else ".")
                )
            path.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(path).free) < NEEDED:
                raise CliError(
                    f"the disk of {path} has {free / 2**20:.0f} MiB left, expected at least "
                    f"{NEEDED >> 20}; make room, or {remedy}"
                )
        return folder

    @classmethod
    def existing(cls, path: Path, command: str) -> RunFolder:
        """The folder of a run that was begun.

        Raises:
          CliError: if it is none.
        """
        folder = cls(path, command)
        if not folder.is_run:
            raise CliError(
                f"{path} has no config.json; write the folder of a run, as --out gave it."
            )
        return folder

    @property
    def is_run(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "config.json").is_file()

    @property
    def is_finished(self) -> bool:
        """Whether the run here came to its end."""
        return (self.path / "result.json").is_file()

    @property
    def resume(self) -> str:
        """The command that goes on from here."""
        return f"lora-jax {self.command} --resume {shlex.quote(str(self.path))}"

    def checkpoints(
        self, every: int = 1, keep: int = 1, identity: Mapping[str, Any] | None = None
    ) -> Checkpoints:
        """Where the training goes on."""
        return Checkpoints(self.path / "state", every=every, keep=keep, identity=identity or {})

    def outcome(self) -> str:
        """What has been done so far, and the command that goes on from here."""
        step = self.checkpoints().latest_step()
        if step is None:
            return f"nothing was trained yet. Write {self.resume} to begin."
        return f"step {step} is saved. Write {self.resume} to go on."

    def writing(self) -> Any:
        """Turns what goes wrong on the disk into a sentence about what to do."""
        return writing(
            self.path,
            "what was saved there before is still there. Make room, and write "
            f"{self.resume} to go on.",
        )

    def write_config(self, config: Any) -> None:
        """Writes `config.json`."""
        self.write_json("config.json", to_json(config))

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file, whole or not at all."""
        self._write(name, json.dumps(value, indent=2, default=str) + "\n")

    def _write(self, name: str, text: str) -> None:
        partial = self.path / f".{name}.partial"
        with self.writing():
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # the rename must not reach the disk before the content
            partial.replace(self.path / name)

    def record(self, **values: Any) -> None:
        """Adds a line to `metrics.jsonl`."""
        with self.writing(), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, without those that were not written to their end."""
        try:
            content = (self.path / "metrics.jsonl").read_bytes()
        except FileNotFoundError:
            return []
        found = []
        for line in content.splitlines():
            with contextlib.suppress(ValueError):
                found.append(parse_object(line, "metrics.jsonl"))
        return found

    def rewind(self, step: int) -> None:
        """Takes back what `metrics.jsonl` says of the steps after one, and of the test."""
        kept = [record for record in self.records() if record.get("step", step + 1) <= step]
        self._write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    def complete(self, history: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        """Writes `metrics.jsonl` anew, with the lines that could not be written at their time.

        Args:
          history: a step's number and its numbers, of all steps and evaluations.
        """
        seconds = {
            record["step"]: {"seconds": record["seconds"]}
            for record in self.records()
            if "seconds" in record
        }
        lines = (
            {"step": step, **metrics, **(seconds.get(step, {}) if "loss" in metrics else {})}
            for step, metrics in history
        )
        self._write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def save(self, adapters: Any, rules: Sequence[LoraRule], base_model: str) -> None:
        """Saves an adapter in both forms, over the one that was saved before.

        Args:
          adapters: the tree.
          rules: what made it.
          base_model: what it belongs to, by a name that PEFT understands.
        """
        with uninterrupted(), self.writing():
            save_adapters(self.path / "checkpoint", adapters, rules=rules)
            write_peft(self.path / "adapter", adapters, base_model=base_model)

    def contents(self) -> str:
        """What is in the folder, a line each."""
        return "\n".join(
            f"  {name:<14} {what}" for name, what in CONTENTS.items() if (self.path / name).exists()
        )
