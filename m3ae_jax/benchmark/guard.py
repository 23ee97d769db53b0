"""What it costs that steps are judged: host time a step and compiled operations, with and without."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from typing import Any

import jax
from ml_collections import ConfigDict

from m3ae_jax.benchmark.step import Runner
from m3ae_jax.benchmark.timing import Figures, device, timed
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
class GuardFigures(Figures):
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


class _Runner(Runner):
    """One side's compiled step, and what the loop does beside it."""

    def __init__(self, config: ConfigDict, spike: float | None) -> None:
        super().__init__(config, spike)
        self._watchdog = Watchdog(600.0, 3600.0) if spike is not None else None
        self._cached: collections.deque[Any] = collections.deque(maxlen=_STEPS)

    def side(self, host: list[float], whole: list[float]) -> Side:
        """Of seconds of the host and of whole steps; operations, bytes and calls are the compiler's."""
        cost: Any = self.compiled.cost_analysis()
        text = self.compiled.as_text()
        calls = sum(f" {call}" in text for call in _CALLS_TO_THE_HOST)
        return Side(cost["flops"], cost["bytes accessed"], statistics.median(host), statistics.median(whole), calls)

    def round(self, steps: int, host: list[float], whole: list[float]) -> None:
        """Appends host seconds of each step, and seconds a step of all of them to the end."""
        with timed(round_seconds := list[float]()):
            for number in range(steps):
                with timed(host):
                    metrics = self.start()
                    if self._watchdog:
                        self._watchdog.started(number, metrics["loss"])
                        self._cached.append({name: metrics[name] for name in ("loss", "gradient_norm", "skipped")})
                jax.block_until_ready(metrics)
                if self._watchdog:
                    self._watchdog.look()
        whole.append(round_seconds[0] / steps)


def measure(config: ConfigDict, repeats: int, steps: int = _STEPS) -> GuardFigures:
    """Measures both sides in turns.

    Args:
        config: resolved, of one source.
        repeats: rounds of each.
        steps: of a round.
    """
    runners = {"without": _Runner(config, None), "with": _Runner(config, config.anomaly.spike)}
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runners}
    for runner in runners.values():
        runner.round(steps, [], [])  # to warm up
    for _ in range(repeats):
        for name, runner in runners.items():
            runner.round(steps, *seconds[name])
    sides = {name: runner.side(*seconds[name]) for name, runner in runners.items()}
    return GuardFigures(sides, steps, device())
