"""What data an evaluation is of, and the name of these data in the names of its files."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from m3ae_jax.data.sources import build_source
from m3ae_jax.data.sources.base import Source, report_of
from m3ae_jax.data.sources.index import IndexReport
from m3ae_jax.data.sources.scenes import SceneOptions, ScenesSource
from m3ae_jax.evals.base import Data
from m3ae_jax.evals.labelled import labelled_fields, open_labelled

SCENES = ("scenes val", "scenes val_novel")
"""Parts that are no fields of the config: the scenes that an evaluation draws for itself."""

_LETTERS, _DIGITS = 40, 6
_NAMES = ("test", "val")  # after the first of these parts that there is, data are called


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the data.

    Attributes:
        about: what the files of an evaluation's result say of it.
        modalities: of its source.
        report: what its source left out; None where it does not say.
    """

    about: dict[str, Any]
    modalities: tuple[str, ...]
    report: IndexReport | None


def part_of(config: ConfigDict, part: str) -> Part:
    """Opens a part of the data, and says what it is.

    Args:
        config: resolved.
        part: ``train``, ``test`` or ``outside`` of ``config.eval``, ``val`` of ``config.data``, or one of `SCENES`.

    Raises:
        UserError: it cannot be opened.
    """
    source: Source
    label = {}
    if part in SCENES:
        kind, path, split = "scenes", "", part.removeprefix("scenes ")
        source = ScenesSource(split, SceneOptions(**config.data.scenes.to_dict()))
    else:
        spec = config.data.val if part == "val" else labelled_fields(config, part)
        source = build_source(config, "val") if part == "val" else open_labelled(config, part)
        kind, path, split = spec.source, spec.path, spec.split
        label = {"label": config.eval.label} if kind == "scenes" and part != "val" else {}
    about = {"source": kind, "path": path, "split": split, **label}
    about |= {"fingerprint": source.fingerprint, "examples": len(source)}
    return Part(about, source.modalities, report_of(source))


def data_of(config: ConfigDict, names: tuple[str, ...], part: Callable[[ConfigDict, str], Part] = part_of) -> Data:
    """What parts of the data are, together.

    Args:
        config: resolved.
        names: of the parts.
        part: opens one.

    Raises:
        UserError: one of them cannot be opened.
    """
    if not names:
        return Data()
    parts, digest = {name: part(config, name) for name in names}, hashlib.sha256()
    for name, one in parts.items():
        digest.update(f"{name} {one.about['fingerprint']} {one.modalities}\n".encode())
    shown = parts[next((name for name in _NAMES if name in names), names[0])]
    return Data(f"{_slug(shown.about)}-{digest.hexdigest()[:_DIGITS]}", {n: one.about for n, one in parts.items()})


def _slug(about: dict[str, Any]) -> str:
    """What people call the data: scenes and their label, a data set's name, or the path's last part that is a name."""
    text = about["source"] if about["source"] == "scenes" else about["path"].partition(",")[0]
    if about["source"] == "tfds":
        text = text.partition("@")[0].replace("/", "-")
    names = [name for name in text.split("/") if name and not set(name) & set("*?[{")]
    words = " ".join([*names[-1:], about.get("label", "")])
    return re.sub("[^A-Za-z0-9]+", "-", words).strip("-")[:_LETTERS].strip("-") or "data"
