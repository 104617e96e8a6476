"""Writing on from prompts: greedily, or by drawing from the model's distribution.

A prompt is read once, which fills a cache of keys and values; then every step reads one token and
gives the next. `generate` does so for a batch of prompts, in one compiled loop; `stream` for one
prompt, handing out each token as it comes.

Shapes: B rows, T tokens of the longest prompt, S slots of the cache, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.adapt import adapt
from lora_jax.core.tree import combine
from lora_jax.models.decoder import Decoder, KVCache, init_cache

_SHORTEST = 64  # tokens, the least width of a batch of prompts


def generate(
    model: Decoder,
    base: Any,
    adapters: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    eos: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    rows: int | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Prompts of similar lengths, and the same `max_tokens`, share a compiled program. A step of few
    rows takes the time of reading every weight once, and a quantized weight is decoded at every
    step: on a CPU the merged base of SmolLM2-135M writes four times faster than its NF4 one.

    What a prompt is continued with depends on itself, the key and its place among the prompts, and
    on nothing else: not on its neighbours, nor on `rows`, up to the rounding of the logits.

    >>> prompt = checkpoint.tokenizer.encode("The capital of France is").ids
    >>> [answer] = generate(model, base, adapters, [prompt], max_tokens=8, eos=checkpoint.stop)
    >>> checkpoint.tokenizer.decode(answer)
    ' Paris.'

    Args:
      model: The decoder.
      base: Its parameters, quantized or not.
      adapters: Their adapters; None for the base alone.
      prompts: Token ids, at least one each.
      max_tokens: How many tokens to add to a prompt, at most.
      eos: Tokens that end a continuation; None to go on up to `max_tokens`.
      temperature: What logits are divided by before drawing; 0 takes the likeliest token always.
      top_p: Draws are from the smallest set of tokens that has this probability.
      key: Of the draws; needed unless the temperature is 0.
      rows: How many prompts to run at once; None for all. They are taken by length, so that little
        is padded.

    Returns:
      The continuation of each prompt, in their order. It ends with one of `eos`, unless it was cut
      at `max_tokens`.

    Raises:
      ValueError: If a prompt is empty or has a token that the model does not know, or an option is
        out of its range.
    """
    sampler = _Sampler.of(temperature, top_p, key)
    _check(model, prompts, max_tokens)
    if rows is not None and rows < 1:
        raise ValueError(f"rows is {rows}, expected at least 1, or None for all prompts at once.")
    rows = rows or max(1, len(prompts))
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), rows):
        group = order[start : start + rows]
        written, lengths = jax.device_get(
            _continue(
                model,
                base,
                adapters,
                _pad(prompts, group, rows),
                sampler,
                _stops(eos),
                max_tokens=max_tokens,
            )
        )
        for row, index in enumerate(group):
            found[index] = written[row, : lengths[row]].tolist()
    return found


def stream(
    model: Decoder,
    base: Any,
    adapters: Any,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    eos: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
) -> Iterator[int]:
    """Continues one prompt, a token at a time; the same tokens as `generate` gives it.

    Args:
      model: The decoder.
      base: Its parameters, quantized or not.
      adapters: Their adapters; None for the base alone.
      prompt: Token ids, at least one.
      max_tokens: How many tokens to add, at most.
      eos: As for `generate`.
      temperature: As for `generate`.
      top_p: As for `generate`.
      key: As for `generate`.

    Returns:
      The tokens, the one of `eos` included that ends them.

    Raises:
      ValueError: As `generate` does; at the call, not at the first token.
    """
    sampler = _Sampler.of(temperature, top_p, key)
    _check(model, [prompt], max_tokens)
    stops = set(_stops(eos).tolist())

    def tokens() -> Iterator[int]:
        cache, newest = _compiled_read_prompts(
            model, base, adapters, _pad([prompt], [0], 1), sampler, max_tokens=max_tokens
        )
        for number in range(1, max_tokens + 1):
            token = newest.token
            if number < max_tokens:
                # Sent off before this token is waited for: the device never waits for the host.
                cache, newest = _compiled_step(model, base, adapters, cache, newest, sampler)
            yield (value := int(token[0]))
            if value in stops:
                return

    return tokens()


