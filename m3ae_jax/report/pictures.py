"""Pictures for people: reconstructions, attention maps, maps of classes, and loss curves.

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
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps

from m3ae_jax.report.charts import Series, collect

# All sizes in pixels of the sheet.
_MARGIN = 16
_GAP = 8
_CELL_MIN, _CELL_MAX = 192, 256
_CAPTION_WIDTH = 440
_TEXT_ONLY_WIDTH = 760
_COLUMNS = ("original", "masked", "reconstruction")
_RATIO_CELL = 192  # five of them fill a page
_ATTENTION_CELL, _ATTENTION_WORDS = 224, 300
_STRIPES = (96, 224)  # of what is hidden, dark and light
_HEAT = "YlOrRd"  # pale to dark: it reads in grey too

OWN_STATISTICS = (
    "The model restores patches normalised by their own mean and deviation: each restored patch is shown with the mean "
    "and deviation of the true one, which the model did not find out."
)
"""What to know of pictures of a model with normalised patches."""

UNITS = {
    "loss": "weighted sum of the terms",
    "image_loss": "squared error per pixel value",
    "text_loss": "nats per word",
}
"""The units of the losses, by term."""


@dataclasses.dataclass(frozen=True)
class Word:
    """One token of a caption.

    Attributes:
        text: the piece as read; a leading space says that it starts a new word.
        hidden: whether the model had to guess it.
        predicted: the guess, in the same form as `text`; None where the model predicted nothing.
    """

    text: str
    hidden: bool
    predicted: str | None


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """One example, before and after reconstruction.

    Attributes:
        original: `[H, W, 3] uint8`, or None (as the next two) in an example without a picture.
        masked: `[H, W, 3] uint8`, the hidden patches `hatched`; None too where all are hidden.
        restored: `[H, W, 3] uint8`, as the model reconstructs it.
        words: the caption's tokens in order; empty in an example without a caption.
    """

    original: np.ndarray | None
    masked: np.ndarray | None
    restored: np.ndarray | None
    words: tuple[Word, ...]


@dataclasses.dataclass(frozen=True)
class Attended:
    """A picture with its caption, and the attention between them.

    Attributes:
        picture: `[S, S, 3] uint8`.
        grid: rows and columns of patches.
        words: of the caption, in order.
        patch: number of the marked patch, row by row.
        to_words: `[W] float`, how the marked patch's attention to words is shared out; the sum is 1.
        to_patches: by word (its number), `[L] float`, how its attention to patches is shared out.
    """

    picture: np.ndarray
    grid: tuple[int, int]
    words: tuple[str, ...]
    patch: int
    to_words: np.ndarray
    to_patches: Mapping[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ClassMap:
    """Examples in the plane.

    Attributes:
        title: above the map.
        places: `[n, 2] float`.
        label: `[n] int`, the number of each one's class.
    """

    title: str
    places: np.ndarray
    label: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Style:
    ink: str
    paper: str | None = None


_PLAIN = _Style("black")
_RIGHT = _Style("#0b5a1c", "#c8efcf")
_WRONG = _Style("#a01010", "#ffd6d2")
_NOT_PREDICTED = _Style("#5c4a00", "#fff0b0")
_FAINT = _Style("#666666")
_HEADING = _Style("#444444")


@dataclasses.dataclass(frozen=True)
class _Chip:
    """A stretch of text in one style; `starts_word` puts a space before it and allows a line to end there."""

    text: str
    style: _Style
    starts_word: bool = True

    @property
    def padding(self) -> int:
        """Pixels on each side: a background needs room."""
        return 3 if self.style.paper else 0

    def width(self, font: ImageFont.FreeTypeFont) -> float:
        """Pixels in a line."""
        return font.getlength(self.text) + 2 * self.padding


@dataclasses.dataclass(frozen=True)
class _Flow:
    """Chips laid out in lines: `placed` holds (x, y, chip) from the top left corner; `height` in pixels."""

    placed: tuple[tuple[float, int, _Chip], ...]
    font: ImageFont.FreeTypeFont
    height: int

    def draw(self, draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
        """Draws with the top left corner at (left, top)."""
        line_height = sum(self.font.getmetrics())
        for x, y, chip in self.placed:
            x, y = x + left, y + top
            if chip.style.paper is not None:
                right = x + self.font.getlength(chip.text)
                draw.rounded_rectangle((x - 2, y - 1, right + 2, y + line_height + 1), 3, chip.style.paper)
            draw.text((x, y), chip.text, chip.style.ink, self.font)


_Block = Image.Image | _Flow
"""Something in a column."""


def hatched(height: int, width: int, patch: int) -> np.ndarray:
    """What stands for hidden patches: `[H, W, 3] uint8`, dark and light diagonal stripes, which no picture looks like.

    Args:
        height: of the whole picture.
        width: likewise.
        patch: side of a patch, in pixels; four stripes cross it.
    """
    y, x = np.indices((height, width))
    light = (x + y) // max(patch // 4, 1) % 2 == 1
    return np.repeat(np.where(light, _STRIPES[1], _STRIPES[0]).astype(np.uint8)[..., None], 3, axis=-1)


def reconstruction_sheet(rows: Sequence[Reconstruction], title: str, note: str = "") -> Image.Image:
    """Draws one row an example: original, masked and restored picture, and the caption with its guesses.

    A column that no example has (a picture of some kind, captions) is left out. Small pictures are enlarged to at least
    192 pixels, large ones reduced to at most 256. A character that the font lacks is shown as `\\uXXXX`.

    Args:
        rows: the examples, top to bottom; with none the sheet says so.
        title: the heading, wrapped where it is long.
        note: what else to know, likewise.

    Returns:
        An RGB picture as wide as its columns and as high as its rows.
    """
    cell = _cell_size(rows)
    pictures = [(row.original, row.masked, row.restored) for row in rows]
    shown = [n for n in range(len(_COLUMNS)) if any(of[n] is not None for of in pictures)]
    names, widths = [_COLUMNS[n] for n in shown], [cell] * len(shown)
    if not cell or any(row.words for row in rows):
        names.append("caption")
        widths.append(_CAPTION_WIDTH if cell else _TEXT_ONLY_WIDTH)
    grid = [_headings(names, widths)] if rows else []
    for row, of in zip(rows, pictures, strict=True):
        columns: list[list[_Block]] = []
        for one in (of[n] for n in shown):
            columns.append([_no_picture(cell) if one is None else _fit(one, cell)])
        if len(columns) < len(widths):
            columns.append([_flow(_caption(row), _font(16), widths[-1])])
        grid.append(columns)
    return _grid(title, [*_noted(note, sum(widths)), _legend(rows, sum(widths))], widths, grid)


def ratio_sheet(examples: Sequence[Mapping[float, Reconstruction]], title: str, note: str = "") -> Image.Image:
    """Draws one row an example: the original, and beside it what was masked and restored at each mask ratio.

    Args:
        examples: each restored at the same ratios.
        title: the heading, wrapped where it is long.
        note: what else to know, likewise.

    Returns:
        An RGB picture; 1,024 pixels wide of four ratios.
    """
    everything = [one for example in examples for one in example.values()]
    ratios = list(examples[0]) if examples else []
    widths = [_RATIO_CELL] * max(1 + len(ratios), 3)
    names = ["original", *(f"{ratio:.0%} hidden" for ratio in ratios)]
    rows = [_headings(names, widths)] if examples else []
    for example in examples:
        first = next(iter(example.values()))
        visible = tuple(dataclasses.replace(word, hidden=False) for word in first.words)
        original = _restored_stack(dataclasses.replace(first, words=visible), (first.original,))
        rows.append([original, *(_restored_stack(one, (one.masked, one.restored)) for one in example.values())])
    return _grid(title, [*_noted(note, sum(widths)), _legend(everything, sum(widths))], widths, rows)


def attention_sheet(rows: Sequence[Attended], title: str, note: str) -> Image.Image:
    """Draws one row a pair: the marked patch, what some words attend to, and which words the patch attends to.

    Colours run from nothing to the largest share of a panel, which is written above it.

    Args:
        rows: the pairs, top to bottom.
        title: the heading, wrapped where it is long.
        note: how to read it, likewise.

    Returns:
        An RGB picture; 1,028 pixels wide with two words a pair.
    """
    words = max((len(row.to_patches) for row in rows), default=0)
    widths = [_ATTENTION_CELL] * (1 + words) + [_ATTENTION_WORDS]
    legend = [_line(note, 13, sum(widths)), _scale(sum(widths))]
    return _grid(title, legend, widths, [_attention_row(row, words) for row in rows])


def class_maps(maps: Sequence[ClassMap], classes: Sequence[str], title: str) -> np.ndarray:
    """Draws examples in the plane, a panel a map, with the same colour for a class in all of them.

    Args:
        maps: side by side.
        classes: their names, by number, at most ten.
        title: the heading, wrapped where it is long.

    Returns:
        `[H, W, 3] uint8`, 1,000 pixels wide of two maps.
    """
    down = -(-len(classes) // 5)
    figure, panels = figure_of_panels(title, len(maps), len(maps), (5.0, 5.0 + 0.25 * down), dpi=100)
    # The solver's result varies by a pixel or two from process to process: room for that at the edges.
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    canvas = FigureCanvasAgg(figure)
    styles = list(zip(matplotlib.color_sequences["tab10"], "os^Dv" * 2, strict=True))
    for axes, one in zip(panels, maps, strict=True):
        axes.set_title(_drawable(one.title), fontsize=10, parse_math=False)
        axes.set(xticks=[], yticks=[])  # only nearness means something in such a map
        for label, (colour, marker) in enumerate(styles[: len(classes)]):
            x, y = one.places[one.label == label].T
            axes.scatter(x, y, s=16, color=colour, marker=marker, alpha=0.75, linewidths=0)
    handles = [Line2D([], [], color=colour, marker=marker, linestyle="") for colour, marker in styles[: len(classes)]]
    legend = figure.legend(
        handles, ["name"] * len(handles), loc="outside lower center", ncols=min(len(classes), 5), fontsize=9
    )
    for text, name in zip(legend.get_texts(), classes, strict=True):  # afterwards: a name may begin with an underscore
        text.set_parse_math(False)
        text.set_text(_drawable(name if len(name) <= 20 else name[:19] + "…"))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


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
    series = collect(rows)
    terms = loss_terms(series)
    figure, panels = figure_of_panels(title, len(terms), 3, (4.6, 3.4))
    if not terms:
        figure.text(0.5, 0.5, "no losses logged yet", ha="center", color="#666666")
    for axes, term in zip(panels, terms, strict=True):
        _panel(axes, series, term)
    figure.savefig(path)


def figure_of_panels(
    title: str, count: int, across: int, size: tuple[float, float], *, dpi: int = 110
) -> tuple[Figure, list[Axes]]:
    """Makes an empty figure of several panels under one heading.

    Args:
        title: the heading, wrapped where it is long.
        count: of the panels.
        across: at most so many side by side.
        size: width and height of a panel in inches.
        dpi: pixels per inch.

    Returns:
        The figure and its panels' axes, row by row.
    """
    width, height = size
    across = max(min(count, across), 1)
    down = max(-(-count // across), 1)
    lines = textwrap.wrap(title, int(10 * width * across)) or [""]
    figure = Figure((width * across, height * down + 0.3 * len(lines)), dpi=dpi, layout="constrained")
    # A title is a person's words: a dollar sign in it starts no formula.
    figure.suptitle("\n".join(map(_drawable, lines)), fontsize=12, parse_math=False)
    return figure, [figure.add_subplot(down, across, number) for number in range(1, count + 1)]


def loss_terms(names: Iterable[str]) -> list[str]:
    """The loss terms among figures' names, the total first, the others in order of appearance."""
    parts = [name.partition("/") for name in names]
    # TERM/NAME is the loss of one source.
    terms = [t for split, _, t in parts if split in ("train", "val") and t.endswith("loss") and "/" not in t]
    return sorted(dict.fromkeys(terms), key=lambda term: term != "loss")


