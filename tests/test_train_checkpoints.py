"""Checkpoints: bit-exact, one after the other, refused for another run, whole after SIGKILL."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import linear
import numpy as np
import optax
import pytest

from lora_jax import train

pytestmark = pytest.mark.compiled_quickly

IDENTITY = {
    "model": {"name": "tiny", "digest": "abc"},
    "rules": ({"pattern": "w", "rank": 2},),
    "data": {"train": 17},
}
TREE = {
    "adapters": {"w": jnp.arange(6.0).reshape(2, 3) / 7, "half": jnp.ones(3, jnp.bfloat16) / 3},
    "count": jnp.int32(3),
    "flag": jnp.array(True),
    "key": jax.random.key(4),
    "nothing": None,
}


def plain(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def assert_bits_equal(actual: Any, wanted: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        assert plain(one).tobytes() == plain(other).tobytes()


def test_what_is_saved_is_read(tmp_path):
    checkpoints = train.Checkpoints(tmp_path / "new" / "folder", every=1, identity=IDENTITY)
    assert checkpoints.latest_step() is None
    record = {"loss": [0.1, float("nan")], "name": "é", "nothing": None}
    with checkpoints.opened() as store:
        assert store.find() is None
        store.save(4, TREE, record)
    assert checkpoints.latest_step() == 4
    with checkpoints.opened() as store:
        found = store.find()
        assert found.step == 4
        assert json.dumps(found.record) == json.dumps(record)
        read = store.read(4, jax.tree.map(jnp.zeros_like, TREE))
    assert_bits_equal(read, TREE)
    assert jax.random.uniform(read["key"]) == jax.random.uniform(TREE["key"])


def test_the_newest_ones_are_kept(tmp_path):
    checkpoints = train.Checkpoints(tmp_path, every=1, keep=2)
    with checkpoints.opened() as store:
        for step in (1, 5, 9, 10):
            store.save(step, {"x": jnp.float32(step)}, {})
        store.save(10, {"x": jnp.float32(0)}, {})  # there is one already
    assert sorted(int(x.name) for x in tmp_path.iterdir()) == [9, 10]
    with checkpoints.opened() as store:
        assert store.find().step == 10
        assert store.read(10, {"x": jnp.float32(0)})["x"] == 10


def test_arrays_may_be_given_away_while_they_are_written(tmp_path):
    checkpoints = train.Checkpoints(tmp_path, every=1)
    move = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(100_000)
    with checkpoints.opened() as store:
        for step in range(1, 6):
            x = move(x)
            store.save(step, {"x": x}, {})
            x = move(x) - 1
    with checkpoints.opened() as store:
        for step in (4, 5):
            np.testing.assert_array_equal(store.read(step, {"x": x})["x"], step)


def test_an_unfinished_one_does_not_count(tmp_path):
    checkpoints = train.Checkpoints(tmp_path, every=1)
    with checkpoints.opened() as store:
        store.save(3, TREE, {})
    (tmp_path / "6.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
    assert checkpoints.latest_step() == 3
    with checkpoints.opened() as store:
        assert store.find().step == 3
        store.save(6, TREE, {})
    assert checkpoints.latest_step() == 6


OTHERS = {
    "a value": (
        {**IDENTITY, "model": {"name": "tiny", "digest": "xyz"}},
        'model.digest is "abc" there and "xyz" here',
    ),
    "something more": ({**IDENTITY, "seed": 1}, "seed is missing there and 1 here"),
    "something less": (
        {"model": IDENTITY["model"], "rules": IDENTITY["rules"]},
        "data is .* there",
    ),
    "within a list": (
        {**IDENTITY, "rules": [{"pattern": "w", "rank": 8}]},
        r"rules\[0\].rank is 2 there and 8 here",
    ),
    "several": (
        {**IDENTITY, "model": {"name": "big", "digest": "x"}, "data": {"train": 18}},
        "model.name .*; model.digest .*; data.train is 17 there and 18 here. Write the options",
    ),
}


@pytest.mark.parametrize(("identity", "sentence"), OTHERS.values(), ids=OTHERS)
def test_another_run_is_refused(identity, sentence, tmp_path):
    with train.Checkpoints(tmp_path, every=1, identity=IDENTITY).opened() as store:
        store.save(3, TREE, {})
    with (
        train.Checkpoints(tmp_path, every=1, identity=identity).opened() as store,
        pytest.raises(ValueError, match=f"the checkpoint of step 3 in .* another run: {sentence}"),
    ):
        store.find()


def test_the_same_run_is_not(tmp_path):
    """Lists and tuples, and the order of names, are one to JSON."""
    with train.Checkpoints(tmp_path, every=1, identity=IDENTITY).opened() as store:
        store.save(3, TREE, {})
    same = {**dict(reversed(IDENTITY.items())), "rules": list(IDENTITY["rules"])}
    with train.Checkpoints(tmp_path, every=1, identity=same).opened() as store:
        assert store.find().step == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"tx": optax.sgd(0.1)},
            r"state/opt_state/0/count is \"int32\[\]\" there and missing here",
        ),
        (
            {"rank": 3},
            r"state/adapters/w/a is \"float32\[2, 6\]\" there and \"float32\[3, 6\]\" here",
        ),
    ],
)
def test_other_arrays_are_refused(options, sentence, tmp_path):
    import lora_jax as lj

    def run(tx=None, rank=2, steps=2):
        base, _ = linear.make()
        adapters = lj.init_adapters(jax.random.key(0), base, [lj.LoraRule("w", rank=rank)])
        return train.fit(
            *(linear.loss_fn, base, adapters, tx or optax.adam(0.1), linear.batches(4)),
            key=jax.random.key(0),
            steps=steps,
            checkpoints=train.Checkpoints(tmp_path, every=10),
        )

    run()
    with pytest.raises(ValueError, match=sentence):
        run(**options, steps=4)


def test_what_cannot_be_kept(tmp_path):
    with pytest.raises(TypeError, match=r"identity cannot be kept .* a PosixPath is in it; write"):
        train.Checkpoints(tmp_path, every=1, identity={"path": Path("x")})
    for name in ("every", "keep"):
        with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
            train.Checkpoints(tmp_path, **{"every": 1, name: 0})
    with (
        train.Checkpoints(tmp_path, every=1).opened() as store,
        pytest.raises(ValueError, match="two leaves are both called 'a/b'; rename one"),
    ):
        store.save(1, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, {})


# Disks


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match="file"),
        train.Checkpoints(tmp_path / "file" / "folder", every=1).opened(),
    ):
        pass


def full(*arguments: Any, **options: Any) -> None:
    # As TensorStore says it.
    raise ValueError(
        'RESOURCE_EXHAUSTED: Error writing "d/1": [OS error 28: No space left on device]'
    )


def test_a_full_disk_is_an_os_error_and_leaves_the_one_before(tmp_path, monkeypatch):
    from orbax.checkpoint import PyTreeCheckpointHandler

    def run(steps):
        base, adapters = linear.make()
        return train.fit(
            *(linear.loss_fn, base, adapters, optax.adam(0.1), linear.batches(steps)),
            key=jax.random.key(0),
            steps=steps,
            checkpoints=checkpoints,
        )

    checkpoints = train.Checkpoints(tmp_path, every=2)
    run(4)
    with monkeypatch.context() as patch:
        patch.setattr(PyTreeCheckpointHandler, "async_save", full)
        patch.setattr(PyTreeCheckpointHandler, "save", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            run(12)
    assert caught.value.errno == errno.ENOSPC
    assert checkpoints.latest_step() == 4
    assert run(12).step == 12
    assert checkpoints.latest_step() == 12


def test_no_thread_is_left(tmp_path):
    before = set(threading.enumerate())
    with train.Checkpoints(tmp_path, every=1).opened() as store:
        store.save(1, TREE, {})
    left = {x.name for x in set(threading.enumerate()) - before}
    assert not [name for name in left if name.startswith("checkpoints")]


# Processes that are killed

RUN = """
import sys, json
sys.path.insert(0, {tests!r})
import jax, linear, numpy as np, optax
from lora_jax import train

