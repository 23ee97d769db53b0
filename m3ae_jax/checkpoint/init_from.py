"""Starting a new run from the weights of another: what has the same name and shape is taken, the rest told."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from m3ae_jax.checkpoint.manager import load_params
from m3ae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Matched:
    """What of a checkpoint fitted, by parameter path.

    Attributes:
        taken: in both, with the same shape.
        other_shape: in both with different shapes, as ``path: theirs -> ours``; left at their fresh values.
        missing: only in the new model; left at their fresh values.
        unused: only in the checkpoint.
    """

    taken: tuple[str, ...]
    other_shape: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def lines(self) -> list[str]:
        """For the log: a line for each kind that occurs."""
        kinds = {
            "taken": f"{len(self.taken)} parameters",
            "other shape, left fresh": ", ".join(self.other_shape),
            "not in the checkpoint, left fresh": ", ".join(self.missing),
            "in the checkpoint, unused": ", ".join(self.unused),
        }
        return [f"init_from: {kind}: {what}" for kind, what in kinds.items() if what]


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def take_weights(params: Any, path: str) -> tuple[Any, Matched]:
    """Replaces what fits in `params` by a checkpoint's weights, leaf by leaf, keeping each leaf's sharding.

    Fixed sin-cos positions are not parameters, so another resolution or caption length fits as it is.

    Raises:
        UserError: no checkpoint at `path`, or nothing in it fits.
    """
    stored = _by_path(load_params(path))
    taken, other_shape, missing = [], [], []

    def replace(key_path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if name not in stored:
            missing.append(name)
        elif stored[name].shape != leaf.shape:
            other_shape.append(f"{name}: {stored[name].shape} -> {leaf.shape}")
        else:
            taken.append(name)
            return jax.device_put(np.asarray(stored[name], leaf.dtype), leaf.sharding)
        return leaf

    replaced = jax.tree_util.tree_map_with_path(replace, params)
    if not taken:
        raise UserError(f"init_from={path!r}: none of its {len(stored)} parameters has the name and shape of one here")
    unused = tuple(sorted(set(stored) - set(_by_path(params))))
    return replaced, Matched(tuple(taken), tuple(other_shape), tuple(missing), unused)
