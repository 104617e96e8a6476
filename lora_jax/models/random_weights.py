"""Random weights that are made 4-bit where they will lie: for plans and measurements of any size.

A 175B model takes 350 GB before it is quantized, and 90 after; here it never exists but as codes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.codebooks import codebook
from lora_jax.core.leaves import QuantizedArray
from lora_jax.core.rules import fold_path
from lora_jax.core.tree import map_leaves, quantize
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
) -> Any:
    """A decoder's parameters, random, with the kernels of its layers in 4 bits.

    Args:
      key: a JAX PRNG key.
      config: the decoder.
      kind: as for `lj.quantize`; None to quantize nothing.
      pattern: which leaves are quantized.
      block_size: elements that share a scale.
      double_quant: whether the scales are stored in 8 bits.

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

    def make(path: str, leaf: Any) -> Any:
        if isinstance(leaf, QuantizedArray):
            return _random_codes(fold_path(key, path), leaf)
        if path.endswith("scale"):
            return jnp.ones(leaf.shape, leaf.dtype)
        return _random_dense(fold_path(key, path), leaf.shape, leaf.dtype)

    return map_leaves(make, shapes)


def _random_codes(key: jax.Array, like: QuantizedArray) -> QuantizedArray:
    levels = codebook(like.kind, like.block_size)
    scale = SPREAD / levels.std()
    fields: dict[str, Any] = {"codes": _random_bits(key, like.codes.shape)}
    if like.group_scales is None:
        fields["scales"] = jnp.full(like.scales.shape, scale, like.scales.dtype)
    else:
        # The 8-bit codes say how far a scale is from the offset, here up to a tenth of it.
        fields["scales"] = _random_bits(jax.random.fold_in(key, 1), like.scales.shape)
        fields["group_scales"] = jnp.full(like.group_scales.shape, scale / 10, jnp.float32)
        fields["offset"] = jnp.full(like.offset.shape, scale, jnp.float32)
    if like.minimum is not None:
        fields["minimum"] = jnp.full(like.minimum.shape, -levels.mean() * scale, like.minimum.dtype)
    static = {name: getattr(like, name) for name in ("kind", "block_size", "dtype", "layout")}
    return QuantizedArray(**fields, **static, axis_sizes=like.axis_sizes)


@functools.partial(jax.jit, static_argnums=1)
def _random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _in_parts(lambda key, part: jax.random.bits(key, part, jnp.uint8), key, shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_dense(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    def normal(key: jax.Array, part: tuple[int, ...]) -> jax.Array:
        return (SPREAD * jax.random.normal(key, part)).astype(dtype)

    return _in_parts(normal, key, shape)


def _in_parts(make: Any, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`make(key, shape)`, one leading index after the other where there are several axes."""
    if len(shape) < 2:
        return make(key, shape)
    return jax.lax.map(lambda key: make(key, shape[1:]), jax.random.split(key, shape[0]))
