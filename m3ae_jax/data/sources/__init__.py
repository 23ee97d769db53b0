"""Where examples come from; one file per format."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from m3ae_jax.config.fields import declared
from m3ae_jax.data.sources import splits
from m3ae_jax.data.sources.base import OPTIONS, Source, SourceOptions, called
from m3ae_jax.data.sources.files import is_remote
from m3ae_jax.errors import UserError, one_of

SOURCES: dict[str, tuple[str, str]] = {
    # Class, imported when needed, and what its path takes.
    "webdataset": (
        "m3ae_jax.data.sources.webdataset:WebDatasetSource",
        "a folder of .tar shards as img2dataset writes them (KEY.jpg|jpeg|png|webp + KEY.txt and/or KEY.json), a glob, "
        "DIR/{00000..00099}.tar, or several of these with commas",
    ),
    "tfrecord": ("m3ae_jax.data.sources.tfrecord:TFRecordSource", "TFRecord files of tf.train.Example"),
    "array_record": ("m3ae_jax.data.sources.array_record:ArrayRecordSource", ".array_record files of tf.train.Example"),
    "hdf5": ("m3ae_jax.data.sources.hdf5:HDF5Source", "HDF5 files"),
    "parquet": ("m3ae_jax.data.sources.parquet:ParquetSource", "Parquet files with bytes and text columns"),
    "folder": (
        "m3ae_jax.data.sources.folder:FolderSource",
        "a folder of pictures with metadata.jsonl, metadata.csv, or a .txt beside each picture",
    ),
    "class_folders": ("m3ae_jax.data.sources.class_folders:ClassFoldersSource", "a folder with a folder per class"),
    "text": ("m3ae_jax.data.sources.text_lines:TextSource", "plain UTF-8 text files, a line each an example"),
    "tfds": (
        "m3ae_jax.data.sources.tfds:TFDSSource",
        "a TensorFlow Datasets name[/config][:version], with @DATA_DIR where it is not ~/tensorflow_datasets",
    ),
}
NAMES = ("scenes", *SOURCES)
_WAITS = (0.2, 0.8, 3.2)  # seconds between tries


def build_source(config: ConfigDict, part: str) -> Source:
    """Opens ``config.data.train`` or ``config.data.val``.

    Args:
        config: the config.
        part: ``train`` or ``val``.

    Raises:
        UserError: an unknown source, or a path that is missing or holds nothing.
    """
    return open_source(config.data[part], f"data.{part}.", config)


def open_source(spec: ConfigDict, field: str, config: ConfigDict, group_key: str = "") -> Source:
    """Opens what one source's part of a config describes.

    Args:
        spec: the values of `SourceFields`.
        field: what stands before its fields' names, for messages, as ``data.train.``.
        config: the whole, for ``data.scenes``, ``data.max_bytes`` and ``data.index_dir``.
        group_key: see `SourceOptions`.

    Raises:
        UserError: as `build_source`.
    """
    read = {name: spec[name] for name in declared(SourceOptions)}
    options = SourceOptions(
        **read, max_bytes=config.data.max_bytes, index_dir=config.data.index_dir, group_key=group_key
    )
    if spec.source == "scenes":
        from m3ae_jax.data.sources.scenes import SceneOptions, ScenesSource

        if spec.path:
            raise UserError(
                f"{field}path={spec.path!r}: {field}source='scenes' draws its pictures, and reads no files; for these "
                f"set {field}source to one of {', '.join(SOURCES)}"
            )
        _check_options("scenes", ScenesSource, options, field)
        return called(ScenesSource(spec.split, SceneOptions(**config.data.scenes.to_dict())), field)
    return open_format(spec.source, spec.path, options, field)


def format_class(name: str, field: str) -> Any:
    """The class of one of `SOURCES`, or of the user's ``package.module:Class``.

    Raises:
        UserError: there is no such.
    """
    if name not in SOURCES and ":" not in name:
        raise UserError(one_of(f"{field}source", name, NAMES))
    module, _, attribute = SOURCES.get(name, (name, ""))[0].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{field}source={name!r} cannot be imported: {error}") from error


def open_format(name: str, path: str, options: SourceOptions, field: str) -> Source:
    """Opens `path` as one of `SOURCES`, or of a class ``package.module:Class`` of the user's.

    Raises:
        UserError: as `build_source`.
    """
    kind = format_class(name, field)
    if not path:
        forms = SOURCES[name][1] if name in SOURCES else "what that class takes"
        raise UserError(
            f"{field}path is empty; it takes {forms}. To try without data of your own: "
            "python -m m3ae_jax.main --config=configs/tiny.py"
        )
    _check_options(name, kind, options, field)
    try:
        source: Source = _retried(lambda: kind(path, options), path)
    except OSError as error:
        raise UserError(f"{field}path={path!r} cannot be read: {error}") from error
    except UserError as error:  # a format does not know which data of the config it is
        text = str(error).replace("data.*.", field)
        raise UserError(text if field in text else f"{field}path={path!r}: {text}") from error
    return called(source, field)


def _retried(make: Callable[[], Source], path: str) -> Source:
    """What `make` returns; of a store, which may fail for a moment, it is tried again."""
    for wait in _WAITS if is_remote(path) else ():
        try:
            return make()
        except FileNotFoundError:
            break
        except OSError:
            time.sleep(wait)
    return make()


def _check_options(name: str, kind: Any, options: SourceOptions, field: str) -> None:
    """Refuses options that are set and that a format does not read.

    Raises:
        UserError: there is such an option.
    """
    uses = getattr(kind, "uses", None)
    if uses is None:
        return
    defaults: dict[str, tuple[Any, ...]] = {option: (getattr(SourceOptions(), option),) for option in OPTIONS}
    defaults["split"] = splits.DEFAULTS
    for option, values in defaults.items():
        value = getattr(options, option)
        if option not in uses and value not in values:
            where = "eval." if option == "group_key" else field
            takes = ", ".join(sorted(uses - {"group_key"})) or "none of these options"
            raise UserError(f"{where}{option}={value!r}: the format {name} does not read it; it takes {takes}")
