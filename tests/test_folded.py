"""Folded products: the update is added while the weight is decoded, and nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax
from test_residuals import is_decoded, residuals

import lora_jax as lj
from lora_jax.core import folded

pytestmark = pytest.mark.compiled_quickly

IN, OUT, ROWS, RANK = 96, 160, 7, 4
USES = {
    "dense": ("i o", (IN, OUT), lambda w, x: x @ w, lambda w, x: x @ w),
    "rows": ("o i", (OUT, IN), lambda w, x: x @ w.T, lambda w, x: x @ w.T),
    "heads": (
        "i o o",
        (IN, 4, 40),
        lambda w, x: jnp.einsum("bd,dhk->bhk", x, w),
        lambda w, x: np.einsum("bd,dhk->bhk", x, w),
    ),
    "weight first": ("o i", (OUT, IN), lambda w, x: w @ x.T, lambda w, x: w @ x.T),
}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Products as small as those here are folded, too."""
    monkeypatch.setattr(folded, "least_rows", lambda *_: 1)


def problem(layout, shape, kind="nf4", dtype=jnp.float32):
    """A quantized weight, an adapter that does something, and activations."""
    w = jnp.asarray(reference.weight(shape)).astype(dtype)
    base = {"w": lj.quantize_array(w, kind, layout=layout, block_size=32)}
    adapters = lj.init_adapters(jax.random.key(0), base, [lj.LoraRule("w", RANK, alpha=6.0)])
    moved = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), adapters
    )
    x = jax.random.normal(jax.random.key(2), (ROWS, IN), dtype)
    return base, adapters, moved, x


def applied(use, fold):
    adapted = lj.adapt(lambda tree, x: use(tree["w"], x), fold=fold)
    return lambda adapters, base, x: adapted(lj.combine(base, adapters), x)


def dense64(base, adapters):
    """W + scale·BA in float64, as the parameter."""
    q, adapter = base["w"], adapters["w"]
    w = reference.matrix(np.asarray(lj.dequantize(q), np.float64), q.layout)
    update = np.asarray(adapter.b, np.float64) @ np.asarray(adapter.a, np.float64)
    return reference.parameter(w + adapter.scale * update, q.layout, q.shape)


@pytest.mark.parametrize(("layout", "shape", "use", "in_numpy"), USES.values(), ids=USES)
def test_value_and_gradients(layout, shape, use, in_numpy):
    """The value is that of W + scale·BA in float64; gradients are those of the factored product."""
    base, _, moved, x = problem(layout, shape)
    fn = applied(use, True)
    assert np.abs(fn(moved, base, x) - in_numpy(dense64(base, moved), np.asarray(x))).max() < 1e-5

    def loss(fn, trained):
        return jnp.sin(fn(trained[0], base, jnp.tanh(trained[1]))).sum()

    got = jax.jit(jax.grad(functools.partial(loss, fn)))((moved, x))
    wanted = jax.jit(jax.grad(functools.partial(loss, applied(use, False))))((moved, x))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert jnp.abs(a - b).max() <= 1e-5 * jnp.abs(b).max()


