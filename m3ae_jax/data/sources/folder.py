"""A folder of pictures with their captions: metadata.jsonl, metadata.csv, or a .txt beside each picture.

The layout is that of Hugging Face's ``imagefolder``: each line of the metadata names a picture by its path in the
folder (field ``file_name``) and holds its caption, or a list of them. Without metadata, ``a/b.txt`` is the caption of
``a/b.jpg``; without any, it is a source of pictures alone.

The folder is walked at each start, and its metadata read once. What stays in memory are the pictures' names, one after
the other in one bytes object, and where each line of the metadata lies: a fraction of what Python's objects would take.
What cannot be used is left out and counted by reason.
"""

from __future__ import annotations

import array
import bisect
import csv
import dataclasses
import difflib
import hashlib
import io
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from m3ae_jax.data.sources.base import IMAGE_EXTENSIONS, Record, SourceOptions, find_key, several
from m3ae_jax.data.sources.files import file_cache, is_remote
from m3ae_jax.data.sources.index import Tally, left_out, printable, skip_line
from m3ae_jax.errors import UserError

_METADATA = (b"metadata.jsonl", b"metadata.csv")
_SUFFIXES = tuple(extension.encode() for extension in IMAGE_EXTENSIONS)
_NAME_KEYS = ("file_name", "filename", "file", "path")
_LOOKED_AT = 1000  # lines of a metadata.jsonl whose fields say what it holds
_MAX_LINE = 16 << 20  # bytes; a longer line of metadata is cut there, and so does not parse
_SIZED = 1 << 16  # pictures whose sizes are part of the fingerprint; each costs a call to the system
_ALL = -1  # in place of a caption's number: all of them

_FORMS = (
    "it takes a folder of pictures with a metadata.jsonl or metadata.csv (fields file_name and caption), "
    "or with a .txt beside each picture"
)

_log = logging.getLogger("m3ae_jax")


# --- names of files ----------------------------------------------------------------------------------------


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


def is_picture(name: bytes) -> bool:
    """Whether a file's name ends as a picture's."""
    return name.lower().endswith(_SUFFIXES)


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


