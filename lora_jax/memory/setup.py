"""What a training step is made of, as far as its memory depends on it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, Protocol, get_args

import jax.numpy as jnp
import numpy as np

from lora_jax.core.codebooks import KINDS

Method = Literal["full", "lora", "qlora"]
Optimizer = Literal["adamw", "adamw-bfloat16", "momentum", "sgd"]
POLICIES = ("products", "attention", "stream", "layer")  # the one that repeats least comes first
# To be asked for: which is the better depends on the length, or on what the host has left.
ASKED_FOR = ("attended", "layer-offloaded", "attended-offloaded")

PROJECTIONS = r"_proj/kernel"


class Shape(Protocol):
    """What is read of a decoder's config; `lora_jax.models.DecoderConfig` is one."""

    @property
    def vocab_size(self) -> int:
        """V, rows of the embedding."""

    @property
    def dim(self) -> int:
        """D, width of the residual stream."""

    @property
    def mlp_dim(self) -> int:
        """F, width of the MLP, or of each expert."""

    @property
    def num_layers(self) -> int:
        """L."""

    @property
    def num_heads(self) -> int:
        """N, query heads."""

    @property
    def num_kv_heads(self) -> int:
        """K, key and value heads."""

    @property
    def head_dim(self) -> int:
        """H."""

    @property
    def num_experts(self) -> int:
        """E; 0 for an MLP that every token passes."""

    @property
    def experts_per_token(self) -> int:
        """How many experts a token passes."""

    @property
    def biases(self) -> tuple[str, ...]:
        """Projections that add a bias."""

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed."""

    @property
    def post_norms(self) -> bool:
        """Whether what attention and MLP give is normed."""

    @property
    def tied_head(self) -> bool:
        """Whether the embedding is the head."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """One training step: the model, what is trained of it, on how many tokens, and how.

    Attributes:
      shape: of the decoder.
      method: `"qlora"`, adapters on a base in 4 bits; `"lora"`, on a dense one; `"full"`, all
        weights trained and no adapters.
      rank: r, of the adapters.
      targets: the weights that have one: a pattern searched in the paths of the scanned decoder.
      batch: B, rows of a step.
      length: tokens of a row.
      accumulate: parts in which a batch is computed, one after the other.
      optimizer: `"adamw"`; `"adamw-bfloat16"`, whose mean of gradients is in bfloat16 (optax's
        `mu_dtype`); `"momentum"`; or `"sgd"`, which keeps nothing.
      remat: None, or a policy of `lora_jax.models.remat`: `"products"`, `"attention"`, `"stream"`,
        `"layer"`, `"attended"`, `"layer-offloaded"` or `"attended-offloaded"`.
      scan: whether layers are scanned.
      chunk: positions whose logits are held at once; None for all.
      attention: `"cudnn"`, which never holds the products of queries and keys, or `"xla"`.
      kind: of the 4-bit base.
      quantized: the weights in 4 bits, a pattern as `targets`.
      block_size: elements that share a scale.
      double_quant: whether scales are stored in 8 bits.
      dtype: of activations.
      param_dtype: of weights that are not in 4 bits.
      adapter_dtype: of adapters, and of their optimizer's state.
      fold: whether the update may be added while a 4-bit weight is decoded, as on a GPU.
      keep: layers whose 4-bit kernels are on the device, the others' being in the host's pinned
        memory (`lj.offload`); None for all.
    """

    shape: Shape
    method: Method = "qlora"
    rank: int = 16
    targets: str = PROJECTIONS
    batch: int = 1
    length: int = 2048
    accumulate: int = 1
    optimizer: Optimizer = "adamw"
    remat: str | None = "layer"
    scan: bool = True
    chunk: int | None = 2048
    attention: Literal["cudnn", "xla"] = "cudnn"
    kind: str = "nf4"
    quantized: str = PROJECTIONS
    block_size: int = 64
    double_quant: bool = True
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.bfloat16
    adapter_dtype: Any = jnp.float32
    fold: bool = True
    keep: int | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "batch", "length", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name, known in (
            ("method", get_args(Method)),
            ("optimizer", get_args(Optimizer)),
            ("remat", (None, *POLICIES, *ASKED_FOR)),
            ("attention", ("cudnn", "xla")),
            ("kind", tuple(KINDS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, of which no memory is foretold; write "
                    f"one of {', '.join(map(repr, known))}"
                )
        if self.batch % self.accumulate:
            raise ValueError(
                f"a batch of {self.batch} cannot be cut in {self.accumulate} equal parts; write an "
                "accumulate that divides it"
            )
        if self.keep is not None and (self.keep < 0 or self.method != "qlora"):
            raise ValueError(
                f"keep is {self.keep} with method {self.method!r}, expected a number of layers "
                'whose 4-bit kernels stay on the device, with method "qlora"'
            )
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}, expected at least 1, or None for all")
        for name in ("targets", "quantized"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, which is no regular expression: {error}"
                ) from None

    @property
    def rows(self) -> int:
        """Rows that are computed at once."""
        return self.batch // self.accumulate

    @property
    def tokens(self) -> int:
        """T, tokens that are computed at once."""
        return self.rows * self.length

    @property
    def offloads(self) -> bool:
        """Whether the layers' inputs wait in the host's memory."""
        return self.remat is not None and self.remat.endswith("-offloaded")

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return np.dtype(self.dtype).itemsize
