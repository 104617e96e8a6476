"""How `adapt`ed functions are called: what passes by value, what survives, what is cached."""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    LAYERS,
    MATRIX,
    PLAIN,
    SQUARE,
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
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lj

pytestmark = pytest.mark.compiled_quickly


@pytest.fixture(scope="module")
def tree():
    """One adapted 4-bit matrix."""
    return lj.combine(*trees(PLAIN, "nf4"))


# Gradients that the function itself cuts, and casts.


def test_stop_gradient():
    base, adapters = trees(PLAIN, "nf4")

    def loss(adapters):
        fn = lj.adapt(lambda tree, x: x @ lax.stop_gradient(tree["w"]))
        return fn(lj.combine(base, adapters), X).sum()

    value, gradients = jax.value_and_grad(loss)(adapters)
    assert value == pytest.approx(WANTED.sum(), rel=1e-4)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradients))


@pytest.mark.compiled_quickly(False)
@pytest.mark.parametrize("base_kind", ["float", "nf4"])
@pytest.mark.parametrize(
    "casts",
    [
        (jnp.bfloat16,),
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.bfloat16),
    ],
    ids=lambda casts: ">".join(jnp.dtype(x).name for x in casts),
)
def test_casts_round_as_they_would(casts, base_kind):
    """With B = 0: the same numbers, bit for bit, as if the dense weight were cast."""

    def fn(tree, x):
        w = tree["w"]
        for dtype in casts:
            w = w.astype(dtype)
        return x.astype(w.dtype) @ w

    base, adapters = trees(PLAIN, base_kind)
    start = jax.tree.map(jnp.zeros_like, adapters)
    actual = jax.jit(lambda base: lj.adapt(fn)(lj.combine(base, start), X))(base)
    wanted = jax.jit(lambda base: fn(lj.merge(base, start), X))(base)
    assert actual.dtype == wanted.dtype
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(wanted))


@pytest.mark.parametrize("base_kind", ["float", "nf4"])
def test_activations_narrower_than_the_weight(base_kind):
    """JAX multiplies bfloat16 by float32 without rounding either; so does the update."""
    case = Case(
        "i o",
        MATRIX,
        (X.astype(jnp.bfloat16),),
        lambda w, x: x @ w,
        lambda w, x: x.astype(float) @ w,
    )
    base, adapters = trees(case, base_kind)
    actual = call(case, base, adapters)
    assert actual.dtype == jnp.float32
    assert_near(actual, expected(case, base, adapters), 1e-5)


# What passes by value, and how functions may be called.


def layered(tree, x, power, *, flag=True, name=None, act=jnp.tanh, shift=0):
    assert isinstance(flag, bool)
    assert isinstance(power, int)
    assert name in (None, "one")
    y = act(x @ tree["params"]["w"]) ** power + shift
    return {"y": y if flag else -y, "flag": flag, "name": name, "act": act, "state": tree["mode"]}


def test_static_leaves_pass_by_value(tree):
    result = lj.adapt(layered)(
        {"params": tree, "mode": "train"}, X, 2, flag=False, name="one", act=jnp.sin, shift=X[:, :1]
    )
    assert_near(result["y"], -(np.sin(WANTED) ** 2 + X[:, :1]), 1e-4)
    assert (result["flag"], result["name"], result["state"]) == (False, "one", "train")
    assert result["act"] is jnp.sin


def test_static_leaves_are_part_of_the_trace(tree):
    fn = lj.adapt(layered)
    inputs = {"params": tree, "mode": "train"}
    seen = [
        fn(inputs, X, 1, flag=flag, act=act)["y"]
        for flag in (True, False)
        for act in (jnp.sin, jnp.tanh)
    ]
    for actual, wanted in zip(
        seen, [np.sin(WANTED), np.tanh(WANTED), -np.sin(WANTED), -np.tanh(WANTED)], strict=True
    ):
        assert_near(actual, wanted, 1e-4)
    assert_near(fn(inputs, X, True and 3)["y"], np.tanh(WANTED) ** 3, 1e-4)


def test_unhashable_static_leaves(tree):
    class Unhashable:
        __hash__ = None
        sign = -1

    fn = lj.adapt(lambda tree, x, config: config.sign * (x @ tree["w"]))
    for _ in range(2):
        assert_near(fn(tree, X, Unhashable()), -WANTED)


def test_methods_and_partials(tree):
    class Model:
        scale = 3.0

        def __call__(self, tree, x):
            return self.scale * (x @ tree["w"])

        def apply(self, tree, x, *, shift):
            return self(tree, x) + shift

    model = Model()
    assert_near(lj.adapt(model)(tree, X), 3 * WANTED)
    assert_near(lj.adapt(model.apply)(tree, X, shift=1), 3 * WANTED + 1)
    assert_near(lj.adapt(functools.partial(model.apply, shift=2))(tree, X), 3 * WANTED + 2)
    assert lj.adapt(model.apply).__name__ == "apply"


