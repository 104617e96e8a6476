r"""Token sequences and what of them is learned: the one form that every task comes down to.

    text      Q: 2+2? \n A:  4 </s>
    tokens    5  8 3 8 9 2 7 6  1
    weights   0  0 0 0 0 0 0 1  1

weights[t] is that of predicting tokens[t] from those before it.

Shapes: n tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What is asked of a tokenizer; that of the `tokenizers` package does it."""

    def encode_batch(self, input: list[str], *, add_special_tokens: bool) -> list[Any]:
        """For each text what has `.ids`, its tokens, and `.offsets`, where each one stood."""

    def id_to_token(self, id: int) -> str | None:
        """The text of a token."""

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        """The tokens outside the ordinary vocabulary, each with a flag `special`."""


class SpecialTokens(NamedTuple):
    """The tokens around a text, which no text contains; None where a model does without.

    Attributes:
      bos: begins every sequence.
      eos: ends it; to be learned, lest the model never stop.
    """

    bos: int | None
    eos: int | None


class Encoded(NamedTuple):
    """A sequence.

    Attributes:
      tokens: int32 [n].
      weights: float32 [n], of predicting each token from those before it; weights[0] is 0.
      record: the number of the record that it was made of.
    """

    tokens: np.ndarray
    weights: np.ndarray
    record: int

    @property
    def prompt(self) -> list[int]:
        """The tokens in front of the first that is learned."""
        learned = np.flatnonzero(self.weights)
        return self.tokens[: learned[0] if len(learned) else None].tolist()


def make_encoded(tokens: Sequence[int] | np.ndarray, learned: Any, record: int = 0) -> Encoded:
    """A sequence of which some tokens are learned; the first one, which nothing precedes, never.

    Args:
      tokens: the ids.
      learned: the weight of each, or one for all.
      record: the number of the record.

    Returns:
      The sequence.
    """
    weights = np.array(np.broadcast_to(np.asarray(learned, np.float32), len(tokens)))
    weights[:1] = 0
    return Encoded(np.asarray(tokens, np.int32), weights, record)


def token_ids(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """The tokens of texts, without any that the tokenizer would add by itself."""
    return [encoding.ids for encoding in encodings(tokenizer, texts)]


def encodings(tokenizer: Tokenizer, texts: Iterable[str]) -> list[Any]:
    """As `token_ids`, with the place of each token in its text (`.offsets`).

    Raises:
      ValueError: if the tokenizer cuts or fills texts, which would pass unseen.
    """
    for setting in ("truncation", "padding"):
        if getattr(tokenizer, setting, None) is not None:
            raise ValueError(
                f"the tokenizer does {setting} by itself, expected one that leaves texts whole; "
                f"call tokenizer.no_{setting}() first"
            )
    return tokenizer.encode_batch(list(texts), add_special_tokens=False)
