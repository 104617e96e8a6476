"""Model folders written, for transformers to read; 4-bit leaves are for bitsandbytes.

    config.json                        as it was read, with what the weights now are
    model.safetensors                  or, of a large model, parts of it and their index
    tokenizer.json, ...                as they were read

Names and folders are those that `lora_jax.formats.hf` reads.
"""

from __future__ import annotations

import json
import operator
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from lora_jax.core.leaves import QuantizedArray
from lora_jax.formats import bitsandbytes
from lora_jax.formats.checkpoint import Checkpoint, leaf_at
from lora_jax.formats.hf import INDEX, WEIGHTS, places

_PART = 2**31  # bytes of a file, all of which are in memory once more while it is written
_COPIED = ("generation_config.json", "tokenizer_config.json")


def write_hf(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Writes a model folder, which appears whole or not at all.

    Leaves of NF4 and FP4 are written as bitsandbytes keeps them, without being decoded; all others
    in the dtype that they have. `read_model` and transformers read the folder.

    >>> checkpoint = read_model("hf:owner/name", quantize=Quantization())
    >>> write_hf("name-nf4", checkpoint)

    Args:
      path: The folder, which is not there yet.
      checkpoint: What was read from a model folder, perhaps with other `params`.

    Raises:
      FileExistsError: If there is such a folder already.
      ValueError: If the checkpoint does not come from a folder, or a leaf is of a kind that nobody
        else reads.
      OSError: If the folder cannot be written.
    """
    if "config.json" not in checkpoint.metadata:
        raise ValueError(
            f"{checkpoint.name} was not read from a model folder, so it has no config.json, which "
            "transformers asks for; expected what read_model makes of a folder"
        )
    target = Path(path).absolute()
    if target.exists():
        raise FileExistsError(f"{target} is there already; write the path of a new folder")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_weights(partial, checkpoint)
        _write_json(partial / "config.json", _config(checkpoint))
        for name in _COPIED:
            if name in checkpoint.metadata:
                _write_json(partial / name, checkpoint.metadata[name])
        checkpoint.tokenizer.save(str(partial / "tokenizer.json"))
        if checkpoint.chat_template is not None:
            text = checkpoint.chat_template
            (partial / "chat_template.jinja").write_text(text, encoding="utf-8")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tensors(checkpoint: Checkpoint) -> Iterator[dict[str, np.ndarray]]:
    """The tensors of each weight, by their names."""
    scanned = checkpoint.config.scan_layers
    for name, place in places(checkpoint.config).items():
        leaf = leaf_at(checkpoint.params, place.path_in(scan_layers=scanned))
        if place.layer is not None and scanned:
            leaf = jax.tree.map(operator.itemgetter(place.layer), leaf)
        if isinstance(leaf, QuantizedArray):
            yield bitsandbytes.to_tensors(leaf, name)
        else:
            values = np.asarray(leaf)
            values = values.T if place.path.endswith("/kernel") else values
            yield {name: np.ascontiguousarray(values)}


def _parts(checkpoint: Checkpoint) -> Iterator[dict[str, np.ndarray]]:
    """The same, as many in one as make a file."""
    part: dict[str, np.ndarray] = {}
    for tensors in _tensors(checkpoint):
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
        safetensors.numpy.save_file(part, folder / f"part-{number}", metadata={"format": "pt"})
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
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config as it was read, with what the weights now are."""
    config = dict(checkpoint.metadata["config.json"])
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)  # what `dtype` was called
    config["dtype"] = np.asarray(leaf_at(checkpoint.params, "final_norm/scale")).dtype.name
    packed, dense = [], []
    for name, place in places(checkpoint.config).items():
        leaf = leaf_at(checkpoint.params, place.path_in(scan_layers=checkpoint.config.scan_layers))
        if isinstance(leaf, QuantizedArray):
            packed.append(leaf)
        elif place.path.endswith("/kernel"):
            dense.append(name.removesuffix(".weight"))
    if packed:
        config["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": packed[0].kind,
            "bnb_4bit_use_double_quant": packed[0].group_scales is not None,
            "bnb_4bit_compute_dtype": config["dtype"],
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": dense,
        }
    return config


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
