"""Which runs share a program: everything about a sweep that is known before it is compiled.

Runs are parted from left to right, and those that are still together then are a group:

runs ──► the same leaves trained whole ──► the same optimizer but for its numbers ──► a group
                                               └─ and the same ranks, where padding
                                                  would change what it does
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.sweep import padding
from lora_jax.sweep.fields import fields_of, varying_numbers, with_fields

# By how many updates it is found out whether padding changes an optimizer, and by how much of the
# largest move these may differ: sums over padded arrays are taken in another order.
PROBES, TOLERANCE = 2, 1e-3


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one program.

    Attributes:
      runs: their numbers in the plan.
      like: what holds the adapters of any of them, abstract: the largest rank of each leaf.
      at_once: how many of them the program trains side by side.
      run_bytes: what one of them needs of the device for itself: adapters, the last good ones, the
        optimizer's state, a gradient, and the activations that `plan` was told of.
    """

    runs: tuple[int, ...]
    like: Any
    at_once: int
    run_bytes: int

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max((x.rank for x in padding.adapters_in(self.like)), default=0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Runs, and the programs that will train them. `print` shows the latter.

    Attributes:
      runs: the configs.
      own: the abstract adapters of each run.
      make_adapters, make_tx: as `plan` was given them.
      traced: names of the fields that differ and reach `make_tx` as traced scalars.
      groups: every run is in one of them.
    """

    runs: tuple[Any, ...]
    own: tuple[Any, ...]
    make_adapters: Callable[[Any], Any]
    make_tx: Callable[[Any], optax.GradientTransformation]
    traced: tuple[str, ...]
    groups: tuple[Group, ...]

    def __str__(self) -> str:
        rows = [("program", "runs", "at once", "rank", "MiB a run")]
        for number, group in enumerate(self.groups):
            size = f"{group.run_bytes / 2**20:.1f}"
            rows.append(
                (str(number), str(len(group.runs)), str(group.at_once), str(group.rank), size)
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
        batched = ", ".join(self.traced) or "none"
        return "\n".join([*lines, f"numbers that differ within a program: {batched}"])


def plan(
    runs: Sequence[Any],
    make_adapters: Callable[[Any], Any],
    make_tx: Callable[[Any], optax.GradientTransformation],
    *,
    static: Sequence[str] = (),
    at_once: int | None = None,
    memory: int | None = None,
    activations: int = 0,
) -> Plan:
    """Sorts runs into programs. Nothing is compiled yet, and whatever is wrong is said here.

    Args:
      runs: configs, frozen dataclasses of one type, all different (see `grid`).
      make_adapters: from a run to the adapters that it starts from, as for the run alone. Rank,
        alpha, scaling, seed, size of the start, dropout and targets are its business.
      make_tx: from a run to its optimizer. It is called while a program is traced: fields that are
        numbers and differ between the runs are then traced scalars, as learning rate and weight
        decay may be for any optax optimizer. Other fields are themselves; where what they change is
        the program, their runs are in different groups.
      static: fields that `make_tx` must have as Python numbers, such as one that it branches on.
        Runs that differ in what comes of them are in different groups.
      at_once: how many runs a program trains side by side; None for all, or as many as fit.
      memory: bytes of the device for what each run needs for itself; None for no limit.
      activations: bytes that a step of one run takes beside its adapters and optimizer.

    Returns:
      The plan, for `fit`.

    Raises:
      ValueError: if there are no runs or two are the same, `make_adapters` refuses one, `make_tx`
        looks at a number that is traced, or as many runs as asked for do not fit.
      TypeError: if runs are no dataclasses, or not all of one type.
    """
    runs = tuple(runs)
    _check_runs(runs)
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once is {at_once}, expected at least 1")
    if unknown := [name for name in static if name not in fields_of(runs[0])]:
        raise ValueError(
            f"static names {unknown[0]!r}, and a run has {', '.join(fields_of(runs[0]))}"
        )
    traced = tuple(name for name in varying_numbers(runs) if name not in static)
    own = tuple(_adapters_of(run, k, make_adapters) for k, run in enumerate(runs))
    unsized = [
        part
        for alike in _parted(range(len(runs)), lambda k: padding.whole_leaves(own[k]))
        for part in _of_one_optimizer(alike, runs, own, make_tx, traced)
    ]
    groups = []
    for part in unsized:
        like = padding.union([own[k] for k in part])
        size = _run_bytes(like, make_tx, runs[part[0]]) + activations
        groups.append(Group(tuple(part), like, _at_once(len(part), size, at_once, memory), size))
    return Plan(runs, own, make_adapters, make_tx, traced, tuple(groups))


def _check_runs(runs: tuple[Any, ...]) -> None:
    if not runs:
        raise ValueError("there are no runs; give at least one config, such as those of a grid")
    for run in runs:
        if (
            not dataclasses.is_dataclass(run)
            or isinstance(run, type)
            or type(run) is not type(runs[0])
        ):
            raise TypeError(
                f"runs holds {run!r}, expected configs that are all of one frozen dataclass"
            )
    seen: dict[Any, int] = {}
    for number, run in enumerate(runs):
        try:
            first = seen.setdefault(run, number)
        except TypeError:
            raise TypeError(
                f"run {number} cannot be hashed, {run!r}; write @dataclass(frozen=True), and "
                "tuples in place of lists"
            ) from None
        if first != number:
            raise ValueError(f"runs {first} and {number} are the same, {run!r}; leave one out")


def _adapters_of(run: Any, number: int, make_adapters: Callable[[Any], Any]) -> Any:
    try:
        adapters = jax.eval_shape(lambda: make_adapters(run))
    except ValueError as error:
        raise ValueError(f"run {number}, {run!r}: {error}") from error
    if not jax.tree.leaves(adapters):
        raise ValueError(
            f"run {number}, {run!r}: make_adapters gave a tree without arrays, so there is nothing "
            "to train; expected what lj.init_adapters returns"
        )
    return adapters


def _parted(runs: Sequence[int], kind: Callable[[int], Any]) -> list[list[int]]:
    """Runs of one kind together, in the order in which the kinds appear."""
    parts = collections.defaultdict(list)
    for k in runs:
        parts[kind(k)].append(k)
    return list(parts.values())


def _of_one_optimizer(
    alike: list[int], runs: Sequence[Any], own: Sequence[Any], make_tx: Any, traced: Sequence[str]
) -> list[list[int]]:
    """Runs parted by what their optimizer does, beside its numbers."""
    like = padding.union([own[k] for k in alike])
    known: dict[Any, str] = {}  # by the other fields: one trace for all runs that share them

    def update_program(k: int) -> str:
        others = tuple((x, y) for x, y in fields_of(runs[k]).items() if x not in traced)
        if others not in known:
            known[others] = _update_program(runs[k], like, make_tx, traced)
        return known[others]

    parts = []
    for part in _parted(alike, update_program):
        shapes = {k: padding.shapes(own[k]) for k in part}
        smallest = min(part, key=lambda k: sum(x.size for x in jax.tree.leaves(own[k])))
        padded = padding.union([own[k] for k in part])
        differ = len(set(shapes.values())) > 1
        if differ and _padding_matters(make_tx(runs[smallest]), own[smallest], padded):
            parts += _parted(part, shapes.__getitem__)
        else:
            parts.append(part)
    return parts


def _update_program(run: Any, like: Any, make_tx: Any, traced: Sequence[str]) -> str:
    """The optimizer's program as text: the same for two runs if one program may serve both."""

    def update(values: dict[str, Any], grads: Any) -> Any:
        tx = make_tx(with_fields(run, values))
        return tx.update(grads, tx.init(grads), grads)

    def trace(names: Sequence[str]) -> Any:
        values = {name: fields_of(run)[name] for name in names}
        return jax.make_jaxpr(update)(values, like)

    try:
        closed = trace(traced)
    except jax.errors.JAXTypeError as error:
        culprits = [name for name in traced if _fails(trace, name)] or list(traced)
        raise ValueError(
            f"make_tx looks at the value of {' and of '.join(culprits)}, which is traced, for it "
            "differs between the runs that share a program; compute with it alone, as in lambda "
            "step: run.learning_rate * schedule(step), or write "
            f"static={culprits!r} to have a program for each value"
        ) from error
    consts = [np.asarray(x).tobytes().hex() for x in closed.consts]
    return re.sub(r" at 0x[0-9a-f]+", "", "\n".join([str(closed.jaxpr), *consts]))


def _fails(trace: Callable, name: str) -> bool:
    try:
        trace([name])
    except jax.errors.JAXTypeError:
        return True
    return False


def _padding_matters(tx: optax.GradientTransformation, own: Any, like: Any) -> bool:
    """Whether the optimizer moves a run's adapters otherwise when they are padded.

    It is tried, on random numbers: of those that mix entries, as Muon and Adafactor do, some depend
    on the shape and some do not, which their names do not tell.
    """
    rng = np.random.default_rng(0)

    def drawn() -> Any:
        return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), own)

    def moves(params: Any, grads: list[Any], shaped: Callable[[Any], Any]) -> Any:
        params = start = shaped(params)
        state = tx.init(params)
        for g in grads:
            updates, state = tx.update(shaped(g), state, params)
            params = optax.apply_updates(params, updates)
        return padding.cut(jax.tree.map(jnp.subtract, params, start), own)

    def differs(alone: jax.Array, padded: jax.Array) -> jax.Array:
        return jnp.abs(alone - padded).max() > TOLERANCE * jnp.abs(alone).max()

    @jax.jit
    def compared(params: Any, grads: list[Any]) -> Any:
        alone = moves(params, grads, lambda x: x)
        return jax.tree.map(differs, alone, moves(params, grads, lambda x: padding.pad(x, like)))

    return any(jax.tree.leaves(compared(drawn(), [drawn() for _ in range(PROBES)])))


def _run_bytes(like: Any, make_tx: Any, run: Any) -> int:
    state = jax.eval_shape(lambda x: make_tx(run).init(x), like)
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    return 3 * size(like) + size(state)


def _at_once(runs: int, size: int, wanted: int | None, memory: int | None) -> int:
    """How many runs a program trains side by side; evenly, where it is run several times."""
    fitting = runs if memory is None else min(runs, memory // size)
    least = min(runs, wanted or 1)
    if least > fitting:
        raise ValueError(
            f"{least} runs at once need {least * size:,} bytes for adapters and optimizer, and "
            f"there are {memory:,}; "
            + (f"write at_once={fitting}" if fitting else "write a smaller rank, or fewer targets")
        )
    most = fitting if wanted is None else least
    return math.ceil(runs / math.ceil(runs / most))
