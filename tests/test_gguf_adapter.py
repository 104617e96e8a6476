"""Adapters for llama.cpp, added to the tensors of a model's own file as llama.cpp adds them."""

from __future__ import annotations

import dataclasses
import errno
import os
import re

import gguf
import jax
import numpy as np
import pytest
from tiny_model import CONFIG, write_model

import lora_jax as lj
from lora_jax.formats import whole
from lora_jax.formats.gguf import read_gguf
from lora_jax.formats.gguf_adapter import write_gguf_adapter
from lora_jax.models.decoder import DecoderConfig, parameter_shapes, unstack_layers

pytestmark = pytest.mark.compiled_quickly

# Everything of another size, and a head of its own.
UNTIED = DecoderConfig(
    vocab_size=11,
    dim=12,
    mlp_dim=20,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
)
RULES = [
    lj.LoraRule("embed", 2, 3.0, layout="o i"),
    lj.LoraRule("lm_head", 2, 3.0),
    lj.LoraRule("layers.*kernel", 4, 3.0, layout="b i o"),
]
NAMES = {
    "attn/q_proj": "attn_q",
    "attn/k_proj": "attn_k",
    "attn/v_proj": "attn_v",
    "attn/o_proj": "attn_output",
    "mlp/gate_proj": "ffn_gate",
    "mlp/up_proj": "ffn_up",
    "mlp/down_proj": "ffn_down",
}


def grown(config=UNTIED, rules=RULES):
    """Adapters with random A and B, as if they had been trained."""
    shapes = parameter_shapes(config)
    adapters = jax.eval_shape(lambda: lj.init_adapters(jax.random.key(0), zeros(shapes), rules))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), adapters)


def zeros(tree):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)


def read(path):
    """Metadata and tensors of a file, in the order of NumPy's axes."""
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return metadata, {x.name: gguf.dequantize(x.data, x.tensor_type) for x in reader.tensors}


def update(path, name):
    """What llama.cpp adds to a tensor, float64: it knows one alpha, and takes r from B."""
    metadata, tensors = read(path)
    a, b = (tensors[f"{name}.weight.lora_{x}"].astype(np.float64) for x in "ab")
    scale = metadata["adapter.lora.alpha"] / b.shape[-1]
    if name == "token_embd":
        return scale * a @ b.T  # rows of A are looked up, and B makes them as wide as the model
    return scale * b @ a


def pairs_side_by_side(rows, heads, width):
    """Rows of a q or k projection, one by one to where llama.cpp's conversion puts them."""
    ordered = np.empty_like(rows)
    for head in range(heads):
        for j in range(width // 2):
            ordered[head * width + 2 * j] = rows[head * width + j]
            ordered[head * width + 2 * j + 1] = rows[head * width + j + width // 2]
    return ordered


def test_what_is_added_to_each_tensor(tmp_path):
    adapters, path = grown(), tmp_path / "adapter.gguf"
    write_gguf_adapter(path, adapters, UNTIED, base_model="tiny")
    metadata, tensors = read(path)
    assert metadata["general.type"] == "adapter"
    assert metadata["general.architecture"] == "llama"
    assert metadata["adapter.type"] == "lora"
    assert metadata["adapter.lora.alpha"] == 3
    assert metadata["general.base_model.0.name"] == "tiny"
    assert len(tensors) == 2 * (2 * len(NAMES) + 2)
    for part, name in NAMES.items():
        outer, inner = part.split("/")
        leaf = adapters["layers"][outer][inner]["kernel"]
        for layer in (0, 1):
            expected = leaf.scale * leaf.b[layer].astype(np.float64) @ leaf.a[layer]
            if name in ("attn_q", "attn_k"):
                expected = pairs_side_by_side(expected, 3 if name == "attn_q" else 1, 6)
            found = update(path, f"blk.{layer}.{name}")
            np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg=name)
    head, embedding = adapters["lm_head"]["kernel"], adapters["embed"]["embedding"]
    for name, leaf in (("output", head), ("token_embd", embedding)):
        expected = leaf.scale * leaf.b.astype(np.float64) @ leaf.a  # [V, D] both
        np.testing.assert_allclose(update(path, name), expected, rtol=1e-12)


def test_a_model_that_is_read_with_its_adapter_added(tmp_path):
    """The base's file with every update added in place is the merged model."""
    rules = [
        lj.LoraRule("(q|down)_proj", 2, 5.0, layout="b i o"),
        lj.LoraRule("kernel", 3, 7.0, layout="b i o", rslora=True),
    ]
    adapters, model, added = grown(CONFIG, rules), tmp_path / "model.gguf", tmp_path / "added.gguf"
    base = read_gguf(write_model(model)).params
    write_gguf_adapter(tmp_path / "adapter.gguf", adapters, CONFIG)
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(added, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=kind)
    changed = {name.removesuffix(".weight.lora_a") for name in read(tmp_path / "adapter.gguf")[1]}
    for tensor in reader.tensors:
        name, values = tensor.name.removesuffix(".weight"), np.array(tensor.data)
        if name in changed:
            values = (values + update(tmp_path / "adapter.gguf", name)).astype(np.float32)
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    merged = lj.merge(base, adapters)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        read_gguf(added).params,
        merged,
    )


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_layers_without_an_adapter_have_no_tensor(tmp_path, scan_layers):
    adapters = grown(rules=RULES[2:])
    for factor in jax.tree.leaves(adapters["layers"]["attn"]["v_proj"]):
        factor[1] = 0
    if not scan_layers:
        adapters = unstack_layers(adapters)
    write_gguf_adapter(tmp_path / "adapter.gguf", adapters, UNTIED)
    _, tensors = read(tmp_path / "adapter.gguf")
    missing = {"blk.1.attn_v.weight.lora_a", "blk.1.attn_v.weight.lora_b"}
    if not scan_layers:
        assert len(tensors) == 4 * len(NAMES)  # zeros of a layer of its own are written
        return
    assert len(tensors) == 4 * len(NAMES) - 2
    assert not missing & tensors.keys()


