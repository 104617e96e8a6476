"""Tokens per second of one training step: full fine-tuning, LoRA, and QLoRA, side by side.

    python experiments/speed/cpu_step.py
    python experiments/speed/cpu_step.py --batch 16 --length 512 --dtype bfloat16   # on a GPU

The SmolLM2-135M shape with random weights, AdamW; LoRA of r=8 on the weights of attention, as
`lora-jax finetune` has it, or where --targets says. QLoRA stores all kernels of all layers in NF4.
The whole step (forward, backward, optimizer) is timed, the methods in turn, round after round, so
that a drift of the machine meets all alike. Results are in this folder's README.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lora_jax as lj
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import SHAPES

KERNELS = r"layers(_\d+)?/.*/kernel"


def make_step(model: Decoder, tx: optax.GradientTransformation, tree_of: Any) -> Any:
    """A jitted step that trains `trained`; `tree_of(trained, frozen)` is what the model sees."""
    apply = lj.adapt(model.apply)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Any, opt_state: Any, frozen: Any, tokens: jax.Array) -> Any:
        def loss_fn(trained: Any) -> jax.Array:
            logits = apply({"params": tree_of(trained, frozen)}, tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_fn)(trained)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, loss

    return step


def methods(
    model: Decoder, params: Any, targets: str, rank: int
) -> dict[str, tuple[Any, Any, Any]]:
    """For each method: what is trained, what is frozen, and how the two make a tree."""
    layout = "b i o" if model.config.scan_layers else "i o"
    base = lj.quantize(params, KERNELS, layout=layout)
    key = jax.random.key(1)
    lora = lj.init_adapters(key, params, [lj.LoraRule(targets, rank=rank, layout=layout)])
    qlora = lj.init_adapters(key, base, [lj.LoraRule(targets, rank=rank)])
    combined = lambda trained, frozen: lj.combine(frozen, trained)  # noqa: E731
    return {
        "full": (jax.tree.map(jnp.copy, params), None, lambda trained, _: trained),
        "lora": (lora, params, combined),
        "qlora": (qlora, base, combined),
    }


def main() -> None:
    """Measures, prints a table, and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="smollm2-135m", choices=sorted(SHAPES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--targets", default=r"attn/.*/kernel", help="pattern of adapted weights")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--unrolled", action="store_true", help="layers unrolled, not scanned")
    parser.add_argument("--steps", type=int, default=7, help="timed rounds")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()

    dtype = jnp.dtype(args.dtype)
    config = dataclasses.replace(
        SHAPES[args.shape], scan_layers=not args.unrolled, dtype=dtype, param_dtype=dtype
    )
    model = Decoder(config)
    tokens = jax.random.randint(
        jax.random.key(0), (args.batch, args.length + 1), 0, config.vocab_size
    )
    params = jax.jit(model.init)(jax.random.key(2), tokens[:, :8])["params"]
    tx = optax.adamw(1e-4)

    states, compile_s = {}, {}
    for name, (trained, frozen, tree_of) in methods(model, params, args.targets, args.rank).items():
        step = make_step(model, tx, tree_of)
        start = time.perf_counter()
        state = step(trained, tx.init(trained), frozen, tokens)
        jax.block_until_ready(state)
        compile_s[name] = time.perf_counter() - start
        states[name] = (step, state[:2], frozen)
    del params
    gc.collect()

    seconds: dict[str, list[float]] = {name: [] for name in states}
    for _ in range(args.steps + 1):
        for name, (step, state, frozen) in states.items():
            start = time.perf_counter()
            state = jax.block_until_ready(step(*state, frozen, tokens))
            seconds[name].append(time.perf_counter() - start)
            states[name] = (step, state[:2], frozen)

    count = args.batch * args.length
    speed = {name: count / statistics.median(times[1:]) for name, times in seconds.items()}
    device = jax.devices()[0]
    result = {
        "device": getattr(device, "device_kind", device.platform),
        "machine": ", ".join(
            [platform.machine(), f"Python {platform.python_version()}", f"JAX {jax.__version__}"]
        ),
        "setting": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "tokens_per_second": speed,
        "lora_over_full": speed["lora"] / speed["full"],
        "qlora_over_lora": speed["qlora"] / speed["lora"],
        "compile_and_first_step_seconds": compile_s,
        "seconds": seconds,
    }
    print(f"{result['device']}; {result['machine']}")
    for name, value in speed.items():
        print(f"{name:>6} {value:10.0f} tokens/s   compile + first step {compile_s[name]:5.1f} s")
    print(
        f"LoRA / full {result['lora_over_full']:.2f}   QLoRA / LoRA {result['qlora_over_lora']:.2f}"
    )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
