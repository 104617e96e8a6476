"""Reading a PEFT folder into a tree of adapters.

The base says which modules there are and of which shape, the config which of them have an adapter.
So every tensor that must be there is known before one is read.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.core.leaves import Adapter
from lora_jax.core.tree import combine, map_leaves, named_leaves
from lora_jax.formats.peft.config import PeftConfig, read_config
from lora_jax.formats.peft.fused import Fused, find_fused, fused_shapes, fused_shares
from lora_jax.formats.peft.naming import Names, adapter_indices, naming, parameter, turned
from lora_jax.formats.peft.places import Place, all_places
from lora_jax.formats.peft.repeats import Repeats, find_repeats, has_tied_head, refuse_untied
from lora_jax.formats.peft.weights import Weights, open_weights

_LISTED = 6  # names that an error lists of those that are wrong
_SEPARATE = "read it into a base of separate layers (scan_layers=False)"


def read_peft(
    path: str | os.PathLike[str],
    base: Any,
    *,
    strict: bool = True,
    dtype: DTypeLike | None = None,
    names: Names | None = None,
    layouts: Mapping[str, str] | None = None,
    fan_in_fan_out: str | Sequence[str] = (),
) -> Any:
    """Reads a folder that `peft` or `write_peft` wrote.

    Layers of a scanned leaf that have no adapter get zeros for A and B, which change nothing and
    learn nothing; `write_peft` leaves them out again.

    >>> adapters = read_peft("folder", base)
    >>> logits = lj.adapt(model.apply)({"params": lj.combine(base, adapters)}, tokens)

    Args:
      path: the folder.
      base: the parameters it is for, dense or quantized, or their shapes: of an `lj.models`
        decoder, scanned or unrolled, or of any model with `names`.
      strict: whether it is an error if tensors are missing, have no place in the base, or are of
        another shape, and if the config has fields that are not known. If not, they are passed
        over, as peft does with most of them.
      dtype: of what is read; as it is on disk, if None (but float64 only where JAX has x64).
      names: what torch calls the module of a leaf, by the leaf's path, with a `{}` for each batch
        axis: `{"h/attn/c_attn/kernel": "transformer.h.{}.attn.c_attn"}`, or a function.
      layouts: by patterns searched in paths, the layout of dense leaves that have more than two
        axes besides those that `names` numbers, such as `{"query/kernel": "b i o o"}`.
      fan_in_fan_out: patterns of the leaves that torch has as [in, out], as in GPT-2's Conv1D.
        This matters for what was trained whole.

    Returns:
      A tree of the base's structure: an `Adapter` where a module is adapted, an array where it was
      trained whole, None elsewhere.

    Raises:
      FileNotFoundError: if the folder or a file in it is missing.
      ValueError: if the weights are pickled or broken, the config asks for something that cannot
        be honoured, the tensors are not those that config and base ask for, or layers of a scanned
        leaf differ in a way that one leaf cannot express.
    """
    folder = Path(path)
    try:
        weights = open_weights(folder)
        config = read_config(folder, strict=strict)
        name_of = naming(names, [path for path, _ in named_leaves(base)])
        places = all_places(base, name_of, layouts or {}, fan_in_fan_out)
        fused = find_fused(config, places)
        joined = {place for parameter in fused for parts in parameter.places for place in parts}
        apart = [place for place in places if place not in joined]
        adapted, whole = _wanted(config, apart, weights)
        if is_tied := names is None and has_tied_head(base):
            refuse_untied(config, [*adapted, *whole])
        expected = _expected(config, adapted, whole) | fused_shapes(fused)
        if strict:
            repeats = find_repeats(weights, base, adapted, whole, is_tied)
            _compare(expected, weights, repeats)
        found = {name for name, shape in expected.items() if weights.shapes.get(name) == shape}
        read = functools.partial(weights.read, dtype=dtype)
        shares = _shares(config, found, read, adapted, whole, fused)
        adapters = map_leaves(lambda at, leaf: _gathered(at, leaf, shares.get(at)), base)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    combine(base, adapters)  # checks the shapes
    return adapters


# What there is, and what is wanted.


def _wanted(
    config: PeftConfig, places: list[Place], weights: Weights
) -> tuple[list[Place], list[Place]]:
    """The modules that have an adapter, and those that were trained whole."""
    adapted, whole = [], []
    for place in places:
        if config.is_saved(place.module):
            whole.append(place)
            continue
        is_adapted = config.is_adapted(place.module)
        if is_adapted is None:
            is_adapted = any(name in weights.shapes for name in place.factors)
        if not is_adapted or parameter(place.path) == "bias" or len(place.shape) < 2:
            continue
        if place.layout is None:
            raise ValueError(
                f"{place.module} has an adapter, but {place.path} has axes {place.shape} there; "
                'write layouts={"pattern": "i o o"} to say which are contracted and produced'
            )
        adapted.append(place)
    return adapted, whole


def _expected(
    config: PeftConfig, adapted: list[Place], whole: list[Place]
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that must be there."""
    expected: dict[str, tuple[int, ...]] = {}
    for place in adapted:
        shapes = place.factor_shapes(config.rank(place.module))
        expected.update(zip(place.factors, shapes, strict=True))
    for place in whole:
        expected[place.parameter] = place.shape[::-1] if place.is_turned else place.shape
    return expected


