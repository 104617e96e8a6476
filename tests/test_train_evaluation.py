"""Evaluation: sequences and labels, each against the model's own logits one at a time."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest
from small_batches import VOCAB, adapted, batch, decoder

import lora_jax as lj
from lora_jax import train

pytestmark = pytest.mark.compiled_quickly

MODEL = decoder(tied_head=True)


@pytest.fixture(scope="module")
def trees() -> tuple[Any, Any]:
    return adapted(tied_head=True, quantized=True)


@jax.jit
def alone(base: Any, adapters: Any, tokens: jax.Array) -> jax.Array:
    return lj.adapt(MODEL.apply)({"params": lj.combine(base, adapters)}, tokens)


def log_probabilities(trees: Any, tokens: list[int]) -> np.ndarray:
    """float64 [T, V] of the token after each prefix, alone in a batch."""
    padded = np.zeros((1, 24), np.int32)  # nothing that comes later is seen
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(alone(*trees, padded)[0, : len(tokens)], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_a_packed_sequence_has_the_loss_it_has_alone(trees):
    """To 1e-5, in every row and segment; with the weights of its tokens."""
    batches = [batch(rows=3, seed=0), batch(rows=3, seed=1)]
    result = train.evaluate_nll(MODEL, *trees, batches)
    sums, total, right, weight = [], 0.0, 0.0, 0.0
    for data in batches:
        for row in range(3):
            for number in range(1, 4):
                at = np.nonzero(data.segment_ids[row] == number)[0]
                tokens, weights = data.tokens[row, at], data.weights[row, at]
                if not weights.any():
                    continue
                scores = log_probabilities(trees, tokens.tolist())[:-1]
                chosen = -scores[np.arange(len(at) - 1), tokens[1:]]
                sums.append((chosen * weights[1:]).sum())
                total, weight = total + sums[-1], weight + weights.sum()
                right += ((scores.argmax(-1) == tokens[1:]) * weights[1:]).sum()
    np.testing.assert_allclose(result.per_sequence, sums, rtol=1e-5)
    assert result.nll == pytest.approx(total / weight, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / weight), rel=1e-4)
    assert result.accuracy == pytest.approx(right / weight)
    assert result.tokens == pytest.approx(weight)


def test_nothing_to_evaluate(trees):
    data = batch()._replace(weights=np.zeros((4, 24), np.float32))
    with pytest.raises(ValueError, match="no token has a weight"):
        train.evaluate_nll(MODEL, *trees, [data])


PROMPTS = [[5, 6, 7], [9], list(range(1, 20)), [40, 41], [100, 3, 8, 50, 60]]
LABELS = {
    "one token each": [[3], [200], [9]],
    "of all lengths": [[3], [4, 5], [4, 5, 6], [4, 7], [8, 9, 10, 11], [200, 3]],
    "many": [[k % VOCAB, (7 * k) % VOCAB, k // 2] for k in range(1, 60)],
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels_have_the_likelihood_they_have_alone(trees, labels):
    result = train.label_likelihoods(MODEL, *trees, PROMPTS, labels, rows=2)
    assert result.shape == (len(PROMPTS), len(labels))
    chosen = labels if len(labels) < 10 else labels[::20]
    for row, prompt in zip(result, PROMPTS, strict=True):
        for label in chosen:
            scores = log_probabilities(trees, prompt + label)[len(prompt) - 1 : -1]
            wanted = scores[np.arange(len(label)), label].sum()
            assert row[labels.index(label)] == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_the_base_alone(trees):
    base, _ = trees
    result = train.label_likelihoods(MODEL, base, None, [[5, 6]], [[3], [4, 5]], rows=4)
    scores = log_probabilities((base, None), [5, 6, 4])
    wanted = [scores[1, 3], scores[1, 4] + scores[2, 5]]
    np.testing.assert_allclose(result, [wanted], rtol=1e-4)


def test_common_beginnings_are_run_once(monkeypatch, trees):
    """Of 59 labels of three tokens with 20 first ones: 20 nodes, and one for each pair."""
    labels = [[k % 20, k, 7] for k in range(59)]
    seen = []
    scores = train.evaluation._edge_scores

    def spy(*arguments):
        seen.append(arguments[-1])
        return scores(*arguments)

    monkeypatch.setattr(train.evaluation, "_edge_scores", spy)
    train.label_likelihoods(MODEL, *trees, PROMPTS[:1], labels, rows=1)
    assert len(seen[0].tokens) == 1 + 20 + 59
    assert len(seen[0].targets) == 20 + 59 + 59


@pytest.mark.parametrize(
    ("prompts", "labels", "name"), [([[1], []], [[1]], "prompts"), ([[1]], [], "labels")]
)
def test_empty_ones(trees, prompts, labels, name):
    with pytest.raises(ValueError, match=f"{name} hold .* lists, expected some, none empty"):
        train.label_likelihoods(MODEL, *trees, prompts, labels, rows=2)
