"""`lora-jax generate`, `evaluate` and `inspect` on the tiny model and on what a run has left."""

from __future__ import annotations

import io
import itertools
import json
import signal

import jax
import numpy as np
import pytest
from tiny_model import write_model
from tiny_runs import arguments, finetune, one_sentence, result, write_files, write_lines

import lora_jax as lj
from lora_jax.cli import generate as generate_command
from lora_jax.cli import main
from lora_jax.cli.options import ModelOptions
from lora_jax.cli.problem import load_model
from lora_jax.formats import read_model
from lora_jax.models.decoder import Decoder

pytestmark = pytest.mark.compiled_quickly

LETTERS = "abcdefghijklmnop"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def classifier(files, tmp_path_factory):
    """The folder of a run on two labels."""
    out = tmp_path_factory.mktemp("runs") / "classifier"
    assert main(finetune(**files, out=out, log="quiet")) == 0
    return out


@pytest.fixture(scope="module")
def echo(files, tmp_path_factory):
    """The folder of a run that has learned to write three times what it is given."""
    folder = tmp_path_factory.mktemp("echo")
    lines = [{"given": a + b, "wanted": (a + b) * 2} for a in LETTERS for b in "xyz"]
    options = {"task": "completion", "prompt": "{given}:", "completion": "{wanted}", "labels": None}
    options |= {"data": write_lines(folder / "data.jsonl", lines), "steps": 60, "test": 0.2}
    options |= {"targets": "layers/.*/kernel", "evaluate_every": 60, "compare": False}
    assert main(finetune(**{**files, **options}, out=folder / "run", log="quiet")) == 0
    return folder / "run"


def written(capsys, *argv, **options) -> str:
    assert main(arguments("generate", **options) + list(argv)) == 0
    return capsys.readouterr().out


def by_hand(model, adapter, prompt: str, number: int) -> str:
    """What the model writes, by the library alone."""
    checkpoint = read_model(model)
    base = lj.quantize(checkpoint.params, "layers/.*/kernel", layout="b i o")
    adapters = None if adapter is None else lj.load_adapters(adapter / "checkpoint", base)
    tokens = checkpoint.tokenizer.encode(prompt, add_special_tokens=False).ids
    [found] = lj.generate.generate(
        Decoder(checkpoint.config), base, adapters, [tokens], max_tokens=number, eos=checkpoint.stop
    )
    return checkpoint.tokenizer.decode(found, skip_special_tokens=True)


# generate


def test_generate_writes_what_the_library_does(files, echo, capsys):
    model = files["model"]
    plain = written(capsys, "ax:", model=model, max_tokens=6)
    assert plain == by_hand(model, None, "ax:", 6) + "\n"
    adapted = written(capsys, "ax:", adapter=echo, max_tokens=6)
    assert adapted == by_hand(model, echo, "ax:", 6) + "\n"
    assert adapted != plain
    # A saved adapter alone does not say which model it belongs to.
    saved = written(capsys, "ax:", model=model, adapter=echo / "checkpoint", max_tokens=6)
    assert saved == adapted


def test_generate_reads_the_standard_input(files, capsys, monkeypatch):
    given = written(capsys, "a\\nb", model=files["model"], max_tokens=4)  # \n as a shell has it
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb"))
    assert written(capsys, model=files["model"], max_tokens=4) == given
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(arguments("generate", model=files["model"])) == 2
    assert "the prompt is empty" in one_sentence(capsys.readouterr())


def test_generate_draws_by_seed(files, capsys):
    def draw(seed: int) -> str:
        options = {"temperature": 1, "top_p": 0.9, "max_tokens": 12, "log": "json", "seed": seed}
        event = json.loads(written(capsys, "ab", model=files["model"], **options))
        assert (event["event"], event["prompt"]) == ("generated", "ab")
        return event["text"]

    assert draw(0) == draw(0) != draw(1)


