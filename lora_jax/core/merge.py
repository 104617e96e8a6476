"""Back to ordinary parameters: the update added into the weights, and taken out again."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.leaves import AdaptedArray, QuantizedArray, from_matrix, is_array
from lora_jax.core.placement import on_device
from lora_jax.core.quantize import dequantize
from lora_jax.core.tree import combine, map_leaves


def merge(base: Any, adapters: Any, *, dtype: Any = None) -> Any:
    """Ordinary dense parameters with the update added in: `W + scale · b @ a`.

    Args:
      base: the frozen tree; quantized leaves are decoded.
      adapters: a tree of the same structure.
      dtype: of the float leaves; each leaf's own, if None.

    Returns:
      A tree of arrays that the unadapted function takes.
    """
    return map_leaves(lambda _, leaf: merged(leaf, dtype), combine(base, adapters))


def merged(leaf: Any, dtype: Any = None) -> Any:
    """One leaf of a combined tree as `merge` gives it, or of a part of it on its batch axes."""
    if isinstance(leaf, AdaptedArray):
        return dense(leaf, dtype)
    if isinstance(leaf, QuantizedArray):
        return dequantize(leaf, dtype)
    leaf = on_device(leaf)
    if dtype is not None and is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.asarray(leaf, dtype)
    return leaf


def unmerge(params: Any, adapters: Any) -> Any:
    """Takes the update out of merged parameters again: `W - scale · b @ a`.

    Raises:
      ValueError: if a leaf was trained whole: its old value is in the base alone.
    """

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, AdaptedArray):
            return leaf
        if leaf.is_replaced:
            raise ValueError(
                f"{path} was trained whole and cannot be unmerged, since merging replaced it; "
                "keep the base tree, which merge does not change"
            )
        if isinstance(leaf.base, QuantizedArray):
            raise ValueError(f"{path} is quantized; unmerge takes the parameters that merge gave")
        negated = dataclasses.replace(leaf.adapter, scale=-leaf.adapter.scale)
        return dense(AdaptedArray(leaf.base, negated))

    return map_leaves(one, combine(params, adapters))


def dense(leaf: AdaptedArray, dtype: Any = None) -> jax.Array:
    """One adapted leaf as the dense parameter it stands for.

    The sum is taken in float32 (or the base's own dtype, where wider) and cast once.
    """
    dtype = dtype or leaf.dtype
    if leaf.is_replaced:
        return leaf.adapter.astype(dtype)
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    base = (
        dequantize(leaf.base, wide)
        if isinstance(leaf.base, QuantizedArray)
        else on_device(leaf.base)
    )
    adapter = leaf.adapter
    update = jnp.matmul(adapter.b.astype(wide), adapter.a.astype(wide), precision="highest")
    update = update * adapter.scale  # [b..., out, in]
    if leaf.scale is not None:
        update = update * leaf.scale[..., None, None].astype(wide)
    sizes = leaf.shape[leaf.ndim - len(adapter.layout.split()) :]
    return (base.astype(wide) + from_matrix(update, adapter.layout, sizes)).astype(dtype)
