"""Labelled sentences as packed batches: read, split, tokenized, and laid side by side.

A headline has some fifteen tokens. Padded to a common length, half of a batch would be padding, so
several headlines share a row, each a segment with positions of its own, and none sees another:

    tokens       h h h h p a a a h h h p h h h h h p . .      h headline, p prompt, . padding
    segment_ids  1 1 1 1 1 2 2 2 ...              3 3 0 0
    positions    0 1 2 3 4 0 1 2 ...

The answer of a headline is the token that should follow its last one.

Shapes: B rows, T tokens of a row, N places for examples in a batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class Example(NamedTuple):
    """A sentence and its class."""

    text: str
    label: int


class Splits(NamedTuple):
    """Examples by what they are for; no sentence is in two of them."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


class Batch(NamedTuple):
    """Packed sequences, and where the answer of each is read off.

    Attributes:
      tokens: int32 [B, T], 0 where there is padding.
      positions: int32 [B, T], counted from 0 in each segment.
      segment_ids: int32 [B, T], 1, 2, ... in each row; 0 is padding.
      row, column: int32 [N], the last token of each example.
      label: int32 [N], its class.
      weight: float32 [N], 1 for an example and 0 for an empty place.
      which: int32 [N], the example's number in the list that was packed; -1 for an empty place.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    row: np.ndarray
    column: np.ndarray
    label: np.ndarray
    weight: np.ndarray
    which: np.ndarray


class Tokenizer(Protocol):
    """What is asked of a tokenizer; that of the `tokenizers` package does it."""

    def encode(self, sequence: str) -> Any:
        """The tokens of a text; `.ids` are their numbers."""

    def encode_batch(self, input: list[str]) -> list[Any]:
        """The tokens of several texts."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """How a classification is asked of a language model.

    Attributes:
      before: text in front of each sentence.
      after: text behind it.
      answers: what should follow, for class 0, 1, ...; a single token each.
    """

    before: str
    after: str
    answers: tuple[str, ...]

    def answer_tokens(self, tokenizer: Tokenizer) -> np.ndarray:
        """The token of each answer, int32 [classes].

        Raises:
          ValueError: if an answer is no single token, or two are the same.
        """
        tokens = [tokenizer.encode(answer).ids for answer in self.answers]
        for answer, ids in zip(self.answers, tokens, strict=True):
            if len(ids) != 1:
                raise ValueError(
                    f"the answer {answer!r} has {len(ids)} tokens in this model's vocabulary, "
                    'expected one; write another word, such as " yes"'
                )
        if len({ids[0] for ids in tokens}) != len(tokens) or len(tokens) < 2:
            raise ValueError(
                f"the answers are {self.answers}, expected at least two, all different"
            )
        return np.array([ids[0] for ids in tokens], np.int32)

    def encode(
        self, tokenizer: Tokenizer, examples: Sequence[Example], max_length: int
    ) -> list[list[int]]:
        """The token ids of each example; a sentence that is too long loses its end.

        Raises:
          ValueError: if the prompt alone leaves no room.
        """
        before, after = (
            list(tokenizer.encode(part).ids) if part else [] for part in (self.before, self.after)
        )
        room = max_length - len(before) - len(after)
        if room < 1:
            raise ValueError(
                f"the prompt alone has {max_length - room} tokens, and a row has {max_length}; "
                "write a shorter prompt or a longer row"
            )
        sentences = tokenizer.encode_batch([example.text for example in examples])
        return [[*before, *sentence.ids[:room], *after] for sentence in sentences]


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """Reads labelled sentences, each once, from a file of JSON lines.

    A line is `{"text": "...", "label": 0}`, or a sample of OpenAI's evals, whose text is
    `input[-1].content` and whose label is `ideal`. Sentences that differ in case and white space
    alone are one; it is the first that is kept.

    Args:
      path: the file.

    Returns:
      The distinct examples, in the order of the file.

    Raises:
      FileNotFoundError: if there is no file.
      ValueError: if a line is no such record; it is named by its number.
    """
    distinct: dict[str, Example] = {}
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if "text" in record:
                    example = Example(str(record["text"]), int(record["label"]))
                else:
                    example = Example(str(record["input"][-1]["content"]), int(record["ideal"]))
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise ValueError(
                    f'line {number} of {path} is not {{"text": "...", "label": 0}} or a sample of '
                    f"OpenAI's evals ({type(error).__name__}: {error})"
                ) from None
            distinct.setdefault(normalized(example.text), example)
    return list(distinct.values())


def normalized(text: str) -> str:
    """A sentence without what does not make it another one: case, and the amount of space."""
    return " ".join(text.casefold().split())


def split_examples(examples: Iterable[Example], held_out: float = 0.05) -> Splits:
    """Assigns each example to a split by a hash of its text, whatever the others are.

    Args:
      examples: distinct examples, as `read_examples` gives.
      held_out: share of the examples in validation, and as much again in test.

    Returns:
      The splits, each in the order of the hash, so that a prefix of one is a random sample that
      does not depend on the order of the file.
    """
    splits = Splits([], [], [])
    hashed = {example: _hash(normalized(example.text)) for example in examples}
    for example in sorted(hashed, key=lambda example: hashed[example]):
        # The low digits choose the split and the high ones the order, so that they are independent.
        share = hashed[example] % 2**32 / 2**32
        if share < held_out:
            splits.test.append(example)
        elif share < 2 * held_out:
            splits.validation.append(example)
        else:
            splits.train.append(example)
    return splits


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def shuffled(number: int, seed: int) -> Iterator[int]:
    """0 to number - 1 in random order, for ever: a new order each time round."""
    rng = np.random.default_rng(seed)
    while number:
        yield from rng.permutation(number).tolist()


def pack(
    sequences: Sequence[Sequence[int]],
    labels: Sequence[int],
    order: Iterable[int],
    *,
    rows: int,
    length: int,
) -> Iterator[Batch]:
    """Batches of one shape, filled with as many sequences as go in.

    Each sequence goes into the first row with room for it; a batch is complete when one fits into
    no row. For 16 tokens on average and rows of 128 that fills 97 % of the places.

    Args:
      sequences: token ids, at most `length` each.
      labels: the class of each sequence.
      order: which sequences to take, in which order; may be endless.
      rows: B.
      length: T.

    Returns:
      The batches, the last one partly empty if `order` ends.

    Raises:
      ValueError: if a sequence is longer than a row.
    """
    places = rows * max(1, length // 8)  # N: no sequence is much shorter than eight tokens
    batch: list[tuple[int, int, int]] = []  # row, first column, sequence
    filled = [0] * rows
    for index in order:
        size = len(sequences[index])
        if size > length:
            raise ValueError(
                f"sequence {index} has {size} tokens, expected at most the {length} of a row; "
                "encode it with max_length"
            )
        row = next((k for k, used in enumerate(filled) if used + size <= length), None)
        if row is None or len(batch) == places:
            yield _collate(sequences, labels, batch, (rows, length, places))
            batch, filled, row = [], [0] * rows, 0
        batch.append((row, filled[row], index))
        filled[row] += size
    if batch:
        yield _collate(sequences, labels, batch, (rows, length, places))


def _collate(
    sequences: Sequence[Sequence[int]],
    labels: Sequence[int],
    placed: list[tuple[int, int, int]],
    shape: tuple[int, int, int],
) -> Batch:
    rows, length, places = shape
    tokens, positions, segment_ids = (np.zeros((rows, length), np.int32) for _ in range(3))
    row, column, label = (np.zeros(places, np.int32) for _ in range(3))
    weight, which = np.zeros(places, np.float32), np.full(places, -1, np.int32)
    for place, (k, start, index) in enumerate(placed):
        ids = sequences[index]
        where = slice(start, start + len(ids))
        tokens[k, where] = ids
        positions[k, where] = range(len(ids))
        segment_ids[k, where] = segment_ids[k].max() + 1
        row[place], column[place] = k, start + len(ids) - 1
        label[place], weight[place], which[place] = labels[index], 1, index
    return Batch(tokens, positions, segment_ids, row, column, label, weight, which)
