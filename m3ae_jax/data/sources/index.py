"""An index of files, built once: where each record lies; checked against the files' sizes and times of change.

There is one file for each folder and format, in the user's cache or in ``data.index_dir``, which may be in a store such
as ``gs://``. It holds each file's size and time of change, so only new and changed files are scanned again, and what of
them is no example, so that every start can tell it. What a file held is remembered when it is damaged or gone later.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from m3ae_jax.atomic import replacing
from m3ae_jax.data.sources.files import is_remote, open_file, split_in, stamp, write_remote
from m3ae_jax.errors import UserError

_SCAN_THREADS = 4  # for slow disks; with more, and data at hand, threads stand in each other's way
_VERSION = 2  # of the file
_MOST_KINDS = 40  # of what is not used, by its own name; more are counted together
_OTHERS = "others"
_SHOWN_KINDS = 10
_MOST_CHARACTERS = 500  # of a name
UNUSABLE, DAMAGED_SHARD, GONE = "unusable file", "damaged shard", "file that is gone"
FEWER = "examples fewer than when it was indexed before"
LOST = (UNUSABLE, DAMAGED_SHARD, "damaged file", "empty file")
"""Reasons that count a file; where it is known how many examples it held, these."""

_log = logging.getLogger("m3ae_jax")


@dataclass(frozen=True)
class IndexReport:
    """How many examples the files hold, and what of them is no example.

    Attributes:
        shards: number of files.
        examples: number of examples.
        skipped: how many examples were left out, by reason; of a file that is damaged or gone as many as it held, as
            far as is known, else one.
        samples: for each reason, the name of the first one left out, as `FILE:RECORD`; of `unused` likewise.
        unused: what is there beside the examples and is not read, and how often: columns, fields, members, files.
    """

    shards: int
    examples: int
    skipped: dict[str, int]
    samples: dict[str, str]
    unused: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    """The index of one file.

    Attributes:
        size: bytes.
        mtime_ns: time of change, nanoseconds.
        rows: `[n, k] int64`, what its format needs to find each record.
        skipped: per reason the number left out and the name of the first.
        grouped: of tars: whether the members of every key are neighbours.
        unused: per kind of what is not read its number and the name of the first.
        held: examples that it is known to have held, if it is damaged.
    """

    size: int
    mtime_ns: int
    rows: np.ndarray
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    grouped: bool = True
    unused: dict[str, tuple[int, str]] = field(default_factory=dict)
    held: int = 0


class Tally:
    """Counts what of a file, or of several, is no example, with the first name of each kind.

    Args:
        shard: the file's name, which is put before the names of its records.

    Attributes:
        skipped: examples left out, by reason.
        unused: what is not read and is no example, as an ending, a column or a field.
    """

    def __init__(self, shard: str = "") -> None:
        self._prefix = f"{shard}:" if shard else ""
        self.skipped: dict[str, tuple[int, str]] = {}
        self.unused: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Counts `count` examples like `name` that are left out."""
        if count:
            self.merge({reason: (count, self._prefix + printable(name))})

    def ignore(self, kind: str, name: str, count: int = 1) -> None:
        """Counts what is not read, though no example is lost by it, as ``column url``."""
        if count:
            self.merge({}, {printable(kind)[:80]: (count, self._prefix + printable(name))})

    def merge(
        self, skipped: Mapping[str, tuple[int, str]], unused: Mapping[str, tuple[int, str]] | None = None
    ) -> None:
        """Adds the counts of another tally."""
        for counts, more in ((self.skipped, skipped), (self.unused, unused or {})):
            for kind, (count, sample) in more.items():
                known = kind in counts or len(counts) < _MOST_KINDS
                before, first = counts.get(kind if known else _OTHERS, (0, sample))
                counts[kind if known else _OTHERS] = (before + count, first)

    def report(self, shards: int, examples: int) -> IndexReport:
        """These counts as a report on so many files and examples."""
        skipped, unused = ({k: count for k, (count, _) in kinds.items()} for kinds in (self.skipped, self.unused))
        samples = {kind: sample for kind, (_, sample) in (self.unused | self.skipped).items()}
        return IndexReport(shards, examples, skipped, samples, unused)


