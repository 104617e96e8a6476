"""4-bit weights as bitsandbytes keeps them in a state dict: read and written without decoding.

    weight                                uint8 [ceil(N/2), 1], codes in the order of [out, in]; or
                                          the same bytes seen as another dtype (quant_storage)
    weight.absmax                         float32 [B], the scales (half precision from a CPU that
                                          computed with them); of nested ones uint8 codes
    weight.quant_map                      float32 [16], the codebook
    weight.nested_absmax                  float32 [ceil(B/256)], the scales' scales
    weight.nested_quant_map               float32 [256], the scales' codebook
    weight.quant_state.bitsandbytes__nf4  uint8, JSON: block size, dtype, shape, nested_offset, ...
                                          (or __fp4)

"Nested" is what bitsandbytes calls double quantization (QLoRA, arXiv:2305.14314). The codes are
those of `QuantizedArray`, in its order; blocks that run over row ends make a flat leaf.

Shapes: N = out * in values, G block size, B = ceil(N/G) blocks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.codebooks import codebook, scale_codebook
from lora_jax.core.leaves import QuantizedArray
from lora_jax.core.quantize import BLOCK_SIZES
from lora_jax.files import parse_object, shown
from lora_jax.kernels.xla import GROUP

KINDS = ("nf4", "fp4")
STATE = ".quant_state.bitsandbytes__"
DTYPES = {name: np.dtype(getattr(jnp, name)) for name in ("float32", "bfloat16", "float16")}
LONGEST_STATE = 2**16  # bytes of the JSON, which has some 200
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def from_tensors(tensors: Mapping[str, np.ndarray], name: str = "weight") -> QuantizedArray:
    """The leaf that the tensors of one weight stand for.

    Its values, decoded, are those of bitsandbytes bit for bit.

    >>> state = safetensors.numpy.load_file("model.safetensors")
    >>> q = from_tensors(state, "model.layers.0.self_attn.q_proj.weight")

    Args:
      tensors: the weight's, among others perhaps, by their names.
      name: what the weight is called there; its other tensors' names begin with it.

    Returns:
      A `QuantizedArray` of layout "o i" and NumPy arrays, which share the tensors' memory.

    Raises:
      ValueError: if tensors are missing or of another size than the weight's shape asks for, the
        quantization is not one that can be decoded here, or scales are NaN or infinite.
    """
    state = State.of(tensors, name)
    out, inn = state.shape
    parts = {part: tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in tensors}
    needed = set(_PARTS if state.nested else _PARTS[:2])
    if missing := [f"{name}.{part}" for part in sorted(needed - set(parts))]:
        raise ValueError(f"{name} is in 4 bits, but {', '.join(missing)} is missing")
    if unexpected := [f"{name}.{part}" for part in sorted(set(parts) - needed)]:
        raise ValueError(
            f"{', '.join(unexpected)} is there, but {state.name} has no nested_offset to go with it"
        )

    if not state.nested and parts["absmax"].dtype in DTYPES.values():
        parts["absmax"] = parts["absmax"].astype(np.float32)  # as bitsandbytes does, exactly
    blocks = -(-out * inn // state.block_size)
    groups = -(-blocks // GROUP)
    codes = _as_bytes(tensors[name], name)
    sizes = {
        name: (codes, np.uint8, -(-out * inn // 2)),
        f"{name}.absmax": (parts["absmax"], np.uint8 if state.nested else np.float32, blocks),
        f"{name}.quant_map": (parts["quant_map"], np.float32, 16),
    }
    if state.nested:
        sizes[f"{name}.nested_absmax"] = (parts["nested_absmax"], np.float32, groups)
        sizes[f"{name}.nested_quant_map"] = (parts["nested_quant_map"], np.float32, 256)
    for part, (values, dtype, size) in sizes.items():
        if values.dtype != dtype or values.size != size:
            raise ValueError(
                f"{part} is {values.dtype} of {values.size:,} elements, but a weight of shape "
                f"{state.shape} in blocks of {state.block_size} needs {np.dtype(dtype)} of {size:,}"
            )
    maps = {"quant_map": codebook(state.kind, state.block_size)}
    if state.nested:
        maps["nested_quant_map"] = scale_codebook()
    for part, expected in maps.items():
        if not np.array_equal(parts[part].ravel(), expected):
            what = state.kind if part == "quant_map" else "bitsandbytes' dynamic map"
            raise ValueError(
                f"{name}.{part} does not hold the levels of {what}, which are all that can be "
                "decoded here; take the original model, and quantize it here"
            )
    scales = parts["nested_absmax" if state.nested else "absmax"]
    # Nested ones are products of at most 1 and these, to which the offset is added.
    largest = float(np.abs(scales).max(initial=0)) + abs(state.offset or 0.0)
    if not largest <= float(np.finfo(np.float32).max):
        raise ValueError(f"the scales of {name} are NaN or infinite; repair the checkpoint first")

    rows = 1 if inn % state.block_size else out
    return QuantizedArray(
        codes.reshape(rows, -1),
        parts["absmax"].reshape(rows, -1),
        parts["nested_absmax"].ravel() if state.nested else None,
        np.float32(state.offset) if state.nested else None,
        kind=state.kind,
        block_size=state.block_size,
        dtype=state.dtype,
        layout="o i",
        axis_sizes=state.shape,
    )


def to_tensors(q: QuantizedArray, name: str = "weight") -> dict[str, np.ndarray]:
    """The tensors that bitsandbytes keeps a weight in; undoes `from_tensors`.

    Args:
      q: a leaf of one matrix, of whatever layout; written is the matrix [out, in].
      name: what the weight is called.

    Returns:
      The tensors by their names, for `Linear4bit` and `Params4bit.from_prequantized`.

    Raises:
      ValueError: if the leaf holds several matrices, or is of a kind that bitsandbytes lacks.
    """
    if q.batch_shape:
        raise ValueError(
            f"{name} holds {math.prod(q.batch_shape)} matrices, shape {q.shape}, and bitsandbytes "
            "keeps each by itself; write them one by one"
        )
    if q.kind not in KINDS or q.minimum is not None:
        raise ValueError(
            f"{name} is stored as {q.kind}, which bitsandbytes does not know; quantize the model "
            "with kind='nf4' or 'fp4', or write it dense"
        )
    q = jax.tree.map(np.asarray, q)
    described = {
        "quant_type": q.kind,
        "blocksize": q.block_size,
        "dtype": q.dtype.name,
        "shape": list(q.matrix_shape),
    }
    tensors = {
        name: q.codes.reshape(-1, 1),
        f"{name}.absmax": q.scales.ravel(),
        f"{name}.quant_map": codebook(q.kind, q.block_size),
    }
    if q.group_scales is not None:
        described |= {"nested_blocksize": GROUP, "nested_dtype": "float32"}
        described |= {"nested_offset": float(q.offset)}
        tensors[f"{name}.nested_absmax"] = q.group_scales
        tensors[f"{name}.nested_quant_map"] = scale_codebook()
    tensors[f"{name}{STATE}{q.kind}"] = np.frombuffer(json.dumps(described).encode(), np.uint8)
    return tensors


def weight_of(name: str) -> str | None:
    """The weight that a tensor belongs to, if its name is that of a part of one."""
    weight, _, part = name.rpartition(".")
    if part in _PARTS:
        return weight
    weight, separator, _ = name.partition(STATE)
    return weight if separator else None


@dataclasses.dataclass(frozen=True)
class State:
    """What the JSON beside a weight says of it.

    Attributes:
      name: of the tensor that holds the JSON.
      kind: `"nf4"` or `"fp4"`.
      block_size: G.
      dtype: that the weight had, and decodes to.
      shape: (out, in).
      offset: added to every nested scale; None if scales are not nested.
    """

    name: str
    kind: str
    block_size: int
    dtype: np.dtype
    shape: tuple[int, int]
    offset: float | None

    @property
    def nested(self) -> bool:
        """Whether the scales are themselves quantized."""
        return self.offset is not None

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray], name: str) -> State:
        """Reads it, and refuses what cannot be decoded here.

        Raises:
          ValueError: as `from_tensors`.
        """
        found = [key for key in tensors if key.startswith(f"{name}{STATE}")]
        if len(found) != 1:
            raise ValueError(
                f"{name} has {', '.join(found) or 'no quant_state'} beside it, expected one of "
                f"{', '.join(f'{name}{STATE}{kind}' for kind in KINDS)}"
            )
        described = parse_object(np.ascontiguousarray(tensors[found[0]]).tobytes(), found[0])

        def field(key: str, expected: str, fits: Any) -> Any:
            if not fits(value := described.get(key)):
                raise ValueError(f"{found[0]} says {key}: {shown(value)}, expected {expected}")
            return value

        kind = found[0].rpartition("__")[2]
        field("quant_type", f"{kind!r} of {KINDS}", lambda x: x == kind and x in KINDS)
        block_size = field("blocksize", f"one of {BLOCK_SIZES}", _is_one_of(BLOCK_SIZES))
        dtype = field("dtype", f"one of {', '.join(DTYPES)}", _is_one_of(DTYPES))
        shape = field("shape", "two sizes, out and in", _is_shape)
        offset = None
        if any(key.startswith("nested_") for key in described):
            field("nested_blocksize", f"{GROUP}", lambda x: x == GROUP)
            field("nested_dtype", "'float32'", lambda x: x == "float32")
            offset = float(field("nested_offset", "a number", _is_number))
        return cls(found[0], kind, block_size, DTYPES[dtype], tuple(shape), offset)


def _is_one_of(values: Any) -> Any:
    return lambda x: isinstance(x, str | int) and x in values


def _is_number(x: Any) -> bool:
    return isinstance(x, float) or (type(x) is int and abs(x) < 2**128)


def _is_shape(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(type(n) is int and 0 < n < 2**48 for n in x)


def _as_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """The codes, in whatever dtype they are seen."""
    return np.ascontiguousarray(values).ravel().view(np.uint8)
