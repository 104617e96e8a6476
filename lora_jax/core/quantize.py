"""Blockwise 4-bit quantization with double-quantized scales (QLoRA, arXiv:2305.14314).

Each block of G neighbours along the contracted axis is divided by its largest magnitude and every
value takes the nearest of sixteen levels. The codes are those of bitsandbytes on CPU, bit for bit.
The kinds of GGUF take integers instead, and are those of its own quantizer, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.codebooks import GGUF_KINDS, KINDS, decision_points, scale_codebook
from lora_jax.core.leaves import (
    QuantizedArray,
    is_array,
    is_concrete,
    parse_layout,
    split_axes,
    to_matrix,
)
from lora_jax.core.placement import joined
from lora_jax.kernels import decode_parameter, xla

LARGEST = 1e37  # beyond it the mean of the scales, which double quantization takes, may overflow
LARGEST_OF_GGUF = 65504.0  # of a float16, in which its kinds keep a block's minimum
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def quantize_array(
    w: Any,
    kind: str = "nf4",
    *,
    block_size: int = 64,
    double_quant: bool = True,
    layout: str | None = None,
    flat: bool = False,
    name: str = "the weight",
) -> QuantizedArray:
    """Stores a weight in 4 bits.

    With double quantization at block size 64 a parameter takes 4 + 8/64 + 32/(64*256) = 4.127 bits.
    A block whose largest magnitude is below float32's smallest normal number decodes to within
    that number of zero.

    The kinds of GGUF are what llama.cpp writes at block size 32: `"q4_0"` is `(code - 8) * d` in
    4.5 bits a parameter, `"q4_1"` is `code * d + m` in 5, with d and m in float16 whatever
    `double_quant` says. They are for weights between about 1e-5 and 65504.

    Args:
      w: float16, bfloat16 or float32 array of two or more axes.
      kind: `"nf4"`, `"fp4"`, `"int4"` (uniform, -7..7), `"af4"`, `"q4_0"` or `"q4_1"`.
      block_size: elements that share a scale: 32, 64, ... 4096; divides the contracted size,
        unless `flat`.
      double_quant: whether to store the scales in 8 bits; not for the kinds of GGUF.
      layout: which axes are contracted (`i`), produced (`o`) or batch (`b`, leading): `"i o"` for
        Flax kernels (the default for matrices), `"o i"` for Equinox weights and embeddings,
        `"i o o"` and `"i i o"` for DenseGeneral, `"b i o"` for scanned layers and experts.
      flat: whether blocks may run over row ends where the block size does not divide the contracted
        size, as bitsandbytes lets them. Such a matrix cannot be sharded, and looking up some of its
        rows decodes all.
      name: what error messages call the weight.

    Returns:
      A `QuantizedArray` of the same logical shape and dtype.

    Raises:
      TypeError: if `w` is no array, or its dtype is not one of the three.
      ValueError: for an unknown kind, block size or layout, a contracted size that the block size
        does not divide (unless `flat`), and values that are NaN, infinite or above 1e37, or above
        65504 for the kinds of GGUF (not seen under jit).
    """
    if not is_array(w):
        raise TypeError(f"{name} is {type(w).__name__}, expected an array of floats")
    dtype = np.dtype(w.dtype)
    if dtype not in (np.dtype(np.float32), np.dtype(np.float16), np.dtype(jnp.bfloat16)):
        raise TypeError(
            f"{name} has dtype {dtype}, expected float32, bfloat16 or float16; cast it first, "
            "for example with w.astype(jnp.float32), or leave it out of the pattern"
        )
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; write one of {', '.join(map(repr, KINDS))}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size!r}, expected one of {BLOCK_SIZES}")
    layout = parse_layout(layout, tuple(w.shape), name)
    axis_sizes = tuple(w.shape[w.ndim - len(layout.split()) :])
    matrix_shape = jax.eval_shape(functools.partial(to_matrix, layout=layout), w).shape
    if 0 in w.shape:
        raise ValueError(f"{name} is empty, shape {tuple(w.shape)}; leave it out of the pattern")
    if matrix_shape[-1] % block_size and not flat:
        fitting = [size for size in BLOCK_SIZES if matrix_shape[-1] % size == 0]
        raise ValueError(
            f"{name} contracts {matrix_shape[-1]} inputs (shape {tuple(w.shape)}, layout "
            f"{layout!r}), which blocks of {block_size} do not divide; "
            + (f"write block_size={fitting[-1]}" if fitting else "leave it out of the pattern")
            + ", or write flat=True for blocks that run over row ends"
        )
    if kind in GGUF_KINDS:
        codes, scales, minimum, absmax = _encode_as_gguf(jnp.asarray(w), kind, block_size, layout)
        largest = LARGEST_OF_GGUF
    else:
        codes, scales = _encode(jnp.asarray(w), kind, block_size, layout)
        minimum, absmax, largest = None, scales, LARGEST
    if is_concrete(absmax) and not bool(absmax.max() <= largest):
        raise ValueError(
            f"{name} holds values that are NaN, infinite or above {largest:g}; repair the "
            "checkpoint first"
        )
    q = QuantizedArray(
        codes,
        scales,
        minimum=minimum,
        kind=kind,
        block_size=block_size,
        dtype=dtype,
        layout=layout,
        axis_sizes=axis_sizes,
    )
    return double_quantized(q) if double_quant else q


def double_quantized(q: QuantizedArray) -> QuantizedArray:
    """The same codes, their float32 scales stored in 8 bits; GGUF's kinds have none of those."""
    if q.kind in GGUF_KINDS:
        return q
    scales, group_scales, offset = _double_quantize(q.scales)
    return dataclasses.replace(q, scales=scales, group_scales=group_scales, offset=offset)


