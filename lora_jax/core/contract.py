"""What an adapted weight does in a product or a look-up: `x·W + ((x·Aᵀ)·Bᵀ)·scale`, factored.

The sum `W + scale·BA` is never differentiated: its gradient would cost 6·T·in·out operations
instead of 4·T·in·out for T tokens. Nor is it kept, which would cost the memory that a 4-bit base
saved; on a GPU folded.py forms it where such a weight is decoded for a product anyway.

Every function here returns None where a use has no factored form, and leaves the verdict to its
caller.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import kernels
from lora_jax.core import folded, products
from lora_jax.core.leaves import QuantizedArray, RunAdapter
from lora_jax.core.view import View

RANK, OTHER_RANK = 1000, 1001  # labels of rank axes; those of operands' axes count from zero


@dataclasses.dataclass(frozen=True)
class Labelled:
    """An array with a label for each axis; axes of a product that share a label are paired."""

    value: jax.Array
    labels: list[int]

    def times(self, other: Labelled, out: list[int], precision: Any) -> Labelled:
        """The contraction to the labels `out`, accumulated in float32 or wider."""
        wide = jnp.promote_types(self.value.dtype, jnp.float32)
        value = jnp.einsum(
            *(self.value, self.labels, other.value, other.labels, out),
            precision=precision,
            preferred_element_type=wide,
        )
        return Labelled(value, out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum:
    """A product with the base, and the update's share of it, not added up yet.

    XLA folds the transpose of a product into the product, but not that of a sum. A transpose, as
    vmap puts behind `W @ x`, is therefore taken of both: the base's product is then computed as it
    is without an adapter, to the last bit.
    """

    product: jax.Array
    update: jax.Array

    def total(self) -> jax.Array:
        """What the product of the adapted weight is."""
        return self.product + self.update.astype(self.product.dtype)

    def transposed(self, permutation: tuple[int, ...]) -> Sum:
        """With its axes permuted."""
        return Sum(jnp.transpose(self.product, permutation), self.update.transpose(permutation))


def dot_general(
    lhs: Any, rhs: Any, params: dict[str, Any], product: Callable[..., jax.Array] | None = None
) -> jax.Array | Sum | None:
    """`lax.dot_general` where one operand is a `View`, or both are.

    Args:
      lhs: array or view.
      rhs: array or view.
      params: the primitive's parameters.
      product: what takes the product of two arrays; by default the primitive with these parameters.

    Returns:
      The product, or None where an adapted axis group is not contracted at all.
    """
    left, right, out = _label(len(lhs.shape), len(rhs.shape), params["dimension_numbers"])
    precision = params.get("precision")

    product = product or functools.partial(lax.dot_general, **params)
    if isinstance(lhs, View) and isinstance(rhs, View):
        return _product_of_views(lhs, left, rhs, right, out, product, precision)
    if isinstance(lhs, View):
        return _product(lhs, left, Labelled(rhs, right), out, product, precision)
    flipped = lambda w, x: product(x, w)  # noqa: E731
    return _product(rhs, right, Labelled(lhs, left), out, flipped, precision)


def float32_product(x: Any, w: Any) -> jax.Array | Sum | None:
    """`products.float32_product` where an operand is a `View`, or both are."""
    params = {"dimension_numbers": (((len(x.shape) - 1,), (0,)), ((), ()))}
    return dot_general(x, w, params, products.float32_product)


def total(x: Any) -> Any:
    """A sum added up; anything else as it is."""
    return x.total() if isinstance(x, Sum) else x


def _label(
    left_ndim: int, right_ndim: int, dimension_numbers: Any
) -> tuple[list[int], list[int], list[int]]:
    """Labels for the axes of both operands and of their product."""
    (left_contract, right_contract), (left_batch, right_batch) = dimension_numbers
    left = list(range(left_ndim))
    right = list(range(left_ndim, left_ndim + right_ndim))
    for k, m in zip((*left_contract, *left_batch), (*right_contract, *right_batch), strict=True):
        right[m] = left[k]
    batch = [left[k] for k in left_batch]
    paired = {*batch, *(left[k] for k in left_contract)}
    return left, right, [*batch, *(x for x in (*left, *right) if x not in paired)]


def _product(
    view: View,
    labels: list[int],
    x: Labelled,
    out: list[int],
    product: Callable[[jax.Array, jax.Array], jax.Array],
    precision: Any,
) -> jax.Array | Sum | None:
    """`product(W, x)` and the update's share of it."""
    if view.adapter is None:
        return _base_product(view, x.value, product)
    # Activations may be integers, or narrower than the weight: the product is of the wider dtype.
    dtype = jnp.promote_types(x.value.dtype, view.dtype)
    summed = [k for k in x.labels if k not in out]
    if _summed_kind(view, labels, summed) is None:
        return None

    def update(view: View, value: jax.Array) -> jax.Array:
        factors = _factors(view, labels, summed, dtype)
        assert factors is not None  # something is summed, as was seen
        first, second = factors
        dropped = Labelled(_dropout(view, value.astype(dtype)), x.labels)
        needed = {*out, *second.labels}
        kept = [k for k in dict.fromkeys((*x.labels, *first.labels)) if k in needed]
        hidden = dropped.times(first, kept, precision)  # [T, r]
        hidden = Labelled(hidden.value.astype(dtype), hidden.labels)
        return hidden.times(second, out, precision).value  # [T, out]

    rows = math.prod(x.value.shape) // math.prod(x.value.shape[x.labels.index(k)] for k in summed)
    if folded.folds(view, x.value, rows):
        return folded.product(view, x.value, product, update)
    return Sum(_base_product(view, x.value, product), update(view, x.value))


