"""Model folders for transformers and everything that loads what it loads, adapters merged in.

    config.json                        the architecture
    model.safetensors                  the weights; or, of more than a shard may hold,
    model-00001-of-0000N.safetensors   parts of them and model.safetensors.index.json
    tokenizer.json, ...                what `hf_text` lists

A tensor is computed when its turn has come and written at once: memory holds the parameters as they
are, perhaps in 4 bits or not at all (`read_model(..., lazy=True)`), and one dense tensor.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jax.typing import DTypeLike

from lora_jax.formats.checkpoint import Checkpoint, Tensor
from lora_jax.formats.disassembly import disassemble
from lora_jax.formats.folder import require_replaceable, write_file, written_folder
from lora_jax.formats.hf import naming
from lora_jax.formats.hf_text import FILES, as_json, special_ids, text_files
from lora_jax.models.config import DecoderConfig
from lora_jax.models.families import from_hf

SHARD = 5_000_000_000  # bytes; what transformers takes as well
_PART = 2**20  # values that are cast, checked and written at once
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # by safetensors' names
# What such a folder consists of: an older one that has nothing else may be replaced.
OWN = r"config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|" + "|".join(
    name.replace(".", r"\.") for name in FILES
)
# How a decoder is run, and in what it is kept, is not what it is.
_RUN = ("scan_layers", "remat", "attention", "dtype", "param_dtype")


def write_hf(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    adapters: Any = None,
    *,
    dtype: DTypeLike | None = None,
    shard_size: int = SHARD,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a model as a folder that transformers loads; undoes `read_hf`.

    The config and the tokenizer of a model that came in such a folder are those of that folder, but
    for the dtype. Those of other models are written out.

    >>> checkpoint = read_model("smollm2-135m-instruct")
    >>> base = lj.quantize(checkpoint.params, "layers/.*/kernel", layout="b i o")
    >>> write_hf("merged", dataclasses.replace(checkpoint, params=base), adapters)

    Args:
      path: The folder, which appears whole or not at all; an older model there is replaced.
      checkpoint: The model; its parameters may be of scanned or separate layers, dense or in 4
        bits.
      adapters: What is added to them, as by `lj.merge`; nothing, if None.
      dtype: Of the tensors on disk: float32, bfloat16 or float16; by default that of the config's
        parameters.
      shard_size: The most bytes of a file of weights, though a tensor is never cut.
      progress: Called after each tensor with the number of those written, and of all.

    Raises:
      FileExistsError: If there is something else at that path.
      ValueError: If parameters, adapters and config do not belong together, or a value is infinite
        or NaN in that dtype.
      OSError: If the folder cannot be written; what was there before is still there.
    """
    target, config = Path(path), checkpoint.config
    require_replaceable(target, OWN)
    dtype = np.dtype(config.param_dtype if dtype is None else dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"dtype is {dtype.name}, expected one of {', '.join(DTYPES)}")
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}, expected a number of bytes")
    described = config_json(checkpoint, dtype)
    tensors = disassemble(config, naming(config), checkpoint.params, adapters, dtype=dtype)
    with written_folder(target, OWN) as folder:
        _require_space(folder, sum(_nbytes(tensor, dtype) for tensor in tensors))
        write_file(folder / "config.json", as_json(described))
        for name, content in text_files(checkpoint).items():
            write_file(folder / name, content)
        shards = list(_shards(tensors, dtype, shard_size))
        for done, _ in enumerate(_write_weights(folder, shards, dtype), 1):
            if progress is not None:
                progress(done, len(tensors))


