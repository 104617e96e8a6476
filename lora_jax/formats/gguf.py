"""GGUF files of the Llama family: shape, weights and tokenizer out of one file.

GGUF stores a kernel as `[out, in]`, possibly in blocks of few bits, and keeps the rows of the query
and key projections in an order of its own: llama.cpp turns neighbouring pairs (2j, 2j + 1) of a
head where the decoder turns (j, j + H/2). Reading undoes both::

    blk.{i}.attn_q.weight  [N * H, D]  ->  layers/attn/q_proj/kernel[i]  [D, N * H]

Kernels in Q4_0 and Q4_1 may stay in their four bits. Blocks lie along `in`, so that rows change
places as they are, and nothing is rounded a second time.

Shapes: D model width, N heads, H head width, L layers.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jax.typing import DTypeLike
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lora_jax.core.leaves import QuantizedArray
from lora_jax.files import shown
from lora_jax.formats.checkpoint import (
    Checkpoint,
    Naming,
    Reading,
    SpecialTokens,
    Tensor,
    assemble,
    digest,
)
from lora_jax.formats.gguf_file import GgufTensor, read_head
from lora_jax.models.decoder import DecoderConfig, parameter_shapes
from lora_jax.models.families import from_gguf
from lora_jax.models.fields import LARGEST, Fields

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

# The types that a kernel may stay in, by what the core calls them.
_PACKED = {"Q4_0": "q4_0", "Q4_1": "q4_1"}
_BLOCK = 32  # elements of a block of either
# The types without scales. A value of theirs that is NaN is the model's own, and read as it is.
_PLAIN = ("F32", "F16", "BF16")

# What a tokenizer is built from: tokens, their types and the merges, a string or number for each.
TOKENIZER_LISTS = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))


def read_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = np.float32,
    scan_layers: bool = True,
    packed: bool = False,
    reading: Reading = Reading(),  # noqa: B008 frozen, and the same for all
) -> Checkpoint:
    """Reads a GGUF file of the Llama family.

    One tensor at a time is decoded and cast, so that memory holds the result and little else.

    Args:
      path: The file.
      dtype: Of the parameters.
      scan_layers: Whether the parameters are those of scanned layers (stacked) or of separate ones.
      packed: Whether kernels in Q4_0 and Q4_1 stay as they are: a `QuantizedArray` of that kind,
        which decodes to the values that are read otherwise, bit for bit. Layers in both that are to
        be stacked are all of kind `"q4_1"`, to which Q4_0 goes over without a loss (of the sign of
        its zeros alone).
      reading: How tensors are taken in.

    Returns:
      The checkpoint.

    Raises:
      FileNotFoundError: If there is no file.
      ValueError: If it is no GGUF file, ends too early, or holds a model that cannot be read
        faithfully; or if kernels are to stay packed and none is, or not all of those that are to
        be stacked.
    """
    path = Path(path)
    metadata, stored = read_head(path)
    try:
        tied_head = all(tensor.name != "output.weight" for tensor in stored)
        config = from_gguf(metadata, tied_head=tied_head)
        config = dataclasses.replace(config, param_dtype=dtype)
        staying = _packed_kernels(stored, config, scan_layers) if packed else {}
        tensors = [_tensor(tensor, config, staying.get(tensor.name)) for tensor in stored]
        config, params = assemble(
            config, _NAMING, tensors, scan_layers=scan_layers, reading=reading
        )
        tokenizer, special = _build_tokenizer(metadata), special_tokens(metadata)
        template = chat_template(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Checkpoint(
        config=config,
        params=params,
        tokenizer=tokenizer,
        special=special,
        stop=() if special.eos is None else (special.eos,),
        chat_template=template,
        name=path.stem,
        digest=digest([path]),
        metadata={key: value for key, value in metadata.items() if key not in TOKENIZER_LISTS},
    )


def _packed_kernels(
    tensors: Iterable[GgufTensor], config: DecoderConfig, scan_layers: bool
) -> dict[str, str]:
    """The kernels that may stay in 4 bits by their names, and the kind that each is to have."""
    places = _NAMING.places(config, parameter_shapes(config))
    kernels = {name for name, place in places.items() if place.path.endswith("/kernel")}
    types = {x.name: x.kind.name for x in tensors if x.name in kernels}
    found = {name: _PACKED[kind] for name, kind in types.items() if kind in _PACKED}
    if types and not found:
        counts = collections.Counter(types.values())
        raise ValueError(
            "no kernel is stored as Q4_0 or Q4_1, and so none can stay packed; they are stored as "
            f"{', '.join(f'{kind} ({count})' for kind, count in counts.items())}."
        )
    if not scan_layers:
        return found
    # llama.cpp writes some layers of a Q4_0 file in Q4_1, where it knows that they need it.
    kinds = collections.defaultdict(set)
    for name, kind in found.items():
        kinds[places[name].path].add(kind)
    return {name: "q4_1" if "q4_1" in kinds[places[name].path] else "q4_0" for name in found}


def _tensor(tensor: GgufTensor, config: DecoderConfig, kind: str | None) -> Tensor:
    """The tensor as it is to be read, its rows in the decoder's order.

    That is float32 [out, in] or [D], or what stays packed of the given kind.
    """
    turned = {"attn_q.weight": config.num_heads, "attn_k.weight": config.num_kv_heads}
    heads = turned.get(tensor.name.split(".", 2)[-1])

    def read() -> np.ndarray | QuantizedArray:
        rows = tensor.read()
        rows = rows if heads is None else _unpermute(rows, heads)
        if kind is not None:
            return _repack(tensor.name, rows, _PACKED[tensor.kind.name], kind, config.param_dtype)
        return _decoded(tensor, rows)

    return Tensor(tensor.name, tensor.shape, read)


def _decoded(tensor: GgufTensor, rows: np.ndarray) -> np.ndarray:
    """The values of rows of bytes in float32."""
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # scales that are not finite: see below
            values = gguf.dequantize(rows, tensor.kind)
    except NotImplementedError as error:
        raise ValueError(
            f"the tensor {tensor.name!r} is stored as {tensor.kind.name}, "
            "which the gguf package cannot decode."
        ) from error
    if tensor.kind.name not in _PLAIN and not np.isfinite(values).all():
        raise _spoilt(tensor.name)
    return values


def _spoilt(name: str) -> ValueError:
    return ValueError(f"the scales of {name} are NaN or infinite; fetch the file again")


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * H, ...] of neighbouring pairs, put in the order of pairs (j, j + H/2)."""
    out, width = rows.shape
    pairs = rows.reshape(heads, out // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(out, width)


def _repack(
    name: str, rows: np.ndarray, stored: str, kind: str, dtype: DTypeLike
) -> QuantizedArray:
    """Rows of blocks, `[out, bytes]`, as a leaf of the same codes.

    A block is a float16 scale, in Q4_1 a float16 minimum, and 16 bytes. Byte k holds element k in
    its low and element k + 16 in its high nibble, where the leaf has neighbours in a byte.
    """
    head = 4 if stored == "q4_1" else 2  # bytes
    blocks = rows.reshape(len(rows), -1, head + _BLOCK // 2)  # [out, in/32, bytes of a block]
    halves = np.ascontiguousarray(blocks[..., :head]).view(np.float16)
    if not np.isfinite(halves).all():
        raise _spoilt(name)
    nibbles = blocks[..., head:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)  # [out, in/32, 32]
    codes = codes.reshape(len(rows), -1)
    scales, minimum = halves[..., 0].copy(), None
    if kind == "q4_1":
        # (code - 8) d is code d - 8 d, all of which are exact.
        minimum = halves[..., 1].copy() if stored == "q4_1" else -8 * scales
    return QuantizedArray(
        (codes[:, ::2] << 4) | codes[:, 1::2],
        scales,
        minimum=minimum,
        kind=kind,
        block_size=_BLOCK,
        dtype=np.dtype(dtype),
        layout="o i",
        axis_sizes=codes.shape,
    )


def special_tokens(metadata: Mapping[str, Any]) -> SpecialTokens:
    """The tokens around a text, as a file's metadata name them.

    Raises:
      ValueError: If they are no tokens.
    """
    fields = Fields(metadata, "the GGUF metadata")
    tokens = fields.get(TOKENIZER_LISTS[0])
    most = len(tokens) if isinstance(tokens, list) else LARGEST

    def token(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = fields.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < most):
            raise fields.wrong(key, value, f"a token, of which there are {most:,}")
        return value

    # Files name a token that could begin a text even if the model was trained without one.
    begins = fields.flag("tokenizer.ggml.add_bos_token")
    return SpecialTokens(bos=token("bos") if begins else None, eos=token("eos"))


def chat_template(metadata: Mapping[str, Any]) -> str | None:
    """The Jinja template of a file's metadata, if there is one.

    Raises:
      ValueError: If it is no text.
    """
    fields, key = Fields(metadata, "the GGUF metadata"), "tokenizer.chat_template"
    if not isinstance(template := fields.get(key), str | None):
        raise fields.wrong(key, template, "a text")
    return template


def _build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that the metadata describes."""
    kind, splitter = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if (kind, splitter) != ("gpt2", "smollm"):
        raise ValueError(
            f"the tokenizer is of model {shown(kind)} with pre-tokenizer {shown(splitter)}; "
            "only 'gpt2' with 'smollm' can be built."
        )
    for key, element in zip(TOKENIZER_LISTS, (str, int, str), strict=True):
        if key not in metadata:
            raise ValueError(f"the GGUF metadata lacks {key!r}, without which no text can be read.")
        values = metadata[key]
        if not isinstance(values, list) or any(type(x) is not element for x in values):
            raise ValueError(f"{key} is {shown(values)}, expected a list of {element.__name__}.")
    tokens, types, merges = (metadata[key] for key in TOKENIZER_LISTS)
    if len(types) != len(tokens):
        raise ValueError(f"there are {len(types):,} types of {len(tokens):,} tokens.")
    try:
        model = models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(
            f"the tokenizer's vocabulary and merges do not fit: {shown(str(error))}."
        ) from error
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
