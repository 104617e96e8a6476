"""Tasks: what is asked of a model about a record, and what it should answer.

Every task comes down to a token sequence of which a part is learned. A classification is a
completion whose completions come from a closed set; plain text is a completion of nothing.

    Completion      [bos] prompt... | completion... eos
    Classification  [bos] prompt... | label...
    Text            [bos] | text... eos                      | what follows is learned
    Chat            see `lora_jax.data.chat`

A prompt and its completion are tokenized apart, as they are when the model is used and only the
prompt is there.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax.data import templates
from lora_jax.data.encoding import Encoded, SpecialTokens, Tokenizer, make_encoded, token_ids
from lora_jax.data.records import Record


class Task(abc.ABC):
    """What every task can do."""

    @abc.abstractmethod
    def prompt_of(self, record: Record) -> str:
        """What the model is shown of a record, as text.

        Raises:
          ValueError: if a column is missing; the record's file and line are named.
        """

    @abc.abstractmethod
    def key_of(self, record: Record) -> str:
        """What splits go by: what the record asks, whatever words the task puts around it."""

    @abc.abstractmethod
    def encode_batch(
        self, records: Sequence[Record], tokenizer: Tokenizer, special: SpecialTokens
    ) -> list[Encoded]:
        """The sequence of each record, however long.

        Args:
          records: the records.
          tokenizer: the model's.
          special: the model's; None for one that is not to be added.

        Returns:
          A sequence for each record, numbered in their order.

        Raises:
          ValueError: if a column is missing; the record's file and line are named.
        """

    @abc.abstractmethod
    def shorten(self, encoded: Encoded, length: int, special: SpecialTokens) -> Encoded:
        """The sequence cut to `length` tokens where it hurts least."""

    def encode(self, record: Record, tokenizer: Tokenizer, special: SpecialTokens) -> Encoded:
        """The sequence of one record; as `encode_batch`, which is faster for many."""
        return self.encode_batch([record], tokenizer, special)[0]

    def encode_prompts(
        self, records: Sequence[Record], tokenizer: Tokenizer, special: SpecialTokens
    ) -> list[list[int]]:
        """The tokens of each prompt, for records that need have no answer."""
        bos = _listed(special.bos)
        return [bos + ids for ids in token_ids(tokenizer, map(self.prompt_of, records))]


def _listed(token: int | None) -> list[int]:
    return [] if token is None else [token]


def _key(template: str, record: Record) -> str:
    return "\n".join(str(templates.value(record, name)) for name in templates.columns(template))


def _without_front_of_prompt(encoded: Encoded, length: int, special: SpecialTokens) -> Encoded:
    """The last tokens, behind the beginning; of a completion that is still too long, the first."""
    bos = int(special.bos is not None)
    learned = len(encoded.tokens) - len(encoded.prompt)
    start = max(bos, min(len(encoded.tokens) - (length - bos), len(encoded.tokens) - learned))
    tokens, weights = (
        [*x[:bos], *x[start : start + length - bos]] for x in (encoded.tokens, encoded.weights)
    )
    return make_encoded(tokens, weights, encoded.record)


def _joined(
    prompts: Iterable[list[int]], completions: Iterable[list[int]], special: SpecialTokens
) -> list[Encoded]:
    bos = _listed(special.bos)
    return [
        make_encoded(
            [*bos, *prompt, *completion],
            [0.0] * (len(bos) + len(prompt)) + [1.0] * len(completion),
            number,
        )
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]


@dataclasses.dataclass(frozen=True)
class Completion(Task):
    """A prompt, and what should follow it up to the end of the sequence.

    Attributes:
      prompt: template of what the model is shown.
      completion: template of what it should write. Most vocabularies have words with the space in
        front of them: write `" {answer}"` behind a prompt that does not end in one.
    """

    prompt: str
    completion: str

    def __post_init__(self) -> None:
        templates.columns(self.prompt)
        templates.columns(self.completion)

    def prompt_of(self, record: Record) -> str:
        """See `Task`."""
        return templates.fill(self.prompt, record)

    def completion_of(self, record: Record) -> str:
        """What the model should write, as text."""
        return templates.fill(self.completion, record)

    def key_of(self, record: Record) -> str:
        """See `Task`; the columns of the prompt."""
        return _key(self.prompt, record)

    def encode_batch(
        self, records: Sequence[Record], tokenizer: Tokenizer, special: SpecialTokens
    ) -> list[Encoded]:
        """See `Task`."""
        eos = _listed(special.eos)
        prompts = token_ids(tokenizer, map(self.prompt_of, records))
        completions = token_ids(tokenizer, map(self.completion_of, records))
        return _joined(prompts, [ids + eos for ids in completions], special)

    def shorten(self, encoded: Encoded, length: int, special: SpecialTokens) -> Encoded:
        """See `Task`; from the front of the prompt, and only then from the end."""
        return _without_front_of_prompt(encoded, length, special)


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """A prompt, and which of a few texts should follow it.

    Attributes:
      prompt: template of what the model is shown.
      labels: the text of each class, such as `" Yes"`: by the value that a record of it has, or in
        the order of the classes if records have numbers from 0 or the text itself.
      label: the column of a record's class.
    """

    prompt: str
    labels: Mapping[str, str] | tuple[str, ...]
    label: str = "label"

    def __post_init__(self) -> None:
        templates.columns(self.prompt)
        if len(self.names) < 2 or len({*self.names}) + len({*self.texts}) < 2 * len(self.names):
            raise ValueError(f"the labels are {self.labels}, expected at least two, all different")

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each class."""
        return tuple(self.labels.values() if isinstance(self.labels, Mapping) else self.labels)

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each class: its value in a record, or its text."""
        return tuple(str(label).strip() for label in self.labels)

    def prompt_of(self, record: Record) -> str:
        """See `Task`."""
        return templates.fill(self.prompt, record)

    def key_of(self, record: Record) -> str:
        """See `Task`; the columns of the prompt."""
        return _key(self.prompt, record)

    def label_of(self, record: Record) -> int:
        """The class of a record, counted from 0.

        Raises:
          ValueError: if the record has none of the labels.
        """
        value = templates.value(record, self.label)
        found = self._class_of(value)
        if found is None:
            raise ValueError(
                f"{record.where}: the column {self.label!r} is {value!r}, expected one of "
                + ", ".join(map(repr, self.names))
            )
        return found

    def _class_of(self, value: Any) -> int | None:
        text = str(value).strip()
        if text in self.names:
            return self.names.index(text)
        if isinstance(self.labels, tuple):
            numbers = [str(number) for number in range(len(self.labels))]
            return numbers.index(text) if text in numbers else None
        return None

    def label_tokens(self, tokenizer: Tokenizer, special: SpecialTokens) -> list[list[int]]:
        """The tokens of each class's text, none of them the beginning of another's.

        Args:
          tokenizer: the model's.
          special: the model's. If one label is the beginning of another, all of them end in
            `special.eos`, so that the shorter one does not always win.

        Returns:
          The tokens, for each class.

        Raises:
          ValueError: if two classes cannot be told apart.
        """
        labels = token_ids(tokenizer, self.texts)
        if all(labels) and not _any_begins_another(labels):
            return labels
        if special.eos is None or len(set(map(tuple, labels))) < len(labels):
            raise ValueError(
                f"the labels {self.texts} cannot be told apart: their tokens are {labels}, "
                "expected none to be the beginning of another; write other texts"
            )
        return [[*label, special.eos] for label in labels]

    def encode_batch(
        self, records: Sequence[Record], tokenizer: Tokenizer, special: SpecialTokens
    ) -> list[Encoded]:
        """See `Task`."""
        labels = self.label_tokens(tokenizer, special)
        prompts = token_ids(tokenizer, map(self.prompt_of, records))
        return _joined(prompts, [labels[self.label_of(record)] for record in records], special)

    def shorten(self, encoded: Encoded, length: int, special: SpecialTokens) -> Encoded:
        """See `Task`; from the front of the prompt, and only then from the end."""
        return _without_front_of_prompt(encoded, length, special)


def _any_begins_another(sequences: Sequence[list[int]]) -> bool:
    """Whether one of the sequences is the beginning of another; if so, of the next one by order."""
    ordered = sorted(sequences)
    return any(after[: len(before)] == before for before, after in itertools.pairwise(ordered))


@dataclasses.dataclass(frozen=True)
class Text(Task):
    """Documents, all of which is learned.

    Attributes:
      text: template of a document.
    """

    text: str = "{text}"

    def __post_init__(self) -> None:
        templates.columns(self.text)

    def prompt_of(self, record: Record) -> str:
        """See `Task`; nothing, a document begins by itself."""
        return ""

    def key_of(self, record: Record) -> str:
        """See `Task`; the columns of the text."""
        return _key(self.text, record)

    def encode_batch(
        self, records: Sequence[Record], tokenizer: Tokenizer, special: SpecialTokens
    ) -> list[Encoded]:
        """See `Task`."""
        bos, eos = _listed(special.bos), _listed(special.eos)
        texts = token_ids(tokenizer, (templates.fill(self.text, record) for record in records))
        return [make_encoded([*bos, *ids, *eos], 1, number) for number, ids in enumerate(texts)]

    def shorten(self, encoded: Encoded, length: int, special: SpecialTokens) -> Encoded:
        """See `Task`; from the end."""
        return make_encoded(encoded.tokens[:length], encoded.weights[:length], encoded.record)

    def split(self, encoded: Encoded, length: int) -> list[Encoded]:
        """The pieces of a document, each `length` tokens at most and every token learned once.

        A piece begins with the last token of the one before, from which its first is predicted.
        """
        return [
            make_encoded(encoded.tokens[start : start + length], 1, encoded.record)
            for start in range(0, max(1, len(encoded.tokens) - 1), length - 1)
        ]
