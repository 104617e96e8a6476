"""What the commands do with input that is wrong: one sentence, and status 2."""

from __future__ import annotations

import json
import re

import pytest
from tiny_model import write_model
from tiny_runs import arguments, finetune, one_sentence, write_files, write_lines

from lora_jax.cli import COMMANDS, main, run_folder

pytestmark = pytest.mark.compiled_quickly


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        # The model.
        ({"model": "no-such-model"}, "there is no file 'no-such-model'"),
        ({"model": "pypi:nonsense"}, "names no member of a wheel"),
        ({"model": __file__}, "test_cli_errors.py is no model: it begins with"),
        # The rule.
        ({"targets": "no_such_kernel"}, "pattern 'no_such_kernel' matches no leaf"),
        ({"targets": "("}, "pattern '(' is no regular expression"),
        ({"rank": 65}, "rank 65 of the rule"),
        ({"rank": 0}, "rank is 0, expected a whole number of at least 1"),
        ({"whole": ("q_proj",)}, "a leaf is adapted or trained whole, not both"),
        # The training.
        ({"learning_rate": 0}, "learning_rate is 0.0, expected a positive number"),
        ({"steps": 0}, "--steps is 0, expected at least 1"),
        ({"accumulate": 3}, "--rows 4 cannot be cut in 3 equal parts"),
        ({"schedule": "square"}, "invalid choice 'square' for argument '--schedule'"),
        ({"steps": "many"}, "--steps: invalid literal for int()"),
        ({"stepz": 3}, "unrecognized options: --stepz, 3 Perhaps you meant: --steps"),
        ({"config": "a", "resume": "b"}, "b has no config.json"),
        # The data.
        ({"data": "no-such-data.jsonl"}, "there is no file 'no-such-data.jsonl'"),
        ({"data": __file__}, "ends in '.py', expected one of .jsonl, .json, .csv"),
        (
            {"prompt": "{question}"},
            "data.jsonl:1: no column 'question'; the columns are text, label",
        ),
        ({"prompt": "{text"}, "the template '{text' is malformed"),
        ({"label": "class"}, r"data.jsonl:\d+: no column 'class'"),
        ({"labels": ("0=a", "2=b")}, "the column 'label' is 1, expected one of '0', '2'"),
        ({"labels": ("0",)}, "expected at least two, all different"),
        ({"labels": ("0=a", "1=a")}, "expected at least two, all different"),
        ({"task": "chat"}, "no column 'messages'"),
        ({"task": "completion"}, "no column 'completion'"),
        ({"validation": 0.9}, "--validation 0.9 and --test 0.2 leave nothing to train on"),
        ({"validation_data": "none.csv"}, "there is no file 'none.csv'"),
        ({"too_long": "split"}, "only text can be cut in pieces"),
        ({"length": 5, "too_long": "error"}, r"data.jsonl:\d+: 11 tokens, expected at most 5"),
        ({"length": 5, "too_long": "drop"}, "no record is left for .* left out"),
        ({"length": 1}, "--length is 1, expected at least 2"),
    ],
    ids=str,
)
def test_finetune(files, tmp_path, capsys, options, sentence):
    given = {**files, "out": tmp_path / "run", "test": 0.2, **options}
    assert main(finetune(**given)) == 2
    said = one_sentence(capsys.readouterr())
    assert said.startswith("lora-jax finetune: ")
    assert sentence in said or re.search(sentence, said), said


