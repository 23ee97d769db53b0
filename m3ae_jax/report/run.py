"""The page of a run: what happened, how far it is, what it learnt, how fast, and how to go on.

Everything is read from files of the run's folder. Each may be missing, cut off by a kill, or strange: the page is for
the day on which something went wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import m3ae_jax.config as config_lib
import m3ae_jax.console as console
from m3ae_jax.doctor.subject import subject
from m3ae_jax.errors import UserError
from m3ae_jax.metrics.writers import EVERY_STEP, damaged_lines, read_lines, read_rows
from m3ae_jax.report import data, measured, page, results
from m3ae_jax.report.charts import Series, collect, short
from m3ae_jax.report.page import Html

log = logging.getLogger("m3ae_jax")

_METRICS, _EVENTS, _CONFIG = "metrics.jsonl", "events.jsonl", "config.json"
_SHOWN = 200  # events
_STARTS = ("started", "resumed")
_ENDS = {"finished": "finished", "stopped": "stopped", "preempted": "stopped (preempted)", "failed": "failed"}
_BAD = ("stopped", "preempted", "failed", "stalled", "skipped", "warning")
_TOTAL = re.compile(r"(?:all )?(\d+) steps\b.*")  # in the text of started and of finished


@dataclasses.dataclass(frozen=True)
class Event:
    """A line of ``events.jsonl``.

    Attributes:
        time: in UTC; None where the line has none.
        step: or None.
        kind: one word, such as ``saved``.
        text: one line.
    """

    time: datetime.datetime | None
    step: int | None
    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Run:
    """What the folder of a run holds.

    Attributes:
        folder: of the run.
        metrics: by name.
        events: as they happened.
        config: ``config.json``; empty where there is none that can be read.
        trouble: what could not be read.
    """

    folder: Path
    metrics: dict[str, Series]
    events: list[Event]
    config: dict[str, Any]
    trouble: list[str]

    @property
    def last(self) -> Event | None:
        """The newest event."""
        return self.events[-1] if self.events else None

    @property
    def ending(self) -> Event | None:
        """How the newest start ended; None if it has not, as far as is known."""
        newest = next((event for event in reversed(self.events) if event.kind in (*_STARTS, *_ENDS)), None)
        return newest if newest and newest.kind in _ENDS else None

    @property
    def done(self) -> int:
        """Steps done, as far as metrics and events say."""
        logged = max((int(series.steps[-1]) for series in self.metrics.values()), default=0)
        event = next((event for event in reversed(self.events) if event.step is not None), None)
        if event is None or event.step is None:
            return logged
        wrote_since = self._wrote and event.time and self._wrote > event.time
        if event is self.last and event.kind in _STARTS and not wrote_since:
            return event.step  # a start falls back to its checkpoint: the rows are of the start before
        return max(logged, event.step)

    @property
    def checkpoint(self) -> int | None:
        """The step of the newest checkpoint."""
        return max(results.numbered(self.folder / "checkpoints", r"([0-9]+)"), default=None)

    @property
    def _wrote(self) -> datetime.datetime | None:
        metrics = self.folder / _METRICS
        return datetime.datetime.fromtimestamp(metrics.stat().st_mtime, datetime.UTC) if metrics.exists() else None

    @property
    def heard_of(self) -> datetime.datetime | None:
        """When the run last wrote anything."""
        times = [event.time for event in self.events if event.time]
        if self._wrote and not self.ending:
            times.append(self._wrote)
        return max(times, default=None)


def build_run(workdir: Path) -> Path:
    """Makes the run's parts of the page anew, and the page; other parts stay as they are, the data doctor's unless it
    is of other data.

    Args:
        workdir: the run's folder.

    Returns:
        ``WORKDIR/report.html``.

    Raises:
        UserError: the folder holds no run.
        OSError: the page cannot be written.
    """
    run = read(Path(workdir))
    _drop_stale_doctor(run)
    for number, name, title, section in _SECTIONS:
        try:
            parts = list(section(run))
        except Exception as error:  # a run gone wrong may hold anything; the other parts are needed all the more
            log.warning("report: the part %r could not be made: %s", title, error, exc_info=True)
            parts = [page.alert("This part could not be made: ", page.data(f"{type(error).__name__}: {error}"))]
        if parts:
            page.write(run.folder, number, name, title, *parts)
        else:  # there may have been something before
            page.place(run.folder, number, name).unlink(missing_ok=True)
    return page.build(run.folder, run.folder.resolve().name)


def _drop_stale_doctor(run: Run) -> None:
    """Removes the data doctor's part where it is of other data, or of another tokenizer, than the run's config."""
    told = results.load(run.folder / "report" / "data_doctor.json")
    if run.config and "subject" in told and told["subject"] != subject(run.config):
        page.place(run.folder, 10, "data_doctor").unlink(missing_ok=True)


def read(folder: Path) -> Run:
    """Reads the files of a run's folder.

    Raises:
        UserError: none of them exists.
    """
    if not any((folder / name).is_file() for name in (_METRICS, _EVENTS, _CONFIG)):
        raise UserError(f"--workdir={folder} holds no run: none of {_METRICS}, {_EVENTS} and {_CONFIG} is there")
    run = Run(folder, {}, [], results.load(folder / _CONFIG), [])
    try:
        run.events.extend(map(_event, read_lines(folder / _EVENTS)))
        run.metrics.update(collect(read_rows(folder)))
    except Exception as error:  # no run writes such a line, but an editor or a failing disk may
        run.trouble.append(f"{_METRICS if run.events else _EVENTS} cannot be read: {type(error).__name__}: {error}")
    if not run.config and (folder / _CONFIG).exists():
        run.trouble.append(f"{_CONFIG} cannot be read")
    run.trouble.extend(_damage(folder))
    return run


def _damage(folder: Path) -> Iterator[str]:
    """What of a run's small files cannot be read, a line a file."""
    for name in (_METRICS, EVERY_STEP, _EVENTS):
        with contextlib.suppress(OSError):
            if count := damaged_lines(folder / name):
                yield f"{name}: {count:,} lines cannot be read, as after a kill, and are left out"
    for file in (folder / "data.json", *sorted((folder / "evals").glob("*.json"))):
        if file.exists() and not results.load(file):
            yield f"{file.relative_to(folder)} cannot be read, and is left out"


