"""Predicted and measured peak memory of training steps drawn at random.

    python experiments/speed/memory.py --seed 7                          # ten of them, on a GPU
    python experiments/speed/memory.py --seed 7 --first 4 --count 3      # the fifth to the seventh
    python experiments/speed/memory.py --seed 7 --only-predict           # no GPU, nothing is run

A seed draws the same configurations whatever part of them is run: a shape from 135M to 65B, batch,
length, rank, remat policy, layers scanned or not, logits at once, a 4-bit base or a bfloat16 one.
What `lora_jax.memory` predicts of each is written down before train_step.py, in a process of its
own, compiles and runs it. Draws that would not fit the GPU, that would take too long, or that need
less than train_step.py takes to measure the limit of products are drawn again. Results are in this
folder's README.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_jax.memory import Memory, Setup, predict, weights
from lora_jax.models.shapes import SHAPES

STEP = Path(__file__).with_name("train_step.py")
GIB = 2**30
NAMES = (
    "smollm2-135m",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "llama-2-7b",
    "llama-3-8b",
    "llama-2-13b",
    "llama-65b",
)
LARGEST = 120 * GIB  # of an H200's 139
SMALLEST = 1 * GIB  # beside the state; the limit of products takes nearly that
WORK = 1.5e14  # parameters times tokens: about two seconds a step
UNROLLED = 32  # layers that compile in less than a minute
TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Draw:
    """One configuration, as options of train_step.py."""

    shape: str
    batch: int
    length: int
    rank: int
    kind: str
    remat: str
    scan: bool
    chunk: int

    @property
    def setup(self) -> Setup:
        """The same for `lora_jax.memory`."""
        return Setup(
            SHAPES[self.shape],
            method="lora" if self.kind == "none" else "qlora",
            rank=self.rank,
            batch=self.batch,
            length=self.length,
            remat=None if self.remat == "none" else self.remat,
            scan=self.scan,
            chunk=self.chunk,
            kind="nf4" if self.kind == "none" else self.kind,
        )

    @property
    def options(self) -> list[str]:
        """What train_step.py is given."""
        values = dataclasses.asdict(self)
        scan = ["--scan"] if values.pop("scan") else []
        return [word for name, value in values.items() for word in (f"--{name}", str(value))] + scan

    def is_suitable(self) -> bool:
        """Whether it fits, is quick, and is not smaller than what else is measured."""
        memory = predict(self.setup)
        parameters = sum(weight.parameters for weight in weights(self.setup.shape))
        return (
            memory.needed <= LARGEST
            and memory.needed - memory.resident >= SMALLEST
            and parameters * self.batch * self.length <= WORK
            and (self.scan or self.setup.shape.num_layers <= UNROLLED)
        )


def draw(rng: random.Random) -> Draw:
    """The next suitable one."""
    while True:
        found = Draw(
            shape=rng.choice(NAMES),
            batch=rng.choice((1, 2, 4, 8, 16)),
            length=rng.choice((512, 1024, 2048, 4096)),
            rank=rng.choice((4, 8, 16, 32, 64, 128)),
            kind=rng.choice(("nf4", "nf4", "nf4", "int4", "none")),
            remat=rng.choice(("layer", "stream", "attention", "products", "none")),
            scan=rng.random() < 0.7,
            chunk=rng.choice((512, 1024, 2048, 4096)),
        )
        if found.is_suitable():
            return found


def measured(config: Draw) -> dict[str, Any]:
    """What train_step.py writes down; or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(STEP), *config.options, "--steps", "1", "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not out.is_file():
            return {"error": (done.stderr or done.stdout).strip().splitlines()[-1:]}
        result = json.loads(out.read_text())
        return result if result["peak_gib"] else {"error": "the device counts no peak; use a GPU"}


def compared(config: Draw, memory: Memory, result: dict[str, Any]) -> dict[str, Any]:
    """Both numbers of the peak, and of the compiled program alone."""
    peak, program = (result[f"{name}_gib"] for name in ("peak", "argument"))
    program += result["temporary_gib"]
    return {
        **dataclasses.asdict(config),
        "device": result["device"],
        "jax": result["jax"],
        "predicted_gib": memory.needed / GIB,
        "measured_gib": peak,
        "error": memory.needed / GIB / peak - 1,
        "predicted_program_gib": memory.total / GIB,
        "measured_program_gib": program,
        "program_error": memory.total / GIB / program - 1,
    }


def main() -> None:
    """Draws, predicts, measures, compares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, help="the first to run, from 0")
    parser.add_argument("--count", type=int, help="how many to run")
    parser.add_argument("--draws", type=int, default=10, help="how many there are")
    parser.add_argument("--only-predict", action="store_true")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    drawn = [draw(rng) for _ in range(args.draws)]
    end = None if args.count is None else args.first + args.count
    rows = []
    for number, config in list(enumerate(drawn))[args.first : end]:
        memory, started = predict(config.setup), time.perf_counter()
        words = " ".join(config.options).replace("--", "")
        print(f"{number}: {words}\n   predicted {memory.needed / GIB:.2f} GiB", end="", flush=True)
        if args.only_predict:
            print()
            continue
        result = measured(config)
        seconds = time.perf_counter() - started
        if "error" in result:
            print(f"; failed after {seconds:.0f} s: {result['error']}", flush=True)
            rows.append({**dataclasses.asdict(config), "failed": result["error"]})
            continue
        row = compared(config, memory, result)
        rows.append(row)
        print(
            f", measured {row['measured_gib']:.2f}: {row['error']:+.1%}; the program alone "
            f"{row['predicted_program_gib']:.2f} and {row['measured_program_gib']:.2f}: "
            f"{row['program_error']:+.1%} ({seconds:.0f} s)",
            flush=True,
        )
        if args.out:
            args.out.write_text(json.dumps({"seed": args.seed, "rows": rows}, indent=1))
    if not args.only_predict:
        good = sum(abs(row.get("error", 1)) <= TOLERANCE for row in rows)
        print(f"{good} of {len(rows)} within {TOLERANCE:.0%}")


if __name__ == "__main__":
    main()
