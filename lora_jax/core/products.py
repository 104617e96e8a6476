"""Functions with derivatives of their own, that the rewrite knows by their names.

A custom derivative rule that an adapted weight enters is an error in general: who knows whether it
is that of the function. Of these it is, only cheaper, so that `adapt` may look inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import _jaxpr

# What the jits of these functions are called in a jaxpr. Nobody else's function must have the name,
# for it would be taken for one of these.
FLOAT32_PRODUCT = "lora_jax_core_products_float32_product"
DERIVATIVE_IS_AS_EXPECTED = "lora_jax_core_products_derivative_is_as_expected"


def _called(name: str, fn: Callable) -> Callable:
    """The jit of a function, which a jaxpr shows by that name."""

    def named(*args: Any) -> Any:
        return fn(*args)

    named.__name__ = name
    return jax.jit(named)


def float32_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Logits: `x @ w`, summed and returned in float32, whatever the operands are.

    The same as `lax.dot_general(..., preferred_element_type=float32)`, but for its gradient. There
    the cotangent of float32 would have the product with `w` taken in float32, too, which costs two
    to four times as much on an accelerator; here it is rounded to the operands' dtype before, as
    that of every other product is.

    Args:
      x: `[..., D]`.
      w: `[D, V]`, in the dtype of x.

    Returns:
      `[..., V]` in float32, or in float64 for operands of that dtype.
    """
    return _float32_product(x, w)


def _wide_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=wide)


_wide = jax.custom_jvp(_wide_dot)
_float32_product = _called(FLOAT32_PRODUCT, _wide)


@_wide.defjvp
def _wide_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, w), (x_dot, w_dot) = primals, tangents
    y = _wide(x, w)

    def narrow(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ()))).astype(y.dtype)

    return y, narrow(x_dot, w) + narrow(x, w_dot)


def with_derivative(primal: Callable, rule: Callable) -> Callable:
    """`primal`, with a cheaper rule for the derivative that it has anyway.

    Args:
      primal: a function of arrays.
      rule: as for `jax.custom_jvp.defjvp` with `symbolic_zeros=True`. Where an adapted or 4-bit
        weight is among the arguments, it is not used: `primal` is differentiated instead.

    Returns:
      The function, to be called under a trace.
    """
    fn = jax.custom_jvp(primal)
    fn.defjvp(rule, symbolic_zeros=True)
    return _called(DERIVATIVE_IS_AS_EXPECTED, fn)


def primal_of(jaxpr: Any, name: str) -> Any:
    """What `with_derivative` was made of: the jaxpr of the primal in that of the jit; or None."""
    if name != DERIVATIVE_IS_AS_EXPECTED:
        return None
    (equation,) = jaxpr.eqns
    return equation.params["call_jaxpr"]


def hoisted(fn: Callable, *examples: Any) -> tuple[Callable, list]:
    """A function without the arrays that it closes over, and those arrays.

    Args:
      fn: a function of arrays.
      examples: arguments, of which only shapes and dtypes matter.

    Returns:
      A function of the list of arrays and of `fn`'s arguments, and the list: the same one, in the
      same order, for other shapes of the arguments.
    """
    closed, result = jax.make_jaxpr(fn, return_shape=True)(*examples)
    jaxpr, consts = _jaxpr.opened(closed)
    treedef = jax.tree.structure(result)

    def without(consts: list, *args: Any) -> Any:
        return jax.tree.unflatten(treedef, _jaxpr.evaluated(jaxpr, consts, jax.tree.leaves(args)))

    return without, list(consts)
