"""Sentences: read once each, split for good, and packed without one touching another."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import data
from lora_jax.data import Example, Prompt


@dataclasses.dataclass(frozen=True)
class Characters:
    """A tokenizer whose tokens are characters."""

    @dataclasses.dataclass(frozen=True)
    class Encoding:
        ids: list[int]

    def encode(self, sequence):
        return self.Encoding([ord(c) for c in sequence])

    def encode_batch(self, input):
        return [self.encode(text) for text in input]


def sample(text, label):
    """As OpenAI's evals write it."""
    return {"input": [{"role": "system"}, {"role": "user", "content": text}], "ideal": str(label)}


def write_lines(path, *lines):
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return path


def test_each_sentence_is_read_once(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        sample("Cat sat  down", 1),
        {"text": "dog ran", "label": 0},
        "\n",
        {"text": " cat SAT down\n", "label": 0},
        sample("dog  ran away", 1),
    )
    assert data.read_examples(path) == [
        ("Cat sat  down", 1),
        ("dog ran", 0),
        ("dog  ran away", 1),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "not json\n",
        {"text": "no label"},
        {"text": "a word for a label", "label": "yes"},
        {"input": [], "ideal": "1"},
        "7\n",
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path, line):
    path = write_lines(tmp_path / "a.jsonl", {"text": "fine", "label": 0}, line)
    with pytest.raises(ValueError, match=f"^line 2 of {re.escape(str(path))} is not") as caught:
        data.read_examples(path)
    assert "\n" not in str(caught.value)


EXAMPLES = [Example(f"sentence number {n}", n % 2) for n in range(4_000)]


def test_splits_share_nothing_and_lose_nothing():
    splits = data.split_examples(EXAMPLES)
    assert sorted(itertools.chain(*splits)) == sorted(EXAMPLES)
    # Binomial(4000, 0.05) has mean 200 and standard deviation 13.8.
    assert 140 < len(splits.test) < 260
    assert 140 < len(splits.validation) < 260


def test_a_sentence_keeps_its_split_whatever_the_others_are():
    splits = data.split_examples(EXAMPLES)
    fewer = data.split_examples(EXAMPLES[::-3])
    for some, all_ in zip(fewer, splits, strict=True):
        assert some == [example for example in all_ if example in set(some)]  # and its order
    shouted = data.split_examples([Example(f" {x.text.upper()} ", x.label) for x in EXAMPLES])
    assert [len(split) for split in shouted] == [len(split) for split in splits]


def test_the_order_of_a_split_says_nothing_of_its_labels():
    labels = [example.label for example in data.split_examples(EXAMPLES).train]
    first = np.mean(labels[:1_000])
    assert abs(first - 0.5) < 0.06  # four standard deviations


def test_a_prompt_surrounds_the_sentence():
    prompt = Prompt("Q ", "\nA:", ("0", "1"))
    encoded = prompt.encode(Characters(), [Example("cat", 0), Example("c" * 50, 1)], 12)
    assert ["".join(map(chr, ids)) for ids in encoded] == ["Q cat\nA:", "Q ccccccc\nA:"]
    assert prompt.answer_tokens(Characters()).tolist() == [ord("0"), ord("1")]


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (Prompt("", "?", ("no", "y")), "the answer 'no' has 2 tokens"),
        (Prompt("", "?", ("", "y")), "the answer '' has 0 tokens"),
        (Prompt("", "?", ("y", "y")), "expected at least two, all different"),
        (Prompt("", "?", ("y",)), "expected at least two, all different"),
    ],
)
def test_answers_that_cannot_be_told_apart(prompt, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        prompt.answer_tokens(Characters())


def test_a_prompt_that_fills_the_row():
    with pytest.raises(ValueError, match="the prompt alone has 6 tokens, and a row has 6"):
        Prompt("abc", "def", ("0", "1")).encode(Characters(), EXAMPLES[:1], 6)


def test_shuffled_goes_round_and_round():
    order = list(itertools.islice(data.shuffled(7, seed=3), 21))
    rounds = [order[:7], order[7:14], order[14:]]
    assert all(sorted(part) == list(range(7)) for part in rounds)
    assert rounds[0] != rounds[1]
    assert order == list(itertools.islice(data.shuffled(7, seed=3), 21))
    assert order != list(itertools.islice(data.shuffled(7, seed=4), 21))
    assert list(data.shuffled(0, seed=3)) == []


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), max_size=80),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_packing_keeps_every_token_and_its_neighbours(lengths, rows, seed):
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(1, 1_000, n).tolist() for n in lengths]
    labels = rng.integers(0, 2, len(lengths)).tolist()
    order = rng.permutation(len(lengths)).tolist()
    batches = list(data.pack(sequences, labels, order, rows=rows, length=24))
    found = []
    for batch in batches:
        assert batch.tokens.shape == batch.positions.shape == (rows, 24)
        assert {x.shape for x in batch[3:]} == {(rows * 3,)}
        taken = np.zeros_like(batch.tokens)
        for place in np.flatnonzero(batch.weight):
            row, end = batch.row[place], batch.column[place] + 1
            which = batch.which[place]
            start = end - len(sequences[which])
            assert batch.tokens[row, start:end].tolist() == sequences[which]
            assert batch.positions[row, start:end].tolist() == list(range(end - start))
            (segment,) = set(batch.segment_ids[row, start:end].tolist())
            assert segment > 0
            assert (batch.segment_ids[row] == segment).sum() == end - start
            assert batch.label[place] == labels[which]
            taken[row, start:end] += 1
            found.append(which)
        assert ((batch.segment_ids > 0) == taken).all()  # each place once, padding never
        assert (batch.which[batch.weight == 0] == -1).all()
    assert sorted(found) == list(range(len(lengths)))


def test_batches_of_an_endless_order():
    batches = data.pack([[1] * 9, [2] * 7], [0, 1], data.shuffled(2, seed=0), rows=2, length=32)
    for batch in itertools.islice(batches, 5):
        assert (batch.segment_ids > 0).mean() > 0.75


def test_a_sequence_longer_than_a_row():
    with pytest.raises(ValueError, match="sequence 0 has 9 tokens, expected at most the 8"):
        next(data.pack([[1] * 9], [0], [0], rows=1, length=8))
