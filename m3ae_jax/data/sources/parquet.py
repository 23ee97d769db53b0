"""Parquet files with a column of pictures and one of captions or classes, as Hugging Face's `datasets` writes them.

A picture is binary, or a struct whose field `bytes` is, or a list of one of these, whose first that is not null is
used. Where `bytes` is null and `path` names a file in the folder of the Parquet file, or below it, that file is the
picture. A caption is a string, or a list of strings: several captions of one picture. A class is a whole number; names
of the classes are read from a `ClassLabel` in the schema's metadata, where -1 is no label. A column of strings holds
names of classes if `label_key` names it, or if it has a usual name and there is no caption; they are numbered in their
order, and an empty one is no label. A column that holds anything else is refused where `label_key` names it; where only
its name is a usual one, it is not read, and counted.

Hugging Face keeps splits apart by file name, as ``train-00000-of-00010.parquet``. Where the files of a folder or a glob
name two splits or more, `split` chooses, and the files of the others are not read.

A null is no caption: such rows are left out and counted when the source is opened. Where the footer's statistics say
that there is none, nothing is read for that; else the column of captions of a row group is decoded once. Null pictures
are left out where the statistics tell of them. Of plain binary their number is enough, unless captions are decoded too;
else that group's pictures are decoded once as well.

Parquet stores rows in groups, and a group is the least that can be decoded: a row group whose pictures together take
more memory than there is cannot be read, whatever `max_bytes` says of a single one. The groups used last are cached
decoded, up to `_CACHE_BYTES`; where all fit, or groups are small, reading in any order is fast. Otherwise a warning at
the start says what it costs.

Damage: a file whose footer cannot be read is left out and counted. A group that cannot be decoded gives pictures of
zero bytes, and no captions. Bytes that changed where no compression and no checksum notices it come as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m3ae_jax.data.images import DAMAGED, NO_BYTES, TOO_MANY_BYTES, Unusable
from m3ae_jax.data.sources.base import (
    NoClassesError,
    Record,
    SourceOptions,
    class_captions,
    several,
)
from m3ae_jax.data.sources.concatenated import (
    ConcatenatedSource,
    check_template,
)
from m3ae_jax.data.sources.files import Stamps, open_file
from m3ae_jax.data.sources.index import Tally, caption_rows, left_out
from m3ae_jax.data.sources.parquet_files import (
    DAMAGE,
    SCAN_THREADS,
    Columns,
    ParquetFile,
    RowGroup,
    Stream,
    check_columns,
    choose_columns,
    file_beside,
    find_files,
    has_path,
    ignore_unread,
    is_caption,
    is_list,
    is_number,
    one_line,
    open_parquet,
    read_footer,
    scan_files,
)
from m3ae_jax.errors import UserError

_FORMS = (
    "it takes a folder of .parquet files, a glob, a range or one file, or several separated by commas, "
    "e.g. 'data/train-{00000..00012}-of-00013.parquet'"
)
_ENDING = r"\.parquet"
_CACHE_BYTES = 256 * 2**20
_SLOW_GROUP = 8 * 2**20  # bytes, all of which an example out of order may cost decoding
_MAX_FOOTERS = 256
_MAX_CLASSES = 10**6
_MAX_NAMES = 10**5  # of classes; a column with more distinct strings holds something else
_UNLABELLED = -1  # in place of a class's number, as Hugging Face's `datasets` has it
_DRAWN = -1  # in place of a caption's number: one is drawn at each reading

_log = logging.getLogger("m3ae_jax")


class ParquetSource(ConcatenatedSource):
    """Pictures with captions or classes, or texts, in Parquet files, by index.

    Examples are in the order of the files, then of the rows. A null picture of which the footer does not tell, and each
    of a group that cannot be decoded, comes as zero bytes. A record has no label where it is null or unlabelled.

    Attributes:
        modalities: of `("image", "text")` those that are there.
        classes: names of the classes, their numbers where there are no names; empty without labels.
        fingerprint: hash of the files' base names and sizes, of the row groups' lengths and of the columns' names.
        report: how many examples there are, what was left out, and which columns and files are not read.
    """

    uses: ClassVar[frozenset[str]] = frozenset(
        {"split", "image_key", "caption_key", "label_key", "captions", "template", "group_key"}
    )

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Opens the files and reads their footers.

        Args:
            path: a folder (all its `*.parquet`, or those of its folder `data`), a glob, a range as
                `{00..12}.parquet`, one file, or several of these separated by commas.
            options: `image_key`, `caption_key`, `label_key` and `group_key` name columns; `split` chooses among files
                whose names begin with one.

        Raises:
            UserError: `path` names no file, or none that is whole; columns are missing or of other types; `label_key`
                names a column of no classes; files of several splits, but not of the one wanted.
            OSError: a file cannot be read.
        """
        tally = Tally()
        paths = find_files(path, options.split, tally)
        self._footer = functools.lru_cache(maxsize=_MAX_FOOTERS)(read_footer)
        self._stamps = Stamps(paths)
        files = scan_files(paths, tally)
        self._columns = columns = choose_columns(files[0], options) if files else Columns()
        self._limit, self._each = options.max_bytes, columns.several and options.captions == "all"
        self._cache = _Cache(self._decode, _CACHE_BYTES)
        self._damaged: set[RowGroup] = set()
        check_columns(files, columns.only(columns.image, columns.caption, columns.group))
        check_template(options.template, columns.caption, columns.label)
        ignore_unread(files, columns, tally)
        self._groups = [group for file in files for group in file.groups if group.rows]
        self.classes = self._find_classes(files, tally, needed=bool(options.label_key or options.template))
        self._number_rows(tally)
        self.report = tally.report(len(paths), len(self))
        if not len(self):
            raise UserError(f"data.*.path={path!r} holds no example{left_out(self.report)}")
        self._check_pictures()
        self._class_numbers = {name: number for number, name in enumerate(self.classes)}
        self._class_captions = class_captions(options.template, self.classes) if options.template else ()
        has_text = bool(columns.caption or self._class_captions)
        self.modalities = ("image",) * bool(columns.image) + ("text",) * has_text
        self.fingerprint = self._hash(files, options.template)
        self._warn_if_slow()

    def _number_rows(self, tally: Tally) -> None:
        """Counts the examples of each row group, and what is none."""
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            counted = list(pool.map(self._count_examples, self._groups))
        for _, counts in counted:
            tally.merge(counts.skipped, counts.unused)
        self._number_examples(count for count, _ in counted)

    def _count_examples(self, group: RowGroup) -> tuple[int, Tally]:
        """How many examples a group has, and what is left out; decodes no more than that needs."""
        columns, name, tally = self._columns, os.path.basename(group.path), Tally()
        lost = group.without_picture(columns.image)
        counts_captions = self._each or group.may_have_null(columns.caption)
        if not counts_captions and lost is not None:
            tally.add("no image", f"{name}:row group {group.number}", lost)
            return group.rows - lost, tally
        used = [columns.caption] * counts_captions + [columns.image] * (lost != 0)
        decoded = self._decode_columns(group, columns.only(*used))
        if not decoded.whole:
            tally.add("damaged row group", f"{name}:row group {group.number}", group.rows)
            return 0, tally
        pictured, captioned = self._usable(decoded, group)
        for reason, absent in (("no image", ~pictured), ("no caption", pictured & ~captioned)):
            if absent.any():
                tally.add(reason, f"{name}:row {group.start + absent.argmax()}", int(absent.sum()))
        nulls = decoded.captions.nulls * (pictured & captioned) if decoded.captions else np.zeros(1)
        if nulls.any():
            first = f"{name}:row {group.start + nulls.argmax()}"
            tally.ignore("null in a list of captions", first, int(nulls.sum()))
        return len(self._examples(decoded, group)), tally

    def _examples(self, decoded: _Decoded, group: RowGroup) -> np.ndarray:
        """Row and caption of each example of a group, `[n, 2] int64`."""
        rows = np.flatnonzero(np.logical_and(*self._usable(decoded, group)))
        if self._each and decoded.captions:
            return caption_rows(rows[:, None], decoded.captions.counts[rows])
        return np.column_stack([rows, np.full_like(rows, _DRAWN)])

    def _usable(self, decoded: _Decoded, group: RowGroup) -> tuple[np.ndarray, np.ndarray]:
        """Which rows have a picture, and which a caption, both `[rows] bool`; all where the footer tells of no null."""
        pictured = captioned = np.ones(group.rows, np.bool_)
        if decoded.image is not None and group.without_picture(self._columns.image) != 0:
            pictured = _is_valid(decoded.image) | _is_valid(decoded.paths)
        if decoded.captions is not None and (self._each or group.may_have_null(self._columns.caption)):
            captioned = decoded.captions.counts > 0
        return pictured, captioned

    def _check_pictures(self) -> None:
        """Raises a `UserError` where the first row group has paths of pictures alone, and no such file is there."""
        group, key = self._groups[0], self._columns.image
        leaf = group.bytes_leaf(key) if key else None
        if leaf is None or leaf.nulls not in (None, leaf.values):
            return
        decoded = self._cache.get(0)
        if decoded.paths is None or decoded.image is None or decoded.image.null_count < group.rows:
            return
        paths = [path for path in decoded.paths.to_pylist() if path is not None]
        if paths and not any(file_beside(group.path, path) for path in paths):
            folder = os.path.dirname(group.path)
            raise UserError(
                f"data.*.path: {group.path}: column {key!r} has paths in place of pictures, as "
                f"{os.fsdecode(paths[0])!r}, and no such file is in {folder}"
            )

    def _read_part(self, part: int, rows: np.ndarray) -> list[Record]:
        decoded, path = self._cache.get(part), self._groups[part].path
        examples = [(0, _DRAWN)] * len(rows) if decoded.examples is None else decoded.examples[rows].tolist()
        return [self._record(decoded, row, caption, path) for row, caption in examples]

    def _record(self, group: _Decoded, row: int, caption: int, path: str) -> Record:
        record, columns = Record(), self._columns
        label = self._label(_value(group.label, row))
        if label is not None:
            record["label"] = label
        if self._class_captions and label is not None:
            record["caption"] = self._class_captions[label]
        if (together := _value(group.group, row)) is not None:
            record["group"] = _text(together)
        if columns.image:
            record["image"] = b""
        try:
            if group.captions is not None:
                record.update(several(group.captions.of(row, caption, self._limit)))
            if columns.image:
                record["image"] = self._picture(group, row, path)
        except Unusable as error:
            record["unusable"] = str(error)
        return record

    def _picture(self, group: _Decoded, row: int, path: str) -> bytes:
        """The picture of a row; no bytes where it is null.

        Raises:
            Unusable: it has too many bytes, is damaged, or a path that leads nowhere.
            OSError: the storage failed.
        """
        if group.image is None:
            raise Unusable(DAMAGED)
        if group.sizes[row] > self._limit:
            raise Unusable(TOO_MANY_BYTES)
        data = _value(group.image, row)
        stored = None if data is not None else _value(group.paths, row)
        if stored is None:
            return data or b""
        place = file_beside(path, stored)
        if not place:
            raise Unusable(NO_BYTES)
        file = open_file(place)
        if file.size > self._limit:
            raise Unusable(TOO_MANY_BYTES)
        return file.read(0, file.size)

    def _label(self, stored: Any) -> int | None:
        """The number of a stored class; None where it is none."""
        if isinstance(stored, bytes):
            return self._class_numbers.get(_text(stored))
        if stored is None or not 0 <= stored < len(self.classes):  # of NaN neither is true
            return None
        return int(stored)

    def _decode(self, number: int) -> _Decoded:
        group, count = self._groups[number], self._starts[number + 1] - self._starts[number]
        decoded = self._decode_columns(group, self._columns)
        if not decoded.whole:
            return decoded
        examples = self._examples(decoded, group)
        if len(examples) != count:
            self._warn_of_damage(group, f"{len(examples)} examples, its footer tells of {count}")
            return _Decoded()
        return dataclasses.replace(decoded, examples=examples)

    def _decode_columns(self, group: RowGroup, columns: Columns) -> _Decoded:
        """Decodes columns of a row group; nothing in them where it is damaged.

        Raises:
            OSError: the storage failed.
        """
        self._stamps.check(group.path)
        stream = Stream(open_file(group.path))
        if stream.size != group.file_size:
            raise OSError(f"{group.path}: changed since it was indexed; start again")
        footer = self._footer(group.path)
        try:
            table = open_parquet(stream, footer).read_row_group(group.number, columns=columns.leaves, use_threads=False)
            return _unpack(table, columns, group.rows)
        except DAMAGE as error:
            if stream.failure is not None:
                raise stream.failure from None
            self._warn_of_damage(group, one_line(error))
            return _Decoded()

    def _warn_of_damage(self, group: RowGroup, reason: str) -> None:
        if group not in self._damaged:  # once, though it may be tried again
            self._damaged.add(group)
            line = "parquet: %s: row group %d cannot be decoded (%s); none of its %d rows can be used"
            _log.warning(line, group.path, group.number, reason, group.rows)

    def _find_classes(self, files: Sequence[ParquetFile], tally: Tally, *, needed: bool) -> tuple[str, ...]:
        """The names of the classes; where they are not needed, a column that holds none is counted and not read.

        Raises:
            UserError: they are needed, and the column holds none.
        """
        columns = self._columns
        try:
            check_columns(files, columns.only(columns.label))
            return self._label_names(files) if columns.label else ()
        except NoClassesError as error:
            if needed:
                raise
            for file in files:
                if columns.label in file.types:
                    tally.ignore(f"column {columns.label}: {error.why}", os.path.basename(file.path), file.rows)
            self._columns = columns.only(columns.image, columns.caption, columns.group)
            return ()

    def _label_names(self, files: Sequence[ParquetFile]) -> tuple[str, ...]:
        """The names of the classes, or their numbers.

        Raises:
            NoClassesError: a label is no class.
        """
        key, first = self._columns.label, files[0]
        if not is_number(first.types[key]):
            return self._stored_names(key)
        names = first.class_names.get(key, ())
        other = next((file for file in files if file.class_names.get(key, ()) != names), None)
        if other is not None:
            message = f"data.*.path: {first.path} and {other.path} name different classes in column {key!r}"
            raise NoClassesError(message, "names of different classes")
        if not self._groups:
            return names
        ranges = [(*self._label_range(group), group) for group in self._groups]
        lowest, _, low = min(ranges, key=lambda limits: limits[0])
        _, highest, high = max(ranges, key=lambda limits: limits[1])
        if lowest < 0 and (not names or lowest < _UNLABELLED or highest < 0):
            raise self._no_class(low, lowest, "class numbers start at 0")
        allowed = (len(names) or _MAX_CLASSES) - 1
        if highest > allowed:
            raise self._no_class(high, highest, f"allowed are 0 to {allowed}")
        return names or tuple(map(str, range(highest + 1)))

    def _no_class(self, group: RowGroup, value: Any, rule: str) -> NoClassesError:
        where = f"data.*.label_key: {group.path}: column {self._columns.label!r}"
        return NoClassesError(f"{where} has {value} in row group {group.number}; {rule}", f"no class, e.g. {value}")

    def _labels(self, group: RowGroup) -> Any:
        """The labels of a row group that are not null, as an Arrow array; None where it is damaged."""
        key = self._columns.label
        labels = self._decode_columns(group, self._columns.only(key)).label
        return None if labels is None else labels.drop_null()

    def _label_range(self, group: RowGroup) -> tuple[int, int]:
        """The least and the largest label of a row group; 0 and -1 where there is none.

        Raises:
            NoClassesError: one is no whole number.
        """
        leaf = group.leaves.get(self._columns.label)
        if leaf and leaf.limits:
            return leaf.limits
        labels = self._labels(group)
        known = np.zeros(0) if labels is None else labels.to_numpy()
        if known.dtype.kind == "f":
            known = known[~np.isnan(known)]  # what pandas makes of a null beside integers
            broken = known[~np.isfinite(known) | (known != np.floor(known))]
            if broken.size:
                raise self._no_class(group, broken[0], "a class is a whole number")
        return (int(known.min()), int(known.max())) if known.size else (0, -1)

    def _stored_names(self, key: str) -> tuple[str, ...]:
        """The names of classes that a column of strings holds, in their order; an empty one is none.

        Raises:
            NoClassesError: there are too many.
        """
        names: set[str] = set()
        for group in self._groups:
            labels = self._labels(group)
            names.update(map(_text, [] if labels is None else labels.unique().to_pylist()))
            if len(names) > _MAX_NAMES:
                why = f"more than {_MAX_NAMES:,} different strings"
                message = f"data.*.label_key: {group.path}: column {key!r} has {why}, so it names no classes"
                raise NoClassesError(f"{message}; if it holds captions, set caption_key to it", why)
        return tuple(sorted(names - {""}))

    def _hash(self, files: Sequence[ParquetFile], template: str) -> str:
        sizes = [(os.path.basename(file.path), file.size) for file in files]
        groups = [(number, group.rows) for number, file in enumerate(files) for group in file.groups if group.rows]
        columns = self._columns
        keys = [columns.image, columns.caption, columns.label, template, *[columns.group] * bool(columns.group)]
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
    """The columns of a row group, as Arrow's chunked arrays; all None where it is damaged.

    Attributes:
        whole: it is not damaged.
        image: pictures.
        sizes: of each picture its bytes, `[n] int64`.
        paths: where the pictures have some.
        captions: those of each row.
        label: whole numbers, or names as bytes.
        group: values of any type.
        examples: row and caption of each example, `[n, 2] int64`.
        nbytes: of all.
    """

    whole: bool = False
    image: Any = None
    sizes: Any = None
    paths: Any = None
    captions: _Captions | None = None
    label: Any = None
    group: Any = None
    examples: np.ndarray | None = None
    nbytes: int = 0


