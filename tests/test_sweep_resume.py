"""Sweeps that are killed or trained elsewhere: to the last bit what they are in peace and here."""

import functools
import math
import multiprocessing.pool
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sweep_resume_check
from sweep_resume_check import RUNS, STEPS, batches_of, outcome, sweep

from lora_jax.sweep.places import Entry, Saved
from lora_jax.sweep.program import from_host, on_host
from lora_jax.sweep.progress import Progress


class KilledError(Exception):
    """As good as a kill: nothing that the sweep does catches it."""


class Few:
    """Batches of which only so many can be drawn in all."""

    def __init__(self, batches: Any, most: int):
        self.batches, self.left = batches, most

    def __iter__(self):
        for batch in self.batches:
            self.left -= 1
            if self.left < 0:
                raise KilledError
            yield batch


@functools.cache
def in_peace(kind: str) -> Any:
    """A sweep that keeps nothing."""
    found = sweep(batches_of(kind))
    fifth = "data" if kind == "own" else "done"
    stopped = ["done", "diverged", "done", "patience", fifth, "halved"]
    assert [x.stopped for x in found] == stopped
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves([x.adapters for x in found]))
    return found


def test_a_sweep_that_is_killed_goes_on_from_its_last_save(tmp_path):
    """With the same batches for all, which are drawn again up to where a run is."""
    for most in (2, 21, 30):
        with pytest.raises(KilledError):
            sweep(Few(batches_of("same"), most), folder=tmp_path, save_every=3)
    told = []
    options = {"folder": tmp_path, "save_every": 3, "on_metrics": lambda *row: told.append(row)}
    found = sweep(batches_of("same"), **options)
    assert outcome(found) == outcome(in_peace("same"))
    for x in found:
        assert repr([row[1:] for row in told if row[0] == x.run]) == repr(x.history)
    # All is done: nothing is drawn any more, and the same is told of.
    before = list(told)
    told.clear()
    assert outcome(sweep(Few([], 0), **options)) == outcome(found)
    assert sorted(map(repr, told)) == sorted(map(repr, before))


class Backwards:
    """Does the last task first, in another thread, and each one again whose worker died."""

    def __init__(self):
        self.deaths = 0

    def map(self, fn, tasks):
        def tried(task):
            for _ in range(3):
                try:
                    return fn(task)
                except KilledError:
                    self.deaths += 1
            raise AssertionError("a task was never done")

        with multiprocessing.pool.ThreadPool(1) as pool:
            return pool.map(tried, list(tasks)[::-1])[::-1]


def test_groups_are_trained_elsewhere_and_again_if_their_worker_dies(tmp_path):
    """With batches of their own, whose iterators are told where to go on."""
    drawn, deadly = [], iter((5, 30, 55))
    moment = next(deadly)

    class Deadly(sweep_resume_check.Positioned):
        def __next__(self):
            nonlocal moment
            if len(drawn) == moment:
                moment = next(deadly, math.inf)
                raise KilledError
            drawn.append(super().__next__())
            return drawn[-1]

    batches = batches_of("own")
    told, executor = [], Backwards()
    found = sweep(
        lambda run: Deadly(batches(run).data),
        folder=tmp_path,
        save_every=2,
        executor=executor,
        on_metrics=lambda run, step, metrics: told.append((run, step)),
    )
    assert executor.deaths == 3
    assert outcome(found) == outcome(in_peace("own"))
    assert told.count((RUNS[0], STEPS)) == 2  # a step and an evaluation
    # What was drawn since the last save, by two runs at most, is drawn again.
    assert len(drawn) <= 2 + sum(x.step for x in found) + executor.deaths * 2 * 2


def test_kills_by_the_system(tmp_path):
    """The whole check has 20: python tests/sweep_resume_check.py."""
    assert sweep_resume_check.check(tmp_path, in_peace("own"), kills=2, seed=0) == []


def test_what_is_kept_of_a_run_is_what_it_was(tmp_path):
    """Also numbers that JSON does not have, and arrays of dtypes that NumPy does not."""
    state = {
        "bfloat16": jnp.array([1.5, jnp.nan], jnp.bfloat16),
        "flag": jnp.array(True),
        "key": jax.random.split(jax.random.key(3, impl="rbg")),
        "none": None,
        "of nothing": jnp.zeros((0, 3)),
    }
    history = [(1, {"loss": math.nan, "grad_norm": -math.inf}), (2, {"loss": 0.1 + 0.2})]
    entry = Entry(7, "a config", step=2, history=history, state=on_host(state))
    waiting = Entry(8, "another", stopped="halved", last=on_host(state["bfloat16"]))
    like = {"state": entry.state, "last": waiting.last, "best": waiting.last}
    open_folder = lambda: Progress(tmp_path / "a", [entry, waiting], lambda: like)  # noqa: E731
    assert open_folder().find() is None
    open_folder().save(Saved(5, {3: entry}, [waiting]))
    (tmp_path / "a" / ".progress.npz.1.partial").write_bytes(b"of a process that was killed")
    saved = open_folder().find()
    assert (saved.clock, list(saved.placed)) == (5, [3])
    assert {x.name for x in (tmp_path / "a").iterdir()} == {"progress.npz", "run-8.npz"}
    found = from_host(saved.placed[3].state)
    assert found["key"].dtype == state["key"].dtype
    for x, y in zip(*(jax.tree.leaves(on_host(tree)) for tree in (found, state)), strict=True):
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
    assert repr(saved.placed[3].history) == repr(history)
    assert (saved.left[0].stopped, saved.left[0].state) == ("halved", None)


def test_a_folder_of_another_sweep_is_refused(tmp_path):
    """Before anything is trained; what is there stays."""
    with pytest.raises(KilledError):
        sweep(Few([0], 0), folder=tmp_path, identity={"model": "one"})
    found = lambda: {x: x.read_bytes() for x in tmp_path.rglob("*") if x.is_file()}  # noqa: E731
    before = found()
    with pytest.raises(ValueError, match="holds another sweep") as caught:
        sweep(lambda run: [], folder=tmp_path, identity={"model": "two"}, accumulate=2)
    assert str(caught.value).endswith(
        'holds another sweep: batches is "the same for all" there and "of each run" here; '
        'accumulate is 1 there and 2 here; identity.model is "one" there and "two" here. Write the '
        "options it was begun with, or another folder"
    )
    assert found() == before


def test_a_damaged_file_is_named(tmp_path):
    progress = Progress(tmp_path, [Entry(0, "a config")], dict)
    progress.save(Saved(1, {}, [Entry(0, "a config")]))
    content = (tmp_path / "run-0.npz").read_bytes()
    for damaged in (b"", content[:-30], content.replace(b'"waited"', b'"wasted"')):
        (tmp_path / "run-0.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"run-0.npz is damaged or of another sweep: .*remove"):
            progress.find()
    (tmp_path / "run-0.npz").unlink()
    with pytest.raises(ValueError, match=r"run-0.npz is damaged or of another sweep: .*remove"):
        progress.find()
