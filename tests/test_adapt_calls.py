"""How `adapt`ed functions are called: what they refuse, what passes by value, what is cached."""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import LAYERS, MATRIX, SQUARE, Case, X, assert_near, call, expected, trees
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax.core.rewrite import Report


@pytest.fixture(scope="module")
def tree():
    """One adapted 4-bit matrix."""
    return lj.combine(*trees(PLAIN, "nf4"))


PLAIN = Case("i o", MATRIX, (X,), lambda w, x: x @ w, lambda w, x: x @ w)
WANTED = expected(PLAIN, *trees(PLAIN, "nf4"))


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (7 * g,))


def on_mesh(fn: Callable, *specs) -> Callable:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)


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


# Gradients that the function itself cuts, and casts.


def test_stop_gradient():
    base, adapters = trees(PLAIN, "nf4")

    def loss(adapters):
        fn = lj.adapt(lambda tree, x: x @ lax.stop_gradient(tree["w"]))
        return fn(lj.combine(base, adapters), X).sum()

    value, gradients = jax.value_and_grad(loss)(adapters)
    assert value == pytest.approx(WANTED.sum(), rel=1e-4)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradients))


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


# explain


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
