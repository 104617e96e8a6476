"""GGUF files of the Llama family: shape, weights and tokenizer out of one file.

GGUF stores a kernel as `[out, in]`, possibly in blocks of few bits, and keeps the rows of the query
and key projections in an order of its own: llama.cpp turns neighbouring pairs (2j, 2j + 1) of a
head where the decoder turns (j, j + H/2). Reading undoes both::

    blk.{i}.attn_q.weight  [N * H, D]  ->  layers/attn/q_proj/kernel[i]  [D, N * H]

Shapes: D model width, N heads, H head width, L layers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jax.typing import DTypeLike
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lora_jax.formats.checkpoint import (
    Checkpoint,
    Naming,
    Reading,
    SpecialTokens,
    Tensor,
    assemble,
    digest,
)
from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.families import from_gguf

_NAMING = Naming(
    whole={
        "token_embd.weight": "embed/embedding",
        "output_norm.weight": "final_norm/scale",
        "output.weight": "lm_head/kernel",
    },
    layered={
        "blk.{}.attn_norm.weight": "layers/attn_norm/scale",
        "blk.{}.attn_q.weight": "layers/attn/q_proj/kernel",
        "blk.{}.attn_k.weight": "layers/attn/k_proj/kernel",
        "blk.{}.attn_v.weight": "layers/attn/v_proj/kernel",
        "blk.{}.attn_output.weight": "layers/attn/o_proj/kernel",
        "blk.{}.ffn_norm.weight": "layers/mlp_norm/scale",
        "blk.{}.ffn_gate.weight": "layers/mlp/gate_proj/kernel",
        "blk.{}.ffn_up.weight": "layers/mlp/up_proj/kernel",
        "blk.{}.ffn_down.weight": "layers/mlp/down_proj/kernel",
    },
)

# What a tokenizer is built from: tokens, their types and the merges, a string or number for each.
_TOKENIZER_LISTS = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))


def read_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = np.float32,
    scan_layers: bool = True,
    reading: Reading = Reading(),  # noqa: B008 frozen, and the same for all
) -> Checkpoint:
    """Reads a GGUF file of the Llama family.

    One tensor at a time is decoded and cast, so that memory holds the result and little else.

    Args:
      path: The file.
      dtype: Of the parameters.
      scan_layers: Whether the parameters are those of scanned layers (stacked) or of separate ones.
      reading: How tensors are taken in.

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
        config = dataclasses.replace(config, param_dtype=dtype)
        tensors = [_tensor(tensor, config) for tensor in reader.tensors]
        config, params = assemble(
            config, _NAMING, tensors, scan_layers=scan_layers, reading=reading
        )
        tokenizer = _build_tokenizer(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    special = _special_tokens(metadata)
    return Checkpoint(
        config=config,
        params=params,
        tokenizer=tokenizer,
        special=special,
        stop=() if special.eos is None else (special.eos,),
        chat_template=metadata.get("tokenizer.chat_template"),
        name=path.stem,
        digest=digest([path]),
        metadata={key: value for key, value in metadata.items() if key not in _TOKENIZER_LISTS},
    )


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


def _tensor(tensor: gguf.ReaderTensor, config: DecoderConfig) -> Tensor:
    """The tensor as it is to be read: float32 [out, in] or [D], its rows in the decoder's order."""
    turned = {"attn_q.weight": config.num_heads, "attn_k.weight": config.num_kv_heads}
    heads = turned.get(tensor.name.split(".", 2)[-1])

    def read() -> np.ndarray:
        try:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"the tensor {tensor.name!r} is stored as {tensor.tensor_type.name}, "
                "which the gguf package cannot decode."
            ) from error
        return weight if heads is None else _unpermute(weight, heads)

    return Tensor(tensor.name, tuple(int(n) for n in reversed(tensor.shape)), read)


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * H, in] of neighbouring pairs, put in the order of pairs (j, j + H/2)."""
    out, width = weight.shape
    pairs = weight.reshape(heads, out // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(out, width)


def _special_tokens(metadata: Mapping[str, Any]) -> SpecialTokens:
    # Files name a token that could begin a text even if the model was trained without one.
    begins = metadata.get("tokenizer.ggml.add_bos_token", False)
    return SpecialTokens(
        bos=metadata.get("tokenizer.ggml.bos_token_id") if begins else None,
        eos=metadata.get("tokenizer.ggml.eos_token_id"),
    )


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
