"""`adapt` on Flax Linen, Flax NNX and Equinox: layers of every kind that has weight matrices.

The expectation is the model itself on the dense weights `W + scale · B A` that NumPy computed, and,
where B is still zero, the model on its own weights, bit for bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from small_models import KEY, MODELS, equinox_mlp, linen_block, nnx_block

import lora_jax as lj


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    name = request.param
    loops = "scan" in name or "remat" in name
    return dataclasses.replace(MODELS[name](), loops=loops, narrow="bfloat16" in name)


@pytest.fixture(scope="module", params=["nf4", "float"])
def trees(request, model):
    """The base, adapters at their start, and adapters as after some training."""
    base, rules = model.params, []
    for pattern, layout in model.weights.items():
        if request.param == "nf4":
            base = lj.quantize(base, pattern, block_size=32, layout=layout)
            layout = None  # the rule takes that of the leaf
        rules.append(lj.LoraRule(pattern, 3, 6, layout=layout))
    start = lj.init_adapters(jax.random.key(2), base, rules)
    return base, start, reference.randomized(start)


def is_leaf(x: Any) -> bool:
    return x is None or isinstance(x, lj.QuantizedArray | lj.Adapter)


def adapted_leaves(base: Any, adapters: Any) -> list[tuple[Any, lj.Adapter]]:
    """Each adapted weight of the base, and its adapter."""
    pairs = zip(
        jax.tree.leaves(base, is_leaf=is_leaf),
        jax.tree.leaves(adapters, is_leaf=is_leaf),
        strict=True,
    )
    return [(weight, adapter) for weight, adapter in pairs if isinstance(adapter, lj.Adapter)]


def without_weights(base: Any, adapters: Any) -> Any:
    """The base with holes where there are adapters: one and the same in floats and in 4 bits."""
    return jax.tree.map(
        lambda leaf, adapter: "hole" if isinstance(adapter, lj.Adapter) else leaf,
        base,
        adapters,
        is_leaf=is_leaf,
    )


def with_weights(rest: Any, weights: list[Any]) -> Any:
    """With dense weights in the holes."""
    remaining = iter(weights)
    return jax.tree.map(lambda x: next(remaining) if isinstance(x, str) else x, rest)


def arrays(result: Any) -> list[np.ndarray]:
    """Everything that a model returned, and that is not a key."""
    leaves = [x for x in jax.tree.leaves(result) if eqx.is_array(x)]
    return [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]


def values_and_gradients(call: Callable) -> Callable:
    """Of a function `call(x, base)`: all results, and the gradients of a sum of the first."""

    def total(x, base):
        results = arrays(call(x, base))
        direction = jnp.cos(jnp.arange(results[0].size)).reshape(results[0].shape)
        return jnp.sum(results[0] * direction), results

    def run(x, base):
        (_, results), gradients = jax.value_and_grad(total, has_aux=True)(x, base)
        return results, gradients

    return eqx.filter_jit(run)


@pytest.fixture(scope="module")
def adapted(model):
    return values_and_gradients(lambda a, base: lj.adapt(model.apply)(lj.combine(base, a)))


@pytest.fixture(scope="module")
def dense(model):
    """The model on dense weights, and its gradients with respect to them."""
    return values_and_gradients(lambda weights, rest: model.apply(with_weights(rest, weights)))


def assert_near(actual: Any, wanted: Any, tolerance: float) -> None:
    """Within `tolerance` of the largest value."""
    actual, wanted = (np.asarray(x).astype(np.float64) for x in (actual, wanted))
    assert actual.shape == wanted.shape
    size = max(np.abs(wanted).max(), 1e-3)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * size)


def test_starts_as_its_base(trees, adapted, dense):
    """Law 1, jitted and beside the gradients: bit for bit."""
    base, start, _ = trees
    weights = [
        lj.dequantize(w) if isinstance(w, lj.QuantizedArray) else w
        for w, _ in adapted_leaves(base, start)
    ]
    actual, wanted = adapted(start, base)[0], dense(weights, without_weights(base, start))[0]
    assert len(actual) == len(wanted) > 0
    for one, other in zip(actual, wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_starts_as_its_base_eagerly(model, trees):
    """Law 1, bit for bit."""
    base, start, _ = trees
    weights = [
        lj.dequantize(w) if isinstance(w, lj.QuantizedArray) else w
        for w, _ in adapted_leaves(base, start)
    ]
    actual = arrays(lj.adapt(model.apply)(lj.combine(base, start)))
    wanted = arrays(model.apply(with_weights(without_weights(base, start), weights)))
    for one, other in zip(actual, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_equals_dense_weights(model, trees, adapted, dense):
    """Values, and gradients by the chain rule: dA = s Bᵀ dW and dB = s dW Aᵀ, for s = 2."""
    base, start, moved = trees
    pairs = adapted_leaves(base, moved)
    weights = [jnp.asarray(reference.dense(*pair), jnp.float32) for pair in pairs]
    actual, gradients = adapted(moved, base)
    wanted, of_weights = dense(weights, without_weights(base, moved))
    for one, other in zip(actual, wanted, strict=True):
        assert_near(one, other, 2e-2 if model.narrow else 1e-5)
    assert not np.allclose(adapted(start, base)[0][0], wanted[0], rtol=0.1)
    for (_, moments), (_, adapter), of_weight in zip(
        adapted_leaves(base, gradients), pairs, of_weights, strict=True
    ):
        d_w = reference.matrix(np.asarray(of_weight).astype(np.float64), adapter.layout)
        a, b = (np.asarray(x).astype(np.float64) for x in (adapter.a, adapter.b))
        tolerance = 2e-2 if model.narrow else 2e-5
        assert_near(moments.a, 2 * b.swapaxes(-1, -2) @ d_w, tolerance)
        assert_near(moments.b, 2 * d_w @ a.swapaxes(-1, -2), tolerance)
        assert np.abs(d_w).max() > 1e-3


def test_every_weight_stays_factored(model, trees):
    report = lj.explain(model.apply)(lj.combine(*trees[:2]))
    assert report.uses
    assert all(report.status(path) == "factored" for path in report.uses)


PATHS = {
    "linen": (linen_block, "Dense_0/kernel", "i o"),
    "nnx": (nnx_block, "layers/1/kernel", "i o"),
    "equinox": (equinox_mlp, "layers/2/weight", "o i"),
}


@pytest.mark.parametrize(("make", "path", "layout"), PATHS.values(), ids=PATHS)
def test_paths_are_what_a_reader_would_write(make, path, layout):
    params = make().params
    rules = [lj.LoraRule(f"^{path}$", 2, layout=layout)]
    adapters = lj.init_adapters(KEY, params, rules)
    assert list(lj.explain(make().apply)(lj.combine(params, adapters)).uses) == [path]


@pytest.mark.parametrize("pattern", ["count", "key"])
def test_random_state_of_nnx(pattern):
    """Keys are no weights; the count of those used is an integer, which nothing can adapt."""
    state = nnx_block().params
    with pytest.raises((ValueError, TypeError)):
        lj.quantize(state, pattern)
    with pytest.raises(ValueError, match=pattern):
        lj.init_adapters(KEY, state, [lj.LoraRule(pattern)])
