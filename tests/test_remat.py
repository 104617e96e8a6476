"""What a layer saves, by the name of the policy: equal gradients, and fewer products the more."""

from __future__ import annotations

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from family_cases import CASES, TOKENS
from jax.extend import core as jex

from lora_jax.models import remat
from lora_jax.models.decoder import Decoder, parameter_shapes
from lora_jax.models.families import from_hf

pytestmark = pytest.mark.compiled_quickly

LAYERS = 2


def config_of(case, **run):
    return dataclasses.replace(
        from_hf(CASES[case]), num_layers=LAYERS, windowed_layers=(), window=None, **run
    )


def embeddings_of(config):
    return 0.5 * jax.random.normal(jax.random.key(1), (*TOKENS.shape, config.dim))


def loss(config, params, embeddings):
    hidden = Decoder(config).apply(
        {"params": params}, TOKENS, embeddings=embeddings, method="hidden"
    )
    return jnp.sin(hidden).sum()


def equations(jaxpr):
    """All equations, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jex.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize(
    ("policy", "repeated"),
    [
        *[("layer-offloaded", 6), ("layer", 6), ("attended", 6), ("attended-offloaded", 6)],
        *[("stream", 5), ("attention", 2), ("products", 0)],
    ],
)
def test_products_that_are_taken_again(policy, repeated):
    """Of the seven of a layer: once forward, once backward, and these once more."""
    config = config_of("llama", remat=policy, scan_layers=False, biases=())
    shapes = parameter_shapes(config)
    kernels = collections.Counter(
        x.shape for x in jax.tree.leaves(shapes["layers_0"]) if len(x.shape) == 2
    )
    assert sum(kernels.values()) == 7
    gradient = jax.grad(functools.partial(loss, config), argnums=1)
    jaxpr = jax.make_jaxpr(gradient)(shapes, embeddings_of(config)).jaxpr
    products = [
        e
        for e in equations(jaxpr)
        if e.primitive.name == "dot_general" and any(x.aval.shape in kernels for x in e.invars)
    ]
    assert len(products) == LAYERS * (7 + 7 + repeated)


@pytest.mark.parametrize("case", ["gemma2", "qwen3", "qwen3_moe"])
def test_gradients_are_the_same(case):
    """With norms behind a block, norms of queries and keys, and experts."""
    plain = config_of(case)
    params = Decoder(plain).init(jax.random.key(0), TOKENS)["params"]
    results = {}
    for policy in (None, *remat.NAMED):
        config = dataclasses.replace(plain, remat=policy)
        gradient = jax.jit(
            jax.grad(functools.partial(loss, config), argnums=(0, 1)),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        results[policy] = jax.tree.leaves(gradient(params, embeddings_of(config)))
    for policy in remat.NAMED:
        for got, wanted in zip(results[policy], results[None], strict=True):
            assert jnp.abs(got - wanted).max() <= 1e-5 * jnp.abs(wanted).max()


def test_fused_attention_is_saved_with_its_statistics():
    """Its primitive is known by name, for this machine may have none."""
    fused = collections.namedtuple("Primitive", "name")("dot_product_attention_fwd_wrapper")
    saves = {name for name in remat.NAMED if remat.policy(name)(fused) is True}
    assert saves == {"attended", "attended-offloaded", "attention", "products"}
