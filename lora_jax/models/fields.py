"""The fields by which a file describes a model, each checked when it is asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from lora_jax.files import shown

MOST = 4_096  # layers, heads or experts: these are listed one by one, and more are a broken file
LARGEST = 2**22  # rows and columns of a matrix


@dataclasses.dataclass(frozen=True)
class Fields:
    """Fields as a file has them, of whatever types.

    Attributes:
      said: By their names.
      where: They stand, such as `config.json`.
    """

    said: Mapping[str, Any]
    where: str

    def get(self, name: str, usual: Any = None) -> Any:
        """A field as it is, or what is usual where it is missing."""
        return self.said.get(name, usual)

    def need(self, name: str) -> Any:
        """A field as it is.

        Raises:
          ValueError: If it is missing; and the others, if it is not what they return.
        """
        if name not in self.said:
            raise ValueError(f"{self.where} lacks {name!r}, without which no model is defined.")
        return self.said[name]

    def count(
        self, name: str, usual: int | None = None, *, least: int = 1, most: int = LARGEST
    ) -> int:
        """A whole number."""
        value = self.need(name) if usual is None else self.get(name, usual)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, value, f"a whole number from {least} to {most:,}")
        return value

    def number(self, name: str, usual: float | None = None) -> float:
        """A positive number."""
        value = self.need(name) if usual is None else self.get(name, usual)
        if type(value) not in (int, float) or not 0 < value < math.inf or value > 1e30:
            raise self.wrong(name, value, "a positive number")
        return value

    def flag(self, name: str, usual: bool = False) -> bool:
        """Yes or no."""
        if not isinstance(value := self.get(name, usual), bool):
            raise self.wrong(name, value, "true or false")
        return value

    def within(self, name: str) -> Mapping[str, Any]:
        """The fields in a field, which may be missing or null."""
        if not isinstance(value := self.get(name) or {}, Mapping):
            raise self.wrong(name, value, "an object")
        return value

    def only(self, known: Collection[Any], name: str, usual: Any) -> Any:
        """One of few values."""
        refuse_all_but(known, name, value := self.get(name, usual), self.where)
        return value

    def wrong(self, name: str, value: Any, expected: str) -> ValueError:
        """The error for a value that is none of the field."""
        return ValueError(f"{name} is {shown(value)} in {self.where}; expected {expected}.")


def refuse_all_but(known: Collection[Any], name: str, value: Any, where: str) -> None:
    """An error for every value but few."""
    if value not in known:
        options = " or ".join(repr(option) for option in known)
        raise ValueError(f"{name} is {shown(value)} in {where}; only {options} can be read.")
