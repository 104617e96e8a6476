"""`adapt` on models that nobody wrote for us: Flax Linen under scan and remat, Flax NNX, Equinox.

The expectation is the model itself, called with ordinary dense weights `W + scale · B A`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_models import equinox_vision_transformer, linen_scanned_encoder, nnx_llama

import lora_jax as lj

MODELS = {
    "linen: scanned, remat": linen_scanned_encoder,
    "nnx: tied head, remat": nnx_llama,
    "equinox": equinox_vision_transformer,
}
RANK, ALPHA = 4, 8.0


def is_leaf(x):
    return isinstance(x, lj.QuantizedArray | lj.Adapter) or x is None


def dense_weights(base, adapters):
    """Every adapted weight as `W + (alpha/r) B A` in its own axes, without the library's help."""

    def one(weight, adapter):
        if isinstance(weight, lj.QuantizedArray):
            weight = lj.dequantize(weight)
        if adapter is None:
            return weight
        update = jnp.matmul(adapter.b, adapter.a, precision="highest")  # [b..., out, in]
        if adapter.layout.removeprefix("b ").startswith("i"):
            update = jnp.swapaxes(update, -1, -2)
        return weight + (ALPHA / RANK) * update.reshape(weight.shape)

    return jax.tree.map(one, base, adapters, is_leaf=is_leaf)


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def model(request):
    return request.param()


@pytest.fixture(scope="module")
def trees(model):
    """A 4-bit base, and adapters at their start."""
    base = model.params
    for pattern, layout in model.weights.items():
        base = lj.quantize(base, pattern, layout=layout)
    rule = lj.LoraRule("|".join(model.weights), RANK, ALPHA)  # the base knows the layouts
    return base, lj.init_adapters(jax.random.key(2), base, [rule])


@pytest.fixture(scope="module")
def moved(trees):
    """The same trees as after some training: B no longer zero."""
    base, adapters = trees
    random = np.random.default_rng(3)
    return base, jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * random.standard_normal(x.shape), x.dtype), adapters
    )


def adapted(model):
    return lambda base, adapters: lj.adapt(model.apply)(lj.combine(base, adapters), *model.inputs)


def through_dense_weights(model):
    return lambda base, adapters: model.apply(dense_weights(base, adapters), *model.inputs)


def test_starts_as_its_base(model, trees):
    """Law 1: with B = 0 nothing has changed, bit for bit."""
    actual = eqx.filter_jit(adapted(model))(*trees)
    expected = eqx.filter_jit(through_dense_weights(model))(*trees)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.compiled_quickly
def test_values_and_gradients_equal_those_of_dense_weights(model, moved):
    base, adapters = moved
    shape = eqx.filter_eval_shape(model.apply, model.params, *model.inputs).shape
    direction = np.random.default_rng(4).standard_normal(shape).astype(np.float32)

    def output_and_gradients(call):
        def objective(adapters, base):
            output = call(base, adapters)
            return jnp.sum(direction * output), output

        gradients, output = eqx.filter_jit(jax.grad(objective, has_aux=True))(adapters, base)
        return [output, *jax.tree.leaves(gradients)]

    actual = output_and_gradients(adapted(model))
    expected = output_and_gradients(through_dense_weights(model))
    for got, wanted in zip(actual, expected, strict=True):
        size = np.abs(wanted).max()
        assert size > 0
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * size)
