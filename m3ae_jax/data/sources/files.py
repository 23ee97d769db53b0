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
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from m3ae_jax.errors import UserError

_MAX_OPEN = 256  # well under the usual limit of 1024 descriptors a process


def is_remote(path: str) -> bool:
    """Whether `path` names something in a store, as ``gs://bucket/file``."""
    return "://" in path


def expand(path: str, extensions: Sequence[str], forms: str) -> list[str]:
    """The files that `path` names, each once, in order.

    Args:
        path: a folder (its files with one of `extensions`, sorted by name), a glob, a range as
            ``{00000..00012}.tar``, one file, or several of these with commas. What starts with ``~`` is at home;
            local paths come back absolute.
        extensions: as ``.tar``; of a folder's files.
        forms: what is allowed, for messages.

    Raises:
        UserError: a part names nothing.
    """
    parts = [path] if os.path.exists(path) else [part.strip() for part in path.split(",")]
    found = [file for part in parts for file in _expand_part(part, tuple(extensions), forms)]
    return list(dict.fromkeys(file if is_remote(file) else os.path.abspath(file) for file in found))


def _expand_part(part: str, extensions: tuple[str, ...], forms: str) -> list[str]:
    if part.startswith("pipe:"):
        raise UserError(f"data.*.path={part!r}: a stream allows no random access; copy or mount the files")
    names = _expand_ranges(os.path.expanduser(part))
    files = []
    for name in names:
        if is_remote(name):
            found = _remote(name, extensions)
        elif os.path.exists(name):
            found = _in_folder(name, extensions) if os.path.isdir(name) else [name]
        else:
            matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
            folders = [_in_folder(match, extensions) if os.path.isdir(match) else [match] for match in matches]
            found = [file for files_of in folders for file in files_of]
        if not found:
            hint = _hint(name, extensions) if len(names) == 1 and not is_remote(name) else ""
            what = f" ({os.path.basename(name)} of its range)" if len(names) > 1 else ""
            raise UserError(f"data.*.path={part!r}: no such file{what}; {forms}{hint}")
        files += found
    return files


def _expand_ranges(name: str) -> list[str]:
    found = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if found is None or os.path.exists(name):
        return [name]
    first, last = found.groups()
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    expanded = [e for n in numbers for e in _expand_ranges(name[: found.start()] + n + name[found.end() :])]
    return expanded or [name]


def _in_folder(folder: str, extensions: tuple[str, ...]) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    found = [os.path.join(folder, name) for name in names if name.lower().endswith(extensions)]
    if not found:
        for name in names:
            if name.lower().endswith(tuple(e + ".gz" for e in extensions)):
                raise UserError(gzip_line(os.path.join(folder, name)))
    return found


def _remote(name: str, extensions: tuple[str, ...]) -> list[str]:
    import tensorflow as tf

    files = tf.io.gfile
    try:
        if glob.has_magic(name):
            return sorted(files.glob(name))
        if files.isdir(name):
            base = name.rstrip("/")
            return sorted(f"{base}/{entry}" for entry in files.listdir(name) if entry.lower().endswith(extensions))
        return [name] if files.exists(name) else []
    except tf.errors.OpError as error:
        raise UserError(f"data.*.path={name!r} cannot be listed: {error.message}") from None


def _hint(name: str, extensions: tuple[str, ...]) -> str:
    """`; did you mean ...?` with a subfolder that holds such files, or the nearest neighbour's name."""
    inside = sorted(glob.glob(os.path.join(glob.escape(name), "*", "*"))) if os.path.isdir(name) else []
    inside = [file for file in inside if file.lower().endswith(extensions)]
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


class File(Protocol):
    """A file open for reading at offsets, from several threads at once; it closes itself."""

    size: int
    mtime_ns: int

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`.

        Raises:
            OSError: the storage failed, or the file is shorter than that.
        """

    def read_up_to(self, offset: int, size: int) -> bytes:
        """As `read`, but fewer at the end of the file."""


def open_file(path: str) -> File:
    """Opens a file.

    Raises:
        OSError: it cannot be opened.
    """
    return _Remote(path) if is_remote(path) else _Local(path)


def file_cache() -> Callable[[str], File]:
    """An `open_file` that keeps the files used last open."""
    return functools.lru_cache(maxsize=_MAX_OPEN)(open_file)


def _too_short(path: str) -> OSError:
    return OSError(f"{path}: shorter than when it was indexed; start again to index it anew")


class _Local:
    """A descriptor that closes itself when its last user, a reader or the cache, lets go of it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = -1  # so that __del__ works where open raises
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: modules go first at shutdown
        if self._descriptor >= 0:
            close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        data = self.read_up_to(offset, size)
        if len(data) < size:
            raise _too_short(self._path)
        return data

    def read_up_to(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:  # a network file system may return less than asked for
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


class _Remote:
    """A file of a store; one reader at a time, as it has one place."""

    def __init__(self, path: str) -> None:
        import tensorflow as tf

        self._path, self._lock = path, threading.Lock()
        self._errors: Any = tf.errors.OpError
        try:
            status = tf.io.gfile.stat(path)
            self._file = tf.io.gfile.GFile(path, "rb")
        except tf.errors.OpError as error:
            raise OSError(f"{path}: {error.message}") from None
        self.size, self.mtime_ns = status.length, status.mtime_nsec

    def read(self, offset: int, size: int) -> bytes:
        data = self.read_up_to(offset, size)
        if len(data) < size:
            raise _too_short(self._path)
        return data

    def read_up_to(self, offset: int, size: int) -> bytes:
        try:
            with self._lock:
                self._file.seek(offset)
                return bytes(self._file.read(size))
        except self._errors as error:
            raise OSError(f"{self._path}: {error.message}") from None
