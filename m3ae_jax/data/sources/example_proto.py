"""Files whose records are serialized `tf.train.Example`s: their keys, and what TFRecord and ArrayRecord share.

A format says how its records are indexed and read (`Storage`); here is what their contents mean.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
from google.protobuf.message import DecodeError

from m3ae_jax.data import images
from m3ae_jax.data.sources import splits
from m3ae_jax.data.sources.base import (
    CAPTIONS,
    MAX_BYTES,
    USUAL_KEYS,
    Record,
    SourceOptions,
    class_captions,
    find_key,
    several,
)
from m3ae_jax.data.sources.concatenated import (
    ConcatenatedSource,
    check_template,
    ignore_beside,
    path_parts,
)
from m3ae_jax.data.sources.files import Stamps, open_file
from m3ae_jax.data.sources.index import Index, Shard, Tally, caption_rows, left_out, too_large
from m3ae_jax.errors import UserError, one_of

_INDEX_VERSION = 1
_CLASS_NAMES = "classes.txt"
_SAMPLED = 32  # records whose features show the keys: one alone may lack an optional feature
_BLOCK = 64  # records read at once while captions are counted
_NO_EXAMPLE, _DAMAGED = -1, -2  # in place of the number of captions; less: minus the size of a record not looked at

Features = Mapping[str, Sequence[bytes] | Sequence[int] | Sequence[float]]
Payload = bytes | int | None
"""The contents of a record; of one above the limit its size in bytes; of a damaged one None."""

_log = logging.getLogger("m3ae_jax")


class Storage(Protocol):
    """A file format of numbered byte strings.

    Attributes:
        kind: its name, for messages and the index.
        ending: of its files, a regular expression.
        columns: of a row, which says where a record lies.
        size_column: of a row, which has the record's bytes; None where that is not known before it is read.
        damage: what is wrong with a record that `read` gives as None.
    """

    kind: str
    ending: str
    columns: int
    size_column: int | None
    damage: str

    def scan(self, path: str) -> Shard:
        """Finds the records of a file.

        Raises:
            UserError: the file is none of this format.
            OSError: it cannot be read.
        """

    def read(self, path: str, rows: np.ndarray) -> list[Payload]:
        """Contents of records; safe to call from several threads at once.

        Args:
            path: the file.
            rows: `[n, k] int64`, the records' rows; `columns` of them say where a record lies.

        Raises:
            OSError: the storage failed.
        """


def parse(payload: bytes) -> Features | None:
    """The features of an Example by key: bytes, integers or floats; None where it is no Example."""
    import tensorflow as tf

    try:
        features = tf.train.Example.FromString(payload).features.feature
    except DecodeError:
        return None
    return {
        key: feature.bytes_list.value or feature.int64_list.value or feature.float_list.value
        for key, feature in features.items()
    }


def _byte_values(features: Features, key: str | None) -> list[bytes]:
    return [value for value in features.get(key or "", ()) if isinstance(value, bytes)]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What of an Example is the picture, the caption, the label.

    Attributes:
        image: key of the picture; None: there is none.
        caption: key of the caption.
        label: key of the class.
        template: makes a caption of a class name, for want of a caption; empty: none.
        classes: names of the classes; empty: not known.
        group: key of what says which examples belong together.
    """

    image: str | None
    caption: str | None
    label: str | None
    template: str
    classes: tuple[str, ...]
    group: str | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """Which of ``"image"``, ``"text"`` its records hold."""
        text = self.caption is not None or bool(self.label and self.template)
        return ("image",) * (self.image is not None) + ("text",) * text

    @property
    def keys(self) -> frozenset[str]:
        """Of the features that are read."""
        return frozenset(key for key in (self.image, self.caption, self.label, self.group) if key is not None)

    def record(self, payload: Payload, number: int | None) -> Record:
        """The record of one Example.

        Args:
            payload: of a damaged record, or what is no Example, the record has a picture of no bytes and no caption.
            number: which of its captions; None: all.
        """
        features = (parse(payload) if isinstance(payload, bytes) else None) or {}
        record = Record()
        if self.image is not None:
            record["image"] = next(iter(_byte_values(features, self.image)), b"")
        if isinstance(payload, int):
            record["unusable"] = images.TOO_MANY_BYTES
        captions = self.captions(features) if self.caption is not None else self._made_captions(features)
        record |= several(captions if number is None else captions[number : number + 1])
        label = self._label(features)
        if label is not None:
            record["label"] = label
        groups: Sequence[bytes | int | float] = features.get(self.group or "", ())
        for group in groups[:1]:
            record["group"] = group.decode("utf-8", "replace") if isinstance(group, bytes) else str(group)
        return record

    def captions(self, features: Features) -> list[bytes]:
        """All captions of an Example; none where the feature is absent or holds nothing."""
        return _byte_values(features, self.caption)

    def _label(self, features: Features) -> int | None:
        """The class number; None where there is none, it is out of range, or there are several."""
        values: Sequence[bytes | int | float] = features.get(self.label or "", ())
        stored = values[0] if len(values) == 1 else -1
        if isinstance(stored, bytes):  # a name, or digits
            name = stored.decode("utf-8", "replace")
            if name in self.classes:
                return self.classes.index(name)
            stored = int(name) if re.fullmatch(r"[0-9]{1,18}", name) else -1
        number = int(stored) if stored == stored // 1 and abs(stored) < 2**63 else -1  # 3.0 is a class, 3.5 is none
        return number if number >= 0 and (not self.classes or number < len(self.classes)) else None

    def _made_captions(self, features: Features) -> list[bytes]:
        """The template with the class's name: of `classes`, or as stored; none where there is no class."""
        if not self.template:
            return []
        label = self._label(features)
        if label is not None:
            return [self.template.format(self.classes[label] if self.classes else label).encode()]
        names = [] if self.classes else _byte_values(features, self.label)
        return [self.template.format(name.decode("utf-8", "replace")).encode() for name in names if len(names) == 1]

    def unread(self, features: Features) -> list[str]:
        """What of the features that are read is not used: further pictures and groups, what is no class."""
        several = [key for key in (self.image, self.group) if len(features.get(key or "", ())) > 1]
        is_class = self._label(features) is not None or bool(self._made_captions(features))
        wrong = bool(features.get(self.label or "", ())) and not is_class
        return [f"further value of feature {key}" for key in several] + [f"feature {self.label}: no class"] * wrong


