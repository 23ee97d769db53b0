"""What a run measured, as parts of its page: curves, throughput."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from m3ae_jax.report import page
from m3ae_jax.report.charts import Line, Series, chart, gallery, short, stack
from m3ae_jax.report.page import Html
from m3ae_jax.report.pictures import UNITS, loss_terms

_GROUPS = 16  # lines of a chart: more do not tell apart
_SHARES = ("step", "data_wait", "startup", "compile", "evaluation", "checkpoint")
_PERCENT = 100.0
_NORMS_LOG = 5  # times the least: below, a logarithmic axis would have hardly a tick
_LOSSES_LOG = 100  # times the least: beyond, a linear axis shows the outliers alone

Found = Mapping[str, Series]


def curves(found: Found) -> Iterator[Html]:
    """The section on what was learnt: losses, accuracies, learning rate, norms; nothing before the first row.

    Args:
        found: the run's figures, by name.
    """
    charts = [*_losses(found), *_accuracies(found), *_rates(found), *_norms(found)]
    if charts:
        yield page.note("The number beside a name is its newest value. The prior is the loss without any context.")
        yield gallery(charts)
    rows = [(name, f"{series.steps[-1]:,}", short(series.last)) for name, series in sorted(found.items())]
    if rows:
        yield page.details("The newest value of everything", page.table(("figure", "step", "value"), rows))


def _skipped(found: Found) -> list[int]:
    """The steps of the rows that tell of skipped steps."""
    series = found.get("train/skipped_steps")
    return series.steps[series.values > 0].tolist() if series else []


def _losses(found: Found) -> Iterator[Html]:
    for term in loss_terms(found):
        lines = _splits(found, term)
        prior = found.get(f"prior/{term}")
        level = ("prior", prior.last) if prior else None
        # Steps are skipped in training: without its curve there is nothing to mark.
        marks = _skipped(found) if f"train/{term}" in found else []
        yield chart(_title(term), UNITS.get(term, "loss"), lines, level=level, skipped=marks, log_from=_LOSSES_LOG)
        if sources := _within(found, f"train/{term}/"):
            yield chart(f"{_title(term)}, by source", UNITS.get(term, "loss"), sources)


def _accuracies(found: Found) -> Iterator[Html]:
    terms = {name.partition("/")[2]: None for name in found if name.startswith(("train/", "val/"))}
    for term in terms:
        if term.endswith("accuracy"):
            percent = [Line(line.label, line.series.scaled(_PERCENT), line.colour) for line in _splits(found, term)]
            yield chart(_title(term), "% right", percent, from_zero=True)


def _rates(found: Found) -> Iterator[Html]:
    if rate := found.get("train/learning_rate"):
        yield chart("learning rate", "of the optimizer", [Line("newest", rate)])


def _norms(found: Found) -> Iterator[Html]:
    for name in ("gradient_norm", "parameter_norm"):
        marks = _skipped(found) if name == "gradient_norm" else []
        if total := found.get(f"train/{name}"):
            yield chart(_title(name), "L2", [Line("all", total)], skipped=marks, log_from=_NORMS_LOG)
        if groups := _within(found, f"train/{name}/"):
            most = sorted(groups, key=lambda line: -np.nan_to_num(line.series.last, nan=np.inf))[:_GROUPS]
            chosen = [line for line in groups if line in most]
            left_out = f", the {_GROUPS} largest of {len(groups)}" if len(groups) > _GROUPS else ""
            yield chart(f"{_title(name)}, by group{left_out}", "L2", chosen, log_from=_NORMS_LOG)


def _splits(found: Found, term: str) -> list[Line]:
    lines = [("train", "var(--c1)"), ("val", "var(--c2)")]
    return [Line(split, found[f"{split}/{term}"], c) for split, c in lines if f"{split}/{term}" in found]


def _within(found: Found, start: str) -> list[Line]:
    return [Line(name.removeprefix(start), series) for name, series in found.items() if name.startswith(start)]


def _title(name: str) -> str:
    return name.replace("_", " ")


def throughput(found: Found) -> Iterator[Html]:
    """The section on speed: examples, waiting, where the time went, memory, tokens; nothing before the first row.

    Args:
        found: the run's figures, by name.
    """
    charts = [*_speed(found), *_shares(found), *_memory(found)]
    if rate := found.get("train/examples_per_second"):
        median = short(float(np.nanmedian(rate.values))) if np.isfinite(rate.values).any() else "none"
        yield page.paragraph(f"{median} examples/s in the median of {len(rate.values):,} intervals.")
    if charts:
        yield gallery(charts)
    yield from _tokens(found)
    yield from _sources(found)


def _speed(found: Found) -> Iterator[Html]:
    whole, chip = found.get("train/examples_per_second"), found.get("train/examples_per_second_per_chip")
    if whole:
        yield chart("examples per second", "examples/s", [Line("newest", whole)], from_zero=True)
    if chip and not (whole and np.array_equal(whole.values, chip.values, equal_nan=True)):
        yield chart("examples per second and chip", "examples/s a chip", [Line("newest", chip)], from_zero=True)
    for name, title, unit, scale in (
        ("train/mfu", "model FLOPs utilization (MFU)", "% of the chip's peak", _PERCENT),
        ("train/teraflops_per_second_per_chip", "model FLOPs per second and chip", "TFLOP/s a chip", 1.0),
        ("train/data_wait_share", "waiting for data", "% of the interval", _PERCENT),
    ):
        if series := found.get(name):
            yield chart(title, unit, [Line("newest", series.scaled(scale))], from_zero=True)


def _memory(found: Found) -> Iterator[Html]:
    labels = {"memory/host_gib": "host", "memory/device_gib": "device, at most"}
    if lines := [Line(label, found[name]) for name, label in labels.items() if name in found]:
        yield chart("memory", "GiB", lines, from_zero=True)


def _shares(found: Found) -> Iterator[Html]:
    """Those named, in their order, then any others."""
    others = [name.removeprefix("time/") for name in found if name.startswith("time/")]
    names = [*(name for name in _SHARES if name in others), *(name for name in others if name not in _SHARES)]
    if names:
        lines = [Line(_title(name), found[f"time/{name}"].scaled(_PERCENT)) for name in names]
        yield stack("where the time went", "% of the wall time since this start", lines)


def _tokens(found: Found) -> Iterator[Html]:
    names = [name.removeprefix("tokens/") for name in found if name.startswith("tokens/")]
    groups = {name.rpartition("_")[0]: None for name in names if name.endswith(("_visible", "_target"))}
    rate = found.get("train/examples_per_second")
    rows = []
    for group in groups:
        parts = [found[f"tokens/{group}_{part}"].last for part in ("visible", "target") if f"{group}_{part}" in names]
        cells = [short(part) for part in parts] if len(parts) == 2 else ["", ""]
        speed = short(sum(parts) * rate.last) if rate else ""
        rows.append((group, *cells, short(sum(parts)), speed))
    if rows:
        yield page.heading("Tokens of an example, in the mean")
        yield page.table(("", "visible", "hidden, to be restored", "together", "tokens/s"), rows)


def _sources(found: Found) -> Iterator[Html]:
    start = "train/epochs/"
    rows = []
    for name in (name.removeprefix(start) for name in found if name.startswith(start)):
        share = found.get(f"train/share/{name}")
        told = f"{share.last * _PERCENT:.3g} %" if share else ""
        rows.append((name, told, short(found[start + name].last)))
    if rows:
        yield page.heading("Sources of the mixture")
        yield page.table(("source", "share of the examples", "epochs so far"), rows)


def total(found: Found, name: str) -> float:
    """The sum of a figure that counts in each interval; 0 where there is none."""
    return float(np.nansum(found[name].values)) if name in found else 0.0


def parts_of(found: Found, start: str) -> Sequence[tuple[str, float]]:
    """Names and sums of the counted figures below `start`, the greatest first."""
    sums = [(name.removeprefix(start), total(found, name)) for name in found if name.startswith(start)]
    return sorted(sums, key=lambda one: -one[1])