def dequantize(q: QuantizedArray, dtype: Any = None) -> jax.Array:
    """The dense parameter that a quantized one stands for.

    Args:
      q: the quantized leaf.
      dtype: of the result; the dtype the weight had, if None.

    Returns:
      An array of shape `q.shape`.
    """
    if not isinstance(q, QuantizedArray):
        raise TypeError(f"expected a QuantizedArray, got {type(q).__name__}")
    return decode_parameter(joined(q)).astype(dtype or q.dtype)


@functools.partial(jax.jit, static_argnames=("kind", "block_size", "layout"))
def _encode(w: jax.Array, kind: str, block_size: int, layout: str) -> tuple[jax.Array, jax.Array]:
    """Codes uint8 `[b..., out, in/2]` and the largest magnitude a block `[b..., out, in/G]`.

    Both as of a flat leaf, where the block size does not divide `in`.
    """
    batch = w.ndim - len(layout.split())
    outer, inner = (math.prod(sizes) for sizes in split_axes(layout, w.shape[batch:]))
    if inner % block_size:
        return _encode_flat(to_matrix(w, layout), kind, block_size)
    if layout[0] == "i":
        # Encoded as it lies, and only the codes transposed: nine times as fast on a CPU.
        columns = w.reshape(*w.shape[:batch], inner, outer)
        codes, absmax = _encode_blocks(columns, kind, block_size, axis=-2)
        return codes.swapaxes(-1, -2), absmax.swapaxes(-1, -2)
    return _encode_blocks(to_matrix(w, layout), kind, block_size, axis=-1)