def batches():
    yield from linear.batches(60)

base, adapters = linear.make(dropout=0.3)
fitted = train.fit(
    linear.loss_fn, base, adapters, optax.adam(0.05), batches(), key=jax.random.key(0), steps=60,
    evaluate_every=7, eval_fn=lambda a: {{"loss": float(abs(a["w"].b.sum() - 0.2))}},
    checkpoints=train.Checkpoints(sys.argv[1], every=1, identity={{"a": 1}}),
    on_metrics=lambda step, metrics: print(step, flush=True),
)
leaves = [np.asarray(x).tobytes().hex() for x in jax.tree.leaves((fitted.adapters, fitted.last))]
print(json.dumps([leaves, fitted.history, fitted.best_step]))
"""


def test_killed_at_any_moment(tmp_path):
    """With a checkpoint after each step, most of the time is spent inside of writing one."""
    code = RUN.format(tests=str(Path(__file__).parent))

    def start(folder: str) -> subprocess.Popen:
        command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    whole, errors = start("whole").communicate()
    assert not errors
    rng, kills = np.random.default_rng(0), 0
    for first in (5, 20, 40):
        process = start("killed")
        for line in process.stdout:
            if line.strip() == str(first):
                time.sleep(rng.uniform(0, 0.05))
                process.send_signal(signal.SIGKILL)
                kills += 1
        process.communicate()
    assert kills == 3
    resumed, errors = start("killed").communicate()
    assert not errors
    assert int(resumed.split()[0]) > 30  # it went on from where it was
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]
