"""One QLoRA training step on a GPU: tokens per second, peak memory, and how near the limit it is.

    python experiments/speed/train_step.py                                    # the 8B shape, 4x2048
    python experiments/speed/train_step.py --shape 65b --batch 1 --remat layer
    python experiments/speed/train_step.py --profile                          # where the time goes
    python experiments/speed/train_step.py --against peft,unsloth --out both.json
    python experiments/speed/train_step.py --scan --remat layer --against both.json

Random weights, made packed on the device; LoRA on all seven linear layers of each block; AdamW. The
whole step (forward, backward, optimizer) is timed. Beside it stands what matrix products alone
reach in the same run, and what share of that the step's own products make; and what PEFT with
bitsandbytes and Unsloth reach, where they are installed. Results are in this folder's README.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import glob
import json
import math
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import optax
import peers

import lora_jax as lj
from lora_jax import kernels
from lora_jax.formats.hf_write import to_hf
from lora_jax.models.decoder import Decoder, DecoderConfig
from lora_jax.models.random_weights import KERNELS, random_base
from lora_jax.models.shapes import SHAPES
from lora_jax.train import chunked_cross_entropy

AT_ONCE = 3  # steps that are timed together
FOLD = {"auto": None, "always": True, "never": False}
NAMES = {
    "135m": "smollm2-135m",
    "1b": "llama-3.2-1b",
    "8b": "llama-3-8b",
    "13b": "llama-2-13b",
    "65b": "llama-65b",
    "175b": "gpt-3-175b",
    "405b": "llama-3.1-405b",
}


def make_step(
    model: Decoder, tx: optax.GradientTransformation, chunk: int | None, fold: bool | None
) -> Any:
    """The step of the README's loop, with logits a chunk at a time."""

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        run = functools.partial(model.apply, {"params": params})
        targets = jnp.roll(tokens, -1, axis=-1)
        weights = jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0)
        unembed = functools.partial(run, method="unembed")
        hidden = run(tokens, method="hidden")
        loss, weight, _ = chunked_cross_entropy(hidden, targets, weights, unembed, chunk=chunk)
        return loss / weight

    adapted = lj.adapt(forward, fold=fold)

    def step(adapters: Any, opt_state: Any, base: Any, tokens: jax.Array) -> Any:
        loss_fn = lambda adapters: adapted(lj.combine(base, adapters), tokens)  # noqa: E731
        loss, grads = jax.value_and_grad(loss_fn)(adapters)
        updates, opt_state = tx.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def place(args: argparse.Namespace) -> Any:
    """What puts the layers after the first `--keep` in host memory."""
    if args.keep is None:
        return None
    if args.scan:
        return functools.partial(lj.offload, pattern=KERNELS, keep=args.keep)

    def offload(base: Any) -> Any:
        layers = [name for name in base if re.fullmatch(r"layers_\d+", name)]
        waiting = [f"^layers_{k}/.*_proj/kernel" for k in range(args.keep, len(layers))]
        return lj.offload(base, waiting)

    return offload


def product_flops(config: DecoderConfig, tokens: int) -> int:
    """Operations of the products of a step that repeats none: base twice, head twice."""
    shapes = jax.eval_shape(lambda key: random_base(key, config, None), jax.random.key(0))
    kernels = sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if re.search(r"layers.*kernel", jax.tree_util.keystr(path))
    )
    return 4 * tokens * (kernels + config.dim * config.vocab_size)


