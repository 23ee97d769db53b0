"""Where figures of a run go: files of JSON lines, and the writers of ``config.metrics.writers``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.atomic import replacing
from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.config.schema import imported
from m3ae_jax.errors import UserError, one_of

log = logging.getLogger("m3ae_jax")

ROWS = "metrics.jsonl"
EVERY_STEP = "every_step.jsonl"
WRITERS: dict[str, str] = {
    "tensorboard": "m3ae_jax.metrics.tensorboard:TensorBoard",
    "wandb": "m3ae_jax.metrics.wandb:WandB",
}
"""The built-in writers."""
_SLOW, _PAUSE = 1.0, 100.0  # a failure of more seconds is followed by a pause so many times as long


class MetricFields(FieldGroup):
    """Where the figures of a run go besides its `metrics.jsonl`."""

    writers: tuple[str, ...] = setting(("tensorboard",), identifies=False, aliases=("wandb", "tensorboard", "logger"))
    """Writers of figures: `tensorboard`, `wandb`, or import paths "package.module:Class" ([metrics.md](metrics.md))."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Refuses a writer that is neither built in nor an import path; none is imported for it."""
        for name in config.metrics.writers:
            if ":" not in name and name not in WRITERS:
                said = one_of(f"{path}.writers", name, WRITERS)
                raise UserError(f'{said} (or an import path "package.module:Class")')


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What a writer is told of the run.

    Attributes:
        workdir: the run's folder.
        config: resolved.
        step: the last step done; 0 of a fresh run.
        evaluation: ``--mode=eval`` of the checkpoint of that step, perhaps beside a run that goes on.
    """

    workdir: Path
    config: ConfigDict
    step: int
    evaluation: bool = False

    @property
    def first(self) -> int:
        """The first step that is to come, and is written: what was written of it and of later ones was lost."""
        return self.step + 1 if self.step else 0


class Writer:
    """Takes figures, pictures and texts of a run, on one process. These do nothing: inherit what you do not need.

    What raises is logged once and tried again with what comes next; it stops nothing, but for a `UserError` of the
    constructor: a mistake such as a missing package, which ends the start.

    Args:
        run: what there is to know when a run starts or goes on, or when its checkpoint is evaluated.
    """

    def __init__(self, run: RunInfo) -> None:
        pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Takes figures by name, such as ``train/loss``; may be called several times a step. NaN and inf occur."""

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Takes a picture, `[H, W, 3] uint8`."""

    def text(self, step: int, name: str, text: str) -> None:
        """Takes plain text of some lines."""

    def close(self) -> None:
        """The run ends, however; not called when it is killed."""


class MetricWriter:
    """Writes what a run tells to its files and to each writer of its config. What fails stops nothing.

    Args:
        workdir: gets ``metrics.jsonl`` and ``every_step.jsonl``.
        config: resolved.
        enabled: False on all but one process.
        clock: seconds.

    Raises:
        UserError: a writer cannot be imported; on each process.
    """

    def __init__(
        self,
        workdir: Path,
        config: ConfigDict,
        *,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        targets = [_Target(name, clock) for name in dict.fromkeys(config.metrics.writers)]
        self._targets = targets if enabled else []
        self._files = {name: _RowFile(workdir / name, clock) for name in (ROWS, EVERY_STEP)} if enabled else {}
        self._workdir, self._config = workdir, config

    def start(self, step: int, *, evaluation: bool = False) -> None:
        """Begins: cuts from the files what was written of later steps, by a start that was killed; makes the writers.

        Args:
            step: the last step done; 0 of a fresh run, of which nothing counts that was written before.
            evaluation: of a checkpoint, beside a run: nothing is cut.

        Raises:
            UserError: a writer cannot work at all.
        """
        run = RunInfo(self._workdir, self._config, step, evaluation)
        if not evaluation:
            for file in self._files.values():
                file.cut(run.first)
        for target in self._targets:
            target.start(run)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row of metrics."""
        self._append(ROWS, {"step": step, **{name: _jsonable(value) for name, value in values.items()}})
        for target in self._targets:
            target.write(lambda writer: writer.scalars(step, dict(values)))

    def every_step(self, first: int, values: Mapping[str, Sequence[float]]) -> None:
        """Writes some metrics of all steps from `first` on, a list each, to their file alone."""
        lists = {name: [_jsonable(value) for value in each] for name, each in values.items()}
        self._append(EVERY_STEP, {"step": first, **lists})

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Writes a picture, `[H, W, 3] uint8`."""
        for target in self._targets:
            target.write(lambda writer: writer.image(step, name, picture))

    def text(self, step: int, name: str, text: str) -> None:
        """Writes plain text."""
        for target in self._targets:
            target.write(lambda writer: writer.text(step, name, text))

    def close(self) -> None:
        """Closes the writers."""
        for target in self._targets:
            target.close()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if name in self._files:
            self._files[name].append(row)


class _Tried:
    """Calls what may fail. A failure is logged once; a slow one is not tried again at once, as steps would wait."""

    def __init__(self, what: str, clock: Callable[[], float]) -> None:
        self._what, self._clock = what, clock
        self._failed, self._pause_until = False, -math.inf

    def __call__(self, write: Callable[[], object], passes: tuple[type[Exception], ...] = ()) -> None:
        begin = self._clock()
        if begin < self._pause_until:
            return
        try:
            write()
        except passes:
            raise
        except Exception as error:  # a store, a full disk, a user's code: training goes on without
            if (took := self._clock() - begin) > _SLOW:
                self._pause_until = begin + (1 + _PAUSE) * took
            if not self._failed:
                log.warning("%s cannot be written (%s); training goes on", self._what, " ".join(str(error).split()))
                log.debug("%s", self._what, exc_info=True)
            self._failed = True
        else:
            if self._failed:
                log.warning("%s can be written again", self._what)
            self._failed = False


class _Target:
    """A writer; made when the run starts, or with what comes later if it could not be made then."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._make = _writer_class(name)
        self._try = _Tried(name, clock)
        self._run: RunInfo | None = None
        self._writer: Writer | None = None

    def start(self, run: RunInfo) -> None:
        self._run = run
        self._try(self._made, passes=(UserError,))

    def write(self, call: Callable[[Writer], object]) -> None:
        self._try(lambda: call(self._made()))

    def close(self) -> None:
        if self._writer is not None:
            self._try(self._writer.close)

    def _made(self) -> Writer:
        if self._writer is None:
            assert self._run is not None, "the metrics were not started"
            self._writer = self._make(self._run)
        return self._writer


