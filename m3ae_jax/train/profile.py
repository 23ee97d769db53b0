"""A trace of some steps, for TensorBoard or Perfetto (``profile="100-105"``)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax

from m3ae_jax.config import parse_profile
from m3ae_jax.metrics.events import Events

log = logging.getLogger("m3ae_jax")


class Profile:
    """Traces from before the first of the steps until the last one is done on the device; each process its own.

    A profiler that fails is logged and stops nothing.

    Args:
        steps: ``"A-B"`` or nothing.
        folder: gets the trace.
        events: records where the trace is.
    """

    def __init__(self, steps: str, folder: Path, events: Events) -> None:
        self._steps, self._folder, self._events = parse_profile(steps), folder, events
        self._running = False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Begins at the first step, or where a run goes on between the two."""
        if self._steps is None or self._running or not self._steps[0] <= step <= self._steps[1]:
            return
        if _would_crash():
            self._steps = None
            log.warning("no profile: libtpu, which is loaded, crashes where there is no TPU: set JAX_PLATFORMS=cpu")
            return
        try:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of every thread: minutes to write, and it slows the steps down
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._running = True
        except Exception as error:
            self._steps = None
            log.warning("no profile: %s", " ".join(str(error).split()))

    def after(self, step: int, metrics: Any) -> None:
        """Ends after the last step."""
        if self._running and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            log.warning("no profile: %s", " ".join(str(error).split()))
            return
        first, last = self._steps or (0, 0)
        text = f"a trace of the steps {first} to {last} is in {self._folder}"
        self._events.add("profile", text)
        log.info(text)


def _would_crash() -> bool:
    """Whether JAX has loaded libtpu, as it does where it is installed, without a TPU: its profiler ends the process."""
    if any(device.platform == "tpu" for device in jax.devices()):
        return False
    loaded = Path("/proc/self/maps")
    return loaded.exists() and "libtpu" in loaded.read_text()
