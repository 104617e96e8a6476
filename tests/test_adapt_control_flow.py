"""`adapt` on loops, branches and transformations inside the function, and around it.

Expectations are NumPy's, in float64 (cases.py).
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    BASES,
    LAYERS,
    MATRIX,
    SQUARE,
    Case,
    X,
    array,
    assert_near,
    call,
    check_values_and_gradients,
    expected,
    same,
    trees,
)
from jax import lax

pytestmark = pytest.mark.compiled_quickly


def layer(x, w):
    return jnp.tanh(x @ w)


def scanned(step: Callable, **options: Any) -> Callable:
    return lambda w, x: lax.scan(lambda x, w: (step(x, w), None), x, w, **options)[0]


def looped(w, x):
    """Layers one after the other: what most of these functions do."""
    for one in w:
        x = np.tanh(x @ one)
    return x


CONTROL_FLOW = {
    "scan": Case("b i o", SQUARE, (X,), scanned(layer), looped),
    "scan, unrolled": Case("b i o", SQUARE, (X,), scanned(layer, unroll=3), looped),
    "scan, reverse": Case(
        "b i o", SQUARE, (X,), scanned(layer, reverse=True), lambda w, x: looped(w[::-1], x)
    ),
    "scan, o i": Case(
        "b o i",
        SQUARE,
        (X,),
        scanned(lambda x, w: layer(x, w.T)),
        lambda w, x: looped(w.swapaxes(1, 2), x),
    ),
    "scan, reversed weights": Case(
        "b i o",
        SQUARE,
        (X,),
        lambda w, x: scanned(layer)(w[::-1], x),
        lambda w, x: looped(w[::-1], x),
    ),
    "scan in scan": Case(
        "b b i o",
        (2, *SQUARE),
        (X,),
        scanned(lambda x, w: scanned(layer)(w, x)),
        lambda w, x: looped(w.reshape(-1, 32, 32), x),
    ),
    "scan over steps": Case(
        "i o",
        (32, 32),
        (array(4, 5, 32),),
        lambda w, x: lax.scan(lambda h, x: (jnp.tanh((h + x) @ w),) * 2, jnp.zeros((5, 32)), x)[
            1
        ].sum(0),
        lambda w, x: sum(
            itertools.islice(
                itertools.accumulate(
                    x, lambda h, x: np.tanh((h + x) @ w), initial=np.zeros((5, 32))
                ),
                1,
                None,
            )
        ),
    ),
    "scan, weights handed on": Case(
        "b i o",
        SQUARE,
        (X,),
        lambda w, x: (lambda x, w: x + 0 * scanned(layer)(w, x))(
            *lax.scan(lambda x, w: (layer(x, w), w), x, w)
        ),
        looped,
    ),
    "scan, weights carried": Case(
        "i o",
        (32, 32),
        (X,),
        lambda w, x: lax.scan(
            lambda c, _: ((layer(c[0], c[1]), c[1]), None), (x, w), None, length=3
        )[0][0],
        lambda w, x: looped([w] * 3, x),
    ),
    "map": same(
        "b i o", LAYERS, (X,), lambda xp, w, x: lax.map(lambda w: x @ w, w) if xp is jnp else x @ w
    ),
    "fori": Case(
        "b i o",
        SQUARE,
        (X,),
        lambda w, x: lax.fori_loop(0, 3, lambda k, x: layer(x, w[k]), x),
        looped,
    ),
    "unrolled": Case("b i o", SQUARE, (X,), lambda w, x: [x := layer(x, w) for w in w][-1], looped),
    "split": Case(
        "b i o",
        SQUARE,
        (X,),
        lambda w, x: [x := layer(x, w[0]) for w in jnp.split(w, 3)][-1],
        looped,
    ),
    "cond": Case(
        "i o",
        MATRIX,
        (X,),
        lambda w, x: lax.cond(x[0, 0] > 9, lambda w: x @ w, lambda w: jnp.tanh(x @ w), w),
        lambda w, x: np.tanh(x @ w),
    ),
    "switch": Case(
        "i o",
        MATRIX,
        (X, np.int32(2)),
        lambda w, x, k: lax.switch(
            k, [lambda x: x @ w, lambda x: 0 * (x @ w), lambda x: 3 * (x @ w)], x
        ),
        lambda w, x, k: 3 * (x @ w),
    ),
    "cond in scan": Case(
        "b i o",
        SQUARE,
        (X,),
        scanned(lambda x, w: lax.cond(x[0, 0] > 99, lambda w: x, lambda w: layer(x, w), w)),
        looped,
    ),
    "checkpoint": Case(
        "i o", MATRIX, (X,), lambda w, x: jax.checkpoint(layer)(x, w), lambda w, x: np.tanh(x @ w)
    ),
    "checkpoint in scan": Case("b i o", SQUARE, (X,), scanned(jax.checkpoint(layer)), looped),
    "checkpoint with a policy": Case(
        "b i o",
        SQUARE,
        (X,),
        scanned(jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable)),
        looped,
    ),
    "scan in checkpoint": Case("b i o", SQUARE, (X,), jax.checkpoint(scanned(layer)), looped),
    "jit": Case("b i o", SQUARE, (X,), jax.jit(scanned(jax.jit(layer))), looped),
    "vmap over inputs": Case(
        "i o", MATRIX, (X,), lambda w, x: jax.vmap(lambda x: x @ w)(x), lambda w, x: x @ w
    ),
    "vmap over weights": Case(
        "b i o",
        LAYERS,
        (X,),
        lambda w, x: jax.vmap(lambda w: jnp.tanh(x @ w))(w),
        lambda w, x: np.tanh(x @ w),
    ),
    "vmap over both, moved": Case(
        "b i o",
        LAYERS,
        (array(5, 3, 32),),
        lambda w, x: jax.vmap(jnp.matmul, in_axes=(1, 0), out_axes=1)(x, w),
        lambda w, x: np.einsum("bei,eio->beo", x, w),
    ),
    "vmap over outputs": Case(
        "i o", MATRIX, (X,), lambda w, x: jax.vmap(lambda w: x @ w, 1, 1)(w), lambda w, x: x @ w
    ),
    "grad of the input": Case(
        "i o",
        MATRIX,
        (X,),
        lambda w, x: jax.grad(lambda x: (x @ w @ w.T * x).sum())(x),
        lambda w, x: 2 * x @ w @ w.T,
    ),
    "barrier": Case(
        "i o",
        MATRIX,
        (X,),
        lambda w, x: jnp.matmul(*lax.optimization_barrier((x, w))),
        lambda w, x: x @ w,
    ),
}
# A loop with a bound that is not known can be run, not differentiated.
WHILE = {
    "while": Case(
        "b i o",
        SQUARE,
        (X, np.int32(3)),
        lambda w, x, n: lax.while_loop(
            lambda c: c[0] < n, lambda c: (c[0] + 1, layer(c[1], w[c[0]])), (0, x)
        )[1],
        lambda w, x, n: looped(w, x),
    ),
    "while, weights in the condition": Case(
        "i o",
        (32, 32),
        (X,),
        lambda w, x: lax.while_loop(lambda x: (x @ w).max() > 1e-2, lambda x: x / 4, x),
        lambda w, x: next(x / 4**k for k in range(99) if (x / 4**k @ w).max() <= 1e-2),
    ),
    "while, weights carried": Case(
        "i o",
        (32, 32),
        (X, np.int32(3)),
        lambda w, x, n: lax.while_loop(
            lambda c: c[0] < n, lambda c: (c[0] + 1, c[1], layer(c[2], c[1])), (0, w, x)
        )[2],
        lambda w, x, n: looped([w] * 3, x),
    ),
    "fori, bound unknown": Case(
        "b i o",
        SQUARE,
        (X, np.int32(3)),
        lambda w, x, n: lax.fori_loop(0, n, lambda k, x: layer(x, w[k]), x),
        lambda w, x, n: looped(w, x),
    ),
}


@pytest.mark.parametrize("base_kind", BASES)
@pytest.mark.parametrize("case", CONTROL_FLOW.values(), ids=CONTROL_FLOW)
def test_values_and_gradients(case, base_kind):
    check_values_and_gradients(case, base_kind)


@pytest.mark.parametrize("case", (CONTROL_FLOW | WHILE).values(), ids=CONTROL_FLOW | WHILE)
def test_eager_values(case):
    base, adapters = trees(case, "nf4")
    assert_near(call(case, base, adapters), expected(case, base, adapters))


@pytest.mark.parametrize("base_kind", BASES)
@pytest.mark.parametrize("case", WHILE.values(), ids=WHILE)
def test_values_of_unbounded_loops(case, base_kind):
    base, adapters = trees(case, base_kind)
    actual = jax.jit(lambda base, adapters: call(case, base, adapters))(base, adapters)
    assert_near(actual, expected(case, base, adapters))
