"""Many runs in one program, beside the same run alone: tokens per second, memory, and the ratio.

    python experiments/speed/sweep_step.py                                    # 32 runs of 8x128
    python experiments/speed/sweep_step.py --shape 8b --runs 8 --remat layer
    python experiments/speed/sweep_step.py --against peft:none                # and PEFT, one run
    python experiments/speed/sweep_step.py --cpu                              # 8 runs of 2x64

Random weights in 4 bits; each run has its own adapters, learning rate, seed and batches. What is
timed is `lj.sweep.fit`, with all it does between steps, and for one run alone `lj.train.fit`: the
time from one step that it told of to another. Results are in this folder's README.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from train_step import NAMES, gemm_ceiling, kernel_times, product_flops

import lora_jax as lj
from lora_jax.data import Batch
from lora_jax.formats.hf_write import to_hf
from lora_jax.models.decoder import Decoder, DecoderConfig
from lora_jax.models.random_weights import random_base
from lora_jax.models.shapes import SHAPES

WARM = 3  # steps before the clock is read
ON_CPU = {
    "runs": 8,
    "batch": 2,
    "length": 64,
    "dtype": "float32",
    "remat": "none",
    "attention": "xla",
    "steps": 4,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What differs between the runs."""

    learning_rate: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """What both loops are given."""

    base: Any
    loss_fn: Any
    make_adapters: Callable[[Run], Any]
    batches_of: Callable[[Run], Iterator[Batch]]
    runs: list[Run]


def config_of(args: argparse.Namespace) -> DecoderConfig:
    """The decoder that is trained."""
    dtype = jnp.dtype(args.dtype)
    shape = SHAPES[NAMES.get(args.shape, args.shape)]
    return dataclasses.replace(
        shape,
        scan_layers=not args.unroll,
        remat=None if args.remat == "none" else args.remat,
        attention=args.attention,
        dtype=dtype,
        param_dtype=dtype,
    )


def make_problem(args: argparse.Namespace) -> Problem:
    """Random weights, and runs of which each has its own batches."""
    config = config_of(args)
    base = random_base(jax.random.key(0), config, None if args.kind == "none" else args.kind)
    layout = "i o" if args.unroll else "b i o"
    rule = lj.LoraRule(args.targets, rank=args.rank, alpha=2 * args.rank, layout=layout)

    def make_adapters(run: Run) -> Any:
        return lj.init_adapters(jax.random.key(run.seed), base, [rule])

    def batches_of(run: Run) -> Iterator[Batch]:
        rng = np.random.default_rng(run.seed)
        shape = args.batch, args.length
        weights = np.ones(shape, np.float32)
        weights[:, 0] = 0
        kept = [rng.integers(0, config.vocab_size, shape, np.int32) for _ in range(4)]
        segments = np.ones(shape, np.int32)
        return (Batch(tokens, weights, None, segments) for tokens in itertools.cycle(kept))

    loss_fn = lj.train.next_token_loss(Decoder(config), chunk=args.chunk or None)
    runs = [Run(1e-4 * (1 + k / args.runs), k) for k in range(args.runs)]
    return Problem(base, loss_fn, make_adapters, batches_of, runs)


def together(problem: Problem, steps: int) -> float:
    """Seconds a step of all runs side by side."""
    plan = lj.sweep.plan(problem.runs, problem.make_adapters, make_tx)
    seen: dict[int, float] = {}
    lj.sweep.fit(
        *(problem.loss_fn, problem.base, plan, problem.batches_of),
        make_key=lambda run: jax.random.key(run.seed),
        steps=steps,
        on_metrics=lambda run, step, metrics: seen.setdefault(step, time.perf_counter()),
    )
    return per_step(seen)


def alone(problem: Problem, steps: int) -> float:
    """Seconds a step of one run."""
    run, seen = problem.runs[0], {}
    lj.train.fit(
        *(problem.loss_fn, problem.base, problem.make_adapters(run), make_tx(run)),
        problem.batches_of(run),
        key=jax.random.key(run.seed),
        steps=steps,
        on_metrics=lambda step, metrics: seen.setdefault(step, time.perf_counter()),
    )
    return per_step(seen)


