"""Reading PEFT folders that peft itself saved, and what of others one leaf can hold."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folder import GOLDEN, write_folder
from peft_folder import (
    FOLDER,
    LOGITS,
    Q2,
    Q,
    copy,
    edited,
    same_bytes,
    set_to,
    tensors,
    zeros_in_layer_2,
)

import lora_jax as lj
from lora_jax.formats.hf import read_hf
from lora_jax.formats.peft import read_peft, write_peft
from lora_jax.models.decoder import Decoder, unstack_layers

pytestmark = pytest.mark.compiled_quickly


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The Llama that the golden adapters are for; its layers are scanned."""
    return read_hf(write_folder(tmp_path_factory.mktemp("model")))


def shapes(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("variant", ["patterns", "embedding"])
def test_logits_are_those_of_peft(checkpoint, tmp_path, variant, scan_layers):
    base = checkpoint.params if scan_layers else unstack_layers(checkpoint.params)
    adapters = read_peft(FOLDER / variant, base)
    config = dataclasses.replace(checkpoint.config, scan_layers=scan_layers)
    tree = {"params": lj.combine(base, adapters)}
    logits = lj.adapt(Decoder(config).apply)(tree, GOLDEN["tokens"][:1])
    np.testing.assert_allclose(logits[0], LOGITS[variant], atol=1e-4, rtol=1e-4)

    write_peft(tmp_path / "first", adapters, base_model="tiny")
    write_peft(tmp_path / "second", read_peft(tmp_path / "first", base), base_model="tiny")
    assert same_bytes(tmp_path / "first", tmp_path / "second")
    original, written = tensors(FOLDER / variant), tensors(tmp_path / "first")
    assert original.keys() - written.keys() <= {"model.embed_tokens.base_layer.weight"}
    for name, values in written.items():
        np.testing.assert_array_equal(values, original[name], strict=True)


def test_what_the_config_says_of_each_module(checkpoint):
    adapters = read_peft(FOLDER / "patterns", checkpoint.params)["layers"]
    theirs = tensors(FOLDER / "patterns")
    expected = {  # r = 2 but for v_proj, alpha 3 but for the mlp, divided by sqrt(r)
        ("attn", "q_proj"): (2, 3 / np.sqrt(2)),
        ("attn", "v_proj"): (1, 3.0),
        ("mlp", "down_proj"): (2, 5 / np.sqrt(2)),
    }
    for (part, name), (rank, scale) in expected.items():
        adapter = adapters[part][name]["kernel"]
        assert (adapter.rank, adapter.scale, adapter.layout) == (rank, scale, "i o")
        assert not adapter.a[1].any()  # layers_to_transform leaves out the second
        assert not adapter.b[1].any()
        module = f"model.layers.2.{'self_attn' if part == 'attn' else part}.{name}"
        np.testing.assert_array_equal(adapter.a[2], theirs[f"{module}.lora_A.weight"])
        np.testing.assert_array_equal(adapter.b[2], theirs[f"{module}.lora_B.weight"])
    assert adapters["attn"]["o_proj"]["kernel"] is None


def test_an_embedding_is_turned(checkpoint):
    adapters = read_peft(FOLDER / "embedding", checkpoint.params)
    theirs = tensors(FOLDER / "embedding")
    adapter = adapters["embed"]["embedding"]
    assert (adapter.dropout, adapter.layout) == (0.125, "o i")
    update = theirs["model.embed_tokens.lora_embedding_B"].astype(np.float64)
    update = (update @ theirs["model.embed_tokens.lora_embedding_A"]).T  # as peft adds it
    ours = np.asarray(adapter.b, np.float64) @ np.asarray(adapter.a, np.float64)
    np.testing.assert_allclose(ours, update, rtol=1e-12)
    norm = adapters["layers"]["mlp_norm"]["scale"][1]  # "norm" is the end of each norm's name
    np.testing.assert_array_equal(norm, theirs["model.layers.1.post_attention_layernorm.weight"])


def test_a_base_of_shapes_or_of_4_bits(checkpoint):
    params = checkpoint.params
    expected = read_peft(FOLDER / "embedding", params)
    base = lj.quantize(params, "o_proj", layout="b i o", block_size=32)
    for other in (shapes(params), base, shapes(base)):
        adapters = read_peft(FOLDER / "embedding", other)
        assert jax.tree.structure(adapters) == jax.tree.structure(expected)
        equal = jax.tree.map(lambda x, y: (x == y).all(), adapters, expected)
        assert all(jax.tree.leaves(equal))


def test_another_dtype(checkpoint):
    adapters = read_peft(FOLDER / "embedding", checkpoint.params, dtype=jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(adapters)} == {"bfloat16"}


def test_a_weight_that_is_not_the_bases_own(checkpoint, tmp_path):
    name = "model.embed_tokens.base_layer.weight"
    edited(lambda t: t.update({name: 2 * t[name]}))(copy(tmp_path, "embedding"))
    with pytest.raises(ValueError, match=f"{name} is not what it should repeat"):
        read_peft(tmp_path, checkpoint.params)
    read_peft(tmp_path, shapes(checkpoint.params))  # of which nothing is known


def test_an_embedding_without_its_tied_head(checkpoint):
    tied = {name: leaf for name, leaf in checkpoint.params.items() if name != "lm_head"}
    with pytest.raises(ValueError, match="is trained without the head that is tied to it"):
        read_peft(FOLDER / "embedding", tied)


def test_one_norm_of_scanned_layers(checkpoint, tmp_path):
    saved = ["layers.1.input_layernorm", "model.norm"]
    edit = edited(lambda t: [t.pop(k) for k in list(t) if "norm" in k and not k.startswith(keep)])
    keep = tuple(f"model.{name.removeprefix('model.')}" for name in saved)
    edit(copy(tmp_path, "embedding"))
    set_to(modules_to_save=saved)(tmp_path)
    with pytest.raises(ValueError, match=r"1 of the 3 modules .* layers/attn_norm/scale"):
        read_peft(tmp_path, checkpoint.params)
    adapters = read_peft(tmp_path, unstack_layers(checkpoint.params))
    assert adapters["layers_1"]["attn_norm"]["scale"].shape == (24,)
    assert adapters["layers_0"]["attn_norm"]["scale"] is None


def test_going_on_without_what_does_not_fit(checkpoint, tmp_path):
    def change(named):
        del named[Q]  # its B alone is no adapter
        named["model.layers.2.extra"] = np.ones(3)
        named[Q2.format("B")] = named[Q2.format("B")][:5]
        named["model.layers.0.self_attn.v_proj.lora_B.weight"] *= 2

    edited(change)(copy(tmp_path))
    set_to(some_method=True)(tmp_path)
    adapters = read_peft(tmp_path, checkpoint.params, strict=False)
    assert adapters["layers"]["attn"]["q_proj"]["kernel"] is None
    expected = 2 * tensors(FOLDER / "patterns")["model.layers.0.self_attn.v_proj.lora_B.weight"]
    np.testing.assert_array_equal(adapters["layers"]["attn"]["v_proj"]["kernel"].b[0], expected)


def test_unrolled_layers_hold_what_differs(checkpoint, tmp_path):
    base = unstack_layers(checkpoint.params)
    copy(tmp_path)
    set_to(alpha_pattern={r"layers\.2.*": 5})(tmp_path)
    edited(zeros_in_layer_2)(tmp_path)
    adapters = read_peft(tmp_path, base)
    scales = [adapters[f"layers_{k}"]["attn"]["v_proj"]["kernel"].scale for k in (0, 2)]
    assert scales == [3.0, 5.0]
    assert adapters["layers_1"]["attn"]["v_proj"]["kernel"] is None
    write_peft(tmp_path / "ours", adapters, base_model="x")
    assert tensors(tmp_path / "ours").keys() == tensors(tmp_path).keys()
