"""Files that take the place of others: a reader sees the old one or the new one, and nothing is overwritten."""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end; on an error nothing is left of it.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unique over hosts that share a disk, and (unlike tempfile's) as readable to others as any new file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old one or the new one, never a part.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def free(path: Path) -> Path:
    """`path`, or if something is there ``path.2`` and so on, the first that is free."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return next(place for place in itertools.chain((path,), numbered) if not os.path.lexists(place))


def set_aside(path: Path, ending: str) -> Path:
    """Renames what is there to a free name with an ending; returns that.

    Raises:
        OSError: the folder cannot be written.
    """
    aside = free(path.with_name(path.name + ending))
    path.rename(aside)
    return aside
