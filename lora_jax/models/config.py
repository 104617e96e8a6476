"""What a decoder is: its shape, and the way in which it is run."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import remat

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies slowed down, so that longer texts turn no further than short ones did.

    Attributes:
      factor: What frequencies are divided by.
      length: None to divide them all (position interpolation, arXiv:2306.15595). Else the tokens of
        the longest text before: a frequency of at least `high` turns in it stays as it is, one of
        at most `low` turns is divided, and those between pass from one to the other (Llama 3.1,
        arXiv:2407.21783).
      low: Turns.
      high: Turns, more than `low`.
    """

    factor: float
    length: int | None = None
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self) -> None:
        if not self.factor > 0 or not self.low < self.high:
            raise ValueError(
                f"expected a rope scaling of factor > 0 and low < high, got factor={self.factor}, "
                f"low={self.low}, high={self.high}."
            )


class AttentionKind(NamedTuple):
    """In what the attention of a layer may differ from that of its neighbours.

    Attributes:
      window: Positions that a token sees, its own included; None for all that are not later.
      theta: Base of the rotary frequencies; None for attention that knows no positions.
      scaling: Of those frequencies, if any.
    """

    window: int | None
    theta: float | None
    scaling: RopeScaling | None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder and the way in which it is run.

    Attributes:
      vocab_size: V, rows of the embedding.
      dim: D, width of the residual stream.
      mlp_dim: F, width of the MLP, or of each expert.
      num_layers: L.
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads; divides N.
      head_dim: H, even, because rotary positions turn pairs.
      rope_theta: Base of the rotary frequencies.
      rope_scaling: How these are slowed down for long texts, if they are.
      local_rope_theta: Base in the layers that have a window, where nothing is slowed down; None if
        they turn as the others do.
      unrotated_layers: Numbers of the layers whose attention knows no positions.
      window: Positions that a token sees in the layers that have a window, its own included.
      windowed_layers: Numbers of these layers.
      norm_eps: Added to the mean square in RMSNorm.
      zero_centered_norms: Whether norms multiply by 1 + scale, in float32, instead of by scale.
      post_norms: Whether what attention and MLP give is normed again before it is added.
      qk_norm: Whether each head's queries and keys are normed before they are turned.
      biases: Projections that add a bias, by their names, such as `q_proj`.
      activation: Of the MLP's gate: `silu`, or `gelu_tanh`, the GELU by its tanh approximation.
      num_experts: E, experts of the MLP; 0 for a single one, that every token passes.
      experts_per_token: How many of them a token passes, the likeliest by the router.
      normalized_routing: Whether the weights of these experts are made to sum to one.
      embedding_scale: Factor on embeddings, rounded to the activations' dtype.
      attention_scale: Factor on products of queries and keys; None for 1 / sqrt(H).
      attention_cap: These products, scaled, are kept within -c and c by c * tanh(x / c).
      logit_cap: The same for logits.
      tied_head: Whether the logits are taken with the embedding instead of `lm_head`.
      scan_layers: Whether layers are one stacked layer under `nn.scan` (compiles in the time of one
        layer) or L separate ones.
      remat: None to save what autodiff asks for, or one of `models.remat.POLICIES`.
      attention: Implementation in `jax.nn.dot_product_attention`: "xla", or "cudnn" for the fused
        kernel of NVIDIA GPUs in half precision, which knows no `attention_cap` and is at its best
        where no positions or segment ids are given, so that the mask is the causal one.
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
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    unrotated_layers: tuple[int, ...] = ()
    window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    norm_eps: float = 1e-5
    zero_centered_norms: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    biases: tuple[str, ...] = ()
    activation: Literal["silu", "gelu_tanh"] = "silu"
    num_experts: int = 0
    experts_per_token: int = 0
    normalized_routing: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    tied_head: bool = False
    scan_layers: bool = True
    remat: str | None = None
    attention: Literal["xla", "cudnn"] = "xla"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)}; a decoder has 1 at least.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads="
                f"{self.num_kv_heads}; every key-value head must serve as many query heads."
            )
        if self.head_dim % 2 or self.head_dim < 1:
            raise ValueError(
                f"head_dim={self.head_dim} is odd or below 1; rotary positions need an even "
                "head_dim."
            )
        self._check_layers()
        self._check_mlp()
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation={self.activation!r}; write 'silu' or 'gelu_tanh'.")
        if self.attention_cap is not None and self.attention == "cudnn":
            raise ValueError(
                f"attention_cap={self.attention_cap} with attention='cudnn', whose kernel knows no "
                "cap; write attention='xla'."
            )
        if self.remat is not None and self.remat not in remat.POLICIES:
            raise ValueError(
                f"remat={self.remat!r} is no policy; write None or one of "
                f"{', '.join(remat.POLICIES)}."
            )

    def _check_layers(self) -> None:
        for name in ("unrotated_layers", "windowed_layers"):
            numbers = getattr(self, name)
            if outside := [k for k in numbers if k not in range(self.num_layers)]:
                raise ValueError(
                    f"{name} has {outside[0]}; the layers are 0 to {self.num_layers - 1}."
                )
        if (self.window is None) != (not self.windowed_layers):
            raise ValueError(
                f"window={self.window} with windowed_layers={self.windowed_layers}; "
                "write both, or neither."
            )
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window={self.window}; a token sees at least itself: write 1 or more."
            )

    def _check_mlp(self) -> None:
        known = ATTENTION_PROJECTIONS + (() if self.num_experts else MLP_PROJECTIONS)
        if unknown := [name for name in self.biases if name not in known]:
            raise ValueError(f"biases has {unknown[0]!r}; expected some of {', '.join(known)}.")
        if not min(1, self.num_experts) <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} of num_experts={self.num_experts}; "
                "a token passes one expert at least, and all of them at most."
            )

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """What the attention of each layer is like."""
        windowed, unrotated = frozenset(self.windowed_layers), frozenset(self.unrotated_layers)

        def kind(layer: int) -> AttentionKind:
            theta, scaling = self.rope_theta, self.rope_scaling
            window = self.window if layer in windowed else None
            if window is not None and self.local_rope_theta is not None:
                theta, scaling = self.local_rope_theta, None
            if layer in unrotated:
                return AttentionKind(window, None, None)
            return AttentionKind(window, theta, scaling)

        return tuple(kind(layer) for layer in range(self.num_layers))