def _base_product(view: View, x: jax.Array, product: Callable) -> jax.Array:
    base = dataclasses.replace(view, adapter=None, scale=None, dropout_key=None)
    if not isinstance(view.base, QuantizedArray):
        return product(base.dense_base(), x)
    # Differentiation with respect to x needs the weight again. Left to itself it would keep the
    # decoded one; recomputing it from the codes is what makes the base four bits in training, too.
    return jax.checkpoint(lambda view, x: product(view.dense_base(), x))(base, x)


def _factors(
    view: View, labels: list[int], summed: list[int], dtype: Any, rank: int = RANK
) -> tuple[Labelled, Labelled] | None:
    """The factor that meets x first, and the other one, times the scale.

    The first is the one that owns the contracted axes, so that what lies between the two products
    has r columns.
    """
    adapter, batch = view.adapter, len(view.batch_shape)
    assert adapter is not None
    summed_kind = _summed_kind(view, labels, summed)
    if summed_kind is None:
        return None
    of_kind = _labels_by_kind(view, labels)
    batch_sizes, ones = view.batch_shape, (1,) * view.ones
    a = adapter.a.reshape(*batch_sizes, adapter.rank, *view.inner)
    b = adapter.b.reshape(*batch_sizes, *view.outer, adapter.rank, *ones)
    of_a = [*of_kind["b"], rank, *of_kind["i"]]
    of_b = [*of_kind["b"], *of_kind["o"], rank, *of_kind["1"]]
    wide = jnp.promote_types(a.dtype, jnp.float32)
    scale = view.factor_scale(wide)
    a, b = Labelled(a, of_a), Labelled(b, of_b)
    first, second = (a, b) if summed_kind == "i" else (b, a)
    scaled = second.value * scale.reshape(*batch_sizes, *(1,) * (second.value.ndim - batch))
    return Labelled(first.value.astype(dtype), first.labels), Labelled(
        scaled.astype(dtype), second.labels
    )


def _summed_kind(view: View, labels: list[int], summed: list[int]) -> str | None:
    """Which axes of a weight a product sums over, `i` or `o`; None where it is neither."""
    of_kind = _labels_by_kind(view, labels)
    return next((kind for kind in "io" if not set(summed).isdisjoint(of_kind[kind])), None)


def _labels_by_kind(view: View, labels: list[int]) -> dict[str, list[int]]:
    name = {canonical: labels[k] for k, canonical in enumerate(view.order)}
    return {kind: [name[c] for c, k in enumerate(view.kinds) if k == kind] for kind in "boi1"}


def _dropout(view: View, x: jax.Array) -> jax.Array:
    if view.dropout_key is None or view.adapter is None or not view.adapter.drops:
        return x
    keep: Any = 1 - view.adapter.dropout
    divisor = keep
    if isinstance(view.adapter, RunAdapter):
        keep = keep.reshape(-1)[0]
        divisor = keep.astype(x.dtype)  # as a Python number would be
    key = view.dropout_key.reshape(-1)[0]
    return jnp.where(jax.random.bernoulli(key, keep, x.shape), x / divisor, 0).astype(x.dtype)


