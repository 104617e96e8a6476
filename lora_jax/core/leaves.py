"""The leaves of the three trees: a 4-bit weight, a low-rank update, and the pair of both.

    base:      {"q": {"kernel": QuantizedArray}, "norm": {"scale": Array}}
    adapters:  {"q": {"kernel": Adapter},        "norm": {"scale": None}}
    combined:  {"q": {"kernel": AdaptedArray},   "norm": {"scale": Array}}

Shapes: `in` is the contracted size of a weight, `out` the produced one, `r` the rank, `G` the block
size, and `b...` any number of leading batch axes (layers, experts, runs). Batch axes are free:
every array of a leaf carries them first and no static field depends on them, so `lax.scan` may
slice a leaf and `vmap` may batch it like any other pytree.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

LAYOUT_LETTERS = ("b", "i", "o")

T = TypeVar("T")


@typing.dataclass_transform(frozen_default=True)
def _leaf(data: list[str], static: list[str]) -> Callable[[type[T]], type[T]]:
    """A frozen dataclass that is a pytree of its data fields."""

    def register(cls: type[T]) -> type[T]:
        frozen: Any = dataclasses.dataclass(frozen=True)(cls)
        return jax.tree_util.register_dataclass(frozen, data_fields=data, meta_fields=static)

    return register


@_leaf(
    ["codes", "scales", "group_scales", "offset", "minimum"],
    ["kind", "block_size", "dtype", "layout", "axis_sizes", "sharding_at_use"],
)
class QuantizedArray:
    """A weight stored in 4 bits, in the order of the torch and bitsandbytes matrix `[out, in]`.

    Invariants:
      - `codes` holds two codes a byte along `in`, the earlier element in the high nibble.
      - A block is `block_size` neighbours along `in`, and never crosses a row, except that of a
        flat leaf: where `block_size` does not divide `in`, the matrix is stored as one row of
        out*in values, the last block and the last byte of which may be incomplete. That is
        bitsandbytes' own form. Read `[1, out*in]` for `[out, in]`, rounded up, in what follows.
      - Scales are float32 a block, or double-quantized: an 8-bit code a block, one float32 for
        each group of 256 consecutive blocks of one matrix (row-major; groups restart at each
        leading index), and one float32 offset a matrix. The kinds of GGUF, `"q4_0"` and `"q4_1"`,
        have float16 scales and are never double-quantized; `"q4_1"` has a float16 minimum too.
      - `layout` and `axis_sizes` describe the trailing, non-batch axes of the parameter as the
        model sees it; `shape` is that parameter's shape, whatever the storage.

    Attributes:
      codes: uint8 `[b..., out, in/2]`.
      scales: float32 or float16 `[b..., out, in/G]`, or uint8 when double-quantized.
      group_scales: float32 `[b..., ceil(out*in/G/256)]`, or None.
      offset: float32 `[b...]`, or None.
      minimum: `[b..., out, in/G]` in the scales' dtype, added to every value of a block (affine
        kinds), or None.
      kind: name of the codebook, such as `"nf4"`.
      block_size: G, in elements.
      dtype: the dtype the weight had, and decodes to.
      layout: one letter an axis, such as `"i o"` (see `quantize_array`).
      axis_sizes: the sizes of those axes.
      sharding_at_use: how `[out, in]` lies on a mesh when it is decoded, or None to leave that to
        the compiler; `lj.shard` sets it for weights that are gathered at each use (FSDP).
    """

    codes: Any
    scales: Any
    group_scales: Any = None
    offset: Any = None
    minimum: Any = None
    kind: str = "nf4"
    block_size: int = 64
    dtype: Any = np.dtype(np.float32)
    layout: str = "i o"
    axis_sizes: tuple[int, ...] = ()
    sharding_at_use: jax.sharding.NamedSharding | None = None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.codes.shape[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return (*self.batch_shape, *self.axis_sizes)

    @property
    def ndim(self) -> int:
        """The parameter's number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The parameter's number of elements."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Sizes of `[out, in]`, the matrix that one leading index holds."""
        outer, inner = split_axes(self.layout, self.axis_sizes)
        return math.prod(outer), math.prod(inner)

    @property
    def is_flat(self) -> bool:
        """Whether blocks run over row ends."""
        return self.matrix_shape[1] % self.block_size != 0

    @property
    def nbytes(self) -> int:
        """Bytes that the leaf really occupies: codes, scales and whatever the scales need."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):  # a tree of something else, such as shardings
            return f"QuantizedArray(codes={self.codes!r}, scales={self.scales!r}, ...)"
        scales = "double-quantized" if self.group_scales is not None else self.scales.dtype
        return (
            f"QuantizedArray({self.kind}, shape={self.shape}, dtype={self.dtype}, "
            f"layout={self.layout!r}, block_size={self.block_size}, {scales} scales"
            f"{', flat' if self.is_flat else ''})"
        )


@_leaf(["a", "b"], ["scale", "dropout", "layout"])
class Adapter:
    """A low-rank update `ΔW = scale · b @ a` of one weight (LoRA, arXiv:2106.09685).

    Invariants: `a` and `b` share their batch axes and their rank. `scale` is static metadata and
    not a leaf: a leaf would be moved by the optimizer's weight decay even with a zero gradient.

    Attributes:
      a: `[b..., r, in]`.
      b: `[b..., out, r]`.
      scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
      dropout: probability of dropping an input of `a`, when a dropout key is given.
      layout: the layout of the weight it belongs to.
    """

    a: Any
    b: Any
    scale: float = 1.0
    dropout: float = 0.0
    layout: str = "i o"

    @property
    def rank(self) -> int:
        """Width of the update, r."""
        return self.a.shape[-2]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.a.shape[:-2])

    @property
    def drops(self) -> bool:
        """Whether inputs are dropped when there is a key."""
        return bool(self.dropout)

    def __repr__(self) -> str:
        if not all(hasattr(x, "shape") for x in (self.a, self.b)):
            return f"Adapter(a={self.a!r}, b={self.b!r}, scale={self.scale})"
        batch = f"batch={self.batch_shape}, " if self.batch_shape else ""
        sizes = f"rank={self.rank}, in={self.a.shape[-1]}, out={self.b.shape[-2]}"
        return f"Adapter({batch}{sizes}, scale={self.scale:g}, layout={self.layout!r})"


@_leaf(["a", "b", "scale", "dropout"], ["layout"])
class RunAdapter(Adapter):
    """An adapter whose scale and dropout are values: what a loss is given in a sweep.

    Runs that differ in them share one program. Nothing that is optimized or kept holds such a
    leaf, for as values they would be decayed with the weights.

    Attributes:
      a, b, layout: as in `Adapter`; beyond the run's own rank they are zero.
      scale: `[b...]`.
      dropout: `[b...]`, the same at all indices, or None for none.
    """

    scale: Any = 1.0
    dropout: Any = None

    @property
    def drops(self) -> bool:
        """Whether inputs are dropped when there is a key."""
        return self.dropout is not None

    def __repr__(self) -> str:
        return f"RunAdapter(a={self.a!r}, b={self.b!r}, scale={self.scale!r})"


@_leaf(["base", "adapter", "scale", "dropout_key"], [])
class AdaptedArray:
    """A frozen weight and what was learned for it: the leaf that `adapt` knows how to apply.

    Attributes:
      base: a `jax.Array` or `QuantizedArray`.
      adapter: an `Adapter`, or a plain array that replaces the base's value (a leaf trained whole).
      scale: `[b...]` factor on the adapter's own scale, one a run of a sweep, or None.
      dropout_key: `[b...]` keys, or None for no dropout.
    """

    base: Any
    adapter: Any
    scale: Any = None
    dropout_key: Any = None

    @property
    def is_replaced(self) -> bool:
        """Whether the weight is trained whole, so that the base's value is not used."""
        return not isinstance(self.adapter, Adapter)

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """The parameter's dtype."""
        return self.base.dtype

    @property
    def ndim(self) -> int:
        """The parameter's number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The parameter's number of elements."""
        return math.prod(self.shape)


