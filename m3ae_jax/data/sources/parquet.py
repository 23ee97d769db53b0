"""Parquet files with a column of pictures and one of captions or classes, as Hugging Face's `datasets` writes them.

A picture is binary, or a struct whose field `bytes` is. A caption is a string, or a list of strings: several captions
of one picture. A class is an integer; names of the classes are read from a `ClassLabel` in the schema's
metadata.

Parquet stores rows in groups, and a group is the least that can be decoded. The groups used last are cached decoded,
up to `_CACHE_BYTES`; where all fit, or groups are small, reading in any order is fast. Otherwise a warning at the start
says what it costs.

Damage: a file whose footer cannot be read is left out and counted. A group that cannot be decoded gives pictures (or
captions) of zero bytes. Bytes that changed where no compression and no checksum notices it come as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from m3ae_jax.data.sources.base import Record, SourceOptions, class_captions, find_key, several
from m3ae_jax.data.sources.concatenated import ConcatenatedSource
from m3ae_jax.data.sources.files import File, expand, open_file
from m3ae_jax.data.sources.index import Tally, caption_rows, left_out, skip_line
from m3ae_jax.errors import UserError

_FORMS = (
    "it takes a folder of .parquet files, a glob, a range or one file, or several separated by commas, "
    "e.g. 'data/train-{00000..00012}-of-00013.parquet'"
)
_CACHE_BYTES = 256 * 2**20
_SLOW_GROUP = 8 * 2**20  # bytes, all of which an example out of order may cost decoding
_MAX_FOOTERS = 256
_SCAN_THREADS = 4
_MAX_CLASSES = 10**6
_MAX_ROWS = 2**48

# What pyarrow makes of damage; a name that is no UTF-8 is a ValueError.
_DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError)

_log = logging.getLogger("m3ae_jax")


class ParquetSource(ConcatenatedSource):
    """Pictures with captions or classes, or texts, in Parquet files, by index.

    Examples are in the order of the files, then of the rows. A null, and a row of a group that cannot be decoded,
    gives zero bytes. So does the picture of a row whose label is null or no class.

    Attributes:
        modalities: of `("image", "text")` those that are there.
        classes: names of the classes, their numbers where there are no names; empty without labels.
        fingerprint: hash of the files' base names and sizes, of the row groups' lengths and of the columns' names.
        report: how many examples there are, and what was left out.
    """

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Opens the files and reads their footers.

        Args:
            path: a folder (all its `*.parquet`), a glob, a range as `{00..12}.parquet`, one file, or several of
                these separated by commas.
            options: `image_key`, `caption_key` and `label_key` name columns.

        Raises:
            UserError: `path` names no file, or none that is whole; columns are missing or of other types; a label
                that is no class.
            OSError: a file cannot be read.
        """
        paths, tally = expand(path, r"\.parquet", _FORMS), Tally()
        self._footer = functools.lru_cache(maxsize=_MAX_FOOTERS)(_read_footer)
        files = _scan(paths, tally)
        self._columns = columns = _choose(files[0], options) if files else _Columns()
        self._cache = _Cache(self._decode, _CACHE_BYTES)
        self._damaged: set[_Group] = set()
        _check_columns(files, columns)
        self._groups = [group for file in files for group in file.groups if group.rows]
        self._captions: list[np.ndarray] | None = None  # of each group `[n, 2]`: row and caption of each example
        if columns.several and options.captions == "all":
            self._captions = [self._caption_rows(group, tally) for group in self._groups]
        self._number_examples(map(len, self._captions) if self._captions else [group.rows for group in self._groups])
        self.report = tally.report(len(paths), len(self))
        if not len(self):
            raise UserError(f"data.*.path={path!r} holds no example{left_out(self.report)}")
        if self.report.skipped:
            _log.warning("parquet: left out: %s", skip_line(self.report))
        if columns.label:
            self.classes = self._label_names(files)
        self._class_captions: tuple[bytes, ...] = ()
        if columns.label and not columns.caption and options.template:
            self._class_captions = class_captions(options.template, self.classes)
        has_text = bool(columns.caption or self._class_captions)
        self.modalities = ("image",) * bool(columns.image) + ("text",) * has_text
        self.fingerprint = self._hash(files, options.template if self._class_captions else "")
        self._warn_if_slow()

    def _read_part(self, part: int, rows: np.ndarray) -> list[Record]:
        decoded = self._cache.get(part)
        if self._captions is None:
            return [self._record(decoded, row, None) for row in rows.tolist()]
        return [self._record(decoded, row, caption) for row, caption in self._captions[part][rows].tolist()]

    def _record(self, group: _Decoded, row: int, chosen: int | None) -> Record:
        record, columns = Record(), self._columns
        if columns.image:
            record["image"] = _value(group.image, row) or b""
        if columns.caption:
            value = _value(group.caption, row)
            captions = [one or b"" for one in value or []] if columns.several else [value or b""]
            record.update(several(captions if chosen is None else captions[chosen : chosen + 1]))
        if columns.label:
            label = _value(group.label, row)
            known = label is not None and 0 <= label < len(self.classes)
            record["label"] = int(label) if known else 0
            if self._class_captions:
                record["caption"] = self._class_captions[record["label"]] if known else b""
            if not known and columns.image:
                record["image"] = b""
        return record

    def _decode(self, number: int) -> _Decoded:
        return self._decode_columns(self._groups[number], self._columns)

    def _decode_columns(self, group: _Group, columns: _Columns) -> _Decoded:
        """Decodes columns of a row group; nothing in them where it is damaged.

        Raises:
            OSError: the storage failed.
        """
        stream = _Stream(open_file(group.path))
        if stream.size != group.file_size:
            raise OSError(f"{group.path}: another size than when it was opened; start again to read it anew")
        footer = self._footer(group.path)
        try:
            table = _open(stream, footer).read_row_group(group.number, columns=columns.leaves, use_threads=False)
            return _unpack(table, columns, group.rows)
        except _DAMAGE as error:
            if stream.failure is not None:
                raise stream.failure from None
            if group not in self._damaged:  # once, though it may be tried again
                self._damaged.add(group)
                line = "parquet: %s: row group %d cannot be decoded (%s); none of its %d rows can be used"
                _log.warning(line, group.path, group.number, _one_line(error), group.rows)
            return _Decoded()

    def _caption_rows(self, group: _Group, tally: Tally) -> np.ndarray:
        """Row and caption of every caption of a group; a row without any stays, with an empty one."""
        key = self._columns.caption
        captions = self._decode_columns(group, _Columns(caption=key, leaves=(key,), several=True)).caption
        if captions is None:
            name = f"{os.path.basename(group.path)}:row group {group.number}"
            tally.add("damaged row group", name, group.rows)
            return np.zeros((0, 2), np.int64)
        counts = pc.list_value_length(captions).fill_null(0).to_numpy()
        return caption_rows(np.arange(group.rows)[:, None], counts)

    def _label_names(self, files: Sequence[_File]) -> tuple[str, ...]:
        """The names of the classes, or their numbers.

        Raises:
            UserError: a label is no class.
        """
        key, first, top = self._columns.label, files[0], -1
        names = first.class_names.get(key, ())
        other = next((file for file in files if file.class_names.get(key, ()) != names), None)
        if other is not None:
            raise UserError(f"data.*.path: {first.path} and {other.path} name different classes in column {key!r}")
        largest = (len(names) or _MAX_CLASSES) - 1
        for group in self._groups:
            leaf = group.leaves.get(key)
            lowest, highest = (leaf and leaf.limits) or self._label_range(group)
            where = f"data.*.label_key: {group.path}: column {key!r}"
            if lowest < 0:
                raise UserError(f"{where} has {lowest} in row group {group.number}; class numbers start at 0")
            if highest > largest:
                raise UserError(f"{where} has {highest} in row group {group.number}; allowed are 0 to {largest}")
            top = max(top, highest)
        return names or tuple(map(str, range(top + 1)))

    def _label_range(self, group: _Group) -> tuple[int, int]:
        """The least and the largest label of a row group without statistics."""
        key = self._columns.label
        labels = self._decode_columns(group, _Columns(label=key, leaves=(key,))).label
        known = [] if labels is None else [label for label in labels.to_pylist() if label is not None]
        return (min(known), max(known)) if known else (0, -1)

    def _hash(self, files: Sequence[_File], template: str) -> str:
        sizes = [(os.path.basename(file.path), file.size) for file in files]
        groups = [(number, group.rows) for number, file in enumerate(files) for group in file.groups if group.rows]
        keys = (self._columns.image, self._columns.caption, self._columns.label, template)
        identity = json.dumps([sizes, groups, keys, len(self)])
        return hashlib.sha256(f"parquet 1 {identity}".encode()).hexdigest()[:16]

    def _warn_if_slow(self) -> None:
        used = [leaf.size for group in self._groups for name, leaf in group.leaves.items() if self._columns.uses(name)]
        average = sum(used) / len(self._groups)
        if sum(used) > _CACHE_BYTES and average > _SLOW_GROUP:
            _log.warning(
                "parquet: row groups are of %.0f MB on average (e.g. %s): in shuffled order each example costs "
                "decoding that much; python -m m3ae_jax.data.prepare rewrites the files for random access",
                average / 1e6,
                self._groups[0].path,
            )


