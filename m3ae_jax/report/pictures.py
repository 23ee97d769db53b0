"""Pictures for a person: what the model restored, and how the losses fell.

Legend: `H` height, `W` width, in pixels. Needs neither jax nor tensorflow.
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

# All sizes in pixels of the sheet.
_MARGIN = 16
_GAP = 8
_CELL_MIN, _CELL_MAX = 192, 256
_CAPTION_WIDTH = 440
_TEXT_ONLY_WIDTH = 760
_COLUMNS = ("original", "masked", "reconstruction")

UNITS = {
    "loss": "weighted sum of the terms",
    "image_loss": "squared error per pixel value",
    "text_loss": "nats per word",
}
"""Of the losses, by term."""


@dataclasses.dataclass(frozen=True)
class Word:
    """One token of a caption.

    Attributes:
        text: the piece as read; a leading space says that it starts a new word.
        hidden: whether the model had to guess it.
        predicted: the guess, in the same form as `text`; None where nothing was asked.
    """

    text: str
    hidden: bool
    predicted: str | None


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """One example, before and after.

    Attributes:
        original: `[H, W, 3] uint8`, or None (as the next two) in an example without a picture.
        masked: `[H, W, 3] uint8`, the hidden patches blanked.
        restored: `[H, W, 3] uint8`, the model's answer.
        words: the caption's tokens in order; empty in an example without a caption.
    """

    original: np.ndarray | None
    masked: np.ndarray | None
    restored: np.ndarray | None
    words: tuple[Word, ...]


@dataclasses.dataclass(frozen=True)
class _Style:
    ink: str
    paper: str | None = None


_PLAIN = _Style("black")
_RIGHT = _Style("#0b5a1c", "#c8efcf")
_WRONG = _Style("#a01010", "#ffd6d2")
_UNASKED = _Style("#5c4a00", "#fff0b0")
_FAINT = _Style("#666666")


@dataclasses.dataclass(frozen=True)
class _Chip:
    """A stretch of text in one style; `starts_word` puts a space before it and allows a line to end there."""

    text: str
    style: _Style
    starts_word: bool = True


@dataclasses.dataclass(frozen=True)
class _Flow:
    """Chips laid out in lines: `placed` holds (x, y, chip) from the top left corner; `height` in pixels."""

    placed: tuple[tuple[float, int, _Chip], ...]
    font: ImageFont.FreeTypeFont
    height: int

    def draw(self, draw: ImageDraw.ImageDraw, left: int, top: int) -> int:
        """Draws with the top left corner at (left, top) and returns the y below it."""
        ascent, descent = self.font.getmetrics()
        for x, y, chip in self.placed:
            x, y = x + left, y + top
            if chip.style.paper is not None:
                right = x + self.font.getlength(chip.text)
                draw.rounded_rectangle((x - 2, y - 1, right + 2, y + ascent + descent + 1), 3, chip.style.paper)
            draw.text((x, y), chip.text, chip.style.ink, self.font)
        return top + self.height


def reconstruction_sheet(rows: Sequence[Reconstruction], title: str) -> Image.Image:
    """Draws one row an example: original, masked and restored picture, and the caption with its guesses.

    A column that no example has (pictures or captions) is left out. Small pictures are enlarged to at least
    192 pixels, large ones reduced to at most 256. A character that the font lacks is shown as `\\uXXXX`.

    Args:
        rows: the examples, top to bottom; with none the sheet says so.
        title: the heading, wrapped where it is long.

    Returns:
        An RGB picture as wide as its columns and as high as its rows.
    """
    cell = _cell_size(rows)
    pictures_width = len(_COLUMNS) * (cell + _GAP) if cell else 0
    has_words = any(row.words for row in rows)
    caption_width = (_CAPTION_WIDTH if cell else _TEXT_ONLY_WIDTH) if has_words or not cell else 0
    width = pictures_width + caption_width

    heading = _flow([_Chip(word, _PLAIN) for word in title.split()], _font(20, bold=True), width)
    legend = _flow(_legend(rows), _font(13), width)
    captions = [_flow(_caption(row), _font(16), caption_width or width) for row in rows]
    heights = [max(cell, caption.height) for caption in captions]
    columns_height = 22 if rows else 0
    height = heading.height + legend.height + columns_height + sum(h + _MARGIN for h in heights) + 4 * _GAP
    sheet = Image.new("RGB", (width + 2 * _MARGIN, height + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)

    y = heading.draw(draw, _MARGIN, _MARGIN) + _GAP
    y = legend.draw(draw, _MARGIN, y) + 2 * _GAP
    if rows:
        _column_headings(draw, y, cell, has_words)
    y += columns_height
    for row, caption, row_height in zip(rows, captions, heights, strict=True):
        if cell:
            _paste_pictures(sheet, row, y, cell)
        if caption_width:
            caption.draw(draw, _MARGIN + pictures_width + (_GAP if cell else 0), y)
        y += row_height + _MARGIN
    return sheet


def curves(rows: Sequence[Mapping[str, float]], path: str | Path, title: str) -> None:
    """Draws a run's loss curves, one panel a term, and writes them to a file.

    A term is what follows the slash in `train/<term>` or `val/<term>` and ends in `loss`. A row need not have
    every key. The last `prior/<term>` is drawn as a dashed line: the loss of a model that ignores its input.

    Args:
        rows: metric rows, each with `step`; other keys are ignored.
        path: where to write; the suffix names the format (`.png`, `.svg`).
        title: the heading, wrapped where it is long.

    Raises:
        OSError: the file cannot be written.
    """
    terms = loss_terms(key for row in rows for key in row)
    count = max(len(terms), 1)
    across = min(count, 3)
    down = -(-count // across)
    lines = textwrap.wrap(title, 46 * across) or [""]
    figure = Figure((4.6 * across, 3.4 * down + 0.3 * len(lines)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    # A title is a person's words: a dollar sign in it starts no formula.
    figure.suptitle("\n".join(lines), fontsize=12, parse_math=False)
    if not terms:
        figure.text(0.5, 0.5, "no losses logged yet", ha="center", color="#666666")
    for i, term in enumerate(terms):
        _panel(figure.add_subplot(down, across, i + 1), rows, term)
    figure.savefig(path)


def loss_terms(names: Iterable[str]) -> list[str]:
    """The loss terms among figures' names, the total first, the others in order of appearance."""
    found: dict[str, None] = {}
    for name in names:
        split, _, term = name.partition("/")
        if split in ("train", "val") and term.endswith("loss") and "/" not in term:  # TERM/NAME: of one source
            found[term] = None
    return sorted(found, key=lambda term: term != "loss")


