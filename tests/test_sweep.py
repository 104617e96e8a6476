"""Sweeps: a run among others is the run alone, and nothing that the others hold reaches it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sweep_runs
from sweep_runs import Run, assert_as_alone, assert_trees_close, loss_fn, make_key, make_tx, sgd

import lora_jax as lj
from lora_jax.sweep.program import Program

quickly = pytest.mark.compiled_quickly  # where no equal bits are claimed

# Between them they differ in everything that is a number.
RUNS = [
    Run(4, 1.0, learning_rate=3e-2, weight_decay=0.1, warmup=9),
    Run(1, 8.0, seed=3, init_scale=0.5, targets="up"),
    Run(3, rslora=True, dropout=0.3, seed=1),
]


@quickly
def test_every_run_is_the_run_alone_in_float64():
    """50 steps in their own order of data, two at a time: one of three has to wait."""
    with jax.enable_x64(True):
        base = sweep_runs.make_base(np.float64)
        make_adapters = sweep_runs.maker(base, jnp.float64)
        plan = lj.sweep.plan(RUNS, make_adapters, make_tx, at_once=2)
        assert [group.runs for group in plan.groups] == [(0, 1, 2)]
        data = lambda run: sweep_runs.batches(50, run.seed, np.float64)  # noqa: E731
        found = lj.sweep.fit(loss_fn, base, plan, data, make_key=make_key, steps=50)
        for run, fitted in zip(RUNS, found, strict=True):
            alone = sweep_runs.train_alone(
                *(loss_fn, base, make_adapters(run), make_tx(run), make_key(run), data(run))
            )
            assert (fitted.run, fitted.step, fitted.stopped) == (run, 50, "done")
            assert fitted.adapters is fitted.last
            assert_as_alone(fitted, alone, 1e-9)


@quickly
def test_loss_and_gradient_of_a_first_step_in_float32():
    """With SGD at rate 1 the first move is the gradient."""
    base, data = sweep_runs.make_base(), sweep_runs.batches(1)
    make_adapters = sweep_runs.maker(base)
    plan = lj.sweep.plan(RUNS[:2], make_adapters, lambda run: optax.sgd(1.0))
    found = lj.sweep.fit(loss_fn, base, plan, data, make_key=make_key, steps=1)
    for run, fitted in zip(RUNS[:2], found, strict=True):
        start = make_adapters(run)
        loss, gradient = jax.jit(jax.value_and_grad(loss_fn))(start, base, data[0], None)
        assert fitted.history[0][1]["loss"] == pytest.approx(float(loss), rel=1e-6)
        # What is left of a move of 0.01 in numbers of size 1 is known to 6e-8.
        for x, y, g in zip(*map(jax.tree.leaves, (fitted.last, start, gradient)), strict=True):
            tolerance = 1e-5 * np.abs(g).max() + 1.2e-7
            np.testing.assert_allclose(x, np.subtract(y, g), rtol=0, atol=tolerance)


@quickly
def test_where_runs_arrive_in_float32_differs_by_less_than_their_seeds_do():
    """By a tenth of the seeds' standard deviation on validation: rounding changes no conclusion."""
    base, validation = sweep_runs.make_base(), sweep_runs.batches(2, seed=9)
    make_adapters = sweep_runs.maker(base)
    runs = [Run(dropout=0.3, learning_rate=3e-2, seed=seed) for seed in range(3)]
    plan = lj.sweep.plan(runs, make_adapters, make_tx)
    data = lambda run: sweep_runs.batches(50, run.seed)  # noqa: E731
    options = {"make_key": make_key, "steps": 50, "validation": validation}
    found = lj.sweep.fit(loss_fn, base, plan, data, **options)
    evaluate = jax.jit(lambda adapters, batch: loss_fn(adapters, base, batch, None))
    losses = []
    for run in runs:
        alone, _ = sweep_runs.train_alone(
            *(loss_fn, base, make_adapters(run), make_tx(run), make_key(run), data(run))
        )
        losses.append(np.mean([evaluate(alone, batch) for batch in validation], dtype=np.float64))
    assert len(set(losses)) == 3
    together = [fitted.best_metrics["loss"] for fitted in found]
    assert np.abs(np.subtract(together, losses)).max() < 0.1 * np.std(losses, ddof=1)


