"""HDF5 files, a data set of pictures beside one of captions or class numbers; row i of each is example i.

The layouts of M3AE's reference implementation are recognised by name: `jpg` + `caption`, `{split}_jpg` +
`{split}_labels`, `text` alone; so are all the usual names (`base.USUAL_KEYS`) with or without
``{split}_`` or ``{split}/`` before them. Others are named by the options.

A picture is a row of variable-length uint8 or of opaque bytes, or a decoded `[h, w, 3]` or `[h, w] uint8` array,
which is handed on as a BMP, without loss. A caption is a row of variable-length uint8 (UTF-8), a string of fixed or
variable length, or `[k]` strings: k captions of one picture (empty ones are padding where one is drawn). HDF5 ends
strings at their first NUL, so no picture is read from those of variable length; rows of fixed length lose zeros at
their end.

Class numbers are read and checked when a file is opened. A negative one is always refused. Class names come from
an attribute or data set `class_names`, `label_names` or `classes` (a JSON list or an array of strings), the number
of classes from an attribute `num_classes`; a label beyond them is refused. Without either, labels are taken as they
are if they run from 0 without a gap. If they have gaps, one that is not below the number of examples (labels and
examples of all splits of the files together) is refused: so a 1000 for "unknown" among 40 examples of three
classes is noticed, while 2,000 examples of some of 1,000 classes pass. A mark that is below the number of examples
is not noticed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import h5py
import numpy as np

from m3ae_jax.data.sources.base import USUAL_KEYS, Record, SourceOptions, class_captions, find_key, several
from m3ae_jax.data.sources.concatenated import ConcatenatedSource
from m3ae_jax.data.sources.files import expand, is_remote
from m3ae_jax.data.sources.index import Tally
from m3ae_jax.errors import UserError

_FORMS = (
    "it takes one .h5, .hdf5 or .hdf file, a folder of them, a glob, a range as {0..3}.h5, or several of these "
    "separated by commas"
)
_ALIASES = {"val": ("validation", "valid", "test"), "validation": ("val", "valid", "test")}
_NAMES_KEYS = ("class_names", "label_names", "classes")
_MAX_OPEN = 64
_MAX_BYTES = 2**28  # of one picture or caption
_MAX_CLASSES = 10**6
_MAX_NAMES = 1000  # a file with a data set per picture is none of these layouts
_VLEN_BYTES = 16  # of a value of variable length: its length (4), where its heap is (8), its number there (4)
_CHUNK_CACHE = 32 * 2**20  # bytes a data set: HDF5's own 1 MiB is less than one chunk of decoded pictures

# What h5py makes of HDF5's errors, by their class.
_DAMAGE = (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError, OverflowError)

_log = logging.getLogger("m3ae_jax")


class HDF5Source(ConcatenatedSource):
    """Pictures with captions or classes, or texts, in local HDF5 files, by index.

    Examples are in the order of the files, then of the rows. A row that HDF5 cannot read, as its chunk is damaged,
    gives a picture (a caption) of zero bytes.

    Attributes:
        modalities: of `("image", "text")` those that are there.
        classes: names of the classes, their numbers where there are no names; empty without labels.
        fingerprint: hash of the files' base names and sizes and of the data sets' names and lengths.
        report: how many examples there are, and what was left out.
    """

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Opens the files and checks that their data sets fit together.

        Args:
            path: a folder, a glob, a range as `{0..3}.h5`, one file, or several of these separated by commas.
            options: `split` chooses among ``{split}_jpg``, ...; `image_key`, `caption_key` and `label_key` name data
                sets, with or without the split before them.

        Raises:
            UserError: `path` names no file; a file is damaged, or none of these layouts; data sets of unequal
                lengths; a label that is no class.
            OSError: a file cannot be read.
        """
        remote = next((part.strip() for part in path.split(",") if is_remote(part)), None)
        if remote is not None:
            raise UserError(f"data.*.path={remote!r}: HDF5 is read from local files; copy it or mount the store")
        paths = expand(path, r"\.(h5|hdf5|hdf)", _FORMS)
        tally = Tally()
        self._files: list[_File] = []
        for name in paths:
            try:
                self._files.append(_inspect(name, options))
            except _NotWhole as error:
                if len(paths) == 1:
                    raise
                _log.warning("hdf5: left out: %s", error)
                tally.add("unusable file", str(error))
        if not self._files:
            raise UserError(f"data.*.path={path!r}: none of its {len(paths)} files can be read")
        first = self._files[0]
        for file in self._files:
            if (file.keys.keys(), file.captions) != (first.keys.keys(), first.captions):
                raise UserError(f"data.*.path: {file.path} has {file.contents}, but {first.path} {first.contents}")
        self._class_captions: tuple[bytes, ...] = ()
        if "label" in first.keys:
            self.classes = _classes(self._files)
            if "caption" not in first.keys and options.template:
                self._class_captions = class_captions(options.template, self.classes)
        has_text = "caption" in first.keys or bool(self._class_captions)
        self.modalities = ("image",) * ("image" in first.keys) + ("text",) * has_text
        # With captions="all" a row with k captions is k examples.
        self._per_row = first.captions if options.captions == "all" else 1
        self._number_examples(file.length * self._per_row for file in self._files)
        if not len(self):
            raise UserError(f"data.*.path={path!r} holds no example: {first.contents} has no rows")
        self.report = tally.report(len(self._files), len(self))
        parts = [(os.path.basename(f.path), f.size, f.length, *map(f.keys.get, USUAL_KEYS)) for f in self._files]
        identity = json.dumps([parts, self._per_row, options.template if self._class_captions else ""])
        self.fingerprint = hashlib.sha256(f"hdf5 1 {identity}".encode()).hexdigest()[:16]
        self._open = functools.lru_cache(maxsize=_MAX_OPEN)(_open)

    def _read_part(self, part: int, rows: np.ndarray) -> list[Record]:
        file = self._files[part]
        if os.stat(file.path).st_size != file.size:  # HDF5 would take zeros for what is missing
            raise OSError(f"{file.path}: another size than when it was opened; start again to read it anew")
        opened = self._open(file.path)
        rows, which = np.divmod(rows, self._per_row)
        records = [Record() for _ in rows]
        if "image" in file.keys:
            for record, value in zip(records, _take(opened[file.keys["image"]], rows), strict=True):
                record["image"] = _picture(value)
        if "caption" in file.keys:
            values = _take(opened[file.keys["caption"]], rows)
            for record, value, number in zip(records, values, which.tolist(), strict=True):
                # Of several captions the empty ones are padding.
                captions = [_bytes(value)] if file.captions == 1 or value is None else [_bytes(one) for one in value]
                if self._per_row > 1:
                    captions = captions[number : number + 1]
                record.update(several([caption for caption in captions if caption]))
        if "label" in file.keys:
            for record, label in zip(records, file.labels[rows].tolist(), strict=True):
                record["label"] = label
                if self._class_captions:
                    record["caption"] = self._class_captions[label]
        return records