@dataclasses.dataclass(frozen=True)
class _Captions:
    """The captions of each row.

    Attributes:
        values: all that are not null, one row's after the other's.
        sizes: bytes of each.
        counts: `[rows] int64`, captions of each row.
        nulls: `[rows] int64`, nulls among them.
        starts: `[rows] int64`, the place of a row's first.
    """

    values: Any
    sizes: np.ndarray
    counts: np.ndarray
    nulls: np.ndarray
    starts: np.ndarray

    def of(self, row: int, number: int, limit: int) -> list[bytes]:
        """The captions of a row, or one of them.

        Raises:
            Unusable: one has more than `limit` bytes.
        """
        start, count = int(self.starts[row]), int(self.counts[row])
        places = range(start, start + count) if number == _DRAWN else range(start + number, start + number + 1)
        if any(self.sizes[place] > limit for place in places):
            raise Unusable(TOO_MANY_BYTES)
        return [self.values[place].as_py() for place in places]


def _value(column: Any, row: int) -> Any:
    return None if column is None else column[row].as_py()


def _is_valid(values: Any) -> np.ndarray:
    return np.zeros(1, np.bool_) if values is None else np.asarray(values.is_valid().to_numpy(zero_copy_only=False))


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _sizes(values: Any) -> np.ndarray:
    """Bytes of each of a column of byte strings, 0 of a null, `[n] int64`: known before one is copied."""
    return np.asarray(pc.binary_length(values).fill_null(0).to_numpy(), np.int64)


