"""How long it takes to make a fresh training state: tracing, compiling, running."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

from m3ae_jax.benchmark.step import Model
from m3ae_jax.benchmark.timing import Figures, device, spread, timed
from m3ae_jax.train.progress import host_peak_bytes
from m3ae_jax.train.step import jit_init


@dataclasses.dataclass(frozen=True)
class InitFigures(Figures):
    """What was measured; seconds of each round.

    Attributes:
        device: how many of which.
        parameters: numbers.
        state_bytes: parameters, moments and the rest, one copy.
        lower_seconds: of tracing.
        compile_seconds: of compiling.
        run_seconds: of drawing the numbers.
        host_peak_bytes: the most that the process held.
    """

    device: str
    parameters: int
    state_bytes: int
    lower_seconds: list[float]
    compile_seconds: list[float]
    run_seconds: list[float]
    host_peak_bytes: int

    def text(self) -> str:
        """For people."""
        return (
            f"a fresh state of {self.parameters:,} parameters, {self.state_bytes / 2**30:.2f} GiB ({self.device}; "
            f"seconds are the median of the rounds and their range):\n"
            f"  tracing    {spread(self.lower_seconds)} s\n"
            f"  compiling  {spread(self.compile_seconds)} s\n"
            f"  running    {spread(self.run_seconds)} s\n"
            f"  the process had at most {self.host_peak_bytes / 2**30:.2f} GiB"
        )


def measure(config: ConfigDict, repeats: int) -> InitFigures:
    """Makes the state of a resolved config `repeats` times, each time from nothing."""
    model = Model.of(config)
    lower, compile_, run = list[float](), list[float](), list[float]()
    state: Any = None
    for _ in range(repeats):
        state = None  # gives its memory back
        with timed(lower):
            lowered = jit_init(*model).lower()
        with timed(compile_):
            compiled = lowered.compile()
        with timed(run):
            state = jax.block_until_ready(compiled())
    return InitFigures(
        device=device(),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        lower_seconds=lower,
        compile_seconds=compile_,
        run_seconds=run,
        host_peak_bytes=host_peak_bytes(),
    )
