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
from lora_jax.formats.peft.fused import Part, fuse, have_gates, parameter_of, stacked, wrappers
from lora_jax.formats.peft.naming import (
    EMBEDDING,
    HEAD,
    ROUTER,
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
    fused_experts: bool | None = None,
) -> None:
    """Writes adapters as a folder that `peft` loads.

    Experts are written as the class has them that the adapters are for. Since its version 5
    transformers has those of a layer in two parameters, `experts.gate_up_proj` and
    `experts.down_proj`, and the router in a third: their adapters are `target_parameters`, for
    which peft has no dropout. Before, each expert had modules of its own. peft turns adapters of
    those into the others when it loads them, but only if gate and up of all layers are adapted, and
    all with one rank and alpha.

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
      fused_experts: whether experts are written as parameters of a layer, or else as modules of
        their own; by default the former of a decoder that has gate, up and down of experts, and the
        latter with `names`.

    Raises:
      ValueError: if the tree holds no adapter, or a leaf that PEFT's format has no place for.
      OSError: if the folder cannot be written.
    """
    record = _record(adapters, names, fan_in_fan_out, fused_experts)
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
    if record.parameters:
        config["target_parameters"] = _target_parameters(record)
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
      ranks, scales: of adapted modules and parameters.
      dropouts: of all of them.
      whole: modules trained whole.
      others: names of the modules that are neither, with a `{}` for each number; None if some
        modules have no name.
      parameters: those that are adapted by themselves.
      possible: names of parameters of the same kinds, whether or not they are adapted.
      experts: by module, parameter and part of it, what the leaves have for a layer's experts.
      is_tied: whether the head is the embedding, and trained with it.
      fan_in_fan_out: whether adapted modules are GPT-2's Conv1D.
    """

    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    dropouts: set[float] = dataclasses.field(default_factory=set)
    whole: set[str] = dataclasses.field(default_factory=set)
    others: set[str] | None = dataclasses.field(default_factory=set)
    parameters: set[str] = dataclasses.field(default_factory=set)
    possible: set[str] = dataclasses.field(default_factory=set)
    experts: dict[str, dict[str, dict[str, Part]]] = dataclasses.field(default_factory=dict)
    is_tied: bool = False
    fan_in_fan_out: bool = False

    def kind(self, name: str) -> str:
        """`q_proj` of `model.layers.0.self_attn.q_proj`; of a parameter `experts.down_proj`."""
        parts = name.split(".")
        return ".".join(parts[-2:] if name in self.possible else parts[-1:])

    def add_adapter(self, path: str, template: str, leaf: Adapter, suffix: str = "") -> None:
        """With a suffix, of the parameter of that name in its module."""
        leaf = jax.tree.map(np.asarray, leaf)
        positions = adapter_indices(path, template, leaf)
        for index in positions:
            module = template.format(*index)
            factors = turned(path, leaf.layout, leaf.a[index], leaf.b[index])
            self.tensors.update(zip(factor_names(path, module), factors, strict=True))
            name = module + suffix
            self.ranks[name], self.scales[name] = leaf.rank, leaf.scale
            if suffix:
                self.parameters.add(name)
        self.dropouts.add(leaf.dropout)
        if suffix:
            everywhere = indices(path, template, leaf.batch_shape)
            self.possible |= {template.format(*index) + suffix for index in everywhere}
        elif self.others is not None and len(positions) < math.prod(leaf.batch_shape):
            self.others.add(template)

    def add_experts(self, path: str, template: str, leaf: Adapter) -> None:
        """Kept until all parts of a parameter are there."""
        leaf = jax.tree.map(np.asarray, leaf)
        live = {index[:-1] for index in adapter_indices(path, template, leaf)}
        for index in np.ndindex(leaf.batch_shape[:-1]):
            expert = parameter_of(template.format(*index, 0))
            assert expert is not None  # or the leaf would not be here
            self.possible.add(f"{expert.module}.{expert.parameter}")
            if index in live:
                parts = self.experts.setdefault(expert.module, {}).setdefault(expert.parameter, {})
                parts[expert.part] = Part(leaf.a[index], leaf.b[index], leaf.scale)
        self.dropouts.add(leaf.dropout)

    def fuse_experts(self) -> None:
        """Each parameter's factors, from those of its parts."""
        for module, kinds in self.experts.items():
            for kind, wrapper in wrappers(module, kinds).items():
                name, part = f"{module}.{kind}", fuse(kind, kinds[kind])
                factors = dict(zip(factor_names("", wrapper), stacked(part), strict=True))
                self.tensors.update(factors)
                self.ranks[name], self.scales[name] = part.a.shape[1], part.scale
                self.parameters.add(name)

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


