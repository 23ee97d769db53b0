"""Examples that lie in several parts (files, slices of files, row groups), numbered one part after the other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import numpy as np

from m3ae_jax.data.sources.base import Record
from m3ae_jax.data.sources.index import IndexReport, Tally
from m3ae_jax.errors import UserError

_PACKED = r"\.(gz|bz2|xz|zst|zip|part|partial|tmp|crdownload|download)"


class ConcatenatedSource:
    """A `base.Source` over parts; a format says how the records of one part are read.

    Attributes:
        modalities: as in `base.Source`.
        classes: as in `base.Source`.
        fingerprint: as in `base.Source`.
        report: how many examples there are, and what was left out.
    """

    modalities: tuple[str, ...]
    classes: tuple[str, ...] = ()
    fingerprint: str
    report: IndexReport
    _starts: np.ndarray

    def _number_examples(self, lengths: Iterable[int]) -> None:
        """Part p holds the examples `_starts[p]` to `_starts[p + 1]`."""
        self._starts = np.cumsum([0, *lengths], dtype=np.int64)

    def __len__(self) -> int:
        """Number of examples."""
        return int(self._starts[-1])

    def read(self, indices: np.ndarray) -> list[Record]:
        """Reads examples, in the order of `indices`; safe to call from several threads at once.

        Args:
            indices: `[n] int64`, each in `[0, len(self))`.

        Raises:
            OSError: a file cannot be read, or is another one than when it was opened.
        """
        indices = np.asarray(indices, np.int64)
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        records = [Record()] * len(indices)
        for part in np.unique(parts).tolist():
            places = np.flatnonzero(parts == part)
            part_records = self._read_part(part, indices[places] - self._starts[part])
            for place, record in zip(places.tolist(), part_records, strict=True):
                records[place] = record
        return records

    def _read_part(self, part: int, rows: np.ndarray) -> list[Record]:
        """The records of rows of a part, `[n] int64`, each counted from the part's first."""
        raise NotImplementedError


def path_parts(path: str) -> list[str]:
    """What a source's path names: one thing, or several separated by commas."""
    return [path] if os.path.exists(path) else [part.strip() for part in path.split(",")]


def ignore_beside(part: str, read: Iterable[str], ending: str, tally: Tally) -> None:
    """Counts what lies in a local folder beside the files that are read from it, but not what is hidden.

    What may hold examples, a compressed or unfinished file or a folder with files of the same ending, is left out; the
    rest is no example.

    Args:
        part: of the source's path; nothing is counted where it is no folder.
        read: the files.
        ending: of files of this format, as `files.expand` takes it.
        tally: counts.
    """
    folder = os.path.expanduser(part)
    names = {os.path.basename(file) for file in read}
    packed, alike = re.compile(rf"(?:{ending}){_PACKED}\Z|\.tgz\Z"), re.compile(rf"(?:{ending})\Z")
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        if name in names or name.startswith("."):
            continue
        if os.path.isdir(inner := os.path.join(folder, name)):
            if any(alike.search(inside.lower()) for inside in os.listdir(inner)):
                tally.add("folder of such files", name)
            else:
                tally.ignore("folder", name)
        elif packed.search(name.lower()):
            tally.add("compressed or unfinished file", name)
        else:
            tally.ignore(f"file {os.path.splitext(name)[1].lower() or 'without an ending'}", name)


def check_template(template: str, caption: str | None, label: str | None) -> None:
    """Refuses a template that makes no caption.

    Args:
        template: see `SourceOptions`; empty: none.
        caption: where the captions are; empty: there are none.
        label: where the classes are, likewise.

    Raises:
        UserError: there are captions already, or no classes.
    """
    if template and caption:
        raise UserError(f"data.*.template={template!r} is not read: the data have captions ({caption})")
    if template and not label:
        raise UserError(f"data.*.template={template!r} needs classes, and the data have none; name them with label_key")
