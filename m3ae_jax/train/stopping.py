"""Requests to stop, by SIGTERM (a preemption, a time limit) or SIGINT (Ctrl-C): where a run may be left."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopFlag:
    """Inside the context, set by SIGTERM or SIGINT and read at step boundaries; a second SIGINT stops at once.

    Of several processes all stop after the same step: JAX then watches for SIGTERM, and SIGINT stops at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if jax.process_count() == 1:
            self._before = {n: signal.signal(n, self._set) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def at(self, step: int) -> bool:
        """Whether to stop after this step."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self.requested

    def _set(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
