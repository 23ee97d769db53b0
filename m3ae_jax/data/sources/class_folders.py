"""A folder with a folder per class, as torchvision's ``ImageFolder`` reads and as ImageNet is often unpacked.

Classes are numbered in the order of their folders' names, sorted as bytes. With a template, a class's name makes the
caption of its pictures.
"""

from __future__ import annotations

import array
import hashlib
import logging
import os
from collections.abc import Sequence

import numpy as np

from m3ae_jax.data.sources.base import Record, SourceOptions, class_captions
from m3ae_jax.data.sources.folder import Names, is_picture, local_folder, read_picture, sizes_digest
from m3ae_jax.data.sources.index import Tally, left_out, printable, skip_line
from m3ae_jax.errors import UserError, one_of

_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
_TRAIN = "train"

_FORMS = "it takes a folder with a folder per class, as PATH/dog/1.jpg or PATH/train/dog/1.jpg"

_log = logging.getLogger("m3ae_jax")


class ClassFoldersSource:
    """Pictures in a folder per class, by index.

    Examples are in the order of the classes, then of the pictures' paths, both sorted as bytes. Links are followed:
    a subset of a data set is often a folder of links. Hidden files and folders (``.name``) are no part of it.

    Attributes:
        modalities: `("image",)`; with a template `("image", "text")`.
        classes: names of the class folders, those without a picture included, so that the numbers of two splits
            agree; where a split is read, those of ``train`` too.
        report: how many examples there are, and what was left out.
        fingerprint: hash of the pictures' paths, of the sizes of at most 65,536 of them, of the classes' names and
            the template.
    """

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Walks the folder.

        Args:
            path: a local folder that holds the class folders, or a folder named as `options.split` with these in it.
            options: `split` and `template`.

        Raises:
            UserError: `path` is no folder, there is no class folder, no such split, or no picture.
            OSError: a folder cannot be read.
        """
        top = local_folder(path, _FORMS)
        self._root, names = _find_classes(top, path, options.split)
        tally = Tally(os.path.basename(os.fsdecode(self._root)))
        self.classes = tuple(printable(os.fsdecode(name)) for name in names)
        self._captions = class_captions(options.template, self.classes) if options.template else ()
        self.modalities: tuple[str, ...] = ("image", "text") if self._captions else ("image",)
        self._names, self._labels = _walk_classes(self._root, names, tally)
        self.report = tally.report(len(names), len(self))
        if not len(self):
            folders = f"{len(names)} class folders{left_out(self.report)}"
            raise UserError(f"data.*.path={path!r}: no picture in its {folders}; {_FORMS}")
        if self.report.skipped:
            _log.warning("class_folders: left out: %s", skip_line(self.report))
        digest = hashlib.sha256(repr((names, options.template)).encode())
        digest.update(self._names.digest() + sizes_digest(self._root, self._names))
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._names)

    def read(self, indices: np.ndarray) -> list[Record]:
        """Reads examples, in the order of `indices`; safe to call from several threads at once.

        Args:
            indices: `[n] int64`, each in `[0, len(self))`.

        Raises:
            OSError: a picture cannot be read.
        """
        records = []
        for i, label in zip(indices.tolist(), self._labels[indices].tolist(), strict=True):
            record = Record(image=read_picture(self._root, self._names[i]), label=label)
            if self._captions:
                record["caption"] = self._captions[label]
            records.append(record)
        return records


def _folders(root: bytes) -> list[bytes]:
    """Names of the folders in `root` that are not hidden, sorted."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(b"."))


def _is_split(folder: bytes) -> bool:
    """Whether it holds folders and no picture, and is thus no class."""
    with os.scandir(folder) as entries:
        return bool(_folders(folder)) and not any(is_picture(entry.name) and entry.is_file() for entry in entries)


def _find_classes(top: bytes, path: str, split: str) -> tuple[bytes, list[bytes]]:
    """The folder that holds the class folders, and their names.

    Raises:
        UserError: there are none, or splits without `split`.
    """
    names = _folders(top)
    known = {os.fsencode(name) for name in (*_SPLITS, split)}
    splits = [name for name in names if name in known and _is_split(os.path.join(top, name))]
    if not splits:
        if not names:
            raise UserError(f"data.*.path={path!r} holds no folder; {_FORMS}")
        return top, names
    if os.fsencode(split) not in splits:
        raise UserError(f"{one_of('data.*.split', split, map(os.fsdecode, splits))} (the folders in {path})")
    classes = set(_folders(os.path.join(top, os.fsencode(split))))
    if os.fsencode(_TRAIN) in splits:
        classes.update(_folders(os.path.join(top, os.fsencode(_TRAIN))))
    return os.path.join(top, os.fsencode(split)), sorted(classes)


def _walk_classes(root: bytes, classes: Sequence[bytes], tally: Tally) -> tuple[Names, np.ndarray]:
    """The pictures' paths below `root`, and `[n] int32` the number of each one's class."""
    names, labels = Names(), array.array("i")
    with os.scandir(root) as entries:
        for entry in entries:
            if is_picture(entry.name) and entry.is_file():
                tally.add("not in a class folder", os.fsdecode(entry.name))
    for label, folder in enumerate(classes):
        before = len(names)
        if os.path.isdir(os.path.join(root, folder)):
            _walk_class(root, folder, names, tally)
        labels.extend([label] * (len(names) - before))
        if len(names) == before:
            tally.add("empty class folder", os.fsdecode(folder))
    return names, np.array(labels, np.int32)


def _walk_class(root: bytes, folder: bytes, names: Names, tally: Tally) -> None:
    """Adds the pictures below one class's folder to `names`, in the order of their paths."""
    real = os.path.realpath(root)
    seen = {_identity(real)}  # links may lead in circles, and up to where other classes are
    while (above := os.path.dirname(real)) != real:
        real = above
        seen.add(_identity(real))
    pictures, waiting = list[bytes](), [folder]
    while waiting:
        inner = waiting.pop()
        identity = _identity(os.path.join(root, inner))
        if identity in seen:
            tally.add("link to a folder that is there already", os.fsdecode(inner))
            continue
        seen.add(identity)
        with os.scandir(os.path.join(root, inner)) as entries:
            for entry in entries:
                name = os.path.join(inner, entry.name)
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir():
                    waiting.append(name)
                elif not is_picture(entry.name):
                    tally.add("not a picture", os.fsdecode(name))
                elif not entry.is_file():
                    tally.add("not a regular file", os.fsdecode(name))
                else:
                    pictures.append(name)
    for name in sorted(pictures):
        names.append(name)


def _identity(folder: bytes) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
