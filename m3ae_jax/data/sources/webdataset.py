"""WebDataset tar shards, as img2dataset writes them: KEY.jpg + KEY.txt and/or KEY.json.

The shards are indexed once: one walk over the tar headers notes where each picture and each caption lies,
and from then on example i is two `pread` calls. Nothing is ever extracted to disk.

A member's key is its path up to the first dot of the base name; the rest, lowercased, is its extension. An
example is a picture (the first member of its key with a picture's extension) and a caption (the .txt, or the
.json where there is no .txt or it is of zero bytes). What cannot be used is left out and counted by reason.

The index of a folder is one file beside the shards, or in a cache folder where that one cannot be written.
It knows each shard's size and time of change, so only new and changed shards are walked again.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import glob
import hashlib
import json
import logging
import os
import re
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m3ae_jax.data.sources.base import Record
from m3ae_jax.errors import UserError

_IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
_CAPTION_EXTENSIONS = frozenset({"txt", "json"})
_KIND_TXT, _KIND_JSON = 0, 1

_INDEX_NAME = ".m3ae_jax_index.npz"
_INDEX_VERSION = 1
_SCAN_THREADS = 4  # for slow disks; with more, and data at hand, threads stand in each other's way
_MAX_OPEN_SHARDS = 256  # well under the usual limit of 1024 descriptors a process

_BLOCK = 512
_ZERO_BLOCK = bytes(_BLOCK)
_TAR_REGULAR = b"0\0" + b"7"  # 7 is "contiguous", stored as a regular file
_TAR_LONG_NAME, _TAR_PAX, _TAR_GNU_SPARSE, _TAR_DIRECTORY = b"L", b"x", b"S", b"5"
_TAR_NO_DATA = b"123456"  # links, devices, directories, FIFOs: their size field counts no blocks
_PAX_RECORD = re.compile(rb"(\d{1,18}) ([^=]+)=")

_FORMS = (
    "it takes a folder of .tar shards, a glob, a range or one file, or several separated by commas, "
    "e.g. 'cc12m/{00000..00012}.tar'"
)

_log = logging.getLogger("m3ae_jax")


@dataclass(frozen=True)
class IndexReport:
    """What indexing found.

    Attributes:
        shards: number of shards.
        examples: number of examples.
        skipped: how many were left out, by reason.
        samples: for each reason, the name of the first one left out, as `SHARD:MEMBER`.
    """

    shards: int
    examples: int
    skipped: dict[str, int]
    samples: dict[str, str]


class WebDatasetSource:
    """Pairs of picture and caption in local tar shards, by index.

    Examples are in the order of the shards (as given; a folder's or glob's sorted by name), then in the
    order of the pictures within a shard. A caption of zero bytes is a caption: the example stays.

    Attributes:
        modalities: `("image", "text")`.
        fingerprint: hash of the shards' base names and sizes and of all offsets (not of times of change), so
            that two copies of the data have the same.
        report: what was found and what was left out.
    """

    modalities: tuple[str, ...] = ("image", "text")

    def __init__(self, path: str, *, caption_key: str = "caption", cache_dir: str | None = None) -> None:
        """Opens the shards, indexing those that are new or changed.

        Args:
            path: a folder (all its `*.tar`), a glob, a range as `{00000..00012}.tar`, one file, or several of
                these separated by commas. A shard named twice counts once.
            caption_key: the field of the .json that holds the caption.
            cache_dir: where an index goes that cannot be written beside its shards (default
                `$XDG_CACHE_HOME`, else `~/.cache`; under it `m3ae_jax/index/`).

        Raises:
            UserError: `path` names no shard, or a file that is no tar, or there is no pair in it.
            OSError: a shard cannot be read.
        """
        self._paths = _expand(path)
        self._caption_key = caption_key
        shards = _indexed(self._paths, _cache_root(cache_dir))
        self.report = _report(shards)
        if not self.report.examples:
            found = f" (left out: {_skip_line(self.report)})" if self.report.skipped else ""
            raise UserError(f"data.*.path={path!r} holds no KEY.jpg (png, ...) with a KEY.txt or KEY.json{found}")
        # A row's shard follows from its number: shard s holds rows starts[s] to starts[s + 1].
        self._starts = np.cumsum([0] + [len(shard.rows) for shard in shards], dtype=np.int64)
        self._rows = np.concatenate([shard.rows for shard in shards])
        self._fingerprint = _fingerprint(self._paths, shards, caption_key)
        self._open = functools.lru_cache(maxsize=_MAX_OPEN_SHARDS)(_OpenShard)

    @property
    def fingerprint(self) -> str:
        """See the class docstring."""
        return self._fingerprint

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._rows)

    def read(self, indices: np.ndarray) -> list[Record]:
        """Reads examples, in the order asked for; safe to call from several threads at once.

        A .json that does not parse, or whose caption is missing or no string, gives an empty caption.

        Args:
            indices: `[n] int64`, each in `[0, len(self))`.

        Raises:
            OSError: a shard cannot be read, or is shorter than when it was indexed.
        """
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        records: list[Record] = []
        for shard, row in zip(shards.tolist(), self._rows[indices].tolist(), strict=True):
            image_offset, image_size, caption_offset, caption_size, kind = row
            opened = self._open(self._paths[shard])
            caption = opened.read(caption_offset, caption_size)
            if kind == _KIND_JSON:
                caption = _json_caption(caption, self._caption_key)
            records.append({"image": opened.read(image_offset, image_size), "caption": caption})
        return records


class _OpenShard:
    """A descriptor that closes itself when its last user, a reader or the cache, lets go of it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = -1  # so that __del__ works where open raises
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: modules go first at shutdown
        if self._descriptor >= 0:
            close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`."""
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:  # a network file system may return less than asked for
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                raise OSError(f"{self._path}: shorter than when it was indexed; start again to index it anew")
            data += more
        return data


def _json_caption(data: bytes, key: str) -> bytes:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        return b""
    caption = fields.get(key) if isinstance(fields, dict) else None
    return caption.encode("utf-8", "replace") if isinstance(caption, str) else b""


# --- which files -------------------------------------------------------------------------------------------


def _expand(path: str) -> list[str]:
    """The absolute paths of the shards that `path` names, each once, in order."""
    parts = [path] if os.path.exists(path) else [part.strip() for part in path.split(",")]
    shards = [shard for part in parts for shard in _expand_part(part)]
    return list(dict.fromkeys(os.path.abspath(shard) for shard in shards))


def _expand_part(part: str) -> list[str]:
    if "://" in part or part.startswith("pipe:"):
        raise UserError(f"data.*.path={part!r}: only local paths are supported; copy or mount the shards")
    names = _expand_ranges(os.path.expanduser(part))
    shards = []
    for name in names:
        if os.path.exists(name):
            found = _tars_in(name) if os.path.isdir(name) else [name]
        else:
            matches = sorted(glob.glob(name)) if glob.has_magic(name) else []
            found = [tar for match in matches for tar in (_tars_in(match) if os.path.isdir(match) else [match])]
        if not found:
            hint = _hint(name) if len(names) == 1 else ""
            what = f" ({os.path.basename(name)} of its range)" if len(names) > 1 else ""
            raise UserError(f"data.*.path={part!r}: no such shard{what}; {_FORMS}{hint}")
        shards += found
    return shards


def _expand_ranges(name: str) -> list[str]:
    found = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if found is None or os.path.exists(name):
        return [name]
    first, last = found.groups()
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    expanded = [e for n in numbers for e in _expand_ranges(name[: found.start()] + n + name[found.end() :])]
    return expanded or [name]


def _tars_in(folder: str) -> list[str]:
    escaped = glob.escape(folder)
    tars = sorted(glob.glob(os.path.join(escaped, "*.tar")))
    if not tars:
        for packed in sorted(glob.glob(os.path.join(escaped, "*.tar.gz")))[:1]:
            raise UserError(_gzip_line(packed))
    return tars


def _hint(name: str) -> str:
    """`; did you mean ...?` with a subfolder that holds shards, or the nearest neighbour's name."""
    inside = sorted(glob.glob(os.path.join(glob.escape(name), "*", "*.tar"))) if os.path.isdir(name) else []
    if inside:
        return f"; did you mean {os.path.dirname(inside[0])!r}?"
    folder, base = os.path.split(name.rstrip("/"))
    neighbours = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    near = difflib.get_close_matches(base, neighbours, n=1)
    return f"; did you mean {os.path.join(folder, near[0])!r}?" if near and near[0] != base else ""


def _gzip_line(path: str) -> str:
    rename = "" if path.endswith((".gz", ".tgz")) else f"mv {path} {path}.gz && "
    packed = path if not rename else f"{path}.gz"
    return f"data.*.path: {path} is compressed, which allows no random access; run: {rename}gunzip -k {packed}"


# --- the index file ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    """What is known of one shard.

    Attributes:
        size: bytes.
        mtime_ns: time of change, nanoseconds.
        rows: `[n, 5] int64`: image offset and size, caption offset and size (bytes), caption kind.
        skipped: per reason the number left out and the name of the first.
        grouped: whether the members of every key are neighbours.
    """

    size: int
    mtime_ns: int
    rows: np.ndarray
    skipped: dict[str, tuple[int, str]]
    grouped: bool


def _cache_root(cache_dir: str | None) -> Path:
    root = cache_dir or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "m3ae_jax" / "index"


def _indexed(paths: list[str], cache: Path) -> list[_Shard]:
    """What is known of each shard, from the folders' indices or by walking it."""
    known: dict[str, _Shard] = {}
    for folder in dict.fromkeys(os.path.dirname(path) for path in paths):
        chosen = [os.path.basename(path) for path in paths if os.path.dirname(path) == folder]
        shards = _index_folder(folder, chosen, cache)
        known.update({os.path.join(folder, name): shards[name] for name in chosen})
    return [known[path] for path in paths]


def _index_folder(folder: str, names: list[str], cache: Path) -> dict[str, _Shard]:
    places = [
        Path(folder, _INDEX_NAME),
        cache / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.npz",
    ]
    known: dict[str, _Shard] = {}
    for place in places:
        known |= _load_index(place, folder)
    missing = [name for name in names if name not in known]
    if not missing:
        return known
    began = time.monotonic()
    _log.info("webdataset: indexing %d shards of %s (once)", len(missing), folder)
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        fresh = dict(zip(missing, pool.map(_scan, [os.path.join(folder, name) for name in missing]), strict=True))
    known |= fresh
    saved = _save_index(places, known)
    seconds = time.monotonic() - began
    _log_index(_report(fresh.values()), [n for n, shard in fresh.items() if not shard.grouped], seconds, saved)
    return known


def _load_index(place: Path, folder: str) -> dict[str, _Shard]:
    """The shards of an index that are still as they were; none where it cannot be read."""
    try:
        with open(place, "rb") as file, np.load(file, allow_pickle=False) as index:
            if int(index["version"]) != _INDEX_VERSION:
                return {}
            columns = zip(*(index[column].tolist() for column in ("sizes", "times", "grouped")), strict=True)
            names, skipped = json.loads(str(index["names"])), json.loads(str(index["skipped"]))
            rows = np.split(index["rows"], np.cumsum(index["counts"])[:-1])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    shards = {}
    for name, (size, mtime_ns, grouped), part, left_out in zip(names, columns, rows, skipped, strict=True):
        with contextlib.suppress(OSError):  # a shard that is gone is not known
            now = os.stat(os.path.join(folder, name))
            if (now.st_size, now.st_mtime_ns) == (size, mtime_ns):
                reasons = {reason: (count, sample) for reason, (count, sample) in left_out.items()}
                shards[name] = _Shard(size, mtime_ns, part, reasons, grouped)
    return shards


def _save_index(places: list[Path], shards: dict[str, _Shard]) -> Path | None:
    """Writes the index to the first of `places` that can be written."""
    names, known = list(shards), list(shards.values())
    arrays = {
        "version": np.array(_INDEX_VERSION),
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


def _write_atomically(place: Path, arrays: dict[str, np.ndarray]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    # For root, as in most containers, the system lets this pass; what is marked read-only stays untouched.
    if not place.parent.stat().st_mode & 0o222:
        raise PermissionError(f"{place.parent} is read-only")
    # Unique over hosts that share a disk, and (unlike tempfile's) as readable to others as any new file.
    temporary = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy types **arrays as its bool flag too
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def _report(shards: Iterable[_Shard]) -> IndexReport:
    number, examples, skipped, samples = 0, 0, Counter[str](), dict[str, str]()
    for shard in shards:
        number += 1
        examples += len(shard.rows)
        for reason, (count, sample) in shard.skipped.items():
            skipped[reason] += count
            samples.setdefault(reason, sample)
    return IndexReport(number, examples, dict(skipped), samples)


def _skip_line(report: IndexReport) -> str:
    return ", ".join(f"{r} {n} (e.g. {report.samples[r]})" for r, n in sorted(report.skipped.items()))


def _log_index(report: IndexReport, ungrouped: list[str], seconds: float, saved: Path | None) -> None:
    where = saved or "nowhere: no folder can be written, so the next start indexes again"
    line = "webdataset: indexed %d shards, %d examples in %.1f s, saved in %s"
    _log.info(line, report.shards, report.examples, seconds, where)
    if report.skipped:
        _log.warning("webdataset: left out: %s", _skip_line(report))
    if ungrouped:
        line = "webdataset: keys are not grouped in %d shards (e.g. %s): pictures and captions paired by key"
        _log.warning(line, len(ungrouped), ungrouped[0])


def _fingerprint(paths: list[str], shards: list[_Shard], caption_key: str) -> str:
    digest = hashlib.sha256(f"webdataset {_INDEX_VERSION}".encode())
    for path, shard in zip(paths, shards, strict=True):
        digest.update(json.dumps([os.path.basename(path), shard.size, len(shard.rows)]).encode())
        digest.update(shard.rows.astype("<i8").tobytes())
    if any((shard.rows[:, 4] == _KIND_JSON).any() for shard in shards):
        digest.update(caption_key.encode())
    return digest.hexdigest()[:16]


# --- one shard ---------------------------------------------------------------------------------------------


class _Reader:
    """Reads at an offset, some way ahead: neighbouring headers then cost one call to the system.

    Each call lets another thread take the interpreter's lock, which costs more than the call.
    """

    _AHEAD = 16 * 1024

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._data, self._start = b"", 0

    def read(self, size: int, offset: int) -> bytes:
        """`size` bytes from `offset`, fewer at the end of the file."""
        at = offset - self._start
        if at < 0 or at + size > len(self._data):
            self._data = os.pread(self._descriptor, max(size, self._AHEAD), offset)
            self._start, at = offset, 0
        return self._data[at : at + size]


class _Damaged(Exception):
    """The archive makes no sense from here on; what came before is whole."""


class _Member(NamedTuple):
    name: str
    regular: bool
    offset: int
    size: int


class _Part(NamedTuple):
    """A picture or a caption; `run` numbers the stretches of neighbouring members with the same key."""

    extension: str
    run: int
    offset: int
    size: int
    name: str


class _Tally:
    """Counts what is left out of a shard, with the first name per reason."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self.skipped: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        before, sample = self.skipped.get(reason, (0, f"{self._shard}:{_printable(name)}"))
        self.skipped[reason] = (before + count, sample)


def _printable(name: str) -> str:
    """`name` in one line that any log can take: tar names are arbitrary bytes."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return text if text.isprintable() else ascii(text)[1:-1]


def _scan(path: str) -> _Shard:
    """Walks one shard's headers and pairs its members.

    Raises:
        UserError: it is no uncompressed tar.
    """
    tally = _Tally(os.path.basename(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status, reader = os.fstat(descriptor), _Reader(descriptor)
        if status.st_size:  # an empty file is a shard cut off at once
            _check_is_tar(path, reader.read(_BLOCK, 0))
        parts = _collect(path, reader, status.st_size, tally)
    finally:
        os.close(descriptor)
    grouped = all(len({part.run for part in of_key}) == 1 for of_key in parts.values() if not _repeats(of_key))
    rows = []
    for of_key in parts.values():
        row = _pair(_first_sample(of_key, grouped, tally) if _repeats(of_key) else of_key, tally)
        if row is not None:
            rows.append(row)
    table = np.array(sorted(rows), np.int64).reshape(len(rows), 5)
    return _Shard(status.st_size, status.st_mtime_ns, table, tally.skipped, grouped)


def _check_is_tar(path: str, start: bytes) -> None:
    try:
        if start != _ZERO_BLOCK:
            _parse_header(start)
    except _Damaged:
        no_tar = f"data.*.path: {path} is not a tar file; {_FORMS}"
        raise UserError(_gzip_line(path) if start.startswith(b"\x1f\x8b") else no_tar) from None


def _collect(path: str, reader: _Reader, size: int, tally: _Tally) -> dict[str, list[_Part]]:
    """The pictures and captions of a shard by key, in the order of the tar."""
    parts: dict[str, list[_Part]] = {}
    run, last_key = 0, None
    try:
        for member in _members(reader, size):
            if not member.regular:
                tally.add("not a regular file", member.name)
                continue
            if member.name.startswith("/") or ".." in member.name.split("/"):
                tally.add("unsafe name", member.name)
                continue
            folder, slash, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key, extension = folder + slash + stem, extension.lower()
            if key != last_key:
                run, last_key = run + 1, key
            if stem and (extension in _IMAGE_EXTENSIONS or extension in _CAPTION_EXTENSIONS):
                part = _Part(extension, run, member.offset, member.size, member.name)
                parts.setdefault(key, []).append(part)
    except _Damaged as error:
        _log.warning("webdataset: %s: %s; the whole pairs before that are used", path, error)
        tally.add("damaged shard", str(error))
    return parts


def _repeats(parts: list[_Part]) -> bool:
    """Whether a key's members must come from more than one sample."""
    if len(parts) == 1:
        return False
    pictures = {part.run for part in parts if part.extension in _IMAGE_EXTENSIONS}
    return len(pictures) > 1 or len({part.extension for part in parts}) < len(parts)


def _first_sample(parts: list[_Part], grouped: bool, tally: _Tally) -> list[_Part]:
    """The first whole sample of a repeated key, or nothing where samples cannot be told apart.

    A sample is a stretch of neighbours without a repeated extension. That says nothing in a shard whose
    keys are not grouped, nor where a picture and a caption are left over, which may belong together.
    """
    samples = [[parts[0]]]
    for part in parts[1:]:
        last = samples[-1]
        if part.run != last[-1].run or part.extension in {other.extension for other in last}:
            samples.append([])
        samples[-1].append(part)
    whole = [sample for sample in samples if all(_roles(sample))]
    rest = [part for sample in samples if not all(_roles(sample)) for part in sample]
    kept = whole[0] if whole and grouped and not all(_roles(rest)) else []
    pictures = sum(_roles(sample)[0] for sample in samples)
    tally.add("duplicate key", parts[0].name, max(pictures - bool(kept), 1))
    return kept


def _roles(parts: list[_Part]) -> tuple[bool, bool]:
    """Whether there is a picture, and whether there is a caption."""
    pictures = sum(part.extension in _IMAGE_EXTENSIONS for part in parts)
    return pictures > 0, pictures < len(parts)


def _pair(parts: list[_Part], tally: _Tally) -> tuple[int, int, int, int, int] | None:
    """The row of one sample, or None (counted) where it has no picture or no caption."""
    if not parts:
        return None
    image = next((part for part in parts if part.extension in _IMAGE_EXTENSIONS), None)
    captions = {part.extension: part for part in parts if part.extension in _CAPTION_EXTENSIONS}
    if image is None or not captions:
        tally.add("no image" if image is None else "no caption", parts[0].name)
        return None
    text, fields = captions.get("txt"), captions.get("json")
    if text is not None and (text.size or fields is None):
        return image.offset, image.size, text.offset, text.size, _KIND_TXT
    assert fields is not None
    return image.offset, image.size, fields.offset, fields.size, _KIND_JSON


# --- tar headers (POSIX.1-1988 ustar, POSIX.1-2001 pax, and GNU's long names) ------------------------------
# Python's tarfile takes about 60 us a member, under the interpreter's lock: half an hour for 12M pairs.


def _members(reader: _Reader, end: int) -> Iterator[_Member]:
    """The members of a tar but its directories, reading nothing but headers.

    Raises:
        _Damaged: a header is none, or the file ends before the archive does.
    """
    position, long_name, pax = 0, None, dict[bytes, bytes]()
    while (header := reader.read(_BLOCK, position)) != _ZERO_BLOCK:
        name, size, kind = _parse_header(header)
        offset = position + _BLOCK
        if b"size" in pax:
            size = int(pax[b"size"])
        if kind in _TAR_NO_DATA:
            size = 0
        if kind == _TAR_GNU_SPARSE:
            offset += _sparse_map_size(reader, header, offset)
        position = offset + -(-size // _BLOCK) * _BLOCK
        if offset + size > end:
            raise _Damaged(f"cut off after {end} bytes")
        if kind == _TAR_LONG_NAME:
            long_name = reader.read(size, offset).partition(b"\0")[0]
        elif kind == _TAR_PAX:
            pax = _parse_pax(reader.read(size, offset))
        elif kind not in b"gK":  # g: defaults for all members, K: a link's long target
            name = pax.get(b"path") or long_name or name
            regular = kind in _TAR_REGULAR and not any(key.startswith(b"GNU.sparse") for key in pax)
            if kind != _TAR_DIRECTORY and not name.endswith(b"/"):
                yield _Member(name.decode("utf-8", "surrogateescape"), regular, offset, size)
            long_name, pax = None, {}


def _parse_header(header: bytes) -> tuple[bytes, int, bytes]:
    """A header's name, size in bytes and type flag."""
    if len(header) < _BLOCK:
        raise _Damaged("cut off: there is no end-of-archive mark")
    try:
        # A size of 8 GiB or more does not fit octal digits: GNU sets the top bit and stores it in binary.
        large = header[124] & 0x80
        size = int.from_bytes(header[125:136], "big") if large else _octal(header[124:136])
        # The checksum is taken with its own field read as eight spaces.
        valid = sum(header) - sum(header[148:156]) + 8 * ord(" ") == _octal(header[148:156]) and size >= 0
    except ValueError:
        valid = False
    if not valid:
        raise _Damaged("a damaged header")
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name, size, header[156:157]


def _octal(field: bytes) -> int:
    return int(field.strip(b" \0") or b"0", 8)


def _parse_pax(data: bytes) -> dict[bytes, bytes]:
    """The records `LENGTH KEY=VALUE\\n` of an extended header."""
    fields, position = {}, 0
    while (found := _PAX_RECORD.match(data, position)) is not None:
        length = int(found[1])
        if length < len(found[0]) + 1:
            raise _Damaged("a damaged pax header")
        fields[found[2]] = data[found.end() : position + length - 1]
        position += length
    size = fields.get(b"size", b"0")
    if not size.isdigit() or len(size) > 18:
        raise _Damaged("a damaged pax header")
    return fields


def _sparse_map_size(reader: _Reader, header: bytes, position: int) -> int:
    """Bytes of the further blocks of a GNU sparse file's map, each of which says whether one more follows."""
    size, more = 0, header[482]
    while more:
        block = reader.read(_BLOCK, position + size)
        if len(block) < _BLOCK:
            raise _Damaged("cut off within a sparse file's map")
        size, more = size + _BLOCK, block[504]
    return size