MALFORMED = {
    "train.jsonl": '{"text": "a", "label": 0}\n{"text": "b", label: 1}\n',
    "train.csv": 'text,label\na,0\n"b,c",1,2\n',
    "list.jsonl": '{"text": "a", "label": 0}\n["b", 1]\n',
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("command", ["finetune", "evaluate"])
def test_a_malformed_line_is_named(files, tmp_path, capsys, name, command):
    (tmp_path / name).write_text(MALFORMED[name])
    options = {"task": "classification", "prompt": "{text}", "labels": ("0", "1")}
    options |= {"out": tmp_path / "run"} if command == "finetune" else {}
    line = 3 if name.endswith("csv") else 2
    assert main(arguments(command, model=files["model"], data=tmp_path / name, **options)) == 2
    assert f"{tmp_path / name}:{line}: " in one_sentence(capsys.readouterr())


def test_an_empty_split(files, tmp_path, capsys):
    data = write_lines(tmp_path / "few.jsonl", [{"text": x, "label": 0} for x in "abc"])
    assert main(finetune(**{**files, "data": data}, out=tmp_path / "run")) == 2
    assert (
        "few.jsonl has 3 records, of which the validation split would have none at a share of "
        "0.05; write a larger --validation, --validation 0 for none, or --validation-data"
    ) in one_sentence(capsys.readouterr())


def test_a_chat_without_a_template(files, tmp_path, capsys):
    model = write_model(tmp_path / "plain.gguf", template=None)
    assert main(finetune(model=model, data=files["data"], task="chat", out=tmp_path / "run")) == 2
    assert "has no chat template" in one_sentence(capsys.readouterr())
    assert main(["generate", "a", "--chat", "--model", str(model)]) == 2
    assert "has no chat template" in one_sentence(capsys.readouterr())


def test_what_is_too_long_is_counted(files, tmp_path, capsys):
    lines = [{"text": "ab" * n, "label": n % 2} for n in range(1, 40)]
    given = {**files, "data": write_lines(tmp_path / "long.jsonl", lines), "length": 32, "steps": 1}
    given |= {"validation": 0, "test": 0}
    for too_long, said in (
        ("truncate", "cut to 32 tokens"),
        ("drop", "longer than 32 tokens left out"),
    ):
        assert main(finetune(**given, too_long=too_long, out=tmp_path / too_long)) == 0
        assert f"25 {said}" in capsys.readouterr().out


# Config files.


BROKEN = {
    "no file": (None, "config.json cannot be read: No such file or directory"),
    "no JSON": ("{", "is no JSON: Expecting property name"),
    "no object": ("[1]", "holds a list, expected an object"),
    "an unknown option": ({"stepz": 3}, "has an option 'stepz', and there is none; write 'steps'"),
    "another type": ({"steps": "many"}, "has \"many\" for 'steps', expected a whole number"),
    "no such choice": ({"base": "nf5"}, 'has "nf5" for \'base\', expected one of "nf4"'),
    "not a list": ({"labels": "a"}, "has \"a\" for 'labels', expected a list, each a text"),
    "a number for a switch": ({"pack": 1}, "has 1 for 'pack', expected true or false"),
    "out of range": ({"data": "x", "task": "text", "steps": 0}, "--steps is 0, expected at least"),
    "not whole": ({"task": "text"}, "is not a whole config"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config(tmp_path, capsys, name):
    content, sentence = BROKEN[name]
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert main(["finetune", "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    assert sentence in one_sentence(capsys.readouterr())


def test_options_beside_a_config_take_precedence(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"data": "no.csv", "task": "text", "seed": 1}))
    config = ["finetune", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]
    assert main([*config, "--data", "other.csv", "--model", "none"]) == 2
    capsys.readouterr()
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (written["data"], written["task"], written["seed"]) == ("other.csv", "text", 1)


# Folders.


def test_a_folder_that_is_taken(files, tmp_path, capsys):
    (tmp_path / "result.json").write_text("precious")
    assert main(finetune(**files, out=tmp_path)) == 2
    assert "is not empty; write --out with a new folder" in one_sentence(capsys.readouterr())
    assert (tmp_path / "result.json").read_text() == "precious"


def test_a_folder_is_not_taken_by_a_run_that_never_began(files, tmp_path, capsys):
    assert main(finetune(**{**files, "model": "no-such-model"}, out=tmp_path / "run")) == 2
    assert main(finetune(**{**files, "model": "none-either"}, out=tmp_path / "run")) == 2
    assert "is not empty" not in capsys.readouterr().err


def test_a_folder_that_cannot_be(files, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(finetune(**files, out=tmp_path / "file" / "run")) == 2
    assert "could not be written: Not a directory" in one_sentence(capsys.readouterr())


def test_a_disk_that_is_nearly_full(files, tmp_path, capsys, monkeypatch):
    free = run_folder.shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: free)
    assert main(finetune(**files, out=tmp_path / "run")) == 2
    assert "has 1 MiB left, expected at least 64" in one_sentence(capsys.readouterr())


# The other commands.


@pytest.mark.parametrize(
    ("command", "options", "sentence"),
    [
        ("generate", {"top_p": 0}, "--top-p is 0.0, expected a probability above 0"),
        ("generate", {"temperature": -1}, "--temperature is -1.0, expected at least 0"),
        ("generate", {"max_tokens": 0}, "--max-tokens is 0, expected at least 1"),
        ("generate", {"adapter": "none"}, "none holds no adapters.json"),
        ("generate", {"beams": 3}, "unrecognized options: --beams"),
        ("evaluate", {}, "missing from lora-jax evaluate: --data SOURCE --task"),
        ("evaluate", {"data": "x.csv", "task": "texts"}, "invalid choice 'texts'"),
        ("evaluate", {"data": "x.csv", "task": "text"}, "there is no file 'x.csv'"),
        ("evaluate", {"data": "x.csv", "task": "text", "generations": "y"}, "a text has no prompt"),
        ("inspect", {"targets": "("}, "pattern '(' is no regular expression"),
        ("inspect", {"targets": "nothing"}, "pattern 'nothing' matches no leaf"),
        ("inspect", {"base": "nf5"}, "invalid choice 'nf5'"),
    ],
)
def test_other_commands(files, capsys, monkeypatch, command, options, sentence):
    argv = arguments(command, **options)
    argv += {"generate": ["abc", "--model"], "evaluate": ["--model"], "inspect": []}[command]
    assert main([*argv, str(files["model"])]) == 2
    said = one_sentence(capsys.readouterr())
    assert said.startswith(f"lora-jax {command}: ")
    assert sentence in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": "{question}"}, r"data.jsonl:\d+: no column 'question'"),
        ({"label": "class"}, r"data.jsonl:\d+: no column 'class'"),
        ({"length": 5, "too_long": "error"}, r"data.jsonl:\d+: 1\d tokens, expected at most 5"),
        ({"length": 5, "too_long": "drop"}, "no record is left for training .* left out"),
        ({"split": "test", "test": 0}, "there are no records for test; write --test with a share"),
        ({"validation_data": "none.csv", "split": "validation"}, "there is no file 'none.csv'"),
    ],
    ids=str,
)
def test_evaluate(files, capsys, options, sentence):
    given = {"task": "classification", "prompt": "?{text}:", "labels": ("0", "1")}
    assert main(arguments("evaluate", **{**files, **given, **options})) == 2
    assert re.search(sentence, one_sentence(capsys.readouterr()))


def test_commands_that_are_none(capsys):
    assert main(["fine-tune"]) == 2
    assert "there is no command 'fine-tune'; write one of finetune" in one_sentence(
        capsys.readouterr()
    )
    assert main([]) == 2
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_about_every_option(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: lora-jax {command}" in text
    # Every option has a line of help beside its default.
    assert "(default" in text
    assert "--log" in text
