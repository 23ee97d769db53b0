"""Where metrics go: TensorBoard and the log through clu, and JSON-lines files."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger("m3ae_jax")

ROWS = "metrics.jsonl"
EVERY_STEP = "every_step.jsonl"


class MetricWriter:
    """Writes scalars and pictures of a run. Never raises: a kind of writer that fails is logged once, and tried again.

    Args:
        workdir: gets ``metrics.jsonl``, ``every_step.jsonl`` and ``tensorboard/``.
        enabled: False on all but one process.
    """

    def __init__(self, workdir: Path, *, enabled: bool = True) -> None:
        self._workdir = workdir if enabled else None
        self._clu: Any = None
        self._failed: set[str] = set()
        if enabled:
            self._try("TensorBoard", self._open_clu)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row of metrics."""
        self._line(ROWS, {"step": step, **{name: _jsonable(value) for name, value in values.items()}})
        if self._clu:
            self._try("TensorBoard", lambda: self._clu.write_scalars(step, dict(values)))

    def every_step(self, first: int, values: Mapping[str, Sequence[float]]) -> None:
        """Writes some metrics of all steps from `first` on, a list each."""
        lists = {name: [_jsonable(value) for value in each] for name, each in values.items()}
        self._line(EVERY_STEP, {"step": first, **lists})

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Writes a picture, `[H, W, 3] uint8`."""
        if self._clu:
            self._try("TensorBoard", lambda: self._clu.write_images(step, {name: picture[None]}))

    def close(self) -> None:
        """Flushes and closes."""
        if self._clu:
            self._try("TensorBoard", self._clu.close)

    def _open_clu(self) -> None:
        from clu import metric_writers

        board = metric_writers.SummaryWriter(str(self._workdir / "tensorboard"))  # type: ignore[operator]
        self._clu = metric_writers.MultiWriter([board, metric_writers.LoggingWriter()])

    def _line(self, name: str, row: dict[str, Any]) -> None:
        if self._workdir is not None:
            path = self._workdir / name
            self._try(name, lambda: append_line(path, json.dumps(row)))

    def _try(self, what: str, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:  # a store, a full disk, TensorFlow: training goes on without
            if what not in self._failed:
                log.warning("%s cannot be written (%s); training goes on", what, " ".join(str(error).split()))
            self._failed.add(what)
        else:
            if what in self._failed:
                log.warning("%s can be written again", what)
            self._failed.discard(what)


def append_line(path: Path, line: str) -> None:
    """Appends a line, on a new one if a kill or a full disk cut the last.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("ab+") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 1, 0))
        cut = file.read(1) not in (b"\n", b"")
        file.write(b"\n" * cut + line.encode() + b"\n")


def _jsonable(value: float) -> float | None:
    # JSON knows no NaN: null is what readers expect.
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without a line that a kill has cut; none if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def read_rows(workdir: Path, until: int | None = None) -> list[dict[str, float]]:
    """The rows of ``metrics.jsonl`` in order of steps; a step written again after a resume counts once, the last.

    Args:
        workdir: the run's folder.
        until: the last step; by default that of the file's last row. Rows beyond it were written by a start that was
            killed, before the run fell back to its checkpoint.
    """
    lines = [row for row in read_lines(workdir / ROWS) if "step" in row]
    if until is None:
        until = next((row["step"] for row in reversed(lines) if isinstance(row["step"], int)), 0)
    rows: dict[int, dict[str, float]] = {}
    for row in lines:
        if row["step"] <= until:
            rows.setdefault(row["step"], {}).update({name: _number(value) for name, value in row.items()})
    return [rows[step] for step in sorted(rows)]


def read_every_step(workdir: Path, step: int) -> dict[str, float] | None:
    """The metrics of one step in ``every_step.jsonl``, from the last time that it was done; None if there are none."""
    values = None
    for row in read_lines(workdir / EVERY_STEP):
        place = step - row.pop("step", 0)
        lists = {name: each for name, each in row.items() if isinstance(each, list)}
        if lists and 0 <= place < min(map(len, lists.values())):
            values = {name: _number(each[place]) for name, each in lists.items()}
    return values
