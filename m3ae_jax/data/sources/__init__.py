"""Where examples come from; one file per format."""

from __future__ import annotations

import importlib
from typing import Any

from ml_collections import ConfigDict

from m3ae_jax.config.fields import declared
from m3ae_jax.data.sources.base import Source, SourceOptions
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


def build_source(config: ConfigDict, part: str) -> Source:
    """Opens ``config.data.train`` or ``config.data.val``.

    Args:
        config: the config.
        part: ``train`` or ``val``.

    Raises:
        UserError: an unknown source, or a path that is missing or holds nothing.
    """
    return open_source(config.data[part], f"data.{part}.", config)


def open_source(spec: ConfigDict, field: str, config: ConfigDict) -> Source:
    """Opens what one source's part of a config describes.

    Args:
        spec: the values of `SourceFields`.
        field: what stands before its fields' names, for messages, as ``data.train.``.
        config: the whole, for ``data.scenes``.

    Raises:
        UserError: as `build_source`.
    """
    if spec.source == "scenes":
        from m3ae_jax.data.sources.scenes import SceneOptions, ScenesSource

        return ScenesSource(spec.split, SceneOptions(**config.data.scenes.to_dict()))
    options = SourceOptions(**{name: spec[name] for name in declared(SourceOptions)})
    return open_format(spec.source, spec.path, options, field)


def open_format(name: str, path: str, options: SourceOptions, field: str) -> Source:
    """Opens `path` as one of `SOURCES`, or of a class ``package.module:Class`` of the user's.

    Raises:
        UserError: as `build_source`.
    """
    if name not in SOURCES and ":" not in name:
        raise UserError(one_of(f"{field}source", name, NAMES))
    where, forms = SOURCES.get(name, (name, "what that class takes"))
    if not path:
        raise UserError(
            f"{field}path is empty; it takes {forms}. To try without data of your own: "
            "python -m m3ae_jax.main --config=configs/tiny.py"
        )
    module, _, attribute = where.partition(":")
    try:
        kind: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{field}source={name!r} cannot be imported: {error}") from error
    try:
        source: Source = kind(path, options)
    except OSError as error:
        raise UserError(f"{field}path={path!r} cannot be read: {error}") from error
    return source