def is_leaf(x: Any) -> bool:
    """Whether `x` is one of this library's leaves (for `jax.tree.map(..., is_leaf=...)`)."""
    return isinstance(x, QuantizedArray | Adapter | AdaptedArray)


def is_array(x: Any) -> bool:
    """Whether JAX can trace `x`: a JAX or NumPy array, a tracer, or an abstract array."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def is_concrete(x: Any) -> bool:
    """Whether the values of `x` can be looked at now: not under jit, vmap or eval_shape."""
    return is_array(x) and not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)


# Layouts. A layout names the axes of a parameter: `i` is contracted (and blocked), `o` produced,
# `b` batch. Leaves store it without its leading b's, which any scan or vmap may add or take away.


def parse_layout(layout: str | None, shape: tuple[int, ...], where: str) -> str:
    """The layout of a parameter of `shape`, checked, and without its batch axes.

    Args:
      layout: letters separated by blanks, such as `"b i o"`, or None for `"i o"`.
      shape: the parameter's shape.
      where: what the error message calls the parameter.

    Raises:
      ValueError: if the layout is missing though needed, malformed, or of another length.
    """
    if layout is None:
        if len(shape) == 2:
            return "i o"
        if len(shape) < 2:
            raise ValueError(
                f"{where} has shape {shape}, but only a matrix can be adapted or quantized; "
                "write a pattern that matches kernels alone (biases and norms are trained whole "
                "with train=...)"
            )
        raise ValueError(
            f"{where} has {len(shape)} axes, shape {shape}, and its layout is unknown; write "
            'layout="b i o" for scanned layers or experts, "i o o" or "i i o" for the q or o '
            "projections of DenseGeneral"
        )
    if not isinstance(layout, str):
        raise TypeError(f'layout of {where} is {layout!r}, expected a str such as "i o"')
    letters = layout.split()
    trailing = [letter for letter in letters if letter != "b"]
    malformed = any(letter not in LAYOUT_LETTERS for letter in letters)
    if malformed or letters != ["b"] * letters.count("b") + trailing:
        raise ValueError(
            f"layout {layout!r} of {where} is not understood; write the letters b (batch axes, "
            'first), i (contracted) and o (produced) separated by blanks, such as "b i o"'
        )
    if _runs(trailing) not in (["i", "o"], ["o", "i"]):
        raise ValueError(
            f"layout {layout!r} of {where} must have its i axes together and its o axes together, "
            'at least one of each, such as "i o", "o i", "i o o" or "b i i o"'
        )
    if len(letters) != len(shape):
        raise ValueError(
            f"layout {layout!r} names {len(letters)} axes, but {where} has {len(shape)}, shape "
            f"{shape}; write one letter for each axis"
        )
    return " ".join(trailing)


def _runs(letters: list[str]) -> list[str]:
    return [x for k, x in enumerate(letters) if k == 0 or letters[k - 1] != x]


def split_axes(layout: str, axis_sizes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of the produced axes and of the contracted axes of a parameter."""
    letters = layout.split()
    outer = tuple(n for n, letter in zip(axis_sizes, letters, strict=True) if letter == "o")
    inner = tuple(n for n, letter in zip(axis_sizes, letters, strict=True) if letter == "i")
    return outer, inner


