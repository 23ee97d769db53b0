"""Data sets that TensorFlow Datasets has prepared, by index; nothing is ever downloaded or prepared here.

A prepared data set is a folder ``DATA_DIR/NAME[/CONFIG]/VERSION`` of TFRecord or ArrayRecord files with a
``features.json`` that says what their records hold. Its Examples are read as of any such files (`tfrecord`,
`array_record`): pictures and texts are stored as they came, so nothing is decoded. The class that made the data set
is not needed, and not built: unless its data are there, its constructor asks a server on the network for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import glob
import importlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from m3ae_jax.data.sources import array_record, tfrecord
from m3ae_jax.data.sources.base import (
    CAPTION_KEYS,
    CAPTIONS,
    IMAGE_KEYS,
    LABEL_KEYS,
    Record,
    SourceOptions,
    class_captions,
    find_key,
)
from m3ae_jax.data.sources.example_proto import Layout, Storage, parse
from m3ae_jax.data.sources.files import is_remote, open_file
from m3ae_jax.data.sources.index import Index, Shard, Tally, report
from m3ae_jax.errors import UserError, one_of

_INDEX_VERSION = 1
_BLOCK = 64  # records read at once while captions are counted
_SEQUENCE_KEYS = ("captions/text", "captions/caption")  # of data sets as coco_captions
_INFO = "dataset_info.json"
_FEATURES = "tensorflow_datasets.core.features."  # the library's own classes are in modules below it
_OPENING = threading.Lock()
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_AFTER_NAME = r"(?:/(?P<config>[\w\-.+]+))?(?::(?P<version>\d+(?:\.(?:\d+|\*)){2}))?"
_NAME = re.compile(rf"(?P<name>\w+){_AFTER_NAME}")
_CLASS = re.compile(rf"(?P<module>[A-Za-z_][\w.]*):(?P<builder>[A-Za-z_]\w*){_AFTER_NAME}")

_FORMS = (
    "it takes NAME[/CONFIG][:VERSION][@DATA_DIR] as 'coco_captions@/data/tfds', package.module:BuilderClass instead of "
    "a name, or the folder of a prepared data set"
)


class TFDSSource:
    """The examples of a prepared TensorFlow Datasets data set, by index.

    Examples are in the order of the files of the split, then of the records within a file.

    Attributes:
        modalities: `("image", "text")`, `("image",)` or `("text",)`, whichever the records hold.
        classes: the names of the label's classes; empty where there is none.
        report: what was found and what was left out.
        fingerprint: hash of the files' base names and sizes, of where the records lie, of the split and the keys.
    """

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Opens the files of a split, indexing those that are new or changed.

        Args:
            path: ``NAME[/CONFIG][:VERSION][@DATA_DIR]``; DATA_DIR is by default ``$TFDS_DATA_DIR``, else
                ``~/tensorflow_datasets``; ``package.module:BuilderClass`` instead of NAME; or a folder.
            options: `split` may be a slice, as ``train[:90%]``; keys are features' names, those of a sequence as
                ``captions/text``.

        Raises:
            UserError: an unknown or unprepared data set, an unknown split, no such feature, no example.
            OSError: a file cannot be read.
        """
        if options.captions not in CAPTIONS:
            raise UserError(one_of("data.*.captions", options.captions, CAPTIONS))
        builder = _open_builder(_find_prepared(path), path)
        found = _find_features(builder.info.features, options, path)
        self._layout, self.classes = found.layout, found.classes
        self.modalities = self._layout.modalities
        self._storage = _storage_of(builder, path)
        self._each_caption = options.captions == "all" and self._layout.caption is not None
        slices = _slices(builder, options.split, path)
        self._paths = list(dict.fromkeys(part.path for part in slices))
        index = self._index(options.cache_dir)
        shards = dict(zip(self._paths, index.of(self._paths), strict=True))
        tally = Tally(os.path.basename(str(builder.data_path)))
        # Part p of the split holds examples starts[p] to starts[p + 1], those of rows tables[p] of its file.
        self._parts = [part.path for part in slices]
        tables = [_take(shards[part.path].rows, part, tally) for part in slices]
        self._tables = [_each(table) if self._each_caption else table for table in tables]
        self._starts = np.cumsum([0] + [len(table) for table in self._tables], dtype=np.int64)
        of_files = report([*shards.values(), Shard(0, 0, np.empty((0, 0)), tally.skipped)])
        self.report = dataclasses.replace(of_files, shards=len(shards), examples=len(self))
        if not len(self):
            raise UserError(f"data.*.path={path!r}: its split {options.split!r} holds no example")
        taken = [f"{os.path.basename(part.path)}[{part.skip}:{part.skip + part.take}]" for part in slices]
        self._fingerprint = index.fingerprint(
            self._paths, list(shards.values()), *taken, options.captions, repr(self._layout)
        )

    def _index(self, cache_dir: str | None) -> Index:
        """Where each record lies and, if each caption is an example, the number of its captions."""
        storage, layout = self._storage, self._layout
        if not self._each_caption:
            return Index(f"tfds_{storage.kind}", _INDEX_VERSION, storage.columns, storage.scan, cache_dir)
        kind = f"tfds_{storage.kind}_{re.sub('[^A-Za-z0-9]', '-', layout.caption or '')}"
        return Index(
            kind, _INDEX_VERSION, storage.columns + 1, lambda path: _scan_captions(storage, layout, path), cache_dir
        )

    @property
    def fingerprint(self) -> str:
        """See the class docstring."""
        return self._fingerprint

    def __len__(self) -> int:
        """Number of examples."""
        return int(self._starts[-1])

    def read(self, indices: np.ndarray) -> list[Record]:
        """Reads examples, in the order asked for; safe to call from several threads at once.

        A damaged record gives a picture and a caption of no bytes and no label.

        Args:
            indices: `[n] int64`, each in `[0, len(self))`.

        Raises:
            OSError: a file cannot be read, or is shorter than when it was indexed.
        """
        indices = np.asarray(indices, np.int64)
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        records = [Record()] * len(indices)
        for part in np.unique(parts).tolist():
            places = np.flatnonzero(parts == part)
            rows = self._tables[part][indices[places] - self._starts[part]]
            payloads = self._storage.read(self._parts[part], rows)
            for place, number, payload in zip(places.tolist(), rows[:, -1].tolist(), payloads, strict=True):
                records[place] = self._layout.record(payload, number if self._each_caption else None)
        return records


