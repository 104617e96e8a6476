"""Model folders whose 4-bit weights stay so, for transformers with bitsandbytes.

Such a folder is one of `hf_write`, except that a weight in NF4 or FP4 is the tensors that
`bitsandbytes` lists, and that config.json says so.
"""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from lora_jax.core.leaves import QuantizedArray
from lora_jax.formats import bitsandbytes
from lora_jax.formats.checkpoint import Checkpoint, leaf_at
from lora_jax.formats.folder import require_replaceable, write_file, written_folder
from lora_jax.formats.hf import INDEX, WEIGHTS, naming
from lora_jax.formats.hf_text import as_json, text_files
from lora_jax.formats.hf_write import OWN, config_json
from lora_jax.models.decoder import parameter_shapes

_PART = 2**31  # bytes of a file, all of which are in memory once more while it is written


def write_bitsandbytes(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Writes a model folder in which 4-bit leaves are as bitsandbytes keeps them, not decoded.

    All other leaves are written in the dtype that they have. `read_model` and transformers read the
    folder.

    >>> checkpoint = read_model("hf:owner/name", quantize=Quantization())
    >>> write_bitsandbytes("name-nf4", checkpoint)

    Args:
      path: The folder, which appears whole or not at all; an older model there is replaced.
      checkpoint: The model, with leaves of kind NF4 or FP4 among its parameters.

    Raises:
      FileExistsError: If there is something else at that path.
      ValueError: If nothing is in 4 bits, or a leaf is of a kind that bitsandbytes lacks.
      OSError: If the folder cannot be written; what was there before is still there.
    """
    target = Path(path)
    require_replaceable(target, OWN)
    described = _config(checkpoint)
    with written_folder(target, OWN) as folder:
        _write_weights(folder, checkpoint)
        write_file(folder / "config.json", as_json(described))
        for name, content in text_files(checkpoint).items():
            write_file(folder / name, content)


def _leaves(checkpoint: Checkpoint) -> Iterator[tuple[str, str, Any]]:
    """The name of each tensor that a dense folder would have, its path, and its share of a leaf."""
    config = checkpoint.config
    shapes = parameter_shapes(dataclasses.replace(config, scan_layers=True))
    for name, place in naming(config).places(config, shapes).items():
        path, leading = place.home(scan_layers=config.scan_layers)
        leaf = leaf_at(checkpoint.params, path)
        yield name, path, jax.tree.map(operator.itemgetter(leading), leaf)


def _parts(checkpoint: Checkpoint) -> Iterator[dict[str, np.ndarray]]:
    """The tensors by their names, as many at a time as make a file."""
    part: dict[str, np.ndarray] = {}
    for name, path, leaf in _leaves(checkpoint):
        if isinstance(leaf, QuantizedArray):
            tensors = bitsandbytes.to_tensors(leaf, name)
        else:
            values = np.asarray(leaf)
            values = values.T if path.endswith("/kernel") else values
            tensors = {name: np.ascontiguousarray(values)}
        if part and _nbytes(part) + _nbytes(tensors) > _PART:
            yield part
            part = {}
        part |= tensors
    yield part


def _nbytes(tensors: dict[str, np.ndarray]) -> int:
    return sum(values.nbytes for values in tensors.values())


def _write_weights(folder: Path, checkpoint: Checkpoint) -> None:
    names, size = [], 0
    for number, part in enumerate(_parts(checkpoint)):
        write_file(folder / f"part-{number}", safetensors.numpy.save(part, {"format": "pt"}))
        names.append(list(part))
        size += _nbytes(part)
    if len(names) == 1:
        (folder / "part-0").rename(folder / WEIGHTS)
        return
    where: dict[str, str] = {}
    for number, part_names in enumerate(names):
        file = f"model-{number + 1:05}-of-{len(names):05}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        where |= dict.fromkeys(part_names, file)
    index = {"metadata": {"total_size": size}, "weight_map": where}
    write_file(folder / INDEX, as_json(index))


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of the dense model, and what is in 4 bits."""
    dtype = np.asarray(leaf_at(checkpoint.params, "final_norm/scale")).dtype
    packed, dense = [], []
    for name, path, leaf in _leaves(checkpoint):
        if isinstance(leaf, QuantizedArray):
            packed.append(leaf)
        elif path.endswith("/kernel"):
            dense.append(name.removesuffix(".weight"))
    if not packed:
        raise ValueError(
            f"{checkpoint.name} has no leaf in 4 bits; quantize it, or write it with write_hf"
        )
    return config_json(checkpoint, dtype) | {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": packed[0].kind,
            "bnb_4bit_use_double_quant": packed[0].group_scales is not None,
            "bnb_4bit_compute_dtype": dtype.name,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": dense,
        }
    }
