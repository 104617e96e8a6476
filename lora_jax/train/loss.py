"""Losses: functions of adapters, base, batch and key that a step differentiates.

Shapes: B rows, T tokens of a row, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.adapt import adapt
from lora_jax.core.tree import combine
from lora_jax.train.cross_entropy import chunked_cross_entropy

if TYPE_CHECKING:
    from lora_jax.data import Batch
    from lora_jax.models.decoder import Decoder

# From adapters, base, batch and a key (None: as in evaluation) to the loss, or to the loss and
# numbers worth recording beside it. "weight" among them is what the loss is a mean over.
LossFn = Callable[[Any, Any, Any, Any], jax.Array | tuple[jax.Array, dict[str, jax.Array]]]
# From a key, embeddings [B, T, D] and their batch to other embeddings.
Perturb = Callable[[jax.Array, jax.Array, Any], jax.Array]


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
      chunk: positions whose logits are held at once; None for all.
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
        hidden = run(*decoder_inputs(batch), embeddings=embeddings, method="hidden")
        targets, weights = shifted(batch)
        choices = None if among is None else jnp.asarray(among, targets.dtype)
        if choices is not None:
            targets = _index_of(targets, choices)

        def unembed(hidden: jax.Array) -> jax.Array:
            return run(hidden, choices, method="unembed")

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


def decoder_inputs(batch: Batch) -> tuple[Any, ...]:
    """What the decoder is told of a batch: no segments where a causal mask hides all that it must.

    Padding behind a sequence then sees that sequence, which makes no difference to any loss.
    """
    if batch.positions is None:
        return (batch.tokens,)
    return batch.tokens, batch.positions, batch.segment_ids


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
