"""Losses of language models, without ever holding the logits of a whole batch.

With a vocabulary of 50,000 the logits of 16 rows of 512 tokens are 1.6 GB, and as much again for
their gradient. So they are taken a chunk at a time, and again in the backward pass; and only where
something is to be predicted, for which the supervised positions of each row are brought forward:

    weights   0 0 0 1 1 0 0 1    the row's own order
              1 1 1 . . . . .    brought forward: of T positions, the first T/2 will do here

How many positions of each row are run is chosen among T, T/2, ..., T/16, by what the fullest row
needs. Rows stay where they are, so that they may lie on different devices.

Shapes: B rows, T tokens of a row, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lora_jax.core.adapt import adapt
from lora_jax.core.products import hoisted, with_derivative
from lora_jax.core.tree import combine

if TYPE_CHECKING:
    from lora_jax.data import Batch
    from lora_jax.models.decoder import Decoder

# From adapters, base, batch and a key (None: as in evaluation) to the loss, or to the loss and
# numbers worth recording beside it. "weight" among them is what the loss is a mean over.
LossFn = Callable[[Any, Any, Any, Any], jax.Array | tuple[jax.Array, dict[str, jax.Array]]]
# From a key, embeddings [B, T, D] and their batch to other embeddings.
Perturb = Callable[[jax.Array, jax.Array, Any], jax.Array]
# From hidden states [..., D] to logits [..., V].
Unembed = Callable[[jax.Array], jax.Array]

HALVINGS = 4  # 32 supervised positions of 512 cost 32; fewer cost no less


def next_token_loss(
    model: Decoder,
    *,
    label_smoothing: float = 0.0,
    chunk: int | None = 512,
    perturb: Perturb | None = None,
    among: Sequence[int] | None = None,
) -> LossFn:
    """Cross-entropy of each next token, as the batch's weights tell.

    Args:
      model: an `lj.models` decoder.
      label_smoothing: share of the target's probability that is spread over the vocabulary.
      chunk: positions whose logits are held at once; None for all, which saves taking them again
        in the backward pass (a tenth of the time of a step, where everything is supervised).
      perturb: what is done to the embeddings in training, such as `neftune(5.0)`.
      among: tokens to choose from, such as the labels of a classification that are one token each;
        None for the whole vocabulary. A target that is not among them has an infinite loss.

    Returns:
      A loss function: of adapters (or None), base, `lj.data.Batch` and a key, to the mean over the
      weights, and `{"weight": their sum, "accuracy": share of them predicted rightly, "tokens":
      tokens that are no padding}`. The key is for dropout and `perturb`; with None there is
      neither.
    """

    def forward(params: Any, batch: Batch, key: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        run: Any = functools.partial(model.apply, {"params": params})
        embeddings = None
        if perturb is not None and key is not None:
            embeddings = perturb(key, run(batch.tokens, method="embeddings"), batch)
        hidden = run(
            *(batch.tokens, batch.positions, batch.segment_ids),
            embeddings=embeddings,
            method="hidden",
        )
        targets, weights = shifted(batch)
        choices = None if among is None else jnp.asarray(among, targets.dtype)
        if choices is not None:
            targets = _index_of(targets, choices)

        def unembed(hidden: jax.Array) -> jax.Array:
            logits = run(hidden, method="unembed")
            return logits if choices is None else logits[..., choices]

        return chunked_cross_entropy(
            hidden, targets, weights, unembed, chunk=chunk, label_smoothing=label_smoothing
        )

    adapted = adapt(forward)

    def loss_fn(adapters: Any, base: Any, batch: Batch, key: Any = None) -> tuple[jax.Array, dict]:
        dropout_key, noise_key = (None, None) if key is None else jax.random.split(key)
        tree = combine(base, adapters, dropout_key=dropout_key)
        loss, weight, correct = adapted(tree, batch, noise_key)
        total = jnp.where(weight == 0, 1, weight)
        tokens = (jnp.asarray(batch.segment_ids) > 0).sum()
        return loss / total, {"weight": weight, "accuracy": correct / total, "tokens": tokens}

    return loss_fn


def shifted(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What each position is to predict: targets and their weights, [B, T]; none for the last."""
    targets = jnp.roll(batch.tokens, -1, axis=-1)
    weights = jnp.roll(batch.weights, -1, axis=-1)
    return targets, jnp.asarray(weights).at[..., -1].set(0)


def _index_of(targets: jax.Array, choices: jax.Array) -> jax.Array:
    """Where each target stands among the choices; -1 if it does not."""
    found = targets[..., None] == choices
    return jnp.where(found.any(-1), found.argmax(-1), -1)