def _event(line: dict[str, Any]) -> Event:
    step = line.get("step")
    kind, text = (str(line.get(name) or "") for name in ("kind", "text"))
    return Event(_time(line.get("time")), step if isinstance(step, int) else None, kind, text)


def _time(text: object) -> datetime.datetime | None:
    try:
        time = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return time.replace(tzinfo=datetime.UTC) if time.tzinfo is None else time.astimezone(datetime.UTC)


# --- at a glance -------------------------------------------------------------------------------------------


def _summary(run: Run) -> Iterator[Html]:
    alarm = run.last if run.last and run.last.kind == "stalled" else run.ending
    if alarm and alarm.kind != "finished":
        at = "" if alarm.step is None else f" at step {alarm.step:,}"
        yield page.alert(f"{alarm.kind}{at}: ", page.data(alarm.text))
        # A run that was stopped on purpose needs no mending.
        begin = "The" if alarm.kind in ("stopped", "preempted") else "Once the cause is mended, the"
        step = run.checkpoint
        goes_on = (
            "begins anew: there is no checkpoint" if step is None else f"goes on from the checkpoint of step {step:,}"
        )
        yield page.note("All output is in ", page.code("log.txt"), f". {begin} same command {goes_on}.")
    for trouble in run.trouble:
        yield page.alert(page.data(trouble))
    yield page.facts(_facts(run))


def _facts(run: Run) -> Iterator[tuple[str, object]]:
    yield "status", _status(run)
    total, metrics = _total(run), run.metrics
    # Rounded down: never 100 % of a run that is not done.
    share = f" of {total:,} ({math.floor(1000 * run.done / total) / 10:g} %)" if total else ""
    yield "steps", f"{run.done:,}{share}"
    batch = run.config.get("batch_size")
    if isinstance(batch, int):
        yield "examples", f"{run.done * batch:,}"
    if any(event.time for event in run.events):
        yield "wall time", console.duration(_worked(run))
    if starts := sum(event.kind in _STARTS for event in run.events):
        yield "starts", f"{starts:,}"
    for name, label in (("train/loss", "training loss"), ("val/loss", "validation loss")):
        if series := metrics.get(name):
            yield f"newest {label}", f"{short(series.last)} at step {series.steps[-1]:,}"
    validation = metrics.get("val/loss")
    if validation and np.isfinite(validation.values).any():
        best = int(np.nanargmin(validation.values))
        yield "best validation loss", f"{short(validation.values[best])} at step {validation.steps[best]:,}"
    if skipped := metrics.get("train/skipped_steps"):
        yield "skipped steps", f"{skipped.total:,.0f}"
    if replaced := metrics.get("train/replaced_examples"):
        reasons = sorted(measured.within(metrics, "train/replaced/").items(), key=lambda item: -item[1].total)
        counts = ", ".join(f"{reason.replace('_', ' ')} {series.total:,.0f}" for reason, series in reasons)
        yield "replaced examples", page.join([f"{replaced.total:,.0f}", page.data(f" ({counts})" if counts else "")])
    if run.checkpoint is not None:
        yield "newest checkpoint", f"step {run.checkpoint:,}"


