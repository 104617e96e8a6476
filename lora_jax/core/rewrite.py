"""The rewrite: a jaxpr's equations, emitted again with lazy weights among their operands.

An equation that meets no weight is bound as it is. One that does either changes how the weight is
seen (view.py), or uses it up in factored form (contract.py), or is control flow, which is written
again with `lax`'s own public functions around the rewritten body.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import _jaxpr, contract, placement, products
from lora_jax.core.view import View


@dataclasses.dataclass(frozen=True)
class Use:
    """One consumer of a leaf: the primitive, and whether the weight stayed factored."""

    path: str
    primitive: str
    factored: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """How a function uses each adapted or quantized leaf.

    Attributes:
      uses: for each leaf's path, its consumers; none if the function does not use it.
      shapes: for each leaf's path, its logical shape.
    """

    uses: dict[str, tuple[Use, ...]]
    shapes: dict[str, tuple[int, ...]]

    def status(self, path: str) -> str:
        """`factored`, `dense` or `unused`."""
        uses = self.uses[path]
        return "unused" if not uses else "factored" if all(u.factored for u in uses) else "dense"

    def __str__(self) -> str:
        rows = [("leaf", "shape", "used by", "as")]
        for path, uses in self.uses.items():
            counts = collections.Counter(use.primitive for use in uses)
            names = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in counts.items())
            rows.append((path, str(self.shapes[path]), names or "-", self.status(path)))
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


class Rewrite:
    """Emits a jaxpr's equations again, with views among the values."""

    def __init__(self, strict: bool, fold: bool = False):
        self.strict = strict
        self.fold = fold
        self.uses: list[Use] = []

    def run(self, jaxpr: Any, consts: list, values: list, compiled: dict | None = None) -> list:
        """The outputs of a jaxpr. `compiled` is given for the outermost one alone."""
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, values, strict=True))
        for equation in jaxpr.eqns:
            operands = [_jaxpr.read(env, atom) for atom in equation.invars]
            if equation.primitive.name != "transpose":
                operands = [contract.total(x) for x in operands]
            with _jaxpr.name_scope(equation):
                outputs = self.emit(equation, operands, compiled)
            env.update(zip(equation.outvars, outputs, strict=True))
        return [_jaxpr.read(env, atom) for atom in jaxpr.outvars]

    def emit(self, equation: Any, values: list, compiled: dict | None) -> list:
        """The outputs of one equation."""
        name = equation.primitive.name
        if name == "transpose" and isinstance(values[0], contract.Sum):
            return [values[0].transposed(equation.params["permutation"])]
        if not any(isinstance(x, View) for x in values):
            return _jaxpr.bind(equation, values)
        if name in _CONTROL_FLOW:
            return self.control_flow(equation, values, compiled)
        values = placement.joined(values)
        if name in _LAZY and (result := _LAZY[name](equation.params, *values)) is not None:
            return list(result) if isinstance(result, list) else [result]
        if name in _PRODUCTS and (result := _PRODUCTS[name](equation.params, *values)) is not None:
            return self.used(name, values, result)
        return _jaxpr.bind(equation, [self.made_dense(x, name) for x in values])

    def used(self, primitive: str, values: Sequence, result: Any) -> list:
        """The result of a factored use, which is noted."""
        for x in values:
            if isinstance(x, View) and not isinstance(result, View):
                self.uses.append(Use(x.path, primitive, factored=True))
        return [result]

    def control_flow(self, equation: Any, values: list, compiled: dict | None) -> list:
        """The outputs of a loop, branch or inner function that meets a view."""
        rule = functools.partial(_CONTROL_FLOW[equation.primitive.name], self, equation)
        tracing = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values))
        if compiled is None or tracing:
            return rule(*values)
        # Eagerly, JAX compiles each loop or branch once and finds it again by its jaxpr. A loop
        # that is written anew at each call would be compiled at each call, hence this jit.
        if id(equation) not in compiled:
            compiled[id(equation)] = jax.jit(rule)
        return compiled[id(equation)](*values)

    def made_dense(self, x: Any, primitive: str) -> Any:
        """The value of a view that cannot stay lazy: an error if strict."""
        if not isinstance(x, View):
            return contract.total(x)
        if self.strict:
            raise ValueError(
                f"{x.path} (shape {x.shape}) reaches {primitive!r}, which has no factored form: "
                "only products, look-ups and rearrangements of an adapted or quantized weight do; "
                "apply the operation to the activations instead, leave the leaf out of the "
                "patterns, or write adapt(fn, strict=False) to have it made dense there"
            )
        self.uses.append(Use(x.path, primitive, factored=False))
        return x.dense()

    def returned(self, x: Any) -> Any:
        """An output: a weight that was only passed through is returned as the leaf it is."""
        if not isinstance(x, View):
            return contract.total(x)
        leaf = x.leaf()
        return self.made_dense(x, "return") if leaf is None else leaf


