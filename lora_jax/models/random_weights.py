"""Random weights that are made 4-bit where they will lie: for plans and measurements of any size.

A 175B model takes 350 GB before it is quantized, and 90 after; here it never exists but as codes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.codebooks import codebook
from lora_jax.core.leaves import QuantizedArray
from lora_jax.core.placement import Stack, in_host_memory
from lora_jax.core.rules import fold_path
from lora_jax.core.tree import map_leaves, named_leaves, quantize
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import by_layout, parameter_shapes

KERNELS = r"layers(_\d+)?/.*_proj/kernel"
SPREAD = 0.02  # standard deviation of the weights


def random_base(
    key: jax.Array,
    config: DecoderConfig,
    kind: str | None = "nf4",
    *,
    pattern: str = KERNELS,
    block_size: int = 64,
    double_quant: bool = True,
    place: Callable[[Any], Any] | None = None,
) -> Any:
    """A decoder's parameters, random, with the kernels of its layers in 4 bits.

    Args:
      key: a JAX PRNG key.
      config: the decoder.
      kind: as for `lj.quantize`; None to quantize nothing.
      pattern: which leaves are quantized.
      block_size: elements that share a scale.
      double_quant: whether the scales are stored in 8 bits.
      place: what is done to the abstract tree before, to say where weights will lie, such as
        `functools.partial(lj.offload, pattern=..., keep=...)`.

    Returns:
      The tree that `lj.quantize` would give, with codes uniform and scales all alike, so that
      weights have a standard deviation of 0.02; norms are ones. Leaf after leaf is made, a layer
      at a time, so that little more memory is needed than the tree takes.
    """
    shapes = parameter_shapes(config)
    if kind is not None:
        for layout, matched in by_layout(pattern, shapes).items():
            quantized = functools.partial(
                quantize,
                pattern=matched,
                kind=kind,
                block_size=block_size,
                double_quant=double_quant,
                layout=layout,
            )
            shapes = jax.eval_shape(quantized, shapes)
    if place is not None:
        shapes = place(shapes)

    def make(path: str, leaf: Any) -> Any:
        if isinstance(leaf, QuantizedArray):
            return _random_codes(fold_path(key, path), path, leaf)
        if path.endswith("scale"):
            return jnp.ones(leaf.shape, leaf.dtype)
        return _made(_random_dense, fold_path(key, path), path, leaf)

    # What is largest comes first: allocators that take memory in ever larger pieces waste less.
    leaves = sorted(named_leaves(shapes), key=lambda named: -named[1].size)
    made = {path: make(path, leaf) for path, leaf in leaves}
    return map_leaves(lambda path, _: made[path], shapes)


def _random_codes(key: jax.Array, path: str, like: QuantizedArray) -> QuantizedArray:
    levels = codebook(like.kind, like.block_size)
    scale = SPREAD / levels.std()

    def full(value: float) -> Callable:
        return lambda key, shape, dtype: jnp.full(shape, value, dtype)

    makers: dict[str, Callable] = {"codes": _random_bits, "scales": full(scale)}
    if like.group_scales is not None:
        # The 8-bit codes say how far a scale is from the offset, here up to a tenth of it.
        makers |= {"scales": _random_bits, "group_scales": full(scale / 10), "offset": full(scale)}
    if like.minimum is not None:
        makers["minimum"] = full(-levels.mean() * scale)
    fields = {
        name: _made(make, jax.random.fold_in(key, k), path, getattr(like, name))
        for k, (name, make) in enumerate(makers.items())
    }
    static = {name: getattr(like, name) for name in ("kind", "block_size", "dtype", "layout")}
    return QuantizedArray(**fields, **static, axis_sizes=like.axis_sizes)


def _made(make: Callable, key: jax.Array, path: str, like: Any) -> Any:
    """`make(key, shape, dtype)` where an abstract array, or each part of a stack, will lie."""
    if isinstance(like, Stack):
        keys = jax.random.split(key, len(like.parts))
        pairs = zip(keys, like.parts, strict=True)
        return Stack(tuple(_made(make, key, path, part) for key, part in pairs))
    x = make(key, like.shape, like.dtype)
    on_host = getattr(like.sharding, "memory_kind", None) == "pinned_host"
    return in_host_memory(path, x) if on_host else x


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_bits(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return _in_parts(lambda key, part: jax.random.bits(key, part, dtype), key, shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_dense(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    def normal(key: jax.Array, part: tuple[int, ...]) -> jax.Array:
        return (SPREAD * jax.random.normal(key, part)).astype(dtype)

    return _in_parts(normal, key, shape)


def _in_parts(make: Any, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`make(key, shape)` a part after the other: a matrix of several, or up to 64 parts of one."""
    parts = shape[0] if len(shape) > 2 else math.gcd(shape[0], 64) if len(shape) > 1 else 1
    part = (shape[0] // parts, *shape[1:])
    return jax.lax.map(lambda key: make(key, part), jax.random.split(key, parts)).reshape(shape)
