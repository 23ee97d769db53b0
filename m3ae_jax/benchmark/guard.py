"""What it costs that steps are judged: host time a step and compiled operations, with and without."""

from __future__ import annotations

import collections
import dataclasses
import statistics
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from m3ae_jax.benchmark.step import Runner, device
from m3ae_jax.train.watchdog import Watchdog

_STEPS = 50
_CALLS_TO_THE_HOST = ("callback", "outfeed", "infeed", "send", "recv")


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        flops: of the compiled step, as the compiler counts them (a loop's body once).
        bytes_accessed: likewise.
        host_seconds: median, for handing a step to the device, of all rounds.
        step_seconds: median of all rounds, a step from start to end, one after the other.
        calls_to_the_host: operations of the compiled step that need it.
    """

    flops: float
    bytes_accessed: float
    host_seconds: float
    step_seconds: float
    calls_to_the_host: int


@dataclasses.dataclass(frozen=True)
class GuardFigures:
    """What was measured: `sides` holds ``without`` and ``with``."""

    sides: dict[str, Side]
    steps: int
    device: str

    def text(self) -> str:
        """For people."""
        a, b = self.sides["without"], self.sides["with"]
        added = (b.host_seconds - a.host_seconds) * 1e6
        return (
            f"steps judged and watched, against not ({self.steps} steps a round, in turns; {self.device}):\n"
            f"  host time a step    {a.host_seconds * 1e6:,.0f} -> {b.host_seconds * 1e6:,.0f} us ({added:+,.0f} us)\n"
            f"  whole step          {a.step_seconds * 1e3:,.2f} -> {b.step_seconds * 1e3:,.2f} ms "
            f"(x {b.step_seconds / a.step_seconds:.3f})\n"
            f"  compiled FLOPs      {a.flops:,.0f} -> {b.flops:,.0f} ({b.flops / a.flops - 1:+.4%})\n"
            f"  bytes accessed      {a.bytes_accessed:,.0f} -> {b.bytes_accessed:,.0f} "
            f"({b.bytes_accessed / a.bytes_accessed - 1:+.2%})\n"
            f"  calls to the host   {a.calls_to_the_host} -> {b.calls_to_the_host}"
        )

    def record(self) -> dict[str, Any]:
        """For programs."""
        return dataclasses.asdict(self)


class _Runner(Runner):
    """One side's compiled step, and what the loop does beside it."""

    def __init__(self, config: ConfigDict, spike: float | None) -> None:
        super().__init__(config, spike)
        self._watchdog = Watchdog(600.0, 3600.0) if spike is not None else None
        self._kept: collections.deque[Any] = collections.deque(maxlen=_STEPS)

    def cost(self) -> tuple[float, float, int]:
        """Operations, bytes, and calls to the host."""
        counted: Any = self.compiled.cost_analysis()
        text = self.compiled.as_text()
        return counted["flops"], counted["bytes accessed"], sum(f" {call}" in text for call in _CALLS_TO_THE_HOST)

    def round(self, steps: int) -> tuple[list[float], float]:
        """Host seconds of each step, and seconds of all of them to the end."""
        host = []
        begin = time.perf_counter()
        for number in range(steps):
            before = time.perf_counter()
            figures = self.start()
            if self._watchdog:
                self._watchdog.started(number, figures["loss"])
                self._kept.append({name: figures[name] for name in ("loss", "gradient_norm", "skipped")})
            host.append(time.perf_counter() - before)
            jax.block_until_ready(figures)
            if self._watchdog:
                self._watchdog.look()
        return host, time.perf_counter() - begin


def measure(config: ConfigDict, repeats: int, steps: int = _STEPS) -> GuardFigures:
    """Measures both sides in turns.

    Args:
        config: resolved, of one source.
        repeats: rounds of each.
        steps: of a round.
    """
    runners = {"without": _Runner(config, None), "with": _Runner(config, config.anomaly.spike)}
    host: dict[str, list[float]] = {name: [] for name in runners}
    whole: dict[str, list[float]] = {name: [] for name in runners}
    for repeat in range(repeats + 1):
        for name, runner in runners.items():
            of_steps, seconds = runner.round(steps)
            if repeat:  # the first is to warm up
                host[name] += of_steps
                whole[name].append(seconds / steps)
    sides = {}
    for name, runner in runners.items():
        flops, accessed, calls = runner.cost()
        sides[name] = Side(flops, accessed, statistics.median(host[name]), statistics.median(whole[name]), calls)
    return GuardFigures(sides, steps, device())