def read_whole(path: bytes) -> bytes:
    """A file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        return file.read()


def read_picture(root: bytes, name: bytes) -> bytes:
    """A picture's bytes; none if that file alone cannot be read, which the pipeline then replaces.

    Raises:
        OSError: the storage failed, or the whole folder is gone.
    """
    try:
        return read_whole(os.path.join(root, name))
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
        os.listdir(root)
        return b""


def sizes_digest(root: bytes, names: Names) -> bytes:
    """A hash of the sizes of at most `_SIZED` of the files, evenly spread.

    Raises:
        OSError: one cannot be looked at.
    """
    chosen = range(0, len(names), max(-(-len(names) // _SIZED), 1))
    sizes = np.fromiter((os.stat(os.path.join(root, names[i])).st_size for i in chosen), "<i8", len(chosen))
    return hashlib.sha256(sizes.tobytes()).digest()


# --- the walk ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Walked:
    """What a folder holds.

    Attributes:
        pictures: paths of all pictures below it, sorted as bytes.
        with_text: for each, whether a .txt of the same stem is beside it.
        lonely: the .txt without a picture.
        metadata: the metadata files that are not in the folder itself, but below.
    """

    pictures: Names
    with_text: bytearray
    lonely: Names
    metadata: list[bytes]


def _inside(root: bytes) -> bytes:
    """What the true path of whatever is in a folder begins with."""
    return os.path.join(os.path.realpath(root), b"")


def _within(path: bytes, inside: bytes) -> bool:
    return os.path.realpath(path).startswith(inside)


def _refused(entry: os.DirEntry[bytes], inside: bytes) -> str:
    """Why a file must not be used, or an empty string."""
    if entry.is_symlink() and not _within(entry.path, inside):
        return "link out of the folder"
    return "" if entry.is_file() else "not a regular file"


def _walk(root: bytes, tally: Tally) -> _Walked:
    """Lists all pictures below `root`.

    Raises:
        OSError: a folder cannot be listed.
    """
    walked = _Walked(Names(), bytearray(), Names(), [])
    pending = [(b"", False)]  # a path, that of a folder with a slash at its end, and whether a .txt is beside it
    while pending:
        path, has_text = pending.pop()
        if not path or path.endswith(b"/"):
            names, texts = _list(root, path, tally)
            stems = {os.path.splitext(name)[0] for name in names if is_picture(name)} if texts else set()
            for text in sorted(path + stem + b".txt" for stem in texts - stems):
                walked.lonely.append(text)
            pending += [(path + name, os.path.splitext(name)[0] in texts) for name in sorted(names, reverse=True)]
        elif os.path.basename(path) not in _METADATA:
            walked.pictures.append(path)
            walked.with_text.append(has_text)
        elif b"/" in path:
            walked.metadata.append(path)
    return walked


def _list(root: bytes, prefix: bytes, tally: Tally) -> tuple[list[bytes], set[bytes]]:
    """What one folder holds that is not hidden.

    Args:
        root: the whole folder.
        prefix: the path of the one to list below the root, with a slash at its end.
        tally: counts what must not be used.

    Returns:
        names: the pictures and metadata files, and with a slash at their end the folders.
        texts: stems of the .txt files.
    """
    names, texts, inside = list[bytes](), set[bytes](), _inside(root)
    with os.scandir(os.path.join(root, prefix)) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(b"."):
                continue
            if entry.is_dir() and entry.is_symlink():
                tally.add("link to a folder", os.fsdecode(prefix + name))
            elif entry.is_dir():
                names.append(name + b"/")
            elif name in _METADATA:
                names.append(name)
            elif name.endswith(b".txt") or is_picture(name):
                if reason := _refused(entry, inside):
                    tally.add(reason, os.fsdecode(prefix + name))
                elif name.endswith(b".txt"):
                    texts.add(name[:-4])
                else:
                    names.append(name)
    return names, texts


# --- captions of metadata ----------------------------------------------------------------------------------


def _decode(data: bytes) -> str:
    """Text of any bytes; `_encode` gives back the same bytes."""
    return data.decode("utf-8", "surrogateescape")


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # JSON may escape half a surrogate pair
        return text.encode("utf-8", "replace")


class _Line(NamedTuple):
    """One record of metadata and where it lies, in bytes; `values` is None where it does not parse."""

    offset: int
    size: int
    values: Any


def _raw_lines(path: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The lines of a file: offset, size and content, which is cut at `_MAX_LINE` bytes."""
    with open(path, "rb", buffering=1 << 20) as file:
        offset = 3 if file.read(3) == b"\xef\xbb\xbf" else 0  # the byte order mark that Excel writes
        file.seek(offset)
        while data := file.readline(_MAX_LINE):
            size, last = len(data), data
            while len(last) == _MAX_LINE and not last.endswith(b"\n"):
                last = file.readline(_MAX_LINE)
                size += len(last)
            yield offset, size, data
            offset += size


def _json_values(data: bytes) -> Any:
    try:
        values = json.loads(_decode(data))
    except (ValueError, RecursionError):  # not JSON, or nested without end
        return None
    return values if isinstance(values, dict) else None


def _json_lines(path: bytes) -> Iterator[_Line]:
    for offset, size, data in _raw_lines(path):
        if data.strip():
            yield _Line(offset, min(size, _MAX_LINE), _json_values(data))


def _csv_values(data: bytes) -> list[str] | None:
    try:
        return next(csv.reader(io.StringIO(_decode(data), newline="\n")), None)
    except csv.Error:
        return None


def _csv_lines(path: bytes) -> Iterator[_Line]:
    """The records of a CSV file; one may take several lines, where a quoted field holds line ends."""
    end = 0  # bytes up to which the reader was fed

    def feed() -> Iterator[str]:
        nonlocal end
        for offset, size, data in _raw_lines(path):
            end = offset + size
            yield _decode(data)

    reader, start = csv.reader(feed()), next((offset for offset, _, _ in _raw_lines(path)), 0)
    while True:
        try:
            values: list[str] | None = next(reader)
        except csv.Error:  # a field of more than 131,072 characters, as where a quote is never closed
            values = None
        except StopIteration:
            return
        if values is None or values:
            yield _Line(start, min(end - start, _MAX_LINE), values)
        start = end


