"""4-bit decoding on NVIDIA GPUs: Pallas kernels, lowered through Triton.

Each takes one matrix `[out, in]` (`vmap` adds batch axes) whose blocks do not cross rows. In the
shapes, `G` is the block size and `h = G/2` its bytes; `hi` and `lo` are the earlier and the later
element of each byte. Look-ups:

    table   a load from the sixteen levels, which stay in the first-level cache
    tree    fifteen selections
    bytes   four codes at a time by byte permutation, in PTX; nothing but a GPU runs it
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from lora_jax.core.codebooks import codebook, scale_codebook
from lora_jax.core.leaves import QuantizedArray
from lora_jax.kernels.xla import GROUP, _product_then_sum

GROUP_BITS = GROUP.bit_length() - 1
Parts = dict[str, Any]  # what a kernel needs beside the codes, arrays or references


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work.

    Attributes:
      rows: rows of W a program handles (blocks, for plain decoding).
      blocks: blocks along a row it handles at once.
      unroll: how often the loop's body is written out (products only).
      splits: programs that share a row (products only).
      warps: of 32 threads, a program.
      stages: of the software pipeline.
      lookup: `"table"`, `"tree"` or `"bytes"`.
    """

    rows: int
    blocks: int = 1
    unroll: int = 1
    splits: int = 1
    warps: int = 4
    stages: int = 3
    lookup: str = "table"


