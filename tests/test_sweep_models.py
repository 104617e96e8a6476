"""Sweeps over models of Flax Linen, Flax NNX and, with a DPO loss, Equinox."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sweep_runs
from flax import linen, nnx

import lora_jax as lj

pytestmark = pytest.mark.compiled_quickly

VOCAB, DIM, STEPS = 7, 6, 3
TOKENS = np.random.default_rng(0).integers(VOCAB, size=(STEPS, 2, 2, 4))  # step, of a pair, B, T


@dataclasses.dataclass(frozen=True)
class RunOfModel:
    lora_rank: int
    learning_rate: float


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(VOCAB, DIM)(tokens)
        return linen.Dense(VOCAB)(x + jnp.tanh(linen.Dense(DIM)(x)))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, DIM, rngs=rngs)
        self.hidden, self.head = nnx.Linear(DIM, DIM, rngs=rngs), nnx.Linear(DIM, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.head(x + jnp.tanh(self.hidden(x)))


def of_linen():
    model = LinenModel()
    params = jax.jit(model.init)(jax.random.key(0), TOKENS[0, 0])
    return params, model.apply, ("kernel", "i o")


def of_nnx():
    graph, params = nnx.split(NnxModel(nnx.Rngs(0)))
    return params, lambda params, x: nnx.merge(graph, params)(x), ("kernel", "i o")


def of_equinox():
    key = jax.random.key(0)
    model = eqx.nn.Sequential(
        [eqx.nn.Embedding(VOCAB, DIM, key=key), eqx.nn.MLP(DIM, VOCAB, DIM, 1, key=key)]
    )
    params, static = eqx.partition(model, eqx.is_array)
    call = lambda params, x: jax.vmap(jax.vmap(eqx.combine(params, static)))(x)  # noqa: E731
    return params, call, (r"layers/\d/weight$", "o i")


def next_token_loss(apply):
    def loss_fn(adapters, base, batch, key):
        tokens = batch[0]
        logits = apply(lj.combine(base, adapters), tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss_fn


def dpo_loss(apply):
    """Direct preference optimization, whose reference is the model without adapters."""

    def loss_fn(adapters, base, batch, key):
        def margin(adapters):
            def log_likelihood(tokens):
                logits = apply(lj.combine(base, adapters), tokens[:, :-1])
                nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
                return -nll.sum(-1)

            return log_likelihood(batch[0]) - log_likelihood(batch[1])

        learned, reference = margin(adapters), margin(None)
        loss = -jax.nn.log_sigmoid(0.5 * (learned - reference)).mean()
        return loss, {"accuracy": (learned > 0).mean()}

    return loss_fn


MODELS: dict[str, Any] = {
    "linen": (of_linen, next_token_loss),
    "nnx": (of_nnx, next_token_loss),
    "equinox, DPO": (of_equinox, dpo_loss),
}


@pytest.mark.parametrize(("model", "loss"), MODELS.values(), ids=MODELS)
def test_runs_of_a_model_are_those_runs_alone(model, loss):
    base, call, (pattern, layout) = model()
    loss_fn, make_key = loss(lj.adapt(call)), lambda run: jax.random.key(run.lora_rank)

    def make_adapters(run):
        rule = lj.LoraRule(pattern, rank=run.lora_rank, alpha=8.0, layout=layout)
        return jax.jit(lambda: lj.init_adapters(jax.random.key(0), base, rule))()

    make_tx = lambda run: optax.sgd(run.learning_rate)  # noqa: E731
    runs = [RunOfModel(1, 0.02), RunOfModel(3, 0.01)]
    plan = lj.sweep.plan(runs, make_adapters, make_tx)
    assert len(plan.groups) == 1
    for fitted in lj.sweep.fit(loss_fn, base, plan, TOKENS, make_key=make_key, steps=STEPS):
        run = fitted.run
        start = make_adapters(run)
        alone = sweep_runs.train_alone(*(loss_fn, base, start, make_tx(run), make_key(run), TOKENS))
        sweep_runs.assert_as_alone(fitted, alone, 1e-5)
        first, last = jax.tree.leaves(start), jax.tree.leaves(fitted.adapters)
        assert all(np.not_equal(x, y).any() for x, y in zip(first, last, strict=True))