# --- rows --------------------------------------------------------------------------------------------------


def _take(dataset: Any, rows: np.ndarray) -> list[Any]:
    """The values of rows, in their order; None where one is damaged.

    One call for many rows is much cheaper than a call for each. HDF5 wants them in rising order.
    """
    unique, places = np.unique(rows, return_inverse=True)
    whole = _is_plausible(dataset, unique)
    values: list[Any] = [None] * len(unique)
    try:
        stored = list(dataset[unique[whole]])
    except _DAMAGE as error:
        _raise_failure(error)
        stored = [_take_one(dataset, row) for row in unique[whole].tolist()]
    for place, value in zip(np.flatnonzero(whole).tolist(), stored, strict=True):
        values[place] = value
    return [values[place] for place in places.tolist()]


def _is_plausible(dataset: Any, rows: np.ndarray) -> np.ndarray:
    """Which rows have lengths that can be, `[n] bool`.

    HDF5 allocates and clears as many bytes as a row claims before it looks for them: up to 4 GiB, and 20 s, for one
    changed byte. The lengths of a data set that is not chunked lie in a table of 16 bytes a value.
    """
    count, offset = int(np.prod(dataset.shape)), dataset.id.get_offset()
    if dataset.dtype.kind != "O" or offset is None or dataset.id.get_storage_size() != _VLEN_BYTES * count:
        return np.ones(len(rows), np.bool_)
    descriptor, row_bytes = dataset.file.id.get_vfd_handle(), _VLEN_BYTES * count // dataset.shape[0]
    table = b"".join(os.pread(descriptor, row_bytes, offset + row * row_bytes) for row in rows.tolist())
    if len(table) < len(rows) * row_bytes:
        return np.ones(len(rows), np.bool_)  # beyond the end, as HDF5 will find
    lengths = np.frombuffer(table, np.dtype([("length", "<u4"), ("place", "V12")]))["length"].reshape(len(rows), -1)
    return np.asarray((lengths <= _MAX_BYTES).all(axis=1))


