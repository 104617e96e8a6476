"""The studies of rank: their scores, how they look for learning rates, and that they run."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import sys
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer

from lora_jax.cli.problem import Model
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder
from lora_jax.sweep.tuning import tune

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def script(name: str) -> types.ModuleType:
    """A script of a study, as a module: what it imports is in its own folder."""
    path = EXPERIMENTS / name
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(name.replace("/", "_"), path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@pytest.fixture(scope="module")
def ranks() -> types.ModuleType:
    return script("rank_ablation/study.py")


@pytest.fixture(scope="module")
def capacity() -> types.ModuleType:
    return script("capacity/study.py")


# Scores.


def test_rouge_l_is_that_of_the_challenge():
    scores = script("rank_ablation/scores.py")
    # "the cat sat" is common to both: 3 of 4 words and 3 of 5. Of the other reference "the" alone.
    text = scores.Text("The cat sat down.", ["the cat, it sat there", "the dog"])
    precision, recall = 3 / 4, 3 / 5  # the second gives 1/4 and 1/2
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert scores.rouge_l([text]) == pytest.approx(100 * expected, rel=1e-12)
    # Precision is the largest of any reference, and so is recall: here they are of two.
    text = scores.Text("a b c d", ["a b c x y z", "a b"])
    precision, recall = 3 / 4, 1.0
    second = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    nothing = scores.Text("", ["a b"])
    assert scores.rouge_l([text, nothing]) == pytest.approx(100 * second / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's £20-25, family-friendly.", ["it's", "£20-25", "family-friendly"]),
        (" 5 out of 5 ", ["5", "out", "of", "5"]),
        ("...", []),
    ],
)
def test_words(text, expected):
    assert script("rank_ablation/scores.py").words(text) == expected


def test_scores_of_a_perfect_text():
    scores = script("rank_ablation/scores.py")
    texts = [scores.Text("The Vaults is a cheap pub .", ["x", "The Vaults is a cheap pub ."])]
    assert scores.scores(texts) == pytest.approx({"bleu": 100, "bleu_cased": 100, "rouge_l": 100})


# Learning rates.


@dataclasses.dataclass(frozen=True)
class Run:
    rank: int
    learning_rate: float
    seed: int = 0


def bowl(optima: dict[int, float], calls: list):
    """Losses that are least at a learning rate of each rank, and infinite far above it."""

    def train(runs, number):
        calls.append((number, [(run.rank, run.learning_rate) for run in runs]))
        rows = []
        for run in runs:
            away = math.log2(run.learning_rate / optima[run.rank])
            stopped = "diverged" if away > 3 else "done"
            rows.append({**vars(run), "stopped": stopped, "loss": 1 + away**2 + 0.01 * run.seed})
        return rows

    return train


def test_a_grid_grows_on_the_side_of_its_best_until_that_is_inside():
    calls: list = []
    runs = [Run(r, lr, s) for r in (1, 8) for lr in (1.0, 2.0, 4.0) for s in (0, 1)]
    rows = tune(bowl({1: 2.0, 8: 16.0}, calls), runs, metric="loss")
    assert calls[1:] == [(1, [(8, 8.0)] * 2), (2, [(8, 16.0)] * 2), (3, [(8, 32.0)] * 2)]
    assert len(rows) == 12 + 6
    calls.clear()
    tune(bowl({1: 0.5}, calls), runs[:6], metric="loss")
    assert calls[1:] == [(1, [(1, 0.5)] * 2), (2, [(1, 0.25)] * 2)]


def test_a_grid_that_finds_no_best_says_so():
    def falling(runs, number):
        return [{**vars(run), "stopped": "done", "loss": -run.learning_rate} for run in runs]

    with pytest.raises(ValueError, match=r"edge of what was tried after 2 rounds more: .*16"):
        tune(falling, [Run(1, 2.0), Run(1, 4.0)], metric="loss", most=2)


def test_what_diverged_is_no_best():
    calls: list = []
    tune(bowl({1: 1.0}, calls), [Run(1, lr) for lr in (16.0, 32.0)], metric="loss")
    tried = [rate for _, pairs in calls[1:] for _, rate in pairs]
    assert tried == [8.0, 4.0, 2.0, 1.0, 0.5]


# Time.


def test_the_clock_counts_steps_and_nothing_else(ranks, monkeypatch):
    now = 0.0
    monkeypatch.setattr(ranks.time, "perf_counter", lambda: now)
    clock = ranks.Clock()
    for run in ("a", "b"):  # of an earlier call, all told at once
        for step in range(1, 6):
            clock(run, step, {"loss": 1.0})
    for step in range(6, 20):
        now += 100.0 if step == 11 else 2.0  # an evaluation took the rest
        for run in ("a", "b"):
            clock(run, step, {"loss": 1.0})
        if step == 10:
            clock("a", step, {"validation/loss": 1.0})
            clock("b", step, {"validation/loss": 1.0})
    assert clock.seconds == [2.0] * (14 - 1 - 1)
    assert clock.summary()["seconds_a_step"] == 2.0


# E2E on a model that is made here.

SETS = ["name[Aromi], food[Thai]", "name[Bibi], area[city]", "name[Cocum], food[French]"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """The zip in its own form: five sentences of each set of facts."""
    folder = tmp_path_factory.mktemp("e2e")
    for name in ("trainset", "devset", "testset_w_refs"):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["mr", "ref"])
            writer.writerows([mr, f"{mr[5:9]} is £{k}, nice."] for mr in SETS for k in range(5))
    with zipfile.ZipFile(folder / "e2e.zip", "w") as archive:
        for path in sorted(folder.glob("*.csv")):
            archive.write(path, f"e2e-dataset/{path.name}")
    return folder / "e2e.zip"


@functools.cache
def tiny(base: str) -> Model:
    shape = DecoderConfig(257, 16, 32, 1, 2, 1, 8, tied_head=True)
    model = Decoder(shape)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    checkpoint = types.SimpleNamespace(
        tokenizer=byte_tokenizer("<eos>"), special=(None, 256), stop=(256,), digest="tiny"
    )
    assert base == "bfloat16"
    return Model(model, params, checkpoint, "tiny")


def test_splits_are_read_from_the_zip_and_from_a_folder(ranks, dataset):
    zipped = ranks.read_split(dataset, "devset")
    assert [x.fields for x in zipped] == [
        x.fields for x in ranks.read_split(dataset.parent, "devset")
    ]
    assert zipped[0].fields == {"mr": SETS[0], "ref": "Arom is £0, nice."}
    assert {x.fields["mr"] for x in ranks.first_sets(zipped, 2)} == set(SETS[:2])
    assert len(ranks.first_sets(zipped, 2)) == 10
    with pytest.raises(ValueError, match=r"has no other\.csv; expected the E2E dataset"):
        ranks.read_split(dataset, "other")


@pytest.fixture
def study(ranks, dataset, tmp_path):
    config = dataclasses.replace(
        ranks.CPU,
        data=dataset,
        out=tmp_path / "runs",
        results=tmp_path / "results",
        ranks=(1, 4),
        length=96,
        at_once=4,
        chunk=None,
        max_tokens=8,
    )
    return ranks.Study.load(config, tiny)


def tuned_without_training(study, monkeypatch, fits: list) -> None:
    """Has `tune` meet losses whose optimum is 0.004 for one epoch, and less for more."""

    def rows_of(self, name, epochs, runs, number):
        optima = dict.fromkeys((0, 1, 4), 0.004 / epochs**2)
        return [{**row, "validation_loss": row["loss"]} for row in bowl(optima, fits)(runs, number)]

    monkeypatch.setattr(type(study), "_tuning_rows", rows_of)


def test_learning_rates_are_tuned_for_few_epochs_and_then_for_many(study, monkeypatch):
    """For more epochs the optimum is lower, and beside the neighbours of the first one."""
    fits: list = []
    tuned_without_training(study, monkeypatch, fits)
    object.__setattr__(study, "config", dataclasses.replace(study.config, tune_epochs=(1.0, 4.0)))
    with pytest.raises(SystemExit, match="run --stages tune before"):
        study.tuned()
    study.tune()
    runs = study.tuned()
    assert [(x.rank, x.learning_rate, x.seed) for x in runs] == [
        (rank, 0.00025, seed) for rank in (1, 4) for seed in (0, 1)
    ]
    assert {x.rank for x in study.tuned(full=True)} == {0}
    assert fits[1][1][:3] == [(1, 0.002), (1, 0.004), (1, 0.008)]  # the neighbours of the best


def writes_what_people_wrote(study):
    """In place of `generate`, which has tests of its own: the last reference of each prompt."""
    tokenizer = study.models("bfloat16").tokenizer
    last = {f"{x.fields['mr']}\n": x.fields["ref"] for x in study.test}

    def write(model, base, adapters, prompts, *, max_tokens, eos, rows):
        assert (eos, rows, max_tokens) == ((256,), 3, 8)
        texts = [last[tokenizer.decode(prompt)] for prompt in prompts]
        tokens = [tokenizer.encode(text).ids for text in texts]
        return [x if k == 0 else [*x, 256] for k, x in enumerate(tokens)]  # one is cut

    return write


@pytest.mark.compiled_quickly
def test_the_study_of_ranks_runs(study, tmp_path, ranks, monkeypatch):
    results = study.config.results
    tuned_without_training(study, monkeypatch, [])
    study.tune()
    study.train_table("main")
    monkeypatch.setattr(ranks.generate, "generate", writes_what_people_wrote(study))
    (results / "test.json").write_text(json.dumps({"rows": [{"table": "nf4"}, {"table": "main"}]}))
    study.score_tables()
    found = {x.stem: json.loads(x.read_text()) for x in results.glob("*.json")}
    # A rank has 16 + 16 numbers in the query's factors and 16 + 8 in the value's.
    sizes = {row["rank"]: row["parameters"] for row in found["main"]["rows"]}
    assert sizes == {1: 56, 4: 4 * 56}
    drawn = itertools.islice(study.batches(ranks.Run(1, 0.004, 1)), study.steps(1))
    tokens = sum(int((batch.segment_ids > 0).sum()) for batch in drawn)
    assert [x["tokens"] for x in found["main"]["rows"] if x["seed"] == 1] == [tokens] * 2
    assert found["test"]["rows"].pop() == {"table": "nf4"}  # which is not here, and was scored
    tested = [(x["table"], x.get("rank"), x["texts"]) for x in found["test"]["rows"]]
    assert tested == [("main", rank, 3) for rank in (None, 1, 1, 4, 4)]
    assert all(x["bleu"] == pytest.approx(100) for x in found["test"]["rows"])
    assert {x["cut"] for x in found["test"]["rows"]} == {1}
    (results / "test.json").write_text(json.dumps(found["test"]))
    script("rank_ablation/report.py").main(results, tmp_path)
    tables = (tmp_path / "tables.md").read_text()
    assert "| before training | 0 |" in tables
    assert "| 4 | 224 | 0.004 |" in tables
    for name in ("ranks.png", "learning_rates.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_full_fine_tuning_trains_every_leaf(study, ranks):
    base = study.models("bfloat16").base
    adapters = jax.eval_shape(lambda: study.adapters(ranks.Run(ranks.FULL, 1e-4, 0), base))
    assert jax.tree.structure(adapters) == jax.tree.structure(base)
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {np.dtype(np.float32)}


def test_the_speed_is_reckoned_from_steps():
    report = script("rank_ablation/report.py")
    packed = {"runs": 4, "steps": 100, "tokens": 8000, "seconds_a_step_mean": 0.2, "steps_timed": 9}
    alone = [{"rank": r, "seconds_a_step_mean": 0.1 * r, "steps_timed": 9} for r in (1, 2)]
    text = report.speed(packed, {"seeds": 2, "rows": alone})
    assert "0 min 20 s | 400 |" in text  # 100 steps
    assert "1 min 0 s | 133 |" in text  # 2 seeds, 100 steps of 0.1 and of 0.2 seconds
    assert "The ratio is 3.00." in text


# Capacity.


def test_pairs_are_what_they_should_be(capacity):
    config = dataclasses.replace(capacity.CPU, vocabulary=8, batch=5)
    run = capacity.Run(1, 12, 0.1, 3)
    pairs = capacity.draw_pairs(config, run)
    assert len(np.unique(pairs.keys, axis=0)) == 12
    assert pairs.values.max() < 8
    drawn = capacity.batches(config, run)
    seen = np.concatenate([next(drawn).keys for _ in range(12)])  # five epochs
    _, counts = np.unique(seen, axis=0, return_counts=True)
    assert counts.tolist() == [5] * 12


@pytest.mark.compiled_quickly
def test_the_study_of_capacity_runs(capacity, tmp_path, monkeypatch):
    config = dataclasses.replace(
        capacity.CPU,
        vocabulary=16,
        width=16,
        targets="down_proj/kernel",
        ranks=(1, 4),
        pairs=(64,),
        tune_pairs=(64,),
        seeds=(0, 1),
        learning_rates=(0.01, 0.02, 0.04),
        batch=64,
        steps=40,
        at_once=4,
        out=tmp_path / "runs",
        results=tmp_path,
    )
    fit = capacity.Study.fit

    def tuned_without_training(self, name, runs):
        """The best learning rate is the middle one."""
        if name == "main":
            return fit(self, name, runs)
        rows = bowl(dict.fromkeys(config.ranks, 0.02), [])(runs, 0)
        return [{**row, "nll": row["loss"]} for row in rows]

    monkeypatch.setattr(capacity.Study, "fit", tuned_without_training)
    capacity.Study.make(config).run()
    found = json.loads((tmp_path / "capacity.json").read_text())
    rows = found["rows"]
    recalls = {row["rank"]: row["recall"] for row in rows}
    assert {row["learning_rate"] for row in rows} == {0.02}
    assert 2 / 16 < recalls[1] < 0.9 * recalls[4]  # by chance it is 1 / 16
    assert rows[0]["bits"] == pytest.approx(64 * (4 - rows[0]["nll"] / math.log(2)))
    assert {row["rank"]: row["parameters"] for row in rows} == {1: 32 + 16, 4: 4 * (32 + 16)}
    report = script("capacity/report.py")
    report.main(tmp_path, tmp_path)
    assert "| 4 | 192 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "capacity.png").read_bytes()[:4] == b"\x89PNG"


def test_where_a_rank_breaks():
    report = script("capacity/report.py")
    rows = [{"pairs": n, "recall": r} for n, r in ((16, 1.0), (64, 0.95), (256, 0.75), (1024, 0.1))]
    # A quarter of the way from 64 to 256, on a logarithmic scale.
    assert report.breaks_at(rows) == pytest.approx(64 * 4**0.25)
    assert math.isnan(report.breaks_at(rows[:2]))
    fit = report.line_through({r: [5.0 * r**0.8, math.nan] for r in (1, 2, 4, 8)})
    assert (2**fit.start, fit.slope) == pytest.approx((5.0, 0.8))
    noisy = {r: [4.0 * r * 1.1, 4.0 * r / 1.1] for r in (1, 4)}
    fit = report.line_through(noisy)
    # Four residuals of log2(1.1), two degrees of freedom, x = 0, 0, 2, 2.
    assert fit.error == pytest.approx(math.log2(1.1) * math.sqrt(4 / 2 / 4))


@pytest.mark.parametrize("preset", ["h200", "cpu"])
def test_every_option_is_explained(ranks, capacity, preset, capsys):
    for module in (ranks, capacity):
        with pytest.raises(SystemExit) as stopped:
            module.options([preset, "--help"])
        assert stopped.value.code == 0
        assert "--learning-rates" in capsys.readouterr().out
