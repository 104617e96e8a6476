"""`lora-jax finetune` on a tiny model: what it leaves behind, and how it ends when it must."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny_model import write_model, write_sentences

import lora_jax as lj
from lora_jax.cli import main, run_folder
from lora_jax.formats import peft
from lora_jax.formats.gguf import read_gguf

FILES = {"adapter", "checkpoint", "config.json", "curves.png", "metrics.jsonl", "result.json"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return write_model(folder / "model.gguf"), write_sentences(folder / "data.jsonl")


def arguments(paths, out: Path, **options) -> list[str]:
    """A command that learns in a second what the tiny data have to teach."""
    options = {
        "model": paths[0],
        "data": paths[1],
        "out": out,
        "before": "?",
        "after": ":",
        "answers": ("0", "1"),
        "steps": 12,
        "rows": 4,
        "length": 48,
        "learning_rate": 0.02,
        **options,
    }
    command = ["finetune"]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        command += [f"--{name.replace('_', '-')}", *map(str, values)]
    return command


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def done(paths, tmp_path_factory):
    """A run from beginning to end, in a process of its own, and all that it printed."""
    out = tmp_path_factory.mktemp("runs") / "done"
    return out, run_process(arguments(paths, out))


def run_process(argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command outside of this process, whose eight devices change the last bits."""
    command = [sys.executable, "-W", "error", "-m", "lora_jax.cli", *argv]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished


def test_it_learns(done):
    out, _ = done
    result = json.loads((out / "result.json").read_text())
    assert result["accuracy"]["after"] > 0.9 > result["accuracy"]["before"]
    assert result["nll"]["after"] < 0.3 < result["nll"]["before"]
    assert 0.5 <= result["accuracy"]["majority"] < 0.75


def test_it_says_what_it_does(done):
    out, finished = done
    assert finished.stderr == ""
    printed = finished.stdout
    assert not re.search(r"[^\n -~…]", printed)  # no control characters where there is no terminal
    for expected in (
        r"Rule 'attn/\.\*/kernel', rank 8, alpha 16: 4 of 11 weights match\.\n",
        r"layers/attn/q_proj/kernel +2x64x64 +nf4 +r=8 +2,048\n",
        r"layers/mlp/up_proj/kernel +2x64x128 +nf4 +- +-\n",
        r"[\d,]+ trainable of [\d,]+ parameters \([\d.]+ %\)",
        r"training 12/12  loss \d\.\d+  \d+ tokens/s  ETA 0 s",
        r"majority class +\d\d\.\d %",
        r"before +\d\d\.\d % +\d\.\d+\nafter +\d+\.\d % +\d\.\d+\n",
        r"the first 5 of them",
        rf"{re.escape(str(out))} holds:",
    ):
        assert re.search(expected, printed), expected


def test_it_leaves_everything_behind(done):
    out, _ = done
    assert {path.name for path in out.iterdir()} == FILES
    config = json.loads((out / "config.json").read_text())
    assert (config["steps"], config["learning_rate"], config["seed"]) == (12, 0.02, 0)
    lines = records(out)
    assert [line.get("event", line.get("step")) for line in lines] == [
        "before",
        *range(1, 13),
        "after",
    ]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_both_forms_of_the_adapter_are_the_same(done, paths):
    out, _ = done
    base = read_gguf(paths[0]).params
    adapters = lj.load_adapters(out / "checkpoint", base)
    saved = weights(out)
    assert len(saved) == 2 * 2 * 4  # A and B, layers, projections
    kernel = adapters["layers"]["attn"]["v_proj"]["kernel"]
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
        np.testing.assert_array_equal(saved[f"{name}.lora_A.weight"], kernel.a[layer])
        np.testing.assert_array_equal(saved[f"{name}.lora_B.weight"], kernel.b[layer])


def test_the_same_seed_gives_the_same_bits(done, paths, tmp_path):
    def numbers(out):
        return [{k: v for k, v in line.items() if k != "seconds"} for line in records(out)]

    run_process(arguments(paths, tmp_path / "again"))
    assert numbers(tmp_path / "again") == numbers(done[0])
    run_process(arguments(paths, tmp_path / "other", seed=1, base="float32"))
    assert numbers(tmp_path / "other") != numbers(done[0])


# Ends that come too early.


