"""Uses of one weight, in JAX and in NumPy, and what it means for `adapt` to get one right.

NumPy runs in float64 on the dense weight `W + scale · B A`; the derivative there is taken by a
complex step, which is exact to machine precision.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference
from jax.sharding import AxisType

import lora_jax as lj

BASES = ("float", "nf4")
STORED = {"nf4": {"block_size": 32}, "flat": {"block_size": 64, "flat": True}}


@dataclasses.dataclass(frozen=True)
class Case:
    """A use of one weight.

    Attributes:
      layout: of the weight, with its batch axes.
      shape: of the weight.
      args: the function's other arguments.
      fn: the function in JAX, of the weight and `args`.
      expected: the function in NumPy.
    """

    layout: str
    shape: tuple[int, ...]
    args: tuple[Any, ...]
    fn: Callable
    expected: Callable


def same(layout: str, shape: tuple[int, ...], args: tuple[Any, ...], fn: Callable) -> Case:
    """A case whose function is written for `jnp` and `np` alike, its first argument."""
    return Case(layout, shape, args, lambda w, *x: fn(jnp, w, *x), lambda w, *x: fn(np, w, *x))


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


X, Y, V = array(5, 32), array(5, 6), array(32)
MATRIX, SWAPPED, LAYERS, SQUARE = (32, 6), (6, 32), (3, 32, 6), (3, 32, 32)


def trees(case: Case, base_kind: str) -> tuple[Any, Any]:
    """A base of one leaf, and adapters of scale 2 as after some training."""
    base, layout = {"w": jnp.asarray(reference.weight(case.shape))}, case.layout
    if base_kind != "float":
        base = lj.quantize(base, "w", layout=layout, **STORED[base_kind])
        layout = None
    rules = [lj.LoraRule("w", rank=3, alpha=6, layout=layout)]
    shapes = jax.eval_shape(lambda: lj.init_adapters(jax.random.key(0), base, rules))
    return base, reference.randomized(shapes)


def call(case: Case, base: Any, adapters: Any, **options: Any) -> jax.Array:
    """The case's function through `adapt`."""
    fn = lj.adapt(lambda tree, *args: case.fn(tree["w"], *args), **options)
    return fn(lj.combine(base, adapters), *case.args)


def expected(case: Case, base: Any, adapters: Any) -> np.ndarray:
    return np.asarray(case.expected(reference.dense(base["w"], adapters["w"]), *case.args))


def assert_near(actual: Any, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def check_values_and_gradients(case: Case, base_kind: str) -> None:
    """Values within 1e-5 of the largest; the gradient along a random direction within 2e-5."""
    base, adapters = trees(case, base_kind)
    wanted = expected(case, base, adapters)
    rng = np.random.default_rng(7)
    cotangent = rng.normal(size=wanted.shape).astype(np.float32)

    @jax.jit
    def values_and_gradients(base, adapters, cotangent):
        values, pullback = jax.vjp(lambda adapters: call(case, base, adapters), adapters)
        return values, pullback(cotangent)[0]

    actual, gradients = values_and_gradients(base, adapters, cotangent)
    assert_near(actual, wanted)

    # d/dε of Σ cotangent · f(W + 2 (B + ε dB)(A + ε dA)) at ε = 0, for one direction (dA, dB).
    step, adapter = 1e-30, adapters["w"]
    d_a, d_b = (rng.normal(size=x.shape) for x in (adapter.a, adapter.b))
    a, b = (np.asarray(x, np.float64) for x in (adapter.a, adapter.b))
    product = 2 * (b + 1j * step * d_b) @ (a + 1j * step * d_a)
    moved = reference.dense(base["w"], None)
    moved = moved + reference.parameter(product, adapter.layout, case.shape)
    derivative = (cotangent * case.expected(moved, *case.args)).sum().imag / step
    terms = np.concatenate(
        [np.ravel(gradients["w"].a) * d_a.ravel(), np.ravel(gradients["w"].b) * d_b.ravel()]
    )
    size = np.linalg.norm(terms)
    assert size > 0
    assert abs(terms.sum() - derivative) < 2e-5 * size


PLAIN = Case("i o", MATRIX, (X,), lambda w, x: x @ w, lambda w, x: x @ w)
WANTED = expected(PLAIN, *trees(PLAIN, "nf4"))


@jax.custom_vjp
def doubled(x):
    """Twice its argument, with a derivative of seven, so that nobody else's can pass for it."""
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (7 * g,))


def on_mesh(fn: Callable, *specs) -> Callable:
    """A function of arrays that are split over two devices."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
