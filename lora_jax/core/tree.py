"""Functions between the three trees: quantize, init_adapters, combine, split, count.

Every one is a pure function of trees, works under `jax.eval_shape`, and leaves what it does not
understand (activations, strings, None) where it found it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.leaves import (
    AdaptedArray,
    Adapter,
    QuantizedArray,
    is_array,
    is_leaf,
    parse_layout,
    split_axes,
)
from lora_jax.core.quantize import quantize_array
from lora_jax.core.rules import LoraRule, first_matches, fold_path, path_string


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Path and value of each leaf; this library's leaves count as one."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(path_string(path), leaf) for path, leaf in flat]


def map_leaves(fn: Any, tree: Any, *rest: Any) -> Any:
    """`tree` with `fn(path, leaf, *others)` at each leaf, others being where `rest` has them."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, *others: fn(path_string(path), leaf, *others),
        tree,
        *rest,
        is_leaf=is_leaf,
    )


def quantize(
    params: Any,
    pattern: str | Sequence[str],
    *,
    kind: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    layout: str | None = None,
    flat: bool = False,
) -> Any:
    """The base: `params` with the leaves that match stored in 4 bits.

    Args:
      params: any pytree of parameters.
      pattern: regular expression searched in each leaf's path (or several of them).
      kind: see `quantize_array`, as for the options below.
      block_size: elements that share a scale.
      double_quant: whether to store the scales in 8 bits.
      layout: which axes are contracted, produced or batch; the same for all that match.
      flat: whether blocks may run over row ends where they do not divide rows.

    Returns:
      The same tree with a `QuantizedArray` at each leaf that matched.

    Raises:
      ValueError: if a pattern matches nothing, or a leaf that matched cannot be quantized.
      TypeError: if a leaf that matched is of integers or float64.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    leaves = [(path, leaf) for path, leaf in named_leaves(params) if _is_weight(leaf)]
    chosen = first_matches(patterns, [path for path, _ in leaves])

    def one(path: str, leaf: Any) -> Any:
        if path not in chosen or not _is_weight(leaf):
            return leaf
        if not is_array(leaf):
            raise ValueError(
                f"{path} is {leaf!r} already; write a pattern that leaves it out, or start from "
                "the dense parameters"
            )
        return quantize_array(
            leaf,
            kind,
            block_size=block_size,
            double_quant=double_quant,
            layout=layout,
            flat=flat,
            name=path,
        )

    return map_leaves(one, params)


def init_adapters(
    key: jax.Array,
    base: Any,
    rules: Sequence[LoraRule],
    *,
    train: str | Sequence[str] = (),
    dtype: Any = jnp.float32,
) -> Any:
    """The adapters before training: A gaussian, B zero, so that the model is the base's.

    A has variance 1/in, which keeps `A x` of the size of x. Each leaf's key is folded with a hash
    of its path, so that adding a rule leaves the start of all other leaves unchanged.

    Args:
      key: a JAX PRNG key.
      base: any pytree of parameters, quantized or not.
      rules: what to adapt; for each leaf the first rule that matches its path.
      train: patterns of leaves to train whole (norms, biases, heads), kept in `dtype`.
      dtype: of everything that is trained.

    Returns:
      A tree of the base's structure: an `Adapter` where a rule matched, an array where `train`
      did, None elsewhere.

    Raises:
      ValueError: if a pattern matches nothing, a rule meets a leaf that is no matrix or needs a
        layout, a rank is above min(in, out), or a leaf is matched by both.
    """
    rules = [rules] if isinstance(rules, LoraRule) else list(rules)
    train = [train] if isinstance(train, str) else list(train)
    for rule in rules:
        if not isinstance(rule, LoraRule):
            raise TypeError(
                f"rules holds {rule!r}, expected LoraRule(pattern, rank=..., alpha=...)"
            )
    paths = [path for path, leaf in named_leaves(base) if _is_weight(leaf)]
    ruled = first_matches([rule.pattern for rule in rules], paths)
    whole = first_matches(train, paths)

    def one(path: str, leaf: Any) -> Any:
        if not _is_weight(leaf):
            return None
        if path in ruled and path in whole:
            raise ValueError(
                f"{path} is matched by the rule {rules[ruled[path]].pattern!r} and by train="
                f"{train[whole[path]]!r}; a leaf is adapted or trained whole, not both"
            )
        if path in ruled:
            return _init_adapter(fold_path(key, path), path, leaf, rules[ruled[path]], dtype)
        if path in whole:
            return _trained_whole(path, leaf, dtype)
        return None

    return map_leaves(one, base)


def _is_weight(leaf: Any) -> bool:
    """Whether patterns may speak of a leaf: quantized, or an array that is not a PRNG key."""
    if isinstance(leaf, QuantizedArray):
        return True
    return is_array(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def _init_adapter(key: jax.Array, path: str, leaf: Any, rule: LoraRule, dtype: Any) -> Adapter:
    if isinstance(leaf, QuantizedArray):
        layout, sizes = leaf.layout, leaf.axis_sizes
        if rule.layout and parse_layout(rule.layout, leaf.shape, path) != layout:
            raise ValueError(
                f"the rule {rule.pattern!r} says layout {rule.layout!r}, but {path} was quantized "
                f"as {layout!r}; leave the rule's layout out"
            )
    else:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"the rule {rule.pattern!r} matches {path} of dtype {leaf.dtype}; only weights of "
                "floats can be adapted, so write a pattern that leaves it out"
            )
        layout = parse_layout(rule.layout, tuple(leaf.shape), path)
        sizes = tuple(leaf.shape[len(leaf.shape) - len(layout.split()) :])
    batch = tuple(leaf.shape[: len(leaf.shape) - len(sizes)])
    out, inn = (math.prod(part) for part in split_axes(layout, sizes))
    if rule.rank > min(out, inn):
        raise ValueError(
            f"rank {rule.rank} of the rule {rule.pattern!r} is above min(in, out) = "
            f"{min(out, inn)} of {path}, whose whole space has that rank; write a smaller rank"
        )
    a = jax.random.normal(key, (*batch, rule.rank, inn), dtype) * (1 / math.sqrt(inn))
    b = jnp.zeros((*batch, out, rule.rank), dtype)
    return Adapter(a.astype(dtype), b, scale=rule.scale, dropout=rule.dropout, layout=layout)


def _trained_whole(path: str, leaf: Any, dtype: Any) -> jax.Array:
    if isinstance(leaf, QuantizedArray) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"{path} is {leaf if isinstance(leaf, QuantizedArray) else leaf.dtype}, and only float "
            "leaves can be trained whole; leave it out of train="
        )
    return jnp.array(leaf, dtype, copy=True)  # a copy, so that donating it leaves the base alone


def combine(base: Any, adapters: Any, *, scales: Any = None, dropout_key: Any = None) -> Any:
    """The tree that meets the model: each adapted leaf becomes an `AdaptedArray`.

    Args:
      base: the frozen tree.
      adapters: a tree of the same structure, as `init_adapters` gives; None for the base alone.
      scales: factors on the adapters' own scales: one number, or a tree like `adapters` with a
        scalar for each `Adapter` (under vmap over runs, the run's own).
      dropout_key: a JAX PRNG key for the rules' dropout; None for no dropout.

    Returns:
      A tree for `adapt`ed functions.

    Raises:
      ValueError: if the structures or shapes differ.
    """

    def one(path: str, leaf: Any, adapter: Any, scale: Any = None) -> Any:
        if adapter is None:
            return leaf
        if not isinstance(adapter, Adapter):
            _check_replacement(path, leaf, adapter)
            return AdaptedArray(leaf, adapter)
        _check_adapter(path, leaf, adapter)
        batch = adapter.batch_shape
        if scale is not None:
            scale = jnp.broadcast_to(jnp.asarray(scale), batch)
        keys = None
        if dropout_key is not None and adapter.drops:
            keys = fold_path(dropout_key, path)
            keys = jax.random.split(keys, batch) if batch else keys
        return AdaptedArray(leaf, adapter, scale, keys)

    if adapters is None:
        return base
    if dropout_key is not None:
        dropout_key = _typed_key(dropout_key)
    if scales is not None and jax.tree_util.all_leaves([scales]):
        scale = scales
        scales = jax.tree.map(lambda x: scale, adapters, is_leaf=lambda x: isinstance(x, Adapter))
    trees = (adapters,) if scales is None else (adapters, scales)
    for name, tree in zip(("adapters", "scales"), trees, strict=False):
        _check_structure(name, base, tree)
    return map_leaves(one, base, *trees)


def _typed_key(key: Any) -> jax.Array:
    if not is_array(key):
        raise TypeError(
            f"dropout_key is {key!r}, expected a JAX key; write jax.random.key({key!r})"
        )
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def _check_structure(name: str, base: Any, tree: Any) -> None:
    structure: Any = jax.tree.structure(base, is_leaf=is_leaf)
    try:
        structure.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} and base differ in structure; expected the tree that init_adapters made for "
            f"this base ({error})"
        ) from None


def _check_adapter(path: str, leaf: Any, adapter: Adapter) -> None:
    if not (isinstance(leaf, QuantizedArray) or is_array(leaf)):
        raise ValueError(f"{path} has an adapter, but its base is {type(leaf).__name__}, no array")
    axes = len(adapter.layout.split())
    shape = tuple(leaf.shape)
    out, inn = (math.prod(part) for part in split_axes(adapter.layout, shape[len(shape) - axes :]))
    if isinstance(leaf, QuantizedArray) and leaf.layout != adapter.layout:
        raise ValueError(
            f"{path} was quantized with layout {leaf.layout!r}, its adapter has {adapter.layout!r}"
        )
    expected = (*shape[: len(shape) - axes], out, inn)
    rank = adapter.a.shape[-2]
    if adapter.a.shape != (*expected[:-2], rank, inn) or adapter.b.shape != (*expected[:-1], rank):
        raise ValueError(
            f"the adapter of {path} has a {tuple(adapter.a.shape)} and b {tuple(adapter.b.shape)}, "
            f"but a weight of shape {shape} and layout {adapter.layout!r} needs "
            f"a {(*expected[:-2], 'r', inn)} and b {(*expected[:-1], 'r')}"
        )


def _check_replacement(path: str, leaf: Any, value: Any) -> None:
    if not is_array(value) or tuple(value.shape) != tuple(getattr(leaf, "shape", (None,))):
        raise ValueError(
            f"the adapters hold {getattr(value, 'shape', value)} at {path}, expected an Adapter, "
            f"None, or an array of the base's shape {getattr(leaf, 'shape', None)}"
        )


def split(tree: Any) -> tuple[Any, Any]:
    """Undoes `combine`: the base and the adapters of a combined tree."""
    base = map_leaves(lambda _, x: x.base if isinstance(x, AdaptedArray) else x, tree)
    adapters = map_leaves(lambda _, x: x.adapter if isinstance(x, AdaptedArray) else None, tree)
    return base, adapters


@dataclasses.dataclass(frozen=True)
class ParamCount:
    """Numbers of parameters, and the bytes that hold them.

    Attributes:
      trainable: parameters in the adapters tree.
      frozen: parameters of the base that are used as they are (not those trained whole).
      trainable_bytes, frozen_bytes: what they occupy, codes and scales counted as stored.
    """

    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.trainable + self.frozen

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return (
            f"{self.trainable:,} trainable of {self.total:,} parameters ({self.percent:.2f} %); "
            f"{_readable(self.trainable_bytes)} trained, {_readable(self.frozen_bytes)} frozen"
        )


def _readable(count: int) -> str:
    """Bytes, in the unit that leaves a few digits."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 2 ** (10 * power):
            return f"{count / 2 ** (10 * power):.1f} {unit}"
    return f"{count} B"


def count_params(base: Any, adapters: Any) -> ParamCount:
    """Counts what is trained and what is frozen. Works on abstract trees as well."""
    trainable = [x for x in jax.tree.leaves(adapters) if is_array(x)]
    frozen = []
    for _, leaf in named_leaves(combine(base, adapters)):
        if isinstance(leaf, AdaptedArray):
            leaf = None if leaf.is_replaced else leaf.base
        if leaf is not None and _is_weight(leaf):
            frozen.append(leaf)
    return ParamCount(
        trainable=sum(math.prod(x.shape) for x in trainable),
        frozen=sum(math.prod(x.shape) for x in frozen),
        trainable_bytes=sum(_nbytes(x) for x in trainable),
        frozen_bytes=sum(_nbytes(x) for x in frozen),
    )


def _nbytes(leaf: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(leaf))
