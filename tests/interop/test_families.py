"""Folders of every family that transformers wrote: its logits, and ours."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from family_cases import CASES, TOKENS, WINDOW
from transformers import AutoConfig, AutoModelForCausalLM

from lora_jax.formats import read_model
from lora_jax.generate import generate
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder, init_cache

TOLERANCE = 1e-4  # float32; the logits reach 8
LENGTH = TOKENS.shape[1]
PADDING = 6  # more than the window


def build(case: str, *, tied: bool):
    """Their model, with weights that are random everywhere, where it would begin with ones, too."""
    fields = CASES[case] | {"tie_word_embeddings": tied}
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(noise, alpha=0.2)
            else:
                parameter.copy_(noise * 0.3)
    return model.eval()


@pytest.fixture(
    scope="module",
    params=[(case, tied) for case in CASES for tied in (True, False)],
    ids=lambda param: f"{param[0]}, {'tied' if param[1] else 'untied'}",
)
def written(request, tmp_path_factory):
    """A model, and the folder that transformers saved it in."""
    case, tied = request.param
    folder = tmp_path_factory.mktemp("model")
    model = build(case, tied=tied)
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return model, folder


def theirs(model, tokens, mask=None, positions=None):
    options = {"attention_mask": mask, "position_ids": positions}
    given = {name: torch.from_numpy(x) for name, x in options.items() if x is not None}
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens), **given).logits.numpy()


@pytest.fixture(scope="module")
def ours(written):
    """Their model, read: scanned if its head is tied, unrolled if not."""
    model, folder = written
    checkpoint = read_model(folder, scan_layers=model.config.tie_word_embeddings)
    apply = compiled(Decoder(checkpoint.config))
    return checkpoint.config, functools.partial(apply, {"params": checkpoint.params})


def compiled(decoder):
    """`decoder.apply`, compiled in half of the time: a program here runs once."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(decoder.apply, static_argnames="method", compiler_options=options)


def test_logits(written, ours):
    expected = theirs(written[0], TOKENS)
    assert np.abs(ours[1](TOKENS) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_rows(written, ours, side):
    mask = np.ones_like(TOKENS)
    mask[1, slice(PADDING) if side == "left" else slice(-PADDING, None)] = 0
    positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)
    expected = theirs(written[0], TOKENS, mask, positions)
    logits = np.asarray(ours[1](TOKENS, positions, mask))
    assert np.abs(logits - expected)[mask == 1].max() <= TOLERANCE


def test_logits_of_later_positions(written, ours):
    positions = np.broadcast_to(np.arange(LENGTH) + 40, TOKENS.shape).copy()
    expected = theirs(written[0], TOKENS, positions=positions)
    assert np.abs(ours[1](TOKENS, positions) - expected).max() <= TOLERANCE


def test_decoding_token_by_token(written, ours):
    """A prompt of one row padded in front, and then more tokens than a window holds."""
    mask = np.ones_like(TOKENS)
    mask[1, :2] = 0
    positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)
    expected = theirs(written[0], TOKENS, mask, positions)
    (config, apply), prompt = ours, 6
    assert LENGTH - prompt > WINDOW
    cache, hidden = init_cache(config, batch=2, length=LENGTH), []
    for part in (slice(prompt), *(slice(k, k + 1) for k in range(prompt, LENGTH))):
        arguments = TOKENS[:, part], cache, positions[:, part], mask[:, part]
        states, cache = apply(*arguments, method="extend")
        hidden.append(states)
    logits = np.asarray(apply(np.concatenate(hidden, axis=1), method="unembed"))
    assert np.abs(logits - expected)[mask == 1].max() <= TOLERANCE


@pytest.mark.parametrize("case", ["mistral", "gemma3_text", "qwen3_moe"])
def test_greedy_continuations(tmp_path, case):
    """Prompts of unequal lengths in one batch: the same words, from caches of either kind."""
    model = build(case, tied=False)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    checkpoint = read_model(tmp_path)
    prompts, width, new = [TOKENS[0, :3].tolist(), TOKENS[1].tolist()], LENGTH, 12
    tokens = np.zeros((2, width), int)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(
        torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask), **options
    )
    decoder = Decoder(checkpoint.config)
    found = generate(decoder, checkpoint.params, None, prompts, max_tokens=new)
    assert found == output[:, width:].tolist()
    assert len(set(found[0])) > 3


@pytest.mark.parametrize("case", CASES)
def test_no_field_is_without_effect(tmp_path, case):
    """Left at its default, each field that a family changes would be seen in the logits."""
    model = build(case, tied=True)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    checkpoint = read_model(tmp_path)
    config, params = checkpoint.config, checkpoint.params
    expected = theirs(model, TOKENS)
    shape = {"vocab_size", "dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim"}
    changed = {
        field.name: field.default
        for field in dataclasses.fields(DecoderConfig)
        if field.name not in {*shape, "tied_head", "num_experts", "experts_per_token"}
        and getattr(config, field.name) != field.default
    }
    if config.window is not None:  # the two go together
        changed["windowed_layers"] = {"windowed_layers": (), "window": None}
        del changed["window"]
    for name, default in changed.items():
        changes = default if isinstance(default, dict) else {name: default}
        other = Decoder(dataclasses.replace(config, **changes))
        difference = np.abs(compiled(other)({"params": params}, TOKENS) - expected).max()
        assert difference > 10 * TOLERANCE, name
