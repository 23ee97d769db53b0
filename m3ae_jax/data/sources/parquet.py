"""Parquet files with a column of pictures and one of captions or classes, as Hugging Face's `datasets` writes them.

A picture is binary, or a struct whose field `bytes` is. A caption is a string, or a list of strings: several captions
of one picture. A class is an integer; names of the classes are read from a `ClassLabel` in the schema's
metadata.

Parquet stores rows in groups, and a group is the least that can be decoded. The groups used last are kept decoded, up
to `_CACHE_BYTES`; where all fit, or groups are small, reading in any order is fast. Otherwise a warning tells of
the cost at the start.

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
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from m3ae_jax.data.sources.base import (
    CAPTION_KEYS,
    IMAGE_KEYS,
    LABEL_KEYS,
    Record,
    SourceOptions,
    class_captions,
    find_key,
    several,
)
from m3ae_jax.data.sources.files import File, expand, open_file
from m3ae_jax.data.sources.index import IndexReport, Tally, skip_line
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

_log = logging.getLogger("m3ae_jax")


class ParquetSource:
    """Pictures with captions or classes, or texts, in Parquet files, by index.

    Examples are in the order of the files, then of the rows.

    Attributes:
        modalities: of `("image", "text")` those that are there.
        classes: names of the classes, their numbers where there are no names; empty without labels.
        fingerprint: hash of the files' base names and sizes, of the row groups' lengths and of the columns' names.
        report: what was found and what was left out.
    """

    modalities: tuple[str, ...]
    classes: tuple[str, ...] = ()

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Opens the files and reads their footers.

        Args:
            path: a folder (all its `*.parquet`), a glob, a range as `{00..12}.parquet`, one file, or several of
                these separated by commas.
            options: `image_key`, `caption_key` and `label_key` name columns.

        Raises:
            UserError: pyarrow is missing; `path` names no file, or none that is whole; columns are missing or of other
                types; a label that is no class.
            OSError: a file cannot be read.
        """
        _pyarrow()
        self._footer = functools.lru_cache(maxsize=_MAX_FOOTERS)(_read_footer)
        found = _scan(expand(path, (".parquet",), _FORMS))
        self._columns = columns = _choose(found.files[0], options) if found.files else _Columns()
        self._cache = _Cache(self._decode, _CACHE_BYTES)
        self._damaged: set[int] = set()
        self._files, self._groups, tally = found.files, _groups(found.files, columns), found.tally
        self._which: np.ndarray | None = None  # `[n, 3]` group, row and caption of each example
        if columns.several and options.captions == "all":
            self._which = self._expand(tally)
        self._starts = np.cumsum([0] + [group.rows for group in self._groups], dtype=np.int64)
        samples = {reason: sample for reason, (_, sample) in tally.items()}
        counts = {reason: count for reason, (count, _) in tally.items()}
        self.report = IndexReport(len(found.files) + found.damaged, len(self), counts, samples)
        if not len(self):
            left_out = f" (left out: {skip_line(self.report)})" if counts else ""
            raise UserError(f"data.*.path={path!r} holds no example{left_out}")
        if counts:
            _log.warning("parquet: left out: %s", skip_line(self.report))
        if columns.label:
            self.classes = self._label_names()
        self._class_captions: tuple[bytes, ...] = ()
        if columns.label and not columns.caption and options.template:
            self._class_captions = class_captions(options.template, self.classes)
        has_text = bool(columns.caption or self._class_captions)
        self.modalities = ("image",) * bool(columns.image) + ("text",) * has_text
        self._fingerprint = self._hash(options.template if self._class_captions else "")
        self._warn_if_slow()

    @property
    def fingerprint(self) -> str:
        """See the class docstring."""
        return self._fingerprint

    def __len__(self) -> int:
        """Number of examples."""
        return int(self._starts[-1]) if self._which is None else len(self._which)

    def read(self, indices: np.ndarray) -> list[Record]:
        """Reads examples, in the order asked for; safe to call from several threads at once.

        A null, and a row of a group that cannot be decoded, gives zero bytes. So does the picture of a row whose label
        is null or no class.

        Args:
            indices: `[n] int64`, each in `[0, len(self))`.

        Raises:
            OSError: a file is gone or has another size than when it was opened, or the storage failed.
        """
        indices = np.asarray(indices, np.int64)
        if self._which is not None:
            groups, rows, chosen = self._which[indices].T
        else:
            groups = np.searchsorted(self._starts, indices, side="right") - 1
            rows, chosen = indices - self._starts[groups], np.full(len(indices), -1)
        records = [Record() for _ in indices]
        for group in np.unique(groups).tolist():
            decoded = self._cache.get(group)
            for place in np.flatnonzero(groups == group).tolist():
                records[place] = self._record(decoded, int(rows[place]), int(chosen[place]))
        return records

    def _record(self, group: _Decoded, row: int, chosen: int) -> Record:
        record, columns = Record(), self._columns
        if columns.image:
            record["image"] = _value(group.image, row) or b""
        if columns.caption:
            found = _value(group.caption, row)
            captions = [one or b"" for one in found or []] if columns.several else [found or b""]
            record.update(several(captions if chosen < 0 else captions[chosen : chosen + 1]))
        if columns.label:
            label = _value(group.label, row)
            known = label is not None and 0 <= label < len(self.classes)
            record["label"] = int(label) if known else 0
            if self._class_captions:
                record["caption"] = self._class_captions[record["label"]] if known else b""
            if not known and columns.image:
                record["image"] = b""
        return record

    def _decode(self, number: int, columns: _Columns | None = None) -> _Decoded:
        """Decodes a row group; nothing in it where it is damaged.

        Args:
            number: of the group, from 0 over all files.
            columns: other ones than those of the source.

        Raises:
            OSError: the storage failed.
        """
        group, columns = self._groups[number], columns or self._columns
        file = self._files[group.file]
        stream = _Stream(open_file(file.path))
        if stream.size != file.size:
            raise OSError(f"{file.path}: another size than when it was opened; start again to read it anew")
        footer = self._footer(file.path)
        try:
            opened = _open(stream, footer)
            table = opened.read_row_group(group.number, columns=columns.leaves, use_threads=False)
            return _unpack(table, columns, group.rows)
        except _damage() as error:
            if stream.failure is not None:
                raise stream.failure from None
            if number not in self._damaged:  # once, though it may be tried again
                self._damaged.add(number)
                line = "parquet: %s: row group %d cannot be decoded (%s); none of its %d rows can be used"
                _log.warning(line, file.path, group.number, _one_line(error), group.rows)
            return _Decoded()

    def _expand(self, tally: dict[str, tuple[int, str]]) -> np.ndarray:
        """Group, row and caption of every caption; a row without any stays, with an empty one."""
        import pyarrow.compute as pc

        parts = [np.zeros((0, 3), np.int64)]
        captions_alone = _Columns(caption=self._columns.caption, leaves=(self._columns.caption,), several=True)
        for number, group in enumerate(self._groups):
            decoded = self._decode(number, captions_alone)
            if decoded.caption is None:
                path = self._files[group.file].path
                _count(tally, path, "damaged row group", f"row group {group.number}", group.rows)
                continue
            counts = np.maximum(pc.list_value_length(decoded.caption).fill_null(0).to_numpy(), 1)
            rows = np.repeat(np.arange(group.rows), counts)
            firsts = np.repeat(np.cumsum(counts) - counts, counts)
            parts.append(np.stack([np.full_like(rows, number), rows, np.arange(len(rows)) - firsts], 1))
        return np.concatenate(parts)

    def _label_names(self) -> tuple[str, ...]:
        """The names of the classes, or their numbers.

        Raises:
            UserError: a label is no class.
        """
        key, first, top = self._columns.label, self._files[0], -1
        names = first.class_names.get(key, ())
        other = next((file for file in self._files if file.class_names.get(key, ()) != names), None)
        if other is not None:
            raise UserError(f"data.*.path: {first.path} and {other.path} name different classes in column {key!r}")
        for number, group in enumerate(self._groups):
            lowest, highest = group.labels or self._label_range(number)
            where = f"data.*.label_key: {self._files[group.file].path}: column {key!r}"
            if lowest < 0:
                raise UserError(f"{where} has {lowest} in row group {group.number}; class numbers start at 0")
            if highest >= (len(names) or _MAX_CLASSES):
                allowed = f"0 to {(len(names) or _MAX_CLASSES) - 1}"
                raise UserError(f"{where} has {highest} in row group {group.number}; allowed are {allowed}")
            top = max(top, highest)
        return names or tuple(map(str, range(top + 1)))

    def _label_range(self, number: int) -> tuple[int, int]:
        """The least and the largest label of a row group whose statistics do not tell."""
        labels = self._decode(number, _Columns(label=self._columns.label, leaves=(self._columns.label,))).label
        known = [] if labels is None else [label for label in labels.to_pylist() if label is not None]
        return (min(known), max(known)) if known else (0, -1)

    def _hash(self, template: str) -> str:
        columns = self._columns
        files = [(os.path.basename(file.path), file.size) for file in self._files]
        groups = [(group.file, group.rows) for group in self._groups]
        keys = (columns.image, columns.caption, columns.label, template)
        told = json.dumps([files, groups, keys, len(self)])
        return hashlib.sha256(f"parquet 1 {told}".encode()).hexdigest()[:16]

    def _warn_if_slow(self) -> None:
        total = sum(group.decoded_bytes for group in self._groups)
        average = total / len(self._groups)
        if total > _CACHE_BYTES and average > _SLOW_GROUP:
            _log.warning(
                "parquet: row groups are of %.0f MB on average (e.g. %s): in shuffled order each example costs "
                "decoding that much; python -m m3ae_jax.data.prepare rewrites the files for random access",
                average / 1e6,
                self._files[0].path,
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
        ValueError: there is something else in it than the footer told.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

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
        wanted = pa.large_list(pa.large_binary()) if columns.several else pa.large_binary()
        caption = table[columns.caption].cast(wanted)
    if columns.label:
        label = table[columns.label]
    return _Decoded(image, caption, label, table.nbytes)


class _Cache:
    """The row groups used last, decoded once though several threads ask.

    Args:
        decode: decodes a row group.
        limit: bytes; the one decoded last stays even if it alone is larger.
    """

    def __init__(self, decode: Callable[[int], _Decoded], limit: int) -> None:
        self._decode, self._limit = decode, limit
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, Future[_Decoded]] = OrderedDict()
        self._sizes: dict[int, int] = {}
        self._total = 0

    def get(self, number: int) -> _Decoded:
        """A row group.

        Raises:
            OSError: the storage failed.
        """
        with self._lock:
            future = self._groups.get(number)
            mine = future is None
            if future is None:
                future = self._groups[number] = Future()
            self._groups.move_to_end(number)
        if mine:
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
            if self._total <= self._limit:
                return
            for oldest in list(self._groups):
                if oldest != number and oldest in self._sizes:  # not one that is being decoded
                    self._total -= self._sizes.pop(oldest)
                    del self._groups[oldest]
                if self._total <= self._limit:
                    return


