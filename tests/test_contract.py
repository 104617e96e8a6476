"""The laws that hold for every adapter variant on every kind of base, under every transform.

One small language model serves them all: an embedding that is its own head, and three layers of two
matrices, scanned or unrolled. Expectations are NumPy's, in float64. Law 8 is in
test_residuals.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from small_lm import (
    BASES,
    IDS,
    LAYOUTS,
    VARIANTS,
    VOCAB,
    apply,
    assert_bits_equal,
    assert_near,
    decoded,
    in_numpy,
    is_quantized,
    jitted,
    logits,
    make,
    model,
)

import lora_jax as lj

quickly = pytest.mark.compiled_quickly
# Every base with plain LoRA, and every variant on a 4-bit base.
KEY = jax.random.key(0)
PAIRS = list(
    dict.fromkeys([(base, "lora") for base in BASES] + [("nf4", variant) for variant in VARIANTS])
)


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: " + ".join(pair))
def trees(request):
    return make(*request.param)


# Law 1: at its start the adapted model is the base.


def test_start_is_the_base(trees):
    """Bit for bit: eager and jitted, scanned and unrolled."""
    dense = decoded(trees.base)
    for scan in (False, True):
        eager = logits(trees.base, trees.start, scan=scan)
        np.testing.assert_array_equal(np.asarray(eager), np.asarray(model(dense, IDS, scan=scan)))
    np.testing.assert_array_equal(
        np.asarray(jitted(trees.base, trees.start)), np.asarray(apply(dense, IDS))
    )


# XLA's CPU products of few rows add up in another order when a weight lies differently in memory,
# so they are where an adapted model would part from its base.
FEW_ROWS = {
    "x @ W": (lambda w, x: jnp.tanh(x @ w), (32, 48), "i o"),
    "x @ W.T": (lambda w, x: jnp.tanh(x @ w.T), (48, 32), "o i"),
    "vmap W @ x": (lambda w, x: jax.vmap(lambda row: w @ row)(x), (48, 32), "o i"),
    "scan": (
        lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0],
        (3, 32, 32),
        "b i o",
    ),
}


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize(("fn", "shape", "layout"), FEW_ROWS.values(), ids=FEW_ROWS)
def test_start_is_the_base_for_few_rows(fn, shape, layout, kind, rows):
    w, x = (jnp.asarray(reference.weight(s, k)) for k, s in enumerate((shape, (rows, 32))))
    base = w if kind is None else lj.quantize_array(w, kind, block_size=32, layout=layout)
    adapters = lj.init_adapters(KEY, {"w": base}, [lj.LoraRule("w", 4, layout=layout)])
    tree, dense = lj.combine({"w": base}, adapters), lj.merge({"w": base}, {"w": None})
    wanted = np.asarray(jax.jit(fn)(dense["w"], x))
    adapted = lj.adapt(lambda params, x: fn(params["w"], x))
    np.testing.assert_array_equal(np.asarray(jax.jit(adapted)(tree, x)), wanted)
    np.testing.assert_array_equal(np.asarray(adapted(tree, x)), np.asarray(fn(dense["w"], x)))
    # And where the decoding is part of the same program.
    decoded_inside = jax.jit(lambda base, x: fn(lj.merge(base, {"w": None})["w"], x))
    np.testing.assert_array_equal(np.asarray(decoded_inside({"w": base}, x)), wanted)


def test_equals_numpy(trees):
    """And after its start it is the base plus scale · B A."""
    wanted = in_numpy(reference.dense_tree(trees.base, trees.moved), IDS)
    assert_near(jitted(trees.base, trees.moved), wanted, trees.tolerance)
    assert not np.allclose(wanted, in_numpy(decoded_numpy(trees.base), IDS), rtol=0.1)


def decoded_numpy(base: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), decoded(base))


# Law 2: training does not touch the base.

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "lora+": lambda: lj.lora_plus(optax.adamw, 1e-3, ratio=16),
}


def cross_entropy(base: Any, adapters: Any) -> jax.Array:
    scores = logits(base, adapters, IDS[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(scores, IDS[:, 1:]).mean()


def make_step(tx: optax.GradientTransformation):
    def step(adapters, state, base):
        value, gradients = jax.value_and_grad(lambda a: cross_entropy(base, a))(adapters)
        updates, state = tx.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    return step


@quickly
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("base_kind", ["float32", "nf4"])
def test_training_leaves_the_base_alone(base_kind, optimizer):
    trees = make(base_kind, "lora, norms trained")
    tx = OPTIMIZERS[optimizer]()
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    before = jax.tree.map(np.array, trees.base)
    adapters = jax.tree.map(jnp.copy, trees.start)
    state, values = tx.init(adapters), []
    for _ in range(8):
        adapters, state, value = step(adapters, state, trees.base)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    assert_bits_equal(trees.base, before)
    for moved, start in zip(jax.tree.leaves(adapters), jax.tree.leaves(trees.start), strict=True):
        assert not np.array_equal(moved, start)
    assert jax.tree.structure(adapters) == jax.tree.structure(trees.start)


# Law 3: merging.


def test_merged_equals_adapted(trees):
    merged = lj.merge(trees.base, trees.moved)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(merged))
    assert_near(apply(merged, IDS), jitted(trees.base, trees.moved), trees.tolerance)


def test_unmerged_equals_the_base(trees):
    adapters = {**trees.moved, "norm": None}
    adapters["layers"] = {**trees.moved["layers"], "gain": None}
    again = lj.unmerge(lj.merge(trees.base, adapters), adapters)
    for one, other in zip(
        jax.tree.leaves(again), jax.tree.leaves(decoded(trees.base)), strict=True
    ):
        assert one.dtype == other.dtype
        assert_near(one, other, trees.tolerance)


# Law 4: transforms change nothing.


@quickly
@pytest.mark.parametrize("options", [{"remat": True}, {"scan": False}], ids=["remat", "unrolled"])
@pytest.mark.parametrize("base_kind", ["float32", "nf4"])
def test_loops_and_remat(base_kind, options):
    """Values and gradients."""
    trees = make(base_kind, "lora, norms trained")

    def run(**options):
        def total(adapters, base):
            return jnp.sum(jnp.sin(logits(base, adapters, **options)))

        return jax.jit(jax.value_and_grad(total))(trees.moved, trees.base)

    for one, other in zip(jax.tree.leaves(run(**options)), jax.tree.leaves(run()), strict=True):
        assert_near(one, other, 1e-5)


@pytest.mark.parametrize("base_kind", ["float32", "nf4"])
def test_eager_equals_jit(base_kind):
    trees = make(base_kind, "lora, norms trained")
    assert_near(logits(trees.base, trees.moved), jitted(trees.base, trees.moved), 1e-6)


RUNS = 3
stacked = functools.partial(jax.tree.map, lambda *xs: jnp.stack(xs))


@quickly
@pytest.mark.parametrize("base_kind", ["float32", "nf4"])
def test_runs_under_vmap(base_kind):
    """Adapters of several runs on one base, each with a scale of its own."""
    trees = make(base_kind, "lora, norms trained")
    runs = [reference.randomized(trees.start, seed) for seed in range(RUNS)]
    scales = jnp.array([1.0, 0.5, 2.0])

    def one(adapters, scale):
        return lj.adapt(model)(lj.combine(trees.base, adapters, scales=scale), IDS)

    together = jax.jit(jax.vmap(one))(stacked(*runs), scales)
    for result, adapters, scale in zip(together, runs, scales, strict=True):
        rescaled = jax.tree.map(
            lambda x: (
                dataclasses.replace(x, scale=x.scale * float(scale))  # noqa: B023
                if isinstance(x, lj.Adapter)
                else x
            ),
            adapters,
            is_leaf=lambda x: isinstance(x, lj.Adapter),
        )
        wanted = in_numpy(reference.dense_tree(trees.base, rescaled), IDS)
        assert_near(result, wanted, 1e-5)


NESTED = {
    "vmap over inputs": lambda f, a: jax.vmap(f, (None, 0))(a, IDS),
    "jit of vmap of jit": lambda f, a: jax.jit(jax.vmap(jax.jit(f), (None, 0)))(a, IDS),
    "map over inputs": lambda f, a: lax.map(lambda ids: f(a, ids), IDS),
    "checkpoint": lambda f, a: jax.checkpoint(f)(a, IDS),
    "scan": lambda f, a: lax.scan(lambda c, ids: (c, f(a, ids)), 0, IDS)[1],
    "cond": lambda f, a: lax.cond(IDS[0, 0] >= 0, f, lambda a, ids: 0 * f(a, ids), a, IDS),
    "while": lambda f, a: lax.while_loop(
        lambda c: c[0] < 1, lambda c: (c[0] + 1, f(a, IDS)), (0, jnp.zeros((*IDS.shape, VOCAB)))
    )[1],
    "value of jvp": lambda f, a: jax.jvp(lambda a: f(a, IDS), (a,), (a,))[0],
    "linearized": lambda f, a: jax.linearize(lambda a: f(a, IDS), a)[0],
}


@quickly
@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED)
def test_inside_other_transforms(nested):
    trees = make("nf4", "lora")
    fn = functools.partial(logits, trees.base)
    assert_near(nested(fn, trees.moved), jitted(trees.base, trees.moved), 2e-6)


@quickly
def test_derivatives_agree():
    """Forward and reverse; and the second derivative, forward over reverse and the other way."""
    trees = make("nf4", "lora")
    direction = reference.randomized(trees.start, 9)

    def total(adapters):
        return jnp.sum(jnp.sin(logits(trees.base, adapters)))

    def forward(fn):
        return lambda a: jax.jvp(fn, (a,), (direction,))[1]

    def reverse(fn):
        def along(a):
            pairs = zip(jax.tree.leaves(jax.grad(fn)(a)), jax.tree.leaves(direction), strict=True)
            return sum(jnp.vdot(gradient, d) for gradient, d in pairs)

        return along

    first = [jax.jit(f(total))(trees.moved) for f in (forward, reverse)]
    np.testing.assert_allclose(*first, rtol=1e-4)
    second = [jax.jit(f)(trees.moved) for f in (forward(reverse(total)), reverse(forward(total)))]
    np.testing.assert_allclose(*second, rtol=1e-3)


@quickly
@pytest.mark.parametrize("base_kind", ["float32", "nf4"])
def test_sharded_equals_unsharded(base_kind):
    trees = make(base_kind, "lora, norms trained")
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    rules = [
        ("embed", PartitionSpec("d")),
        ("up", PartitionSpec(None, None, "d")),
        ("down", PartitionSpec(None, None, "d")),
    ]
    base, adapters = (lj.shard(tree, mesh, rules) for tree in (trees.base, trees.moved))
    values = lambda a, b: jnp.sum(jnp.sin(logits(b, a)))  # noqa: E731
    run = jax.jit(jax.value_and_grad(values))
    wanted = run(trees.moved, trees.base)
    for one, other in zip(
        jax.tree.leaves(run(adapters, base)), jax.tree.leaves(wanted), strict=True
    ):
        assert_near(one, other, 1e-5)


# Law 5: what is saved is what is loaded.


def test_saved_and_loaded(trees, tmp_path):
    lj.save_adapters(tmp_path / "run", trees.moved)
    assert_bits_equal(lj.load_adapters(tmp_path / "run", trees.base), trees.moved)


# Law 6: one adapter with weight 1 is that adapter.


def test_weight_of_one(trees):
    def weighted(base, adapters, scale):
        return lj.adapt(model)(lj.combine(base, adapters, scales=scale), IDS)

    one = jax.jit(weighted)(trees.base, trees.moved, 1.0)
    np.testing.assert_array_equal(np.asarray(one), np.asarray(jitted(trees.base, trees.moved)))


# Law 7: gradients are those through the dense weight.


def dense_loss(adapters: Any, base: Any, dtype: Any) -> jax.Array:
    """Through W + scale · B A written out, in plain JAX and in `dtype`."""

    def one(weight, adapter):
        weight = weight.astype(dtype)
        if not isinstance(adapter, lj.Adapter):
            return weight if adapter is None else adapter.astype(dtype)
        update = adapter.scale * adapter.b.astype(dtype) @ adapter.a.astype(dtype)  # [.., out, in]
        return weight + (update if adapter.layout == "o i" else jnp.swapaxes(update, -1, -2))

    dense = jax.tree.map(
        one, base, adapters, is_leaf=lambda x: x is None or isinstance(x, lj.Adapter)
    )
    return jnp.sum(jnp.sin(model(dense, IDS)))


@quickly
@pytest.mark.parametrize(
    ("base_kind", "variant"),
    [("float32", "lora"), ("nf4", "rslora"), ("nf4", "lora, norms trained")],
)
def test_gradients(base_kind, variant):
    """To 1e-10 in float64; to 1e-5 of each leaf's largest in float32."""
    trees = make(base_kind, variant)
    dense = decoded(trees.base)

    def loss(adapters, base, dtype):
        return jnp.sum(jnp.sin(logits(base, adapters, dtype=dtype)))

    single = jax.jit(jax.grad(loss), static_argnums=2)(trees.moved, trees.base, None)
    with jax.enable_x64(True):
        # A leaf trained whole is used, and its gradient rounded, in the base's own dtype.
        widen = lambda x: x if is_quantized(x) else jnp.asarray(x, jnp.float64)  # noqa: E731
        wide = jax.tree.map(widen, trees.moved)
        wide_base = jax.tree.map(widen, trees.base, is_leaf=is_quantized)
        double = jax.jit(jax.grad(loss), static_argnums=2)
        actual = double(wide, wide_base, jnp.float64)
        exact = jax.jit(jax.grad(dense_loss), static_argnums=2)(wide, dense, jnp.float64)
        for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(exact), strict=True):
            assert one.dtype == jnp.float64
            assert_near(one, other, 1e-10)
    for one, other in zip(jax.tree.leaves(single), jax.tree.leaves(exact), strict=True):
        assert_near(one, other, 1e-5)


