"""How many values a second are stored in NF4, double-quantized.

    python experiments/loading/quantizer.py

Sixteen million Gaussian values, as torch has a kernel ([out, in]), as Flax has it ([in, out]), and
as tensors are quantized while a model is read, in parts. The best of the rounds, by the clock and
by the processor time of all cores: where others use the machine as well, the latter tells what it
could do.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.formats import Quantization


def rates(fn: Callable[[], object], values: int, rounds: int) -> tuple[float, float]:
    """Millions of values a second, by the clock and by processor time."""
    jax.block_until_ready(fn())
    clock, processor = [], []
    for _ in range(rounds):
        began = time.perf_counter(), time.process_time()
        jax.block_until_ready(fn())
        clock.append(time.perf_counter() - began[0])
        processor.append((time.process_time() - began[1]) / (os.cpu_count() or 1))
    return values / min(clock) / 1e6, values / min(processor) / 1e6


def main() -> None:
    """Prints a line for each dtype and way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    gaussian = np.random.default_rng(0).standard_normal((4096, 4096), np.float32)
    print(f"{os.cpu_count()} cores, JAX {jax.__version__}; millions of values a second")
    print(f"{'dtype':10}{'way':14}{'clock':>8}{'processor':>12}")
    for dtype in ("float32", "bfloat16"):
        w = jnp.asarray(gaussian).astype(dtype)
        on_host, store = np.asarray(w), Quantization("w").store(["w"], dtype)
        ways = {
            "[out, in]": lambda w=w: lj.quantize_array(w, layout="o i"),
            "[in, out]": lambda w=w: lj.quantize_array(w),
            "while read": lambda w=on_host, store=store: store("w", w),
        }
        for way, fn in ways.items():
            clock, processor = rates(fn, w.size, options.rounds)
            print(f"{dtype:10}{way:14}{clock:8,.0f}{processor:12,.0f}", flush=True)


if __name__ == "__main__":
    main()
