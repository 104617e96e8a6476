"""The torch modules that a base has: the share of a leaf that each stands for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax.core.leaves import QuantizedArray, is_array, parse_layout, split_axes
from lora_jax.core.rules import compile_pattern
from lora_jax.core.tree import named_leaves
from lora_jax.formats.peft.naming import (
    conv1d_paths,
    factor_names,
    indices,
    is_embedding,
    is_turned,
    layout_of,
    parameter,
)


@dataclasses.dataclass(frozen=True)
class Place:
    """One torch module's share of a leaf.

    Attributes:
      path: of the leaf.
      index: on the leaf's batch axes.
      module: the torch module.
      shape: of the share.
      layout: of the leaf, without batch axes; None for what is no matrix.
      is_turned: whether torch has its axes the other way round.
    """

    path: str
    index: tuple[int, ...]
    module: str
    shape: tuple[int, ...]
    layout: str | None
    is_turned: bool

    @property
    def parameter(self) -> str:
        """The torch name of the share itself."""
        return f"{self.module}.{parameter(self.path)}"

    @property
    def factors(self) -> tuple[str, str]:
        """PEFT's names of the two factors."""
        return factor_names(self.path, self.module)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two factors, as PEFT has them."""
        assert self.layout is not None  # or there would be no adapter
        out, inn = (math.prod(part) for part in split_axes(self.layout, self.shape))
        if is_embedding(self.path) and self.layout == "o i":
            out, inn = inn, out
        return (rank, inn), (out, rank)


def all_places(
    base: Any,
    name_of: Callable[[str], str | None],
    layouts: Mapping[str, str],
    fan_in_fan_out: str | Sequence[str],
) -> list[Place]:
    """Every torch module that the base has, leaf by leaf."""
    leaves = [
        (path, leaf)
        for path, leaf in named_leaves(base)
        if is_array(leaf) or isinstance(leaf, QuantizedArray)
    ]
    conv1d = conv1d_paths(fan_in_fan_out, [path for path, _ in leaves])
    places = []
    for path, leaf in leaves:
        if (template := name_of(path)) is None:
            continue
        shape = tuple(leaf.shape)
        batch = template.count("{}")
        layout = _layout(path, leaf, batch, layouts)
        turned = is_turned(path, len(shape) - batch, conv1d)
        for index in indices(path, template, shape):
            module = template.format(*index)
            places.append(Place(path, index, module, shape[batch:], layout, turned))
    return places


def _layout(path: str, leaf: Any, batch: int, layouts: Mapping[str, str]) -> str | None:
    if isinstance(leaf, QuantizedArray):
        return leaf.layout
    for pattern, layout in layouts.items():
        if compile_pattern(pattern).search(path):
            return parse_layout(layout, tuple(leaf.shape), path)
    return layout_of(path) if len(leaf.shape) - batch == 2 else None
