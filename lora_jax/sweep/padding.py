"""Adapters of several runs in one tree: padded to the largest rank, beside each run's numbers.

    run 0, r = 2:  a [2, in]  b [out, 2]          a [N, 4, in]   zero from row r on
    run 1, r = 4:  a [4, in]  b [out, 4]   ──►    b [N, out, 4]  zero from column r on
                                                  numbers: scale [N], dropout [N], rank [N]

Where `b @ a` meets zeros in both factors, both gradients are zero as well: such padding is never
moved by an optimizer that treats each entry by itself. A leaf that a run does not adapt is one of
rank zero.

Shapes: N runs, r rank, `in` and `out` as in core/leaves.py, b... batch axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.core.leaves import Adapter, RunAdapter
from lora_jax.core.rules import path_string


class LeafNumbers(NamedTuple):
    """What differs by a number between the runs' adapters of one leaf.

    Attributes:
      scale: alpha / r or alpha / sqrt(r), of the run's own rank.
      dropout: the probability of dropping an input.
      rank: the run's own; 0 where it does not adapt the leaf.
    """

    scale: Any
    dropout: Any
    rank: Any


def stack(adapters: Sequence[Any]) -> tuple[Any, Any]:
    """Adapters of several runs as one tree, for `jax.vmap` over its first axis.

    Args:
      adapters: trees for one base, as `init_adapters` gives: ranks, scales and targets may differ.
        Each is made at its own rank before, so that its start does not depend on the others.

    Returns:
      A tree of adapters with arrays `[N, ...]`, padded with zeros, whose own scale is 1; and a tree
      of scales `[N]`, for `combine(..., scales=...)` within the vmap.

    Raises:
      ValueError: if there are none, they are not for one base, or their dropout differs.

    Example:
      >>> stacked, scales = lj.sweep.stack([adapters_of_rank_2, adapters_of_rank_8])
      >>> loss = lambda adapters, scales: ...  # lj.combine(base, adapters, scales=scales)
      >>> losses = jax.vmap(loss)(stacked, scales)
    """
    if not adapters:
        raise ValueError("adapters is empty, expected those of at least one run")
    like = union(adapters)
    numbers = [numbers_of(tree, like) for tree in adapters]
    (dropout, *others) = {x.dropout for tree in adapters for x in adapters_in(tree)} or {0.0}
    if others:
        raise ValueError(
            f"dropout differs between the runs, {dropout} and {others[0]} among them, and is no "
            "part of scales; stack runs of the same dropout, or let lj.sweep.fit train them"
        )
    padded = [pad(tree, like) for tree in adapters]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *padded)
    stacked = map_adapters(lambda x: dataclasses.replace(x, dropout=dropout), stacked)

    def scales_of(leaf: Any, *own: LeafNumbers) -> Any:
        return jnp.asarray([x.scale for x in own]) if isinstance(leaf, Adapter) else None

    return stacked, jax.tree.map(scales_of, like, *numbers, is_leaf=_is_place)


def union(adapters: Sequence[Any]) -> Any:
    """What holds the adapters of any of these runs: abstract leaves of the largest rank, scale 1.

    Raises:
      ValueError: if a leaf is trained whole by some runs and not by others, or the trees are not
        for one base.
    """
    structures = [jax.tree.structure(tree, is_leaf=_is_place) for tree in adapters]
    if structures.count(structures[0]) < len(structures):
        raise ValueError(
            "the runs' adapters differ in structure; expected those that init_adapters made for "
            "one base"
        )

    def one(path: tuple, *leaves: Any) -> Any:
        present = [x for x in leaves if x is not None]
        if not present:
            return None
        largest = max(present, key=lambda x: x.rank if isinstance(x, Adapter) else 0)
        alike = {_kind(x) for x in present}
        whole = not isinstance(largest, Adapter)
        if len(alike) > 1 or (whole and len(present) < len(leaves)):
            raise ValueError(
                f"the runs' adapters differ at {path_string(path)} in more than rank, scale, "
                "dropout and target; expected adapters for one base, of one dtype, and the same "
                "leaves trained whole"
            )
        largest = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), largest)
        return largest if whole else dataclasses.replace(largest, scale=1.0, dropout=0.0)

    return jax.tree_util.tree_map_with_path(one, *adapters, is_leaf=_is_place)


def whole_leaves(adapters: Any) -> Any:
    """What `union` cannot bring together: paths of leaves trained whole, dtypes of adapters."""
    flat, _ = jax.tree_util.tree_flatten_with_path(adapters, is_leaf=_is_place)
    whole = (path_string(path) for path, x in flat if not (x is None or isinstance(x, Adapter)))
    return tuple(whole), frozenset((str(x.a.dtype), str(x.b.dtype)) for x in adapters_in(adapters))


def shapes(adapters: Any) -> tuple[Any, ...]:
    """The shape of the arrays at each place, which padding makes alike."""
    places = jax.tree.leaves(adapters, is_leaf=_is_place)
    return tuple(tuple(x.shape for x in jax.tree.leaves(place)) for place in places)


def _kind(leaf: Any) -> Any:
    if not isinstance(leaf, Adapter):
        return leaf.shape, leaf.dtype
    *batch, _, inner = leaf.a.shape
    return (*batch, leaf.b.shape[-2], inner), leaf.a.dtype, leaf.b.dtype, leaf.layout


def pad(adapters: Any, like: Any) -> Any:
    """A run's adapters with zeros to the shapes of `like`, a `union` with others."""

    def one(like: Any, leaf: Any) -> Any:
        if not isinstance(like, Adapter):
            return leaf
        if leaf is None:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        more, batch = like.rank - leaf.rank, [(0, 0)] * len(leaf.batch_shape)
        a = jnp.pad(leaf.a, [*batch, (0, more), (0, 0)])
        b = jnp.pad(leaf.b, [*batch, (0, 0), (0, more)])
        return dataclasses.replace(like, a=a, b=b)

    return jax.tree.map(one, like, adapters, is_leaf=_is_place)