def gemm_ceiling(size: int = 8192, rounds: int = 10) -> float:
    """FLOP/s of bfloat16 products of `size`³, through XLA."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    body = lambda _, x: x @ a * jnp.bfloat16(0.01)  # noqa: E731
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, rounds, body, x))
    seconds = timed(lambda: chain(a), 5)
    return 2 * size**3 * rounds / statistics.median(seconds)


def timed(fn: Any, times: int) -> list[float]:
    """Seconds of each call, after one that is not counted."""
    jax.block_until_ready(fn())
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        seconds.append(time.perf_counter() - start)
    return seconds


def kernel_times(run: Any, steps: int) -> list[tuple[str, float, int]]:
    """Name, milliseconds a step and calls a step of the GPU's kernels, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(steps)
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = jax.profiler.ProfileData.from_file(path).planes
        total, calls = collections.Counter(), collections.Counter()
        for plane in planes:
            if "gpu" not in plane.name.lower():
                continue
            for line in plane.lines:
                if "Stream" in line.name:
                    for event in line.events:
                        name = re.sub(r"\d+", "#", re.sub(r"[._]\d+", "", event.name))[:90]
                        total[name] += event.duration_ns
                        calls[name] += 1
    return [(name, ns / steps / 1e6, calls[name] // steps) for name, ns in total.most_common(40)]


def shape_of(args: argparse.Namespace) -> DecoderConfig:
    """The shape, with as many layers as asked for."""
    shape = SHAPES[NAMES.get(args.shape, args.shape)]
    return dataclasses.replace(shape, num_layers=args.layers or shape.num_layers)


def setting(args: argparse.Namespace) -> dict[str, str]:
    """The options, for the JSON."""
    return {key: str(value) for key, value in vars(args).items() if key != "out"}


def measure_peers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the peers of `--against` reach, none of ours having been started yet."""
    if args.against.endswith(".json"):
        return peers.earlier(Path(args.against), setting(args))
    pairs = peers.chosen(args.against)
    try:
        # Slowed rotary frequencies change no speed, and the peers' config has other names for them.
        fields = to_hf(dataclasses.replace(shape_of(args), rope_scaling=None))
    except ValueError as error:
        return [{"peer": peer, "variant": variant, "error": str(error)} for peer, variant in pairs]
    return peers.run(pairs, fields, args)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured of one configuration."""
    config = dataclasses.replace(
        shape_of(args),
        scan_layers=args.scan,
        remat=None if args.remat == "none" else args.remat,
        attention=args.attention,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )
    key, model, tx = jax.random.key(0), Decoder(config), optax.adamw(1e-4)
    base = random_base(key, config, None if args.kind == "none" else args.kind, place=place(args))
    layout = "b i o" if args.scan else "i o"
    rules = [lj.LoraRule(KERNELS, rank=args.rank, alpha=2 * args.rank, layout=layout)]
    adapters = lj.init_adapters(key, base, rules)
    state = (adapters, tx.init(adapters))
    tokens = jax.random.randint(key, (args.batch, args.length), 0, config.vocab_size)
    jax.block_until_ready((base, state))

    ceiling = gemm_ceiling() if jax.default_backend() == "gpu" else math.nan
    start = time.perf_counter()
    lowered = make_step(model, tx, args.chunk or None, FOLD[args.fold]).lower(*state, base, tokens)
    lower_seconds = time.perf_counter() - start
    step = lowered.compile()
    compile_seconds = time.perf_counter() - start - lower_seconds
    losses = []

    def run(times: int) -> None:
        nonlocal state
        for _ in range(times):
            *state, loss = step(*state, base, tokens)
        losses.append(float(jax.block_until_ready(loss)))

    for _ in range(3):
        run(1)
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        run(AT_ONCE)  # as a loop does, which does not wait for each step
        seconds.append((time.perf_counter() - start) / AT_ONCE)
    analysis, device = step.memory_analysis(), jax.devices()[0]
    count = args.batch * args.length
    median = statistics.median(seconds)
    result = {
        "device": getattr(device, "device_kind", device.platform),
        "jax": jax.__version__,
        "setting": setting(args),
        "layers": config.num_layers,
        "milliseconds": median * 1e3,
        "tokens_per_second": count / median,
        "peak_gib": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        "argument_gib": analysis.argument_size_in_bytes / 2**30,
        "temporary_gib": analysis.temp_size_in_bytes / 2**30,
        "trace_and_lower_seconds": lower_seconds,
        "compile_seconds": compile_seconds,
        "gemm_ceiling_tflops": ceiling / 1e12,
        "utilization": product_flops(config, count) / median / ceiling,
        "losses": losses,
        "seconds": seconds,
    }
    if args.profile:
        result["kernels"] = kernel_times(run, 2)
    if args.hlo:
        args.hlo.write_text(step.as_text())
    return result


def main() -> None:
    """Measures, prints, and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="8b", help=f"{', '.join(NAMES)}, or a name in SHAPES")
    parser.add_argument("--layers", type=int, help="instead of as many as the shape has")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kind", default="nf4", help="of the base; none for bfloat16")
    parser.add_argument("--remat", default="products", help="policy, or none")
    parser.add_argument("--scan", action="store_true", help="layers scanned, not unrolled")
    parser.add_argument("--keep", type=int, help="layers on the device; the rest on the host")
    parser.add_argument("--fold", default="auto", choices=FOLD)
    parser.add_argument("--path", default="auto", help="of lj.kernels: auto, xla or pallas")
    parser.add_argument("--chunk", type=int, default=2048, help="positions of logits; 0 for all")
    parser.add_argument("--attention", default="cudnn", choices=("cudnn", "xla"))
    parser.add_argument("--steps", type=int, default=8, help="timed samples")
    parser.add_argument(
        "--against",
        help="peft, unsloth, unsloth:false, ...; or what an earlier --out wrote of them",
    )
    parser.add_argument("--profile", action="store_true", help="list the kernels by their time")
    parser.add_argument("--hlo", type=Path, help="a file for the optimized program")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()
    others = measure_peers(args) if args.against else []
    with kernels.use(args.path):
        result = measure(args)
    result["peers"], losses = peers.compared(result, others), result["losses"]
    print(
        f"{result['device']}, JAX {result['jax']}: {args.shape} ({result['layers']} layers) "
        f"{args.batch}x{args.length}, {args.kind}, remat {args.remat}, "
        f"{'scanned' if args.scan else 'unrolled'}, fold {args.fold}\n"
        f"  {result['milliseconds']:.1f} ms a step, {result['tokens_per_second']:,.0f} tokens/s, "
        f"peak {result['peak_gib']:.2f} GiB (arguments {result['argument_gib']:.2f}, temporary "
        f"{result['temporary_gib']:.2f}), compiled in {result['trace_and_lower_seconds']:.0f} + "
        f"{result['compile_seconds']:.0f} s\n"
        f"  products alone: {result['gemm_ceiling_tflops']:.0f} TFLOP/s; used by the step's own: "
        f"{result['utilization']:.1%}; loss {losses[0]:.4f} -> {losses[-1]:.4f}",
        flush=True,
    )
    if others:
        print(peers.table(result, result["peers"]), flush=True)
    for name, milliseconds, calls in result.get("kernels", ()):
        print(f"  {milliseconds:9.2f} ms  x{calls:<6} {name}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
