"""How fast a run is, and where its time goes."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

import m3ae_jax.console as console
from m3ae_jax.parallel.chips import peak_flops

KINDS = ("startup", "compile", "data_wait", "evaluation", "checkpoint")
"""What takes time beside the steps."""

_GIB = 2**30


def process_age() -> float:
    """Seconds since this process was started; its processor time where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()


class Start:
    """How a run starts, until there is a `Progress`.

    Attributes:
        begun: `time.perf_counter()` when this was made.
        parts: seconds by name; ``imports`` are all before it was made.
    """

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.parts = {"imports": process_age()}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context whose time is that of `name`."""
        begin = time.perf_counter()
        yield
        self.parts[name] = time.perf_counter() - begin


class Progress:
    """Rates between two log lines, evaluation and saving left out, and shares of the time since the start.

    Args:
        batch_size: examples a step.
        total: steps of the run.
        flops_per_example: of matrix products, forward and backward, in closed form.
        devices: that take part.
        device_kind: as JAX names it.
        start: of the run.
    """

    def __init__(
        self, batch_size: int, total: int, flops_per_example: float, devices: int, device_kind: str, start: Start
    ) -> None:
        self._batch_size, self._total = batch_size, total
        self._flops, self._devices, self._kind = flops_per_example * batch_size / devices, devices, device_kind
        self._peak = peak_flops(device_kind)
        self._start, self._begun = start, start.begun
        self._spent = dict.fromkeys(KINDS, 0.0)
        self._first_step = 0
        self._begin_interval(time.perf_counter(), 0)

    def _begin_interval(self, now: float, step: int) -> None:
        self._last, self._waited, self._pause = (now, step), 0.0, 0.0

    def start(self, step: int) -> None:
        """Begins counting at a step."""
        now = time.perf_counter()
        self._spent["startup"] = now - self._begun - sum(self._spent.values())
        self._first_step = step
        self._begin_interval(now, step)

    def waiting(self, get: Callable[[], Any], metrics: dict[str, Any]) -> Any:
        """Calls `get`; counts its time as waiting for data if the device had run out of work by its end."""
        begin = time.perf_counter()
        batch = get()
        if all(value.is_ready() for value in metrics.values()):
            seconds = time.perf_counter() - begin
            self._waited += seconds
            self._spent["data_wait"] += seconds
        return batch

    @contextlib.contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """A context whose time is one of `KINDS`, and none of the steps'."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self._pause += seconds
            self._spent[kind] += seconds

    def interval(self, step: int) -> dict[str, float]:
        """Figures since the last call, then begins anew."""
        now = time.perf_counter()
        seconds = max(now - self._last[0] - self._pause, 1e-9)
        count = step - self._last[1]
        rate = count * self._batch_size / seconds
        done = self._flops * count / seconds
        metrics = {
            "examples_per_second": rate,
            "examples_per_second_per_chip": rate / self._devices,
            "teraflops_per_second_per_chip": done / 1e12,
            **({"mfu": done / self._peak} if self._peak else {}),
            "data_wait_share": min(self._waited / seconds, 1.0),
            "seconds_per_step": seconds / max(count, 1),
        }
        self._begin_interval(now, step)
        return metrics

    def first_step(self, step: int) -> dict[str, float]:
        """Seconds from the program's start to the end of its first step, by what they went to; ``{}`` later."""
        if step != self._first_step + 1:
            return {}
        spent = self._spent  # waiting for data: for the first batch, whole, as the device has no work yet
        known = {
            **self._start.parts,
            "evaluation": spent["evaluation"],
            "batch": spent["data_wait"],
            "compile": spent["compile"],
        }
        other = time.perf_counter() - self._begun - (sum(known.values()) - known["imports"])
        return {**known, "other": max(other, 0.0)}

    def shares(self) -> dict[str, float]:
        """Where the time since the start went, ``time/<kind>`` and for the steps ``time/step`` (goodput); 1 in all."""
        whole = max(time.perf_counter() - self._begun, 1e-9)
        shares = {f"time/{kind}": seconds / whole for kind, seconds in self._spent.items()}
        return {"time/step": max(1.0 - sum(shares.values()), 0.0), **shares}

    def formula(self) -> str:
        """What the MFU is, in one line."""
        flops = f"{self._flops / 1e9:,.1f} GFLOP of matrix products a step and chip (3 x forward, in closed form)"
        if not self._peak:
            return f"{flops}; no peak of {self._kind!r} is known, so no MFU"
        return f"MFU = {flops} / seconds a step / {self._peak / 1e12:,.1f} TFLOP/s, the bfloat16 peak of {self._kind}"

    def line(self, step: int, values: dict[str, float], timing: dict[str, float]) -> str:
        """The one line on the console."""
        left = "ETA " + console.duration(timing["seconds_per_step"] * (self._total - step))
        if step == self._first_step + 1:
            left = f"compiled in {console.duration(self._spent['compile'])}"
        terms = " ".join(f"{k} {v:.4f}" for k, v in values.items() if "/" not in k and k.endswith(("loss", "accuracy")))
        replaced = f" | replaced {values['replaced_examples']:.0f}" if values["replaced_examples"] else ""
        skipped = f" | skipped steps {values['skipped_steps']:.0f}" if values["skipped_steps"] else ""
        mfu = f", MFU {timing['mfu']:.1%}" if "mfu" in timing else ""
        return (
            f"step {step}/{self._total} {step / self._total:4.0%} | {left} | "
            f"{timing['examples_per_second']:.1f} ex/s{mfu} | {terms} | data wait {timing['data_wait_share']:.0%}"
            f"{replaced}{skipped}"
        )


def host_peak_bytes() -> int:
    """The most that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory() -> dict[str, float]:
    """GiB that this process has resident, and the most that its first device has held where JAX reports it."""
    status = Path("/proc/self/status")
    resident = re.search(r"VmRSS:\s*(\d+) kB", status.read_text()) if status.exists() else None
    host = int(resident[1]) * 1024 if resident else host_peak_bytes()
    stats = jax.local_devices()[0].memory_stats() or {}
    device = {"memory/device_gib": stats["peak_bytes_in_use"] / _GIB} if "peak_bytes_in_use" in stats else {}
    return {"memory/host_gib": host / _GIB, **device}
