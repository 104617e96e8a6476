"""What `lj.train.fit` costs beside the step itself: the same step, bare and in the loop.

    python experiments/speed/loop_overhead.py
    python experiments/speed/loop_overhead.py --batch 16 --length 512 --dtype bfloat16   # on a GPU

The SmolLM2-135M shape with random weights, all of whose kernels are NF4; LoRA of r=8 on the weights
of attention, AdamW, every token supervised. A round is a number of steps in a bare loop (that of
`make_step`: nothing is fetched, and the end is waited for) and as many in `fit`, whose metrics a
hook writes as JSON. Which of the two goes first alternates, so that a drift of the machine meets
both alike. The first step of each is left out: the loop's start is not its cost. `--checkpoint`
adds an asynchronous checkpoint in the middle of each round.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.data import Batch
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import SHAPES

KERNELS = r"layers/.*/kernel"
TARGETS = r"attn/.*/kernel"
LAYOUT = "b i o"


def random_batches(rows: int, length: int, vocabulary: int) -> list[Batch]:
    """Some batches on the host, every token of which is to be predicted."""
    rng = np.random.default_rng(0)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return [
        Batch(
            tokens=rng.integers(0, vocabulary, (rows, length), np.int32),
            weights=(positions > 0).astype(np.float32),
            positions=positions,
            segment_ids=np.ones((rows, length), np.int32),
        )
        for _ in range(8)
    ]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What both loops are given."""

    loss_fn: Any
    base: Any
    adapters: Any
    tx: Any
    batches: list[Batch]


def make_problem(args: argparse.Namespace) -> Problem:
    """A model with random weights, as the arguments say."""
    dtype = jnp.dtype(args.dtype)
    config = dataclasses.replace(SHAPES[args.shape], dtype=dtype, param_dtype=dtype)
    model = Decoder(config)
    tokens = jnp.zeros((1, 8), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(2), tokens)["params"]
    base = lj.quantize(params, KERNELS, layout=LAYOUT)
    adapters = lj.init_adapters(jax.random.key(1), base, [lj.LoraRule(TARGETS, rank=args.rank)])
    config = lj.train.OptimizerConfig(args.rounds * args.steps, 1e-4)
    return Problem(
        lj.train.next_token_loss(model, chunk=args.chunk),
        base,
        adapters,
        lj.train.make_optimizer(config),
        random_batches(args.batch, args.length, model.config.vocab_size),
    )


def seconds_bare(problem: Problem, step: Any, number: int) -> float:
    """Seconds a step, after the first, of the bare jitted step."""
    state = lj.train.init_state(jax.random.key(0), problem.adapters, problem.tx)
    batches = itertools.cycle(problem.batches)
    state, _ = step(state, problem.base, next(batches))
    jax.block_until_ready(state)
    start = time.perf_counter()
    for batch in itertools.islice(batches, number - 1):
        state, _ = step(state, problem.base, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / (number - 1)


def seconds_in_fit(problem: Problem, number: int, folder: str | None) -> float:
    """Seconds a step, after the first, of `fit`."""
    moments: list[float] = []

    def on_metrics(step: int, metrics: dict[str, float]) -> None:
        moments.append(time.perf_counter())
        json.dumps({"step": step, **metrics})

    lj.train.fit(
        *(problem.loss_fn, problem.base, problem.adapters, problem.tx),
        itertools.cycle(problem.batches),
        key=jax.random.key(0),
        steps=number,
        on_metrics=on_metrics,
        checkpoints=lj.train.Checkpoints(folder, every=number // 2) if folder else None,
    )
    return (moments[-1] - moments[0]) / (number - 1)


def main() -> None:
    """Measures, prints, and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="smollm2-135m", choices=sorted(SHAPES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=12, help="of each loop in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--checkpoint", action="store_true", help="one in each round")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()

    problem = make_problem(args)
    step = lj.train.make_step(problem.loss_fn, problem.tx)
    seconds: dict[str, list[float]] = {"bare": [], "fit": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds + 1):  # the first compiles, and is left out
            measure = {
                "bare": lambda: seconds_bare(problem, step, args.steps),
                "fit": lambda number=number: seconds_in_fit(
                    problem, args.steps, f"{folder}/{number}" if args.checkpoint else None
                ),
            }
            for name in sorted(measure, reverse=number % 2 == 1):
                seconds[name].append(measure[name]())
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    device = jax.devices()[0]
    result = {
        "device": getattr(device, "device_kind", device.platform),
        "machine": ", ".join(
            [platform.machine(), f"Python {platform.python_version()}", f"JAX {jax.__version__}"]
        ),
        "setting": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "milliseconds_a_step": {name: 1e3 * value for name, value in medians.items()},
        "overhead": medians["fit"] / medians["bare"] - 1,
        "overhead_of_rounds": [
            fit / bare - 1
            for fit, bare in zip(seconds["fit"][1:], seconds["bare"][1:], strict=True)
        ],
        "seconds": seconds,
    }
    print(f"{result['device']}; {result['machine']}")
    for name, value in medians.items():
        print(f"{name:>6} {1e3 * value:9.2f} ms a step")
    print(f"overhead of fit {100 * result['overhead']:+.2f} %")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