def _encode_flat(m: jax.Array, kind: str, block_size: int) -> tuple[jax.Array, jax.Array]:
    """The same of matrices `[b..., out, in]` as one row, with an incomplete last block perhaps."""
    m = m.reshape(*m.shape[:-2], 1, -1)
    size, rest = m.shape[-1], m.shape[-1] % block_size
    parts = []
    if size > rest:
        parts.append(_encode_blocks(m[..., : size - rest], kind, block_size, axis=-1))
    if rest:
        padding = [(0, 0)] * (m.ndim - 1) + [(0, block_size - rest)]
        last = jnp.pad(m[..., size - rest :], padding)
        parts.append(_encode_blocks(last, kind, block_size, axis=-1, divide=True))
    codes, absmax = (jnp.concatenate(part, -1) for part in zip(*parts, strict=True))
    return codes[..., : -(-size // 2)], absmax


def _encode_blocks(
    m: jax.Array, kind: str, block_size: int, *, axis: int, divide: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Codes, two a byte, and the largest magnitudes of blocks along an axis, -1 or -2."""
    blocks = _split(m, axis, block_size)
    absmax = _largest(blocks, axis)
    # bitsandbytes multiplies by the reciprocal of max(absmax, 1e-38), but divides an incomplete
    # block. That bound is itself subnormal and some backends flush it to zero, so its reciprocal is
    # written out.
    tiny = absmax < np.finfo(np.float32).tiny
    divisor = jnp.where(tiny, 1.0, absmax)
    reciprocal = jnp.where(tiny, np.float32(1e38), 1.0 / divisor)
    blocks = blocks.astype(jnp.float32)
    scaled = blocks * jnp.expand_dims(reciprocal, axis)
    if divide:
        quotient = blocks / jnp.expand_dims(divisor, axis)
        scaled = jnp.where(jnp.expand_dims(tiny, axis), scaled, quotient)
    midpoints, order = decision_points(kind, block_size)
    codes = _nearest(scaled, midpoints, order).reshape(m.shape)
    return _packed(_split(codes, axis, 2), axis), absmax


@functools.partial(jax.jit, static_argnames=("kind", "block_size", "layout"))
def _encode_as_gguf(
    w: jax.Array, kind: str, block_size: int, layout: str
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """Codes as `_encode`'s, float16 scales, for `"q4_1"` the minimum, and the largest magnitude.

    All but the codes are `[b..., out, in/G]`; of a flat leaf, whose last block is filled with its
    last value, `[b..., 1, blocks]`. Q4_0 has its value of largest magnitude at code 0, the first of
    them if there are two, so that a scale may be negative. Codes are found with the scale before it
    is rounded to float16.
    """
    m = to_matrix(w, layout).astype(jnp.float32)
    if m.shape[-1] % block_size:
        m = m.reshape(*m.shape[:-2], 1, -1)
    size = m.shape[-1]
    if rest := size % block_size:
        m = jnp.pad(m, [(0, 0)] * (m.ndim - 1) + [(0, block_size - rest)], mode="edge")
    blocks = m.reshape(*m.shape[:-1], -1, block_size)
    if kind == "q4_0":
        at = jnp.argmax(jnp.abs(blocks), -1, keepdims=True)
        start, zero = jnp.zeros((), jnp.float32), 8.0
        scales = jnp.take_along_axis(blocks, at, -1) / -8.0
    else:
        start, zero = blocks.min(-1, keepdims=True), 0.0
        spread = blocks.max(-1, keepdims=True) - start
        # XLA multiplies by 1/15 where it sees a constant, which rounds differently.
        scales = spread / jnp.where(spread > 0, 15.0, 1.0)
    tiny = jnp.abs(scales) < np.finfo(np.float32).tiny  # zeros in float16, whatever the codes
    reciprocal = jnp.where(tiny, 0.0, 1.0 / jnp.where(tiny, 1.0, scales))
    # The bound changes no code; like that of `kernels.xla` it keeps product and sum apart.
    steps = jnp.maximum((blocks - start) * reciprocal, -8.0) + (zero + 0.5)
    codes = jnp.minimum(steps, 15.0).astype(jnp.uint8).reshape(m.shape)
    codes = _packed(_split(codes, -1, 2), -1)[..., : -(-size // 2)]
    minimum = None if kind == "q4_0" else start[..., 0].astype(jnp.float16)
    return codes, scales[..., 0].astype(jnp.float16), minimum, jnp.abs(blocks).max(-1)


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
    """An axis, -1 or -2, in parts of `size`, which are the axis at that place of the result."""
    before, after = x.shape[: x.ndim + axis], x.shape[x.ndim + axis + 1 :]
    return x.reshape(*before, -1, size, *after)


def _largest(blocks: jax.Array, axis: int) -> jax.Array:
    """The largest magnitude in float32; NaN, if there is one."""
    if blocks.dtype == jnp.float32:
        return jnp.abs(blocks).max(axis)
    # Without a sign, floats order as their bits do, with NaN above all: so 16 bits are compared as
    # they are, in half the time, and no float32 copy of them is made.
    bits = jax.lax.bitcast_convert_type(blocks, jnp.uint16) & np.uint16(0x7FFF)
    return jax.lax.bitcast_convert_type(bits.max(axis), blocks.dtype).astype(jnp.float32)


def _packed(pairs: jax.Array, axis: int) -> jax.Array:
    """Pairs of codes along an axis as one byte, the earlier one in the high nibble."""
    if axis == -2:
        return (pairs[..., 0, :] << 4) | pairs[..., 1, :]
    # Two neighbours as one number, the earlier one in its low byte: XLA vectorizes shifts of those,
    # but not taking every other code, which takes three times as long on a CPU.
    both = jax.lax.bitcast_convert_type(pairs, jnp.uint16)
    return ((both << 4) | (both >> 8)).astype(jnp.uint8)


def _nearest(x: jax.Array, midpoints: np.ndarray, order: np.ndarray) -> jax.Array:
    """Code of the level nearest to each x; a value on a midpoint takes the lower level."""
    # Fifteen comparisons and additions vectorize; a binary search would not.
    steps = [(x > point).astype(jnp.uint8) for point in midpoints]
    rank = functools.reduce(jnp.add, steps)
    if np.array_equal(order, np.arange(len(order))):
        return rank
    return jnp.asarray(order)[rank]


@jax.jit
def _double_quantize(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """8-bit codes, group scales and offset of float32 scales `[b..., out, in/G]`."""
    batch = absmax.shape[:-2]
    flat = absmax.reshape(*batch, -1)
    offset = _mean(flat)
    centred = flat - offset[..., None]
    groups = -(-centred.shape[-1] // xla.GROUP)
    padding = [(0, 0)] * len(batch) + [(0, groups * xla.GROUP - centred.shape[-1])]
    grouped = jnp.pad(centred, padding).reshape(*batch, groups, xla.GROUP)
    group_scales = jnp.abs(grouped).max(-1)
    levels = scale_codebook()
    normalized = grouped / jnp.where(group_scales == 0, 1.0, group_scales)[..., None]
    codes = jnp.searchsorted(jnp.asarray((levels[1:] + levels[:-1]) / 2), normalized)
    codes = codes.astype(jnp.uint8).reshape(*batch, -1)[..., : flat.shape[-1]]
    return codes.reshape(absmax.shape), group_scales, offset


def _mean(x: jax.Array) -> jax.Array:
    """The mean of values `[b..., n]` that are not negative, added up in an order that n decides.

    XLA sums in an order that depends on what else is in the program; the offset, and with it the
    scales' codes, would then differ between a layer quantized alone and the same one in a stack.
    """
    size = x.shape[-1]
    while x.shape[-1] > 1:
        parts = -(-x.shape[-1] // xla.GROUP)
        padding = [(0, 0)] * (x.ndim - 1) + [(0, parts * xla.GROUP - x.shape[-1])]
        columns = jnp.moveaxis(jnp.pad(x, padding).reshape(*x.shape[:-1], xla.GROUP, parts), -2, 0)
        x = jax.lax.fori_loop(1, xla.GROUP, lambda k, total, c=columns: total + c[k], columns[0])
    # The maximum changes nothing; what is subtracted must not be a product that XLA may contract.
    return jnp.maximum(x[..., 0] / size, 0)