def neftune(alpha: float) -> Perturb:
    """Noise on the embeddings in training (NEFTune, arXiv:2310.05914).

    Args:
      alpha: the noise is uniform in ±alpha / sqrt(L * D), for a sequence of L tokens; the paper
        uses 5 to 15.

    Returns:
      What `next_token_loss` takes as `perturb`.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha!r}, expected a number of at least 0, such as 5.0")

    def perturb(key: jax.Array, embeddings: jax.Array, batch: Batch) -> jax.Array:
        ids = batch.segment_ids
        lengths = (ids[:, :, None] == ids[:, None, :]).sum(-1)  # [B, T], of each token's sequence
        size = alpha * lax.rsqrt(lengths.astype(jnp.float32) * embeddings.shape[-1])
        noise = jax.random.uniform(key, embeddings.shape, jnp.float32, -1, 1)
        return embeddings + (size[..., None] * noise).astype(embeddings.dtype)

    return perturb


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
    rows, length = targets.shape
    per_row = length if chunk is None else max(1, chunk // rows)
    supervised = weights != 0
    # Neighbours stay in order, which keeps the look-up below nearly sequential.
    order = jnp.argsort(~supervised, axis=-1, stable=True)
    back = jnp.argsort(order, axis=-1)
    sizes = [length] if chunk is None else _halved(length)
    needed = supervised.sum(-1).max()
    index = sum(((needed <= size).astype(jnp.int32) for size in sizes[1:]), jnp.int32(0))
    positions = (targets, supervised, order, back, index)
    head = hoisted(unembed, hidden[:, :1])[1]

    def of_all(of_chunk: Callable[..., tuple], hidden: jax.Array, positions: tuple) -> tuple:
        """What `of_chunk` gives for the supervised positions, in their own order; else zero."""

        targets, supervised, order, back, index = positions

        def of_first(size: int) -> Callable[..., tuple]:
            """Of the first `size` positions of each row, in the order brought forward."""

            def branch(hidden: jax.Array) -> tuple:
                first = order[:, :size]
                parts = (_chosen(hidden, first), _chosen(targets, first))
                return tuple(
                    jnp.pad(x, [(0, 0), (0, length - size), *[(0, 0)] * (x.ndim - 2)])
                    for x in _in_chunks(of_chunk, parts, per_row)
                )

            # Whatever the branch needs in the backward pass it makes again: `lax.cond` would have
            # to return it from all branches, those that were not taken included.
            return branch if chunk is None else jax.checkpoint(branch)

        values = lax.switch(index, [of_first(size) for size in sizes], hidden)
        shown = lambda x: supervised.reshape(rows, length, *[1] * (x.ndim - 2))  # noqa: E731
        return tuple(jnp.where(shown(x), _chosen(x, back), 0) for x in values)

    def losses(hidden: jax.Array, positions: tuple, head: list) -> tuple:
        def of_chunk(hidden: jax.Array, targets: jax.Array) -> tuple:
            logits = hoisted(unembed, hidden)[0](head, hidden)
            return _cross_entropy(logits, targets, label_smoothing)

        return of_all(of_chunk, hidden, positions)

    def rule(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
        """A token's loss depends on its own hidden state alone, so that its gradient by that can be
        taken while the logits are there: they need not be kept, nor taken again."""
        (hidden, positions, head), (hidden_dot, _, head_dot) = primals, tangents

        def of_chunk(hidden: jax.Array, targets: jax.Array) -> tuple:
            def losses(hidden: jax.Array) -> tuple:
                logits = hoisted(unembed, hidden)[0](head, hidden)
                return _cross_entropy(logits, targets, label_smoothing)

            losses, pull, correct = jax.vjp(losses, hidden, has_aux=True)
            return losses, correct, pull(jnp.ones_like(losses))[0]

        values, correct, gradient = of_all(of_chunk, hidden, positions)
        by_hidden = jnp.zeros_like(values)
        if not isinstance(hidden_dot, SymbolicZero):
            by_hidden = jnp.einsum(
                "btd,btd->bt", gradient, hidden_dot, preferred_element_type=values.dtype
            )
        if not all(isinstance(x, SymbolicZero) for x in head_dot):
            moved = [k for k, x in enumerate(head_dot) if not isinstance(x, SymbolicZero)]

            def of_moved(values: list) -> jax.Array:
                whole = dict(enumerate(head)) | dict(zip(moved, values, strict=True))
                return plain(hidden, positions, [whole[k] for k in range(len(head))])[0]

            values_dot = [head_dot[k] for k in moved]
            by_hidden += jax.jvp(of_moved, ([head[k] for k in moved],), (values_dot,))[1]
        return (values, correct), (by_hidden, jnp.zeros_like(correct))

    plain = losses if chunk is None else jax.checkpoint(losses)
    return with_derivative(plain, rule)(hidden, positions, head)


def _halved(length: int) -> list[int]:
    """`length`, half of it, and so on: the numbers of positions that are compiled for."""
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
