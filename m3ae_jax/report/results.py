"""What a run left in files beside its metrics, as parts of its page: pictures, evaluations, replays."""

from __future__ import annotations

import functools
import glob
import io
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m3ae_jax.report import page
from m3ae_jax.report.charts import bar, short
from m3ae_jax.report.page import Html
from m3ae_jax.report.pictures import OWN_STATISTICS

_BETWEEN = 6  # pictures between the first and the last
_BYTES = 330_000  # of a picture: eight of them, a third longer as text, leave the page room below 5 MB
_WIDTH = 1200  # pixels: the page is 990 wide
_HEIGHT = 6000  # pixels of a sheet: the rest is cut off
_PIXELS = 50_000_000  # of a sheet that is read at all
_COLUMNS = 6  # steps of an evaluation side by side
_REPLAYS = 3
_WORST = 32
_LAYERS = 100
_CAPTION = 500  # characters
_LINE = 4_000  # characters of a line below a table, such as a verdict
_CHARACTERS = 20_000  # of a text
_DATA = "[A-Za-z0-9-]+-[0-9a-f]{6}"  # `evals.base.Data.name`
_EVALUATION = re.compile(rf"(?P<name>.+)_(?P<step>[0-9]+)(?:_(?P<data>{_DATA}))?\.json")


def reconstructions(folder: Path) -> Iterator[Html]:
    """The section of the sheets in ``pictures/``: the first, some between, the last; nothing without any.

    Args:
        folder: the run's.
    """
    sheets = numbered(folder / "pictures", r"step_([0-9]+)\.png")
    if sheets:
        yield from _about_pixels(folder)
    chosen = spread(list(sheets))
    if len(chosen) < len(sheets):
        yield page.note(f"{len(chosen)} of the {len(sheets):,} sheets in ", page.code("pictures/"), ".")
    for step in chosen:
        yield picture(sheets[step], f"Reconstructions at step {step:,}", f"Step {step:,}")


def _about_pixels(folder: Path) -> Iterator[Html]:
    """What to know of restored patches that were normalised."""
    groups = load(folder / "config.json").values()
    if any(isinstance(group, dict) and group.get("normalize_patches") is True for group in groups):
        yield page.note(OWN_STATISTICS)


def numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """Files whose name matches the pattern, by the number in it, rising."""
    matches = [(re.fullmatch(pattern, file.name), file) for file in folder.glob("*")]
    return dict(sorted((int(match[1]), file) for match, file in matches if match))


def spread(steps: list[int], between: int = _BETWEEN) -> list[int]:
    """The first, the last and at most `between` others, evenly over the logarithm of the step.

    >>> spread([0, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000], between=2)
    [0, 1000, 3000, 8000]
    """
    if len(steps) <= between + 2:
        return steps
    others = np.log(np.maximum(steps[1:-1], 1))
    targets = np.linspace(others[0], math.log(steps[-1]), between + 1)[:-1]
    return sorted({steps[0], steps[-1], *(steps[1 + int(np.abs(others - target).argmin())] for target in targets)})


def picture(file: Path, alt: str, caption: str) -> Html:
    """A sheet, small enough for the page; a line where it cannot be read."""
    try:
        status = file.stat()
        encoded, cut = _fitting(file, status.st_mtime_ns, status.st_size)
    except Exception as error:  # over damaged files Pillow raises errors of many kinds
        return page.note(f"{caption}: ", page.code(file.name), " cannot be shown: ", page.data(error))
    more = f". The upper part alone: all of it is in {file.parent.name}/{file.name}" if cut else ""
    return page.figure(encoded, alt, caption + more)


