"""The command line on the tiny model: its files, its arguments, what it leaves and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tiny_model import write_model, write_sentences

# Learns in a second what the tiny data have to teach.
OPTIONS = {
    "task": "classification",
    "prompt": "?{text}:",
    "labels": ("0", "1"),
    "targets": "attn/.*/kernel",
    "rank": 8,
    "steps": 12,
    "rows": 4,
    "length": 48,
    "learning_rate": 0.02,
    "evaluate_every": 5,
    "save_every": 5,
}


def write_files(folder: Path) -> dict[str, Path]:
    """The options that name the model and the data, which are written."""
    return {
        "model": write_model(folder / "model.gguf"),
        "data": write_sentences(folder / "data.jsonl"),
    }


def arguments(command: str, **options: Any) -> list[str]:
    """A command line; an option that is None is left out."""
    found = [command]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            found.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            found += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return found


def finetune(**options: Any) -> list[str]:
    """The command line of a run."""
    return arguments("finetune", **{**OPTIONS, **options})


def run_process(argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command outside of this process, whose eight devices change the last bits."""
    command = [sys.executable, "-W", "error", "-m", "lora_jax.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def one_sentence(captured: Any) -> str:
    """What was said on stderr: one line, and no traceback."""
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def records(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without times."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in line.items() if name != "seconds"} for line in lines]


def result(run: Path) -> dict[str, Any]:
    """The run in a few numbers."""
    return json.loads((run / "result.json").read_text())


def weights(run: Path) -> dict[str, np.ndarray]:
    """The adapter's, as PEFT reads them."""
    return safetensors.numpy.load_file(run / "adapter" / "adapter_model.safetensors")


def write_lines(path: Path, lines: list[Any]) -> Path:
    """Writes JSON lines; texts go in as they are."""
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path
