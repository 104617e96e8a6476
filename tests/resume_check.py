"""Kills a run again and again, resumes it each time, and compares it with one left in peace.

    python tests/resume_check.py               # 20 kills: some ten minutes on two cores
    python tests/resume_check.py --kills 5 --seed 1

The kills are SIGKILLs, which no program can answer: half of them at random steps, in training, in
evaluation and in the test at the end, half of them while a checkpoint is being written. In the end
the adapter's bytes and every number but times and memory must be those of the run in peace, whose
dropout, noise, packing and choice of the best adapter all depend on where it is.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tiny_model import write_model, write_sentences

STEPS = 300
OPTIONS = {
    "task": "classification",
    "prompt": "?{text}:",
    "labels": ("0", "1"),
    "rank": 4,
    "dropout": 0.2,
    "neftune": 2.0,
    "accumulate": 2,
    "steps": STEPS,
    "rows": 4,
    "length": 48,
    "learning-rate": 0.005,
    "evaluate-every": 25,
    "save-every": 4,
}
TIMES = ("seconds", "peak_gib")


def command(*arguments: object) -> list[str]:
    """`lora-jax finetune` as a process of its own, on one simulated device as users have it."""
    return [
        sys.executable,
        "-m",
        "lora_jax.cli",
        "finetune",
        "--log",
        "quiet",
        *map(str, arguments),
    ]


def options(folder: Path, steps: int) -> list[object]:
    """The run's options."""
    given: list[object] = ["--model", folder / "model.gguf", "--data", folder / "data.jsonl"]
    for name, value in {**OPTIONS, "steps": steps}.items():
        given += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    return given


def records(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_done(run: Path) -> int:
    """The last step that was recorded."""
    return max((record.get("step", 0) for record in records(run)), default=0)


def is_writing(run: Path) -> bool:
    """Whether a checkpoint is under way: Orbax gives it its name when it is complete."""
    try:
        return any("tmp" in name for name in os.listdir(run / "state"))
    except FileNotFoundError:
        return False


def kill(
    process: subprocess.Popen, run: Path, step: int, *, writing: bool, rng: random.Random
) -> str:
    """Kills a run once it has come to a step; says where it was."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if steps_done(run) >= step and (not writing or is_writing(run)):
            break
        time.sleep(0 if steps_done(run) >= step else 0.02)
    if not writing:
        time.sleep(rng.uniform(0, 0.5))
    was_writing = is_writing(run)
    process.kill()
    process.wait()
    if process.returncode == 0:
        return "too late: it was done"
    if process.returncode != -9:
        raise SystemExit(f"the run ended by itself, with status {process.returncode}")
    while_ = ", a checkpoint under way" if was_writing else ""
    return f"killed at step {steps_done(run)}{while_}"


def without_times(value: Any) -> Any:
    """A JSON value without what the clock and the machine's memory have a part in."""
    if isinstance(value, dict):
        return {key: without_times(x) for key, x in value.items() if key not in TIMES}
    return value


def differences(peaceful: Path, killed: Path) -> list[str]:
    """What is not the same in two runs' folders."""
    found = [
        f"{name} differs"
        for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json")
        if (peaceful / name).read_bytes() != (killed / name).read_bytes()
    ]
    one, other = (list(map(without_times, records(run))) for run in (peaceful, killed))
    if len(one) != len(other):
        found.append(f"metrics.jsonl has {len(one)} lines in one, {len(other)} in the other")
    found += [f"{a} is {b}" for a, b in zip(one, other, strict=False) if a != b][:3]
    one, other = (
        without_times(json.loads((run / "result.json").read_text())) for run in (peaceful, killed)
    )
    if one != other:
        found.append(f"result.json: {one} is {other}")
    return found


def check(
    folder: Path, *, kills: int, seed: int, steps: int = STEPS, say: Any = print
) -> list[str]:
    """Runs in peace, runs with kills, and compares.

    Args:
      folder: an empty one, for model, data and runs.
      kills: how many.
      seed: of their moments.
      steps: of the run.
      say: is told what happens.

    Returns:
      The differences: none, if all is well.
    """
    rng = random.Random(seed)
    write_model(folder / "model.gguf")
    write_sentences(folder / "data.jsonl")
    peaceful, run = folder / "peaceful", folder / "killed"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command(*options(folder, steps), "--out", peaceful), check=True, env=environment)
    moments = sorted(rng.randrange(steps + 1) for _ in range(kills))
    begin = command(*options(folder, steps), "--out", run)
    for number, step in enumerate(moments):
        arguments = command("--resume", run) if (run / "config.json").is_file() else begin
        with subprocess.Popen(arguments, env=environment) as process:
            where = kill(process, run, step, writing=number % 2 == 0 and step < steps, rng=rng)
        say(f"{number + 1}/{kills}: {where}")
    subprocess.run(command("--resume", run), check=True, env=environment)
    return differences(peaceful, run)


def main() -> None:
    """Checks, and prints the outcome."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = check(Path(folder), kills=arguments.kills, seed=arguments.seed)
    print("\n".join(found) or f"{arguments.kills} kills: the same adapter, the same numbers")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
