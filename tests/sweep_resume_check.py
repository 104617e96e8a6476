"""Kills a sweep again and again, calls it again each time, and compares it with one left in peace.

    python tests/sweep_resume_check.py             # 20 kills: some minutes on two cores
    python tests/sweep_resume_check.py --kills 5 --seed 1

The kills are SIGKILLs: half of them anywhere, half of them while something is being written. In the
end every number and every byte of every adapter must be those of the sweep in peace. It has noise,
two programs, and runs that wait for a place, diverge, lose patience, are halved or run out of data.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import sweep_runs
from sweep_runs import Run

import lora_jax as lj

STEPS = 24
# The same ranks and scales, for each that is new is another program to be compiled.
RUNS = [
    Run(),
    Run(learning_rate=1e30, seed=1),  # diverges
    Run(learning_rate=3e-2, seed=2),
    Run(learning_rate=0.0, seed=3),  # ceases to improve
    Run(weight_decay=0.1),  # another program
    Run(weight_decay=0.1, learning_rate=3e-3),
]


def make_adapters(run: Run) -> Any:
    """By NumPy, which compiles nothing."""
    rng = np.random.default_rng(run.seed)

    def adapter(i: int, o: int) -> lj.Adapter:
        a, b = (rng.normal(size=x).astype(np.float32) for x in ((run.rank, i), (o, run.rank)))
        return lj.Adapter(a, b, scale=0.1, layout="i o")

    up, down = adapter(sweep_runs.IN, sweep_runs.HIDDEN), adapter(sweep_runs.HIDDEN, sweep_runs.OUT)
    return {"up": {"kernel": up}, "down": {"kernel": down}}


def make_tx(run: Run) -> optax.GradientTransformation:
    return optax.sgd(run.learning_rate) if run.weight_decay else optax.adam(run.learning_rate)


def loss_fn(adapters: Any, base: Any, batch: Any, key: Any) -> Any:
    """With noise that is made of the key itself: a generator takes long to compile."""
    x, y = batch
    noise = 0.0 if key is None else jax.random.key_data(key)[-1] % 8 / 64
    return ((sweep_runs.network(lj.combine(base, adapters), x) - y + noise) ** 2).mean()


class Positioned:
    """A run's own batches, whose iterator can be told where to go on."""

    def __init__(self, data: list[Any]):
        self.data, self.next = data, 0

    def __iter__(self) -> Positioned:
        return self

    def __next__(self) -> Any:
        if self.next == len(self.data):
            raise StopIteration
        self.next += 1
        return self.data[self.next - 1]

    def get_state(self) -> bytes:
        return str(self.next).encode()

    def set_state(self, state: bytes) -> None:
        self.next = int(state)


@functools.cache
def base_and_plan() -> tuple[Any, lj.sweep.Plan]:
    plan = lj.sweep.plan(RUNS, make_adapters, make_tx, static=["weight_decay"], at_once=2)
    return sweep_runs.make_base(), plan


def batches_of(kind: str) -> Any:
    """The same for all, or of each run; of two runs they end before all steps are done."""
    if kind == "same":
        return sweep_runs.batches(STEPS)
    steps = lambda run: 22 if run.weight_decay else STEPS  # noqa: E731
    return lambda run: Positioned(sweep_runs.batches(steps(run), run.seed))


def sweep(batches: Any, **options: Any) -> list[lj.sweep.Fitted]:
    """The sweep."""
    base, plan = base_and_plan()
    return lj.sweep.fit(
        *(loss_fn, base, plan, batches),
        make_key=sweep_runs.make_key,
        steps=STEPS,
        validation=sweep_runs.batches(1, seed=9),
        evaluate_every=4,
        patience=2,
        halving=lj.sweep.Halving(at=(16,), keep=0.7),
        **options,
    )


def outcome(found: Iterable[lj.sweep.Fitted]) -> list[Any]:
    """All of it, as JSON has it: of arrays, their bytes' hash."""

    def bytes_of(tree: Any) -> Any:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {
            jax.tree_util.keystr(path): hashlib.sha256(np.asarray(x).tobytes()).hexdigest()
            for path, x in flat
        }

    return [
        [
            repr(x[:1] + x[3:]),  # in which NaN is equal to itself
            bytes_of(x.adapters),
            bytes_of(x.last),
        ]
        for x in found
    ]


def begun(folder: Path, batches: str) -> subprocess.Popen:
    """The sweep as a process of its own, which prints a line for each row that is told of."""
    # As many devices as here, so that what was compiled here serves there.
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    return subprocess.Popen(
        [sys.executable, __file__, "--sweep", str(folder), "--batches", batches],
        env={**os.environ, **devices},
        stdout=subprocess.PIPE,
    )


def is_saving(folder: Path) -> bool:
    """Whether a file is being written."""
    return any((folder / "state").rglob(".*.partial"))


def kill(process: subprocess.Popen, folder: Path, row: int, *, saving: bool) -> str:
    """Kills a sweep some time after it told of a row; says where it was."""
    assert process.stdout is not None
    for _ in itertools.islice(process.stdout, row + 1):
        pass
    while saving and process.poll() is None and not is_saving(folder):
        pass
    was_saving = is_saving(folder)
    process.kill()
    process.wait()
    if process.returncode == 0:
        return "too late: it was done"
    if process.returncode != -9:
        raise SystemExit(f"the sweep ended by itself, with status {process.returncode}")
    return f"killed after {row} rows{', while saving' if was_saving else ''}"


def check(
    folder: Path,
    peaceful: list[lj.sweep.Fitted],
    *,
    kills: int,
    seed: int,
    batches: str = "own",
    say: Callable[[str], None] = print,
) -> list[str]:
    """Sweeps with kills, and compares.

    Args:
      folder: an empty one.
      peaceful: the sweep without.
      kills: how many.
      seed: of their moments.
      batches: "own" or "same".
      say: is told what happens.

    Returns:
      The differences: none, if all is well.
    """
    rng = random.Random(seed)
    rows = sum(len(x.history) for x in peaceful)
    for number, row in enumerate(sorted(rng.randrange(rows) for _ in range(kills))):
        with begun(folder, batches) as process:
            say(f"{number + 1}/{kills}: {kill(process, folder, row, saving=number % 2 == 0)}")
    with begun(folder, batches) as process:
        assert process.stdout is not None
        told = sum(1 for _ in process.stdout)
    pairs = zip(outcome(peaceful), json.loads((folder / "outcome.json").read_text()), strict=True)
    found = [f"run {k}: {one} is {other}" for k, (one, other) in enumerate(pairs) if one != other]
    return found if told == rows else [*found, f"{told} rows were told of, and {rows} are there"]


def main() -> None:
    """Checks, and prints the outcome; or, of a process that is to be killed, sweeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", choices=("same", "own"), default="own")
    parser.add_argument("--sweep", type=Path, help="a folder: only sweep")
    options = parser.parse_args()
    batches = batches_of(options.batches)
    if options.sweep is not None:
        state, tell = options.sweep / "state", lambda *row: print("row", flush=True)
        found = sweep(batches, folder=state, save_every=3, on_metrics=tell)
        (options.sweep / "outcome.json").write_text(json.dumps(outcome(found)))
        return
    given = {"kills": options.kills, "seed": options.seed, "batches": options.batches}
    with tempfile.TemporaryDirectory() as folder:
        differences = check(Path(folder), sweep(batches), **given)
    print("\n".join(differences) or f"{options.kills} kills: the same adapters, the same numbers")
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
