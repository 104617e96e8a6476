"""What `adapt` refuses, by name, what it does when told not to, and what `explain` says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import (
    MATRIX,
    PLAIN,
    WANTED,
    Case,
    X,
    assert_near,
    call,
    doubled,
    expected,
    on_mesh,
    trees,
)
from jax import lax
from jax.sharding import PartitionSpec

import lora_jax as lj
from lora_jax.core.rewrite import Report

pytestmark = pytest.mark.compiled_quickly


@pytest.fixture(scope="module")
def tree():
    """One adapted 4-bit matrix."""
    return lj.combine(*trees(PLAIN, "nf4"))


# What has no factored form: the function in JAX, in NumPy, and the primitive that the error names.
DENSE = {
    "elementwise": (lambda w, x: x @ jnp.sin(w), lambda w, x: x @ np.sin(w), "sin"),
    "scaled": (lambda w, x: x @ (2 * w), lambda w, x: x @ (2 * w), "mul"),
    "masked": (lambda w, x: x @ jnp.where(w > 0, w, 0), lambda w, x: x @ np.maximum(w, 0), "gt"),
    "summed": (lambda w, x: w.sum(0) + x[:, :6], lambda w, x: w.sum(0) + x[:, :6], "reduce_sum"),
    "columns": (lambda w, x: x @ w[:, 2:5], lambda w, x: x @ w[:, 2:5], "slice"),
    "flattened": (lambda w, x: w.ravel()[None] * 1, lambda w, x: w.ravel()[None], "reshape"),
    "outer": (
        lambda w, x: jnp.einsum("io,b->bio", w, x[:, 0]),
        lambda w, x: np.einsum("io,b->bio", w, x[:, 0]),
        "dot_general",
    ),
    "joined": (
        lambda w, x: x @ jnp.concatenate([w, w], 1),
        lambda w, x: np.concatenate([x @ w, x @ w], 1),
        "concatenate",
    ),
    "custom derivative": (lambda w, x: x @ doubled(w), lambda w, x: 2 * x @ w, "custom_vjp_call"),
    "shard_map": (
        lambda w, x: on_mesh(lambda w, x: x @ w, PartitionSpec(), PartitionSpec())(w, x),
        lambda w, x: x @ w,
        "shard_map",
    ),
    "chosen by cond": (
        lambda w, x: x @ lax.cond(x[0, 0] > 9, lambda: w, lambda: jnp.zeros(w.shape)),
        lambda w, x: 0 * x @ w,
        "cond",
    ),
    "changed while carried": (
        lambda w, x: x @ lax.fori_loop(0, 2, lambda _, w: w * 2, w),
        lambda w, x: x @ w * 4,
        "scan",
    ),
    # JAX gives every branch's operands the axis of the runs, since any of them might be chosen.
    "chosen by cond under vmap": (
        lambda w, x: jax.vmap(
            lambda x: lax.cond(x[0] > 0, lambda w: x @ w, lambda w: 2 * x @ w, w)
        )(x),
        lambda w, x: np.where(x[:, :1] > 0, 1, 2) * (x @ w),
        "broadcast_in_dim",
    ),
    "returned transposed": (lambda w, x: w.T, lambda w, x: w.T, "return"),
}


@pytest.mark.parametrize(("fn", "_", "primitive"), DENSE.values(), ids=DENSE)
def test_refuses_to_make_dense(tree, fn, _, primitive):
    with pytest.raises(ValueError, match="has no factored form") as caught:
        lj.adapt(lambda tree, x: fn(tree["layers"]["w"], x))({"layers": tree}, X)
    message = str(caught.value)
    assert f"{primitive!r}" in message or primitive in message
    assert message.startswith("layers/w (shape (")
    assert "strict=False" in message


@pytest.mark.parametrize(("fn", "in_numpy", "_"), DENSE.values(), ids=DENSE)
def test_makes_dense_if_told_to(fn, in_numpy, _):
    case = Case("i o", MATRIX, (X,), fn, in_numpy)
    base, adapters = trees(case, "nf4")
    assert_near(call(case, base, adapters, strict=False), expected(case, base, adapters))


def test_bare_leaf_is_called_something(tree):
    assert_near(lj.adapt(lambda w, x: x @ w)(tree["w"], X), WANTED)
    with pytest.raises(ValueError, match=r"^\S.* \(shape \(32, 6\)\) reaches 'sin'"):
        lj.adapt(lambda w, x: x @ jnp.sin(w))(tree["w"], X)


def test_refuses_what_is_not_used(tree):
    two = {"a": tree, "b": tree, "c": {"w": jnp.ones(3)}}

    def use_a(tree, x):
        return x @ tree["a"]["w"]

    with pytest.raises(ValueError, match="never uses b/w") as caught:
        lj.adapt(use_a)(two, X)
    assert "a/w" not in str(caught.value)
    with pytest.raises(ValueError, match="never uses a/w, b/w"):
        lj.adapt(lambda tree, x: x)(two, X)
    with pytest.raises(ValueError, match="never uses b/w"):
        jax.jit(lj.adapt(use_a))(two, X)
    assert_near(lj.adapt(use_a, strict=False)(two, X), WANTED)


def test_refuses_what_is_trained_whole_and_not_used(tree):
    norm = lj.AdaptedArray(jnp.ones(3), jnp.ones(3))
    with pytest.raises(ValueError, match="never uses norm"):
        lj.adapt(lambda tree, x: x @ tree["w"])({**tree, "norm": norm}, X)


def test_frozen_leaf_need_not_be_used():
    base, _ = trees(PLAIN, "nf4")
    assert lj.adapt(lambda tree, x: x)(base, X) is not None


def test_nan_from_elsewhere_is_no_error(tree):
    """Values are not looked at: strictness is about structure alone."""
    assert np.isnan(lj.adapt(lambda tree, x: x @ tree["w"])(tree, X * np.nan)).all()


def test_explain():
    base = {
        "used": jnp.asarray(reference.weight((32, 6))),
        "twice": jnp.asarray(reference.weight((32, 6))),
        "sin": jnp.asarray(reference.weight((32, 6))),
        "idle": jnp.asarray(reference.weight((32, 6))),
        "bias": jnp.ones(6),
    }
    base = lj.quantize(base, "used|frozen", block_size=32) | {
        "frozen": lj.quantize_array(np.ones((32, 6), np.float32), block_size=32)
    }
    adapters = lj.init_adapters(
        jax.random.key(0), base, [lj.LoraRule("used|twice|sin|idle", rank=2)]
    )

    def fn(tree, x):
        y = x @ tree["used"] + x @ tree["twice"] + tree["bias"] + x @ tree["frozen"]
        return y @ tree["twice"].T + x * jnp.sin(tree["sin"]).sum() + tree["sin"][0, 0]

    tree = lj.combine(base, adapters)
    report = lj.explain(fn)(tree, X)
    assert isinstance(report, Report)
    status = {path: report.status(path) for path in report.uses}
    assert status == {
        "frozen": "factored",
        "idle": "unused",
        "sin": "dense",
        "twice": "factored",
        "used": "factored",
    }
    assert [use.primitive for use in report.uses["twice"]] == ["dot_general", "dot_general"]
    assert report.shapes["used"] == (32, 6)
    lines = str(report).splitlines()
    assert lines[0].split() == ["leaf", "shape", "used", "by", "as"]
    assert any(
        "twice" in line and "dot_general x2" in line and "factored" in line for line in lines
    )
    assert any("idle" in line and "unused" in line for line in lines)
    abstract = jax.eval_shape(lambda: tree)
    assert lj.explain(fn)(abstract, jax.ShapeDtypeStruct(X.shape, X.dtype)) == report
