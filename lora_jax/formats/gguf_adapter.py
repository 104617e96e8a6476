"""Adapters in llama.cpp's GGUF format, for `llama-server --lora` and what is built on it.

    general.type         "adapter"          blk.{i}.attn_q.weight.lora_a  [r, in]
    adapter.type         "lora"             blk.{i}.attn_q.weight.lora_b  [out, r]
    adapter.lora.alpha   float32            blk.{i}.ffn_up_exps.weight.lora_a  [E, r, in]
                                            token_embd.weight.lora_a  [V, r],  .lora_b  [D, r]

llama.cpp adds `alpha / r · lora_b @ lora_a`, with one alpha for all tensors. An alpha of zero
would mean no factor at all, so that none is written. Rows of the base's query and key kernels lie
in an order of their own for the architecture `llama` (see gguf.py), and so do those of B.

Shapes: r rank, `in` contracted, `out` produced, E experts, V vocabulary, D width, H head width.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
from jax.typing import DTypeLike

from lora_jax.core.leaves import Adapter
from lora_jax.core.tree import named_leaves
from lora_jax.formats.peft.naming import EMBEDDING, adapter_indices, decoder_module
from lora_jax.formats.peft.write import alpha_of
from lora_jax.formats.whole import written_whole
from lora_jax.models.config import DecoderConfig

# Whether an architecture's query and key rows are in llama.cpp's order of pairs. Others may move
# more than these rows, and are left out until somebody has looked.
_ARCHITECTURES = {
    "llama": True,
    "qwen2": False,
    "qwen3": False,
    "qwen3moe": False,
    "gemma": False,
    "gemma2": False,
    "gemma3": False,
}
_DTYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
}
_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
}


def write_gguf_adapter(
    path: str | os.PathLike[str],
    adapters: Any,
    config: DecoderConfig,
    *,
    architecture: str = "llama",
    base_model: str | None = None,
    dtype: DTypeLike = np.float32,
) -> None:
    """Writes a decoder's adapters as a GGUF file that llama.cpp loads beside the model's own.

    Where the adapters' alphas differ, the commonest is the file's, and B of the others is
    multiplied by what is left of theirs, in float32 and before it is cast. The file appears whole
    or not at all.

    Args:
      path: the file.
      adapters: of an `lj.models` decoder, scanned or unrolled. Layers of a scanned leaf whose A
        and B are both zero are left out.
      config: of the decoder.
      architecture: what the model's GGUF file says in `general.architecture`.
      base_model: what the model is called, for the record.
      dtype: of the tensors: float32, float16 or bfloat16.

    Raises:
      ValueError: if the tree holds no adapter, or something that llama.cpp has no adapter for:
        leaves trained whole, an embedding that is the head as well, an architecture of unknown
        order.
      OSError: if the file cannot be written.
    """
    kind = np.dtype(dtype).name
    if kind not in _DTYPES:
        raise ValueError(f"dtype is {kind}; write one of {', '.join(_DTYPES)}")
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"architecture is {architecture!r}, for which the order of the rows is not known; "
            f"write one of {', '.join(_ARCHITECTURES)}"
        )
    updates = list(_updates(adapters, config, architecture))
    if not updates:
        raise ValueError("the tree holds no adapters, expected what init_adapters returns")
    alphas = collections.Counter(update.alpha for update in updates if update.alpha)
    alpha = max(alphas, key=lambda x: (alphas[x], x)) if alphas else 1.0
    path = Path(path)
    with written_whole(path) as (partial,):
        writer = gguf.GGUFWriter(partial, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(_FILE_TYPES[kind])
        if base_model is not None:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, base_model)
        for update in updates:
            b = update.b
            if update.alpha != alpha:
                b = b.astype(np.float32) * np.float32(update.alpha / alpha)
            for factor, values in (("lora_a", update.a), ("lora_b", b)):
                data = gguf.quantize(np.ascontiguousarray(values, np.float32), _DTYPES[kind])
                writer.add_tensor(f"{update.name}.{factor}", data, raw_dtype=_DTYPES[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@dataclasses.dataclass(frozen=True)
class _Update:
    """A tensor's update `alpha / r · b @ a`, in llama.cpp's axes."""

    name: str
    a: np.ndarray
    b: np.ndarray
    alpha: float


def _updates(adapters: Any, config: DecoderConfig, architecture: str) -> Iterator[_Update]:
    names = gguf.get_tensor_name_map(_architecture(architecture), config.num_layers)
    for path, leaf in named_leaves(adapters):
        template = decoder_module(path)
        if template is None:
            raise ValueError(
                f"{path} has no place in a GGUF adapter; expected an lj.models decoder"
            )
        if not isinstance(leaf, Adapter):
            raise ValueError(
                f"{path} is trained whole, which llama.cpp has no adapter for; write the whole "
                "model, or leave it out of train="
            )
        if path == EMBEDDING and config.tied_head:
            raise ValueError(
                f"{path} is the head as well, and llama.cpp has no adapter for a tensor that is "
                "both; leave it out of the rules"
            )
        leaf = jax.tree.map(np.asarray, leaf)
        for module, part in _tensors(path, template, leaf):
            name = names.get_name(module)
            if name is None:
                raise ValueError(f"{path} has no tensor in the architecture {architecture!r}")
            alpha = alpha_of(part.scale, part.rank)
            a, b = part.a, part.b
            if path == EMBEDDING:
                a, b = (b, a.T) if part.layout == "o i" else (a.T, b)
            elif _ARCHITECTURES[architecture] and name.endswith(("attn_q", "attn_k")):
                heads = config.num_heads if name.endswith("attn_q") else config.num_kv_heads
                b = _permuted(path, b, heads, config.head_dim)
            yield _Update(f"{name}.weight", a, b, alpha)


def _architecture(name: str) -> Any:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _tensors(path: str, template: str, leaf: Adapter) -> Iterator[tuple[str, Adapter]]:
    """The shares of a leaf that are tensors of their own there: layers are, experts are not."""
    is_expert = ".experts.{}" in template
    module = template.replace(".experts.{}", ".experts")
    for index in _layers(path, template, leaf, is_expert):
        part = jax.tree.map(lambda x, k=index: x[k], leaf)
        yield module.format(*index), part


def _layers(path: str, template: str, leaf: Adapter, is_expert: bool) -> list[tuple[int, ...]]:
    """Positions on the axis of layers, if there is one, of those that are adapted."""
    positions = adapter_indices(path, template, leaf)
    return sorted({k[: len(k) - is_expert] for k in positions})


def _permuted(path: str, b: np.ndarray, heads: int, width: int) -> np.ndarray:
    """Rows of pairs (j, j + H/2) of each head, put next to each other: undoes gguf's reading."""
    out, rank = b.shape
    if out != heads * width:
        raise ValueError(
            f"the adapter of {path} produces {out} rows, and the config has {heads} heads of "
            f"{width}; write the config of the decoder that the adapters are for"
        )
    return b.reshape(heads, 2, width // 2, rank).swapaxes(1, 2).reshape(out, rank)
