"""Reading a model in whatever format it is: what it is in is found by looking."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from lora_jax.formats.checkpoint import Checkpoint, Reading
from lora_jax.formats.quantization import Quantization
from lora_jax.formats.sources import fetch


def read_model(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike = np.float32,
    scan_layers: bool = True,
    packed: bool = False,
    quantize: Quantization | None = None,
    place: Callable[[str, Any], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    strict: bool = True,
    lazy: bool = False,
) -> Checkpoint:
    """Reads a GGUF file or a Hugging Face model folder, fetched first if need be.

    >>> checkpoint = read_model("smollm2-135m-instruct")
    >>> logits = Decoder(checkpoint.config).apply({"params": checkpoint.params}, tokens)

    A model that is to be stored in 4 bits never is in memory whole; on a mesh, each leaf leaves the
    host as soon as it is complete:

    >>> def place(path, leaf):
    ...     here = [rule for rule in rules if re.search(rule[0], path)]
    ...     return lj.shard({path: leaf}, mesh, here)[path]
    >>> checkpoint = read_model("hf:owner/name", quantize=Quantization(), place=place)

    One that is only to be written elsewhere need not be in memory at all:

    >>> write_hf("folder", read_model("model.gguf", lazy=True))

    Args:
      source: A path, or anything else that `sources.fetch` takes.
      dtype: Of the parameters, except those that the files have in 4 bits: these stay as they are,
        and decode to the dtype that they had.
      scan_layers: Whether the parameters are those of scanned layers (stacked) or of separate ones.
      packed: Whether kernels that a GGUF file keeps in Q4_0 or Q4_1 stay so (see `read_gguf`).
      quantize: What to store in 4 bits as it arrives; the leaves are those of `lj.quantize` of the
        parameters otherwise read, bit for bit.
      place: Called with the path and the value of each leaf as soon as it is whole, of NumPy
        arrays; what it returns stands in the tree.
      progress: Called after each tensor with the numbers of those read, and of all.
      strict: Whether tensors that the decoder has no place for are an error; if not, they are left
        out with a warning. Missing ones always are an error: nothing honest could stand for them.
      lazy: Whether leaves stay in their files, to be read part by part when they are asked for; see
        `checkpoint.Unread`.

    Returns:
      The checkpoint.

    Raises:
      SourceError: If the source cannot be fetched.
      FileNotFoundError: If files are missing in a folder.
      ValueError: If it is neither, is broken, or holds a model that cannot be read faithfully; or
        if kernels are to stay packed and it has none, or what `quantize` names cannot be quantized.
    """
    reading = Reading(quantize, place, progress, strict, lazy)
    path = Path(fetch(source))
    # Imported here, so that a folder is read where the package for GGUF is not installed.
    if path.is_dir():
        from lora_jax.formats.hf import read_hf

        if packed:
            raise ValueError(
                f"{path} is a folder of safetensors; only the kernels of a GGUF file are stored as "
                "Q4_0 or Q4_1, and so none can stay packed."
            )
        return read_hf(path, dtype=dtype, scan_layers=scan_layers, reading=reading)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(
            f"{path} is no model: it begins with {magic!r}, not with b'GGUF'; "
            "write the path of a GGUF file or of a folder with config.json and safetensors."
        )
    from lora_jax.formats.gguf import read_gguf

    return read_gguf(path, dtype=dtype, scan_layers=scan_layers, packed=packed, reading=reading)
