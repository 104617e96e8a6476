"""How a model does on records: by the likelihood of labels, or of what it should write.

Shapes: N records, C labels.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax import data, train
from lora_jax.cli.problem import Model, Split

AT_ONCE = 64  # prompts between two signs of life

# Is called with a number of tokens each time that some are done, and may raise.
Advance = Callable[[float], Any]


class Scores(NamedTuple):
    """What came of it.

    Attributes:
      metrics: numbers by their names, `nll` and `accuracy` among them.
      probabilities: of each label, float64 [N, C]; C is 0 for a task without labels.
    """

    metrics: dict[str, float]
    probabilities: np.ndarray


@dataclasses.dataclass(frozen=True)
class TokenScorer:
    """Scores by the likelihood of the tokens that training would learn.

    Attributes:
      model: the model.
      split: the records.
      rows, length: of a batch.
      pack: whether sequences share rows.
    """

    model: Model
    split: Split
    rows: int
    length: int
    pack: bool

    def rounds(self) -> int:
        """How many times `advance` is called."""
        return len(self._batches())

    def __call__(self, adapters: Any, advance: Advance) -> Scores:
        """Scores adapters, or the base alone if they are None."""

        def watched() -> Iterator[data.Batch]:
            for batch in self._batches():
                yield batch
                advance(int((batch.segment_ids > 0).sum()))

        nll = train.evaluate_nll(self.model.decoder, self.model.base, adapters, watched())
        metrics = {"nll": nll.nll, "perplexity": nll.perplexity, "accuracy": nll.accuracy}
        return Scores(metrics, np.zeros((len(self.split.sequences), 0)))

    def _batches(self) -> Sequence[data.Batch]:
        sequences, shape = self.split.sequences, {"rows": self.rows, "length": self.length}
        return list(data.evaluation_batches(sequences, **shape, pack=self.pack))


@dataclasses.dataclass(frozen=True)
class LabelScorer:
    """Scores a classification: the likeliest label is the answer, and the others do not count.

    Attributes:
      model: the model.
      task: the task.
      split: the records.
      rows: prompts of a batch.
    """

    model: Model
    task: data.Classification
    split: Split
    rows: int

    def rounds(self) -> int:
        """How many times `advance` is called."""
        return -(-len(self.split.sequences) // AT_ONCE)

    def __call__(self, adapters: Any, advance: Advance) -> Scores:
        """Scores adapters, or the base alone if they are None."""
        labels = self.task.label_tokens(self.model.tokenizer, self.model.special)
        tables = []
        for index in range(0, len(self.split.sequences), AT_ONCE):
            prompts = [one.prompt for one in self.split.sequences[index : index + AT_ONCE]]
            tables.append(
                train.label_likelihoods(
                    self.model.decoder, self.model.base, adapters, prompts, labels, rows=self.rows
                )
            )
            advance(sum(map(len, prompts)))
        likelihoods = np.concatenate(tables)  # [N, C]
        table = likelihoods - np.logaddexp.reduce(likelihoods, axis=-1, keepdims=True)
        truth = self.truth()
        metrics = {
            "nll": float(-table[np.arange(len(truth)), truth].mean()),
            "accuracy": float(np.mean(table.argmax(-1) == truth)),
        }
        return Scores(metrics, np.exp(table))

    def truth(self) -> np.ndarray:
        """The right label of each record, int [N]."""
        records = [self.split.records[one.record] for one in self.split.sequences]
        return np.array([self.task.label_of(record) for record in records])

    def majority(self) -> float:
        """Share of the most frequent label."""
        counts = collections.Counter(self.truth().tolist())
        return max(counts.values()) / len(self.split.sequences)

    def answers(self, scores: Sequence[Scores], number: int) -> list[tuple[str, ...]]:
        """The first records: what they say, their label, and what each score makes of it."""
        rows = []
        for place, truth in enumerate(self.truth()[:number]):
            record = self.split.records[self.split.sequences[place].record]
            text = " ".join(self.task.key_of(record).split())
            shares = [one.probabilities[place] for one in scores]
            guesses = [f"{self.task.names[x.argmax()]} {100 * x.max():.0f} %" for x in shares]
            text = text if len(text) <= 72 else f"{text[:71]}…"
            rows.append((text, self.task.names[truth], *guesses))
        return rows


Scorer = TokenScorer | LabelScorer


def make_scorer(
    model: Model, task: data.Task, split: Split, *, rows: int, length: int, pack: bool
) -> Scorer:
    """The scorer of a task."""
    if isinstance(task, data.Classification):
        # Labels are read behind a prompt in the cache, whose masks the fused kernel is not for.
        return LabelScorer(model.running(attention="xla"), task, split, rows)
    return TokenScorer(model, split, rows, length, pack)
