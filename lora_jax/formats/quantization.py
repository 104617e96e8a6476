"""What of a model to store in 4 bits while it is read, so that it never is in memory whole."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.typing import DTypeLike

from lora_jax.core.leaves import QuantizedArray
from lora_jax.core.quantize import double_quantized, quantize_array
from lora_jax.core.rules import first_matches

# Values that are encoded at once. Small, so that what XLA needs beside them is little; and whole
# blocks of every size, so that codes are those of the tensor encoded as one.
_PART = 2**20

# From a leaf's path and a tensor of it, kernels as [out, in], to what is kept of that tensor.
Store = Callable[[str, np.ndarray], np.ndarray | QuantizedArray]


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What to store in 4 bits, and how: as `lj.quantize` would store the parameters once read.

    Attributes:
      pattern: Regular expressions searched in the paths of the parameters; one, or several.
      kind: As for `lj.quantize_array`, and so the others.
      block_size: Values that share a scale.
      double_quant: Whether scales are stored in 8 bits.
      flat: Whether blocks may run over row ends where they do not divide rows.
    """

    pattern: str | Sequence[str] = r"layers(_\d+)?/.*/kernel"
    kind: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    flat: bool = False

    def store(self, paths: Sequence[str], dtype: DTypeLike) -> Store:
        """What becomes of tensors as they arrive.

        Args:
          paths: Of all parameters.
          dtype: Of the parameters, into which values are cast before they are encoded.

        Raises:
          ValueError: If a pattern matches nothing; when called, if a tensor cannot be quantized.
        """
        patterns = [self.pattern] if isinstance(self.pattern, str) else list(self.pattern)
        chosen = first_matches(patterns, paths)

        def store(path: str, values: np.ndarray) -> np.ndarray | QuantizedArray:
            return self._stored(path, values, np.dtype(dtype)) if path in chosen else values

        return store

    def _stored(self, path: str, values: np.ndarray, dtype: np.dtype) -> QuantizedArray:
        """A leaf of layout "o i": rows are what a kernel produces, or an embedding's tokens."""
        quantized = functools.partial(
            quantize_array,
            kind=self.kind,
            block_size=self.block_size,
            double_quant=False,
            name=path,
        )
        as_one = functools.partial(
            quantized, layout="o i" if values.ndim == 2 else None, flat=self.flat
        )
        leaf = jax.eval_shape(as_one, jax.ShapeDtypeStruct(values.shape, dtype))
        leaf = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), leaf)
        row = values.reshape(1, -1)
        for start in range(0, row.size, _PART):
            piece = row[:, start : start + _PART].astype(dtype, copy=False)
            part = quantized(piece, layout="o i", flat=True)
            for whole, x in zip(jax.tree.leaves(leaf), jax.tree.leaves(part), strict=True):
                each = 2 if whole is leaf.codes else self.block_size
                whole.reshape(-1)[start // each : start // each + x.size] = np.ravel(x)
        return jax.tree.map(np.asarray, double_quantized(leaf)) if self.double_quant else leaf