_NOTHING = Layout(None, None, None, "", ())


def find_layout(examples: Iterable[Features], options: SourceOptions, classes: tuple[str, ...], path: str) -> Layout:
    """The layout of Examples like these.

    Raises:
        UserError: a named key is not there, there is neither a picture nor a caption, or a template is of no use.
    """
    values = {key: value for features in examples for key, value in features.items() if len(value)}
    there = sorted({key for features in examples for key in features})
    byte_keys = [key for key, value in values.items() if isinstance(value[0], bytes)]
    layout = Layout(
        find_key("image", options, byte_keys, path),
        find_key("caption", options, byte_keys, path),
        find_key("label", options, values, path),
        options.template,
        classes,
        find_key("group", options, values, path) if options.group_key else None,
    )
    check_template(layout.template, layout.caption, layout.label)
    if not layout.modalities:
        usual = f"{', '.join(USUAL_KEYS['image'])} or {', '.join(USUAL_KEYS['caption'])}"
        raise UserError(
            f"data.*.path={path!r}: its records have neither a picture nor a caption under a usual key ({usual}) but "
            f"only {', '.join(there) or 'no features'}; set data.*.image_key and data.*.caption_key"
        )
    return layout


class ExampleRecords(ConcatenatedSource):
    """Pictures, captions and labels of stored Examples, by index.

    A damaged record, or one that is no Example, gives a picture of no bytes, no caption and no label; the first
    damaged one of a file is logged. Where each caption is an example, such records, and those without a caption, are
    left out and counted.
    """

    uses: ClassVar[frozenset[str]] = frozenset(
        {"split", "image_key", "caption_key", "label_key", "captions", "template", "group_key"}
    )

    def __init__(self, storage: Storage, layout: Layout, options: SourceOptions) -> None:
        """Takes the files' format and what their records hold; `_set_parts` completes it."""
        self._storage, self._layout, self._options = storage, layout, options
        self._each_caption = options.captions == "all" and layout.caption is not None
        self.modalities = layout.modalities
        self._warned: set[str] = set()

    def _tables(self, kind: str, paths: list[str], shards: list[Shard]) -> list[np.ndarray]:
        """Where each record of the files lies and, if each caption is an example, the number of its captions."""
        if not self._each_caption:
            return [shard.rows for shard in shards]
        key = re.sub(r"[^A-Za-z0-9]", lambda match: f"_{ord(match[0]):x}_", self._layout.caption or "")
        known = dict(zip(paths, shards, strict=True))
        scan = functools.partial(_scan_captions, self._storage, self._layout, known)
        index = Index(f"{kind}_{key}", _INDEX_VERSION, self._storage.columns + 1, scan, self._options.index_dir)
        return [shard.rows for shard in index.shards(paths)]

    def _set_parts(
        self,
        paths: Sequence[str],
        tables: Sequence[np.ndarray],
        firsts: Sequence[int],
        tally: Tally,
        sampled: Sequence[Features] | None = None,
    ) -> list[np.ndarray]:
        """Sets the file of each part and its examples; counts the records that are none, and values that are not read.

        Args:
            paths: the parts' files.
            tables: of `_tables`, or parts of these.
            firsts: number in its file of each part's first record.
            tally: counts.
            sampled: some of the records; None: they are read here.

        Returns:
            The rows that are left.
        """
        sampled = _parsed(_sample(self._storage, paths, tables)) if sampled is None else sampled
        _count_kinds((self._layout.unread(features) for features in sampled), len(sampled), tally)
        limit, column = self._options.max_bytes, self._storage.size_column
        if self._each_caption:
            parts = zip(paths, tables, firsts, strict=True)
            tables = [self._with_captions(path, table, first, tally) for path, table, first in parts]
        if column is not None:
            tables = too_large(tables, column, limit, paths, tally)
        left = list(tables)
        if self._each_caption:
            tables = [caption_rows(table[:, :-1], table[:, -1]) for table in left]
        self._part_paths, self._part_rows, self._stamps = paths, tables, Stamps(paths)
        self._number_examples(map(len, tables))
        return left

    def _with_captions(self, path: str, table: np.ndarray, first: int, tally: Tally) -> np.ndarray:
        """The rows of a part that have captions; counts the others."""
        counts, limit, name = table[:, -1].copy(), self._options.max_bytes, os.path.basename(path)
        fits = np.flatnonzero((counts < _DAMAGED) & (-counts <= limit))  # were above the limit that it was indexed with
        counts[fits] = _count_captions(self._storage, self._layout, path, table[fits])
        too_large([-counts[counts < _DAMAGED, np.newaxis]], 0, limit, [path], tally)
        reasons = {0: images.NO_CAPTION, _NO_EXAMPLE: "no tf.train.Example", _DAMAGED: self._storage.damage}
        for code, reason in reasons.items():
            lost = np.flatnonzero(counts == code)
            if len(lost):
                tally.add(reason, f"{name}:record {first + lost[0]}", len(lost))
        return np.column_stack([table[:, :-1], counts])[counts > 0]

    def _fingerprint(self, index: Index, paths: Sequence[str], shards: Sequence[Shard], *more: str) -> str:
        """Hash of the parts' files, rows and layout, and of what else changes the records."""
        group = [f"group {self._layout.group}"] if self._layout.group else []
        layout = repr(dataclasses.replace(self._layout, group=None))
        return index.fingerprint(list(paths), list(shards), self._options.captions, layout, *group, *more)

    def _limit_told(self, shards: Iterable[Shard]) -> list[str]:
        """The limit, where records' sizes are not known and one may be above it."""
        limit, largest = self._options.max_bytes, max(shard.size for shard in shards)
        unknown = self._storage.size_column is None and limit != MAX_BYTES and largest > limit
        return [f"at most {limit} bytes"] if unknown else []

    def _read_part(self, part: int, rows: np.ndarray) -> list[Record]:
        path, table = self._part_paths[part], self._part_rows[part][rows]
        self._stamps.check(path)
        records = []
        for row, payload in zip(table.tolist(), self._storage.read(path, table), strict=True):
            if payload is None and path not in self._warned:
                self._warned.add(path)
                _log.warning("%s: %s: %s at %d: not used", self._storage.kind, path, self._storage.damage, row[0])
            records.append(self._layout.record(payload, row[-1] if self._each_caption else None))
        return records


