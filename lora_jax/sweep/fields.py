"""A run's config, read field by field: which numbers differ, and the config with others in place.

A config is a frozen dataclass, whose fields may be such dataclasses again; a field of those is
named with a dot, such as `optimizer.learning_rate`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

R = TypeVar("R")


def grid(config: R, **values: Iterable[Any]) -> list[R]:
    """All combinations of values for some fields; the last field named changes fastest.

    Args:
      config: a dataclass with the values of all other fields.
      values: for each field its values.

    Returns:
      The configs, made by `dataclasses.replace`.

    Raises:
      ValueError: if a field does not exist, or has no values.

    Example:
      >>> lj.sweep.grid(Run(), rank=[1, 2, 4], learning_rate=[1e-4, 1e-3], seed=range(3))
    """
    lists = {name: list(choices) for name, choices in values.items()}
    names = fields_of(config)
    for name, choices in lists.items():
        if name not in names:
            raise ValueError(
                f"{type(config).__name__} has no field {name!r}; it has {', '.join(names)}"
            )
        if not choices:
            raise ValueError(f"the grid is empty: {name} has no values; give it at least one")
    return [
        dataclasses.replace(config, **dict(zip(lists, choice, strict=True)))  # type: ignore[type-var]
        for choice in itertools.product(*lists.values())
    ]


def fields_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """Name and value of each field, those of dataclasses within it included."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= fields_of(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = value
    return found


def with_fields(config: R, values: Mapping[str, Any]) -> R:
    """The config with other values, which are not checked: they may be traced."""
    by_field: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        field, _, rest = name.partition(".")
        by_field.setdefault(field, {})[rest] = value
    changed = copy.copy(config)
    for name, within in by_field.items():
        value = within[""] if "" in within else with_fields(getattr(config, name), within)
        # Neither __init__ nor __post_init__ may run: they look at values, as a trace cannot.
        object.__setattr__(changed, name, value)
    return changed


def varying_numbers(runs: Sequence[Any]) -> tuple[str, ...]:
    """Names of the fields that are a number in all runs, and not the same in all."""
    columns = [fields_of(run) for run in runs]
    names = [name for name in columns[0] if all(name in column for column in columns)]
    return tuple(
        name
        for name in names
        if all(_is_number(column[name]) for column in columns)
        and len({column[name] for column in columns}) > 1
    )


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)
