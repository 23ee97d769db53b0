"""Checkpoints of a run: asynchronous, the newest few and the best one kept, restored onto any mesh.

A checkpoint holds the whole training state and a small JSON of what identifies the run: its config, the version
of the data order and the fingerprints of the data and the tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from m3ae_jax.errors import UserError

BEST_METRIC = "val/loss"


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: made if missing.
        keep: how many of the newest to keep; the one with the least validation loss is kept besides.
        read_only: touches nothing, not even what a running save has not finished.
    """

    def __init__(self, folder: str | Path, keep: int, *, read_only: bool = False) -> None:
        path = Path(folder).resolve()  # a relative path would fail late, in orbax's background thread
        best = policies.BestN(get_metric_fn=_score, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                # Without best_fn orbax writes no metrics, and forgets after a restart which one is best.
                best_fn=_score,
                best_mode="min",
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
        )

    def save(self, state: Any, meta: dict[str, Any], metrics: dict[str, float]) -> None:
        """Starts to save; does nothing if this step is saved already.

        Args:
            state: pytree of `jax.Array` with a scalar `step`.
            meta: JSON-able.
            metrics: validation figures at this step, ``{}`` if it was not evaluated.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        best = {BEST_METRIC: metrics[BEST_METRIC]} if BEST_METRIC in metrics else None
        self._manager.save(step, args=args, metrics=best)

    def latest(self) -> int | None:
        """The newest complete step, None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the least validation loss among those kept."""
        return self._manager.best_step()

    def restore(self, step: int, abstract: Any) -> Any:
        """The state of a step, on the shardings of `abstract` (`jax.ShapeDtypeStruct` leaves)."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=args)["state"]

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved as `meta` with a step."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and stops the background threads."""
        self._manager.close()


def _score(metrics: dict[str, float]) -> float:
    return metrics[BEST_METRIC]


def find(path: str) -> tuple[Path, int]:
    """Finds a checkpoint: a run's folder, its ``checkpoints`` folder, or one step's folder inside.

    Returns:
        The ``checkpoints`` folder and the step: the newest, unless a step's folder was named.

    Raises:
        UserError: nothing there.
    """
    root = Path(path).expanduser().resolve()
    if root.name.isdigit() and (root / "state").is_dir():
        return root.parent, int(root.name)
    for folder in (root / "checkpoints", root):
        steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
        if steps:
            return folder, max(steps)
    raise UserError(
        f"no checkpoint at {path!r}: it takes a run's folder (--workdir), or one checkpoint in it, "
        "as runs/tiny/checkpoints/1000"
    )


def load_params(path: str) -> dict[str, Any]:
    """The parameters alone of a checkpoint, as nested dicts of NumPy arrays in host memory.

    Raises:
        UserError: no checkpoint there.
    """
    folder, step = find(path)
    place = folder / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(place).item_metadata.tree
        params = {"params": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree["params"])}
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=_numpy()), params)
        restored = checkpointer.restore(
            place, args=ocp.args.PyTreeRestore(item=params, restore_args=restore_args, partial_restore=True)
        )
    return restored["params"]


def _numpy() -> type:
    import numpy as np

    return np.ndarray
