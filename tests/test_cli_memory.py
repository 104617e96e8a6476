"""`lora-jax memory`: what is said of a step, of one that does not fit, and of what is quoted."""

from __future__ import annotations

import json

import pytest
from hf_folder import GOLDEN, write_json
from tiny_runs import arguments, finetune, one_sentence, write_files

from lora_jax import memory
from lora_jax.cli import main
from lora_jax.cli.finetune import Config, start
from lora_jax.cli.memory import bytes_of
from lora_jax.cli.parsing import parse
from lora_jax.cli.report import Reporter
from lora_jax.cli.training import Problem
from lora_jax.models.shapes import SHAPES

pytestmark = pytest.mark.compiled_quickly

GIB = 2**30


def events(capsys, **options) -> list[dict]:
    """What is said for programs."""
    assert main([*arguments("memory", **options), "--log", "json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys, **options) -> str:
    """The sentence with which it ends."""
    assert main([*arguments("memory", **options), "--log", "quiet"]) == 2
    return one_sentence(capsys.readouterr())


def test_one_policy(capsys):
    options = {"model": "llama-3-8b", "batch": 4, "remat": "products"}
    [event] = events(capsys, **options)
    found = memory.predict(memory.Setup(SHAPES["llama-3-8b"], batch=4, remat="products", chunk=512))
    assert event["total"] == found.total
    assert event["needed"] == found.needed
    assert sum(event[name] for name in found.categories()) == event["total"]
    assert main(arguments("memory", **options)) == 0
    said = capsys.readouterr().out
    assert f"{found.base:,}" in said
    assert f"{found.total:,}" in said
    assert "With remat products most is alive at the backward of a step." in said


def test_all_policies_side_by_side(capsys):
    found = events(capsys, model="smollm2-135m", batch=8)
    assert [event["remat"] for event in found] == ["none", *memory.POLICIES]
    totals = [event["total"] for event in found]
    assert totals == sorted(totals, reverse=True)
    assert main(arguments("memory", model="smollm2-135m", batch=8, device_memory="4GB")) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[-5:] == ["none", *memory.POLICIES]
    assert rows[-1].split()[-5:] == ["yes" if total < 4e9 else "no" for total in totals]


def test_the_policy_that_fits(capsys):
    options = {"model": "llama-3-8b", "batch": 4, "remat": "auto"}
    assert events(capsys, **options, device_memory="24GB")[0]["remat"] == "attention"
    assert events(capsys, **options, device_memory="80GB")[0]["remat"] == "products"


def test_options_reach_the_step(capsys):
    [event] = events(
        capsys,
        model="llama-3.2-1b",
        method="full",
        optimizer="sgd",
        remat="none",
        scan=False,
        dtype="float32",
        chunk=0,
    )
    assert event["base"] == 4 * 1_235_814_400
    assert (event["optimizer"], event["scales"], event["adapters"]) == (0, 0, 0)


@pytest.mark.parametrize("remat", [None, "products"])
def test_a_step_that_does_not_fit(capsys, remat):
    sentence = refused(capsys, model="llama-65b", batch=8, remat=remat, device_memory="48GB")
    assert sentence.startswith("lora-jax memory: this step needs ")
    assert "and there are 44.70 GiB; write --remat " in sentence
    words = sentence.split("write ")[1].split(", which")[0].replace(" and", "").split()
    assert events(capsys, model="llama-65b", batch=8, device_memory="48GB", **_options(words))


def _options(words: list[str]) -> dict[str, str]:
    """What a sentence proposes."""
    names = [word.removeprefix("--") for word in words[::2]]
    return dict(zip(names, words[1::2], strict=True))


def test_a_model_that_is_too_large(capsys):
    sentence = refused(capsys, model="gpt-3-175b", device_memory="80GB")
    assert "what stays from step to step takes" in sentence
    assert sentence.endswith("write a smaller model.\n")


def test_a_folder(tmp_path, capsys):
    write_json(tmp_path / "config.json", json.loads(str(GOLDEN["config"])))
    [event] = events(capsys, model=tmp_path, method="lora", remat="layer", dtype="float32")
    config = json.loads(str(GOLDEN["config"]))
    assert event["base"] > 4 * config["vocab_size"] * config["hidden_size"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "llama-9"}, "there is no shape 'llama-9', nor a folder of that name"),
        ({"device_memory": "much"}, "--device-memory is 'much', expected a size such as 80GB"),
        ({"targets": "conv"}, "targets is 'conv', which matches none of embed/embedding"),
        ({"rank": 0}, "--rank is 0, expected at least 1"),
        ({"batch": 3, "accumulate": 2}, "cannot be cut in 2 equal parts"),
    ],
)
def test_mistakes(capsys, options, sentence):
    assert sentence in refused(capsys, **options)


def test_a_broken_config(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refused(capsys, model=tmp_path)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80e9), ("23.5 GiB", 23.5 * GIB), ("141g", 141e9), ("512MiB", GIB / 2), ("7", 7)],
)
def test_sizes(text, size):
    assert bytes_of(text) == size


def test_what_is_quoted(capsys):
    found = events(capsys, quoted=True)
    assert [event["case"] for event in found] == [case.case for case in memory.QUOTED]
    assert main(["memory", "--quoted"]) == 0
    said = capsys.readouterr().out
    for words in ("2,800.0", "104.1", "0.0336", "2 weights, 2 gradients, 4 float32 weights"):
        assert words in said


def test_finetune_chooses_a_policy(tmp_path, capsys, monkeypatch):
    argv = finetune(**write_files(tmp_path), out=tmp_path / "run", remat="auto")
    config = parse(Config, argv[1:], prog="lora-jax finetune", default=start(argv[1:]))
    problem = Problem.load(config, Reporter("quiet"))
    assert problem.model.decoder.config.remat == "products"  # a CPU names no limit
    monkeypatch.setattr("lora_jax.memory.choice.device_bytes", lambda: 10**6)
    assert main([*argv, "--log", "quiet"]) == 2
    assert "this step needs" in one_sentence(capsys.readouterr())
