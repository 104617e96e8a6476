"""What only a GPU can show; run by hand: `python tests/gpu_checks.py`.

bitsandbytes' values are compared bit for bit inside jit, against the golden file; the residual law
(law 8) is read off the compiled programs' memory; the step runs in bfloat16.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder

GOLDEN = Path(__file__).parent / "golden" / "bitsandbytes.npz"
KERNELS = r"layers(_\d+)?/.*kernel"


def bitsandbytes_differences() -> dict[str, tuple[int, int]]:
    """For each case of the golden file, how many codes and how many decoded values differ."""
    golden, result = np.load(GOLDEN), {}
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
        result[name] = codes, int((decoded.view(expected.dtype) != expected).sum())
    return result


def saved_bytes(scan_layers: bool, remat: str | None) -> tuple[int, int]:
    """Temporary bytes of a compiled gradient, and what all decoded weights together would take."""
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
    base = jax.eval_shape(lambda p: lj.quantize(p, KERNELS, layout=layout), params)
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


def main() -> None:
    """Prints each fact, and fails if one does not hold."""
    print(jax.devices()[0].device_kind, "JAX", jax.__version__)
    for name, (codes, values) in bitsandbytes_differences().items():
        print(f"{name:>18}: {codes} codes and {values} values differ from bitsandbytes'")
        assert values == 0
    for scan_layers in (True, False):
        for remat in (None, "nothing_saveable"):
            temporary, decoded = saved_bytes(scan_layers, remat)
            layers = "scanned" if scan_layers else "unrolled"
            print(
                f"{layers:>9}, remat={remat}: {temporary / 2**20:.0f} MiB temporary; the decoded "
                f"weights would be {decoded / 2**20:.0f} MiB"
            )
            assert temporary < decoded / 2


if __name__ == "__main__":
    main()
