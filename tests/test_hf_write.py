"""Model folders that are written: golden weights through them and back, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import safetensors.numpy
from family_cases import CASES, write_family
from hf_folder import GOLDEN, tensors, write_folder, write_json
from safetensors import safe_open
from tiny_model import CONFIG, EOS, TEMPLATE, write_model

import lora_jax as lj
from lora_jax.formats import disassembly, hf, hf_write, read_model
from lora_jax.formats import folder as folder_module
from lora_jax.formats.hf_write import to_hf, write_hf
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import from_hf

pytestmark = pytest.mark.compiled_quickly

LAYERS = "layers.*kernel"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("gguf") / "model.gguf")


def saved(folder) -> dict[str, np.ndarray]:
    """All tensors of a folder, by the package that the format is named after."""
    files = sorted(folder.glob("*.safetensors"))
    parts = [safetensors.numpy.load_file(file) for file in files]
    names = [name for part in parts for name in part]
    assert len(names) == len(set(names))
    return {name: values for part in parts for name, values in part.items()}


def assert_equal(trees):
    one, other = trees
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize(("tied", "expected"), [(False, "logits"), (True, "tied_logits")])
def test_the_model_that_was_read_is_written(tmp_path, scan_layers, tied, expected):
    source = write_folder(tmp_path / "source", tie_word_embeddings=tied)
    checkpoint = read_model(source, scan_layers=scan_layers)
    write_hf(tmp_path / "written", checkpoint, shard_size=20_000)
    found, names = saved(tmp_path / "written"), set(tensors()) - {"lm_head.weight"}
    assert set(found) == (names if tied else set(tensors()))
    for name, values in found.items():
        np.testing.assert_array_equal(values, tensors()[name])
    again = read_model(tmp_path / "written", scan_layers=scan_layers)
    assert_equal((checkpoint.params, again.params))
    logits = Decoder(again.config).apply({"params": again.params}, GOLDEN["tokens"])
    np.testing.assert_allclose(logits, GOLDEN[expected], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["llama", "qwen2, no window", "gemma3_text", "qwen3_moe"])
def test_models_of_any_family_are_written(tmp_path, case):
    """With biases, norms of several sorts, experts, a tied head."""
    source = write_family(tmp_path / "source", CASES[case])
    for scan_layers in (True, False):
        checkpoint = read_model(source, scan_layers=scan_layers)
        write_hf(tmp_path / "written", checkpoint, shard_size=30_000)
        expected, found = saved(source), saved(tmp_path / "written")
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
        config = json.loads((tmp_path / "written" / "config.json").read_text())
        assert config == {**CASES[case], "torch_dtype": "float32"}


def test_the_files_of_a_folder_are_carried_over(tmp_path):
    source = write_folder(tmp_path / "source", torch_dtype="x", extra={"a": [1]})
    write_json(source / "generation_config.json", {"eos_token_id": [1, 2]})
    write_json(source / "special_tokens_map.json", {"pad_token": "w7"})
    (source / "chat_template.jinja").write_text("{{ é }}", encoding="utf-8")
    write_hf(tmp_path / "written", read_model(source), dtype=jnp.bfloat16)
    there, here = (
        {x.name: x.read_bytes() for x in f.iterdir()} for f in (source, tmp_path / "written")
    )
    assert set(there) == set(here)
    changed = {name for name in there if there[name] != here[name]}
    assert changed == {"config.json", "model.safetensors"}
    config, own = (json.loads(files["config.json"]) for files in (there, here))
    assert own == config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}


def test_a_tokenizer_that_was_changed_is_written(tmp_path):
    checkpoint = read_model(write_folder(tmp_path / "source"))
    changed = dataclasses.replace(checkpoint, chat_template="{{ messages }}", stop=(1, 2))
    write_hf(tmp_path / "written", changed)
    again = read_model(tmp_path / "written")
    assert (again.chat_template, again.stop, again.special) == ("{{ messages }}", (1, 2), (0, 1))
    assert again.tokenizer.encode("w0 w1").ids == [0, 3, 4]


def test_a_folder_that_is_gone_is_not_needed(tmp_path):
    checkpoint = read_model(write_folder(tmp_path / "source"))
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    write_hf(tmp_path / "written", checkpoint)
    assert read_model(tmp_path / "written").special == checkpoint.special


@pytest.mark.parametrize("begins", [False, True], ids=["without bos", "with bos"])
def test_a_model_of_one_file_is_written_out(tmp_path, gguf_file, begins):
    checkpoint = read_model(gguf_file)
    metadata = {**checkpoint.metadata, "llama.context_length": 77}
    metadata |= {"tokenizer.ggml.padding_token_id": 3}
    checkpoint = dataclasses.replace(checkpoint, metadata=metadata)
    if begins:
        checkpoint = dataclasses.replace(checkpoint, special=(type(checkpoint.special))(5, EOS))
    write_hf(tmp_path / "written", checkpoint)
    config = json.loads((tmp_path / "written" / "config.json").read_text())
    bos = 5 if begins else None
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (bos, EOS, 3)
    assert (config["max_position_embeddings"], config["torch_dtype"]) == (77, "float32")
    settings = json.loads((tmp_path / "written" / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is begins
    assert settings.get("bos_token") == ("%" if begins else None)
    again = read_model(tmp_path / "written")
    for name in ("config", "special", "stop", "chat_template"):
        assert getattr(again, name) == getattr(checkpoint, name), name
    assert again.chat_template == TEMPLATE
    assert_equal((checkpoint.params, again.params))
    # In front of a text by itself, as transformers has it; the checkpoint's own does not.
    text, ids = "ab!! c<|endoftext|>", checkpoint.tokenizer.encode("ab!! c<|endoftext|>").ids
    assert again.tokenizer.encode(text).ids == ([5, *ids] if begins else ids)
    assert again.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_fields_of_a_config_are_those_of_transformers():
    theirs = json.loads(str(GOLDEN["config"]))
    written = to_hf(from_hf(theirs))
    rope = theirs.pop("rope_parameters")
    theirs["architectures"] = ["LlamaForCausalLM"]  # of a config without a model: none
    assert (written.pop("rope_theta"), written.pop("rope_scaling")) == (rope["rope_theta"], None)
    assert {name: theirs[name] for name in written} == written


def test_a_decoder_that_no_config_describes(tmp_path, gguf_file, monkeypatch):
    checkpoint = read_model(gguf_file)
    # As if a later decoder did something of which `to_hf` does not know.
    other = dataclasses.replace(CONFIG, rope_theta=1.0)
    monkeypatch.setattr(hf_write, "from_hf", lambda fields: other)
    with pytest.raises(ValueError, match=r"the decoder has rope_theta=10000\.0.*, which no config"):
        write_hf(tmp_path / "written", checkpoint)
    assert list(tmp_path.iterdir()) == []


# Merging.


@pytest.mark.parametrize(
    ("kind", "scan_layers"), [("nf4", True), ("float32", False)], ids=["scanned", "unrolled"]
)
def test_adapters_are_merged(tmp_path, gguf_file, scan_layers, kind):
    checkpoint = read_model(gguf_file, scan_layers=scan_layers)
    layout = "b i o" if scan_layers else "i o"
    base = checkpoint.params
    if kind != "float32":
        base = lj.quantize(base, LAYERS, kind=kind, layout=layout)
    rules = [lj.LoraRule("(q|down)_proj", rank=3, alpha=5.0, layout=layout)]
    init = functools.partial(lj.init_adapters, base=base, rules=rules, train="final_norm")
    adapters = reference.randomized(jax.eval_shape(init, jax.random.key(0)), size=1.0)
    write_hf(tmp_path / "merged", dataclasses.replace(checkpoint, params=base), adapters)
    found = saved(tmp_path / "merged")
    np.testing.assert_array_equal(found["model.norm.weight"], adapters["final_norm"]["scale"])
    embedding = checkpoint.params["embed"]["embedding"]
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], embedding)
    for layer in range(2):
        for module, adapted in (
            ("attn/q_proj", True),
            ("mlp/down_proj", True),
            ("mlp/up_proj", False),
        ):
            part, name = module.split("/")
            top = "layers" if scan_layers else f"layers_{layer}"
            weight, adapter = (t[top][part][name]["kernel"] for t in (base, adapters))
            if kind != "float32":
                weight = lj.dequantize(weight)
            pick = (lambda x: x[layer]) if scan_layers else (lambda x: x)  # noqa: B023
            expected = np.asarray(pick(weight), np.float64).T
            if adapted:
                a, b = (np.asarray(pick(x), np.float64) for x in (adapter.a, adapter.b))
                expected = expected + 5 / 3 * b @ a
            prefix = {"attn": "self_attn", "mlp": "mlp"}[part]
            values = found[f"model.layers.{layer}.{prefix}.{name}.weight"]
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


def test_one_layer_of_one_weight_is_decoded_at_a_time(gguf_file, monkeypatch):
    checkpoint = read_model(gguf_file)
    base = lj.quantize(checkpoint.params, LAYERS, layout="b i o")
    decoded, merged = [], disassembly._merged
    monkeypatch.setattr(
        disassembly,
        "_merged",
        lambda leaf, dtype: decoded.append(leaf.shape) or merged(leaf, dtype),
    )
    config, names = checkpoint.config, hf.naming(checkpoint.config)
    tensors = disassembly.disassemble(config, names, base, dtype=np.float32)
    assert not decoded
    [up] = [x for x in tensors if x.name == "model.layers.1.mlp.up_proj.weight"]
    assert up.read().shape == up.shape == (128, 64)
    assert decoded == [(64, 128)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_another_dtype(tmp_path, dtype):
    write_hf(tmp_path / "written", read_model(write_folder(tmp_path / "source")), dtype=dtype)
    with safe_open(tmp_path / "written" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    for name, values in saved(tmp_path / "written").items():
        np.testing.assert_array_equal(values, tensors()[name].astype(dtype))
    written = json.loads((tmp_path / "written" / "config.json").read_text())
    assert written["dtype"] == np.dtype(dtype).name


def test_shards(tmp_path):
    checkpoint = read_model(write_folder(tmp_path / "source"))
    write_hf(tmp_path / "written", checkpoint, shard_size=20_000)
    parts = sorted((tmp_path / "written").glob("*.safetensors"))
    index = json.loads((tmp_path / "written" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors().values())
    assert sorted(set(index["weight_map"].values())) == [part.name for part in parts]
    assert len(parts) > 2
    for part in parts:
        found = safetensors.numpy.load_file(part)
        assert {index["weight_map"][name] for name in found} == {part.name}
        assert sum(x.nbytes for x in found.values()) <= 20_000 or len(found) == 1


def test_progress(tmp_path):
    seen = []
    checkpoint = read_model(write_folder(tmp_path / "source"))
    write_hf(tmp_path / "written", checkpoint, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(k + 1, len(tensors())) for k in range(len(tensors()))]


# What is refused, and what is left.


def test_nothing_is_written_over(tmp_path):
    checkpoint = read_model(write_folder(tmp_path / "source"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds something else already \(notes\.txt\)"):
        write_hf(tmp_path / "taken", checkpoint)
    with pytest.raises(FileExistsError, match=r"notes\.txt is a file"):
        write_hf(tmp_path / "taken" / "notes.txt", checkpoint)
    assert (tmp_path / "taken" / "notes.txt").read_text() == "precious"
    # An older model is replaced, all of it.
    write_hf(tmp_path / "written", checkpoint, shard_size=20_000)
    write_hf(tmp_path / "written", checkpoint, dtype=np.float16)
    assert len(list((tmp_path / "written").glob("*.safetensors*"))) == 1
    (tmp_path / "link").symlink_to("written")
    write_hf(tmp_path / "link", checkpoint)
    assert saved(tmp_path / "written")["model.norm.weight"].dtype == np.float32
    assert sorted(x.name for x in tmp_path.iterdir()) == ["link", "source", "taken", "written"]


class Interrupted(BaseException):
    pass


def interrupt(done, number):
    if done > number // 2:
        raise Interrupted


def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("before", [False, True], ids=["alone", "over an older one"])
@pytest.mark.parametrize("how", ["interrupted", "disk full", "disk too small"])
def test_what_was_there_before_is_left(tmp_path, monkeypatch, before, how):
    checkpoint = read_model(write_folder(tmp_path / "source"))
    if before:
        write_hf(tmp_path / "written", checkpoint)
    content = {x.name: x.read_bytes() for x in tmp_path.glob("written/*")}
    progress, expected = None, OSError
    if how == "interrupted":
        progress, expected = interrupt, Interrupted
    elif how == "disk full":
        monkeypatch.setattr(folder_module.os, "fsync", full)
    else:
        free = hf_write.shutil.disk_usage(tmp_path)._replace(free=1_000)
        monkeypatch.setattr(hf_write.shutil, "disk_usage", lambda _: free)
    with pytest.raises(expected):
        write_hf(tmp_path / "written", checkpoint, progress=progress, dtype=np.float16)
    assert content == {x.name: x.read_bytes() for x in tmp_path.glob("written/*")}
    assert sorted(x.name for x in tmp_path.iterdir()) == ["source", *["written"][: int(before)]]


def without_a_leaf(checkpoint):
    params = {name: leaf for name, leaf in checkpoint.params.items() if name != "final_norm"}
    return dataclasses.replace(checkpoint, params=params)


def of_another_shape(checkpoint):
    params = {**checkpoint.params, "final_norm": {"scale": np.ones(7, np.float32)}}
    return dataclasses.replace(checkpoint, params=params)


def of_another_config(checkpoint):
    config = dataclasses.replace(checkpoint.config, rope_theta=7.0)
    return dataclasses.replace(checkpoint, config=config)


def infinite(checkpoint):
    params = {**checkpoint.params, "final_norm": {"scale": np.full(24, 1e6, np.float32)}}
    return dataclasses.replace(checkpoint, params=params)


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (
            without_a_leaf,
            {},
            "the parameters are not those of the config: final_norm/scale is miss",
        ),
        (of_another_shape, {}, "final_norm/scale ((7,), expected (24,)) is of another shape"),
        (of_another_config, {}, "config has rope_theta=7.0, and its config.json another"),
        (infinite, {"dtype": np.float16}, "model.norm.weight has values that are infinite or NaN"),
        (lambda x: x, {"dtype": np.int8}, "dtype is int8, expected one of float32, bfloat16"),
        (lambda x: x, {"shard_size": 0}, "shard_size is 0, expected a number of bytes"),
        (lambda x: x, {"adapters": {"a": None}}, "adapters and base differ in structure"),
    ],
)
def test_models_that_are_none(tmp_path, change, options, sentence):
    checkpoint = change(read_model(write_folder(tmp_path / "source")))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        write_hf(tmp_path / "written", checkpoint, **options)
    assert [x.name for x in tmp_path.iterdir()] == ["source"]
