"""HDF5 files, a data set of pictures beside one of captions or class numbers; row i of each is example i.

The layouts of M3AE's reference implementation are recognised by name: `jpg` + `caption`, `{split}_jpg` +
`{split}_labels`, `text` alone; so are all the usual names (`base.USUAL_KEYS`) with or without
``{split}_`` or ``{split}/`` before them, and in groups in groups where one alone holds them. Others are named by the
options. Where several groups, or several data sets of pictures, may be meant, none is chosen, and the message names
all. Data sets that are not read are counted.

A picture is a row of variable-length uint8 or of opaque bytes, or a decoded `[h, w, 3]` or `[h, w] uint8` array,
which is handed on as a BMP, without loss. A caption is a row of variable-length uint8 (UTF-8), a string of fixed or
variable length, or `[k]` strings: k captions of one picture, where empty ones are padding, and a row of these alone
has no caption. HDF5 ends strings at their first NUL, so no picture is read from those of variable length; rows of fixed
length lose zeros at their end.

What has more than `max_bytes` is not read where its length lies in a table (data sets that are not chunked) or in the
type; chunks of values of variable length HDF5 reads as a whole, and then it is dropped.

Class numbers, whole numbers of any type, are read and checked when a file is opened. Labels of which one is no class
are refused where `label_key` names them or a template needs them; where only their name is a usual one, they are not
read, and counted. A negative one is none. Class names come from an attribute or data set `class_names`, `label_names`
or `classes` (a JSON list or an array of strings), the number of classes from an attribute `num_classes`; a label beyond
them is none. Without either, labels are taken as they are if they run from 0 without a gap. If they have gaps, one that
is not below the number of examples (labels and examples of all splits of the files together) is none: so a 1000 for
"unknown" among 40 examples of three classes is noticed, while 2,000 examples of some of 1,000 classes pass. A mark that
is below the number of examples is not noticed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import h5py
import numpy as np

from m3ae_jax.data.images import DAMAGED, TOO_MANY_BYTES
from m3ae_jax.data.sources import splits
from m3ae_jax.data.sources.base import (
    USUAL_KEYS,
    NoClassesError,
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
from m3ae_jax.data.sources.files import SPLITS, Stamps, expand, is_remote
from m3ae_jax.data.sources.index import UNUSABLE, Tally, left_out
from m3ae_jax.errors import UserError

_FORMS = (
    "it takes one .h5, .hdf5 or .hdf file, a folder of them, a glob, a range as {0..3}.h5, or several of these "
    "separated by commas"
)
_ENDING = r"\.(h5|hdf5|hdf)"
_NAMES_KEYS = ("class_names", "label_names", "classes")
_MAX_OPEN = 64
_MAX_CLASSES = 10**6
_MAX_NAMES = 1000  # a file with a data set per picture is none of these layouts
_MAX_LISTED = 10  # names in a message
_MAX_DEPTH = 4  # of groups in groups
_BLOCK = 4096  # rows of captions read at once
_VLEN_BYTES = 16  # of a value of variable length: its length (4), where its heap is (8), its number there (4)
_CHUNK_CACHE = 32 * 2**20  # bytes a data set: HDF5's own 1 MiB is less than one chunk of decoded pictures

# What h5py makes of HDF5's errors, by their class.
_DAMAGE = (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError, OverflowError)

_log = logging.getLogger("m3ae_jax")


class HDF5Source(ConcatenatedSource):
    """Pictures with captions or classes, or texts, in local HDF5 files, by index.

    Examples are in the order of the files, then of the rows. A row that HDF5 cannot read, as its chunk is damaged,
    gives a picture of zero bytes and no caption.

    Attributes:
        modalities: of `("image", "text")` those that are there.
        classes: names of the classes, their numbers where there are no names; empty without labels.
        fingerprint: hash of the files' base names and sizes and of the data sets' names and lengths.
        report: how many examples there are, what was left out, and which data sets and files are not read.
    """

    uses: ClassVar[frozenset[str]] = frozenset(
        {"split", "image_key", "caption_key", "label_key", "captions", "template", "group_key"}
    )

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Opens the files and checks that their data sets fit together.

        Args:
            path: a folder, a glob, a range as `{0..3}.h5`, one file, or several of these separated by commas.
            options: `split` chooses among ``{split}_jpg``, ...; `image_key`, `caption_key`, `label_key` and
                `group_key` name data sets, with or without the split before them.

        Raises:
            UserError: `path` names no file; a file is damaged, or none of these layouts; data sets of unequal
                lengths; `label_key` names a data set of no classes; several data sets that may be meant.
            OSError: a file cannot be read.
        """
        tally = Tally()
        paths = _find_files(path, tally)
        self._files = _inspect_all(paths, options, tally)
        if not self._files:
            raise UserError(f"data.*.path={path!r}: none of its {len(paths)} files can be read")
        first = self._files[0]
        for file in self._files:
            if (file.keys.keys() - {"label"}, file.captions) != (first.keys.keys() - {"label"}, first.captions):
                raise UserError(f"data.*.path: {file.path} has {file.contents}, but {first.path} {first.contents}")
        self._limit = options.max_bytes
        self._open = functools.lru_cache(maxsize=_MAX_OPEN)(_open)
        self._stamps = Stamps(file.path for file in self._files)
        check_template(options.template, first.keys.get("caption"), first.keys.get("label"))
        self.classes = self._find_classes(tally, needed=bool(options.label_key or options.template))
        self._class_captions = class_captions(options.template, self.classes) if options.template else ()
        has_text = "caption" in first.keys or bool(self._class_captions)
        self.modalities = ("image",) * ("image" in first.keys) + ("text",) * has_text
        # With captions="all" a row with k captions is k examples.
        self._each = first.captions > 1 and options.captions == "all"
        self._rows = [self._find_captions(file, tally) for file in self._files] if self._each else []
        lengths = map(len, self._rows) if self._each else [file.length for file in self._files]
        self._number_examples(lengths)
        self.report = tally.report(len(paths), len(self))
        if not len(self):
            why = f"{first.contents} has no rows" if not first.length else "no row has a caption"
            raise UserError(f"data.*.path={path!r} holds no example: {why}{left_out(self.report)}")
        self.fingerprint = self._hash(options.template)

    def _find_classes(self, tally: Tally, *, needed: bool) -> tuple[str, ...]:
        """The names of the classes; where they are not needed, a data set that holds none is counted and not read.

        Raises:
            UserError: they are needed, and it holds none.
        """
        try:
            return _classes(self._files)
        except NoClassesError as error:
            if needed:
                raise
            for file in self._files:
                if name := file.keys.pop("label", ""):
                    tally.ignore(f"data set {name}: {error.why}", os.path.basename(file.path), file.length)
            return ()

    def _hash(self, template: str) -> str:
        parts = [
            (os.path.basename(f.path), f.size, f.length, *map(f.keys.get, USUAL_KEYS), *_present(f.keys, "group"))
            for f in self._files
        ]
        per_row = self._files[0].captions if self._each else 1
        padded = len(self) != per_row * sum(file.length for file in self._files)
        identity = json.dumps([parts, per_row, template, *[len(self)] * padded])
        return hashlib.sha256(f"hdf5 1 {identity}".encode()).hexdigest()[:16]

    def _find_captions(self, file: _File, tally: Tally) -> np.ndarray:
        """Row and number of each caption that is no padding, `[n, 2] int64`; counts the rows without any."""
        found = [np.zeros((0, 2), np.int64)]
        for start in range(0, file.length, _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, file.length))
            values = _take(self._open(file.path)[file.keys["caption"]], rows, self._limit)
            # A row that cannot be read stays, once.
            used = [
                [0] if isinstance(one, _Unread) else np.flatnonzero([_bytes(text) != b"" for text in one])
                for one in values
            ]
            counts = np.array([len(numbers) for numbers in used])
            found.append(np.column_stack([np.repeat(rows, counts), np.concatenate(used).astype(np.int64)]))
            absent = rows[counts == 0]
            if absent.size:
                tally.add("no caption", f"{os.path.basename(file.path)}:row {absent[0]}", absent.size)
        return np.concatenate(found)

    def _read_part(self, part: int, rows: np.ndarray) -> list[Record]:
        file = self._files[part]
        self._stamps.check(file.path)  # HDF5 would take zeros for what is missing
        opened, numbers = self._open(file.path), np.full(len(rows), -1)
        if self._each:
            rows, numbers = self._rows[part][rows].T
        columns = [
            _take(opened[file.keys[kind]], rows, self._limit) if kind in file.keys else [None] * len(rows)
            for kind in ("image", "caption", "group")
        ]
        labels = file.labels[rows].tolist() if "label" in file.keys else [None] * len(rows)
        return [self._record(*values) for values in zip(*columns, labels, numbers.tolist(), strict=True)]

    def _record(self, image: Any, caption: Any, group: Any, label: int | None, number: int) -> Record:
        """The record of a row's values, None of what there is not.

        Args:
            image: as HDF5 gives it.
            caption: likewise, one or several.
            group: likewise.
            label: class number.
            number: of the caption; -1: all.
        """
        record = Record()
        if label is not None:
            record["label"] = label
        if label is not None and self._class_captions:
            record["caption"] = self._class_captions[label]
        if group is not None and not isinstance(group, _Unread):
            record["group"] = _group(group)
        if caption is not None and not isinstance(caption, _Unread):
            record.update(several(self._captions(caption, number)))
        if image is not None:
            record["image"] = b"" if isinstance(image, _Unread) else _picture(image)
        if image is _Unread.TOO_LARGE or caption is _Unread.TOO_LARGE:
            record["unusable"] = TOO_MANY_BYTES
        elif image is _Unread.DAMAGED:
            record["unusable"] = DAMAGED
        return record

    def _captions(self, value: Any, number: int) -> list[bytes]:
        """The captions of a row; of several the empty ones are padding."""
        if self._files[0].captions == 1:
            is_row = isinstance(value, np.ndarray) and value.dtype.kind != "u"  # of a data set [n, 1]
            return [_bytes(value[0] if is_row else value)]
        if number >= 0:
            value = value[number : number + 1]
        return [caption for caption in map(_bytes, value) if caption]


