"""Attention: what a token sees, the turning of queries and keys, and the cache of what was seen.

Shapes: B batch, T tokens, S slots of the cache (or T), N query heads, K key-value heads, H head
width, L layers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from lora_jax.kernels.dispatch import sees_ampere
from lora_jax.models.config import AttentionKind, DecoderConfig
from lora_jax.models.parts import RMSNorm, capped, dense
from lora_jax.models.remat import saved


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
    """What layers of one kind share in one call."""

    cos: jax.Array  # float32 [B, T, 1, H/2]
    sin: jax.Array  # float32 [B, T, 1, H/2]
    mask: jax.Array | None  # bool [B, 1, T, S]; None: causal, each row one sequence


class Carry(NamedTuple):
    """What one layer hands to the next; the cache goes along whole, to be written in place."""

    x: jax.Array  # [B, T, D]
    cache: KVCache | None


def rotary(
    positions: jax.Array, config: DecoderConfig, kind: AttentionKind
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles (Su et al., 2021), float32 [B, T, 1, H/2] each."""
    frequencies = _frequencies(config.head_dim, kind)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _frequencies(head_dim: int, kind: AttentionKind) -> np.ndarray:
    """Radians a position, float32 [H/2]; zero where attention knows no positions."""
    # An error in a frequency grows with the position: take them in float64, and round once.
    exponents = np.arange(0, head_dim, 2) / head_dim
    if kind.theta is None:
        return np.zeros(exponents.shape, np.float32)
    frequencies, scaling = kind.theta**-exponents, kind.scaling
    if scaling is not None:
        kept: float | np.ndarray = 0.0  # the share of a frequency that is not slowed down
        if scaling.length is not None:
            turns = scaling.length * frequencies / (2 * math.pi)
            kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return np.asarray(frequencies, np.float32)


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


def within(window: int, positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """Mask [B, 1, T, S] of the tokens less than `window` positions back, and of later ones."""
    return (key_positions[:, None, :] > positions[:, :, None] - window)[:, None]


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, carry: Carry, layer: jax.Array | int, context: Context) -> Carry:
        """Attends from x [B, T, D] to itself, or to the cache after x has joined it."""
        c, (x, cache) = self.config, carry

        def heads(name: str, number: int) -> jax.Array:
            y = dense(c, number * c.head_dim, f"{name}_proj")(x)
            return y.reshape(*y.shape[:-1], number, c.head_dim)

        def turned(name: str, number: int) -> jax.Array:
            y = heads(name, number)
            if c.qk_norm:
                y = RMSNorm(c, name=f"{name}_norm")(saved(y, "heads"))
            return _rotate(y, context)

        q = saved(turned("q", c.num_heads), "queries")  # [B, T, N, H]
        k = saved(turned("k", c.num_kv_heads), "keys")  # [B, T, K, H]
        v = saved(heads("v", c.num_kv_heads), "values")  # [B, T, K, H]
        if cache is not None:
            corner = (layer, 0, cache.length, 0, 0)
            cache = cache._replace(
                k=jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), corner),
                v=jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), corner),
            )
            k = jax.lax.dynamic_index_in_dim(cache.k, layer, keepdims=False).astype(c.dtype)
            v = jax.lax.dynamic_index_in_dim(cache.v, layer, keepdims=False).astype(c.dtype)
        y = _attend(c, q, k, v, context.mask)  # [B, T, N, H]
        if c.attention != "cudnn":  # of which policies save all results; a scan would stack two
            y = saved(y, "attended")
        y = y.reshape(*y.shape[:-2], c.num_heads * c.head_dim)
        return Carry(dense(c, c.dim, "o_proj")(y), cache)


def fused_obstacles(config: DecoderConfig, length: int) -> list[str]:
    """What keeps cuDNN's kernel from reading rows that hold one sequence each.

    Args:
      config: Of the decoder, whatever attention it names.
      length: T.

    Returns:
      Each obstacle as a sentence without its full stop; none if the kernel can be used.
    """
    dtype, window = jnp.dtype(config.dtype), config.window
    found = {
        "there is no NVIDIA GPU of compute capability 8.0 or above": not sees_ampere(),
        f"activations are {dtype.name}": dtype.itemsize != 2,
        f"heads are {config.head_dim} wide": config.head_dim > 128 or config.head_dim % 8 != 0,
        "products of queries and keys are capped": config.attention_cap is not None,
        f"some layers see {window} tokens": window is not None and window < length,
        # JAX refuses these in training, where it takes the absence of a bias for one.
        f"rows are of {length} tokens, an odd number": length % 2 != 0,
    }
    return [sentence for sentence, holds in found.items() if holds]


def _attend(
    c: DecoderConfig, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Values [B, T, N, H] for queries [B, T, N, H] of keys and values [B, S, K, H]."""
    if c.attention_cap is None:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            scale=c.attention_scale,
            is_causal=mask is None,
            implementation=c.attention,
        )
    if mask is None:
        mask = jnp.tri(q.shape[1], dtype=bool)[None, None]
    scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
    grouped = q.reshape(*q.shape[:2], c.num_kv_heads, -1, c.head_dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    logits = capped(logits * scale, c.attention_cap)
    logits = jnp.where(mask[:, :, None], logits, jnp.finfo(logits.dtype).min)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)
