"""`adapt(fn)`: any JAX function, run on adapted weights as if they were arrays.

    fn ──trace──► jaxpr on dense abstract values ──rewrite──► the same equations, where W is a
                                                              lazy View until it is used

The function is traced with ordinary abstract arrays, so that the model, Flax's shape checks and
every grad, vmap or custom rule inside it see nothing new. Then its equations are emitted again
(rewrite.py) with each adapted weight as a lazy view. Nothing of this is left at run time.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.core import _jaxpr
from lora_jax.core.leaves import AdaptedArray, QuantizedArray, is_array, is_concrete
from lora_jax.core.placement import on_device
from lora_jax.core.rewrite import Report, Rewrite
from lora_jax.core.rules import path_string
from lora_jax.core.view import View

TRACES_KEPT = 64  # per adapted function, for eager calls


def adapt(fn: Callable, *, strict: bool = True, fold: bool | None = None) -> Callable:
    """Makes a function of a tree work on a combined tree, at the cost of the factored products.

    Args:
      fn: any JAX function whose first argument is a pytree: `model.apply`, a method, a partial, a
        plain function. Arrays are traced; any other leaf (bool, str, callable, None) is passed by
        value, so `train=False` and Equinox modules work. As with `jax.jit`, Python side effects
        happen when it is traced, and eager calls with equal shapes are not traced again. A 4-bit
        weight is decoded again in the backward pass, unless `fn` itself uses `jax.checkpoint` with
        a policy that saves whatever it does not know (`everything_saveable` and the like).
      strict: whether an adapted leaf that `fn` does not use, or uses in a way that would make it
        dense, is an error. `explain` shows which leaves those are.
      fold: whether a product of many rows with a 4-bit weight adds the update while it decodes the
        weight (core/folded.py). It saves a pass over the activations and costs a weight for each
        adapter: with `vmap` over many adapters it had better be False. None: True on a GPU.

    Returns:
      A function of the same signature that takes a tree from `combine` (or a quantized base alone).

    Raises:
      ValueError: when called, if `strict` and a leaf cannot be used in factored form.

    Example:
      >>> apply = lj.adapt(model.apply)
      >>> logits = apply({"params": lj.combine(base, adapters)}, tokens)
    """
    traces = _Traces()

    @functools.wraps(fn)
    def adapted(tree: Any, /, *args: Any, **kwargs: Any) -> Any:
        folds = jax.default_backend() == "gpu" if fold is None else fold
        return _call(fn, Rewrite(strict, folds), traces, (tree, *args), kwargs)

    return adapted


def explain(fn: Callable) -> Callable[..., Report]:
    """What `adapt(fn)` would do with each leaf, found without computing anything.

    Args:
      fn: a function as for `adapt`.

    Returns:
      A function of the same arguments that returns a `Report`; print it.
    """

    @functools.wraps(fn)
    def explained(tree: Any, /, *args: Any, **kwargs: Any) -> Report:
        arguments = _Arguments.of((tree, *args), kwargs)
        rewrite = Rewrite(strict=False)
        jax.eval_shape(
            lambda dynamic: _Trace.of(fn, arguments).run(rewrite, dynamic), arguments.dynamic
        )
        lazy = [
            (p, x) for p, x in zip(arguments.paths, arguments.dynamic, strict=True) if _is_lazy(x)
        ]
        uses = {path: tuple(use for use in rewrite.uses if use.path == path) for path, _ in lazy}
        return Report(uses, {path: tuple(leaf.shape) for path, leaf in lazy})

    return explained


# Arguments: what is traced, what is passed by value, and what stays lazy.


def _is_lazy(x: Any) -> bool:
    return isinstance(x, AdaptedArray | QuantizedArray)


@dataclasses.dataclass(frozen=True)
class _Arguments:
    """A call's leaves. `dynamic` holds arrays and lazy leaves; `static` the values in between."""

    treedef: Any
    dynamic: list[Any]
    static: tuple[Any, ...]  # a value, or _DYNAMIC where the next dynamic leaf belongs
    paths: list[str]  # of the dynamic leaves
    trained: list[bool]  # for each dynamic leaf, whether it is adapted or trained whole

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> _Arguments:
        flat, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=_is_lazy)
        dynamic, static, paths, trained = [], [], [], []
        for path, leaf in flat:
            is_trained = isinstance(leaf, AdaptedArray)
            if isinstance(leaf, AdaptedArray) and leaf.is_replaced:
                leaf = leaf.adapter.astype(leaf.dtype)
            if _is_lazy(leaf) or is_array(leaf):
                # Lazy weights are copied where they are used; the function knows of no others.
                dynamic.append(leaf if _is_lazy(leaf) else on_device(leaf))
                paths.append(_argument_path(path))
                trained.append(is_trained)
                static.append(_DYNAMIC)
            else:
                static.append(leaf)
        return cls(treedef, dynamic, tuple(static), paths, trained)

    def call(self, fn: Callable, dynamic: list[Any]) -> Any:
        values = iter(dynamic)
        leaves = [next(values) if x is _DYNAMIC else x for x in self.static]
        args, kwargs = jax.tree.unflatten(self.treedef, leaves)
        return fn(*args, **kwargs)

    def key(self) -> Any:
        """What a trace depends on, or None if it must not be kept."""
        leaves = jax.tree.leaves(self.dynamic)
        if not all(is_concrete(x) for x in leaves):
            return None
        structure = jax.tree.structure(self.dynamic)
        avals = tuple(jax.typeof(x) for x in leaves)
        static = tuple((type(x), x) for x in self.static)
        settings = [getattr(jax.config, name) for name in _SETTINGS]
        context = (*settings, jax.sharding.get_abstract_mesh())
        key = (self.treedef, structure, avals, static, context)
        try:
            hash(key)
        except TypeError:
            return None
        return key