def printable(name: str) -> str:
    """`name` in one line that any log can take: file and member names are arbitrary bytes."""
    text = name[:_MOST_CHARACTERS].encode("utf-8", "backslashreplace").decode()
    return text if text.isprintable() else ascii(text)[1:-1]


class Index:
    """Builds, saves and loads the index of a format.

    Args:
        kind: the format's name, for messages and file names.
        version: changes when the rows mean something else.
        columns: of a row.
        scan: indexes one file; raises `UserError` where it is none of this format.
        folder: of the index files, or one of a store; empty: ``$XDG_CACHE_HOME/m3ae_jax/index``, else
            ``~/.cache/m3ae_jax/index``.
    """

    def __init__(self, kind: str, version: int, columns: int, scan: Callable[[str], Shard], folder: str = "") -> None:
        self._kind, self._version, self._columns, self._scan = kind, version, columns, scan
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "m3ae_jax", "index")
        self._gone: dict[str, Shard] = {}
        self._folder = folder if is_remote(folder) else os.path.abspath(os.path.expanduser(folder or cache))

    @property
    def _file_version(self) -> str:
        return f"{self._version}.{_VERSION}"

    def shards(self, paths: list[str]) -> list[Shard]:
        """The index of each file, loaded from the folders' indices or made by scanning the file."""
        by_path: dict[str, Shard] = {}
        for folder in dict.fromkeys(os.path.dirname(path) for path in paths):
            names = [os.path.basename(path) for path in paths if os.path.dirname(path) == folder]
            by_name = self._folder_shards(folder, names)
            by_path |= {os.path.join(folder, name): by_name[name] for name in names}
        return [by_path[path] for path in paths]

    def report(self, shards: Collection[Shard], beside: Tally | None = None) -> IndexReport:
        """The sum over files, with those that are gone since they were indexed.

        Args:
            shards: the files.
            beside: what else was counted when they were opened.
        """
        tally = Tally()
        for shard in (*shards, *self._gone.values()):
            tally.merge(shard.skipped, shard.unused)
        if beside is not None:
            tally.merge(beside.skipped, beside.unused)
        return tally.report(len(shards), _rows(shards))

    def fingerprint(self, paths: list[str], shards: list[Shard], *more: str) -> str:
        """Hash of base names, sizes and rows (not of times of change), so that two copies have the same."""
        digest = hashlib.sha256(f"{self._kind} {self._version}".encode())
        for path, shard in zip(paths, shards, strict=True):
            digest.update(json.dumps([os.path.basename(path), shard.size, len(shard.rows)]).encode())
            digest.update(shard.rows.astype("<i8").tobytes())
        for text in more:
            digest.update(text.encode())
        return digest.hexdigest()[:16]

    def _place(self, folder: str) -> str:
        """Where the index of a folder's files lies; of the same name on every host."""
        name = f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}_{self._kind}.npz"
        return f"{self._folder.rstrip('/')}/{name}"

    def _folder_shards(self, folder: str, names: list[str]) -> dict[str, Shard]:
        place = self._place(folder)
        stored = self._load(place)
        known = {name: shard for name, shard in stored.items() if _is_as_it_was(os.path.join(folder, name), shard)}
        gone = self._find_gone(folder, names, stored)
        self._gone |= {os.path.join(folder, name): shard for name, shard in gone.items()}
        missing = [name for name in names if name not in known]
        if missing:
            began = time.monotonic()
            _log.info("%s: indexing %d files of %s (once)", self._kind, len(missing), folder)
            with ThreadPoolExecutor(_SCAN_THREADS) as pool:
                paths = [os.path.join(folder, name) for name in missing]
                scan = self._scan if len(names) == 1 else self._scan_or_leave_out
                scanned = zip(missing, pool.map(scan, paths), strict=True)
                fresh = {name: _counting_lost(folder, name, shard, stored.get(name)) for name, shard in scanned}
            known |= fresh
            saved = self._save(place, stored | gone | known)
            self._log_scanned(fresh, time.monotonic() - began, place if saved else "")
        return known

    def _find_gone(self, folder: str, names: Collection[str], stored: Mapping[str, Shard]) -> dict[str, Shard]:
        """Files that were indexed and are not there any more: without rows, and counted.

        Nothing where others of their kind are there and were not named, so that they may belong to another set.
        """
        gone: dict[str, Shard] = {}
        splits = {split_in(name) for name in stored.keys() & set(names)}
        for name in sorted(stored.keys() - set(names)):
            shard = stored[name]
            if split_in(name) not in splits:
                continue
            with contextlib.suppress(OSError):
                stamp(os.path.join(folder, name))
                return {}
            if held := max(shard.held, len(shard.rows)):
                tally = Tally()
                tally.add(GONE, f"{name}, indexed earlier", held)
                gone[name] = replace(shard, rows=shard.rows[:0], skipped=tally.skipped, unused={}, held=held)
        return gone

    def _load(self, place: str) -> dict[str, Shard]:
        """What an index holds; nothing where it cannot be read."""
        try:
            return self._loaded(place)
        except FileNotFoundError:
            return {}
        except Exception as error:  # a damaged zip raises many kinds, and an index can be built again
            if not is_remote(place):
                _log.warning("%s: the index %s cannot be read (%s) and is built anew", self._kind, place, error)
            return {}

    def _loaded(self, place: str) -> dict[str, Shard]:
        if is_remote(place):
            file = open_file(place)
            source: Any = io.BytesIO(file.read(0, file.size))
        else:
            source = open(place, "rb")  # noqa: SIM115  # closed below
        with source, np.load(source, allow_pickle=False) as index:
            if str(index["version"]) != self._file_version:
                return {}
            table, ends = index["rows"], np.cumsum(index["counts"])
            if table.shape[1] != self._columns:
                return {}
            if ends[-1:].sum() != len(table):
                raise ValueError("its rows do not add up")
            numbers = zip(*(index[column].tolist() for column in ("sizes", "times", "grouped", "held")), strict=True)
            names, counts = json.loads(str(index["names"])), json.loads(str(index["counted"]))
        rows = np.split(table, ends[:-1])
        shards = {}
        for name, (size, mtime_ns, grouped, held), part, counted in zip(names, numbers, rows, counts, strict=True):
            skipped, unused = ({kind: (count, first) for kind, (count, first) in one.items()} for one in counted)
            shards[name] = Shard(size, mtime_ns, part, skipped, grouped, unused, held)
        return shards

    def _save(self, place: str, shards: dict[str, Shard]) -> bool:
        """Writes the index, where it can be written."""
        names, known = list(shards), list(shards.values())
        arrays = {
            "version": np.array(self._file_version),
            "names": np.array(json.dumps(names)),
            "sizes": np.array([shard.size for shard in known], np.int64),
            "times": np.array([shard.mtime_ns for shard in known], np.int64),
            "grouped": np.array([shard.grouped for shard in known], np.bool_),
            "held": np.array([shard.held for shard in known], np.int64),
            "counts": np.array([len(shard.rows) for shard in known], np.int64),
            "rows": np.concatenate([shard.rows for shard in known]),
            "counted": np.array(json.dumps([(shard.skipped, shard.unused) for shard in known])),
        }
        with contextlib.suppress(OSError):
            _write_atomically(place, arrays)
            return True
        return False

    def _scan_or_leave_out(self, path: str) -> Shard:
        """One bad file among others never ends a run."""
        try:
            return self._scan(path)
        except (UserError, FileNotFoundError, IsADirectoryError) as error:
            _log.warning("%s: left out: %s", self._kind, error)
            tally = Tally(os.path.basename(path))
            tally.add(UNUSABLE, " ".join(str(error).split()))
            size, time_ns = (0, 0) if isinstance(error, OSError) else stamp(path)
            return Shard(size, time_ns, np.zeros((0, self._columns), np.int64), tally.skipped)

    def _log_scanned(self, fresh: dict[str, Shard], seconds: float, saved: str) -> None:
        where = saved or f"nowhere: {self._folder} cannot be written (data.index_dir), so the next start indexes again"
        line = "%s: indexed %d files, %d examples in %.1f s, saved in %s"
        _log.info(line, self._kind, len(fresh), _rows(fresh.values()), seconds, where)
        ungrouped = [name for name, shard in fresh.items() if not shard.grouped]
        if ungrouped:
            line = "%s: keys are not grouped in %d shards (e.g. %s): pictures and captions paired by key"
            _log.warning(line, self._kind, len(ungrouped), ungrouped[0])