@quickly
def test_a_run_that_diverges_is_frozen_and_the_others_go_on():
    runs, base, data = (
        [Run(), Run(3, learning_rate=1e30)],
        sweep_runs.make_base(),
        sweep_runs.batches(6),
    )
    plan = lj.sweep.plan(runs, sweep_runs.maker(base), sgd)
    told = []
    fitted, diverged = lj.sweep.fit(
        *(loss_fn, base, plan, data),
        make_key=make_key,
        steps=6,
        on_metrics=lambda run, step, metrics: told.append((run, step)),
    )
    assert (fitted.stopped, fitted.step) == ("done", 6)
    assert diverged.stopped == "diverged"
    assert diverged.step < 6
    assert not np.isfinite(diverged.history[-1][1]["grad_norm"])
    assert jax.tree.map(lambda x: x.shape, diverged.adapters["up"]["kernel"].a) == (3, 8)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(diverged.adapters))
    assert told.count((runs[0], 6)) == 1
    assert (runs[1], 6) not in told


@quickly
def test_runs_end_on_validation_and_free_their_places():
    """Halving keeps the best; places are taken again; nothing is compiled twice."""
    traces = []

    def counted(*args):
        traces.append(None)
        return loss_fn(*args)

    runs = [Run(learning_rate=rate) for rate in (1e-6, 1e-2, 1e-5, 3e-2, 1e-7)]
    base, data = sweep_runs.make_base(), sweep_runs.batches(9)
    plan = lj.sweep.plan(runs, sweep_runs.maker(base), sgd, at_once=2)
    found = {}
    for name, given in (("same", data), ("own", lambda run: data)):
        traces.clear()
        found[name] = lj.sweep.fit(
            *(counted, base, plan, given),
            make_key=make_key,
            steps=8,
            validation=data[:2],
            evaluate_every=2,
            halving=lj.sweep.Halving(at=(2, 4), keep=0.5),
        )
        assert len(traces) == 2  # the step and the evaluation
        assert [x.stopped for x in found[name]] == ["halved", "done", "halved", "done", "halved"]
        assert [x.step for x in found[name]] == [2, 8, 4, 8, 2]
    for same, own in zip(*found.values(), strict=True):
        assert [step for step, _ in same.history] == [step for step, _ in own.history]
        assert_trees_close(same.adapters, own.adapters, 1e-6)
    best = found["own"][3]
    start = sweep_runs.maker(base)(runs[3])
    alone = sweep_runs.train_alone(loss_fn, base, start, sgd(runs[3]), make_key(runs[3]), data[:8])
    assert_as_alone(best, alone, 1e-5)
    validation = {step: m["validation/loss"] for step, m in best.history if "validation/loss" in m}
    assert list(validation) == [2, 4, 6, 8]
    assert best.best_metrics["loss"] == min(validation.values()) == validation[best.best_step]
    evaluate = jax.jit(loss_fn)
    direct = np.mean([evaluate(best.adapters, base, batch, None) for batch in data[:2]])
    assert best.best_metrics["loss"] == pytest.approx(direct, rel=1e-6)


@quickly
def test_patience_and_the_end_of_data():
    base, data = sweep_runs.make_base(), sweep_runs.batches(6)
    runs = [Run(learning_rate=0.0), Run(learning_rate=1e-2)]
    plan = lj.sweep.plan(runs, sweep_runs.maker(base), sgd)
    options = {"make_key": make_key, "validation": data[:1], "evaluate_every": 1, "patience": 2}
    idle, busy = lj.sweep.fit(loss_fn, base, plan, lambda _: iter(data), steps=9, **options)
    assert (idle.stopped, idle.step, idle.best_step) == ("patience", 3, 1)
    assert (busy.stopped, busy.step) == ("data", 6)


