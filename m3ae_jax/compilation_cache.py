"""JAX's compilation cache, shared by all runs: a program that was compiled before starts without compiling.

What is cached is code, so it lies in a folder of the user's that no other user may write to, never in a run's folder.
JAX's own settings come first: ``JAX_COMPILATION_CACHE_DIR`` for another folder, ``JAX_ENABLE_COMPILATION_CACHE=false``
for none. A run of several processes takes none by itself: JAX lets the first of them alone write, and the others would
compile while it reads, unless all share the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import stat
import time
from pathlib import Path

_DAYS = 30
"""Days after which a file is removed; a program still in use is then compiled anew."""


def use() -> None:
    """Sets the cache up, for this process and those it starts; call before jax is imported.

    A folder that cannot be made, or that others may write to, is not used.
    """
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):  # the latter: there is no home
        ours = _home() / "m3ae_jax"
        folder = ours / _machine()
        ours.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        if all(_private(part) for part in (folder, ours)) and all(_safe(part) for part in ours.parents):
            _tidy(ours)
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def _home() -> Path:
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # By the specification of these folders a relative path is to be ignored.
    return (named if named.is_absolute() else Path.home() / ".cache").resolve()


def _private(folder: Path) -> bool:
    """Whether this is a folder, no link, that its owner, this user, alone may write to."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _safe(folder: Path) -> bool:
    """Whether nobody but this user and root could put another folder in the place of one within."""
    status = folder.lstat()
    protected = not status.st_mode & 0o022 or bool(status.st_mode & stat.S_ISVTX)
    return status.st_uid in (0, os.getuid()) and (protected or _own_group_alone(status))


def _own_group_alone(status: os.stat_result) -> bool:
    """Whether a folder that its group may write to is of a group that carries the user's own number.

    So many systems set up their users, with the umask 0002.
    """
    return not status.st_mode & 0o002 and status.st_uid == os.getuid() and status.st_gid == status.st_uid


def _machine() -> str:
    """A name for this kind of processor: a home may be shared, and what is compiled for one may crash another."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
        return hashlib.sha256("\n".join(features).encode()).hexdigest()[:16]
    return platform.machine()


def _tidy(ours: Path) -> None:
    # By the time of writing, for many file systems record no time of reading.
    old = time.time() - _DAYS * 24 * 3600
    for file in ours.glob("*/*-cache"):
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < old:
                file.unlink()