def check_target(path: Path) -> None:
    """The `FileExistsError` of `write_hf`, for who would rather know before a model is read."""
    require_replaceable(path, OWN)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a `config.json` that describe a decoder; undoes `families.from_hf`.

    Raises:
      ValueError: If the decoder does something for which a Llama has no field.
    """
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": float(config.norm_eps),
        "rope_theta": float(config.rope_theta),
        "rope_scaling": None,
        "tie_word_embeddings": config.tied_head,
    }
    if different := _differences(from_hf(fields), config):
        raise ValueError(
            f"the decoder has {different}, which no config.json of a Llama says; "
            "only a model that came in a folder of transformers can be written as one"
        )
    return fields


def config_json(checkpoint: Checkpoint, dtype: np.dtype) -> dict[str, Any]:
    """The model's own config.json, if it has one, but of weights that are dense and of a dtype.

    Raises:
      ValueError: If it has one that describes another decoder, or none can say what this one is.
    """
    config, metadata = checkpoint.config, checkpoint.metadata
    if "config.json" in metadata:
        fields = dict(metadata["config.json"])
        fields.pop("quantization_config", None)
        if different := _differences(from_hf(fields), config):
            raise ValueError(
                f"the checkpoint's config has {different}, and its config.json another; "
                "take it out of the metadata to have one written"
            )
    else:
        fields = to_hf(config) | special_ids(checkpoint)
        length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        fields |= {} if length is None else {"max_position_embeddings": int(length)}
    # transformers has said `dtype` since version 5, and understands both.
    names = [name for name in ("dtype", "torch_dtype") if name in fields] or ["torch_dtype"]
    return fields | dict.fromkeys(names, dtype.name)


def _differences(one: DecoderConfig, other: DecoderConfig) -> str:
    """What another decoder is that one is not, as its config says it; nothing if they are equal."""
    names = [field.name for field in dataclasses.fields(one) if field.name not in _RUN]
    values = [(name, getattr(one, name), getattr(other, name)) for name in names]
    return ", ".join(f"{name}={theirs!r}" for name, ours, theirs in values if ours != theirs)


def _nbytes(tensor: Tensor, dtype: np.dtype) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * dtype.itemsize


def _require_space(folder: Path, needed: int) -> None:
    """An error before hours of work rather than after them."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _shards(tensors: Sequence[Tensor], dtype: np.dtype, most: int) -> Iterator[list[Tensor]]:
    """The tensors in files of at most so many bytes, in their order."""
    shard: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + _nbytes(tensor, dtype) > most:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += _nbytes(tensor, dtype)
    yield shard


def _write_weights(
    folder: Path, shards: Sequence[Sequence[Tensor]], dtype: np.dtype
) -> Iterator[None]:
    """Writes the tensors of each file, and where they are if there are several."""
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        yield from _write_file(folder / file, shard, dtype)
        names |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        size = sum(_nbytes(tensor, dtype) for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": size}, "weight_map": names}
        write_file(folder / "model.safetensors.index.json", as_json(index))


def _write_file(path: Path, tensors: Sequence[Tensor], dtype: np.dtype) -> Iterator[None]:
    """Writes a safetensors file, one tensor after the other.

    The `safetensors` package takes all the tensors of a file at once. The format is that of its
    documentation: eight bytes with the length of a JSON object, the object, which has dtype, shape
    and place of each tensor, and the values, little-endian and without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + _nbytes(tensor, dtype)
        header[tensor.name] = {
            "dtype": DTYPES[dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that values are aligned
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors:
            _write_values(file, tensor, dtype)
            yield
        file.flush()
        os.fsync(file.fileno())  # the rename must not reach the disk before the content


def _write_values(file: BinaryIO, tensor: Tensor, dtype: np.dtype) -> None:
    """Some rows at a time, so that beside the tensor there is little more in memory."""
    values = tensor.read()
    assert isinstance(values, np.ndarray)
    assert values.shape == tensor.shape
    rows = max(1, _PART * len(values) // values.size)
    for start in range(0, len(values), rows):
        with np.errstate(over="ignore"):  # what becomes infinite is found below
            part = np.ascontiguousarray(values[start : start + rows], dtype)
        if not np.isfinite(part).all():
            raise ValueError(
                f"{tensor.name} has values that are infinite or NaN as {dtype.name}; write "
                "another dtype, or repair the parameters"
            )
        file.write(part.reshape(-1).view(np.uint8).data)
