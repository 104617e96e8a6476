"""All records of a split as sequences that fit, with an account of those that did not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from lora_jax.data.encoding import Encoded, SpecialTokens, Tokenizer
from lora_jax.data.records import Record
from lora_jax.data.tasks import Task, Text

TooLong = Literal["truncate", "drop", "error", "split"]

_AT_A_TIME = 4096  # records: enough to keep a tokenizer's threads busy, few enough to hold


@dataclasses.dataclass(frozen=True)
class EncodedSet:
    """Sequences, and what became of those that were too long.

    Attributes:
      sequences: in the order of the records.
      truncated: how many were shortened, or split.
      dropped: how many were left out because they were too long.
      empty: how many were left out because nothing in them is learned.
      max_length: the tokens that a sequence has at most.
    """

    sequences: list[Encoded]
    truncated: int
    dropped: int
    empty: int
    max_length: int

    @property
    def tokens(self) -> int:
        """Tokens in all sequences."""
        return sum(len(sequence.tokens) for sequence in self.sequences)

    @property
    def learned(self) -> int:
        """Tokens whose prediction counts."""
        return sum(int(np.count_nonzero(sequence.weights)) for sequence in self.sequences)

    def __str__(self) -> str:
        parts = [
            f"{len(self.sequences):,} sequences of {self.tokens:,} tokens, {self.learned:,} learned"
        ]
        if self.truncated:
            parts.append(f"{self.truncated:,} cut to {self.max_length:,} tokens")
        if self.dropped:
            parts.append(f"{self.dropped:,} longer than {self.max_length:,} tokens left out")
        if self.empty:
            parts.append(f"{self.empty:,} with nothing to learn left out")
        return "; ".join(parts)


def encode_all(
    task: Task,
    records: Sequence[Record],
    tokenizer: Tokenizer,
    special: SpecialTokens,
    *,
    max_length: int,
    too_long: TooLong = "truncate",
) -> EncodedSet:
    """Encodes records, so that each sequence fits into a row.

    Args:
      task: what to make of a record.
      records: the records.
      tokenizer: the model's.
      special: the model's; None for one that is not to be added.
      max_length: the tokens that a sequence may have, at least 2.
      too_long: what becomes of a longer one. `"truncate"` cuts it: the front of the prompt of a
        completion or classification, the end of a text or chat. `"drop"` leaves it out, `"error"`
        names it, and `"split"` makes several sequences of a text.

    Returns:
      The sequences, and how many were cut or left out.

    Raises:
      ValueError: if a record lacks a column, or is too long and `too_long` is `"error"`; its file
        and line are named.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected 2 tokens or more")
    if too_long == "split" and not isinstance(task, Text):
        raise ValueError(
            f"too_long='split' with {type(task).__name__}: only the pieces of a Text are texts; "
            "write 'truncate', 'drop' or 'error'"
        )
    kept: list[Encoded] = []
    truncated = dropped = 0
    for sequence in _encoded(task, records, tokenizer, special):
        size = len(sequence.tokens)
        if size <= max_length:
            kept.append(sequence)
        elif too_long == "error":
            raise ValueError(
                f"{records[sequence.record].where}: {size} tokens, expected at most {max_length}; "
                "raise max_length, or choose to truncate or drop what is too long"
            )
        elif too_long == "drop":
            dropped += 1
        else:
            truncated += 1
            if too_long == "split":
                assert isinstance(task, Text)
                kept += task.split(sequence, max_length)
            else:
                kept.append(task.shorten(sequence, max_length, special))
    sequences = [sequence for sequence in kept if sequence.weights.any()]
    return EncodedSet(sequences, truncated, dropped, len(kept) - len(sequences), max_length)


def _encoded(
    task: Task, records: Sequence[Record], tokenizer: Tokenizer, special: SpecialTokens
) -> Iterator[Encoded]:
    for start in range(0, len(records), _AT_A_TIME):
        some = records[start : start + _AT_A_TIME]
        for sequence in task.encode_batch(some, tokenizer, special):
            yield sequence._replace(record=start + sequence.record)


def encode_prompts(
    task: Task,
    records: Sequence[Record],
    tokenizer: Tokenizer,
    special: SpecialTokens,
    *,
    max_length: int,
) -> list[list[int]]:
    """The tokens to generate from, of records that need have no answer.

    Args:
      task: what to make of a record.
      records: the records.
      tokenizer: the model's.
      special: the model's.
      max_length: the tokens that a prompt may have; a longer one loses its front, but keeps its
        first token if that is `special.bos`.

    Returns:
      The tokens of each prompt.

    Raises:
      ValueError: if a record lacks a column; its file and line are named.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected 2 tokens or more")
    prompts = task.encode_prompts(records, tokenizer, special)
    return [_last(prompt, max_length, special) for prompt in prompts]


def _last(prompt: list[int], length: int, special: SpecialTokens) -> list[int]:
    if len(prompt) <= length:
        return prompt
    bos = int(prompt[0] == special.bos)
    return prompt[:bos] + prompt[len(prompt) - length + bos :]