@quickly
def test_stacked_adapters_of_any_rank_are_what_they_are_alone():
    base, x = sweep_runs.make_base(), sweep_runs.batches(1)[0][0]
    runs = [Run(1, 3.0), Run(4, targets="down"), Run(2, rslora=True)]
    adapters = [sweep_runs.maker(base)(run) for run in runs]
    stacked, scales = lj.sweep.stack(adapters)
    assert stacked["up"]["kernel"].a.shape == (3, 2, 8)  # nobody has rank 4 there
    assert stacked["down"]["kernel"].b.shape == (3, 4, 4)
    apply = lambda tree, s: sweep_runs.network(lj.combine(base, tree, scales=s), x)  # noqa: E731
    outputs = np.asarray(jax.jit(jax.vmap(apply))(stacked, scales))

    def dense(name, tree):
        kernel, adapter = np.asarray(base[name]["kernel"], np.float64), tree[name]["kernel"]
        if adapter is None:
            return kernel
        return kernel + adapter.scale * (np.asarray(adapter.b) @ np.asarray(adapter.a)).T

    for output, tree in zip(outputs, adapters, strict=True):
        expected = np.tanh(x @ dense("up", tree)) @ dense("down", tree)
        np.testing.assert_allclose(output, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"dropout differs between the runs, 0\.\d and 0"):
        lj.sweep.stack([sweep_runs.maker(base)(Run(dropout=rate)) for rate in (0.2, 0.5)])
    with pytest.raises(ValueError, match="adapters is empty"):
        lj.sweep.stack([])


@quickly
def test_a_base_in_4_bits_is_decoded_once_for_all_runs():
    """Also where a weight is folded with its adapter for a run alone."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 96)), jnp.float32)
    base = lj.quantize({"kernel": w}, "kernel")
    apply = lj.adapt(lambda params, x: x @ params["kernel"], fold=True)

    def loss(adapters, base, batch, key):
        return (apply(lj.combine(base, adapters), batch) ** 2).mean()

    plan = lj.sweep.plan([Run(1), Run(2), Run(3)], sweep_runs.maker(base), make_tx)
    program = Program(plan, plan.groups[0], loss, shared=True)
    states = jax.eval_shape(
        lambda: jax.vmap(lambda _: program.start(0, jax.random.key(0)))(jnp.arange(3))
    )
    numbers = program.numbers([0, 1, 2])
    text = str(jax.make_jaxpr(program.step)(states, numbers, base, jnp.ones((3, 160, 64))[0]))
    assert "[96,64]" in text
    assert "[3,96,64]" not in text
    assert "[3,64,96]" not in text


def test_whatever_the_others_hold_leaves_a_run_bit_for_bit():
    """Law 9, in one compiled program: others as they are, NaN, infinite, of other numbers.

    The optimizer adds something to every entry; the padding is zero all the same.
    """
    shift = optax.stateless(lambda updates, _: jax.tree.map(lambda x: x + 0.01, updates))
    shifted = lambda run: optax.chain(sgd(run), shift)  # noqa: E731
    base, data, mine = sweep_runs.make_base(), sweep_runs.batches(4), 1
    plan = lj.sweep.plan(RUNS, sweep_runs.maker(base), make_tx)
    program = Program(
        dataclasses.replace(plan, make_tx=shifted), plan.groups[0], loss_fn, shared=True
    )
    states = [program.start(k, make_key(run)) for k, run in enumerate(RUNS)]
    states = jax.jit(lambda *x: jax.tree.map(lambda *x: jnp.stack(x), *x))(*states)
    numbers = program.numbers([0, 1, 2])

    def with_others(tree, change):
        def one(x):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return jnp.copy(x)
            x = np.asarray(x)
            changed = change(x)
            changed[mine] = x[mine]
            return jnp.asarray(changed)

        return jax.tree.map(one, tree)

    def result(change):
        state, own = with_others(states, change), with_others(numbers, change)
        for batch in data:
            state, metrics = program.step(state, own, base, batch)
        values = (state.adapters, metrics)
        return [np.asarray(x[mine]) for x in jax.tree.leaves(values)], state

    expected, state = result(np.array)
    up, down = (state.adapters[name]["kernel"] for name in ("up", "down"))
    assert up.a.shape == (3, 4, 8)
    assert np.asarray(up.a[0]).all()
    for padding in (up.a[mine, 1:], up.b[mine, :, 1:], down.a[mine], down.b[mine], up.a[2, 3:]):
        assert not np.asarray(padding).any()
    full = np.full_like
    for change in (lambda x: full(x, np.nan), lambda x: full(x, np.inf), lambda x: 1.5 * x):
        values, state = result(change)
        assert not state.diverged[mine]
        for x, y in zip(values, expected, strict=True):
            np.testing.assert_array_equal(x, y)
    assert program.step._cache_size() == 1