def test_alphas_that_differ_are_folded_into_b(tmp_path):
    rules = [
        lj.LoraRule("q_proj", 2, 0.0, layout="b i o"),  # an alpha of zero would stand for one
        lj.LoraRule("k_proj", 3, 7.0, layout="b i o", rslora=True),
        lj.LoraRule("mlp/.*kernel", 4, 5.0, layout="b i o"),
    ]
    adapters, path = grown(rules=rules), tmp_path / "adapter.gguf"
    write_gguf_adapter(path, adapters, UNTIED)
    metadata, tensors = read(path)
    assert metadata["adapter.lora.alpha"] == 5
    leaf = adapters["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(tensors["blk.0.ffn_up.weight.lora_b"], leaf.b[0])
    assert not update(path, "blk.1.attn_q").any()
    leaf = adapters["layers"]["attn"]["k_proj"]["kernel"]
    expected = 7 / np.sqrt(3) * leaf.b[1].astype(np.float64) @ leaf.a[1]
    found = update(path, "blk.1.attn_k")
    np.testing.assert_allclose(found, pairs_side_by_side(expected, 1, 6), rtol=1e-6)


def test_zeros_alone(tmp_path):
    adapters = grown(rules=[lj.LoraRule("up_proj", 2, 0.0, layout="b i o")])
    write_gguf_adapter(tmp_path / "adapter.gguf", adapters, UNTIED)
    assert not update(tmp_path / "adapter.gguf", "blk.0.ffn_up").any()


def test_other_architectures_keep_their_rows(tmp_path):
    adapters, path = grown(), tmp_path / "adapter.gguf"
    write_gguf_adapter(path, adapters, UNTIED, architecture="qwen2")
    metadata, tensors = read(path)
    assert metadata["general.architecture"] == "qwen2"
    leaf = adapters["layers"]["attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight.lora_b"], leaf.b[1])


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_experts_are_stacked(tmp_path, scan_layers):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=size).astype(np.float32) for size in ((2, 3, 2, 12), (2, 3, 20, 2)))
    leaf = lj.Adapter(a, b, 1.5)
    adapters = {"layers": {"mlp": {"experts": {"up_proj": {"kernel": leaf}}}}}
    adapters = adapters if scan_layers else unstack_layers(adapters)
    path = tmp_path / "adapter.gguf"
    write_gguf_adapter(path, adapters, UNTIED, architecture="qwen3moe")
    metadata, tensors = read(path)
    assert metadata["adapter.lora.alpha"] == 3
    np.testing.assert_array_equal(tensors["blk.1.ffn_up_exps.weight.lora_a"], a[1])
    np.testing.assert_array_equal(tensors["blk.1.ffn_up_exps.weight.lora_b"], b[1])


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("float16", gguf.GGMLQuantizationType.F16), ("bfloat16", gguf.GGMLQuantizationType.BF16)],
)
def test_half_precision(tmp_path, dtype, kind):
    adapters, path = grown(), tmp_path / "adapter.gguf"
    write_gguf_adapter(path, adapters, UNTIED, dtype=dtype)
    assert {tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors} == {kind}
    expected = adapters["layers"]["attn"]["v_proj"]["kernel"].a[1]
    expected = np.asarray(jax.numpy.asarray(expected, dtype), np.float32)
    np.testing.assert_array_equal(read(path)[1]["blk.1.attn_v.weight.lora_a"], expected)


LEAF = lj.Adapter(np.ones((2, 1, 12), np.float32), np.ones((2, 18, 1), np.float32))
TIED = dataclasses.replace(UNTIED, tied_head=True)


@pytest.mark.parametrize(
    ("adapters", "config", "options", "sentence"),
    [
        ({"w": None}, UNTIED, {}, "the tree holds no adapters"),
        ({"w": LEAF}, UNTIED, {}, "w has no place in a GGUF adapter"),
        (
            {"final_norm": {"scale": np.ones(12)}},
            UNTIED,
            {},
            "final_norm/scale is trained whole, which llama.cpp has no adapter for",
        ),
        ({"embed": {"embedding": LEAF}}, TIED, {}, "embed/embedding is the head as well"),
        (
            {"layers": {"attn": {"k_proj": {"kernel": LEAF}}}},
            UNTIED,
            {},
            "produces 18 rows, and the config has 1 heads of 6",
        ),
        (
            {"layers": {"attn": {"qkv_proj": {"kernel": LEAF}}}},
            UNTIED,
            {"architecture": "gemma"},
            "layers/attn/qkv_proj/kernel has no tensor in the architecture 'gemma'",
        ),
        ({"w": LEAF}, UNTIED, {"architecture": "phi3"}, "the order of the rows is not known"),
        ({"w": LEAF}, UNTIED, {"dtype": "int8"}, "dtype is int8; write one of float32, float16"),
    ],
)
def test_trees_that_llama_cpp_has_no_adapter_for(tmp_path, adapters, config, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        write_gguf_adapter(tmp_path / "adapter.gguf", adapters, config, **options)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "adapter.gguf"
    write_gguf_adapter(path, grown(), UNTIED)
    before = path.read_bytes()

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole.os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_gguf_adapter(path, grown(rules=RULES[2:]), UNTIED)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
