"""The MLP of a layer: one that every token passes, or experts of which each token passes a few.

Shapes: B batch, T tokens, D model width, F MLP width, E experts, R = B * T rows, P experts that a
token passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.kernels import grouped_dot
from lora_jax.models.config import DecoderConfig
from lora_jax.models.parts import dense
from lora_jax.models.remat import saved

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}


class MLP(nn.Module):
    """A gated linear unit between two projections (Shazeer, 2020): SwiGLU, or GeGLU."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, T, D] to the same shape."""
        c = self.config
        gate = saved(dense(c, c.mlp_dim, "gate_proj")(x), "gate")  # [B, T, F]
        up = saved(dense(c, c.mlp_dim, "up_proj")(x), "up")  # [B, T, F]
        return dense(c, c.dim, "down_proj")(_ACTIVATIONS[c.activation](gate) * up)


class MixtureOfExperts(nn.Module):
    """A router sends each token through a few of many MLPs (Shazeer et al., 2017).

    No expert is ever full and no token is dropped, so what a token becomes depends on itself alone.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, T, D] to the same shape."""
        c, passed = self.config, self.config.experts_per_token
        rows = x.reshape(-1, c.dim)  # [R, D]
        logits = dense(c, c.num_experts, "router")(rows)  # [R, E]
        probabilities = jax.nn.softmax(logits.astype(jnp.float32))
        weights, chosen = jax.lax.top_k(probabilities, passed)  # [R, P]
        if c.normalized_routing:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        # Each row as often as it passes an expert, sorted by expert: one product for all of them.
        order = jnp.argsort(chosen.reshape(-1))  # [R * P]
        sizes = jnp.bincount(chosen.reshape(-1), length=c.num_experts)
        y = Experts(c, name="experts")(rows[order // passed], sizes)  # [R * P, D]
        y = saved(y, "routed")
        y = jnp.zeros_like(y).at[order].set(y, unique_indices=True).reshape(-1, passed, c.dim)
        y = jnp.einsum("rpd,rp->rd", y, weights.astype(c.dtype))
        return y.reshape(x.shape)


class Experts(nn.Module):
    """As many MLPs as there are experts, each for some of the rows."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """Maps rows x [R * P, D], sorted by expert, of which each has sizes int32 [E]."""
        c = self.config
        gate = saved(GroupedDense(c, c.mlp_dim, name="gate_proj")(x, sizes), "gate")  # [R * P, F]
        up = saved(GroupedDense(c, c.mlp_dim, name="up_proj")(x, sizes), "up")  # [R * P, F]
        gated = _ACTIVATIONS[c.activation](gate) * up
        return GroupedDense(c, c.dim, name="down_proj")(gated, sizes)


class GroupedDense(nn.Module):
    """A projection whose kernel [E, in, out] has a matrix for each group of rows."""

    config: DecoderConfig
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """Maps rows x [R * P, in], sorted by group, to [R * P, out]."""
        c = self.config
        shape = (c.num_experts, x.shape[-1], self.features)
        start = nn.initializers.lecun_normal(batch_axis=0)
        kernel = self.param("kernel", start, shape, c.param_dtype)
        return grouped_dot(x, kernel.astype(c.dtype), sizes)