def decode_tiling(q: QuantizedArray, interpret: bool = False) -> Tiling:
    """The tiling of `decode`."""
    rows = max(1, min(GROUP, 4096 // q.block_size))
    return Tiling(rows=rows, lookup="tree" if interpret else "table")


def fold_tiling(q: QuantizedArray, interpret: bool = False) -> Tiling:
    """The tiling of `decode_folded`."""
    return Tiling(rows=64, lookup="tree" if interpret else "table")


def matmul_tiling(m: int, q: QuantizedArray, interpret: bool = False) -> Tiling:
    """The tiling of `matmul` for m rows of x."""
    blocks = q.matrix_shape[1] // q.block_size
    unroll = math.gcd(blocks, 4 if m <= 16 else 2)
    return Tiling(rows=64, unroll=unroll, lookup="tree" if interpret else "bytes")


# Levels.


def _levels(codes: jax.Array, parts: Parts, levels: np.ndarray, lookup: str, dtype: Any) -> Any:
    """The levels of the high and of the low nibbles of `codes`, in float32 or in 16 bits."""
    if lookup == "bytes":
        return _levels_by_bytes(codes, levels, np.dtype(dtype))
    wide = codes.astype(jnp.int32)
    nibbles = (wide >> 4, wide & 15)
    if lookup == "table":
        return tuple(parts["levels"][x].astype(dtype) for x in nibbles)
    return tuple(_by_tree(x, levels).astype(dtype) for x in nibbles)


def _by_tree(nibbles: jax.Array, levels: np.ndarray) -> jax.Array:
    bits = [(nibbles & (1 << k)) != 0 for k in range(4)]

    def select(options: list[Any], bit: int) -> Any:
        if len(options) == 1:
            return options[0]
        half = len(options) // 2
        return jnp.where(
            bits[bit], select(options[half:], bit - 1), select(options[:half], bit - 1)
        )

    return select([jnp.float32(level) for level in levels], 3)


def _levels_by_bytes(codes: jax.Array, levels: np.ndarray, dtype: np.dtype) -> list[jax.Array]:
    shape = jax.ShapeDtypeStruct(codes.shape, dtype)
    table, size = levels.astype(dtype).tobytes(), dtype.itemsize
    # One call for both would be natural, but Pallas lowers no assembly of two results. What the two
    # have in common ptxas finds.
    return [
        plt.elementwise_inline_asm(
            byte_assembly(table, size, nibble),
            args=[codes],
            constraints="=r,h" if size == 2 else "=r,=r,h",
            pack=2,
            result_shape_dtypes=[shape],
        )[0]
        for nibble in ("high", "low")
    ]


@functools.lru_cache
def byte_assembly(table: bytes, size: int, nibble: str) -> str:
    """PTX that looks up the levels of two bytes' high or low nibbles.

    A nibble is what `prmt` takes to choose one of eight bytes, so two of them look up one byte of
    four levels at once, from either half of the codebook; the fourth bit of each code, spread over
    a byte by `prmt`'s sign mode, chooses between the two. The bytes are then put together.

    Args:
      table: the sixteen levels' bytes, little-endian.
      size: bytes a level, 2 or 4.
      nibble: `"high"` or `"low"`.

    Returns:
      Assembly whose outputs are one register of two levels or two of one, and whose input is a
      register of two bytes.
    """
    planes = np.frombuffer(table, np.uint8).reshape(16, size).T  # byte k of every level
    pick = {"high": "0x7351", "low": "0x6240"}[nibble]
    lines = [
        f"cvt.u32.u16 w, ${size // 2};",
        "shl.b32 s, w, 4;",
        "and.b32 m, w, 0x7777;",
        "prmt.b32 k, s, w, 0xD9C8;",
    ]
    for number, plane in enumerate(planes):
        words = [int.from_bytes(plane[k : k + 4].tobytes(), "little") for k in range(0, 16, 4)]
        lines += [
            f"prmt.b32 p, 0x{words[0]:08X}, 0x{words[1]:08X}, m;",
            f"prmt.b32 q, 0x{words[2]:08X}, 0x{words[3]:08X}, m;",
            f"lop3.b32 b{number}, p, q, k, 0xD8;",
        ]
    if size == 2:
        lines.append(f"prmt.b32 $0, b0, b1, {pick};")
    else:
        lines += [
            f"prmt.b32 p, b0, b1, {pick};",
            f"prmt.b32 q, b2, b3, {pick};",
            "prmt.b32 $0, p, q, 0x5410;",
            "prmt.b32 $1, p, q, 0x7632;",
        ]
    return "{ .reg .b32 w, s, m, k, p, q, b0, b1, b2, b3; " + " ".join(lines) + " }"


# Scales.


def _scales(parts: Parts, index: Any, block: Any, mask: Any) -> jax.Array:
    """The float32 scales at `index`; `block` counts the matrix's blocks in row-major order."""
    scales = _load(parts["scales"], index, mask)
    if "groups" not in parts:
        return scales.astype(jnp.float32)
    levels = parts["book"][scales.astype(jnp.int32)]
    return _product_then_sum(levels, parts["groups"][block >> GROUP_BITS], parts["offset"][0])


def _parts(q: QuantizedArray, lookup: str) -> Parts:
    parts: Parts = {"scales": q.scales}
    if q.group_scales is not None:
        parts["groups"] = q.group_scales
        parts["book"] = jnp.asarray(scale_codebook())
        parts["offset"] = q.offset.reshape(1)
    if q.minimum is not None:
        parts["minimum"] = q.minimum
    if lookup == "table":
        parts["levels"] = jnp.asarray(codebook(q.kind, q.block_size))
    return parts


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
    parts = _parts(q, tiling.lookup)
    for name in ("scales", "minimum"):
        if name in parts:
            parts[name] = parts[name].reshape(total)
    padded = pl.cdiv(total, n) * n
    specs = _part_specs(parts, padded)
    levels = codebook(q.kind, g)

    def kernel(codes_ref: Any, parts: Parts, out_ref: Any) -> None:
        first = pl.program_id(0) * n
        mask = None
        if total % n:
            mask = first + _range(n) < total
        codes = _load(codes_ref, (pl.ds(first, n), slice(None)), _column(mask))
        hi, lo = _levels(codes, parts, levels, tiling.lookup, jnp.float32)  # [n, h]
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
      tiling: see `fold_tiling`.
      interpret: runs on any platform, slowly.

    Returns:
      `[out, in]`.
    """
    (out, inn), g = q.matrix_shape, q.block_size
    h, rank = g // 2, max(16, pl.next_power_of_2(a.shape[0]))
    rows, blocks, count = tiling.rows, tiling.blocks, inn // g
    padded = pl.cdiv(out, rows) * rows
    # The tensor cores cut float32 off to ten bits of mantissa: rounding first halves the error and
    # takes its bias away.
    a, b = (lax.reduce_precision(x, 8, 10) for x in (a, minus_b))
    a = jnp.pad(a, ((0, rank - a.shape[0]), (0, 0))).reshape(rank, inn // 2, 2)
    a = jnp.moveaxis(a, -1, 0)  # [2, r, in/2]: the columns of the high nibbles, and of the low
    b = jnp.pad(b, ((0, padded - out), (0, rank - b.shape[1])))
    parts = _parts(q, tiling.lookup)
    specs = _part_specs(parts, padded)
    levels = codebook(q.kind, g)

    def kernel(codes_ref: Any, a_ref: Any, b_ref: Any, parts: Parts, out_ref: Any) -> None:
        at = pl.ds(pl.program_id(0) * rows, rows)
        row = pl.program_id(0) * rows + _range(rows)
        mask = None if padded == out else row < out
        b = b_ref[at, :]  # [rows, r]
        for k in range(blocks):
            block = pl.program_id(1) * blocks + k
            half = pl.ds(block * h, h)
            codes = _load(codes_ref, (at, half), _column(mask))
            hi, lo = _levels(codes, parts, levels, tiling.lookup, jnp.float32)
            scales = _scales(parts, (at, block), row * count + block, mask)[:, None]
            values = [hi * scales, lo * scales]
            if "minimum" in parts:
                minimum = _load(parts["minimum"], (at, block), mask).astype(jnp.float32)
                values = [jnp.maximum(x, -3e38) + minimum[:, None] for x in values]
            for parity, x in enumerate(values):
                update = jnp.dot(b, a_ref[parity, :, half], preferred_element_type=jnp.float32)
                values[parity] = (x - update).astype(dtype)
            _store(out_ref, (at, pl.ds(block * g, g)), _join(*values), _column(mask))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((out, inn), dtype),
        grid=(padded // rows, count // blocks),
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
    prepared: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """`x @ decode(q).T` for few rows, `[m, in]` in 16 bits -> `[m, out]` in `dtype`.

    Levels meet x in the tensor cores, block by block, and scales the float32 sums: a column of the
    right operand belongs to one of `tiling.blocks` blocks and to one row of x, and is zero outside
    that block.
    """
    (out, inn), g = q.matrix_shape, q.block_size
    h, rows, blocks, unroll, splits = (
        g // 2,
        tiling.rows,
        tiling.blocks,
        tiling.unroll,
        tiling.splits,
    )
    padded, count = pl.cdiv(out, rows) * rows, inn // g
    m = x.shape[0]
    width = max(pl.next_power_of_2(m), 16 // blocks)  # rows of x, padded
    columns, steps = width * blocks, count // blocks // unroll // splits
    if prepared:
        x = jnp.moveaxis(jnp.pad(x, ((0, width - m), (0, 0))).reshape(width, inn // 2, 2), -1, 0)
    else:
        x = x.reshape(m, inn // 2, 2)
    parts = _parts(q, tiling.lookup)
    specs = _part_specs(parts, padded)
    levels = codebook(q.kind, g)

    def kernel(x_ref: Any, codes_ref: Any, parts: Parts, out_ref: Any) -> None:
        at = pl.ds(pl.program_id(0) * rows, rows)
        row = pl.program_id(0) * rows + _range(rows)
        mask = None if padded == out else row < out
        start = pl.program_id(1) * steps
        of_x = _range(width)
        masked_x = None if width == m else of_x < m
        column = _range(columns)
        member = _range(blocks * h)[:, None] // h == column[None, :] // width

        def operand(first: Any, parity: int) -> jax.Array:  # [blocks * h, columns]
            if prepared:
                part = x_ref[parity, :, pl.ds(first * h, blocks * h)]
            else:
                index = (slice(None), pl.ds(first * h, blocks * h), np.int32(parity))
                part = _load(x_ref, index, _column(masked_x))
            part = part.T
            if blocks == 1:
                return part
            part = jnp.broadcast_to(part[:, None, :], (blocks * h, blocks, width))
            return jnp.where(member, part.reshape(blocks * h, columns), 0).astype(x.dtype)

        def part(first: Any) -> jax.Array:
            codes = _load(codes_ref, (at, pl.ds(first * h, blocks * h)), _column(mask))
            if blocks == 1:
                scales = _scales(parts, (at, first), row * count + first, mask)[:, None]
            else:
                block = first + _range(blocks)
                index, wide_mask = (at, pl.ds(first, blocks)), _column(mask)
                scales = _scales(parts, index, row[:, None] * count + block[None, :], wide_mask)
                scales = jnp.broadcast_to(scales[:, :, None], (rows, blocks, width))
                scales = scales.reshape(rows, columns)
            hi, lo = _levels(codes, parts, levels, tiling.lookup, x.dtype)  # [rows, blocks * h]
            product = jnp.dot(hi, operand(first, 0), preferred_element_type=jnp.float32)
            product += jnp.dot(lo, operand(first, 1), preferred_element_type=jnp.float32)
            return product * scales

        def step(k: Any, total: jax.Array) -> jax.Array:
            first = (start + k) * unroll
            for number in range(unroll):
                total += part((first + number) * blocks)
            return total

        total = lax.fori_loop(
            np.int32(0), np.int32(steps), step, jnp.zeros((rows, columns), jnp.float32)
        )
        if blocks > 1:
            total = total.reshape(rows, blocks, width).sum(1)  # [rows, width]
        y = total.T.astype(out_ref.dtype)
        out_mask = _column(masked_x)
        if mask is not None:
            out_mask = mask[None, :] if out_mask is None else out_mask & mask[None, :]
        _store(out_ref, (pl.program_id(1), slice(None), at), y, out_mask)

    y = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((splits, m, out), dtype if splits == 1 else jnp.float32),
        grid=(padded // rows, splits),
        in_specs=[_whole(x) if prepared else _whole(x, width), _whole(q.codes, padded), specs],
        out_specs=pl.BlockSpec((splits, width, padded), lambda *_: (0, 0, 0)),
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="matmul",
    )(x, q.codes, parts)
    return y[0] if splits == 1 else y.sum(0).astype(dtype)


def _range(n: int) -> jax.Array:
    return lax.iota(jnp.int32, n)


def _column(mask: jax.Array | None) -> jax.Array | None:
    return None if mask is None else mask[:, None]


def _part_specs(parts: Parts, padded: int) -> dict[str, pl.BlockSpec]:
    by_row = ("scales", "minimum")
    return {k: _whole(x, padded if k in by_row else None) for k, x in parts.items()}
