"""Writing a tree of adapters as a folder that `peft` loads."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.typing import DTypeLike

from lora_jax.core.leaves import Adapter, is_leaf
from lora_jax.core.rules import path_string
from lora_jax.formats.peft.config import CONFIG
from lora_jax.formats.peft.naming import (
    EMBEDDING,
    HEAD,
    Names,
    adapter_indices,
    conv1d_paths,
    decoder_module,
    factor_names,
    indices,
    is_turned,
    naming,
    parameter,
    turned,
)
from lora_jax.formats.peft.weights import PREFIX, WEIGHTS
from lora_jax.formats.whole import written_whole

_DIGITS = 12  # more than an alpha that somebody chose has


def write_peft(
    path: str | os.PathLike[str],
    adapters: Any,
    *,
    base_model: str,
    task_type: str | None = "CAUSAL_LM",
    dtype: DTypeLike | None = None,
    names: Names | None = None,
    fan_in_fan_out: str | Sequence[str] = (),
) -> None:
    """Writes adapters as a folder that `peft` loads.

    The same adapters give the same bytes, and so do those that `read_peft` reads of them. Both
    files are complete before either takes its place, so an older adapter stays until then.

    Args:
      path: the folder, made if need be.
      adapters: of an `lj.models` decoder, scanned or unrolled, or of any model with `names`.
        Layers of a scanned leaf whose A and B are both zero are left out, as layers without an
        adapter.
      base_model: where the base is found by others: a name on the hub, or a path.
      task_type: as PEFT calls it; None for a model that has none of its tasks.
      dtype: of the tensors on disk, such as `np.float16`; their own, if None.
      names: what torch calls the module of a leaf, by the leaf's path, with a `{}` for each batch
        axis: `{"h/attn/c_attn/kernel": "transformer.h.{}.attn.c_attn"}`, or a function.
      fan_in_fan_out: patterns of the leaves that torch has as [in, out], as in GPT-2's Conv1D.

    Raises:
      ValueError: if the tree holds no adapter, or a leaf that PEFT's format has no place for.
      OSError: if the folder cannot be written.
    """
    record = _record(adapters, names, fan_in_fan_out)
    if not record.ranks:
        raise ValueError("the tree holds no adapters, expected what init_adapters returns")
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        **_described(record),
        "use_dora": False,
        "fan_in_fan_out": record.fan_in_fan_out,
        "bias": "none",
        "inference_mode": True,
    }
    if record.whole:
        config["modules_to_save"] = sorted(record.whole)
    if record.is_tied:
        config["ensure_weight_tying"] = True
    tensors = {
        PREFIX + name: np.ascontiguousarray(np.asarray(value, dtype))
        for name, value in record.tensors.items()
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / WEIGHTS, folder / CONFIG) as (weights, description):
        weights.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
        description.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@dataclasses.dataclass
class _Record:
    """What is to be written, by torch module.

    Attributes:
      tensors: by their names in the file.
      ranks, scales: of adapted modules.
      dropouts: of all of them.
      whole: modules trained whole.
      others: names of the modules that are neither, with a `{}` for each number; None if some
        modules have no name.
      is_tied: whether the head is the embedding, and trained with it.
      fan_in_fan_out: whether adapted modules are GPT-2's Conv1D.
    """

    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    dropouts: set[float] = dataclasses.field(default_factory=set)
    whole: set[str] = dataclasses.field(default_factory=set)
    others: set[str] | None = dataclasses.field(default_factory=set)
    is_tied: bool = False
    fan_in_fan_out: bool = False

    def add_adapter(self, path: str, template: str, leaf: Adapter) -> None:
        leaf = jax.tree.map(np.asarray, leaf)
        positions = adapter_indices(path, template, leaf)
        for index in positions:
            module = template.format(*index)
            factors = turned(path, leaf.layout, leaf.a[index], leaf.b[index])
            self.tensors.update(zip(factor_names(path, module), factors, strict=True))
            self.ranks[module], self.scales[module] = leaf.rank, leaf.scale
        self.dropouts.add(leaf.dropout)
        if self.others is not None and len(positions) < math.prod(leaf.batch_shape):
            self.others.add(template)

    def add_tied_head(self, leaf: Any) -> None:
        """The embedding's share once more, as peft has it with `ensure_weight_tying`."""
        self.is_tied = True
        embedding, head = str(decoder_module(EMBEDDING)), str(decoder_module(HEAD))
        if not isinstance(leaf, Adapter):
            self.tensors[f"{head}.weight"] = self.tensors[f"{embedding}.weight"]
            return
        a, b = (self.tensors[name].T for name in reversed(factor_names(EMBEDDING, embedding)))
        self.tensors.update(zip(factor_names(HEAD, head), (a, b), strict=True))
        self.ranks[head], self.scales[head] = leaf.rank, leaf.scale

    def add_whole(self, path: str, template: str, leaf: Any, conv1d: set[str]) -> None:
        leaf = np.asarray(leaf)
        numbered = template.count("{}")
        if leaf.ndim - numbered > 2:
            raise ValueError(
                f"{path} is trained whole and has axes {leaf.shape[numbered:]}, which PEFT has no "
                "place for; only matrices and vectors can be written (save it with "
                "lj.save_adapters)"
            )
        turn = is_turned(path, leaf.ndim - numbered, conv1d)
        for index in indices(path, template, leaf.shape):
            module = template.format(*index)
            self.tensors[f"{module}.{parameter(path)}"] = leaf[index].T if turn else leaf[index]
            self.whole.add(module)


