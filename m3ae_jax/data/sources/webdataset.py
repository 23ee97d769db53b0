"""WebDataset tar shards, as img2dataset writes them: KEY.jpg + KEY.txt and/or KEY.json, and KEY.cls for a class.

The shards are indexed once: one pass over the tar headers records where each picture and each caption lies,
and from then on example i is two `pread` calls. Nothing is ever extracted to disk.

A member's name is its key, a dot and its ending, in any case. The ending is what follows the first dot of the base
name where that is an ending known here or named by the options, else the longest known one at the end: ``Photo
v1.5.jpg`` and ``Photo v1.5.txt`` are a pair, and ``a.jpg`` and ``a.jpg.txt`` are one.

An example is a picture (the first member of its key with a picture's ending) and a caption (the .txt, or the .json
where there is no .txt or it is of zero bytes; its field may be a list of several captions). A .json is read once for
the index where its caption or its class is used: one without a caption is no example, nor is one with a null beside a
.txt of zero bytes, as img2dataset writes it; where the .json has no such field that .txt is an empty caption. What
cannot be used is left out and counted by reason, what is not read is counted by ending.

A folder of CLIP_benchmark, ``ROOT/{split}/0.tar``, is known by its ``nshards.txt``; ``dataset_type.txt`` and
``classnames.txt`` are read beside any shards and in the folder above.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from m3ae_jax.data.sources import splits
from m3ae_jax.data.sources.base import MAX_BYTES, USUAL_KEYS, Record, SourceOptions, find_key, several
from m3ae_jax.data.sources.concatenated import ConcatenatedSource, ignore_beside, path_parts
from m3ae_jax.data.sources.files import File, ReadAhead, Stamps, expand, file_cache, is_remote, open_file
from m3ae_jax.data.sources.index import Index, IndexReport, Shard, Tally, caption_rows, left_out, too_large
from m3ae_jax.data.sources.tar import BLOCK, Damaged, members, name_at
from m3ae_jax.data.sources.webdataset_shard import (
    CLS,
    COLUMNS,
    FIELDS,
    FORMS,
    IMAGE,
    IMAGE_ENDINGS,
    JSON,
    LABEL,
    NO_CLASS,
    NO_FIELD,
    NO_LABEL,
    TEXT,
    TXT,
    USUAL_ROLES,
    Contents,
    Members,
    captions_in,
    class_name,
    is_class,
    lines_of,
    parse,
    scan,
    scan_contents,
    short,
)
from m3ae_jax.errors import UserError

_ENDING = r"\.tar"
_INDEX_VERSION, _FINGERPRINT_VERSION = 2, 1
_MOST_CLASSES = 10**6  # a number above that is an identifier
_KIND_TXT, _KIND_JSON, _KIND_NONE = 0, 1, 2

_SAMPLED = 64  # .json whose fields show the keys
_MOST_WALKED = 3  # shards whose names are looked at for endings that the options name

_CLASS_NAMES, _DATASET_TYPE, _NUMBER = "classnames.txt", "dataset_type.txt", "nshards.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"

_log = logging.getLogger("m3ae_jax")


class _Row(NamedTuple):
    """An example: offsets and sizes of its members; the columns with a default are there where any row has another."""

    image: int
    image_size: int
    caption: int
    caption_size: int
    kind: int
    label: int = NO_LABEL
    number: int = 0  # of its caption
    fields: int = 0
    fields_size: int = 0


_COLUMN = {name: column for column, name in enumerate(_Row._fields)}


class WebDatasetSource(ConcatenatedSource):
    """Pairs of picture and caption in tar shards, by index.

    Examples are in the order of the shards (as given; a folder's or glob's sorted by name), then in the
    order of the pictures within a shard. A caption of zero bytes is a caption: the example stays.

    Attributes:
        modalities: `("image", "text")`; where no shard holds a pair `("image",)`, or without pictures `("text",)`.
        classes: of the .cls or of the .json's field: the lines of ``classnames.txt``, else the numbers from 0 or, of
            classes that are words, these sorted; empty without any.
        fingerprint: hash of the shards' base names and sizes and of all offsets (not of times of change), so
            that two copies of the data have the same.
        report: how many examples there are, and what was left out or is not read.
    """

    modalities: tuple[str, ...] = ("image", "text")
    uses: ClassVar[frozenset[str]] = frozenset(
        {"split", "image_key", "caption_key", "label_key", "captions", "caption_per_line", "group_key"}
    )

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Opens the shards, indexing those that are new or changed.

        Args:
            path: a folder (all its `*.tar`), a glob, a range as `{00000..00012}.tar`, one file, or several of
                these separated by commas. A shard named twice counts once. Or a folder with a folder per split.
            options: `image_key` is an ending, as ``left.jpg``; `caption_key` and `label_key` are endings or fields of
                the .json, `group_key` is such a field. A field that is named is read in place of the .txt. With
                ``captions="all"`` every caption of a list, or line of a .txt, is an example.

        Raises:
            UserError: `path` names no shard, or a file that is no tar, there is no pair in it, or nothing of a name
                that the options give.
            OSError: a shard cannot be read, or is being written.
        """
        folder = _split_folder(path, options.split)
        parts, beside = {part: expand(part, _ENDING, FORMS) for part in path_parts(folder)}, Tally()
        self._paths = splits.of_files(parts, options.split if folder == path else "", beside)
        _check_number(folder, parts.get(folder, []))
        about = _About.read(os.path.dirname(self._paths[0]))
        self._lines = options.caption_per_line or about.retrieval
        self._each = options.captions == "all"
        self._group = options.group_key
        found = _open(path, self._paths, options, self._lines)
        self._caption_field = found.contents.caption
        self.modalities = (found.spec.alone,) if found.spec.alone else self.modalities
        self.classes = _settle_labels(found, about.classes)
        found.tally.merge(beside.skipped, beside.unused)
        self._tell_beside(parts, about, found.tally)
        tables = found.tables
        sizes = [_COLUMN[name] for name in ("image_size", "caption_size", "fields_size")]
        for column in [column for column in sizes if column < tables[0].shape[1]]:
            tables = too_large(tables, column, options.max_bytes, self._paths, found.tally)
        self._tables = _trimmed(tables)
        self._stamps = Stamps(self._paths)
        self._number_examples(map(len, self._tables))
        self.report = found.report()
        self._check_use(path, options)
        self.fingerprint = self._fingerprint_of(found)
        self._open_file = file_cache()

    def _tell_beside(self, parts: Mapping[str, list[str]], about: _About, tally: Tally) -> None:
        """Counts the files around the shards that are not read."""
        unused = [*about.unused, *[_CLASS_NAMES] * bool(about.classes and self.classes != about.classes)]
        for name in unused:
            tally.ignore(f"file {name}", name)
        known = (_CLASS_NAMES, _DATASET_TYPE, _TEMPLATES, _NUMBER)
        for part, shards in parts.items():
            statistics = [f"{os.path.splitext(path)[0]}_stats.json" for path in shards]  # read of damaged shards
            ignore_beside(part, [*shards, *statistics, *known], _ENDING, tally)

    def _check_use(self, path: str, options: SourceOptions) -> None:
        if not len(self):
            raise UserError(
                f"data.*.path={path!r} holds no KEY.jpg (png, ...) with a KEY.txt or KEY.json{left_out(self.report)}"
            )
        if options.caption_per_line and not self._has_kind(_KIND_TXT):
            raise UserError(f"data.*.caption_per_line=True: {path} has no .txt with captions")

    def _has_kind(self, kind: int) -> bool:
        return any((table[:, _COLUMN["kind"]] == kind).any() for table in self._tables)

    def _fingerprint_of(self, found: _Found) -> str:
        """Of what is read, whichever options led to it."""
        more = [self._caption_field] * self._has_kind(_KIND_JSON) + ["lines"] * (
            self._lines and self._has_kind(_KIND_TXT)
        )
        more += [repr(self.classes)] * bool(self.classes) + [f"group {self._group}"] * bool(self._group)
        kind = Members(USUAL_ROLES, alone=found.spec.alone).kind  # the rows tell of other endings
        index = Index(kind, _FINGERPRINT_VERSION, COLUMNS, functools.partial(scan, spec=found.spec))
        shards = [dataclasses.replace(shard, rows=rows) for shard, rows in zip(found.shards, self._tables, strict=True)]
        return index.fingerprint(self._paths, shards, *more)

    def _read_part(self, part: int, rows: np.ndarray) -> list[Record]:
        path = self._paths[part]
        self._stamps.check(path)
        opened = self._open_file(path)
        return [self._record(opened, _Row(*row)) for row in self._tables[part][rows].tolist()]

    def _record(self, file: File, row: _Row) -> Record:
        record = Record()
        if row.kind != _KIND_NONE:
            data = file.read(row.caption, row.caption_size)
            captions = captions_in(parse(data), self._caption_field) if row.kind == _KIND_JSON else [data]
            if row.kind == _KIND_TXT and self._lines:
                captions = lines_of(data)
            record = several(captions[row.number : row.number + 1] if self._each else captions)
        if "image" in self.modalities:
            record["image"] = file.read(row.image, row.image_size)
        if row.label != NO_LABEL:
            record["label"] = row.label
        if self._group and row.fields:
            group = parse(file.read(row.fields, row.fields_size)).get(self._group)
            if group is not None:
                record["group"] = str(group)
        return record


