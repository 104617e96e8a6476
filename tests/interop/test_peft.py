"""What is written here, peft loads into transformers' model: the same logits from both."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch
from flax import traverse_util
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import lora_jax as lj
from lora_jax.formats.peft import write_peft
from lora_jax.models.decoder import Decoder, stack_layers
from lora_jax.models.families import from_hf

# peft 0.21.2 asks transformers 5.23 for a name that the latter has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

TOLERANCE = 1e-4  # float32; the logits reach 3
NAMES = {
    "self_attn": "attn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
}


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def parameters(model):
    """Their parameters in the tree of the unrolled decoder."""
    flat = {}
    for name, value in model.state_dict().items():
        value = value.numpy()
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        if parts[0] == "layers":
            parts = [f"layers_{parts[1]}", *(NAMES.get(part, part) for part in parts[2:])]
        path = {"embed_tokens": "embed", "norm": "final_norm"}.get(parts[0], "/".join(parts))
        kind = "embedding" if path == "embed" else "scale" if value.ndim == 1 else "kernel"
        flat[f"{path}/{kind}"] = value.T if kind == "kernel" else value
    return traverse_util.unflatten_dict(flat, sep="/")


RULES = {
    "attention": ([lj.LoraRule("attn/.*/kernel", 4, 8.0)], ()),
    "ranks": ([lj.LoraRule("q_proj", 2, 5.0), lj.LoraRule("layers.*kernel", 4, 6.0)], ()),
    "rslora": ([lj.LoraRule("layers.*kernel", 3, 2.0, rslora=True)], ()),
    "whole": ([lj.LoraRule("mlp/.*/kernel", 4, 8.0)], ("norm", "lm_head")),
}


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("variant", RULES)
def test_peft_gives_the_same_logits(tmp_path, theirs, variant, scan_layers):
    config = dataclasses.replace(from_hf(theirs.config.to_dict()), scan_layers=scan_layers)
    base = parameters(theirs)
    base = stack_layers(base) if scan_layers else base
    rules, train = RULES[variant]
    if scan_layers:
        rules = [dataclasses.replace(rule, layout="b i o") for rule in rules]
    adapters = lj.init_adapters(jax.random.key(0), base, rules, train=train)
    keys = iter(jax.random.split(jax.random.key(1), 200))
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), adapters)
    write_peft(tmp_path, adapters, base_model="tiny")

    tokens = np.random.default_rng(0).integers(0, 97, (2, 17))
    apply = lj.adapt(Decoder(config).apply)
    ours = np.asarray(apply({"params": lj.combine(base, adapters)}, tokens))
    with torch.no_grad():
        plain = theirs(torch.from_numpy(tokens)).logits.numpy()
        loaded = PeftModel.from_pretrained(theirs, tmp_path).eval()
        expected = loaded(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(expected - plain).max() > 0.1  # the adapter does something
    assert np.abs(ours - expected).max() <= TOLERANCE