def _record(adapters: Any, names: Names | None, fan_in_fan_out: str | Sequence[str]) -> _Record:
    record = _Record()
    flat, _ = jax.tree_util.tree_flatten_with_path(
        adapters, is_leaf=lambda x: x is None or is_leaf(x)
    )
    leaves = [(path_string(path), leaf) for path, leaf in flat]
    name_of = naming(names, [path for path, _ in leaves])
    conv1d = conv1d_paths(fan_in_fan_out, [path for path, _ in leaves])
    adapted = {path for path, leaf in leaves if isinstance(leaf, Adapter)}
    record.fan_in_fan_out = bool(adapted & conv1d)
    kinds = collections.defaultdict(set)  # of the leaves that one module has
    for path, leaf in leaves:
        template = name_of(path)
        if template is None:
            if leaf is not None:
                raise ValueError(
                    f"{path} has no place in a PEFT adapter; expected kernels and norms of an "
                    "lj.models decoder, or names= that says what torch calls it (save others with "
                    "lj.save_adapters)"
                )
            record.others = None
            continue
        kinds[template].add(type(leaf) if isinstance(leaf, Adapter | None) else "whole")
        if isinstance(leaf, Adapter):
            record.add_adapter(path, template, leaf)
        elif leaf is not None:
            record.add_whole(path, template, leaf, conv1d)
    tree = dict(leaves)
    if names is None and HEAD not in tree and tree.get(EMBEDDING) is not None:
        record.add_tied_head(tree[EMBEDDING])
    if record.others is not None:
        record.others |= {name for name, found in kinds.items() if Adapter not in found}
    if split := [name for name, found in kinds.items() if "whole" in found and len(found) > 1]:
        raise ValueError(
            f"only some leaves of the module {split[0]} are trained whole, and PEFT saves modules; "
            "write train= so that it matches all of its leaves (kernel and bias), or none"
        )
    if len(record.dropouts) > 1:
        raise ValueError(
            f"the adapters have dropouts {sorted(record.dropouts)}, and PEFT knows one for all; "
            "write rules with the same dropout"
        )
    return record


# The config: names as short, and patterns as few, as say the same.


def _described(record: _Record) -> dict[str, Any]:
    stabilized, alphas = _alphas(record)
    rank, alpha = _most_common(record.ranks), _most_common(alphas)
    return {
        "r": rank,
        "lora_alpha": _whole_number(alpha),
        "lora_dropout": next(iter(record.dropouts)),
        "target_modules": _targets(record),
        "rank_pattern": _pattern(record.ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "use_rslora": stabilized,
    }


def _alphas(record: _Record) -> tuple[bool, dict[str, float]]:
    """Whether to write rsLoRA, and the alphas.

    A scale that came of alpha / sqrt(r) is seldom a float64 divided by r: as a plain alpha it
    needs all its digits and loses a bit. Where rsLoRA has it in a few, it was rsLoRA.
    """
    plain, stabilized = (
        {
            module: alpha_of(record.scales[module], math.sqrt(rank) if is_stabilized else rank)
            for module, rank in record.ranks.items()
        }
        for is_stabilized in (False, True)
    )
    longest = [max(len(repr(alpha)) for alpha in x.values()) for x in (plain, stabilized)]
    is_stabilized = longest[0] > _DIGITS >= longest[1]
    return is_stabilized, stabilized if is_stabilized else plain


def alpha_of(scale: float, divisor: float) -> float:
    """The number of fewest digits that gives `scale` when it is divided, to the last bit if any."""
    product = scale * divisor
    candidates = (float(f"{product:.{digits}g}") for digits in range(1, 18))
    return next((alpha for alpha in candidates if alpha / divisor == scale), product)


def _targets(record: _Record) -> list[str]:
    """The short name of a kind where it says enough, else whole names."""
    kept = None if record.others is None else {_kind(name) for name in record.others}

    def target(module: str) -> str:
        kind = _kind(module)
        return module if kept is None or kind in kept or kind.isdigit() else kind

    head = {decoder_module(HEAD)} if record.is_tied else set()  # follows its embedding
    return sorted({target(module) for module in record.ranks if module not in head})


def _pattern(values: dict[str, Any], usual: Any) -> dict[str, Any]:
    """What is not as usual, by the short name of a kind where that says enough."""
    of_kind = collections.defaultdict(set)
    for module, value in values.items():
        of_kind[_kind(module)].add(value)
    return {
        _kind(module) if len(of_kind[_kind(module)]) == 1 else module: _whole_number(value)
        for module, value in sorted(values.items())
        if value != usual
    }


def _kind(module: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj`."""
    return module.rpartition(".")[2]


def _most_common(values: dict[str, Any]) -> Any:
    counts = collections.Counter(values.values())
    return max(counts, key=lambda value: (counts[value], value))


def _whole_number(x: float) -> int | float:
    """PEFT's own files hold whole alphas as integers."""
    return int(x) if float(x).is_integer() else x
