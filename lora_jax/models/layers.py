"""The parts of a decoder: norm, rotary positions, attention with its cache, MLP.

Shapes: B batch, T tokens, S slots of the cache, D model width, F MLP width, N query heads,
K key-value heads, H head width, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from lora_jax.models.config import DecoderConfig


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far.

    The first `length` slots are filled, the same in every row. Rows of unequal length are padded,
    and their padding is hidden by its segment id, as it is everywhere in this module.

    Attributes:
      k: [L, B, S, K, H], rotated keys.
      v: [L, B, S, K, H], values.
      positions: int32 [B, S].
      segment_ids: int32 [B, S].
      length: int32 [], slots filled.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    length: jax.Array


def init_cache(
    config: DecoderConfig, batch: int, length: int, dtype: DTypeLike | None = None
) -> KVCache:
    """An empty cache of `length` slots in each of `batch` rows.

    Args:
      config: The decoder that will fill it.
      batch: B.
      length: S, the longest sequence that it can hold, prompt and padding included.
      dtype: Of keys and values; by default the config's activation dtype.

    Returns:
      A cache of which nothing is visible: no token is as late as the position of an empty slot.
    """
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    dtype = config.dtype if dtype is None else dtype
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        positions=jnp.full((batch, length), jnp.iinfo(jnp.int32).max, jnp.int32),
        segment_ids=jnp.zeros((batch, length), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


class Context(NamedTuple):
    """What all layers share in one call."""

    cos: jax.Array  # float32 [B, T, 1, H/2]
    sin: jax.Array  # float32 [B, T, 1, H/2]
    mask: jax.Array | None  # bool [B, 1, T, S]; None: causal, each row one sequence


class Carry(NamedTuple):
    """What one layer hands to the next; the cache goes along whole, to be written in place."""

    x: jax.Array  # [B, T, D]
    cache: KVCache | None


def rotary(positions: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles (Su et al., 2021), float32 [B, T, 1, H/2] each."""
    # An error in a frequency grows with the position: take them in float64, and round once.
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = np.asarray(config.rope_theta**-exponents, np.float32)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: jax.Array, context: Context) -> jax.Array:
    """Turns the pairs (j, j + H/2) of heads x [B, T, heads, H] by their angles, in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = context.cos, context.sin
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def visible(
    positions: jax.Array, segment_ids: jax.Array, key_positions: jax.Array, key_segments: jax.Array
) -> jax.Array:
    """Mask [B, 1, T, S]: a token sees its own segment's tokens that are not later than itself."""
    earlier = key_positions[:, None, :] <= positions[:, :, None]
    return ((key_segments[:, None, :] == segment_ids[:, :, None]) & earlier)[:, None]


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, with float32 statistics (Zhang & Sennrich, 2019)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x [..., D]."""
        c = self.config
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], c.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + c.norm_eps)
        return x.astype(c.dtype) * scale.astype(c.dtype)


def _dense(config: DecoderConfig, features: int, name: str) -> nn.Dense:
    return nn.Dense(
        features, use_bias=False, dtype=config.dtype, param_dtype=config.param_dtype, name=name
    )


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, carry: Carry, layer: jax.Array | int, context: Context) -> Carry:
        """Attends from x [B, T, D] to itself, or to the cache after x has joined it."""
        c, (x, cache) = self.config, carry

        def heads(name: str, number: int) -> jax.Array:
            y = _dense(c, number * c.head_dim, name)(x)
            return y.reshape(*y.shape[:-1], number, c.head_dim)

        q = _rotate(heads("q_proj", c.num_heads), context)  # [B, T, N, H]
        k = _rotate(heads("k_proj", c.num_kv_heads), context)  # [B, T, K, H]
        v = heads("v_proj", c.num_kv_heads)  # [B, T, K, H]
        if cache is not None:
            corner = (layer, 0, cache.length, 0, 0)
            cache = cache._replace(
                k=jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), corner),
                v=jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), corner),
            )
            k = jax.lax.dynamic_index_in_dim(cache.k, layer, keepdims=False).astype(c.dtype)
            v = jax.lax.dynamic_index_in_dim(cache.v, layer, keepdims=False).astype(c.dtype)
        y = jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=context.mask,
            is_causal=context.mask is None,
            implementation=c.attention,
        )  # [B, T, N, H]
        y = y.reshape(*y.shape[:-2], c.num_heads * c.head_dim)
        return Carry(_dense(c, c.dim, "o_proj")(y), cache)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, T, D] to the same shape."""
        c = self.config
        gate = nn.silu(_dense(c, c.mlp_dim, "gate_proj")(x))  # [B, T, F]
        return _dense(c, c.dim, "down_proj")(gate * _dense(c, c.mlp_dim, "up_proj")(x))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, carry: Carry, layer: jax.Array | int, context: Context
    ) -> tuple[Carry, None]:
        """One step of the scan over layers: the carry, and no output of its own."""
        x, cache = carry
        normed = RMSNorm(self.config, name="attn_norm")(x)
        y, cache = Attention(self.config, name="attn")(Carry(normed, cache), layer, context)
        x = x + y
        x = x + MLP(self.config, name="mlp")(RMSNorm(self.config, name="mlp_norm")(x))
        return Carry(x, cache), None
