"""Products of rows with the matrices of their groups: what experts do, under every transformation.

`lax.ragged_dot` computes them, but JAX can batch it only where rows, matrices and sizes are all
batched, and differentiates it once. A frozen base is shared by the runs of a batch, and each run
sends its tokens to other experts. So the product is a primitive of its own here, and its gradient
another; both end as `lax.ragged_dot`. A batch of them is a loop: it copies nothing that its members
share, costs what they cost one by one, and lets no value of one reach another. On a mesh that
divides the members every device would go through all of them: put `jax.shard_map` around the vmap.

Shapes: T rows, E groups, `in` contracted, `out` produced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike


def grouped_dot(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """Each row times the matrix of its group: `lax.ragged_dot`, which may be batched.

    Args:
      x: rows `[T, in]`, those of the first group first.
      w: a matrix for each group, `[E, in, out]`.
      sizes: integers `[E]`, the rows of each group; what rows are left over give zeros.
      precision: as for `lax.dot_general`.
      preferred_element_type: of the result; by default that of the operands.

    Returns:
      `[T, out]`.
    """
    if preferred_element_type is not None:
        preferred_element_type = jnp.dtype(preferred_element_type)
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    return _dot.bind(x, w, sizes, **options)


def _grouped_outer(x: jax.Array, y: jax.Array, sizes: jax.Array, **options: Any) -> jax.Array:
    """`xᵀ y` over the rows of each group: `[T, in]` and `[T, out]` to `[E, in, out]`."""
    return _outer.bind(x, y, sizes, **options)


def _ragged_outer(x: jax.Array, y: jax.Array, sizes: jax.Array, **options: Any) -> jax.Array:
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return lax.ragged_dot_general(x, y, sizes, numbers, **options)


def _gradients_of_dot(ct: Any, x: Any, w: Any, sizes: Any, **options: Any) -> list[Any]:
    """Of a product that is linear in one of its first two operands, the gradient of that one."""
    if ad.is_undefined_primal(x):
        return [_like(x, grouped_dot(ct, jnp.swapaxes(w, 1, 2), sizes, **options)), None, None]
    return [None, _like(w, _grouped_outer(x, ct, sizes, **options)), None]


def _gradients_of_outer(ct: Any, x: Any, y: Any, sizes: Any, **options: Any) -> list[Any]:
    if ad.is_undefined_primal(x):
        return [_like(x, grouped_dot(y, jnp.swapaxes(ct, 1, 2), sizes, **options)), None, None]
    return [None, _like(y, grouped_dot(x, ct, sizes, **options)), None]


def _like(operand: Any, gradient: jax.Array) -> jax.Array:
    return gradient.astype(operand.aval.dtype)


def _in_a_loop(
    primitive: Primitive, operands: Sequence[Any], axes: Sequence[int | None], **options: Any
) -> tuple[jax.Array, int]:
    """The batching rule: one after the other. A single product of all would mix the runs' values.

    Zeros stand for the rows of other groups in the masks that XLA makes of groups on some backends,
    and zero times a neighbour's NaN is NaN.
    """
    batched = {
        k: jnp.moveaxis(x, axis, 0)
        for k, (x, axis) in enumerate(zip(operands, axes, strict=True))
        if axis is not None
    }

    def one(own: dict[int, jax.Array]) -> jax.Array:
        return primitive.bind(*(own.get(k, x) for k, x in enumerate(operands)), **options)

    return lax.map(one, batched), 0


def _primitive(name: str, fn: Callable[..., jax.Array], gradients: Callable) -> Primitive:
    """What computes `fn(x, y, sizes)`, linear in each of the first two."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(fn, static_argnames=("precision", "preferred_element_type")))
    primitive.def_abstract_eval(
        lambda *avals, **options: jax.typeof(
            jax.eval_shape(functools.partial(fn, **options), *avals)
        )
    )
    mlir.register_lowering(primitive, mlir.lower_fun(fn, multiple_results=False))
    batching.primitive_batchers[primitive] = functools.partial(_in_a_loop, primitive)
    ad.defjvp(
        primitive,
        lambda tangent, x, y, sizes, **options: primitive.bind(tangent, y, sizes, **options),
        lambda tangent, x, y, sizes, **options: primitive.bind(x, tangent, sizes, **options),
        None,
    )
    ad.primitive_transposes[primitive] = gradients
    return primitive


_dot = _primitive("grouped_dot", lax.ragged_dot, _gradients_of_dot)
_outer = _primitive("grouped_outer", _ragged_outer, _gradients_of_outer)