class _Metadata:
    """A metadata file: which fields names and captions are in, and how a record is read.

    Raises:
        UserError: it has no field of names or none of captions.
    """

    def __init__(self, path: bytes, options: SourceOptions) -> None:
        self.path, self._is_json = path, path.endswith(b".jsonl")
        self._columns: dict[str, int] = {}
        if self._is_json:
            first = itertools.islice(_json_lines(path), _LOOKED_AT)
            fields = list(dict.fromkeys(key for line in first for key in line.values or ()))
        else:
            header = next(_csv_lines(path), None)
            fields = [name.strip() for name in (header.values if header else None) or []]
            self._columns = {name: place for place, name in reversed(list(enumerate(fields)))}
        self._name_key = self._key("image", "file_name", options, fields, _NAME_KEYS)
        self.caption_key = self._key("caption", "caption", options, fields)

    def _key(
        self, kind: str, usual_name: str, options: SourceOptions, fields: list[str], usual: Sequence[str] | None = None
    ) -> str:
        where = printable(os.fsdecode(self.path))
        key = find_key(kind, options, fields, where, usual)
        if key is None:
            names = ", ".join(sorted(map(printable, fields)))
            has = f"the fields {names}, none named" if names else "no line that can be read, so no field"
            raise UserError(f"data.*.path: {where} has {has} {usual_name}; data.*.{kind}_key names another")
        return key

    def lines(self) -> Iterator[_Line]:
        """The records, without the header."""
        return _json_lines(self.path) if self._is_json else itertools.islice(_csv_lines(self.path), 1, None)

    def name(self, values: Any) -> bytes:
        """The picture that a record names; empty: none."""
        value = self._field(values, self._name_key)
        return _encode(value) if isinstance(value, str) else b""

    def captions(self, values: Any) -> list[bytes]:
        """The captions of a record; what is no string is left out."""
        value = self._field(values, self.caption_key)
        return [_encode(text) for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]

    def parse(self, data: bytes) -> Any:
        """The values of a record's bytes."""
        return _json_values(data) if self._is_json else _csv_values(data)

    def _field(self, values: Any, key: str) -> Any:
        if isinstance(values, dict):
            return values.get(key)
        place = self._columns.get(key, 0)
        return values[place] if isinstance(values, list) and place < len(values) else None


class _Captions:
    """Which pictures have captions, and these; this base has none.

    Attributes:
        modalities: of the source.
        pictures: `[n] int64`, the number of each example's picture.
    """

    modalities: tuple[str, ...] = ("image",)

    def __init__(self, pictures: np.ndarray) -> None:
        self.pictures = pictures

    def read(self, indices: np.ndarray) -> list[Record]:
        """Records without pictures."""
        return [Record() for _ in indices]

    def digest(self) -> bytes:
        """A hash of what belongs to the fingerprint."""
        return b""


class _Described(_Captions):
    """Captions from metadata: a row for each line, or each caption of a line, in the order of the pictures."""

    modalities = ("image", "text")

    def __init__(self, metadata: _Metadata, names: Names, each_caption: bool, tally: Tally) -> None:
        self._metadata, self._open = metadata, file_cache()
        rows, used = array.array("q"), np.zeros(len(names), bool)
        for line in metadata.lines():
            number = _picture_number(metadata, line, names, tally)
            if number is None:
                continue
            used[number] = True
            captions = metadata.captions(line.values)
            if not captions:
                tally.add("no caption", os.fsdecode(names[number]))
            for which in range(len(captions)) if each_caption else [_ALL] * bool(captions):
                rows.extend((number, line.offset, line.size, which))
        _add_all(tally, "no caption", names, np.flatnonzero(~used))
        table = np.frombuffer(rows, np.int64).reshape(-1, 4)
        self._rows = table[np.argsort(table[:, 0], kind="stable")]
        super().__init__(self._rows[:, 0])

    def read(self, indices: np.ndarray) -> list[Record]:
        file, records = self._open(os.fsdecode(self._metadata.path)), []
        for _, offset, size, which in self._rows[indices].tolist():
            captions = self._metadata.captions(self._metadata.parse(file.read(offset, size)))
            records.append(several(captions if which == _ALL else captions[which : which + 1]))
        return records

    def digest(self) -> bytes:
        digest = hashlib.sha256(os.path.splitext(self._metadata.path)[1] + _encode(self._metadata.caption_key))
        for column, kind in zip(self._rows.T, ("<i4", "<i8", "<i4", "<i4"), strict=True):
            digest.update(column.astype(kind).tobytes())
        return digest.digest()


def _picture_number(metadata: _Metadata, line: _Line, names: Names, tally: Tally) -> int | None:
    """The number of the picture that a line names, or None (counted)."""
    name = metadata.name(line.values)
    if not name:
        reason = "unreadable line" if line.values is None else "no file name"
        tally.add(reason, f"{os.path.basename(metadata.path).decode()} at byte {line.offset}")
        return None
    parts = name.split(b"/")
    if name.startswith(b"/") or b".." in parts:
        tally.add("unsafe name", os.fsdecode(name))
        return None
    number = names.find(b"/".join(part for part in parts if part not in (b"", b".")))
    if number is None:
        tally.add("no image", os.fsdecode(name))
    return number