def _present(keys: Mapping[str, str], kind: str) -> list[str]:
    return [keys[kind]] if kind in keys else []


def _find_files(path: str, tally: Tally) -> list[str]:
    """The files that `path` names; counts what lies beside them.

    Raises:
        UserError: there is none, or it is in a store.
    """
    remote = next((part.strip() for part in path.split(",") if is_remote(part)), None)
    if remote is not None:
        raise UserError(f"data.*.path={remote!r}: HDF5 is read from local files; copy it or mount the store")
    paths = expand(path, _ENDING, _FORMS)
    for part in path_parts(path):
        ignore_beside(part, paths, _ENDING, tally)
    return paths


def _inspect_all(paths: Sequence[str], options: SourceOptions, tally: Tally) -> list[_File]:
    """The whole ones of the files; counts the others.

    Raises:
        UserError: a file is none of these layouts, or the only one is damaged.
    """
    files = []
    for path in paths:
        try:
            files.append(_inspect(path, options, tally))
        except _NotWhole as error:
            if len(paths) == 1:
                raise
            _log.warning("hdf5: left out: %s", error)
            tally.add(UNUSABLE, str(error))
    return files


# --- rows --------------------------------------------------------------------------------------------------


class _Unread(enum.Enum):
    """Why there is no value of a row."""

    DAMAGED = enum.auto()
    TOO_LARGE = enum.auto()


def _take(dataset: Any, rows: np.ndarray, limit: int) -> list[Any]:
    """The values of rows, in their order; `_Unread` where one is damaged, or has a part of more than `limit` bytes.

    One call for many rows is much cheaper than a call for each. HDF5 wants them in rising order.
    """
    unique, places = np.unique(rows, return_inverse=True)
    fits = _fits(dataset, unique, limit)
    values: list[Any] = [_Unread.TOO_LARGE] * len(unique)
    try:
        stored = list(dataset[unique[fits]])
    except _DAMAGE as error:
        _raise_failure(error)
        stored = [_take_one(dataset, row) for row in unique[fits].tolist()]
    for place, value in zip(np.flatnonzero(fits).tolist(), stored, strict=True):
        values[place] = _Unread.TOO_LARGE if _largest(value) > limit else value
    return [values[place] for place in places.tolist()]


def _fits(dataset: Any, rows: np.ndarray, limit: int) -> np.ndarray:
    """Which rows have no more than `limit` bytes, as far as that is known before they are read, `[n] bool`.

    HDF5 allocates and clears as many bytes as a row claims before it looks for them: up to 4 GiB, and 20 s, for one
    changed byte. The lengths of a data set that is not chunked lie in a table of 16 bytes a value.
    """
    count, offset = int(np.prod(dataset.shape)), dataset.id.get_offset()
    if dataset.dtype.kind != "O":
        return np.full(len(rows), dataset.dtype.itemsize * count <= limit * max(dataset.shape[0], 1))
    if offset is None or dataset.id.get_storage_size() != _VLEN_BYTES * count:
        return np.ones(len(rows), np.bool_)
    descriptor, row_bytes = dataset.file.id.get_vfd_handle(), _VLEN_BYTES * count // dataset.shape[0]
    table = b"".join(os.pread(descriptor, row_bytes, offset + row * row_bytes) for row in rows.tolist())
    if len(table) < len(rows) * row_bytes:
        return np.ones(len(rows), np.bool_)  # beyond the end, as HDF5 will find
    lengths = np.frombuffer(table, np.dtype([("length", "<u4"), ("place", "V12")]))["length"].reshape(len(rows), -1)
    return np.asarray((lengths <= limit).all(axis=1))


def _largest(value: Any) -> int:
    """Bytes of the largest value of variable length in a row; 0 where it is none."""
    if isinstance(value, np.ndarray):
        return max(map(_largest, value), default=0) if value.dtype == object else value.nbytes
    return len(value) if isinstance(value, str | bytes) else 0


def _take_one(dataset: Any, row: int) -> Any:
    try:
        return dataset[row]
    except _DAMAGE as error:
        _raise_failure(error)
        return _Unread.DAMAGED


def _raise_failure(error: BaseException) -> None:
    """Raises `error` where the system refused a call (it has a number then), not where HDF5 met with damage."""
    if isinstance(error, OSError) and error.errno:
        raise error


def _bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "replace")
    return value.tobytes() if isinstance(value, np.ndarray | np.void) else bytes(value)


def _group(value: Any) -> str:
    is_number = isinstance(value, np.number | np.bool_)
    return str(value) if is_number else _bytes(value).decode("utf-8", "replace")


def _picture(value: Any) -> bytes:
    if not isinstance(value, np.ndarray) or value.ndim == 1:
        return _bytes(value)
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(value).convert("RGB").save(file, "BMP")
    return file.getvalue()


# --- one file ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _File:
    """The data sets of a file.

    Attributes:
        path: where it is.
        size: bytes.
        keys: names of the data sets by what they hold: image, caption, label, group, as far as they are there.
        length: rows of each.
        captions: of a row.
        labels: `[length] int64`; empty without labels, and where they hold no classes.
        no_classes: why; None where they do.
        other_labels: those of the other splits, in no order.
        class_names: empty where the file has none.
    """

    path: str
    size: int
    keys: dict[str, str]
    length: int
    captions: int
    labels: np.ndarray
    other_labels: np.ndarray
    class_names: tuple[str, ...]
    no_classes: NoClassesError | None

    @property
    def contents(self) -> str:
        more = f" ({self.captions} captions a row)" if self.captions > 1 else ""
        return " + ".join(self.keys.values()) + more


def _open(path: str) -> Any:
    """Opens a file without a lock, which a read-only or network disk may refuse.

    Raises:
        OSError: it cannot be opened, or (without `errno`) is no whole HDF5 file.
    """
    return h5py.File(path, "r", locking=False, rdcc_nbytes=_CHUNK_CACHE)


class _NotWhole(UserError):
    """A damaged file, which does not stop the others."""


def _inspect(path: str, options: SourceOptions, tally: Tally) -> _File:
    """Finds the data sets of a file and checks them.

    Raises:
        UserError, OSError: see `HDF5Source`.
    """
    size = os.stat(path).st_size
    try:
        with _open(path) as file:
            found, unused = _inspect_open(path, size, file, options)
    except UserError:
        raise
    except _DAMAGE as error:
        _raise_failure(error)
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise _NotWhole(f"data.*.path: {path} is no whole HDF5 file: {reason or type(error).__name__}") from None
    for name, rows in unused.items():
        tally.ignore(f"data set {name}", os.path.basename(path), rows)
    return found


def _inspect_open(path: str, size: int, file: Any, options: SourceOptions) -> tuple[_File, dict[str, int]]:
    """What a file holds, and the rows of each data set that is not read."""
    names = list(itertools.islice(_names(file), _MAX_NAMES))
    chosen = _choose(options, names, path, file)
    datasets = {kind: _dataset(file, name, path) for kind, name in chosen.items()}
    keys = {kind: dataset.name[1:] for kind, dataset in datasets.items()}
    lengths = {keys[kind]: _rows(dataset, path) for kind, dataset in datasets.items()}
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{name} has {rows} rows" for name, rows in lengths.items())
        raise UserError(f"data.*.path: {path}: {each}; row i of each must be of example i, so they must be as many")
    if "image" in datasets:
        _check_picture(datasets["image"], path)
    if "group" in datasets:
        _check_group(datasets["group"], path)
    captions = _check_caption(datasets["caption"], path) if "caption" in datasets else 1
    labels = others = np.zeros(0, np.int64)
    class_names: tuple[str, ...] = ()
    no_classes = None
    if "label" in datasets:
        try:
            labels = _labels(datasets["label"], path)
        except NoClassesError as error:
            no_classes = error
        for name in names:
            if name != keys["label"] and _split_of(name, "label"):
                other = _dataset(file, name, path)
                with contextlib.suppress(UserError):  # it holds something else
                    others = np.concatenate([others, _labels(other, path)])
        class_names = _class_names(file, datasets["label"], path)
    unused = {name: _count(file, name) for name in names if name not in chosen.values() and name not in _NAMES_KEYS}
    length = next(iter(lengths.values()))
    return _File(path, size, keys, length, captions, labels, others, class_names, no_classes), unused


def _names(group: Any) -> Iterator[str]:
    """The data sets of a file and of its groups, down to `_MAX_DEPTH`.

    Raises:
        KeyError: one is damaged (without this, a file would silently seem to hold pictures alone).
    """
    groups, seen = [("", group)], {_address(group)}  # a link may lead back
    while groups:
        above, group = groups.pop(0)
        for key in group:
            name, link = f"{above}{key}", group.get(key, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                yield name  # not followed; refused where it is chosen
                continue
            target = group[key] if isinstance(link, h5py.HardLink) else group.get(key)  # a link may lead nowhere
            if isinstance(target, h5py.Dataset):
                yield name
            elif isinstance(target, h5py.Group) and name.count("/") + 1 < _MAX_DEPTH and _address(target) not in seen:
                seen.add(_address(target))
                groups.append((f"{name}/", target))


def _address(group: Any) -> tuple[int, int]:
    """What tells a group from all others."""
    info = h5py.h5o.get_info(group.id)
    return info.fileno, info.addr


def _is_dataset(group: Any, name: str) -> bool:
    """Whether it is a data set, or a link to another file that is not followed."""
    return isinstance(group.get(name, getlink=True), h5py.ExternalLink) or isinstance(group.get(name), h5py.Dataset)


def _linked(file: Any, name: str) -> Any:
    """What a name stands for; None where it is a link to another file, which is not followed."""
    return None if isinstance(file.get(name, getlink=True), h5py.ExternalLink) else file.get(name)


def _count(file: Any, name: str) -> int:
    """Rows of a data set that is not read, 1 where they are not known."""
    dataset = _linked(file, name)
    return int(dataset.shape[0]) if isinstance(dataset, h5py.Dataset) and dataset.shape else 1


def _dataset(file: Any, name: str, path: str) -> Any:
    """A data set that is in the file itself.

    HDF5 can take the rows of a data set from any file of this machine that its author names, which nothing here should
    read for him; nor would a change of that file be noticed.

    Raises:
        UserError: its rows are in another file.
    """
    within = not isinstance(file.get(name, getlink=True), h5py.ExternalLink)
    dataset = file[name] if within else None
    if dataset is None or dataset.file.filename != file.filename or dataset.external or dataset.is_virtual:
        raise UserError(
            f"data.*.path: {path}: the rows of {name} are in another file (an external link, external storage or a "
            "virtual data set), which is not read; name the file that holds them"
        )
    return dataset


def _choose(options: SourceOptions, names: Sequence[str], path: str, file: Any) -> dict[str, str]:
    """The names of picture, caption, label and group, as far as they are there.

    Raises:
        UserError: neither a picture nor a caption, or not those that the options name; or several may be meant.
    """
    named = {kind: key for kind in (*USUAL_KEYS, "group") if (key := getattr(options, f"{kind}_key"))}
    ends = {kind: list(keys) for kind, keys in USUAL_KEYS.items()} | {kind: [key] for kind, key in named.items()}
    there = {prefix for kind in ("image", "caption") for name in names for prefix in _prefixes(name, ends[kind])}
    all_names = frozenset(names)
    folders = [f"{key.rpartition('/')[0]}/" for key in named.values() if "/" in key]
    present = {prefix: _present_at(prefix, folders, ends, all_names) for prefix in sorted(there)}
    whole = {prefix: found for prefix, found in present.items() if found.keys() >= named.keys()}
    prefix = _choose_prefix(options.split, list(whole), list(present), path)
    if prefix is None:
        _refuse_examples_apart(present, path, file)
        _refuse(options, names, path, list(present), missing=not whole)
    found = whole[prefix]
    pictures = [name for name in found.get("image", ()) if _holds_pictures(file, name, path)]
    if len(pictures) > 1:
        keys = " or ".join(f"image_key={name.removeprefix(prefix)!r}" for name in pictures)
        raise UserError(f"data.*.path: {path} has several data sets of pictures, {', '.join(pictures)}; set {keys}")
    return {kind: (pictures if kind == "image" and pictures else found[kind])[0] for kind in found}


def _prefixes(name: str, ends: Iterable[str]) -> list[str]:
    """What stands before a key in a data set's name, as ``train_``, ``a/`` or nothing; no item where no key ends it."""
    key = max((end for end in ends if name == end or name.endswith((f"/{end}", f"_{end}"))), key=len, default=None)
    return [] if key is None else [name[: len(name) - len(key)]]


def _present_at(
    prefix: str, folders: Sequence[str], ends: Mapping[str, Sequence[str]], names: Collection[str]
) -> dict[str, list[str]]:
    """The data sets with this prefix, or else beside those that the options name, by what they hold."""
    found: dict[str, list[str]] = {}
    for kind, keys in ends.items():
        for place in ("", *folders):
            here = [name for key in keys if (name := f"{prefix}{place}{key}") in names]
            if here and kind not in found:
                found[kind] = here
    return found


def _choose_prefix(split: str, whole: Sequence[str], present: Sequence[str], path: str) -> str | None:
    """The prefix that is meant; None where there is none, or several may be.

    Args:
        split: the one wanted.
        whole: prefixes that have all that the options name.
        present: those that have a picture or a caption.
        path: the file, for a message.
    """
    any_split = split in splits.DEFAULTS  # not one that was asked for
    others = splits.names_of(split)[1:]
    at_top = (
        [f"{split}_", f"{split}/"] * bool(split) + [""] * any_split + [f"{name}{m}" for name in others for m in "_/"]
    )
    chosen = next((prefix for prefix in at_top if prefix in whole), None)
    if chosen is None:
        inside = _of_split([split, *others], whole)
        is_alone = any_split and len(present) == 1 and not _of_split(SPLITS, present)
        inside = inside or list(whole) * is_alone
        chosen = inside[0] if len(inside) == 1 else None
    if chosen and not _of_split([split], [chosen]) and chosen[:-1] != split:
        _log.info("hdf5: %s: split %s is called %s here", path, split, chosen[:-1])
    return chosen


def _of_split(splits: Iterable[str], prefixes: Sequence[str]) -> list[str]:
    """The prefixes that are of the first of the splits of which there is any, as ``a/train_`` and ``train/b/``."""
    each = ([prefix for prefix in prefixes if name and name in re.split("[/_]", prefix)] for name in splits)
    return next(filter(None, each), [])


def _refuse_examples_apart(present: Mapping[str, Mapping[str, Sequence[str]]], path: str, file: Any) -> None:
    """Refuses a group for each example, as in the text-to-image files of CUB.

    Raises:
        UserError: each data set of pictures that was found, by prefix, is a single picture's bytes.
    """
    pictures = [name for found in present.values() for name in found.get("image", ())]
    if len(pictures) > 1 and all(_is_one_picture(_linked(file, name)) for name in pictures):
        raise UserError(
            f"data.*.path: {path} has a group for each example ({_listed(sorted(pictures))}), which neither hdf5 nor "
            "data.prepare reads; write all pictures into one data set and all captions into one, or tars"
        )


def _is_one_picture(dataset: Any) -> bool:
    if not isinstance(dataset, h5py.Dataset):
        return False
    return dataset.shape == () or (len(dataset.shape or ()) == 1 and dataset.dtype == np.uint8)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED:,} more" if len(names) > _MAX_LISTED else ""
    return (", ".join(names[:_MAX_LISTED]) or "none at all") + more


def _refuse(
    options: SourceOptions, names: Sequence[str], path: str, prefixes: Sequence[str], *, missing: bool
) -> NoReturn:
    """Says why no data sets can be chosen, and which there are.

    Args:
        options: with the names that were wanted.
        names: of all data sets.
        path: the file.
        prefixes: of those of pictures and captions.
        missing: no prefix has all that the options name.

    Raises:
        UserError: always.
    """
    listed = _listed(sorted(names))
    if missing:
        keys = [name.removeprefix(prefix) for name in names for prefix in ("", *prefixes) if name.startswith(prefix)]
        for kind in (*USUAL_KEYS, *["group"] * bool(options.group_key)):
            find_key(kind, options, dict.fromkeys(keys), path)
    there = sorted(prefix.rstrip("/_") for prefix in prefixes if prefix)
    if there or not missing:
        only = f"has only the splits {_listed(there)}" if there else "has no splits"
        near = difflib.get_close_matches(options.split, there, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"data.*.split={options.split!r}: {path} {only} (data sets {listed}){hint}")
    raise UserError(
        f"data.*.path: {path} has no data set of pictures or captions under a usual name, only {listed}; name them "
        "with image_key, caption_key and label_key"
    )


def _split_of(name: str, kind: str) -> str:
    """`train` of ``train_jpg`` or ``train/jpg``; empty where it is no such name."""
    return next((prefix.rstrip("/_") for prefix in _prefixes(name, USUAL_KEYS[kind])), "")


def _rows(dataset: Any, path: str) -> int:
    if not dataset.shape:  # a scalar, or h5py's None for "empty"
        raise UserError(f"data.*.path: {path}: {dataset.name[1:]} is one value, not one for each example")
    return int(dataset.shape[0])


def _holds_pictures(file: Any, name: str, path: str) -> bool:
    try:
        _check_picture(_dataset(file, name, path), path)
    except UserError:
        return False
    return True


def _check_group(dataset: Any, path: str) -> None:
    kind = dataset.dtype
    is_text = h5py.check_string_dtype(kind) is not None or _is_fixed_bytes(kind)
    if len(dataset.shape) != 1 or not (is_text or kind.kind in "iufb" or h5py.check_vlen_dtype(kind) == np.uint8):
        raise UserError(
            f"eval.group_key: {path}: {dataset.name[1:]} is {_kind(dataset)}; allowed are strings or numbers [n]"
        )


def _check_picture(dataset: Any, path: str) -> None:
    kind, shape = dataset.dtype, dataset.shape
    text = h5py.check_string_dtype(kind)
    if text is not None and text.length is None:
        raise UserError(
            f"data.*.image_key: {path}: {dataset.name[1:]} holds strings, which HDF5 ends at their first zero byte: "
            "the pictures in it are lost; store them as h5py.vlen_dtype(numpy.uint8)"
        )
    is_bytes = len(shape) == 1 and (h5py.check_vlen_dtype(kind) == np.uint8 or _is_fixed_bytes(kind))
    is_decoded = kind == np.uint8 and (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)) and 0 not in shape[1:]
    if not is_bytes and not is_decoded:
        raise UserError(
            f"data.*.image_key: {path}: {dataset.name[1:]} is {_kind(dataset)}; allowed are variable-length uint8 or "
            "opaque bytes [n], and decoded pictures uint8 [n, height, width, 3] or [n, height, width]"
        )


def _check_caption(dataset: Any, path: str) -> int:
    """The number of captions of a row."""
    kind, shape = dataset.dtype, dataset.shape
    is_text = h5py.check_string_dtype(kind) is not None or _is_fixed_bytes(kind)
    if not (is_text or h5py.check_vlen_dtype(kind) == np.uint8) or len(shape) > 2 or 0 in shape[1:]:
        raise UserError(
            f"data.*.caption_key: {path}: {dataset.name[1:]} is {_kind(dataset)}; allowed are variable-length uint8 "
            "(UTF-8) or strings, [n] or [n, captions]"
        )
    return int(shape[1]) if len(shape) == 2 else 1


