"""Which leaves a study touches: paths, patterns, and the rule that gives a leaf its adapter."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class LoraRule:
    """Adapters for every leaf whose path matches a pattern. In a list, the first match wins.

    Attributes:
      pattern: regular expression searched in the leaf's path, such as `r"attn/.*/kernel"`.
      rank: r, the width of the update.
      alpha: the update is scaled by alpha / rank, or alpha / sqrt(rank) with `rslora`.
      layout: which axes are contracted (`i`), produced (`o`) or batch (`b`), such as `"b i o"`;
        needed for float leaves of more than two axes, known already for quantized ones.
      rslora: rank-stabilized scaling (arXiv:2312.03732).
      dropout: probability of dropping an input of the update when `combine` is given a key.

    Raises:
      ValueError: for a rank, alpha or dropout out of range, or a malformed pattern.
    """

    pattern: str
    rank: int = 8
    alpha: float = 16.0
    _: dataclasses.KW_ONLY
    layout: str | None = None
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        compile_pattern(self.pattern)
        rank, alpha, dropout = map(_number, (self.rank, self.alpha, self.dropout))
        if not rank >= 1 or rank != int(rank):
            raise ValueError(f"rank is {self.rank!r}, expected a whole number of at least 1")
        if math.isnan(alpha):
            raise ValueError(f"alpha is {self.alpha!r}, expected a finite number")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}, expected a probability below 1")
        # Plain Python numbers, so that rules hash, compare and print alike wherever they came from.
        object.__setattr__(self, "rank", int(rank))
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "dropout", dropout)

    @property
    def scale(self) -> float:
        """The factor on `b @ a`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def _number(x: Any) -> float:
    """A Python or NumPy number as a float; NaN for anything else, and for what is not finite."""
    is_number = isinstance(x, numbers.Real) and not isinstance(x, bool)
    return float(x) if is_number and math.isfinite(x) else math.nan


def path_string(path: Sequence[Any]) -> str:
    """A leaf's key path as `layers/0/attn/q_proj/kernel`.

    The `.value` that Flax NNX appends to each variable is dropped.
    """
    keys = list(path)
    if (
        len(keys) > 1
        and isinstance(keys[-1], jax.tree_util.GetAttrKey)
        and keys[-1].name == "value"
    ):
        keys.pop()
    return "/".join(str(_key_name(key)) for key in keys)


def _key_name(key: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """A key of its own for each path, the same whatever other paths there are."""
    digest = hashlib.blake2s(path.encode(), digest_size=4).digest()
    return jax.random.fold_in(key, int.from_bytes(digest, "little"))


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The compiled pattern, or a sentence about what is wrong with it."""
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern is a regular expression in a str, got {pattern!r}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None


def first_matches(patterns: Iterable[str], paths: Sequence[str]) -> dict[str, int]:
    """For each path that some pattern matches, the number of the first such pattern.

    Raises:
      ValueError: if a pattern matches no path at all, or two leaves have the same path.
    """
    if repeated := [path for path, n in collections.Counter(paths).items() if n > 1]:
        raise ValueError(
            f"two leaves are both called {repeated[0]!r}, since a name holds a '/'; rename one"
        )
    matches: dict[str, int] = {}
    for number, pattern in enumerate(patterns):
        found = [path for path in paths if compile_pattern(pattern).search(path)]
        if not found:
            raise ValueError(
                f"pattern {pattern!r} matches no leaf; the paths are {_excerpt(paths)}"
            )
        for path in found:
            matches.setdefault(path, number)
    return matches


def _excerpt(paths: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(paths[:most]) or "none: the tree has no arrays"
    return shown + (f", ... ({len(paths)} in all)" if len(paths) > most else "")
