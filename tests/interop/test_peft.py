"""What is written here, peft loads into transformers' model, and the other way: the same logits."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import traverse_util
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lora_jax as lj
from lora_jax.formats.peft import read_peft, write_peft
from lora_jax.models.decoder import Decoder, stack_layers
from lora_jax.models.families import from_hf

pytestmark = [
    # peft 0.21.2 asks transformers 5.23 for a name that the latter has deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    # What it says when it saves an embedding, whose adapter is tied or is not.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    # A key that looks as if it matched, and does not: patterns reach to the end of a name.
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning"),
]

TOLERANCE = 1e-4  # float32; the logits reach 3, and 9 with the start that peft gives tied adapters
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 17))
FILES = ("adapter_config.json", "adapter_model.safetensors")
NAMES = {
    "self_attn": "attn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
}
LAYERS = pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])


def build(*, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def parameters(model):
    """Their parameters in the tree of the unrolled decoder."""
    flat = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        value = value.numpy()
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        if parts[0] == "layers":
            parts = [f"layers_{parts[1]}", *(NAMES.get(part, part) for part in parts[2:])]
        path = {"embed_tokens": "embed", "norm": "final_norm"}.get(parts[0], "/".join(parts))
        kind = "embedding" if path == "embed" else "scale" if value.ndim == 1 else "kernel"
        flat[f"{path}/{kind}"] = value.T if kind == "kernel" else value
    return traverse_util.unflatten_dict(flat, sep="/")


def ours(model, scan_layers):
    """The same model here: a function of adapters to logits, and its parameters."""
    config = dataclasses.replace(from_hf(model.config.to_dict()), scan_layers=scan_layers)
    base = parameters(model)
    base = stack_layers(base) if scan_layers else base
    adapted = lj.adapt(Decoder(config).apply)
    apply = jax.jit(lambda adapters: adapted({"params": lj.combine(base, adapters)}, TOKENS))
    return lambda adapters: np.asarray(apply(adapters)), base


RULES = {
    "attention": ([lj.LoraRule("attn/.*/kernel", 4, 8.0)], ()),
    "ranks": ([lj.LoraRule("q_proj", 2, 5.0), lj.LoraRule("layers.*kernel", 4, 6.0)], ()),
    "rslora": ([lj.LoraRule("layers.*kernel", 3, 2.0, rslora=True)], ()),
    "whole": ([lj.LoraRule("mlp/.*/kernel", 4, 8.0)], ("norm", "lm_head")),
    "embedding": ([lj.LoraRule("embed", 3, 6.0), lj.LoraRule("attn/.*/kernel", 4, 8.0)], ()),
    "head": ([lj.LoraRule("lm_head", 3, 6.0), lj.LoraRule("embed", 2, 6.0)], ()),
    "tied": ([lj.LoraRule("embed", 3, 5.0), lj.LoraRule("attn/.*/kernel", 4, 8.0)], ()),
    "tied, whole": ([lj.LoraRule("attn/.*/kernel", 4, 8.0)], ("embed",)),
}


@LAYERS
@pytest.mark.parametrize("variant", RULES)
def test_peft_gives_the_same_logits(tmp_path, variant, scan_layers):
    theirs = build(tied=variant.startswith("tied"))
    apply, base = ours(theirs, scan_layers)
    rules, train = RULES[variant]
    layouts = {"embed": "o i", "lm_head": "i o"}
    rules = [
        dataclasses.replace(
            rule, layout=layouts.get(rule.pattern, "b i o" if scan_layers else "i o")
        )
        for rule in rules
    ]
    adapters = lj.init_adapters(jax.random.key(0), base, rules, train=train)
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), adapters)
    write_peft(tmp_path, adapters, base_model="tiny")
    plain = logits(theirs)
    expected = logits(PeftModel.from_pretrained(theirs, tmp_path).eval())
    assert np.abs(expected - plain).max() > 0.1  # the adapter does something
    assert np.abs(apply(adapters) - expected).max() <= TOLERANCE


CONFIGS = {
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "by regular expression": {"target_modules": r".*\.(mlp|self_attn)\.(gate|o)_proj"},
    "rslora": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "r": 3},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"],
        "rank_pattern": {"q_proj": 3, r"self_attn\.[kv]_proj": 2},
        "alpha_pattern": {".*k_proj": 5, "proj": 1000, "mlp.up_proj": 7},
    },
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "all but some": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "lora_dropout": 0.25},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    # peft starts an embedding's adapter at a standard deviation of one, and it is the head's, too:
    # with alpha = 6 the logits reach 160, and another order of summing moves those by 1.4e-4.
    "tied": {
        "target_modules": ["embed_tokens", "q_proj"],
        "ensure_weight_tying": True,
        "lora_alpha": 0.5,
    },
    "tied, whole": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    # Unrolled layers alone can hold what differs from layer to layer.
    "ranks of layers": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {r"model\.layers\.[02]\.mlp\.up_proj": 3},
    },
    "one norm": {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.input_layernorm"]},
}
UNROLLED = ("ranks of layers", "one norm")


def saved(folder, variant):
    """A folder that peft wrote, the logits with its adapter, and the model without."""
    torch.manual_seed(1)
    tied = variant.startswith("tied")
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | CONFIGS[variant]
    model = get_peft_model(build(tied=tied), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    for name, value in model.named_parameters():
        if value.requires_grad and "modules_to_save" in name:
            value.data += 0.1 * torch.randn(value.shape)
    model.save_pretrained(folder)
    return logits(model), build(tied=tied)


def tensors(folder):
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


@LAYERS
@pytest.mark.parametrize("variant", CONFIGS)
def test_what_peft_wrote(tmp_path, variant, scan_layers):
    theirs, first, second = (tmp_path / name for name in ("theirs", "first", "second"))
    expected, model = saved(theirs, variant)
    apply, base = ours(model, scan_layers)
    if scan_layers and variant in UNROLLED:
        with pytest.raises(ValueError, match=r"separate layers \(scan_layers=False\)"):
            read_peft(theirs, base)
        return
    adapters = read_peft(theirs, base)
    assert np.abs(expected - logits(model)).max() > 0.1
    assert np.abs(apply(adapters) - expected).max() <= TOLERANCE

    # Written again it is what it was, and written once more the same bytes.
    write_peft(first, adapters, base_model="tiny")
    write_peft(second, read_peft(first, base), base_model="tiny")
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)
    written = tensors(first)
    original = {k: v for k, v in tensors(theirs).items() if "base_layer" not in k}
    assert written.keys() == original.keys()
    for name, values in original.items():
        np.testing.assert_array_equal(written[name], values, err_msg=name, strict=True)

    # And peft reads it back.
    assert (logits(PeftModel.from_pretrained(model, first).eval()) == expected).all()


def test_settings_survive(tmp_path):
    saved(tmp_path / "theirs", "embedding")
    _, base = ours(build(), scan_layers=True)
    write_peft(tmp_path / "ours", read_peft(tmp_path / "theirs", base), base_model="tiny")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.25)
    assert config["target_modules"] == ["embed_tokens", "q_proj"]


def test_an_embedding_whose_head_stays_behind(tmp_path):
    """peft then adapts half of what is one leaf here."""
    config = LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
    get_peft_model(build(tied=True), config).save_pretrained(tmp_path)
    _, base = ours(build(tied=True), scan_layers=True)
    with pytest.raises(ValueError, match="trained without the head that is tied to it"):
        read_peft(tmp_path, base)


def test_half_precision(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(build(), config, autocast_adapter_dtype=False)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    _, base = ours(build(), scan_layers=True)
    adapter = read_peft(tmp_path, base)["layers"]["attn"]["q_proj"]["kernel"]
    assert adapter.a.dtype == "bfloat16"
    theirs = model.base_model.model.model.layers[2].self_attn.q_proj.lora_B["default"].weight
    np.testing.assert_array_equal(adapter.b[2].astype(np.float32), theirs.detach().float().numpy())
