"""A folder of pictures with their captions: a table such as metadata.jsonl, or a .txt beside each picture.

The layout is that of Hugging Face's ``imagefolder``: each line of the metadata names a picture by its path in the
folder (field ``file_name``) and holds its caption, or a list of them. Without metadata, ``captions.*`` is such a table;
else ``a/b.txt`` or ``a/b.jpg.txt`` is the caption of ``a/b.jpg``; else the one table that has both names and captions;
without any, it is a source of pictures alone. Where all pictures lie in one folder below, names of the table may leave
that folder out, as Flickr8k's do. Of folders called ``train`` and ``test`` without a table above them one is read.

The folder is walked at each start, and its table read once. What stays in memory are the pictures' names, one after
the other in one bytes object, and where each line of the table lies: a fraction of what Python's objects would take.
What cannot be used is left out and counted by reason; files that are not read are counted by their endings. A line that
does not parse counts with its picture as one, where it holds the picture's name as it is; else each is counted.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple

import numpy as np

from m3ae_jax.data.sources import splits
from m3ae_jax.data.sources.base import Record, SourceOptions, class_captions, several
from m3ae_jax.data.sources.files import SPLITS, encoding_of, split_in
from m3ae_jax.data.sources.index import Tally, left_out, printable
from m3ae_jax.data.sources.metadata import (
    ANNOTATIONS,
    BEYOND,
    ENDINGS,
    Classes,
    Line,
    Metadata,
    Table,
    class_texts,
    fits,
    open_table,
)
from m3ae_jax.data.sources.picture_files import (
    START,
    Names,
    count_file,
    file_kind,
    folder_name,
    is_dir,
    is_file,
    is_picture,
    local_folder,
    nothing_in,
    read_picture,
    read_whole,
    refuse_foreign,
    sizes_digest,
    too_large,
    unsupported,
)
from m3ae_jax.errors import UserError, one_of

_METADATA = tuple(b"metadata" + ending for ending in ENDINGS)
_CAPTIONS = tuple(b"captions" + ending for ending in ENDINGS)
_OF_ANNOTATIONS = (b"", b"annotations/")  # where COCO's annotation files lie beside the pictures
_CAPTIONS_TXT = b"captions.txt"  # of Flickr8k, where it is a CSV file
_ALL, _MADE, _NONE = -1, -2, -3  # in place of a caption's number: all of them, that of the class, none
_NO_TEXT = 0  # no .txt is beside a picture; another number is that of one of `_text_names`, from 1
_LOOKED_AT = 4096  # bytes of a line that does not parse, in which its picture's name is looked for
_FIELDS = ("image_key", "caption_key", "label_key", "group_key", "template")

_FORMS = (
    "it takes a folder of pictures with a metadata.jsonl, .csv, .tsv or .parquet (fields file_name and caption), "
    "or with a .txt beside each picture"
)


# --- the walk ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Walked:
    """What a folder holds.

    Attributes:
        pictures: paths of all pictures below it, sorted as bytes.
        texts: for each, which .txt is beside it, as `_NO_TEXT`.
        refused: paths of the pictures that must not be used, sorted as bytes.
        reasons: why, for each.
        tables: names of the tables in the folder itself.
        metadata: the metadata files that are not in the folder itself, but below.
        beside: counts the .txt where they are captions.
        elsewhere: counts them where they are not.
    """

    pictures: Names
    texts: bytearray
    refused: Names
    reasons: list[str]
    tables: list[bytes]
    metadata: list[bytes]
    beside: Tally
    elsewhere: Tally

    def count_refused(self, tally: Tally, counted: set[int]) -> None:
        """Counts the pictures that must not be used, but for those that are `counted` already."""
        for number, reason in enumerate(self.reasons):
            if number not in counted:
                tally.add(reason, os.fsdecode(self.refused[number]))


class _Found(NamedTuple):
    """A folder (with a slash at its end) or picture: path, which .txt is beside it, and why it must not be used."""

    path: bytes
    text: int = _NO_TEXT
    refused: str = ""


def _within(path: bytes, root: bytes) -> bool:
    """Whether the true path of a file is in a folder."""
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(root), b""))


def _refused(entry: os.DirEntry[bytes], root: bytes) -> str:
    """Why a file must not be used, or an empty string."""
    if entry.is_symlink() and not _within(entry.path, root):
        return "link out of the folder"
    return "" if is_file(entry) else "not a regular file"


def _walk(root: bytes, table: bytes, tally: Tally) -> _Walked:
    """Lists all pictures below `root`.

    Args:
        root: the folder.
        table: the name of the table in it that is read; empty: none yet.
        tally: counts the files that are not read, but for .txt and tables of the folder itself.

    Raises:
        OSError: a folder cannot be listed.
    """
    name = folder_name(root)
    walked = _Walked(Names(), bytearray(), Names(), [], [], [], Tally(name), Tally(name))
    pending = [_Found(b"")]
    while pending:
        found = pending.pop()
        if not found.path or found.path.endswith(b"/"):
            pending += sorted(_list(root, found.path, table, walked, tally), reverse=True)
        elif found.refused:
            walked.refused.append(found.path)
            walked.reasons.append(found.refused)
        else:
            walked.pictures.append(found.path)
            walked.texts.append(found.text)
    walked.tables.sort()
    walked.metadata.sort()
    return walked


def _list(root: bytes, prefix: bytes, table: bytes, walked: _Walked, tally: Tally) -> list[_Found]:
    """The folders and pictures of one folder that are not hidden.

    Args:
        root: the whole folder.
        prefix: the path of the one to list below the root, with a slash at its end.
        table: as in `_walk`.
        walked: takes the tables, and the counts of the .txt.
        tally: counts what is not read.
    """
    found, pictures, texts = list[_Found](), dict[bytes, str](), dict[bytes, str]()
    with os.scandir(os.path.join(root, prefix)) as entries:
        for entry in entries:
            name, path = entry.name, prefix + entry.name
            if name.startswith(b".") or path == table:
                continue
            if is_dir(entry):
                if entry.is_symlink():
                    tally.add("link to a folder", os.fsdecode(path))
                else:
                    found.append(_Found(path + b"/"))
            elif name.lower().endswith(b".txt"):
                texts[name] = _refused(entry, root)
            elif is_picture(name) or unsupported(name):
                pictures[name] = _refused(entry, root) or unsupported(name)
            elif (not prefix and name.endswith(ENDINGS)) or (prefix in _OF_ANNOTATIONS and name.endswith(ANNOTATIONS)):
                walked.tables.append(path)
            else:
                if name in _METADATA:
                    walked.metadata.append(path)
                tally.ignore(file_kind(name), os.fsdecode(path))
    used = set[bytes]()
    for name, refused in pictures.items():
        names = _text_names(name)
        text = next((which for which, beside in enumerate(names, 1) if texts.get(beside) == ""), _NO_TEXT)
        used.update(names[text - 1 : text] if text else ())
        found.append(_Found(prefix + name, text, refused))
    _count_texts(prefix, pictures, texts, used, walked)
    return found


def _text_names(picture: bytes) -> list[bytes]:
    """What the .txt beside a picture may be called: the first that is there is its caption."""
    stem = os.path.splitext(picture)[0]
    return [name + ending for ending in (b".txt", b".TXT", b".Txt") for name in (stem, picture)]


def _count_texts(
    prefix: bytes, pictures: dict[bytes, str], texts: dict[bytes, str], used: set[bytes], walked: _Walked
) -> None:
    """Counts the .txt of a folder that are no captions."""
    if not texts:
        return
    walked.elsewhere.ignore("file .txt", os.fsdecode(prefix + min(texts)), len(texts))
    stems = {os.path.splitext(name)[0] for name in pictures}
    for name in sorted(texts):
        path, stem = os.fsdecode(prefix + name), name[:-4]
        if texts[name]:
            walked.beside.ignore(f"{texts[name]}, .txt", path)
        elif stem not in stems and stem not in pictures:
            walked.beside.add("no image", path)
        elif name not in used:
            walked.beside.ignore("second .txt of a picture", path)


# --- captions ----------------------------------------------------------------------------------------------


class _Captions:
    """Which pictures have captions, and these; this base has none.

    Attributes:
        modalities: of the source.
        classes: of the source.
        pictures: `[n] int64`, the number of each example's picture.
        of_split: whether they are those of the split that the options name, by a table's rows or its name.
    """

    modalities: tuple[str, ...] = ("image",)
    classes: tuple[str, ...] = ()
    of_split = False

    def __init__(self, pictures: np.ndarray) -> None:
        self.pictures = pictures

    def read(self, indices: np.ndarray) -> list[Record]:
        """Records without pictures."""
        return [Record() for _ in indices]

    def digest(self) -> bytes:
        """A hash of what belongs to the fingerprint."""
        return b""


class _Beside(_Captions):
    """Captions in a .txt beside each picture."""

    modalities = ("image", "text")

    def __init__(self, root: bytes, walked: _Walked, max_bytes: int, tally: Tally) -> None:
        self._root, self._names, self._max_bytes = root, walked.pictures, max_bytes
        self._texts = np.frombuffer(walked.texts, np.uint8)
        super().__init__(np.flatnonzero(self._texts))
        _add_all(tally, "no caption", walked.pictures, np.flatnonzero(self._texts == _NO_TEXT))
        walked.count_refused(tally, set())
        tally.merge(walked.beside.skipped, walked.beside.unused)
        refuse_foreign(os.path.join(root, self._text(0)))  # one tool wrote them all, most likely

    def _text(self, i: int) -> bytes:
        number = int(self.pictures[i])
        return _text_names(self._names[number])[self._texts[number] - 1]

    def read(self, indices: np.ndarray) -> list[Record]:
        records = []
        for i in indices.tolist():
            caption = read_whole(os.path.join(self._root, self._text(i)), self._max_bytes)
            if caption is None:
                records.append(too_large())
            else:  # one in UTF-16 is none that can be read
                records.append(Record() if encoding_of(caption[:START]) else Record(caption=caption))
        return records

    def digest(self) -> bytes:
        texts = Names()
        for i in range(len(self.pictures)):
            texts.append(self._text(i))
        return texts.digest() + sizes_digest(self._root, texts)


class _Described(_Captions):
    """Captions from a table: a row for each line, or each caption of a line, in the order of the pictures."""

    def __init__(self, metadata: Metadata, walked: _Walked, options: SourceOptions, tally: Tally) -> None:
        self._metadata, self._names, self._options = metadata, walked.pictures, options
        self._refused, self._reasons, self._tally = walked.refused, walked.reasons, tally
        self._below = _common_folder(walked.pictures)
        self._makes = class_texts(options, metadata)
        has_text = metadata.caption_key is not None or self._makes
        self.modalities = ("image", "text") if has_text else ("image",)
        self._rows, self._labels = self._read_lines(Classes(metadata.table.numbers_are_text))
        super().__init__(self._rows[:, 0])
        walked.count_refused(tally, self._named_refused)
        tally.merge(walked.elsewhere.skipped, walked.elsewhere.unused)

    def _read_lines(self, classes: Classes) -> tuple[np.ndarray, np.ndarray]:
        """The rows `[n, 4] int64` (picture, offset, bytes, caption) and their classes `[n] int32`, -1: none."""
        rows, codes = array.array("q"), array.array("i")
        used, self._named_refused = np.zeros(len(self._names), bool), set[int]()
        metadata, seen = self._metadata, {*self._metadata.keys, BEYOND}
        split = self._chosen_split()
        self.of_split = bool(split)
        self._count_columns([*metadata.table.fields, *metadata.table.others], seen)
        for line in metadata.table.lines(metadata.keys):
            reason = metadata.unreadable(line.values)
            if split and not reason and (other := metadata.split(line.values or {})) != split:
                self._tally.ignore(f"row of split {other}" if other else "row of no split", _base_name(metadata.table))
                number = _find(self._names, self._paths(metadata.name(line.values or {})))
                used[number if number is not None else []] = True
                continue
            number = self._named_within(line, reason) if reason else self._picture_number(line)
            self._count_columns(line.values or (), seen)
            if number is not None:
                used[number] = True
            if number is None or reason:
                continue
            code = classes.add(metadata.label(line.values or {}))
            for which in self._which(line, number, code):
                rows.extend((number, line.offset, line.size, which))
                codes.append(code)
        missing = "no caption" if "text" in self.modalities else "no label"
        _add_all(self._tally, missing, self._names, np.flatnonzero(~used))
        return self._sorted(np.frombuffer(rows, np.int64).reshape(-1, 4), np.frombuffer(codes, np.int32), classes)

    def _chosen_split(self) -> str:
        """The split whose rows are read, where those of the table tell of several; empty: all rows.

        Raises:
            UserError: there is no such split.
        """
        metadata, wanted = self._metadata, self._options.split
        if metadata.split_key is None or not wanted:
            return ""
        there = {metadata.split(line.values or {}) for line in metadata.table.lines(metadata.keys)} - {""}
        if len(there) < 2 or not any(splits.called(name, there) for name in SPLITS):
            return ""
        chosen = splits.called(wanted, there)
        if chosen is None:
            raise UserError(f"{one_of('data.*.split', wanted, there)} (the field split of {metadata.table.where})")
        return chosen

    def _sorted(self, rows: np.ndarray, codes: np.ndarray, classes: Classes) -> tuple[np.ndarray, np.ndarray]:
        """The rows in the order of the pictures, and their classes."""
        try:
            self.classes, numbers = classes.finish()
            labels = numbers[codes]
        except ValueError as error:
            self._without_classes(str(error))
            labels = np.full(len(rows), -1, np.int32)
        self._made = class_captions(self._options.template, self.classes) if self._makes else ()
        order = np.argsort(rows[:, 0], kind="stable")
        return rows[order], labels[order]

    def _without_classes(self, value: str) -> None:
        """Leaves a field of no classes unread, which the user did not name and of which nothing is made."""
        key, metadata = self._metadata.label_key, self._metadata
        if self._options.label_key or self._makes or metadata.caption_key is None:
            raise UserError(
                f"data.*.label_key={key!r}: {metadata.table.where} has {value}, which is no class; classes are "
                "integers from 0, or names"
            ) from None
        self._tally.ignore(f"column {key} (no classes)", f"{_base_name(metadata.table)}: {value}")

    def _count_columns(self, fields: Iterable[str], seen: set[str]) -> None:
        for field in fields:
            if field not in seen:
                seen.add(field)
                self._tally.ignore(f"column {field or 'without a name'}", _base_name(self._metadata.table))

    def _paths(self, name: bytes) -> tuple[bytes, ...]:
        """The pictures' paths that a name may mean; none where it leads out of the folder."""
        path = _normal(name)
        paths = [] if path is None else [path, self._below + path]
        paths += self._by_name.get(os.path.basename(name), ())
        return tuple(dict.fromkeys(paths))

    @functools.cached_property
    def _by_name(self) -> dict[bytes, tuple[bytes, ...]]:
        """The path of each picture whose name no other has, where the table gives names alone."""
        named: dict[bytes, tuple[bytes, ...]] = {}
        for number in range(len(self._names) if self._metadata.table.names_alone else 0):
            path = self._names[number]
            name = os.path.basename(path)
            named[name] = () if name in named else (path,)
        return named

    def _named_within(self, line: Line, reason: str) -> int | None:
        """Counts a line that cannot be used; the number of the picture that it names, where its text has the name."""
        self._tally.add(reason, f"{_base_name(self._metadata.table)} at {line.offset}")
        data = self._metadata.table.raw(line.offset, min(line.size, _LOOKED_AT))
        found = (_find(self._names, self._paths(part.strip())) for part in re.split(rb'["\t\n,;|]', data))
        return next((number for number in found if number is not None), None)

    def _picture_number(self, line: Line) -> int | None:
        """The number of the picture that a line names, or None (counted)."""
        name = self._metadata.name(line.values or {})
        paths = self._paths(name)
        if not name:
            self._tally.add("no file name", f"{_base_name(self._metadata.table)} at {line.offset}")
            return None
        if not paths:
            self._tally.add("unsafe name", os.fsdecode(name))
            return None
        number = _find(self._names, paths)
        if number is None:
            refused = _find(self._refused, paths)
            if refused is not None:
                self._named_refused.add(refused)
            self._tally.add("no image" if refused is None else self._reasons[refused], os.fsdecode(name))
        return number

    def _which(self, line: Line, number: int, code: int) -> list[int]:
        """Which captions of a line are examples; what is none is counted."""
        values, name = line.values or {}, os.fsdecode(self._names[number])
        if line.size > self._options.max_bytes:
            self._tally.add(
                "too many bytes (data.max_bytes)", f"{_base_name(self._metadata.table)}: {line.size:,} bytes"
            )
            return []
        if "text" not in self.modalities:
            return [_NONE]
        given = self._metadata.captions(values)
        captions = [caption for caption in given if caption is not None]
        if not captions:
            if self._makes and code >= 0:
                return [_MADE]
            self._tally.add("no caption", name)
            return []
        if self._options.captions == "all":
            self._tally.add("no caption", name, len(given) - len(captions))
            return list(range(len(captions)))
        self._tally.ignore("null in a list of captions", name, len(given) - len(captions))
        return [_ALL]

    def read(self, indices: np.ndarray) -> list[Record]:
        rows, labels = self._rows[indices].tolist(), self._labels[indices].tolist()
        return [self._record(row, label) for row, label in zip(rows, labels, strict=True)]

    def _record(self, row: list[int], label: int) -> Record:
        number, offset, size, which = row
        values = self._metadata.table.read(offset, size) or {}
        captions = [one for one in self._metadata.captions(values) if one is not None]
        # A table that is written again while a run reads it would give other pictures' captions.
        is_same = not self._metadata.unreadable(values) and self._names[number] in self._paths(
            self._metadata.name(values)
        )
        if not is_same or which >= len(captions):
            raise OSError(
                f"{self._metadata.table.where}: its line at {offset} is not that of "
                f"{printable(os.fsdecode(self._names[number]))} any more: the file has changed since it was indexed; "
                "start again to index it anew"
            )
        if which == _MADE:
            captions = [self._made[label]]
        record = several(captions[which : which + 1] if which >= 0 else captions) if which != _NONE else Record()
        if label >= 0:
            record["label"] = label
        record.update(self._metadata.group(values))
        return record

    def digest(self) -> bytes:
        caption_key = (self._metadata.caption_key or "").encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(os.path.splitext(self._metadata.table.path)[1] + caption_key)
        for column, kind in zip(self._rows.T, ("<i4", "<i8", "<i4", "<i4"), strict=True):
            digest.update(column.astype(kind).tobytes())
        more = (self.classes, self._options.template, self._options.group_key)
        if any(more):
            digest.update(repr(more).encode("utf-8", "surrogateescape") + self._labels.astype("<i4").tobytes())
        return digest.digest()


