"""How fast a run trains with its own data, beside the same step on a batch that lies ready; and how it starts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from m3ae_jax.benchmark.timing import Figures, device, spread, timed
from m3ae_jax.errors import UserError
from m3ae_jax.metrics.writers import read_rows
from m3ae_jax.parallel.mesh import put_batch
from m3ae_jax.sweep.runner import python_command
from m3ae_jax.train.setup import Setup, prepare

Overrides = Sequence[tuple[str, str]]
"""Of a config, as (path, text)."""

_STEPS = 30  # of a round


@dataclasses.dataclass(frozen=True)
class EndToEndFigures(Figures):
    """What was measured; seconds of each round.

    Attributes:
        device: how many of which.
        batch_size: examples of a step, of all processes.
        data: what is read.
        step_seconds: a step with its data.
        ready_seconds: a step on one batch that lies on the device.
        host_seconds: of the program's thread, for handing a batch and a step to the device.
        wait_share: of the time, in which the program waited for the next batch.
        start: seconds of a new process by what it does, to its first step: ``cold``, then ``cached``, with what the
            first has compiled.
    """

    device: str
    batch_size: int
    data: str
    step_seconds: list[float]
    ready_seconds: list[float]
    host_seconds: float
    wait_share: float
    start: dict[str, dict[str, float]]

    def text(self) -> str:
        """For people."""
        step, ready = statistics.median(self.step_seconds), statistics.median(self.ready_seconds)
        starts = [
            f"  start, {name:<7} {sum(parts.values()):.1f} s to the end of the first step: "
            + ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
            for name, parts in self.start.items()
        ]
        lines = [
            f"training with data, {self.batch_size} examples a step, {self.data} ({self.device}; seconds are the "
            "median of the rounds and their range):",
            f"  with its data   {spread(self.step_seconds)} s a step, {self.batch_size / step:,.1f} examples/s",
            f"  ready batches   {spread(self.ready_seconds)} s a step, {self.batch_size / ready:,.1f} examples/s",
            f"  ratio           {ready / step:.2f} x the examples/s of ready batches",
            f"  waits           {self.wait_share:.0%} of the time for data; "
            f"{self.host_seconds * 1e6:,.0f} us of host time a step",
        ]
        return "\n".join([*lines, *starts])


def measure(
    config: ConfigDict, repeats: int, start: tuple[str, Overrides] | None = None, steps: int = _STEPS
) -> EndToEndFigures:
    """Starts the program twice, then trains with and without data in turns.

    Args:
        config: resolved; its data are read.
        repeats: rounds of each.
        start: the config's file and overrides, for m3ae_jax.main; None: it is not started.
        steps: of a round.

    Raises:
        UserError: the data are missing or do not fit.
    """
    starts = _starts(*start) if start else {}  # first: afterwards this process holds the device
    setup = prepare(config)
    step, state = setup.train_step(), setup.init_state()
    with_data, ready = list[float](), list[float]()
    waits, host = list[float](), list[float]()
    with contextlib.closing(_endless(setup)) as batches:
        batch = put_batch(next(batches), setup.mesh)
        state, metrics = step(state, batch)
        for _ in range(repeats):
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            with timed(ready):
                for _ in range(steps):
                    state, metrics = step(state, batch)
                jax.block_until_ready(metrics)
            with timed(with_data):
                for _ in range(steps):
                    with timed(waits):
                        read = next(batches)
                    with timed(host):
                        state, metrics = step(state, put_batch(read, setup.mesh))
                jax.block_until_ready(metrics)
    return EndToEndFigures(
        device=device(),
        batch_size=config.batch_size,
        data=", ".join(setup.train_data.names) or f"{config.data.train.source} {config.data.train.path}".strip(),
        step_seconds=[seconds / steps for seconds in with_data],
        ready_seconds=[seconds / steps for seconds in ready],
        host_seconds=statistics.mean(host),
        wait_share=sum(waits) / sum(with_data),
        start=starts,
    )


def _endless(setup: Setup) -> Generator[Any, None, None]:
    while True:
        yield from setup.train_batches(0)


def _starts(path: str, overrides: Overrides) -> dict[str, dict[str, float]]:
    """Of two new processes that do one step, without and with what the first has compiled."""
    starts = {}
    short = (("duration", "1 steps"), ("evals", ""), ("eval.every", "1000 steps"))
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "JAX_ENABLE_COMPILATION_CACHE": "true"}
        for name in ("cold", "cached"):
            workdir = Path(folder) / name
            command = python_command(path, workdir, (*overrides, *short))
            done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
                raise UserError(f"m3ae_jax.main with this config ended with {done.returncode}: {''.join(last)}")
            row = next(row for row in read_rows(workdir) if "start/imports" in row)
            starts[name] = {k.removeprefix("start/"): v for k, v in row.items() if k.startswith("start/")}
    return starts
