"""A decoder's tensors by the names of a format: the way back from parameters to files.

Nothing is computed before a tensor is read, and that one alone then: 4-bit weights are decoded and
adapters merged a layer at a time, and what is still in its files (`Unread`) is read from there. So
no dense model stands beside the packed one, and none at all need be in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.core.leaves import AdaptedArray
from lora_jax.core.merge import merged
from lora_jax.core.tree import combine, map_leaves, named_leaves
from lora_jax.formats.checkpoint import Naming, Tensor, Unread, some
from lora_jax.models.decoder import DecoderConfig, parameter_shapes

# Compiled, a merged tensor needs room for the product and the sum alone.
_merged = jax.jit(merged, static_argnames="dtype")


def disassemble(
    config: DecoderConfig, naming: Naming, params: Any, adapters: Any = None, *, dtype: DTypeLike
) -> list[Tensor]:
    """The tensors of a decoder by the names of a format; undoes `assemble`.

    Args:
      config: The decoder, scanned or unrolled.
      naming: What the tensors are to be called.
      params: Its parameters, dense or quantized.
      adapters: What is added to them, as by `lj.merge`; nothing, if None.
      dtype: Of what is decoded or merged; all else has the dtype of the parameters.

    Returns:
      Every tensor that the format has of this decoder, layer by layer.

    Raises:
      ValueError: If the parameters are not those of the config, or the adapters of another tree.
    """
    leaves = _combined(params, adapters)
    expected = {path: leaf.shape for path, leaf in named_leaves(parameter_shapes(config))}
    _require(expected, {path: tuple(leaf.shape) for path, leaf in leaves.items()})
    shapes = parameter_shapes(dataclasses.replace(config, scan_layers=True))
    tensors = []
    for name, place in naming.places(config, shapes).items():
        path, leading = place.home(scan_layers=config.scan_layers)
        read = functools.partial(_as_stored, leaves[path], leading, path, dtype)
        tensors.append(Tensor(name, place.shape(shapes), read))
    return tensors


def _as_stored(leaf: Any, leading: tuple[int, ...], path: str, dtype: DTypeLike) -> np.ndarray:
    """The share of a leaf at an index on its leading axes, dense; kernels as [out, in].

    What is dense and not adapted is returned as it is, in its own dtype: whoever writes it can cast
    a part of it at a time.
    """
    if isinstance(leaf, Unread):
        share = leaf.stored(leading)
        wider = np.dtype(jnp.promote_types(share.dtype, leaf.dtype))
        if isinstance(share, np.ndarray) and leaf.dtype not in (dtype, wider):
            share = share.astype(leaf.dtype)  # which rounds, and not as the last cast will
    else:
        share = jax.tree.map(operator.itemgetter(leading), leaf)
    if not isinstance(share, np.ndarray):
        share = np.asarray(_merged(share, np.dtype(dtype)))
    return share.T if path.endswith("/kernel") else share


def _combined(params: Any, adapters: Any) -> dict[str, Any]:
    """The leaves of a combined tree by their paths; what is unread stays so."""
    unread = {path: leaf for path, leaf in named_leaves(params) if isinstance(leaf, Unread)}

    def known(path: str, leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if path in unread else leaf

    leaves = dict(named_leaves(combine(map_leaves(known, params), adapters)))
    for path, leaf in unread.items():
        there = leaves[path]
        adapted = isinstance(there, AdaptedArray)
        leaves[path] = dataclasses.replace(there, base=leaf) if adapted else leaf
    return leaves


def _require(
    expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Every parameter of the decoder in its shape, and no other."""
    wrong = {
        "missing": [path for path in expected if path not in shapes],
        "without a place in it": [path for path in shapes if path not in expected],
        "of another shape": [
            f"{path} ({shape}, expected {expected[path]})"
            for path, shape in shapes.items()
            if shape != expected.get(path, shape)
        ],
    }
    if found := [f"{some(names)} {what}" for what, names in wrong.items() if names]:
        raise ValueError(f"the parameters are not those of the config: {'; '.join(found)}")
