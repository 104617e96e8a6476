"""What is made of a sweep's runs: tables, means with intervals, the best of a grid, pictures."""

from __future__ import annotations

import csv
import dataclasses
import math

import numpy as np
import pyarrow.parquet
import pytest

from lora_jax.sweep import Fitted, plots, results

PNG = b"\x89PNG"
# Quantiles of Student's t as tables of statistics print them: degrees of freedom, at 95 %, 97.5 %.
QUANTILES = [
    (1, 6.314, 12.706),
    (2, 2.920, 4.303),
    (3, 2.353, 3.182),
    (4, 2.132, 2.776),
    (5, 2.015, 2.571),
    (9, 1.833, 2.262),
    (10, 1.812, 2.228),
    (29, 1.699, 2.045),
    (30, 1.697, 2.042),
    (120, 1.658, 1.980),
]


@dataclasses.dataclass(frozen=True)
class Run:
    rank: int = 2
    learning_rate: float = 1e-3
    targets: str = "kernel"
    seed: int = 0


NAMES = [field.name for field in dataclasses.fields(Run)]


@pytest.mark.parametrize(("degrees", "at_95", "at_975"), QUANTILES)
def test_quantiles_are_those_of_the_tables(degrees, at_95, at_975):
    assert results.t_quantile(0.95, degrees) == pytest.approx(at_95, abs=5e-4)
    assert results.t_quantile(0.975, degrees) == pytest.approx(at_975, abs=5e-4)


def test_an_interval_is_the_mean_and_its_standard_error_times_t():
    values = np.array([0.31, 0.35, 0.30], np.float64)
    found = results.interval(values)
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.half == pytest.approx(4.303 * values.std(ddof=1) / np.sqrt(3), rel=2e-4)
    assert (found.n, str(found)) == (3, "0.3200 ± 0.0657")


def test_what_has_no_interval():
    assert results.interval([2.0])[::2] == (2.0, 1)
    assert str(results.interval([2.0])) == "2.0000"
    lost = results.interval([1.0, math.nan, 2.0])
    assert (lost.mean, lost.n, str(lost)) == (math.inf, 3, "diverged")
    assert math.isnan(lost.half)


def fitted(run: Run, loss: float, stopped: str = "done", steps: int = 20) -> Fitted:
    """A run whose loss falls to `loss`, which is found on validation at its last step."""
    history = [
        (step, {"loss": loss + 1 / step, "tokens": 3.0, "grad_norm": 1.0})
        for step in range(1, steps + 1)
    ]
    best = {"loss": loss, "weight": 5.0, "accuracy": 0.5}
    history.insert(10, (10, {"validation/loss": loss + 1, "validation/accuracy": 0.25}))
    if stopped == "diverged":
        history.append((steps + 1, {"loss": math.nan, "tokens": 3.0, "grad_norm": math.nan}))
        return Fitted(run, None, None, 10, {"loss": loss + 1}, steps, stopped, history)
    history.append((steps, {"validation/loss": loss, "validation/accuracy": 0.5}))
    return Fitted(run, None, None, steps, best, steps, stopped, history)


RATES = (1e-4, 1e-3, 1e-2)
# Best at the highest rate for rank 1, in the middle for 2, at the lowest for 4.
MEANS = {1: (0.9, 0.6, 0.5), 2: (0.6, 0.4, 0.5), 4: (0.3, 0.4, math.nan)}


@pytest.fixture(scope="module")
def sweep() -> list[Fitted]:
    return [
        fitted(
            Run(rank, rate, seed=seed),
            0.0 if math.isnan(mean) else mean + 0.01 * seed,
            "diverged" if math.isnan(mean) and seed == 1 else "done",
        )
        for rank, means in MEANS.items()
        for rate, mean in zip(RATES, means, strict=True)
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def cells(sweep) -> list[results.Cell]:
    return results.cells(results.result_rows(sweep), "validation_loss", names=NAMES)


def test_a_row_for_each_run(sweep):
    rows = results.result_rows(sweep)
    assert len(rows) == 27
    assert rows[1] == {
        **{"run": 1, "rank": 1, "learning_rate": 1e-4, "targets": "kernel", "seed": 1},
        **{"stopped": "done", "steps": 20, "tokens": 60, "best_step": 20},
        "train_loss": pytest.approx(np.mean([0.91 + 1 / 19, 0.91 + 1 / 20])),  # of the last tenth
        **{"validation_loss": 0.91, "validation_accuracy": 0.5, "last_validation_loss": 0.91},
    }


def test_a_row_for_each_step(sweep):
    rows = results.history_rows(sweep[:2])
    assert [(row["run"], row["step"]) for row in rows] == [
        (run, step) for run in range(2) for step in range(1, 21)
    ]
    assert rows[9]["validation_loss"] == pytest.approx(1.9)
    assert "validation_loss" not in rows[8]


def test_tables_as_files(sweep, tmp_path):
    rows = results.history_rows(sweep)
    results.write_csv(tmp_path / "history.csv", rows)
    results.write_parquet(tmp_path / "history.parquet", rows)
    with (tmp_path / "history.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    typed = pyarrow.parquet.read_table(tmp_path / "history.parquet").to_pylist()
    assert len(read) == len(typed) == len(rows)
    for row, text, value in zip(rows, read, typed, strict=True):
        assert {k: x for k, x in value.items() if x is not None} == pytest.approx(row, nan_ok=True)
        assert float(text["loss"]) == pytest.approx(row["loss"], nan_ok=True)
        assert (text["validation_loss"] == "") == ("validation_loss" not in row)


def test_the_best_rate_of_each_rank_and_whether_it_is_at_the_edge(cells):
    found = results.best(cells)
    assert [(x.cell.values, x.edge) for x in found] == [
        ({"rank": 1, "learning_rate": 1e-2}, "high"),
        ({"rank": 2, "learning_rate": 1e-3}, None),
        ({"rank": 4, "learning_rate": 1e-4}, "low"),
    ]
    half = 4.303 * np.std([0.4, 0.41, 0.42], ddof=1) / np.sqrt(3)
    assert found[1].cell.interval == pytest.approx((0.41, half, 3), rel=2e-4)


def test_a_run_that_diverged_is_worse_than_any(cells):
    lost = next(cell for cell in cells if cell.values == {"rank": 4, "learning_rate": 1e-2})
    assert lost.scores == (0.0, math.inf, 0.0)
    assert lost.interval.mean == math.inf


def test_one_rate_alone_is_at_no_edge(sweep):
    rows = [row for row in results.result_rows(sweep) if row["learning_rate"] == 1e-3]
    found = results.best(results.cells(rows, "validation_loss", names=NAMES))
    assert [(x.cell.values, x.edge) for x in found] == [({"rank": r}, None) for r in (1, 2, 4)]


def test_pictures(sweep, cells, tmp_path):
    label = "validation loss (nats)"
    plots.plot_against(tmp_path / "rank", cells, x="rank", by="learning_rate", label=label)
    plots.plot_heat_map(tmp_path / "heat_map", cells, label=label)
    rows, history = results.result_rows(sweep), results.history_rows(sweep)
    curves = {"by": "rank", "colour": "learning_rate", "label": "loss (nats)"}
    plots.plot_curves(tmp_path / "curves", rows, history, **curves)
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.iterdir())