@functools.lru_cache(maxsize=16)  # a page is made anew at each evaluation, of mostly the same sheets
def _fitting(file: Path, changed: int, size: int) -> tuple[bytes, bool]:
    """The file's bytes if they are few, or a JPEG of about `_BYTES`; and whether the lower part is cut off."""
    del changed
    with Image.open(file, formats=("PNG", "JPEG")) as opened:
        width, height = opened.size
        if size <= _BYTES and width <= _WIDTH and height <= _HEIGHT:
            opened.verify()
            return file.read_bytes(), False
        if width * height > _PIXELS:
            raise ValueError(f"{width:,} × {height:,} pixels are too many")
        sheet = opened.convert("RGB").crop((0, 0, width, min(height, _HEIGHT)))
    encoded, scale = b"", min(1.0, _WIDTH / width)
    for _ in range(3):
        shape = max(1, round(sheet.width * scale)), max(1, round(sheet.height * scale))
        out = io.BytesIO()
        sheet.resize(shape, Image.Resampling.BICUBIC, reducing_gap=2.0).save(out, "JPEG", quality=80)
        encoded = out.getvalue()
        if len(encoded) <= _BYTES:
            break
        scale *= 0.95 * math.sqrt(_BYTES / len(encoded))
    return encoded, sheet.height < height


def evaluations(folder: Path) -> Iterator[Html]:
    """The section of ``evals/``: the newest step of each evaluation of each data, and its metrics over the steps.

    Args:
        folder: the run's.
    """
    for name, by_data in sorted(by_name(folder).items()):
        for data, by_step in sorted(by_data.items()):
            yield from _evaluation(name, data, dict(sorted(by_step.items())))
        if len(by_data) > 1:
            yield page.heading(f"{name}, data beside each other")
            newest = [(data, max(by_step)) for data, by_step in sorted(by_data.items())]
            heads = [f"{data or 'data unknown'}, step {step:,}" for data, step in newest[:_COLUMNS]]
            yield _columns(heads, [by_data[data][step] for data, step in newest[:_COLUMNS]])


def by_name(folder: Path) -> dict[str, dict[str, dict[int, Path]]]:
    """The files of ``evals/`` in a run's folder, by evaluation, by data ("": not told) and by step."""
    found: dict[str, dict[str, dict[int, Path]]] = {}
    for file in (folder / "evals").glob("*"):
        if match := _EVALUATION.fullmatch(file.name):
            found.setdefault(match["name"], {}).setdefault(match["data"] or "", {})[int(match["step"])] = file
    return found


def _evaluation(name: str, data: str, by_step: dict[int, Path]) -> Iterator[Html]:
    """The results of an evaluation of some data, by step, rising."""
    newest = max(by_step)
    file = by_step[newest]
    yield page.heading(f"{name} at step {newest:,}" + (f", of {data}" if data else ""))
    if about := list(_about(load(file).get("data"))):
        yield page.note(*about)
    text = file.with_suffix(".md")
    if text.exists():
        yield text_or_table(text.read_text(encoding="utf-8", errors="replace"))
    for sheet in sorted(file.parent.glob(f"{glob.escape(file.stem)}_*.png")):
        rest = sheet.stem.removeprefix(f"{file.stem}_")
        if data or not re.match(f"{_DATA}_", rest):  # those are of the same step, of other data
            caption = rest.replace("_", " ")
            yield picture(sheet, f"{name}: {caption}", caption)
    if len(by_step) > 1 or not text.exists():
        shown = list(by_step)[-_COLUMNS:]
        yield _columns([f"step {step:,}" for step in shown], [by_step[step] for step in shown])
        if len(shown) < len(by_step):
            yield page.note(f" The newest {_COLUMNS} of {len(by_step)} steps.")


def _about(data: object) -> Iterator[Html]:
    """What a result's file says of its data."""
    parts = data.items() if isinstance(data, dict) else ()
    for number, (part, about) in enumerate((part, about) for part, about in parts if isinstance(about, dict)):
        fields = [str(about[key]) for key in ("source", "path", "split", "label") if about.get(key)]
        count = about.get("examples")
        examples = [f"{count:,} examples"] if isinstance(count, int) else []
        yield page.join(["; " if number else "", page.data(f"{part}: {', '.join([*fields, *examples])}")])


def text_or_table(text: str) -> Html:
    """A text as it is written; a Markdown table that it begins with, as a table, and what follows as lines."""
    lines = [line.strip() for line in text.strip().splitlines()]
    rows = list(itertools.takewhile(lambda line: line.startswith("|") and line.endswith("|"), lines))
    if len(rows) > 2 and (len(rows) == len(lines) or not lines[len(rows)]):
        cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in rows]
        if set("".join(cells[1])) <= set("-: "):
            below = [page.paragraph(page.data(line[:_LINE])) for line in lines[len(rows) :][:_LAYERS] if line]
            return page.join([page.table(cells[0], cells[2:]), *below])
    cut = f"\n… and {len(text) - _CHARACTERS:,} characters more" if len(text) > _CHARACTERS else ""
    return page.preformatted(text[:_CHARACTERS] + cut)


