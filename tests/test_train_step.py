"""One step: its numbers against NumPy, in parts as at once, its end at NaN, on eight devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import linear
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_batches import adapted, batch, decoder

import lora_jax as lj
from lora_jax import train

pytestmark = pytest.mark.compiled_quickly

SGD = optax.sgd(0.05)


def start(tx: Any = SGD, **options: Any) -> tuple[Any, train.State]:
    base, adapters = linear.make(**options)
    return base, train.init_state(jax.random.key(7), adapters, tx)


def leaves(tree: Any) -> list[np.ndarray]:
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return [np.array(plain(x)) for x in jax.tree.leaves(tree)]


def test_steps_are_those_of_float64_numpy():
    base, state = start()
    step = train.make_step(linear.loss_fn, SGD)
    w, a, b = (np.float64(x) for x in (base["w"], state.adapters["w"].a, state.adapters["w"].b))
    for number, data in enumerate(linear.batches(4), 1):
        wanted, grad_a, grad_b = linear.in_numpy(w, a, b, data)
        state, metrics = step(state, base, data)
        assert metrics["loss"] == pytest.approx(wanted, rel=1e-5)
        norm = np.sqrt((grad_a**2).sum() + (grad_b**2).sum())
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert set(metrics) == {"loss", "grad_norm", "weight", "mean_x"}
        np.testing.assert_allclose(state.last_good["w"].a, a, rtol=1e-4, atol=1e-6)
        a, b = a - 0.05 * grad_a, b - 0.05 * grad_b
        np.testing.assert_allclose(state.adapters["w"].a, a, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.adapters["w"].b, b, rtol=1e-4, atol=1e-6)
        assert int(state.step) == number


def test_what_was_given_is_left_alone():
    base, adapters = linear.make()
    before = jax.tree.map(np.array, (base, adapters))
    state = train.init_state(jax.random.key(7), adapters, SGD)
    train.make_step(linear.loss_fn, SGD)(state, base, linear.batches(1)[0])
    jax.tree.map(np.testing.assert_array_equal, before, (base, adapters))


@pytest.mark.parametrize("number", [2, 4, 8])
def test_parts_of_a_batch_are_the_whole(number):
    """Law: gradient accumulation equals the large batch, to 1e-6."""
    data = linear.batches(1, rows=16)[0]
    results = []
    for accumulate in (1, number):
        base, state = start()
        state = state._replace(adapters=jax.tree.map(lambda x: x + 0.3, state.adapters))
        step = train.make_step(linear.loss_fn, SGD, accumulate=accumulate)
        state, metrics = step(state, base, data)
        results.append((state.adapters, metrics))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), *results)


def test_parts_of_a_batch_of_text(monkeypatch):
    """Through the decoder, with weights that differ between rows, one of which has none."""
    monkeypatch.setattr(train.cross_entropy, "HALVINGS", 1)
    base, adapters = adapted(tied_head=True, quantized=False)
    data, other = batch(rows=4, supervised=0.3), batch(rows=4, supervised=0.9, seed=1)
    data = jax.tree.map(lambda *xs: np.concatenate(xs), data, other)
    data.weights[2] = 0
    loss_fn = train.next_token_loss(decoder(tied_head=True), chunk=40)
    results = []
    for accumulate in (1, 4):
        state = train.init_state(jax.random.key(0), adapters, SGD)
        step = train.make_step(loss_fn, SGD, accumulate=accumulate)
        state, metrics = step(state, base, data)
        results.append((state.adapters, metrics))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *results)
    assert results[1][1]["tokens"] == (data.segment_ids > 0).sum()


def test_parts_without_a_weight_count_equally():
    def loss_fn(adapters, base, data, key):
        return jnp.mean(data["x"]) * adapters["w"].b.sum()

    base, state = start()
    data = linear.batches(1, rows=6)[0]
    state, metrics = train.make_step(loss_fn, SGD, accumulate=3)(state, base, data)
    np.testing.assert_allclose(state.adapters["w"].b, -0.05 * data["x"].mean(), rtol=1e-5)
    assert set(metrics) == {"loss", "grad_norm"}


def test_sums_of_gradients_are_wide():
    """A thousand bfloat16 gradients of 1: added up in bfloat16 they would stop at 256."""
    adapters = {"w": jnp.zeros((), jnp.bfloat16)}
    state = train.init_state(jax.random.key(0), adapters, optax.sgd(1.0))
    step = train.make_step(lambda a, b, x, key: a["w"] * x.sum(), optax.sgd(1.0), accumulate=1000)
    state, _ = step(state, None, np.ones(1000, np.float32))
    assert state.adapters["w"].dtype == jnp.bfloat16
    assert state.adapters["w"] == -1


def test_every_step_and_part_has_keys_of_its_own():
    def loss_fn(adapters, base, data, key):
        return jax.random.uniform(key) + data.mean() + 0 * adapters["w"].b.sum()

    def transform(key, data):
        return data + jax.random.uniform(key)

    def losses(accumulate, seed):
        state = train.init_state(jax.random.key(seed), linear.make()[1], SGD)
        step = train.make_step(loss_fn, SGD, accumulate=accumulate, transform=transform)
        values = []
        for _ in range(3):
            state, metrics = step(state, None, np.zeros(4, np.float32))
            values.append(float(metrics["loss"]))
        return values

    seen = [x for options in ((1, 0), (1, 1), (2, 0)) for x in losses(*options)]
    assert len(set(seen)) == 9
    assert losses(2, 0) == seen[6:]


def test_dropout_of_a_step():
    base, state = start(dropout=0.5)
    state = state._replace(adapters=jax.tree.map(lambda x: x + 0.3, state.adapters))
    data = linear.batches(1)[0]
    step = train.make_step(linear.loss_fn, optax.set_to_zero())
    losses = []
    for _ in range(2):
        state, metrics = step(state._replace(opt_state=optax.EmptyState()), base, data)
        losses.append(float(metrics["loss"]))
    assert losses[0] != losses[1]  # nothing but the step's number has changed


# What is not finite


def spoilt(number: int, at: int, name: str) -> list:
    data = linear.batches(number)
    data[at - 1][name] = data[at - 1][name] * np.float32(np.nan)
    return data


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_state_stays_at_its_last_good_adapters(at):
    """Whatever follows: a good batch, or many."""
    tx = optax.adam(0.1)
    base, state = start(tx)
    step = train.make_step(linear.loss_fn, tx)
    seen = [leaves(state.adapters)]
    for number, data in enumerate(spoilt(6, at, "y"), 1):
        state, _ = step(state, base, data)
        assert bool(state.diverged) == (number >= at)
        seen.append(leaves(state.adapters))
        if number == at:
            kept = leaves(state)
    for one, other in zip(leaves(state), kept, strict=True):
        np.testing.assert_array_equal(one, other)
    assert int(state.step) == at - 1
    # Those whose loss was the last finite one, one update before those that were refused.
    for one, other in zip(leaves(state.last_good), seen[max(at - 2, 0)], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_gradient_that_is_not_finite():
    def cliff(adapters, base, data, key):
        return jnp.sqrt(0.0 * adapters["w"].b).sum()  # 0, with a slope of NaN

    base, state = start()
    before = leaves(state.adapters)
    state, metrics = train.make_step(cliff, SGD)(state, base, None)
    assert bool(state.diverged)
    assert metrics["loss"] == 0
    for tree in (state.adapters, state.last_good):
        for one, other in zip(leaves(tree), before, strict=True):
            np.testing.assert_array_equal(one, other)


def test_diverged_says_so():
    error = train.Diverged(3, {"w": 1}, float("nan"))
    assert str(error).startswith("the loss is nan at step 3, or its gradient is not finite")
    assert (error.step, error.adapters) == (3, {"w": 1})


# Transforms, devices, errors


def test_many_runs_at_once():
    """A step under vmap over states is a loop over them: what a sweep does."""
    base, adapters = linear.make()
    data = linear.batches(1)[0]
    states = [train.init_state(jax.random.key(k), adapters, SGD) for k in range(3)]
    states = [
        state._replace(adapters=jax.tree.map(lambda x, k=k: x * (k + 1.0), state.adapters))
        for k, state in enumerate(states)
    ]

    def one(state):
        return train.train_step(state, base, data, loss_fn=linear.loss_fn, tx=SGD)

    together = jax.jit(jax.vmap(one))(jax.tree.map(lambda *xs: jnp.stack(xs), *states))
    for k, state in enumerate(states):
        for x, y in zip(leaves(jax.jit(one)(state)), leaves(together), strict=True):
            np.testing.assert_allclose(x, y[k], rtol=1e-5, atol=1e-6)


def test_on_eight_devices(caplog):
    """State and rows are spread: the same numbers, one program, and everything stays in place."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    base, adapters = linear.make()
    adapters = jax.tree.map(lambda x: x + 0.3, adapters)
    data = linear.batches(3, rows=32)
    tx = optax.adam(0.1)
    alone = train.init_state(jax.random.key(0), adapters, tx)
    step = train.make_step(linear.loss_fn, tx, accumulate=2)
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    spread = train.init_state(jax.random.key(0), jax.device_put(adapters, everywhere), tx)
    placement = jax.tree.map(lambda x: x.sharding, spread)
    assert {len(x.device_set) for x in jax.tree.leaves(placement)} == {8}
    step_of_spread = train.make_step(linear.loss_fn, tx, accumulate=2, shardings=placement)
    base_everywhere = jax.device_put(base, everywhere)
    for one in data:
        alone, wanted = step(alone, base, one)
        with jax.log_compiles():
            spread, metrics = step_of_spread(spread, base_everywhere, jax.device_put(one, rows))
        for x, y in zip(leaves((alone, wanted)), leaves((spread, metrics)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        assert jax.tree.map(lambda x: x.sharding, spread) == placement
    assert caplog.text.count("Finished XLA compilation of jit(train_step)") == 1


def test_old_style_keys_are_understood():
    _, adapters = linear.make()
    old = train.init_state(jax.random.PRNGKey(3), adapters, SGD)
    new = train.init_state(jax.random.key(3), adapters, SGD)
    for x, y in zip(leaves(old), leaves(new), strict=True):
        np.testing.assert_array_equal(x, y)


ERRORS = {
    "no parts": ({"accumulate": 0}, "accumulate is 0, expected at least 1"),
    "parts of unequal size": ({"accumulate": 3}, r"accumulate is 3, .* shape \(8,\); expected"),
}


@pytest.mark.parametrize(("options", "sentence"), ERRORS.values(), ids=ERRORS)
def test_errors(options, sentence):
    base, state = start()
    with pytest.raises(ValueError, match=sentence):
        train.make_step(linear.loss_fn, SGD, **options)(state, base, linear.batches(1)[0])


def test_a_metric_that_is_no_number():
    def loss_fn(adapters, base, data, key):
        return adapters["w"].b.sum(), {"errors": data["y"]}

    base, state = start()
    with pytest.raises(ValueError, match=r"the metric 'errors' has shape \(8, 5\), expected a sc"):
        train.make_step(loss_fn, SGD)(state, base, linear.batches(1)[0])


def test_abstractly():
    base, adapters = linear.make()
    shapes = jax.eval_shape(lambda: train.init_state(jax.random.key(0), adapters, SGD))
    state, metrics = jax.eval_shape(
        train.make_step(linear.loss_fn, SGD), shapes, base, linear.batches(1)[0]
    )
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, shapes)
    assert metrics["loss"].shape == ()
    assert isinstance(state.adapters["w"], lj.Adapter)
