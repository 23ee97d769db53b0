"""The model card of a run, ``MODEL.md``: what was trained on what, how well it does, and how to find that out again.

Everything is read from the files of the run's folder, so that it can be written anew at any time; nothing is said that
is not in them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import m3ae_jax.config as config_lib
from m3ae_jax.atomic import write_text
from m3ae_jax.errors import UserError
from m3ae_jax.metrics.writers import read_lines
from m3ae_jax.report import measured, results
from m3ae_jax.report.charts import short
from m3ae_jax.report.run import Run, read

log = logging.getLogger("m3ae_jax")

FILE = "MODEL.md"
_STATES = ("started", "resumed", "stopped", "preempted", "failed", "finished")
UNKNOWN_LICENSE = "unknown: see the source"


def is_done(folder: Path) -> bool:
    """Whether the newest start of the run ended with all steps done."""
    kinds = [line.get("kind") for line in read_lines(folder / "events.jsonl")]
    return [kind for kind in kinds if kind in _STATES][-1:] == ["finished"]


def write(folder: Path) -> Path:
    """Writes the card.

    Args:
        folder: the run's.

    Returns:
        ``MODEL.md``.

    Raises:
        UserError: the folder holds no run.
        OSError: the card cannot be written.
    """
    run, lines = read(folder), list[str]()
    for section in (_about, _training, _data, _config, _figures, _tokenizer, _weights, _versions):
        try:
            lines += section(run)
        except Exception as error:  # as on the page: a folder may hold anything, and the other parts are needed
            log.warning("%s: a part could not be made: %s", FILE, error, exc_info=True)
            lines += ["", f"A part could not be made: {_line(f'{type(error).__name__}: {error}')}"]
    place = folder / FILE
    write_text(place, "\n".join(lines).strip() + "\n")
    return place


def _about(run: Run) -> Iterator[str]:
    config, name = run.config, run.folder.resolve().name
    modalities = " and ".join(config.get("data", {}).get("modalities", ()))
    yield f"# {name}"
    yield ""
    yield f"A model of {modalities or 'unknown modalities'}, trained by the objective `{config.get('objective')}`."
    yield ""
    yield "```python"
    yield "import m3ae_jax"
    yield f"model = m3ae_jax.load({str(run.folder.resolve())!r})  # this folder, wherever it lies"
    yield "```"


def _training(run: Run) -> Iterator[str]:
    if not run.events:
        return
    batch = run.config.get("batch_size")
    yield from _heading("Training")
    at = f" at {run.ending.time:%Y-%m-%d %H:%M} UTC" if run.ending and run.ending.time else ""
    yield f"- {run.done:,} steps; {f'{run.ending.kind}{at}' if run.ending else 'not finished'}"
    if isinstance(batch, int):
        yield f"- {run.done * batch:,} examples seen, {batch:,} a step"
    yield f"- starts: {sum(event.kind in ('started', 'resumed') for event in run.events):,}"
    yield f"- again: `python -m m3ae_jax.main --config={_folder(run)}/config.json{_code(run)} --workdir=NEW`"


def _data(run: Run) -> Iterator[str]:
    sources: dict[str, dict[str, Any]] = results.load(run.folder / "data.json").get("sources", {})
    if not sources:
        return
    yield from _heading("Data")
    rows = []
    for field, source in sources.items():
        left = ", ".join(f"{reason} {count:,}" for reason, (count, _) in source.get("left_out", {}).items())
        silent = "none" if source.get("counted") or not source["path"] else "not told"
        place = f"`{source['path']}`" if source["path"] else "built in"
        modalities = "+".join(source["modalities"])
        rows.append((f"`{field}`", source["format"], place, modalities, f"{source['examples']:,}", left or silent))
    yield from _table(("data", "format", "path", "gives", "examples", "left out"), rows)
    replaced = measured.within(run.metrics, "train/replaced/")
    counts = [f"{reason.replace('_', ' ')} {series.total:,.0f}" for reason, series in replaced.items() if series.total]
    if counts:
        yield f"\nReplaced by another example while training: {', '.join(counts)}."


def _config(run: Run) -> Iterator[str]:
    yield from _heading("Config")
    try:
        config = config_lib.from_json(json.dumps(run.config))
        base = config_lib.from_json(json.dumps({"objective": config.objective}))
    except UserError as error:
        yield f"All of it is in `config.json` ({_line(error)})."
        return
    changes = config_lib.difference(base, config)
    yield f"All of it is in `config.json`; {len(changes)} fields differ from the default:"
    yield ""
    yield from (f"- `{name}={_line(repr(new))}`" for name, _, new in changes)


def _figures(run: Run) -> Iterator[str]:
    validation, evaluations = measured.within(run.metrics, "val/"), results.by_name(run.folder)
    if not validation and not evaluations:
        return
    yield from _heading("Figures")
    program = f"python -m m3ae_jax.main --mode=eval --workdir={_folder(run)}{_code(run)}"
    if validation:
        yield f"On the validation data (`{program} --config.evals=`):"
        yield ""
        prior = measured.within(run.metrics, "prior/")
        rows = [
            (name, short(series.last), f"{series.steps[-1]:,}", short(prior[name].last) if name in prior else "")
            for name, series in validation.items()
        ]
        yield from _table(("figure", "value", "at step", "without any context"), rows)
    for name, by_data in sorted(evaluations.items()):
        for by_step in by_data.values():
            yield from _evaluation(run, name, by_step, f"{program} --config.evals={name}")


def _evaluation(run: Run, name: str, by_step: dict[int, Path], command: str) -> Iterator[str]:
    """The newest result of an evaluation of some data, and the command that makes it."""
    step = max(by_step)
    told, text = results.load(by_step[step]), by_step[step].with_suffix(".md")
    if name == "validation" or not text.is_file():  # those are in the table above
        return
    parts: dict[str, dict[str, Any]] = told.get("data", {})
    others = [option for part, about in parts.items() for option in _other_data(run, part, about)]
    yield from ("", f"### {name}, step {step:,}", "", f"`{' '.join([command, *others])}`", "")
    for part, about in parts.items():
        fields = [str(about[key]) for key in ("source", "path", "split", "label") if about.get(key)]
        yield f"- {part}: {_line(', '.join(fields))}, of {about.get('examples', 0):,} examples"
    yield ""
    yield text.read_text(encoding="utf-8", errors="replace").strip()


def _other_data(run: Run, part: str, about: dict[str, Any]) -> Iterator[str]:
    """Options for data that are not those of the run's config."""
    group, known = ("data", ("val",)) if part == "val" else ("eval", ("train", "test", "outside"))
    named = run.config.get(group, {}).get(part, {})
    if part not in known or about.get("source") == "scenes" == run.config["data"]["val"]["source"]:
        return
    for key in ("source", "path", "split"):
        if about.get(key) != named.get(key):
            yield f"--config.{group}.{part}.{key}={shlex.quote(str(about.get(key)))}"


