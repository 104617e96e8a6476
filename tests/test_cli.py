"""`lora-jax finetune` on a tiny model: what it learns, says and leaves behind."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest
from tiny_runs import finetune, records, result, run_process, weights, write_files, write_lines

import lora_jax as lj
from lora_jax.cli import main
from lora_jax.formats.gguf import read_gguf

pytestmark = pytest.mark.compiled_quickly

FILES = {
    *("adapter", "checkpoint", "config.json", "curves.png", "metrics.jsonl", "result.json"),
    "state",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    """A run from beginning to end, in a process of its own, and all that it printed."""
    out = tmp_path_factory.mktemp("runs") / "done"
    finished = run_process(finetune(**files, out=out, dropout=0.1))
    assert finished.returncode == 0, finished.stderr
    return out, finished


def test_it_learns(done):
    test = result(done[0])["test"]
    assert test["after"]["accuracy"] > 0.9 > test["before"]["accuracy"]
    assert test["after"]["nll"] < 0.3 < test["before"]["nll"]
    assert 0.5 <= test["majority"] < 0.75


def test_it_says_what_it_does(done):
    out, finished = done
    assert finished.stderr == ""
    printed = finished.stdout
    assert not re.search(r"[^\n -~…]", printed)  # no control characters where there is no terminal
    for expected in (
        r"train       \d+ sequences of [\d,]+ tokens, \d+ learned\.\n",
        r"layers/attn/q_proj/kernel +2x64x64 +nf4 +4\.\d+ +0\.00 +r=8 +2,048\n",
        r"layers/mlp/up_proj/kernel +2x64x128 +nf4 +4\.\d+ +0\.01 +- +-\n",
        r"4 of 11 weights are adapted: [\d,]+ trainable of [\d,]+ parameters \([\d.]+ %\)",
        r"training 12/12  loss \d\.\d+  [\d,]+ tokens/s  \d\.\d GiB  ETA 0:00:00\n",
        r"step 10: validation/nll \d\.\d+, validation/accuracy \d+\.\d %\n",
        r"majority class +- +\d\d\.\d %",
        r"before +\d\.\d+ +\d\d\.\d %\nafter +\d\.\d+ +\d+\.\d %\n",
        r"the first 5 of them",
        rf"{re.escape(str(out))} holds:",
    ):
        assert re.search(expected, printed), expected


def test_it_leaves_everything_behind(done):
    out, _ = done
    assert {path.name for path in out.iterdir()} == FILES
    lines = records(out)
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 13))
    assert [line["step"] for line in lines if "validation/nll" in line] == [5, 10, 12]
    assert [line["test"] for line in lines if "test" in line] == ["before", "after"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_on_validation_is_kept(done):
    out, _ = done
    found = {x["step"]: x["validation/nll"] for x in records(out) if "validation/nll" in x}
    best = min(found, key=found.get)
    assert result(out)["best_step"] == best
    assert result(out)["validation"]["nll"] == found[best]


def test_both_forms_of_the_adapter_are_the_same(done, files):
    out, _ = done
    base = read_gguf(files["model"]).params
    adapters = lj.load_adapters(out / "checkpoint", base)
    saved = weights(out)
    assert len(saved) == 2 * 2 * 4  # A and B, layers, projections
    kernel = adapters["layers"]["attn"]["v_proj"]["kernel"]
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
        np.testing.assert_array_equal(saved[f"{name}.lora_A.weight"], kernel.a[layer])
        np.testing.assert_array_equal(saved[f"{name}.lora_B.weight"], kernel.b[layer])


def test_a_config_file_runs_again_to_the_bit(done, tmp_path):
    config = ["finetune", "--config", str(done[0] / "config.json"), "--log", "json"]
    again = run_process([*config, "--out", str(tmp_path / "again")])
    assert again.returncode == 0, again.stderr
    assert records(tmp_path / "again") == records(done[0])
    # In this mode every line is for programs.
    events = [json.loads(line) for line in again.stdout.splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 13))
    assert events[-1]["event"] == "done"
    other = run_process(
        [*config[:3], "--log", "quiet", "--seed", "1", "--out", str(tmp_path / "1")]
    )
    assert (other.returncode, other.stdout, other.stderr) == (0, "", "")
    assert records(tmp_path / "1") != records(done[0])
    assert json.loads((tmp_path / "1" / "config.json").read_text())["seed"] == 1


# Other tasks, in this process.


def run(files, tmp_path, **options) -> dict:
    assert main(finetune(**{**files, "out": tmp_path / "run", "log": "quiet", **options})) == 0
    return result(tmp_path / "run")


def test_completions_from_csv_with_files_for_each_split(files, tmp_path):
    rows = [f"{letter * 3},{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.csv").write_text("\n".join(["question,answer", *rows]))
    found = run(
        files,
        tmp_path,
        data=tmp_path / "train.csv",
        validation_data=tmp_path / "validation.csv",
        test_data=tmp_path / "test.csv",
        task="completion",
        prompt=r"{question}\n",
        completion="{answer}",
        labels=None,
        steps=30,
        evaluate_every=30,
        compare=False,
    )
    assert found["training"]["records"] == found["test"]["records"] == 26
    assert found["test"]["after"]["accuracy"] > 0.7
    assert "before" not in found["test"]
    assert found["test"]["after"]["perplexity"] == pytest.approx(
        np.exp(found["test"]["after"]["nll"])
    )


def test_text_without_validation_or_test(files, tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join("ab" * n for n in range(5, 60)))
    options = {"task": "text", "too_long": "split", "labels": None, "prompt": None}
    found = run(
        files, tmp_path, data=tmp_path / "book.txt", **options, validation=0, test=0, steps=4
    )
    assert found["test"] is None
    assert found["best_step"] is None
    assert found["training"]["tokens"] > 0


def test_chats_with_the_model_s_template(files, tmp_path):
    said = [
        [{"role": "user", "content": w * 2}, {"role": "assistant", "content": w}]
        for w in "abcdefghijklmnopqrstuvwxyz"
    ]
    data = write_lines(tmp_path / "chats.jsonl", [{"messages": messages} for messages in said])
    options = {"task": "chat", "labels": None, "prompt": None, "validation": 0.2, "test": 0.2}
    found = run(files, tmp_path, data=data, **options, steps=20)
    assert found["test"]["after"]["nll"] < found["test"]["before"]["nll"]


def test_labels_are_those_that_occur(files, tmp_path, capsys):
    lines = [{"text": x * 4, "label": "xy"[n % 2]} for n, x in enumerate("abcdefgh" * 20)]
    data = write_lines(
        tmp_path / "data.jsonl", [{**x, "text": x["text"] + str(n)} for n, x in enumerate(lines)]
    )
    run(files, tmp_path, data=data, labels=None, steps=1, log="progress")
    assert "Labels have several tokens" in capsys.readouterr().out  # a space and a letter
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["labels"] == ["x= x", "y= y"]


def test_training_stops_early(files, tmp_path):
    found = run(files, tmp_path, steps=60, evaluate_every=1, patience=2, learning_rate=0.1)
    assert found["stopped"] == "patience"
    assert found["steps"] == found["best_step"] + 2
    assert found["steps"] < 60


def test_everything_trains_that_may(files, tmp_path):
    options = {"whole": ("norm/scale",), "rslora": True, "lora_plus_ratio": 4, "accumulate": 2}
    options |= {"schedule": "linear", "weight_decay": 0.1, "label_smoothing": 0.1, "neftune": 5}
    options |= {"remat": "nothing_saveable", "base": "bfloat16", "dtype": "bfloat16"}
    options |= {"among_labels": False}
    found = run(files, tmp_path, **options, pack=False, validation_examples=8, test_examples=9)
    assert found["test"]["records"] == 9
    assert "base_model.model.model.norm.weight" in weights(tmp_path / "run")
    assert all(np.isfinite(x).all() for x in weights(tmp_path / "run").values())
    jax.clear_caches()
