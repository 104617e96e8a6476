"""`adapter_model.safetensors`: the tensors of an adapter, by the names of torch modules."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from jax.typing import DTypeLike

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLES = ("adapter_model.bin", "adapter_model.pt")


@dataclasses.dataclass(frozen=True)
class Weights:
    """An opened file.

    Attributes:
      file: safetensors' own handle.
      shapes: of each tensor, by its name without the prefix that all have.
      doubled: names that the file holds more than once.
    """

    file: Any
    shapes: dict[str, tuple[int, ...]]
    doubled: list[str]

    def read(self, name: str, dtype: DTypeLike | None = None) -> np.ndarray:
        """The values of a tensor, in its own dtype or in another."""
        values = self.file.get_tensor(PREFIX + name)
        return values if dtype is None else values.astype(dtype)


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """Opens the weights of an adapter; their values are read one by one.

    Raises:
      FileNotFoundError: if there is no folder, or no weights in it.
      ValueError: if they are pickled, broken, not floats, or not an adapter's.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise _absent(folder)
    try:
        opened = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{WEIGHTS} is broken or ends too early ({path.stat().st_size:,} bytes): {error}."
        ) from error
    with opened as file:
        shapes = {}
        for name in list(file.keys()):
            header = file.get_slice(name)
            if not name.startswith(PREFIX):
                raise ValueError(f"the tensor {name!r} does not begin with {PREFIX!r}.")
            if header.get_dtype() not in _FLOATS:
                raise ValueError(
                    f"the tensor {name!r} is stored as {header.get_dtype()}; only "
                    f"{', '.join(_FLOATS)} can be read."
                )
            shapes[name.removeprefix(PREFIX)] = tuple(header.get_shape())
        yield Weights(file, shapes, _doubled(path))


def _doubled(path: Path) -> list[str]:
    """Names that stand twice in the header, of which safetensors only shows the last."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    names = collections.Counter(
        name for name, _ in json.loads(header, object_pairs_hook=lambda pairs: pairs)
    )
    return [name.removeprefix(PREFIX) for name, count in names.items() if count > 1]


def _absent(folder: Path) -> Exception:
    if not folder.is_dir():
        return FileNotFoundError(f"there is no folder {str(folder)!r}.")
    if pickled := [name for name in _PICKLES if (folder / name).is_file()]:
        return ValueError(
            f"it has its weights in a pickle ({pickled[0]}) and not in safetensors; opening a "
            "pickle runs whatever code it holds, so it is not read. Where you trust it, convert "
            'it with peft: PeftModel.from_pretrained(model, "...").save_pretrained("folder").'
        )
    present = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
    return FileNotFoundError(f"{folder} lacks {WEIGHTS}; it has {present}.")
