"""Reading model folders: golden weights in, transformers' logits out, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hf_folder import GOLDEN, tensors, write_folder, write_json

from lora_jax.formats import read_model
from lora_jax.formats.hf import read_hf
from lora_jax.models.decoder import Decoder, parameter_shapes

pytestmark = pytest.mark.compiled_quickly


@pytest.mark.parametrize("shards", [1, 3], ids=["whole", "sharded"])
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize(("tied", "expected"), [(False, "logits"), (True, "tied_logits")])
def test_logits_are_those_of_transformers(tmp_path, shards, scan_layers, tied, expected):
    folder = write_folder(tmp_path / "tiny", shards=shards, tie_word_embeddings=tied)
    checkpoint = read_hf(folder, scan_layers=scan_layers)
    assert checkpoint.config.scan_layers == scan_layers
    logits = Decoder(checkpoint.config).apply({"params": checkpoint.params}, GOLDEN["tokens"])
    np.testing.assert_allclose(logits, GOLDEN[expected], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stored", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_of_any_float_are_cast(tmp_path, stored, dtype):
    checkpoint = read_hf(write_folder(tmp_path, dtype=stored), dtype=dtype)
    shapes = parameter_shapes(checkpoint.config)
    assert jax.eval_shape(lambda: checkpoint.params) == shapes
    assert {leaf.dtype for leaf in jax.tree.leaves(checkpoint.params)} == {np.dtype(dtype)}
    up = tensors(stored)["model.layers.1.mlp.up_proj.weight"]
    kernel = checkpoint.params["layers"]["mlp"]["up_proj"]["kernel"][1]
    np.testing.assert_array_equal(kernel, up.astype(dtype).T)


def test_what_a_folder_says_beside_its_weights(tmp_path):
    folder = write_folder(tmp_path / "tiny-llama")
    checkpoint = read_model(folder)
    weights = (folder / "model.safetensors").read_bytes()
    assert checkpoint.name == "tiny-llama"
    assert checkpoint.digest == hashlib.sha256(weights).hexdigest()
    assert checkpoint.metadata["config.json"]["hidden_size"] == checkpoint.config.dim
    # Lengths that the file asks for are for whoever makes batches to decide.
    ids = checkpoint.tokenizer.encode("w0 w1 w2 w3 w4", add_special_tokens=False).ids
    assert ids == [3, 4, 5, 6, 7]


def test_fields_that_are_empty_say_nothing(tmp_path):
    read_hf(write_folder(tmp_path, quantization_config=None, rope_scaling=None, head_dim=8))


def test_the_digest_of_parts_knows_all_of_them(tmp_path):
    folder = write_folder(tmp_path, shards=2)
    before = read_hf(folder).digest
    assert before == read_hf(folder).digest
    part = folder / "model-00002-of-00002.safetensors"
    changed = {name: 2 * values for name, values in safetensors.numpy.load_file(part).items()}
    safetensors.numpy.save_file(changed, part)
    assert read_hf(folder).digest != before


def test_the_name_of_a_model_in_the_cache_of_the_hub(tmp_path):
    folder = tmp_path / "models--some--model-1B" / "snapshots" / "0123abc"
    assert read_hf(write_folder(folder)).name == "some/model-1B"


@pytest.mark.parametrize(
    ("adds_bos", "settings", "generation", "special", "stop"),
    [
        (True, {}, None, (0, 1), (1,)),
        (False, {}, None, (None, 1), (1,)),  # named, and not used
        (False, {"add_bos_token": True}, None, (0, 1), (1,)),
        (True, {"add_bos_token": False}, None, (None, 1), (1,)),
        (True, {"bos_token": None}, None, (None, 1), (1,)),
        (True, {"eos_token": "<|turn|>"}, None, (0, 2), (2,)),
        (True, {}, {"eos_token_id": [1, 2]}, (0, 1), (1, 2)),
        (True, {}, {"eos_token_id": 2}, (0, 1), (1, 2)),
        (True, {"eos_token": None}, {}, (0, 5), (5,)),  # of config.json
    ],
)
def test_special_tokens(tmp_path, adds_bos, settings, generation, special, stop):
    folder = write_folder(tmp_path, adds_bos=adds_bos, bos_token_id=None, eos_token_id=[5, 6])
    file = folder / "tokenizer_config.json"
    write_json(file, json.loads(file.read_text()) | settings)
    if generation is not None:
        write_json(folder / "generation_config.json", generation)
    checkpoint = read_hf(folder)
    assert checkpoint.special == special
    assert checkpoint.stop == stop


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"chat_template.jinja": "{{ a }}"}, "{{ a }}"),
        ({"tokenizer_config.json": {"chat_template": "{{ b }}"}}, "{{ b }}"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "{{ c }}"},
                        {"name": "default", "template": "{{ d }}"},
                    ]
                }
            },
            "{{ d }}",
        ),
        (
            {"chat_template.jinja": "{{ a }}", "tokenizer_config.json": {"chat_template": "b"}},
            "{{ a }}",
        ),
    ],
    ids=["none", "file", "setting", "several", "file before setting"],
)
def test_chat_templates(tmp_path, files, template):
    folder = write_folder(tmp_path)
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert read_hf(folder).chat_template == template


def rewritten(change):
    """Edits the tensors of a folder in one file."""

    def edit(folder):
        weights = tensors()
        change(weights)
        safetensors.numpy.save_file(weights, folder / "model.safetensors")

    return edit


def test_tensors_that_only_repeat_others_are_passed_over(tmp_path):
    folder = write_folder(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewritten(lambda weights: weights.update({name: np.ones(4, np.float32)}))(folder)
    read_hf(folder)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without(name):
    return lambda folder: (folder / name).unlink()


def written(name, content):
    return lambda folder: (folder / name).write_text(content)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def an_adapter(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def indexed(content):
    return written("model.safetensors.index.json", json.dumps(content))


UP = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("break_it", "error", "sentence"),
    [
        (pickled, ValueError, "in a pickle (pytorch_model.bin) and not in safetensors"),
        (an_adapter, FileNotFoundError, "holds a PEFT adapter, not the model that it is for"),
        (without("config.json"), FileNotFoundError, "has no config.json"),
        (without("tokenizer.json"), FileNotFoundError, "has no tokenizer.json; write one with"),
        (without("model.safetensors"), FileNotFoundError, "lacks model.safetensors; it has config"),
        (cut, ValueError, "model.safetensors is broken or ends too early"),
        (written("config.json", "{,}"), ValueError, "config.json is no JSON"),
        (written("config.json", "[]"), ValueError, "config.json holds a list, expected an"),
        (written("tokenizer.json", "{}"), ValueError, "tokenizer.json is no tokenizer"),
        (indexed({"weight_map": {}}), ValueError, "has no weight_map"),
        (indexed({"weight_map": {"a": "b.safetensors"}}), FileNotFoundError, "lacks b.safetensors"),
        (rewritten(lambda w: w.pop(UP)), ValueError, f"{UP} is missing"),
        (
            rewritten(lambda w: w.update({"model.layers.2.extra": w[UP]})),
            ValueError,
            "model.layers.2.extra is without a place in this decoder",
        ),
        (
            rewritten(lambda w: w.update({UP: w[UP].T.copy()})),
            ValueError,
            f"{UP} ((24, 40), expected (40, 24)) is of another shape",
        ),
        (
            rewritten(lambda w: w.update({UP: w[UP].astype(np.int8)})),
            ValueError,
            f"the tensor '{UP}' of model.safetensors is stored as I8; only F64, F32, F16, BF16",
        ),
    ],
)
def test_folders_that_cannot_be_read_faithfully(tmp_path, break_it, error, sentence):
    folder = write_folder(tmp_path)
    break_it(folder)
    with pytest.raises(error, match=re.escape(sentence)) as caught:
        read_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_in_two_parts_is_an_error(tmp_path):
    folder = write_folder(tmp_path, shards=2)
    first, second = sorted(folder.glob("model-*.safetensors"))
    both = safetensors.numpy.load_file(first) | {"model.norm.weight": np.ones(24, np.float32)}
    safetensors.numpy.save_file(both, first)
    safetensors.numpy.save_file(
        safetensors.numpy.load_file(second) | {"model.norm.weight": np.ones(24, np.float32)}, second
    )
    with pytest.raises(ValueError, match=r"model\.norm\.weight is more than once in the files"):
        read_hf(folder)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "says that the weights are quantized"),
        ({"model_type": "mamba"}, "model_type 'mamba' in config.json"),
    ],
)
def test_models_of_another_kind(tmp_path, config, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_model(write_folder(tmp_path, **config))


def test_files_that_are_no_model(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\x08\x07")
    with pytest.raises(ValueError, match=r"model\.onnx is no model: it begins with b'\\x08\\x07'"):
        read_model(file)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_hf(tmp_path / "nowhere")
