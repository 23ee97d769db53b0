"""The data doctor's part of the run's page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from ml_collections import ConfigDict
from PIL import Image

from m3ae_jax.data.annotations import number_of
from m3ae_jax.data.order import ATTEMPTS
from m3ae_jax.doctor.findings import PROBLEM, percent
from m3ae_jax.doctor.speed import Shown
from m3ae_jax.doctor.survey import Sample
from m3ae_jax.report import page
from m3ae_jax.report.page import Html

_BINS = 40
_PAST = 2  # times the text budget: where the histogram of lengths ends
_WIDE = 20  # a largest value so many times the smallest gets a logarithmic axis
_ALL = "together"

Row = tuple[str, Callable[[dict[str, Any]], object]]


def section(report: dict[str, Any], sample: Sample, shown: Sequence[Shown], config: ConfigDict) -> Iterator[Html]:
    """The parts below the title.

    Args:
        report: of `inspection.inspect`.
        sample: of all sources.
        shown: examples as training gets them.
        config: resolved.
    """
    yield page.facts(_subject(report))
    looked = report["together"]["examples"]
    first = f"first {looked:,} examples" if looked > 1 else "first example"
    yield page.note(f"The run's {first}, in its own order, each as it stands before any replacement.")
    yield page.bullets(
        page.element("span", finding["text"], class_="bad" if finding["level"] == PROBLEM else "fine")
        for finding in report["findings"]
    )
    yield from _sources(report)
    yield from _held_out(report)
    if "captions" in report["together"]:
        yield from _captions(report, sample)
    if "pictures" in report["together"]:
        yield from _pictures(report, sample, config)
    yield from _speed(report)
    yield from _sheet(shown)


def _sources(report: dict[str, Any]) -> Iterator[Html]:
    yield page.heading("Sources")
    rows = []
    for name, source in report["sources"].items():
        rows.append([
            name, source["format"], source["path"] or "built in", "+".join(source["modalities"]),
            source["examples"], percent(source["share"]), f"{source['epochs']:,.3g}", source["looked_at"]["examples"],
        ])  # fmt: skip
    columns = ("name", "format", "path", "gives", "examples", "share", "epochs of the run", "looked at")
    yield page.table(columns, rows)
    yield from _left_out(report)
    unreadable = [one for _, looked in _columns(report) for one in looked.get("unreadable", {}).get("examples", ())]
    if unreadable:
        yield page.paragraph("Cannot be read:")
        reasons = {(one["source"], one["index"], one["error"]) for one in unreadable}
        yield page.table(("source", "example", "why"), sorted(reasons))


def _subject(report: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """When the doctor looked, and at what."""
    yield "made", f"{report['made'][:16].replace('T', ' ')} UTC"
    for name, source in (report["sources"] | report["held_out"]).items():
        said = f", fingerprint {source['fingerprint']}" if "fingerprint" in source else ""
        yield name, page.join([f"{source['format']} ", page.data(source["path"] or "built in"), said])
    tokenizer = report["tokenizer"]
    text = "none: words between blanks are counted" if report["text_unit"] == "words" else tokenizer["path"]
    yield "tokenizer", page.data(text)


def _opened(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All sources that were opened, by name."""
    sources: dict[str, dict[str, Any]] = report["sources"] | report["held_out"]
    return {name: source for name, source in sources.items() if "error" not in source}


def _left_out(report: dict[str, Any]) -> Iterator[Html]:
    """What was left out at opening, and what is not read, of all sources."""
    sources = _opened(report)
    tables = (
        ("left_out", "Left out when the files were opened:", "reason", "number"),
        ("not_read", "There, but not read:", "what", "number"),
    )
    for kind, title, what, number in tables:
        rows = [
            (name, page.data(one), count, page.data(source[f"{kind}_e.g."].get(one, "")))
            for name, source in sources.items()
            for one, count in source[kind].items()
        ]
        if rows:
            yield page.paragraph(title)
            yield page.table(("source", what, number, "first of them"), rows)
    files = {name: source for name, source in sources.items() if source["format"] != "scenes"}  # these are made
    silent = [name for name, source in files.items() if not source["counted_at_indexing"]]
    if silent:
        yield page.note(f"What was left out of {', '.join(silent)} is not known: the format does not say.")
    elif files and not any(source["left_out"] for source in files.values()):
        yield page.note("Nothing was left out when the files were opened.")


