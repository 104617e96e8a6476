"""Sixteen levels looked up by 4-bit codes inside a Pallas kernel.

On a GPU each thread of a warp holds one level, and a shuffle brings it to the thread whose code
names it. That is PTX, which Pallas' interpreter cannot run: there it is fifteen selections.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plt


def look_up(
    codes: jax.Array,
    levels: np.ndarray,
    dtype: Any,
    beside: Sequence[jax.Array] = (),
    *,
    interpret: bool = False,
) -> list[jax.Array]:
    """The levels of the high and of the low nibbles of `codes`.

    Args:
      codes: bytes.
      levels: the codebook, float32 `[16]`.
      dtype: of the result, float32 or one of 16 bits.
      beside: nothing, or two arrays of the codes' shape in whose layouts among the threads the
        results are wanted.
      interpret: whether the kernel is interpreted.

    Returns:
      Two arrays of the codes' shape.
    """
    dtype = np.dtype(dtype)
    if interpret:
        wide = codes.astype(jnp.int32)
        return [_by_tree(x, levels).astype(dtype) for x in (wide >> 4, wide & 15)]
    table, size = levels.astype(dtype).tobytes(), dtype.itemsize
    constraints = ["=&r"] * size + ["r"] * (1 + 4 * len(beside[:1]))
    # One call for both would be natural, but Pallas lowers no assembly of two results. What the two
    # have in common ptxas finds. It sees no use of the array beside, but Triton cannot know that.
    return [
        plt.elementwise_inline_asm(
            lane_assembly(table, size, nibble),
            args=[codes, *beside[number : number + 1]],
            constraints=",".join(constraints),
            pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, dtype)],
        )[0]
        for number, nibble in enumerate(("high", "low"))
    ]


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


@functools.lru_cache
def lane_assembly(table: bytes, size: int, nibble: str) -> str:
    """PTX that looks up the levels of four bytes' high or low nibbles.

    Threads k and k + 16 of a warp select level k by their own number, which ptxas does once for all
    codes. A level is then had from the thread that the code names: one shuffle, which looks at the
    last four bits alone. A multiprocessor shuffles 32 lanes at once; of the operations on bits that
    other look-ups are made of it does 64, but those take several for a level.

    Args:
      table: the sixteen levels' bytes, little-endian.
      size: bytes a level, 2 or 4.
      nibble: `"high"` or `"low"`.

    Returns:
      Assembly whose outputs are two registers of two levels or four of one, and whose input is a
      register of four bytes.
    """
    options = [f"0x{level:X}" for level in np.frombuffer(table, f"u{size}")]
    lines = ["mov.u32 s, %laneid;"]
    for bit in range(4):
        lines += [f"and.b32 q, s, {1 << bit};", "setp.ne.u32 odd, q, 0;"]
        halved = [f"v{bit}_{k}" for k in range(len(options) // 2)]
        lines += [
            f"selp.b32 {to}, {options[2 * k + 1]}, {options[2 * k]}, odd;"
            for k, to in enumerate(halved)
        ]
        options = halved
    registers = [f"v{bit}_{k}" for bit in range(4) for k in range(8 >> bit)]
    for k in range(4):
        to = f"${k}" if size == 4 else "pq"[k % 2]
        lines.append(f"shr.u32 s, ${size}, {8 * k + 4 * (nibble == 'high')};")
        lines.append(f"shfl.sync.idx.b32 {to}, {options[0]}, s, 0x101F, 0xFFFFFFFF;")
        if size == 2 and k % 2:
            lines.append(f"prmt.b32 ${k // 2}, p, q, 0x5410;")
    declared = f".reg .pred odd; .reg .b32 s, p, q, {', '.join(registers)};"
    return f"{{ {declared} {' '.join(lines)} }}"