Params = dict[str, Any]
Lazy = View | None

# Equations that keep a view lazy. Each returns the new view, or None if it cannot.


def _reshape(params: Params, view: View, *_: Any) -> Lazy:
    return None if params.get("dimensions") else view.reshaped(tuple(params["new_sizes"]))


def _broadcast_in_dim(params: Params, view: View, *_: Any) -> Lazy:
    """Only with new axes of size one."""
    shape, kept = params["shape"], params["broadcast_dimensions"]
    if [shape[k] for k in kept] != list(view.shape) or list(kept) != sorted(kept):
        return None
    added = [k for k in range(len(shape)) if k not in kept]
    return view.with_ones(added) if all(shape[k] == 1 for k in added) else None


def _slice(params: Params, view: View) -> Lazy:
    starts, stops = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * len(starts)
    cuts = {}
    for axis, bounds in enumerate(zip(starts, stops, steps, strict=True)):
        if bounds != (0, view.shape[axis], 1):
            named = dict(zip(("start_index", "limit_index", "stride"), bounds, strict=True))
            cuts[axis] = functools.partial(lax.slice_in_dim, **named)
    return _along_batches(view, cuts)


def _dynamic_slice(params: Params, view: View, *starts: Any) -> Lazy:
    cuts = {
        axis: functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        for axis, (start, size) in enumerate(zip(starts, params["slice_sizes"], strict=True))
        if size != view.shape[axis]
    }
    return _along_batches(view, cuts)


def _rev(params: Params, view: View) -> Lazy:
    return _along_batches(view, dict.fromkeys(params["dimensions"], jnp.flip))


def _along_batches(view: View, fns: Mapping[int, Callable]) -> Lazy:
    """With a function applied along each of these axes, all of which must be batch axes."""
    for axis, fn in fns.items():
        changed = view.along_batch(axis, fn)
        if changed is None:
            return None
        view = changed
    return view


def _split(params: Params, view: View) -> list | None:
    parts, start = [], 0
    for size in map(int, params["sizes"]):
        cut = functools.partial(lax.slice_in_dim, start_index=start, limit_index=start + size)
        parts.append(view.along_batch(params["axis"], cut))
        start += size
    return None if None in parts else parts


def _unstack(params: Params, view: View) -> list | None:
    axis = params["axis"]
    if view.batch_axis(axis) is None:
        return None
    first = view.batch_first(axis)
    order = tuple(k - 1 for k in first.order if k != 0)
    return [
        dataclasses.replace(first.on_batch(operator.itemgetter(k)), order=order)
        for k in range(view.shape[axis])
    ]


_LAZY: dict[str, Callable] = {
    "transpose": lambda params, view: view.transposed(tuple(params["permutation"])),
    "convert_element_type": lambda params, view: view.cast(params["new_dtype"]),
    "reshape": _reshape,
    "squeeze": lambda params, view: view.squeezed(tuple(params["dimensions"])),
    "broadcast_in_dim": _broadcast_in_dim,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "rev": _rev,
    "split": _split,
    "unstack": _unstack,
    "optimization_barrier": lambda params, *values: list(values),
    "stop_gradient": lambda params, view: view.on_batch(lax.stop_gradient),
    "copy": lambda params, view: view,
    "copy_p": lambda params, view: view,
    "name": lambda params, view: view,
    "sharding_constraint": lambda params, view: view,
}


