"""Which checkpoints are whole: each lists the size and the SHA-256 sum of its files, checked before it is used.

Orbax restores most flipped bits without a word. The manifest is written last, when every process's files are in
place, so a checkpoint without one was never finished.
"""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Survey:
    """What of a folder's checkpoints can be used.

    Attributes:
        whole: the newest whole step; None if there is none.
        damaged: steps newer than `whole`, newest first, with what is wrong, one entry a file.
        unfinished: steps without a manifest.
        unlisted: no checkpoint of the folder has a manifest, as before manifests existed; then the newest counts as
            whole and none as unfinished.
    """

    whole: int | None
    damaged: dict[int, list[str]]
    unfinished: tuple[int, ...]
    unlisted: bool


def steps(folder: Path) -> list[int]:
    """The steps that have a folder, finished or not, newest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(p.name) for p in found if p.name.isdigit() and p.is_dir()), reverse=True)


def finished(folder: Path) -> list[int]:
    """The steps that have a manifest, newest first; their files are not looked at."""
    return [step for step in steps(folder) if (folder / str(step) / NAME).exists()]


def survey(folder: Path) -> Survey:
    """Checks the checkpoints in `folder` from the newest on, up to the first whole one."""
    every, listed = steps(folder), finished(folder)
    if every and not listed:
        return Survey(every[0], {}, (), unlisted=True)
    unfinished = tuple(step for step in every if step not in listed)
    damaged: dict[int, list[str]] = {}
    for step in listed:
        wrong = problems(folder / str(step))
        if not wrong:
            return Survey(step, damaged, unfinished, unlisted=False)
        damaged[step] = wrong
    return Survey(None, damaged, unfinished, unlisted=False)


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
    sizes = [_size_problem(checkpoint / name, name, int(entry["bytes"])) for name, entry in files.items()]
    if any(sizes):
        return list(filter(None, sizes))
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda item: _sum_problem(checkpoint / item[0], item[0], str(item[1]["sha256"])), files.items())
        return list(filter(None, sums))


def summary(wrong: Iterable[str]) -> str:
    """What is wrong, in one line."""
    entries = list(wrong)
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return ", ".join(entries[:_SHOWN]) + more


def _entry(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # else a loss of power could keep the manifest and lose what it lists
        total = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": total}


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


def _size_problem(path: Path, name: str, size: int) -> str | None:
    try:
        now = path.stat().st_size
    except OSError as error:
        return f"{name}: {_reason(error)}"
    return None if now == size else f"{name}: {now:,} bytes instead of {size:,}"


def _sum_problem(path: Path, name: str, total: str) -> str | None:
    try:
        with path.open("rb") as file:
            now = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{name}: {_reason(error)}"
    return None if now == total else f"{name}: its content is not what was saved (SHA-256)"


def _reason(error: OSError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
