"""What the files of Parquet are: which there are, their footers, and which of their columns are read."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from m3ae_jax.data.sources import splits
from m3ae_jax.data.sources.base import USUAL_KEYS, NoClassesError, SourceOptions, find_key
from m3ae_jax.data.sources.concatenated import ignore_beside, path_parts
from m3ae_jax.data.sources.files import File, expand, is_remote, open_file
from m3ae_jax.data.sources.index import Tally
from m3ae_jax.errors import UserError

_FORMS = (
    "it takes a folder of .parquet files, a glob, a range or one file, or several separated by commas, "
    "e.g. 'data/train-{00000..00012}-of-00013.parquet'"
)
_ENDING = r"\.parquet"
SCAN_THREADS = 4
_MAX_ROWS = 2**48

# What pyarrow makes of damage; a name that is no UTF-8 is a ValueError.
DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError)

_log = logging.getLogger("m3ae_jax")


# --- files -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ParquetFile:
    """A whole file; `types` and `class_names` are by column, the latter of those alone that have any."""

    path: str
    size: int
    types: dict[str, Any]
    class_names: dict[str, tuple[str, ...]]
    groups: tuple[RowGroup, ...]

    @property
    def rows(self) -> int:
        """Of all row groups."""
        return sum(group.rows for group in self.groups)


@dataclasses.dataclass(frozen=True, eq=False)
class RowGroup:
    """A row group: its number in its file, its first row there, its rows, and the leaves of its columns by path."""

    path: str
    file_size: int
    number: int
    start: int
    rows: int
    leaves: dict[str, _Leaf]

    def leaves_of(self, column: str) -> dict[str, _Leaf]:
        """The leaves of a column by path."""
        return {name: leaf for name, leaf in self.leaves.items() if _is_of(name, column)}

    def may_have_null(self, column: str) -> bool:
        """Whether the footer does not say that it has none (nor an empty list)."""
        return any(leaf.nulls != 0 for leaf in self.leaves_of(column).values())

    def without_picture(self, column: str) -> int | None:
        """How many rows have no picture by the footer; None where it says only that some may have none.

        Of columns that are nested its counts are not relied on: whether a null around the value counts, writers differ.
        """
        data, path = self.bytes_leaf(column), self.leaves.get(f"{column}.path")
        if data is None or not data.nulls or (path and path.nulls == 0):
            return 0
        return data.nulls if column in self.leaves else None

    def bytes_leaf(self, column: str) -> _Leaf | None:
        """The leaf of a column of pictures that holds their bytes."""
        leaves = self.leaves_of(column)
        alone = next(iter(leaves.values())) if len(leaves) == 1 else None
        return next((leaf for name, leaf in leaves.items() if name.endswith(".bytes")), alone)


def _is_of(leaf: str, column: str) -> bool:
    return leaf == column or leaf.startswith(column + ".")


class _Leaf(NamedTuple):
    """What the footer says of a leaf.

    Attributes:
        size: bytes when decoded.
        values: their number; an empty list, or one that is null, counts as one.
        nulls: of these; None where it is not known.
        limits: the least and the largest of integers; None where they are not known.
    """

    size: int
    values: int
    nulls: int | None
    limits: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns used; empty: none.

    Attributes:
        leaves: what is read, as Parquet names it.
        several: a caption is a list.
    """

    image: str = ""
    caption: str = ""
    label: str = ""
    group: str = ""
    leaves: tuple[str, ...] = ()
    several: bool = False

    @property
    def names(self) -> list[str]:
        """Of those that are used."""
        return [name for name in (self.image, self.caption, self.label, self.group) if name]

    def only(self, *names: str) -> Columns:
        """These of the columns alone."""
        used: dict[str, Any] = {kind: "" for kind in (*USUAL_KEYS, "group") if getattr(self, kind) not in names}
        leaves = tuple(leaf for leaf in self.leaves if any(_is_of(leaf, name) for name in names if name))
        return dataclasses.replace(self, leaves=leaves, **used)

    def uses(self, leaf: str) -> bool:
        """Whether a leaf is read."""
        return any(_is_of(leaf, name) for name in self.leaves)


