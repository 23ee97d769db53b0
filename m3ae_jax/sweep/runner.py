"""Runs the trainings of a sweep, one after the other or some beside each other, each in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import m3ae_jax.console as console
from m3ae_jax.errors import STOPPED

log = logging.getLogger("m3ae_jax")

CONSOLE = "console.txt"
_POLL = 0.2  # seconds
_STARTS = 20  # of a run that ends with the exit code for "start again"
_GRACE = 120.0  # seconds for the runs to save when the sweep is stopped


@dataclasses.dataclass
class Job:
    """A run to be made.

    Attributes:
        name: for people.
        command: its program and arguments.
        folder: its own.
        is_done: whether there is nothing left to do.
        metrics: its results, for the line that says it is done.
        finished: called once it is done.
    """

    name: str
    command: list[str]
    folder: Path
    is_done: Callable[[], bool]
    metrics: Callable[[], str]
    finished: Callable[[], None] = lambda: None

    def line(self) -> str:
        """The command for a shell."""
        return shlex.join(["python", *self.command[1:]])


@dataclasses.dataclass
class _Started:
    job: Job
    number: int
    process: subprocess.Popen[bytes]
    begun: float
    cores: list[int]
    starts: int = 1


def run_all(jobs: Sequence[Job], parallel: int = 1) -> list[Job]:
    """Runs the jobs that are not done.

    Args:
        jobs: in the order in which they are started.
        parallel: how many at a time; more than one share the cores of a CPU evenly.

    Returns:
        Those that failed; for each a line is logged that says why.
    """
    waiting = [(number, job) for number, job in enumerate(jobs, 1) if not job.is_done()]
    log.info("%d runs, %d of them done", len(jobs), len(jobs) - len(waiting))
    free = _shares(parallel)
    running: list[_Started] = []
    failed: list[Job] = []
    try:
        while waiting or running:
            while waiting and free:
                number, job = waiting.pop(0)
                cores = free.pop(0)
                log.info("%d of %d: %s", number, len(jobs), job.name)
                running.append(_Started(job, number, _start(job, cores), time.monotonic(), cores))
            time.sleep(_POLL)
            for one in list(running):
                if one.process.poll() is None:
                    continue
                if one.process.returncode == STOPPED and one.starts < _STARTS:
                    one.process, one.starts = _start(one.job, one.cores), one.starts + 1
                    continue
                running.remove(one)
                free.append(one.cores)
                if not _succeeded(one, len(jobs)):
                    failed.append(one.job)
    finally:
        _stop(running)
    return failed


def _shares(parallel: int) -> list[list[int]]:
    """Cores of each of the runs beside each other; no cores: whatever there is."""
    if parallel == 1 or not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(parallel)]
    cores = sorted(os.sched_getaffinity(0))
    return [cores[part::parallel] for part in range(parallel)]


def _start(job: Job, cores: list[int]) -> subprocess.Popen[bytes]:
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / CONSOLE).open("ab") as output:
        # A session of its own: Ctrl-C reaches the runs as one SIGTERM from here, at which they save.
        command = [*_ending_with_parent(), *job.command]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    if cores:
        with contextlib.suppress(OSError):  # ended already
            os.sched_setaffinity(process.pid, cores)
    return process


def _ending_with_parent() -> list[str]:
    """What goes before a run's command: a killed sweep ends its runs too, or the next one would start them twice.

    By util-linux's program, as code between fork and exec may hang beside JAX's threads.
    """
    return ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


def _succeeded(one: _Started, count: int) -> bool:
    """Whether a run that has ended is done; logs its metrics, or the last line of its output."""
    job, code = one.job, one.process.returncode
    if code == 0 and job.is_done():
        job.finished()
        took = console.duration(time.monotonic() - one.begun)
        log.info("%d of %d done in %s: %s  %s", one.number, count, took, job.name, job.metrics())
        return True
    file = job.folder / CONSOLE
    why = (file.read_text(errors="replace").strip().splitlines() or ["said nothing"])[-1]
    message = "%d of %d FAILED (exit code %d): %s: %s (all it said: %s)"
    log.warning(message, one.number, count, code, job.name, why, file)
    return False


def _stop(running: list[_Started]) -> None:
    """When the sweep is stopped, its runs save and stop too."""
    for one in running:
        with contextlib.suppress(ProcessLookupError):
            one.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    for one in running:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.process.kill()


def python_command(config: str, folder: Path, overrides: Sequence[tuple[str, str]]) -> list[str]:
    """The command of a run."""
    fields = [f"--config.{field}={value}" for field, value in overrides]
    return [sys.executable, "-m", "m3ae_jax.main", f"--config={config}", f"--workdir={folder}", *fields]