def _base_name(table: Table) -> str:
    return os.path.basename(os.fsdecode(table.path))


def _normal(name: bytes) -> bytes | None:
    """A picture's path as the walk has it; None where it leads out of the folder."""
    parts = name.split(b"/")
    if name.startswith(b"/") or b".." in parts:
        return None
    return b"/".join(part for part in parts if part not in (b"", b"."))


def _find(names: Names, paths: Iterable[bytes]) -> int | None:
    """The number of the first of `paths` that is among the names, or None."""
    return next((number for path in paths if (number := names.find(path)) is not None), None)


def _common_folder(names: Names) -> bytes:
    """The folder, with a slash at its end, that all of these sorted paths are in; empty: none."""
    ends = [names[0], names[len(names) - 1]] if len(names) else [b""]
    return os.path.join(os.path.commonpath(list(map(os.path.dirname, ends))), b"")


def _add_all(tally: Tally, reason: str, names: Names, numbers: np.ndarray) -> None:
    if len(numbers):
        tally.add(reason, os.fsdecode(names[int(numbers[0])]), len(numbers))


# --- which table -------------------------------------------------------------------------------------------


def _named_table(root: bytes, path: str, options: SourceOptions) -> Table | None:
    """The table that the folder's layout names: ``metadata.*``, else ``captions.*``.

    Raises:
        UserError: it must not be used.
        OSError: it cannot be read.
    """
    for name in (*_METADATA, *_CAPTIONS, _CAPTIONS_TXT):
        place = os.path.join(root, name)
        if not os.path.lexists(place) or os.path.isdir(place):
            continue
        is_safe = _within(place, root)
        if name != _CAPTIONS_TXT and not is_safe:
            raise UserError(f"data.*.path={path!r}: {name.decode()} is a link out of the folder; copy it there")
        if name != _CAPTIONS_TXT and not os.path.isfile(place):
            raise UserError(f"data.*.path={path!r}: {name.decode()} is no regular file")
        if name != _CAPTIONS_TXT or (is_safe and os.path.isfile(place)):
            table = open_table(place, options)
            if name != _CAPTIONS_TXT or _may_be_table(table, options):
                return table
    return None


