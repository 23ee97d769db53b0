"""A momentum teacher: an exponential moving average of some of the parameters (arXiv 1703.01780).

Its leaves are float32 whatever the products are taken in: in bfloat16 an increment of 0.005 of a difference is rounded
away, and the teacher stands still.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp


def subset(params: Any, paths: Iterable[str]) -> dict[str, Any]:
    """The branches of a tree at some paths, as ``image`` or ``heads/projection``, under the same names.

    Raises:
        LookupError: there is no such branch.
    """
    taken: dict[str, Any] = {}
    for path in paths:
        branch, into = params, taken
        *parents, name = path.split("/")
        for parent in parents:
            branch, into = branch[parent], into.setdefault(parent, {})
        into[name] = branch[name]
    return taken


def moved(teacher: Any, params: Any, paths: Iterable[str], momentum: Any) -> Any:
    """The teacher after a step: ``momentum * teacher + (1 - momentum) * student``, leaf by leaf, float32.

    Args:
        teacher: of `subset`.
        params: after the optimizer.
        paths: of `subset`.
        momentum: a scalar in [0, 1].
    """
    m = jnp.asarray(momentum, jnp.float32)
    return jax.tree.map(lambda old, new: m * old + (1.0 - m) * new, teacher, subset(params, paths))


def momentum_at(step: Any, first: float, last: float, ramp: int) -> jax.Array:
    """The momentum at a step: from `first` linearly to `last` in `ramp` steps, then that."""
    if ramp == 0:
        return jnp.float32(last)
    return first + (last - first) * jnp.minimum(step / ramp, 1.0).astype(jnp.float32)