def _panel(axes: Axes, rows: Sequence[Mapping[str, float]], term: str) -> None:
    """One term's curves on its own axes."""
    for split, colour in (("train", "#1f77b4"), ("val", "#d95f02")):
        key = f"{split}/{term}"
        steps = [row["step"] for row in rows if key in row]
        values = [row[key] for row in rows if key in row]
        if steps:
            # A line of a few points, or of one, is seen by its markers alone.
            marker = "o" if len(steps) <= 30 else ""
            axes.plot(steps, values, color=colour, marker=marker, markersize=3, linewidth=1.3, label=split)
    priors = [row[f"prior/{term}"] for row in rows if f"prior/{term}" in row]
    if priors:
        axes.axhline(priors[-1], color="#444444", linestyle="--", linewidth=1, label="prior")
    axes.set_title(term.replace("_", " "), fontsize=10, parse_math=False)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set_ylabel(UNITS.get(term, "loss"))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _cell_size(rows: Sequence[Reconstruction]) -> int:
    """Side in pixels of the square that holds one picture; 0 where no example has a picture."""
    pictures = [p for row in rows for p in (row.original, row.masked, row.restored) if p is not None]
    if not pictures:
        return 0
    return min(max(_CELL_MIN, *(side for p in pictures for side in p.shape[:2])), _CELL_MAX)


def _fit(picture: np.ndarray, cell: int) -> Image.Image:
    """`[H, W, 3] uint8` scaled so that the longer side is `cell` pixels."""
    height, width = picture.shape[:2]
    longer = max(height, width)
    size = (max(1, round(width * cell / longer)), max(1, round(height * cell / longer)))
    # Whole multiples show each pixel as it is; other ratios would make nearest neighbours uneven.
    method = Image.Resampling.NEAREST if cell % longer == 0 else Image.Resampling.BICUBIC
    return Image.fromarray(picture).resize(size, method)


