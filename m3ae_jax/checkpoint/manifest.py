"""Which checkpoints are whole: each lists the size and the SHA-256 sum of its files, checked before it is used.

Orbax restores most flipped bits without a word. The manifest is written last, when every process's files are in
place, so a checkpoint without one was never finished. It also says of which step and of which run the checkpoint is,
as a folder can be renamed, copied or exchanged. A run is known by a random number that lies beside its checkpoints;
where there is none, as beside a checkpoint that was copied alone, any run's is taken.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from m3ae_jax.atomic import write_text
from m3ae_jax.errors import UserError

NAME = "checksums.json"
RUN = "run_id"
FORMAT = 7
"""Of the manifest; 1 knew no step and no run. A flipped bit in the digit 7 makes no larger one: what has a larger one
was made by a newer program."""

_THREADS = 8  # hashing lets go of the GIL
_SHOWN = 3  # files named in one line
_SMALL = 2**20  # bytes: all that is parsed when a folder of checkpoints is opened is smaller

_Files = dict[str, dict[str, int | str]]


def step_of(name: str) -> int | None:
    """The step whose checkpoint has this name; None if none has, as ``7.damaged``, ``007`` and ``²``."""
    return int(name) if re.fullmatch("0|[1-9][0-9]{0,8}", name) else None


def steps(folder: Path) -> list[int]:
    """The steps that have a folder, finished or not, newest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = ((step_of(path.name), path) for path in paths)
    return sorted((step for step, path in found if step is not None and path.is_dir()), reverse=True)


def finished(folder: Path) -> list[int]:
    """The steps that have a manifest, newest first; their files are not checked."""
    return [step for step in steps(folder) if (folder / str(step) / NAME).exists()]


def run_of(folder: Path) -> str:
    """The run whose checkpoints lie in a folder; "" if nothing says it that can be read."""
    try:
        text = (folder / RUN).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    return text if re.fullmatch("[0-9a-f]{32}", text) else ""


def claim(folder: Path) -> str:
    """As `run_of`; where nothing says it, it is written down: that of most of the checkpoints, or a new one.

    Raises:
        OSError: the storage does not do it.
    """
    run = run_of(folder)
    if not run:
        runs = collections.Counter(filter(None, (_run(folder / str(step)) for step in finished(folder))))
        run = runs.most_common(1)[0][0] if runs else uuid.uuid4().hex
        write_text(folder / RUN, run + "\n")
    return run


def _run(checkpoint: Path) -> str:
    """The run that a manifest names; "" if it names none."""
    try:
        return str(_read(checkpoint / NAME).get("run", ""))
    except (OSError, _Damaged):
        return ""


def write(checkpoint: Path) -> None:
    """Brings all files of a checkpoint safely to disk and writes its manifest, at once or not at all.

    Raises:
        OSError: the storage does not do it.
    """
    names = sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file() and p.name != NAME)
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(lambda name: _entry(checkpoint / name), names))
    _save(checkpoint, dict(zip(names, entries, strict=True)))


def _save(checkpoint: Path, files: _Files) -> None:
    fresh = checkpoint / (NAME + ".tmp")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(_text({"step": int(checkpoint.name), "run": claim(checkpoint.parent), "files": files}))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(checkpoint / NAME)


def upgrade(checkpoint: Path) -> bool:
    """Gives a whole manifest of format 1 its step and run; whether it was one.

    Raises:
        OSError: the storage does not do it.
    """
    stored = _read(checkpoint / NAME)
    if "step" in stored:
        return False
    _save(checkpoint, stored["files"])
    return True


def problems(checkpoint: Path, *, large: bool = True) -> list[str]:
    """What is wrong with a checkpoint, one entry a file; empty if it is whole.

    Sizes are compared first; only where all fit are files read. Files that the manifest does not know are no problem.

    Args:
        checkpoint: its folder.
        large: read the large files too, which hold nothing but arrays.

    Raises:
        UserError: a newer program made it.
    """
    try:
        stored = _read(checkpoint / NAME)
    except FileNotFoundError:
        return [f"{NAME}: missing (it was never finished, or the file was lost)"]
    except OSError as error:
        return [f"{NAME}: {_reason(error)}"]
    except _Damaged:
        return [f"{NAME}: damaged"]
    if wrong := _misplaced(stored, checkpoint):
        return [f"{NAME}: {wrong}"]
    files: _Files = stored["files"]
    for contents in (False, True):
        names = [name for name, entry in files.items() if large or not contents or int(entry["bytes"]) <= _SMALL]
        with ThreadPoolExecutor(_THREADS) as pool:
            checks = [pool.submit(_problem, checkpoint / name, name, files[name], contents) for name in names]
        if wrong_files := [problem for check in checks if (problem := check.result())]:
            return wrong_files
    return []


def _misplaced(stored: Mapping[str, Any], checkpoint: Path) -> str:
    """What a manifest says against the place in which its checkpoint lies; "" if nothing."""
    if "step" in stored and str(stored["step"]) != checkpoint.name:
        return f"it is the checkpoint of step {stored['step']}, and its folder was renamed or copied"
    run = run_of(checkpoint.parent)
    if run and stored.get("run", run) != run:
        return f"it is a checkpoint of another run ({str(stored['run'])[:8]}; here is {run[:8]})"
    return ""


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


def _text(content: Mapping[str, Any]) -> str:
    """A manifest, with a sum of its own."""
    whole = {"format": FORMAT, **content}
    return json.dumps({**whole, "sha256": _own_sum(whole)}, indent=1, sort_keys=True) + "\n"


def _text_of_format_1(files: _Files) -> str:
    whole = {"format": 1, "sha256_of_files": _own_sum(files), "files": files}
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"


class _Damaged(Exception):
    """A manifest that is not as it was written."""


def _own_sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """A whole manifest: ``files``, and but in format 1 ``step`` and ``run``.

    Raises:
        _Damaged: as said.
        OSError: it cannot be read.
        UserError: a newer program wrote it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        stored = json.loads(text)
        if isinstance(stored["format"], int) and stored["format"] > FORMAT:
            raise UserError(
                f"checkpoint {path.parent} was made by a newer program (its {NAME} is of format {stored['format']}, "
                f"this one reads up to {FORMAT}): update m3ae_jax"
            )
        first = stored["format"] == 1
        content = {name: stored[name] for name in (("files",) if first else ("step", "run", "files"))}
        expected = _text_of_format_1(content["files"]) if first else _text(content)
        whole = text == expected and all(map(_is_entry, content["files"].items()))
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Damaged from error
    if not whole:
        raise _Damaged
    return content


def _is_entry(item: tuple[str, Any]) -> bool:
    name, entry = item
    return _is_within(name) and isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)


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
