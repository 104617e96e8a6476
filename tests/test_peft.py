"""PEFT folders, read back with nothing but safetensors and json."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from tiny_model import CONFIG

import lora_jax as lj
from lora_jax.formats import whole
from lora_jax.formats.peft import write_peft
from lora_jax.formats.peft.write import alpha_of
from lora_jax.models.decoder import parameter_shapes, unstack_layers

pytestmark = pytest.mark.compiled_quickly

# Decoder part, transformers module, in, out; the decoder has two layers of width 64.
MODULES = [
    ("attn/q_proj", "self_attn.q_proj", 64, 64),
    ("attn/o_proj", "self_attn.o_proj", 64, 64),
    ("mlp/up_proj", "mlp.up_proj", 64, 128),
    ("mlp/down_proj", "mlp.down_proj", 128, 64),
]
KEYS = {  # of the minimal config that older readers know
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout"),
    *("target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("fan_in_fan_out", "bias", "inference_mode"),
}


def grown(rules, *, train=(), config=CONFIG):
    """Adapters of a scanned decoder with random B, as if they had been trained."""
    base = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), parameter_shapes(config))
    rules = [dataclasses.replace(rule, layout="b i o") for rule in rules]
    key = jax.random.key(1)
    adapters = jax.eval_shape(lambda: lj.init_adapters(key, base, rules, train=train))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), adapters)


def read(folder):
    with safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return json.loads((folder / "adapter_config.json").read_text()), tensors


def test_every_module_of_every_layer_is_written(tmp_path):
    adapters = grown([lj.LoraRule("(q|o|up|down)_proj", rank=4, alpha=6.0)])
    write_peft(tmp_path, adapters, base_model="owner/name")
    config, tensors = read(tmp_path)
    assert set(config) == KEYS
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "owner/name"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 6, False)
    assert set(config["target_modules"]) == {"q_proj", "o_proj", "up_proj", "down_proj"}
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    expected = {}
    for part, module, inn, out in MODULES:
        leaf = adapters["layers"]
        for key in (*part.split("/"), "kernel"):
            leaf = leaf[key]
        for layer in range(2):
            name = f"base_model.model.model.layers.{layer}.{module}"
            assert (leaf.a[layer].shape, leaf.b[layer].shape) == ((4, inn), (out, 4))
            expected[f"{name}.lora_A.weight"] = leaf.a[layer]
            expected[f"{name}.lora_B.weight"] = leaf.b[layer]
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value)


def test_scanned_and_unrolled_layers_give_the_same_folder(tmp_path):
    adapters = grown([lj.LoraRule("attn/.*/kernel", rank=4)], train="(norm|embed)")
    unrolled = unstack_layers(adapters)
    for name, tree in (("scanned", adapters), ("unrolled", unrolled)):
        write_peft(tmp_path / name, tree, base_model="x")
    (config, tensors), (other_config, others) = map(
        read, (tmp_path / "scanned", tmp_path / "unrolled")
    )
    assert sorted(config.pop("modules_to_save")) == sorted(other_config.pop("modules_to_save"))
    assert config == other_config
    assert set(tensors) == set(others)
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, others[name])


def test_ranks_and_alphas_of_their_own(tmp_path):
    rules = [
        lj.LoraRule("q_proj", rank=2, alpha=5.0),
        lj.LoraRule("attn/.*kernel", rank=4, alpha=4),
    ]
    write_peft(tmp_path, grown(rules), base_model="x")
    config, _ = read(tmp_path)
    assert (config["r"], config["rank_pattern"]) == (4, {"q_proj": 2})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (4, {"q_proj": 5})


def test_rank_stabilized_scaling_is_kept_as_a_scale(tmp_path):
    rule = lj.LoraRule("q_proj", rank=4, alpha=6.0, rslora=True)
    write_peft(tmp_path, grown([rule]), base_model="x")
    config, _ = read(tmp_path)
    assert config["lora_alpha"] / config["r"] == 6 / np.sqrt(4)


def test_rank_stabilized_scaling_that_no_alpha_gives(tmp_path):
    """No float64 divided by 5 is 8 / sqrt(5); 8 divided by sqrt(5) is."""
    rule = lj.LoraRule("q_proj", rank=5, alpha=8, rslora=True)
    write_peft(tmp_path, grown([rule]), base_model="x")
    config, _ = read(tmp_path)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 8, True)
    product = rule.scale * 5
    nearby = [product, np.nextafter(product, 0), np.nextafter(product, 99)]
    assert all(x / 5 != rule.scale for x in nearby)


@pytest.mark.parametrize(("alpha", "rank"), [(5.0, 3), (0.1, 7), (16, 24), (1e-3, 49), (0.0, 3)])
def test_alphas_come_back_as_they_were_chosen(alpha, rank):
    assert alpha_of(alpha / rank, rank) == alpha


def test_a_kind_that_not_every_layer_has(tmp_path):
    adapters = unstack_layers(grown([lj.LoraRule("(q|v)_proj", rank=4)]))
    adapters["layers_1"]["attn"]["q_proj"]["kernel"] = None
    write_peft(tmp_path, adapters, base_model="x")
    config, tensors = read(tmp_path)
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj", "v_proj"]
    assert len(tensors) == 6


def test_leaves_trained_whole_are_written_as_torch_has_them(tmp_path):
    untied = dataclasses.replace(CONFIG, tied_head=False)
    adapters = grown([lj.LoraRule("q_proj")], train="(mlp_norm|final_norm|lm_head)", config=untied)
    write_peft(tmp_path, adapters, base_model="x")
    config, tensors = read(tmp_path)
    norms = ["model.layers.0.post_attention_layernorm", "model.layers.1.post_attention_layernorm"]
    assert sorted(config["modules_to_save"]) == ["lm_head", *norms, "model.norm"]
    prefix = "base_model.model."
    head = tensors[f"{prefix}lm_head.weight"]
    np.testing.assert_array_equal(head, adapters["lm_head"]["kernel"].T)
    norm = adapters["layers"]["mlp_norm"]["scale"]
    np.testing.assert_array_equal(tensors[f"{prefix}{norms[1]}.weight"], norm[1])


def test_another_dtype_on_disk(tmp_path):
    write_peft(tmp_path, grown([lj.LoraRule("q_proj")]), base_model="x", dtype=np.float16)
    _, tensors = read(tmp_path)
    assert {x.dtype for x in tensors.values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    ("adapters", "sentence"),
    [
        ({"w": None}, "the tree holds no adapters"),
        ({"w": lj.Adapter(jnp.ones((1, 2)), jnp.ones((3, 1)))}, "w has no place in a PEFT adapter"),
        (
            {"layers": {"q_proj": {"kernel": lj.Adapter(jnp.ones((1, 2)), jnp.ones((3, 1)))}}},
            "batch axes (), and its torch name 'model.layers.{}.q_proj' numbers 1",
        ),
        (
            {
                "layers_0": {
                    "q_proj": {"kernel": None, "bias": jnp.ones(2)},
                    "up_proj": {"kernel": lj.Adapter(jnp.ones((1, 2)), jnp.ones((3, 1)))},
                }
            },
            "only some leaves of the module model.layers.0.q_proj are trained whole",
        ),
        (
            {"layers": {"norm": {"scale": jnp.ones((2, 3, 4, 5))}}},
            "layers/norm/scale is trained whole and has axes (3, 4, 5)",
        ),
        (
            {
                f"layers_{k}": {"q_proj": {"kernel": lj.Adapter(*jnp.ones((2, 1, 1)), dropout=p)}}
                for k, p in enumerate((0.1, 0.2))
            },
            "the adapters have dropouts [0.1, 0.2], and PEFT knows one for all",
        ),
    ],
)
def test_trees_that_have_no_place_in_a_folder(tmp_path, adapters, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        write_peft(tmp_path / "adapter", adapters, base_model="x")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_full_disk_leaves_the_adapter_that_was_there(tmp_path, monkeypatch, fails_at):
    write_peft(tmp_path, grown([lj.LoraRule("q_proj")]), base_model="first")
    before = read(tmp_path)
    calls = []

    def fsync(_):
        calls.append(1)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole.os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_peft(tmp_path, grown([lj.LoraRule("up_proj")]), base_model="second")
    after = read(tmp_path)
    assert after[0] == before[0]
    assert set(after[1]) == set(before[1])
    assert len(list(tmp_path.iterdir())) == 2
