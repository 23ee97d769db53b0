"""Floating-point operations in closed form: every matrix product of a traced step, loops counted in full.

A step's are three times those of the forward pass (once forward, twice backward) for products of what depends on the
parameters, and once for the others: a momentum teacher or a frozen tokenizer has no backward pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxprs_in_params
from ml_collections import ConfigDict

from m3ae_jax.objectives.base import build
from m3ae_jax.objectives.batch import abstract_batch, batch_loss


def matmul_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Operations of all matrix products that `function` does: 2 m n k each.

    A `jax.lax.scan` counts as often as it runs; a `jax.lax.while_loop`'s body, whose number of runs is not known,
    once; of a `jax.lax.cond` the costliest branch.

    Args:
        function: traced, never run.
        arguments: arrays or `jax.ShapeDtypeStruct`.
    """
    program = jax.make_jaxpr(function)(*arguments).jaxpr
    return _count(program, [False] * len(program.invars)).all


def step_flops(loss: Callable[..., Any], params: Any, *rest: Any) -> float:
    """Operations of the matrix products of a loss and its gradient with respect to `params`, see the module docstring.

    Args:
        loss: of (params, ...); traced, never run.
        params: arrays or `jax.ShapeDtypeStruct`, as `rest`.
        rest: what there is no gradient of.
    """
    program = jax.make_jaxpr(loss)(params, *rest).jaxpr
    trained = len(jax.tree.leaves(params))
    count = _count(program, [i < trained for i in range(len(program.invars))])
    return count.all + 2 * count.trained


@dataclasses.dataclass(frozen=True)
class _Count:
    """Operations of all products, of those that depend on the parameters, and which outputs depend on them."""

    all: float
    trained: float
    outputs: list[bool]


def _count(jaxpr: Any, inputs: Sequence[bool]) -> _Count:
    """Of a program, of whose inputs some depend on the parameters."""
    dependent = {variable for variable, depends in zip(jaxpr.invars, inputs, strict=True) if depends}
    total = trained = 0.0

    def depend(variables: Sequence[Any]) -> list[bool]:
        return [not isinstance(variable, Literal) and variable in dependent for variable in variables]

    for equation in jaxpr.eqns:
        count = _count_equation(equation, depend(equation.invars))
        total, trained = total + count.all, trained + count.trained
        dependent.update(itertools.compress(equation.outvars, count.outputs))
    return _Count(total, trained, depend(jaxpr.outvars))


def _count_equation(equation: Any, inputs: list[bool]) -> _Count:
    name, params, outputs = equation.primitive.name, equation.params, len(equation.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lengths = [equation.invars[0].aval.shape[d] for d in contracted]
        flops = 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lengths)
        return _Count(flops, flops * any(inputs), [any(inputs)])
    if name == "stop_gradient":
        return _Count(0.0, 0.0, [False] * outputs)
    inner = list(jaxprs_in_params(params))
    if name == "scan":
        return _scan(params, inner[0], inputs)
    if name == "cond":
        branches = [_count(branch, inputs[1:]) for branch in inner]
        costliest = max(branches, key=lambda branch: branch.all + 2 * branch.trained)
        depends = [any(output) for output in zip(*(branch.outputs for branch in branches), strict=True)]
        return dataclasses.replace(costliest, outputs=depends)
    if len(inner) == 1 and len(inner[0].invars) == len(inputs) and len(inner[0].outvars) == outputs:
        return _count(inner[0], inputs)
    # Of whatever else holds programs (a while loop), all depends on the parameters if anything does.
    counts = [_count(part, [any(inputs)] * len(part.invars)) for part in inner]
    return _Count(sum(c.all for c in counts), sum(c.trained for c in counts), [any(inputs)] * outputs)


def _scan(params: dict[str, Any], body: Any, inputs: list[bool]) -> _Count:
    if "ft_in" in params:  # JAX 0.12
        consts, carried, _ = (len(list(kind)) for kind in params["ft_in"].update(inputs).unpack())
    else:
        consts, carried = params["num_consts"], params["num_carry"]
    while True:  # until what an iteration passes on to the next depends on nothing new
        count = _count(body, inputs)
        before = inputs[consts : consts + carried]
        carry = [a or b for a, b in zip(before, count.outputs, strict=False)]
        if carry == before:
            return _Count(params["length"] * count.all, params["length"] * count.trained, count.outputs)
        inputs = [*inputs[:consts], *carry, *inputs[consts + carried :]]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a config needs, independent of any machine; from the traced program's matrix products.

    Attributes:
        flops_per_example: of a step, as `step_flops`.
        executed_flops: of a whole step as it runs: what remat computes anew counts again.
        parameters: numbers.
    """

    flops_per_example: float
    executed_flops: float
    parameters: int


def work(config: ConfigDict, vocab_size: int) -> Work:
    """Counts the operations of a resolved config's step; traces, compiles nothing."""
    loss, arguments = _traced(config, vocab_size)
    return Work(
        flops_per_example=step_flops(loss, *arguments) / _examples(config),
        executed_flops=matmul_flops(jax.grad(loss), *arguments) / _examples(config) * config.batch_size,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(arguments[0])),
    )


def flops_per_example(config: ConfigDict, vocab_size: int) -> float:
    """`Work.flops_per_example` alone, which is quicker to count."""
    loss, arguments = _traced(config, vocab_size)
    return step_flops(loss, *arguments) / _examples(config)


def _examples(config: ConfigDict) -> int:
    """Of the batch that is traced."""
    return min(config.batch_size, 840)  # divides well


def _traced(config: ConfigDict, vocab_size: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The loss of a config, and shapes of its arguments, parameters first."""
    objective, key = build(config, vocab_size), jax.random.key(0)
    boxed = jax.eval_shape(objective.init, key)
    extra = jax.eval_shape(objective.init_extra, boxed, key)

    def loss(params: Any, extra: Any, batch: Any) -> Any:
        output = batch_loss(objective, params, extra, batch, key, jnp.int32(0))
        return sum(total for total, _ in output.terms.values())

    return loss, (nn.unbox(boxed), nn.unbox(extra), abstract_batch(config, objective, _examples(config), 1))
