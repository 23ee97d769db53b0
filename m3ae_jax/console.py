"""What users see: the project's own lines on the console, everything else in the run's log file."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from m3ae_jax.errors import STOPPED

log = logging.getLogger("m3ae_jax")


def quiet_environment() -> None:
    """Silences the start-up noise of TensorFlow and XLA; call before they are imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # also: bit-equal results from run to run
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def exit_on_sigterm() -> None:
    """SIGTERM ends the program with the exit code for "start again"; the training loop puts its own handler over it."""
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    hook = sys.unraisablehook

    def try_again(lost: sys.UnraisableHookArgs) -> None:
        # What is raised in a collector's callback or a `__del__` is dropped: the exit too, and the run went on.
        if isinstance(lost.exc_value, _Terminated):
            atexit.unregister(_say)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            hook(lost)

    sys.unraisablehook = try_again


class _Terminated(SystemExit):
    """Not an Exception, which a library might catch."""


def _exit(number: int, frame: FrameType | None) -> None:
    del number, frame
    atexit.register(_say)
    raise _Terminated(STOPPED)


def _say() -> None:
    print("stopped outside the training steps; the same command goes on", flush=True)


def leave(code: int) -> NoReturn:
    """Ends the program without waiting for its threads: those of a failed save would hold it for five minutes."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def use_huge_pages() -> None:
    """Starts the program anew with glibc's malloc on huge pages, unless the user has set its tunables.

    XLA's CPU back end takes and returns one large buffer a step; its page faults are a
    good part of a small model's step. glibc reads the setting only when a process starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
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
    sys.stderr.flush()
    saved = os.dup(2)
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
            os.close(saved)


def table(rows: list[tuple[str, object]]) -> str:
    """Formats rows as aligned ``name  value`` lines."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def duration(seconds: float) -> str:
    """Formats seconds as ``3h12m``, ``4m05s`` or ``12s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