# Equations that use a view up.


def _slice_of_one(params: Params, view: View, *starts: Any) -> jax.Array | None:
    """A slice of one row: what indexing an embedding with a scalar becomes."""
    sizes = params.get("slice_sizes")
    if sizes is None:
        starts = params["start_indices"]
        sizes = [hi - lo for lo, hi in zip(starts, params["limit_indices"], strict=True)]
    cut = [k for k, size in enumerate(sizes) if size != view.shape[k]]
    if len(cut) != 1 or sizes[cut[0]] != 1:
        return None
    index = jnp.clip(starts[cut[0]], 0, view.shape[cut[0]] - 1)
    row = contract.take_one(view, cut[0], index)
    return None if row is None else jnp.expand_dims(row, cut[0])


_PRODUCTS: dict[str, Callable] = {
    "dot_general": lambda params, lhs, rhs: contract.dot_general(lhs, rhs, params),
    "grouped_dot": lambda params, lhs, rhs, sizes: contract.grouped_dot(lhs, rhs, sizes, params),
    "ragged_dot_general": lambda params, lhs, rhs, sizes: contract.ragged_dot_general(
        lhs, rhs, sizes, params
    ),
    "gather": lambda params, view, indices: (
        contract.gather(view, indices, params) if isinstance(view, View) else None
    ),
    "slice": _slice_of_one,
    "dynamic_slice": _slice_of_one,
}


# Control flow, written again with lax's public functions.


def _inline(rewrite: Rewrite, equation: Any, *values: Any) -> list:
    name = equation.params.get("name")
    if name == products.FLOAT32_PRODUCT:
        result = contract.float32_product(*values)
        if result is not None:
            return rewrite.used("dot_general", values, result)
    inner = "jaxpr" if "jaxpr" in equation.params else "call_jaxpr"
    jaxpr, consts = _jaxpr.opened(equation.params[inner])
    if (primal := products.primal_of(jaxpr, name)) is not None:
        order = [jaxpr.invars.index(atom) for atom in jaxpr.eqns[0].invars]
        jaxpr, consts = _jaxpr.opened(primal)
        values = tuple(values[k] for k in order)
    return rewrite.run(jaxpr, consts, list(values))


def _checkpoint(rewrite: Rewrite, equation: Any, *values: Any) -> list:
    params = equation.params
    jaxpr, consts = _jaxpr.opened(params["jaxpr"])

    @functools.partial(jax.checkpoint, policy=params["policy"], prevent_cse=params["prevent_cse"])
    def body(*values: Any) -> list:
        return rewrite.run(jaxpr, consts, list(values))

    return body(*values)


def _cond(rewrite: Rewrite, equation: Any, index: jax.Array, *values: Any) -> list:
    def rewritten(branch: Any) -> Callable[..., list]:
        jaxpr, consts = _jaxpr.opened(branch)
        run = lambda *values: rewrite.run(jaxpr, consts, list(values))  # noqa: E731
        return lambda *values: [rewrite.made_dense(x, "cond") for x in run(*values)]

    return lax.switch(index, [rewritten(x) for x in equation.params["branches"]], *values)


def _while(rewrite: Rewrite, equation: Any, *values: Any) -> list:
    params = equation.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = list(values[:n_cond]), list(values[n_cond : n_cond + n_body])
    carry = list(values[n_cond + n_body :])
    cond_jaxpr, cond_extra = _jaxpr.opened(params["cond_jaxpr"])
    body_jaxpr, body_extra = _jaxpr.opened(params["body_jaxpr"])
    fixed = _fixed_carry(body_jaxpr, n_body, carry)
    moving = [rewrite.made_dense(x, "while") for k, x in enumerate(carry) if k not in fixed]

    def cond(moving: list) -> jax.Array:
        full = _with_fixed(moving, fixed)
        return rewrite.run(cond_jaxpr, cond_extra, [*cond_consts, *full])[0]

    def body(moving: list) -> list:
        full = _with_fixed(moving, fixed)
        outputs = rewrite.run(body_jaxpr, body_extra, [*body_consts, *full])
        return [rewrite.made_dense(x, "while") for k, x in enumerate(outputs) if k not in fixed]

    return _with_fixed(lax.while_loop(cond, body, moving), fixed)