def test_a_chat_is_written_in_the_model_s_template(files, capsys, monkeypatch):
    options = {"model": files["model"], "max_tokens": 5}
    chat = written(capsys, "ab", **options, chat=True, system="cd")
    assert chat == written(
        capsys, "@system:cd<|endoftext|>\\n@user:ab<|endoftext|>\\n@assistant:", **options
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_conversation_remembers_what_was_said(files, capsys, monkeypatch):
    said, asked = iter(["ab", "cd", ""]), []
    turn = generate_command.Writer.turn

    def remembered(self, messages):
        asked.append([message["role"] for message in messages])
        return turn(self, messages)

    monkeypatch.setattr(generate_command.Writer, "turn", remembered)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    assert main(arguments("generate", model=files["model"], max_tokens=3, system="x")) == 0
    assert asked == [["system", "user"], ["system", "user", "assistant", "user"]]
    capsys.readouterr()
    # Ctrl-C ends an answer, and Ctrl-D the conversation.
    stream = generate_command.stream

    def interrupted(*args, **kwargs):
        yield from itertools.islice(stream(*args, **kwargs), 1)
        signal.raise_signal(signal.SIGINT)

    def once(_):
        monkeypatch.setattr("builtins.input", ends)
        return "ab"

    def ends(_):
        raise EOFError

    monkeypatch.setattr(generate_command, "stream", interrupted)
    monkeypatch.setattr("builtins.input", once)
    assert main(arguments("generate", model=files["model"], max_tokens=30)) == 0


# evaluate


def test_evaluate_repeats_the_test_of_a_run(classifier, capsys, tmp_path):
    out = tmp_path / "numbers.json"
    assert main(arguments("evaluate", adapter=classifier, out=out)) == 0
    found, expected = json.loads(out.read_text()), result(classifier)["test"]
    assert found["records"] == expected["records"]
    assert found["majority"] == expected["majority"]
    assert found["nll"] == pytest.approx(expected["after"]["nll"], rel=1e-5)
    assert found["accuracy"] == expected["after"]["accuracy"]
    assert "test" in capsys.readouterr().out


def test_evaluate_takes_other_data_whole(classifier, capsys, tmp_path):
    lines = [{"text": "abcdabcd"[:n], "label": 0} for n in range(1, 9)]
    data = write_lines(tmp_path / "other.jsonl", lines)
    options = {"adapter": classifier, "log": "json", "data": data}
    assert main(arguments("evaluate", **options)) == 0
    event = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (event["split"], event["records"], event["majority"]) == ("all", 8, 1)
    assert main(arguments("evaluate", **options, examples=3)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == 3


def test_evaluate_writes_what_the_model_does(files, echo, capsys, tmp_path):
    out = tmp_path / "written.jsonl"
    assert main(arguments("evaluate", adapter=echo, generations=out, max_tokens=8)) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == result(echo)["test"]["records"]
    for line in lines:
        given = line["prompt"].removesuffix(":")
        assert line["reference"] == given * 2
        assert line["generated"] == by_hand(files["model"], echo, line["prompt"], 8)
    assert np.mean([line["generated"] == line["reference"] for line in lines]) > 0.5
    assert main(arguments("evaluate", adapter=echo, generations=out)) == 2
    assert "exists; write --generations with a new file" in one_sentence(capsys.readouterr())


def test_evaluate_of_a_model_alone_on_text(files, capsys, tmp_path):
    (tmp_path / "book.txt").write_text("abc abc\n\nabc")
    options = {"data": tmp_path / "book.txt", "task": "text", "base": "float32", "log": "json"}
    assert main(arguments("evaluate", model=files["model"], **options)) == 0
    event = json.loads(capsys.readouterr().out.splitlines()[-1])
    # By the decoder itself: every token after the first, and the end.
    checkpoint = read_model(files["model"])
    losses = []
    for text in ("abc abc", "abc"):
        ids = [*checkpoint.tokenizer.encode(text).ids, 0]
        logits = Decoder(checkpoint.config).apply({"params": checkpoint.params}, np.array([ids]))
        logits = np.asarray(logits, np.float64)[0, :-1]
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-table[k, token] for k, token in enumerate(ids[1:])]
    assert event["nll"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert event["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_an_adapter_of_another_model(files, classifier, tmp_path, capsys):
    (tmp_path / "adapters.json").write_text('{"format": 1, "leaves": {"other": null}}')
    options = {"adapter": tmp_path, "model": files["model"]}
    assert main([*arguments("generate", **options), "a"]) == 2
    assert "which this base does not have" in one_sentence(capsys.readouterr())


# inspect


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


def test_inspect_a_model_and_a_rule(files, capsys):
    options = {"targets": "attn/.*/kernel", "rank": 4, "base": "nf4", "whole": ("final_norm",)}
    said, events = inspected(capsys, files["model"], **options)
    assert "layers/attn/q_proj/kernel" in said
    assert "5 of 11 weights are adapted" in said
    [model], [plan] = events["model"], events["plan"]
    assert (model["num_layers"], model["vocab_size"], model["eos"]) == (2, 98, 0)
    assert plan["trainable"] == 4 * 2 * 4 * (64 + 64) + 64  # kernels, layers, rank; and a norm
    said, events = inspected(capsys, files["model"])
    assert "0 of 11 weights are adapted" in said


def test_a_model_that_stays_packed(files, tmp_path, capsys):
    path = write_model(tmp_path / "packed.gguf", kind="Q4_1")
    said, _ = inspected(capsys, path, base="q4_1")
    paths = ("embed/", "layers/", "final_norm/")
    rows = [line.split() for line in said.splitlines() if line.startswith(paths)]
    assert {tuple(row[2:4]) for row in rows if row[0].endswith("kernel")} == {("q4_1", "5")}
    assert {tuple(row[2:4]) for row in rows if not row[0].endswith("kernel")} == {("float32", "32")}
    packed, dense = (load_model(ModelOptions(str(path), base)).base for base in ("q4_1", "float32"))
    assert packed["layers"]["attn"]["q_proj"]["kernel"].kind == "q4_1"
    merged = lj.merge(packed, jax.tree.map(lambda _: None, dense))
    jax.tree.map(np.testing.assert_array_equal, merged, dense)

    assert main(["inspect", str(path), "--base", "q4_0"]) == 2
    assert "--base is q4_0, and the kernels of packed are in q4_1; write --base q4_1" in (
        one_sentence(capsys.readouterr())
    )
    assert main(finetune(**{**files, "base": "q4_1", "out": tmp_path / "run"})) == 2
    assert "none can stay packed; they are stored as F32 (14)" in one_sentence(capsys.readouterr())


def test_inspect_a_run_and_its_adapters(classifier, capsys):
    said, events = inspected(capsys, classifier)
    assert "rank" in said
    assert "layers/attn/q_proj/kernel" in said
    assert events["config"][0]["rank"] == 8
    assert events["result"][0]["steps"] == 12
    assert events["total"] == [{"parameters": 4 * 2 * 8 * 128, "bytes": 4 * 4 * 2 * 8 * 128}]
    _, saved = inspected(capsys, classifier / "checkpoint")
    assert saved["total"] == events["total"]
    said, peft = inspected(capsys, classifier / "adapter")
    assert peft["total"] == events["total"]
    assert "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight" in said


def test_inspect_a_run_that_is_not_done(classifier, tmp_path, capsys):
    (tmp_path / "config.json").write_text((classifier / "config.json").read_text())
    said, events = inspected(capsys, tmp_path)
    assert f"It came to step 0 of 12; lora-jax finetune --resume {tmp_path} goes on." in said
    assert events["unfinished"] == [{"step": 0}]
    assert main([*arguments("generate", adapter=tmp_path), "a"]) == 2
    assert f"has no adapter yet; write lora-jax finetune --resume {tmp_path}" in one_sentence(
        capsys.readouterr()
    )


def test_a_broken_run_folder(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model": 3}')
    for command in ("generate", "evaluate"):
        assert main(arguments(command, adapter=tmp_path)) == 2
        assert "has 3 for 'model', expected a text" in one_sentence(capsys.readouterr())
    (tmp_path / "config.json").write_text("{")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is no JSON" in one_sentence(capsys.readouterr())
