"""Experts that transformers has in one parameter a layer, gates and ups together.

peft names an adapter of such parameters after the module that holds them, and puts one inside the
other (`base_layer`) where both have one:

    mlp.experts.base_layer.lora_A.weight  [E * r, D]    of gate_up_proj
    mlp.experts.base_layer.lora_B.weight  [2 * F, r * E]
    mlp.experts.lora_A.weight             [E * r, F]    of down_proj
    mlp.experts.lora_B.weight             [D, r * E]

Rows of A are an expert's together; of B's columns, neighbours are of different experts. Here gate
and up are two leaves. When such a folder is read both get A, and each its half of B. When one is
written they share A if theirs is the same; else their ranks add up:

    A = | A of gate |     B = | B of gate     0     |
        |  A of up  |         |     0       B of up |

A router is a parameter by itself there, too, and no linear module: `mlp.gate.weight`.

Shapes: E experts, r rank, D width, F width of an expert.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lora_jax.formats.peft.config import PeftConfig
from lora_jax.formats.peft.naming import is_embedding
from lora_jax.formats.peft.places import Place

_EXPERT = re.compile(r"(.*\.experts)\.(?:\d+|\{\})\.(\w+)")  # the module of one, or of all
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
    """The parameters that a config targets, of the experts that a base has, or matrices of it.

    Raises:
      ValueError: if it targets any other parameter.
    """
    experts: dict[str, dict[str, list[Place]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    fused = []
    for place in places:
        if found := _EXPERT.fullmatch(place.module):
            experts[found[1]][found[2]].append(place)  # in the order of their numbers
        elif config.is_parameter(place.parameter) and _is_linear(place):
            rank = config.rank(place.parameter)
            fused.append(Fused(place.parameter, place.module, [[place]], rank))
    for module, kinds in experts.items():
        names = [
            name
            for name, parts in _KINDS.items()
            if all(kinds.get(part) for part in parts) and config.is_parameter(f"{module}.{name}")
        ]
        for name, wrapper in wrappers(module, names).items():
            joined = zip(*(kinds[part] for part in _KINDS[name]), strict=True)
            fused.append(
                Fused(
                    f"{module}.{name}",
                    wrapper,
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
            f"the config adapts the parameters {', '.join(unknown)}, and the base has none of that "
            "name; gate_up_proj and down_proj of experts can be read, and weights that are matrices"
        )
    return fused


def _is_linear(place: Place) -> bool:
    """Whether torch has it as [out, in]."""
    plain = place.layout == "i o" if place.is_turned else place.layout == "o i"
    return plain and not is_embedding(place.path)


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
    """Of every module in them: its place, the parameter that says its scale, A and B.

    An expert with nothing but zeros has none, where others have some: a parameter is of all of
    them, and so a file has factors for those, too, that were left out.
    """
    for parameter in fused:
        if found.issuperset(parameter.factors):
            a, b = map(read, parameter.factors)
            shares = list(parameter.shares(a, b))
            live = [share for share in shares if share[1].any() or share[2].any()]
            for place, its_a, its_b in live or shares:
                yield place, parameter.name, its_a, its_b


# The way back.


class Part(NamedTuple):
    """What one leaf has for all experts of a layer: a [E, r, in], b [E, out, r], and its scale."""

    a: np.ndarray
    b: np.ndarray
    scale: float


class Expert(NamedTuple):
    """Where an expert's module has gone: the experts' module, the parameter, and the part of it."""

    module: str
    parameter: str
    part: str


def parameter_of(module: str) -> Expert | None:
    """What has become of a module of this torch name; None if it is not an expert's."""
    found = _EXPERT.fullmatch(module)
    kinds = [kind for kind, parts in _KINDS.items() if found and found[2] in parts]
    return Expert(found[1], kinds[0], found[2]) if found and kinds else None


def have_gates(modules: Collection[str]) -> bool:
    """Whether among the names are gate, up and down of experts, which transformers has fused."""
    found = {match[2] for match in map(_EXPERT.fullmatch, modules) if match}
    return found.issuperset(part for parts in _KINDS.values() for part in parts)


def wrappers(module: str, names: Collection[str]) -> dict[str, str]:
    """What peft names the factors of some parameters after: the last one is outermost."""
    ordered = [name for name in _KINDS if name in names]
    return {
        name: f"{module}{'.base_layer' * depth}" for depth, name in enumerate(reversed(ordered))
    }


def fuse(name: str, parts: Mapping[str, Part]) -> Part:
    """One parameter's factors from those of its parts, with the experts as axes still.

    Args:
      name: of the parameter, within its module.
      parts: by their names; one that has no adapter is absent.
    """
    present = [parts[part] for part in _KINDS[name] if part in parts]
    first, scale = present[0], max((part.scale for part in present), key=abs)
    # One parameter has one scale: what is left of the others goes into B.
    scaled = {
        part: x.b if x.scale == scale else (x.b * (x.scale / scale)).astype(x.b.dtype)
        for part, x in parts.items()
    }
    if all(np.array_equal(part.a, first.a) for part in present):
        nothing = np.zeros_like(first.b)  # gate and up are of one shape
        rows = [scaled.get(part, nothing) for part in _KINDS[name]]
        return Part(first.a, np.concatenate(rows, axis=1), scale)
    blocks = [scaled[part] for part in _KINDS[name]]
    experts, rank = len(first.a), sum(x.shape[2] for x in blocks)
    b = np.zeros((experts, sum(x.shape[1] for x in blocks), rank), first.b.dtype)
    row = column = 0
    for block in blocks:
        _, out, r = block.shape
        b[:, row : row + out, column : column + r] = block
        row, column = row + out, column + r
    return Part(np.concatenate([part.a for part in present], axis=1), b, scale)


def stacked(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Both factors as PEFT has them: [E * r, in] and [out, r * E]."""
    experts, rank, inn = part.a.shape
    return part.a.reshape(experts * rank, inn), part.b.transpose(1, 2, 0).reshape(
        part.b.shape[1], rank * experts
    )
