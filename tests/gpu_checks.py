"""What only a GPU can show; run by hand: `python tests/gpu_checks.py`.

The values of bitsandbytes and of gguf are compared bit for bit inside jit: against the golden file,
against the gguf package, and against bitsandbytes' own CUDA kernels where it is installed. The
residual law (law 8) is read off the compiled programs' memory; the step runs in bfloat16. Each fact
is a line of JSON.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import gguf_blocks
import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.core.codebooks import GGUF_KINDS
from lora_jax.formats.bitsandbytes import from_tensors
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder

GOLDEN = Path(__file__).parent / "golden" / "bitsandbytes.npz"
KERNELS = r"layers(_\d+)?/.*kernel"
WEIGHTS = 200  # random ones, of bitsandbytes


def golden_differences() -> Iterator[dict[str, Any]]:
    """For each case of the golden file, how many codes and how many decoded values differ."""
    golden = np.load(GOLDEN)
    for name in sorted({key.split("/")[0] for key in golden if "/" in key}):
        dtype, kind, block_size = name.split("_")
        weight = jnp.asarray(golden["weight"]).astype(dtype)
        field = lambda key, name=name: golden[f"{name}/{key}"]  # noqa: E731
        ours = lj.quantize_array(weight, kind, block_size=int(block_size), layout="o i")
        theirs = dataclasses.replace(
            ours,
            codes=jnp.asarray(field("codes")),
            scales=jnp.asarray(field("scales")),
            group_scales=jnp.asarray(field("nested")),
            offset=jnp.asarray(field("offset")),
        )
        decoded = np.asarray(jax.jit(lj.dequantize)(theirs))
        expected = field("decoded")
        codes = int((np.asarray(ours.codes) != field("codes")).sum())
        # Values, not bits: the file was made on a CPU, where the zeros of FP4 have another sign.
        differing = int((decoded != expected.view(decoded.dtype)).sum())
        yield {"golden": name, "values": decoded.size, "codes": codes, "differences": differing}


def gguf_differences() -> Iterator[dict[str, Any]]:
    """For each kind of GGUF, how many bytes of its blocks and how many decoded values differ."""
    for kind in gguf_blocks.KINDS:
        stored = gguf_blocks.stored_as(kind)
        weight = gguf_blocks.nasty()
        ours = lj.quantize_array(jnp.asarray(weight), kind, block_size=32, layout="o i")
        encoded = int((gguf_blocks.rows_of(ours) != gguf.quantize(weight, stored)).sum())
        blocks = gguf_blocks.random_blocks()
        expected = gguf.dequantize(gguf_blocks.write_blocks(kind, *blocks), stored)
        decoded = np.asarray(jax.jit(lj.dequantize)(gguf_blocks.of_blocks(kind, *blocks)))
        differing = int((decoded.view(np.uint32) != expected.view(np.uint32)).sum())
        yield {"gguf": kind, "values": decoded.size, "bytes": encoded, "differences": differing}


def bitsandbytes_differences(device: str) -> dict[str, Any]:
    """How many random weights decode to other bits than by bitsandbytes' kernels on a device."""
    import bitsandbytes.functional as functional
    from bitsandbytes_weights import bits, in_numpy, random_state

    names = ("values", "over row ends", "odd", "differences")
    counts, differing = dict.fromkeys(names, 0), []
    for seed in range(WEIGHTS):
        codes, state, tensors = random_state(seed, device)
        q = from_tensors(tensors)
        ours = np.asarray(jax.jit(lj.dequantize)(q))
        theirs = in_numpy(functional.dequantize_4bit(codes, state)).reshape(ours.shape)
        assert ours.dtype == theirs.dtype
        differences = int((bits(ours) != bits(theirs)).sum())
        found = (q.size, int(q.is_flat), q.size % 2, differences)
        counts = {name: counts[name] + n for name, n in zip(names, found, strict=True)}
        if differences:
            described = (seed, q.kind, str(q.dtype), *q.shape, q.block_size, bool(state.nested))
            differing.append((*described, differences))
    return {"bitsandbytes": device, "weights": WEIGHTS, **counts, "in": differing}


def saved_bytes(kind: str, scan_layers: bool, remat: str | None) -> tuple[int, int]:
    """Temporary bytes of a compiled gradient, and what all decoded weights together would take."""
    block_size = 32 if kind in GGUF_KINDS else 64
    config = DecoderConfig(
        vocab_size=512,
        dim=2048,
        mlp_dim=8192,
        num_layers=8,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        scan_layers=scan_layers,
        remat=remat,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )
    model = Decoder(config)
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    params = jax.eval_shape(lambda t: model.init(jax.random.key(0), t)["params"], tokens)
    layout = "b i o" if scan_layers else "i o"
    options = {"kind": kind, "block_size": block_size, "layout": layout}
    base = jax.eval_shape(lambda p: lj.quantize(p, KERNELS, **options), params)
    rules = [lj.LoraRule(KERNELS, rank=8)]
    adapters = jax.eval_shape(lambda b: lj.init_adapters(jax.random.key(0), b, rules), base)
    apply = lj.adapt(model.apply)

    def loss(adapters: Any, base: Any, tokens: jax.Array) -> jax.Array:
        return jnp.square(apply({"params": lj.combine(base, adapters)}, tokens)).mean()

    program = jax.jit(jax.grad(loss)).lower(adapters, base, tokens).compile()
    decoded = sum(
        2 * x.size for x in jax.tree.leaves(base, is_leaf=is_quantized) if is_quantized(x)
    )
    return program.memory_analysis().temp_size_in_bytes, decoded


def is_quantized(x: Any) -> bool:
    """Whether `x` is a quantized leaf."""
    return isinstance(x, lj.QuantizedArray)


def facts() -> Iterator[tuple[dict[str, Any], bool]]:
    """Each fact, and whether it is as it should be."""
    for fact in (*golden_differences(), *gguf_differences()):
        yield fact, fact["differences"] == 0
    if importlib.util.find_spec("bitsandbytes") is None:
        yield {"bitsandbytes": "is not installed"}, True
    else:
        fact = bitsandbytes_differences("cuda")
        yield fact, fact["differences"] == 0
    for kind in ("nf4", *GGUF_KINDS):
        for scan_layers in (True, False):
            for remat in (None, "nothing_saveable"):
                temporary, decoded = saved_bytes(kind, scan_layers, remat)
                layers = "scanned" if scan_layers else "unrolled"
                fact = {"residuals of": kind, "layers": layers, "remat": remat}
                mebibytes = {"MiB": temporary >> 20, "MiB decoded": decoded >> 20}
                yield {**fact, **mebibytes}, temporary < decoded / 2


def main() -> None:
    """Prints each fact, and fails if one does not hold."""
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__}))
    failed = []
    for fact, holds in facts():
        print(json.dumps(fact), flush=True)
        failed += [] if holds else [fact]
    if failed:
        raise SystemExit(f"{len(failed)} do not hold: {json.dumps(failed)}")


if __name__ == "__main__":
    main()
