"""A tokenizer whose tokens are the bytes of a text, and the special ones that a test names."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def byte_tokenizer(*special: str) -> Tokenizer:
    """Ids 0 to 255 are bytes, in an order of their own; the special tokens follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: id for id, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return tokenizer


def text_of(tokenizer: Tokenizer, tokens) -> str:
    """What tokens say, special ones included."""
    return tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)


def learned_text(tokenizer: Tokenizer, encoded) -> str:
    """What of a sequence is learned."""
    return text_of(tokenizer, encoded.tokens[encoded.weights > 0])