# --- what lies around the shards ---------------------------------------------------------------------------


def _split_folder(path: str, split: str) -> str:
    """The folder of a split where `path` is one of CLIP_benchmark with a folder for each; else `path`.

    Raises:
        UserError: there are splits but not this one.
    """
    root = os.path.abspath(os.path.expanduser(path))
    names = sorted(os.listdir(root)) if os.path.isdir(root) else []
    there = [name for name in names if os.path.isfile(os.path.join(root, name, _NUMBER))]
    if not there or any(name.lower().endswith(".tar") for name in names):
        return path
    found = splits.called(split, there) or split
    splits.check(path, found, there)
    if found != split:
        _log.info("webdataset: %s: split %s is called %s here", path, split, found)
    return os.path.join(root, found)


def _check_number(folder: str, paths: Sequence[str]) -> None:
    """Refuses a folder that lacks some of the shards 0.tar, 1.tar, ... which its ``nshards.txt`` counts.

    Raises:
        UserError: as said, or that file holds no number.
    """
    place = os.path.join(os.path.expanduser(folder), _NUMBER)
    if is_remote(folder) or not os.path.isfile(place):
        return
    text = open_file(place).read_up_to(0, BLOCK).strip()
    if not text.isdigit() or len(text) > 6:
        raise UserError(f"data.*.path: {place} holds no number of shards but {text[:40]!r}")
    names = {os.path.basename(path) for path in paths}
    missing = [f"{number}.tar" for number in range(int(text)) if f"{number}.tar" not in names]
    if missing:
        more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
        raise UserError(
            f"data.*.path: {place} counts {int(text)} shards, but these are missing: {', '.join(missing[:20])}{more}; "
            f"to read the others, give {os.path.join(folder, '*.tar')}"
        )


@dataclasses.dataclass(frozen=True)
class _About:
    """What the files of CLIP_benchmark say, in the shards' folder or the one above.

    Attributes:
        classes: names of the classes; empty: not known.
        retrieval: each line of a .txt is a caption.
        unused: files that are not read.
    """

    classes: tuple[str, ...]
    retrieval: bool
    unused: tuple[str, ...]

    @classmethod
    def read(cls, folder: str) -> _About:
        """Reads those of a folder of shards."""
        found: dict[str, bytes] = {}
        for name in (_CLASS_NAMES, _DATASET_TYPE, _TEMPLATES):
            for place in (folder, os.path.dirname(folder)):
                try:
                    file = open_file(os.path.join(place, name))
                    found.setdefault(name, file.read(0, min(file.size, MAX_BYTES)))
                except OSError:
                    continue
        text = found.get(_CLASS_NAMES, b"").decode("utf-8", "replace").rstrip()
        classes = tuple(line.strip() for line in text.splitlines())
        retrieval = found.get(_DATASET_TYPE, b"").strip() == b"retrieval"
        return cls(classes, retrieval, (_TEMPLATES,) * (_TEMPLATES in found))


# --- what members are --------------------------------------------------------------------------------------


def _as_ending(key: str) -> str:
    return key.lower().removeprefix(".")


def _find_members(paths: Sequence[str], options: SourceOptions, where: str) -> Members:
    """What the members are: the usual endings, or those that the options name.

    Raises:
        UserError: no member has the ending that is to be the picture's.
    """
    keys = {kind: getattr(options, f"{kind}_key") for kind in ("image", "caption", "label")}
    if not any(keys.values()):
        return Members(USUAL_ROLES)
    endings = _endings(paths, {_as_ending(key) for key in keys.values() if key}, options)
    named = {kind: _as_ending(key) for kind, key in keys.items() if key and _as_ending(key) in endings}
    if options.image_key and "image" not in named:
        find_key("image", options, [ending for ending, _ in endings.most_common(20)], where)
    roles = {named["image"]: IMAGE} if "image" in named else dict.fromkeys(IMAGE_ENDINGS, IMAGE)
    caption = named.get("caption", TXT)
    is_json = caption.rpartition(".")[2] == JSON
    roles |= {caption: FIELDS} if is_json else {caption: TEXT, JSON: FIELDS}
    if "label" in named or not options.label_key:
        roles[named.get("label", CLS)] = LABEL
    return Members(roles, captions_in_fields=is_json or "caption" not in named)


def _endings(paths: Sequence[str], wanted: set[str], options: SourceOptions) -> Counter[str]:
    """How often endings occur in the first shards, whatever follows a dot, until all that are wanted were seen.

    A key that is a field of the first .json is none, which spares going through all names.
    """
    endings, fields = Counter[str](), set[str]()
    for path in paths[:_MOST_WALKED]:
        try:
            file = open_file(path)
            reader = ReadAhead(file)
            for member in members(reader, file.size):
                base = member.name.rpartition("/")[2].lower()
                parts = base.split(".")
                endings.update(".".join(parts[start:]) for start in range(1, len(parts)))
                if parts[-1] == JSON and not fields and member.size <= options.max_bytes:
                    fields = {_as_ending(name) for name in parse(file.read(member.offset, member.size))}
                if wanted <= endings.keys() | fields:
                    return endings
        except (Damaged, OSError):  # told by the index
            continue
    return endings


# --- all shards --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Found:
    """The shards' examples while they are opened.

    Attributes:
        paths: of the shards.
        spec: what their members are.
        index: of the members.
        shards: of `index`.
        contents: what of the members' contents was read.
        read: what was found there, of each shard `[n, 2] int64` as `scan_contents` says; None: nothing was read.
        tables: of each shard `[n, 9] int64`, a `_Row` for each example.
        tally: what was left out beside what `shards` tell.
    """

    paths: Sequence[str]
    spec: Members
    index: Index
    shards: list[Shard]
    contents: Contents
    read: list[np.ndarray] | None
    tables: list[np.ndarray]
    tally: Tally

    def tell(
        self, count: Callable[[str, str, int], None], kind: str, shard: int, which: np.ndarray, column: int
    ) -> None:
        """Counts rows of a shard's index.

        Args:
            count: `Tally.add` or `Tally.ignore`.
            kind: of what is counted.
            shard: its number.
            which: `[n] bool`, the rows.
            column: that has the offset of the member which gives the name; where it is 0 the first member's.
        """
        if which.any():
            path, row = self.paths[shard], self.shards[shard].rows[np.flatnonzero(which)[0]].tolist()
            offset = row[column] or next(place for place in row[:6:2] if place)
            count(kind, f"{os.path.basename(path)}:{name_at(open_file(path), offset)}", int(which.sum()))

    def report(self) -> IndexReport:
        """What there is, and what was left out."""
        total = self.index.report(self.shards, self.tally)
        return dataclasses.replace(total, examples=sum(map(len, self.tables)))


def _open(path: str, paths: Sequence[str], options: SourceOptions, lines: bool) -> _Found:
    """Indexes the shards; where they hold not one pair, as pictures alone or texts alone.

    Raises:
        UserError, OSError: see `WebDatasetSource`.
    """
    spec = _find_members(paths, options, path)
    found = _index(path, paths, options, lines, spec)
    skipped = found.report().skipped
    alone = [role for role, half in ((IMAGE, "caption"), (TEXT, "image")) if f"no {half}" in skipped]
    # What the user named must be there.
    alone = [role for role in alone if not (options.caption_key if role == IMAGE else options.image_key)]
    if any(map(len, found.tables)) or not alone:
        return found
    return _index(path, paths, options, lines, dataclasses.replace(spec, alone=alone[0]))


def _index(path: str, paths: Sequence[str], options: SourceOptions, lines: bool, spec: Members) -> _Found:
    index = Index(spec.kind, _INDEX_VERSION, COLUMNS, functools.partial(scan, spec=spec), options.index_dir)
    shards = index.shards(list(paths))
    contents = _find_contents(path, paths, shards, options, spec, lines)
    found = _Found(paths, spec, index, shards, contents, None, [], Tally())
    takes = [contents.takes_fields(shard.rows, spec) for shard in shards]
    takes_any = bool(contents.caption) and any(map(np.any, takes))
    if takes_any or contents.all_fields or contents.words or contents.lines:
        found.read = _read_contents(found, options.index_dir)
    width = _width(found, options)
    found.tables = [_table(found, number, taken, options, width) for number, taken in enumerate(takes)]
    return found


