"""PEFT adapter folders: what `peft` and everything built on it reads and writes.

    adapter_config.json          rank, alpha, target modules
    adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight ...

A tensor is named after the torch module that it belongs to. Scanned layers are one leaf here and
one module a layer there:

    layers/attn/q_proj/kernel [L, ...]  ->  model.layers.{0..L-1}.self_attn.q_proj

Shapes: L layers, r rank, `in` contracted, `out` produced; a [L, r, in] is L times lora_A [r, in].
"""

from __future__ import annotations

import collections
import json
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.typing import DTypeLike

from lora_jax.core.leaves import Adapter
from lora_jax.core.rules import path_string
from lora_jax.core.tree import named_leaves

_PREFIX = "base_model.model."
# The decoder's parts that transformers calls otherwise; `q_proj`, `mlp` and their like agree.
_PARTS = {
    "attn": "self_attn",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
_WHOLE_MODELS = {
    "embed/embedding": "model.embed_tokens",
    "final_norm/scale": "model.norm",
    "lm_head/kernel": "lm_head",
}


def write_peft(
    path: str | os.PathLike[str],
    adapters: Any,
    *,
    base_model: str,
    task_type: str = "CAUSAL_LM",
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a decoder's adapters as a folder that `peft` loads.

    Each of the two files appears whole or not at all, so an older adapter there is replaced by a
    complete one.

    Args:
      path: the folder, made if need be.
      adapters: of an `lj.models` decoder, scanned or unrolled.
      base_model: where the base is found by others: a name on the hub, or a path.
      task_type: as PEFT calls it.
      dtype: of the tensors on disk, such as `np.float16`; their own, if None.

    Raises:
      ValueError: if the tree holds no adapter, or a leaf that PEFT's format has no place for.
      OSError: if the folder cannot be written.
    """
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}  # by module
    alphas: dict[str, float] = {}
    dropouts: set[float] = set()
    whole: list[str] = []
    for leaf_path, leaf in named_leaves(adapters):
        for module, part in _modules(leaf_path, leaf):
            if isinstance(part, Adapter):
                tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.asarray(part.a, dtype)
                tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.asarray(part.b, dtype)
                ranks[module], alphas[module] = part.rank, part.scale * part.rank
                dropouts.add(part.dropout)
            else:
                weight = np.asarray(part, dtype)
                weight = weight.T if leaf_path.endswith("kernel") else weight  # [out, in]
                tensors[f"{_PREFIX}{module}.weight"] = weight
                whole.append(module)
    if not ranks:
        raise ValueError("the tree holds no adapters, expected what init_adapters returns")
    if len(dropouts) > 1:
        raise ValueError(
            f"the adapters have dropouts {sorted(dropouts)}, and PEFT knows one for all; "
            "write rules with the same dropout"
        )
    rank, alpha = (_most_common(values) for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _whole_number(alpha),
        "lora_dropout": dropouts.pop(),
        "target_modules": _targets(list(ranks), _number_of_layers(adapters)),
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "use_rslora": False,  # whatever the rule was, lora_alpha / r is the scale here
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "inference_mode": True,
    }
    if whole:
        config["modules_to_save"] = whole
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    _write_whole(folder / "adapter_model.safetensors", weights)
    _write_whole(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())


def _modules(path: str, leaf: Any) -> Iterator[tuple[str, Any]]:
    """The torch modules that a leaf stands for, each with its share of it."""
    if (layer := re.fullmatch(r"layers(?:_(\d+))?/(.+)/(kernel|scale)", path)) is None:
        if path not in _WHOLE_MODELS or (path == "embed/embedding" and isinstance(leaf, Adapter)):
            raise ValueError(
                f"{path} has no place in a PEFT adapter; expected kernels and norms of an "
                "lj.models decoder (save others with lj.save_adapters)"
            )
        yield _WHOLE_MODELS[path], leaf
        return
    number, parts, _ = layer.groups()
    name = ".".join(_PARTS.get(part, part) for part in parts.split("/"))
    if number is not None:
        yield f"model.layers.{number}.{name}", leaf
        return
    leaf = jax.tree.map(np.asarray, leaf)
    for index in range(jax.tree.leaves(leaf)[0].shape[0]):
        yield f"model.layers.{index}.{name}", jax.tree.map(operator.itemgetter(index), leaf)


def _number_of_layers(adapters: Any) -> int:
    """Layers of the decoder, those without adapters included."""
    leaves = jax.tree_util.tree_leaves_with_path(
        adapters, is_leaf=lambda x: x is None or isinstance(x, Adapter)
    )
    numbers = {0}
    for path, leaf in leaves:
        if unrolled := re.match(r"layers_(\d+)/", path_string(path)):
            numbers.add(int(unrolled[1]) + 1)
        elif isinstance(leaf, Adapter) and path_string(path).startswith("layers/"):
            numbers.add(leaf.a.shape[0])
    return max(numbers)


def _targets(modules: list[str], layers: int) -> list[str]:
    """The short name of a kind that is adapted in every layer, else whole names."""
    kinds = collections.Counter(map(_kind, modules))
    return sorted({_kind(name) if kinds[_kind(name)] == layers else name for name in modules})


def _pattern(values: dict[str, Any], usual: Any) -> dict[str, Any]:
    """What is not as usual, by the short name of a kind where that says enough."""
    of_kind = collections.defaultdict(set)
    for module, value in values.items():
        of_kind[_kind(module)].add(value)
    return {
        _kind(module) if len(of_kind[_kind(module)]) == 1 else module: _whole_number(value)
        for module, value in values.items()
        if value != usual
    }


def _kind(module: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj`."""
    return module.rpartition(".")[2]


def _most_common(values: dict[str, Any]) -> Any:
    return collections.Counter(values.values()).most_common(1)[0][0]


def _whole_number(x: float) -> int | float:
    """PEFT's own files hold whole alphas as integers."""
    return int(x) if float(x).is_integer() else x


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the content
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