def _scan(rewrite: Rewrite, equation: Any, *values: Any) -> list:
    params = equation.params
    n_consts, n_carry = _jaxpr.scan_counts(equation)
    jaxpr, extra = _jaxpr.opened(params["jaxpr"])
    consts, carry = list(values[:n_consts]), list(values[n_consts : n_consts + n_carry])
    xs = list(values[n_consts + n_carry :])
    fixed = _fixed_carry(jaxpr, n_consts, carry)
    moving = [rewrite.made_dense(x, "scan") for k, x in enumerate(carry) if k not in fixed]
    # A view is scanned over if its first axis is a batch axis of the leaf.
    for k, x in enumerate(xs):
        if isinstance(x, View):
            scanned = x.batch_axis(0) is not None
            if x.order[0] != 0:
                x = placement.joined(x)
            xs[k] = x.batch_first(0) if scanned else rewrite.made_dense(x, "scan")
    # A slice that the body hands back unchanged is the whole operand again (NNX does so).
    inputs = jaxpr.invars[n_consts + n_carry :]
    returned = {
        k: inputs.index(atom)
        for k, atom in enumerate(jaxpr.outvars[n_carry:])
        if atom in inputs and isinstance(xs[inputs.index(atom)], View)
    }

    def body(moving: list, xs: list) -> tuple[list, list]:
        xs = [x.entered() if isinstance(x, View) else x for x in xs]
        full = _with_fixed(moving, fixed)
        outputs = rewrite.run(jaxpr, extra, [*consts, *full, *xs])
        carry = [x for k, x in enumerate(outputs[:n_carry]) if k not in fixed]
        carry = [rewrite.made_dense(x, "scan") for x in carry]
        ys = [x for k, x in enumerate(outputs[n_carry:]) if k not in returned]
        return carry, [rewrite.made_dense(x, "scan") for x in ys]

    # Of a stack in parts one is run through after the other.
    bounds = [0, *sorted(placement.bounds(xs)), params["length"]]
    ranges = list(itertools.pairwise(bounds))
    options = {name: params[name] for name in ("reverse", "unroll")}
    stacks = []
    for start, stop in reversed(ranges) if params["reverse"] else ranges:
        part = placement.cut(xs, start, stop) if len(ranges) > 1 else xs
        moving, ys = lax.scan(body, moving, part, length=stop - start, **options)
        stacks.append(ys)
    if params["reverse"]:
        stacks.reverse()
    remaining = iter(
        jax.tree.map(lambda *ys: jnp.concatenate(ys), *stacks) if len(stacks) > 1 else ys
    )
    n_ys = len(jaxpr.outvars) - n_carry
    ys = [xs[returned[k]] if k in returned else next(remaining) for k in range(n_ys)]
    return [*_with_fixed(moving, fixed), *ys]


def _fixed_carry(body: Any, n_consts: int, carry: list) -> dict[int, View]:
    """The views among the carry that the body hands on unchanged."""
    inputs = body.invars[n_consts : n_consts + len(carry)]
    return {
        k: x for k, x in enumerate(carry) if isinstance(x, View) and body.outvars[k] is inputs[k]
    }


def _with_fixed(moving: list, fixed: dict[int, View]) -> list:
    remaining = iter(moving)
    return [fixed[k] if k in fixed else next(remaining) for k in range(len(moving) + len(fixed))]


_CONTROL_FLOW: dict[str, Callable] = {
    "jit": _inline,
    "pjit": _inline,
    "closed_call": _inline,
    "core_call": _inline,
    "remat2": _checkpoint,
    "checkpoint": _checkpoint,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