def log_distribution(
    logits: jax.Array, temperature: float | jax.Array, top_p: float | jax.Array = 1.0
) -> jax.Array:
    """What tokens are drawn from: nucleus sampling (Holtzman et al., 2020) at a temperature.

    The nucleus is the smallest set of likeliest tokens whose probabilities, at this temperature,
    sum to `top_p`; of tokens that are equally likely, it has all or none.

    Args:
      logits: [..., V].
      temperature: What they are divided by, above 0.
      top_p: In (0, 1].

    Returns:
      Log-probabilities, float32 [..., V]; -inf outside the nucleus.
    """
    logits = logits.astype(jnp.float32)
    # The maximum goes first: a logit over a tiny temperature is no float.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    probabilities = jax.nn.softmax(logits)

    # Floats that are not negative are ordered as their bits are: the least probability within the
    # nucleus is found by bisection, in 31 sums: 0.8 ms on a CPU where sorting 49,152 takes 10 ms.
    def holds(bits: jax.Array) -> jax.Array:
        return probabilities >= jax.lax.bitcast_convert_type(bits, jnp.float32)[..., None]

    def bisect(step: jax.Array, least: jax.Array) -> jax.Array:
        higher = least | (1 << (30 - step))
        mass = jnp.sum(probabilities, axis=-1, where=holds(higher))
        return jnp.where(mass >= top_p, higher, least)

    least = jax.lax.fori_loop(0, 31, bisect, jnp.zeros(logits.shape[:-1], jnp.int32))
    least = jnp.where(top_p < 1, least, 0)  # rounded, a part may sum to 1
    return jax.nn.log_softmax(jnp.where(holds(least), logits, -jnp.inf))


class _Sampler(NamedTuple):
    """How a token is chosen; None for the likeliest always."""

    key: jax.Array
    temperature: jax.Array
    top_p: jax.Array

    @classmethod
    def of(cls, temperature: float, top_p: float, key: jax.Array | None) -> _Sampler | None:
        if not 0 <= temperature < float("inf"):
            raise ValueError(
                f"temperature is {temperature}, expected 0 for the likeliest token, or more."
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}, expected a probability above 0, and 1 at most.")
        if temperature == 0:
            return None
        if key is None:
            raise ValueError(
                f"temperature is {temperature} and key is None; write key=jax.random.key(seed), "
                "or temperature=0 for the likeliest tokens."
            )
        return cls(key, jnp.float32(temperature), jnp.float32(top_p))


class _Prompts(NamedTuple):
    """Prompts, padded in front: so the last token of each is in the last column.

    Attributes:
      tokens: int32 [B, T].
      lengths: int32 [B], 0 for a row that is there to fill the batch.
      place: int32 [B], that of each among all prompts.
    """

    tokens: jax.Array
    lengths: jax.Array
    place: jax.Array


class _Newest(NamedTuple):
    """The newest token of each row, chosen and not yet read.

    Attributes:
      token: int32 [B].
      position: int32 [B].
      prompt: int32 [B], the index of the prompt that the row continues.
      number: int32 [], how many tokens each row was given, these included.
    """

    token: jax.Array
    position: jax.Array
    prompt: jax.Array
    number: jax.Array


def _choose(
    sampler: _Sampler | None, logits: jax.Array, prompt: jax.Array, number: jax.Array
) -> jax.Array:
    """The next token, int32 [B], of logits [B, V]."""
    if sampler is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(row: jax.Array, prompt: jax.Array) -> jax.Array:
        # By the prompt's place and the token's, so that no neighbour has a say.
        key = jax.random.fold_in(jax.random.fold_in(sampler.key, prompt), number)
        return jax.random.categorical(key, row)

    logits = log_distribution(logits, sampler.temperature, sampler.top_p)
    return jax.vmap(draw)(logits, prompt).astype(jnp.int32)


