"""What lies in memory from step to step: weights, their scales, adapters, the optimizer's state.

Counted, not measured: every number here is the sum of the bytes of the arrays that `quantize`,
`init_adapters` and optax would make.
"""

from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from lora_jax.core.codebooks import GGUF_KINDS
from lora_jax.kernels.xla import GROUP
from lora_jax.memory.setup import Setup, Shape


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter of a decoder, all its layers together.

    Attributes:
      path: in the scanned decoder.
      count: matrices or vectors: one for each layer and expert.
      inner: what a matrix contracts; None for a vector, which is neither adapted nor quantized.
      outer: what it produces, or the length of a vector.
    """

    path: str
    count: int
    inner: int | None
    outer: int

    @property
    def parameters(self) -> int:
        """Numbers in all of them."""
        return self.count * (self.inner or 1) * self.outer


def weights(shape: Shape) -> list[Weight]:
    """Every parameter of a decoder of this shape."""
    layers, d, f = shape.num_layers, shape.dim, shape.mlp_dim
    queries = shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    attention = {
        "q_proj": (d, queries),
        "k_proj": (d, keys),
        "v_proj": (d, keys),
        "o_proj": (queries, d),
    }
    mlp = {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
    found = [
        Weight("embed/embedding", 1, d, shape.vocab_size),
        Weight("final_norm/scale", 1, None, d),
    ]
    if not shape.tied_head:
        found.append(Weight("lm_head/kernel", 1, d, shape.vocab_size))

    def add(path: str, outer: int, inner: int | None = None, each: int = 1) -> None:
        found.append(Weight(f"layers/{path}", layers * each, inner, outer))

    for norm in ("attn_norm", "mlp_norm", *("attn_post_norm", "mlp_post_norm") * shape.post_norms):
        add(f"{norm}/scale", d)
    for norm in ("q_norm", "k_norm") * shape.qk_norm:
        add(f"attn/{norm}/scale", shape.head_dim)
    for name, (inner, outer) in attention.items():
        add(f"attn/{name}/kernel", outer, inner)
        if name in shape.biases:
            add(f"attn/{name}/bias", outer)
    if shape.num_experts:
        add("mlp/router/kernel", shape.num_experts, d)
    for name, (inner, outer) in mlp.items():
        if shape.num_experts:
            add(f"mlp/experts/{name}/kernel", outer, inner, shape.num_experts)
            continue
        add(f"mlp/{name}/kernel", outer, inner)
        if name in shape.biases:
            add(f"mlp/{name}/bias", outer)
    return found


class State(NamedTuple):
    """Bytes that stay from step to step, those of a gradient, and what of a base is on the host."""

    base: int
    scales: int
    adapters: int
    gradients: int
    optimizer: int
    host: int


def state(setup: Setup) -> State:
    """The bytes of base, scales, adapters, gradients and optimizer.

    Raises:
      ValueError: if a pattern matches no weight.
    """
    found = weights(setup.shape)
    chosen = {name: _matching(found, setup, name) for name in ("targets", "quantized")}
    base = scales = adapters = host = 0
    itemsize = np.dtype(setup.param_dtype).itemsize
    for weight in found:
        if setup.method == "qlora" and weight in chosen["quantized"]:
            codes, of_scales = packed_bytes(setup, weight)
            waiting = _share_on_host(setup, weight)
            host += int((codes + of_scales) * waiting)
            base, scales = (
                base + int(codes * (1 - waiting)),
                scales + int(of_scales * (1 - waiting)),
            )
        else:
            base += weight.parameters * itemsize
        if setup.method != "full" and weight in chosen["targets"]:
            assert weight.inner is not None  # a matrix, by `_matching`
            adapters += weight.count * setup.rank * (weight.inner + weight.outer)
    dtype = np.dtype(setup.param_dtype if setup.method == "full" else setup.adapter_dtype)
    trained = base // itemsize if setup.method == "full" else adapters
    gradients = trained * dtype.itemsize
    return State(
        base,
        scales,
        0 if setup.method == "full" else gradients,
        gradients,
        _optimizer_bytes(setup, trained, dtype.itemsize),
        host,
    )


def _share_on_host(setup: Setup, weight: Weight) -> Fraction:
    """The part of a weight's layers whose kernels wait on the host."""
    layers = setup.shape.num_layers
    if setup.keep is None or not weight.path.startswith("layers/"):
        return Fraction(0)
    return Fraction(layers - min(setup.keep, layers), layers)


def _matching(found: list[Weight], setup: Setup, name: str) -> list[Weight]:
    pattern = getattr(setup, name)
    matched = [w for w in found if w.inner is not None and re.search(pattern, w.path)]
    if not matched and setup.method != "full":
        paths = ", ".join(w.path for w in found if w.inner is not None)
        raise ValueError(f"{name} is {pattern!r}, which matches none of {paths}")
    return matched


def packed_bytes(setup: Setup, weight: Weight) -> tuple[int, int]:
    """Bytes of the 4-bit codes of a weight, and of its scales."""
    assert weight.inner is not None
    size = weight.inner * weight.outer
    codes, blocks = math.ceil(size / 2), math.ceil(size / setup.block_size)
    if setup.kind in GGUF_KINDS:
        scales = blocks * 2 * (2 if setup.kind == "q4_1" else 1)  # float16, perhaps a minimum
    elif setup.double_quant:
        scales = blocks + 4 * math.ceil(blocks / GROUP) + 4
    else:
        scales = 4 * blocks
    return weight.count * codes, weight.count * scales


def _optimizer_bytes(setup: Setup, trained: int, itemsize: int) -> int:
    """Bytes of what optax keeps of `trained` numbers; Adam also counts its steps, in an int32."""
    if setup.optimizer == "sgd":
        return 0
    if setup.optimizer == "momentum":
        return trained * itemsize
    of_mean = 2 if setup.optimizer == "adamw-bfloat16" else itemsize
    return trained * (of_mean + itemsize) + 4