def _record(
    adapters: Any,
    names: Names | None,
    fan_in_fan_out: str | Sequence[str],
    fused_experts: bool | None,
) -> _Record:
    record = _Record()
    flat, _ = jax.tree_util.tree_flatten_with_path(
        adapters, is_leaf=lambda x: x is None or is_leaf(x)
    )
    leaves = [(path_string(path), leaf) for path, leaf in flat]
    name_of = naming(names, [path for path, _ in leaves])
    conv1d = conv1d_paths(fan_in_fan_out, [path for path, _ in leaves])
    adapted = {path for path, leaf in leaves if isinstance(leaf, Adapter)}
    record.fan_in_fan_out = bool(adapted & conv1d)
    if fused_experts is None:
        fused_experts = names is None and have_gates([name_of(path) or "" for path, _ in leaves])
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
        expert = parameter_of(template) if fused_experts else None
        suffix = ".weight" if fused_experts and path.endswith(ROUTER) else ""
        if expert is not None and "{}" not in expert.module:
            record.possible.add(f"{expert.module}.{expert.parameter}")
        if suffix and "{}" not in template:
            record.possible.add(template + suffix)
        if isinstance(leaf, Adapter) and expert is not None:
            record.add_experts(path, template, leaf)
        elif isinstance(leaf, Adapter):
            record.add_adapter(path, template, leaf, suffix)
        elif leaf is not None and expert is not None:
            raise ValueError(
                f"{path} is trained whole, and peft has no place for that among fused experts; "
                "adapt it, or save the tree with lj.save_adapters"
            )
        elif leaf is not None:
            record.add_whole(path, template, leaf, conv1d)
    record.fuse_experts()
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
        "lora_dropout": 0.0 if record.parameters else next(iter(record.dropouts)),
        "target_modules": _targets(record),
        "rank_pattern": _pattern(record, record.ranks, rank),
        "alpha_pattern": _pattern(record, alphas, alpha),
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
    kept = None if record.others is None else {record.kind(name) for name in record.others}

    def target(module: str) -> str:
        kind = record.kind(module)
        return module if kept is None or kind in kept or kind.isdigit() else kind

    head = {decoder_module(HEAD)} if record.is_tied else set()  # follows its embedding
    modules = record.ranks.keys() - record.parameters - head
    return sorted({target(module) for module in modules})


def _target_parameters(record: _Record) -> list[str]:
    """The same of parameters."""
    kept = {record.kind(name) for name in record.possible - record.parameters}
    kinds = {name: record.kind(name) for name in record.parameters}
    return sorted({name if kind in kept else kind for name, kind in kinds.items()})


def _pattern(record: _Record, values: dict[str, Any], usual: Any) -> dict[str, Any]:
    """What is not as usual, by the short name of a kind where that says enough."""
    of_kind = collections.defaultdict(set)
    for name, value in values.items():
        of_kind[record.kind(name)].add(value)
    return {
        kind if len(of_kind[kind := record.kind(name)]) == 1 else name: _whole_number(value)
        for name, value in sorted(values.items())
        if value != usual
    }


def _most_common(values: dict[str, Any]) -> Any:
    counts = collections.Counter(values.values())
    return max(counts, key=lambda value: (counts[value], value))


def _whole_number(x: float) -> int | float:
    """PEFT's own files hold whole alphas as integers."""
    return int(x) if float(x).is_integer() else x