def _columns(heads: list[str], files: list[Path]) -> Html:
    """The numbers in several files, side by side."""
    columns = [_numbers(load(file)) for file in files]
    names = dict.fromkeys(name for column in columns for name in column if name != "step")
    rows = [[name, *(short(column[name]) if name in column else "" for column in columns)] for name in names]
    return page.table(["", *heads], rows)


def load(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file holds none, as after a kill while it was written."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _numbers(values: object) -> dict[str, float]:
    """The numbers in an object; null is NaN."""
    if not isinstance(values, dict):
        return {}
    return {key: _number(value) for key, value in values.items() if value is None or isinstance(value, int | float)}


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.inf


def replays(folder: Path) -> Iterator[Html]:
    """The section of ``replay/``: steps that were computed again, the newest first.

    Args:
        folder: the run's.
    """
    by_step = numbered(folder / "replay", r"step_([0-9]+)\.json")
    if by_step:
        yield from _about_pixels(folder)
    for step in list(by_step)[: -_REPLAYS - 1 : -1]:
        yield page.heading(f"Step {step:,}")
        yield from _replay(load(by_step[step]), by_step[step].with_suffix(".png"), step)
    if len(by_step) > _REPLAYS:
        yield page.note(f"{len(by_step) - _REPLAYS:,} older ones are in ", page.code("replay/"), ".")


def _replay(replay: dict[str, Any], sheet: Path, step: int) -> Iterator[Html]:
    if not replay:
        yield page.paragraph("Its file cannot be read.")
        return
    yield _verdict(replay)
    if terms := _numbers(replay.get("terms")):
        yield page.table(("term", "value"), [(name, short(value)) for name, value in terms.items()])
    yield from _layers(_numbers(replay.get("gradient_norms")))
    worst = replay.get("worst")
    examples = [one for one in worst if isinstance(one, dict)][:_WORST] if isinstance(worst, list) else []
    if examples:
        yield page.paragraph("Examples with the greatest losses:")
        yield page.table(("position", "source", "example", "loss", "caption"), map(_example, examples))
    if sheet.exists():
        yield picture(sheet, f"The examples of step {step:,} with the greatest losses", "The same, as pictures")


def _example(one: dict[str, Any]) -> list[str]:
    position, source, index, caption = (str(one.get(key, "")) for key in ("position", "source", "index", "caption"))
    return [position, source, index, short(_number(one.get("loss"))), caption[:_CAPTION]]


def _verdict(replay: dict[str, Any]) -> Html:
    loss, recorded = (_exact(replay.get(name)) for name in ("loss", "recorded_loss"))
    comparison: object = page.element("span", f"The run wrote {recorded}.", class_="bad")
    if replay.get("equal") is None:
        comparison = "The run wrote no loss of this step to compare with."
    elif replay["equal"]:
        comparison = "The run wrote the same."
    verdict = f" The verdict on the step: {replay['verdict']}." if replay.get("verdict") else ""
    begin = f"Computed again from step {replay.get('from_step')}: loss {loss}. "
    return page.paragraph(begin, comparison, verdict)


def _exact(value: object) -> str:
    number = _number(value)
    return f"{number:.9g}" if math.isfinite(number) else "not finite"


def _layers(norms: dict[str, float]) -> Iterator[Html]:
    """The norm of each layer's gradient, as numbers and bars."""
    finite = {name: value for name, value in norms.items() if math.isfinite(value)}
    others = [name for name in norms if name not in finite]
    if others:
        yield page.element("p", "Not finite: ", page.data(", ".join(others[:_LAYERS])), class_="bad")
    if not finite:
        return
    most = max(finite.values()) or 1.0
    rows = [(name, short(value), bar(value / most)) for name, value in list(finite.items())[:_LAYERS]]
    more = page.note(f"{len(finite) - _LAYERS:,} more are left out.") if len(finite) > _LAYERS else ""
    yield page.details("Gradient norms by layer", page.table(("layer", "L2", ""), rows), more)
