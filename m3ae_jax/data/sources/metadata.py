"""Tables of captions beside pictures: JSON lines, separated values, Parquet; a record for each picture, or caption.

A table has a field of file names, and one of captions (text, or a list of them) or of classes. It is read once, from
its start to its end; what stays in memory is where each record lies. Parquet and the annotation files of this field
(`data.annotations`) allow no access to single records, so of them the fields that are used stay, in one bytes object.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3ae_jax.data.annotations import captioned
from m3ae_jax.data.sources.base import USUAL_KEYS, Record, SourceOptions, class_captions, find_key
from m3ae_jax.data.sources.files import file_cache
from m3ae_jax.data.sources.index import printable
from m3ae_jax.data.sources.picture_files import Names, refuse_foreign
from m3ae_jax.errors import UserError

ENDINGS = (b".jsonl", b".csv", b".tsv", b".parquet")
ANNOTATIONS = b".json"
"""How the annotation files end that are tables; they are so by what is in them, whatever they are called."""
BEYOND = "more values than the header"
"""Beside the fields of a line of separated values that has more: the last field then holds the rest of the line."""
_NAME_KEYS = (
    "file_name", "filename", "file", "path", "image", "image_path", "img", "filepath", "file_path", "image_name",
    "image_file", "img_path",
)  # fmt: skip
_SPLIT = "split"
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_LOOKED_AT = 1000  # lines of JSON whose fields say what a table holds
_MAX_LINE = 16 << 20  # bytes; a longer line is cut there, and so does not parse
_MAX_CLASSES = 10**6
_BATCH = 4096  # rows of Parquet decoded at once
_DAMAGE = (OSError, ValueError, KeyError, MemoryError, NotImplementedError)  # of which pyarrow's exceptions are
_NUMBER = re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?")

_log = logging.getLogger("m3ae_jax")


def _decode(data: bytes) -> str:
    """Text of any bytes; `_encode` gives back the same bytes."""
    return data.decode("utf-8", "surrogateescape")


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # JSON may escape half a surrogate pair
        return text.encode("utf-8", "replace")


# --- the forms of tables -----------------------------------------------------------------------------------


class Line(NamedTuple):
    """One record of a table and where it lies, in bytes; `values` is None where it does not parse."""

    offset: int
    size: int
    values: dict[str, Any] | None


class Table:
    """A table in a file.

    Args:
        path: the file.

    Attributes:
        path: the file.
        where: its name for messages, with its separator where it has one.
        fields: names of its fields, as far as known, of which names, captions and classes may be taken.
        others: of those of other types.
        numbers_are_text: whether integers are stored as digits.
        names_alone: a picture's path may be another's, so its name alone is looked for too.
    """

    numbers_are_text = False
    names_alone = False

    def __init__(self, path: bytes) -> None:
        self.path, self.where = path, printable(os.fsdecode(path))
        self.fields: list[str] = []
        self.others: list[str] = []
        self._open = file_cache()

    def lines(self, used: Collection[str]) -> Iterator[Line]:
        """All records, at least their `used` fields.

        Raises:
            UserError: a table is damaged so that it has no lines any more.
            OSError: it cannot be read.
        """
        raise NotImplementedError

    def read(self, offset: int, size: int) -> dict[str, Any] | None:
        """The values of a record that `lines` gave; safe to call from several threads at once.

        Raises:
            OSError: the file cannot be read, or is shorter than it was.
        """
        return self.parse(self.raw(offset, size))

    def raw(self, offset: int, size: int) -> bytes:
        """Bytes of the file; raises as `read`."""
        return self._open(os.fsdecode(self.path)).read(offset, size)

    def parse(self, data: bytes) -> dict[str, Any] | None:
        """The values of a record's bytes; None where they do not parse."""
        raise NotImplementedError


def open_table(path: bytes, options: SourceOptions) -> Table:
    """Opens a table; its form is that of its ending, separated values for all other endings.

    Args:
        path: the file.
        options: `image_key` and `caption_key` tell separators apart.

    Raises:
        UserError: it is no Parquet file, or no UTF-8.
        OSError: it cannot be read.
    """
    if path.endswith(b".parquet"):
        return _Parquet(path)
    if path.endswith(ANNOTATIONS):
        return _Annotations(path)
    refuse_foreign(path)
    return _JsonLines(path) if path.endswith(b".jsonl") else _Separated(path, options)


def fits(fields: Collection[str], options: SourceOptions, kinds: Sequence[str] = ("caption",)) -> bool:
    """Whether a table has fields of file names and of one of `kinds`, as the options name them or as is usual."""

    lower = {name.lower() for name in fields}

    def has(kind: str) -> bool:
        wanted = getattr(options, f"{kind}_key")
        usual = _NAME_KEYS if kind == "image" else USUAL_KEYS[kind]
        return wanted in fields if wanted else not lower.isdisjoint(map(str.lower, usual))

    return has("image") and any(map(has, kinds))


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


