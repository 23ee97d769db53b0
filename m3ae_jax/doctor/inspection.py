"""``--mode=inspect_data``: the data doctor. Looks at the training data as the run would meet them, before it does."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import m3ae_jax.console as console
from m3ae_jax.atomic import write_text
from m3ae_jax.config import resolve, steps
from m3ae_jax.data.annotations import number_of
from m3ae_jax.data.mixture import Mixture, open_mixture
from m3ae_jax.data.run_tokenizer import open_tokenizer
from m3ae_jax.doctor import pages
from m3ae_jax.doctor.findings import PROBLEM, find
from m3ae_jax.doctor.parts import HeldOut, annotation_files, facts_of, held_out, overlap
from m3ae_jax.doctor.speed import Speed, measure, need
from m3ae_jax.doctor.subject import subject
from m3ae_jax.doctor.survey import Sample, Words, draws, look, statistics, together
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import build
from m3ae_jax.report import page
from m3ae_jax.train.setup import BERT_VOCABULARY

log = logging.getLogger("m3ae_jax")

EXAMPLES = 2000
_SHOWN = 12


def inspect(config: ConfigDict, workdir: Path, examples: int = EXAMPLES, topology: str = "") -> dict[str, Any]:
    """Writes ``report/10_data_doctor.html``, ``report/data_doctor.json`` and ``report.html``; prints the findings.

    Args:
        config: as loaded and overridden; a missing tokenizer is reported, not refused.
        workdir: the run's folder.
        examples: to look at, the run's first ones (of each source at most one pass).
        topology: what the pipeline's speed is compared with, as ``--mode=plan`` takes it; empty: with nothing.

    Returns:
        What the JSON file holds.

    Raises:
        UserError: the config cannot work, its data cannot be opened, or the folder cannot be written. What is in the
            data never raises.
    """
    if examples < 1:
        raise UserError(f"--inspect_examples={examples}: must be 1 or more")
    config = resolve(config)
    has_text = "text" in config.data.modalities
    named = open_tokenizer(config.data.tokenizer, workdir) if has_text and config.data.tokenizer else None
    tokenizer = named or Words()
    vocab_size = (named.vocab_size if named else BERT_VOCABULARY) if has_text else 0
    needed = need(config, vocab_size, topology)
    mixture = _open(config)
    samples = []
    for member, count in zip(mixture.members, draws(mixture, examples), strict=True):
        log.info("%s: looking at %s of %s", member.name, f"{count:,}", number_of(len(member.source), "examples"))
        samples.append(look(member, _view(mixture, member.name, config), count, tokenizer, config))
    unit = "tokens" if named else "words"
    others = held_out(config, tokenizer, unit)
    speed = measure(config, mixture, build(config, vocab_size).groups, tokenizer, _SHOWN)
    report = _report(config, mixture, samples, speed, unit) | _report_on_others(config, samples, others)
    report["tokenizer"] = {"path": config.data.tokenizer, "fingerprint": named.fingerprint if named else ""}
    report["speed"]["needed"] = [dataclasses.asdict(one) for one in needed]
    findings = find(report, config)
    report["findings"] = [dataclasses.asdict(finding) for finding in findings]
    _write(workdir, report, samples, speed, config)
    if findings:
        log.info(console.table([("!!" if finding.level == PROBLEM else " -", finding.text) for finding in findings]))
    log.info("the data doctor's page: %s", Path(workdir) / "report.html")
    return report


def _open(config: ConfigDict) -> Mixture:
    """The training data.

    Raises:
        UserError: they cannot be opened; it also says which annotation files are at the path.
    """
    try:
        return open_mixture(config, 1)  # its parts are the same on any mesh
    except UserError as error:
        found = "; ".join(map(str, annotation_files(config).found))
        raise UserError(f"{error}; {found}" if found else str(error)) from None


def _view(mixture: Mixture, name: str, config: ConfigDict) -> Any:
    place = [member.name for member in mixture.members].index(name)
    part = next(part for part in mixture.parts if place in part.members)
    return mixture.feed(part, config).views[part.members.index(place)]


def _report(config: ConfigDict, mixture: Mixture, samples: list[Sample], speed: Speed, unit: str) -> dict[str, Any]:
    total = max(1, steps("duration", config.duration, config.batch_size, mixture.epoch_examples))
    sources: dict[str, Any] = {}
    troubles = [f"the pipeline stopped: {speed.trouble}"] if speed.trouble else []
    for place, (member, sample) in enumerate(zip(mixture.members, samples, strict=True)):
        spec = config.data.mixture[member.name] if config.data.mixture else config.data.train
        share = mixture.share(place)
        sources[member.name] = facts_of(member.source, spec) | {
            "modalities": list(member.modalities),
            "share": share,
            "epochs": share * config.batch_size * total / len(member.source),
            "looked_at": statistics(sample, config, unit),
        }
        missing = [m for m in member.modalities if m not in member.source.modalities]
        if missing:
            troubles.append(f"data.modalities asks for {', '.join(missing)}, which {member.name} does not hold")
    measured = dataclasses.asdict(dataclasses.replace(speed, shown=()))
    del measured["shown"]
    return {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "subject": subject(config.to_dict()),
        "batch_size": config.batch_size,
        "steps": total,
        "troubles": troubles,
        "sources": sources,
        "together": statistics(together(samples), config, unit),
        "speed": measured,
        "text_unit": unit,
    }


def _report_on_others(config: ConfigDict, samples: list[Sample], parts: list[HeldOut]) -> dict[str, Any]:
    """What is held out, what of it is trained on, and which annotation files lie beside the data."""
    everything = together(samples)
    opened = [part for part in parts if everything.pictures and part.sample and part.sample.pictures]
    files = annotation_files(config)
    return {
        "held_out": {part.name: part.facts for part in parts},
        "overlap": {part.name: overlap(everything, part) for part in opened},
        "annotations": [
            {
                "text": str(one),
                "name": one.path.name,
                "of": len(one.pictures) or one.counts.get("shards", 0),
                "nouns": "images" if one.pictures else "shards",
                "missing": len(one.missing),
                "e.g.": one.missing[0] if one.missing else "",
            }
            for one in files.found
        ],
        "passed_over": files.passed_over,
    }


def _write(workdir: Path, report: dict[str, Any], samples: list[Sample], speed: Speed, config: ConfigDict) -> None:
    try:
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        write_text(Path(workdir) / "report" / "data_doctor.json", text + "\n")
        parts = pages.section(report, together(samples), speed.shown, config)
        page.write(workdir, 10, "data_doctor", "Data doctor", *parts)
        page.build(workdir, Path(workdir).name)
    except OSError as error:
        raise UserError(f"--workdir={str(workdir)!r} cannot be written: {error.strerror}") from error
