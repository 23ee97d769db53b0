"""The end of a program before all is done: asked for by SIGTERM or SIGINT, or because a fellow process failed for good.

Nothing here imports JAX: it listens from the first moments of a start on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

import m3ae_jax.console as console
from m3ae_jax.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""A preemption or a time limit; Ctrl-C."""

NOW = -1
"""Proposed instead of a boundary by a process that loses nothing by ending at once."""

_POLL = 0.25  # seconds between two looks at what the fellows say
_PATIENCE = 5.0  # seconds: for a save to end after a fellow has ended, and for `at_end`
_TWICE = 0.5  # seconds within which a second SIGINT is the same one, as a terminal sends it to parent and child


class Fellows(Protocol):
    """The other processes of a run (`m3ae_jax.parallel.processes.Notices`)."""

    def ask_to_stop(self) -> None:
        """Lets all know that this process was asked to stop."""

    def asked_to_stop(self) -> bool:
        """Whether one was."""

    def agree(self, boundary: int) -> int:
        """The last boundary that a process proposes; `NOW` if one of them ends at once."""

    def fail(self, code: int, line: str) -> None:
        """Lets all know that this process failed for good."""

    def failure(self) -> tuple[int, str] | None:
        """Exit code and line of the first process that failed for good."""

    def depart(self, code: int) -> None:
        """Lets all know that this process ends with this code; process 0, through which they speak, waits for them."""


class Stop:
    """Follows requests to stop: at once wherever nothing would be lost, else at a boundary of the training loop.

    At once means from a thread, so also while a compiler or a library works in the main one. Between `hold` and
    `release` there are steps that no checkpoint has yet: the loop asks `at_boundary`, and all processes of a run stop
    at the same one. A second SIGINT ends the program in any case.

    A program calls `listen`, and all its life is meant. Without that, as in a notebook, only signals between `hold` and
    `release` are followed, and all others stay the caller's.
    """

    def __init__(self) -> None:
        self.requested = False
        self._lock = threading.Lock()
        self._held = self._listens = self._leaving = False
        self._requested_at = 0.0
        self._boundary = 0  # how many the loop has passed
        self._target = 0
        self._agreed = threading.Event()
        self._over = threading.Event()
        self._fellows: Fellows | None = None
        self._watcher: threading.Thread | None = None
        self._at_end: list[Callable[[], None]] = []
        self._before: dict[int, Any] = {}

    # --- for programs

    def listen(self) -> None:
        """Follows SIGTERM and SIGINT from now on; call in the main thread, after any fork."""
        self._listens = True
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        # Python calls its handlers between two instructions of the main thread, but writes here at once.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()

    def meet(self, fellows: Fellows) -> None:
        """Stops and fails together with these; call once."""
        self._fellows = fellows
        self._watcher = threading.Thread(target=self._watch, args=(fellows,), name="fellows", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Does not look at the fellows any more; before the program ends, or JAX aborts it."""
        self._over.set()
        if self._watcher:
            self._watcher.join()
        self._fellows = None

    def fail(self, code: int, line: str) -> NoReturn:
        """Ends the program for good with this exit code, and all its fellows too, which print the line."""
        with self._lock:
            self._leaving = True
        if self._fellows:
            self._fellows.fail(code, line)
            self._fellows.depart(code)
        console.leave(code)

    def wait_for_news(self) -> None:
        """Waits a moment for a fellow's own account, after an error that it may have caused by its end.

        Does not return if there is one: the program is ending by it.
        """
        time.sleep(8 * _POLL)
        if self._fellows and (failure := self._fellows.failure()):
            self._leave(*failure)
        with self._lock:
            leaving = self._leaving
        if leaving:  # in another thread
            threading.Event().wait()

    # --- for the loop

    def at_end(self, action: Callable[[], None]) -> None:
        """Calls this before the program is ended at once; it may take `_PATIENCE` seconds, and may fail."""
        self._at_end.append(action)

    def hold(self) -> None:
        """From now on there is something to lose."""
        with self._lock:
            self._held = True
        if not self._listens:
            self._before = {number: signal.signal(number, self._set) for number in SIGNALS}

    def release(self) -> bool:
        """From now on there is nothing to lose, and requests are followed at once; whether there was one before."""
        with self._lock:
            self._held = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        return self.requested

    @contextlib.contextmanager
    def released(self, step: int) -> Iterator[None]:
        """A context, between `hold` and `release`, in which there is nothing to lose.

        Raises:
            Stopped: there was a request before; `step` is saved.
        """
        if self.release():
            raise stopped_at(step)
        yield
        self.hold()

    def at_boundary(self) -> bool:
        """Whether to stop here; the same in all processes, which must come here equally often."""
        with self._lock:
            self._boundary += 1
            if not self.requested:
                return False
        self._agreed.wait()
        return self._boundary >= self._target

    # --- its threads

    def _set(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._fellows:
            threading.Thread(target=self._follow, args=(number,), name="stop", daemon=True).start()
        else:
            self.requested = True
            self._agreed.set()

    def _read(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] in SIGNALS:
                threading.Thread(target=self._follow, args=(number[0],), name="stop", daemon=True).start()

    def _watch(self, fellows: Fellows) -> None:
        while not self._over.wait(_POLL):
            if failure := fellows.failure():
                self._leave(*failure)
            elif not self.requested and fellows.asked_to_stop():
                self._follow(signal.SIGTERM)

    def _follow(self, number: int) -> None:
        """A request, of this process or of a fellow."""
        with self._lock:
            again, now = self.requested, time.monotonic()
            if again and now - self._requested_at < _TWICE:
                return
            at_once = not self._held or (again and number == signal.SIGINT)
            proposal = NOW if at_once else self._boundary + 1
            self.requested, self._requested_at = True, now if not again else self._requested_at
        if again and not at_once:
            return
        target = proposal
        if self._fellows and not again:
            self._fellows.ask_to_stop()
            target = self._fellows.agree(proposal)
        if target == NOW:
            self._await_release(0.0 if at_once else _PATIENCE)
            self._leave(*console.ending(number))
        else:
            self._target = target
            self._agreed.set()

    def _await_release(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._held and time.monotonic() < deadline:
            time.sleep(_POLL / 10)

    def _leave(self, code: int, line: str) -> None:
        """Ends the program, once."""
        with self._lock:
            if self._leaving:
                return
            self._leaving = True
        acting = threading.Thread(target=self._act, daemon=True)
        acting.start()
        acting.join(_PATIENCE)
        console.tell(line)
        if self._fellows:
            self._fellows.depart(code)
        console.leave(code)

    def _act(self) -> None:
        for action in self._at_end:
            with contextlib.suppress(Exception):
                action()


def stopped_at(step: int) -> Stopped:
    """What a run raises that was asked to stop and has saved this step."""
    return Stopped(f"stopped at step {step}, saved; the same command goes on")