# --- which data set ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What a path names.

    Attributes:
        name: of the data set.
        config: empty: its default.
        version: may hold ``*``; empty: the highest.
        data_dir: where to look.
        prepare: the command that prepares it.
        own: whether it is a class of the user's.
    """

    name: str
    config: str
    version: str
    data_dir: str
    prepare: str
    own: bool


def _import_tfds() -> Any:
    """The library; it takes a second, so not before it is needed."""
    import tensorflow_datasets

    return tensorflow_datasets


def _find_prepared(path: str) -> str:
    """The folder of the data set that a path names.

    Raises:
        UserError: it is unknown, or not prepared.
    """
    folder = os.path.expanduser(path)
    if os.path.isdir(folder) or (is_remote(path) and "@" not in path):
        found = _choose(_prepared_below(folder), "", "", folder, path)
        if found:
            return found
        if os.path.isabs(folder) or not _NAME.fullmatch(path) or is_remote(path):
            raise UserError(f"data.*.path={path!r} holds no prepared data set (dataset_info.json); {_FORMS}")
    wanted = _parse_path(path)
    place = _join(wanted.data_dir, wanted.name)
    prepared = _prepared_below(place)
    found = _choose(prepared, wanted.config, wanted.version, place, path)
    if found:
        return found
    known = () if wanted.own else tuple(_import_tfds().list_builders(with_community_datasets=False))
    if prepared:
        has = ", ".join("/".join(parts) for parts in sorted(prepared))
        raise UserError(f"data.*.path={path!r} is not prepared: {place} has only {has}; run: {wanted.prepare}")
    if wanted.own or wanted.name in known:
        raise UserError(f"data.*.path={path!r} is not prepared: there is no {place}; run: {wanted.prepare}")
    there = [] if is_remote(place) or not os.path.isdir(wanted.data_dir) else os.listdir(wanted.data_dir)
    near = difflib.get_close_matches(wanted.name, {*known, *there}, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else _FORMS
    raise UserError(
        f"data.*.path={path!r}: {wanted.name!r} is no data set of TensorFlow Datasets, nor in {wanted.data_dir}; {hint}"
    )


def _parse_path(path: str) -> _Wanted:
    """Takes a path apart.

    Raises:
        UserError: it has none of the forms, or its class cannot be imported.
    """
    spec, _, data_dir = path.partition("@")
    option = f" --data_dir={data_dir}" if data_dir else ""
    data_dir = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    found = _NAME.fullmatch(spec)
    if found:
        # The library takes MyData for my_data too.
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", found["name"]).lower()
        return _Wanted(
            name, found["config"] or "", found["version"] or "", data_dir, f"tfds build {spec}{option}", own=False
        )
    found = _CLASS.fullmatch(spec)
    if found is None:
        raise UserError(f"data.*.path={path!r} is no name of a data set; {_FORMS}")
    module, class_name, config = found["module"], found["builder"], found["config"] or ""
    try:
        builder = getattr(importlib.import_module(module), class_name)
        name = builder.name
        config = config or next((known.name for known in builder.BUILDER_CONFIGS), "")
    except (ImportError, AttributeError) as error:
        raise UserError(f"data.*.path={path!r} cannot be imported as a builder: {error}") from error
    arguments = f"data_dir='{data_dir}'" + (f", config='{config}'" if config else "")
    prepare = f'python -c "from {module} import {class_name}; {class_name}({arguments}).download_and_prepare()"'
    return _Wanted(name, config, found["version"] or "", data_dir, prepare, own=True)


def _join(folder: str, *names: str) -> str:
    return "/".join([folder.rstrip("/"), *names])


def _glob(folder: str, pattern: str) -> list[str]:
    if not is_remote(folder):
        return glob.glob(_join(glob.escape(folder), pattern))
    import tensorflow as tf

    try:
        return list(tf.io.gfile.glob(_join(folder, pattern)))
    except tf.errors.OpError as error:
        raise OSError(f"{folder}: {error.message}") from None


def _prepared_below(folder: str) -> dict[tuple[str, ...], str]:
    """The prepared data sets in a folder: by path below it, which is `()`, `(version,)` or `(config, version)`."""
    found = {}
    for pattern in (_INFO, f"*/{_INFO}", f"*/*/{_INFO}"):
        for name in _glob(folder, pattern):
            place = name[: -len(_INFO) - 1]
            parts = tuple(place[len(folder.rstrip("/")) + 1 :].split("/")) if pattern != _INFO else ()
            if not parts or _VERSION.fullmatch(parts[-1]):  # an unfinished one is called incomplete.ABCDEF_1.0.0
                found[parts] = place
    return found


def _choose(prepared: dict[tuple[str, ...], str], config: str, version: str, folder: str, path: str) -> str | None:
    """The folder of a config's highest version, or None.

    Raises:
        UserError: there are several configs, and nothing says which.
    """
    if () in prepared and not (config or version):
        return prepared[()]
    wanted = re.compile(re.escape(version).replace(r"\*", r"\d+") or ".*")
    fitting = [parts for parts in prepared if parts and wanted.fullmatch(parts[-1])]
    if not config and all(parts[:-1] for parts in fitting):
        configs = sorted({parts[0] for parts in fitting})
        config = configs[0] if len(configs) == 1 else _default_config(folder)
        if len(configs) > 1 and config not in configs:
            raise UserError(f"data.*.path={path!r}: {folder} holds several; name one of {', '.join(configs)}")
    fitting = [parts for parts in fitting if parts[:-1] == ((config,) if config else ())]
    highest = max(fitting, key=lambda parts: tuple(map(int, parts[-1].split("."))), default=None)
    return None if highest is None else prepared[highest]


def _default_config(folder: str) -> str:
    """The config that the data set's author made its default; empty: not known."""
    try:
        file = open_file(_join(folder, ".config", "metadata.json"))
        return str(json.loads(file.read(0, file.size)).get("default_config_name", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _open_builder(folder: str, path: str) -> Any:
    """What the library knows of a prepared data set.

    Raises:
        UserError: it is of an old version of the library, or damaged, or would import code.
    """
    tfds = _import_tfds()
    try:
        with _importing_nothing(folder):
            builder = tfds.builder_from_directory(folder)
    except (OSError, UserError):
        raise
    except Exception as error:  # it promises nothing about what a damaged file raises
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"data.*.path={path!r}: {folder} cannot be opened: {reason}") from error
    return builder


@contextlib.contextmanager
def _importing_nothing(folder: str) -> Iterator[None]:
    """Keeps the library from importing the modules of features' classes that a data set names, but its own.

    It imports whatever ``features.json`` or ``dataset_info.json`` says, in any of several notations, and so would run
    a file that comes with the data where Python looks for modules there, as in the working directory. So the one
    function that all notations end in is replaced for as long as a data set is opened.

    Raises:
        UserError: a class is neither the library's nor of a module that is imported already.
    """
    connector = _import_tfds().features.FeatureConnector

    def cls_from_name(name: str) -> Any:
        module = name.rpartition(".")[0]
        if not module.startswith(_FEATURES) and module not in sys.modules:
            raise UserError(
                f"data.*.path: the features of {folder} (features.json) name the class {name!r}, which is not of "
                "TensorFlow Datasets and would be imported; if you trust it, name the data set by its builder's class, "
                "as package.module:BuilderClass"
            )
        return original.__get__(None, connector)(name)

    with _OPENING:
        original = vars(connector)["cls_from_name"]
        connector.cls_from_name = staticmethod(cls_from_name)
        try:
            yield
        finally:
            connector.cls_from_name = original


# --- what its records hold ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One feature.

    Attributes:
        name: with slashes, as ``captions/text``.
        key: in the Example.
        feature: the library's description.
        depth: of sequences around it.
    """

    name: str
    key: str
    feature: Any
    depth: int


def _leaves(feature: Any, parts: tuple[str, ...] = (), depth: int = 0) -> Iterator[_Leaf]:
    features = _import_tfds().features
    if isinstance(feature, features.FeaturesDict):
        for name, inner in feature.items():
            yield from _leaves(inner, (*parts, name), depth)
    elif isinstance(feature, features.Sequence):
        yield from _leaves(feature.feature, parts, depth + 1)
    else:
        name = "/".join(parts)
        yield _Leaf(name, f"{name}/ragged_flat_values" if depth > 1 else name, feature, depth)


@dataclasses.dataclass(frozen=True)
class _Found:
    """`layout` has the classes' names as they are read in a caption, `classes` as they are."""

    layout: Layout
    classes: tuple[str, ...]


def _find_features(features: Any, options: SourceOptions, path: str) -> _Found:
    """Which features are the picture, the caption and the label.

    Raises:
        UserError: one that is named is not there, or there is neither picture nor caption.
    """
    types = _import_tfds().features
    leaves = sorted(_leaves(features), key=lambda leaf: leaf.name)  # their order in a features.json is by chance

    def find(what: str, wanted: str, usual: Sequence[str], typed: list[_Leaf], other: list[_Leaf]) -> _Leaf | None:
        """By name among all that would do, else by usual name among those of the type."""
        names = {leaf.name: leaf for leaf in (*typed, *(other if wanted else ()))}
        name = find_key(wanted, usual, names, f"data.*.{what}_key", path)
        return names[name] if name is not None else None

    texts = [leaf for leaf in leaves if _is_string(leaf.feature)]
    pictures = [leaf for leaf in leaves if type(leaf.feature) is types.Image and not leaf.depth]
    labels = [leaf for leaf in leaves if isinstance(leaf.feature, types.ClassLabel) and not leaf.depth]
    image = find("image", options.image_key, IMAGE_KEYS, pictures, texts) or _only(pictures)
    caption = find("caption", options.caption_key, (*CAPTION_KEYS, *_SEQUENCE_KEYS), texts, [])
    label = find("label", options.label_key, LABEL_KEYS, labels, []) or _only(labels)
    if image is None and caption is None:
        names = ", ".join(f"{leaf.name} ({type(leaf.feature).__name__})" for leaf in leaves)
        raise UserError(
            f"data.*.path={path!r} has no picture and no caption by a usual name; it has {names}; "
            "data.*.image_key and data.*.caption_key name others"
        )
    classes = tuple(label.feature.names) if label else ()
    if options.template:
        class_captions(options.template, classes)
    readable = tuple(name.replace("_", " ") for name in classes)
    layout = Layout(_key(image), _key(caption), _key(label), options.template, readable)
    return _Found(layout, classes)


def _key(leaf: _Leaf | None) -> str | None:
    return leaf.key if leaf else None


def _only(leaves: list[_Leaf]) -> _Leaf | None:
    return leaves[0] if len(leaves) == 1 else None


def _is_string(feature: Any) -> bool:
    import tensorflow as tf

    dtype = getattr(feature, "tf_dtype", None)
    return isinstance(feature, _import_tfds().features.Tensor) and dtype is tf.string


# --- where they are ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Slice:
    """Records `skip` to `skip + take` of a file."""

    path: str
    skip: int
    take: int


def _storage_of(builder: Any, path: str) -> Storage:
    """How its files are read.

    Raises:
        UserError: they cannot be, at random.
    """
    kind, folder = builder.info.file_format.value, str(builder.data_path)
    if kind == "tfrecord":
        return tfrecord.storage()
    if kind != "array_record":
        command = f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record --out_dir=DIR"
        raise UserError(f"data.*.path={path!r}: {folder} is stored as {kind}, which allows no random access; {command}")
    if is_remote(folder):
        raise UserError(f"data.*.path={path!r}: ArrayRecord files are read from local disks; copy or mount {folder}")
    return array_record.storage()


def _slices(builder: Any, split: str, path: str) -> list[_Slice]:
    """The parts of files that a split is made of.

    Raises:
        UserError: there is no such split, it is no split, or its files are said to lie outside the data set's folder.
    """
    splits = builder.info.splits
    for part in split.split("+"):
        name = part.partition("[")[0].strip()
        if name not in splits and name != "all":
            longer = next((known for known in sorted(splits) if name and known.startswith(name)), "")
            hint = f"; did you mean {longer!r}?" if longer else ""  # val for validation
            raise UserError(f"{one_of('data.*.split', name, splits)} (the splits of {path}){hint}")
    try:
        instructions = splits[split].file_instructions
    except Exception as error:  # it promises nothing; ValueError, AssertionError and KeyError were seen
        reason = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise UserError(f"data.*.split={split!r}: {reason}") from error
    folder = str(builder.data_path)
    for one in instructions:  # named by a template in its dataset_info.json; an index is written beside them
        if not os.path.normpath(str(one.filename)).startswith(_join(os.path.normpath(folder), "")):
            raise UserError(f"data.*.path={path!r}: {_INFO} names a file outside of {folder}: {str(one.filename)!r}")
    return [_Slice(str(one.filename), one.skip, one.take) for one in instructions]


def _take(rows: np.ndarray, part: _Slice, tally: Tally) -> np.ndarray:
    """The rows of a slice; counts those that the file lacks."""
    taken = rows[part.skip : part.skip + part.take]
    if len(taken) < part.take:
        tally.add("not in its file", os.path.basename(part.path), part.take - len(taken))
    return taken


def _scan_captions(storage: Storage, layout: Layout, path: str) -> Shard:
    """As the storage's own scan, but reads every record: the last column is the number of its captions."""
    shard = storage.scan(path)
    counts = []
    for start in range(0, len(shard.rows), _BLOCK):
        payloads = storage.read(path, shard.rows[start : start + _BLOCK])
        parsed = (parse(payload) if payload is not None else None for payload in payloads)
        counts += [len(layout.captions(features)) if features else 0 for features in parsed]
    rows = np.column_stack([shard.rows, np.array(counts, np.int64)])
    return dataclasses.replace(shard, rows=rows)


def _each(rows: np.ndarray) -> np.ndarray:
    """A row for each caption: instead of their number, which it is. A record without any stays, with none."""
    counts = np.maximum(rows[:, -1], 1)
    each = np.repeat(rows, counts, axis=0)
    each[:, -1] = np.arange(len(each)) - np.repeat(np.cumsum(counts) - counts, counts)
    return each