class _Beside(_Captions):
    """Captions in a .txt beside each picture."""

    modalities = ("image", "text")

    def __init__(self, root: bytes, walked: _Walked, tally: Tally) -> None:
        self._root, self._names = root, walked.pictures
        paired = np.frombuffer(walked.with_text, np.bool_)
        super().__init__(np.flatnonzero(paired))
        _add_all(tally, "no caption", walked.pictures, np.flatnonzero(~paired))
        _add_all(tally, "no image", walked.lonely, np.arange(len(walked.lonely)))

    def _text(self, i: int) -> bytes:
        return os.path.splitext(self._names[int(self.pictures[i])])[0] + b".txt"

    def read(self, indices: np.ndarray) -> list[Record]:
        return [Record(caption=read_whole(os.path.join(self._root, self._text(int(i))))) for i in indices]

    def digest(self) -> bytes:
        texts = Names()
        for i in range(len(self.pictures)):
            texts.append(self._text(i))
        return texts.digest() + sizes_digest(self._root, texts)


def _add_all(tally: Tally, reason: str, names: Names, numbers: np.ndarray) -> None:
    if len(numbers):
        tally.add(reason, os.fsdecode(names[int(numbers[0])]), len(numbers))


# --- the source --------------------------------------------------------------------------------------------


class FolderSource:
    """Pictures below a folder with their captions, by index.

    Examples are in the order of the pictures' paths, sorted as bytes. A picture that several lines of metadata name
    is an example for each. Hidden files and folders (``.name``) are no part of it, and folders that are links are not
    entered. A caption of no characters is a caption: the example stays.

    Attributes:
        modalities: `("image", "text")`; without captions `("image",)`.
        classes: none.
        report: how many examples there are, and what was left out.
        fingerprint: hash of the pictures' paths, of the sizes of at most 65,536 of them, and of where the captions
            lie.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Walks the folder and reads its metadata.

        Args:
            path: a local folder.
            options: `caption_key` is the metadata's field of the caption; `image_key` that of the picture's path, by
                default ``file_name``; with `captions="all"` each caption of a list is an example.

        Raises:
            UserError: `path` is no folder, or holds no picture; the metadata lack a field.
            OSError: a folder or the metadata cannot be read.
        """
        self._root = local_folder(path, _FORMS)
        tally = Tally(os.path.basename(os.fsdecode(self._root)))
        walked = _walk(self._root, tally)
        self._names = walked.pictures
        self._captions = self._find_captions(path, walked, options, tally)
        self.modalities = self._captions.modalities
        self.report = tally.report(1, len(self))
        if not len(self):
            kinds = " with ".join(self.modalities)
            raise UserError(f"data.*.path={path!r} holds no {kinds}{left_out(self.report)}; {_FORMS}")
        if self.report.skipped:
            _log.warning("folder: left out: %s", skip_line(self.report))
        digest = hashlib.sha256(f"folder {self.modalities}".encode())
        digest.update(self._names.digest() + sizes_digest(self._root, self._names) + self._captions.digest())
        self.fingerprint = digest.hexdigest()[:16]

    def _find_captions(self, path: str, walked: _Walked, options: SourceOptions, tally: Tally) -> _Captions:
        for name in _METADATA:
            if os.path.lexists(place := os.path.join(self._root, name)):
                if not _within(place, _inside(self._root)):
                    raise UserError(f"data.*.path={path!r}: {name.decode()} is a link out of the folder; copy it there")
                return _Described(_Metadata(place, options), self._names, options.captions == "all", tally)
        if any(walked.with_text):
            return _Beside(self._root, walked, tally)
        if walked.metadata:
            inside = os.fsdecode(os.path.dirname(os.path.join(self._root, walked.metadata[0])))
            raise UserError(
                f"data.*.path={path!r} has its metadata in folders below it ({len(walked.metadata)}); name one of "
                f"these; did you mean {printable(inside)!r}?"
            )
        return _Captions(np.arange(len(self._names)))

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._captions.pictures)

    def read(self, indices: np.ndarray) -> list[Record]:
        """Reads examples, in the order of `indices`; safe to call from several threads at once.

        Args:
            indices: `[n] int64`, each in `[0, len(self))`.

        Raises:
            OSError: a file cannot be read, or the metadata are shorter than when they were indexed.
        """
        records = self._captions.read(indices)
        for record, number in zip(records, self._captions.pictures[indices].tolist(), strict=True):
            record["image"] = read_picture(self._root, self._names[number])
        return records
