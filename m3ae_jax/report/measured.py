"""What a run measured, as parts of its page: curves, throughput."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from m3ae_jax.report import page
from m3ae_jax.report.charts import Line, Series, chart, short, stack
from m3ae_jax.report.page import Html
from m3ae_jax.report.pictures import UNITS, loss_terms

_GROUPS = 16  # lines of a chart: more cannot be distinguished
_SHARES = ("step", "data_wait", "startup", "compile", "evaluation", "checkpoint")
_TERAFLOPS = "train/teraflops_per_second_per_chip"
_NORMS_LOG = 5  # times the least: below, a logarithmic axis would have hardly a tick
_LOSSES_LOG = 100  # times the least: beyond, a linear axis shows the outliers alone

Metrics = Mapping[str, Series]
"""The metrics of a run, by name."""


def curves(metrics: Metrics) -> Iterator[Html]:
    """The section on what was learnt: losses, accuracies, learning rate, norms; nothing before the first row.

    Args:
        metrics: of the run, by name.
    """
    charts = [*_losses(metrics), *_accuracies(metrics), *_learning_rate(metrics), *_norms(metrics)]
    if charts:
        yield page.note("The number beside a name is its newest value. The prior is the loss without any context.")
        yield page.gallery(charts, "charts")
    rows = [(name, f"{series.steps[-1]:,}", short(series.last)) for name, series in sorted(metrics.items())]
    if rows:
        yield page.details("The newest value of everything", page.table(("figure", "step", "value"), rows))


def _skipped(metrics: Metrics) -> list[int]:
    """The logged steps at which steps were skipped."""
    series = metrics.get("train/skipped_steps")
    return series.steps[series.values > 0].tolist() if series else []


def _losses(metrics: Metrics) -> Iterator[Html]:
    for term in loss_terms(metrics):
        title, unit = _title(term), UNITS.get(term, "loss")
        prior = metrics.get(f"prior/{term}")
        level = ("prior", prior.last) if prior else None
        # Steps are skipped in training: without its curve there is nothing to mark.
        marks = _skipped(metrics) if f"train/{term}" in metrics else []
        yield chart(title, unit, _splits(metrics, term), level=level, skipped=marks, log_from=_LOSSES_LOG)
        if sources := _lines(within(metrics, f"train/{term}/")):
            yield chart(f"{title}, by source", unit, sources)


def _accuracies(metrics: Metrics) -> Iterator[Html]:
    terms = dict.fromkeys(name.partition("/")[2] for name in metrics if name.startswith(("train/", "val/")))
    for term in terms:
        if term.endswith("accuracy"):
            yield chart(_title(term), "% right", _splits(metrics, term, scale=100), from_zero=True)


def _learning_rate(metrics: Metrics) -> Iterator[Html]:
    if rate := metrics.get("train/learning_rate"):
        yield chart("learning rate", "of the optimizer", [Line("newest", rate)])


def _norms(metrics: Metrics) -> Iterator[Html]:
    for name in ("gradient_norm", "parameter_norm"):
        marks = _skipped(metrics) if name == "gradient_norm" else []
        if total := metrics.get(f"train/{name}"):
            yield chart(_title(name), "L2", [Line("all", total)], skipped=marks, log_from=_NORMS_LOG)
        if groups := _lines(within(metrics, f"train/{name}/")):
            largest = sorted(groups, key=lambda line: -np.nan_to_num(line.series.last, nan=np.inf))[:_GROUPS]
            left_out = f", the {_GROUPS} largest of {len(groups)}" if len(groups) > _GROUPS else ""
            shown = [line for line in groups if line in largest]
            yield chart(f"{_title(name)}, by group{left_out}", "L2", shown, log_from=_NORMS_LOG)


def _splits(metrics: Metrics, term: str, scale: float = 1) -> list[Line]:
    series = {split: metrics.get(f"{split}/{term}") for split in ("train", "val")}
    colours = {"train": "var(--c1)", "val": "var(--c2)"}
    return [Line(split, one.scaled(scale), colours[split]) for split, one in series.items() if one]


def within(metrics: Metrics, prefix: str) -> dict[str, Series]:
    """The metrics whose names begin with a prefix, by the rest of the name."""
    return {name.removeprefix(prefix): series for name, series in metrics.items() if name.startswith(prefix)}


def _lines(metrics: Metrics) -> list[Line]:
    return [Line(name, series) for name, series in metrics.items()]


def _title(name: str) -> str:
    return name.replace("_", " ")


def throughput(metrics: Metrics) -> Iterator[Html]:
    """The section on speed: examples, waiting, where the time went, memory, tokens; nothing before the first row.

    Args:
        metrics: of the run, by name.
    """
    charts = [*_speed(metrics), *_shares(metrics), *_memory(metrics)]
    if rate := metrics.get("train/examples_per_second"):
        median = short(float(np.nanmedian(rate.values))) if np.isfinite(rate.values).any() else "none"
        yield page.paragraph(f"{median} examples/s in the median of {len(rate.values):,} intervals.")
    if charts:
        yield page.gallery(charts, "charts")
    yield from _tokens(metrics)
    yield from _sources(metrics)


def _speed(metrics: Metrics) -> Iterator[Html]:
    whole, chip = metrics.get("train/examples_per_second"), metrics.get("train/examples_per_second_per_chip")
    if whole and chip and np.array_equal(whole.values, chip.values, equal_nan=True):
        chip = None
    for series, title, unit, scale in (
        (whole, "examples per second", "examples/s", 1),
        (chip, "examples per second and chip", "examples/s a chip", 1),
        (metrics.get("train/mfu"), "model FLOPs utilization (MFU)", "% of the chip's peak", 100),
        (metrics.get(_TERAFLOPS), "model FLOPs per second and chip", "TFLOP/s a chip", 1),
        (metrics.get("train/data_wait_share"), "waiting for data", "% of the interval", 100),
    ):
        if series:
            yield chart(title, unit, [Line("newest", series.scaled(scale))], from_zero=True)


def _memory(metrics: Metrics) -> Iterator[Html]:
    labels = {"memory/host_gib": "host", "memory/device_gib": "device, at most"}
    if lines := [Line(label, metrics[name]) for name, label in labels.items() if name in metrics]:
        yield chart("memory", "GiB", lines, from_zero=True)


def _shares(metrics: Metrics) -> Iterator[Html]:
    """Those named, in their order, then any others."""
    shares = within(metrics, "time/")
    names = dict.fromkeys([*(name for name in _SHARES if name in shares), *shares])
    if names:
        lines = [Line(_title(name), shares[name].scaled(100)) for name in names]
        yield stack("where the time went", "% of the wall time since this start", lines)


def _tokens(metrics: Metrics) -> Iterator[Html]:
    tokens = within(metrics, "tokens/")
    groups = dict.fromkeys(name.rpartition("_")[0] for name in tokens if name.endswith(("_visible", "_target")))
    rate = metrics.get("train/examples_per_second")
    rows = []
    for group in groups:
        names = [name for name in (f"{group}_visible", f"{group}_target") if name in tokens]
        parts = [tokens[name].last for name in names]
        cells = [short(part) for part in parts] if len(parts) == 2 else ["", ""]
        speed = short(sum(parts) * rate.last) if rate else ""
        rows.append((group, *cells, short(sum(parts)), speed))
    if rows:
        yield page.heading("Tokens of an example, in the mean")
        yield page.table(("", "visible", "hidden, to be restored", "together", "tokens/s"), rows)


def _sources(metrics: Metrics) -> Iterator[Html]:
    shares = within(metrics, "train/share/")
    rows = [
        (name, f"{shares[name].last * 100:.3g} %" if name in shares else "", short(epochs.last))
        for name, epochs in within(metrics, "train/epochs/").items()
    ]
    if rows:
        yield page.heading("Sources of the mixture")
        yield page.table(("source", "share of the examples", "epochs so far"), rows)
