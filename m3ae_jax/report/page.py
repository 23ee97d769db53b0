"""The run's one HTML page, to which every part of the program adds.

Each writer (the data doctor, training curves, an evaluation) makes a fragment, ``WORKDIR/report/NN_name.html``;
`build` joins the fragments, in the order of NN, into ``WORKDIR/report.html``. The page is one file: styles are inline,
pictures are data: URIs, there are no scripts, and its own security policy forbids it to fetch or run anything. What
comes from data goes through `escape`; whatever is not `Html` is escaped wherever it is put.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from m3ae_jax.atomic import write_text

_DPI = 130

# Control characters, and those that turn the direction of all text behind them.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
_FRAGMENT = re.compile(r"(\d\d)_([\w-]+)\.html")
_TITLE = re.compile(r"<h2>(.*?)</h2>", re.DOTALL)
_NUMBER = re.compile(r"[−-]?\d[\d,.]*( %)?")
_MIME = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}


class Html(str):
    """Text that is HTML already; all other text is escaped."""


def escape(value: object) -> Html:
    """Turns any value into text of a page; control characters and changes of direction show as escapes."""
    if isinstance(value, Html):
        return value
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    visible = _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
    return Html(html.escape(visible, quote=True))


def join(parts: Iterable[object], separator: str = "") -> Html:
    """Joins parts one after the other."""
    return Html(escape(separator).join(escape(part) for part in parts))


def element(name: str, *parts: object, **attributes: str) -> Html:
    """``<name attribute="...">parts</name>``; an attribute's trailing underscore (``class_``) is left out.

    Others become hyphens (``data_head``).
    """
    names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
    written = "".join(f' {names[key]}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{join(parts)}</{name}>")


def heading(text: object) -> Html:
    """The heading of a part of a section."""
    return element("h3", text)


def paragraph(*parts: object) -> Html:
    """A paragraph."""
    return element("p", *parts)


def note(*parts: object) -> Html:
    """A paragraph of lesser weight: what a figure means, how it was measured."""
    return element("p", *parts, class_="note")


def data(text: object) -> Html:
    """Words from a data set within other text: a change of direction in them affects nothing around them."""
    return element("bdi", text)


def code(text: object) -> Html:
    """Bytes, paths, commands: on one line, in a monospaced font."""
    return element("code", text)


def bullets(items: Iterable[object]) -> Html:
    """A list; an item may be `Html`."""
    return element("ul", *(element("li", item) for item in items))


def table(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """A table; numbers to the right, text in its own direction. A wide one scrolls by itself.

    On a narrow screen each row is a block, its cells one below the other, with the columns' headings before them.

    Args:
        columns: headings.
        rows: cells; text such as ``1,234`` or ``0.5 %`` counts as a number, `Html` never does.
    """
    head = element("tr", *(element("th", column) for column in columns))
    body = [element("tr", *(_cell(cell, head) for cell, head in zip(row, columns, strict=True))) for row in rows]
    return _scrolling(element("table", element("thead", head), element("tbody", *body)))


def facts(pairs: Iterable[tuple[object, object]]) -> Html:
    """A table of two columns without a heading: names and values."""
    rows = (element("tr", element("th", name, scope="row"), element("td", value, dir="auto")) for name, value in pairs)
    return _scrolling(element("table", element("tbody", *rows)))


def alert(*parts: object) -> Html:
    """A highlighted box for what went wrong."""
    return element("p", *parts, class_="alert bad")


def details(summary: object, *parts: object) -> Html:
    """Parts that show when the summary is clicked."""
    return element("details", element("summary", summary), *parts)


def preformatted(text: object) -> Html:
    """Text whose lines and blanks stay as they are; a wide one scrolls by itself."""
    lines = (escape(line.expandtabs()) for line in str(text).splitlines())  # so that no line end shows as an escape
    return _scrolling(element("pre", join(lines, "\n")))


def _scrolling(wide: Html) -> Html:
    return element("div", wide, class_="wide")


def _cell(value: object, head: object) -> Html:
    heading = str(head)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return element("td", f"{value:,}", class_="number", data_head=heading)
    if not isinstance(value, Html) and _NUMBER.fullmatch(str(value)):
        return element("td", value, class_="number", data_head=heading)
    return element("td", value, dir="auto", data_head=heading)


def figure(picture: bytes | Figure, alt: str, caption: object = "") -> Html:
    """A picture with its description.

    Args:
        picture: the bytes of a PNG or a JPEG, or a matplotlib figure.
        alt: says what it shows, for whoever cannot see it.
        caption: below it.

    Raises:
        ValueError: bytes of another format.
    """
    if isinstance(picture, Figure):
        out = io.BytesIO()
        picture.savefig(out, format="png", dpi=_DPI)
        picture = out.getvalue()
    mime = next((mime for start, mime in _MIME.items() if picture.startswith(start)), None)
    if mime is None:
        raise ValueError(f"a figure is a PNG or a JPEG, not {picture[:4]!r}")
    image = Html(f'<img src="data:{mime};base64,{base64.b64encode(picture).decode()}" alt="{escape(alt)}">')
    return element("figure", image, element("figcaption", caption) if caption else Html())


def gallery(figures: Iterable[Html], kind: str = "gallery") -> Html:
    """Figures side by side, as many as fit: pictures (a ``gallery``) or wider ``charts``."""
    return element("div", *figures, class_=kind)


def write(workdir: Path, number: int, name: str, title: str, *parts: object) -> Path:
    """Writes a fragment, all at once, in place of the one of that name.

    Args:
        workdir: the run's folder.
        number: its place in the page, 0 to 99.
        name: letters, digits, ``_`` and ``-``.
        title: in the page and its table of contents.
        parts: what is below the title.

    Raises:
        ValueError: a name that `build` would not find.
        OSError: it cannot be written.
    """
    file = place(workdir, number, name)
    write_text(file, join([element("h2", title), *parts], "\n") + "\n")
    return file


def place(workdir: Path, number: int, name: str) -> Path:
    """The file of a fragment.

    Raises:
        ValueError: a name that `build` would not find.
    """
    file = Path(workdir) / "report" / f"{number:02d}_{name}.html"
    if not _FRAGMENT.fullmatch(file.name):
        raise ValueError(f"a fragment's name is letters, digits, _ and -, not {name!r}")
    return file


def build(workdir: Path, title: str) -> Path:
    """Joins the fragments of ``WORKDIR/report`` into ``WORKDIR/report.html``.

    Args:
        workdir: the run's folder.
        title: of the page.

    Returns:
        The page.

    Raises:
        OSError: it cannot be written.
    """
    contents, sections = [], []
    for file in sorted((Path(workdir) / "report").glob("*.html")):
        if match := _FRAGMENT.fullmatch(file.name):
            text = file.read_text(encoding="utf-8", errors="replace")
            heading = _TITLE.search(text)
            anchor = f"{match[1]}-{match[2]}"
            contents.append(element("a", Html(heading[1]) if heading else match[2], href=f"#{anchor}"))
            sections.append(element("section", Html(text), id=anchor))
    body = join([element("h1", title), element("nav", bullets(contents)), *sections], "\n")
    page = Path(workdir) / "report.html"
    write_text(page, _PAGE.replace("TITLE", escape(title)).replace("STYLE", _STYLE).replace("BODY", body))
    return page


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>TITLE</title>
<style>STYLE</style>
</head>
<body>
BODY
</body>
</html>
"""