def _may_be_table(table: Table, options: SourceOptions) -> bool:
    """Whether a table has names and captions, as named, or (as where one is mistyped) as is usual."""
    return fits(table.fields, options) or fits(table.fields, SourceOptions())


def _only_table(root: bytes, path: str, walked: _Walked, options: SourceOptions) -> Table | None:
    """The one table in the folder that has both names and captions, by whatever name.

    Raises:
        UserError: there are several, or one is no UTF-8.
    """
    tables = [table for table in _tables(root, walked.tables, options) if _may_be_table(table, options)]
    exact = [table for table in tables if fits(table.fields, options)]
    of_splits = {split_in(_base_name(table)): table for table in exact or tables}
    chosen = splits.called(options.split, of_splits) if len(of_splits) == len(exact or tables) else None
    if len(of_splits) > 1 and chosen:
        return of_splits[chosen]
    if len(exact or tables) > 1:
        names = ", ".join(printable(_base_name(table)) for table in exact or tables)
        raise UserError(
            f"data.*.path={path!r} has several tables of names and captions ({names}); rename the one to be read to "
            "metadata, as metadata.csv"
        )
    return next(iter(exact or tables), None)


def _tables(root: bytes, names: Iterable[bytes], options: SourceOptions) -> Iterator[Table]:
    """The tables of these names that can be read.

    Raises:
        UserError: one is no UTF-8.
    """
    for name in names:
        place = os.path.join(root, name)
        if _within(place, root) and os.path.isfile(place):
            try:
                yield open_table(place, options)
            except UserError:
                if not name.endswith(b".parquet"):
                    raise  # a damaged Parquet file that is not asked for is counted as any other file


