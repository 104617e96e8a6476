"""What a model thinks of text: the likelihood of sequences, and of a few labels after a prompt.

Shapes: B rows, T tokens of a row, N prompts, P tokens of a prompt, C labels, M nodes and E edges
of the labels' tree, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.adapt import adapt
from lora_jax.core.tree import combine
from lora_jax.train.cross_entropy import token_losses
from lora_jax.train.loss import decoder_inputs, shifted

if TYPE_CHECKING:
    from lora_jax.data import Batch
    from lora_jax.models.decoder import Decoder

CHUNK = 512  # positions whose logits are held at once
PROMPT_STEP = 16  # prompts are padded to a multiple of this, so that few programs are compiled


class Nll(NamedTuple):
    """How well a model predicts sequences.

    Attributes:
      nll: mean negative log-likelihood of a token, by weight, in nats.
      perplexity: its exponential.
      accuracy: share of tokens, by weight, that are the most probable ones.
      tokens: sum of the weights.
      per_sequence: float64 [S], for each segment that has a weight the sum of its tokens' negative
        log-likelihoods times their weights; by batch, row and segment id.
    """

    nll: float
    perplexity: float
    accuracy: float
    tokens: float
    per_sequence: np.ndarray


def evaluate_nll(model: Decoder, base: Any, adapters: Any, batches: Iterable[Batch]) -> Nll:
    """The likelihood of sequences.

    Args:
      model: an `lj.models` decoder.
      base: its parameters, 4-bit or not.
      adapters: those of `base`, or None.
      batches: such as `lj.data.evaluation_batches` gives; of one shape, to be compiled once.

    Returns:
      The scores over all tokens that have a weight.

    Raises:
      ValueError: if there is no such token.
    """
    total = weight = correct = 0.0
    sequences: list[np.ndarray] = []
    for batch in batches:
        losses, right = _token_scores(model, base, adapters, batch)
        weights = np.asarray(batch.weights, np.float64)
        # The loss of predicting token t stands at the position before it.
        losses, right = (np.roll(np.asarray(x, np.float64), 1, axis=-1) for x in (losses, right))
        weighted = losses * weights
        total, weight = total + weighted.sum(), weight + weights.sum()
        correct += (right * weights).sum()
        sequences.append(_by_segment(weighted, weights, np.asarray(batch.segment_ids)))
    if weight == 0:
        raise ValueError("no token has a weight, expected something to evaluate on")
    nll = total / weight
    return Nll(
        nll=float(nll),
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        accuracy=float(correct / weight),
        tokens=float(weight),
        per_sequence=np.concatenate(sequences),
    )


def _by_segment(values: np.ndarray, weights: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """Sums over the segments that have a weight, by row and id."""
    count = segment_ids.max(initial=0) + 1
    index = np.arange(len(segment_ids))[:, None] * count + segment_ids  # [B, T]
    sums, present = (
        np.bincount(index.ravel(), x.ravel(), len(segment_ids) * count)
        for x in (values, weights != 0)
    )
    return sums[present > 0]


@functools.partial(jax.jit, static_argnames="model")
def _token_scores(
    model: Decoder, base: Any, adapters: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Loss of each prediction, and whether it is right, [B, T]."""

    def forward(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        run: Any = functools.partial(model.apply, {"params": params})
        hidden = run(*decoder_inputs(batch), method="hidden")
        unembed = functools.partial(run, method="unembed")
        return token_losses(hidden, *shifted(batch), unembed, chunk=CHUNK)

    return adapt(forward)(combine(base, adapters), batch)


class _Tree(NamedTuple):
    """Labels by their common beginnings: each node is a token that is run once, for all of them.

        (prompt) ── " book" ── " a" ── (" flight")     a leaf's token is predicted, never run
                 │          └─ (" hotel")
                 └─ (" yes")

    Attributes:
      tokens: int32 [M], of each node; the prompt's end, node 0, has none of its own.
      depths: int32 [M], tokens from the prompt's end.
      sees: bool [M, M], whether a node is another's ancestor, or itself.
      parents, targets: int32 [E], of each edge: the node that it leaves, and the token it leads to.
      paths: bool [C, E], the edges of each label.
    """

    tokens: np.ndarray
    depths: np.ndarray
    sees: np.ndarray
    parents: np.ndarray
    targets: np.ndarray
    paths: Any

    @classmethod
    def of(cls, labels: Sequence[Sequence[int]]) -> _Tree:
        inner = {tuple(x[:k]) for x in labels for k in range(1, len(x))}
        nodes = {prefix: k for k, prefix in enumerate([(), *sorted(inner)])}
        edges = sorted({tuple(x[:k]) for x in labels for k in range(1, len(x) + 1)})
        edge_at = {prefix: k for k, prefix in enumerate(edges)}
        sees = np.zeros((len(nodes), len(nodes)), bool)
        for prefix, k in nodes.items():
            sees[k, [nodes[prefix[:n]] for n in range(len(prefix) + 1)]] = True
        paths = np.zeros((len(labels), len(edges)), bool)
        for k, label in enumerate(labels):
            paths[k, [edge_at[tuple(label[: n + 1])] for n in range(len(label))]] = True
        return cls(
            tokens=np.array([prefix[-1] if prefix else 0 for prefix in nodes], np.int32),
            depths=np.array([len(prefix) for prefix in nodes], np.int32),
            sees=sees,
            parents=np.array([nodes[prefix[:-1]] for prefix in edges], np.int32),
            targets=np.array([prefix[-1] for prefix in edges], np.int32),
            paths=paths,
        )


def label_likelihoods(
    model: Decoder,
    base: Any,
    adapters: Any,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    rows: int,
) -> np.ndarray:
    """How probable each label is after each prompt.

    A prompt is run once, into the decoder's cache, and its labels once behind it, all at the same
    time and their common beginnings together.

    Args:
      model: an `lj.models` decoder.
      base: its parameters, 4-bit or not.
      adapters: those of `base`, or None.
      prompts: N lists of tokens, none of them empty.
      labels: C lists of tokens, none of them empty.
      rows: prompts to run at once.

    Returns:
      float64 [N, C], the sum over each label's tokens of their log-probabilities, in nats.

    Raises:
      ValueError: if a prompt or a label is empty, or there is none.
    """
    for name, sequences in (("prompts", prompts), ("labels", labels)):
        if not len(sequences) or not all(len(x) for x in sequences):
            raise ValueError(f"{name} hold {len(sequences)} lists, expected some, none empty")
    tree = _Tree.of(labels)
    result = np.empty((len(prompts), len(labels)))
    # By length, so that little is padding.
    order = sorted(range(len(prompts)), key=lambda k: -len(prompts[k]))
    for start in range(0, len(order), rows):
        block = order[start : start + rows]
        length = -(-len(prompts[block[0]]) // PROMPT_STEP) * PROMPT_STEP
        tokens, lengths = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
        for row, k in enumerate(block):
            tokens[row, : len(prompts[k])] = prompts[k]
            lengths[row] = len(prompts[k])
        edges = _edge_scores(model, base, adapters, tokens, lengths, tree._replace(paths=None))
        scores = np.asarray(edges, np.float64) @ tree.paths.T  # [B, E] -> [B, C]
        result[block] = scores[: len(block)]
    return result


@functools.partial(jax.jit, static_argnames="model")
def _edge_scores(
    model: Decoder, base: Any, adapters: Any, tokens: jax.Array, lengths: jax.Array, tree: _Tree
) -> jax.Array:
    """Log-probability of each edge after each prompt, float32 [B, E]."""
    from lora_jax.models.decoder import init_cache

    (rows, length), nodes = tokens.shape, len(tree.tokens)

    def forward(params: Any, tokens: jax.Array, lengths: jax.Array, tree: _Tree) -> jax.Array:
        run: Any = functools.partial(model.apply, {"params": params})
        cache = init_cache(model.config, rows, length + nodes - 1)
        filled = (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)  # [B, P]
        hidden, cache = run(tokens, cache, None, filled, method="extend")
        ends = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)  # [B, 1, D]
        if nodes > 1:
            own = jnp.broadcast_to(tree.sees[1:, 1:], (rows, nodes - 1, nodes - 1))
            prompt = jnp.broadcast_to(filled[:, None] > 0, (rows, nodes - 1, length))
            hidden, _ = run(
                jnp.broadcast_to(tree.tokens[1:], (rows, nodes - 1)),
                cache,
                lengths[:, None] - 1 + tree.depths[1:],
                mask=jnp.concatenate([prompt, own], axis=-1),  # [B, M - 1, S]
                method="extend",
            )
            ends = jnp.concatenate([ends, hidden], axis=1)
        return _scores_at(ends, tree, functools.partial(run, method="unembed"))

    return adapt(forward)(combine(base, adapters), tokens, lengths, tree)


def _scores_at(hidden: jax.Array, tree: _Tree, unembed: Any) -> jax.Array:
    """Log-probability of each edge, from the hidden states of the nodes [B, M, D]."""
    rows, nodes, width = hidden.shape
    per_row = max(1, min(nodes, CHUNK // rows))
    number = -(-nodes // per_row)
    padded = jnp.pad(hidden, ((0, 0), (0, number * per_row - nodes), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(rows, number, per_row, width), 1, 0)

    def body(scores: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden, start = chunk
        log_probabilities = jax.nn.log_softmax(unembed(hidden), axis=-1)  # [B, per_row, V]
        place = tree.parents - start
        inside = (place >= 0) & (place < per_row)  # [E]
        chosen = log_probabilities[:, jnp.clip(place, 0, per_row - 1), tree.targets]  # [B, E]
        return jnp.where(inside, chosen, scores), None

    scores = jnp.zeros((rows, len(tree.parents)), jnp.float32)
    starts = jnp.arange(number) * per_row
    return jax.lax.scan(body, scores, (chunks, starts))[0]
