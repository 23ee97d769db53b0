"""What users see: the project's own lines on the console, everything else in the run's log file."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from m3ae_jax.errors import INTERRUPTED, STOPPED

log = logging.getLogger("m3ae_jax")

WIDTH = 100
"""Characters of a line in a table."""

_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_stderr = 2  # where errors go; another while `_stderr_held_back` holds back what comes there
_FIGURE = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?( ?%)?( ± .*)?|")


def quiet_environment() -> None:
    """Silences the start-up noise of TensorFlow and XLA; call before they are imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # also: bit-equal results from run to run
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def exit_on_signals() -> None:
    """SIGTERM ends the program with the exit code for "start again", SIGINT with 130, until `stopping.Stop` listens."""
    signal.signal(signal.SIGTERM, _exit)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _exit)
    hook = sys.unraisablehook

    def try_again(lost: sys.UnraisableHookArgs) -> None:
        # What is raised in a collector's callback or a `__del__` is dropped: the exit too, and the run went on.
        if isinstance(lost.exc_value, _Terminated):
            number = signal.SIGINT if lost.exc_value.code == INTERRUPTED else signal.SIGTERM
            signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        elif isinstance(lost.exc_value, Exception):
            # As of each array of a save that a full disk stopped. Nobody can act on it: it goes to the log file alone.
            what = (lost.exc_type, lost.exc_value, lost.exc_traceback)
            logging.getLogger("background").warning(lost.err_msg or "Exception ignored", exc_info=what)
        else:
            hook(lost)

    sys.unraisablehook = try_again


class _Terminated(SystemExit):
    """Not an Exception, which a library might catch."""


def _exit(number: int, frame: FrameType | None) -> None:
    del frame
    code, line = ending(number)
    atexit.unregister(tell)
    atexit.register(tell, line)
    raise _Terminated(code)


def ending(number: int) -> tuple[int, str]:
    """Exit code and last line of a program that a signal ends where nothing is lost by it."""
    if number == signal.SIGINT:
        return INTERRUPTED, "error: interrupted; the same command goes on from the last checkpoint"
    return STOPPED, "stopped outside the training steps; the same command goes on"


def tell(line: str) -> None:
    """Writes a line from any thread: an error to standard error, even where that is held back, all else to output."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(_stderr if line.startswith("error: ") else 1, f"{line}\n".encode())


def leave(code: int) -> NoReturn:
    """Ends the program without waiting for its threads: those of a failed save would hold it for five minutes."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def use_huge_pages() -> None:
    """Starts the program anew with glibc's malloc on huge pages, unless the user has set its tunables.

    XLA's CPU back end takes and returns one large buffer a step; its page faults are a
    good part of a small model's step. glibc reads the setting only when a process starts. A signal that comes
    meanwhile is followed in the new program.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        os.execv(sys.executable, sys.orig_argv)


def start_logging() -> None:
    """Sends the project's lines to standard output, warnings of other libraries nowhere (until `log_to`)."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    logging.raiseExceptions = False  # a log file on a full disk is no reason for a stack trace a line
    log.setLevel(logging.INFO)
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers = [logging.NullHandler()]


def only_errors() -> None:
    """Silences the project's lines below errors: another process of the run prints them."""
    log.setLevel(logging.ERROR)


def log_to(path: Path) -> None:
    """Appends everything, the libraries' lines too, to a file."""
    from absl import logging as absl_logging

    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    log.addHandler(handler)
    absl_logging.set_verbosity(absl_logging.INFO)


def import_tensorflow() -> None:
    """Imports TensorFlow without the lines its C++ prints before its log level is read, and without its GPUs.

    Raises:
        ImportError: it is not installed, or broken; then with all that it printed.
    """
    with _stderr_held_back():
        import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # the accelerator is JAX's


@contextlib.contextmanager
def _stderr_held_back() -> Iterator[None]:
    """Holds back standard error of this process, native code included; shows it if the block fails.

    A signal that ends the program in it is no failure.
    """
    global _stderr
    sys.stderr.flush()
    saved = _stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except Exception:
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            _stderr = 2
            os.close(saved)


def python() -> str:
    """The name of this Python for a shell: its path, unless ``python`` is in its environment, as of an active one."""
    found = shutil.which("python")
    same = found is not None and Path(found).absolute().parent == Path(sys.executable).parent
    return "python" if same else shlex.quote(sys.executable)


def table(rows: Iterable[Sequence[object]], heads: Sequence[str] = ()) -> str:
    """Formats rows as aligned columns, within `WIDTH` characters: numbers to the right, long cells over several lines.

    A table with more columns than fit becomes a block for each row, a line ``head  cell`` for each of its columns.

    Args:
        rows: as many cells in each.
        heads: of the columns; none for names and values.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    whole = [list(heads), *cells] if heads else cells
    widths = _fitting(whole) if heads else _with_narrow_end(whole)
    if not widths:
        blocks = [[pair for pair in zip(heads, row, strict=True) if pair[1]] for row in cells]
        return "\n\n".join(map(table, blocks))
    right = [bool(heads) and all(_FIGURE.fullmatch(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = [_lines(row, widths, right or [False] * len(widths)) for row in whole]
    if heads:
        lines.insert(1, ["  " + "  ".join("-" * width for width in widths)])
    return "\n".join(itertools.chain.from_iterable(lines))


def readable(text: str) -> str:
    """A text for the console: each Markdown table in it as a `table`, all other lines wrapped at `WIDTH`."""
    parts: list[str] = []
    for is_table, group in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        lines = list(group)
        if is_table and len(lines) > 1:
            heads, _, *rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines]
            parts.append(table(rows, heads))
        else:
            parts += [part for line in lines for part in _wrapped(line, WIDTH)]
    return "\n".join(parts)


def _fitting(rows: list[list[str]]) -> list[int]:
    """Widths with which the columns fit the console, none if words would be cut.

    The loosest is made narrower: first as far as its head alone is on more lines, then its cells too.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = [max((len(word) for cell in column for word in cell.split()), default=0) for column in columns]
    cells = [max(word, *map(len, column[1:]), 0) for word, column in zip(words, columns, strict=True)]
    room = WIDTH - 2 * len(widths)
    if sum(words) > room:
        return []
    for least in (cells, words):
        loose = [width - low for width, low in zip(widths, least, strict=True)]
        while sum(widths) > room and max(loose) > 0:
            narrower = loose.index(max(loose))
            widths[narrower] -= 1
            loose[narrower] -= 1
    return widths


def _with_narrow_end(rows: list[list[str]]) -> list[int]:
    """Widths of columns of which the last alone is made narrower."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [*widths[:-1], min(widths[-1], max(WIDTH - 2 * len(widths) - sum(widths[:-1]), 20))] if widths else []


def _lines(row: list[str], widths: list[int], right: list[bool]) -> list[str]:
    columns = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
    lines = []
    for parts in itertools.zip_longest(*columns, fillvalue=""):
        padded = [p.rjust(w) if r else p.ljust(w) for p, w, r in zip(parts, widths, right, strict=True)]
        lines.append(("  " + "  ".join(padded)).rstrip())
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    indent = " " * (len(text) - len(text.lstrip()))
    return textwrap.wrap(text, max(width, 1), break_on_hyphens=False, subsequent_indent=indent) or [""]


def duration(seconds: float) -> str:
    """Formats seconds as ``3h12m``, ``4m05s`` or ``12s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
