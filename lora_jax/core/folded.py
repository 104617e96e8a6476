"""The product of an adapted 4-bit weight in one: `x·(W + scale·BA)`, with a factored gradient.

A product of many rows waits for memory where the update is taken apart: `(x·Aᵀ)·Bᵀ` reads and
writes all of y again, and the backward pass all of dx. The weight is decoded for the product
anyway, so the update is added while it is decoded, in float32 and before the one rounding: that
costs 2·r operations a weight and moves nothing more. Gradients of A and B stay factored, so that
there are 4·T·in·out operations, as without folding, and not the 6·T·in·out of a dense sum.

On an H200 folding takes 0.6 ps an element of W; to read and write one of y or dx takes 0.9 ps at
the speed of its memory. So it pays from some in·out / (in + out) rows on: 3,185 of Llama 3 8B's
gate, 5,970 of Llama 65B's.

Shapes: T rows of activations, r rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax

from lora_jax.core.leaves import Adapter, QuantizedArray, RunAdapter
from lora_jax.core.view import View

# Products of fewer rows are bound by reading the codes, and have a kernel of their own.
LEAST_ROWS = 128


def folds(view: View, x: jax.Array, rows: int) -> bool:
    """Whether a product of `rows` rows x is taken in one.

    Only a 4-bit weight has it: its float32 values lie between those of the narrower dtype, so that
    rounding keeps even small updates on average, where it would lose them beside a weight that is
    rounded already. Nor is it done in a sweep, where each run would decode a weight for itself.
    """
    return (
        view.fold
        and view.adapter is not None
        and not isinstance(view.adapter, RunAdapter)
        and isinstance(view.base, QuantizedArray)
        and not view.batch_shape
        and view.scale is None
        and (view.dropout_key is None or not view.adapter.drops)
        and x.dtype == view.dtype
        and rows >= least_rows(math.prod(view.inner), math.prod(view.outer))
    )


def least_rows(inn: int, out: int) -> int:
    """Rows from which on a product with a weight of this size is taken in one."""
    return max(LEAST_ROWS, inn * out // (inn + out))


def product(
    view: View,
    x: jax.Array,
    of_dense: Callable[[jax.Array, jax.Array], jax.Array],
    update: Callable[[View, jax.Array], jax.Array],
) -> jax.Array:
    """`of_dense(W + scale·BA, x)`.

    Args:
      view: the weight, adapted.
      x: activations.
      of_dense: the product of a dense weight with activations, linear in both.
      update: the factored share of the update in that product.

    Returns:
      The product. Its tangents are those of `of_dense(W, x) + update(view, x)`; its residuals are
      codes, factors and activations.
    """

    def decoded(view: View, x: jax.Array) -> jax.Array:
        return of_dense(view.dense(), x)

    @jax.custom_jvp
    def in_one(view: View, x: jax.Array) -> jax.Array:
        # A weight depends on no activation. Left to itself XLA decodes those of all unrolled layers
        # before the first one runs, and keeps them: 12 GiB of a 7B model, by its schedule.
        view, x = jax.lax.optimization_barrier((view, x))
        return jax.checkpoint(decoded)(view, x)

    @in_one.defjvp
    def rule(
        primals: tuple[View, jax.Array], tangents: tuple[View, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (view, x), (view_dot, x_dot) = primals, tangents
        y = in_one(view, x)
        by_x = jax.checkpoint(decoded)(view, x_dot)

        def of_adapter(adapter: Adapter | None) -> jax.Array:
            return update(dataclasses.replace(view, adapter=adapter), x)

        _, by_adapter = jax.jvp(of_adapter, (view.adapter,), (view_dot.adapter,))
        return y, by_x + by_adapter.astype(y.dtype)

    return in_one(view, x)
