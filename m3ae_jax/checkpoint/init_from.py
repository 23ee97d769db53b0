"""Starting from the weights of other checkpoints: what has the same name and shape is taken, the rest is logged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from m3ae_jax.checkpoint.manager import load_params
from m3ae_jax.errors import UserError

log = logging.getLogger("m3ae_jax")


Fit = Callable[[str, np.ndarray, jax.Array], tuple[Any, str] | None]
"""Of a name, what is stored, and the leaf here of another shape: what is taken in its place, and in words how."""


def load_into(
    tree: Any,
    path: str,
    into: str = "",
    source: str = "",
    *,
    complete: bool = False,
    fit: Fit = lambda name, stored, leaf: None,
    field: str = "init_from",
) -> Any:
    """Replaces what fits in a pytree by a checkpoint's weights, leaf by leaf, keeping each leaf's sharding.

    What was taken, has another shape, or is missing on either side is logged.

    Args:
        tree: parameters, or other state, on its devices.
        path: a run's folder, or one checkpoint in it.
        into: which branch of `tree` is filled, as ``encoder``; empty: all.
        source: which branch of the checkpoint's parameters is taken; empty: all; ``extra/NAME``: that of what is
            beside them.
        complete: refuse a checkpoint that lacks a leaf; else the leaf stays as it is.
        field: of the config that names the checkpoint, for messages.
        fit: what of another shape can be taken nevertheless, as learned positions.

    Raises:
        UserError: no checkpoint there, nothing in it fits, or a leaf is missing where all are needed.
    """
    beside = source.removeprefix("extra/") if source.startswith("extra/") else ""
    everything = _by_path(load_params(path, (beside,) if beside else ()))
    stored = _branch(everything, beside or source)
    wanted = _branch(_by_path(tree), into)
    shared = [name for name in wanted if name in stored]
    taken = {name: stored[name] for name in shared if stored[name].shape == wanted[name].shape}
    fits = {name: fit(name, stored[name], wanted[name]) for name in shared if name not in taken}
    fitted = {name: found for name, found in fits.items() if found is not None}
    whole = len(taken)
    taken |= {name: value for name, (value, _) in fitted.items()}
    where = f"{field}={path}" + (f" ({into})" if into else "")
    if not stored and everything:
        branches = sorted({name.partition("/")[0] for name in everything})
        raise UserError(f"{where}: its checkpoint has no {source!r}, it is of another objective: {', '.join(branches)}")
    if not taken:
        raise UserError(f"{where}: none of its {len(stored)} parameters has the name and shape of one here")
    shapes = [
        f"{name}: {stored[name].shape} -> {leaf.shape}"
        for name, leaf in wanted.items()
        if name in stored and name not in taken
    ]
    missing = [name for name in wanted if name not in stored]
    numbers = [sum(wanted[name].size for name in names) for names in (taken, wanted)]
    if numbers[0] < numbers[1] / 2:
        log.warning(
            "%s: only %d of the %d parameters here are in it with the same shape, %.0f %% of the numbers; the others "
            "are drawn anew",
            where, len(taken), len(wanted), 100 * numbers[0] / numbers[1],
        )  # fmt: skip
    if complete and (missing or shapes):
        raise UserError(f"{where} does not fit: {', '.join(missing + shapes)}")
    for kind, names in (
        ("taken", [f"{whole} parameters"]),
        ("taken at another size", [f"{name}: {how}" for name, (_, how) in fitted.items()]),
        ("other shape, left fresh", shapes),
        ("not in the checkpoint, left fresh", missing),
        ("in the checkpoint, unused", sorted(set(stored) - set(wanted))),
    ):
        if names:
            log.info("%s: %s: %s", where, kind, ", ".join(names))

    def replace(key_path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = _name(key_path)
        branch = name.removeprefix(into + "/") if into else name
        if (into and branch == name) or branch not in taken:
            return leaf
        value = taken[branch]
        return value if isinstance(value, jax.Array) else jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(replace, tree)


def _branch(by_path: dict[str, Any], branch: str) -> dict[str, Any]:
    prefix = branch + "/" if branch else ""
    return {name.removeprefix(prefix): leaf for name, leaf in by_path.items() if name.startswith(prefix)}


def _by_path(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