def test_any_keyword(tree):
    """Even those that the wrapper might have wanted for itself."""

    def fn(params, x, *, tree, fn, strict, args):
        return x @ params["w"] * tree * fn * strict * args

    assert_near(
        lj.adapt(fn)(tree, X, tree=2.0, fn=3.0, strict=1.0, args=X[:, :1]), 6 * X[:, :1] * WANTED
    )
    report = lj.explain(fn)(tree, X, tree=2.0, fn=3.0, strict=1.0, args=X[:, :1])
    assert report.status("w") == "factored"


def test_adapted_leaves_in_any_argument(tree):
    fn = lj.adapt(lambda x, first, *, second: x @ first["w"] + x @ second[0])
    assert_near(fn(X, tree, second=[tree["w"]]), 2 * WANTED)


def test_numpy_trees():
    base, adapters = trees(PLAIN, "nf4")
    base, adapters = jax.tree.map(np.asarray, (base, adapters))
    assert_near(lj.adapt(lambda tree, x: x @ tree["w"])(lj.combine(base, adapters), X), WANTED)


def test_adapted_twice(tree):
    assert_near(lj.adapt(lj.adapt(lambda tree, x: x @ tree["w"]))(tree, X), WANTED)


@pytest.mark.parametrize("base_kind", ["float", "nf4"])
def test_constants_of_a_jit(base_kind):
    """Trees that a jitted function closes over, as XLA then sees them while compiling."""
    base, adapters = trees(PLAIN, base_kind)
    assert_near(
        jax.jit(lambda x: call(PLAIN, base, adapters) + 0 * x)(0.0), expected(PLAIN, base, adapters)
    )


# Other values' custom derivatives, kernels and maps survive.


def test_custom_derivative_of_activations(tree):
    """A wrong derivative, so that it shows whether it was used."""

    def fn(tree, x):
        return doubled(x @ tree["w"])

    assert_near(lj.adapt(fn)(tree, X), 2 * WANTED)
    base, adapters = lj.split(tree)
    gradients = jax.grad(lambda a: lj.adapt(fn)(lj.combine(base, a), X).sum())(adapters)
    plain = jax.grad(lambda a: call(PLAIN, base, a).sum())(adapters)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),
        gradients,
        jax.tree.map(lambda g: 7 * g, plain),
    )


def test_shard_map_of_activations(tree):
    spec = PartitionSpec(None, "d")

    def fn(tree, x):
        return on_mesh(lambda y: y + lax.axis_index("d"), spec)(x @ tree["w"])

    wanted = WANTED + np.repeat([0, 1], 3)
    assert_near(jax.jit(lj.adapt(fn))(tree, X), wanted)
    assert_near(lj.adapt(fn)(tree, X), wanted)


