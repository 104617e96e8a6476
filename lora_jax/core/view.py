"""A lazy view: an adapted weight on its way through a function, before anything is computed.

Transposes, casts, reshapes within an axis group, and slices or look-ups of batch axes only change
how the weight is seen. A view records that and applies it when the weight is used.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.leaves import (
    AdaptedArray,
    Adapter,
    QuantizedArray,
    from_matrix,
    parameter_axes,
    split_axes,
)
from lora_jax.core.placement import on_device
from lora_jax.kernels import as_parameter, decode_folded, decode_parameter


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "adapter", "scale", "dropout_key"],
    meta_fields=["path", "layout", "outer", "inner", "ones", "order", "casts", "fold"],
)
@dataclasses.dataclass(frozen=True)
class View:
    """A weight, seen with its axes split, permuted and cast.

    The canonical axes of a view are `(b..., o..., i..., 1...)`: the batch axes of the leaf, `out`
    split into the sizes `outer`, `in` split into `inner`, and `ones` axes of size one. Axis k of
    what the function sees is the canonical axis `order[k]`.

    Invariants: all arrays of the leaf carry the batch axes first, so that a view is a pytree that
    scan and vmap may slice (`entered` then drops the axis from `order`); everything static is
    independent of the batch axes' number and sizes.

    Attributes:
      base: `jax.Array` in the parameter's own axes, or `QuantizedArray`.
      adapter: `Adapter` or None.
      scale, dropout_key: as in `AdaptedArray`.
      path: the leaf's path, for messages.
      layout: of the leaf.
      outer, inner, ones, order: see above.
      casts: the dtypes that the function cast the weight to, one after the other: each may round.
      fold: whether products of many rows may add the update to the weight while it is decoded.
    """

    base: Any
    adapter: Adapter | None
    scale: Any
    dropout_key: Any
    path: str
    layout: str
    outer: tuple[int, ...]
    inner: tuple[int, ...]
    ones: int
    order: tuple[int, ...]
    casts: tuple[Any, ...] = ()
    fold: bool = False

    @classmethod
    def of(cls, leaf: AdaptedArray | QuantizedArray, path: str, fold: bool = False) -> View:
        """The view that shows a leaf as the parameter it stands for."""
        if isinstance(leaf, AdaptedArray):
            base, adapter, scale, key = leaf.base, leaf.adapter, leaf.scale, leaf.dropout_key
            layout = adapter.layout
        else:
            base, adapter, scale, key, layout = leaf, None, None, None, leaf.layout
        batch = len(base.shape) - len(layout.split())
        outer, inner = split_axes(layout, tuple(base.shape[batch:]))
        order = parameter_axes(layout, batch)
        return cls(base, adapter, scale, key, path, layout, outer, inner, 0, order, fold=fold)

    @property
    def dtype(self) -> np.dtype:
        """The dtype that the function sees."""
        return np.dtype(self.casts[-1] if self.casts else self.base.dtype)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the leaf's batch axes."""
        if isinstance(self.base, QuantizedArray):
            return self.base.batch_shape
        return tuple(self.base.shape[: len(self.base.shape) - len(self.layout.split())])

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """Sizes of the canonical axes."""
        return (*self.batch_shape, *self.outer, *self.inner, *(1,) * self.ones)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the function sees."""
        return tuple(self.canonical_shape[k] for k in self.order)

    @property
    def kinds(self) -> tuple[str, ...]:
        """`b`, `o`, `i` or `1` for each canonical axis."""
        batch = len(self.batch_shape)
        return (
            *("b",) * batch,
            *("o",) * len(self.outer),
            *("i",) * len(self.inner),
            *("1",) * self.ones,
        )

    def leaf(self) -> AdaptedArray | QuantizedArray | None:
        """The leaf itself, if this is still its plain view; else None."""
        leaf = self.base
        if self.adapter is not None:
            leaf = AdaptedArray(self.base, self.adapter, self.scale, self.dropout_key)
        plain = View.of(leaf, self.path)
        static = ("outer", "inner", "ones", "order", "casts")
        same = all(getattr(self, name) == getattr(plain, name) for name in static)
        return leaf if same else None

    # What the view is worth: the base alone, or all of it.

    def dense_base(self) -> jax.Array:
        """The base's values as the function sees them, without the update."""
        quantized = isinstance(self.base, QuantizedArray)
        return self._seen(decode_parameter(self.base) if quantized else on_device(self.base))

    def dense(self) -> jax.Array:
        """The whole weight made dense, update included; rounded once."""
        adapter, base = self.adapter, self.base
        if adapter is None:
            return self.dense_base()
        wide = jnp.promote_types(base.dtype, jnp.float32)
        scale = self.factor_scale(wide)
        if isinstance(base, QuantizedArray):
            values = decode_folded(base, adapter.a, adapter.b, scale)
            return self._seen(as_parameter(base, values))
        update = jnp.matmul(adapter.b.astype(wide), adapter.a.astype(wide)) * scale[..., None, None]
        axis_sizes = tuple(base.shape[len(self.batch_shape) :])
        update = from_matrix(update, self.layout, axis_sizes)
        return self._seen((on_device(base).astype(wide) + update).astype(base.dtype))

    def _seen(self, base: jax.Array) -> jax.Array:
        """The parameter's values in the axes and the dtype that the function sees."""
        batch = len(self.batch_shape)
        own_outer, own_inner = split_axes(self.layout, tuple(base.shape[batch:]))
        own_order = parameter_axes(self.layout, batch)
        if (own_outer, own_inner, 0) == (self.outer, self.inner, self.ones):
            # One permutation from the parameter to the view: usually none at all.
            seen = _permuted(base, [own_order.index(k) for k in self.order])
        else:
            canonical = _permuted(base, np.argsort(own_order))
            seen = _permuted(canonical.reshape(self.canonical_shape), self.order)
        return functools.reduce(lambda x, dtype: x.astype(dtype), self.casts, seen)

    def factor_scale(self, dtype: Any) -> jax.Array:
        """The factor on `b @ a`, `[b...]`."""
        assert self.adapter is not None
        scale = jnp.full(self.batch_shape, self.adapter.scale, dtype)
        return scale if self.scale is None else scale * self.scale.astype(dtype)

    # How a view changes. Each returns None where the result is no view of one leaf any more.

    def cast(self, dtype: Any) -> View | None:
        """In another float dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return dataclasses.replace(self, casts=(*self.casts, np.dtype(dtype)))

    def transposed(self, permutation: tuple[int, ...]) -> View:
        """With its axes permuted."""
        return dataclasses.replace(self, order=tuple(self.order[k] for k in permutation))

    def entered(self) -> View:
        """The view inside a scan over its first axis, whose leaf has lost that batch axis."""
        return dataclasses.replace(self, order=tuple(k - 1 for k in self.order[1:]))

    def on_batch(self, fn: Callable[[jax.Array], jax.Array]) -> View:
        """The view with `fn` applied to every array of the leaf (`fn` acts on batch axes alone)."""
        fields = (self.base, self.adapter, self.scale, self.dropout_key)
        base, adapter, scale, key = jax.tree.map(fn, fields)
        return dataclasses.replace(self, base=base, adapter=adapter, scale=scale, dropout_key=key)

    def batch_axis(self, axis: int) -> int | None:
        """Which batch axis of the leaf the view's axis is, if it is one."""
        canonical = self.order[axis]
        return canonical if self.kinds[canonical] == "b" else None

    def along_batch(self, axis: int, fn: Callable[..., jax.Array]) -> View | None:
        """With `fn(array, axis=...)` applied along one axis, if that is a batch axis."""
        batch_axis = self.batch_axis(axis)
        if batch_axis is None:
            return None
        return self.on_batch(functools.partial(fn, axis=batch_axis))

    def batch_first(self, axis: int) -> View:
        """The same view over a leaf whose first batch axis is the view's axis `axis`."""
        old = self.order[axis]
        if old == 0:
            return self
        moved = self.on_batch(lambda x: jnp.moveaxis(x, old, 0))
        order = tuple(0 if k == old else k + 1 if k < old else k for k in self.order)
        return dataclasses.replace(moved, order=order)

    def squeezed(self, axes: tuple[int, ...]) -> View | None:
        """Without some axes of size one."""
        view = self
        for axis in sorted(axes, reverse=True):
            canonical = view.order[axis]
            kind = view.kinds[canonical]
            within = canonical - view.kinds.index(kind)
            changed: dict[str, Any] = {
                "order": tuple(k - (k > canonical) for k in view.order if k != canonical)
            }
            if kind == "b":
                view = view.on_batch(functools.partial(jnp.squeeze, axis=canonical))
            elif kind == "1":
                changed["ones"] = view.ones - 1
            else:
                name = "outer" if kind == "o" else "inner"
                sizes = getattr(view, name)
                if len(sizes) == 1:
                    return None
                changed[name] = sizes[:within] + sizes[within + 1 :]
            view = dataclasses.replace(view, **changed)
        return view

    def with_ones(self, positions: list[int]) -> View:
        """With new axes of size one at these positions of the result."""
        first = len(self.canonical_shape)
        order = list(self.order)
        for number, position in enumerate(sorted(positions)):
            order.insert(position, first + number)
        return dataclasses.replace(self, ones=self.ones + len(positions), order=tuple(order))

    def reshaped(self, shape: tuple[int, ...]) -> View | None:
        """In another shape, if no new axis mixes axes of different kinds."""
        if ones := tuple(k for k, c in enumerate(self.order) if self.kinds[c] == "1"):
            squeezed = self.squeezed(ones)
            return None if squeezed is None else squeezed.reshaped(shape)
        pieces = _matching_groups(self.shape, shape)
        if pieces is None:
            return None
        if dropped := tuple(olds[0] for olds, news in pieces if not news):
            squeezed = self.squeezed(dropped)
            return None if squeezed is None else squeezed.reshaped(shape)

        # The new axes that hold something, each after the canonical axis that its group begins at.
        placed: list[tuple[int, int]] = []
        new_ones = [news[0] for olds, news in pieces if not olds]
        for olds, news in pieces:
            if not olds:
                continue
            canonical = [self.order[k] for k in olds]
            one_kind = len({self.kinds[c] for c in canonical}) == 1
            if not one_kind or canonical != list(range(canonical[0], canonical[0] + len(olds))):
                return None
            placed += [(canonical[0], k) for k in news]
        placed.sort()
        sizes: dict[str, list[int]] = {"b": [], "o": [], "i": []}
        for canonical_start, k in placed:
            sizes[self.kinds[canonical_start]].append(shape[k])
        view, batch = self, len(self.batch_shape)
        if tuple(sizes["b"]) != self.batch_shape:
            view = self.on_batch(lambda x: x.reshape(*sizes["b"], *x.shape[batch:]))
        kept = sorted(k for _, k in placed)
        order = [0] * len(kept)
        for number, (_, k) in enumerate(placed):
            order[kept.index(k)] = number
        return dataclasses.replace(
            view, outer=tuple(sizes["o"]), inner=tuple(sizes["i"]), order=tuple(order)
        ).with_ones(new_ones)


def _permuted(x: jax.Array, order: Any) -> jax.Array:
    order = tuple(int(k) for k in order)
    return x if order == tuple(range(len(order))) else jnp.transpose(x, order)


def _matching_groups(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[list[int], list[int]]] | None:
    """Smallest groups of neighbouring axes of equal products: [(old axes, new axes), ...].

    An axis of size one that finds no partner of size one stands in a group of its own.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        old_one, new_one = i < len(old) and old[i] == 1, j < len(new) and new[j] == 1
        if old_one != new_one:
            groups.append(([i], []) if old_one else ([], [j]))
            i, j = i + old_one, j + new_one
            continue
        if i == len(old) or j == len(new):
            return None
        olds, news = [i], [j]
        i, j = i + 1, j + 1
        while (left := math.prod(old[k] for k in olds)) != (
            right := math.prod(new[k] for k in news)
        ):
            if left < right and i < len(old):
                olds.append(i)
                i += 1
            elif right < left and j < len(new):
                news.append(j)
                j += 1
            else:
                return None
        groups.append((olds, news))
    return groups
