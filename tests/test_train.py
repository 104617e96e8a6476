"""The loop: its numbers against NumPy, its answers one sentence at a time, its end at NaN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import CONFIG

import lora_jax as lj
from lora_jax import data, train
from lora_jax.models.decoder import Decoder


def line(params, batch):
    """Mean squared error of a linear model, and a number beside it."""
    x, y = batch
    error = x @ params["w"] - y
    return jnp.mean(jnp.square(error)), {"largest": jnp.abs(error).max()}


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    base = {"w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
    adapters = lj.init_adapters(jax.random.key(0), base, [lj.LoraRule("w", rank=2, alpha=3.0)])
    batches = [
        (rng.normal(size=(8, 6)).astype(np.float32), rng.normal(size=(8, 5)).astype(np.float32))
        for _ in range(4)
    ]
    return base, adapters, batches


def test_steps_are_those_of_float64_numpy(problem):
    base, adapters, batches = problem
    before = jax.tree.map(np.array, (base, adapters))
    steps = list(train.train(line, base, adapters, optax.sgd(0.1), batches))
    w, a, b = (np.float64(x) for x in (base["w"], adapters["w"].a, adapters["w"].b))
    for step, (x, y) in zip(steps, batches, strict=True):
        error = x @ (w + 1.5 * (b @ a).T) - y  # w is [in, out], b @ a is [out, in]
        slope = x.T @ error * (2 / error.size)  # of the loss by w
        grad_a, grad_b = 1.5 * b.T @ slope.T, 1.5 * slope.T @ a.T
        assert step.loss == pytest.approx(np.mean(error**2), rel=1e-5)
        assert step.metrics["largest"] == pytest.approx(np.abs(error).max(), rel=1e-5)
        norm = np.sqrt((grad_a**2).sum() + (grad_b**2).sum())
        assert step.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        a, b = a - 0.1 * grad_a, b - 0.1 * grad_b
        np.testing.assert_allclose(step.adapters["w"].a, a, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(step.adapters["w"].b, b, rtol=1e-4, atol=1e-6)
    assert [step.number for step in steps] == [1, 2, 3, 4]
    jax.tree.map(np.testing.assert_array_equal, before, (base, adapters))


@pytest.mark.parametrize("spoilt", [1, 2, 3])
def test_a_loss_that_is_not_finite_ends_the_run(problem, spoilt):
    base, adapters, batches = problem
    whole = list(train.train(line, base, adapters, optax.sgd(0.1), batches))
    batches[spoilt - 1] = (batches[spoilt - 1][0], batches[spoilt - 1][1] * np.nan)
    done = []
    with pytest.raises(train.Diverged, match=f"the loss is nan at step {spoilt}") as caught:
        done.extend(train.train(line, base, adapters, optax.sgd(0.1), batches))
    assert caught.value.step == spoilt
    # The last adapters that are known to be good: those that gave the last finite loss.
    good = [None, adapters, *(step.adapters for step in whole)][spoilt - 1]
    jax.tree.map(np.testing.assert_array_equal, caught.value.adapters, good)


def test_a_gradient_that_is_not_finite_ends_the_run(problem):
    base, _, batches = problem

    def cliff(params, batch):
        loss, metrics = line(params, batch)
        return loss + jnp.sqrt(0.0 * params["w"]).sum(), metrics  # 0, with a slope of NaN

    base = jax.tree.map(jnp.abs, base)
    with pytest.raises(train.Diverged, match="or its gradient is not finite") as caught:
        list(train.train(cliff, base, {"w": base["w"]}, optax.sgd(0.1), batches))
    np.testing.assert_array_equal(caught.value.adapters["w"], base["w"])


def test_the_learning_rate_rises_falls_and_ends_near_zero():
    config = train.OptimizerConfig(steps=20, learning_rate=0.5, warmup=0.25, clip=1e9)
    tx = train.make_optimizer(config)
    adapters = {"w": lj.Adapter(jnp.ones((1, 1)), jnp.ones((1, 1)))}
    state, moves = tx.init(adapters), []
    for _ in range(20):
        updates, state = tx.update(adapters, state, adapters)
        moves.append(-float(updates["w"].a[0, 0]))  # Adam's update of a constant gradient is 1
    rise = 0.5 * np.arange(5) / 5
    fall = 0.25 * (1 + np.cos(np.pi * np.arange(15) / 16))
    np.testing.assert_allclose(moves, [*rise, *fall], atol=1e-5)


def test_lora_plus_moves_b_faster():
    tx = train.make_optimizer(train.OptimizerConfig(5, 0.1, lora_plus_ratio=4.0, warmup=0.0))
    adapters = {"w": lj.Adapter(jnp.ones((1, 1)), jnp.ones((1, 1)))}
    updates, _ = tx.update(adapters, tx.init(adapters), adapters)
    assert float(updates["w"].b[0, 0]) == pytest.approx(4 * float(updates["w"].a[0, 0]), rel=1e-5)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0, expected a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"warmup": 1.0}, "warmup is 1.0, expected a share of the steps below 1"),
    ],
)
def test_optimizers_that_make_no_sense(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        train.OptimizerConfig(**{"steps": 1, "learning_rate": 1.0, **values})


@pytest.fixture(scope="module")
def packed():
    """A model, its answers, and sentences of 3 to 11 tokens in rows of 16."""
    model = Decoder(CONFIG)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, CONFIG.vocab_size, rng.integers(3, 12)).tolist() for _ in range(9)]
    labels = rng.integers(0, 2, 9).tolist()
    batches = list(data.pack(sequences, labels, range(9), rows=3, length=16))
    answers = np.array([5, 9], np.int32)
    expected = np.stack(
        [model.apply({"params": params}, np.array([x]))[0, -1, answers] for x in sequences]
    )
    return model, params, answers, batches, np.array(labels), np.float64(expected)


def test_packed_sentences_do_not_see_each_other(packed):
    model, params, answers, batches, _, expected = packed
    logits_of = train.answer_logits(model, answers)
    seen = 0
    for batch in batches:
        logits = np.asarray(logits_of(params, batch))
        for place in np.flatnonzero(batch.weight):
            np.testing.assert_allclose(logits[place], expected[batch.which[place]], atol=1e-5)
            seen += 1
    assert seen == len(expected)
    assert max(batch.segment_ids.max() for batch in batches) > 1  # something was there to be seen


def nll_of(logits, labels):
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -np.log(p[np.arange(len(labels)), labels])


def test_the_loss_leaves_empty_places_out(packed):
    model, params, answers, batches, labels, expected = packed
    batch = batches[-1]
    which = batch.which[batch.weight > 0]
    assert 0 < len(which) < len(batch.weight)
    loss, metrics = train.answer_loss(model, answers)(params, batch)
    assert loss == pytest.approx(nll_of(expected[which], labels[which]).mean(), rel=1e-5)
    right = expected[which].argmax(-1) == labels[which]
    assert metrics["accuracy"] == pytest.approx(right.mean())


def test_scores_are_in_the_order_of_the_examples(packed):
    model, params, answers, batches, labels, expected = packed
    score = train.scorer(train.answer_logits(model, answers))
    adapters = lj.init_adapters(jax.random.key(0), params, [])
    scores = train.evaluate(score, params, adapters, reversed(batches))
    assert scores.nll == pytest.approx(nll_of(expected, labels).mean(), rel=1e-5)
    assert scores.accuracy == pytest.approx((expected.argmax(-1) == labels).mean())
    p = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
    np.testing.assert_allclose(scores.probabilities, p, rtol=1e-4)
