"""What happened in a run, and when: ``events.jsonl``, a line each, over all its starts."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path

from m3ae_jax.metrics.writers import append_line

log = logging.getLogger("m3ae_jax")


class Events(logging.Handler):
    """Writes events; as a handler of the project's log also each warning and error.

    A file that cannot be written never stops anything: the event is then in the log alone.

    Args:
        workdir: gets ``events.jsonl``: ``{"time": "2026-11-23T10:12:13Z", "step": 12, "kind": "saved", "text": ...}``.
        enabled: False on all but one process.
    """

    def __init__(self, workdir: Path, *, enabled: bool = True) -> None:
        super().__init__(logging.WARNING)
        self._path = workdir / "events.jsonl" if enabled else None
        self.step: int | None = None  # of the events that are added without one

    def add(self, kind: str, text: str, step: int | None = None) -> None:
        """Writes one event.

        Args:
            kind: started, resumed, config, data, saved, evaluated, skipped, stalled, preempted, stopped, failed,
                warning, finished, profile.
            text: for people; line ends become blanks.
            step: the last one done; by default `self.step`.
        """
        if self._path is None:
            return
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        event = {"time": now, "step": self.step if step is None else step, "kind": kind, "text": " ".join(text.split())}
        try:
            append_line(self._path, json.dumps(event))
        except OSError as error:
            log.debug("%s: %s", self._path, error.strerror)  # a warning would come back here

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a warning or an error of the log as an event, of the kind that its `extra` names."""
        fields = record.__dict__
        self.add(fields.get("kind", "warning"), fields.get("brief") or record.getMessage(), fields.get("step"))
