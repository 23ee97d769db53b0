"""Files whose records are serialized `tf.train.Example`s: their keys, and what TFRecord and ArrayRecord share.

A format says how its records are indexed and read (`Storage`); here is what their contents mean.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
from google.protobuf.message import DecodeError

from m3ae_jax.data.sources.base import CAPTIONS, USUAL_KEYS, Record, SourceOptions, class_captions, find_key, several
from m3ae_jax.data.sources.concatenated import ConcatenatedSource
from m3ae_jax.data.sources.files import open_file
from m3ae_jax.data.sources.index import Index, Shard, Tally, caption_rows, left_out, report
from m3ae_jax.errors import UserError, one_of

_INDEX_VERSION = 1
_CLASS_NAMES = "classes.txt"
_LOOKED_AT = 8  # records whose features show the keys; one alone may lack an optional feature
_MOST_TRIED = 100  # records tried for that, where some are damaged
_BLOCK = 64  # records read at once while captions are counted

Features = dict[str, Sequence[bytes] | Sequence[int]]

_log = logging.getLogger("m3ae_jax")


class Storage(Protocol):
    """A file format of numbered byte strings.

    Attributes:
        kind: its name, for messages and the index.
        columns: of a row, which says where a record lies.
        damage: what is wrong with a record that `read` gives as None.
    """

    kind: str
    columns: int
    damage: str

    def scan(self, path: str) -> Shard:
        """Finds the records of a file.

        Raises:
            UserError: the file is none of this format.
            OSError: it cannot be read.
        """

    def first(self, path: str) -> Iterator[bytes]:
        """The contents of the undamaged records from the start of the file, one at a time; raises as `scan`."""

    def read(self, path: str, rows: np.ndarray) -> list[bytes | None]:
        """Contents of records, None for a damaged one; safe to call from several threads at once.

        Args:
            path: the file.
            rows: `[n, k] int64`, the records' rows; `columns` of them say where a record lies.

        Raises:
            OSError: the storage failed.
        """


def parse(payload: bytes) -> Features | None:
    """The features of an Example by key: bytes or integers, nothing of floats; None where it is no Example."""
    import tensorflow as tf

    try:
        features = tf.train.Example.FromString(payload).features.feature
    except DecodeError:
        return None
    return {key: feature.bytes_list.value or feature.int64_list.value for key, feature in features.items()}


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
    """

    image: str | None
    caption: str | None
    label: str | None
    template: str
    classes: tuple[str, ...]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Which of ``"image"``, ``"text"`` its records hold."""
        text = self.caption is not None or bool(self.label and self.template)
        return ("image",) * (self.image is not None) + ("text",) * text

    def record(self, payload: bytes | None, number: int | None) -> Record:
        """The record of one Example.

        Args:
            payload: None, or what is no Example, gives a picture and a caption of no bytes.
            number: which of its captions; None: all.
        """
        features = (parse(payload) if payload is not None else None) or {}
        record = Record()
        if self.caption is not None:
            captions = self.captions(features)
            record |= several(captions if number is None else captions[number : number + 1])
        elif "text" in self.modalities:
            record["caption"] = self._made_caption(features)
        if self.image is not None:
            record["image"] = next(iter(_byte_values(features, self.image)), b"")
        label = self._label(features)
        if label is not None:
            record["label"] = label
        return record

    def captions(self, features: Features) -> list[bytes]:
        """All captions of an Example."""
        return _byte_values(features, self.caption)

    def _label(self, features: Features) -> int | None:
        """The class number; None where there is none or it is out of range."""
        values: Sequence[bytes | int] = features.get(self.label or "", ())
        stored = values[0] if len(values) else -1
        if isinstance(stored, bytes):  # a name, or digits
            name = stored.decode("utf-8", "replace")
            if name in self.classes:
                return self.classes.index(name)
            stored = int(name) if re.fullmatch(r"[0-9]{1,18}", name) else -1
        return stored if stored >= 0 and (not self.classes or stored < len(self.classes)) else None

    def _made_caption(self, features: Features) -> bytes:
        """The template with the class's name: of `classes`, or as stored; no bytes where there is no class."""
        label = self._label(features)
        if label is not None:
            return self.template.format(self.classes[label] if self.classes else label).encode()
        names = [] if self.classes else _byte_values(features, self.label)
        return self.template.format(names[0].decode("utf-8", "replace")).encode() if names else b""


_NOTHING = Layout(None, None, None, "", ())