def _product_of_views(
    lhs: View,
    left: list[int],
    rhs: View,
    right: list[int],
    out: list[int],
    product: Callable[[jax.Array, jax.Array], jax.Array],
    precision: Any,
) -> jax.Array | None:
    """A product of two adapted weights, as three-operand einsums make: (W + BA)(V + DC).

    With the right one written out it is (W + BA)V + ((W + BA)D)C: each term has one view.
    """
    if lhs.dropout_key is not None or rhs.dropout_key is not None:
        return None  # there are no activations to drop
    summed = [k for k in left if k in right and k not in out]

    def both(lhs: View, rhs: View) -> jax.Array | None:
        values = Labelled(rhs.dense_base(), right)
        y = total(_product(lhs, left, values, out, product, precision))
        if rhs.adapter is None or y is None:
            return y
        factors = _factors(rhs, right, summed, rhs.dtype, OTHER_RANK)
        if factors is None:
            return None
        first, second = factors
        kept = [k for k in dict.fromkeys((*left, *first.labels)) if k in out or k in second.labels]

        def through(w: jax.Array, x: jax.Array) -> jax.Array:
            return Labelled(w, left).times(Labelled(x, first.labels), kept, precision).value

        hidden = total(_product(lhs, left, first, kept, through, precision))
        if hidden is None:
            return None
        update = Labelled(hidden.astype(rhs.dtype), kept).times(second, out, precision)
        return y + update.value.astype(y.dtype)

    return jax.checkpoint(both)(lhs, rhs)  # again, no decoded weight is kept


def ragged_dot_general(lhs: Any, rhs: Any, sizes: Any, params: dict[str, Any]) -> Any:
    """`lax.ragged_dot`, as `grouped_dot` below; None for any other kind of ragged product."""
    numbers = params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), batch = numbers.dot_dimension_numbers
    plain = (tuple(x_contract), tuple(w_contract), batch) == ((1,), (1,), ((), ()))
    grouped = tuple(numbers.rhs_group_dimensions) == (0,)
    rows = tuple(numbers.lhs_ragged_dimensions) == (0,)
    if not (plain and grouped and rows and params.get("group_offset") is None):
        return None
    return grouped_dot(lhs, rhs, sizes, params)


def grouped_dot(lhs: Any, rhs: Any, sizes: Any, params: dict[str, Any]) -> Any:
    """Rows `[T, in]`, grouped by expert, times a view `[E, in, out]`.

    Returns:
      The product `[T, out]`, or None where the view is not that of one matrix for each expert.
    """
    if not isinstance(rhs, View) or isinstance(lhs, View) or isinstance(sizes, View):
        return None
    kinds = tuple(rhs.kinds[c] for c in rhs.order)
    if kinds not in (("b", "i", "o"), ("b", "o", "i")):
        return None
    options = {name: params.get(name) for name in ("precision", "preferred_element_type")}
    y = _base_product(rhs, lhs, lambda w, x: kernels.grouped_dot(x, w, sizes, **options))
    if rhs.adapter is None:
        return y
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    factors = _factors(rhs, [0, 1, 2], [1], dtype)
    assert factors is not None  # axis 1 is a matrix axis, as checked above
    first, second = factors
    options["preferred_element_type"] = jnp.promote_types(dtype, jnp.float32)

    def grouped_product(x: jax.Array, factor: Labelled, summed: int) -> jax.Array:
        kernel = jnp.moveaxis(factor.value, factor.labels.index(summed), 1)  # [E, summed, produced]
        return kernels.grouped_dot(x, kernel, sizes, **options)

    hidden = grouped_product(_dropout(rhs, lhs.astype(dtype)), first, 1).astype(dtype)  # [T, r]
    update = grouped_product(hidden, second, RANK)  # [T, out]
    return y + update.astype(y.dtype)


