"""The loop: a plain loop's numbers, what it chooses, when it stops, and that it can go on."""

from __future__ import annotations

import itertools
import math
import signal
from typing import Any

import jax
import jax.numpy as jnp
import linear
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import train

pytestmark = pytest.mark.compiled_quickly

TX = optax.adam(0.05)
KEY = jax.random.key(5)


def transform(key: Any, batch: Any) -> Any:
    return {**batch, "x": batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)}


def fit(batches: Any = None, *, steps: int = 12, dropout: float = 0.3, **options: Any) -> Any:
    base, adapters = linear.make(dropout)
    batches = linear.batches(steps) if batches is None else batches
    return train.fit(
        *(linear.loss_fn, base, adapters, TX, batches),
        **{"key": KEY, "steps": steps, "transform": transform, **options},
    )


def evaluation(adapters: Any) -> dict[str, float]:
    """A loss that falls, then rises again: deterministic, and the adapters' own."""
    return {"loss": abs(float(adapters["w"].b.sum()) - 0.2), "other": 1.0}


def assert_equal(one: train.Fitted, other: train.Fitted) -> None:
    """Bit for bit."""
    assert jax.tree.structure(one[:2]) == jax.tree.structure(other[:2])
    for x, y in zip(jax.tree.leaves(one[:2]), jax.tree.leaves(other[:2]), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert one[2:] == other[2:]


def test_it_is_a_plain_loop():
    base, adapters = linear.make(dropout=0.3)
    state = train.init_state(KEY, adapters, TX)
    step = train.make_step(linear.loss_fn, TX, transform=transform)
    wanted = []
    for data in linear.batches(12):
        state, metrics = step(state, base, data)
        wanted.append({name: float(value) for name, value in metrics.items()})
    told = []
    fitted = fit(on_metrics=lambda step, metrics: told.append((step, metrics)))
    assert told == fitted.history == list(enumerate(wanted, 1))
    for x, y in zip(jax.tree.leaves(fitted.last), jax.tree.leaves(state.adapters), strict=True):
        np.testing.assert_array_equal(x, y)
    assert fitted.adapters is fitted.last
    assert fitted[2:6] == (None, {}, 12, "done")


def test_a_step_is_reported_while_the_next_one_runs():
    events = []

    def batches():
        for number, data in enumerate(linear.batches(4), 1):
            events.append(f"draw {number}")
            yield data

    fit(batches(), steps=4, on_metrics=lambda step, _: events.append(f"report {step}"))
    assert events == [
        *("draw 1", "draw 2", "report 1", "draw 3", "report 2", "draw 4", "report 3", "report 4")
    ]


def test_what_was_given_is_left_alone():
    base, adapters = linear.make()
    before = jax.tree.map(np.array, (base, adapters))
    train.fit(linear.loss_fn, base, adapters, TX, linear.batches(3), key=KEY, steps=3)
    jax.tree.map(np.testing.assert_array_equal, before, (base, adapters))


def test_the_program_is_compiled_once(caplog):
    loss_fn = lambda *arguments: linear.loss_fn(*arguments)  # noqa: E731
    base, adapters = linear.make()
    with jax.log_compiles():
        for _ in range(2):
            train.fit(loss_fn, base, adapters, TX, linear.batches(3), key=KEY, steps=3)
    assert caplog.text.count("Finished XLA compilation of jit(step)") == 1


def test_a_loss_that_cannot_be_hashed():
    class Loss:
        __hash__ = None

        def __call__(self, *arguments):
            return linear.loss_fn(*arguments)

    base, adapters = linear.make()
    one, other = (
        train.fit(fn, base, adapters, TX, linear.batches(3), key=KEY, steps=3)
        for fn in (Loss(), linear.loss_fn)
    )
    assert_equal(one, other)


# Evaluation


@pytest.mark.parametrize(
    ("values", "options", "best", "stopped", "steps"),
    [
        ([3, 1, 2, 4], {}, 4, "done", 8),
        ([3, 1, 2, 4], {"mode": "max"}, 8, "done", 8),
        ([3, 1, 1, 0], {"patience": 1}, 4, "patience", 6),
        ([3, 1, 2, 4], {"patience": 2}, 4, "done", 8),
        ([math.nan, 2, math.nan, 3], {}, 4, "done", 8),
        ([math.nan] * 4, {"patience": 3}, None, "patience", 6),
        ([5, 4, 3, 2], {"evaluate_every": None}, 8, "done", 8),
        ([5, 4, 3, 2], {"evaluate_every": 3}, 8, "done", 8),
    ],
)
def test_the_best_and_when_to_stop(values, options, best, stopped, steps):
    remaining, seen = iter(values), {}

    def eval_fn(adapters):
        value = next(remaining)
        seen.setdefault(value, adapters)
        return {"loss": np.float32(value), "accuracy": 1}

    fitted = fit(steps=8, eval_fn=eval_fn, **{"evaluate_every": 2, **options})
    assert (fitted.best_step, fitted.stopped, fitted.step) == (best, stopped, steps)
    if best is None:
        assert fitted.adapters is fitted.last
        return
    assert fitted.adapters is seen[fitted.best_metrics["loss"]]
    plain = fit(linear.batches(8), steps=best)  # the best ones are those of that step
    for x, y in zip(*map(jax.tree.leaves, (fitted.adapters, plain.last)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_evaluations_are_reported_after_their_step():
    fitted = fit(steps=4, evaluate_every=2, eval_fn=evaluation)
    order = [(step, "validation/loss" in metrics) for step, metrics in fitted.history]
    assert order == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]
    assert fitted.history[2][1].keys() == {"validation/loss", "validation/other"}


def test_batches_that_end():
    fitted = fit(linear.batches(5), steps=12, evaluate_every=2, eval_fn=evaluation)
    assert (fitted.step, fitted.stopped) == (5, "data")
    assert fitted.history[-1][0] == 5
    assert "validation/loss" in fitted.history[-1][1]


def test_stopping_when_asked():
    answers = iter([False, False, True])
    fitted = fit(stop=lambda: next(answers))
    assert (fitted.step, fitted.stopped, len(fitted.history)) == (2, "asked", 2)


# Divergence


@pytest.mark.parametrize("at", [1, 2, 5, 12])
def test_a_loss_that_is_not_finite_ends_the_run(at, tmp_path):
    whole = fit(steps=max(at - 2, 1))
    batches, told = linear.batches(12), []
    batches[at - 1]["y"] = batches[at - 1]["y"] * np.float32(np.nan)
    checkpoints = train.Checkpoints(tmp_path, every=3)
    with pytest.raises(train.Diverged, match=f"the loss is nan at step {at}") as caught:
        fit(batches, checkpoints=checkpoints, on_metrics=lambda step, _: told.append(step))
    assert told == list(range(1, at))
    assert caught.value.step == at
    # Nothing of what came after the last good step is kept.
    assert (checkpoints.latest_step() or 0) == (at - 1) // 3 * 3
    if at == 1:
        assert caught.value.adapters is None
    if at > 2:  # those that gave the last finite loss
        for x, y in zip(*map(jax.tree.leaves, (caught.value.adapters, whole.last)), strict=True):
            np.testing.assert_array_equal(x, y)


# Resumption


class Counting:
    """Batches whose iterator can tell where it is, as grain's can."""

    def __init__(self, data: list, as_bytes: bool = False):
        self.data, self.next, self.drawn, self.as_bytes = data, 0, 0, as_bytes

    def __iter__(self):
        return self

    def __next__(self):
        if self.next == len(self.data):
            raise StopIteration
        self.next, self.drawn = self.next + 1, self.drawn + 1
        return self.data[self.next - 1]

    def get_state(self):
        return bytes([self.next, 255]) if self.as_bytes else {"next": self.next}

    def set_state(self, state):
        self.next = state[0] if self.as_bytes else state["next"]


STREAMS = {
    "a list": lambda: linear.batches(12),
    "told by JSON": lambda: Counting(linear.batches(12)),
    "told by bytes": lambda: Counting(linear.batches(12), as_bytes=True),
}
OPTIONS = {"evaluate_every": 3, "eval_fn": evaluation}


class Interruption(BaseException):
    """Like KeyboardInterrupt, but nobody else's."""


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("where", ["stop", "draw", "report", "evaluate", "evaluate late"])
def test_a_resumed_run_is_the_uninterrupted_one(where, stream, tmp_path):
    """Ended again and again, at every step, by whatever means: nothing is lost or done twice."""
    wanted = fit(stream(), **OPTIONS)
    checkpoints = train.Checkpoints(tmp_path, every=5)
    notes: list[str] = []

    def attempt(at: int) -> Any:
        calls = itertools.count(1)

        def interrupting(fn):
            def inner(*arguments):
                if next(calls) > at:
                    raise Interruption
                return fn(*arguments)

            return inner

        options = {**OPTIONS, "checkpoints": checkpoints}
        batches = stream()
        if where == "stop":
            options["stop"] = lambda: next(calls) > at
        elif where == "draw":
            batches = iter(batches)
            told = isinstance(batches, Counting)
            if told:
                batches.data = batches.data.copy()
                draw = Counting.__next__
                batches = type("Interrupted", (Counting,), {"__next__": interrupting(draw)})(
                    batches.data, batches.as_bytes
                )
            else:
                inner = batches
                batches = iter(interrupting(lambda: next(inner)), None)
        elif where == "report":
            options["on_metrics"] = interrupting(lambda step, metrics: None)
        else:
            late = where == "evaluate late"

            def eval_fn(adapters):
                result = evaluation(adapters) if late else None
                if next(calls) > at:
                    raise Interruption
                return result or evaluation(adapters)

            options["eval_fn"] = eval_fn
        try:
            return fit(batches, **options)
        except Interruption as interruption:
            notes.extend(getattr(interruption, "__notes__", []))
            return None

    # Longer and longer attempts, for a list draws again what was drawn before.
    for at in range(1, 40):
        fitted = attempt(at)
        if fitted is not None and fitted.stopped == "done":
            break
    assert not notes  # every state could be saved
    assert_equal(fitted, wanted)
    assert checkpoints.latest_step() == 12
    assert_equal(fit(stream(), **OPTIONS, checkpoints=checkpoints), wanted)  # nothing left to do


def test_patience_is_kept(tmp_path):
    def eval_fn(adapters):
        return {"loss": 1.0}

    options = {"evaluate_every": 2, "eval_fn": eval_fn, "patience": 3}
    wanted = fit(**options)
    assert (wanted.step, wanted.stopped) == (8, "patience")
    checkpoints = train.Checkpoints(tmp_path, every=100)
    for steps in (3, 2, 1, 100):
        answers = itertools.count()
        fitted = fit(
            **options,
            checkpoints=checkpoints,
            stop=lambda answers=answers, steps=steps: next(answers) >= steps,
        )
    assert_equal(fitted, wanted)
    assert_equal(fit(**options, checkpoints=checkpoints), wanted)  # it has stopped for good


def test_a_signal_that_raises_at_any_moment(tmp_path):
    """Also between a step's taking its input's memory and its result's being held by Python."""
    wanted = fit(steps=400, batches=linear.batches(400))
    checkpoints = train.Checkpoints(tmp_path, every=150)
    delays = np.random.default_rng(0).uniform(0.02, 0.12, 100)

    def interrupt(number, frame):
        raise Interruption

    before, fitted = signal.signal(signal.SIGALRM, interrupt), None
    interruptions: list[Interruption] = []
    try:
        for delay in delays:
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                fitted = fit(linear.batches(400), steps=400, checkpoints=checkpoints)
                signal.setitimer(signal.ITIMER_REAL, 0)
                break
            except Interruption as interruption:
                interruptions.append(interruption)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interruptions
    assert not [note for x in interruptions for note in getattr(x, "__notes__", [])]
    assert fitted is not None
    assert_equal(fitted, wanted)


def test_between_eight_devices_and_one(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    base, adapters = linear.make()
    data = linear.batches(9)
    wanted = train.fit(linear.loss_fn, base, adapters, TX, data, key=KEY, steps=9)
    checkpoints = train.Checkpoints(tmp_path, every=100)
    for steps, on_eight in ((3, False), (6, True), (9, False)):
        trees, batches = (base, adapters), data
        if on_eight:
            trees = jax.device_put(trees, everywhere)
            batches = [jax.device_put(x, rows) for x in data]
        fitted = train.fit(
            *(linear.loss_fn, *trees, TX, batches), key=KEY, steps=steps, checkpoints=checkpoints
        )
        devices = {len(x.sharding.device_set) for x in jax.tree.leaves(fitted.last)}
        assert devices == {8 if on_eight else 1}
    for x, y in zip(*map(jax.tree.leaves, (fitted.last, wanted.last)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


ERRORS = {
    "mode": ({"mode": "least"}, "mode is 'least', expected 'min' or 'max'"),
    "steps": ({"steps": 0}, "steps is 0, expected at least 1"),
    "patience": ({"patience": 2}, "patience is 2, but there is no eval_fn"),
    "monitor": (
        {"monitor": "f1", "eval_fn": evaluation},
        "monitor is 'f1', and eval_fn gives loss, other",
    ),
}


@pytest.mark.parametrize(("options", "sentence"), ERRORS.values(), ids=ERRORS)
def test_errors(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit(linear.batches(3), **{"steps": 3, **options})


def test_batches_that_are_not_those_of_before(tmp_path):
    checkpoints = train.Checkpoints(tmp_path, every=100)
    fit(linear.batches(6), steps=6, checkpoints=checkpoints)
    with pytest.raises(
        ValueError, match="the batches end after 4, and the checkpoint is of step 6"
    ):
        fit(linear.batches(4), steps=12, checkpoints=checkpoints)


def test_an_iterator_that_cannot_be_told_where_to_go(tmp_path):
    checkpoints = train.Checkpoints(tmp_path, every=100)
    fit(Counting(linear.batches(6)), steps=6, checkpoints=checkpoints)
    with pytest.raises(ValueError, match="the iterator of these batches has no set_state"):
        fit(linear.batches(12), checkpoints=checkpoints)


def test_half_precision_adapters_resume(tmp_path):
    base, adapters = linear.make()
    adapters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapters)
    arguments = (linear.loss_fn, base, adapters, TX, linear.batches(6))
    wanted = train.fit(*arguments, key=KEY, steps=6)
    checkpoints = train.Checkpoints(tmp_path, every=4)
    for steps in (4, 6):
        fitted = train.fit(*arguments, key=KEY, steps=steps, checkpoints=checkpoints)
    assert fitted.last["w"].a.dtype == jnp.bfloat16
    assert_equal(fitted, wanted)


def test_the_librarys_own_batches(tmp_path):
    """Their iterator is asked where it was, so that nothing is drawn again."""
    rng = np.random.default_rng(0)
    sequences = [
        lj.data.Encoded(rng.integers(1, 50, n).astype(np.int32), np.ones(n, np.float32), k)
        for k, n in enumerate(rng.integers(3, 12, 40))
    ]
    batches = lj.data.training_batches(sequences, rows=2, length=16, seed=0)
    adapters = {"w": jnp.ones(50)}

    def loss_fn(adapters, base, batch, key):
        return jnp.mean(jnp.square(adapters["w"][batch.tokens] - batch.positions) * batch.weights)

    def run(steps, checkpoints=None):
        options = {"key": KEY, "steps": steps, "checkpoints": checkpoints}
        return train.fit(loss_fn, None, adapters, TX, batches, **options)

    wanted = run(30)
    checkpoints = train.Checkpoints(tmp_path, every=100)
    for steps in (7, 8, 30):
        fitted = run(steps, checkpoints)
        with checkpoints.opened() as store:
            position = store.find().record["position"]
        assert position["step"] == steps
        assert position["state"] is not None
    assert_equal(fitted, wanted)
