"""Batches: nothing is lost, nothing touches its neighbour, and the stream goes on where it was."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys

import grain
import grain.experimental
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data import Batch, evaluation_batches, training_batches
from lora_jax.data.batches import PackedBatches
from lora_jax.data.encoding import make_encoded
from lora_jax.data.loader import _owned


def make_sequences(sizes, seed=0):
    """Random tokens from 1, random weights; 0 is padding alone."""
    rng = np.random.default_rng(seed)
    return [
        make_encoded(rng.integers(1, 1_000, n), rng.random(n).astype(np.float32) + 1, k)
        for k, n in enumerate(sizes)
    ]


SEQUENCES = make_sequences(np.random.default_rng(1).integers(2, 12, 50))


def unpacked(batch):
    """The segments of a batch by row and id, as tokens and weights, with all else checked."""
    found = []
    if batch.positions is None:  # each row is one segment, which the checks below hold it to
        counted = np.arange(batch.tokens.shape[1], dtype=np.int32)
        assert batch.segment_ids.max() == 1
        batch = batch._replace(positions=np.where(batch.segment_ids, counted, 0))
    assert {array.shape for array in batch} == {batch.tokens.shape}
    assert [array.dtype for array in batch] == [np.int32, np.float32, np.int32, np.int32]
    for tokens, weights, positions, ids in zip(*batch, strict=True):
        used = np.count_nonzero(ids)
        for rest in (tokens, weights, positions, ids):
            assert not rest[used:].any()  # padding is at the end, and zero
        assert sorted(set(ids[:used])) == list(range(1, ids.max() + 1))
        for segment in range(1, ids.max() + 1):
            where = np.flatnonzero(ids == segment)
            assert (np.diff(where) == 1).all()
            assert positions[where].tolist() == list(range(len(where)))
            assert weights[where[0]] == 0
            found.append((tokens[where].tolist(), weights[where].tolist()))
    return found


def as_lists(sequences):
    return [(sequence.tokens.tolist(), sequence.weights.tolist()) for sequence in sequences]


sizes = st.lists(st.integers(1, 24), min_size=1, max_size=80)


@settings(deadline=None)
@given(sizes=sizes, rows=st.integers(1, 4), pack=st.booleans())
def test_evaluation_has_each_sequence_once_and_in_order(sizes, rows, pack):
    sequences = make_sequences(sizes)
    batches = evaluation_batches(sequences, rows=rows, length=24, pack=pack)
    assert {batch.tokens.shape for batch in batches} == {(rows, 24)}
    found = list(itertools.chain.from_iterable(map(unpacked, batches)))
    assert found == as_lists(sequences)
    if not pack:
        assert len(batches) == -(-len(sizes) // rows)
        assert max(batch.segment_ids.max() for batch in batches) == 1
    assert {batch.positions is None for batch in batches} == {not pack}


@settings(deadline=None)
@given(
    sizes=sizes,
    rows=st.integers(1, 4),
    pack=st.booleans(),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_training_has_each_sequence_once_an_epoch(sizes, rows, pack, epochs, seed):
    sequences = make_sequences(sizes)
    batches = list(
        training_batches(sequences, rows=rows, length=24, seed=seed, pack=pack, epochs=epochs)
    )
    assert {batch.tokens.shape for batch in batches} == {(rows, 24)}
    found = list(itertools.chain.from_iterable(map(unpacked, batches)))
    assert sorted(found) == sorted(as_lists(sequences) * epochs)


class InOrderOfEpochs:
    """The stream of sequences that training batches are made of, as grain's packer wants it."""

    def __init__(self, sequences, seed, epochs):
        orders = [
            np.random.default_rng((seed, epoch)).permutation(len(sequences))
            for epoch in range(epochs)
        ]
        self.sequences = [sequences[k] for k in np.concatenate(orders)]

    def __len__(self):
        return len(self.sequences)

    def __getitem__(self, k):
        return {"tokens": self.sequences[k].tokens, "weights": self.sequences[k].weights}


@pytest.mark.parametrize("seed", [0, 7])
def test_batches_are_those_of_grains_first_fit(seed):
    stream = grain.MapDataset.source(InOrderOfEpochs(SEQUENCES, seed, epochs=20))
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    packed = grain.experimental.FirstFitPackIterDataset(
        stream.to_iter_dataset(options),
        length_struct={"tokens": 16, "weights": 16},
        num_packing_bins=3,
        shuffle_bins=False,
    )
    expected = packed.batch(3, drop_remainder=True)
    batches = training_batches(SEQUENCES, rows=3, length=16, seed=seed)
    for batch, other in zip(batches, itertools.islice(expected, 100), strict=False):
        np.testing.assert_array_equal(batch.tokens, other["tokens"])
        np.testing.assert_array_equal(batch.weights, other["weights"])
        np.testing.assert_array_equal(batch.positions, other["tokens_positions"])
        np.testing.assert_array_equal(batch.segment_ids, other["tokens_segment_ids"])