def _read(
    model: Decoder, base: Any, adapters: Any, tokens: jax.Array, cache: KVCache, *where: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Logits [B, V] of what follows tokens [B, T], and the cache with these in it."""

    def last_logits(params: Any, *arguments: Any) -> Any:
        variables = {"params": params}
        hidden, cache = model.apply(variables, *arguments, method="extend")
        return model.apply(variables, hidden[:, -1], method="unembed"), cache

    return adapt(last_logits)(combine(base, adapters), tokens, cache, *where)


def _read_prompts(
    model: Decoder,
    base: Any,
    adapters: Any,
    prompts: _Prompts,
    sampler: _Sampler | None,
    *,
    max_tokens: int,
) -> tuple[KVCache, _Newest]:
    """Fills a cache, and chooses the first token of each row."""
    batch, width = prompts.tokens.shape
    # Padding sees padding alone, in a segment of its own; where it stands does not matter.
    positions = jnp.arange(width) - (width - prompts.lengths)[:, None]
    logits, cache = _read(
        model,
        base,
        adapters,
        prompts.tokens,
        init_cache(model.config, batch, width + max_tokens - 1),  # the last token is not read
        jnp.maximum(positions, 0),
        (positions >= 0).astype(jnp.int32),
    )
    number = jnp.zeros((), jnp.int32)
    token = _choose(sampler, logits, prompts.place, number)
    return cache, _Newest(token, prompts.lengths, prompts.place, number + 1)


def _step(
    model: Decoder,
    base: Any,
    adapters: Any,
    cache: KVCache,
    newest: _Newest,
    sampler: _Sampler | None,
) -> tuple[KVCache, _Newest]:
    """Reads the newest token of each row, and chooses the next."""
    token, position, prompt, number = newest
    logits, cache = _read(model, base, adapters, token[:, None], cache, position[:, None])
    token = _choose(sampler, logits, prompt, number)
    return cache, _Newest(token, position + 1, prompt, number + 1)


_compiled_read_prompts = jax.jit(_read_prompts, static_argnames=("model", "max_tokens"))
# The cache is donated: a step writes into it, and need not copy it.
_compiled_step = jax.jit(_step, static_argnames="model", donate_argnames="cache")


@functools.partial(jax.jit, static_argnames=("model", "max_tokens"))
def _continue(
    model: Decoder,
    base: Any,
    adapters: Any,
    prompts: _Prompts,
    sampler: _Sampler | None,
    stops: jax.Array,
    *,
    max_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """All of a batch: tokens int32 [B, max_tokens], and how many of them count, int32 [B]."""

    def ends(newest: _Newest) -> jax.Array:
        return (newest.token[:, None] == stops).any(axis=-1)

    def goes_on(carry: Any) -> jax.Array:
        _, newest, _, _, done = carry
        return (newest.number < max_tokens) & ~done.all()

    def go_on(carry: Any) -> Any:
        cache, newest, written, lengths, done = carry
        column = newest.number
        cache, newest = _step(model, base, adapters, cache, newest, sampler)
        written = jax.lax.dynamic_update_slice(written, newest.token[:, None], (0, column))
        return cache, newest, written, lengths + ~done, done | ends(newest)

    cache, newest = _read_prompts(model, base, adapters, prompts, sampler, max_tokens=max_tokens)
    written = jnp.zeros((len(newest.token), max_tokens), jnp.int32).at[:, 0].set(newest.token)
    lengths = jnp.ones_like(newest.token)
    done = ends(newest) | (prompts.lengths == 0)
    carry = cache, newest, written, lengths, done
    _, _, written, lengths, _ = jax.lax.while_loop(goes_on, go_on, carry)
    return written, lengths


def _pad(prompts: Sequence[Sequence[int]], indices: Sequence[int], rows: int) -> _Prompts:
    """The chosen prompts, and rows of padding where they do not fill the batch."""
    lengths = np.zeros(rows, np.int32)
    lengths[: len(indices)] = [len(prompts[index]) for index in indices]
    width = _width(int(lengths.max()))
    tokens = np.zeros((rows, width), np.int32)
    for row, index in enumerate(indices):
        tokens[row, width - lengths[row] :] = prompts[index]
    place = np.resize(np.asarray(indices, np.int32), rows)
    return _Prompts(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(place))


def _width(length: int) -> int:
    """What prompts are padded to: 64, 96, 128, 192, 256, ...

    So few, that a conversation which grows seldom asks for a new program, and that close, that a
    third at most is padding.
    """
    width = _SHORTEST
    while width < length:
        width = width * 3 // 2 if width.bit_count() == 1 else width * 4 // 3
    return width


def _stops(eos: int | Sequence[int] | None) -> jax.Array:
    return jnp.asarray([] if eos is None else eos, jnp.int32).reshape(-1)


def _check(model: Decoder, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected at least 1.")
    vocabulary = model.config.vocab_size
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"prompt {index} is empty; a model continues from a token, such as its bos."
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(
                f"prompt {index} has tokens from {min(prompt)} to {max(prompt)}; "
                f"the model knows 0 to {vocabulary - 1}."
            )
