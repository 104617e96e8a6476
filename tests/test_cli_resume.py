"""Runs that are stopped, by whom or what ever, and go on as if nothing had been."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import resume_check
from tiny_runs import (
    OPTIONS,
    finetune,
    one_sentence,
    records,
    weights,
    write_files,
)

import lora_jax as lj
from lora_jax.cli import main, run_folder, scoring, training
from lora_jax.formats import read_model

pytestmark = pytest.mark.compiled_quickly


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("tiny"))


def test_kills_leave_no_trace(tmp_path):
    assert resume_check.check(tmp_path, kills=2, seed=0, steps=60) == []


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while resume_check.steps_done(out) < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_ends_the_run_with_a_checkpoint_and_the_command_to_resume(files, tmp_path, number):
    out = tmp_path / "a run"
    options = {
        "steps": 50_000,
        "save_every": 50_000,
        "evaluate_every": 50_000,
        "schedule": "constant",
    }
    argv = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "lora_jax.cli",
        *finetune(**files, out=out, **options),
    ]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, **pipes) as process:
        try:
            wait_for_step(process, out, 4)
            process.send_signal(number)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    found = re.fullmatch(
        r"lora-jax finetune: interrupted; step (\d+) is saved\. "
        r"Write lora-jax finetune --resume '(.*)' to go on\.\n",
        error,
    )
    assert found, error
    assert found[2] == str(out)
    assert [x["step"] for x in records(out)] == list(range(1, int(found[1]) + 1))
    # What it has learned can be used as it is.
    lj.load_adapters(out / "checkpoint", read_model(files["model"]).params)
    assert all(np.isfinite(x).all() for x in weights(out).values())


def test_a_signal_before_training(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "load_model", lambda _: signal.raise_signal(signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    assert main(finetune(**files, out=tmp_path / "run", log="quiet")) == 130
    assert (
        f"interrupted; nothing was trained yet. Write lora-jax finetune --resume {tmp_path}/run"
    ) in one_sentence(capsys.readouterr())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_in_an_evaluation_and_in_the_test(files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    score, calls = scoring.LabelScorer.__call__, []

    def interrupted(self, adapters, advance):
        calls.append(None)
        if len(calls) in (2, 5):
            signal.raise_signal(signal.SIGTERM)
        return score(self, adapters, advance)

    monkeypatch.setattr(scoring.LabelScorer, "__call__", interrupted)
    given = {**files, "out": out, "log": "quiet"}
    assert main(finetune(**given)) == 143
    assert "interrupted; step 10 is saved." in one_sentence(capsys.readouterr())
    assert main(["finetune", "--resume", str(out), "--log", "quiet"]) == 143
    assert "interrupted; step 12 is saved." in one_sentence(capsys.readouterr())
    assert not (out / "result.json").exists()
    assert main(["finetune", "--resume", str(out), "--log", "quiet"]) == 0
    monkeypatch.undo()
    assert main(finetune(**{**given, "out": tmp_path / "peaceful"})) == 0
    assert records(out) == records(tmp_path / "peaceful")
    assert resume_check.differences(tmp_path / "peaceful", out) == []
    # There is nothing to do for a run that is done.
    assert main(["finetune", "--resume", str(out)]) == 0
    assert f"lora-jax finetune --config {out}/config.json runs it again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"rank": 4}, "rank is 8 there and 4 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        (
            {"targets": "mlp/.*/kernel"},
            'targets is "attn/.*/kernel" there and "mlp/.*/kernel" here',
        ),
        ({"steps": 13}, "steps is 12 there and 13 here"),
        ({"prompt": "{text}"}, "training data is"),
        ({"base": "float32"}, 'base is "nf4" there and "float32" here'),
    ],
    ids=str,
)
def test_another_run_is_refused(half_done, capsys, options, difference):
    argv = finetune(**{**dict.fromkeys(OPTIONS), **options}, resume=half_done, log="quiet")
    assert main(argv) == 2
    said = one_sentence(capsys.readouterr())
    assert "is of another run" in said
    assert difference in said


@pytest.fixture(scope="module")
def half_done(files, tmp_path_factory):
    """The folder of a run that was stopped at step 5."""
    out = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "record", _stopping_at(5))
        assert main(finetune(**files, out=out, log="quiet")) == 143
    return out


def _stopping_at(step):
    record = run_folder.RunFolder.record

    def stopping(self, **values):
        record(self, **values)
        if values.get("step") == step and "loss" in values:
            signal.raise_signal(signal.SIGTERM)

    return stopping


def test_a_folder_that_holds_no_run(tmp_path, capsys):
    assert main(["finetune", "--resume", str(tmp_path)]) == 2
    assert "has no config.json; write the folder of a run" in one_sentence(capsys.readouterr())


def test_a_disk_that_fills_up_loses_nothing_that_was_saved(files, tmp_path, capsys, monkeypatch):
    out, record = tmp_path / "run", run_folder.RunFolder.record

    def full(self, **values):
        if values.get("step") == 8:
            with self.writing():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        record(self, **values)

    monkeypatch.setattr(run_folder.RunFolder, "record", full)
    assert main(finetune(**files, out=out, log="quiet")) == 2
    said = one_sentence(capsys.readouterr())
    assert f"could not be written: {os.strerror(errno.ENOSPC)}; what was saved there before" in said
    assert said.endswith(f"write lora-jax finetune --resume {out} to go on.\n")
    monkeypatch.undo()
    assert main(["finetune", "--resume", str(out), "--log", "quiet"]) == 0
    assert main(finetune(**files, out=tmp_path / "peaceful", log="quiet")) == 0
    assert resume_check.differences(tmp_path / "peaceful", out) == []


def test_a_loss_of_nan_keeps_the_last_good_adapter(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(finetune(**{**files, "learning_rate": 1e38}, out=out, log="quiet")) == 1
    error = one_sentence(capsys.readouterr())
    found = re.search(r"at step (\d+), .* the last good adapter is saved in", error)
    lines = [x for x in records(out) if "loss" in x]
    assert lines[-1]["step"] == int(found[1]) - 1
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert all(np.isfinite(x).all() for x in weights(out).values())