class ExampleSource(ExampleRecords):
    """Pictures, captions and labels of Examples in files, by index: the part that TFRecord and ArrayRecord share.

    Examples are in the order of the files (as given; a folder's or glob's sorted by name), then of the records
    within a file; with ``captions="all"`` an example for each caption of a record. Where the files' names tell of
    several splits, those of `SourceOptions.split` are read.

    Attributes:
        modalities: `("image", "text")`, `("image",)` or `("text",)`, whichever the records hold.
        classes: the lines of a ``classes.txt`` beside the files; empty where there is none.
        fingerprint: hash of the files' base names and sizes, of where the records lie, and of the keys.
        report: how many examples there are, and what was left out; features that are not read, of sampled records.
    """

    def __init__(self, storage: Storage, path: str, expand: Callable[[str], list[str]], options: SourceOptions) -> None:
        """Opens files.

        Args:
            storage: their format.
            path: as the user named them.
            expand: the files of one part of that path.
            options: those of `uses`, `max_bytes` and `index_dir`.

        Raises:
            UserError: a file is none of this format, its records are no Examples, or have no such keys; the split is
                none of the files'.
            OSError: a file cannot be read.
        """
        check(options)
        tally = Tally()
        parts = {part: expand(part) for part in path_parts(path)}
        for part, files in parts.items():
            made = glob.glob(os.path.join(glob.escape(os.path.expanduser(part)), f"*{splits.MANIFEST}"))
            ignore_beside(part, [*files, *made, _CLASS_NAMES], storage.ending, tally)
        paths = splits.of_files(parts, options.split, tally)
        index = Index(storage.kind, _INDEX_VERSION, storage.columns, storage.scan, options.index_dir)
        shards = index.shards(paths)
        sampled = _sample(storage, paths, [shard.rows for shard in shards])
        parsed = _parsed(sampled)
        layout = find_layout(parsed, options, _class_names(paths[0]), path) if parsed else _NOTHING
        super().__init__(storage, layout, options)
        tables = self._tables(storage.kind, paths, shards)
        left = self._set_parts(paths, tables, [0] * len(paths), tally, parsed)
        unread = (sorted(key for key in features.keys() - layout.keys if len(features[key])) for features in parsed)
        _count_kinds(([f"feature {key}" for key in keys] for keys in unread), len(parsed), tally)
        self.report = dataclasses.replace(index.report(shards, tally), examples=len(self))
        if not parsed or not len(self):
            what = "no tf.train.Example" if len(self) else "no records"
            if any(isinstance(payload, int) for payload in sampled):
                what = f"no record of at most {options.max_bytes:,} bytes (data.max_bytes)"
            raise UserError(f"data.*.path={path!r} holds {what}{left_out(self.report)}")
        self.classes = layout.classes
        used = [dataclasses.replace(shard, rows=rows) for shard, rows in zip(shards, left, strict=True)]
        self.fingerprint = self._fingerprint(index, paths, used, *self._limit_told(shards))