@pytest.mark.compiled_quickly(False)
@pytest.mark.parametrize("kind", ["nf4", "q4_0", "q4_1"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_update_of_zero_changes_no_bit(kind, dtype):
    base, adapters, _, x = problem("i o", (IN, OUT), kind, dtype)
    fn = jax.jit(applied(lambda w, x: x @ w, True))
    plain = jax.jit(lambda base, x: lj.adapt(lambda tree, x: x @ tree["w"])(base, x))
    assert (fn(adapters, base, x) == plain(base, x)).all()


def test_bfloat16_rounds_once():
    """The sum is taken in float32: small updates survive beside large weights on average."""
    base, _, moved, _ = problem("o i", (OUT, IN), dtype=jnp.bfloat16)
    small = jax.tree.map(lambda x: x * 0.05, moved)
    seen = applied(lambda w, x: (w @ x.T).T, True)(small, base, jnp.eye(IN, dtype=jnp.bfloat16))
    wide = jax.tree.map(
        lambda q: lj.quantize_array(
            jnp.asarray(reference.weight((OUT, IN))).astype(jnp.bfloat16).astype(jnp.float32),
            layout="o i",
            block_size=32,
        ),
        base,
        is_leaf=lambda x: isinstance(x, lj.QuantizedArray),
    )
    expected = dense64(wide, small).astype(np.float32).astype(jnp.bfloat16)
    assert (expected == np.asarray(seen).T).mean() > 0.999  # float32 sums round within an ulp


def layer(x, w):
    return jnp.tanh(x @ w), None


TRANSFORMS = {
    "jvp": lambda fn, at, to: jax.jvp(fn, (at,), (to,)),
    "linearize": lambda fn, at, to: jax.linearize(fn, at)[1](to),
    "vmap of grad": lambda fn, at, to: jax.vmap(jax.grad(lambda x: fn(x).sum()))(
        jax.tree.map(lambda x, y: jnp.stack([x, y]), at, to)
    ),
    "jvp of grad": lambda fn, at, to: jax.jvp(jax.grad(lambda x: fn(x).sum()), (at,), (to,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform):
    """Of a rematerialized loop over layers, and as factored products of a plain one."""
    base, _, moved, x = problem("b i o", (3, IN, IN))
    bodies = {True: jax.checkpoint(layer, prevent_cse=False), False: layer}

    def result(fold):
        fn = lj.adapt(lambda tree, x: lax.scan(bodies[fold], x, tree["w"])[0], fold=fold)
        of_adapters = lambda adapters: fn(lj.combine(base, adapters), x)  # noqa: E731
        direction = jax.tree.map(jnp.cos, moved)
        return jax.tree.leaves(jax.jit(functools.partial(transform, of_adapters))(moved, direction))

    for got, wanted in zip(result(True), result(False), strict=True):
        assert jnp.abs(got - wanted).max() <= 2e-5 * jnp.abs(wanted).max()


def test_residuals_are_codes():
    base, _, moved, x = problem("i o", (IN, OUT))
    fn = applied(lambda w, x: jnp.sin(x) @ w, True)
    assert not [x for x in residuals(lambda t: fn(t[0], base, t[1]), (moved, x)) if is_decoded(x)]


def test_few_rows_are_not_folded(monkeypatch):
    monkeypatch.undo()
    base, _, moved, _ = problem("i o", (IN, OUT))
    fn = applied(lambda w, x: x @ w, True)
    for rows, folds in ((127, False), (128, True)):
        jaxpr = jax.make_jaxpr(fn)(moved, base, jnp.ones((rows, IN)))
        assert ("decode_folded" in str(jaxpr)) == folds
    assert folded.least_rows(4096, 14336) == 3185  # of Llama 3 8B's gate


def test_what_is_not_folded():
    """Dropout, a base of floats, activations of another dtype, and whoever asked for it."""
    base, _, moved, x = problem("i o", (IN, OUT))

    def folds(base=base, adapters=moved, x=x, key=None, fold=True):
        use = lj.adapt(lambda tree, x: x @ tree["w"], fold=fold)
        fn = lambda adapters: use(lj.combine(base, adapters, dropout_key=key), x)  # noqa: E731
        return "decode_folded" in str(jax.make_jaxpr(fn)(adapters))

    assert folds()
    assert not folds(fold=False)
    assert not folds(x=x.astype(jnp.bfloat16))
    assert not folds(base={"w": lj.dequantize(base["w"])})
    dropped = lj.init_adapters(jax.random.key(0), base, [lj.LoraRule("w", RANK, dropout=0.1)])
    assert folds(adapters=dropped)
    assert not folds(adapters=dropped, key=jax.random.key(3))
