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
import tensorflow_datasets as tfds

from m3ae_jax.data.sources.array_record import ArrayRecordStorage
from m3ae_jax.data.sources.base import USUAL_KEYS, SourceOptions, find_key
from m3ae_jax.data.sources.concatenated import check_template
from m3ae_jax.data.sources.example_proto import ExampleRecords, Layout, Storage, check
from m3ae_jax.data.sources.files import is_remote, open_file
from m3ae_jax.data.sources.index import LOST, Index, Shard, Tally, left_out
from m3ae_jax.data.sources.tfrecord import TFRecordStorage
from m3ae_jax.errors import UserError, one_of

_SEQUENCE_KEYS = ("captions/text", "captions/caption")  # of data sets as coco_captions
_INFO = "dataset_info.json"
_INDEX_VERSION = 1
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


class TFDSSource(ExampleRecords):
    """The examples of a prepared TensorFlow Datasets data set, by index.

    Examples are in the order of the files of the split, then of the records within a file.

    Attributes:
        modalities: `("image", "text")`, `("image",)` or `("text",)`, whichever the records hold.
        classes: the names of the label's classes; empty where there is none.
        report: how many examples there are, and what was left out.
        fingerprint: hash of the files' base names and sizes, of where the records lie, and of the keys.
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
        check(options)
        builder = _open_builder(_find_prepared(path), path)
        leaves = sorted(_leaves(builder.info.features), key=lambda leaf: leaf.name)  # in the file by chance
        layout, self.classes = _find_features(leaves, options, path)
        storage = _storage(builder, path, options.max_bytes)
        super().__init__(storage, layout, options)
        slices = _slices(builder, options.split, path)
        paths, kind = list(dict.fromkeys(part.path for part in slices)), f"tfds_{storage.kind}"
        index = Index(kind, _INDEX_VERSION, storage.columns, storage.scan, options.index_dir)
        shards = index.shards(paths)
        by_path = dict(zip(paths, zip(shards, self._tables(kind, paths, shards), strict=True), strict=True))
        tally = Tally()
        tables = [_take(*by_path[part.path], part, tally) for part in slices]
        files = [part.path for part in slices]
        left = self._set_parts(files, tables, [part.skip for part in slices], tally)
        for leaf in leaves:
            if leaf.key not in layout.keys:
                tally.ignore(f"feature {leaf.name}", "in features.json")
        self.report = tally.report(len(shards), len(self))
        if not len(self):
            raise UserError(
                f"data.*.path={path!r}: its split {options.split!r} holds no example{left_out(self.report)}"
            )
        used = [dataclasses.replace(by_path[file][0], rows=rows) for file, rows in zip(files, left, strict=True)]
        self.fingerprint = self._fingerprint(index, files, used, *self._limit_told(shards))


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


def _find_prepared(path: str) -> str:
    """The folder of the data set that a path names.

    Raises:
        UserError: it is unknown, or not prepared.
    """
    folder = os.path.expanduser(path)
    if os.path.isdir(folder) or (is_remote(path) and "@" not in path):
        place = _choose(_prepared_below(folder), "", "", folder, path)
        if place:
            return place
        if os.path.isabs(folder) or not _NAME.fullmatch(path) or is_remote(path):
            raise UserError(f"data.*.path={path!r} holds no prepared data set (dataset_info.json); {_FORMS}")
    wanted = _parse_path(path)
    top = _join(wanted.data_dir, wanted.name)
    prepared = _prepared_below(top)
    place = _choose(prepared, wanted.config, wanted.version, top, path)
    if place:
        return place
    known = () if wanted.own else tuple(tfds.list_builders(with_community_datasets=False))
    if prepared:
        has = ", ".join("/".join(parts) for parts in sorted(prepared))
        raise UserError(f"data.*.path={path!r} is not prepared: {top} has only {has}; run: {wanted.prepare}")
    if wanted.own or wanted.name in known:
        raise UserError(f"data.*.path={path!r} is not prepared: there is no {top}; run: {wanted.prepare}")
    there = [] if is_remote(top) or not os.path.isdir(wanted.data_dir) else os.listdir(wanted.data_dir)
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
    match = _NAME.fullmatch(spec) or _CLASS.fullmatch(spec)
    if match is None:
        raise UserError(f"data.*.path={path!r} is no name of a data set; {_FORMS}")
    config, version = match["config"] or "", match["version"] or ""
    if match.re is _NAME:
        # The library takes MyData for my_data too.
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", match["name"]).lower()
        return _Wanted(name, config, version, data_dir, f"tfds build {spec}{option}", own=False)
    module, class_name = match["module"], match["builder"]
    try:
        builder = getattr(importlib.import_module(module), class_name)
        name = builder.name
        config = config or next((known.name for known in builder.BUILDER_CONFIGS), "")
    except (ImportError, AttributeError) as error:
        raise UserError(f"data.*.path={path!r} cannot be imported as a builder: {error}") from error
    arguments = f"data_dir='{data_dir}'" + (f", config='{config}'" if config else "")
    prepare = f'python -c "from {module} import {class_name}; {class_name}({arguments}).download_and_prepare()"'
    return _Wanted(name, config, version, data_dir, prepare, own=True)


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
    places = {}
    for pattern in (_INFO, f"*/{_INFO}", f"*/*/{_INFO}"):
        for name in _glob(folder, pattern):
            place = name[: -len(_INFO) - 1]
            parts = tuple(place[len(folder.rstrip("/")) + 1 :].split("/")) if pattern != _INFO else ()
            if not parts or _VERSION.fullmatch(parts[-1]):  # an unfinished one is called incomplete.ABCDEF_1.0.0
                places[parts] = place
    return places


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
    try:
        with _importing_nothing(folder):
            return tfds.builder_from_directory(folder)
    except (OSError, UserError):
        raise
    except Exception as error:  # it promises nothing about what a damaged file raises
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"data.*.path={path!r}: {folder} cannot be opened: {reason}") from error


@contextlib.contextmanager
def _importing_nothing(folder: str) -> Iterator[None]:
    """Stops the library from importing the modules of features' classes that a data set names, but its own.

    It imports whatever ``features.json`` or ``dataset_info.json`` says, in any of several notations, and so would run
    a file that comes with the data where Python looks for modules there, as in the working directory. So the one
    function that all notations end in is replaced for as long as a data set is opened.

    Raises:
        UserError: a class is neither the library's nor of a module that is imported already.
    """
    connector = tfds.features.FeatureConnector

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
    if isinstance(feature, tfds.features.FeaturesDict):
        for name, inner in feature.items():
            yield from _leaves(inner, (*parts, name), depth)
    elif isinstance(feature, tfds.features.Sequence):
        yield from _leaves(feature.feature, parts, depth + 1)
    else:
        name = "/".join(parts)
        yield _Leaf(name, f"{name}/ragged_flat_values" if depth > 1 else name, feature, depth)


def _find_features(leaves: list[_Leaf], options: SourceOptions, path: str) -> tuple[Layout, tuple[str, ...]]:
    """Which features are the picture, the caption and the label; and the classes' names as they are stored.

    The layout has the names as they are read in a caption.

    Raises:
        UserError: one that is named is not there, there is neither picture nor caption, or a template is of no use.
    """
    types = tfds.features

    def find(kind: str, typed: list[_Leaf], other: Sequence[_Leaf] = (), usual: Sequence[str] = ()) -> _Leaf | None:
        """By name among all that would do, else by usual name among those of the type."""
        names = {leaf.name: leaf for leaf in (*typed, *(other if getattr(options, f"{kind}_key") else ()))}
        name = find_key(kind, options, names, path, usual)
        return names[name] if name is not None else None

    texts = [leaf for leaf in leaves if _is_string(leaf.feature)]
    pictures = [leaf for leaf in leaves if type(leaf.feature) is types.Image and not leaf.depth]
    labels = [leaf for leaf in leaves if isinstance(leaf.feature, types.ClassLabel) and not leaf.depth]
    image = find("image", pictures, texts) or _only(pictures)
    caption = find("caption", texts, usual=(*USUAL_KEYS["caption"], *_SEQUENCE_KEYS))
    label = find("label", labels) or _only(labels)
    if image is None and caption is None:
        names = ", ".join(f"{leaf.name} ({type(leaf.feature).__name__})" for leaf in leaves)
        raise UserError(
            f"data.*.path={path!r} has no picture and no caption by a usual name; it has {names}; "
            "data.*.image_key and data.*.caption_key name others"
        )
    classes = tuple(label.feature.names) if label else ()
    readable = tuple(name.replace("_", " ") for name in classes)
    values = [leaf for leaf in leaves if isinstance(leaf.feature, types.Tensor) and not leaf.depth]
    group = find("group", values) if options.group_key else None
    layout = Layout(_key(image), _key(caption), _key(label), options.template, readable, _key(group))
    check_template(layout.template, layout.caption, layout.label)
    return layout, classes


def _key(leaf: _Leaf | None) -> str | None:
    return leaf.key if leaf else None


def _only(leaves: list[_Leaf]) -> _Leaf | None:
    return leaves[0] if len(leaves) == 1 else None


def _is_string(feature: Any) -> bool:
    import tensorflow as tf

    dtype = getattr(feature, "tf_dtype", None)
    return isinstance(feature, tfds.features.Tensor) and dtype is tf.string


# --- where they are ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Slice:
    """Records `skip` to `skip + take` of a file."""

    path: str
    skip: int
    take: int


def _storage(builder: Any, path: str, max_bytes: int) -> Storage:
    """How its files are read.

    Raises:
        UserError: they cannot be, at random.
    """
    kind, folder = builder.info.file_format.value, str(builder.data_path)
    if kind == "tfrecord":
        return TFRecordStorage(max_bytes)
    if kind != "array_record":
        command = f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record --out_dir=DIR"
        raise UserError(f"data.*.path={path!r}: {folder} is stored as {kind}, which allows no random access; {command}")
    if is_remote(folder):
        raise UserError(f"data.*.path={path!r}: ArrayRecord files are read from local disks; copy or mount {folder}")
    return ArrayRecordStorage(max_bytes)


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


def _take(shard: Shard, rows: np.ndarray, part: _Slice, tally: Tally) -> np.ndarray:
    """The rows of a slice; counts those that the file lacks, with what is wrong with the file, where that is known."""
    taken = rows[part.skip : part.skip + part.take]
    reason = next((reason for reason in LOST if reason in shard.skipped), "not in its file")
    _, name = shard.skipped.get(reason, (0, os.path.basename(part.path)))
    tally.add(reason, name, part.take - len(taken))
    return taken
