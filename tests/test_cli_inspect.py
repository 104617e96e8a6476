"""`lora-jax inspect` of each kind of file and folder, found by looking, and of what is none."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import safetensors.numpy
from hf_folder import GOLDEN, tensors, write_folder, write_json
from test_gguf import write as write_gguf
from tiny_model import CONFIG, write_model
from tiny_runs import arguments, one_sentence, write_lines

import lora_jax as lj
from lora_jax.cli import main
from lora_jax.formats import read_model
from lora_jax.formats.gguf_adapter import write_gguf_adapter
from lora_jax.formats.outline import read_outline, safetensors_headers

pytestmark = pytest.mark.compiled_quickly


def inspected(capsys, source, **options) -> tuple[str, dict[str, list[dict]]]:
    """What is said for people, and the events for programs by their names."""
    command, *flags = arguments("inspect", **options)
    assert main([command, str(source), *flags]) == 0
    said, events = capsys.readouterr().out, {}
    assert main([command, str(source), *flags, "--log", "json"]) == 0
    for line in capsys.readouterr().out.splitlines():
        event = json.loads(line)
        events.setdefault(event.pop("event"), []).append(event)
    return said, events


def refused(capsys, source, **options) -> str:
    """The sentence with which it ends."""
    command, *flags = arguments("inspect", **options)
    assert main([command, str(source), *flags, "--log", "quiet"]) == 2
    return one_sentence(capsys.readouterr())


@pytest.fixture
def unread(monkeypatch):
    """Whoever reads the values of a tensor fails."""
    monkeypatch.setattr(gguf, "dequantize", None)
    monkeypatch.setattr(safetensors, "safe_open", None)


SIZE = sum(x.size for x in tensors().values())


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_folder(tmp_path, capsys, shards):
    folder = write_folder(tmp_path / "tiny", dtype=np.float16, shards=shards)
    said, events = inspected(capsys, folder)
    assert said.startswith(f"{folder} is a model folder of transformers.\n")
    assert events["found"] == [{"kind": "hf", "path": str(folder)}]
    [model] = events["model"]
    theirs = json.loads(str(GOLDEN["config"]))
    assert (model["name"], model["dim"]) == ("tiny", theirs["hidden_size"])
    assert (model["bos"], model["eos"], model["stop"]) == (0, 1, [1])
    assert (model["rope_theta"], model["chat template"]) == (500.0, "no")
    stored = {"kind": "F16", "tensors": len(tensors()), "parameters": SIZE, "bytes": 2 * SIZE}
    assert events["stored"] == [stored]
    assert events["plan"] == [{"trainable": 0, "total": SIZE}]
    said, events = inspected(capsys, folder, targets="q_proj", rank=2)
    assert "1 of 12 weights are adapted" in said
    assert events["plan"][0]["trainable"] == 3 * 2 * (24 + 32)


@pytest.mark.usefixtures("unread")
def test_a_gguf_file(tmp_path, capsys):
    written = write_gguf(tmp_path / "model.gguf")
    said, events = inspected(capsys, written.path)
    assert said.startswith(f"{written.path} is a GGUF file.\n")
    assert "tokenizer.ggml.eos_token_id" in said
    assert "tokenizer.ggml.tokens" not in said
    # By blocks of 32: 20 bytes in Q4_1, 34 in Q8_0.
    matrices = 64 * 32 + 2 * 32 * 32 + 32 * 64 + 2 * 96 * 32
    expected = {
        "Q4_1": (12, 2 * matrices, 2 * matrices // 32 * 20),
        "Q8_0": (1, 268 * 32, 268 * 34),
        "F16": (2, 2 * 96 * 32, 2 * 2 * 96 * 32),
        "F32": (5, 5 * 32, 4 * 5 * 32),
    }
    found = {x["kind"]: (x["tensors"], x["parameters"], x["bytes"]) for x in events["stored"]}
    assert found == expected
    total = sum(parameters for _, parameters, _ in expected.values())
    assert events["plan"] == [{"trainable": 0, "total": total}]
    assert events["model"][0]["stop"] == [2]


def test_models_that_cannot_be_run_are_shown_all_the_same(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", model_type="mamba")
    said, events = inspected(capsys, folder)
    assert "It cannot be run here: model_type 'mamba' in config.json" in said
    assert events["total"] == [{"parameters": SIZE, "bytes": 4 * SIZE}]
    assert "model.layers.2.mlp.up_proj.weight" in said
    assert "model_type 'mamba' in config.json" in refused(capsys, folder, targets="q_proj")
    path = write_gguf(tmp_path / "model.gguf", architecture="mamba").path
    said, events = inspected(capsys, path)
    assert "It cannot be run here: architecture 'mamba' in the GGUF metadata" in said
    assert events["metadata"][0]["general.architecture"] == "mamba"
    (folder / "tokenizer.json").unlink()
    write_json(folder / "config.json", json.loads(str(GOLDEN["config"])))
    said, _ = inspected(capsys, folder)
    assert "has no tokenizer.json; write one with" in said


def test_a_safetensors_file(tmp_path, capsys):
    path = tmp_path / "any name"
    weights = {"b": np.ones((2, 3), np.int8), "a.c": np.ones((), np.float64), "d": np.ones((0, 4))}
    safetensors.numpy.save_file(weights, path)
    said, events = inspected(capsys, path)
    assert said.startswith(f"{path} is a safetensors file.\n")
    found = [(x["name"], x["kind"], x["shapes"], x["parameters"]) for x in events["tensor"]]
    assert found == [("a.c", "F64", "", 1), ("b", "I8", "2x3", 6), ("d", "F64", "0x4", 0)]
    assert events["total"] == [{"parameters": 7, "bytes": 14}]


def test_a_peft_adapter(tmp_path, capsys):
    shapes = {"self_attn.q_proj": (4, 24, 32), "mlp.up_proj": (2, 24, 40)}
    weights = {}
    for layer in range(2):
        for module, (rank, inn, out) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            weights[f"{name}.lora_A.weight"] = np.ones((rank, inn), np.float32)
            weights[f"{name}.lora_B.weight"] = np.ones((out, rank), np.float32)
    safetensors.numpy.save_file(weights, tmp_path / "adapter_model.safetensors")
    write_json(tmp_path / "adapter_config.json", {"r": 4, "rank_pattern": {"up_proj": 2}})
    said, events = inspected(capsys, tmp_path)
    assert said.startswith(f"{tmp_path} is a PEFT adapter.\n")
    assert events["module"] == [
        {"name": "q_proj", "number": 2, "ranks": [4]},
        {"name": "up_proj", "number": 2, "ranks": [2]},
    ]
    number = 2 * (4 * (24 + 32) + 2 * (24 + 40))
    assert events["total"] == [{"parameters": number, "bytes": 4 * number}]
    assert "--targets and --whole are about models" in refused(capsys, tmp_path, targets="q")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    said = refused(capsys, tmp_path)
    assert "lacks adapter_model.safetensors; it has adapter_config.json, adapter_model.bin" in said


def test_a_gguf_adapter(tmp_path, capsys):
    leaf = lj.Adapter(np.ones((2, 3, 64), np.float32), np.ones((2, 64, 3), np.float32))
    adapters = {"layers": {"attn": {"v_proj": {"kernel": leaf}}}}
    write_gguf_adapter(tmp_path / "adapter.gguf", adapters, CONFIG, dtype=np.float16)
    said, events = inspected(capsys, tmp_path / "adapter.gguf")
    assert "cannot be run" not in said
    assert events["metadata"][0]["general.type"] == "adapter"
    assert [x["name"] for x in events["tensor"]] == [
        f"blk.{layer}.attn_v.weight.lora_{factor}" for layer in range(2) for factor in "ab"
    ]
    number = 2 * 2 * 3 * 64
    assert events["total"] == [{"parameters": number, "bytes": 2 * number}]


def test_records(tmp_path, capsys):
    text = "é" * 80
    data = write_lines(tmp_path / "data.jsonl", [{"text": text, "label": 1}, {"text": "b"}])
    said, events = inspected(capsys, data)
    assert said == (
        f"{data} is a file of records.\n\n"
        f'2 records, of which the first is\n  text   "{"é" * 58}…\n  label  1\n'
    )
    expected = {"number": 2, "columns": ["text", "label"], "first": {"text": text, "label": 1}}
    assert events["records"] == [expected]


def cut(path, number):
    path.write_bytes(path.read_bytes()[:number])


@pytest.mark.parametrize("number", [0, 7, 8, 100, -1])
def test_truncated_files(tmp_path, capsys, number):
    folder = write_folder(tmp_path / "hf")
    weights = folder / "model.safetensors"
    path = write_model(tmp_path / "model.gguf")
    cut(weights, number)
    cut(path, number)
    for source in (folder, weights):
        assert "ends too early" in refused(capsys, source)
    # Without a beginning it could be anything.
    expected = "is no file that is known" if number == 0 else "is broken or ends too early"
    assert expected in refused(capsys, path)


@pytest.mark.parametrize(
    "head", [b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"\xff\xff", b"[" * 9_999]
)
def test_heads_that_are_none(tmp_path, head):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(ValueError, match=r"model\.safetensors is broken or ends too early"):
        safetensors_headers(path)


def test_an_outline_knows_what_reading_would_find(tmp_path):
    for path in (write_folder(tmp_path / "hf", shards=2), write_model(tmp_path / "model.gguf")):
        found, expected = read_outline(path), read_model(path)
        assert found.name == expected.name
        assert found.config() == expected.config
        words = (expected.special, expected.stop, expected.chat_template)
        assert found.words() == words


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "notes",
            b"abcdefgh",
            "notes is no file that is known: it begins with b'abcd'; expected a",
        ),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: a list, expected an object"),
        ("a.csv", b"a,b\n", "a.csv holds no records"),
        ("a.json", b'{"a": 1', "not JSON"),
        ("model.pt", b"PK\x03\x04", "has its weights in a pickle (model.pt)"),
    ],
)
def test_files_that_are_none(tmp_path, capsys, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    assert sentence in refused(capsys, tmp_path / name)
    assert "there is no file" in refused(capsys, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "in a pickle (pyt"),
        (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors; it has config.js"),
        (lambda f: (f / "config.json").unlink(), "has no config.json, without which no model is"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "is neither that of a model, which has"),
        (lambda f: (f / "generation_config.json").write_text("[]"), "holds a list, expected"),
        (lambda f: write_json(f / "adapters.json", {}), "is not whole; expected a folder that lj."),
        (lambda f: (f / "adapters.json").write_text("["), "adapters.json is no JSON"),
    ],
)
def test_folders_that_are_none(tmp_path, capsys, break_it, sentence):
    folder = write_folder(tmp_path / "tiny")
    break_it(folder)
    assert sentence in refused(capsys, folder)


def test_a_folder_of_nothing_that_is_known(tmp_path, capsys):
    assert "is no folder that is known: it has nothing; expected" in refused(capsys, tmp_path)
    for name in "abcd":
        (tmp_path / name).touch()
    assert "it has a, b, c, ...; expected a GGUF file" in refused(capsys, tmp_path)
