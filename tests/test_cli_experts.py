"""The command line on a decoder of experts: adapters for every matrix, each in its layout."""

from __future__ import annotations

import json

import numpy as np
import pytest
from family_cases import CASES, write_family
from tiny_model import write_sentences
from tiny_runs import arguments, finetune

import lora_jax as lj
from lora_jax.cli import main
from lora_jax.core.tree import named_leaves
from lora_jax.formats import Quantization, read_model
from lora_jax.formats.checkpoint import leaf_at
from lora_jax.formats.peft import read_peft

pytestmark = pytest.mark.compiled_quickly

FIELDS = CASES["qwen3_moe"] | {"vocab_size": 256, "num_hidden_layers": 2, "eos_token_id": 2}
KERNELS = r"layers/.*_proj/kernel"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    model = write_family(folder / "model", FIELDS)
    return {"model": model, "data": write_sentences(folder / "data.jsonl", 60)}


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A run on a 4-bit base that adapts whatever the default targets match."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = {"targets": None, "rank": 4, "steps": 2, "validation": 0.0, "test": 0}
    assert main(finetune(**files, **options, out=out, log="quiet")) == 0
    return out


def test_every_matrix_is_adapted(files, run):
    adapters = lj.load_adapters(run / "checkpoint", read_model(files["model"]).params)["layers"]
    for leaves, batch in ((adapters["attn"], (2,)), (adapters["mlp"]["experts"], (2, 5))):
        kernels = [leaf["kernel"] for name, leaf in leaves.items() if name.endswith("_proj")]
        assert {(leaf.layout, leaf.batch_shape) for leaf in kernels} == {("i o", batch)}
        assert all(np.abs(leaf.b).max() > 0 for leaf in kernels)
    assert adapters["mlp"]["router"]["kernel"].batch_shape == (2,)
    rules = json.loads((run / "checkpoint" / "adapters.json").read_text())["rules"]
    assert [rule["layout"] for rule in rules] == ["b i o", "b b i o"]


def test_a_merged_model_is_the_adapted_one(files, run, tmp_path):
    assert main(["convert", str(run), str(tmp_path / "merged"), "--log", "quiet"]) == 0
    base = read_model(files["model"], quantize=Quantization(KERNELS, flat=True)).params
    expected = lj.merge(base, lj.load_adapters(run / "checkpoint", base))
    found, dense = (read_model(path).params for path in (tmp_path / "merged", files["model"]))
    for path, leaf in named_leaves(found):
        np.testing.assert_allclose(leaf, leaf_at(expected, path), atol=1e-6, err_msg=path)
        if path.endswith("kernel") and path != "lm_head/kernel":
            assert np.abs(leaf - leaf_at(dense, path)).max() > 1e-3, path


def test_an_adapter_for_others(files, run, tmp_path):
    assert main(["convert", str(run), str(tmp_path / "own"), "--to", "lora-jax"]) == 0
    assert main(["convert", str(run), str(tmp_path / "a.gguf"), "--to", "gguf-adapter"]) == 0
    base = read_model(files["model"]).params
    theirs, ours = read_peft(run / "adapter", base), lj.load_adapters(tmp_path / "own", base)
    merged, expected = (lj.merge(base, x)["layers"]["mlp"]["experts"] for x in (theirs, ours))
    for name, leaf in expected.items():
        np.testing.assert_allclose(merged[name]["kernel"], leaf["kernel"], atol=1e-5)


def test_what_reads_a_run(run, capsys):
    adapter = {"adapter": run, "log": "json"}
    assert main([*arguments("generate", max_tokens=2, **adapter), "ab"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prompt"] == "ab"
    assert main(arguments("evaluate", split="all", examples=4, **adapter)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == 4


@pytest.mark.parametrize("base", ["nf4", "float32"])
def test_a_plan(files, capsys, base):
    options = {"base": base, "targets": "layers/.*/kernel", "rank": 4, "log": "json"}
    assert main([*arguments("inspect", **options), str(files["model"])]) == 0
    [plan] = [
        event
        for event in map(json.loads, capsys.readouterr().out.splitlines())
        if event["event"] == "plan"
    ]
    # q, k, v, o and the router of a layer; gate, up and down of an expert.
    layer = (32 + 32) + 2 * (32 + 16) + (32 + 32) + (32 + 5)
    assert plan["trainable"] == 2 * 4 * (layer + 5 * 3 * (32 + 24))


def test_targets_that_are_no_matrices(files, capsys):
    argv = ["inspect", str(files["model"]), "--targets", "norm", "--log", "quiet"]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "the pattern 'norm' matches" in said
    assert "which is no matrix" in said


def test_what_peft_would_adapt(run, capsys):
    """Five experts of rank 4, of which gates and ups add up."""
    assert main(["inspect", str(run / "adapter"), "--log", "json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ranks = {event["name"]: event["ranks"] for event in events if event["event"] == "module"}
    attention = {name: [4] for name in ("k_proj", "o_proj", "q_proj", "v_proj")}
    assert ranks == attention | {"experts": [5 * 4, 5 * 8], "gate": [4]}
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    parameters = ["experts.down_proj", "experts.gate_up_proj", "gate.weight"]
    assert config["target_parameters"] == parameters