def test_pallas_kernel_of_activations(tree):
    from jax.experimental import pallas as pl

    def twice(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    def kernel(x):
        return pl.pallas_call(twice, jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)

    assert_near(lj.adapt(lambda tree, x: kernel(x @ tree["w"]))(tree, X), 2 * WANTED)


def test_callbacks_see_activations(tree):
    seen = []
    fn = lj.adapt(lambda tree, x: jax.debug.callback(seen.append, x @ tree["w"]))
    fn(tree, X)
    jax.effects_barrier()
    assert_near(np.asarray(seen[0]), WANTED)


# Meshes.


def test_auto_mesh():
    mesh = jax.make_mesh((2, 3), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    base, adapters = trees(PLAIN, "nf4")
    rules = [("w", PartitionSpec(None, "model"))]
    placed = lj.combine(*lj.shard((base, adapters), mesh, [(r"\bw", rules[0][1])]))
    x = jax.device_put(np.tile(X, (2, 1)), NamedSharding(mesh, PartitionSpec("data")))
    wanted = np.tile(WANTED, (2, 1))
    assert_near(jax.jit(lj.adapt(lambda tree, x: x @ tree["w"]))(placed, x), wanted)
    with jax.set_mesh(mesh):

        def pinned(w):
            return lax.with_sharding_constraint(w, PartitionSpec(None, "model"))

        assert_near(jax.jit(lj.adapt(lambda tree, x: x @ pinned(tree["w"])))(placed, x), wanted)


def test_explicit_mesh_is_refused(tree):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    placed = jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
    fn = lj.adapt(lambda tree, x: x @ tree["w"])
    for run in (fn, jax.jit(fn)):
        with pytest.raises(
            ValueError, match=r"^w lies on a mesh with Explicit axes.*AxisType\.\s?Auto"
        ):
            run(placed, X)


# Caching: eager calls neither trace nor compile twice.


def counted(fn: Callable) -> tuple[Callable, list[int]]:
    calls = [0]

    def counting(*args, **kwargs):
        calls[0] += 1
        return fn(*args, **kwargs)

    return counting, calls


def test_eager_calls_are_traced_once(tree):
    fn, calls = counted(lambda tree, x, flag=True: x @ tree["w"] * (1 if flag else -1))
    adapted = lj.adapt(fn)
    moved = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, tree)
    for one in (tree, moved, tree):
        adapted(one, X)
    assert calls == [1]
    adapted(tree, X, flag=False)
    adapted(tree, X[:2])
    adapted(tree, X.astype(jnp.bfloat16))
    assert calls == [4]
    for arguments in ((X,), (X[:2],)):
        adapted(tree, *arguments)
    assert calls == [4]
    with jax.enable_x64(True):
        adapted(tree, X)
    assert calls == [5]
    with jax.default_matmul_precision("highest"):
        adapted(tree, X)
    assert calls == [6]


def test_a_cached_trace_gives_the_new_values(tree):
    adapted = lj.adapt(lambda tree, x: x @ tree["w"])
    adapted(tree, X)
    base, adapters = trees(PLAIN, "nf4")
    doubled_b = jax.tree.map(lambda x: 3 * x, adapters)
    assert_near(adapted(lj.combine(base, doubled_b), X), expected(PLAIN, base, doubled_b))


def test_a_failed_call_leaves_nothing_behind(tree):
    two = {"a": tree, "b": tree}
    adapted = lj.adapt(lambda tree, x: x @ tree["a"]["w"])
    for _ in range(2):
        with pytest.raises(ValueError, match="never uses b/w"):
            adapted(two, X)


def compilations(caplog, run: Callable) -> int:
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        jax.block_until_ready(run())
    return sum(record.getMessage().startswith("Compiling") for record in caplog.records)


EAGER = {
    "product": Case("i o", MATRIX, (X,), lambda w, x: jnp.tanh(x @ w), None),
    "look-up": Case("o i", (6, 32), (np.arange(3),), lambda w, i: w[i], None),
    "scan": Case(
        "b i o", SQUARE, (X,), lambda w, x: lax.scan(lambda x, w: (x @ w, None), x, w), None
    ),
    "scan in jit": Case(
        "b i o",
        SQUARE,
        (X,),
        jax.jit(lambda w, x: lax.scan(lambda x, w: (x @ w, None), x, w)),
        None,
    ),
    "fori": Case(
        "b i o", SQUARE, (X,), lambda w, x: lax.fori_loop(0, 3, lambda k, x: x @ w[k], x), None
    ),
    "map": Case("b i o", LAYERS, (X,), lambda w, x: lax.map(lambda w: x @ w, w), None),
    "cond": Case(
        "i o", MATRIX, (X,), lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: -x @ w), None
    ),
    "checkpoint": Case(
        "i o", MATRIX, (X,), lambda w, x: jax.checkpoint(lambda w: jnp.sin(x @ w))(w), None
    ),
}


@pytest.mark.parametrize("case", EAGER.values(), ids=EAGER)
def test_eager_calls_are_compiled_once(case, caplog):
    tree = lj.combine(*trees(case, "nf4"))
    fn = lj.adapt(lambda tree, *args: case.fn(tree["w"], *args))
    first = compilations(caplog, lambda: fn(tree, *case.args))
    assert compilations(caplog, lambda: fn(tree, *case.args)) == 0
    assert first >= 0


def test_many_kinds_of_calls(tree):
    """More than are kept, so that the oldest traces go; the results stay right."""
    adapted = lj.adapt(lambda tree, x, k: x @ tree["w"] + k)
    for k in (*range(70), 0, 1):
        result = adapted(tree, X, k)
    assert_near(result, WANTED + 1)


def float32_product(x, w):
    return 3 * (x @ w)


def derivative_is_as_expected(x, w):
    return x @ w - 1


@pytest.mark.parametrize("fn", [float32_product, derivative_is_as_expected])
def test_a_function_of_the_same_name_is_not_ours(fn):
    """The rewrite knows two functions of the library by their names; a user may have them, too."""
    base, x = {"w": jnp.cos(jnp.arange(32.0)).reshape(8, 4)}, jnp.ones((2, 8))
    adapters = lj.init_adapters(jax.random.key(1), base, [lj.LoraRule("w", rank=2)])
    adapted = lj.adapt(lambda tree, x: jax.jit(fn)(x, tree["w"]))
    assert jnp.allclose(adapted(lj.combine(base, adapters), x), fn(x, base["w"]), atol=1e-5)
