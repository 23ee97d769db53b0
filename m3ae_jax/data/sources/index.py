"""An index of files, built once: where each record lies; checked against the files' sizes and times of change.

It is one file beside the data, or in a cache folder where that one cannot be written (a store such as ``gs://``
included). It holds each file's size and time of change, so only new and changed files are scanned again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m3ae_jax.atomic import replacing
from m3ae_jax.data.sources.files import is_remote, open_file
from m3ae_jax.errors import UserError

_SCAN_THREADS = 4  # for slow disks; with more, and data at hand, threads stand in each other's way

_log = logging.getLogger("m3ae_jax")


@dataclass(frozen=True)
class IndexReport:
    """How many examples the files hold, and what was left out.

    Attributes:
        shards: number of files.
        examples: number of examples.
        skipped: how many were left out, by reason.
        samples: for each reason, the name of the first one left out, as `FILE:RECORD`.
    """

    shards: int
    examples: int
    skipped: dict[str, int]
    samples: dict[str, str]


@dataclass(frozen=True)
class Shard:
    """The index of one file.

    Attributes:
        size: bytes.
        mtime_ns: time of change, nanoseconds.
        rows: `[n, k] int64`, what its format needs to find each record.
        skipped: per reason the number left out and the name of the first.
        grouped: of tars: whether the members of every key are neighbours.
    """

    size: int
    mtime_ns: int
    rows: np.ndarray
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    grouped: bool = True


class Tally:
    """Counts what is left out of a file, or of several, with the first name per reason.

    Args:
        shard: the file's name, which is put before the names of its records.
    """

    def __init__(self, shard: str = "") -> None:
        self._prefix = f"{shard}:" if shard else ""
        self.skipped: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Counts `count` records like `name`."""
        self.merge({reason: (count, self._prefix + printable(name))})

    def merge(self, skipped: Mapping[str, tuple[int, str]]) -> None:
        """Adds the counts of another tally."""
        for reason, (count, sample) in skipped.items():
            before, first = self.skipped.get(reason, (0, sample))
            self.skipped[reason] = (before + count, first)

    def report(self, shards: int, examples: int) -> IndexReport:
        """These counts as a report on so many files and examples."""
        counts = {reason: count for reason, (count, _) in self.skipped.items()}
        return IndexReport(shards, examples, counts, {reason: sample for reason, (_, sample) in self.skipped.items()})