def _writer_class(name: str) -> Callable[[RunInfo], Writer]:
    try:
        return imported(WRITERS.get(name, name))
    except Exception as error:  # whatever the user's module raises
        text = " ".join(str(error).split())
        raise UserError(f"metrics.writers={name!r} cannot be imported: {type(error).__name__}: {text}") from error


class _RowFile:
    """A file of JSON lines."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path, self._try = path, _Tried(path.name, clock)
        self._lost: tuple[int, int] | None = None  # the first step, and how many bytes of the file may hold it

    def cut(self, first: int) -> None:
        """Removes what was written of steps from `first` on; now, or where that fails before a later row."""
        self._try(lambda: self._cut_from(first))

    def append(self, row: dict[str, Any]) -> None:
        self._try(lambda: self._append(row))

    def _cut_from(self, first: int) -> None:
        self._lost = (first, self._path.stat().st_size if self._path.exists() else 0)
        self._cut_lost()

    def _cut_lost(self) -> None:
        if self._lost is not None:
            cut_rows(self._path, *self._lost)
            self._lost = None

    def _append(self, row: dict[str, Any]) -> None:
        try:
            self._cut_lost()
        finally:  # a disk without room for a copy may have some for a line
            append_line(self._path, json.dumps(row))


def cut_rows(path: Path, first: int, size: int | None = None) -> None:
    """Removes what a file of JSON lines holds of steps from `first` on, and lines that a kill has cut.

    Of a line of several steps (of `EVERY_STEP`) the earlier ones stay.

    Args:
        path: the file; replaced as a whole, if there is anything to remove.
        first: the first step that goes.
        size: how many bytes, from the start, are looked at; by default all.

    Raises:
        OSError: it cannot be read or written.
    """
    text = path.read_bytes() if path.exists() else b""
    old, new = text[:size], text[len(text) if size is None else size :]
    kept = b"".join(line + b"\n" for line in (_before(first, line) for line in old.split(b"\n")) if line)
    if kept != old:
        with replacing(path) as fresh:
            fresh.write_bytes(kept + new)


def _before(first: int, line: bytes) -> bytes:
    """What of a line is of steps before `first`; empty if nothing is."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return b""
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(step, int):
        return line  # nothing that a run wrote: not ours to remove
    if step >= first:
        return b""
    short = {name: each[: first - step] if isinstance(each, list) else each for name, each in row.items()}
    return line if short == row else json.dumps(short).encode()


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


def _number(value: Any) -> float:
    if isinstance(value, int | float) and abs(value) < 1e300:
        return value
    return value if isinstance(value, float) else math.nan


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without lines that a kill has cut or damage spoilt; none if there is no file.

    `damaged_lines` counts the others.
    """
    return [row for row in _rows(path) if row is not None]


def damaged_lines(path: Path) -> int:
    """How many lines of a JSON-lines file hold no object."""
    return sum(row is None for row in _rows(path))


def _rows(path: Path) -> Iterator[dict[str, Any] | None]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        row = None
        with contextlib.suppress(ValueError, RecursionError):  # a number may be too long, a list too deep
            row = json.loads(line)
        yield row if isinstance(row, dict) else None


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value < 10**12


def read_rows(workdir: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.jsonl`` in the order of steps, those of one step as one; of a figure the last counts."""
    rows: dict[int, dict[str, float]] = {}
    trained = -1
    for row in (row for row in read_lines(workdir / ROWS) if _is_step(row.get("step"))):
        if "train/loss" in row:
            if row["step"] <= trained:  # the run fell back, and what it lost could not be cut
                rows = {step: values for step, values in rows.items() if step < row["step"]}
            trained = row["step"]
        rows.setdefault(row["step"], {}).update({name: _number(value) for name, value in row.items()})
    return [rows[step] for step in sorted(rows)]


def read_every_step(workdir: Path, step: int) -> dict[str, float] | None:
    """The metrics of one step in ``every_step.jsonl``; None if there are none."""
    for row in reversed(read_lines(workdir / EVERY_STEP)):
        if not _is_step(row.get("step")):
            continue
        place = step - row.pop("step")
        lists = {name: each for name, each in row.items() if isinstance(each, list)}
        if lists and 0 <= place < min(map(len, lists.values())):
            return {name: _number(each[place]) for name, each in lists.items()}
    return None
