"""Reading a model in whatever format it is: what it is in is found by looking."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from lora_jax.formats.checkpoint import Checkpoint
from lora_jax.formats.sources import fetch


def read_model(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike = np.float32,
    scan_layers: bool = True,
    packed: bool = False,
) -> Checkpoint:
    """Reads a GGUF file or a Hugging Face model folder, fetched first if need be.

    >>> checkpoint = read_model("smollm2-135m-instruct")
    >>> logits = Decoder(checkpoint.config).apply({"params": checkpoint.params}, tokens)

    Args:
      source: A path, or anything else that `sources.fetch` takes.
      dtype: Of the parameters.
      scan_layers: Whether the parameters are those of scanned layers (stacked) or of separate ones.
      packed: Whether kernels that a GGUF file keeps in Q4_0 or Q4_1 stay so (see `read_gguf`).

    Returns:
      The checkpoint.

    Raises:
      SourceError: If the source cannot be fetched.
      FileNotFoundError: If files are missing in a folder.
      ValueError: If it is neither, is broken, or holds a model that cannot be read faithfully; or
        if kernels are to stay packed and it has none.
    """
    path = Path(fetch(source))
    # Imported here, so that a folder is read where the package for GGUF is not installed.
    if path.is_dir():
        from lora_jax.formats.hf import read_hf

        if packed:
            raise ValueError(
                f"{path} is a folder of safetensors; only the kernels of a GGUF file are stored as "
                "Q4_0 or Q4_1, and so none can stay packed."
            )
        return read_hf(path, dtype=dtype, scan_layers=scan_layers)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(
            f"{path} is no model: it begins with {magic!r}, not with b'GGUF'; "
            "write the path of a GGUF file or of a folder with config.json and safetensors."
        )
    from lora_jax.formats.gguf import read_gguf

    return read_gguf(path, dtype=dtype, scan_layers=scan_layers, packed=packed)