def printable(name: str) -> str:
    """`name` in one line that any log can take: file and member names are arbitrary bytes."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return text if text.isprintable() else ascii(text)[1:-1]


class Index:
    """Builds, saves and loads the index of a format.

    Args:
        kind: the format's name, for messages and file names.
        version: changes when the rows mean something else.
        columns: of a row.
        scan: indexes one file; raises `UserError` where it is none of this format.
        cache_dir: where an index goes that cannot be written beside its data (default ``$XDG_CACHE_HOME``, else
            ``~/.cache``; under it ``m3ae_jax/index/``).
    """

    def __init__(
        self, kind: str, version: int, columns: int, scan: Callable[[str], Shard], cache_dir: str | None = None
    ) -> None:
        self._kind, self._version, self._columns, self._scan = kind, version, columns, scan
        self._name = ".m3ae_jax_index.npz" if kind == "webdataset" else f".m3ae_jax_index_{kind}.npz"
        root = cache_dir or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self._cache = Path(root).expanduser() / "m3ae_jax" / "index"

    def shards(self, paths: list[str]) -> list[Shard]:
        """The index of each file, loaded from the folders' indices or made by scanning the file."""
        by_path: dict[str, Shard] = {}
        for folder in dict.fromkeys(os.path.dirname(path) for path in paths):
            names = [os.path.basename(path) for path in paths if os.path.dirname(path) == folder]
            by_name = self._folder_shards(folder, names)
            by_path |= {os.path.join(folder, name): by_name[name] for name in names}
        return [by_path[path] for path in paths]

    def fingerprint(self, paths: list[str], shards: list[Shard], *more: str) -> str:
        """Hash of base names, sizes and rows (not of times of change), so that two copies have the same."""
        digest = hashlib.sha256(f"{self._kind} {self._version}".encode())
        for path, shard in zip(paths, shards, strict=True):
            digest.update(json.dumps([os.path.basename(path), shard.size, len(shard.rows)]).encode())
            digest.update(shard.rows.astype("<i8").tobytes())
        for text in more:
            digest.update(text.encode())
        return digest.hexdigest()[:16]

    def _folder_shards(self, folder: str, names: list[str]) -> dict[str, Shard]:
        places = [self._cache / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}{self._name}"]
        if not is_remote(folder):
            places.insert(0, Path(folder, self._name))
        known: dict[str, Shard] = {}
        for place in places:
            known |= self._load(place, folder)
        missing = [name for name in names if name not in known]
        if not missing:
            return known
        began = time.monotonic()
        _log.info("%s: indexing %d files of %s (once)", self._kind, len(missing), folder)
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:
            paths = [os.path.join(folder, name) for name in missing]
            scan = self._scan if len(names) == 1 else self._scan_or_leave_out
            fresh = dict(zip(missing, pool.map(scan, paths), strict=True))
        known |= fresh
        saved = self._save(places, known)
        self._log_scanned(fresh, time.monotonic() - began, saved)
        return known

    def _load(self, place: Path, folder: str) -> dict[str, Shard]:
        """The files of an index that are still as they were; none where it cannot be read."""
        try:
            return self._loaded(place, folder)
        except FileNotFoundError:
            return {}
        except Exception as error:  # a damaged zip raises many kinds, and an index can be built again
            _log.warning("%s: the index %s cannot be read (%s) and is built anew", self._kind, place, error)
            return {}

    def _loaded(self, place: Path, folder: str) -> dict[str, Shard]:
        with open(place, "rb") as file, np.load(file, allow_pickle=False) as index:
            if int(index["version"]) != self._version or index["rows"].shape[1] != self._columns:
                return {}
            columns = zip(*(index[column].tolist() for column in ("sizes", "times", "grouped")), strict=True)
            names, skipped = json.loads(str(index["names"])), json.loads(str(index["skipped"]))
            rows = np.split(index["rows"], np.cumsum(index["counts"])[:-1])
        shards = {}
        for name, (size, mtime_ns, grouped), part, left_out in zip(names, columns, rows, skipped, strict=True):
            with contextlib.suppress(OSError):  # a file that is gone is not known
                if _size_and_time(os.path.join(folder, name)) == (size, mtime_ns):
                    reasons = {reason: (count, sample) for reason, (count, sample) in left_out.items()}
                    shards[name] = Shard(size, mtime_ns, part, reasons, grouped)
        return shards

    def _save(self, places: list[Path], shards: dict[str, Shard]) -> Path | None:
        """Writes the index to the first of `places` that can be written."""
        names, known = list(shards), list(shards.values())
        arrays = {
            "version": np.array(self._version),
            "names": np.array(json.dumps(names)),
            "sizes": np.array([shard.size for shard in known], np.int64),
            "times": np.array([shard.mtime_ns for shard in known], np.int64),
            "grouped": np.array([shard.grouped for shard in known], np.bool_),
            "counts": np.array([len(shard.rows) for shard in known], np.int64),
            "rows": np.concatenate([shard.rows for shard in known]),
            "skipped": np.array(json.dumps([shard.skipped for shard in known])),
        }
        for place in places:
            with contextlib.suppress(OSError):
                _write_atomically(place, arrays)
                return place
        return None

    def _scan_or_leave_out(self, path: str) -> Shard:
        """One bad file among others never ends a run."""
        try:
            return self._scan(path)
        except (UserError, FileNotFoundError, IsADirectoryError) as error:
            _log.warning("%s: left out: %s", self._kind, error)
            tally = Tally(os.path.basename(path))
            tally.add("unusable file", " ".join(str(error).split()))
            size, time_ns = (0, 0) if isinstance(error, OSError) else _size_and_time(path)
            return Shard(size, time_ns, np.zeros((0, self._columns), np.int64), tally.skipped)

    def _log_scanned(self, fresh: dict[str, Shard], seconds: float, saved: Path | None) -> None:
        where = saved or "nowhere: no folder can be written, so the next start indexes again"
        total = report(fresh.values())
        line = "%s: indexed %d files, %d examples in %.1f s, saved in %s"
        _log.info(line, self._kind, total.shards, total.examples, seconds, where)
        if total.skipped:
            _log.warning("%s: left out: %s", self._kind, skip_line(total))
        ungrouped = [name for name, shard in fresh.items() if not shard.grouped]
        if ungrouped:
            line = "%s: keys are not grouped in %d shards (e.g. %s): pictures and captions paired by key"
            _log.warning(line, self._kind, len(ungrouped), ungrouped[0])


def _size_and_time(path: str) -> tuple[int, int]:
    if is_remote(path):
        file = open_file(path)
        return file.size, file.mtime_ns
    now = os.stat(path)
    return now.st_size, now.st_mtime_ns


def _write_atomically(place: Path, arrays: dict[str, Any]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    # For root, as in most containers, the system lets this pass; what is marked read-only stays untouched.
    if not place.parent.stat().st_mode & 0o222:
        raise PermissionError(f"{place.parent} is read-only")
    with replacing(place) as fresh, open(fresh, "xb") as file:
        np.savez(file, **arrays)


def report(shards: Collection[Shard]) -> IndexReport:
    """The sum over files."""
    tally = Tally()
    for shard in shards:
        tally.merge(shard.skipped)
    return tally.report(len(shards), sum(len(shard.rows) for shard in shards))


def skip_line(total: IndexReport) -> str:
    """What was left out, in one line."""
    return ", ".join(f"{r} {n} (e.g. {total.samples[r]})" for r, n in sorted(total.skipped.items()))


def left_out(total: IndexReport) -> str:
    """What was left out, in brackets, as the end of an error message; empty where nothing was."""
    return f" (left out: {skip_line(total)})" if total.skipped else ""


def caption_rows(rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A row for each caption.

    Args:
        rows: `[n, k] int64`, of the records.
        counts: `[n] int64`, captions of each record; of a record without any there is one row still.

    Returns:
        `[m, k + 1] int64`: the record's row, then the caption's number among those of its record, from 0.
    """
    counts = np.maximum(counts, 1)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    return np.column_stack([np.repeat(rows, counts, axis=0), np.arange(len(firsts)) - firsts])
