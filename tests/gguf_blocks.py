"""Weights in the 4-bit kinds of GGUF: blocks as its files have them, and values to be quantized."""

from __future__ import annotations

import gguf
import jax.numpy as jnp
import numpy as np

import lora_jax as lj

KINDS = ("q4_0", "q4_1")
OUT, IN = 64, 256


def stored_as(kind: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[kind.upper()]


def write_blocks(kind: str, codes, d, m) -> np.ndarray:
    """Rows of a file: float16 d, for Q4_1 float16 m, and 16 bytes, `[out, bytes of a row]`."""
    codes = codes.reshape(len(codes), -1, 32)
    head = np.stack([d] if kind == "q4_0" else [d, m], -1).view(np.uint8)
    nibbles = codes[..., :16] | (codes[..., 16:] << 4)
    return np.concatenate([head, nibbles], -1).reshape(len(codes), -1)


def rows_of(q: lj.QuantizedArray) -> np.ndarray:
    """The same of a leaf of one matrix in blocks of 32."""
    codes = np.stack([q.codes >> 4, q.codes & 15], -1).reshape(len(q.codes), -1)
    minimum = None if q.minimum is None else np.asarray(q.minimum)
    return write_blocks(q.kind, codes, np.asarray(q.scales), minimum)


def of_blocks(kind: str, codes, d, m, dtype="float32") -> lj.QuantizedArray:
    """Blocks as a leaf: two codes a byte, the earlier one in the high nibble."""
    return lj.QuantizedArray(
        jnp.asarray((codes[:, ::2] << 4) | codes[:, 1::2]),
        jnp.asarray(d),
        minimum=jnp.asarray(m) if kind == "q4_1" else None,
        kind=kind,
        block_size=32,
        dtype=jnp.dtype(dtype),
        layout="o i",
        axis_sizes=codes.shape,
    )


def random_blocks(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[out, in]`, d and m `[out, in/32]`, of every size and sign that a float16 has."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (OUT, IN)).astype(np.uint8)
    d, m = (rng.normal(size=(2, OUT, IN // 32)) * 0.1).astype(np.float16)
    d[:8], m[4:12] = (rng.integers(-1023, 1024, (2, 8, 8)) * 2.0**-24).astype(np.float16)
    d[12], m[13] = 0.0, -0.0
    d[14], m[14], m[15] = 65504.0, -65504.0, 65504.0
    return codes, d, m


def nasty() -> np.ndarray:
    """Gaussian rows, and below them what a quantizer may stumble over."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(OUT, IN)).astype(np.float32)
    w[:16] = np.round(w[:16] * 4) / 4  # several largest, of both signs
    w[16] = 0.0
    w[17], w[18] = 3.0, -3.0
    w[19, ::2], w[20, ::32] = -61440.0, 61440.0  # near the largest float16
    w[21:24] *= np.float32(1e-6)  # of which float16 scales keep little
    w[24:26] *= np.float32(1e-9)  # or nothing
    w[26] = np.abs(w[26])
    w[27] = 5 + w[27] / 1000
    blocks = w[32:].reshape(-1, 32)  # midway between two codes of Q4_0, but for rounding
    largest = (1 + rng.random((len(blocks), 1))).astype(np.float32)
    blocks[:] = largest / -8 * np.tile(np.arange(-7.5, 8), 2).astype(np.float32)
    blocks[:, :1] = largest
    return w
