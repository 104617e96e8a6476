"""SmolLM2-135M-Instruct: our logits and transformers', each reading the same GGUF file."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_jax.formats.gguf import read_gguf
from lora_jax.formats.sources import fetch
from lora_jax.models.decoder import Decoder, init_cache
from lora_jax.models.families import from_hf

TOLERANCE = 1e-3  # float32; logits reach 40


@pytest.fixture(scope="module")
def path():
    return fetch("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def theirs(path):
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module", params=[True, False], ids=["scanned", "unrolled"])
def ours(request, path):
    return read_gguf(path, scan_layers=request.param)


@pytest.fixture(scope="module")
def tokens(ours):
    """Two rows of 96 tokens of natural text."""
    text = (
        "It was founded as a small trading post on the banks of the river, and it grew quickly "
        "because merchants from the north and the south met there to exchange grain and salt. "
    )
    ids = ours.tokenizer.encode(text * 6).ids[: 2 * 96]
    return np.reshape(ids, (2, 96))


def test_logits(theirs, ours, tokens):
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(tokens)).logits.numpy()
    logits = jax.jit(Decoder(ours.config).apply)({"params": ours.params}, tokens)
    assert np.abs(logits - expected).max() <= TOLERANCE


def test_logits_of_padded_rows(theirs, ours, tokens):
    mask = np.ones_like(tokens)
    mask[1, :31] = 0
    positions = (np.cumsum(mask, axis=1) - 1).clip(0)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
        ).logits.numpy()
    logits = jax.jit(Decoder(ours.config).apply)({"params": ours.params}, tokens, positions, mask)
    assert np.abs(np.asarray(logits) - expected)[mask == 1].max() <= TOLERANCE


def test_greedy_continuation(theirs, ours):
    prompt = np.asarray([ours.tokenizer.encode("The capital of France is").ids])
    expected = theirs.generate(torch.from_numpy(prompt), max_new_tokens=24, do_sample=False)[0]
    model, variables = Decoder(ours.config), {"params": ours.params}

    @jax.jit
    def step(variables, tokens, cache):
        hidden, cache = model.apply(variables, tokens, cache, method="extend")
        logits = model.apply(variables, hidden[:, -1], method="unembed")
        return jnp.argmax(logits, axis=-1)[:, None], cache

    cache = init_cache(ours.config, batch=1, length=64)
    token, cache = step(variables, prompt, cache)
    generated = [*prompt[0], int(token[0, 0])]
    while len(generated) < len(expected):
        token, cache = step(variables, token, cache)
        generated.append(int(token[0, 0]))
    assert generated == expected.tolist()
    assert ours.tokenizer.decode(generated).startswith("The capital of France is Paris.")


def test_config(theirs, ours):
    config = from_hf(theirs.config.to_dict())
    for name in ("vocab_size", "dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads"):
        assert getattr(config, name) == getattr(ours.config, name), name
    assert config.head_dim == ours.config.head_dim
    assert config.rope_theta == ours.config.rope_theta == 100_000.0
    assert config.norm_eps == pytest.approx(ours.config.norm_eps)
    assert config.tied_head
    assert ours.config.tied_head
