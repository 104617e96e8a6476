"""`lora-jax convert`: what a run has left, in the forms that other programs read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from family_cases import CASES, write_family
from hf_folder import tensors, write_folder
from tiny_model import write_model
from tiny_runs import arguments, finetune, one_sentence, weights, write_files

import lora_jax as lj
from lora_jax.cli import convert, main
from lora_jax.formats import folder as folder_module
from lora_jax.formats import read_model
from lora_jax.formats.peft import write_peft
from lora_jax.models.decoder import Decoder

pytestmark = pytest.mark.compiled_quickly

TOKENS = np.random.default_rng(0).integers(0, 98, (2, 20))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    """The folder of a run on a 4-bit base."""
    out = tmp_path_factory.mktemp("runs") / "done"
    options = {"steps": 4, "evaluate_every": 4, "compare": False, "test": 0, "log": "quiet"}
    assert main(finetune(**files, **options, out=out)) == 0
    return out


def converted(capsys, source, folder, **options) -> tuple[str, list[dict]]:
    """What is said for people, and the events for programs, of the same conversion twice."""
    command, *flags = arguments("convert", **options)
    argv = [command, str(source), str(folder), *flags]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert main([*argv, "--log", "json"]) == 0  # the second time over the first
    return said, list(map(json.loads, capsys.readouterr().out.splitlines()))


def adapted_logits(model, adapter, kind):
    """By the library alone."""
    checkpoint = read_model(model)
    base = checkpoint.params
    if kind != "float32":
        base = lj.quantize(base, "layers/.*/kernel", kind=kind, layout="b i o")
    adapters = lj.load_adapters(adapter, base)
    apply = lj.adapt(Decoder(checkpoint.config).apply)
    return np.asarray(apply({"params": lj.combine(base, adapters)}, TOKENS))


def logits(folder):
    checkpoint = read_model(folder)
    return np.asarray(Decoder(checkpoint.config).apply({"params": checkpoint.params}, TOKENS))


def test_a_run_becomes_a_whole_model(files, done, tmp_path, capsys):
    said, events = converted(capsys, done, tmp_path / "merged")
    assert f"{done} is the folder of a run." in said
    assert f"{files['model']} is read, its kernels are stored in nf4, the adapter is merged" in said
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path / "merged"}") loads it.' in said
    size = sum(file.stat().st_size for file in (tmp_path / "merged").iterdir())
    path = str(tmp_path / "merged")
    assert events == [
        {"event": "found", "kind": "run", "path": str(done)},
        {"event": "converted", "to": "hf", "path": path, "bytes": size},
    ]
    # As it was trained: on the base in 4 bits, and not on the model from which that was made.
    expected = adapted_logits(files["model"], done / "checkpoint", "nf4")
    np.testing.assert_allclose(logits(path), expected, atol=1e-4)
    other = adapted_logits(files["model"], done / "checkpoint", "float32")
    assert np.abs(logits(path) - other).max() > 1e-2
    assert read_model(path).tokenizer.encode("ab!!").ids == [65, 66, 97]
    # The run's own folder is a place for it, too.
    assert main(["convert", str(done), str(done / "merged"), "--log", "quiet"]) == 0
    np.testing.assert_array_equal(logits(done / "merged"), logits(path))
    shutil.rmtree(done / "merged")


def test_an_adapter_alone_is_merged_into_the_model_that_is_named(files, done, tmp_path, capsys):
    options = {"model": files["model"], "dtype": "bfloat16", "shard_size": 0.01}
    converted(capsys, done / "checkpoint", tmp_path / "merged", **options)
    expected = adapted_logits(files["model"], done / "checkpoint", "float32")
    found = logits(tmp_path / "merged")
    assert 1e-4 < np.abs(found - expected).max() < 0.1
    assert main(["convert", str(done / "checkpoint"), str(tmp_path / "other")]) == 2
    assert "does not say what model it is for; write --model SOURCE" in one_sentence(
        capsys.readouterr()
    )


def test_a_run_becomes_an_adapter_of_peft(done, tmp_path, capsys, monkeypatch):
    # Of the model only the shapes are needed.
    monkeypatch.setattr(convert, "read_for", None)
    monkeypatch.setattr(convert, "read_model", None)
    said, events = converted(capsys, done, tmp_path / "adapter", to="peft")
    assert f'PeftModel.from_pretrained(model, "{tmp_path / "adapter"}") loads it.' in said
    assert events[-1]["to"] == "peft"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (done / "adapter" / name).read_bytes()
    converted(capsys, done, tmp_path / "half", to="peft", dtype="float16")
    half = safetensors.numpy.load_file(tmp_path / "half" / "adapter_model.safetensors")
    for name, values in weights(done).items():
        np.testing.assert_array_equal(half[name], values.astype(np.float16))


def test_a_run_becomes_an_adapter_of_ours(files, done, tmp_path, capsys):
    converted(capsys, done, tmp_path / "adapter", to="lora-jax")
    base = read_model(files["model"]).params
    found, expected = (
        lj.load_adapters(path, base) for path in (tmp_path / "adapter", done / "checkpoint")
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def test_a_run_becomes_an_adapter_of_llama_cpp(files, done, tmp_path, capsys):
    path, flags = tmp_path / "adapter.gguf", ["--to", "gguf-adapter"]
    assert main(["convert", str(done), str(path), *flags]) == 0
    assert f"llama-server --model MODEL.gguf --lora {path} loads it" in capsys.readouterr().out
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "llama"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found = {x.name: gguf.dequantize(x.data, x.tensor_type) for x in reader.tensors}
    assert len(found) == 2 * 2 * 4
    saved = weights(done)
    name = "base_model.model.model.layers.1.self_attn.v_proj"
    np.testing.assert_array_equal(
        found["blk.1.attn_v.weight.lora_a"], saved[f"{name}.lora_A.weight"]
    )
    np.testing.assert_array_equal(
        found["blk.1.attn_v.weight.lora_b"], saved[f"{name}.lora_B.weight"]
    )
    config = json.loads((done / "adapter" / "adapter_config.json").read_text())
    assert alpha == config["lora_alpha"]
    # It might be the model's own file.
    assert main(["convert", str(done), str(files["model"]), *flags]) == 2
    assert "is there already; write the name of a new file" in one_sentence(capsys.readouterr())


@pytest.mark.parametrize(
    ("case", "architecture"), [("qwen3_moe", "qwen3moe"), ("mistral", "llama"), ("smollm3", None)]
)
def test_the_family_of_a_folder_as_llama_cpp_calls_it(tmp_path, capsys, case, architecture):
    model = write_family(tmp_path / "model", CASES[case])
    params = read_model(model).params
    rule = lj.LoraRule("attn/v_proj", rank=2, layout="b i o")
    lj.save_adapters(tmp_path / "own", lj.init_adapters(jax.random.key(0), params, rule))
    argv = ["convert", str(tmp_path / "own"), str(tmp_path / "a.gguf"), "--model", str(model)]
    status = main([*argv, "--to", "gguf-adapter", "--log", "quiet"])
    if architecture is None:
        assert status == 2
        assert "architecture is 'smollm3', for which" in one_sentence(capsys.readouterr())
    else:
        assert status == 0
        fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
        assert fields["general.architecture"].contents() == architecture


def test_an_adapter_of_peft_becomes_any_of_them(files, done, tmp_path, capsys):
    """For the model that it names, or another that is named."""
    base = read_model(files["model"]).params
    adapters = lj.load_adapters(done / "checkpoint", base)
    write_peft(tmp_path / "peft", adapters, base_model=str(files["model"]))
    said, _ = converted(capsys, tmp_path / "peft", tmp_path / "merged")
    assert f"{tmp_path / 'peft'} is a PEFT adapter." in said
    expected = adapted_logits(files["model"], done / "checkpoint", "float32")
    np.testing.assert_allclose(logits(tmp_path / "merged"), expected, atol=1e-4)
    options = {"to": "lora-jax", "model": files["model"]}
    converted(capsys, tmp_path / "peft", tmp_path / "own", **options)
    found = lj.load_adapters(tmp_path / "own", base)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, adapters))
    # Twice there and back, byte for byte.
    converted(capsys, tmp_path / "peft", tmp_path / "again", to="peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        there, here = (tmp_path / x / name for x in ("peft", "again"))
        assert there.read_bytes() == here.read_bytes()


def test_an_adapter_of_peft_with_a_rank_for_each_layer(files, tmp_path, capsys):
    checkpoint = read_model(files["model"], scan_layers=False)
    rules = [lj.LoraRule(f"layers_{k}/.*/q_proj", rank=k + 2, alpha=9.0) for k in range(2)]
    adapters = lj.init_adapters(jax.random.key(0), checkpoint.params, rules)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    write_peft(tmp_path / "peft", adapters, base_model=str(files["model"]))
    converted(capsys, tmp_path / "peft", tmp_path / "merged")
    apply = lj.adapt(Decoder(checkpoint.config).apply)
    expected = apply({"params": lj.combine(checkpoint.params, adapters)}, TOKENS)
    np.testing.assert_allclose(logits(tmp_path / "merged"), expected, atol=1e-4)
    converted(capsys, tmp_path / "peft", tmp_path / "again", to="peft")
    found, there = (
        safetensors.numpy.load_file(tmp_path / x / "adapter_model.safetensors")
        for x in ("again", "peft")
    )
    assert found.keys() == there.keys()
    assert all(np.array_equal(x, there[name]) for name, x in found.items())
    # Ours are of stacked layers.
    argv = ["convert", str(tmp_path / "peft"), str(tmp_path / "own"), "--to", "lora-jax"]
    assert main([*argv, "--log", "quiet"]) == 2
    assert "have ranks 2, 3 in different layers" in one_sentence(capsys.readouterr())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (None, "is a PEFT adapter, which does not say what model it is for; write --model SOURCE"),
        ("no such model", "'hf:no such model' names no model on the hub"),
    ],
)
def test_an_adapter_of_peft_without_its_model(tmp_path, capsys, name, sentence):
    config = {"peft_type": "LORA", "base_model_name_or_path": name}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert main(["convert", str(tmp_path), str(tmp_path / "out"), "--log", "quiet"]) == 2
    assert sentence in one_sentence(capsys.readouterr())


def test_models_become_folders(files, tmp_path, capsys):
    said, _ = converted(capsys, files["model"], tmp_path / "one")
    assert f"{files['model']} is a GGUF file.\nIt is written in float32." in said
    source = write_folder(tmp_path / "source", dtype=jnp.bfloat16)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    said, _ = converted(capsys, source, tmp_path / "two")
    assert f"{source} is a model folder of transformers.\nIt is written in bfloat16." in said
    found = safetensors.numpy.load_file(tmp_path / "two" / "model.safetensors")
    for name, values in tensors(jnp.bfloat16).items():
        np.testing.assert_array_equal(found[name], values)


def test_the_four_bits_of_a_file_are_decoded_as_they_are(tmp_path, capsys):
    model = write_model(tmp_path / "model.gguf", kind="Q4_1")
    said, _ = converted(capsys, model, tmp_path / "packed", base="q4_1")
    assert f"{model} is read, its kernels are stored in q4_1, and it is written in float32." in said
    converted(capsys, model, tmp_path / "dense")
    packed, dense = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("packed", "dense")
    )
    assert packed == dense


# What is refused.


def folder_of(tmp_path, **content):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in content.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"adapter_config__json": "{"}, "adapter_config.json is no JSON"),
        ({"config__json": "{}"}, "is neither that of a model, which has a 'model_type', nor that"),
        ({"config__json": "{"}, "config.json is no JSON"),
        ({"pytorch_model__bin": ""}, "has its weights in a pickle (pytorch_model.bin)"),
        (
            {"config__json": '{"model_type": "llama"}', "pytorch_model__bin": ""},
            "has its weights in a pickle (pytorch_model.bin)",
        ),
        ({"config__json": '{"model_type": "mamba"}', "model__safetensors": ""}, "model_type 'mam"),
        ({"model__safetensors": ""}, "has no config.json, without which no model is defined"),
        ({"a__txt": "", "b__txt": ""}, "is no folder that is known: it has a.txt, b.txt; expected"),
        ({}, "is no folder that is known: it has nothing; expected a GGUF file, a safetensors"),
        ({"config__json": '{"model": 3}'}, "has 3 for 'model', expected a text"),
        ({"config__json": '{"model": "none"}', "checkpoint": ""}, "there is no file 'none'"),
        ({"config__json": '{"model": "none"}'}, "there is no file 'none'"),
    ],
    ids=str,
)
def test_folders_that_cannot_be_converted(tmp_path, capsys, content, sentence):
    folder = folder_of(tmp_path, **content)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--log", "quiet"]) == 2
    said = one_sentence(capsys.readouterr())
    assert said.startswith("lora-jax convert: ")
    assert sentence in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("model.onnx", b"\x08\x07", r"is no file that is known: it begins with b'\x08\x07'; expec"),
        ("model.bin", b"PK\x03\x04", "has its weights in a pickle (model.bin)"),
        ("a.gguf", b"GGUF and so on", "is broken or ends too early"),
        ("a.safetensors", b"", "is a safetensors file, which cannot be converted; expected the"),
        ("a.csv", b"a,b", "is a file of records, which cannot be converted; expected the folder"),
        ("a.txt.gz", b"a,b", "is a file of records, which cannot be converted"),
    ],
)
def test_files_that_cannot_be_converted(tmp_path, capsys, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    assert main(["convert", str(tmp_path / name), str(tmp_path / "out"), "--log", "quiet"]) == 2
    assert sentence in one_sentence(capsys.readouterr())


@pytest.mark.parametrize(
    ("source", "options", "sentence"),
    [
        ("model", {"to": "peft"}, "is a whole model, and --to peft writes an adapter; write --to"),
        ("model", {"model": "x"}, "is a model itself; leave out --model x"),
        ("done", {"to": "peft", "base": "nf4"}, "--base nf4 is about a model, and --to peft writ"),
        ("done", {"to": "onnx"}, "invalid choice 'onnx' for argument '--to'"),
        ("done", {"shard_size": 0}, "--shard-size is 0.0, expected at least 0.001"),
        ("done", {"model": "other"}, "kernel has a (2, 8, 64) and b (2, 64, 8), but a weight of"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(files, done, tmp_path, capsys, source, options, sentence):
    path = {"model": files["model"], "done": done}[source]
    if options.get("model") == "other":
        options = {"model": write_folder(tmp_path / "other"), "base": "float32"}
    command, *flags = arguments("convert", **options, log="quiet")
    assert main([command, str(path), str(tmp_path / "out"), *flags]) == 2
    assert sentence in one_sentence(capsys.readouterr())
    assert not (tmp_path / "out").exists()


def test_source_and_destination_are_needed(files, capsys):
    assert main(["convert"]) == 2
    assert "missing from lora-jax convert: SRC DST" in one_sentence(capsys.readouterr())
    assert main(["convert", str(files["model"])]) == 2
    assert "DST" in one_sentence(capsys.readouterr())


@pytest.mark.parametrize("to", ["hf", "peft", "lora-jax"])
def test_a_place_that_is_taken(done, tmp_path, capsys, to):
    (tmp_path / "notes.txt").write_text("precious")
    flags = ["--to", to, "--log", "quiet"]
    for place, sentence in (
        (tmp_path, "holds something else already (notes.txt); write the name of a new folder"),
        (tmp_path / "notes.txt", "notes.txt is a file; write the name of a new folder"),
        (done, "holds something else already (adapter, checkpoint, "),
    ):
        before = sorted(done.iterdir())
        assert main(["convert", str(done), str(place), *flags]) == 2
        assert sentence in one_sentence(capsys.readouterr())
        assert sorted(done.iterdir()) == before
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_a_full_disk(files, tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder_module.os, "fsync", full)
    assert main(["convert", str(files["model"]), str(tmp_path / "out"), "--log", "quiet"]) == 2
    said = one_sentence(capsys.readouterr())
    assert f"{tmp_path / 'out'} could not be written: No space left on device; make room" in said
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_what_was_there(files, tmp_path, capsys, monkeypatch):
    write = convert.write_hf

    def stopped(path, checkpoint, adapters, **options):
        def progress(done, total):
            if done == total // 2:
                signal.raise_signal(signal.SIGINT)

        write(path, checkpoint, adapters, **{**options, "progress": progress})

    monkeypatch.setattr(convert, "write_hf", stopped)
    assert main(["convert", str(files["model"]), str(tmp_path / "out"), "--log", "quiet"]) == 130
    assert f"interrupted; {tmp_path / 'out'} is as it was." in one_sentence(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []
