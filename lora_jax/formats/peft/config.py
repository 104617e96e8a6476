"""`adapter_config.json`: which modules have an adapter, of which rank and scale.

Fields that change what an adapter computes are understood or refused, never passed over; fields
that only told PEFT how to start or to train one are.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_jax.files import file_in, listed, read_object, shown
from lora_jax.formats.peft.patterns import (
    MOST_STEPS,
    is_pattern,
    matches,
    matches_ending,
    steps,
)

CONFIG = "adapter_config.json"
_LARGEST = 1e30  # alpha, and r
_MOST_PATTERNS = 1_024  # of ranks, or names; a model of 126 layers has 882 modules

# What says nothing about the function that a finished adapter computes. `fan_in_fan_out` is about
# the base, and peft too asks each module instead.
_SILENT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "velora_config", "qalora_group_size", "megatron_core", "fan_in_fan_out"),
}
_UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "ensure_weight_tying"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "target_parameters",
    *("modules_to_save", "rank_pattern", "alpha_pattern"),
}
# What makes another function of the same tensors, or asks for more of them. An empty value is none.
_REFUSED = {
    *("alora_invocation_tokens", "arrow_config", "bias", "kasa_config", "layer_replication"),
    *("lora_bias", "megatron_config", "monteclora_config", "trainable_token_indices"),
    *("use_bdlora", "use_dora", "use_qalora"),
}
# Starts that leave the base as it is; pissa, olora, corda, loftq and lora_ga move it.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
KNOWN = _SILENT | _UNDERSTOOD | _REFUSED | {"init_lora_weights"}


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The fields of `adapter_config.json` that are understood, by PEFT's names for them.

    Attributes:
      r, lora_alpha: of modules that no pattern matches.
      lora_dropout: of all modules.
      use_rslora: whether the scale is alpha / sqrt(r) instead of alpha / r.
      target_modules: names, or one regular expression; None for whatever the file holds.
      exclude_modules: the same for those left out.
      layers_to_transform: the only layers that are adapted, or None.
      layers_pattern: what the list of layers is called, where that is ambiguous.
      modules_to_save: endings of the names of modules that are trained whole.
      rank_pattern, alpha_pattern: what is different, by regular expressions.
      target_parameters: endings of the names of parameters that are adapted without their module.
      ensure_weight_tying: whether a head that is the embedding is trained along with it.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: frozenset[str] | str | None = None
    exclude_modules: frozenset[str] | str = frozenset()
    layers_to_transform: frozenset[int] = frozenset()
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()
    ensure_weight_tying: bool = False

    def is_saved(self, module: str) -> bool:
        """Whether a module is trained whole, or lies in one that is."""
        parts = module.split(".")
        names = (".".join(parts[: k + 1]) for k in range(len(parts)))
        return any(name.endswith(self.modules_to_save) for name in names)

    def is_adapted(self, module: str) -> bool | None:
        """Whether a module has an adapter; None where the config leaves that to the weights."""
        if _named(self.exclude_modules, module) or self.is_saved(module):
            return False
        if self.target_modules in (None, "all-linear"):
            return None
        if not _named(self.target_modules, module):
            return False
        if isinstance(self.target_modules, str) or module in self.target_modules:
            return True  # PEFT restricts to layers only what a short name matched
        return not self.layers_to_transform or self._layer(module) in self.layers_to_transform

    def is_parameter(self, name: str) -> bool:
        """Whether a parameter is adapted by itself."""
        return _named(self.target_parameters, name)

    def _layer(self, module: str) -> int | None:
        """The first number after the name of a list of layers, by default after any name."""
        for pattern in self.layers_pattern or (None,):
            before = r".*?\.[^.]*" if pattern is None else rf"(?:^|.*?\.){pattern}"
            if found := re.match(rf"{before}\.(?P<number>\d+)\.", module):
                return int(found["number"])
        return None

    def rank(self, module: str) -> int:
        """r of a module."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """The factor on `b @ a` of a module."""
        rank, alpha = self.rank(module), _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _named(targets: Collection[str], module: str) -> bool:
    """Whether a regular expression matches all of a name, or one of several is its ending."""
    if isinstance(targets, str):
        return matches(targets, module)
    parts = module.split(".")
    return any(".".join(parts[k:]) in targets for k in range(len(parts)))


def _by_pattern(patterns: Mapping[str, Any], module: str, usual: Any) -> Any:
    """What the first pattern says that matches a name, or the end of it from a dot on."""
    for pattern, value in patterns.items():
        if matches_ending(pattern, module):
            return value
    return patterns.get(module, usual)


def read_config(folder: Path, *, strict: bool = True) -> PeftConfig:
    """Reads `adapter_config.json`.

    Args:
      folder: where it lies.
      strict: whether a field that nobody here knows is an error.

    Raises:
      FileNotFoundError: if it does not.
      ValueError: if it is no JSON object, a field has a value that is none, or one asks for
        something that would be passed over.
    """
    path = file_in(folder, CONFIG)
    if path is None:
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}; expected a folder that peft's save_pretrained wrote."
        )
    options = read_object(path)
    _refuse(options)
    said = {name: value for name, value in options.items() if value}
    if strict and (unknown := _shown(said, said.keys() - KNOWN)):
        raise ValueError(
            f"{CONFIG}: {unknown} is not known here, and may change what the adapter computes; "
            "write strict=False to pass over it, as peft does"
        )
    return _understood(options)


def _shown(options: Mapping[str, Any], names: Collection[str]) -> str:
    """Some fields, as the file has them."""
    return listed(
        f"{_cut(json.dumps(name)[1:-1])} = {_cut(json.dumps(options[name]))}"
        for name in sorted(names)
    )


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def _refuse(options: Mapping[str, Any]) -> None:
    """An error for what would change the function and is not done here."""
    if (kind := options.get("peft_type")) != "LORA":
        raise ValueError(f"{CONFIG}: peft_type is {shown(kind)}; only 'LORA' can be read.")
    start = options.get("init_lora_weights", True)
    if start not in _STARTS:
        raise ValueError(
            f"{CONFIG}: init_lora_weights is {shown(start)}, a start that may have moved the base: "
            "such an adapter does not belong to the model that it names. Save it with peft as an "
            "ordinary one: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if refused := [k for k in _REFUSED if options.get(k) and options[k] != "none"]:
        raise ValueError(
            f"{CONFIG}: {_shown(options, refused)} cannot be honoured, and the adapter would be "
            "another without; merge it with peft's merge_and_unload(), and read the merged model."
        )


def _understood(options: Mapping[str, Any]) -> PeftConfig:
    fields = {field.name: field for field in dataclasses.fields(PeftConfig)}
    values: dict[str, Any] = {}
    for name in fields.keys() & options.keys():
        value = options[name]
        if value is None:
            continue  # PEFT's default, which for these is also what says nothing
        check, expected = _CHECKS[name]
        if not check(value):
            raise ValueError(f"{CONFIG}: {name} is {shown(value)}, expected {expected}.")
        values[name] = value
    for name in ("target_modules", "exclude_modules"):
        if isinstance(values.get(name), list):
            values[name] = frozenset(values[name])
    for name in ("layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters"):
        if name in values:
            several = values[name] if isinstance(values[name], list) else [values[name]]
            values[name] = tuple(several) if name != "layers_to_transform" else frozenset(several)
    return PeftConfig(**values)


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and abs(x) < _LARGEST


def _is_rank(x: Any) -> bool:
    return type(x) is int and 1 <= x < _LARGEST


def _is_list_name(x: Any) -> bool:
    """What a list of layers is called; an expression could take forever to be found in a name."""
    return isinstance(x, str) and re.fullmatch(r"[\w.]+", x) is not None


def _names(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(name, str) for name in x)


def _few_names(x: Any) -> bool:
    return _names(x) and len(x) <= _MOST_PATTERNS


def _patterns(x: Any, check: Any) -> bool:
    return (
        isinstance(x, dict)
        and len(x) <= _MOST_PATTERNS
        and sum(map(steps, x)) <= MOST_STEPS
        and all(map(check, x.values()))
    )


_FLAG = (lambda x: isinstance(x, bool), "true or false")
_NAMES = (
    lambda x: _names(x) or is_pattern(x),
    "a list of names or a regular expression of few repetitions",
)
_CHECKS = {
    "r": (_is_rank, "a whole number of at least 1"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (lambda x: _is_number(x) and 0 <= x < 1, "a probability below 1"),
    "use_rslora": _FLAG,
    "ensure_weight_tying": _FLAG,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": (
        lambda x: all(type(k) is int for k in (x if isinstance(x, list) else [x])),
        "a whole number or a list of them",
    ),
    "layers_pattern": (
        lambda x: _is_list_name(x) or (_few_names(x) and all(map(_is_list_name, x))),
        "a name or a list of them",
    ),
    "modules_to_save": (_few_names, f"a list of at most {_MOST_PATTERNS:,} names"),
    "target_parameters": (_few_names, f"a list of at most {_MOST_PATTERNS:,} names"),
    "rank_pattern": (lambda x: _patterns(x, _is_rank), "ranks by regular expressions"),
    "alpha_pattern": (lambda x: _patterns(x, _is_number), "numbers by regular expressions"),
}