def test_each_epoch_has_an_order_of_its_own():
    batches = iter(training_batches(SEQUENCES, rows=1, length=16, seed=0, pack=False))
    tokens = [unpacked(batch)[0][0] for batch in itertools.islice(batches, 150)]
    epochs = [tokens[:50], tokens[50:100], tokens[100:]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert isinstance(batch, Batch)
        for one, two in zip(batch, other, strict=True):
            assert one.tobytes() == two.tobytes()


def test_a_seed_is_an_order():
    def first(seed):
        batches = training_batches(SEQUENCES, rows=2, length=16, seed=seed)
        return list(itertools.islice(batches, 30))

    assert_equal(first(3), first(3))
    with pytest.raises(AssertionError):
        assert_equal(first(3), first(4))


def test_a_batch_depends_on_its_number_alone():
    straight = PackedBatches(SEQUENCES, rows=2, length=16, seed=0, epochs=3)
    backwards = PackedBatches(SEQUENCES, rows=2, length=16, seed=0, epochs=3)
    batches = [straight[k] for k in range(len(straight))]
    assert_equal([backwards[k] for k in reversed(range(len(batches)))], reversed(batches))
    endless = PackedBatches(SEQUENCES, rows=2, length=16, seed=0)
    assert_equal([endless[k] for k in range(len(batches) - 1)], batches[:-1])
    with pytest.raises(IndexError):
        straight[len(batches)]


@pytest.mark.parametrize("stop", [0, 1, 7, 40])  # within the first epoch, and later
def test_the_stream_goes_on_where_it_was(stop):
    stream = training_batches(SEQUENCES, rows=2, length=16, seed=5)
    batches = iter(stream)
    for _ in range(stop):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = list(itertools.islice(batches, 20))
    for resumed in (iter(stream), batches):  # a new iterator; one that has gone too far
        resumed.set_state(state)
        assert_equal(itertools.islice(resumed, 20), expected)


WITH_WORKERS = """
import itertools
import numpy as np
from lora_jax.data import Encoded, training_batches

def take(batches, number):
    return np.array([np.stack(batch) for batch in itertools.islice(batches, number)])

def main():
    zeros = lambda n: np.zeros(n, np.float32)
    sequences = [Encoded(np.arange(n, 2 * n), zeros(n), 0) for n in range(2, 12)]
    options = {"rows": 2, "length": 16, "seed": 5}
    expected = take(training_batches(sequences, **options), 30)
    stream = training_batches(sequences, **options, workers=2)
    batches = iter(stream)
    np.testing.assert_array_equal(take(batches, 17), expected[:17])
    state = batches.get_state()
    np.testing.assert_array_equal(take(batches, 3), expected[17:20])
    batches.close()
    resumed = iter(stream)
    resumed.set_state(state)
    np.testing.assert_array_equal(take(resumed, 13), expected[17:])
    resumed.close()
    print("equal")

if __name__ == "__main__":
    main()
"""


def test_workers_change_nothing(tmp_path):
    """In a process of its own, since workers import the main module of theirs."""
    script = tmp_path / "script.py"
    script.write_text(WITH_WORKERS)
    done = subprocess.run(
        [sys.executable, "-W", "error", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "equal\n", "")


def test_what_a_worker_hands_over_without_positions():
    [batch] = evaluation_batches(SEQUENCES[:2], rows=2, length=16, pack=False)
    owned = _owned(batch)
    assert owned.positions is None
    np.testing.assert_array_equal(owned.tokens, batch.tokens)


def test_short_sequences_fill_their_rows():
    sequences = make_sequences(np.random.default_rng(0).integers(20, 80, 3_000))
    batches = training_batches(sequences, rows=16, length=512, seed=0)
    filled = [(batch.segment_ids > 0).mean() for batch in itertools.islice(batches, 20)]
    assert np.mean(filled) > 0.97


@pytest.mark.parametrize("make", [training_batches, evaluation_batches])
@pytest.mark.parametrize(
    ("sequences", "rows", "sentence"),
    [
        ([], 1, "no sequences to make batches of, expected at least one; is the split empty?"),
        (make_sequences([8, 9]), 1, "sequence 1 has 9 tokens, expected 1 to the 8 of a row; enc"),
        (make_sequences([0]), 1, "sequence 0 has 0 tokens, expected 1 to the 8 of a row"),
        (make_sequences([8]), 0, "rows=0"),
    ],
)
def test_what_makes_no_batch(make, sequences, rows, sentence):
    options = {"seed": 0} if make is training_batches else {}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make(sequences, rows=rows, length=8, **options)


def test_a_negative_seed():
    with pytest.raises(ValueError, match="seed=-1, expected 0 or more"):
        training_batches(SEQUENCES, rows=1, length=16, seed=-1)


def test_no_epochs():
    with pytest.raises(ValueError, match="epochs=0, expected 1 or more"):
        training_batches(SEQUENCES, rows=1, length=16, seed=0, epochs=0)