def check(options: SourceOptions) -> None:
    """Raises a `UserError` for options that no data could go with."""
    if options.captions not in CAPTIONS:
        raise UserError(one_of("data.*.captions", options.captions, CAPTIONS))
    if options.template:
        class_captions(options.template, ())


def _sample(storage: Storage, paths: Sequence[str], tables: Sequence[np.ndarray]) -> list[Payload]:
    """A few records, spread over all of them."""
    starts = np.cumsum([0, *map(len, tables)])
    positions = np.unique(np.linspace(0, max(starts[-1] - 1, 0), _SAMPLED).astype(np.int64))
    sampled: list[Payload] = []
    for path, table, start in zip(paths, tables, starts[:-1], strict=True):
        rows = positions[(positions >= start) & (positions < start + len(table))] - start
        if len(rows):
            sampled += storage.read(path, table[rows])
    return sampled


def _parsed(payloads: Iterable[Payload]) -> list[Features]:
    """The features of those that are Examples and have any."""
    return [features for payload in payloads if isinstance(payload, bytes) and (features := parse(payload))]


def _count_kinds(kinds: Iterable[list[str]], records: int, tally: Tally) -> None:
    """Counts what is not read, given for each sampled record, as often as they have it."""
    for kind, number in Counter(kind for of_record in kinds for kind in of_record).items():
        tally.ignore(kind, f"in {number} of {records} sampled records", number)


def _scan_captions(storage: Storage, layout: Layout, known: Mapping[str, Shard], path: str) -> Shard:
    """The index of a file with one more column, the number of each record's captions, see `_count_captions`."""
    rows = known[path].rows
    return dataclasses.replace(known[path], rows=np.column_stack([rows, _count_captions(storage, layout, path, rows)]))


def _count_captions(storage: Storage, layout: Layout, path: str, rows: np.ndarray) -> np.ndarray:
    """The number of captions of each record, `[n] int64`; `_NO_EXAMPLE`, `_DAMAGED`; above the limit minus its size."""
    counts: list[int] = []
    for start in range(0, len(rows), _BLOCK):
        for payload in storage.read(path, rows[start : start + _BLOCK]):
            if isinstance(payload, bytes):
                features = parse(payload)
                counts.append(_NO_EXAMPLE if features is None else len(layout.captions(features)))
            else:
                counts.append(_DAMAGED if payload is None else -payload)
    return np.array(counts, np.int64)


def _class_names(path: str) -> tuple[str, ...]:
    """The lines of ``classes.txt`` beside a file."""
    beside = os.path.join(os.path.dirname(path), _CLASS_NAMES)
    try:
        file = open_file(beside)
    except OSError:
        return ()
    return tuple(line.strip() for line in file.read(0, file.size).decode("utf-8", "replace").rstrip().splitlines())