def _status(run: Run) -> str:
    if run.ending:
        return _ENDS[run.ending.kind] + (f" at {_utc(run.ending.time)} UTC" if run.ending.time else "")
    heard = f"; last heard of at {_utc(run.heard_of)} UTC" if run.heard_of else ""
    if not run.events:
        return f"unknown: there is no {_EVENTS}{heard}"
    return f"running, or killed without a word{heard}"


def _utc(time: datetime.datetime | None) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S}" if time else ""


def _total(run: Run) -> int | None:
    """All steps of the run, from its config, or from its newest event where the config counts in epochs."""
    batch = run.config.get("batch_size")
    try:
        _, unit = config_lib.parse_duration("duration", run.config.get("duration", ""))
        if unit == "steps" or (unit == "examples" and isinstance(batch, int) and batch > 0):
            return config_lib.steps("duration", run.config["duration"], batch or 1, 1)
    except UserError:
        pass
    for event in reversed(run.events):
        if event.kind in ("started", "finished") and (match := _TOTAL.fullmatch(event.text)):
            return int(match[1])
    return None


def _worked(run: Run) -> float:
    """Seconds from each start to the last event after it; the time between two starts does not count."""
    moments = [(event.time, event.kind) for event in run.events if event.time]
    if run.heard_of:
        moments.append((run.heard_of, ""))
    between = [(after - before, kind) for (before, _), (after, kind) in itertools.pairwise(moments)]
    return sum(passed.total_seconds() for passed, kind in between if kind not in _STARTS)


# --- events and config -------------------------------------------------------------------------------------


def _table_of_events(run: Run) -> Iterator[Html]:
    if not run.events:
        return
    groups = _grouped(run.events)
    older = len(groups) - _SHOWN
    yield page.note("Newest first." + (f" {older:,} older ones are left out: see {_EVENTS}." if older > 0 else ""))
    yield page.table(("time, UTC", "step", "what", ""), map(_row, groups[: -_SHOWN - 1 : -1]))


def _grouped(events: Iterable[Event]) -> list[list[Event]]:
    """Each event by itself, but skipped steps in a row together."""
    groups = itertools.groupby(enumerate(events), lambda item: -1 if item[1].kind == "skipped" else item[0])
    return [[event for _, event in group] for _, group in groups]


def _row(group: list[Event]) -> tuple[object, ...]:
    first, last = group[0], group[-1]
    time = page.element("span", _utc(last.time), class_="nobreak")
    step = "" if last.step is None else f"{last.step:,}"
    kind = page.element("span", last.kind, class_="bad") if last.kind in _BAD else page.escape(last.kind)
    since = "" if first.step is None else f" since step {first.step:,}"
    times = f"{len(group):,} times{since}; the last: " if len(group) > 1 else ""
    return time, step, kind, page.join([times, page.data(last.text)])


def _config(run: Run) -> Iterator[Html]:
    if run.config:
        values = [(name, page.element("code", value)) for name, value in _flat(run.config)]
        yield page.details(f"{len(values):,} fields", page.facts(values))


def _flat(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values as JSON; an empty group is a value."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, json.dumps(value, ensure_ascii=False)


_SECTIONS: tuple[tuple[int, str, str, Callable[[Run], Iterator[Html]]], ...] = (
    (0, "run", "Run", _summary),
    (5, "events", "What happened when", _table_of_events),
    (15, "data", "Data", lambda run: data.section(run.folder, run.metrics)),
    (20, "curves", "Curves", lambda run: measured.curves(run.metrics)),
    (25, "throughput", "Throughput", lambda run: measured.throughput(run.metrics)),
    (30, "reconstructions", "Reconstructions", lambda run: results.reconstructions(run.folder)),
    (40, "evaluations", "Evaluations", lambda run: results.evaluations(run.folder)),
    (60, "replay", "Replay", lambda run: results.replays(run.folder)),
    (80, "config", "Config", _config),
)