def _is_as_it_was(path: str, shard: Shard) -> bool:
    """Whether a file is there with the size and time of its index."""
    with contextlib.suppress(OSError):
        return stamp(path) == (shard.size, shard.mtime_ns)
    return False


def _counting_lost(folder: str, name: str, shard: Shard, before: Shard | None) -> Shard:
    """The index of a file; where a part of it is lost, the examples it held are counted, as far as they are known."""
    reason = next((reason for reason in LOST if reason in shard.skipped), None)
    earlier = max(before.held, len(before.rows)) if before else 0
    if reason is None:
        fewer = earlier - len(shard.rows)
        return replace(shard, unused=shard.unused | {FEWER: (fewer, name)}) if fewer > 0 else shard
    held = max(earlier, _said_to_hold(os.path.join(folder, name)))
    counted = sum(count for other, (count, _) in shard.skipped.items() if other != reason)
    lost = held - len(shard.rows) - counted
    if lost <= 0:
        return shard
    first = shard.skipped[reason][1]
    return replace(shard, skipped=shard.skipped | {reason: (lost, first)}, held=held)


def _said_to_hold(path: str) -> int:
    """Examples of a shard by what img2dataset writes beside it, ``00000_stats.json``; 0: not known."""
    try:
        file = open_file(f"{os.path.splitext(path)[0]}_stats.json")
        return max(int(json.loads(file.read(0, min(file.size, 2**20)))["successes"]), 0)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0