def one_sentence(captured) -> str:
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "no-such-model"}, "there is no file 'no-such-model'"),
        ({"model": "pypi:nonsense"}, "names no member of a wheel"),
        ({"data": "no-such-data.jsonl"}, "there is no file 'no-such-data.jsonl'"),
        ({"model": __file__}, "is not a GGUF file"),
        ({"data": __file__}, "line 1 of"),
        ({"targets": "no_such_kernel"}, "pattern 'no_such_kernel' matches no leaf"),
        ({"targets": "("}, "pattern '(' is no regular expression"),
        ({"rank": 65}, "rank 65 of the rule"),
        ({"rank": 0}, "rank is 0, expected a whole number of at least 1"),
        ({"learning_rate": 0}, "learning_rate is 0.0, expected a positive number"),
        ({"answers": (" No", "1")}, "the answer ' No' has 3 tokens"),
        ({"answers": ("1",)}, "expected at least two, all different"),
        ({"length": 2}, "the prompt alone has 2 tokens, and a row has 2"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(paths, tmp_path, capsys, options, sentence):
    assert main(arguments(paths, tmp_path / "run", **options)) == 2
    assert sentence in one_sentence(capsys.readouterr())


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["finetune", "--no-such-option", "1"], "--no-such-option"),
        (["finetune", "--base", "nf5"], "nf5"),
        (["finetune", "--steps", "many"], "many"),
        (["finetune", "--steps", "0"], "--steps is 0, expected at least 1"),
    ],
)
def test_options_that_are_none(argv, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert sentence in captured.err
    assert "Traceback" not in captured.err


def test_commands_that_are_none(capsys):
    assert main(["fine-tune"]) == 2
    assert "there is no command 'fine-tune'; write one of finetune" in one_sentence(
        capsys.readouterr()
    )
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "finetune" in capsys.readouterr().out


def test_a_label_without_an_answer(paths, tmp_path, capsys):
    lines = [json.dumps({"text": f"sentence {n}", "label": 2}) for n in range(200)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    assert main(arguments(paths, tmp_path / "run", data=tmp_path / "data.jsonl")) == 2
    assert "labels [2] for one of its splits" in one_sentence(capsys.readouterr())


def test_a_folder_that_is_taken(paths, tmp_path, capsys):
    (tmp_path / "result.json").write_text("precious")
    assert main(arguments(paths, tmp_path)) == 2
    assert "is not empty; write --out with a new folder" in one_sentence(capsys.readouterr())
    assert (tmp_path / "result.json").read_text() == "precious"


def test_a_folder_is_not_taken_by_a_run_that_never_began(paths, tmp_path, capsys):
    assert main(arguments(paths, tmp_path / "run", model="no-such-model")) == 2
    assert main(arguments(paths, tmp_path / "run", steps=1)) == 0


def test_a_folder_that_cannot_be(paths, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(arguments(paths, tmp_path / "file" / "run")) == 2
    assert f"could not be written: {os.strerror(errno.ENOTDIR)}" in one_sentence(
        capsys.readouterr()
    )


def test_a_disk_that_is_nearly_full(paths, tmp_path, capsys, monkeypatch):
    free = run_folder.shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: free)
    assert main(arguments(paths, tmp_path / "run")) == 2
    assert "has 1 MiB left, expected at least 64" in one_sentence(capsys.readouterr())


def test_a_disk_that_fills_up_loses_nothing_that_was_saved(paths, tmp_path, capsys, monkeypatch):
    write, calls = peft._write_whole, []

    def write_whole(path, content):
        calls.append(path)
        if len(calls) > 2:  # the two files of the first save were the last that went in
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(peft, "_write_whole", write_whole)
    assert main(arguments(paths, tmp_path / "run", save_every=5)) == 2
    error = one_sentence(capsys.readouterr())
    assert (
        f"could not be written: {os.strerror(errno.ENOSPC)}; what was saved there before" in error
    )
    assert all(np.isfinite(x).all() for x in weights(tmp_path / "run").values())
    assert records(tmp_path / "run")[-1]["step"] == 10


def test_a_loss_of_nan_keeps_the_last_good_adapter(paths, tmp_path, capsys):
    assert main(arguments(paths, tmp_path / "run", learning_rate=1e38)) == 1
    error = one_sentence(capsys.readouterr())
    found = re.search(r"at step (\d+), .* the last good adapter is saved in", error)
    lines = records(tmp_path / "run")
    assert lines[-1]["step"] == int(found[1]) - 1
    assert all(np.isfinite(line["loss"]) for line in lines if "step" in line)
    assert all(np.isfinite(x).all() for x in weights(tmp_path / "run").values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_ends_the_run_with_what_is_done_saved(paths, tmp_path, number):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "lora_jax.cli"]
    command += arguments(paths, out, steps=20_000, save_every=20_000)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            for line in process.stdout:
                if line.startswith("evaluating"):
                    break
            while not (out / "metrics.jsonl").exists() or len(records(out)) < 4:
                assert process.poll() is None
            process.send_signal(number)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    found = re.fullmatch(
        r"lora-jax finetune: interrupted; the adapter of step (\d+) is saved in (.*)\.\n", error
    )
    assert found, error
    assert found[2] == str(out)
    steps = [line["step"] for line in records(out) if "step" in line]
    assert int(found[1]) in (steps[-1], steps[-1] + 1)  # it may come between a step and its record
    assert all(np.isfinite(x).all() for x in weights(out).values())
    lj.load_adapters(out / "checkpoint", jax.tree.map(np.asarray, read_gguf(paths[0]).params))


def test_a_signal_before_training(paths, tmp_path, capsys, monkeypatch):
    def interrupted(_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("lora_jax.cli.finetune.load", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert main(arguments(paths, tmp_path / "run")) == 130
    assert "interrupted; nothing was trained yet" in one_sentence(capsys.readouterr())
    assert signal.getsignal(signal.SIGINT) is before