def _held_out(report: dict[str, Any]) -> Iterator[Html]:
    """Validation data and labelled data, and what of them is trained on."""
    if not report["held_out"]:
        return
    yield page.heading("Held-out data")
    rows = []
    for name, part in report["held_out"].items():
        if "error" in part:
            rows.append([name, "cannot be opened", *[""] * 6])
            continue
        looked, common = part["looked_at"], report["overlap"].get(name)
        pictures, captions = looked.get("pictures"), looked.get("captions")
        rows.append([
            name, part["examples"], sum(part["left_out"].values()), sum(part["not_read"].values()), looked["examples"],
            pictures["usable"] if pictures else "none",
            captions["without_words"]["count"] if captions else "none",
            _counted(common) if common else "not compared",
        ])  # fmt: skip
    columns = ("name", "examples", "left out", "not read", "looked at", "pictures that decode", "without words")
    yield page.table((*columns, "training pictures that are in it"), rows)


def _columns(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The statistics of each source and, of several, those of all together."""
    columns = [(name, source["looked_at"]) for name, source in report["sources"].items()]
    return [*columns, (_ALL, report["together"])] if len(columns) > 1 else columns


def _compare(report: dict[str, Any], kind: str, rows: Sequence[Row]) -> Html:
    """A table of one column a source that holds `kind`."""
    columns = [(name, looked[kind]) for name, looked in _columns(report) if kind in looked]
    body = [[label, *(_get(of, looked) for _, looked in columns)] for label, of in rows]
    return page.table(["", *(name for name, _ in columns)], body)


def _get(of: Callable[[dict[str, Any]], object], looked: dict[str, Any]) -> object:
    try:
        value = of(looked)
        return page.escape(f"{value:,}" if isinstance(value, int) else value)
    except KeyError:  # of no caption or no picture that is any good there are no figures
        return "none"


def _counted(of: dict[str, Any]) -> str:
    return f"{of['count']:,} ({percent(of['share'])})"


def _range(of: dict[str, Any]) -> str:
    return " / ".join(f"{of[key]:,.0f}" for key in ("least", "median", "p99", "most"))


def _extreme(of: dict[str, Any]) -> str:
    return f"{of['width']:,} × {of['height']:,} (example {of['index']:,})"


# --- captions ----------------------------------------------------------------------------------------------


def _captions(report: dict[str, Any], sample: Sample) -> Iterator[Html]:
    unit = report["text_unit"]
    everything = report["together"]["captions"]
    yield page.heading("Captions")
    if unit == "words":
        yield page.note(
            "No tokenizer is named (data.tokenizer is empty), so lengths are in words between blanks. A tokenizer "
            "makes more tokens of them than there are words: train one, then look again."
        )
    rows: list[Row] = [
        ("captions", lambda of: of["count"]),
        ("examples without a caption, not even an empty one", lambda of: _counted(of["absent"])),
        ("empty", lambda of: _counted(of["empty"])),
        ("not UTF-8", lambda of: _counted(of["not_utf8"])),
        ("copies of another one", lambda of: _counted(of["repeated"])),
        ("words: least / median / 99th % / most", lambda of: _range(of["words"])),
        ("characters, likewise", lambda of: _range(of["characters"])),
    ]
    if unit == "tokens":
        rows += [
            ("tokens, likewise", lambda of: _range(of["tokens"])),
            ("unknown tokens", lambda of: _counted(of["unknown_tokens"])),
            ("captions of unknown tokens alone", lambda of: _counted(of["unknown_words_alone"])),
        ]
    yield _compare(report, "captions", rows)
    if "cut" in everything:
        yield from _lengths(report, sample)
    if everything["most_repeated"]:
        yield page.paragraph("The most repeated captions:")
        rows = [(one["count"], one["caption"]) for one in everything["most_repeated"]]
        yield page.table(("times", "caption"), rows)


def _lengths(report: dict[str, Any], sample: Sample) -> Iterator[Html]:
    unit, captions = report["text_unit"], report["together"]["captions"]
    budget, recommended = captions["max_text_tokens"], captions["recommended"]
    lengths = np.array([caption.tokens for caption in sample.captions if caption.tokens])
    limit = max(_PAST * max(budget, recommended), 16)  # or a single endless caption would make the rest one bar
    beyond = int((lengths > limit).sum())
    drawn, axes = _histogram([(np.minimum(lengths, limit), "#1f77b4", "")], linear=True)
    axes.axvline(budget, color="#d95f02", linestyle="--", label=f"data.max_text_tokens = {budget}")
    axes.axvline(recommended, color="#1b7837", linestyle="-", label=f"keeps 99 % whole: {recommended}")
    label = f"{unit} of a caption" + (f"; what is longer than {limit} ({beyond:,}) stands at {limit}" if beyond else "")
    axes.set(xlabel=label, ylabel="captions")
    axes.legend(fontsize=8)
    yield page.figure(drawn, f"Histogram of the captions' lengths in {unit}; {recommended} keep 99 % whole.")
    rows: list[Row] = [(f"text budget that keeps 99 % whole, in {unit}", lambda of: of["recommended"])]
    for tried in captions["cut"]:
        row = f"cut at {tried}" + (" (data.max_text_tokens)" if int(tried) == budget else "")
        rows.append((row, lambda of, tried=tried: _counted(of["cut"][tried])))  # type: ignore[misc]
    yield _compare(report, "captions", rows)
    longest = captions["longest"]
    place = f"{longest['source']} example {longest['index']:,}"
    endless = captions["endless"]
    if endless["count"]:
        which = f"{number_of(endless['count'], 'captions')} of more than {endless['more_than']:,} {unit}"
        yield page.note(f"Left aside for the advice on lengths: {which}; such pages of text are no captions.")
    yield page.note(f"The longest ({longest['tokens']:,} {unit}, {place}) begins: ", page.data(longest["caption"]))


def _histogram(series: Sequence[tuple[np.ndarray, str, str]], *, linear: bool = False) -> tuple[Figure, Axes]:
    """Outlined bars of one or several sets of numbers (values, colour, label) over the same bins."""
    drawn = Figure((5.6, 3.4), layout="constrained")
    axes = drawn.add_subplot()
    values = np.concatenate([numbers for numbers, _, _ in series])
    least, most = int(values.min()), int(values.max())
    if most > _WIDE * max(least, 1) and not linear:
        edges: np.ndarray = np.geomspace(max(least, 1), most + 1, _BINS + 1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
    else:
        step = max(1, -(-(most - least + 1) // _BINS))
        edges = np.arange(least, most + step + 1, step) - 0.5
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        if len(edges) < 5:  # a few bars alone: room for whole numbers beside them
            axes.set_xlim(least - 3, most + 3)
    for numbers, colour, label in series:
        counts, _ = np.histogram(numbers, edges)
        axes.stairs(counts, edges, color=colour, fill=len(series) == 1, alpha=0.8, linewidth=1.5, label=label)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(alpha=0.3)
    return drawn, axes


# --- pictures ----------------------------------------------------------------------------------------------


def _pictures(report: dict[str, Any], sample: Sample, config: ConfigDict) -> Iterator[Html]:
    size = config.data.image_size
    yield page.heading("Pictures")
    yield _compare(
        report,
        "pictures",
        [
            ("pictures", lambda of: of["count"]),
            ("decode", lambda of: of["usable"]),
            ("formats", lambda of: ", ".join(f"{kind} {n:,}" for kind, n in of["formats"].items()) or "none"),
            ("width, pixels: least / median / 99th % / most", lambda of: _range(of["width"])),
            ("height, likewise", lambda of: _range(of["height"])),
            ("shorter side, likewise", lambda of: _range(of["shorter_side"])),
            ("smallest", lambda of: _extreme(of["smallest"])),
            ("largest", lambda of: _extreme(of["largest"])),
            ("narrowest", lambda of: _extreme(of["narrowest"])),
            ("widest", lambda of: _extreme(of["widest"])),
            (f"shorter side below data.image_size={size}", lambda of: _counted(of["smaller_than_image_size"])),
            ("copies of another one, byte for byte", lambda of: _counted(of["repeated"])),
        ],
    )
    usable = [picture for picture in sample.pictures if not picture.reason]
    if usable:
        widths, heights = (np.array([getattr(p, name) for p in usable]) for name in ("width", "height"))
        drawn, axes = _histogram([(widths, "#1f77b4", "width"), (heights, "#7b3294", "height")])
        axes.axvline(size, color="#d95f02", linestyle="--", label=f"data.image_size = {size}")
        axes.set(xlabel="pixels", ylabel="pictures")
        axes.legend(fontsize=8)
        yield page.figure(drawn, "Histogram of the pictures' widths and heights in pixels.")
    rows = []
    for reason, bad in report["together"]["pictures"]["unusable"].items():
        for number, one in enumerate(bad["examples"]):
            counted = [reason, bad["count"], percent(bad["share"])] if number == 0 else ["", "", ""]
            rows.append([*counted, f"{one['source']} example {one['index']:,}", one["bytes"], _start(one)])
    if rows:
        yield page.paragraph("Pictures that do not decode; each is replaced by another example of its source:")
        yield page.table(("reason", "pictures", "share", "e.g.", "bytes", "begins"), rows)


def _start(example: dict[str, Any]) -> Html:
    """First bytes in hexadecimal, and as text where they can be read."""
    raw = bytes.fromhex(example["first_bytes"])
    text = "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in raw)
    return page.code(f"{example['first_bytes']}  {text}") if raw else page.escape("nothing")


# --- speed, and what training sees -------------------------------------------------------------------------


def _speed(report: dict[str, Any]) -> Iterator[Html]:
    speed = report["speed"]
    yield page.heading("Speed of the data")
    rate = speed["examples_per_second"]
    if not rate:
        yield page.paragraph("Not measured. ", page.data(speed["trouble"]))
        return
    here = f"{number_of(speed['cores'], 'cores')}, {speed['processor']}"
    size = f"{'batch' if speed['batches'] == 1 else 'batches'} of {number_of(speed['batch_size'], 'examples')}"
    if speed["batch_size"] < report["batch_size"]:
        size += f" in place of {report['batch_size']:,}"
    yield page.paragraph(
        f"{rate:,.{0 if rate >= 10 else 1}f} examples/s on this machine ({here}; {speed['batches']} {size})."
    )
    if not speed["needed"]:
        yield page.note("--topology=v5e:4x4 beside --mode=inspect_data compares it with what that slice would take.")
        return
    rows = []
    for one in speed["needed"]:
        wanted = one["examples_per_second"]
        cores = f"{wanted / rate * speed['cores']:,.0f}"
        rows.append((one["topology"], one["chips"], f"{wanted:,.0f}", f"{wanted / one['chips']:,.0f}", cores))
    yield page.table(("topology", "chips", "takes at most, examples/s", "a chip", "cores like these"), rows)
    yield page.note(
        "At most: all matrix products of a step at the chips' peak, in closed form, nothing else waited for. "
        "A real run takes less, often half. --mode=plan asks the compiler."
    )


def _sheet(shown: Sequence[Shown]) -> Iterator[Html]:
    if not shown:
        return
    yield page.heading("What training sees")
    yield page.note(
        f"The first {number_of(len(shown), 'examples')} of the run, after cropping and cutting. Hatched patches and ",
        page.element("mark", "marked words"),
        " are hidden from the model.",
    )
    yield page.gallery(_example(one) for one in shown)


def _example(one: Shown) -> Html:
    name = f"{one.source} example {one.index:,}"
    if one.attempt >= ATTEMPTS:
        name += f": not one of its {ATTEMPTS} candidates decodes, so it is left empty"
    elif one.attempt:
        name += f", in place of {one.attempt} that did not decode"
    words = []
    for word in one.words:
        text = word.text.strip() or "▁"
        blank = " " if word.text.startswith(" ") else ""
        words += [blank, page.element("mark", text) if word.hidden else text]
    caption = page.element("p", *words, dir="auto", class_="words") if words else page.note("no caption")
    if one.picture is None:
        return page.element("figure", caption, page.element("figcaption", name))
    return page.figure(_encoded(one.picture), f"{name}, hidden patches hatched", page.join([caption, name]))


def _encoded(picture: np.ndarray) -> bytes:
    """PNG or JPEG, whichever is smaller: of an enlarged picture the first, of a photograph the second."""
    encoded = []
    for kind in ("PNG", "JPEG"):
        out = io.BytesIO()
        Image.fromarray(picture).save(out, kind, quality=85)
        encoded.append(out.getvalue())
    return min(encoded, key=len)