def _refuse_fields(root: bytes, path: str, walked: _Walked, options: SourceOptions) -> None:
    """Refuses options that only a table of captions could use.

    Raises:
        UserError: there is such an option.
    """
    for option in _FIELDS:
        if value := getattr(options, option):
            there = [f"{table.where} has {', '.join(table.fields)}" for table in _tables(root, walked.tables, options)]
            tables = "; ".join(map(printable, there)) or "it has none"
            where = "eval." if option == "group_key" else "data.*."
            raise UserError(
                f"{where}{option}={value!r}: {path} has no table of captions (fields file_name and caption) in use: "
                f"{tables}"
            )


def _split_folder(top: bytes, path: str, options: SourceOptions, tally: Tally) -> bytes | None:
    """The folder of a split, as ``PATH/train`` with a metadata file, or beside ``PATH/test``; None where there is none.

    Raises:
        UserError: the options name another split than there is.
    """

    def has_metadata(name: bytes) -> bool:
        return any(os.path.isfile(os.path.join(top, name, metadata)) for metadata in _METADATA)

    described = [] if has_metadata(b"") else sorted(name for name in os.listdir(top) if has_metadata(name))
    names = [os.fsdecode(name) for name in described or _named_splits(top, path, options)]
    found = splits.called(options.split, names) or options.split
    if names and (options.split not in splits.DEFAULTS or not described):
        splits.check(path, found, names)
    folder = os.path.join(top, os.fsencode(found))
    if found not in names or os.path.islink(folder):
        return None
    for name in sorted(set(os.listdir(top)) - {os.fsencode(found)}):
        if name.startswith(b"."):
            continue
        if not os.path.isdir(os.path.join(top, name)):
            _count_beside(tally, name)
        elif os.fsdecode(name) in names:
            tally.ignore(f"folder of split {os.fsdecode(name)}", os.fsdecode(name))
        else:
            tally.ignore("folder without metadata" if described else "folder of no split", os.fsdecode(name))
    return folder


