"""4-bit decoding in plain JAX, which XLA fuses into one pass over the codes.

`value = level[code] * scale (+ minimum)`, in float32, then cast to the weight's dtype.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.core.codebooks import codebook, cuda_codebook, scale_codebook
from lora_jax.core.leaves import QuantizedArray, from_matrix
from lora_jax.core.placement import on_device

GROUP = 256  # blocks that share one float32 when scales are double-quantized


@jax.jit
def decode(q: QuantizedArray) -> jax.Array:
    """The values of a quantized weight, as the matrix `[b..., out, in]` of its dtype."""
    q = _gathered(q)
    values = _levels_times_scales(q, _whole_blocks(q), decode_scales(q), q.minimum)
    if not q.is_flat:
        return values
    out, inn = q.matrix_shape
    return values[..., : out * inn].reshape(*q.batch_shape, out, inn)


def _whole_blocks(q: QuantizedArray) -> jax.Array:
    """The codes, with those that the last block of a flat leaf lacks."""
    lacking = q.scales.shape[-1] * q.block_size // 2 - q.codes.shape[-1] if q.is_flat else 0
    return jnp.pad(q.codes, [(0, 0)] * (q.codes.ndim - 1) + [(0, lacking)]) if lacking else q.codes


@jax.jit
def as_parameter(q: QuantizedArray, values: jax.Array) -> jax.Array:
    """Decoded values `[b..., out, in]` in the axes of the parameter.

    XLA folds a transpose into the product that follows, and its CPU products of few rows then add
    up in another order. There the values are made to lie in memory as a dense argument's do, so
    that products with either are equal bit for bit. Other backends are left the choice, and the
    speed; so is a mesh, because sharding does not propagate through the constraint.
    """
    w = from_matrix(values, q.layout, q.axis_sizes)
    if q.sharding_at_use is not None:
        return w
    return jax.lax.platform_dependent(w, cpu=_row_major, default=lambda w: w)


def _row_major(w: jax.Array) -> jax.Array:
    return with_layout_constraint(w, Layout(major_to_minor=tuple(range(w.ndim))))


def _gathered(q: QuantizedArray) -> QuantizedArray:
    """The same weight, moved to where it is used while it is still four bits a value."""
    at_use = q.sharding_at_use
    if at_use is None:
        return q
    free = [PartitionSpec.UNCONSTRAINED] * len(q.batch_shape)
    sharding = NamedSharding(at_use.mesh, PartitionSpec(*free, *at_use.spec))

    def gather(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jax.lax.with_sharding_constraint(x, sharding)

    return dataclasses.replace(
        q, codes=gather(q.codes), scales=gather(q.scales), minimum=gather(q.minimum)
    )


@jax.jit
def decode_rows(q: QuantizedArray, rows: jax.Array) -> jax.Array:
    """The values of some rows, reading only their codes (of a flat leaf, all).

    Args:
      q: a quantized weight without batch axes, `[out, in]`.
      rows: integers `[n...]` in `[0, out)`.

    Returns:
      `[n..., in]` in the weight's dtype.
    """
    q = on_device(q)
    if q.is_flat:
        return jnp.take(decode(q), rows, axis=0, mode="clip")
    codes = jnp.take(q.codes, rows, axis=0, mode="clip")
    scales = jnp.take(q.scales, rows, axis=0, mode="clip")
    if q.group_scales is not None:
        scales = _decode_scales(scales, q.group_scales, q.offset, rows)
    minimum = None if q.minimum is None else jnp.take(q.minimum, rows, axis=0, mode="clip")
    return _levels_times_scales(q, codes, scales, minimum)


def decode_scales(q: QuantizedArray) -> jax.Array:
    """The float32 scale of each block, `[b..., out, in/G]` (`[b..., 1, blocks]` of a flat leaf)."""
    if q.group_scales is None:
        return q.scales.astype(jnp.float32)
    rows = jnp.arange(q.scales.shape[-2])
    one = functools.partial(_decode_scales, rows=rows)
    for _ in q.batch_shape:
        one = jax.vmap(one)
    return one(q.scales, q.group_scales, q.offset)


def _decode_scales(
    codes: jax.Array, group_scales: jax.Array, offset: jax.Array, rows: jax.Array
) -> jax.Array:
    """Scales of `rows`: codes `[n..., in/G]`, group scales `[groups]`, offset `[]`."""
    blocks = rows[..., None] * codes.shape[-1] + jnp.arange(codes.shape[-1])
    levels = jnp.asarray(scale_codebook())[codes]
    return _product_then_sum(levels, group_scales[blocks // GROUP], offset)


def _product_then_sum(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """`x * y + z`, rounded twice.

    XLA may contract the two into one fused multiply-add, which rounds once: a quarter of the scales
    would then differ from bitsandbytes' in the last bit. A maximum with a value that no weight or
    scale reaches stands between them and changes nothing; an optimization barrier did not help.
    """
    return jnp.maximum(x * y, -3e38) + z


def _levels_times_scales(
    q: QuantizedArray, codes: jax.Array, scales: jax.Array, minimum: jax.Array | None
) -> jax.Array:
    # uint4 counts its low nibble first and our earlier element is the high one, hence the swap. On
    # an H200 the bitcast with a table look-up was the fastest of three decodings XLA was given.
    # XLA folds that bitcast wrongly where the codes are a constant of the program (seen with jaxlib
    # 0.10.2, right in 0.12), as when a jitted function closes over its base: the barrier hides it.
    codes = jax.lax.optimization_barrier(codes)
    nibbles = jax.lax.bitcast_convert_type((codes << 4) | (codes >> 4), jnp.uint4)
    nibbles = nibbles.reshape(*codes.shape[:-1], -1, q.block_size).astype(jnp.uint8)
    levels = _levels(q)[nibbles]
    scales = scales.astype(jnp.float32)[..., None]
    if minimum is None:
        values = levels * scales
    else:
        values = _product_then_sum(levels, scales, minimum.astype(jnp.float32)[..., None])
    return values.reshape(*codes.shape[:-1], -1).astype(q.dtype)


def _levels(q: QuantizedArray) -> jax.Array:
    levels = jnp.asarray(codebook(q.kind, q.block_size))
    if q.kind != "fp4":  # of which a zero has another sign there
        return levels
    on_cuda = jnp.asarray(cuda_codebook(q.kind, q.block_size))
    return jax.lax.platform_dependent(cuda=lambda: on_cuda, default=lambda: levels)
