"""One process of a run works in a child, so that its parent can report in one line how it ended.

JAX aborts a process, with a page of stack traces, once process 0 is gone or another has been silent for long; inside
the process that can be neither prevented nor caught. (Its option `missed_heartbeat_callback` cannot be used from
Python: it ends in `std::bad_cast`.)
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import re
import signal
import sys
import threading

from m3ae_jax.errors import LOST, MISTAKE, STOPPED

_COORDINATION = re.compile(rb"coordination_service|preemption_|JAX distributed service detected fatal errors")
# Gloo logs, and has no setting to stop it. It writes a line in pieces, so that lines of two threads can mix.
_GLOO = re.compile(
    rb"(\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d+|\s)+"
)
_LAST_LINES = 1.0  # seconds for them to come through
_PR_SET_PDEATHSIG = 1

_verdict: int | None = None  # in a child: where it writes the code with which it is about to end


def supervise() -> None:
    """Returns in a child, which does the work; this process ends when the child has, with its exit code.

    SIGTERM and SIGINT are passed on; the child is killed if this process is. Call before there are threads.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    global _verdict
    reader, writer = os.pipe()
    verdict, _verdict = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        os.close(reader)
        os.close(verdict)
        os.dup2(writer, 2)
        os.close(writer)
        _die_with(parent)
        return
    os.close(writer)
    os.close(_verdict)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _pass_on(child, number))
    held: list[bytes] = []
    console = threading.Thread(target=_forward, args=(reader, held), daemon=True)
    console.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    console.join(_LAST_LINES)
    os.set_blocking(verdict, False)  # a process of the child's may have the other end still
    announced = b""
    with contextlib.suppress(BlockingIOError):
        announced = os.read(verdict, 1)
    _end(code, held, announced[0] if announced else None)


def announce(code: int) -> None:
    """Lets the parent, if there is one, know the exit code of this process, before JAX may abort it on its way out."""
    if _verdict is not None:
        os.write(_verdict, bytes([code]))


def is_of_gloo(line: bytes) -> bool:
    """Whether a line of the console consists of what Gloo logs on connecting, in any order."""
    return _GLOO.fullmatch(line) is not None


def _forward(reader: int, held: list[bytes]) -> None:
    """Shows the child's standard error as it comes; holds it back from JAX's coordination's first line on."""
    with os.fdopen(reader, "rb") as lines:
        for line in lines:
            if is_of_gloo(line):
                continue
            if held or _COORDINATION.search(line):
                held.append(line)
            else:
                _show(line)


def _show(text: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, text)


def _pass_on(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before that
        os._exit(STOPPED)


def _end(code: int, held: list[bytes], announced: int | None) -> None:
    sys.stdout.flush()
    text = b"".join(held)
    aborted = code == -signal.SIGABRT and _COORDINATION.search(text)
    if aborted and announced is None:
        _show(f"error: {LOST}\n".encode())
        os._exit(STOPPED)
    if aborted and announced is not None:
        code = announced
    if aborted or code in (STOPPED, MISTAKE):
        _show(b"".join(line for line in held if line.startswith(b"error: ")))
        os._exit(code)
    _show(text)
    if code >= 0:
        os._exit(code)
    faulthandler.disable()
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
