"""`lora-jax sweep` on the tiny model: its plan, its outcome, how it goes on, its errors."""

from __future__ import annotations

import csv
import html.parser
import json
import re
import shutil

import jax
import numpy as np
import pyarrow.parquet
import pytest
from tiny_runs import OPTIONS, arguments, one_sentence, records, write_files

import lora_jax as lj
from lora_jax.cli import main, sweep_board
from lora_jax.cli.failures import CliError, Interrupted
from lora_jax.cli.options import ModelOptions
from lora_jax.cli.problem import load_adapter, load_model

# Two ranks that learn at one rate and diverge at the other, all in one program.
GRID = {
    **OPTIONS,
    "rank": "2,8",
    "learning_rate": "0.02,1e30",
    "seed": "0:2",
    "warmup": "0.4",
    "steps": 6,
    "evaluate_every": 3,
    "save_every": 2,
    "validation_examples": 16,
}
# Where equal bits are claimed, it is of the same programs, compiled twice in the same way.
pytestmark = pytest.mark.compiled_quickly
SETUP = "import numpy as np, lora_jax as lj\nfrom lora_jax.cli.sweep import Run\n"


def sweep(*first: str, **options) -> list[str]:
    argv = arguments("sweep", **{**GRID, **options})
    return [argv[0], *first, *argv[1:]]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    """The folder of a sweep from beginning to end."""
    out = tmp_path_factory.mktemp("runs") / "done"
    assert main(sweep(**files, out=out, log="quiet")) == 0
    return out


