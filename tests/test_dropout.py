"""Dropout of the update's input: by key, unbiased, and never without a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax

import lora_jax as lj

pytestmark = pytest.mark.compiled_quickly

X = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
RATE = 0.25


def make(shape=(32, 6), layout="i o", dropout=RATE):
    base = {"w": jnp.zeros(shape), "v": jnp.zeros(shape)}
    rules = [lj.LoraRule("w|v", 3, 3, layout=layout, dropout=dropout)]
    shapes = jax.eval_shape(lambda: lj.init_adapters(jax.random.key(0), base, rules))
    return base, reference.randomized(shapes)


@jax.jit
def products(base, adapters, key):
    """`x @ W` and `x @ V`, of a base of zeros: the updates alone."""
    fn = lj.adapt(lambda tree: (X @ tree["w"], X @ tree["v"]))
    return fn(lj.combine(base, adapters, dropout_key=key))


def test_none_without_a_key():
    base, adapters = make()
    np.testing.assert_allclose(
        products(base, adapters, None)[0], X @ reference.dense(base["w"], adapters["w"]), atol=1e-5
    )


@pytest.mark.compiled_quickly(False)
def test_none_without_a_rate():
    base, adapters = make(dropout=0.0)
    np.testing.assert_array_equal(
        products(base, adapters, jax.random.key(0)), products(base, adapters, None)
    )


def test_the_key_decides():
    base, adapters = make()
    once, again, other = (products(base, adapters, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert not np.allclose(once[0], other[0])
    raw = products(base, adapters, jax.random.key_data(jax.random.key(1)))
    np.testing.assert_array_equal(once, raw)  # old-style keys are arrays of integers


def test_each_leaf_drops_others():
    base, adapters = make()
    adapters["v"] = adapters["w"]
    w, v = products(base, adapters, jax.random.key(0))
    assert not np.allclose(w, v)


def test_expectation_is_the_undropped_product():
    """And each draw drops whole inputs, scaling the others by 1 / (1 - rate)."""
    base, adapters = make()
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = np.asarray(jax.vmap(lambda key: products(base, adapters, key)[0])(keys), np.float64)
    wanted = np.asarray(products(base, adapters, None)[0])
    error = draws.std(0) / np.sqrt(len(keys))
    assert (np.abs(draws.mean(0) - wanted) < 5 * error).all()
    # The variance of Σ x_i m_i w_i / (1 - p), for independent masks m, is p / (1 - p) Σ (x_i w_i)².
    w = reference.dense(base["w"], adapters["w"])
    variance = RATE / (1 - RATE) * (X.astype(float) ** 2 @ w**2)
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.2)


def test_the_base_is_never_dropped():
    base, adapters = make()
    base = {"w": jnp.ones((32, 6)), "v": jnp.ones((32, 6))}
    no_update = jax.tree.map(jnp.zeros_like, adapters)
    np.testing.assert_allclose(
        products(base, no_update, jax.random.key(0))[0], X @ np.ones((32, 6)), rtol=1e-5
    )


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_each_layer_of_a_scan_drops_others(run):
    base, adapters = make((3, 32, 6), "b i o")
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), adapters)

    def fn(adapters, key):
        tree = lj.combine(base, adapters, dropout_key=key)
        scan = lj.adapt(lambda tree: lax.scan(lambda c, w: (c, X @ w), 0, tree["w"])[1])
        return scan({"w": tree["w"]})

    layers = np.asarray(run(fn)(same, jax.random.key(0)))
    assert not np.allclose(layers[0], layers[1])
    assert not np.allclose(layers[1], layers[2])
    np.testing.assert_array_equal(layers, run(fn)(same, jax.random.key(0)))


def test_gradient_is_that_of_what_was_kept():
    """Doubling an input that was dropped changes nothing, in values and gradients alike."""
    base, adapters = make()
    key = jax.random.key(3)
    jacobian = jax.jacobian(
        lambda x: lj.adapt(lambda t: x @ t["w"])(
            {"w": lj.combine(base, adapters, dropout_key=key)["w"]}
        )
    )(jnp.asarray(X[0]))  # [out, in]
    w = reference.dense(base["w"], adapters["w"])
    kept = np.abs(jacobian).max(0) > 0
    assert 0 < kept.sum() < 32
    np.testing.assert_allclose(jacobian, np.where(kept[:, None], w / (1 - RATE), 0).T, atol=1e-5)


@pytest.mark.parametrize("key", [0, "key"])
def test_refuses_what_is_no_key(key):
    with pytest.raises(TypeError, match=r"dropout_key is .*, expected a JAX key"):
        lj.combine(*make(), dropout_key=key)