def _compare(expected: dict[str, tuple[int, ...]], weights: Weights, repeats: Repeats) -> None:
    """Every tensor once, in the shape that is asked for, and no other."""
    shapes = weights.shapes
    known = expected.keys() | repeats.agreeing | repeats.differing
    wrong = {
        "missing": [name for name in expected if name not in shapes],
        "without a place in the base or the config": [name for name in shapes if name not in known],
        "not what it should repeat": sorted(repeats.differing),
        "of another shape": [
            f"{name} ({shape}, expected {expected[name]})"
            for name, shape in shapes.items()
            if shape != expected.get(name, shape)
        ],
    }
    if found := [f"{_some(names)} {what}" for what, names in wrong.items() if names]:
        raise ValueError(
            f"the tensors are not those that the config and the base ask for: {'; '.join(found)}; "
            "write strict=False to go on without them"
        )


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    listed = ", ".join(names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{listed}{more} {'is' if len(names) == 1 else 'are'}"


# From the file into the tree.


def _shares(
    config: PeftConfig,
    found: set[str],
    read: Callable[[str], np.ndarray],
    adapted: list[Place],
    whole: list[Place],
    fused: list[Fused],
) -> dict[str, dict[tuple[int, ...], Any]]:
    """What is in the file of each leaf, by the position on its batch axes."""
    shares: dict[str, dict[tuple[int, ...], Any]] = collections.defaultdict(dict)

    def add(place: Place, name: str, first: np.ndarray, second: np.ndarray) -> None:
        assert place.layout is not None  # see _wanted
        a, b = turned(place.path, place.layout, first, second)
        dropout = float(config.lora_dropout)
        shares[place.path][place.index] = Adapter(a, b, config.scale(name), dropout, place.layout)

    for place in adapted:
        if found.issuperset(place.factors):
            add(place, place.module, *map(read, place.factors))
    for place, name, a, b in fused_shares(fused, found, read):
        add(place, name, a, b)
    for place in whole:
        if place.parameter in found:
            share = read(place.parameter)
            shares[place.path][place.index] = share.T if place.is_turned else share
    return shares


def _gathered(path: str, leaf: Any, shares: dict[tuple[int, ...], Any] | None) -> Any:
    """One leaf of the adapters from the shares of its layers."""
    if not shares:
        return None
    parts = list(shares.values())
    batch = tuple(leaf.shape[: len(next(iter(shares)))])
    if isinstance(parts[0], Adapter):
        return _gathered_adapter(path, batch, shares)
    if len(parts) < math.prod(batch):
        raise ValueError(
            f"{len(parts)} of the {math.prod(batch)} modules that are stacked in {path} were "
            f"trained whole; {_SEPARATE}"
        )
    return jnp.asarray(_stacked(path, batch, shares))


def _gathered_adapter(
    path: str, batch: tuple[int, ...], shares: dict[tuple[int, ...], Adapter]
) -> Adapter:
    for what in ("rank", "scale"):
        if len(values := {getattr(part, what): None for part in shares.values()}) > 1:
            raise ValueError(
                f"the adapters of {path} have {what}s {', '.join(map(str, values))} in different "
                f"layers, which one leaf cannot hold; {_SEPARATE}"
            )
    a, b = (
        _stacked(path, batch, {k: getattr(part, name) for k, part in shares.items()})
        for name in ("a", "b")
    )
    part = next(iter(shares.values()))
    whole = dataclasses.replace(part, a=a, b=b)
    if set(adapter_indices(path, "{}" * len(batch), whole)) != set(shares):
        raise ValueError(
            f"some adapters of {path} are zeros alone, in A and in B, which among scanned layers "
            f"stands for none at all; {_SEPARATE}"
        )
    return dataclasses.replace(part, a=jnp.asarray(a), b=jnp.asarray(b))


def _stacked(
    path: str, batch: tuple[int, ...], shares: dict[tuple[int, ...], np.ndarray]
) -> np.ndarray:
    """Shares at their positions on the batch axes, zeros where there is none."""
    parts = list(shares.values())
    if len(dtypes := {part.dtype.name: None for part in parts}) > 1:
        raise ValueError(
            f"the tensors of {path} are stored as {', '.join(dtypes)}; write dtype= to have one"
        )
    stack = np.zeros((*batch, *parts[0].shape), parts[0].dtype)
    for index, part in shares.items():
        stack[index] = part
    return stack