_STYLE = """
:root { --ink: #1a1a1a; --faint: #5f6368; --paper: #ffffff; --line: #d5d8dc; --mark: #ffe08a; --bad: #b3261e;
  --c1: #0072b2; --c2: #d55e00; --c3: #009e73; --c4: #1a1a1a; --c5: #b34b8e; --c6: #c99700; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --faint: #a2a7ad; --paper: #16181b; --line: #3b4047; --mark: #6b5200; --bad: #ff8a80;
    --c1: #4aa3e0; --c2: #e8743b; --c3: #2fc79a; --c4: #f5f5f5; --c5: #d78ac2; --c6: #f0d94a; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.35rem; border-bottom: 1px solid var(--line); margin-top: 2.5rem; }
h3 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
a { color: inherit; }
.note, figcaption { color: var(--faint); font-size: 0.875rem; }
.bad { color: var(--bad); font-weight: 600; }
.wide { overflow-x: auto; margin: 0.75rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 0.75rem 0.25rem 0; text-align: start;
  vertical-align: top; overflow-wrap: normal; }
td { min-width: 5.5rem; max-width: 28rem; overflow-wrap: anywhere; }
td.number { min-width: 0; text-align: end; white-space: nowrap; }
code { white-space: nowrap; }
figure { margin: 0.75rem 0; } img { max-width: 100%; height: auto; display: block; }
figure img { background: #ffffff; }
.gallery { display: flex; flex-wrap: wrap; gap: 1rem; }
.gallery figure { flex: 1 1 9rem; max-width: 14rem; min-width: 0; margin: 0; }
mark { background: var(--mark); color: inherit; border-radius: 2px; }
.alert { border: 2px solid var(--bad); border-radius: 6px; padding: 0.6rem 0.9rem; }
h4 { font-size: 0.95rem; margin: 0; } pre { font-size: 0.8rem; margin: 0; } summary { cursor: pointer; }
th[scope] { font-weight: normal; color: var(--faint); white-space: nowrap; }
.nobreak { white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem 1.25rem; }
.charts figure { margin: 0; min-width: 0; } .chart { display: block; width: 100%; height: auto; }
.chart text { font: 11.5px system-ui, sans-serif; fill: var(--faint); } .chart path { fill: none; stroke-width: 1.5; }
.legend { font-size: 0.8rem; color: var(--faint); display: flex; flex-wrap: wrap; gap: 0 0.9rem; }
.swatch::before, .bar { content: ""; display: inline-block; background: var(--key); height: 0.6em; }
.swatch::before { width: 0.9em; margin-inline-end: 0.35em; border-radius: 2px; }
.chart.key { display: inline-block; width: 28px; height: 8px; margin-inline-end: 0.35em; }
@media (max-width: 40rem) {
  thead { display: none; } .wide tbody tr:has(td[data-head]) { display: block; border-bottom: 1px solid var(--line); }
  td[data-head], td[data-head].number { display: block; border: 0; padding: 0 0 0.15rem; text-align: start; }
  td[data-head]:empty { display: none; } th[scope], td code { white-space: normal; overflow-wrap: anywhere; }
  td[data-head]:not([data-head=""])::before { content: attr(data-head) ": "; color: var(--faint); }
}
.words { color: var(--ink); font-size: 0.95rem; margin: 0.25rem 0; }
"""
