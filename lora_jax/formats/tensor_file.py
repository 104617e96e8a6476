"""A safetensors file: which tensors it holds, and each of them when it is asked for.

    8 bytes    length of the header
    header     JSON: {name: {"dtype": "BF16", "shape": [...], "data_offsets": [start, end]}, ...}
    the rest   the values of all tensors, without gaps

The safetensors package sees to it that the header is true of the file. It maps files into memory
though, and every page that was touched then counts as the program's own; so values are read here.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
DTYPES = {name: np.dtype(dtype) for name, dtype in {**FLOATS, "U8": np.uint8}.items()}


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
      file: Which.
      name: In it.
      dtype: As safetensors calls it, such as `"BF16"`.
      shape: Of its values.
      start: Their first byte, counted from the beginning of the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

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
        dtype, size = DTYPES[self.dtype], math.prod(self.shape)
        # Pages of its own go back to the system with the array. From malloc, tensors of tens of
        # megabytes would come out of a heap that keeps what they leave.
        pages = mmap.mmap(-1, max(1, size * dtype.itemsize))
        values = np.frombuffer(pages, dtype, size).reshape(self.shape)
        room = memoryview(pages)[: size * dtype.itemsize]
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            while len(room):  # a single read ends after two gigabytes
                if not (count := file.readinto(room)):
                    raise ValueError(f"{self.file.name} ends within the tensor {self.name!r}.")
                room = room[count:]
        return values


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a file, in the order of their values; none is read yet.

    Raises:
      ValueError: If the file is broken: too short, or with a header that is not true of it.
    """
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path.name} is broken or ends too early ({path.stat().st_size:,} bytes): {error}. "
            "Fetch the file again."
        ) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = [
        StoredTensor(
            path, name, about["dtype"], tuple(about["shape"]), 8 + length + about["data_offsets"][0]
        )
        for name, about in header.items()
    ]
    return sorted(found, key=lambda tensor: tensor.start)
