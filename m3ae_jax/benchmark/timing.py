"""What all benchmarks share: a result, rounds of measurements, and the machine with its peak."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

_ROUND_SECONDS = 2.0  # about what a round takes
_MOST_STEPS = 50  # of a round
_FLOAT32_SIDE, _ACCELERATOR_SIDE = 3072, 8192  # of the matrices whose product is the peak


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a benchmark measured."""

    def text(self) -> str:
        """For people."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """For programs: the fields, and the properties that follow from them."""
        properties = [name for name, value in vars(type(self)).items() if isinstance(value, property)]
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in properties}


def device() -> str:
    """How many of which."""
    return f"{jax.device_count()} {jax.devices()[0].device_kind}"


def cores() -> int:
    """Of the host, which this process may use."""
    return len(os.sched_getaffinity(0))


def compute_dtype(config: ConfigDict) -> jnp.dtype:
    """Of the matrix products of a resolved config on this machine."""
    automatic = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(automatic if config.compute.dtype == "auto" else config.compute.dtype)


def spread(seconds: list[float], form: str = ".4g") -> str:
    """Median and range."""
    return f"{statistics.median(seconds):{form}} ({min(seconds):{form}} to {max(seconds):{form}})"


@contextlib.contextmanager
def timed(seconds: list[float], clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    """Appends what the block takes."""
    begin = clock()
    yield
    seconds.append(clock() - begin)


class Rounds:
    """Seconds a step of each round, of as many steps as its first one suggests.

    Before each round a step is not timed: the system may have taken back memory that the program will need again.
    """

    def __init__(self, run: Callable[[int], None]) -> None:
        self._run, self.seconds = run, list[float]()
        run(1)
        with timed(first := list[float]()):
            run(1)
        self._steps = int(np.clip(_ROUND_SECONDS / first[0], 1, _MOST_STEPS))

    def one(self) -> None:
        """Runs a round."""
        self._run(1)
        with timed(whole := list[float]()):
            self._run(self._steps)
        self.seconds.append(whole[0] / self._steps)


def in_turns(rounds: Sequence[Rounds], repeats: int, dtype: Any) -> list[float]:
    """Runs `repeats` rounds of each in turns, and after each turn measures the peak, which is returned."""
    peak, peaks = _matmul(dtype), list[float]()
    for _ in range(repeats):
        for one in rounds:
            one.one()
        peaks.append(peak())
    return peaks


def _matmul(dtype: Any) -> Callable[[], float]:
    """A function that measures the operations per second of one large matrix product on one device."""
    on_cpu = jax.default_backend() == "cpu"
    side, times = (_FLOAT32_SIDE, 1) if on_cpu else (_ACCELERATOR_SIDE, 20)
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    # Scaled, so that a chain of products neither grows nor vanishes.
    # Unrolled, for within a loop XLA's CPU back end gives a product one core.
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: (y @ x) * side**-0.5, x, unroll=times))
    jax.block_until_ready(chain(a))

    def measured() -> float:
        seconds: list[float] = []
        for _ in range(4):  # the first after a step is slower: the fastest is the peak
            with timed(seconds):
                jax.block_until_ready(chain(a))
        return 2.0 * side**3 * times / min(seconds)

    return measured
