"""What a decoder is: its shape, and the way in which it is run."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

# What `DecoderConfig.remat` may name: what the backward pass finds saved of each layer.
REMAT_POLICIES = ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder and the way in which it is run.

    Attributes:
      vocab_size: V, rows of the embedding.
      dim: D, width of the residual stream.
      mlp_dim: F, width of the MLP.
      num_layers: L.
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads; divides N.
      head_dim: H, even, because rotary positions turn pairs.
      rope_theta: Base of the rotary frequencies.
      norm_eps: Added to the mean square in RMSNorm.
      tied_head: Whether the logits are taken with the embedding instead of `lm_head`.
      scan_layers: Whether layers are one stacked layer under `nn.scan` (compiles in the time of one
        layer) or L separate ones.
      remat: None to save what autodiff asks for, or one of `REMAT_POLICIES`.
      attention: Implementation in `jax.nn.dot_product_attention`: "xla", or "cudnn" for the fused
        kernel of NVIDIA GPUs in half precision.
      dtype: Of activations. Norm statistics, attention weights and logits are always float32.
      param_dtype: Of parameters at initialization.
    """

    vocab_size: int
    dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = False
    scan_layers: bool = True
    remat: str | None = None
    attention: Literal["xla", "cudnn"] = "xla"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads="
                f"{self.num_kv_heads}; every key-value head must serve as many query heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd; rotary positions need an even head_dim."
            )
        if self.remat is not None and self.remat not in REMAT_POLICIES:
            raise ValueError(
                f"remat={self.remat!r} is no policy; write None or one of "
                f"{', '.join(REMAT_POLICIES)}."
            )