def _take_one(dataset: Any, row: int) -> Any:
    try:
        return dataset[row]
    except _DAMAGE as error:
        _raise_failure(error)
        return None


def _raise_failure(error: BaseException) -> None:
    """Raises `error` where the system refused a call (it has a number then), not where HDF5 met with damage."""
    if isinstance(error, OSError) and error.errno:
        raise error


def _bytes(value: Any) -> bytes:
    if value is None:
        return b""
    if isinstance(value, str):
        return value.encode("utf-8", "replace")
    return value.tobytes() if isinstance(value, np.ndarray | np.void) else bytes(value)


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
        keys: names of the data sets by what they hold: image, caption, label, as far as they are there.
        length: rows of each.
        captions: of a row.
        labels: `[length] int64`; empty without labels.
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


def _inspect(path: str, options: SourceOptions) -> _File:
    """Finds the data sets of a file and checks them.

    Raises:
        UserError, OSError: see `HDF5Source`.
    """
    size = os.stat(path).st_size
    try:
        with _open(path) as file:
            return _inspect_open(path, size, file, options)
    except UserError:
        raise
    except _DAMAGE as error:
        _raise_failure(error)
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise _NotWhole(f"data.*.path: {path} is no whole HDF5 file: {reason or type(error).__name__}") from None


def _inspect_open(path: str, size: int, file: Any, options: SourceOptions) -> _File:
    names = list(itertools.islice(_names(file), _MAX_NAMES))
    datasets = {kind: _dataset(file, name, path) for kind, name in _choose(options, names, path).items()}
    keys = {kind: dataset.name[1:] for kind, dataset in datasets.items()}
    lengths = {keys[kind]: _rows(dataset, path) for kind, dataset in datasets.items()}
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{name} has {rows} rows" for name, rows in lengths.items())
        raise UserError(f"data.*.path: {path}: {each}; row i of each must be of example i, so they must be as many")
    if "image" in datasets:
        _check_picture(datasets["image"], path)
    captions = _check_caption(datasets["caption"], path) if "caption" in datasets else 1
    labels = others = np.zeros(0, np.int64)
    class_names: tuple[str, ...] = ()
    if "label" in datasets:
        labels = _labels(datasets["label"], path)
        same = [_dataset(file, name, path) for name in names if name != keys["label"] and _split_of(name, "label")]
        others = np.concatenate([others, *(_labels(other, path) for other in same if other.dtype.kind in "iu")])
        class_names = _class_names(file, datasets["label"], path)
    return _File(path, size, keys, next(iter(lengths.values())), captions, labels, others, class_names)