def rows(out, name: str = "results") -> list[dict[str, str]]:
    """A table without its times."""
    with (out / f"{name}.csv").open(newline="") as file:
        return [{k: x for k, x in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_a_row_for_each_run(done):
    found = rows(done)
    assert [(x["rank"], x["learning_rate"], x["seed"]) for x in found] == [
        (rank, rate, seed) for rank in "28" for rate in ("0.02", "1e+30") for seed in "01"
    ]
    good = [x for x in found if x["learning_rate"] == "0.02"]
    assert all(x["stopped"] == "done" and x["steps"] == "6" for x in good)
    assert all(float(x["test_accuracy"]) > 0.9 and float(x["test_nll"]) < 0.3 for x in good)
    lost = [x for x in found if x not in good]
    assert all(x["stopped"] == "diverged" and x["test_accuracy"] == "" for x in lost)
    typed = pyarrow.parquet.read_table(done / "results.parquet").to_pylist()
    assert [x["validation_loss"] for x in typed if x["stopped"] == "done"] == [
        float(x["validation_loss"]) for x in good
    ]


def test_each_step_of_each_run(done):
    found = rows(done, "history")
    assert [x["step"] for x in found if x["run"] == "0"] == list("123456")
    evaluated = [x["step"] for x in found if x["run"] == "5" and x["validation_loss"]]
    assert evaluated == ["3", "6"]


def test_the_best_is_at_the_edge_of_two(done):
    found = json.loads((done / "result.json").read_text())
    assert [(x["rank"], x["learning_rate"], x["edge"]) for x in found["best"]] == [
        (2, 0.02, "low"),
        (8, 0.02, "low"),
    ]
    scores = [float(x["validation_loss"]) for x in rows(done)[:2]]
    half = 12.706 * np.std(scores, ddof=1) / np.sqrt(2)
    interval = found["best"][0]["validation_loss"]
    assert interval["mean"] == pytest.approx(np.mean(scores))
    assert (interval["half"], interval["n"]) == (pytest.approx(half, rel=1e-4), 2)


def test_where_it_comes_from(done):
    config = json.loads((done / "config.json").read_text())
    assert len(config["runs"]) == 8
    assert config["at_once"] == [8]
    assert config["options"]["rank"] == [2, 8]
    assert config["environment"]["jax"] == jax.__version__


class Page(html.parser.HTMLParser):
    """The tags of a page, and whatever they refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.references: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_whole_page(done):
    text = (done / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    pictures = sorted(path.name for path in done.glob("*.png"))
    assert pictures == ["curves.png", "heat_map.png", "learning_rate.png", "rank.png"]
    assert len(page.references) == 4
    assert all(uri.startswith("data:image/png;base64,") for uri in page.references)
    assert not page.seen & {"script", "link", "iframe"}
    assert not re.search(r"url\(|@import|https?:", text)
    assert "at the edge of what was tried for 2 of 2" in text
    assert "diverged" in text


def test_a_run_is_what_finetune_trains(done, files, tmp_path):
    folder = done / "runs" / "005"
    out = tmp_path / "alone"
    options = ["--out", str(out), "--no-compare", "--log", "quiet"]
    assert main(["finetune", "--config", str(folder / "config.json"), *options]) == 0
    alone = records(out)
    here = [row for row in rows(done, "history") if row["run"] == "5"]
    losses = [line["loss"] for line in alone if "loss" in line]
    assert [float(row["loss"]) for row in here] == pytest.approx(losses, rel=1e-3, abs=1e-5)
    validation = [line["validation/nll"] for line in alone if "validation/nll" in line]
    found = [float(row["validation_loss"]) for row in here if row["validation_loss"]]
    assert found == pytest.approx(validation, rel=1e-3, abs=1e-5)
    (test,) = (line for line in alone if line.get("test") == "after")
    assert float(rows(done)[5]["test_nll"]) == pytest.approx(test["nll"], rel=1e-2, abs=1e-4)
    base = load_model(ModelOptions(str(files["model"]))).base
    trees = (lj.load_adapters(x / "checkpoint", base) for x in (folder, out))
    for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-3 * np.abs(y).max())


def test_it_goes_on_after_an_interruption(done, files, tmp_path, monkeypatch, capsys):
    out, told = tmp_path / "stopped", []
    on_metrics = sweep_board.Board.on_metrics

    def stopping(board, number, step, metrics):
        on_metrics(board, number, step, metrics)
        told.append(step)
        if step == 5:
            raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_board.Board, "on_metrics", stopping)
        assert main(sweep(**files, out=out, log="quiet")) == 128 + 15
    said = one_sentence(capsys.readouterr())
    assert f"what had been saved is in {out}. Write the same command with --out {out}" in said
    assert main(sweep(**files, out=out, log="quiet", steps=7)) == 2
    assert "of a sweep whose --steps is 6, and here it is 7" in one_sentence(capsys.readouterr())
    assert main(sweep(**files, out=out, log="quiet", rank="2,4")) == 2
    assert "8 runs, which are not these 8" in one_sentence(capsys.readouterr())
    assert main(sweep(**files, out=out, log="quiet")) == 0
    for name in ("results", "history"):
        assert rows(out, name) == rows(done, name)
    base = load_model(ModelOptions(str(files["model"]))).base
    for number in range(8):
        trees = (
            lj.load_adapters(x / "runs" / f"{number:03d}/checkpoint", base) for x in (out, done)
        )
        for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
            np.testing.assert_array_equal(x, y)


def test_its_runs_are_runs(done, capsys):
    assert main(["inspect", str(done / "runs" / "004")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"rank +8\n", said)
    assert re.search(r"stopped +done\n", said)
    assert "layers/attn/q_proj/kernel  r=8, scale 4" in said
    assert main(["inspect", str(done)]) == 2
    assert "is a sweep's folder; write that of one of its runs" in one_sentence(capsys.readouterr())
    with pytest.raises(CliError, match="is a sweep's folder; write that of one of its runs"):
        load_adapter(done, None)


def test_a_finished_sweep_is_left_alone(done, files, capsys):
    before = (done / "report.html").read_bytes()
    assert main(sweep(**files, out=done)) == 0
    assert f"{done} is finished" in capsys.readouterr().out
    assert (done / "report.html").read_bytes() == before


def test_the_plan_of_a_file(files, tmp_path, capsys):
    path = tmp_path / "runs.py"
    path.write_text(
        SETUP
        + "runs = lj.sweep.grid(Run(targets='attn/.*/kernel'), rank=[1, 4], seed=range(3))\n"
        + "runs.append(Run(schedule='linear', rslora=True, learning_rate=np.float32(0.5)))\n"
        + "options = {'steps': 5, 'rows': 2}\n"
    )
    unsaid = dict.fromkeys(("rank", "learning_rate", "seed", "warmup", "targets", "steps", "rows"))
    assert main(sweep(str(path), **files, **unsaid, dry_run=True, at_once=3)) == 0
    said = capsys.readouterr().out
    assert re.search(r"^0 +6 +3 +5 +4 +\d\.\d +\d\.\d\d$", said, re.MULTILINE)
    assert re.search(r"^1 +1 +1 +5 +16 +\d\.\d +\d\.\d\d$", said, re.MULTILINE)
    assert "7 runs, 35 steps, 70 rows of 48 tokens" in said
    assert not (tmp_path / "runs").exists()


ERRORS = [
    # Said before anything is read.
    ({"rank": "3:3"}, "the grid is empty: rank has no values"),
    ({"rank": "0,4"}, "rank is 0, expected a whole number of at least 1"),
    ({"rank": "2,x"}, "--rank: invalid literal for int"),
    ({"rslora": "maybe"}, "'maybe' is neither true nor false"),
    ({"warmup": "1.5"}, "warmup is 1.5, expected a share of the steps below 1"),
    ({"halving": (5, 3)}, "expected steps in rising order"),
    ({"at_once": 0}, "--at-once is 0, expected at least 1"),
    # Said before anything is compiled.
    ({"rank": "4,4"}, r"runs 0 and 2 are the same, Run\(.*\); leave one out"),
    ({"rank": "2,65"}, r"rank 65 of the rule .* is above min\(in, out\) = 64"),
    ({"init_scale": "0"}, "init_scale is 0.0, expected a positive number"),
    (
        {"device_memory": "1MB", "at_once": 4},
        r"program 0 needs about 0\.\d+ GiB for 4 runs at once, and there are 0\.000931; write",
    ),
]


@pytest.mark.parametrize(("options", "sentence"), ERRORS)
def test_errors_are_one_sentence(files, capsys, options, sentence):
    options = {"learning_rate": "0.02", **options}
    assert main(sweep(**files, **options, log="quiet", dry_run=True)) == 2
    assert re.search(sentence, one_sentence(capsys.readouterr()))


FILES = [
    ("", "has no runs; write runs = "),
    ("runs = [3]", r"has runs = \[3\]; write runs = "),
    ("runs = []", "has an empty list of runs"),
    ("runs = lj.sweep.grid(Run(), rnk=[1])", "Run has no field 'rnk'; it has targets, rank"),
    ("runs = [Run(), nonsense]", r"runs.py, line 3: NameError: name 'nonsense'"),
    ("runs = [", "SyntaxError"),
    ("runs = [Run(rank='a')]", "has \"a\" for 'rank', expected a whole number"),
    ("runs = [Run(learning_rate=None)]", "has null for 'learning_rate', expected a number"),
    ("runs = [Run()]\noptions = {'stepz': 3}", "has an option 'stepz', and there is none; write"),
    ("runs = [Run()]\noptions = {'rank': 3}", "has the runs; write rank in these"),
]


@pytest.mark.parametrize(("text", "sentence"), FILES)
def test_files_that_are_wrong(tmp_path, capsys, text, sentence):
    path = tmp_path / "runs.py"
    path.write_text(SETUP + text)
    assert main(["sweep", str(path), "--log", "quiet"]) == 2
    assert re.search(sentence, one_sentence(capsys.readouterr()))
    assert main(["sweep", str(path), "--rank", "4"]) == 2
    one_sentence(capsys.readouterr())


def test_there_is_no_file(tmp_path, capsys):
    assert main(["sweep", str(tmp_path / "runs.py")]) == 2
    assert "there is no file" in one_sentence(capsys.readouterr())


def test_another_command_s_folder_is_left_alone(files, done, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(done / "runs" / "000", folder)
    assert main(sweep(**files, out=folder, log="quiet")) == 2
    assert "is no sweep's folder" in one_sentence(capsys.readouterr())
