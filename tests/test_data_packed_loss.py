"""Packing changes no loss: each document has in a packed batch what it has alone.

Alone, a document is a row without padding, positions or segments, and the loss is taken from the
logits in float64 NumPy.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import train
from lora_jax.data import evaluation_batches, training_batches
from lora_jax.data.encoding import make_encoded
from lora_jax.models.decoder import Decoder, DecoderConfig

pytestmark = pytest.mark.compiled_quickly

CONFIG = DecoderConfig(
    vocab_size=64,
    dim=32,
    mlp_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tied_head=True,
)
MODEL = Decoder(CONFIG)
LENGTH = 32


def make_documents():
    rng = np.random.default_rng(0)
    documents = []
    for number, size in enumerate([32, 2, 17, 9, 32, 1, 9, 17, 9, 2, 2, 17]):
        weights = rng.integers(0, 3, size).astype(np.float32)
        documents.append(make_encoded(rng.integers(1, 64, size), weights, number))
    return documents


DOCUMENTS = make_documents()


@pytest.fixture(scope="module")
def params():
    params = jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
    # As far from uniform as a trained model: the start's logits are near zero.
    return jax.tree.map(lambda x: x * 2, params)


@pytest.fixture(scope="module")
def apply(params):
    run = jax.jit(MODEL.apply)
    return lambda *batch: np.asarray(run(params, *batch), np.float64)


def losses(logits, tokens):
    """-log p of each token after the ones before it, float64 [B, T]; 0 for the first."""
    largest = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - largest).sum(-1)) + largest[..., 0]
    chosen = np.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    return np.pad(log_sum[:, :-1] - chosen, ((0, 0), (1, 0)))


@pytest.fixture(scope="module")
def alone(apply):
    """The loss of each document by its tokens, and what it is weighted with."""
    expected = {}
    for document in DOCUMENTS:
        tokens = document.tokens[None]
        each = losses(apply(tokens), tokens)[0]
        expected[tuple(document.tokens)] = (each * document.weights).sum()
    assert min(expected.values()) == 0  # a document of one token has no loss
    assert max(expected.values()) > 50
    return expected


def assert_losses_are(expected, batches, apply):
    seen = 0
    for batch in batches:
        logits = apply(batch.tokens, batch.positions, batch.segment_ids)
        each = losses(logits, batch.tokens) * batch.weights
        for row, ids in enumerate(batch.segment_ids):
            for segment in range(1, ids.max() + 1):
                document = tuple(batch.tokens[row, ids == segment])
                actual = each[row, ids == segment].sum()
                np.testing.assert_allclose(actual, expected[document], rtol=1e-5, atol=1e-5)
                seen += 1
        assert (each[batch.segment_ids == 0] == 0).all()
    assert seen == len(expected)


@pytest.mark.parametrize("pack", [True, False])
def test_evaluation(apply, alone, pack):
    batches = evaluation_batches(DOCUMENTS, rows=3, length=LENGTH, pack=pack)
    assert len(batches) == (2 if pack else 4)
    assert_losses_are(alone, batches, apply)


def test_training(apply, alone):
    stream = training_batches(DOCUMENTS, rows=3, length=LENGTH, seed=0, epochs=1)
    assert_losses_are(alone, stream, apply)


# Rows of one sequence each, of which nothing but the tokens reaches the decoder.


def with_positions(batch):
    """The same with what a packed batch would say of it."""
    counted = np.arange(LENGTH, dtype=np.int32)
    return batch._replace(positions=np.where(batch.segment_ids, counted, 0))


def padded_in_front(batch):
    """The same with the padding on the other side, where segment ids alone can hide it."""
    ends = np.count_nonzero(batch.segment_ids, axis=-1)
    batch = with_positions(batch)
    return type(batch)(
        *(
            np.stack([np.roll(row, -end) for row, end in zip(array, ends, strict=True)])
            for array in batch
        )
    )


@pytest.fixture
def one_program(monkeypatch):
    """Compiles the head for all positions alone."""
    monkeypatch.setattr(train.cross_entropy, "HALVINGS", 0)


@pytest.mark.usefixtures("one_program")
def test_a_causal_mask_is_enough(params, alone):
    batches = evaluation_batches(DOCUMENTS, rows=3, length=LENGTH, pack=False)
    assert all(batch.positions is None for batch in batches)
    found = train.evaluate_nll(MODEL, params["params"], None, batches)
    expected = [alone[tuple(x.tokens)] for x in DOCUMENTS if x.weights.any()]
    np.testing.assert_allclose(found.per_sequence, expected, rtol=1e-5)
    assert found.nll == pytest.approx(sum(expected) / found.tokens, rel=1e-5)


@pytest.mark.usefixtures("one_program")
def test_windows_see_what_they_saw(params):
    """With a layer that sees five tokens, and one that sees all."""
    model = Decoder(dataclasses.replace(CONFIG, window=5, windowed_layers=(1,)))
    batches = evaluation_batches(DOCUMENTS, rows=3, length=LENGTH, pack=False)
    found, wanted = (
        train.evaluate_nll(model, params["params"], None, some).per_sequence
        for some in (batches, map(with_positions, batches))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.usefixtures("one_program")
def test_losses_and_gradients_are_those_of_segments(params):
    gradient = jax.jit(
        jax.value_and_grad(train.next_token_loss(MODEL), argnums=1, has_aux=True),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    [batch] = evaluation_batches(DOCUMENTS, rows=12, length=LENGTH, pack=False)
    (loss, metrics), grads = gradient(None, params["params"], batch)
    for same in (with_positions(batch), padded_in_front(batch)):
        (wanted, wanted_metrics), wanted_grads = gradient(None, params["params"], same)
        assert loss == pytest.approx(float(wanted), rel=1e-6)
        assert metrics == {name: pytest.approx(float(x)) for name, x in wanted_metrics.items()}
        for one, other in zip(*map(jax.tree.leaves, (grads, wanted_grads)), strict=True):
            assert jnp.abs(one - other).max() <= 1e-5 * jnp.abs(other).max()


def test_no_mask_is_made_of_single_sequences(params):
    """None of [B, 1, T, T], by the mask that a packed batch has."""
    [batch] = evaluation_batches(DOCUMENTS, rows=12, length=LENGTH, pack=False)

    def has_mask(batch):
        traced = jax.make_jaxpr(train.next_token_loss(MODEL))(None, params["params"], batch)
        return f"bool[12,1,{LENGTH},{LENGTH}]" in str(traced)

    assert has_mask(with_positions(batch))
    assert not has_mask(batch)
