"""Notices that a run hangs: logs where every thread is, and ends the process if it goes on."""

from __future__ import annotations

import collections
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.errors import STOPPED

log = logging.getLogger("m3ae_jax")


class StallFields(FieldGroup):
    """What happens when neither a step nor anything else completes."""

    report_after: float = setting(600.0, low=0.0)
    """Seconds after which the stacks of all threads are printed; 0: never."""
    stop_after: float = setting(3600.0, low=0.0)
    """Seconds after which the process ends, to be started again; 0: never."""


def _end() -> None:
    logging.shutdown()
    os._exit(STOPPED)  # the main thread hangs: it cannot end the process


class Watchdog:
    """A thread that looks, inside the context, whether steps complete and stages follow each other.

    It never waits for the device: it polls whether results are ready.

    Args:
        report_after: seconds without progress until the stacks are logged, once a stall; 0: never.
        stop_after: seconds until the process ends with the exit code for "start again"; 0: never.
        clock: seconds.
        end: ends the process.
    """

    def __init__(
        self,
        report_after: float,
        stop_after: float,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[], Any] = _end,
    ) -> None:
        self._report_after, self._stop_after = report_after, stop_after
        self._clock, self._end = clock, end
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()
        self._stage, self._patient = "starting", False
        self._done: int | None = None
        self._reported = False
        self._last = clock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._last = self._clock()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def stage(self, name: str, *, patient: bool = False) -> None:
        """Sets what comes now; `patient`: it may take however long, so a stall is logged but ends nothing."""
        self._stage, self._patient = name, patient
        self._progress()

    def started(self, step: int, result: Any) -> None:
        """A step was handed to the device, which makes this `jax.Array` in it."""
        self._pending.append((step, result))
        self._progress()

    def look(self) -> None:
        """One look; the thread calls it again and again."""
        while self._pending and self._pending[0][1].is_ready():
            self._done = self._pending.popleft()[0]
            self._progress()
        silent = self._clock() - self._last
        if self._report_after and silent > self._report_after and not self._reported:
            self._reported = True
            brief = f"{self._state(silent)}; the stacks of all threads are in the log"
            log.error("%s:\n%s", brief, stacks(), extra={"kind": "stalled", "brief": brief})
        if self._stop_after and silent > self._stop_after and not self._patient:
            text = f"{self._state(silent)}: the process ends; the same command goes on from the last checkpoint"
            log.error(text, extra={"kind": "stalled"})
            self._end()

    def _state(self, silent: float) -> str:
        done = "none yet" if self._done is None else f"step {self._done}"
        return f"nothing has been done for {silent:,.0f} s; last completed: {done}; now: {self._stage}"

    def _progress(self) -> None:
        self._last, self._reported = self._clock(), False

    def _watch(self) -> None:
        wanted = [seconds for seconds in (self._report_after, self._stop_after) if seconds]
        while wanted and not self._over.wait(min(1.0, min(wanted) / 4)):
            self.look()


def stacks() -> str:
    """Where each thread of this process is, the most recent call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
