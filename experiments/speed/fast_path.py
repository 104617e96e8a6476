"""Is the fast path right? Losses of real steps on SmolLM2, by every path, against float32.

    python experiments/speed/fast_path.py wiki.test.txt        # a text file, which may be gzipped

QLoRA of SmolLM2-135M in NF4 on the beginning of the text, all positions supervised. Each path takes
the same steps from the same start; printed is how far its losses are from those in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax import kernels
from lora_jax.cli.options import ModelOptions
from lora_jax.cli.problem import KERNELS, Model, load_model
from lora_jax.core.leaves import QuantizedArray
from lora_jax.models.decoder import Decoder, by_layout, unstack_layers
from lora_jax.train import chunked_cross_entropy

ROWS, LENGTH = 8, 256


@dataclasses.dataclass(frozen=True)
class Route:
    """How the same step is taken.

    Attributes:
      fold: as for `lj.adapt`.
      kernels: as for `lj.kernels.use`.
      remat, attention, scan_layers, dtype: as in `DecoderConfig`.
    """

    fold: bool = False
    kernels: str = "xla"
    remat: str | None = None
    attention: str = "xla"
    scan_layers: bool = True
    dtype: Any = jnp.bfloat16


def paths(fused: str) -> dict[str, Route]:
    """The reference first; `fused` is the fastest attention there is."""
    fast = Route(True, "auto", "products", fused)
    return {
        "float32": Route(dtype=jnp.float32),
        "factored": Route(),
        "factored, kernels": Route(kernels="auto"),
        "factored, attention": Route(attention=fused),
        "factored, remat": Route(remat="products"),
        "folded": Route(fold=True),
        "fast, scanned": fast,
        "fast, unrolled": dataclasses.replace(fast, scan_layers=False),
    }


def in_dtype(base: Any, dtype: Any) -> Any:
    """The same codes, decoding to another dtype, and everything else in it."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, QuantizedArray):
            return dataclasses.replace(leaf, dtype=np.dtype(dtype))
        return leaf.astype(dtype)

    return jax.tree.map(one, base, is_leaf=lambda x: isinstance(x, QuantizedArray))


def losses(model: Model, tokens: np.ndarray, path: Route, rank: int) -> np.ndarray:
    """Losses of one step after the other, on tokens [steps, B, T]."""
    dtype = path.dtype
    options = {name: getattr(path, name) for name in ("remat", "attention", "scan_layers")}
    config = dataclasses.replace(model.decoder.config, dtype=dtype, param_dtype=dtype, **options)
    decoder, base = Decoder(config), in_dtype(model.base, dtype)
    patterns = by_layout(KERNELS, base)
    rules = [lj.LoraRule(x, rank, alpha=2 * rank, layout=k) for k, x in patterns.items()]
    adapters = lj.init_adapters(jax.random.key(0), base, rules)
    if not path.scan_layers:
        base, adapters = unstack_layers(base), unstack_layers(adapters)
    tx = optax.adamw(2e-4)

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        run = functools.partial(decoder.apply, {"params": params})
        weights = jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0)
        total, weight, _ = chunked_cross_entropy(
            run(tokens, method="hidden"),
            jnp.roll(tokens, -1, axis=-1),
            weights,
            functools.partial(run, method="unembed"),
        )
        return total / weight

    adapted = lj.adapt(forward, fold=path.fold)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters: Any, opt_state: Any, base: Any, tokens: jax.Array) -> Any:
        loss_fn = lambda adapters: adapted(lj.combine(base, adapters), tokens)  # noqa: E731
        loss, grads = jax.value_and_grad(loss_fn)(adapters)
        updates, opt_state = tx.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state, loss

    found, opt_state = [], tx.init(adapters)
    with kernels.use(path.kernels):
        for batch in tokens:
            adapters, opt_state, loss = step(adapters, opt_state, base, batch)
            found.append(float(loss))
    return np.array(found)


def main() -> None:
    """Takes the steps by one path after the other, and prints how far apart they are."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path, help="a text file, which may be gzipped")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, help="a JSON file for the losses")
    args = parser.parse_args()

    open_text: Any = gzip.open if args.text.suffix == ".gz" else open
    with open_text(args.text, "rt", encoding="utf-8") as file:
        text = file.read()
    model = load_model(ModelOptions(base="nf4"))
    ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    size = ROWS * LENGTH
    tokens = np.array(ids[: args.steps * size], np.int32).reshape(-1, ROWS, LENGTH)

    found: dict[str, np.ndarray] = {}
    for name, path in paths("cudnn" if jax.default_backend() == "gpu" else "xla").items():
        found[name] = losses(model, tokens, path, args.rank)
        apart = found[name] / found["float32"] - 1
        print(
            f"{name:>20}: {found[name][0]:.5f} -> {found[name][-1]:.5f}; from float32 at most "
            f"{np.abs(apart).max():.1e}, mean {apart.mean():+.1e}",
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps({name: list(x) for name, x in found.items()}, indent=1))


if __name__ == "__main__":
    main()
