"""Experts that transformers has in one parameter a layer, gates and ups together.

peft names an adapter of such parameters after the module that holds them, and puts one inside the
other (`base_layer`) where both have one:

    mlp.experts.base_layer.lora_A.weight  [E * r, D]    of gate_up_proj
    mlp.experts.base_layer.lora_B.weight  [2 * F, r * E]
    mlp.experts.lora_A.weight             [E * r, F]    of down_proj
    mlp.experts.lora_B.weight             [D, r * E]

Rows of A are an expert's together; of B's columns, neighbours are of different experts. Here gate
and up are two leaves: both get A, and each its half of B. What is written again is an adapter for
each of them, which peft fuses when it loads it.

Shapes: E experts, r rank, D width, F width of an expert.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator

import numpy as np

from lora_jax.formats.peft.config import PeftConfig
from lora_jax.formats.peft.places import Place

_KINDS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclasses.dataclass(frozen=True)
class Fused:
    """One parameter that has an adapter.

    Attributes:
      name: torch's, such as `model.layers.0.mlp.experts.gate_up_proj`.
      wrapper: the module that peft names its factors after.
      places: of each expert, what is joined along `out`.
      rank: of each expert's adapter.
    """

    name: str
    wrapper: str
    places: list[list[Place]]
    rank: int

    @property
    def factors(self) -> tuple[str, str]:
        """PEFT's names of the two factors."""
        return f"{self.wrapper}.lora_A.weight", f"{self.wrapper}.lora_B.weight"

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two factors, as PEFT has them."""
        shapes = [place.factor_shapes(self.rank) for place in self.places[0]]
        stacked = self.rank * len(self.places)
        (_, inn), _ = shapes[0]
        return (stacked, inn), (sum(out for _, (out, _) in shapes), stacked)

    def shares(
        self, a: np.ndarray, b: np.ndarray
    ) -> Iterator[tuple[Place, np.ndarray, np.ndarray]]:
        """A [r, in] and B [out, r] of every expert's own modules."""
        experts = len(self.places)
        a = a.reshape(experts, self.rank, -1)  # [E, r, in]
        b = b.reshape(-1, self.rank, experts)  # [out, r, E]
        for number, joined in enumerate(self.places):
            start = 0
            for place in joined:
                _, (out, _) = place.factor_shapes(self.rank)
                yield place, a[number], b[start : start + out, :, number]
                start += out


def find_fused(config: PeftConfig, places: list[Place]) -> list[Fused]:
    """The parameters that a config targets, of the experts that a base has.

    Raises:
      ValueError: if it targets any other parameter.
    """
    experts: dict[str, dict[str, list[Place]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for place in places:
        if found := re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)", place.module):
            experts[found[1]][found[2]].append(place)  # in the order of their numbers
    fused = []
    for module, kinds in experts.items():
        names = [
            name
            for name, parts in _KINDS.items()
            if all(kinds.get(part) for part in parts) and config.is_parameter(f"{module}.{name}")
        ]
        for depth, name in enumerate(reversed(names)):
            joined = zip(*(kinds[part] for part in _KINDS[name]), strict=True)
            fused.append(
                Fused(
                    f"{module}.{name}",
                    f"{module}{'.base_layer' * depth}",
                    [list(parts) for parts in joined],
                    config.rank(f"{module}.{name}"),
                )
            )
    unknown = [
        target
        for target in config.target_parameters
        if not any(f".{parameter.name}".endswith(f".{target}") for parameter in fused)
    ]
    if unknown:
        raise ValueError(
            f"the config adapts the parameters {', '.join(unknown)}, and the base has no experts "
            "of that name; only gate_up_proj and down_proj of experts can be read"
        )
    return fused


def fused_shapes(fused: list[Fused]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that must be there for them."""
    return {
        name: shape
        for parameter in fused
        for name, shape in zip(parameter.factors, parameter.factor_shapes, strict=True)
    }


def fused_shares(
    fused: list[Fused], found: set[str], read: Callable[[str], np.ndarray]
) -> Iterator[tuple[Place, str, np.ndarray, np.ndarray]]:
    """Of every module in them: its place, the parameter that says its scale, A and B."""
    for parameter in fused:
        if found.issuperset(parameter.factors):
            a, b = map(read, parameter.factors)
            for place, its_a, its_b in parameter.shares(a, b):
                yield place, parameter.name, its_a, its_b
