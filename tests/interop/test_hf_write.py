"""Model folders that are written here: transformers loads them and says the same."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from family_cases import CASES, GOLDEN_FILE, TOKENS, write_family
from hf_folder import build_tokenizer
from tiny_model import TOKENS as CHARACTERS
from tiny_model import write_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import lora_jax as lj
from lora_jax.data import Chat, Record
from lora_jax.formats import SpecialTokens, read_model
from lora_jax.formats.hf_write import write_hf
from lora_jax.models.decoder import Decoder

GOLDEN = np.load(GOLDEN_FILE)
TOLERANCE = 1e-4  # float32; the logits reach 5
TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)
TEXTS = ["", "ab c!! d", "a<|endoftext|>b", " <|endoftext|><|endoftext|>\n!!!"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder that transformers wrote."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    folder = tmp_path_factory.mktemp("theirs")
    LlamaForCausalLM(config).eval().save_pretrained(folder, max_shard_size="100KB")
    PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(adds_bos=True),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="w3",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def logits_of(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def ours(config, params, tokens):
    return np.asarray(lj.adapt(Decoder(config).apply)({"params": params}, tokens))


def test_a_folder_of_theirs_comes_back(theirs, tmp_path):
    checkpoint = read_model(theirs)
    write_hf(tmp_path / "out", checkpoint, shard_size=100_000)
    before, after = (AutoModelForCausalLM.from_pretrained(x) for x in (theirs, tmp_path / "out"))
    assert before.config.to_dict() | {"_name_or_path": ""} == after.config.to_dict() | {
        "_name_or_path": ""
    }
    assert before.generation_config.to_dict() == after.generation_config.to_dict()
    states = before.state_dict(), after.state_dict()
    assert set(states[0]) == set(states[1])
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    tokenizers = [AutoTokenizer.from_pretrained(x) for x in (theirs, tmp_path / "out")]
    assert tokenizers[0].special_tokens_map == tokenizers[1].special_tokens_map
    messages = [{"role": "user", "content": "w1 w2"}]
    assert len({x.apply_chat_template(messages, tokenize=False) for x in tokenizers}) == 1
    tokens = np.random.default_rng(0).integers(0, 96, (2, 40))
    found = logits_of(tmp_path / "out", tokens)
    assert np.abs(ours(checkpoint.config, checkpoint.params, tokens) - found).max() <= TOLERANCE


@pytest.mark.parametrize("case", ["llama", "qwen2, no window", "gemma3_text", "qwen3_moe"])
def test_every_family(tmp_path, case):
    source = write_family(tmp_path / "source", CASES[case])
    write_hf(tmp_path / "out", read_model(source))
    found = logits_of(tmp_path / "out", TOKENS)
    assert np.abs(found - GOLDEN[f"{case}/logits"]).max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_merged_adapters(theirs, tmp_path, scan_layers, dtype):
    checkpoint = read_model(theirs, scan_layers=scan_layers)
    layout = "b i o" if scan_layers else "i o"
    # Only o_proj has rows of whole blocks: 96 = 3 * 32.
    base = lj.quantize(checkpoint.params, "layers.*o_proj", block_size=32, layout=layout)
    rules = [lj.LoraRule("layers.*(q|v|o|gate)_proj", rank=4, alpha=8.0, layout=layout)]
    adapters = lj.init_adapters(jax.random.key(0), base, rules, train=("norm", "lm_head"))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), adapters
    )
    quantized = dataclasses.replace(checkpoint, params=base)
    write_hf(tmp_path, quantized, adapters, dtype=dtype)
    tokens = rng.integers(0, 96, (2, 17))
    found = logits_of(tmp_path, tokens)
    plain, adapted = (
        ours(checkpoint.config, tree, tokens) for tree in (base, lj.combine(base, adapters))
    )
    assert np.abs(adapted - plain).max() > 0.1  # the adapter does something
    assert np.abs(found - adapted).max() <= (TOLERANCE if dtype == jnp.float32 else 0.3)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == np.dtype(dtype).name


@pytest.mark.parametrize("bos", [None, CHARACTERS.index("%")], ids=["without bos", "with bos"])
def test_a_model_of_one_file(tmp_path, bos):
    checkpoint = read_model(write_model(tmp_path / "model.gguf", template=TEMPLATE))
    checkpoint = dataclasses.replace(checkpoint, special=SpecialTokens(bos, 0))
    write_hf(tmp_path / "out", checkpoint)
    tokens = np.random.default_rng(0).integers(0, len(CHARACTERS), (2, 40))
    found = logits_of(tmp_path / "out", tokens)
    assert np.abs(ours(checkpoint.config, checkpoint.params, tokens) - found).max() <= TOLERANCE

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    first = [] if bos is None else [bos]
    for text in TEXTS:
        ids = checkpoint.tokenizer.encode(text).ids
        assert tokenizer(text).input_ids == first + ids
        assert tokenizer.decode(ids) == checkpoint.tokenizer.decode(ids, skip_special_tokens=False)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (bos, 0)
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c!"}]
    prompt = [{"messages": messages}]
    [expected] = Chat(TEMPLATE).encode_prompts(
        [Record(prompt[0], "a.jsonl:1")], checkpoint.tokenizer, checkpoint.special
    )
    rendered = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert list(rendered["input_ids"]) == expected

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [0]
    assert model.config.bos_token_id == bos
    assert model.config.rope_parameters["rope_theta"] == checkpoint.config.rope_theta
