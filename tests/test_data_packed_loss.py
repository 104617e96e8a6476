"""Packing changes no loss: each document has in a packed batch what it has alone.

Alone, a document is a row without padding, positions or segments, and the loss is taken from the
logits in float64 NumPy.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lora_jax.data import evaluation_batches, training_batches
from lora_jax.data.encoding import make_encoded
from lora_jax.models.decoder import Decoder, DecoderConfig

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
def apply():
    params = jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
    # As far from uniform as a trained model: the start's logits are near zero.
    params = jax.tree.map(lambda x: x * 2, params)
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
