"""Tensors that say again what others say: an adapted embedding's own weight, and a tied head.

With an embedding among the targets peft also saves the weight that is adapted (`base_layer`). With
`ensure_weight_tying` it saves the embedding's adapter a second time, for the head:

    lm_head.lora_A.weight [r, D] = lora_embedding_B transposed
    lm_head.lora_B.weight [V, r] = lora_embedding_A transposed

Neither is read, but both must agree with what is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from lora_jax.core.leaves import is_concrete
from lora_jax.core.tree import named_leaves
from lora_jax.formats.peft.config import PeftConfig
from lora_jax.formats.peft.naming import EMBEDDING, HEAD, decoder_module
from lora_jax.formats.peft.places import Place
from lora_jax.formats.peft.weights import Weights

HEAD_MODULE = str(decoder_module(HEAD))


@dataclasses.dataclass(frozen=True)
class Repeats:
    """Names of tensors that need not be read, and of those that should say the same and do not."""

    agreeing: set[str]
    differing: set[str]


def has_tied_head(tree: Any) -> bool:
    """Whether a decoder's tree has an embedding and no head of its own."""
    paths = {path for path, _ in named_leaves(tree)}
    return EMBEDDING in paths and HEAD not in paths


def refuse_untied(config: PeftConfig, trained: list[Place]) -> None:
    """An error for an embedding that is trained without the head that is tied to it here."""
    if not any(place.path == EMBEDDING for place in trained):
        return
    embedding = str(decoder_module(EMBEDDING))
    same_scale = config.scale(embedding) == config.scale(HEAD_MODULE)
    if not (config.ensure_weight_tying and (same_scale or config.is_saved(embedding))):
        raise ValueError(
            f"{embedding} is trained without the head that is tied to it (ensure_weight_tying is "
            "not set, or their scales differ), and in this base one leaf is both; give the base a "
            "head of its own: lm_head/kernel, the embedding transposed, and tied_head=False"
        )


def find_repeats(
    weights: Weights,
    base: Any,
    adapted: list[Place],
    whole: list[Place],
    is_tied: bool,
) -> Repeats:
    """Looks at every tensor of a file that repeats another, or the base."""
    repeats = Repeats(set(), set())
    leaves = dict(named_leaves(base))
    for place in adapted:
        for name, expected in _repeated(weights, leaves, place, is_tied):
            same = expected is None or _equal(weights.read(name), expected)
            (repeats.agreeing if same else repeats.differing).add(name)
    for place in whole:
        name = f"{HEAD_MODULE}.weight"
        if is_tied and place.path == EMBEDDING and {name, place.parameter} <= weights.shapes.keys():
            same = _equal(weights.read(name), weights.read(place.parameter))
            (repeats.agreeing if same else repeats.differing).add(name)
    return repeats


def _repeated(
    weights: Weights, leaves: dict[str, Any], place: Place, is_tied: bool
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Names of a module's repeated tensors, each with the values it should have, where known."""
    modules = [place.module]
    if is_tied and place.path == EMBEDDING:
        modules.append(HEAD_MODULE)
        first, second = place.factors
        for name, other in (("lora_A", second), ("lora_B", first)):
            name = f"{HEAD_MODULE}.{name}.weight"
            if {name, other} <= weights.shapes.keys():
                yield name, weights.read(other).T
    for module in modules:
        if (name := f"{module}.base_layer.weight") in weights.shapes:
            leaf = leaves[place.path]
            if not is_concrete(leaf):  # quantized, or a shape
                yield name, None
                continue
            weight = np.asarray(leaf[place.index])
            yield name, weight.T if place.is_turned else weight


def _equal(values: np.ndarray, expected: np.ndarray) -> bool:
    return values.shape == expected.shape and np.array_equal(
        values.astype(expected.dtype), expected
    )