class Stream(io.RawIOBase):
    """A file as pyarrow reads it; remembers a failure of the storage, to tell it from damage in the file."""

    def __init__(self, file: File) -> None:
        super().__init__()
        self._file, self._place = file, 0
        self.size = file.size
        self.failure: OSError | None = None

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.IOBase`."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        self._place = max(start + offset, 0)
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        """See `io.RawIOBase`; raises an OSError where the storage fails."""
        left = max(self.size - self._place, 0)
        count = left if size is None or size < 0 else min(size, left)
        try:
            data = self._file.read(self._place, count) if count else b""
        except OSError as error:
            self.failure = error
            raise
        self._place += len(data)
        return data


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def open_parquet(stream: Stream, footer: Any = None) -> Any:
    """A file as pyarrow has it; `footer` need not be read again."""
    return pq.ParquetFile(stream, metadata=footer, page_checksum_verification=True)


def read_footer(path: str) -> Any:
    """A file's footer, which was whole when the source was opened.

    Raises:
        OSError: it is not any more.
    """
    try:
        return open_parquet(Stream(open_file(path))).metadata
    except DAMAGE as error:
        raise OSError(f"{path}: its footer cannot be read any more: {one_line(error)}") from None


def find_files(path: str, split: str, tally: Tally) -> list[str]:
    """The files that `path` names, of one split where a part of it names several; counts the others.

    Raises:
        UserError: there is none.
    """
    parts = {place: expand(place, _ENDING, _FORMS) for place in map(_data_folder, path_parts(path))}
    for place, files in parts.items():
        ignore_beside(place, files, _ENDING, tally)
    return splits.of_files(parts, split, tally)


def _data_folder(part: str) -> str:
    """The folder ``data`` of a data set that Hugging Face hosts, where `part` is that data set's; else `part`."""
    inner = os.path.join(os.path.expanduser(part), "data")
    if not os.path.isdir(inner) or _has_files(os.path.dirname(inner)) or not _has_files(inner):
        return part
    return inner


def _has_files(folder: str) -> bool:
    return any(re.search(rf"{_ENDING}(\.gz)?\Z", name.lower()) for name in os.listdir(folder))


def file_beside(path: str, stored: bytes) -> str:
    """The picture's file that a row of the Parquet file `path` names; empty where it is not in its folder or below."""
    name, folder = os.fsdecode(stored), os.path.dirname(path)
    if os.path.isabs(name) or ".." in re.split(r"[/\\]", name) or "\0" in name or is_remote(path):
        return ""
    place = os.path.realpath(os.path.join(folder, name))  # a link may lead out of it
    within = place.startswith(os.path.join(os.path.realpath(folder), ""))
    return place if within and os.path.isfile(place) else ""


def ignore_unread(files: Iterable[ParquetFile], columns: Columns, tally: Tally) -> None:
    """Counts the columns that are not read, and the pictures of a row after its first."""
    for file in files:
        name = os.path.basename(file.path)
        for column in file.types:
            if column not in columns.names:
                tally.ignore(f"column {column}", name, file.rows)
        if columns.image and is_list(file.types[columns.image]):
            leaves = [(group.bytes_leaf(columns.image), group.rows) for group in file.groups]
            further = sum(leaf.values - rows for leaf, rows in leaves if leaf is not None)
            tally.ignore("further picture of a row", name, max(further, 0))


def scan_files(paths: Sequence[str], tally: Tally) -> list[ParquetFile]:
    """The whole ones of the files; counts the others."""
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        scanned = list(pool.map(_inspect, paths))
    for path, reason in zip(paths, scanned, strict=True):
        if isinstance(reason, str):
            _log.warning("parquet: %s is no whole Parquet file and left out: %s", path, reason)
            tally.add("damaged file", f"{os.path.basename(path)}:{reason}")
    return [file for file in scanned if isinstance(file, ParquetFile)]


def _inspect(path: str) -> ParquetFile | str:
    """Reads a file's footer; where it cannot be read: why.

    Raises:
        OSError: the storage failed.
    """
    stream = Stream(open_file(path))
    try:
        opened = open_parquet(stream)
        schema, footer = opened.schema_arrow, opened.metadata
        groups = row_groups(path, stream.size, footer)
        rows = [group.rows for group in groups]
        if min(rows, default=0) < 0 or sum(rows) != footer.num_rows or sum(rows) > _MAX_ROWS:
            return "its row groups do not add up"
        types = {field.name: field.type for field in schema}
        return ParquetFile(path, stream.size, types, _class_names(schema.metadata or {}), groups)
    except DAMAGE as error:
        if stream.failure is not None:
            raise stream.failure from None
        return one_line(error)


def row_groups(path: str, file_size: int, footer: Any) -> tuple[RowGroup, ...]:
    """The row groups of a file.

    Raises:
        ValueError: the types of their leaves are not the schema's.
    """
    groups: list[RowGroup] = []
    start = 0
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        leaves = [group.column(i) for i in range(group.num_columns)]
        # Else pyarrow ends the process when it is asked for the statistics.
        if any(leaf.physical_type != footer.schema.column(i).physical_type for i, leaf in enumerate(leaves)):
            raise ValueError("a column is of another type than the schema's")
        by_path = {leaf.path_in_schema: _leaf(leaf) for leaf in leaves}
        groups.append(RowGroup(path, file_size, number, start, group.num_rows, by_path))
        start += group.num_rows
    return tuple(groups)


def _leaf(leaf: Any) -> _Leaf:
    nulls = limits = None
    with contextlib.suppress(ValueError, OverflowError):  # of another column, as a date that Python has not
        is_integer = leaf.physical_type in ("INT32", "INT64")
        stats = leaf.statistics if is_integer or leaf.physical_type == "BYTE_ARRAY" else None
        if stats is not None:
            is_known = stats.has_null_count and 0 <= stats.null_count <= leaf.num_values
            nulls = stats.null_count if is_known else None
            limits = (stats.min, stats.max) if is_integer and stats.has_min_max else None
    return _Leaf(leaf.total_uncompressed_size, leaf.num_values, nulls, limits)


def check_columns(files: Sequence[ParquetFile], columns: Columns) -> None:
    """Raises a `UserError` where a file has other columns than the first; of labels a `NoClassesError`."""
    for file in files:
        for key in columns.names:
            if file.types.get(key) != files[0].types[key] and not _alike(file, files[0], key):
                kind = f"of type {file.types[key]}" if key in file.types else "not there"
                message = (
                    f"data.*.path: {file.path}: column {key!r} is {kind}, in {files[0].path} of type "
                    f"{files[0].types[key]}; its columns are {_listed(file)}"
                )
                raise NoClassesError(message, "not alike in all files") if key == columns.label else UserError(message)


def _alike(file: ParquetFile, first: ParquetFile, key: str) -> bool:
    """Whether a column can be used as the first file's: string and large_string are the same here."""
    if key not in file.types:
        return False
    kinds = (file.types[key], first.types[key])
    same_form = _form(kinds[0]) == _form(kinds[1])
    return same_form and any(all(map(fits, kinds)) for fits in (_is_picture, is_caption, is_number))


def _form(kind: Any) -> str:
    """How a type is nested."""
    if is_list(kind):
        return f"list {_form(kind.value_type)}"
    return "struct" if pa.types.is_struct(kind) else ""


# --- columns -----------------------------------------------------------------------------------------------


def choose_columns(file: ParquetFile, options: SourceOptions) -> Columns:
    """Finds the columns by name and type.

    Raises:
        UserError: neither a picture nor a caption, or not those that the options name.
    """
    image = _find(file, "image", options, _is_picture, "binary or struct<bytes: binary, ...>, or a list of one")
    caption = _find(file, "caption", options, is_caption, "string or list<string>")
    named = bool(options.label_key)
    fits = _is_label if named or not caption else is_number
    label = _find(file, "label", options, fits, "whole numbers or strings")
    group = _find(file, "group", options, _is_plain, "strings or numbers") if options.group_key else ""
    if not image and not caption:
        raise UserError(
            f"data.*.path: {file.path} has no column of pictures (binary) or captions (string) under a usual name, "
            f"only {_listed(file)}; name them with image_key, caption_key and label_key"
        )
    leaves = [name for name in (image, caption, label, group) if name]
    kind = file.types[image] if image else pa.null()
    if pa.types.is_struct(kind):
        leaves[:1] = [f"{image}.bytes"] + [f"{image}.path"] * has_path(kind)
    several_captions = bool(caption) and is_list(file.types[caption])
    return Columns(image, caption, label, group, tuple(leaves), several_captions)


def _find(file: ParquetFile, kind: str, options: SourceOptions, fits: Callable[[Any], bool], allowed: str) -> str:
    names = [name for name in file.types if getattr(options, f"{kind}_key") or fits(file.types[name])]
    key = find_key(kind, options, names, file.path)
    if key is not None and not fits(stored := file.types[key]):
        raise UserError(f"data.*.{kind}_key={key!r}: {file.path}: it is of type {stored}; allowed are {allowed}")
    return key or ""


def _listed(file: ParquetFile) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in file.types.items()) or "none at all"


def _is_picture(kind: Any) -> bool:
    if is_list(kind):
        return not is_list(kind.value_type) and _is_picture(kind.value_type)
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and not _form(kind.field(place).type) and _is_picture(kind.field(place).type)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def is_caption(kind: Any) -> bool:
    """Whether an Arrow type may hold a caption, or several."""
    if is_list(kind) or pa.types.is_dictionary(kind):
        inner = kind.value_type
        return not is_list(inner) and not pa.types.is_struct(inner) and is_caption(inner)
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(test(kind) for test in tests)


def is_list(kind: Any) -> bool:
    """Whether an Arrow type is one of lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def has_path(kind: Any) -> bool:
    """Whether pictures of this type have paths."""
    place = kind.get_field_index("path") if pa.types.is_struct(kind) else -1
    return place >= 0 and _is_text(kind.field(place).type)


def _is_text(kind: Any) -> bool:
    """Whether it is a string, or one of few that a dictionary holds."""
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(test(inner) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def is_number(kind: Any) -> bool:
    """Whether an Arrow type may hold class numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_label(kind: Any) -> bool:
    return is_number(kind) or _is_text(kind)


def _is_plain(kind: Any) -> bool:
    return not pa.types.is_nested(kind)


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """The names of each `ClassLabel` in the metadata of Hugging Face's `datasets`."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        named = {name: kind["names"] for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return {name: tuple(map(str, names)) for name, names in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
