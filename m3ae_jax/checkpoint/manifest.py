"""Which checkpoints are whole: each lists the size and the SHA-256 sum of its files, checked before it is used.

Orbax restores most flipped bits without a word. The manifest is written last, when every process's files are in
place, so a checkpoint without one was never finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "checksums.json"
FORMAT = 1

_THREADS = 8  # hashing lets go of the GIL
_SHOWN = 3  # files named in one line

_Files = dict[str, dict[str, int | str]]


def steps(folder: Path) -> list[int]:
    """The steps that have a folder, finished or not, newest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(path.name) for path in paths if path.name.isdigit() and path.is_dir()), reverse=True)


def finished(folder: Path) -> list[int]:
    """The steps that have a manifest, newest first; their files are not checked."""
    return [step for step in steps(folder) if (folder / str(step) / NAME).exists()]


def write(checkpoint: Path) -> None:
    """Brings all files of a checkpoint safely to disk and writes its manifest, at once or not at all.

    Raises:
        OSError: the storage does not do it.
    """
    names = sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file() and p.name != NAME)
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(lambda name: _entry(checkpoint / name), names))
    fresh = checkpoint / (NAME + ".tmp")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(_text(dict(zip(names, entries, strict=True))))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(checkpoint / NAME)


def problems(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, one entry a file; empty if it is whole.

    Sizes are compared first; only where all fit is every file read. Files that the manifest does not know are no
    problem.
    """
    try:
        files = _read(checkpoint / NAME)
    except (ValueError, KeyError, TypeError, OSError) as error:
        return [f"{NAME}: {_reason(error) if isinstance(error, OSError) else 'damaged'}"]
    for contents in (False, True):
        with ThreadPoolExecutor(_THREADS) as pool:
            checks = [pool.submit(_problem, checkpoint / name, name, entry, contents) for name, entry in files.items()]
        if wrong := [problem for check in checks if (problem := check.result())]:
            return wrong
    return []


def summary(wrong: Iterable[str]) -> str:
    """What is wrong, in one line."""
    entries = list(wrong)
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return ", ".join(entries[:_SHOWN]) + more


def _entry(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # else a loss of power could leave the manifest without the files that it lists
    return {"bytes": path.stat().st_size, "sha256": _sum(path)}


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(files: _Files) -> str:
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"format": FORMAT, "sha256_of_files": own, "files": files}, indent=1, sort_keys=True) + "\n"


def _read(path: Path) -> _Files:
    text = path.read_text(encoding="utf-8")
    files: _Files = json.loads(text)["files"]
    if text != _text(files) or not all(_is_within(name) for name in files):
        raise ValueError
    return files


def _is_within(name: str) -> bool:
    """Whether a name leads to a file of the checkpoint, which may be somebody else's, and not to /dev/zero."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _problem(path: Path, name: str, entry: dict[str, int | str], contents: bool) -> str | None:
    """What is wrong with one file: its size, or with `contents` its SHA-256 sum."""
    try:
        if contents:
            return None if _sum(path) == entry["sha256"] else f"{name}: its content is not what was saved (SHA-256)"
        size, expected = path.stat().st_size, int(entry["bytes"])
    except OSError as error:
        return f"{name}: {_reason(error)}"
    return None if size == expected else f"{name}: {size:,} bytes instead of {expected:,}"


def _reason(error: OSError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
