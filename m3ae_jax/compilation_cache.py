"""JAX's compilation cache, kept between runs: a program that was compiled before starts without compiling.

What is cached is code, so it lies in a folder of the user's that no other user may write to, never in a run's folder.
JAX's own settings come first: ``JAX_COMPILATION_CACHE_DIR`` for another folder, ``JAX_ENABLE_COMPILATION_CACHE=false``
for none.
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
"""After so long without use a file is removed."""


def use() -> None:
    """Sets it up, for this process and those it starts; call before jax is imported.

    A folder that cannot be made, or that others may write to, is not used.
    """
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "m3ae_jax" / _machine()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            _tidy(folder)
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def _machine() -> str:
    """A name for this kind of processor: a home may be shared, and what is compiled for one may crash another."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
    return platform.machine()


def _tidy(folder: Path) -> None:
    # By the time of the last change, for many file systems keep no time of the last reading: what is still in use is
    # compiled anew once a month.
    old = time.time() - _DAYS * 24 * 3600
    for file in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < old:
                file.unlink()
