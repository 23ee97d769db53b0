"""What the data doctor knows of each source: how it was opened, what is held out, and which pictures are in both."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.data.annotations import Annotations, number_of, recognise
from m3ae_jax.data.mixture import Member
from m3ae_jax.data.order import Order, fold_seed
from m3ae_jax.data.pipeline import View, eval_view
from m3ae_jax.data.sources import build_source
from m3ae_jax.data.sources.base import Source, report_of
from m3ae_jax.data.sources.files import is_remote
from m3ae_jax.data.text import Tokenizer
from m3ae_jax.doctor.survey import Picture, Sample, look, statistics
from m3ae_jax.errors import UserError
from m3ae_jax.evals.labelled import LabelRecorder, open_labelled
from m3ae_jax.paths import local

log = logging.getLogger("m3ae_jax")

HELD_OUT = ("data.val", "eval.train", "eval.test")

_MOST_FILES = 20  # of a folder, the largest, that are looked at for annotations
_SAMPLES = 3
_MAGIC = "*?[{"
_BUILT_IN = ("scenes", "tfds")  # their paths are no files


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Data of the config that are not trained on.

    Attributes:
        name: its field, as ``data.val``.
        facts: as of `facts_of`, with what was looked at; of one that cannot be opened ``error`` alone.
        sample: what was looked at; None where it cannot be opened.
    """

    name: str
    facts: dict[str, Any]
    sample: Sample | None


def facts_of(source: Source, spec: ConfigDict) -> dict[str, Any]:
    """How a source was opened: where it is, what it holds, what of it is left out and what is not read.

    Args:
        source: opened.
        spec: the values of its `SourceFields`.
    """
    report = report_of(source)
    return {
        "format": spec.source,
        "path": spec.path,
        "fingerprint": source.fingerprint,
        "options": sorted(getattr(source, "uses", ())),
        "examples": len(source),
        "counted_at_indexing": report is not None,
        "files": report.shards if report else None,
        "left_out": dict(report.skipped) if report else {},
        "left_out_e.g.": {kind: report.samples.get(kind, "") for kind in report.skipped} if report else {},
        "not_read": dict(report.unused) if report else {},
        "not_read_e.g.": {kind: report.samples.get(kind, "") for kind in report.unused} if report else {},
    }


def held_out(config: ConfigDict, tokenizer: Tokenizer, unit: str) -> list[HeldOut]:
    """Opens the validation data and the labelled data that the config names, and looks at what an evaluation takes.

    Args:
        config: resolved.
        tokenizer: counts words or tokens.
        unit: of these.
    """
    parts = []
    for name in HELD_OUT:
        group, _, part = name.partition(".")
        spec = config[group][part]
        if spec.path or spec.source == "scenes":
            try:
                parts.append(_look_at(name, spec, config, tokenizer, unit))
            except Exception as error:  # a user's own source may raise anything
                said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                parts.append(HeldOut(name, {"format": spec.source, "path": spec.path, "error": said}, None))
    return parts


def _look_at(name: str, spec: ConfigDict, config: ConfigDict, tokenizer: Tokenizer, unit: str) -> HeldOut:
    """As `held_out`, one of them.

    Raises:
        UserError: it cannot be opened, or there is nothing in it that is trained.
    """
    is_val = name == "data.val"
    source = build_source(config, "val") if is_val else open_labelled(config, name.partition(".")[2])
    modalities = tuple(one for one in config.data.modalities if one in source.modalities)
    if not modalities:
        trained = ", ".join(config.data.modalities)
        raise UserError(f"it holds only {', '.join(source.modalities)}, and data.modalities trains {trained}")
    of = config.eval
    most = {"data.val": of.examples, "eval.train": of.train_examples, "eval.test": of.test_examples}
    count = min(most[name], len(source))
    log.info("%s: looking at %s of %s", name, f"{count:,}", number_of(len(source), "examples"))
    view = eval_view(config, source, count)
    if not is_val:  # of more examples the choice that the evaluations take
        view = View(Order(len(source), fold_seed("evaluations")), view.seed, augment=False)
    labelled = LabelRecorder(source)
    sample = look(Member(name, labelled, modalities, 1.0), view, count, tokenizer, config)
    facts = facts_of(source, spec) | {"modalities": list(modalities), "looked_at": statistics(sample, config, unit)}
    if not is_val:
        taken = set(np.asarray(view.order.index(np.arange(count))).tolist())
        known = labelled.labels.keys() | {place.index for place, _ in sample.unreadable}
        facts |= {"unlabelled": len(taken - known), "unlabelled_e.g.": min(taken - known, default=None)}
    return HeldOut(name, facts, sample)