def find_layout(examples: Iterable[Features], options: SourceOptions, classes: tuple[str, ...], path: str) -> Layout:
    """The layout of Examples like these.

    Raises:
        UserError: a named key is not there, or there is neither a picture nor a caption.
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
    )
    if not layout.modalities:
        usual = f"{', '.join(USUAL_KEYS['image'])} or {', '.join(USUAL_KEYS['caption'])}"
        raise UserError(
            f"data.*.path={path!r}: its records have neither a picture nor a caption under a usual key ({usual}) but "
            f"only {', '.join(there) or 'no features'}; set data.*.image_key and data.*.caption_key"
        )
    return layout


class ExampleRecords(ConcatenatedSource):
    """Pictures, captions and labels of stored Examples, by index.

    A damaged record, or one that is no Example, gives a picture and a caption of no bytes and no label; the first
    damaged one of a file is logged.
    """

    def __init__(self, storage: Storage, layout: Layout, options: SourceOptions) -> None:
        """Takes the files' format and what their records hold; `_set_parts` completes it."""
        self._storage, self._layout = storage, layout
        self._each_caption = options.captions == "all" and layout.caption is not None
        self.modalities = layout.modalities
        self._warned: set[str] = set()

    def _index(self, kind: str, keep_all: bool, cache_dir: str | None) -> Index:
        """Where each record lies and, if each caption is an example, the number of its captions."""
        storage = self._storage
        if not self._each_caption:
            return Index(kind, _INDEX_VERSION, storage.columns, storage.scan, cache_dir)
        scan = functools.partial(_scan_captions, storage, self._layout, keep_all)
        return Index(kind, _INDEX_VERSION, storage.columns + 1, scan, cache_dir)

    def _set_parts(self, paths: Sequence[str], tables: Sequence[np.ndarray]) -> None:
        """Sets the file of each part and its rows of the index."""
        if self._each_caption:
            tables = [caption_rows(table[:, :-1], table[:, -1]) for table in tables]
        self._part_paths, self._tables = paths, tables
        self._number_examples(map(len, tables))

    def _read_part(self, part: int, rows: np.ndarray) -> list[Record]:
        path, table = self._part_paths[part], self._tables[part][rows]
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
    within a file; with ``captions="all"`` an example for each caption of a record.

    Attributes:
        modalities: `("image", "text")`, `("image",)` or `("text",)`, whichever the records hold.
        classes: the lines of a ``classes.txt`` beside the files; empty where there is none.
        fingerprint: hash of the files' base names and sizes, of where the records lie, and of the keys.
        report: how many examples there are, and what was left out.
    """

    def __init__(self, storage: Storage, path: str, paths: list[str], options: SourceOptions) -> None:
        """Opens files.

        Args:
            storage: their format.
            path: as the user named them.
            paths: the files.
            options: `image_key`, `caption_key`, `label_key`, `captions`, `template`, `cache_dir`.

        Raises:
            UserError: a file is none of this format, its records are no Examples, or have no such keys.
            OSError: a file cannot be read.
        """
        check(options)
        examples = _first_examples(storage, paths)
        layout = find_layout(examples, options, _class_names(paths[0]), path) if examples else _NOTHING
        super().__init__(storage, layout, options)
        key = re.sub(r"[^A-Za-z0-9]", lambda match: f"_{ord(match[0]):x}_", layout.caption or "")
        kind = f"{storage.kind}_{key}" if self._each_caption else storage.kind
        index = self._index(kind, False, options.cache_dir)
        shards = index.shards(paths)
        self.report = report(shards)
        if not examples or not self.report.examples:
            what = "no tf.train.Example" if self.report.examples else "no records"
            raise UserError(f"data.*.path={path!r} holds {what}{left_out(self.report)}")
        self._set_parts(paths, [shard.rows for shard in shards])
        self.report = dataclasses.replace(self.report, examples=len(self))
        self.classes = layout.classes
        self.fingerprint = index.fingerprint(paths, shards, options.captions, repr(layout))


def check(options: SourceOptions) -> None:
    """Raises a `UserError` for options that no data could go with."""
    if options.captions not in CAPTIONS:
        raise UserError(one_of("data.*.captions", options.captions, CAPTIONS))
    if options.template:
        class_captions(options.template, ())


def _first_examples(storage: Storage, paths: list[str]) -> list[Features]:
    """The first few records that are Examples."""
    payloads = (payload for path in paths for payload in storage.first(path))
    parsed = (parse(payload) for payload in islice(payloads, _MOST_TRIED))
    return list(islice((features for features in parsed if features), _LOOKED_AT))


def _scan_captions(storage: Storage, layout: Layout, keep_all: bool, path: str) -> Shard:
    """As the storage's own scan, but reads every record: a last column has the number of its captions.

    Args:
        storage: the format.
        layout: which key holds the captions.
        keep_all: whether records that are no Examples stay, as ones without a caption; else they are left out.
        path: the file.
    """
    shard = storage.scan(path)
    tally = Tally(os.path.basename(path))
    tally.merge(shard.skipped)
    counts: list[int] = []
    for start in range(0, len(shard.rows), _BLOCK):
        for payload in storage.read(path, shard.rows[start : start + _BLOCK]):
            features = parse(payload) if payload is not None else None
            if features is None and not keep_all:
                tally.add(storage.damage if payload is None else "no tf.train.Example", f"record {len(counts)}")
                counts.append(-1)
            else:
                counts.append(len(layout.captions(features or {})))
    rows = np.column_stack([shard.rows, np.array(counts, np.int64)])
    return dataclasses.replace(shard, rows=rows[rows[:, -1] >= 0], skipped=tally.skipped)


def _class_names(path: str) -> tuple[str, ...]:
    """The lines of ``classes.txt`` beside a file."""
    beside = os.path.join(os.path.dirname(path), _CLASS_NAMES)
    try:
        file = open_file(beside)
    except OSError:
        return ()
    return tuple(line.strip() for line in file.read(0, file.size).decode("utf-8", "replace").rstrip().splitlines())