def _tokenizer(run: Run) -> Iterator[str]:
    named = run.config.get("data", {}).get("tokenizer")
    for file in sorted(run.folder.glob("tokenizer.*")):
        yield from _heading("Tokenizer")
        fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        yield f"`{file.name}` (fingerprint {fingerprint}), a copy of `{_line(named)}`."


def _weights(run: Run) -> Iterator[str]:
    origins = results.load(run.folder / "weights.json").get("weights", [])
    if not origins:
        return
    yield from _heading("Weights that it began with")
    for origin in origins:
        if "file" in origin:
            license = _line(origin.get("license")) or UNKNOWN_LICENSE
            yield f"- `{_line(origin['file'])}`, of format {_line(origin.get('format'))}, licence: {license}"
        else:
            yield f"- step {origin.get('step')} of `{_line(origin.get('run'))}`"


def _versions(run: Run) -> Iterator[str]:
    versions = results.load(run.folder / "data.json").get("versions", {})
    if versions:
        yield from _heading("Versions")
        yield "Of the newest start: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."


def _heading(text: str) -> tuple[str, ...]:
    return "", f"## {text}", ""


def _folder(run: Run) -> str:
    return shlex.quote(str(run.folder))


def _code(run: Run) -> str:
    """What a command line adds for a run whose config names code; nothing of a config that cannot be read."""
    try:
        config = config_lib.from_json(json.dumps(run.config))
    except UserError:
        return ""
    return "".join(f" {_line(override)}" for override in config_lib.allowing_named_code(config))


def _line(value: object) -> str:
    """One line without the marks of code, whatever it was."""
    return " ".join(("" if value is None else str(value)).replace("`", "'").split())


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        yield f"| {' | '.join(_line(cell).replace('|', chr(92) + '|') if cell[:1] != '`' else cell for cell in row)} |"