def _read_contents(found: _Found, index_dir: str) -> list[np.ndarray]:
    """What `scan_contents` finds in each shard; its counts go to the tally."""
    known = dict(zip(found.paths, found.shards, strict=True))
    scan = functools.partial(scan_contents, known=known, spec=found.spec, contents=found.contents)
    index = Index(f"{found.spec.kind}_{short(found.contents)}", _INDEX_VERSION, 2, scan, index_dir)
    with_rows = [path for path, shard in known.items() if len(shard.rows)]
    read = dict(zip(with_rows, index.shards(with_rows), strict=True))
    for path, shard in read.items():
        found.tally.merge({}, shard.unused)
        if len(shard.rows) != len(known[path].rows):
            raise OSError(f"{path}: changed while it was indexed; start again")
    return [read[path].rows if path in read else np.zeros((0, 2), np.int64) for path in found.paths]


def _find_contents(
    path: str, paths: Sequence[str], shards: Sequence[Shard], options: SourceOptions, spec: Members, lines: bool
) -> Contents:
    """Which fields of the JSON hold what, by a sample of them.

    Raises:
        UserError: there is no field of a name that the options give, or its values are no classes.
    """
    fields = _sample_fields(paths, shards, options.max_bytes)
    has_text, has_fields = (any((shard.rows[:, column] > 0).any() for shard in shards) for column in (2, 4))
    names = [*fields, *[f".{spec.ending(TEXT)}"] * has_text]
    named_field = bool(options.caption_key) and _as_ending(options.caption_key) not in spec.roles
    if named_field:
        find_key("caption", options, names, path)
    if options.group_key:
        find_key("group", options, fields, path)
    caption = options.caption_key if named_field else _usual_caption(fields) if spec.captions_in_fields else ""
    labels = np.concatenate([shard.rows[:, 6] for shard in shards])
    label = _label_field(fields, options, spec, path, bool((labels != NO_LABEL).any()))
    words = not label and bool((labels < NO_LABEL).any() and not (labels > NO_LABEL).any())
    all_fields = bool(label) or (has_fields and spec.alone == "image")
    return Contents(caption, named_field, label, words, lines and options.captions == "all", all_fields)


def _usual_caption(fields: Mapping[str, Sequence[Any]]) -> str:
    """The first usual field that holds a caption, or else is there; empty: none."""
    usual = [name for name in USUAL_KEYS["caption"] if name in fields]
    with_text = (name for name in usual if any(captions_in({name: value}, name) for value in fields[name]))
    return next(with_text, usual[0] if usual else "")


def _label_field(
    fields: Mapping[str, Sequence[Any]], options: SourceOptions, spec: Members, path: str, has_members: bool
) -> str:
    """The field of the class; empty where there is none, or the classes are in members of their own."""
    named = bool(options.label_key) and _as_ending(options.label_key) not in spec.roles
    if not named:
        usual = USUAL_KEYS["label"] if not has_members else ()
        return next((name for name in usual if any(map(is_class, fields.get(name, ())))), "")
    key = find_key("label", options, fields, path) or ""
    values = [value for value in fields[key] if value is not None]
    if values and not any(map(is_class, values)):
        raise UserError(
            f"data.*.label_key={key!r}: {path}: {values[0]!r} is no class; classes are whole numbers from 0"
        )
    return key


def _sample_fields(paths: Sequence[str], shards: Sequence[Shard], limit: int) -> dict[str, list[Any]]:
    """The values of each field in some of the JSON, of all parts of the data."""
    have = [np.flatnonzero((shard.rows[:, 4] > 0) & (shard.rows[:, 5] <= limit)) for shard in shards]
    starts = np.cumsum([0, *map(len, have)])
    fields: dict[str, list[Any]] = {}
    for place in np.unique(np.linspace(0, starts[-1] - 1, _SAMPLED).astype(np.int64)) if starts[-1] else ():
        number = int(np.searchsorted(starts, place, side="right")) - 1
        row = shards[number].rows[have[number][place - starts[number]]]
        for name, value in parse(open_file(paths[number]).read(int(row[4]), int(row[5]))).items():
            fields.setdefault(name, []).append(value)
    return fields


