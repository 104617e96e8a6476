"""Views: any chain of rearrangements of a weight is what NumPy makes of the dense weight.

A chain is drawn at random and applied twice: to a `View`, and to the weight `W + scale · B A` that
NumPy computed in float64. A view may refuse a step (it would have to be made dense), and the chain
goes on without it; which steps a view must not refuse is a table of its own.
"""

import dataclasses
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings

import lora_jax as lj
from lora_jax.core import contract
from lora_jax.core.view import View

pytestmark = pytest.mark.compiled_quickly

LAYOUTS = ("i o", "o i", "i o o", "i i o", "o i i", "o o i i", "i i o o")
# Few, for the sake of time, and the same at each run; thousands of others were tried once.
FEW = settings(max_examples=15, deadline=None, derandomize=True)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A weight as the library holds it, and as NumPy does, in float64."""

    adapted: lj.AdaptedArray
    dense: np.ndarray
    base: np.ndarray  # without the update


def make_leaf(layout: str, batch: tuple[int, ...], sizes: tuple[int, ...], quantized=False) -> Leaf:
    w = reference.weight((*batch, *sizes))
    base = jnp.asarray(w)
    if quantized:
        base = lj.quantize_array(base, block_size=32, layout="b " * len(batch) + layout)
        w = np.asarray(lj.dequantize(base))
    inn = math.prod(n for n, x in zip(sizes, layout.split(), strict=True) if x == "i")
    rng = np.random.default_rng(1)
    a = rng.normal(size=(*batch, 2, inn)).astype(np.float32)
    b = rng.normal(size=(*batch, math.prod(sizes) // inn, 2)).astype(np.float32)
    adapter = lj.Adapter(jnp.asarray(a), jnp.asarray(b), scale=0.5, layout=layout)
    leaf = lj.AdaptedArray(base, adapter)
    return Leaf(leaf, reference.dense(base, adapter), w.astype(np.float64))


# Steps of a chain, each on a view and on two arrays. Fractions u and v in [0, 1) choose among
# whatever is possible at that point.


def transposed(u, v, view, *arrays):
    order = tuple(np.random.default_rng(int(u * 1e9)).permutation(len(view.shape)).tolist())
    return view.transposed(order), *(x.transpose(order) for x in arrays)


def reshaped(u, v, view, *arrays):
    """Splits an axis in two, merges two, or puts a one in."""
    shape, axis = view.shape, int(u * len(view.shape))
    if v < 0.4:
        n = shape[axis]
        parts = [(k, n // k) for k in range(1, n + 1) if n % k == 0]
        shape = (*shape[:axis], *parts[int(v / 0.4 * len(parts))], *shape[axis + 1 :])
    elif v < 0.8 and axis + 1 < len(shape):
        shape = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    else:
        shape = (*shape[:axis], 1, *shape[axis:])
    return view.reshaped(shape), *(x.reshape(shape) for x in arrays)


def squeezed(u, v, view, *arrays):
    ones = [k for k, n in enumerate(view.shape) if n == 1]
    chosen = tuple(ones[int(u * (len(ones) + 1)) :])
    return view.squeezed(chosen), *(x.squeeze(chosen) for x in arrays)


def expanded(u, v, view, *arrays):
    positions = sorted({int(u * (len(view.shape) + 1)), int(v * (len(view.shape) + 1))})
    return view.with_ones(positions), *(np.expand_dims(x, positions) for x in arrays)


def cut(u, v, view, *arrays):
    """One index of a batch axis, kept as an axis of size one."""
    axes = [k for k in range(len(view.shape)) if view.batch_axis(k) is not None]
    if not axes:
        return None, *arrays
    axis = axes[int(u * len(axes))]
    own, start = view.batch_axis(axis), int(v * view.shape[axis])
    cut_view = view.on_batch(lambda x: jax.lax.slice_in_dim(x, start, start + 1, axis=own))
    return cut_view, *(x.take([start], axis) for x in arrays)


fractions = st.floats(0, 1, exclude_max=True)
steps = st.sampled_from([transposed, reshaped, squeezed, expanded, cut])
chains = st.lists(st.tuples(steps, fractions, fractions), max_size=8)
leaves = st.builds(
    lambda layout, batch, sizes: make_leaf(layout, batch, tuple(sizes[: len(layout.split())])),
    st.sampled_from(LAYOUTS),
    st.sampled_from([(), (3,), (1,), (2, 3), (2, 1)]),
    st.permutations([4, 6, 1, 2]),
)


def walk(leaf: Leaf, chain) -> tuple[View, np.ndarray, np.ndarray]:
    """The view, the dense weight and the dense base at the end of a chain."""
    state = View.of(leaf.adapted, "w"), leaf.dense, leaf.base
    for step, u, v in chain:
        after = step(u, v, *state)
        if after[0] is not None:
            state = after
            assert state[0].shape == state[1].shape
    return state


@pytest.mark.compiled_quickly(False)
@FEW
@given(leaf=leaves, chain=chains)
def test_chain_of_rearrangements(leaf, chain):
    view, dense, base = walk(leaf, chain)
    np.testing.assert_array_equal(view.dense_base(), base.astype(np.float32))
    np.testing.assert_allclose(view.dense(), dense, rtol=0, atol=1e-5)


def dot(x: np.ndarray, y: np.ndarray, dimension_numbers) -> np.ndarray:
    """`lax.dot_general` in NumPy: the product has batch axes, free axes of x, free axes of y."""
    (x_contract, y_contract), (x_batch, y_batch) = dimension_numbers
    of_x = list(range(x.ndim))
    of_y = list(range(x.ndim, x.ndim + y.ndim))
    for k, m in zip((*x_contract, *x_batch), (*y_contract, *y_batch), strict=True):
        of_y[m] = of_x[k]
    free_x = [k for k in of_x if k not in (*x_contract, *x_batch)]
    free_y = [k for k in of_y if k >= x.ndim]
    return np.einsum(x, of_x, y, of_y, [*x_batch, *free_x, *free_y])


@FEW
@given(leaf=leaves, chain=chains, seed=st.integers(0, 2**32 - 1), view_first=st.booleans())
def test_any_product_of_any_view(leaf, chain, seed, view_first):
    """Each axis of the weight is free, contracted or shared as a batch axis, in any order."""
    view, dense, _ = walk(leaf, chain)
    rng = np.random.default_rng(seed)
    roles = rng.choice(["free", "contracted", "batch"], size=dense.ndim, p=[0.4, 0.4, 0.2])
    contracted, batch = (np.flatnonzero(roles == x).tolist() for x in ("contracted", "batch"))
    x_axes = rng.permutation([-1, *contracted, *batch]).tolist()  # -1 is x's own free axis
    x = rng.normal(size=[5 if k < 0 else dense.shape[k] for k in x_axes]).astype(np.float32)

    of_w = (tuple(contracted), tuple(batch))
    of_x = tuple(tuple(x_axes.index(k) for k in axes) for axes in of_w)
    numbers = zip(of_w, of_x, strict=True) if view_first else zip(of_x, of_w, strict=True)
    params = {"dimension_numbers": tuple(numbers), "preferred_element_type": jnp.float32}

    operands = (view, x) if view_first else (x, view)
    actual = contract.total(contract.dot_general(*operands, params))

    if {view.kinds[view.order[k]] for k in contracted}.isdisjoint("io"):
        assert actual is None
        return
    expected = dot(*((dense, x) if view_first else (x, dense)), params["dimension_numbers"])
    size = dot(*map(np.abs, (dense, x) if view_first else (x, dense)), params["dimension_numbers"])
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * size.max())


# Steps that must stay lazy: layout, shape, step.
LAZY = {
    "transpose": ("i o", (32, 6), lambda w: w.T),
    "transpose batch": ("b i o", (3, 32, 6), lambda w: w.transpose(1, 0, 2)),
    "merge heads": ("i o o", (32, 3, 4), lambda w: w.reshape(32, 12)),
    "split into heads": ("i o", (32, 12), lambda w: w.reshape(32, 3, 4)),
    "merge inputs": ("i i o", (4, 8, 6), lambda w: w.reshape(32, 6)),
    "split and permute": ("i o", (32, 12), lambda w: w.reshape(32, 3, 4).transpose(2, 1, 0)),
    "merge batch": ("b b i o", (2, 3, 32, 6), lambda w: w.reshape(6, 32, 6)),
    "split batch": ("b i o", (6, 32, 6), lambda w: w.reshape(2, 3, 32, 6)),
    "split all": ("b i o", (6, 32, 4), lambda w: w.reshape(2, 3, 4, 8, 2, 2)),
    "one in front": ("i o", (32, 6), lambda w: w[None]),
    "one in the middle": ("i o", (32, 6), lambda w: w[:, None]),
    "ones, then none": ("i o", (32, 6), lambda w: w[None, :, None].squeeze((0, 2))),
    "ones, then reshape": ("i o", (32, 6), lambda w: w[:, None].reshape(4, 8, 6)),
    "ones moved": ("i o", (32, 6), lambda w: w[None].transpose(2, 0, 1)),
    "batch of one": ("b i o", (1, 32, 6), lambda w: w.squeeze(0)),
    "batch of one merged": ("b i o", (1, 32, 6), lambda w: w.reshape(32, 6)),
    "head of one": ("i o o", (32, 1, 6), lambda w: w.squeeze(1)),
    "head of one put in": ("i o", (32, 6), lambda w: w.reshape(32, 1, 6)),
    "first layer": ("b i o", (3, 32, 6), lambda w: w[0]),
    "last layer": ("b i o", (3, 32, 6), lambda w: w[-1]),
    "some layers": ("b i o", (5, 32, 6), lambda w: w[1:4]),
    "every other layer": ("b i o", (5, 32, 6), lambda w: w[::2]),
    "layers in reverse": ("b i o", (5, 32, 6), lambda w: w[::-1]),
    "layer of moved batch": ("b b i o", (2, 3, 32, 6), lambda w: w.swapaxes(0, 1)[1]),
    "layer and expert": ("b b i o", (2, 3, 32, 6), lambda w: w[1, 2]),
    "chosen layers": ("b i o", (5, 32, 6), lambda w: w[np.array([4, 0, 0])]),
}


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "nf4"])
@pytest.mark.parametrize(("layout", "shape", "step"), LAZY.values(), ids=LAZY)
def test_stays_lazy(layout, shape, step, quantized):
    """Strict mode refuses what is made dense, so a product with every axis summed must do."""
    batch = layout.count("b")
    leaf = make_leaf(layout.replace("b ", ""), shape[:batch], shape[batch:], quantized)
    dense = step(leaf.dense)
    x = np.random.default_rng(1).normal(size=dense.shape).astype(np.float32)
    axes = "abcdefgh"[: dense.ndim]

    def total(tree, x):
        return jnp.einsum(f"{axes},{axes}->", step(tree["w"]), x)

    actual = jax.jit(lj.adapt(total))({"w": leaf.adapted}, x)
    size = (np.abs(dense) * np.abs(x)).sum()
    np.testing.assert_allclose(actual, (dense * x).sum(), rtol=0, atol=1e-6 * size)


def test_untouched_view_is_returned_as_its_leaf():
    tree = {"w": make_leaf("i o", (), (32, 6)).adapted}
    returned, _ = lj.adapt(lambda tree: (tree, jnp.ones(32) @ tree["w"]))(tree)
    assert isinstance(returned["w"], lj.AdaptedArray)
    assert jax.tree.structure(returned) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, returned, tree)