def _paste_pictures(sheet: Image.Image, row: Reconstruction, y: int, cell: int) -> None:
    """Puts a row's pictures in their columns; an absent one is a grey outline."""
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate((row.original, row.masked, row.restored)):
        x = _MARGIN + i * (cell + _GAP)
        if picture is None:
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline="#dddddd")
            draw.text((x + cell / 2, y + cell / 2), "no picture", "#999999", _font(13), anchor="mm")
        else:
            fitted = _fit(picture, cell)
            sheet.paste(fitted, (x + (cell - fitted.width) // 2, y))


def _column_headings(draw: ImageDraw.ImageDraw, y: int, cell: int, has_words: bool) -> None:
    """The line that names the columns."""
    left = _MARGIN
    if cell:
        for name in _COLUMNS:
            draw.text((left, y), name, "#444444", _font(13, bold=True))
            left += cell + _GAP
        left += _GAP
    if has_words:
        draw.text((left, y), "caption", "#444444", _font(13, bold=True))


def _legend(rows: Sequence[Reconstruction]) -> list[_Chip]:
    """What the colours mean, each said in its own; only those that occur."""
    if not rows:
        return [_Chip("no examples", _FAINT)]
    says = {
        _PLAIN: "visible word",
        _RIGHT: "hidden, predicted right",
        _WRONG: "hidden, predicted wrong: true→predicted",
        _UNASKED: "hidden, not predicted",
    }
    used = {chip.style for row in rows for chip in _caption(row)}
    chips = [_Chip(text, style) for style, text in says.items() if style in used]
    # Words of a legend entry stay together; the faint bar keeps neighbours apart.
    return [part for chip in chips for part in (chip, _Chip("|", _FAINT))][:-1]


def _caption(row: Reconstruction) -> list[_Chip]:
    """The caption as chips: visible words plain, hidden ones coloured by the guess."""
    if not row.words:
        return [_Chip("no caption", _FAINT)]
    return [_word_chip(word) for word in row.words]


def _word_chip(word: Word) -> _Chip:
    """A token in the style of its fate."""
    starts = word.text.startswith(" ")
    text = word.text.strip()
    if not word.hidden:
        return _Chip(text, _PLAIN, starts)
    if word.predicted is None:
        return _Chip(text or "▁", _UNASKED, starts)
    if word.predicted == word.text:
        return _Chip(text or "▁", _RIGHT, starts)
    guess = word.predicted.strip()
    if guess == text:
        # They differ in the leading space alone: show it, as SentencePiece writes it.
        text, guess = (side.rstrip().replace(" ", "▁") for side in (word.text, word.predicted))
    return _Chip(f"{text or '▁'}→{guess or '▁'}", _WRONG, starts)


def _flow(chips: Sequence[_Chip], font: ImageFont.FreeTypeFont, width: int) -> _Flow:
    """Lays chips out in lines of at most `width` pixels, breaking inside a word only where it must."""
    ascent, descent = font.getmetrics()
    line_height = ascent + descent + 8
    space = font.getlength(" ")
    x, y = 0.0, 0
    placed: list[tuple[float, int, _Chip]] = []
    for word in _words(chips):
        drawn = [dataclasses.replace(chip, text=_drawable(chip.text)) for chip in word]
        x += space if x and word[0].starts_word else 0
        if x and x + _word_length(drawn, font) > width:
            x, y = 0.0, y + line_height
        for chip in drawn:
            pad = _pad(chip)
            for part in _pieces(chip.text, font, width - 2 * pad):
                length = font.getlength(part) + 2 * pad
                if x and x + length > width:
                    x, y = 0.0, y + line_height
                placed.append((x + pad, y, dataclasses.replace(chip, text=part)))
                x += length
    return _Flow(tuple(placed), font, y + line_height if placed else 0)


def _word_length(word: Sequence[_Chip], font: ImageFont.FreeTypeFont) -> float:
    """Pixels that a word takes in a line."""
    return sum(font.getlength(chip.text) + 2 * _pad(chip) for chip in word)


def _pad(chip: _Chip) -> int:
    """Pixels on each side of a chip: its background needs room."""
    return 3 if chip.style.paper else 0


def _words(chips: Sequence[_Chip]) -> Iterator[list[_Chip]]:
    """Groups chips into words: each group starts where a word starts."""
    word: list[_Chip] = []
    for chip in chips:
        if chip.starts_word and word:
            yield word
            word = []
        word.append(chip)
    if word:
        yield word


def _pieces(text: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    """Cuts a text that is wider than a line into parts that are not."""
    while font.getlength(text) > width and len(text) > 1:
        end = next(n for n in range(len(text) - 1, 0, -1) if n == 1 or font.getlength(text[:n]) <= width)
        yield text[:end]
        text = text[end:]
    yield text


def _drawable(text: str) -> str:
    """The text with every character that the font lacks written as an escape."""
    known = _characters()
    return "".join(c if ord(c) in known else c.encode("unicode_escape").decode("ascii") for c in text)


def _font_file(bold: bool = False) -> Path:
    """DejaVu Sans as matplotlib ships it: the same on every machine."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"


@functools.cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_font_file(bold)), size)


@functools.cache
def _characters() -> frozenset[int]:
    """Code points that the font can draw."""
    return frozenset(FT2Font(str(_font_file())).get_charmap())
