"""Model folders that transformers wrote: the same logits and the same words as its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hf_folder import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_jax.formats import read_model
from lora_jax.generate import generate
from lora_jax.models.decoder import Decoder

PADDING = 0
PROMPTS = [[5], [17, 3, 95, 8], [40] * 11, list(range(90, 20, -1))]


def build(*, tied: bool, kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # so that the likeliest token is likelier by more than rounding
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=PADDING,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(
    scope="module",
    params=[(False, 6, "5GB"), (True, 2, "5GB"), (False, 3, "60KB")],
    ids=["whole", "tied, grouped", "sharded"],
)
def written(request, tmp_path_factory):
    """A random model, and the folder that transformers saved it in."""
    tied, kv_heads, shard = request.param
    folder = tmp_path_factory.mktemp("model")
    model = build(tied=tied, kv_heads=kv_heads)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(adds_bos=True),
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ messages[0]['content'] }}",
    )
    tokenizer.save_pretrained(folder)
    parts = len(list(folder.glob("*.safetensors")))
    assert parts == 1 if shard == "5GB" else parts > 2
    return model, folder


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_logits(written, scan_layers):
    model, folder = written
    checkpoint = read_model(folder, scan_layers=scan_layers)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 40))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    logits = Decoder(checkpoint.config).apply({"params": checkpoint.params}, tokens)
    assert np.abs(logits - expected).max() <= 1e-4


def test_what_is_said_beside_the_weights(written):
    checkpoint = read_model(written[1])
    assert checkpoint.special == (0, 1)
    assert checkpoint.stop == (1,)
    assert checkpoint.chat_template == "{{ messages[0]['content'] }}"
    assert checkpoint.tokenizer.encode("w0 w1", add_special_tokens=False).ids == [3, 4]


def test_weights_in_half_precision(tmp_path, written):
    model, folder = written
    half = build(tied=model.config.tie_word_embeddings, kv_heads=model.config.num_key_value_heads)
    half.to(torch.bfloat16).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    kernel = read_model(tmp_path).params["layers"]["mlp"]["down_proj"]["kernel"][1]
    theirs = half.model.layers[1].mlp.down_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(kernel, theirs.T)


@pytest.mark.parametrize("rows", [None, 3])
def test_greedy_continuations(written, rows):
    """A padded batch here, and there: the same words."""
    model, folder = written
    width = max(map(len, PROMPTS))
    tokens = np.full((len(PROMPTS), width), PADDING)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    output = model.generate(
        torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=[1, 7],
        pad_token_id=PADDING,
    ).numpy()[:, width:]
    checkpoint = read_model(folder)
    found = generate(
        Decoder(checkpoint.config),
        checkpoint.params,
        None,
        PROMPTS,
        max_tokens=32,
        eos=[1, 7],
        rows=rows,
    )
    assert len({token for row in found for token in row}) > 8
    for ours, theirs in zip(found, output.tolist(), strict=True):
        assert ours == theirs[: len(ours)]
        assert ours[-1] in (1, 7) or len(ours) == 32
        assert all(token == PADDING for token in theirs[len(ours) :])