def overlap(train: Sample, part: HeldOut) -> dict[str, Any]:
    """Which pictures of a sample are also among those of held-out data, by the pixels of their centred squares.

    Args:
        train: pictures looked at of the training data.
        part: held out, with pictures.

    Returns:
        ``count`` and ``share`` of the training pictures, how many of the held-out ones they are, the first of them.
    """
    mine = [picture for picture in train.pictures if picture.pixels]
    theirs: dict[bytes, Picture] = {}
    pictures = part.sample.pictures if part.sample else ()
    for picture in pictures:
        if picture.pixels:
            theirs.setdefault(picture.pixels, picture)
    common = [picture for picture in mine if picture.pixels in theirs]
    digests = {picture.pixels for picture in common}
    pairs = [(picture.place, theirs[picture.pixels].place) for picture in common[:_SAMPLES]]
    return {
        "count": len(common),
        "looked_at": len(mine),
        "share": len(common) / len(mine) if mine else 0.0,
        "held_out": sum(picture.pixels in digests for picture in pictures),
        "held_out_looked_at": sum(bool(picture.pixels) for picture in pictures),
        "examples": [
            {"source": ours.source, "index": ours.index, "is_source": its.source, "is_index": its.index}
            for ours, its in pairs
        ],
    }


# --- annotation files --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AnnotationFiles:
    """What was found.

    Attributes:
        found: each file that has the keys of a known layout.
        passed_over: JSON files that were not looked at, by their folder.
    """

    found: list[Annotations]
    passed_over: dict[str, int]


def annotation_files(config: ConfigDict) -> AnnotationFiles:
    """The annotation files, by their keys, at the paths of the config's data and in the folders beside them."""
    specs = [*config.data.mixture.values()] or [config.data.train]
    specs += [config[group][part] for group, _, part in (name.partition(".") for name in HELD_OUT)]
    paths = [part.strip() for spec in specs if spec.source not in _BUILT_IN for part in spec.path.split(",")]
    found: dict[Path, Annotations] = {}
    passed_over: dict[str, int] = {}
    for path in dict.fromkeys(paths):
        if path and not is_remote(path):
            for file, folder in _candidates(local(path, "path"), passed_over):
                if file not in found and (one := recognise(file, folder)):
                    found[file] = one
    return AnnotationFiles(list(found.values()), passed_over)


def _candidates(path: Path, passed_over: dict[str, int]) -> list[tuple[Path, Path]]:
    """Files and folders that may be annotations, each with the folder in which its pictures may be.

    Args:
        path: of data.
        passed_over: counts the other files, see `AnnotationFiles`.
    """

    def files(folder: Path) -> list[Path]:
        largest = _json_files(folder)
        if len(largest) > _MOST_FILES:
            passed_over[str(folder)] = len(largest) - _MOST_FILES
        return sorted(largest[:_MOST_FILES])

    if path.is_dir():
        return [(path, path), *((file, path) for file in (*files(path), *files(path / "annotations")))]
    if path.is_file() or any(sign in path.name for sign in _MAGIC):
        itself = [(path, path.parent)] if path.is_file() else []
        return [*itself, *((file, path.parent) for file in files(path.parent))]
    return []


def _json_files(folder: Path) -> list[Path]:
    """The largest first: a folder may hold one of its own for each picture, which are none."""
    try:
        files = [file for file in folder.iterdir() if file.suffix in (".json", ".jsonl") and file.is_file()]
        return sorted(files, key=lambda file: -file.stat().st_size)
    except OSError:
        return []
