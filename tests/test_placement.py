"""Weights in host memory: the numbers are those of weights on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.placement import Stack

LAYERS, WIDTH = 5, 32
X = jnp.sin(jnp.arange(4.0 * WIDTH)).reshape(4, WIDTH)


def forward(params, x):
    def layer(x, w):
        return jax.checkpoint(lambda w, x: jnp.tanh(x @ w["in"] + w["bias"]) @ w["out"])(w, x), x

    x, seen = jax.lax.scan(layer, x, params["layers"])
    return x, seen


@pytest.fixture(scope="module")
def trees():
    key = jax.random.key(0)
    shape = (LAYERS, WIDTH, WIDTH)
    weights = [0.2 * jax.random.normal(k, shape) for k in jax.random.split(key)]
    bias = 0.1 * jax.random.normal(key, (LAYERS, WIDTH))
    params = {"layers": {"in": weights[0], "out": weights[1], "bias": bias}}
    base = lj.quantize(params, "in|out", block_size=32, layout="b i o")
    rules = [lj.LoraRule("in|out", rank=2)]
    adapters = lj.init_adapters(key, base, rules)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    return base, adapters


@pytest.fixture(scope="module")
def expected(trees):
    return results(*trees)


def results(base, adapters):
    def loss(adapters):
        y, seen = lj.adapt(forward)(lj.combine(base, adapters), X)
        return jnp.sum(y**2), (y, seen)

    return jax.jit(jax.grad(loss, has_aux=True))(adapters)


def memories(tree):
    return {jax.typeof(x).memory_space for x in jax.tree.leaves(tree)}


@pytest.mark.parametrize("keep", [0, 1, 4, 5])
def test_the_same_numbers_come_out_wherever_weights_lie(trees, expected, keep):
    base, adapters = trees
    placed = lj.offload(base, "layers/(in|out)", keep=keep)
    codes = placed["layers"]["in"].codes
    assert isinstance(codes, Stack) == (0 < keep < LAYERS)
    assert codes.shape == base["layers"]["in"].codes.shape
    assert (jax.memory.Space.Host in memories(placed)) == (keep < LAYERS)
    jax.tree.map(np.testing.assert_array_equal, results(placed, adapters), expected)


def test_a_stack_is_scanned_in_reverse_too(trees):
    base, adapters = trees

    def backwards(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, x), x, params["layers"]["in"], reverse=True)

    fn = jax.jit(lj.adapt(backwards, strict=False))
    placed = lj.offload(base, "layers/(in|out)", keep=2)
    got = fn(lj.combine(placed, adapters), X)
    jax.tree.map(np.testing.assert_array_equal, got, fn(lj.combine(base, adapters), X))


def test_other_uses_of_a_stack_join_it(trees):
    base, adapters = trees
    fn = jax.jit(lj.adapt(lambda params, x: x @ params["layers"]["in"][3], strict=False))
    placed = lj.offload(base, "layers/in", keep=2)
    got = fn(lj.combine(placed, adapters), X)
    np.testing.assert_array_equal(got, fn(lj.combine(base, adapters), X))


def test_a_dense_weight_may_wait_there_too():
    w = {"w": jnp.cos(jnp.arange(64.0)).reshape(8, 8), "bias": jnp.ones(8)}
    adapters = lj.init_adapters(jax.random.key(0), w, [lj.LoraRule("^w", rank=2)])
    fn = jax.jit(lj.adapt(lambda p, x: x @ p["w"] + p["bias"]))
    placed = lj.offload(w, "w|bias")
    assert memories(placed) == {jax.memory.Space.Host}
    got = fn(lj.combine(placed, adapters), jnp.ones((2, 8)))
    np.testing.assert_array_equal(got, fn(lj.combine(w, adapters), jnp.ones((2, 8))))


def test_merging_takes_weights_from_there(trees):
    base, adapters = trees
    for keep in (0, 2):
        placed = lj.offload(lj.offload(base, "layers/(in|out)", keep=keep), "bias")
        merged = lj.merge(placed, adapters)
        assert memories(merged) == {jax.memory.Space.Device}
        jax.tree.map(np.testing.assert_array_equal, merged, lj.merge(base, adapters))


def test_an_embedding_is_looked_up_from_there():
    rows = {"rows": jax.random.normal(jax.random.key(0), (16, 32))}
    base = lj.quantize(rows, "rows", block_size=32, layout="o i")
    look_up = jax.jit(lj.adapt(lambda p, k: p["rows"][k]))
    got = look_up(lj.offload(base, "rows"), jnp.array([3, 0]))
    np.testing.assert_array_equal(got, look_up(base, jnp.array([3, 0])))


def test_abstract_trees_say_where_they_would_lie(trees):
    base, _ = trees
    shapes = jax.eval_shape(lambda: base)
    placed = lj.offload(shapes, "layers/in", keep=2)["layers"]["in"]
    kept, waiting = placed.codes.parts
    assert (kept.shape[0], waiting.shape[0]) == (2, 3)
    assert waiting.sharding.memory_kind == "pinned_host"


def test_what_cannot_be_placed_is_said(trees):
    base, _ = trees
    with pytest.raises(
        ValueError, match=r"keep=2 asks for a part of layers/bias, float32.*write a pattern"
    ):
        lj.offload(base, "bias", keep=2)
    with pytest.raises(ValueError, match="matches no leaf"):
        lj.offload(base, "no such leaf")


def test_no_room_on_the_host_is_one_sentence(trees, monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Failed to allocate host memory")

    monkeypatch.setattr(jax, "device_put", refuse)
    with pytest.raises(MemoryError, match=r"no host memory for layers/in.*HOST_MEMORY_LIMIT_GB"):
        lj.offload(trees[0], "layers/in")
