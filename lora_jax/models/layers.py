"""One layer of a decoder: attention and MLP, each behind a norm.

Shapes: B batch, T tokens, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import linen as nn

from lora_jax.models.attention import Attention, Carry, Context
from lora_jax.models.config import DecoderConfig
from lora_jax.models.mlp import MLP, MixtureOfExperts
from lora_jax.models.parts import RMSNorm
from lora_jax.models.remat import saved


class Step(NamedTuple):
    """Which layer it is that is run; under a scan, which differs from step to step.

    Attributes:
      layer: Its number.
      kind: Of its attention, an index into the leading axis of the contexts; None where there is
        one context without such an axis.
    """

    layer: jax.Array | int
    kind: jax.Array | None = None


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, carry: Carry, step: Step, context: Context) -> tuple[Carry, None]:
        """One step of the scan over layers: the carry, and no output of its own."""
        c, (x, cache) = self.config, carry
        x = saved(x, "input")
        if step.kind is not None:
            context = jax.tree.map(
                lambda of_all: jax.lax.dynamic_index_in_dim(of_all, step.kind, keepdims=False),
                context,
            )
        normed = RMSNorm(c, name="attn_norm")(x)
        y, cache = Attention(c, name="attn")(Carry(normed, cache), step.layer, context)
        if c.post_norms:
            y = RMSNorm(c, name="attn_post_norm")(saved(y, "update"))
        x = saved(x + y, "stream")
        mlp = (MixtureOfExperts if c.num_experts else MLP)(c, name="mlp")
        y = mlp(RMSNorm(c, name="mlp_norm")(x))
        if c.post_norms:
            y = RMSNorm(c, name="mlp_post_norm")(saved(y, "update"))
        return Carry(x + y, cache), None