def make_tx(run: Run) -> optax.GradientTransformation:
    """AdamW."""
    return optax.adamw(run.learning_rate)


def per_step(seen: dict[int, float]) -> float:
    """Seconds between steps that were told of; the last is told of when the device is done."""
    first, last = WARM, max(seen)
    return (seen[last] - seen[first]) / (last - first)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both loops' numbers."""
    problem, device = make_problem(args), jax.devices()[0]
    ceiling = gemm_ceiling() if jax.default_backend() == "gpu" else math.nan
    seconds = together(problem, WARM + args.steps)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    one = alone(problem, WARM + args.steps * args.alone)
    tokens = args.batch * args.length
    result = {
        "device": getattr(device, "device_kind", device.platform),
        "jax": jax.__version__,
        "setting": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "milliseconds": seconds * 1e3,
        "tokens_per_second": args.runs * tokens / seconds,
        "peak_gib": peak,
        "alone_milliseconds": one * 1e3,
        "alone_tokens_per_second": tokens / one,
        "ratio": args.runs * one / seconds,
        "gemm_ceiling_tflops": ceiling / 1e12,
        "utilization": product_flops(config_of(args), args.runs * tokens) / seconds / ceiling,
    }
    if args.profile:
        result["kernels"] = kernel_times(functools.partial(together, problem), WARM + args.steps)
    return result


def main() -> None:
    """Measures, prints, and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="135m", help=f"{', '.join(NAMES)}, or one of SHAPES")
    parser.add_argument("--runs", type=int, default=32, help="side by side")
    parser.add_argument("--batch", type=int, default=8, help="rows of a run")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="_proj/kernel", help="the weights to adapt")
    parser.add_argument("--kind", default="nf4", help="of the base; none for a dense one")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--remat", default="attention", help="policy, or none")
    parser.add_argument("--unroll", action="store_true", help="layers not scanned")
    parser.add_argument("--attention", default="cudnn", choices=("cudnn", "xla"))
    parser.add_argument("--chunk", type=int, default=128, help="positions of logits of a run")
    parser.add_argument("--steps", type=int, default=20, help="timed")
    parser.add_argument("--alone", type=int, default=2, help="times as many, of a run alone")
    parser.add_argument("--against", help="a peer of train_step.py, one run of it")
    parser.add_argument("--profile", action="store_true", help="list the kernels by their time")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    parser.add_argument(
        "--cpu", action="store_true", help="what finetune does by default, but 2x64"
    )
    args = parser.parse_args()
    if args.cpu:
        parser.set_defaults(**ON_CPU)
        args = parser.parse_args()
    others = []
    if args.against:
        fields = to_hf(dataclasses.replace(config_of(args), rope_scaling=None))
        others = peers.run(peers.chosen(args.against), fields, args)
    result = measure(args)
    for row in others:
        if "error" not in row:
            row["ratio"] = result["tokens_per_second"] / row["tokens_per_second"]
    result["peers"] = others
    print(
        f"{result['device']}, JAX {result['jax']}: {args.shape}, {args.runs} runs of "
        f"{args.batch}x{args.length}, {args.kind}, remat {args.remat}\n"
        f"  together {result['milliseconds']:.1f} ms, {result['tokens_per_second']:,.0f} tokens/s, "
        f"peak {result['peak_gib']:.2f} GiB; of the ceiling {result['utilization']:.1%}\n"
        f"  alone {result['alone_milliseconds']:.1f} ms, "
        f"{result['alone_tokens_per_second']:,.0f} tokens/s: {result['ratio']:.2f}x",
        flush=True,
    )
    for name, milliseconds, calls in result.get("kernels", ()):
        print(f"  {milliseconds:9.2f} ms  x{calls:<6} {name}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