def parameter_axes(layout: str, batch: int) -> tuple[int, ...]:
    """Position in canonical order (b..., o..., i...) of each axis of the parameter.

    Also the permutation that turns an array in canonical order into the parameter.
    """
    letters = layout.split()
    canonical = [k for k, x in enumerate(letters) if x == "o"]
    canonical += [k for k, x in enumerate(letters) if x == "i"]
    return (*range(batch), *(batch + canonical.index(k) for k in range(len(letters))))


def to_matrix(w: Any, layout: str) -> Any:
    """The parameter `[b..., axes...]` as the matrix `[b..., out, in]`."""
    batch = w.ndim - len(layout.split())
    outer, inner = split_axes(layout, w.shape[batch:])
    order = np.argsort(parameter_axes(layout, batch)).tolist()
    return jnp.transpose(w, order).reshape(*w.shape[:batch], math.prod(outer), math.prod(inner))


def from_matrix(m: Any, layout: str, axis_sizes: tuple[int, ...]) -> Any:
    """The matrix `[b..., out, in]` as the parameter `[b..., axes...]`."""
    batch = m.shape[:-2]
    outer, inner = split_axes(layout, axis_sizes)
    return jnp.transpose(m.reshape(*batch, *outer, *inner), parameter_axes(layout, len(batch)))