def _is_fixed_bytes(kind: np.dtype) -> bool:
    return kind.kind in "SV" and kind.names is None


def _labels(dataset: Any, path: str) -> np.ndarray:
    """The class numbers, `[n] int64`.

    Raises:
        NoClassesError: one is no whole number.
    """
    what = f"data.*.label_key: {path}: {dataset.name[1:]} is {_kind(dataset)}; allowed are integers [n]"
    if dataset.dtype.kind not in "iuf" or len(dataset.shape or ()) not in (1, 2) or dataset.shape[1:] not in ((), (1,)):
        raise NoClassesError(what, "no class numbers")
    labels = dataset[()].reshape(-1)
    if dataset.dtype.kind == "f":
        broken = np.flatnonzero(~np.isfinite(labels) | (labels != np.floor(labels)))
        if broken.size:
            first = labels[broken[0]]
            message = f"{what} or whole numbers, which {first} at row {broken[0]} is not"
            raise NoClassesError(message, f"no class, e.g. {first}")
    return np.asarray(labels.astype(np.int64))


def _kind(dataset: Any) -> str:
    inner = h5py.check_vlen_dtype(dataset.dtype)
    text = h5py.check_string_dtype(dataset.dtype)
    name = f"variable-length {inner}" if inner is not None else "strings" if text is not None else str(dataset.dtype)
    return f"{name} {list(dataset.shape or ())}"


# --- classes -----------------------------------------------------------------------------------------------


def _class_names(file: Any, label: Any, path: str) -> tuple[str, ...]:
    """What a file says of its classes: their names, or the numbers up to `num_classes`; else nothing."""
    for attributes in (label.attrs, file.attrs):
        for key in _NAMES_KEYS:
            if key in attributes:
                return _parse_names(attributes[key])
        if "num_classes" in attributes:
            return tuple(map(str, range(min(int(attributes["num_classes"]), _MAX_CLASSES))))
    for key in _NAMES_KEYS:
        if _is_dataset(file, key):
            return _parse_names(_dataset(file, key, path)[()])
    return ()


def _parse_names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str | bytes):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list | np.ndarray):
        return ()
    names = np.asarray(value, object).reshape(-1).tolist()
    return tuple(one.decode("utf-8", "replace") if isinstance(one, bytes) else str(one) for one in names)


def _classes(files: Sequence[_File]) -> tuple[str, ...]:
    """The names of the classes, or their numbers; checks every label (see the module's docstring).

    Raises:
        NoClassesError: a label is no class, or the files name different classes, or not all have labels.
    """
    bare = [file for file in files if "label" not in file.keys]
    if len(bare) == len(files):
        return ()
    if bare:
        raise NoClassesError(f"data.*.label_key: {bare[0].path} has no labels, other files have", "not in all files")
    for file in files:
        if file.no_classes:
            raise file.no_classes
    named = {file.class_names: file.path for file in files if file.class_names}
    if len(named) > 1:
        message = f"data.*.path: {' and '.join(list(named.values())[:2])} name different classes"
        raise NoClassesError(message, "names of different classes")
    together = np.concatenate([labels for file in files for labels in (file.labels, file.other_labels)])
    present = np.unique(together[together >= 0])
    names = next(iter(named), ())
    if names:
        limit, rule = len(names), f"class numbers are 0 to {len(names) - 1}, as the file names {len(names)} classes"
    else:
        top = int(present[-1]) + 1 if present.size else 0
        limit = top if len(present) == top else len(together)
        rule = (
            "class numbers start at 0, and where some are missing in between must be below the number of examples "
            f"({len(together)}), unless the file has an attribute class_names or num_classes"
        )
    for file in files:
        _check_range(file, limit, rule)
    return names or tuple(map(str, range(int(present[present < limit].max(initial=-1)) + 1)))


def _check_range(file: _File, limit: int, rule: str) -> None:
    bad = np.flatnonzero((file.labels < 0) | (file.labels >= limit))
    if bad.size:
        first = ", ".join(f"{file.labels[row]} at row {row}" for row in bad[:3].tolist())
        more = f" and {bad.size - 3} more" if bad.size > 3 else ""
        message = f"data.*.label_key: {file.path}: {file.keys['label']} has {first}{more}; {rule}"
        raise NoClassesError(message, f"no class, e.g. {file.labels[bad[0]]}")