def gather(view: View, indices: jax.Array, params: dict[str, Any]) -> jax.Array | View | None:
    """A look-up along one axis: of rows of an embedding, or of whole matrices of a batch axis.

    Args:
      view: the operand.
      indices: integers `[n..., 1]`.
      params: the primitive's parameters.

    Returns:
      The rows as an array, the chosen matrices as a view, or None for any other gather.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    mode = lax.GatherScatterMode.from_any(params["mode"])
    fill = _fill_value(params) if mode == lax.GatherScatterMode.FILL_OR_DROP else None
    paired = [int(k) for k in numbers.operand_batching_dims]
    collapsed = [int(k) for k in numbers.collapsed_slice_dims]
    cut = {k for k, n in enumerate(sizes) if n != view.shape[k]}
    looked_up = {*collapsed, *cut} - {*paired}
    indexed = [int(k) for k in numbers.start_index_map]
    # Axes that are taken whole may be indexed, too, as vmapped slices are: clipping makes that 0.
    if len(looked_up) != 1 or len(paired) > 1 or (len(indexed) > 1 and fill is not None):
        return None
    (axis,) = looked_up
    if axis not in indexed or sizes[axis] != 1:
        return None
    rows = indices[..., indexed.index(axis)]
    # Where the axes of the index, and the operand's other axes, stand in the result.
    offsets = [int(k) for k in numbers.offset_dims]
    ones = [] if axis in collapsed else [offsets.pop(axis - sum(k < axis for k in paired))]
    kept_at = [k - sum(one < k for one in ones) for k in offsets]
    rows_at = [k for k in range(rows.ndim + len(offsets)) if k not in kept_at]

    if paired and _has_rows(view, axis, batch_axes=1) and view.batch_axis(paired[0]) is not None:
        pair_at = int(numbers.start_indices_batching_dims[0])
        first = view.transposed((paired[0], *(k for k in range(len(sizes)) if k != paired[0])))
        below = axis - (paired[0] < axis)
        one = jax.vmap(lambda view, rows: _rows(view.entered(), below, rows, fill), (0, pair_at))
        values = jnp.moveaxis(one(first.batch_first(0), rows), 0, pair_at)
    elif paired:
        return None
    elif view.batch_axis(axis) is not None:
        chosen = _matrices(view.batch_first(axis), rows, fill)
        return _placed(chosen, rows_at, kept_at).with_ones(ones)
    elif _has_rows(view, axis):
        values = _rows(view, axis, rows, fill)
    else:
        return None
    return jnp.expand_dims(_placed(values, rows_at, kept_at), ones)


def take_one(view: View, axis: int, index: Any) -> jax.Array | None:
    """A slice of size one along a matrix axis, without that axis: one row of an embedding."""
    return _rows(view, axis, jnp.asarray(index), None) if _has_rows(view, axis) else None


def _has_rows(view: View, axis: int, batch_axes: int = 0) -> bool:
    """Whether an axis of a view counts the rows, or the columns, of one matrix."""
    kind = view.kinds[view.order[axis]]
    group = {"o": view.outer, "i": view.inner}.get(kind, ())
    return len(group) == 1 and len(view.batch_shape) == batch_axes and not view.ones


def _fill_value(params: dict[str, Any]) -> Any:
    value = params.get("fill_value")
    return jnp.nan if value is None else value


def _placed(values: Any, rows_at: list[int], kept_at: list[int]) -> Any:
    """Axes `[rows..., others...]` moved to where the result has them."""
    order = [0] * (len(rows_at) + len(kept_at))
    for k, position in enumerate((*rows_at, *kept_at)):
        order[position] = k
    if isinstance(values, View):
        return values.transposed(tuple(order))
    return jnp.transpose(values, order)


def _matrices(view: View, rows: jax.Array, fill: Any) -> View:
    """Whole matrices of the first batch axis, seen as `[rows..., others...]`."""
    size = view.batch_shape[0]
    outside = (rows < 0) | (rows >= size)

    def take(x: jax.Array) -> jax.Array:
        taken = x[jnp.clip(rows, 0, size - 1)]
        if fill is None or not jnp.issubdtype(x.dtype, jnp.floating):
            return taken
        # NaN scales make NaN weights. Another fill value no leaf can stand for.
        return jnp.where(outside.reshape(*rows.shape, *(1,) * (x.ndim - 1)), jnp.nan, taken)

    others = [k - 1 + rows.ndim for k in view.order if k != 0]
    return dataclasses.replace(view.on_batch(take), order=(*range(rows.ndim), *others))


def _rows(view: View, axis: int, rows: jax.Array, fill: Any) -> jax.Array:
    """Rows along a matrix axis, `[rows..., others...]`; those outside hold `fill`, if given."""
    canonical = view.order[axis]
    kind = view.kinds[canonical]
    size = view.shape[axis]
    outside = (rows < 0) | (rows >= size)
    rows = jnp.clip(rows, 0, size - 1)
    if isinstance(view.base, QuantizedArray) and kind == "o":
        values = kernels.decode_rows(view.base, rows).reshape(*rows.shape, *view.inner)
        values = functools.reduce(lambda x, dtype: x.astype(dtype), view.casts, values)
    else:
        plain = dataclasses.replace(view, order=tuple(range(len(view.order))))
        values = jnp.moveaxis(plain.dense_base(), canonical, 0)[rows]
    if view.adapter is not None:
        a, b = view.adapter.a, view.adapter.b
        of_rows, other = (b, a) if kind == "o" else (a.T, b.T)  # [size, r], [r, others]
        scaled = other * view.factor_scale(jnp.promote_types(a.dtype, jnp.float32))
        wide = jnp.promote_types(view.dtype, jnp.float32)
        update = jnp.matmul(
            *(of_rows[rows].astype(view.dtype), scaled.astype(view.dtype)),
            preferred_element_type=wide,
        )
        values = values + update.reshape(values.shape).astype(view.dtype)
    if fill is not None:
        mask = outside.reshape(*rows.shape, *(1,) * (values.ndim - rows.ndim))
        values = jnp.where(mask, jnp.asarray(fill, values.dtype), values)
    # `values` is [rows..., others in canonical order]; the view may have permuted the others.
    others = [k for k in view.order if k != canonical]
    order = [rows.ndim + sorted(others).index(k) for k in others]
    return jnp.transpose(values, (*range(rows.ndim), *order))
