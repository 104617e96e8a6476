"""Cross-entropy of tokens, without ever holding the logits of a whole batch.

With a vocabulary of 50,000 the logits of 16 rows of 512 tokens are 1.6 GB, and as much again for
their gradient. So they are taken a chunk at a time, and so is the gradient, while they are there;
and only where something is to be predicted, for which the supervised positions of each row are
brought forward:

    weights   0 0 0 1 1 0 0 1    the row's own order
              1 1 1 . . . . .    brought forward: of T positions, the first T/2 will do here

How many positions of each row are run is chosen among T, T/2, ..., T/16, by what the fullest row
needs. Rows stay where they are, so that they may lie on different devices. Under a `vmap` over
batches all T are run: whatever was chosen for one batch would change the sums of another.

Shapes: B rows, T tokens of a row, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from lora_jax.core.products import hoisted, with_derivative

# From hidden states [..., D] to logits [..., V].
Unembed = Callable[[jax.Array], jax.Array]

HALVINGS = 4  # 32 supervised positions of 512 cost 32; fewer cost no less


def chunked_cross_entropy(
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    unembed: Unembed,
    *,
    chunk: int | None = 512,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sum of the cross-entropies of tokens; see `token_losses` for the arguments.

    Returns:
      Sum of the losses in nats, sum of the weights, and sum of the weights of the tokens that are
      the most probable ones; each a scalar.
    """
    losses, correct = token_losses(
        hidden, targets, weights, unembed, chunk=chunk, label_smoothing=label_smoothing
    )
    weights = weights.astype(losses.dtype)
    return (losses * weights).sum(), weights.sum(), (correct * weights).sum()


