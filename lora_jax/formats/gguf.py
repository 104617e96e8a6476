"""GGUF files of the Llama family: shape, weights and tokenizer out of one file.

GGUF stores a kernel as `[out, in]`, possibly in blocks of few bits, and keeps the rows of the query
and key projections in an order of its own: llama.cpp turns neighbouring pairs (2j, 2j + 1) of a
head where the decoder turns (j, j + H/2). Reading undoes both::

    blk.{i}.attn_q.weight  [N * H, D]  ->  layers/attn/q_proj/kernel[i]  [D, N * H]

Shapes: D model width, N heads, H head width, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
from jax.typing import DTypeLike
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lora_jax.models.decoder import DecoderConfig, parameter_shapes, unstack_layers
from lora_jax.models.families import from_gguf

# Where the tensors of a file, and those of each of its blocks, belong in the tree of parameters.
_TENSORS = {
    "token_embd.weight": "embed/embedding",
    "output_norm.weight": "final_norm/scale",
    "output.weight": "lm_head/kernel",
}
_BLOCK_TENSORS = {
    "attn_norm.weight": "layers/attn_norm/scale",
    "attn_q.weight": "layers/attn/q_proj/kernel",
    "attn_k.weight": "layers/attn/k_proj/kernel",
    "attn_v.weight": "layers/attn/v_proj/kernel",
    "attn_output.weight": "layers/attn/o_proj/kernel",
    "ffn_norm.weight": "layers/mlp_norm/scale",
    "ffn_gate.weight": "layers/mlp/gate_proj/kernel",
    "ffn_up.weight": "layers/mlp/up_proj/kernel",
    "ffn_down.weight": "layers/mlp/down_proj/kernel",
}

# What a tokenizer is built from: tokens, their types and the merges, a string or number for each.
_TOKENIZER_LISTS = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model as it was published.

    Attributes:
      config: The decoder to run it with.
      params: Its parameters, NumPy arrays in the tree of `lora_jax.models.decoder`.
      tokenizer: Text to token ids and back.
      metadata: What else the file says, by its own keys: `general.name`, `general.license`,
        `tokenizer.ggml.eos_token_id`, `tokenizer.chat_template`, ...
    """

    config: DecoderConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    metadata: Mapping[str, Any]


def read_gguf(
    path: str | os.PathLike[str], *, dtype: DTypeLike = np.float32, scan_layers: bool = True
) -> Checkpoint:
    """Reads a GGUF file of the Llama family.

    One tensor at a time is decoded and cast, so that memory holds the result and little else.

    Args:
      path: The file.
      dtype: Of the parameters.
      scan_layers: Whether the parameters are those of scanned layers (stacked) or of separate ones.

    Returns:
      The checkpoint.

    Raises:
      FileNotFoundError: If there is no file.
      ValueError: If it is no GGUF file, ends too early, or holds a model that cannot be read
        faithfully.
    """
    path = Path(path)
    reader = _open(path)
    try:
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tied_head = all(tensor.name != "output.weight" for tensor in reader.tensors)
        config = from_gguf(metadata, tied_head=tied_head)
        # Stacked in any case: separate layers are then views of the stack.
        config = dataclasses.replace(config, scan_layers=True, param_dtype=dtype)
        params = _read_params(reader, config)
        tokenizer = _build_tokenizer(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not scan_layers:
        config = dataclasses.replace(config, scan_layers=False)
        params = unstack_layers(params)
    kept = {name: value for name, value in metadata.items() if name not in _TOKENIZER_LISTS}
    return Checkpoint(config, params, tokenizer, kept)


def _open(path: Path) -> gguf.GGUFReader:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it begins with {magic!r}, not with b'GGUF'.")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        # The reader indexes into the mapped file without looking where it ends.
        raise ValueError(
            f"{path} is broken or ends too early ({path.stat().st_size:,} bytes): the GGUF reader "
            f"says {str(error)!r}. Fetch the file again."
        ) from error


def _read_params(reader: gguf.GGUFReader, config: DecoderConfig) -> dict[str, Any]:
    """Decodes every tensor into its place; what is missing or not understood is an error."""
    params = jax.tree.map(
        lambda shape: np.empty(shape.shape, shape.dtype), parameter_shapes(config)
    )
    missing = set(_TENSORS) - ({"output.weight"} if config.tied_head else set())
    missing |= {f"blk.{i}.{name}" for i in range(config.num_layers) for name in _BLOCK_TENSORS}
    for tensor in reader.tensors:
        if tensor.name not in missing:
            raise ValueError(f"there is no place for the tensor {tensor.name!r} in this decoder.")
        missing.remove(tensor.name)
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", tensor.name)
        name = block[2] if block else tensor.name
        path = _BLOCK_TENSORS[name] if block else _TENSORS[name]
        target = functools.reduce(operator.getitem, path.split("/"), params)
        if block:
            target = target[int(block[1])]
        weight = _decode(tensor)
        if name == "attn_q.weight":
            weight = _unpermute(weight, config.num_heads)
        elif name == "attn_k.weight":
            weight = _unpermute(weight, config.num_kv_heads)
        if weight.ndim == 2 and name != "token_embd.weight":
            weight = weight.T  # [in, out]
        if weight.shape != target.shape:
            raise ValueError(
                f"the tensor {tensor.name!r} is {weight.shape} when read as a parameter; "
                f"the file's own metadata asks for {target.shape}."
            )
        target[...] = weight
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, among them {min(missing)!r}.")
    return params


def _decode(tensor: gguf.ReaderTensor) -> np.ndarray:
    """The tensor's values, float32 [out, in] or [D]."""
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(
            f"the tensor {tensor.name!r} is stored as {tensor.tensor_type.name}, "
            "which the gguf package cannot decode."
        ) from error


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * H, in] of neighbouring pairs, put in the order of pairs (j, j + H/2)."""
    out, width = weight.shape
    pairs = weight.reshape(heads, out // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(out, width)


def _build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that the metadata describes."""
    kind, splitter = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if (kind, splitter) != ("gpt2", "smollm"):
        raise ValueError(
            f"the tokenizer is of model {kind!r} with pre-tokenizer {splitter!r}; "
            "only 'gpt2' with 'smollm' can be built."
        )
    for key in _TOKENIZER_LISTS:
        if key not in metadata:
            raise ValueError(f"the GGUF metadata lacks {key!r}, without which no text can be read.")
    tokens, types, merges = (metadata[key] for key in _TOKENIZER_LISTS)
    try:
        model = models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"the tokenizer's vocabulary and merges do not fit: {error}.") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == gguf.TokenType.CONTROL
        ]
    )
    return tokenizer
