"""Splits for good: which records are trained on, validated on and tested on, by a hash.

A record's split depends on its own key and nothing else, so that it stays where it is when records
are added, removed or moved, and records of the same key (the same prompt with several answers,
say) are never in two splits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import NamedTuple

from lora_jax.data.records import Record


class Splits(NamedTuple):
    """Records by what they are for; no key is in two of them.

    Attributes:
      train: to learn from.
      validation: to choose by: steps, rates, ranks.
      test: to be read once, at the end.
    """

    train: list[Record]
    validation: list[Record]
    test: list[Record]


def split_records(
    records: Iterable[Record],
    key: Callable[[Record], str],
    *,
    validation: float = 0.05,
    test: float = 0.05,
    one_per_key: bool = False,
) -> Splits:
    """Assigns each record to a split by a hash of its key, whatever the others are.

    Keys that differ in case and white space alone are one key. Of records with the same key and
    the same fields the first is kept; with `one_per_key`, the first of each key.

    Args:
      records: the records.
      key: what must not be in two splits, usually a task's `key_of`.
      validation: share of the keys in validation.
      test: share of the keys in test.
      one_per_key: whether a key has one right answer, as in classification, so that a second
        record of it teaches nothing.

    Returns:
      The splits, each in the order of the hash, so that a prefix of one is a random sample that
      does not depend on the order of the file.

    Raises:
      ValueError: if the shares leave nothing to train on.
    """
    if min(validation, test) < 0 or validation + test >= 1:
        raise ValueError(
            f"validation={validation} and test={test}, expected shares from 0 that leave something "
            "to train on; write 0.05 for one in twenty"
        )
    splits = Splits([], [], [])
    distinct: dict[tuple[str, str], tuple[int, Record]] = {}
    for record in records:
        name = normalized(key(record))
        fields = "" if one_per_key else json.dumps(record.fields, sort_keys=True, default=str)
        if (name, fields) not in distinct:
            distinct[name, fields] = _hash(name), record
    for number, record in sorted(distinct.values(), key=lambda item: item[0]):
        # The low digits choose the split and the high ones the order, so that they are independent.
        share = number % 2**32 / 2**32
        if share < test:
            splits.test.append(record)
        elif share < test + validation:
            splits.validation.append(record)
        else:
            splits.train.append(record)
    return splits


def normalized(text: str) -> str:
    """A text without what does not make it another one: case, and the amount of space."""
    return " ".join(text.casefold().split())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
