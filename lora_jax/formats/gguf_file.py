"""A GGUF file: what it says, which tensors it holds, and each of them when it is asked for.

    "GGUF", version                            uint32
    number of tensors, of pairs                uint64 each
    pairs      key, type, value                a text is its length, uint64, and UTF-8
    tensors    name, axes, type, offset        axes from the innermost, uint64 each
    values     of each tensor at its offset    a multiple of general.alignment

Files come from anywhere: every number is compared with what there is before it is made use of.
"""

from __future__ import annotations

import collections
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from lora_jax.files import is_name, listed, shown
from lora_jax.formats.tensor_file import read_bytes

_LONGEST = 2**26  # bytes before the values
_MOST_PAIRS, _MOST_TENSORS, _MOST_AXES = 2**14, 2**17, 4
_MOST_ELEMENTS = 2**21  # of all lists; a vocabulary of 262,144 tokens has 1.3 million in four
_WIDEST = 2**16  # bytes of alignment
_TEXT, _LIST, _BOOL = 8, 9, 7
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_DTYPES = {kind: np.dtype(name) for kind, name in _NUMBERS.items()}
_KINDS = {kind.value: kind for kind in gguf.GGMLQuantizationType if kind in gguf.GGML_QUANT_SIZES}
_UINT32, _UINT64 = struct.Struct("<I"), struct.Struct("<Q")


class GgufTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
      file: Which.
      name: In it.
      kind: How its values are stored.
      shape: Of its values, the innermost axis last.
      start: Their first byte, counted from the beginning of the file.
      nbytes: What they take there.
    """

    file: Path
    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> np.ndarray:
        """The bytes of its rows, uint8 [..., bytes], in memory that nobody else holds.

        Raises:
          ValueError: If the file has become shorter.
        """
        values = read_bytes(self.file, self.start, self.nbytes, self.name)
        return values.reshape(*self.shape[:-1], -1)


class GgufHead(NamedTuple):
    """What comes before the values.

    Attributes:
      metadata: The pairs; numbers, texts, and lists of them.
      tensors: In the order of the head.
    """

    metadata: dict[str, Any]
    tensors: list[GgufTensor]


def read_head(path: Path) -> GgufHead:
    """Looks at a file; of its tensors nothing is read yet.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If it is no GGUF file, ends too early, or its head is not true of it.
    """
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(
                f"{path} is not a GGUF file: it begins with {magic!r}, not with b'GGUF'."
            )
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _parsed(path, _Cursor(content, 4), size)
            except ValueError as error:
                raise ValueError(
                    f"{path} is broken or ends too early ({size:,} bytes): {error}. "
                    "Fetch the file again."
                ) from error


class _Cursor:
    """A position in a file, from which it is read and never beyond its end."""

    def __init__(self, content: mmap.mmap, position: int):
        self.content = content
        self.position = position
        self.end = min(len(content), _LONGEST)
        self.elements = _MOST_ELEMENTS

    def skip(self, count: int) -> int:
        """Moves on by so many bytes, and returns where it was."""
        start = self.position
        if count > self.end - start:
            what = "the file ends" if self.end < _LONGEST else f"{_LONGEST:,} bytes are over"
            raise ValueError(f"at byte {start:,} its head asks for {count:,} more, where {what}")
        self.position = start + count
        return start

    def uint32(self) -> int:
        return _UINT32.unpack_from(self.content, self.skip(4))[0]

    def uint64(self) -> int:
        return _UINT64.unpack_from(self.content, self.skip(8))[0]

    def text(self) -> str:
        start = self.skip(self.uint64())
        return self.content[start : self.position].decode()

    def texts(self, count: int) -> list[str]:
        """As many texts, of which vocabularies have a million: `text` without its calls."""
        content, end, at, unpack = self.content, self.end, self.position, _UINT64.unpack_from
        found = []
        for _ in range(count):
            start = at + 8
            stop = start + unpack(content, at)[0] if start <= end else start
            if stop > end:
                self.position = at
                self.text()  # says what is wrong
            found.append(content[start:stop].decode())
            at = stop
        self.position = at
        return found

    def value(self) -> Any:
        """A value of the type that stands before it."""
        kind = self.uint32()
        if kind != _LIST:
            return self.text() if kind == _TEXT else self.numbers(kind, 1)[0]
        kind, count = self.uint32(), self.uint64()
        self.elements -= count
        if self.elements < 0:
            raise ValueError(
                f"it has a list of {count:,} values, expected at most {_MOST_ELEMENTS:,} in all"
            )
        return self.texts(count) if kind == _TEXT else self.numbers(kind, count)

    def numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in _DTYPES:
            raise ValueError(f"at byte {self.position:,} is a value of the unknown type {kind}")
        dtype = _DTYPES[kind]
        start = self.skip(count * dtype.itemsize)
        found = np.frombuffer(self.content[start : self.position], np.uint8)
        return (found != 0 if kind == _BOOL else found.view(dtype)).tolist()


def _parsed(path: Path, cursor: _Cursor, size: int) -> GgufHead:
    if (version := cursor.uint32()) not in (2, 3):
        raise ValueError(f"its version is {version:,}, expected 2 or 3, of little-endian bytes")
    number, pairs = cursor.uint64(), cursor.uint64()
    if number > _MOST_TENSORS or pairs > _MOST_PAIRS:
        raise ValueError(
            f"it would have {number:,} tensors and {pairs:,} pairs of metadata, expected at most "
            f"{_MOST_TENSORS:,} and {_MOST_PAIRS:,}"
        )
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text()
        if not is_name(key) or key in metadata:
            raise ValueError(f"the key {shown(key)} is no name, or there more than once")
        metadata[key] = cursor.value()
    described = [_described(path, cursor) for _ in range(number)]
    counts = collections.Counter(tensor.name for tensor in described)
    if doubled := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{listed(doubled)} {'is' if len(doubled) == 1 else 'are'} there twice")
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment.bit_count() != 1 or alignment > _WIDEST:
        raise ValueError(
            f"general.alignment is {shown(alignment)}, expected a power of two up to {_WIDEST:,}"
        )
    begin = -(-cursor.position // alignment) * alignment
    end = begin
    for tensor in sorted(described, key=lambda x: (x.start, x.nbytes)):
        start = begin + tensor.start
        if tensor.start % alignment or start < end or start + tensor.nbytes > size:
            raise ValueError(
                f"{tensor.name} would be {tensor.nbytes:,} bytes from byte {start:,} on, which is "
                f"beyond the end, within another, or no multiple of {alignment}"
            )
        end = start + tensor.nbytes
    return GgufHead(metadata, [x._replace(start=begin + x.start) for x in described])


def _described(path: Path, cursor: _Cursor) -> GgufTensor:
    """A tensor as the head has it, its start counted from that of the values."""
    if not is_name(name := cursor.text()):
        raise ValueError(f"{shown(name)} is no name of a tensor")
    axes = cursor.uint32()
    if not 1 <= axes <= _MOST_AXES:
        raise ValueError(f"{name} has {axes:,} axes, expected 1 to {_MOST_AXES}")
    shape = tuple(reversed([cursor.uint64() for _ in range(axes)]))
    kind, start = cursor.uint32(), cursor.uint64()
    if kind not in _KINDS:
        raise ValueError(f"{name} is stored in the unknown type {kind:,}")
    block, nbytes = gguf.GGML_QUANT_SIZES[_KINDS[kind]]
    if 0 in shape or shape[-1] % block:
        raise ValueError(
            f"{name} has the shape {shape}, expected rows of whole blocks of {block} values"
        )
    count = math.prod(shape) // block * nbytes
    return GgufTensor(path, name, _KINDS[kind], shape, start, count)
