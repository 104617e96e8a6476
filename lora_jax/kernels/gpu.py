"""4-bit decoding on NVIDIA GPUs: Pallas kernels, lowered through Triton.

Each takes one matrix `[out, in]` (`vmap` adds batch axes) whose blocks do not cross rows. In the
shapes, `G` is the block size and `h = G/2` its bytes; `hi` and `lo` are the earlier and the later
element of each byte.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from lora_jax.core.codebooks import codebook, cuda_codebook, scale_codebook
from lora_jax.core.leaves import QuantizedArray
from lora_jax.kernels.lookup import look_up
from lora_jax.kernels.xla import GROUP, _product_then_sum

GROUP_BITS = GROUP.bit_length() - 1
Parts = dict[str, Any]  # what a kernel needs beside the codes, arrays or references


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work.

    Attributes:
      rows: rows of W a program handles (blocks, for plain decoding).
      blocks: blocks along a row it handles at once (products only).
      splits: programs that share a row.
      warps: of 32 threads, a program.
      stages: of the software pipeline.
    """

    rows: int
    blocks: int = 1
    splits: int = 1
    warps: int = 4
    stages: int = 3


FOLD = Tiling(64, splits=32, stages=1)  # of `decode_folded`


def decode_tiling(q: QuantizedArray) -> Tiling:
    """The tiling of `decode`."""
    return Tiling(max(1, min(GROUP, 4096 // q.block_size)))


def matmul_tiling(m: int) -> Tiling:
    """The tiling of the product with m rows of x: of `matvec` for up to two, of `matmul` beyond."""
    if m <= 2:
        return Tiling(32, blocks=4, splits=8)
    if m <= 16:
        return Tiling(64, blocks=4 if m <= 4 else 2, splits=4)
    return Tiling(64, stages=4)


def _divided(q: QuantizedArray, tiling: Tiling) -> tuple[int, int, int]:
    """Blocks at once, splits, and steps of each, that are all of a row's blocks together."""
    count = q.matrix_shape[1] // q.block_size
    blocks = math.gcd(count, tiling.blocks)
    splits = math.gcd(count // blocks, tiling.splits)
    return blocks, splits, count // blocks // splits


# Scales.


def _raw_scales(parts: Parts, index: Any, block: Any, mask: Any) -> Parts:
    """What the scales at `index` are computed from; `block` counts blocks in row-major order."""
    raw: Parts = {k: _load(parts[k], index, mask) for k in ("scales", "minimum") if k in parts}
    if "groups" in parts:
        raw["groups"] = _load(parts["groups"], block >> GROUP_BITS, mask)
    return raw


def _scales_of(parts: Parts, raw: Parts) -> jax.Array:
    """The scales in float32."""
    if "groups" not in parts:
        return raw["scales"].astype(jnp.float32)
    levels = parts["book"][raw["scales"].astype(jnp.int32)]
    return _product_then_sum(levels, raw["groups"], parts["offset"][0])


def _parts(q: QuantizedArray) -> Parts:
    parts: Parts = {"scales": q.scales}
    if q.group_scales is not None:
        parts["groups"] = q.group_scales
        parts["book"] = jnp.asarray(scale_codebook())
        parts["offset"] = q.offset.reshape(1)
    if q.minimum is not None:
        parts["minimum"] = q.minimum
    return parts


def _levels(q: QuantizedArray, interpret: bool) -> np.ndarray:
    """The sixteen levels, as the backend that runs a kernel has them: interpreted, it is a CPU."""
    return (codebook if interpret else cuda_codebook)(q.kind, q.block_size)


def _whole(x: Any, rows: int | None = None) -> pl.BlockSpec:
    """All of an array; its first axis as if it had `rows`, of which loads mask the surplus."""
    shape = x.shape if rows is None else (rows, *x.shape[1:])
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _join(hi: jax.Array, lo: jax.Array) -> jax.Array:
    """`[..., h]` twice as `[..., 2h]`, alternating."""
    return jnp.stack([hi, lo], axis=-1).reshape(*hi.shape[:-1], 2 * hi.shape[-1])


# Kernels.


def decode(q: QuantizedArray, tiling: Tiling, *, interpret: bool = False) -> jax.Array:
    """The values of one matrix, `[out, in]` in its dtype.

    Blocks do not cross rows, hence the matrix is a list of blocks, and so is the result.
    """
    (out, inn), g = q.matrix_shape, q.block_size
    total, n = out * inn // g, tiling.rows
    parts = _parts(q)
    for name in ("scales", "minimum"):
        if name in parts:
            parts[name] = parts[name].reshape(total)
    padded = pl.cdiv(total, n) * n
    specs = _part_specs(parts, padded)
    levels = _levels(q, interpret)

    def kernel(codes_ref: Any, parts: Parts, out_ref: Any) -> None:
        first = pl.program_id(0) * n
        mask = None
        if total % n:
            mask = first + _range(n) < total
        codes = _load(codes_ref, (pl.ds(first, n), slice(None)), _column(mask))
        hi, lo = look_up(codes, levels, jnp.float32, interpret=interpret)  # [n, h]
        scales = _load(parts["scales"], pl.ds(first, n), mask)
        if "groups" in parts:
            group = parts["groups"][first >> GROUP_BITS]  # n divides GROUP
            scales = _product_then_sum(
                parts["book"][scales.astype(jnp.int32)], group, parts["offset"][0]
            )
        scales = scales.astype(jnp.float32)[:, None]
        hi, lo = hi * scales, lo * scales
        if "minimum" in parts:
            minimum = _load(parts["minimum"], pl.ds(first, n), mask).astype(jnp.float32)[:, None]
            hi, lo = (jnp.maximum(x, -3e38) + minimum for x in (hi, lo))
        values = _join(hi.astype(q.dtype), lo.astype(q.dtype))
        _store(out_ref, (pl.ds(first, n), slice(None)), values, _column(mask))

    codes = q.codes.reshape(total, g // 2)
    values = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((total, g), q.dtype),
        grid=(padded // n,),
        in_specs=[_whole(codes, padded), specs],
        out_specs=pl.BlockSpec((padded, g), lambda *_: (0, 0)),
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="decode",
    )(codes, parts)
    return values.reshape(out, inn)


def _tile(rows: int, out: int) -> tuple[Any, jax.Array, jax.Array | None]:
    """A program's rows of W: their slice, their numbers, and which exist, or None if all do."""
    at = pl.ds(pl.program_id(1) * rows, rows)
    row = pl.program_id(1) * rows + _range(rows)
    return at, row, row < out if out % rows else None


def _load(ref: Any, index: Any, mask: jax.Array | None = None) -> jax.Array:
    if mask is None:
        return ref[index]
    return plt.load(ref.at[index], mask=mask, other=0)


def _store(ref: Any, index: Any, value: jax.Array, mask: jax.Array | None = None) -> None:
    if mask is None:
        ref[index] = value
    else:
        plt.store(ref.at[index], value, mask=mask)


def decode_folded(
    q: QuantizedArray,
    a: jax.Array,
    minus_b: jax.Array,
    dtype: Any,
    tiling: Tiling,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`decode(q) - minus_b @ a` in one pass over the codes, summed in float32.

    Args:
      q: one quantized matrix, `[out, in]`.
      a: float32 `[r, in]`.
      minus_b: float32 `[out, r]`.
      dtype: of the result.
      tiling: such as `FOLD`.
      interpret: runs on any platform, slowly.

    Returns:
      `[out, in]`.
    """
    (out, inn), g = q.matrix_shape, q.block_size
    h, rank = g // 2, max(16, pl.next_power_of_2(a.shape[0]))
    rows, count = tiling.rows, inn // g
    padded = pl.cdiv(out, rows) * rows
    _, splits, steps = _divided(q, dataclasses.replace(tiling, blocks=1))
    # The tensor cores cut float32 off to ten bits of mantissa: rounding first halves the error and
    # takes its bias away. They want both factors' columns of r to lie together in memory.
    a, b = (lax.reduce_precision(x, 8, 10) for x in (a, minus_b))
    a = jnp.pad(a, ((0, rank - a.shape[0]), (0, 0)))
    a = a.reshape(rank, inn // 2, 2).transpose(2, 1, 0)  # columns of the high nibbles, of the low
    b = jnp.pad(b, ((0, padded - out), (0, rank - b.shape[1])))
    parts = _parts(q)
    specs = _part_specs(parts, padded)
    levels = _levels(q, interpret)

    def kernel(codes_ref: Any, a_ref: Any, b_ref: Any, parts: Parts, out_ref: Any) -> None:
        at, row, mask = _tile(rows, out)
        first = pl.program_id(0) * steps
        b = b_ref[at, :]  # [rows, r]

        def step(k: Any, _: None) -> None:
            block = first + k
            codes = _load(codes_ref, (at, pl.ds(block * h, h)), _column(mask))
            raw = _raw_scales(parts, (at, block), row * count + block, mask)
            factors = [a_ref[parity, pl.ds(block * h, h), :].T for parity in (0, 1)]
            updates = [jnp.dot(b, a, preferred_element_type=jnp.float32) for a in factors]
            # Beside an update, levels are looked up in the layout in which the tensor cores leave
            # it: what passes through shared memory then is codes, an eighth of the values' bytes.
            values = look_up(codes, levels, jnp.float32, updates, interpret=interpret)
            scales = _scales_of(parts, raw)[:, None]
            values = [x * scales for x in values]
            if "minimum" in raw:
                minimum = raw["minimum"].astype(jnp.float32)[:, None]
                values = [jnp.maximum(x, -3e38) + minimum for x in values]
            hi, lo = ((x - update).astype(dtype) for x, update in zip(values, updates, strict=True))
            _store(out_ref, (at, pl.ds(block * g, g)), _join(hi, lo), _column(mask))

        lax.fori_loop(np.int32(0), np.int32(steps), step, None)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((out, inn), dtype),
        grid=(splits, padded // rows),
        in_specs=[_whole(q.codes, padded), _whole(a), _whole(b), specs],
        out_specs=pl.BlockSpec((padded, inn), lambda *_: (0, 0)),
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="decode_folded",
    )(q.codes, a, b, parts)


def matmul(
    x: jax.Array,
    q: QuantizedArray,
    dtype: Any,
    tiling: Tiling,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`x @ decode(q).T` for few rows, `[m, in]` in 16 bits -> `[m, out]` in `dtype`.

    Levels meet x in the tensor cores, and each block's float32 sums its scale: a column of the
    right operand belongs to one of `tiling.blocks` blocks and to one row of x, and is zero outside
    that block.
    """
    (out, inn), g, m = q.matrix_shape, q.block_size, x.shape[0]
    h, rows, count = g // 2, tiling.rows, inn // g
    blocks, _, steps = _divided(q, tiling)
    width = max(pl.next_power_of_2(m), 16 // blocks)  # rows of x, padded
    columns = width * blocks
    x = jnp.pad(x, ((0, width - m), (0, 0))).reshape(width, inn // 2, 2).transpose(2, 1, 0)
    if blocks > 1:
        member = np.arange(inn // 2)[:, None] // h % blocks == np.arange(blocks)
        x = jnp.where(member[:, :, None], x[:, :, None, :], 0).reshape(2, inn // 2, columns)
    parts = _parts(q)
    levels = _levels(q, interpret)

    def kernel(x_ref: Any, codes_ref: Any, parts: Parts, out_ref: Any) -> None:
        at, row, mask = _tile(rows, out)
        start = pl.program_id(0) * steps

        def ahead(k: Any) -> Parts:
            first = (start + k) * blocks
            if blocks == 1:
                return _raw_scales(parts, (at, first), row * count + first, mask)
            block = row[:, None] * count + first + _range(blocks)[None, :]
            return _raw_scales(parts, (at, pl.ds(first, blocks)), block, _column(mask))

        def step(k: Any, carry: tuple[jax.Array, Parts]) -> tuple[jax.Array, Parts]:
            total, raw = carry
            half = pl.ds((start + k) * blocks * h, blocks * h)
            codes = _load(codes_ref, (at, half), _column(mask))
            following = ahead(jnp.minimum(k + 1, np.int32(steps - 1)))
            # [rows, blocks * h]
            hi, lo = look_up(codes, levels, x.dtype, interpret=interpret)
            sums = jnp.dot(hi, x_ref[0, half, :], preferred_element_type=jnp.float32)
            sums += jnp.dot(lo, x_ref[1, half, :], preferred_element_type=jnp.float32)
            scales = _scales_of(parts, raw).reshape(rows, blocks, 1)
            scales = jnp.broadcast_to(scales, (rows, blocks, width)).reshape(rows, columns)
            return total + sums * scales, following

        zero = jnp.zeros((rows, columns), jnp.float32)
        total, _ = lax.fori_loop(np.int32(0), np.int32(steps), step, (zero, ahead(np.int32(0))))
        if columns > width:
            total = total.reshape(rows, blocks, width).sum(1)  # [rows, width]
        out_mask = None if width == m else (_range(width) < m)[:, None]
        if mask is not None:
            out_mask = mask[None, :] if out_mask is None else out_mask & mask[None, :]
        y = total.T.astype(out_ref.dtype)
        _store(out_ref, (pl.program_id(0), slice(None), at), y, out_mask)

    shape = (width, m, dtype)
    return _launched(kernel, x, q, parts, shape, tiling, interpret=interpret, name="matmul")


def matvec(
    x: jax.Array,
    q: QuantizedArray,
    dtype: Any,
    tiling: Tiling,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`matmul` of so few rows that multiplying them without tensor cores is faster.

    Nothing passes through shared memory: a thread multiplies the levels of its codes by x, adds
    them up, and multiplies the sum by their block's scale, all in float32.
    """
    (out, inn), g, (m, _), short = q.matrix_shape, q.block_size, x.shape, x.dtype
    h, rows, count = g // 2, tiling.rows, inn // g
    blocks, _, steps = _divided(q, tiling)
    x = x.astype(jnp.float32).reshape(m, inn // 2, 2).transpose(0, 2, 1)
    parts = _parts(q)
    levels = _levels(q, interpret)

    def kernel(x_ref: Any, codes_ref: Any, parts: Parts, out_ref: Any) -> None:
        at, row, mask = _tile(rows, out)
        start = pl.program_id(0) * steps

        def step(k: Any, totals: list[jax.Array]) -> list[jax.Array]:
            first = (start + k) * blocks
            half = pl.ds(first * h, blocks * h)
            codes = _load(codes_ref, (at, half), _column(mask))
            block = row[:, None] * count + first + _range(blocks)[None, :]
            raw = _raw_scales(parts, (at, pl.ds(first, blocks)), block, _column(mask))
            found = look_up(codes, levels, short, interpret=interpret)
            hi, lo = (v.astype(jnp.float32) for v in found)
            scales = _scales_of(parts, raw)  # [rows, blocks]
            products = [
                hi * x_ref[i, 0, half][None] + lo * x_ref[i, 1, half][None] for i in range(m)
            ]
            sums = [p.reshape(rows, blocks, h).sum(2) for p in products]
            return [total + s * scales for total, s in zip(totals, sums, strict=True)]

        zeros = [jnp.zeros((rows, blocks), jnp.float32)] * m
        totals = lax.fori_loop(np.int32(0), np.int32(steps), step, zeros)
        for i, total in enumerate(totals):
            _store(
                out_ref,
                (pl.program_id(0), np.int32(i), at),
                total.sum(1).astype(out_ref.dtype),
                mask,
            )

    shape = (m, m, dtype)
    return _launched(kernel, x, q, parts, shape, tiling, interpret=interpret, name="matvec")


def _launched(
    kernel: Any,
    x: jax.Array,
    q: QuantizedArray,
    parts: Parts,
    of_y: tuple[int, int, Any],
    tiling: Tiling,
    *,
    interpret: bool,
    name: str,
) -> jax.Array:
    """A product `[m, out]` by a kernel of which several programs may share a row of W.

    `of_y` has the rows that a program stores, m of them not masked, and the dtype. What programs
    that share a row have each is summed in float32.
    """
    (out, _), rows, (width, m, dtype) = q.matrix_shape, tiling.rows, of_y
    padded, splits = pl.cdiv(out, rows) * rows, _divided(q, tiling)[1]
    y = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((splits, m, out), dtype if splits == 1 else jnp.float32),
        grid=(splits, padded // rows),
        in_specs=[_whole(x), _whole(q.codes, padded), _part_specs(parts, padded)],
        out_specs=pl.BlockSpec((splits, width, padded), lambda *_: (0, 0, 0)),
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name=name,
    )(x, q.codes, parts)
    return y[0] if splits == 1 else y.sum(0).astype(dtype)


def _range(n: int) -> jax.Array:
    return lax.iota(jnp.int32, n)


def _column(mask: jax.Array | None) -> jax.Array | None:
    return None if mask is None else mask[:, None]


def _part_specs(parts: Parts, padded: int) -> dict[str, pl.BlockSpec]:
    by_row = ("scales", "minimum")
    return {k: _whole(x, padded if k in by_row else None) for k, x in parts.items()}
