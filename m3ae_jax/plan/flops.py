"""Floating-point operations in closed form: every matrix product of a traced program, loops counted in full."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params


def matmul_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Operations of all matrix products that `function` does: 2 m n k each.

    A `jax.lax.scan` counts as often as it runs; a `jax.lax.while_loop`'s body, whose number of runs is not known,
    once; of a `jax.lax.cond` the costliest branch.

    Args:
        function: traced, never run.
        arguments: arrays or `jax.ShapeDtypeStruct`.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> float:
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lengths = [equation.invars[0].aval.shape[d] for d in contracted]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lengths)
    inner = [_count(part) for part in jaxprs_in_params(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner, default=0.0)
    return sum(inner)
