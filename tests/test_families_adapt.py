"""Adapters on 4-bit bases of other families: biases, soft caps, and one adapter for each expert."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from family_cases import CASES, TOKENS

import lora_jax as lj
from lora_jax.core.rules import path_string
from lora_jax.models.decoder import Decoder, parameter_shapes
from lora_jax.models.families import from_hf

pytestmark = pytest.mark.compiled_quickly

EXPERTS = r"mlp/experts/\w+/kernel"
ROUTER = "router/kernel"
# Compiled in half of the time: a program here runs once.
compiled = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}, static_argnums=0
)


def layouts(config):
    """What is adapted, and how; all but the router is in 4 bits."""
    layers = "b " if config.scan_layers else ""
    if not config.num_experts:
        return {r"(attn|mlp)/\w+/kernel": f"{layers}i o"}
    matrix = f"{layers}i o"
    return {r"attn/\w+/kernel": matrix, EXPERTS: f"{layers}b i o", ROUTER: matrix}


@compiled
def make_trees(config, params):
    base, rules = params, []
    for pattern, layout in layouts(config).items():
        if pattern != ROUTER:
            base = lj.quantize(base, pattern, block_size=32, layout=layout)
        rules.append(lj.LoraRule(pattern, rank=2, alpha=4, layout=layout))
    return base, lj.init_adapters(jax.random.key(0), base, rules)


def written_out(base, adapters):
    """Every weight dense, with its update: W + scale · (B A)ᵀ."""

    def one(leaf, adapter):
        leaf = lj.dequantize(leaf) if isinstance(leaf, lj.QuantizedArray) else leaf
        if adapter is None:
            return leaf
        return leaf + adapter.scale * jnp.swapaxes(adapter.b @ adapter.a, -1, -2)

    is_leaf = lambda x: isinstance(x, lj.QuantizedArray | lj.Adapter) or x is None  # noqa: E731
    return jax.tree.map(one, base, adapters, is_leaf=is_leaf)


@pytest.mark.parametrize(
    ("case", "layers", "run", "leaves"),
    [
        ("qwen2", 2, {}, 7),
        ("gemma2", 2, {"remat": "nothing_saveable"}, 7),
        ("qwen3_moe", 2, {"remat": "nothing_saveable"}, 8),
        ("qwen3_moe", 1, {"scan_layers": False}, 8),
    ],
    ids=["biases", "soft cap", "experts, scanned", "experts, unrolled"],
)
def test_every_weight_has_its_adapter(case, layers, run, leaves):
    fields = CASES[case] | {"num_hidden_layers": layers, "intermediate_size": 64}
    config = dataclasses.replace(from_hf(fields | {"moe_intermediate_size": 64}), **run)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * 0.3).astype(x.dtype), parameter_shapes(config)
    )
    base, adapters = make_trees(config, params)
    adapters = reference.randomized(adapters)
    model = Decoder(config)
    direction = rng.normal(size=(*TOKENS.shape, config.vocab_size))

    def adapted(base, adapters):
        return lj.adapt(model.apply)({"params": lj.combine(base, adapters)}, TOKENS)

    def dense(base, adapters):
        return model.apply({"params": written_out(base, adapters)}, TOKENS)

    @compiled
    def logits_and_gradients(apply, base, adapters):
        def objective(adapters):
            logits = apply(base, adapters)
            return (logits * direction).sum(), logits

        gradients, logits = jax.grad(objective, has_aux=True)(adapters)
        return [logits, *jax.tree.leaves(gradients)]

    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(adapters)]
    assert len(paths) == 2 * leaves  # an A and a B each
    results = (logits_and_gradients(apply, base, adapters) for apply in (adapted, dense))
    for path, got, expected in zip(["logits", *paths], *results, strict=True):
        size = np.abs(expected).max()
        assert size > 0, path
        np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5 * size, err_msg=path)

    report = lj.explain(model.apply)({"params": lj.combine(base, adapters)}, TOKENS)
    assert {report.status(path) for path in report.uses} == {"factored"}
    for path in report.uses:
        if re.search(EXPERTS, path):
            assert [use.primitive for use in report.uses[path]] == ["grouped_dot"]