def _names(file: Any) -> Iterator[str]:
    """The data sets of a file and of its groups, but not of groups in groups.

    Raises:
        KeyError: one is damaged (without this, a file would silently seem to hold pictures alone).
    """
    for name in file:
        link = file.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            yield name  # not followed; refused where it is chosen
            continue
        target = file[name] if isinstance(link, h5py.HardLink) else file.get(name)  # a link may lead nowhere
        if isinstance(target, h5py.Dataset):
            yield name
        elif isinstance(target, h5py.Group):
            yield from (f"{name}/{inner}" for inner in target if _is_dataset(target, inner))


def _is_dataset(group: Any, name: str) -> bool:
    """Whether it is a data set, or a link to another file that is not followed."""
    return isinstance(group.get(name, getlink=True), h5py.ExternalLink) or isinstance(group.get(name), h5py.Dataset)


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


def _choose(options: SourceOptions, names: Sequence[str], path: str) -> dict[str, str]:
    """The names of picture, caption and label, as far as they are there.

    Raises:
        UserError: neither a picture nor a caption, or not those that the options name.
    """
    named = {kind: key for kind in USUAL_KEYS if (key := getattr(options, f"{kind}_key"))}
    prefixes = [f"{options.split}{mark}" for mark in "_/" if options.split] + [""]
    prefixes += [f"{split}{mark}" for split in _ALIASES.get(options.split, ()) for mark in "_/"]
    for prefix in prefixes:
        chosen: dict[str, str] = {}
        for kind, usual in USUAL_KEYS.items():
            present = [prefix + key for key in ([named[kind]] if kind in named else usual) if prefix + key in names]
            if present:
                chosen[kind] = present[0]
        if chosen.keys() >= named.keys() and ("image" in chosen or "caption" in chosen):
            if prefix and prefix[:-1] != options.split:
                _log.info("hdf5: %s: split %s is called %s here", path, options.split, prefix[:-1])
            return chosen
    there = {split for name in names for kind in ("image", "caption") if (split := _split_of(name, kind))}
    if there:
        near = difflib.get_close_matches(options.split, there, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"data.*.split={options.split!r}: {path} has only the splits {', '.join(sorted(there))} "
            f"(data sets {', '.join(sorted(names))}){hint}"
        )
    for kind in USUAL_KEYS:
        find_key(kind, options, names, path)
    raise UserError(
        f"data.*.path: {path} has no data set of pictures or captions under a usual name, only "
        f"{', '.join(sorted(names)) or 'none at all'}; name them with image_key, caption_key and label_key"
    )


def _split_of(name: str, kind: str) -> str:
    """`train` of ``train_jpg`` or ``train/jpg``; empty where it is no such name."""
    if any(name in keys for keys in USUAL_KEYS.values()):
        return ""
    ends = (f"{mark}{key}" for key in USUAL_KEYS[kind] for mark in "_/")
    return next((name[: -len(end)] for end in ends if name.endswith(end)), "")


def _rows(dataset: Any, path: str) -> int:
    if not dataset.shape:  # a scalar, or h5py's None for "empty"
        raise UserError(f"data.*.path: {path}: {dataset.name[1:]} is one value, not one for each example")
    return int(dataset.shape[0])


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
    if dataset.dtype.kind not in "iu" or len(dataset.shape or ()) not in (1, 2) or dataset.shape[1:] not in ((), (1,)):
        raise UserError(f"data.*.label_key: {path}: {dataset.name[1:]} is {_kind(dataset)}; allowed are integers [n]")
    return dataset[()].astype(np.int64).reshape(-1)


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
        UserError: a label is no class, or the files name different classes.
    """
    named = {file.class_names: file.path for file in files if file.class_names}
    if len(named) > 1:
        raise UserError(f"data.*.path: {' and '.join(list(named.values())[:2])} name different classes")
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
        raise UserError(f"data.*.label_key: {file.path}: {file.keys['label']} has {first}{more}; {rule}")
