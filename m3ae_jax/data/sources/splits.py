"""Which files, folders or names are of which split, by the names that people give splits."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping

from m3ae_jax.data.sources.files import is_remote, split_in
from m3ae_jax.data.sources.index import Tally
from m3ae_jax.errors import UserError, one_of

DEFAULTS = ("train", "val", "")
"""What `SourceOptions.split` says where the user said nothing; where there are no splits these ask for none."""

MANIFEST = ".manifest.json"
"""Ends the name of the file that `data.prepare` writes for each split."""

_OTHER_NAMES = {
    "train": ("training",),
    "val": ("validation", "valid", "dev", "test"),
    "validation": ("val", "valid", "dev", "test"),
    "test": ("testing",),
}


def names_of(split: str) -> tuple[str, ...]:
    """What a split may be called in other people's data: first its own name."""
    return (split, *_OTHER_NAMES.get(split, ()))


def called(split: str, there: Collection[str]) -> str | None:
    """What a split is called among the names that are there, capitals or not; None where it is not."""
    by_lower = {name.lower(): name for name in there} | {name: name for name in there}
    return next((by_lower[name] for name in names_of(split) if name in by_lower), None)


def check(path: str, split: str, splits: list[str]) -> None:
    """Refuses a split that a folder does not have.

    Args:
        path: the folder.
        split: what the options name. Where there are no splits the defaults are no choice of the user's, and the folder
            may be the split itself.
        splits: names of those that are there.

    Raises:
        UserError: as said.
    """
    if split in splits or (not splits and split in (*DEFAULTS, os.path.basename(path.rstrip("/")))):
        return
    if splits:
        raise UserError(f"{one_of('data.*.split', split, splits)} (the folders in {path})")
    raise UserError(f"data.*.split={split!r}: {path} has no folder of that name")


def of_files(parts: Mapping[str, list[str]], split: str, tally: Tally) -> list[str]:
    """The files that a path names; where those of a folder or a glob tell of several splits, the files of one.

    Args:
        parts: the files of each part of the path (`concatenated.path_parts`), which is looked at by itself.
        split: its name; where the files call it otherwise, as ``validation`` for ``val``, these; empty: all files.
        tally: counts the others.

    Raises:
        UserError: there is no such split.
    """
    files = [file for part, there in parts.items() for file in _of_split(part, there, split, tally)]
    return list(dict.fromkeys(files))


def _of_split(part: str, files: list[str], split: str, tally: Tally) -> list[str]:
    stems = {file: _stem(file) for file in files}
    own = {split, *(os.path.basename(stem) for stem in set(stems.values()) if _has_manifest(stem))}
    found = {file: _split_of(stem, file, own) for file, stem in stems.items()}
    there = set(found.values()) - {""}
    if len(there) < 2 or not split:
        folders = {os.path.basename(os.path.dirname(file)) for file in files}
        if split not in (*DEFAULTS, *there, *folders):
            raise UserError(f"data.*.split={split!r}: the names of the files of {part} do not tell of several splits")
        return files
    chosen = called(split, there)
    if chosen is None:
        raise UserError(f"{one_of('data.*.split', split, there)} (by the names of the files of {part})")
    for file in files:
        if found[file] != chosen:
            tally.ignore(f"file of split {found[file]}" if found[file] else "file of no split", os.path.basename(file))
    return [file for file in files if found[file] == chosen]


def _stem(path: str) -> str:
    """A file's path up to the numbers and the ending of its name."""
    folder, name = os.path.split(path)
    return os.path.join(folder, re.sub(r"[-_]?\d+(-of-\d+)?\Z", "", name.partition(".")[0]))


def _has_manifest(stem: str) -> bool:
    """Whether `data.prepare` wrote the files of this stem as a split."""
    return not is_remote(stem) and os.path.isfile(stem + MANIFEST)


def _split_of(stem: str, path: str, own: Collection[str]) -> str:
    """The split that a file's name tells of: its stem, if that is one of `own`, else a usual name; empty: none."""
    if (name := os.path.basename(stem)) in own:
        return name
    return split_in(os.path.basename(path))