_DYNAMIC = object()
# Of JAX's settings, those that change what tracing gives.
_SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")


def _argument_path(path: tuple) -> str:
    """The path within the first argument; other arguments are named by position or keyword."""
    in_kwargs, rest = path[0].idx == 1, path[1:]
    if in_kwargs:
        return path_string(rest)
    position, rest = rest[0].idx, rest[1:]
    if position == 0:
        return path_string(rest) or "the weight"
    return f"argument {position}: {path_string(rest)}".removesuffix(": ")


def _dense_aval(leaf: Any) -> Any:
    """What the traced function sees in place of a leaf."""
    if not _is_lazy(leaf):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


# Traces


class _Trace:
    """A function's jaxpr for one kind of arguments, and how to rebuild its result."""

    def __init__(self, closed: Any, arguments: _Arguments, rebuild: Callable):
        self.jaxpr, self.consts = _jaxpr.opened(closed)
        self.paths = arguments.paths
        self.rebuild = rebuild
        self.compiled: dict[int, Callable] = {}  # see Rewrite.control_flow

    @classmethod
    def of(cls, fn: Callable, arguments: _Arguments) -> _Trace:
        result: dict[str, Any] = {}

        def flat(*dynamic: Any) -> list[Any]:
            leaves, treedef = jax.tree.flatten(arguments.call(fn, list(dynamic)))
            result["treedef"] = treedef
            result["static"] = [_DYNAMIC if is_array(x) else x for x in leaves]
            return [x for x in leaves if is_array(x)]

        closed = jax.make_jaxpr(flat)(*map(_dense_aval, arguments.dynamic))

        def rebuild(values: list[Any]) -> Any:
            remaining = iter(values)
            leaves = [next(remaining) if x is _DYNAMIC else x for x in result["static"]]
            return jax.tree.unflatten(result["treedef"], leaves)

        return cls(closed, arguments, rebuild)

    def run(self, rewrite: Rewrite, dynamic: list[Any]) -> Any:
        pairs = zip(dynamic, self.paths, strict=True)
        values = [View.of(x, path, rewrite.fold) if _is_lazy(x) else x for x, path in pairs]
        outputs = rewrite.run(self.jaxpr, self.consts, values, self.compiled)
        return self.rebuild([rewrite.returned(x) for x in outputs])


class _Traces(collections.OrderedDict[Any, _Trace]):
    """Traces of a function, by its arguments' kinds; the last one used is last."""

    def __reduce__(self) -> Any:
        # They belong to a process; a function that is sent to another begins without.
        return _Traces, ()


def _call(fn: Callable, rewrite: Rewrite, traces: _Traces, args: tuple, kwargs: dict) -> Any:
    arguments = _Arguments.of(args, kwargs)
    _check_meshes(arguments)
    key = arguments.key()
    trace = traces.get(key) if key is not None else None
    if trace is not None:
        traces.move_to_end(key)
        return trace.run(rewrite, arguments.dynamic)
    trace = _Trace.of(fn, arguments)
    result = trace.run(rewrite, arguments.dynamic)
    if rewrite.strict:
        _refuse_unused(arguments, trace, rewrite)
    if key is not None and not any(isinstance(x, jax.core.Tracer) for x in trace.consts):
        traces[key] = trace
        if len(traces) > TRACES_KEPT:
            traces.popitem(last=False)
    return result


def _refuse_unused(arguments: _Arguments, trace: _Trace, rewrite: Rewrite) -> None:
    """An error if a leaf that is trained was not used. Those trained whole are ordinary arrays."""
    used = {use.path for use in rewrite.uses}
    consumed = {id(atom) for equation in trace.jaxpr.eqns for atom in equation.invars}
    consumed |= {id(atom) for atom in trace.jaxpr.outvars}
    leaves = zip(
        *(arguments.paths, arguments.dynamic, arguments.trained, trace.jaxpr.invars), strict=True
    )
    unused = [
        path
        for path, leaf, trained, variable in leaves
        if trained and not (path in used if _is_lazy(leaf) else id(variable) in consumed)
    ]
    if unused:
        raise ValueError(
            f"the function never uses {', '.join(unused)}, so training it would learn nothing; "
            "leave it out of the rules and of train=, or write adapt(fn, strict=False)"
        )


def _check_meshes(arguments: _Arguments) -> None:
    for leaf, path in zip(arguments.dynamic, arguments.paths, strict=True):
        if not _is_lazy(leaf):
            continue
        for x in jax.tree.leaves(leaf):
            mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
            if mesh is not None and jax.sharding.AxisType.Explicit in getattr(
                mesh, "axis_types", ()
            ):
                raise ValueError(
                    f"{path} lies on a mesh with Explicit axes, on which looking up 4-bit codes "
                    "has no sharding rule; make the mesh with axis_types=(jax.sharding.AxisType."
                    "Auto,) * number_of_axes"
                )