def _named_splits(top: bytes, path: str, options: SourceOptions) -> list[bytes]:
    """The folders that are called as splits, if there are several with neither pictures nor a table beside them.

    Raises:
        UserError: a table is no UTF-8.
    """
    there = sorted(os.listdir(top))
    names = [name for name in there if os.fsdecode(name).lower() in (*SPLITS, options.split.lower())]
    names = [name for name in names if os.path.isdir(os.path.join(top, name)) and not os.path.islink(name)]
    if len(names) < 2 or not options.split or any(map(is_picture, there)) or _named_table(top, path, options):
        return []
    tables = _tables(top, (name for name in there if name.endswith(ENDINGS)), options)
    return [] if any(_may_be_table(table, options) for table in tables) else names


def _count_beside(tally: Tally, name: bytes) -> None:
    """Counts a file beside the folders of splits."""
    if is_picture(name):
        tally.add("not in the folder of a split", os.fsdecode(name))
    else:
        count_file(tally, name)


# --- the source --------------------------------------------------------------------------------------------


class FolderSource:
    """Pictures below a folder with their captions, by index.

    Examples are in the order of the pictures' paths, sorted as bytes. A picture that several lines of a table name
    is an example for each. Hidden files and folders (``.name``) are no part of it, and folders that are links are not
    entered. A caption of no characters is a caption: the example stays.

    Attributes:
        modalities: `("image", "text")`; without captions `("image",)`.
        classes: those of the table's field of classes: names, sorted, or the integers from 0; none without it.
        report: how many examples there are, what was left out, and which files and columns are not read.
        fingerprint: hash of the pictures' paths, of the sizes of at most 65,536 of them, and of where the captions
            lie.
    """

    uses: ClassVar[frozenset[str]] = frozenset(
        {"split", "image_key", "caption_key", "label_key", "captions", "template", "group_key"}
    )

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Walks the folder and reads its table.

        Args:
            path: a local folder.
            options: `caption_key` is the table's field of the caption; `image_key` that of the picture's path, by
                default ``file_name``; `label_key` that of the class, and with `template` the class makes a caption
                where there is none; `group_key` that of the group; with `captions="all"` each caption of a list is an
                example. `split` is a folder with metadata of its own, or one of several called as splits are.

        Raises:
            UserError: `path` is no folder, or holds no picture; the table lacks a field, or there is none for an
                option.
            OSError: a folder or the table cannot be read.
        """
        top = local_folder(path, _FORMS)
        beside = Tally(folder_name(top))
        folder = _split_folder(top, path, options, beside)
        self._root = folder or top
        tally = Tally(folder_name(self._root))
        tally.merge(beside.skipped, beside.unused)
        self._max_bytes = options.max_bytes
        table = _named_table(self._root, path, options)
        walked = _walk(self._root, os.path.basename(table.path) if table else b"", tally)
        self._names = walked.pictures
        self._captions = self._find_captions(path, walked, table, options, tally)
        if folder is None and not self._captions.of_split:
            splits.check(path, options.split, [])
        self.modalities, self.classes = self._captions.modalities, self._captions.classes
        self.report = tally.report(1, len(self))
        if not len(self):
            kinds = " with ".join(self.modalities)
            if table is None and not len(self._names):
                raise UserError(nothing_in(path, self.report, _FORMS))
            raise UserError(f"data.*.path={path!r} holds no {kinds}{left_out(self.report)}; {_FORMS}")
        digest = hashlib.sha256(f"folder {self.modalities}".encode())
        digest.update(self._names.digest() + sizes_digest(self._root, self._names) + self._captions.digest())
        self.fingerprint = digest.hexdigest()[:16]

    def _find_captions(
        self, path: str, walked: _Walked, table: Table | None, options: SourceOptions, tally: Tally
    ) -> _Captions:
        is_beside = table is None and any(walked.texts)
        if table is None and not is_beside:
            table = _only_table(self._root, path, walked, options)
        for name in walked.tables:
            if table is None or os.path.join(self._root, name) != table.path:
                tally.ignore(file_kind(name), os.fsdecode(name))
        if table is not None:
            described = _Described(Metadata(table, options), walked, options, tally)
            described.of_split |= split_in(_base_name(table)) in splits.names_of(options.split)
            return described
        if not is_beside and walked.metadata:
            inside = os.fsdecode(os.path.dirname(os.path.join(self._root, walked.metadata[0])))
            raise UserError(
                f"data.*.path={path!r} has its metadata in folders below it ({len(walked.metadata)}); name one of "
                f"these, or their data.*.split; did you mean {printable(inside)!r}?"
            )
        if len(self._names):
            _refuse_fields(self._root, path, walked, options)
        if is_beside:
            return _Beside(self._root, walked, options.max_bytes, tally)
        walked.count_refused(tally, set())
        tally.merge(walked.elsewhere.skipped, walked.elsewhere.unused)
        return _Captions(np.arange(len(self._names)))

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._captions.pictures)

    def name(self, index: int) -> str:
        """The picture's path in the folder."""
        return os.fsdecode(self._names[int(self._captions.pictures[index])])

    def read(self, indices: np.ndarray) -> list[Record]:
        """Reads examples, in the order of `indices`; safe to call from several threads at once.

        Args:
            indices: `[n] int64`, each in `[0, len(self))`.

        Raises:
            OSError: a file cannot be read, or the table has changed since it was indexed.
        """
        records = self._captions.read(indices)
        for record, number in zip(records, self._captions.pictures[indices].tolist(), strict=True):
            if "unusable" not in record:
                record.update(read_picture(self._root, self._names[number], self._max_bytes))
        return records
