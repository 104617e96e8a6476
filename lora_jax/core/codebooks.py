"""The sixteen levels of each 4-bit kind, and the 256 of double-quantized scales (NumPy only).

A level times its block's scale is the decoded value. The scale is the largest magnitude in the
block, or the distance between two levels for the kinds of GGUF, of which `"q4_1"` also adds the
block's minimum.
"""

from __future__ import annotations

import functools
import math

import numpy as np

# NF4 (QLoRA, arXiv:2305.14314, appendix E). The levels are averaged neighbouring quantiles of two
# asymmetric halves of a normal distribution, so that 0 is exact and the ends are ±1; they are not
# the levels of least squared error for Gaussian weights (Lloyd-Max's are).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

# FP4 as bitsandbytes numbers it: a sign bit, two exponent bits, one mantissa bit, over 12, with the
# subnormal 0.0625. The code is that bit pattern, so levels are not sorted by code.
FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

# AF4 at block size 64 as published (see `_abnormal_float` for other sizes).
AF4_64 = (
    *(-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0),
    *(0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0),
)

# Symmetric integers -7..7 over 7, the uniform baseline. Code 0 (-8/7) is decoded but never written.
INT4 = tuple((code - 8) / 7 for code in range(16))

# The integers of GGUF's Q4_0 and Q4_1, which keep a scale (and Q4_1 a minimum) in float16 for each
# block: of 32 in GGUF's files, and here of any size. Times a float16 they are exact in float32.
Q4_0 = tuple(range(-8, 8))
Q4_1 = tuple(range(16))
GGUF_KINDS = ("q4_0", "q4_1")

KINDS = ("nf4", "fp4", "int4", "af4", *GGUF_KINDS)


@functools.lru_cache
def codebook(kind: str, block_size: int) -> np.ndarray:
    """The level of each of the sixteen codes.

    Args:
      kind: one of `KINDS`.
      block_size: elements a block; only `"af4"` depends on it.

    Returns:
      float32 `[16]`; read-only.

    Raises:
      ValueError: for an unknown kind.
    """
    if kind == "nf4":
        levels = np.array(NF4, np.float32)
    elif kind == "fp4":
        positive = np.array(FP4_MAGNITUDES, np.float32) / np.float32(12)
        levels = np.concatenate([positive, 0 - positive])  # code 8 is +0, as in bitsandbytes' own
    elif kind == "int4":
        levels = np.array(INT4, np.float32)
    elif kind == "q4_0":
        levels = np.array(Q4_0, np.float32)
    elif kind == "q4_1":
        levels = np.array(Q4_1, np.float32)
    elif kind == "af4":
        levels = np.array(AF4_64, np.float32) if block_size == 64 else _abnormal_float(block_size)
    else:
        raise ValueError(f"kind {kind!r} is unknown; write one of {', '.join(map(repr, KINDS))}")
    levels.setflags(write=False)
    return levels


@functools.lru_cache
def cuda_codebook(kind: str, block_size: int) -> np.ndarray:
    """`codebook` with FP4's second zero as bitsandbytes' CUDA kernels decode it.

    Code 8 is a sign bit and nothing else. They make -0.0 of it, while bitsandbytes' table and the
    CPU kernels that read it say 0.0; decoding follows either where either runs.
    """
    levels = codebook(kind, block_size)
    if kind == "fp4":
        levels = levels.copy()
        levels[8] = -0.0
        levels.setflags(write=False)
    return levels


@functools.lru_cache
def decision_points(kind: str, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where encoding changes from one level to the next.

    Returns:
      Midpoints between the sorted levels that encoding uses, float32 `[n - 1]`, and the code of
      each of those n levels, uint8 `[n]`. A value on a midpoint takes the lower level.
    """
    levels = codebook(kind, block_size)
    order = np.argsort(levels, kind="stable")
    if kind == "int4":
        order = order[1:]  # -8/7 is never written
    ordered = levels[order]
    return (ordered[1:] + ordered[:-1]) / np.float32(2), order.astype(np.uint8)


def _abnormal_float(block_size: int, grid: int = 4001) -> np.ndarray:
    """AbnormalFloat levels: least absolute error for Gaussian blocks scaled by their absmax.

    Yoshida, "NF4 Isn't Information Theoretically Optimal (and that's Good)", arXiv:2306.06965. The
    distribution of a value over its block's largest magnitude depends on the block size, hence so
    do the levels: each is the median of the values nearest to it, with -1, 0 and 1 kept. Levels
    were published for block size 64 only, and at that size those are used, since that is what the
    name means; on Gaussian values their mean absolute error (0.0752 sigma) is above NF4's (0.0728),
    because the two levels beside zero are not medians of their cells.
    """
    z = np.linspace(-8.0, 8.0, 2 * grid - 1)
    phi = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    steps = (phi[1:] + phi[:-1]) / 2 * np.diff(z)
    normal_cdf = np.concatenate([[0.0], np.cumsum(steps)])
    normal_cdf /= normal_cdf[-1]

    absmax = np.linspace(1e-3, 8.0, grid)
    inside = 2 * np.interp(absmax, z, normal_cdf) - 1  # P(|Z| <= m)
    weight = inside ** (block_size - 1) * np.exp(-0.5 * absmax**2)  # density of the largest of G
    weight /= weight.sum()

    u = np.linspace(-1.0, 1.0, grid)
    low = np.interp(-absmax, z, normal_cdf)
    cdf = np.zeros(grid)
    for m, p, below, mass in zip(absmax, weight, low, inside, strict=True):
        if p > 1e-12:
            cdf += p * (np.interp(u * m, z, normal_cdf) - below) / mass

    levels = np.array(NF4, np.float64)
    moving = (levels != 0) & (np.abs(levels) != 1)
    for _ in range(2000):
        edges = np.interp((levels[1:] + levels[:-1]) / 2, u, cdf)
        centre = (edges[1:] + edges[:-1]) / 2
        medians = np.concatenate([[-1.0], np.interp(centre, cdf, u), [1.0]])
        updated = np.where(moving, medians, levels)
        done = np.abs(updated - levels).max() < 1e-9
        levels = updated
        if done:
            break
    return levels.astype(np.float32)


@functools.lru_cache
def scale_codebook() -> np.ndarray:
    """The 256 levels of double-quantized scales: bitsandbytes' signed dynamic map.

    Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv:1511.04561. A level has
    a sign, a power of ten 10^(e-6) and a linear fraction; the larger e, the more fractions (2^e).

    Returns:
      float32 `[256]`, ascending, with 0 at index 127; read-only.
    """
    positive = []
    for exponent in range(7):
        bounds = _linspace(0.1, 1.0, 2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        positive.append(np.float32(10.0 ** (exponent - 6)) * means)
    magnitudes = np.concatenate(positive)
    levels = np.sort(np.concatenate([magnitudes, -magnitudes, [0.0, 1.0]])).astype(np.float32)
    levels.setflags(write=False)
    return levels


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """Evenly spaced float32 values as torch rounds them: a fused multiply-add from either end."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    from_start, from_end = first + step * index, last - step * (count - 1 - index)
    return np.where(index < count // 2, from_start, from_end).astype(np.float32)
