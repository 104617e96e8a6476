"""The few reads of jaxprs and primitive parameters that differ between versions of JAX."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from jax.extend import core as jex


def opened(jaxpr: Any) -> tuple[Any, list[Any]]:
    """A jaxpr and its constants, which are held by a `ClosedJaxpr` before 0.11."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, list(getattr(jaxpr, "consts", None) or ())


def read(env: dict[Any, Any], atom: Any) -> Any:
    """The value of an equation's operand."""
    return atom.val if isinstance(atom, jex.Literal) else env[atom]


def bind(equation: Any, values: list[Any]) -> list[Any]:
    """Applies an equation's primitive, unchanged, to other values."""
    primitive = equation.primitive
    with equation.ctx.manager:
        outputs = primitive.bind(*values, **primitive.get_bind_params(equation.params))
    return list(outputs) if primitive.multiple_results else [outputs]


def scan_counts(equation: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].update(list(range(len(equation.invars)))).unpack()
    return len(list(constants.vals)), len(list(carried.vals))


def name_scope(equation: Any) -> contextlib.AbstractContextManager:
    """The scope an equation was written in, so that profiles keep their names."""
    scope = str(equation.source_info.name_stack)
    return jax.named_scope(scope) if scope else contextlib.nullcontext()


def evaluated(jaxpr: Any, consts: Any, values: Any) -> list:
    """The outputs of a jaxpr."""
    return jax.core.eval_jaxpr(jaxpr, consts, *values)
