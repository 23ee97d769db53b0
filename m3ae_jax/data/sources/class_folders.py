"""A folder with a folder per class, as torchvision's ``ImageFolder`` reads and as ImageNet is often unpacked.

Classes are numbered in the order of their folders' names, sorted as bytes. With a template, a class's name makes the
caption of its pictures.
"""

from __future__ import annotations

import array
import hashlib
import os
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from m3ae_jax.data.sources import splits
from m3ae_jax.data.sources.base import Record, SourceOptions, class_captions
from m3ae_jax.data.sources.files import SPLITS
from m3ae_jax.data.sources.index import Tally, left_out, printable
from m3ae_jax.data.sources.picture_files import (
    Names,
    count_file,
    folder_name,
    is_dir,
    is_file,
    is_picture,
    local_folder,
    nothing_in,
    read_picture,
    sizes_digest,
)
from m3ae_jax.errors import UserError

_FORMS = "it takes a folder with a folder per class, as PATH/dog/1.jpg or PATH/train/dog/1.jpg"


class ClassFoldersSource:
    """Pictures in a folder per class, by index.

    Examples are in the order of the classes, then of the pictures' paths, both sorted as bytes. Links are followed:
    a subset of a data set is often a folder of links. Hidden files and folders (``.name``) are no part of it.

    Attributes:
        modalities: `("image",)`; with a template `("image", "text")`.
        classes: names of the class folders, those without a picture included, so that the numbers of two splits
            agree; where a split is read, those of ``train`` too.
        report: how many examples there are, what was left out, and which files and folders are not read.
        fingerprint: hash of the pictures' paths, of the sizes of at most 65,536 of them, of the classes' names and
            the template.
    """

    uses: ClassVar[frozenset[str]] = frozenset({"split", "template"})

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
        beside = Tally(folder_name(top))
        self._max_bytes = options.max_bytes
        self._root, names = _find_classes(top, path, options.split, beside)
        tally = Tally(folder_name(self._root))
        tally.merge(beside.skipped, beside.unused)
        self.classes = tuple(printable(os.fsdecode(name)) for name in names)
        self._captions = class_captions(options.template, self.classes) if options.template else ()
        self.modalities: tuple[str, ...] = ("image", "text") if self._captions else ("image",)
        self._names, self._labels = _walk_classes(self._root, names, tally)
        self.report = tally.report(len(names), len(self))
        if not names and any(map(is_picture, os.listdir(top))):
            raise UserError(f"data.*.path={path!r} holds no folder; {_FORMS}")
        if not names:
            raise UserError(nothing_in(path, self.report, _FORMS))
        if not len(self):
            folders = f"{len(names)} class folders{left_out(self.report)}"
            raise UserError(f"data.*.path={path!r}: no picture in its {folders}; {_FORMS}")
        digest = hashlib.sha256(repr((names, options.template)).encode())
        digest.update(self._names.digest() + sizes_digest(self._root, self._names))
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._names)

    def name(self, index: int) -> str:
        """The picture's path in the folder of the classes."""
        return os.fsdecode(self._names[index])

    def read(self, indices: np.ndarray) -> list[Record]:
        """Reads examples, in the order of `indices`; safe to call from several threads at once.

        Args:
            indices: `[n] int64`, each in `[0, len(self))`.

        Raises:
            OSError: a picture cannot be read.
        """
        records = []
        for i, label in zip(indices.tolist(), self._labels[indices].tolist(), strict=True):
            record = Record(label=label)
            record.update(read_picture(self._root, self._names[i], self._max_bytes))
            if self._captions:
                record["caption"] = self._captions[label]
            records.append(record)
        return records


def _folders(root: bytes) -> list[bytes]:
    """Names of the folders in `root` that are not hidden, sorted."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if is_dir(entry) and not entry.name.startswith(b"."))


def _has_picture(folder: bytes) -> bool:
    with os.scandir(folder) as entries:
        return any(is_picture(entry.name) and is_file(entry) for entry in entries)


def _find_splits(top: bytes, path: str, names: Sequence[bytes], split: str) -> list[str]:
    """Which of the folders in `top` are splits: those of a split's name that hold folders, whatever pictures lie loose.

    One alone may be a class, as ``train`` beside ``boat``: it is where a folder of another name holds pictures.

    Raises:
        UserError: all folders are called as splits, and none holds a class folder.
    """
    called = {name for name in names if os.fsdecode(name).lower() in (*SPLITS, split.lower())}
    there = [os.fsdecode(name) for name in sorted(called) if _folders(os.path.join(top, name))]
    if not there and len(called) == len(names) > 1:
        flat = ", ".join(map(os.fsdecode, names))
        raise UserError(f"data.*.path={path!r}: its splits {flat} hold no class folders; {_FORMS}")
    is_class = len(there) == 1 and any(_has_picture(os.path.join(top, name)) for name in names if name not in called)
    return [] if is_class else there


def _find_classes(top: bytes, path: str, split: str, tally: Tally) -> tuple[bytes, list[bytes]]:
    """The folder that holds the class folders, and their names.

    Raises:
        UserError: there is no such split, or there are splits without class folders.
    """
    names = _folders(top)
    there = _find_splits(top, path, names, split)
    found = splits.called(split, there) or split
    splits.check(path, found, there)
    if not there:
        return top, names
    _count_files(top, tally)
    for name in map(os.fsdecode, names):
        if name not in there:
            tally.ignore("folder that is no split", name)
    classes = set(_folders(os.path.join(top, os.fsencode(found))))
    if train := splits.called("train", there):
        classes.update(_folders(os.path.join(top, os.fsencode(train))))
    return os.path.join(top, os.fsencode(found)), sorted(classes)


def _count_files(folder: bytes, tally: Tally) -> None:
    """Counts the files of a folder that is no class's."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(b".") and not is_dir(entry))
    for name in names:
        if is_picture(name):
            tally.add("not in a class folder", os.fsdecode(name))
        else:
            count_file(tally, name)


def _walk_classes(root: bytes, classes: Sequence[bytes], tally: Tally) -> tuple[Names, np.ndarray]:
    """The pictures' paths below `root`, and `[n] int32` the number of each one's class."""
    names, labels = Names(), array.array("i")
    _count_files(root, tally)
    for label, folder in enumerate(classes):
        before = len(names)
        if os.path.isdir(os.path.join(root, folder)):
            _walk_class(root, folder, names, tally)
        labels.extend([label] * (len(names) - before))
        if len(names) == before:
            tally.ignore("class folder without a picture", os.fsdecode(folder))
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
                if is_dir(entry):
                    waiting.append(name)
                elif not is_picture(entry.name):
                    count_file(tally, name)
                elif not is_file(entry):
                    tally.add("not a regular file", os.fsdecode(name))
                else:
                    pictures.append(name)
    for name in sorted(pictures):
        names.append(name)


def _identity(folder: bytes) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
