"""Optimizers: the learning rate step by step, clipping, and LoRA+'s faster B."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax import train
from lora_jax.sweep.fields import with_fields

pytestmark = pytest.mark.compiled_quickly

RISE = 0.5 * np.arange(5) / 5
SHARE = np.arange(15) / 16  # of the fall, which is complete one step after the last
RATES = {
    "cosine": ({}, [*RISE, *(0.25 * (1 + np.cos(np.pi * SHARE)))]),
    "cosine to a tenth": ({"end": 0.1}, [*RISE, *(0.05 + 0.225 * (1 + np.cos(np.pi * SHARE)))]),
    "linear": ({"schedule": "linear"}, [*RISE, *(0.5 * (1 - SHARE))]),
    "linear to a half": ({"schedule": "linear", "end": 0.5}, [*RISE, *(0.5 - 0.25 * SHARE)]),
    "constant": ({"schedule": "constant"}, [*RISE, *[0.5] * 15]),
    "no warmup": ({"warmup": 0.0}, 0.25 * (1 + np.cos(np.pi * np.arange(20) / 21))),
}


def adapters(value: float = 1.0) -> dict[str, lj.Adapter]:
    return {"w": lj.Adapter(jnp.full((1, 1), value), jnp.full((1, 1), value))}


@pytest.mark.parametrize(("options", "rates"), RATES.values(), ids=RATES)
def test_the_learning_rate_of_every_step(options, rates):
    config = train.OptimizerConfig(**{"steps": 20, "learning_rate": 0.5, "warmup": 0.25, **options})
    schedule = train.learning_rate_schedule(config)
    np.testing.assert_allclose([schedule(step) for step in range(20)], rates, atol=1e-6)
    tx = train.make_optimizer(config)
    state, moves = tx.init(adapters()), []
    for _ in range(20):
        updates, state = tx.update(adapters(), state, adapters())
        moves.append(-float(updates["w"].a[0, 0]))  # Adam's update of a constant gradient is 1
    np.testing.assert_allclose(moves, rates, atol=1e-5)


def of_optax(config: train.OptimizerConfig) -> optax.Schedule:
    """The schedule put together from those of optax."""
    peak, rise = config.learning_rate, round(config.warmup * config.steps)
    fall = config.steps + 1 - rise
    falling = {
        "cosine": optax.cosine_decay_schedule(peak, fall, alpha=config.end),
        "linear": optax.linear_schedule(peak, config.end * peak, fall),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if not rise:
        return falling
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rise), falling], [rise])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_numbers_that_differ_within_a_program(schedule):
    """As in a sweep, where each run has its own, and there is one program for all."""
    columns = {
        "learning_rate": [3e-4, 1e-2, 0.5, 0.1],
        "warmup": [0.0, 0.1, 0.25, 23 / 40],
        "end": [0.0, 0.1, 0.0, 0.5],
        "weight_decay": [0.0, 0.01, 0.1, 0.3],
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    configs = [train.OptimizerConfig(steps=40, schedule=schedule, **row) for row in rows]
    steps = jnp.arange(40)

    def traced(numbers):
        config = with_fields(configs[0], numbers)
        params, tx = adapters(3.0), train.make_optimizer(config)
        state = optax.tree.set(tx.init(params), count=jnp.asarray(30))
        updates, _ = tx.update(adapters(0.0), state, params)
        return jax.vmap(train.learning_rate_schedule(config))(steps), updates["w"].b[0, 0]

    numbers = {name: jnp.asarray(values) for name, values in columns.items()}
    rates, moves = jax.jit(jax.vmap(traced))(numbers)
    expected = np.stack([[float(of_optax(x)(step)) for step in range(40)] for x in configs])
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-9)
    decays = expected[:, 30] * np.array(columns["weight_decay"]) * 3.0
    np.testing.assert_allclose(moves, -decays, rtol=1e-5)


def test_lora_plus_moves_b_faster():
    tx = train.make_optimizer(train.OptimizerConfig(5, 0.1, lora_plus_ratio=4.0, warmup=0.0))
    updates, _ = tx.update(adapters(), tx.init(adapters()), adapters())
    assert float(updates["w"].b[0, 0]) == pytest.approx(4 * float(updates["w"].a[0, 0]), rel=1e-5)


@pytest.mark.parametrize(("clip", "size"), [(1.0, 2**-0.5), (None, 30.0), (100.0, 30.0)])
def test_clipping_is_of_all_adapters_together(clip, size):
    """Seen after eps, which is larger than any gradient here: the update is g / eps."""
    tx = train.make_optimizer(
        train.OptimizerConfig(5, 1.0, warmup=0.0, clip=clip, b1=0.0, b2=0.0, eps=1e6)
    )
    updates, _ = tx.update(adapters(30.0), tx.init(adapters()), adapters())
    np.testing.assert_allclose(-1e6 * updates["w"].a, size, rtol=1e-3)


def test_weight_decay_is_decoupled():
    tx = train.make_optimizer(train.OptimizerConfig(5, 0.1, warmup=0.0, weight_decay=0.2))
    updates, _ = tx.update(adapters(0.0), tx.init(adapters()), adapters(3.0))
    np.testing.assert_allclose(updates["w"].b, -0.1 * 0.2 * 3.0, rtol=1e-5)


ERRORS = [
    ({"steps": 0}, "steps is 0, expected at least 1"),
    ({"learning_rate": -1.0}, "learning_rate is -1.0, expected a positive number"),
    ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"lora_plus_ratio": 0.0}, "lora_plus_ratio is 0.0, expected a positive number"),
    ({"schedule": "step"}, "schedule is 'step', expected one of cosine, linear, constant"),
    ({"warmup": 1.0}, "warmup is 1.0, expected a share of the steps below 1"),
    ({"end": 2.0}, "end is 2.0, expected a share of the learning rate"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1, expected at least 0"),
    ({"clip": 0.0}, "clip is 0.0, expected a positive number, or None"),
    ({"b2": 1.0}, "b2 is 1.0, expected at least 0, below 1"),
]


@pytest.mark.parametrize(("values", "sentence"), ERRORS)
def test_optimizers_that_make_no_sense(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        train.OptimizerConfig(**{"steps": 1, "learning_rate": 1.0, **values})
