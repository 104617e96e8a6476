"""The loop around the step: evaluation, the best adapters, stopping, checkpoints.

    host     draw 3 | dispatch 3 | report 2 | draw 4 | dispatch 4 | report 3 | ...
    device   ... step 2 ........... | step 3 ....................... | step 4 ...

The host never waits for the step that it has just dispatched, but for the one before: so the
device has work while numbers are written and the next batch is drawn. Only an evaluation or a
checkpoint waits for everything.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.train.checkpoints import Checkpoints, Store
from lora_jax.train.dispatch import Device
from lora_jax.train.loss import LossFn
from lora_jax.train.step import Diverged, Transform, init_state
from lora_jax.train.stream import Stream

Stopped = Literal["done", "patience", "asked", "data"]
OnMetrics = Callable[[int, dict[str, float]], None]
EvalFn = Callable[[Any], Mapping[str, Any]]


class Fitted(NamedTuple):
    """What `fit` arrived at.

    Attributes:
      adapters: the best on validation; the last, if nothing was evaluated.
      last: those after the last step.
      best_step: the step of the best evaluation, or None.
      best_metrics: what it gave; empty if there was none.
      step: steps done, those before a resumption included.
      stopped: "done" after all steps; "patience" when evaluations ceased to improve; "asked" by
        `stop`; "data" if the batches ended first.
      history: (step, metrics) as `on_metrics` got them, from the first step on.
    """

    adapters: Any
    last: Any
    best_step: int | None
    best_metrics: dict[str, float]
    step: int
    stopped: Stopped
    history: list[tuple[int, dict[str, float]]]


def fit(
    loss_fn: LossFn,
    base: Any,
    adapters: Any,
    tx: optax.GradientTransformation,
    batches: Iterable[Any],
    *,
    key: jax.Array,
    steps: int,
    accumulate: int = 1,
    transform: Transform | None = None,
    evaluate_every: int | None = None,
    eval_fn: EvalFn | None = None,
    monitor: str = "loss",
    mode: Literal["min", "max"] = "min",
    patience: int | None = None,
    on_metrics: OnMetrics | None = None,
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], bool] | None = None,
) -> Fitted:
    """Trains adapters.

    Args:
      loss_fn: as for `make_step`.
      base: the frozen tree, any pytree that `loss_fn` takes; it is handed on untouched.
      adapters: the tree to start from; left as it is.
      tx: an optax optimizer for trees of adapters.
      batches: pytrees of arrays, all of the same shapes, in an order that is the same at each
        start. If their iterator has `get_state` and `set_state`, as grain's have, a resumed run
        uses them; otherwise it draws again what was drawn before.
      key: a JAX PRNG key; dropout and transforms follow from it.
      steps: updates in all.
      accumulate: in how many parts a batch is run, one after the other; as for `make_step`.
      transform: from a key and a batch to the batch that is trained on.
      evaluate_every: steps between evaluations; None for one at the end alone.
      eval_fn: from adapters to numbers, on *validation* data: what is chosen by it is not to be
        judged by it.
      monitor: which of these numbers decides what is best.
      mode: whether the least or the greatest is.
      patience: stop after this many evaluations in a row without a better one; None for never.
      on_metrics: called with the number of the step, from 1 on, and its numbers, in order; once for
        each step ("loss", "grad_norm" and the loss function's), and once for each evaluation
        (with "validation/" before the names). A step is reported after the next is under way.
      checkpoints: where to write some, and to continue from; nothing is written if None. Their
        own step has been reported before they are written. One more is written at the end, and
        when anything raises (except `Diverged`).
      stop: asked before each step; once it says True, the loop ends. Signal handlers had better
        set what it reads than raise: then nothing is ever cut in the middle.

    Returns:
      The result. A resumed run's is bit for bit that of one that was never interrupted, on the
      same machine's CPU.

    Raises:
      Diverged: if a loss or gradient is not finite.
      ValueError: if options contradict each other, or the checkpoint is of another run.
      OSError: if a checkpoint cannot be written.
    """
    plan = _Plan(steps, evaluate_every, eval_fn, monitor, mode, patience, on_metrics, stop)
    state = init_state(key, adapters, tx)
    device = Device(state, loss_fn, tx, accumulate, transform)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(checkpoints.opened()) if checkpoints else None
        every = checkpoints.every if checkpoints else None
        run = _Run(plan, device, Stream(batches), store, every)
        run.resume()
        try:
            run.loop(base)
        except BaseException as error:
            run.rescue(error)
            raise
        return run.fitted()


class _Plan(NamedTuple):
    """The options of `fit` that the loop itself reads."""

    steps: int
    evaluate_every: int | None
    eval_fn: EvalFn | None
    monitor: str
    mode: str
    patience: int | None
    on_metrics: OnMetrics | None
    stop: Callable[[], bool] | None

    def check(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode is {self.mode!r}, expected 'min' or 'max'")
        for name in ("steps", "evaluate_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
            if name != "steps" and value is not None and self.eval_fn is None:
                raise ValueError(f"{name} is {value}, but there is no eval_fn to evaluate with")


class _Choice(NamedTuple):
    """What evaluations have decided so far; replaced as a whole, for an interruption may come.

    Attributes:
      adapters: the best, or None.
      step, metrics: of their evaluation.
      waited: evaluations since then.
      evaluated: the step of the last evaluation.
      row: what it adds to the history.
    """

    adapters: Any = None
    step: int | None = None
    metrics: dict[str, float] = {}  # noqa: RUF012 - never changed
    waited: int = 0
    evaluated: int = 0
    row: tuple[int, dict[str, float]] | None = None


class _Run:
    """One call of `fit`. `step` counts the steps dispatched."""

    def __init__(
        self, plan: _Plan, device: Device, stream: Stream, store: Store | None, every: int | None
    ):
        plan.check()
        self.plan, self.device, self.stream = plan, device, stream
        self.store, self.save_every = store, every
        self.step = self.saved = 0
        self.history: list[tuple[int, dict[str, float]]] = []
        self.choice = _Choice()
        self.stopped: Stopped | None = None

    @property
    def reported(self) -> int:
        """The last step that has been told of."""
        return self.history[-1][0] if self.history else 0

    def loop(self, base: Any) -> None:
        """Steps, until there is a reason to stop."""
        exhausted = False
        while True:
            if self._evaluation_is_due(exhausted):
                self._report_all()
                self._evaluate()
            self.stopped = self._reason_to_stop(exhausted)
            at_interval = self.save_every is not None and self.step % self.save_every == 0
            if at_interval or self.stopped:
                self._report_all()
                self._save()
            if self.stopped:
                return
            try:
                batch = self.stream.draw()
            except StopIteration:
                exhausted = True
                continue
            self.device.advance(base, batch)
            self.step += 1
            for value in self.device.outputs[-1][1].values():
                value.copy_to_host_async()
            if self.step - self.reported > 1:
                self._report()

    def _reason_to_stop(self, exhausted: bool) -> Stopped | None:
        plan = self.plan
        if self.step >= plan.steps:
            return "done"
        if plan.patience is not None and self.choice.waited >= plan.patience:
            return "patience"
        if exhausted:
            return "data"
        return "asked" if plan.stop is not None and plan.stop() else None

    def _report(self) -> None:
        """Waits for the first step that has not been told of, and tells of it."""
        step = self.reported + 1
        _, arrays = self.device.outputs[step - self.step - 1]
        metrics = {name: float(value) for name, value in arrays.items()}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            none_was_good = step == 1 and not math.isfinite(metrics["loss"])
            good = None if none_was_good else _copied(self.device.state.last_good)
            raise Diverged(step, good, metrics["loss"])
        self._tell((step, metrics))

    def _report_all(self) -> None:
        while self.reported < self.step:
            self._report()

    def _tell(self, row: tuple[int, dict[str, float]]) -> None:
        self.history.append(row)
        if self.plan.on_metrics is not None:
            self.plan.on_metrics(row[0], dict(row[1]))

    def _evaluation_is_due(self, exhausted: bool) -> bool:
        every = self.plan.evaluate_every
        at_interval = every is not None and self.step % every == 0
        at_end = exhausted or self.step >= self.plan.steps
        due = self.choice.evaluated < self.step and (at_interval or at_end)
        return due and self.plan.eval_fn is not None

    def _evaluate(self) -> None:
        plan = self.plan
        assert plan.eval_fn is not None
        adapters = _copied(self.device.state.adapters)
        metrics = {name: float(value) for name, value in plan.eval_fn(adapters).items()}
        if plan.monitor not in metrics:
            raise ValueError(
                f"monitor is {plan.monitor!r}, and eval_fn gives {', '.join(metrics) or 'nothing'}"
            )
        row = (self.step, {f"validation/{name}": value for name, value in metrics.items()})
        sign = 1 if plan.mode == "min" else -1
        best = self.choice.metrics.get(plan.monitor, sign * math.inf)
        if sign * metrics[plan.monitor] < sign * best:
            self.choice = _Choice(adapters, self.step, metrics, 0, self.step, row)
        else:
            waited = self.choice.waited + 1
            self.choice = self.choice._replace(waited=waited, evaluated=self.step, row=row)
        self._tell(row)

    # Checkpoints

    def resume(self) -> None:
        """Continues from the newest checkpoint, if there is one."""
        if self.store is None:
            return
        found = self.store.find()
        if found is None:
            self.stream.mark(0)  # an iterator whose position cannot be kept says so now
            return
        state, choice = self.device.state, _Choice(**found.record["choice"])
        best = None if choice.step is None else state.adapters
        tree = self.store.read(found.step, {"state": state, "best": best})
        self.device.load(tree["state"])
        self.step = self.saved = found.step
        self.history = [(step, metrics) for step, metrics in found.record["history"]]
        self.choice = choice._replace(adapters=tree["best"])
        if self.step < self.plan.steps:
            self.stream.resume(found.record["position"], self.step)

    def _save(self, at_boundary: bool = True) -> None:
        if self.store is None or self.saved >= self.step:
            return
        if at_boundary:
            self.stream.mark(self.step)
        record = {
            "position": self.stream.position,
            "history": self.history,
            "choice": self.choice._replace(adapters=None, row=None)._asdict(),
        }
        best = self.choice.adapters
        self.store.save(self.step, {"state": self.device.state, "best": best}, record)
        self.saved = self.step

    def rescue(self, error: BaseException) -> None:
        """Saves what can be saved, when something raised at whatever point."""
        if self.store is None or isinstance(error, Diverged):
            return
        try:
            # The exception may have come before the step was counted, or its row was added.
            self.step = int(self.device.state.step)
            with contextlib.suppress(Exception):
                self._report_all()
            row = self.choice.row
            if row is not None and row[0] == self.step and self.history[-1] is not row:
                self.history.append(row)
            if not bool(self.device.state.diverged):
                self._save(at_boundary=False)
                self.store.wait()
        except Exception as second:
            error.add_note(f"the state of step {self.step} could not be saved: {second}")

    def fitted(self) -> Fitted:
        """The result."""
        assert self.stopped is not None
        last, choice = self.device.state.adapters, self.choice
        return Fitted(
            adapters=last if choice.step is None else choice.adapters,
            last=last,
            best_step=choice.step,
            best_metrics=choice.metrics,
            step=self.step,
            stopped=self.stopped,
            history=self.history,
        )


def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
