"""The part of a run's page on its data: what was read, what was left out, what was replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from m3ae_jax.report import page, results
from m3ae_jax.report.charts import Series
from m3ae_jax.report.page import Html

_DATA = "data.json"


def section(folder: Path, metrics: Mapping[str, Series]) -> Iterator[Html]:
    """The parts below the title; nothing where the folder has no ``data.json``.

    Args:
        folder: of the run.
        metrics: by name.
    """
    told = results.load(folder / _DATA)
    sources: dict[str, dict[str, Any]] = told.get("sources", {})
    if not sources:
        return
    yield page.note(f"As opened at the newest start, {told.get('time', '')} UTC.")
    rows = []
    for field, source in sources.items():
        files = f"{source['files']:,}" if source.get("counted") else ""
        place = page.data(source["path"] or "built in")
        modalities = "+".join(source["modalities"])
        rows.append((field, source["format"], place, modalities, source["examples"], files))
    yield page.table(("data", "format", "path", "gives", "examples", "files"), rows)
    for name, head in (("left_out", "Left out when the data were opened:"), ("not_read", "There, but not read:")):
        kinds = [
            (field, kind, count, page.data(sample))
            for field, source in sources.items()
            for kind, (count, sample) in source.get(name, {}).items()
        ]
        if kinds:
            yield page.paragraph(head)
            yield page.table(("data", "what", "number", "first of them"), kinds)
    if not any(source.get("left_out") for source in sources.values()):
        silent = [field for field, source in sources.items() if not source.get("counted") and source["path"]]
        yield page.note("Nothing was left out." + (f" {', '.join(silent)} does not say." if silent else ""))
    yield from _replaced(metrics)


def _replaced(metrics: Mapping[str, Series]) -> Iterator[Html]:
    rows = []
    for prefix, field in (("train/", "data.train"), ("val/", "data.val")):
        for name, series in metrics.items():
            for kind, what in (("replaced/", "replaced"), ("empty_captions", "counted, not replaced")):
                if name.startswith(prefix + kind):
                    reason = name.removeprefix(prefix).removeprefix("replaced/").replace("_", " ")
                    count = series.total if prefix == "train/" else series.last  # the same ones at each validation
                    rows.append((field, reason, f"{count:,.0f}", what))
    if rows:
        yield page.paragraph("While the run read them:")
        yield page.table(("data", "reason", "examples", ""), rows)
