"""The folder of one run: everything that it leaves behind, as `CONTENTS` lists it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

from lora_jax.checkpoint import save_adapters
from lora_jax.cli.failures import CliError, uninterrupted, writing
from lora_jax.core.rules import LoraRule
from lora_jax.formats.peft import write_peft

CONTENTS = {
    "curves.png": "loss and accuracy",
    "adapter": "the adapter for peft and transformers",
    "checkpoint": "the same for lj.load_adapters",
    "metrics.jsonl": "every step, and both evaluations",
    "result.json": "the run in a few numbers",
    "config.json": "the options it was given",
}
NEEDED = 64 * 2**20  # bytes; the adapter twice over, and plenty


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Writes what a run produces; whatever cannot be written is a `CliError`.

    Attributes:
      path: the folder.
      base_model: what its adapter belongs to.
      rules: what made the adapter.
    """

    path: Path
    base_model: str
    rules: tuple[LoraRule, ...]

    @classmethod
    def create(
        cls, out: Path | None, name: str, config: Any, base_model: str, rules: tuple[LoraRule, ...]
    ) -> RunFolder:
        """Makes the folder and writes `config.json`, before anything costs time.

        Args:
          out: the folder; `runs/<name>-<time>`, if None.
          name: of the study.
          config: the command's options.
          base_model: what the adapter belongs to.
          rules: what makes the adapter.

        Raises:
          CliError: if the folder holds something already, or cannot be written, or the disk is
            all but full.
        """
        path = out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        with writing(path):
            # The options alone are what a run leaves that never came to train: take its place.
            if path.is_dir() and any(x.name != "config.json" for x in path.iterdir()):
                raise CliError(f"{path} is not empty; write --out with a new folder.")
            path.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(path).free) < NEEDED:
                raise CliError(
                    f"the disk of {path} has {free / 2**20:.0f} MiB left, expected at least "
                    f"{NEEDED >> 20}; make room, or write --out with a folder on another disk."
                )
        folder = cls(path, base_model, rules)
        folder.write_json("config.json", dataclasses.asdict(config))
        return folder

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file."""
        with writing(self.path):
            (self.path / name).write_text(json.dumps(value, indent=2, default=str) + "\n")

    def record(self, **values: Any) -> None:
        """Adds a line to `metrics.jsonl`."""
        with writing(self.path), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def save(self, adapters: Any) -> None:
        """Saves the adapter, over the one that was saved before."""
        with uninterrupted(), writing(self.path):
            save_adapters(self.path / "checkpoint", adapters, rules=self.rules)
            write_peft(self.path / "adapter", adapters, base_model=self.base_model)

    def contents(self) -> str:
        """What is in the folder, a line each."""
        return "\n".join(
            f"  {name:<14} {what}" for name, what in CONTENTS.items() if (self.path / name).exists()
        )
