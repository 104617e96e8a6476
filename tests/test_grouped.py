"""Rows times the matrices of their groups, and models of experts, under vmap and what goes with it.

Expectations of the product are NumPy's, in float64, member by member; those of models are a loop.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from family_cases import CASES, TOKENS, VOCAB
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.kernels import grouped_dot
from lora_jax.models.decoder import Decoder, parameter_shapes
from lora_jax.models.families import from_hf

pytestmark = pytest.mark.compiled_quickly

RUNS, ROWS, GROUPS, IN, OUT = 3, 7, 4, 5, 6
RNG = np.random.default_rng(0)
X, W, CT, DW = (
    RNG.normal(size=(RUNS, *shape)).astype(np.float32)
    for shape in ((ROWS, IN), (GROUPS, IN, OUT), (ROWS, OUT), (GROUPS, IN, OUT))
)
SIZES = np.array([[2, 1, 0, 4], [1, 1, 1, 2], [0, 7, 0, 0]])  # of the second, rows are left over
AXES = [axes for axes in itertools.product((0, None), repeat=3) if axes != (None, None, None)]


def expected(x, w, sizes, ct):
    """The product and, of its sum weighted by `ct`, the gradients of x and w."""
    x, w, ct = (np.asarray(values, np.float64) for values in (x, w, ct))
    y, dx, dw = np.zeros((ROWS, OUT)), np.zeros_like(x), np.zeros_like(w)
    for row, group in enumerate(np.repeat(np.arange(GROUPS), sizes)):
        y[row] = x[row] @ w[group]
        dx[row] = w[group] @ ct[row]
        dw[group] += np.outer(x[row], ct[row])
    return y, dx, dw


@jax.jit
def values_and_gradients(x, w, sizes, ct):
    y, pullback = jax.vjp(lambda x, w: grouped_dot(x, w, sizes), x, w)
    return y, *pullback(ct)


def members(axes, *args):
    return [
        tuple(x if a is None else x[k] for x, a in zip(args, axes, strict=True))
        for k in range(RUNS)
    ]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_every_batching(axes):
    args = [x if axis == 0 else x[1] for x, axis in zip((X, W, SIZES), axes, strict=True)]
    wanted = [expected(*one) for one in members((*axes, 0), *args, CT)]
    found = jax.vmap(values_and_gradients, (*axes, 0))(*args, CT)
    for values, others in zip(found, map(np.stack, zip(*wanted, strict=True)), strict=True):
        np.testing.assert_allclose(values, others, atol=1e-5)


def test_other_axes_and_a_batch_of_batches():
    moved = jax.vmap(grouped_dot, (1, 2, 0), 1)(X.swapaxes(0, 1), np.moveaxis(W, 0, 2), SIZES)
    twice = jax.vmap(jax.vmap(grouped_dot, (None, 0, None)), (0, None, 0))(X, W, SIZES)
    for run, other in itertools.product(range(RUNS), repeat=2):
        y, *_ = expected(X[run], W[other], SIZES[run], CT[0])
        np.testing.assert_allclose(twice[run, other], y, atol=1e-5)
        if run == other:
            np.testing.assert_allclose(moved[:, run], y, atol=1e-5)


def test_members_on_devices_of_their_own():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((RUNS,), ("runs",), auto, devices=jax.devices()[:RUNS])
    runs = P("runs")
    product = jax.shard_map(jax.vmap(grouped_dot), mesh=mesh, in_specs=runs, out_specs=runs)
    found = jax.jit(product)(X, W, SIZES)
    for run in range(RUNS):
        y, *_ = expected(X[run], W[run], SIZES[run], CT[run])
        np.testing.assert_allclose(found[run], y, atol=1e-5)


@pytest.mark.parametrize("order", ["forward over reverse", "reverse over reverse"])
def test_second_derivatives(order):
    """Of Σ (x w)² / 2: the Hessian times dw is Σ xᵀ (x dw), group by group."""

    def gradient(w, x, sizes):
        return jax.grad(lambda w: jnp.square(grouped_dot(x, w, sizes)).sum() / 2)(w)

    def product(w, x, sizes, dw):
        if order.startswith("forward"):
            return jax.jvp(lambda w: gradient(w, x, sizes), (w,), (dw,))[1]
        return jax.grad(lambda w: jnp.vdot(gradient(w, x, sizes), dw))(w)

    found = jax.jit(jax.vmap(product))(W, X, SIZES, DW)
    for run in range(RUNS):
        y, *_ = expected(X[run], DW[run], SIZES[run], CT[run])
        _, _, wanted = expected(X[run], W[run], SIZES[run], y)
        np.testing.assert_allclose(found[run], wanted, atol=2e-5)


def test_half_precision_accumulates_in_the_type_asked_for():
    x, w = (jnp.asarray(values[0], jnp.bfloat16) for values in (X, W))
    product = functools.partial(grouped_dot, preferred_element_type=jnp.float32)
    y, pullback = jax.vjp(lambda x, w: product(x, w, SIZES[0]), x, w)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected(x, w, SIZES[0], CT[0])[0], atol=1e-5)
    assert [gradient.dtype for gradient in pullback(y)] == [jnp.bfloat16] * 2


# A decoder of experts. Each run sends its tokens to other experts than its neighbours do.


def decoder():
    fields = CASES["qwen3_moe"] | {"num_hidden_layers": 2, "moe_intermediate_size": 32}
    config = from_hf(fields)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * 0.3).astype(x.dtype), parameter_shapes(config)
    )
    return Decoder(config), params


MODEL, PARAMS = decoder()
# Compiled in half of the time: a program here runs once.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
BATCHES = np.stack([TOKENS, TOKENS[::-1, ::-1], (TOKENS * 5 + 1) % VOCAB])


@functools.cache
def trees():
    """A base whose experts are in 4 bits, and adapters of three runs."""
    base = lj.quantize(PARAMS, "experts/", block_size=32, layout="b b i o")
    rules = [
        lj.LoraRule("experts/", rank=2, alpha=4),
        lj.LoraRule("q_proj/kernel|router/kernel", rank=2, alpha=4, layout="b i o"),
    ]
    start = lj.init_adapters(jax.random.key(0), base, rules)
    return base, [reference.randomized(start, seed) for seed in range(RUNS)]


def stacked(runs):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *runs)


def loss(adapters, base, tokens):
    logits = lj.adapt(MODEL.apply)({"params": lj.combine(base, adapters)}, tokens)
    return jnp.tanh(logits).sum()


train = compiled(jax.value_and_grad(loss))
train_all = jax.jit(jax.vmap(jax.value_and_grad(loss), (0, None, 0)))


def test_runs_train_as_one_by_one():
    base, runs = trees()
    values, gradients = train_all(stacked(runs), base, BATCHES)
    for number, (run, batch) in enumerate(zip(runs, BATCHES, strict=True)):
        value, gradient = train(run, base, batch)
        np.testing.assert_allclose(values[number], value, rtol=1e-5)
        mine = jax.tree.map(lambda x: x[number], gradients)  # noqa: B023
        for found, wanted in zip(jax.tree.leaves(mine), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.compiled_quickly(False)
def test_runs_do_not_meet():
    """What neighbours hold, be it NaN or tokens for other experts, leaves mine bit-equal."""
    base, runs = trees()
    pick = lambda result: jax.tree.leaves(jax.tree.map(lambda x: x[1], result))  # noqa: E731
    mine = pick(train_all(stacked(runs), base, BATCHES))
    for spoiled in (np.nan, np.inf, 1e30):
        other = jax.tree.map(lambda x: x * 0 + spoiled, runs[0])  # noqa: B023
        batches = np.stack([BATCHES[2], BATCHES[1], BATCHES[1]])
        changed = pick(train_all(stacked([other, runs[1], other]), base, batches))
        for before, after in zip(mine, changed, strict=True):
            np.testing.assert_array_equal(before, after)
    assert all(np.isfinite(x).all() for x in mine)


def test_runs_on_one_batch():
    """Only the adapters differ, so that the first of them meets what all runs share."""
    base, runs = trees()
    apply = lambda run: lj.adapt(MODEL.apply)({"params": lj.combine(base, run)}, TOKENS)  # noqa: E731
    together = compiled(jax.vmap(apply))(stacked(runs))
    one = compiled(apply)
    for logits, run in zip(together, runs, strict=True):
        wanted = one(run)
        np.testing.assert_allclose(logits, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("adapted", [False, True], ids=["dense", "through adapt"])
def test_a_model_of_experts_over_a_batch(adapted):
    """`vmap(model)` without adapters, and as part of a function that is adapted."""
    base, runs = trees()

    def each(tree, batches):
        return jax.vmap(lambda tokens: MODEL.apply({"params": tree}, tokens))(batches)

    def all_of_them(tree, batches):
        rows = MODEL.apply({"params": tree}, batches.reshape(-1, batches.shape[-1]))
        return rows.reshape(*batches.shape, -1)

    tree = lj.combine(base, runs[0]) if adapted else PARAMS
    found, wanted = (
        compiled(lj.adapt(fn) if adapted else fn)(tree, BATCHES) for fn in (each, all_of_them)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