def _table(found: _Found, number: int, takes: np.ndarray, options: SourceOptions, width: int) -> np.ndarray:
    """The examples of one shard, `[n, width] int64`, the first columns of a `_Row`; tells what is not read of it.

    Args:
        found: what there is.
        number: of the shard.
        takes: `[m] bool`, which rows of the index have their caption in the JSON.
        options: with `captions` and `group_key`.
        width: columns that are needed.
    """
    rows = found.shards[number].rows
    captions, label = found.read[number].T if found.read is not None else (np.where(takes, NO_FIELD, 1), rows[:, 6])
    has_text = rows[:, 2] > 0
    # Where the JSON has no such field, a .txt of zero bytes is a caption.
    takes = takes & ~((captions == NO_FIELD) & has_text & (not found.contents.before_text))
    absent, captions = takes & (captions < 1), np.maximum(captions, 1)
    found.tell(found.tally.add, "no caption", number, absent, 0)
    unread = ~takes & (rows[:, 4] > 0) & (not found.contents.all_fields and not options.group_key)
    found.tell(found.tally.ignore, f"member .{found.spec.ending(FIELDS)}", number, unread, 4)
    if has_text.any():
        found.tell(found.tally.ignore, f"member .{found.spec.ending(TEXT)}", number, takes & has_text & ~absent, 2)
    kind = np.where(takes, _KIND_JSON, _KIND_NONE if found.spec.alone == "image" else _KIND_TXT)
    place = np.where(takes[:, None], rows[:, 4:6], rows[:, 2:4])
    columns = [rows[:, :2], place, kind, label, np.zeros_like(kind), rows[:, 4:6] * bool(options.group_key)]
    table = np.column_stack(columns)[:, :width][~absent].astype(np.int64)
    if options.captions == "all":
        table = caption_rows(table, captions[~absent])
        table[:, _COLUMN["number"]] = table[:, -1]
    return np.ascontiguousarray(table[:, :width])


def _width(found: _Found, options: SourceOptions) -> int:
    """How many columns of a `_Row` are needed."""
    if options.group_key:
        return len(_Row._fields)
    if options.captions == "all":
        return _COLUMN["number"] + 1
    has_labels = found.contents.label or any((shard.rows[:, 6] != NO_LABEL).any() for shard in found.shards)
    return _COLUMN["label"] + bool(has_labels)


def _trimmed(tables: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Tables without the last columns that say nothing, so that an option that changes nothing leaves no trace."""
    width = tables[0].shape[1]
    while width > _COLUMN["label"]:
        default = _Row._field_defaults[_Row._fields[width - 1]]
        if any((table[:, width - 1] != default).any() for table in tables):
            break
        width -= 1
    return [np.ascontiguousarray(table[:, :width]) for table in tables]


# --- classes -----------------------------------------------------------------------------------------------


def _settle_labels(found: _Found, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Makes class numbers of what the tables hold; gives the names of the classes.

    Args:
        found: the examples; what is no class is counted, and the example has none then.
        classes: as ``classnames.txt`` names them; empty: not known.

    Raises:
        UserError: a class beyond those named.
    """
    column = _COLUMN["label"]
    if found.tables[0].shape[1] <= column:
        return ()
    if found.contents.words:
        return _number_words(found, classes)
    top = -1
    for number, table in enumerate(found.tables):
        labels = table[:, column]
        wrong = (labels < NO_LABEL) | (labels >= _MOST_CLASSES)
        if wrong.any():
            name = os.path.basename(found.paths[number])
            found.tally.ignore(NO_CLASS, name, int(wrong.sum()))
            labels[wrong] = NO_LABEL
        top = max(top, int(labels.max(initial=-1)))
    if classes and top >= len(classes):
        raise UserError(f"data.*.path: a label is {top}, but {_CLASS_NAMES} names only {len(classes)} classes (from 0)")
    return (classes or tuple(map(str, range(top + 1)))) if top >= 0 else ()


def _number_words(found: _Found, classes: tuple[str, ...]) -> tuple[str, ...]:
    """As `_settle_labels`, of classes that are words."""
    words: dict[int, str] = {}
    assert found.read is not None
    for path, shard, read in zip(found.paths, found.shards, found.read, strict=True):
        codes, first = np.unique(read[:, 1], return_index=True)
        for code, row in zip(codes.tolist(), first.tolist(), strict=True):
            if code != NO_LABEL and code not in words:
                words[code] = class_name(open_file(path), int(shard.rows[row, 6]))
    names = classes if set(words.values()) <= set(classes) else tuple(sorted(words.values()))
    numbers = {name: number for number, name in enumerate(names)}
    codes = np.array(sorted(words), np.int64)
    of_code = np.array([numbers[words[code]] for code in codes.tolist()], np.int64)
    for table in found.tables:
        labels = table[:, _COLUMN["label"]]
        known = labels != NO_LABEL
        labels[known] = of_code[np.searchsorted(codes, labels[known])]
    return names
