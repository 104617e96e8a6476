"""A small decoder, with weights of every kind, and packed batches for it."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import numpy as np
import reference

import lora_jax as lj
from lora_jax.data import Batch
from lora_jax.models.decoder import Decoder, DecoderConfig

VOCAB = 211  # no other size is a multiple of it
SHAPE = {
    "vocab_size": VOCAB,
    "dim": 32,
    "mlp_dim": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "rope_theta": 1000.0,
}


@functools.cache
def decoder(**options: Any) -> Decoder:
    return Decoder(DecoderConfig(**SHAPE, **options))


@functools.cache
def parameters(tied_head: bool) -> Any:
    tokens = np.zeros((1, 4), np.int32)
    return jax.jit(decoder(tied_head=tied_head).init)(jax.random.key(0), tokens)["params"]


def adapted(tied_head: bool, quantized: bool, dropout: float = 0.0) -> tuple[Any, Any]:
    """A base and adapters of everything that is multiplied, the head included."""
    base = parameters(tied_head)
    head, layout = ("embed", "o i") if tied_head else ("lm_head", "i o")
    layouts = {head: layout, "layers/attn/q_proj": "b i o"}
    if quantized:
        for pattern, layout in layouts.items():
            base = lj.quantize(base, pattern, layout=layout, block_size=32)
    rules = [
        lj.LoraRule(pattern, 3, 6.0, layout=None if quantized else layout, dropout=dropout)
        for pattern, layout in layouts.items()
    ]
    shapes = jax.eval_shape(lambda: lj.init_adapters(jax.random.key(1), base, rules))
    return base, reference.randomized(shapes, size=0.1)


def batch(rows: int = 4, length: int = 24, supervised: float = 0.4, seed: int = 0) -> Batch:
    """Rows of three sequences and some padding."""
    rng = np.random.default_rng(seed)
    positions, segment_ids = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        ends = [0, *sorted(rng.choice(np.arange(4, length - 2), 2, replace=False)), length - 1]
        for number, (start, end) in enumerate(itertools.pairwise(ends), 1):
            segment_ids[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
    tokens = rng.integers(1, VOCAB, (rows, length)).astype(np.int32)
    chosen = (rng.random((rows, length)) < supervised) & (positions > 0)
    weights = np.where(chosen, rng.choice([1.0, 0.5], (rows, length)), 0)
    return Batch(
        np.where(segment_ids > 0, tokens, 0), weights.astype(np.float32), positions, segment_ids
    )


def equations_in(jaxpr: Any) -> list[Any]:
    """All equations of a jaxpr, and of all that it calls."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += equations_in(inner)
    return found