# --- decoded row groups ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """The columns of a row group, as Arrow's chunked arrays; all None where it is damaged."""

    image: Any = None
    caption: Any = None
    label: Any = None
    nbytes: int = 0


def _value(column: Any, row: int) -> Any:
    return None if column is None else column[row].as_py()


def _unpack(table: Any, columns: _Columns, rows: int) -> _Decoded:
    """The columns of `table`, pictures and captions as bytes.

    Raises:
        ValueError: there is something else in it than the footer says.
    """
    if len(table) != rows:
        raise ValueError(f"{len(table)} rows, the footer tells of {rows}")
    image = caption = label = None
    if columns.image:
        image = table[columns.image]
        if pa.types.is_struct(image.type):
            image = pc.struct_field(image, "bytes")
        image = image.cast(pa.large_binary())
    if columns.caption:
        # As bytes, since a caption may be no valid UTF-8.
        kind = pa.large_list(pa.large_binary()) if columns.several else pa.large_binary()
        caption = table[columns.caption].cast(kind)
    if columns.label:
        label = table[columns.label]
    return _Decoded(image, caption, label, table.nbytes)


class _Cache:
    """The row groups used last, decoded once though several threads read them.

    Args:
        decode: decodes a row group.
        limit: bytes; the one decoded last stays even if it alone is larger.
    """

    def __init__(self, decode: Callable[[int], _Decoded], limit: int) -> None:
        self._decode, self._limit = decode, limit
        self._lock = threading.Lock()
        self._groups: dict[int, Future[_Decoded]] = {}  # the one used last is the last
        self._sizes: dict[int, int] = {}
        self._total = 0

    def get(self, number: int) -> _Decoded:
        """A row group.

        Raises:
            OSError: the storage failed.
        """
        with self._lock:
            cached = self._groups.pop(number, None)
            future = self._groups[number] = cached or Future()
        if cached is None:
            self._fill(number, future)
        return future.result()

    def _fill(self, number: int, future: Future[_Decoded]) -> None:
        try:
            group = self._decode(number)
        except BaseException as error:
            with self._lock:
                del self._groups[number]  # so that the next one tries again
            future.set_exception(error)
            return
        future.set_result(group)
        with self._lock:
            self._sizes[number] = group.nbytes
            self._total += group.nbytes
            for oldest in list(self._groups):
                if self._total > self._limit and oldest != number and oldest in self._sizes:  # none being decoded
                    self._total -= self._sizes.pop(oldest)
                    del self._groups[oldest]


