"""The files of a source: which a path names, and bytes at an offset; local, or of a store such as ``gs://``.

Local files are read with `os.pread`; those of a store through TensorFlow's file systems.
"""

from __future__ import annotations

import difflib
import functools
import glob
import os
import re
import threading
from collections.abc import Callable, Iterable
from typing import Any

from m3ae_jax.errors import UserError

_MAX_OPEN = 256  # well under the usual limit of 1024 descriptors a process


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
    files = []
    for name in names:
        if is_remote(name):
            matches = _remote(name, ending)
        elif os.path.exists(name):
            matches = _local(name, ending)
        else:
            paths = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
            matches = [file for path in paths for file in _local(path, ending)]
        if not matches:
            hint = _hint(name, ending) if len(names) == 1 and not is_remote(name) else ""
            what = f" ({os.path.basename(name)} of its range)" if len(names) > 1 else ""
            raise UserError(f"data.*.path={part!r}: no such file{what}; {forms}{hint}")
        files += matches
    return files


def _expand_ranges(name: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if match is None or os.path.exists(name):
        return [name]
    first, last = match.groups()
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    expanded = [e for n in numbers for e in _expand_ranges(name[: match.start()] + n + name[match.end() :])]
    return expanded or [name]


def _ending_in(ending: str, names: Iterable[str]) -> list[str]:
    """The names with this ending, sorted."""
    return sorted(name for name in names if re.search(rf"(?:{ending})\Z", name.lower()))


def _local(path: str, ending: str) -> list[str]:
    """A file itself, or the files of a folder."""
    if not os.path.isdir(path):
        return [path]
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    files, packed = _ending_in(ending, names), _ending_in(f"(?:{ending})\\.gz", names)
    if packed and not files:
        raise UserError(gzip_line(os.path.join(path, packed[0])))
    return [os.path.join(path, name) for name in files]


def _remote(name: str, ending: str) -> list[str]:
    import tensorflow as tf

    files = tf.io.gfile
    try:
        if glob.has_magic(name):
            return sorted(files.glob(name))
        if files.isdir(name):
            base = name.rstrip("/")
            return [f"{base}/{entry}" for entry in _ending_in(ending, files.listdir(name))]
        return [name] if files.exists(name) else []
    except tf.errors.OpError as error:
        raise UserError(f"data.*.path={name!r} cannot be listed: {error.message}") from None


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


def open_file(path: str) -> File:
    """Opens a file.

    Raises:
        OSError: it cannot be opened.
    """
    return _Remote(path) if is_remote(path) else _Local(path)


def file_cache() -> Callable[[str], File]:
    """An `open_file` that leaves the files used last open."""
    return functools.lru_cache(maxsize=_MAX_OPEN)(open_file)


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


class _Remote(File):
    """A file of a store; one reader at a time, as it has one place."""

    def __init__(self, path: str) -> None:
        import tensorflow as tf

        super().__init__(path)
        self._lock = threading.Lock()
        self._errors: Any = tf.errors.OpError
        try:
            status = tf.io.gfile.stat(path)
            self._file = tf.io.gfile.GFile(path, "rb")
        except tf.errors.OpError as error:
            raise OSError(f"{path}: {error.message}") from None
        self.size, self.mtime_ns = status.length, status.mtime_nsec

    def read_up_to(self, offset: int, size: int) -> bytes:
        try:
            with self._lock:
                self._file.seek(offset)
                return bytes(self._file.read(size))
        except self._errors as error:
            raise OSError(f"{self._path}: {error.message}") from None
