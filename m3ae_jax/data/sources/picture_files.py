"""Picture files of a local folder, for the sources that read them one by one: names, bytes, and what is beside them."""

from __future__ import annotations

import array
import bisect
import contextlib
import difflib
import hashlib
import os
import re
import shlex

import numpy as np

from m3ae_jax.data import images
from m3ae_jax.data.sources.base import IMAGE_EXTENSIONS, Record
from m3ae_jax.data.sources.files import encoding_of, is_remote
from m3ae_jax.data.sources.index import IndexReport, Tally, left_out, printable
from m3ae_jax.errors import UserError

_SUFFIXES = tuple(extension.encode() for extension in IMAGE_EXTENSIONS)
_UNSUPPORTED = frozenset(
    b".arw .avif .cr2 .dng .eps .exr .heic .heif .ico .j2k .jp2 .jxl .nef .pbm .pgm .pnm .ppm .psd .svg .tga .tif "
    b".tiff".split()
)
_SOURCES = {
    ".tar": "webdataset",
    ".parquet": "parquet",
    ".tfrecord": "tfrecord",
    ".tfrecords": "tfrecord",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".txt": "text",
}
START = 4096  # bytes of a text that tell its encoding
_SHARD = re.compile(rb"-\d+-of-\d+\Z")
_SIZED = 1 << 16  # pictures whose sizes are part of the fingerprint; each costs a call to the system


class Names:
    """A list of byte strings in one piece: 8 bytes each beside their own."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array.array("q", [0])

    def append(self, name: bytes) -> None:
        """Adds one."""
        self._bytes += name
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> bytes:
        return bytes(self._bytes[self._ends[i] : self._ends[i + 1]])

    def find(self, name: bytes) -> int | None:
        """The number of `name`, or None; the names must be sorted."""
        number = bisect.bisect_left(self, name)
        return number if number < len(self) and self[number] == name else None

    def digest(self) -> bytes:
        """A hash of all names in their order."""
        return hashlib.sha256(hashlib.sha256(self._bytes).digest() + hashlib.sha256(self._ends).digest()).digest()


def is_file(entry: os.DirEntry[bytes]) -> bool:
    """Whether it is a file, or a link to one; a link that leads nowhere, or to itself, is none."""
    with contextlib.suppress(OSError):
        return entry.is_file()
    return False


def is_dir(entry: os.DirEntry[bytes]) -> bool:
    """Whether it is a folder, or a link to one; as `is_file`."""
    with contextlib.suppress(OSError):
        return entry.is_dir()
    return False


def is_picture(name: bytes) -> bool:
    """Whether a file's name ends as a picture's."""
    return name.lower().endswith(_SUFFIXES)


def unsupported(name: bytes) -> str:
    """Why a file that is a picture by its name cannot be used, as ``unsupported ending .tiff``; empty: it is none."""
    ending = os.path.splitext(name)[1].lower()
    return f"unsupported ending {ending.decode()}" if ending in _UNSUPPORTED else ""


def file_kind(name: bytes) -> str:
    """What a file that is not read is counted as: ``file .csv``."""
    ending = os.fsdecode(os.path.splitext(_SHARD.sub(b"", name))[1])
    return f"file {ending}" if ending else "file without an ending"


def count_file(tally: Tally, path: bytes) -> None:
    """Counts a file that is not read: a picture as an example that is lost, another by its ending."""
    if reason := unsupported(path):
        tally.add(reason, os.fsdecode(path))
    else:
        tally.ignore(file_kind(os.path.basename(path)), os.fsdecode(path))


def local_folder(path: str, forms: str) -> bytes:
    """`path` as an absolute local folder.

    Args:
        path: may start with ``~``.
        forms: what is allowed, for the message.

    Raises:
        UserError: it is none.
    """
    if is_remote(path):
        raise UserError(
            f"data.*.path={path!r} is in a store, where a call for each picture takes long; "
            "mount it, or pack the pictures into .tar shards (source webdataset)"
        )
    name = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(name):
        return os.fsencode(name)
    what = "is a file" if os.path.exists(name) else "is not there"
    parent, base = os.path.split(name)
    siblings = os.listdir(parent) if os.path.isdir(parent) else []
    near = difflib.get_close_matches(base, [s for s in siblings if os.path.isdir(os.path.join(parent, s))], n=1)
    hint = f"; did you mean {os.path.join(parent, near[0])!r}?" if near else ""
    raise UserError(f"data.*.path={path!r} {what}; {forms}{hint}")


def nothing_in(path: str, report: IndexReport, forms: str) -> str:
    """The message that a folder holds no picture, with the format that it may be of.

    Args:
        path: the folder.
        report: what is in it.
        forms: what is allowed.
    """
    if not os.listdir(os.path.expanduser(path)):
        return f"data.*.path={path!r} is an empty folder; {forms}"
    for ending, source in _SOURCES.items():
        if count := report.unused.get(f"file {ending}"):
            first = report.samples[f"file {ending}"]
            return f"data.*.path={path!r} holds no picture, but {count:,} {ending} (e.g. {first}): source={source}"
    return f"data.*.path={path!r} holds no picture{left_out(report)}; {forms}"


def folder_name(folder: bytes) -> str:
    """The base name of a folder, for reports."""
    return printable(os.path.basename(os.fsdecode(folder)))


def refuse_foreign(path: bytes) -> None:
    """Raises a `UserError` for a text file in another encoding than UTF-8, with the command that changes it.

    Raises:
        UserError: as said.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        encoding = encoding_of(file.read(START))
    if encoding:
        name = shlex.quote(printable(os.fsdecode(path)))
        raise UserError(
            f"data.*.path: {printable(os.fsdecode(path))} is {encoding}, not UTF-8; run: "
            f"iconv -f {encoding} -t UTF-8 {name} > {name}.new && mv {name}.new {name}"
        )


def read_whole(path: bytes, max_bytes: int) -> bytes | None:
    """A file's bytes; None where it has more than `max_bytes`, of which nothing is read.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        return None if os.fstat(file.fileno()).st_size > max_bytes else file.read()


def read_picture(root: bytes, name: bytes, max_bytes: int) -> Record:
    """A record of a picture alone, of no bytes if that file alone cannot be read, which the pipeline then replaces.

    Raises:
        OSError: the storage failed, or the whole folder is gone.
    """
    try:
        data = read_whole(os.path.join(root, name), max_bytes)
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
        os.listdir(root)
        data = b""
    return too_large() if data is None else Record(image=data)


def too_large() -> Record:
    """The record of an example whose picture or caption has more bytes than are allowed."""
    return Record(image=b"", unusable=images.TOO_MANY_BYTES)


def sizes_digest(root: bytes, names: Names) -> bytes:
    """A hash of the sizes of at most `_SIZED` of the files, evenly spread.

    Raises:
        OSError: one cannot be looked at.
    """
    chosen = range(0, len(names), max(-(-len(names) // _SIZED), 1))
    sizes = np.fromiter((os.stat(os.path.join(root, names[i])).st_size for i in chosen), "<i8", len(chosen))
    return hashlib.sha256(sizes.tobytes()).digest()