def _json_values(data: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(_decode(data))
    except (ValueError, RecursionError):  # not JSON, or nested without end
        return None
    return values if isinstance(values, dict) else None


class _JsonLines(Table):
    """A JSON object a line; its fields are those of the first lines."""

    def __init__(self, path: bytes) -> None:
        super().__init__(path)
        first = itertools.islice(self.lines(()), _LOOKED_AT)
        self.fields = list(dict.fromkeys(key for line in first for key in line.values or ()))

    def lines(self, used: Collection[str]) -> Iterator[Line]:
        for offset, size, data in _raw_lines(self.path):
            if data.strip():
                yield Line(offset, min(size, _MAX_LINE), _json_values(data))

    def parse(self, data: bytes) -> dict[str, Any] | None:
        return _json_values(data)


class _Row(NamedTuple):
    """A record of separated values: where it lies, its text, and its values: none where it does not parse."""

    offset: int
    size: int
    text: str
    values: list[str]


class _Separated(Table):
    """Values with a separator between them, below a header; the separator is that by which the header makes sense.

    Where the header has blanks around it, as ``image_name| comment``, those of the values are no part of them either.
    """

    numbers_are_text = True

    def __init__(self, path: bytes, options: SourceOptions) -> None:
        super().__init__(path)
        self._separator = self._find_separator(options)
        header = self._header(self._separator)
        self.fields = [name.strip() for name in header]
        self._is_padded = header != self.fields
        self._places = {name: place for place, name in reversed(list(enumerate(self.fields)))}
        self.where += f" (separated by {_SEPARATORS[self._separator]})"

    def _find_separator(self, options: SourceOptions) -> str:
        first = "\t" if self.path.endswith(b".tsv") else ","
        separators = sorted(_SEPARATORS, key=lambda one: one != first)
        headers = {one: [name.strip() for name in self._header(one)] for one in separators}
        for tried in (options, SourceOptions()):  # a mistyped key must not hide the separator
            for separator, fields in headers.items():
                if fits(fields, tried, ("caption", "label")):
                    return separator
        return max(headers, key=lambda one: len(headers[one]))

    def _header(self, separator: str) -> list[str]:
        header = next(self._rows(separator), None)
        return header.values if header else []

    def _rows(self, separator: str) -> Iterator[_Row]:
        """The records that are not blank; one may take several lines, where a quoted field holds line ends."""
        end, text = 0, ""  # bytes up to which the reader was fed, and what of them is the record's

        def feed() -> Iterator[str]:
            nonlocal end, text
            for offset, size, data in _raw_lines(self.path):
                end = offset + size
                line = _decode(data)
                text += line
                yield line

        reader = csv.reader(feed(), delimiter=separator)
        start = next((offset for offset, _, _ in _raw_lines(self.path)), 0)
        while True:
            try:
                values, is_whole = next(reader), True
            except csv.Error:  # a field of more than 131,072 characters, as where a quote is never closed
                values, is_whole = [], False
            except StopIteration:
                return
            if values or not is_whole:
                yield _Row(start, min(end - start, _MAX_LINE), text, values)
            start, text = end, ""

    def lines(self, used: Collection[str]) -> Iterator[Line]:
        for offset, size, text, values in itertools.islice(self._rows(self._separator), 1, None):
            yield Line(offset, size, self._named(text, values))

    def parse(self, data: bytes) -> dict[str, Any] | None:
        text = _decode(data)
        try:
            values = next(csv.reader(io.StringIO(text, newline="\n"), delimiter=self._separator), [])
        except csv.Error:
            return None
        return self._named(text, values)

    def _named(self, text: str, values: list[str]) -> dict[str, Any] | None:
        """The values of a record by their fields; None where there are none."""
        last, is_beyond = len(self.fields) - 1, any(value.strip() for value in values[len(self.fields) :])
        if is_beyond:  # as it stood, quotes and all, unless quotes are needed to tell where it starts
            parts = text.rstrip("\r\n").split(self._separator, last)
            rest = parts[last] if parts[:last] == values[:last] else self._separator.join(values[last:])
            values = [*values[:last], rest]
        if self._is_padded:
            values = [value.strip() for value in values]
        named: dict[str, Any] = {name: values[place] for name, place in self._places.items() if place < len(values)}
        if is_beyond:
            named[BEYOND] = True
        return named if values else None


class _Parquet(Table):
    """A Parquet file; the `used` fields of its rows stay in memory as lines of JSON."""

    def __init__(self, path: bytes) -> None:
        super().__init__(path)
        import pyarrow.parquet as pq

        self._kept = Names()
        try:
            self._file = pq.ParquetFile(os.fsdecode(path))
            schema = self._file.schema_arrow
        except _DAMAGE as error:
            raise UserError(f"data.*.path: {self.where} is no whole Parquet file: {_one_line(error)}") from None
        for column in schema:
            (self.fields if _is_plain(column.type) else self.others).append(column.name)

    def lines(self, used: Collection[str]) -> Iterator[Line]:
        kept = self._kept = Names()
        try:
            for batch in self._file.iter_batches(batch_size=_BATCH, columns=list(used), use_threads=False):
                columns = {name: _values(batch.column(name)) for name in used}
                for row in range(batch.num_rows):
                    values = {name: column[row] for name, column in columns.items()}
                    kept.append(json.dumps(values, default=str).encode())
                    yield Line(len(kept) - 1, len(kept[-1]), values)
        except _DAMAGE as error:
            message = f"data.*.path: {self.where} is damaged from row {len(kept)} on: {_one_line(error)}"
            raise UserError(message) from None

    def read(self, offset: int, size: int) -> dict[str, Any] | None:
        return _json_values(self._kept[offset])


class _Annotations(Table):
    """A JSON document of captions; its fields are none where it is of another layout."""

    names_alone = True

    def __init__(self, path: bytes) -> None:
        super().__init__(path)
        self._kept = Names()
        self._rows = captioned(Path(os.fsdecode(path)))
        if self._rows is not None:
            has_splits = any(row is not None and row.split for row in self._rows)
            self.fields = [_NAME_KEYS[0], "captions", *([_SPLIT] if has_splits else [])]

    def lines(self, used: Collection[str]) -> Iterator[Line]:
        kept = self._kept = Names()
        for number, row in enumerate(self._rows or ()):
            values: dict[str, Any] | None = None
            if row is not None:
                values = dict(zip(self.fields, (row.picture, list(row.captions), row.split), strict=False))
            kept.append(json.dumps(values).encode())
            yield Line(number, len(kept[-1]), values)

    def read(self, offset: int, size: int) -> dict[str, Any] | None:
        return _json_values(self._kept[offset])

    def raw(self, offset: int, size: int) -> bytes:
        return self._kept[offset]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_plain(kind: Any) -> bool:
    """Whether a column is of values, or lists of values, and not of binary data."""
    import pyarrow as pa

    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return not types.is_nested(kind.value_type) and _is_plain(kind.value_type)
    binary = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return not types.is_nested(kind) and not any(test(kind) for test in binary)


def _values(column: Any) -> list[Any]:
    """The values of an Arrow array; text is any bytes, which Arrow's own way to `str` would refuse."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    inner = column.type.value_type if types.is_nested(column.type) else column.type
    if types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner):
        column = column.cast(pa.large_list(pa.large_binary()) if types.is_nested(column.type) else pa.large_binary())
    return [_as_text(value) for value in column.to_pylist()]


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_text(one) for one in value]
    return _decode(value) if isinstance(value, bytes) else value


# --- what a table says -------------------------------------------------------------------------------------


class Metadata:
    """What the fields of a table are.

    Attributes:
        table: the table.
        caption_key: field of the caption; None: there is none.
        label_key: of the class, likewise.
        split_key: of the split, likewise.
        keys: all fields that are used.

    Raises:
        UserError: it has no field of names, or none of captions nor of classes, or not those that the options name.
    """

    def __init__(self, table: Table, options: SourceOptions) -> None:
        self.table = table
        fields, where = table.fields, table.where
        name_key = find_key("image", options, fields, where, _NAME_KEYS)
        free = [name for name in fields if options.caption_key or name != name_key]
        self.caption_key = find_key("caption", options, free, where)
        free = [name for name in fields if options.label_key or name not in (name_key, self.caption_key)]
        self.label_key = find_key("label", options, free, where)
        self.group_key = find_key("group", options, fields, where) if options.group_key else None
        taken = (name_key, self.caption_key, self.label_key, self.group_key)
        self.split_key = _SPLIT if _SPLIT in fields and _SPLIT not in taken else None
        if name_key is None:
            self._refuse("image", "file_name")
        if self.caption_key is None and self.label_key is None:
            self._refuse("caption", "caption")
        self._name_key = name_key or ""
        self._takes_rest = self.caption_key is not None and fields.index(self.caption_key) == len(fields) - 1
        used = (*taken, self.split_key)
        self.keys = tuple(dict.fromkeys(key for key in used if key is not None))
        if isinstance(table, _Separated):
            _log.info("folder: %s", where)

    def _refuse(self, kind: str, usual_name: str) -> None:
        names = ", ".join(sorted(map(printable, self.table.fields)))
        has = f"the fields {names}, none named" if names else "no line that can be read, so no field"
        raise UserError(f"data.*.path: {self.table.where} has {has} {usual_name}; data.*.{kind}_key names another")

    def unreadable(self, values: dict[str, Any] | None) -> str:
        """Why a record cannot be used; empty: it can. What is beyond the header belongs to a caption that ends it."""
        if values is None:
            return "unreadable line"
        return BEYOND if BEYOND in values and not self._takes_rest else ""

    def name(self, values: dict[str, Any]) -> bytes:
        """The picture that a record names; empty: none."""
        value = values.get(self._name_key)
        return _encode(value) if isinstance(value, str) else b""

    def captions(self, values: dict[str, Any]) -> list[bytes | None]:
        """The captions of a record, with None for what is no text."""
        value = values.get(self.caption_key) if self.caption_key is not None else []
        several = value if isinstance(value, list) else _listed(value)
        return [_encode(text) if isinstance(text, str) else None for text in several]

    def split(self, values: dict[str, Any]) -> str:
        """The split that a record says; empty: none."""
        value = values.get(self.split_key) if self.split_key is not None else None
        return value.strip() if isinstance(value, str) else ""

    def label(self, values: dict[str, Any]) -> Any:
        """What a record has for its class; None: nothing."""
        return values.get(self.label_key) if self.label_key is not None else None

    def group(self, values: dict[str, Any]) -> Record:
        """The part of a record that says which examples belong together."""
        value = values.get(self.group_key) if self.group_key is not None else None
        return Record() if value is None or value == "" else Record(group=printable(str(value)))


def _listed(value: Any) -> list[Any]:
    """The texts of a JSON list that stands in one cell, as Flickr30k's tables have it; else the value."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        with contextlib.suppress(ValueError, RecursionError):
            listed = json.loads(value)
            if listed and all(isinstance(one, str) for one in listed):
                return list(listed)
    return [value]


class Classes:
    """Collects the classes of a table's rows: integers from 0, or names, which are then sorted.

    Args:
        numbers_are_text: whether digits are integers.
    """

    def __init__(self, numbers_are_text: bool) -> None:
        self._numbers_are_text = numbers_are_text
        self._codes: dict[int | float | str, int] = {}
        self._refused = ""

    def add(self, value: Any) -> int:
        """A code for a class, which `finish` turns into its number; -1: none."""
        is_nothing = value is None or (isinstance(value, str) and not value.strip())
        if is_nothing or (isinstance(value, float) and math.isnan(value)) or self._refused:
            return -1
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            self._refused = printable(json.dumps(value, default=str))[:80]
            return -1
        if len(self._codes) > _MAX_CLASSES:
            self._refused = f"more than {_MAX_CLASSES:,} classes"
            return -1
        return self._codes.setdefault(value, len(self._codes))

    def finish(self) -> tuple[tuple[str, ...], np.ndarray]:
        """The names of the classes, and for each code its class's number, with a last one for code -1.

        Raises:
            ValueError: a value is no class; its text is that value.
        """
        if self._refused:
            raise ValueError(self._refused)
        keys = list(self._codes)
        if all(self._is_number(key) for key in keys):
            numbers = [self._whole(key) for key in keys]
            return tuple(map(str, range(max(numbers, default=-1) + 1))), np.array([*numbers, -1], np.int32)
        odd = next((key for key in keys if not isinstance(key, str)), None)
        if odd is not None:
            raise ValueError(f"{odd} beside names")
        names = sorted(map(str, keys), key=_encode)
        places = {name: number for number, name in enumerate(names)}
        return tuple(map(printable, names)), np.array([*(places[str(key)] for key in keys), -1], np.int32)

    def _is_number(self, key: int | float | str) -> bool:
        if isinstance(key, str):
            return self._numbers_are_text and bool(_NUMBER.fullmatch(key.strip()))
        return True

    def _whole(self, key: int | float | str) -> int:
        number = float(key) if isinstance(key, str) and "." in key else key
        number = int(number) if not isinstance(number, float) or number.is_integer() else -1
        if not 0 <= number < _MAX_CLASSES:
            raise ValueError(printable(str(key)))
        return number


def class_texts(options: SourceOptions, metadata: Metadata) -> bool:
    """Whether captions are made of classes where there are none.

    Raises:
        UserError: the template cannot be used.
    """
    if not options.template:
        return False
    class_captions(options.template, ())
    if metadata.label_key is None:
        raise UserError(
            f"data.*.template={options.template!r}: {metadata.table.where} has no field of classes; "
            "data.*.label_key names it"
        )
    return True
