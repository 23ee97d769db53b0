"""What a run reads and what of it is left out: told at every start, whoever built the index."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import m3ae_jax
from m3ae_jax.atomic import write_text
from m3ae_jax.data.sources.base import Source, report_of
from m3ae_jax.data.sources.index import IndexReport, skip_line, unused_line

log = logging.getLogger("m3ae_jax")

DATA_FILE = "data.json"


def tell(
    reports: Mapping[str, IndexReport | None], add_event: Callable[[str, str], None] = lambda kind, text: None
) -> None:
    """Logs what is left out of each source, or not read; nothing of a source that uses all there is.

    Args:
        reports: by the field of the config that names each, as ``data.train``; None of a source that does not say.
        add_event: gets kind and text of what is logged as information; warnings become events by themselves.
    """
    for field, report in reports.items():
        if report is None:
            continue
        text = f"{field}: {report.examples:,} examples of {report.shards:,} files"
        if report.unused:
            text += f"; not read: {unused_line(report)}"
        if report.skipped:
            log.warning("%s; left out: %s", text, skip_line(report), extra={"kind": "data"})
        elif report.unused:
            log.info(text)
            add_event("data", text)


def save(workdir: Path, sources: dict[str, Source], places: dict[str, dict[str, str]]) -> None:
    """Writes ``data.json`` for the run's page: what is read, and by which versions.

    Args:
        workdir: the run's folder.
        sources: by the field of the config that names each.
        places: of each, its ``format`` and ``path``.

    Raises:
        OSError: it cannot be written.
    """
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    told = {field: {**places[field], **_told(source)} for field, source in sources.items()}
    content = {"time": now, "versions": _versions(), "sources": told}
    write_text(workdir / DATA_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _versions() -> dict[str, str]:
    """What runs here."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "pillow", "tensorflow")
    others = {name: importlib.metadata.version(name) for name in packages}
    return {"m3ae_jax": m3ae_jax.__version__, "python": platform.python_version(), **others}


def _told(source: Source) -> dict[str, Any]:
    return {"modalities": list(source.modalities), "fingerprint": source.fingerprint} | dict(_counts(source))


def _counts(source: Source) -> Iterator[tuple[str, Any]]:
    report = report_of(source)
    yield "examples", len(source)
    yield "classes", len(source.classes)
    yield "counted", report is not None
    if report is not None:
        yield "files", report.shards
        for name, counts in (("left_out", report.skipped), ("not_read", report.unused)):
            yield name, {kind: [count, report.samples.get(kind, "")] for kind, count in counts.items()}
