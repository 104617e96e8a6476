"""One decoder-only transformer, as an ordinary Flax module, described whole by its config.

The architecture is that of Llama (Touvron et al., 2023): RMSNorm before each block, rotary
positions, grouped-query attention, a SwiGLU MLP, no biases. Kernels are plain matrices `[in, out]`,
each met only by a contraction; those of scanned layers are stacked::

    embed/embedding                                   [V, D]
    layers/attn_norm/scale   layers/mlp_norm/scale    [L, D]
    layers/attn/q_proj/kernel                         [L, D, N * H]
    layers/attn/{k,v}_proj/kernel                     [L, D, K * H]
    layers/attn/o_proj/kernel                         [L, N * H, D]
    layers/mlp/{gate,up}_proj/kernel                  [L, D, F]
    layers/mlp/down_proj/kernel                       [L, F, D]
    final_norm/scale                                  [D]
    lm_head/kernel                                    [D, V], absent if the head is tied

What other families add to it is there if the config asks for it::

    layers/attn/q_proj/bias                           [L, N * H], for each projection in `biases`
    layers/attn/{q,k}_norm/scale                      [L, H], with `qk_norm`
    layers/{attn,mlp}_post_norm/scale                 [L, D], with `post_norms`

and with `num_experts` there is, in place of the three kernels of the MLP::

    layers/mlp/router/kernel                          [L, D, E]
    layers/mlp/experts/{gate,up}_proj/kernel          [L, E, D, F]
    layers/mlp/experts/down_proj/kernel               [L, E, F, D]

Unrolled layers lose the leading axis and are called `layers_0`, `layers_1`, and so on.

Shapes: B batch, T tokens, S slots of the cache, D model width, F MLP width, N query heads,
K key-value heads, H head width, L layers, E experts, V vocabulary.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.core.products import float32_product
from lora_jax.core.rules import first_matches
from lora_jax.core.tree import named_leaves
from lora_jax.models import remat
from lora_jax.models.attention import (
    Carry,
    Context,
    KVCache,
    init_cache,
    rotary,
    visible,
    within,
)
from lora_jax.models.config import AttentionKind, DecoderConfig
from lora_jax.models.layers import Layer, Step
from lora_jax.models.parts import RMSNorm, capped

__all__ = [
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "by_layout",
    "init_cache",
    "parameter_shapes",
    "stack_layers",
    "unstack_layers",
]

_MATRICES = {"kernel": "i o", "embedding": "o i"}  # their layouts, whatever axes come before


class Decoder(nn.Module):
    """Tokens to logits.

    A token attends to the tokens of its own segment whose position is not after its own, nor, in
    layers with a window, too far before it. So packed sequences have a segment id each, and padding
    has one of its own; no token id means anything to the model.

    >>> logits = Decoder(config).apply({"params": params}, tokens)
    """

    config: DecoderConfig

    def setup(self) -> None:
        """Names the parts; the tree of parameters is shown at the top of this file."""
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.dim, dtype=c.dtype, param_dtype=c.param_dtype)
        layer = Layer
        if c.remat is not None:
            # Under scan the loop itself keeps XLA from merging the second forward with the first.
            layer = nn.remat(
                Layer,
                policy=remat.policy(c.remat),
                prevent_cse=not c.scan_layers,
            )
        if c.scan_layers:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=c.num_layers,
            )
            self.layers: Any = stack(c)
        else:
            self.layers = [layer(c) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c)
        if not c.tied_head:
            self.lm_head = nn.Dense(
                c.vocab_size,
                use_bias=False,
                dtype=c.dtype,
                param_dtype=c.param_dtype,
                dot_general=lambda x, kernel, *_, **__: float32_product(x, kernel),
            )

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of every position.

        Args:
          tokens: Integers [B, T].
          positions: Integers [B, T]; by default 0, 1, ... in every row.
          segment_ids: Integers [B, T]; by default every row is one segment, of id 1.

        Returns:
          float32 [B, T, V].
        """
        return self.unembed(self.hidden(tokens, positions, segment_ids))

    def embeddings(self, tokens: jax.Array) -> jax.Array:
        """What the first layer is given of tokens [B, T]: [B, T, D], in the activations' dtype."""
        x, scale = self.embed(tokens), self.config.embedding_scale
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        embeddings: jax.Array | None = None,
    ) -> jax.Array:
        """Normed hidden states, of which `unembed` makes the logits.

        A loss on few positions takes the logits of those alone.

        Args:
          tokens: Integers [B, T].
          positions: As in `__call__`.
          segment_ids: As in `__call__`.
          embeddings: [B, T, D], to be read in place of the tokens' own; made of those by a method
            that adds noise to them, or learned.

        Returns:
          [B, T, D].

        Raises:
          ValueError: If the embeddings are not one for each token.
        """
        if embeddings is None:
            embeddings = self.embeddings(tokens)
        elif embeddings.shape != (expected := (*tokens.shape, self.config.dim)):
            raise ValueError(
                f"embeddings are {embeddings.shape} for tokens {tokens.shape}; "
                f"expected {expected}, one of width {self.config.dim} for each token."
            )
        mask = None  # tells the attention kernel that the mask is no other than the causal one
        if positions is not None or segment_ids is not None:
            positions, segment_ids = _ids(tokens, positions, segment_ids)
            mask = visible(positions, segment_ids, positions, segment_ids)
        else:
            positions = jnp.arange(tokens.shape[1])[None]
            if self.config.window is not None and self.config.window < tokens.shape[1]:
                ones = jnp.ones_like(positions)
                mask = visible(positions, ones, positions, ones)
        contexts = self._contexts(positions, mask, positions)
        return self._run(Carry(embeddings.astype(self.config.dtype), None), contexts).x

    def unembed(self, hidden: jax.Array, among: jax.Array | None = None) -> jax.Array:
        """Logits of hidden states.

        Args:
          hidden: [..., D].
          among: Integers [N], the tokens whose logits are wanted: no others are taken.

        Returns:
          float32 [..., V], or [..., N].
        """
        c = self.config
        if c.tied_head:
            rows = self.embed.embedding if among is None else self.embed.embedding[among]
            logits = float32_product(hidden, rows.astype(c.dtype).T)
        elif among is None:
            logits = self.lm_head(hidden)
        else:
            columns = self.lm_head.variables["params"]["kernel"][:, among]
            logits = float32_product(hidden, columns.astype(c.dtype))
        return capped(logits, c.logit_cap)

    def extend(
        self,
        tokens: jax.Array,
        cache: KVCache,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states of tokens that follow those in the cache: a prompt, or one token a step.

        Args:
          tokens: Integers [B, T].
          cache: From `init_cache` or an earlier call. The caller sees to it that T free slots are
            left: `cache.length` is traced, so that an overflow cannot be reported from here.
          positions: Integers [B, T]; by default they count on from `cache.length`.
          segment_ids: Integers [B, T]; by default all 1.
          mask: Booleans [B, T, S], the slots that each token sees, these tokens' own among them; by
            default those of its segment that are not later. So a tree of tokens, several
            continuations of one prompt, can be read at once. Layers with a window see less, by
            the positions.

        Returns:
          The hidden states [B, T, D], and the cache with these tokens in it.

        Raises:
          ValueError: If T alone is more than the cache holds, or the mask is of another shape.
        """
        batch, length = tokens.shape
        slots = cache.positions.shape[1]
        if length > slots:
            raise ValueError(
                f"{length} tokens do not fit into a cache of {slots} slots; "
                f"write init_cache(config, {batch}, length) with length >= {length}."
            )
        if mask is not None and mask.shape != (batch, length, slots):
            raise ValueError(
                f"the mask is {mask.shape}; expected {(batch, length, slots)}, "
                "a boolean for each token and slot of the cache."
            )
        if positions is None:
            positions = cache.length + jnp.arange(length)
        positions, segment_ids = _ids(tokens, positions, segment_ids)
        corner = (0, cache.length)
        cache = cache._replace(
            positions=jax.lax.dynamic_update_slice(cache.positions, positions, corner),
            segment_ids=jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, corner),
        )
        if mask is None:
            mask = visible(positions, segment_ids, cache.positions, cache.segment_ids)
        else:
            mask = mask[:, None]  # the same for all heads
        contexts = self._contexts(positions, mask, cache.positions)
        x, filled = self._run(Carry(self.embeddings(tokens), cache), contexts)
        assert filled is not None  # a cache went in
        return x, filled._replace(length=cache.length + length)

    def _contexts(
        self, positions: jax.Array, mask: jax.Array | None, key_positions: jax.Array
    ) -> dict[AttentionKind, Context]:
        """What the layers of each kind share; no mask says that the windows hide nothing."""

        def context(kind: AttentionKind) -> Context:
            seen = mask
            if seen is not None and kind.window is not None:
                seen = seen & within(kind.window, positions, key_positions)
            return Context(*rotary(positions, self.config, kind), seen)

        return {kind: context(kind) for kind in dict.fromkeys(self.config.attention_kinds)}

    def _run(self, carry: Carry, contexts: dict[AttentionKind, Context]) -> Carry:
        kinds = self.config.attention_kinds
        if not self.config.scan_layers:
            for index, layer in enumerate(self.layers):
                carry, _ = layer(carry, Step(index), contexts[kinds[index]])
        else:
            step, (context, *others) = Step(jnp.arange(len(kinds))), contexts.values()
            if others:
                # A scan has one program for all layers: each takes from a stack what is for it.
                of_kind = list(contexts)
                step = step._replace(kind=jnp.asarray([of_kind.index(kind) for kind in kinds]))
                context = jax.tree.map(lambda *each: jnp.stack(each), context, *others)
            carry, _ = self.layers(carry, step, context)
        return carry._replace(x=self.final_norm(carry.x))


def _ids(
    tokens: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Positions and segment ids, int32 [B, T], with the defaults for what was not given."""
    positions = jnp.arange(tokens.shape[1]) if positions is None else positions
    segment_ids = jnp.ones(()) if segment_ids is None else segment_ids
    return (
        jnp.broadcast_to(positions.astype(jnp.int32), tokens.shape),
        jnp.broadcast_to(segment_ids.astype(jnp.int32), tokens.shape),
    )


def parameter_shapes(config: DecoderConfig) -> dict[str, Any]:
    """The tree of parameters, a `jax.ShapeDtypeStruct` for each; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]


def by_layout(pattern: str, params: Any) -> dict[str, str]:
    """What a pattern matches, by layout: layers' kernels have one layout, their experts' another.

    Kernels are matrices [in, out], and whatever axes they have before counts layers and experts.
    Rows of the embedding are what it produces, and stay together: "o i".

    >>> patterns = by_layout("layers/.*_proj/kernel", params)
    >>> rules = [LoraRule(pattern, layout=layout) for layout, pattern in patterns.items()]

    Args:
      pattern: A regular expression searched in the paths of the parameters.
      params: A decoder's parameters, dense or quantized, or their shapes.

    Returns:
      For each layout a pattern of the leaves that have it: the given one, if it is the only layout.

    Raises:
      ValueError: If the pattern matches nothing, or a leaf that is no matrix.
    """
    axes = {path: len(leaf.shape) for path, leaf in named_leaves(params)}
    found: dict[str, list[str]] = {}
    for path in first_matches([pattern], list(axes)):
        name = path.rpartition("/")[2]
        if name not in _MATRICES:
            raise ValueError(
                f"the pattern {pattern!r} matches {path}, which is no matrix and can be neither "
                "adapted nor quantized; write one that matches kernels alone, and train norms and "
                "biases whole"
            )
        found.setdefault("b " * (axes[path] - 2) + _MATRICES[name], []).append(path)
    if len(found) == 1:
        return dict.fromkeys(found, pattern)
    return {layout: f"^({'|'.join(paths)})$" for layout, paths in found.items()}


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the scanned decoder from those of the unrolled one.

    Args:
      params: A tree with `layers_0` ... `layers_{L-1}`.

    Returns:
      The tree with `layers`, whose leaves have a leading axis of L.

    Raises:
      ValueError: If there are no such layers, or there is a gap between them.
    """
    rest = {name: leaf for name, leaf in params.items() if not re.fullmatch(r"layers_\d+", name)}
    names = [f"layers_{index}" for index in range(len(params) - len(rest))]
    if not names or any(name not in params for name in names):
        raise ValueError(
            f"expected layers_0, layers_1, ... without a gap, got {sorted(params)}; "
            "write the parameters of a decoder with scan_layers=False."
        )
    layers = [params[name] for name in names]
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the unrolled decoder from those of the scanned one; undoes `stack_layers`.

    Args:
      params: A tree with `layers`, whose leaves have a leading axis of L.

    Returns:
      The tree with `layers_0` ... `layers_{L-1}`.

    Raises:
      ValueError: If there is no `layers`.
    """
    if "layers" not in params:
        raise ValueError(
            f"expected a tree with 'layers', got {sorted(params)}; "
            "write the parameters of a decoder with scan_layers=True."
        )
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    number = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = {
        f"layers_{i}": jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(number)
    }
    return {**rest, **layers}
