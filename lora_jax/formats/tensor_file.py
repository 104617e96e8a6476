"""A safetensors file: which tensors it holds, and each of them when it is asked for.

    8 bytes    length of the header
    header     JSON: {name: {"dtype": "BF16", "shape": [...], "data_offsets": [start, end]}, ...}
    the rest   the values of all tensors, without gaps

Files come from anywhere, so that a header is believed once all of it agrees with the file. Values
are read, and not mapped into memory, where every page that was touched counts as the program's own.
"""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.files import LONGEST, is_name, parse_object, shown

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
DTYPES = {name: np.dtype(dtype) for name, dtype in {**FLOATS, "U8": np.uint8}.items()}
# Bits of an element of all dtypes that the format has.
_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_MOST_AXES = 32
_PICKLED = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # torch.save's


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
      file: Which.
      name: In it.
      dtype: As the format calls it, such as `"BF16"`.
      shape: Of its values.
      start: Their first byte, counted from the beginning of the file.
      nbytes: What they take there.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> np.ndarray:
        """Its values, in memory that nobody else holds.

        Raises:
          ValueError: If they are of a dtype other than `DTYPES`, or the file has become shorter.
        """
        if self.dtype not in DTYPES:
            raise ValueError(
                f"the tensor {self.name!r} of {self.file.name} is stored as {self.dtype}; "
                f"only {', '.join(DTYPES)} can be read."
            )
        values = read_bytes(self.file, self.start, self.nbytes, self.name)
        return values.view(DTYPES[self.dtype]).reshape(self.shape)


def read_bytes(path: Path, start: int, nbytes: int, name: str) -> np.ndarray:
    """Bytes of a file, uint8 [nbytes], in memory that nobody else holds.

    Args:
      path: The file.
      start: The first of them.
      nbytes: How many.
      name: Of the tensor that they are.

    Raises:
      ValueError: If the file has become shorter.
    """
    # Pages of its own go back to the system with the array. From malloc, tensors of tens of
    # megabytes would come out of a heap that keeps what they leave.
    pages = mmap.mmap(-1, nbytes) if nbytes >= 2**20 else bytearray(nbytes)
    room = memoryview(pages)[:nbytes]
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while len(room):  # a single read ends after two gigabytes
            if not (count := file.readinto(room)):
                raise ValueError(f"{path.name} ends within the tensor {name!r}.")
            room = room[count:]
    return np.frombuffer(pages, np.uint8, nbytes)


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a file, in the order of their values; none is read yet.

    Raises:
      FileNotFoundError: If there is no file.
      ValueError: If the file is broken: too short, with a header that is not true of it, or none.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        head = file.read(length) if length <= min(size - 8, LONGEST) else b""
    try:
        return _parsed(path, size, prefix, head)
    except ValueError as error:
        if prefix.startswith(_PICKLED):
            raise ValueError(
                f"{path} is a pickle, whatever its name says; opening one runs whatever code it "
                "holds, so it is not read. Where you trust it, load it with torch and write it "
                "with safetensors.torch.save_file."
            ) from error
        raise ValueError(
            f"{path} is no safetensors file, or {path.name} is broken or ends too early "
            f"({size:,} bytes): {str(error).rstrip('.')}. Fetch the file again."
        ) from error


def _parsed(path: Path, size: int, prefix: bytes, head: bytes) -> list[StoredTensor]:
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise ValueError(f"its header would have {length:,} bytes")
    if length > LONGEST:
        raise ValueError(f"its header would have {length:,} bytes, expected {LONGEST:,} at most")
    described = parse_object(head, "its header")
    described.pop("__metadata__", None)
    begin = 8 + length
    found = sorted(
        (_described(path, begin, name, about) for name, about in described.items()),
        key=lambda tensor: (tensor.start, tensor.nbytes),
    )
    end = begin
    for tensor in found:
        if tensor.start != end:
            raise ValueError(
                f"{tensor.name} begins at byte {tensor.start - begin:,} of the values, and what is "
                f"before it ends at {end - begin:,}"
            )
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"its header tells of {end:,} bytes")
    return found


def _described(path: Path, begin: int, name: str, about: Any) -> StoredTensor:
    """A tensor as the header has it, whose values follow those of others from `begin` on."""
    if not is_name(name):
        raise ValueError(f"{shown(name)} is no name of a tensor")
    if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} is {shown(about)}, expected a dtype, a shape and data_offsets")
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name} has the dtype {shown(dtype)}, expected one of {', '.join(_BITS)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{name} has the shape {shown(shape)} and data_offsets {shown(offsets)}, expected "
            "sizes, and two of them"
        )
    start, nbytes = offsets[0], offsets[1] - offsets[0]
    # A product of sizes that are in no file is not worth its time.
    if any(n > 2**48 for n in shape) or 8 * nbytes != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{name} has {nbytes:,} bytes for {dtype} of the shape {shown(shape)}")
    return StoredTensor(path, name, dtype, tuple(shape), begin + start, nbytes)


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= _MOST_AXES
        and all(type(n) is int and n >= 0 for n in values)
    )