# --- files -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _File:
    """A whole file; `types` and `class_names` are by column, the latter of those alone that have any."""

    path: str
    size: int
    types: dict[str, Any]
    class_names: dict[str, tuple[str, ...]]
    groups: tuple[_Group, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """A row group: its number in its file, its rows, and the leaves of its columns by path."""

    path: str
    file_size: int
    number: int
    rows: int
    leaves: dict[str, _Leaf]


class _Leaf(NamedTuple):
    """The bytes of a leaf when decoded, and its least and largest value where the footer has them."""

    size: int
    limits: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The columns used; empty: none.

    Attributes:
        leaves: what is read, as Parquet names it.
        several: a caption is a list.
    """

    image: str = ""
    caption: str = ""
    label: str = ""
    leaves: tuple[str, ...] = ()
    several: bool = False

    def uses(self, leaf: str) -> bool:
        return any(leaf == name or leaf.startswith(name + ".") for name in self.leaves)


class _Stream(io.RawIOBase):
    """A file as pyarrow reads it; remembers a failure of the storage, to tell it from damage in the file."""

    def __init__(self, file: File) -> None:
        super().__init__()
        self._file, self._place = file, 0
        self.size = file.size
        self.failure: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        self._place = max(start + offset, 0)
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        left = max(self.size - self._place, 0)
        count = left if size is None or size < 0 else min(size, left)
        try:
            data = self._file.read(self._place, count) if count else b""
        except OSError as error:
            self.failure = error
            raise
        self._place += len(data)
        return data


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _open(stream: _Stream, footer: Any = None) -> Any:
    return pq.ParquetFile(stream, metadata=footer, page_checksum_verification=True)


def _read_footer(path: str) -> Any:
    """A file's footer, which was whole when the source was opened.

    Raises:
        OSError: it is not any more.
    """
    try:
        return _open(_Stream(open_file(path))).metadata
    except _DAMAGE as error:
        raise OSError(f"{path}: its footer cannot be read any more: {_one_line(error)}") from None


def _scan(paths: Sequence[str], tally: Tally) -> list[_File]:
    """The whole ones of the files; counts the others."""
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        scanned = list(pool.map(_inspect, paths))
    for path, reason in zip(paths, scanned, strict=True):
        if isinstance(reason, str):
            _log.warning("parquet: %s is no whole Parquet file and left out: %s", path, reason)
            tally.add("damaged file", f"{os.path.basename(path)}:{reason}")
    return [file for file in scanned if isinstance(file, _File)]


def _inspect(path: str) -> _File | str:
    """Reads a file's footer; where it cannot be read: why.

    Raises:
        OSError: the storage failed.
    """
    stream = _Stream(open_file(path))
    try:
        opened = _open(stream)
        schema, footer = opened.schema_arrow, opened.metadata
        groups = tuple(_group(path, stream.size, footer, number) for number in range(footer.num_row_groups))
        rows = [group.rows for group in groups]
        if min(rows, default=0) < 0 or sum(rows) != footer.num_rows or sum(rows) > _MAX_ROWS:
            return "its row groups do not add up"
        types = {field.name: field.type for field in schema}
        return _File(path, stream.size, types, _class_names(schema.metadata or {}), groups)
    except _DAMAGE as error:
        if stream.failure is not None:
            raise stream.failure from None
        return _one_line(error)


def _group(path: str, file_size: int, footer: Any, number: int) -> _Group:
    group, leaves = footer.row_group(number), {}
    for i in range(group.num_columns):
        leaf = group.column(i)
        limits = None
        if leaf.physical_type in ("INT32", "INT64"):
            with contextlib.suppress(ValueError, OverflowError):  # of another column, as a date that Python has not
                stats = leaf.statistics
                limits = (stats.min, stats.max) if stats is not None and stats.has_min_max else None
        leaves[leaf.path_in_schema] = _Leaf(leaf.total_uncompressed_size, limits)
    return _Group(path, file_size, number, group.num_rows, leaves)


def _check_columns(files: Sequence[_File], columns: _Columns) -> None:
    """Raises a `UserError` where a file has other columns than the first."""
    for file in files:
        for key in filter(None, (columns.image, columns.caption, columns.label)):
            if file.types.get(key) != files[0].types[key] and not _alike(file, files[0], key):
                kind = f"of type {file.types[key]}" if key in file.types else "not there"
                raise UserError(
                    f"data.*.path: {file.path}: column {key!r} is {kind}, in {files[0].path} of type "
                    f"{files[0].types[key]}; its columns are {_listed(file)}"
                )


def _alike(file: _File, first: _File, key: str) -> bool:
    """Whether a column can be used as the first file's: string and large_string are the same here."""
    if key not in file.types:
        return False
    kinds = (file.types[key], first.types[key])
    same_form = all(len(set(map(is_nested, kinds))) == 1 for is_nested in (_is_list, pa.types.is_struct))
    return same_form and any(all(map(fits, kinds)) for fits in (_is_picture, _is_caption, _is_label))


# --- columns -----------------------------------------------------------------------------------------------


def _choose(file: _File, options: SourceOptions) -> _Columns:
    """Finds the columns by name and type.

    Raises:
        UserError: neither a picture nor a caption, or not those that the options name.
    """
    image = _find(file, "image", options, _is_picture, "binary or struct<bytes: binary, ...>")
    caption = _find(file, "caption", options, _is_caption, "string or list<string>")
    label = _find(file, "label", options, _is_label, "integers")
    if not image and not caption:
        raise UserError(
            f"data.*.path: {file.path} has no column of pictures (binary) or captions (string) under a usual name, "
            f"only {_listed(file)}; name them with image_key, caption_key and label_key"
        )
    leaves = [name for name in (image, caption, label) if name]
    if image and pa.types.is_struct(file.types[image]):
        leaves[0] = f"{image}.bytes"
    return _Columns(image, caption, label, tuple(leaves), bool(caption) and _is_list(file.types[caption]))


def _find(file: _File, kind: str, options: SourceOptions, fits: Callable[[Any], bool], allowed: str) -> str:
    names = [name for name in file.types if getattr(options, f"{kind}_key") or fits(file.types[name])]
    key = find_key(kind, options, names, file.path)
    if key is not None and not fits(stored := file.types[key]):
        raise UserError(f"data.*.{kind}_key={key!r}: {file.path}: it is of type {stored}; allowed are {allowed}")
    return key or ""


def _listed(file: _File) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in file.types.items()) or "none at all"


def _is_picture(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_picture(kind.field(place).type)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def _is_caption(kind: Any) -> bool:
    if _is_list(kind) or pa.types.is_dictionary(kind):
        inner = kind.value_type
        return not _is_list(inner) and not pa.types.is_struct(inner) and _is_caption(inner)
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(test(kind) for test in tests)


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_label(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind))


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """The names of each `ClassLabel` in the metadata of Hugging Face's `datasets`."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        named = {name: kind["names"] for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return {name: tuple(map(str, names)) for name, names in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