# Law 9: runs in one program do not meet.


@pytest.mark.parametrize("base_kind", ["float32", "nf4"])
def test_runs_do_not_meet(base_kind):
    """A neighbour's NaN, in its adapters and its data, leaves my training bit-equal."""
    trees = make(base_kind, "lora, norms trained")
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))

    def step(adapters, state, ids, scale):
        def loss(adapters):
            tree = lj.combine(trees.base, adapters, scales=scale)
            scores = lj.adapt(model)(tree, ids[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(scores, ids[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    steps = jax.jit(jax.vmap(step))
    runs = [reference.randomized(trees.start, seed) for seed in range(RUNS)]
    ids = np.stack([IDS, IDS[:, ::-1], IDS])
    scales = np.array([1.0, 0.5, 2.0], np.float32)

    def train(runs, ids, scales):
        adapters = stacked(*runs)
        state = jax.vmap(tx.init)(adapters)
        for _ in range(2):
            adapters, state, value = steps(adapters, state, ids, scales)
        return jax.tree.map(lambda x: x[1], (adapters, state, value))

    mine = train(runs, ids, scales)
    assert np.isfinite(mine[2])
    for spoiled in (np.nan, np.inf, 1e30):
        others = [jax.tree.map(lambda x: x * 0 + spoiled, run) for run in runs]  # noqa: B023
        changed = train([others[0], runs[1], others[2]], ids[::-1] * 0 + ids[1], scales * [9, 1, 9])
        assert_bits_equal(changed, mine)


def test_every_weight_is_factored():
    trees = make("nf4", "lora")
    report = lj.explain(model)(lj.combine(trees.base, trees.start), IDS)
    assert {path: report.status(path) for path in report.uses} == dict.fromkeys(LAYOUTS, "factored")