def _unpack(table: Any, columns: Columns, rows: int) -> _Decoded:
    """The columns of `table`, pictures and captions as bytes.

    Raises:
        ValueError: there is something else in it than the footer says.
    """
    if len(table) != rows:
        raise ValueError(f"{len(table)} rows, the footer tells of {rows}")
    image = sizes = paths = captions = label = group = None
    if columns.image:
        image, paths = _pictures(table[columns.image])
        sizes = _sizes(image)
    if columns.caption:
        captions = _unpack_captions(table[columns.caption], columns.several)
    if columns.label:
        label = _as_bytes(table[columns.label])
    if columns.group:
        group = _as_bytes(table[columns.group])
    return _Decoded(True, image, sizes, paths, captions, label, group, nbytes=table.nbytes)


def _as_bytes(column: Any) -> Any:
    """Strings as bytes, since they may be no valid UTF-8."""
    return column.cast(pa.large_binary()) if is_caption(column.type) else column


def _field(values: Any, name: str) -> Any:
    """A field of structs, or the values themselves where they are none, as byte strings."""
    if pa.types.is_struct(values.type):
        values = pc.struct_field(values, name)
    return values.cast(pa.large_binary())


def _pictures(column: Any) -> tuple[Any, Any]:
    """Bytes and paths of the rows' pictures, of a list the first that is not null; None in place of no paths."""
    images, paths = [], []
    for chunk in column.chunks:
        values = pc.list_flatten(chunk) if is_list(chunk.type) else chunk
        fields = [_field(values, name) for name in ("bytes", *["path"] * has_path(values.type))]
        if is_list(chunk.type):
            lengths = pc.list_value_length(chunk).fill_null(0).to_numpy()
            present = np.flatnonzero(np.logical_or.reduce([_is_valid(field) for field in fields]))
            rows, places = np.unique(np.repeat(np.arange(len(chunk)), lengths)[present], return_index=True)
            firsts = np.full(len(chunk), -1)
            firsts[rows] = present[places]
            if not np.array_equal(firsts, np.arange(len(values))):
                fields = [field.take(pa.array(firsts, mask=firsts < 0)) for field in fields]
        images.append(fields[0])
        paths.extend(fields[1:])
    return pa.chunked_array(images, pa.large_binary()), pa.chunked_array(paths, pa.large_binary()) if paths else None


def _unpack_captions(column: Any, in_lists: bool) -> _Captions:
    if in_lists:
        column = column.cast(pa.large_list(pa.large_binary()))
        lengths = np.asarray(pc.list_value_length(column).fill_null(0).to_numpy(), np.int64)
        values = pc.list_flatten(column)
    else:
        values, lengths = column.cast(pa.large_binary()), np.ones(len(column), np.int64)
    valid = np.asarray(values.is_valid().to_numpy())
    counts = np.bincount(np.repeat(np.arange(len(lengths)), lengths)[valid], minlength=len(lengths)).astype(np.int64)
    if not valid.all():
        values = values.drop_null()
    return _Captions(values, _sizes(values), counts, lengths - counts, np.cumsum(counts) - counts)


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
