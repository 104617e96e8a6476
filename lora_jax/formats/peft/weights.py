"""`adapter_model.safetensors`: the tensors of an adapter, by the names of torch modules."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from lora_jax.files import file_in
from lora_jax.formats.tensor_file import FLOATS, StoredTensor, stored_tensors

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt")


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a file, whose values are read when they are asked for.

    Attributes:
      stored: each of them, by its name without the prefix that all have.
      shapes: of each.
    """

    stored: dict[str, StoredTensor]
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, dtype: DTypeLike | None = None) -> np.ndarray:
        """The values of a tensor, in its own dtype or in another."""
        values = self.stored[name].read()
        return values if dtype is None else values.astype(dtype)


def open_weights(folder: Path) -> Weights:
    """Looks at the weights of an adapter.

    Values are not judged: one that is NaN is read as it is.

    Raises:
      FileNotFoundError: if there is no folder, or no weights in it.
      ValueError: if they are pickled, broken, not floats, or not an adapter's.
    """
    path = file_in(folder, WEIGHTS)
    if path is None:
        raise _absent(folder)
    stored = {}
    for tensor in stored_tensors(path):
        if not tensor.name.startswith(PREFIX):
            raise ValueError(f"the tensor {tensor.name!r} does not begin with {PREFIX!r}.")
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"the tensor {tensor.name!r} is stored as {tensor.dtype}; only "
                f"{', '.join(FLOATS)} can be read."
            )
        stored[tensor.name.removeprefix(PREFIX)] = tensor
    return Weights(stored, {name: tensor.shape for name, tensor in stored.items()})


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
