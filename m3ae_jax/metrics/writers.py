"""Where figures go: TensorBoard and the log through clu, a JSON-lines file, and one console line."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

log = logging.getLogger("m3ae_jax")


class MetricWriter:
    """Writes scalars and pictures of a run.

    Args:
        workdir: gets ``metrics.jsonl`` and ``tensorboard/``.
        enabled: False on all but one process.
    """

    def __init__(self, workdir: Path, *, enabled: bool = True) -> None:
        self._file = None
        self._writers = None
        if enabled:
            from clu import metric_writers

            path = workdir / "metrics.jsonl"
            cut = path.exists() and not path.read_bytes().endswith(b"\n")  # by a kill
            self._file = path.open("a", encoding="utf-8")
            self._file.write("\n" if cut else "")
            board = metric_writers.SummaryWriter(str(workdir / "tensorboard"))
            self._writers = metric_writers.MultiWriter([board, metric_writers.LoggingWriter()])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row of figures."""
        if self._file and self._writers:
            # JSON knows no NaN: null is what readers expect.
            row = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()
            self._writers.write_scalars(step, dict(values))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Writes a picture, `[H, W, 3] uint8`."""
        if self._writers:
            self._writers.write_images(step, {name: picture[None]})

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text."""
        if self._writers:
            self._writers.write_texts(step, {name: text})

    def close(self) -> None:
        """Flushes and closes."""
        if self._file and self._writers:
            self._file.close()
            self._writers.close()


def read_rows(workdir: Path, until: int | None = None) -> list[dict[str, float]]:
    """The rows of ``metrics.jsonl`` in order of steps; a step written again after a resume counts once, the last.

    Args:
        workdir: the run's folder.
        until: rows beyond this step are left out (they were written by a run that then fell back).
    """
    path = workdir / "metrics.jsonl"
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a kill can cut the last line
        if until is None or row["step"] <= until:
            values = {name: math.nan if value is None else value for name, value in row.items()}
            rows.setdefault(row["step"], {}).update(values)
    return [rows[step] for step in sorted(rows)]