# --- files -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _File:
    """What is known of a file.

    Attributes:
        path: where it is.
        size: bytes.
        types: of each column.
        class_names: of each column that has any.
        groups: its row groups.
    """

    path: str
    size: int
    types: dict[str, Any]
    class_names: dict[str, tuple[str, ...]]
    groups: tuple[_Group, ...]


@dataclasses.dataclass(frozen=True)
class _Group:
    """A row group.

    Attributes:
        file: number of its file.
        number: in the file.
        rows: how many.
        leaves: of each leaf of a column its path, its bytes decoded, and its least and largest value where known.
        decoded_bytes: of the columns used.
        labels: least and largest, where the footer tells.
    """

    file: int
    number: int
    rows: int
    leaves: tuple[tuple[str, int, Any], ...]
    decoded_bytes: int = 0
    labels: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class _Found:
    """The whole files among those given, and what was left out."""

    files: list[_File]
    damaged: int
    tally: dict[str, tuple[int, str]]


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

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        self._place = max(start + offset, 0)
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        left = max(self.size - self._place, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        try:
            data = self._file.read(self._place, wanted) if wanted else b""
        except OSError as error:
            self.failure = error
            raise
        self._place += len(data)
        return data


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("data.*.source='parquet' needs pyarrow: pip install pyarrow") from None
    return pyarrow


def _damage() -> tuple[type[BaseException], ...]:
    """What pyarrow makes of damage; a name that is no UTF-8 is a ValueError."""
    return (_pyarrow().ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _open(stream: _Stream, footer: Any = None) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(stream, metadata=footer, page_checksum_verification=True)


def _read_footer(path: str) -> Any:
    """A file's footer, which was whole when the source was opened.

    Raises:
        OSError: it is not any more.
    """
    try:
        return _open(_Stream(open_file(path))).metadata
    except _damage() as error:
        raise OSError(f"{path}: its footer cannot be read any more: {_one_line(error)}") from None


def _scan(paths: Sequence[str]) -> _Found:
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        scanned = list(pool.map(_inspect, paths))
    files = [file for file in scanned if isinstance(file, _File)]
    tally: dict[str, tuple[int, str]] = {}
    for path, file in zip(paths, scanned, strict=True):
        if isinstance(file, str):
            _log.warning("parquet: %s is no whole Parquet file and left out: %s", path, file)
            _count(tally, path, "damaged file", file, 1)
    return _Found(files, len(paths) - len(files), tally)


def _count(tally: dict[str, tuple[int, str]], path: str, reason: str, name: str, count: int) -> None:
    """Adds to what was left out of all files."""
    of_file = Tally(os.path.basename(path))
    of_file.add(reason, name, count)
    before, sample = tally.get(reason, (0, of_file.skipped[reason][1]))
    tally[reason] = (before + count, sample)


def _inspect(path: str) -> _File | str:
    """Reads a file's footer; where it cannot be read: why.

    Raises:
        OSError: the storage failed.
    """
    stream = _Stream(open_file(path))
    try:
        opened = _open(stream)
        schema, footer = opened.schema_arrow, opened.metadata
        groups = tuple(_group(footer, number) for number in range(footer.num_row_groups))
        rows = [group.rows for group in groups]
        if min(rows, default=0) < 0 or sum(rows) != footer.num_rows or sum(rows) > _MAX_ROWS:
            return "its row groups do not add up"
        types = {field.name: field.type for field in schema}
        return _File(path, stream.size, types, _class_names(schema.metadata or {}), groups)
    except _damage() as error:
        if stream.failure is not None:
            raise stream.failure from None
        return _one_line(error)


def _group(footer: Any, number: int) -> _Group:
    group, leaves = footer.row_group(number), []
    for i in range(group.num_columns):
        leaf = group.column(i)
        limits = None
        if leaf.physical_type in ("INT32", "INT64"):
            with contextlib.suppress(ValueError, OverflowError):  # of another column, as a date that Python has not
                stats = leaf.statistics
                limits = (stats.min, stats.max) if stats is not None and stats.has_min_max else None
        leaves.append((leaf.path_in_schema, leaf.total_uncompressed_size, limits))
    return _Group(0, number, group.num_rows, tuple(leaves))


def _groups(files: Sequence[_File], columns: _Columns) -> list[_Group]:
    """The row groups of all files, with what is known of the columns used.

    Raises:
        UserError: a file has other columns than the first.
    """
    groups = []
    for number, file in enumerate(files):
        for key in (columns.image, columns.caption, columns.label):
            if key and file.types.get(key) != files[0].types[key] and not _alike(file, files[0], key):
                kind = f"of type {file.types[key]}" if key in file.types else "not there"
                raise UserError(
                    f"data.*.path: {file.path}: column {key!r} is {kind}, in {files[0].path} of type "
                    f"{files[0].types[key]}; its columns are {_said(file)}"
                )
        for group in file.groups:
            used = [leaf for leaf in group.leaves if _is_used(leaf[0], columns.leaves)]
            limits = next((leaf[2] for leaf in used if leaf[0] == columns.label), None)
            size = sum(leaf[1] for leaf in used)
            groups.append(_Group(number, group.number, group.rows, (), size, limits))
    return [group for group in groups if group.rows]


def _is_used(leaf: str, chosen: Sequence[str]) -> bool:
    return any(leaf == name or leaf.startswith(name + ".") for name in chosen)


def _alike(file: _File, first: _File, key: str) -> bool:
    """Whether a column can be used as the first file's: string and large_string are the same here."""
    if key not in file.types:
        return False
    kinds, is_struct = (file.types[key], first.types[key]), _pyarrow().types.is_struct
    same_form = _is_list(kinds[0]) == _is_list(kinds[1]) and is_struct(kinds[0]) == is_struct(kinds[1])
    return same_form and any(all(map(fits, kinds)) for fits in (_is_picture, _is_caption, _is_label))


# --- columns -----------------------------------------------------------------------------------------------


def _choose(file: _File, options: SourceOptions) -> _Columns:
    """Finds the columns by name and type.

    Raises:
        UserError: neither a picture nor a caption, or not those asked for.
    """
    image = _find(file, options.image_key, IMAGE_KEYS, "image_key", _is_picture, "binary or struct<bytes: binary, ...>")
    caption = _find(file, options.caption_key, CAPTION_KEYS, "caption_key", _is_caption, "string or list<string>")
    label = _find(file, options.label_key, LABEL_KEYS, "label_key", _is_label, "integers")
    if not image and not caption:
        raise UserError(
            f"data.*.path: {file.path} has no column of pictures (binary) or captions (string) under a usual name, "
            f"only {_said(file)}; name them with image_key, caption_key and label_key"
        )
    leaves = [name for name in (image, caption, label) if name]
    if image and _pyarrow().types.is_struct(file.types[image]):
        leaves[0] = f"{image}.bytes"
    return _Columns(image, caption, label, tuple(leaves), bool(caption) and _is_list(file.types[caption]))


def _find(file: _File, wanted: str, usual: Sequence[str], field: str, fits: Callable[[Any], bool], allowed: str) -> str:
    found = file.types if wanted else [name for name in file.types if fits(file.types[name])]
    key = find_key(wanted, usual, found, f"data.*.{field}", file.path)
    if key is not None and not fits(file.types[key]):
        raise UserError(f"data.*.{field}={key!r}: {file.path}: it is of type {file.types[key]}; allowed are {allowed}")
    return key or ""


def _said(file: _File) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in file.types.items()) or "none at all"


def _is_picture(kind: Any) -> bool:
    types = _pyarrow().types
    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_picture(kind.field(place).type)
    tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(test(kind) for test in tests)


def _is_caption(kind: Any) -> bool:
    types = _pyarrow().types
    if _is_list(kind) or types.is_dictionary(kind):
        inner = kind.value_type
        return not _is_list(inner) and not types.is_struct(inner) and _is_caption(inner)
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(test(kind) for test in tests)


def _is_list(kind: Any) -> bool:
    types = _pyarrow().types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_label(kind: Any) -> bool:
    return bool(_pyarrow().types.is_integer(kind))


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """The names of each `ClassLabel` that Hugging Face's `datasets` noted."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        named = {name: kind["names"] for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return {name: tuple(map(str, names)) for name, names in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
