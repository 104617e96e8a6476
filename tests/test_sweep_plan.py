"""Plans of sweeps: which runs share a program, and what is refused before anything is compiled."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest
import sweep_runs
from sweep_runs import Run, make_tx

import lora_jax as lj
from lora_jax.sweep.places import stacked

pytestmark = pytest.mark.compiled_quickly

BASE = sweep_runs.make_base()
RATES = [Run(learning_rate=rate) for rate in (1e-3, 1e-2)]
RANKS = [Run(rank) for rank in (1, 4, 1)]
RANKS[2] = dataclasses.replace(RANKS[2], seed=1)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: str = "adam"
    learning_rate: float = 1e-3
    clip: float | None = None

    def __post_init__(self):
        if not self.learning_rate > 0:  # as a config may, and a traced number may not
            raise ValueError("learning_rate is not positive")


@dataclasses.dataclass(frozen=True)
class Nested:
    rank: int = 2
    optimizer: Optimizer = Optimizer()


def by_name(run: Nested) -> Any:
    config = run.optimizer
    tx = {"adam": optax.adam, "sgd": optax.sgd}[config.name](config.learning_rate)
    return tx if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), tx)


def make_adapters(run: Any) -> Any:
    return lj.init_adapters(jax.random.key(0), BASE, lj.LoraRule("kernel", rank=run.rank))


NESTED = [
    Nested(2, Optimizer(learning_rate=1e-2)),
    Nested(2, Optimizer("sgd")),
    Nested(3, Optimizer(clip=1.0)),
    Nested(4, Optimizer()),
    Nested(3, Optimizer(clip=2.0)),
]
# Runs, the optimizer, options, and which runs are together.
GROUPS = {
    "numbers that only enter": (RATES, make_tx, {}, [(0, 1)]),
    "numbers that make programs": (
        RATES,
        make_tx,
        {"static": ["learning_rate"]},
        [(0,), (1,)],
    ),
    "ranks, each entry by itself": (RANKS, make_tx, {}, [(0, 1, 2)]),
    "ranks, Adafactor": (RANKS, lambda run: optax.adafactor(1e-3), {}, [(0, 2), (1,)]),
    "ranks, Muon": (RANKS, lambda run: optax.contrib.muon(1e-3), {}, [(0, 2), (1,)]),
    "configs within configs": (NESTED, by_name, {}, [(0, 3), (1,), (2,), (4,)]),
}


@pytest.mark.parametrize(("runs", "tx", "options", "groups"), GROUPS.values(), ids=GROUPS)
def test_what_changes_the_program_makes_groups(runs, tx, options, groups):
    plan = lj.sweep.plan(runs, make_adapters, tx, **options)
    assert [group.runs for group in plan.groups] == groups
    assert len(str(plan).splitlines()) == len(groups) + 2


def test_leaves_trained_whole_make_groups():
    runs = [Run(targets="up"), Run(targets="down"), Run(1, targets="up")]

    def partly_whole(run):
        whole = "up" if run.targets == "down" else ()
        rule = lj.LoraRule(run.targets, rank=run.rank)
        return lj.init_adapters(jax.random.key(0), BASE, rule, train=whole)

    plan = lj.sweep.plan(runs, partly_whole, make_tx)
    assert [group.runs for group in plan.groups] == [(0, 2), (1,)]
    assert plan.groups[0].rank == 2


def test_as_many_at_once_as_fit_and_evenly():
    runs = [Run(seed=seed) for seed in range(10)]
    (group,) = lj.sweep.plan(runs, make_adapters, make_tx).groups
    # A and B of both matrices; adapters, last good ones, gradient, Adam's two moments, two counts.
    assert group.run_bytes == 5 * 4 * 2 * (8 + 12 + 12 + 4) + 2 * 4
    assert group.at_once == 10
    for options, expected in (
        ({"at_once": 8}, 5),
        ({"at_once": 99}, 10),
        ({"memory": 4 * group.run_bytes}, 4),
        ({"memory": 4 * group.run_bytes, "activations": group.run_bytes}, 2),
    ):
        assert lj.sweep.plan(runs, make_adapters, make_tx, **options).groups[0].at_once == expected


def test_a_grid_changes_the_last_field_fastest():
    runs = lj.sweep.grid(Run(), rank=[1, 2], seed=range(2))
    assert runs == [Run(1, seed=0), Run(1, seed=1), Run(2, seed=0), Run(2, seed=1)]


def planned(runs=RATES, adapters=make_adapters, tx=make_tx, **options):
    return lj.sweep.plan(runs, adapters, tx, **options)


class Sending:
    needs_folder = True


def fitted(batches=(), plan=None, **options):
    plan = plan or planned(at_once=1)
    return lj.sweep.fit(None, BASE, plan, batches, make_key=None, **{"steps": 2, **options})


BAD = {
    "empty grid": (lambda: lj.sweep.grid(Run(), rank=[]), "the grid is empty: rank has no values"),
    "unknown field": (lambda: lj.sweep.grid(Run(), ranks=[1]), "Run has no field 'ranks'; it has"),
    "no runs": (lambda: planned([]), "there are no runs"),
    "duplicates": (
        lambda: planned([Run(), Run(3), Run()]),
        "runs 0 and 2 are the same, Run(rank=2",
    ),
    "no config": (lambda: planned([{"rank": 1}]), "runs holds {'rank': 1}, expected configs"),
    "unhashable": (lambda: planned([Run(targets=["up"])]), "run 0 cannot be hashed"),
    "adapters of other models": (
        lambda: planned(adapters=lambda run: {str(run.learning_rate): make_adapters(run)}),
        "the runs' adapters differ in structure; expected those that init_adapters made",
    ),
    "rank above the matrix": (lambda: planned([Run(2), Run(5)]), "run 1, Run(rank=5"),
    "nothing to train": (
        lambda: planned(adapters=lambda run: lj.init_adapters(jax.random.key(0), BASE, [])),
        "make_adapters gave a tree without arrays",
    ),
    "looks at a number": (
        lambda: planned(tx=lambda run: optax.sgd(1.0 if run.learning_rate > 1 else 2.0)),
        "make_tx looks at the value of learning_rate, which is traced",
    ),
    "static names nothing": (lambda: planned(static=["lr"]), "static names 'lr', and a run has"),
    "none at once": (lambda: planned(at_once=0), "at_once is 0"),
    "does not fit": (
        lambda: planned(at_once=2, memory=2000),
        "2 runs at once need 2,896 bytes for adapters and optimizer, and there are 2,000; "
        "write at_once=1",
    ),
    "not even one": (lambda: planned(memory=100), "write a smaller rank, or fewer targets"),
    "no steps": (lambda: fitted(steps=0), "steps is 0"),
    "nothing to evaluate on": (lambda: fitted(patience=1), "there are no validation batches"),
    "one pass": (
        lambda: fitted(iter([])),
        "batches is an iterator, which can be gone through once",
    ),
    "one pass, elsewhere": (
        lambda: fitted(iter([]), plan=planned(RATES[:1]), executor=object()),
        "batches is an iterator, which can be gone through once",
    ),
    "no folder": (lambda: fitted(save_every=5), "save_every is 5, but there is no folder to save"),
    "no folder for retries": (
        lambda: fitted(executor=Sending()),
        "the executor has a group whose worker died go on from its last save, and there is no",
    ),
    "never saved": (lambda: fitted(folder="never made", save_every=0), "save_every is 0, expected"),
    "halving too late": (
        lambda: fitted(validation=[0], halving=lj.sweep.Halving(at=(2,))),
        "halving is at step 2, expected one before steps=2",
    ),
    "halving nowhere": (lambda: lj.sweep.Halving(at=()), "at is ()"),
    "halving keeps all": (lambda: lj.sweep.Halving(at=(1,), keep=1.0), "keep is 1.0"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_batches_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"arrays of shapes \(3, 8\), \(4, 8\); expected the same"):
        stacked([{"x": np.ones((rows, 8))} for rows in (3, 4)])
