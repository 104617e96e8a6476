"""`adapt` on products and look-ups: values and gradients are those of `W + scale · B A`.

Expectations are NumPy's, in float64 (cases.py). Loops and branches are in
test_adapt_control_flow.py, models in test_adapt_models.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    BASES,
    LAYERS,
    MATRIX,
    SWAPPED,
    Case,
    V,
    X,
    Y,
    array,
    check_values_and_gradients,
    same,
)
from jax import lax

pytestmark = pytest.mark.compiled_quickly
HEADS = (32, 3, 4)
IDS = np.array([[0, 5, 1], [1, 1, 3]])


def grouped(w, x, sizes):
    """`lax.ragged_dot`: rows in groups, each with a matrix of its own; none for the last rows."""
    rows = np.repeat(np.arange(len(sizes)), sizes)
    product = np.einsum("ti,tio->to", x[: rows.size], w[rows])
    return np.concatenate([product, np.zeros((len(x) - rows.size, w.shape[2]))])


PRODUCTS = {
    "x @ W": same("i o", MATRIX, (X,), lambda xp, w, x: x @ w),
    "W @ x": same("o i", SWAPPED, (X.T,), lambda xp, w, x: w @ x),
    "x @ W.T, o i": same("o i", SWAPPED, (X,), lambda xp, w, x: x @ w.T),
    "x @ W.T, i o": same("i o", MATRIX, (Y,), lambda xp, w, x: x @ w.T),
    "vector @ W": same("i o", MATRIX, (V,), lambda xp, w, x: x @ w),
    "W @ vector": same("o i", SWAPPED, (V,), lambda xp, w, x: w @ x),
    "four axes @ W": same("i o", MATRIX, (array(2, 3, 4, 32),), lambda xp, w, x: x @ w),
    "dot": same("i o", MATRIX, (X,), lambda xp, w, x: xp.dot(x, w)),
    "inner": same("o i", SWAPPED, (X,), lambda xp, w, x: xp.inner(x, w)),
    "tensordot": same("i o", MATRIX, (X,), lambda xp, w, x: xp.tensordot(w, x, ((0,), (1,)))),
    "einsum, W first": same("i o", MATRIX, (X,), lambda xp, w, x: xp.einsum("io,bi->ob", w, x)),
    "einsum, W last": same("i o", MATRIX, (X,), lambda xp, w, x: xp.einsum("bi,io->bo", x, w)),
    "heads": same("i o o", HEADS, (X,), lambda xp, w, x: xp.einsum("bd,dhk->bhk", x, w)),
    "heads, moved": same("i o o", HEADS, (X,), lambda xp, w, x: xp.einsum("dhk,bd->kbh", w, x)),
    "heads to outputs": same(
        "i i o", (4, 8, 6), (array(5, 4, 8),), lambda xp, w, x: xp.einsum("bhk,hkd->bd", x, w)
    ),
    "one of two inputs": same(
        "i i o", (4, 8, 6), (array(5, 8),), lambda xp, w, x: xp.einsum("bk,hkd->bhd", x, w)
    ),
    "shared head, o contracted": same(
        "i o o", HEADS, (array(5, 3, 4),), lambda xp, w, x: xp.einsum("bhk,dhk->bdh", x, w)
    ),
    "everything contracted": same("i o", MATRIX, (X, Y), lambda xp, w, x, y: (x @ w * y).sum()),
    "with a matrix": same(
        "i o", MATRIX, (array(32, 6),), lambda xp, w, x: xp.einsum("io,io->", w, x)
    ),
    "three operands, W first": same(
        "i o", MATRIX, (X, Y), lambda xp, w, x, y: xp.einsum("io,bi,bo->b", w, x, y)
    ),
    "three operands, W in the middle": same(
        "i o", MATRIX, (X, Y), lambda xp, w, x, y: xp.einsum("bi,io,bo->b", x, w, y)
    ),
    "three operands, W last": same(
        "i o", MATRIX, (X, array(6, 7)), lambda xp, w, x, y: xp.einsum("oc,bi,io->bc", y, x, w)
    ),
    "W twice, activations first": same(
        "i o", MATRIX, (X,), lambda xp, w, x: xp.einsum("bi,io,jo->bj", x, w, w)
    ),
    "W twice, weights first": same(
        "i o", (32, 4), (array(80, 32),), lambda xp, w, x: xp.einsum("bi,io,jo->bj", x, w, w)
    ),
    "x @ (W.T @ W)": same("o i", SWAPPED, (Y,), lambda xp, w, x: x @ (w @ w.T)),
    "merged heads": same("i o o", HEADS, (X,), lambda xp, w, x: x @ w.reshape(32, 12)),
    "split into heads": same(
        "i o", (32, 12), (X,), lambda xp, w, x: xp.einsum("bd,dhk->bhk", x, w.reshape(32, 3, 4))
    ),
    "a one put in": same(
        "i o", MATRIX, (X,), lambda xp, w, x: xp.einsum("bi,zio->zbo", x, w[None])
    ),
    "experts": same(
        "b i o", LAYERS, (array(3, 5, 32),), lambda xp, w, x: xp.einsum("ebi,eio->ebo", x, w)
    ),
    "every expert": same("b i o", LAYERS, (X,), lambda xp, w, x: xp.einsum("bi,eio->beo", x, w)),
    "sum of experts": same(
        "b i o", LAYERS, (array(3, 5, 32),), lambda xp, w, x: xp.einsum("ebi,eio->bo", x, w)
    ),
    "gated experts": same(
        "b i o", LAYERS, (X, array(5, 3)), lambda xp, w, x, g: xp.einsum("bi,be,eio->bo", x, g, w)
    ),
    "experts, o i": same(
        "b o i", (3, 6, 32), (X,), lambda xp, w, x: xp.einsum("bi,eoi->ebo", x, w)
    ),
    "batched matmul": same("b i o", LAYERS, (array(3, 5, 32),), lambda xp, w, x: x @ w),
    "first and last layer": same("b i o", LAYERS, (X,), lambda xp, w, x: x @ w[0] + x @ w[-1]),
    "some layers": same("b i o", (5, 32, 6), (X,), lambda xp, w, x: x @ w[1:4]),
    "layers in reverse": same("b i o", LAYERS, (X,), lambda xp, w, x: (x @ w[::-1]) * 3),
    "layer and expert": same("b b i o", (2, *LAYERS), (X,), lambda xp, w, x: x @ w[1, 2]),
    "moved batch": same(
        "b i o", LAYERS, (X,), lambda xp, w, x: xp.einsum("bi,ieo->beo", x, w.swapaxes(0, 1))
    ),
    "indexed layer": same("b i o", LAYERS, (X, np.int32(2)), lambda xp, w, x, k: x @ w[k]),
    "indexed layer and expert": same(
        "b b i o", (2, *LAYERS), (X, np.int32(1)), lambda xp, w, x, k: x @ w[k, k]
    ),
    "an expert a row": same(
        "b i o",
        LAYERS,
        (X, np.array([0, 2, 1, 1, -1])),
        lambda xp, w, x, k: xp.einsum("bi,bio->bo", x, w[k]),
    ),
    "taken layers": same(
        "b i o", LAYERS, (X, np.array([2, 0])), lambda xp, w, x, k: x @ xp.take(w, k, axis=0)
    ),
    "grouped": Case(
        "b i o", LAYERS, (X, np.array([2, 0, 3])), lambda w, x, n: lax.ragged_dot(x, w, n), grouped
    ),
    "grouped, rows left over": Case(
        "b i o", LAYERS, (X, np.array([1, 2, 0])), lambda w, x, n: lax.ragged_dot(x, w, n), grouped
    ),
    "grouped, o i": Case(
        "b o i",
        (3, 6, 32),
        (X, np.array([2, 1, 2])),
        lambda w, x, n: lax.ragged_dot(x, w.swapaxes(1, 2), n),
        lambda w, x, n: grouped(w.swapaxes(1, 2), x, n),
    ),
    "integers": same("i o", MATRIX, (X.astype(np.int32) + 1,), lambda xp, w, x: x @ w),
    "booleans": same("i o", MATRIX, (X > 0,), lambda xp, w, x: x @ w),
    "along an axis": Case(
        "i o",
        MATRIX,
        (X,),
        lambda w, x: jnp.apply_along_axis(lambda row: row @ w, 1, x),
        lambda w, x: x @ w,
    ),
}

LOOK_UPS = {
    "rows": same("o i", SWAPPED, (IDS,), lambda xp, w, i: w[i]),
    "rows, i o": same("i o", (32, 6), (IDS,), lambda xp, w, i: w[i]),
    "columns": same("o i", SWAPPED, (IDS,), lambda xp, w, i: w[:, i]),
    "take": same("o i", SWAPPED, (IDS,), lambda xp, w, i: xp.take(w, i, axis=0)),
    "one row": same("o i", SWAPPED, (np.int32(3),), lambda xp, w, i: w[i]),
    "one row, static": same("o i", SWAPPED, (), lambda xp, w: w[-2] * 2),
    "one column, static": same("i o", MATRIX, (), lambda xp, w: w[:, 1] * 2),
    "rows of heads": same("o i i", (6, 4, 8), (IDS,), lambda xp, w, i: w[i]),
    "rows, transposed": same("i o", MATRIX, (IDS,), lambda xp, w, i: w.T[i]),
    "negative": same("o i", SWAPPED, (IDS - 6,), lambda xp, w, i: w[i]),
    "tied": same("o i", SWAPPED, (IDS,), lambda xp, w, i: xp.tanh(w[i]) @ w.T),
    "under vmap": Case(
        "o i", SWAPPED, (IDS,), lambda w, i: jax.vmap(lambda i: w[i])(i), lambda w, i: w[i]
    ),
    "one of each": Case(
        "b o i",
        (3, 6, 32),
        (np.array([5, 0, 2]),),
        lambda w, i: jax.vmap(lambda w, i: w[i])(w, i),
        lambda w, i: w[np.arange(3), i],
    ),
    "clipped": Case(
        "o i",
        SWAPPED,
        (IDS + 3,),
        lambda w, i: w.at[i].get(mode="clip"),
        lambda w, i: w[np.minimum(i, 5)],
    ),
    "filled": Case(
        "o i",
        SWAPPED,
        (IDS + 3,),
        lambda w, i: w.at[i].get(mode="fill", fill_value=7.0),
        lambda w, i: np.where((i < 6)[..., None], w[np.minimum(i, 5)], 7),
    ),
    "filled, i o": Case(
        "i o",
        MATRIX,
        (IDS + 30,),
        lambda w, i: w.at[i].get(mode="fill", fill_value=7.0),
        lambda w, i: np.where((i < 32)[..., None], w[np.minimum(i, 31)], 7),
    ),
}


@pytest.mark.parametrize("base_kind", BASES)
@pytest.mark.parametrize("case", (PRODUCTS | LOOK_UPS).values(), ids=PRODUCTS | LOOK_UPS)
def test_values_and_gradients(case, base_kind):
    check_values_and_gradients(case, base_kind)
