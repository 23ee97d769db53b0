"""The files of a source: which a path names, and bytes at an offset; local, or of a store such as ``gs://``.

Local files are read with `os.pread`; those of Google's store through TensorFlow's file systems; those of others, as
``s3://`` and ``https://``, through fsspec, the optional extra ``m3ae_jax[remote]``.
"""

from __future__ import annotations

import collections
import contextlib
import difflib
import functools
import glob
import itertools
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from m3ae_jax.errors import UserError

_MAX_OPEN = 256  # well under the usual limit of 1024 descriptors a process
_FILE, _FOLDER = "file", "folder"
_MOST_ENDINGS = 3  # of a folder's other files, that a message names
_TENSORFLOW_SCHEMES = ("gs://", "ram://")
_STAMPS = ("mtime", "LastModified", "last_modified", "updated", "Last-Modified", "ETag", "created")
_MARKS = {  # the longer ones first: that of UTF-32 starts as that of UTF-16
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_FEW_NULLS = 4  # fewer tell nothing
_NO_RANGES = "the server gives no parts of a file, which random access needs; copy the files"


SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
"""Usual names of splits."""


def split_in(name: str) -> str:
    """The split that a file's name tells of, as ``coco_val2017-00003.tfrecord``; empty: none.

    It stands alone or between ``-``, ``_``, ``.``, blanks and digits.
    """
    words = re.split(r"[-_.\s\d]+", name.lower())
    return next((word for word in words if word in SPLITS), "")


def is_remote(path: str) -> bool:
    """Whether `path` names something in a store, as ``gs://bucket/file``."""
    return "://" in path


def expand(path: str, ending: str, forms: str) -> list[str]:
    """The files that `path` names, each once, in order.

    Args:
        path: a folder (its files with this `ending`, sorted by name), a glob, a range as ``{00000..00012}.tar``, one
            file, or several of these with commas. What starts with ``~`` is at home; local paths come back absolute.
        ending: a regular expression for the end of the names of a folder's files, in lower case, as ``\\.tar``.
        forms: what is allowed, for messages.

    Raises:
        UserError: a part names nothing.
    """
    parts = [path] if os.path.exists(path) else [part.strip() for part in path.split(",")]
    files = [file for part in parts for file in _expand_part(part, ending, forms)]
    return list(dict.fromkeys(file if is_remote(file) else os.path.abspath(file) for file in files))


def _expand_part(part: str, ending: str, forms: str) -> list[str]:
    if part.startswith("pipe:"):
        raise UserError(f"data.*.path={part!r}: a stream allows no random access; copy or mount the files")
    names = _expand_ranges(os.path.expanduser(part))
    try:
        matches = [_matches(name, ending) for name in names]
        if not all(matches):
            what, hint = _gaps(names, matches, ending) if len(names) > 1 else _nothing(names[0], ending)
            raise UserError(f"data.*.path={part!r}{what}; {forms}{hint}")
    except OSError as error:
        raise UserError(f"data.*.path={part!r} cannot be listed: {error}") from error
    return [file for files in matches for file in files]


def _expand_ranges(name: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if match is None or os.path.exists(name):
        return [name]
    first, last = match.groups()
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    expanded = [e for n in numbers for e in _expand_ranges(name[: match.start()] + n + name[match.end() :])]
    return expanded or [name]


def _matches(name: str, ending: str) -> list[str]:
    """A file itself, or the files of a folder or of a glob; nothing where there is none."""
    store = _store(name)
    if not store.is_glob(name):
        kind = store.kind(name)
        return _of_folder(store, name, ending) if kind == _FOLDER else [name] * (kind == _FILE)
    found = sorted(store.glob(name))
    if is_remote(name):  # to ask for the kind of each would take a request each
        return found
    return [f for path in found for f in (_of_folder(store, path, ending) if os.path.isdir(path) else [path])]


def _of_folder(store: _Store, folder: str, ending: str) -> list[str]:
    names = store.entries(folder)
    files, packed = _ending_in(ending, names), _ending_in(f"(?:{ending})\\.gz", names)
    if packed and not files:
        raise UserError(gzip_line(os.path.join(folder, packed[0])))
    return [os.path.join(folder, name) for name in files]


def _ending_in(ending: str, names: Iterable[str]) -> list[str]:
    """The names with this ending, sorted."""
    return sorted(name for name in names if re.search(rf"(?:{ending})\Z", name.lower()))


def _gaps(names: Sequence[str], matches: Sequence[list[str]], ending: str) -> tuple[str, str]:
    """Which files of a range are not there, all in one line, and what to do."""
    folders = {os.path.dirname(name) for name in names}
    missing = [place for place, files in enumerate(matches) if not files]
    shown = [os.path.basename(name) if len(folders) == 1 else name for name in names]
    gone = _runs([place for place in missing if not os.path.isdir(names[place])], shown)
    hollow = _runs([place for place in missing if os.path.isdir(names[place])], shown)
    what = [f"no such file ({gone} of its range)"] * bool(gone)
    what += [f"no {_endings(ending)} in the folders {hollow} of its range"] * bool(hollow)
    folder = folders.pop()
    there = [] if folders else _matches(folder, ending)
    hint = f"; {folder!r} takes the {len(there)} files that are there" if there else ""
    return f": {'; '.join(what)}", hint


def _runs(places: Sequence[int], names: Sequence[str]) -> str:
    """The names at these places, those in a row by the first and the last."""
    rows = itertools.groupby(enumerate(places), lambda numbered: numbered[1] - numbered[0])
    runs = [[names[place] for _, place in run] for _, run in rows]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def _nothing(name: str, ending: str) -> tuple[str, str]:
    """Why a name gives no file, and what may have been meant."""
    store = _store(name)
    if not is_remote(name) and store.is_glob(name) and (folders := sorted(filter(os.path.isdir, store.glob(name)))):
        what, hint = _nothing(folders[0], ending)
        return f" finds folders alone: {folders[0]!r}{what}", hint
    hint = "" if is_remote(name) else _hint(name, ending)
    if store.is_glob(name) or store.kind(name) != _FOLDER:
        return ": no such file", hint
    names = store.entries(name)
    return (f" holds no {_endings(ending)} but {_contents(names)}" if names else " is an empty folder"), hint


def _endings(ending: str) -> str:
    """A regular expression for endings, as ``\\.(h5|hdf5)(-\\d+)?``, for people: ``.h5 or .hdf5``."""
    found = re.match(r"\\\.\(?([\w|]+)", ending)
    return " or ".join(f".{one}" for one in found[1].split("|")) if found else "such file"


def _contents(names: Sequence[str]) -> str:
    """What a folder holds, as ``3 .zip (e.g. a.zip), 1 folder (e.g. b)``."""
    kinds = ["folder" if name.endswith("/") else os.path.splitext(name)[1] or "without ending" for name in names]
    common = collections.Counter(kinds).most_common()
    parts = [f"{n} {kind} (e.g. {names[kinds.index(kind)].rstrip('/')})" for kind, n in common[:_MOST_ENDINGS]]
    others = sum(n for _, n in common[_MOST_ENDINGS:])
    return ", ".join(parts + [f"{others} others"] * bool(others))


def _hint(name: str, ending: str) -> str:
    """`; did you mean ...?` with a subfolder that holds such files, or the nearest neighbour's name."""
    inside = _ending_in(ending, glob.glob(os.path.join(glob.escape(name), "*", "*"))) if os.path.isdir(name) else []
    if inside:
        return f"; did you mean {os.path.dirname(inside[0])!r}?"
    folder, base = os.path.split(name.rstrip("/"))
    neighbours = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    near = difflib.get_close_matches(base, neighbours, n=1)
    return f"; did you mean {os.path.join(folder, near[0])!r}?" if near and near[0] != base else ""


def gzip_line(path: str) -> str:
    """The message that a compressed file cannot be used, with the command that unpacks it."""
    rename = "" if path.endswith((".gz", ".tgz")) else f"mv {path} {path}.gz && "
    packed = path if not rename else f"{path}.gz"
    return f"data.*.path: {path} is compressed, which allows no random access; run: {rename}gunzip -k {packed}"


def encoding_of(start: bytes) -> str:
    """The encoding of a text, if it is one of those that no source reads, by its name for ``iconv``; else empty.

    Args:
        start: the first bytes of a file, some thousand. Where no byte order mark says it, many NULs do, which UTF-8 has
            not; their places then give the byte order, which ``iconv`` must be told: ``UTF-16LE``.
    """
    marked = next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), "")
    whole = len(start) // 4
    if marked or not whole:
        return marked
    nulls = [start[place : whole * 4 : 4].count(0) for place in range(4)]
    for order, (first, second, third, fourth) in (("LE", nulls), ("BE", nulls[::-1])):
        if third == fourth == whole > 1 and first <= whole // 8:
            return f"UTF-32{order}"
        # Letters of Latin, spaces and line ends have a high byte of NUL; few letters have a low one.
        low, high = first + third, second + fourth
        if high >= max(whole // 4, _FEW_NULLS) and low <= high // 8:
            return f"UTF-16{order}"
    return ""


class File:
    """A file open for reading at offsets, from several threads at once; it closes itself."""

    size: int
    mtime_ns: int

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`.

        Raises:
            OSError: the storage failed, or the file is shorter than that.
        """
        data = self.read_up_to(offset, size)
        if len(data) < size:
            raise OSError(f"{self._path}: shorter than when it was indexed; start again to index it anew")
        return data

    def read_up_to(self, offset: int, size: int) -> bytes:
        """As `read`, but fewer at the end of the file."""
        raise NotImplementedError


class ReadAhead:
    """Reads small pieces of a file in its order, some way ahead: neighbours then cost one call to the system.

    Each call lets another thread take the interpreter's lock, which costs more than the call.
    """

    def __init__(self, file: File) -> None:
        self._file = file
        self._data, self._start = b"", 0

    def read(self, offset: int, size: int, ahead: int = 16 * 1024) -> bytes:
        """`size` bytes from `offset`, fewer at the end of the file; where they are not there yet, reads `ahead`."""
        at = offset - self._start
        if at < 0 or at + size > len(self._data):
            self._data = self._file.read_up_to(offset, max(size, ahead))
            self._start, at = offset, 0
        return self._data[at : at + size]


class _Store(Protocol):
    """Where files lie."""

    def is_glob(self, path: str) -> bool:
        """Whether a path is a pattern."""

    def kind(self, path: str) -> str:
        """`_FILE`, `_FOLDER`, or empty where there is nothing."""

    def entries(self, folder: str) -> list[str]:
        """What a folder holds, sorted; hidden files left out, folders with a slash at the end."""

    def glob(self, pattern: str) -> list[str]:
        """The paths that a pattern finds."""

    def open(self, path: str) -> File:
        """Opens a file; raises `OSError` as all of these."""


class _RemoteStore(_Store, Protocol):
    def write(self, path: str, data: bytes) -> None:
        """Writes a whole file."""


def _store(path: str) -> _Store:
    return _remote_store(path) if is_remote(path) else _LocalStore()


def _remote_store(path: str) -> _RemoteStore:
    return _TensorFlowStore() if path.startswith(_TENSORFLOW_SCHEMES) else _FsspecStore()


def open_file(path: str) -> File:
    """Opens a file.

    Raises:
        OSError: it cannot be opened.
    """
    return _store(path).open(path)


class Stamps:
    """Sizes and times of change of local files, by which one that is written to while it is read is noticed.

    Of such a file other records would be read than were indexed, or those of two examples as one.

    Args:
        paths: the files as they are now.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._stamps: dict[str, tuple[int, int]] = {}
        for path in paths:
            if not is_remote(path):
                with contextlib.suppress(OSError):  # one that is not there is told of where it is read
                    self._stamps[path] = stamp(path)

    def check(self, path: str) -> None:
        """Looks at a file.

        Raises:
            OSError: it has changed, or is gone.
        """
        if path not in self._stamps:
            return
        try:
            now = stamp(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: gone since it was indexed; start again") from None
        if now != self._stamps[path]:
            raise OSError(f"{path}: changed since it was indexed; start again")


def stamp(path: str) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds of a file; raises an `OSError` where it is not there."""
    if is_remote(path):
        file = open_file(path)
        return file.size, file.mtime_ns
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def write_remote(path: str, data: bytes) -> None:
    """Writes a whole file of a store.

    Raises:
        OSError: it cannot be written.
    """
    _remote_store(path).write(path, data)


def file_cache() -> Callable[[str], File]:
    """An `open_file` that leaves the files used last open."""
    return functools.lru_cache(maxsize=_MAX_OPEN)(open_file)


class _LocalStore:
    """A `_Store`: the files of this machine."""

    def is_glob(self, path: str) -> bool:
        return glob.has_magic(path) and not os.path.exists(path)

    def kind(self, path: str) -> str:
        return _FOLDER if os.path.isdir(path) else _FILE * os.path.exists(path)

    def entries(self, folder: str) -> list[str]:
        with os.scandir(folder) as found:
            return sorted(one.name + "/" * one.is_dir() for one in found if not one.name.startswith("."))

    def glob(self, pattern: str) -> list[str]:
        return glob.glob(pattern, recursive=True)

    def open(self, path: str) -> File:
        return _Local(path)


class _Local(File):
    """A descriptor that closes itself when its last user, a reader or the cache, lets go of it."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._descriptor = -1  # so that __del__ works where open raises
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: modules go first at shutdown
        if self._descriptor >= 0:
            close(self._descriptor)

    def read_up_to(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:  # a network file system may return less than requested
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


class _TensorFlowStore:
    """A `_Store` of those that TensorFlow's file systems know."""

    def is_glob(self, path: str) -> bool:
        return glob.has_magic(path)

    def kind(self, path: str) -> str:
        with _tensorflow_errors(path) as tf:
            return _FOLDER if tf.io.gfile.isdir(path) else _FILE * tf.io.gfile.exists(path)

    def entries(self, folder: str) -> list[str]:
        with _tensorflow_errors(folder) as tf:
            return sorted(name for name in tf.io.gfile.listdir(folder) if not name.startswith("."))

    def glob(self, pattern: str) -> list[str]:
        with _tensorflow_errors(pattern) as tf:
            return list(tf.io.gfile.glob(pattern))

    def open(self, path: str) -> File:
        return _TensorFlowFile(path)

    def write(self, path: str, data: bytes) -> None:
        with _tensorflow_errors(path) as tf:
            tf.io.gfile.makedirs(os.path.dirname(path))
            with tf.io.gfile.GFile(path, "wb") as file:
                file.write(data)


@contextlib.contextmanager
def _tensorflow_errors(path: str) -> Iterator[Any]:
    """TensorFlow; its errors become those of the system."""
    import tensorflow as tf

    try:
        yield tf
    except tf.errors.OpError as error:
        raise OSError(f"{path}: {error.message}") from None


class _TensorFlowFile(File):
    """One reader at a time, as it has one place."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._lock = threading.Lock()
        with _tensorflow_errors(path) as tf:
            status = tf.io.gfile.stat(path)
            self._file = tf.io.gfile.GFile(path, "rb")
        self.size, self.mtime_ns = status.length, status.mtime_nsec

    def read_up_to(self, offset: int, size: int) -> bytes:
        with _tensorflow_errors(self._path), self._lock:
            self._file.seek(offset)
            return bytes(self._file.read(size))


class _FsspecStore:
    """A `_Store` of those that fsspec knows: ``s3://``, ``https://`` and others.

    What a store needs to know besides is set in the environment, as ``FSSPEC_S3_ANON=true`` for public buckets.
    """

    def is_glob(self, path: str) -> bool:
        # In an address a question mark stands before its query.
        return glob.has_magic(path.replace("?", "") if path.startswith("http") else path)

    def kind(self, path: str) -> str:
        try:
            with _fsspec_errors(path):
                files, name = _fsspec(path)
                info = files.info(name)
        except FileNotFoundError:
            return ""
        # Of a web server a folder is a page with links.
        is_page = info.get("mimetype") == "text/html" and not os.path.splitext(path)[1]
        return _FOLDER if info["type"] == "directory" or is_page else _FILE

    def entries(self, folder: str) -> list[str]:
        with _fsspec_errors(folder):
            files, name = _fsspec(folder)
            found = [one for one in files.ls(name, detail=True) if one["name"].rstrip("/") != name.rstrip("/")]
        slash = {one["name"]: "/" * (one["type"] == "directory") for one in found}
        names = sorted(os.path.basename(path.rstrip("/")) + end for path, end in slash.items())
        return [name for name in names if not name.startswith((".", "?", "#"))]

    def glob(self, pattern: str) -> list[str]:
        with _fsspec_errors(pattern):
            files, name = _fsspec(pattern)
            return [files.unstrip_protocol(path) for path in files.glob(name)]

    def open(self, path: str) -> File:
        return _FsspecFile(path)

    def write(self, path: str, data: bytes) -> None:
        with _fsspec_errors(path):
            files, name = _fsspec(path)
            files.pipe_file(name, data)  # into whatever folder: in stores these are but the starts of names


def _fsspec(path: str) -> tuple[Any, str]:
    """The file system of a path, and its name there.

    Raises:
        UserError: a package is missing, or the scheme is unknown.
    """
    try:
        import fsspec

        files, name = fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise UserError(f"{path} needs a package: pip install 'm3ae_jax[remote]' ({error})") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return files, name


@contextlib.contextmanager
def _fsspec_errors(path: str) -> Iterator[None]:
    """Whatever a store's package raises becomes an error of the system, so that it is tried again."""
    try:
        yield
    except FileNotFoundError as error:
        if _is_missing(error):
            raise
        raise OSError(f"{path}: {error.__cause__}") from error
    except (OSError, UserError):
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(f"{path}: {said}") from error


def _is_missing(error: FileNotFoundError) -> bool:
    """Whether there is no such file: fsspec says so of any web server's failure too."""
    cause = error.__cause__
    failed = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return not failed or getattr(cause, "status", 0) in (404, 410)


class _FsspecFile(File):
    """A file read by ranges, a request each."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        with _fsspec_errors(path):
            self._files, self._name = _fsspec(path)
            info = self._files.info(self._name)
        self._is_http = "https" in self._files.protocol
        if info["size"] is None or not info.get("partial", True):
            raise OSError(f"{path}: {_NO_RANGES}")
        self.size: int = info["size"]
        # A time of change, or what changes with it: it is only compared.
        stamp = next((str(info[key]) for key in _STAMPS if info.get(key)), "")
        self.mtime_ns = zlib.crc32(stamp.encode()) if stamp else 0

    def read_up_to(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self.size)
        if end <= offset:
            return b""
        with _fsspec_errors(self._path):
            if not self._is_http:
                return bytes(self._files.cat_file(self._name, start=offset, end=end))
            # This refuses a server that answers with the whole file, which `cat_file` would take.
            with self._files.open(self._name, "rb", size=self.size, cache_type="none") as file:
                try:
                    file.seek(offset)
                    return bytes(file.read(end - offset))
                except ValueError:
                    raise OSError(f"{self._path}: {_NO_RANGES}") from None