def token_losses(
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    unembed: Unembed,
    *,
    chunk: int | None = 512,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each token whose weight is not zero.

    Works inside of `adapt`, where `unembed` may close over adapted and 4-bit weights.

    Args:
      hidden: what the logits are made from, [B, T, D].
      targets: the tokens to predict, integers [B, T]; one that has no logit has infinite loss.
      weights: [B, T]; only where they are not zero are logits taken.
      unembed: from hidden states to logits.
      chunk: positions whose logits are held at once, over all rows together; None for all.
      label_smoothing: share of the target's probability that is spread over the vocabulary.

    Returns:
      The losses in nats, and 1.0 where no token is more probable than the target, else 0.0; both
      [B, T], float32 or wider, and zero where the weight is. They are not multiplied by weights.

    Raises:
      ValueError: if shapes or options make no sense.
    """
    _check(hidden, targets, weights, chunk, label_smoothing)
    positions = _Positions.of(targets, weights != 0, chunk)
    head = hoisted(unembed, hidden[:, :1])[1]

    def in_chunks(hidden: jax.Array, positions: _Positions, head: list) -> tuple:
        def of_chunk(hidden: jax.Array, targets: jax.Array) -> tuple:
            logits = hoisted(unembed, hidden)[0](head, hidden)
            return _cross_entropy(logits, targets, label_smoothing)

        return positions.all(of_chunk, hidden)

    losses = in_chunks if chunk is None else jax.checkpoint(in_chunks)

    def rule(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
        # A token's loss depends on its own hidden state alone, so that the gradient by that can be
        # taken while the logits are there: they are not kept, nor taken again.
        (hidden, positions, head), (hidden_dot, _, head_dot) = primals, tangents

        def of_chunk(hidden: jax.Array, targets: jax.Array) -> tuple:
            def of_hidden(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
                logits = hoisted(unembed, hidden)[0](head, hidden)
                return _cross_entropy(logits, targets, label_smoothing)

            losses, pull, *correct = jax.vjp(of_hidden, hidden, has_aux=True)
            return losses, *correct, *pull(jnp.ones_like(losses))

        values, correct, gradient = positions.all(of_chunk, hidden)
        moved = jnp.zeros_like(values)
        if not _is_zero(hidden_dot):
            moved += jnp.einsum(
                "btd,btd->bt", gradient, hidden_dot, preferred_element_type=values.dtype
            )
        # A head that is trained, too, is differentiated as any function is.
        trained = [k for k, x in enumerate(head_dot) if not _is_zero(x)]
        if trained:

            def of_trained(*trained_values: jax.Array) -> jax.Array:
                whole = dict(enumerate(head)) | dict(zip(trained, trained_values, strict=True))
                return losses(hidden, positions, list(whole.values()))[0]

            at, along = ([x[k] for k in trained] for x in (head, head_dot))
            moved += jax.jvp(of_trained, at, along)[1]
        return (values, correct), (moved, jnp.zeros_like(correct))

    return with_derivative(losses, rule)(hidden, positions, head)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["targets", "supervised", "order", "back", "branch"],
    meta_fields=["chunk"],
)
@dataclasses.dataclass(frozen=True)
class _Positions:
    """Which positions are to predict something, and how they are brought forward.

    Attributes:
      targets: [B, T].
      supervised: bool [B, T].
      order: int32 [B, T], the positions of each row, supervised ones first.
      back: int32 [B, T], where each position went.
      branch: int32 [], how often the length may be halved.
      chunk: positions at once; None for all.
    """

    targets: jax.Array
    supervised: jax.Array
    order: jax.Array
    back: jax.Array
    branch: jax.Array
    chunk: int | None

    @classmethod
    def of(cls, targets: jax.Array, supervised: jax.Array, chunk: int | None) -> _Positions:
        # Neighbours stay in order, which keeps the look-up nearly sequential.
        order = jnp.argsort(~supervised, axis=-1, stable=True)
        back = jnp.argsort(order, axis=-1)
        needed = supervised.sum(-1).max()
        shorter = _sizes(targets.shape[1], chunk)[1:]
        branch = sum(((needed <= size).astype(jnp.int32) for size in shorter), jnp.int32(0))
        return cls(targets, supervised, order, back, _unbatched(branch), chunk)

    def all(self, of_chunk: Callable[..., tuple], hidden: jax.Array) -> tuple:
        """`of_chunk(hidden, targets)` of the supervised positions, in their own order; else zero.

        Args:
          of_chunk: from arrays [B, N, ...] to arrays [B, N, ...].
          hidden: [B, T, D].
        """
        rows, length = self.targets.shape
        per_row = length if self.chunk is None else max(1, self.chunk // rows)

        def of_first(size: int) -> Callable[..., tuple]:
            """Of the first `size` positions of each row, in the order brought forward."""

            def branch(hidden: jax.Array) -> tuple:
                first = self.order[:, :size]
                parts = (_chosen(hidden, first), _chosen(self.targets, first))
                return tuple(
                    jnp.pad(x, [(0, 0), (0, length - size), *[(0, 0)] * (x.ndim - 2)])
                    for x in _in_chunks(of_chunk, parts, per_row)
                )

            # Whatever the branch needs in the backward pass it makes again: `lax.cond` would have
            # to return it from all branches, those that were not taken included.
            return branch if self.chunk is None else jax.checkpoint(branch)

        branches = [of_first(size) for size in _sizes(length, self.chunk)]

        def shown(x: jax.Array) -> jax.Array:
            supervised = self.supervised.reshape(rows, length, *[1] * (x.ndim - 2))
            return jnp.where(supervised, _chosen(x, self.back), 0)

        return tuple(map(shown, lax.switch(self.branch, branches, hidden)))


@custom_vmap
def _unbatched(branch: jax.Array) -> jax.Array:
    """The same branch, or the first of all under a vmap over what it was chosen by.

    A switch by many numbers would run each branch for each of them, and select.
    """
    return branch


@_unbatched.def_vmap
def _first(axis_size: int, in_batched: list[bool], branch: jax.Array) -> tuple[jax.Array, bool]:
    return (jnp.int32(0) if in_batched[0] else branch), False


def _sizes(length: int, chunk: int | None) -> list[int]:
    """The numbers of positions that are compiled for: `length`, and half of it, and so on."""
    if chunk is None:
        return [length]
    return list(dict.fromkeys(-(-length // 2**k) for k in range(HALVINGS + 1)))


def _chosen(x: jax.Array, index: jax.Array) -> jax.Array:
    """Positions `index` [B, N] of x [B, T, ...]."""

    def row(x: jax.Array, index: jax.Array) -> jax.Array:
        # That no position is asked for twice makes the gradient a plain store.
        return x.at[index].get(unique_indices=True, mode="promise_in_bounds")

    return jax.vmap(row)(x, index)


def _in_chunks(fn: Callable, parts: tuple[jax.Array, ...], per_row: int) -> Any:
    """`fn` of arrays [B, N, ...], `per_row` positions of each row at a time; results are [B, N]."""
    rows, length = parts[0].shape[:2]
    number = -(-length // per_row)
    if number == 1:
        return fn(*parts)
    per_row = -(-length // number)

    def cut(x: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, number * per_row - length), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, padding).reshape(rows, number, per_row, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)  # [number, B, per_row, ...]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(_: None, parts: tuple[jax.Array, ...]) -> tuple[None, Any]:
        return None, fn(*parts)

    _, values = lax.scan(body, None, tuple(map(cut, parts)))
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1, *x.shape[3:])[:, :length], values
    )


def _cross_entropy(
    logits: jax.Array, targets: jax.Array, label_smoothing: float
) -> tuple[jax.Array, jax.Array]:
    """Loss, and whether the target is the most probable token, of [...] positions."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))  # [..., V]
    # A comparison instead of a look-up: its gradient fuses with the softmax's.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    of_target = jnp.where(is_target, logits, 0).sum(-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - (1 - label_smoothing) * of_target
    if label_smoothing:
        losses -= label_smoothing * logits.mean(-1)
    losses = jnp.where((targets >= 0) & (targets < logits.shape[-1]), losses, jnp.inf)
    largest = lax.stop_gradient(logits.max(-1))
    return losses, (lax.stop_gradient(of_target) >= largest).astype(losses.dtype)


def _check(
    hidden: jax.Array, targets: jax.Array, weights: jax.Array, chunk: Any, smoothing: float
) -> None:
    shapes = [tuple(x.shape) for x in (hidden, targets, weights)]
    if len(shapes[0]) != 3 or shapes[0][:2] != shapes[1] or shapes[1] != shapes[2]:
        raise ValueError(
            f"hidden, targets and weights have shapes {shapes[0]}, {shapes[1]} and {shapes[2]}, "
            "expected [B, T, D], [B, T] and [B, T]"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1, or None for all positions")
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing is {smoothing}, expected a share of at least 0, below 1")
