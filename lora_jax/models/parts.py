"""The small parts that attention and MLP share: norm, projection, soft cap.

Shapes: D model width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.config import DecoderConfig


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, with float32 statistics (Zhang & Sennrich, 2019)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x [..., D]."""
        c = self.config
        start = nn.initializers.zeros if c.zero_centered_norms else nn.initializers.ones
        scale = self.param("scale", start, x.shape[-1:], c.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + c.norm_eps)
        if c.zero_centered_norms:
            # In float32 up to here: 1 + scale would lose in bfloat16 what the small scale says.
            return (x * (1 + scale.astype(jnp.float32))).astype(c.dtype)
        return x.astype(c.dtype) * scale.astype(c.dtype)


def dense(config: DecoderConfig, features: int, name: str) -> nn.Dense:
    """The projection of this name, with a bias if the config says so."""
    return nn.Dense(
        features,
        use_bias=name in config.biases,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """c * tanh(x / c), which is nearly x where x is small and never beyond -c and c."""
    return x if cap is None else cap * jnp.tanh(x / cap)