def cut(adapters: Any, own: Any) -> Any:
    """Undoes `pad`: with the rank, scale, dropout and targets of `own`, which may be abstract."""

    def one(own: Any, leaf: Any) -> Any:
        if not isinstance(own, Adapter):
            return None if own is None else leaf
        return dataclasses.replace(own, a=leaf.a[..., : own.rank, :], b=leaf.b[..., : own.rank])

    return jax.tree.map(one, own, adapters, is_leaf=_is_place)


def numbers_of(adapters: Any, like: Any) -> Any:
    """A tree of `LeafNumbers`, one for each adapter of `like`, None elsewhere."""

    def one(like: Any, leaf: Any) -> Any:
        if not isinstance(like, Adapter):
            return None
        if leaf is None:
            return LeafNumbers(scale=0.0, dropout=0.0, rank=0)
        return LeafNumbers(leaf.scale, leaf.dropout, leaf.rank)

    return jax.tree.map(one, like, adapters, is_leaf=_is_place)


# Within a vmap over runs, where numbers are scalars.


def of_run(adapters: Any, numbers: Any, *, drops: bool) -> Any:
    """The adapters as a loss sees them: with the run's own scale, and dropout if `drops`."""

    def one(adapter: Adapter, own: LeafNumbers) -> RunAdapter:
        scale, dropout = (jnp.broadcast_to(x, adapter.batch_shape) for x in own[:2])
        return RunAdapter(adapter.a, adapter.b, scale, dropout if drops else None, adapter.layout)

    return map_adapters(one, adapters, numbers)


def without_padding(tree: Any, numbers: Any) -> Any:
    """A tree like adapters, such as updates, with zeros beyond the run's own rank."""

    def one(adapter: Adapter, own: LeafNumbers) -> Adapter:
        is_own = jnp.arange(adapter.rank) < own.rank
        a = jnp.where(is_own[:, None], adapter.a, 0)
        return dataclasses.replace(adapter, a=a, b=jnp.where(is_own, adapter.b, 0))

    return map_adapters(one, tree, numbers)


def adapters_in(tree: Any) -> list[Adapter]:
    """The adapters of a tree."""
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_place) if isinstance(x, Adapter)]


def map_adapters(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`tree` with `fn(adapter, *others)` at each adapter, others being where `rest` has them."""
    one = lambda x, *others: fn(x, *others) if isinstance(x, Adapter) else x  # noqa: E731
    return jax.tree.map(one, tree, *rest, is_leaf=_is_place)


def _is_place(x: Any) -> bool:
    return x is None or isinstance(x, Adapter)