def _write_atomically(place: str, arrays: dict[str, Any]) -> None:
    if is_remote(place):
        data = io.BytesIO()
        np.savez(data, **arrays)
        return write_remote(place, data.getvalue())
    parent = Path(place).parent
    parent.mkdir(parents=True, exist_ok=True)
    # For root, as in most containers, the system lets this pass; what is marked read-only stays untouched.
    if not parent.stat().st_mode & 0o222:
        raise PermissionError(f"{parent} is read-only")
    with replacing(Path(place)) as fresh, open(fresh, "xb") as file:
        np.savez(file, **arrays)
    return None


def _rows(shards: Iterable[Shard]) -> int:
    return sum(len(shard.rows) for shard in shards)


def skip_line(total: IndexReport) -> str:
    """What was left out, in one line."""
    return _counted(total.skipped, total.samples)


def unused_line(total: IndexReport) -> str:
    """What is not read, in one line."""
    return _counted(total.unused, total.samples)


def _counted(kinds: Mapping[str, int], samples: Mapping[str, str]) -> str:
    shown = sorted(sorted(kinds.items(), key=lambda item: -item[1])[:_SHOWN_KINDS])
    more = [f"{len(kinds) - len(shown)} kinds more"] * (len(kinds) > len(shown))
    return ", ".join([*(f"{kind} {count:,} (e.g. {samples[kind]})" for kind, count in shown), *more])


def left_out(total: IndexReport) -> str:
    """What was left out or is not read, in brackets, as the end of an error message; empty where nothing was."""
    told = {"left out": skip_line(total), "not read": unused_line(total)}
    parts = "; ".join(f"{what}: {line}" for what, line in told.items() if line)
    return f" ({parts})" if parts else ""


def too_large(
    tables: Iterable[np.ndarray], column: int, limit: int, paths: Iterable[str], tally: Tally
) -> list[np.ndarray]:
    """The rows of files whose records have at most `limit` bytes; counts the others.

    Args:
        tables: `[n, k] int64` of each file.
        column: that has the bytes of a record.
        limit: bytes.
        paths: of the files.
        tally: counts.
    """
    result = []
    for table, path in zip(tables, paths, strict=True):
        fits = table[:, column] <= limit
        if not fits.all():
            first = table[np.flatnonzero(~fits)[0], column]
            name = f"{os.path.basename(path)}: {first:,} bytes"
            tally.add("too many bytes (data.max_bytes)", name, int((~fits).sum()))
            table = table[fits]
        result.append(table)
    return result


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
