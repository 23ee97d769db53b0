"""How long it takes to save and to restore a training state, and how long the loop waits for a save."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from m3ae_jax.benchmark.step import Model
from m3ae_jax.benchmark.timing import Figures, device, spread, timed
from m3ae_jax.checkpoint.manager import Checkpoints
from m3ae_jax.train.step import abstract_state, init_state


@dataclasses.dataclass(frozen=True)
class CheckpointFigures(Figures):
    """What was measured; seconds of each round.

    Attributes:
        device: how many of which.
        folder: on whose file system.
        state_bytes: in memory, one copy.
        file_bytes: of one checkpoint.
        wait_seconds: until the loop goes on.
        save_seconds: until all is on the disk and checked.
        restore_seconds: to the devices, checksums compared; the system may still hold the files in memory.
    """

    device: str
    folder: str
    state_bytes: int
    file_bytes: int
    wait_seconds: list[float]
    save_seconds: list[float]
    restore_seconds: list[float]

    def text(self) -> str:
        """For people."""
        megabytes = self.file_bytes / 1e6
        written, read = (megabytes / statistics.median(s) for s in (self.save_seconds, self.restore_seconds))
        return (
            f"a checkpoint of {self.state_bytes / 2**30:.2f} GiB, {self.file_bytes / 2**30:.2f} GiB on the disk "
            f"({self.folder}; {self.device}; seconds are the median of the rounds and their range):\n"
            f"  the loop waits  {spread(self.wait_seconds)} s\n"
            f"  saved after     {spread(self.save_seconds)} s, {written:,.0f} MB/s\n"
            f"  restored in     {spread(self.restore_seconds)} s, {read:,.0f} MB/s, files just written"
        )


def measure(config: ConfigDict, repeats: int) -> CheckpointFigures:
    """Saves and restores a state of a resolved config, whose moments are as hard to compress as its parameters.

    Args:
        config: resolved.
        repeats: saves, each of which is restored.
    """
    model = Model.of(config)
    state, abstract = init_state(*model), abstract_state(*model)
    # A fresh state's moments are zeros, which are compressed to nothing.
    moments = {
        name: jax.tree.map(lambda x, like: x.astype(like.dtype), state.params, optax.tree.get(state.opt_state, name))
        for name in ("mu", "nu")
    }
    state = jax.block_until_ready(dataclasses.replace(state, opt_state=optax.tree.set(state.opt_state, **moments)))
    waits, saves, restores = list[float](), list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
            for step in range(1, repeats + 1):
                state = dataclasses.replace(state, step=jnp.int32(step))
                with timed(saves):
                    with timed(waits):
                        checkpoints.save(state, {"config": config.to_dict()}, {})
                    checkpoints.wait()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        for _ in range(repeats):
            with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints, timed(restores):  # as a new run would
                jax.block_until_ready(checkpoints.restore(repeats, abstract))
    return CheckpointFigures(
        device=device(),
        folder=str(Path(folder).parent),
        state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        file_bytes=size,
        wait_seconds=waits,
        save_seconds=saves,
        restore_seconds=restores,
    )