def _panel(axes: Axes, series: Mapping[str, Series], term: str) -> None:
    """Draws one term's curves on its own axes."""
    for split, colour in (("train", "#1f77b4"), ("val", "#d95f02")):
        if line := series.get(f"{split}/{term}"):
            # A line of a few points, or of one, is seen by its markers alone.
            marker = "o" if len(line.steps) <= 30 else ""
            axes.plot(line.steps, line.values, color=colour, marker=marker, markersize=3, linewidth=1.3, label=split)
    if prior := series.get(f"prior/{term}"):
        axes.axhline(prior.last, color="#444444", linestyle="--", linewidth=1, label="prior")
    axes.set_title(term.replace("_", " "), fontsize=10, parse_math=False)
    axes.set(xlabel="step", ylabel=UNITS.get(term, "loss"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _cell_size(rows: Sequence[Reconstruction]) -> int:
    """Side in pixels of the square that holds one picture; 0 where no example has a picture."""
    pictures = [p for row in rows for p in (row.original, row.masked, row.restored) if p is not None]
    sides = [side for picture in pictures for side in picture.shape[:2]]
    return min(max(_CELL_MIN, *sides), _CELL_MAX) if sides else 0


def _fit(picture: np.ndarray, cell: int) -> Image.Image:
    """`[H, W, 3] uint8` scaled so that the longer side is `cell` pixels."""
    # Whole multiples show each pixel as it is; other ratios would make nearest neighbours uneven.
    whole = cell % max(picture.shape[:2]) == 0
    method = Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC
    return ImageOps.contain(Image.fromarray(picture), (cell, cell), method)


def _no_picture(cell: int) -> Image.Image:
    """What stands in the place of an absent picture: a grey outline."""
    outline = ImageOps.expand(Image.new("RGB", (cell - 2, cell - 2), "white"), border=1, fill="#dddddd")
    ImageDraw.Draw(outline).text((cell / 2, cell / 2), "no picture", "#999999", _font(13), anchor="mm")
    return outline


def _grid(
    title: str, legend: Sequence[_Block], widths: Sequence[int], rows: Sequence[Sequence[Sequence[_Block]]]
) -> Image.Image:
    """A heading, a legend, and rows of columns in each of which blocks stand upon each other."""
    width = sum(widths) + _GAP * (len(widths) - 1)
    top = [_line(title, 20, width, bold=True), *legend]
    heights = [max(map(_stack_height, row)) for row in rows]
    height = _stack_height(top) + _GAP + sum(h + _GAP for h in heights)
    sheet = Image.new("RGB", (width + 2 * _MARGIN, height + 2 * _MARGIN), "white")
    y = _put_stack(sheet, top, _MARGIN, _MARGIN) + _GAP
    for row, row_height in zip(rows, heights, strict=True):
        x = _MARGIN
        for stack, column in zip(row, widths, strict=False):
            _put_stack(sheet, stack, x, y)
            x += column + _GAP
        y += row_height + _GAP
    return sheet


def _stack_height(stack: Sequence[_Block]) -> int:
    return sum(block.height + _GAP for block in stack)


def _put_stack(sheet: Image.Image, stack: Sequence[_Block], x: int, y: int) -> int:
    """Draws blocks from (x, y) downwards and returns the y below them."""
    for block in stack:
        if isinstance(block, _Flow):
            block.draw(ImageDraw.Draw(sheet), x, y)
        else:
            sheet.paste(block, (x, y))
        y += block.height + _GAP
    return y


def _line(text: str, size: int, width: int, *, bold: bool = False) -> _Flow:
    """Plain words, in lines of at most `width` pixels."""
    return _flow([_Chip(word, _PLAIN) for word in text.split()], _font(size, bold=bold), width)


def _noted(note: str, width: int) -> list[_Block]:
    return [_line(note, 13, width)] if note else []


def _headings(names: Sequence[str], widths: Sequence[int]) -> list[list[_Block]]:
    """The row that names the columns."""
    font = _font(13, bold=True)
    return [[_flow([_Chip(name, _HEADING)], font, width)] for name, width in zip(names, widths, strict=False)]


def _restored_stack(one: Reconstruction, pictures: Sequence[np.ndarray | None]) -> list[_Block]:
    """Pictures, and below them the caption."""
    stack: list[_Block] = [_fit(picture, _RATIO_CELL) for picture in pictures if picture is not None]
    return [*stack, _flow(_caption(one), _font(13), _RATIO_CELL)] if one.words else stack


def _attention_row(row: Attended, words: int) -> list[list[_Block]]:
    """The columns of a pair: marked picture, heat maps, caption."""
    columns: list[list[_Block]] = [[_line("marked patch", 13, _ATTENTION_CELL, bold=True), _marked(row)]]
    for word, share in row.to_patches.items():
        name = row.words[word]
        heading = f"“{name if len(name) <= 14 else name[:13] + '…'}”: at most {share.max():.1%}"
        columns.append([_line(heading, 13, _ATTENTION_CELL, bold=True), heated(row.picture, share, row.grid)])
    columns += [[]] * (words - len(row.to_patches))
    heading = f"marked patch to words: at most {row.to_words.max():.1%}"
    shares = _relative_to_largest(row.to_words)
    chips = [_heated_chip(word, share) for word, share in zip(row.words, shares, strict=True)]
    columns.append([_line(heading, 13, _ATTENTION_WORDS, bold=True), _flow(chips, _font(16), _ATTENTION_WORDS)])
    return columns


def heated(picture: np.ndarray, share: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """A picture in grey under the colours of what its patches get, the largest share the darkest.

    Args:
        picture: `[S, S, 3] uint8`.
        share: `[L] float`, of its patches, row by row.
        grid: rows and columns of patches.
    """
    grey = ImageOps.autocontrast(_fit(picture, _ATTENTION_CELL).convert("L"))
    colours = _colours(_relative_to_largest(share)).reshape(*grid, 3)
    heat = np.asarray(Image.fromarray(colours).resize(grey.size, Image.Resampling.NEAREST)) / 255
    light = 0.7 + 0.3 * np.asarray(grey)[..., None] / 255  # outlines are seen, and colours are still those of the scale
    return Image.fromarray(np.round(heat * light * 255).astype(np.uint8))


def _marked(row: Attended) -> Image.Image:
    """The picture with a frame around the marked patch, white within black: one of them is seen."""
    marked = _fit(row.picture, _ATTENTION_CELL)
    y, x = divmod(row.patch, row.grid[1])
    high, wide = marked.height / row.grid[0], marked.width / row.grid[1]
    left, top, right, bottom = x * wide, y * high, (x + 1) * wide - 1, (y + 1) * high - 1
    draw = ImageDraw.Draw(marked)
    draw.rectangle((left, top, right, bottom), outline="black", width=2)
    draw.rectangle((left + 2, top + 2, right - 2, bottom - 2), outline="white", width=2)
    return marked


def _relative_to_largest(share: np.ndarray) -> np.ndarray:
    return np.asarray(share / max(float(share.max()), 1e-30))


def _colours(values: np.ndarray) -> np.ndarray:
    """`[..., 3] uint8`, of values in [0, 1]."""
    rgba = np.asarray(matplotlib.colormaps[_HEAT](np.asarray(values, np.float64)))
    return np.round(rgba[..., :3] * 255).astype(np.uint8)


def _heated_chip(word: str, value: float) -> _Chip:
    colour = _colours(np.array(value))
    light = colour @ (0.299, 0.587, 0.114) > 128
    return _Chip(word, _Style("black" if light else "white", f"#{colour.tobytes().hex()}"))


def _scale(width: int) -> _Flow:
    """What the colours mean."""
    swatches = [_heated_chip("  ", share) for share in np.linspace(0, 1, 11)]
    text = "the panel's largest share, written above it"
    return _flow([_Chip("0", _PLAIN), *swatches, _Chip(text, _PLAIN)], _font(13), width)


def _legend(rows: Sequence[Reconstruction], width: int) -> _Flow:
    """What the colours mean, each written in its own; only those that occur."""
    meanings = {
        _PLAIN: "visible word",
        _RIGHT: "hidden, predicted right",
        _WRONG: "hidden, predicted wrong: true→predicted",
        _NOT_PREDICTED: "hidden, not predicted",
    }
    used = {chip.style for row in rows for chip in _caption(row)}
    chips = [_Chip(text, style) for style, text in meanings.items() if style in used]
    # Words of a legend entry stay together; the faint bar separates neighbours.
    parts = [part for chip in chips for part in (chip, _Chip("|", _FAINT))][:-1]
    return _flow(parts if rows else [_Chip("no examples", _FAINT)], _font(13), width)


def _caption(row: Reconstruction) -> list[_Chip]:
    """The caption as chips: visible words plain, hidden ones coloured by the guess."""
    return [_word_chip(word) for word in row.words] or [_Chip("no caption", _FAINT)]


def _word_chip(word: Word) -> _Chip:
    """A token in the style that says how it was predicted."""
    starts = word.text.startswith(" ")
    text = word.text.strip()
    if not word.hidden:
        return _Chip(text, _PLAIN, starts)
    if word.predicted is None:
        return _Chip(text or "▁", _NOT_PREDICTED, starts)
    if word.predicted == word.text:
        return _Chip(text or "▁", _RIGHT, starts)
    guess = word.predicted.strip()
    if guess == text:
        # They differ in the leading space alone: show it, as SentencePiece writes it.
        text, guess = (side.rstrip().replace(" ", "▁") for side in (word.text, word.predicted))
    return _Chip(f"{text or '▁'}→{guess or '▁'}", _WRONG, starts)


def _flow(chips: Sequence[_Chip], font: ImageFont.FreeTypeFont, width: int) -> _Flow:
    """Lays chips out in lines of at most `width` pixels, breaking inside a word only where it must."""
    line_height = sum(font.getmetrics()) + 8
    space = font.getlength(" ")
    x, y = 0.0, 0
    placed: list[tuple[float, int, _Chip]] = []
    for word in _words(chips):
        drawn = [dataclasses.replace(chip, text=_drawable(chip.text)) for chip in word]
        x += space if x and word[0].starts_word else 0
        if x and x + sum(chip.width(font) for chip in drawn) > width:
            x, y = 0.0, y + line_height
        for chip in drawn:
            for text in _pieces(chip.text, font, width - 2 * chip.padding):
                piece = dataclasses.replace(chip, text=text)
                if x and x + piece.width(font) > width:
                    x, y = 0.0, y + line_height
                placed.append((x + piece.padding, y, piece))
                x += piece.width(font)
    return _Flow(tuple(placed), font, y + line_height if placed else 0)


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


@functools.cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: the same on every machine."""
    name = f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


@functools.cache
def _characters() -> frozenset[int]:
    """Code points that the font can draw."""
    return frozenset(FT2Font(str(_font(16).path)).get_charmap())
