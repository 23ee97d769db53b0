"""Charts of a run's metrics, drawn as SVG within the page.

A picture by matplotlib takes a tenth of a second and more, one of these some milliseconds: a run can afford a page of
them while it trains. They follow the page's light and dark theme, and their text stays text. Lengths are in units of
the drawing, about a pixel each.

Legend: `N` points of a line, `S` steps.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from m3ae_jax.report import page
from m3ae_jax.report.page import Html

_WIDTH, _HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 26, 20, 32
_POINTS = 600  # of a line: more than one a unit of the width does not show
# Hues that are told apart without red, green or blue cones too; of 16 lines each has its own hue and dash.
_HUES = tuple(f"var(--c{number})" for number in range(1, 5))
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_LEVEL = "5 4"
_AREAS = tuple(f"var(--c{number})" for number in (1, 2, 3, 5, 6, 4))
_MOST = 1e300  # what is greater counts as not finite: an axis to it would overflow
_FEW = 30  # points that also get dots: a line of one is seen by them alone


@dataclasses.dataclass(frozen=True)
class Series:
    """One metric over a run.

    Attributes:
        steps: `[N] int64`, rising.
        values: `[N] float64`; NaN where it was not finite.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        """The newest value, NaN or not."""
        return float(self.values[-1])

    @property
    def total(self) -> float:
        """The sum of a metric that counts in each interval."""
        return float(np.nansum(self.values))

    def scaled(self, by: float) -> Series:
        """The same series in another unit."""
        return Series(self.steps, self.values * by)


@dataclasses.dataclass(frozen=True)
class Line:
    """A series with a name.

    Attributes:
        label: in the legend.
        series: its points.
        colour: in CSS syntax; "" for one that, with the dash, differs from the chart's other lines.
        dash: lengths of strokes and gaps as SVG has them; "" for a solid line.
    """

    label: str
    series: Series
    colour: str = ""
    dash: str = ""


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Maps values from `low` to `high` onto the drawing, from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, values: np.ndarray | float) -> np.ndarray:
        scale = np.log if self.log else np.asarray
        return np.interp(scale(values), scale([self.low, self.high]), [self.start, self.end])

    def ticks(self, *, whole: bool = False) -> list[float]:
        if self.log:
            return _log_ticks(self.low, self.high)
        ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1).tick_values(self.low, self.high)
        inside = [float(tick) for tick in ticks if self.low <= tick <= self.high]
        return [0.0 if abs(tick) < 1e-12 * self.high else tick for tick in inside]


def collect(rows: Iterable[Mapping[str, object]]) -> dict[str, Series]:
    """The series of every metric in a list of rows, each with the steps at which it was logged.

    Args:
        rows: in order of steps, each with ``step``; values that are not numbers are left out.
    """
    points: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    for row in rows:
        step = row["step"]
        assert isinstance(step, int)
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                points[name].append((step, float(value)))
    series = {}
    for name, pairs in points.items():
        steps, values = map(np.array, zip(*pairs, strict=True))
        series[name] = Series(steps, np.where(np.abs(values) < _MOST, values, math.nan))
    return series


def short(value: float) -> str:
    """Formats a number in about four digits."""
    if not math.isfinite(value):
        return "not finite"
    return _formatted(value, 4)


def chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    level: tuple[str, float] | None = None,
    skipped: Sequence[int] = (),
    log_from: float = math.inf,
    from_zero: bool = False,
) -> Html:
    """Draws lines over the step.

    Args:
        title: above.
        unit: of the values.
        lines: at least one. What is not finite is a cross at the upper edge.
        level: name and value of a dashed line across.
        skipped: steps that get a stroke at the lower edge.
        log_from: the axis is logarithmic if the values are positive and the greatest is so many times the least.
        from_zero: the axis begins at 0, so that a ripple of a great value looks like one.
    """
    lines = _distinct(lines)
    levels = [level[1]] if level and math.isfinite(level[1]) else []
    x = _steps_axis(lines)
    y = _values_axis(np.concatenate([*(line.series.values for line in lines), levels, [0.0] * from_zero]), log_from)
    drawn, legend = [_frame(x, y, unit)], [_key(_newest(line), line.colour, line.dash) for line in lines]
    if level and levels:
        drawn.append(_stroke(f"M{x.start} {y.at(level[1]):.1f}H{x.end}", "var(--faint)", _LEVEL))
        legend.append(_key(f"{level[0]} {short(level[1])}", "var(--faint)", _LEVEL))
    for line in lines:
        drawn += _curve(line, x, y)
    not_finite = np.concatenate([line.series.steps[np.isnan(line.series.values)] for line in lines])
    if not_finite.size:
        drawn.append(_marks(x, not_finite, "m-3 -3l6 6m-6 0l6 -6", _TOP + 4))
        legend.append(_swatch("✕ not finite", "var(--bad)"))
    if len(skipped):
        drawn.append(_marks(x, np.asarray(skipped), "v-7", _HEIGHT - _BOTTOM))
        legend.append(_swatch("| skipped steps", "var(--bad)"))
    return _figure(title, drawn, legend)


def stack(title: str, unit: str, lines: Sequence[Line]) -> Html:
    """Draws areas stacked on each other over the step.

    Args:
        title: above.
        unit: of the values.
        lines: from the bottom up, none below 0; where one has no value, it counts as 0.
    """
    colours = [line.colour or _AREAS[number % len(_AREAS)] for number, line in enumerate(lines)]
    steps = np.unique(np.concatenate([line.series.steps for line in lines]))
    heights = np.zeros((len(lines), len(steps)))
    for height, line in zip(heights, lines, strict=True):
        height[np.searchsorted(steps, line.series.steps)] = np.nan_to_num(line.series.values)
    some = np.unique(np.linspace(0, len(steps) - 1, _POINTS // 2).astype(int))
    # The first value counts from the beginning: of one point alone there would be no area.
    steps, heights = np.append(0, steps[some]), heights[:, np.append(0, some)]
    edges = np.concatenate([np.zeros((1, len(steps))), np.cumsum(heights, axis=0)])
    x, y = _steps_axis(lines), _Axis(0.0, max(float(edges.max()), 1e-9), _HEIGHT - _BOTTOM, _TOP)
    drawn = [_frame(x, y, unit)]
    for colour, (below, above) in zip(colours, itertools.pairwise(edges), strict=True):
        around = _path(np.append(x.at(steps), x.at(steps[::-1])), np.append(y.at(above), y.at(below[::-1])))
        drawn.append(page.element("path", d=around + "Z", style=f"fill:{colour};fill-opacity:0.75"))
    return _figure(title, drawn, [_swatch(_newest(line), colour) for line, colour in zip(lines, colours, strict=True)])


def bar(share: float) -> Html:
    """Draws a bar whose length is a share, 0 to 1, of six times the letters' size."""
    return page.element("span", class_="bar", style=f"--key:var(--c1);width:{6 * min(max(share, 0), 1):.2f}em")


def thinned(series: Series, most: int = _POINTS) -> Series:
    """Returns the finite points, or the least and the greatest of each of `most / 2` stretches, so that peaks stay."""
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    if len(values) <= most:
        return Series(steps, values)
    parts = np.array_split(np.arange(len(values)), most // 2)
    extremes = [part[extreme(values[part])] for part in parts for extreme in (np.argmin, np.argmax)]
    index = np.unique([0, *extremes, len(values) - 1])
    return Series(steps[index], values[index])


def _distinct(lines: Sequence[Line]) -> list[Line]:
    """Gives each line without a colour one of few hues, and where these are used up another dash."""
    styles = itertools.cycle(itertools.product(_DASHES, _HUES))
    return [
        line if line.colour else dataclasses.replace(line, colour=hue, dash=dash)
        for line, (dash, hue) in zip(lines, styles, strict=False)
    ]


def _newest(line: Line) -> str:
    """A line's label and its newest value."""
    return f"{line.label} {short(line.series.last)}"


def _key(label: str, colour: str, dash: str) -> Html:
    """An entry of the legend with a piece of the line."""
    piece = page.element("svg", _stroke("M0 4H28", colour, dash), class_="chart key", viewBox="0 0 28 8")
    return page.element("span", piece, page.data(label))


def _swatch(label: str, colour: str) -> Html:
    """An entry of the legend with a patch of the colour."""
    return page.element("span", page.data(label), class_="swatch", style=f"--key:{colour}")


def _steps_axis(lines: Sequence[Line]) -> _Axis:
    last = max(int(line.series.steps[-1]) for line in lines)
    return _Axis(0.0, float(max(last, 1)), _LEFT, _WIDTH - _RIGHT)


def _values_axis(values: np.ndarray, log_from: float) -> _Axis:
    """From a little below the least finite value to a little above the greatest."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low > 0 and high / low > log_from:
        room = (high / low) ** 0.04
        return _Axis(low / room, high * room, _HEIGHT - _BOTTOM, _TOP, log=True)
    room = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    # Of what is never negative, the axis shows no negative part.
    return _Axis(max(low - room, 0.0) if low >= 0 else low - room, high + room, _HEIGHT - _BOTTOM, _TOP)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= 6:
            break
    return inside[:: max(-(-len(inside) // 6), 1)]


def _frame(x: _Axis, y: _Axis, unit: str) -> Html:
    """Grid, numbers and units."""
    parts = [_text(2, _TOP - 9, unit, "start")]
    for tick in y.ticks():
        place = float(y.at(tick))
        parts.append(_stroke(f"M{x.start} {place:.1f}H{x.end}", "var(--line)"))
        parts.append(_text(x.start - 6, place + 4, _formatted(tick, 6), "end"))
    for tick in x.ticks(whole=True):
        place = float(x.at(tick))
        parts.append(_stroke(f"M{place:.1f} {y.start}v4", "var(--faint)"))
        parts.append(_text(place, y.start + 16, f"{tick:,.0f}", "middle"))
    parts.append(_stroke(f"M{x.start} {y.start}H{x.end}", "var(--faint)"))
    parts.append(_text(_WIDTH - 2, _HEIGHT - 3, "step", "end"))
    return page.join(parts)


def _formatted(value: float, digits: int) -> str:
    size = abs(value)
    if size and not 1e-3 <= size < 1e8:
        number, exponent = f"{value:.2e}".split("e")
        return f"{number.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.{digits}g}"


def _curve(line: Line, x: _Axis, y: _Axis) -> Iterator[Html]:
    points = thinned(line.series)
    if not points.values.size:
        return
    path = _path(x.at(points.steps), y.at(points.values))
    yield _stroke(path, line.colour, line.dash)
    if points.values.size <= _FEW:
        dots = path.replace("L", "h0M") + "h0"
        yield page.element("path", d=dots, style=f"stroke:{line.colour};stroke-width:5;stroke-linecap:round")


def _marks(x: _Axis, steps: np.ndarray, shape: str, height: float) -> Html:
    # Marks that would lie upon each other are drawn once.
    places = np.unique(np.round(x.at(steps)).astype(int))
    return _stroke("".join(f"M{place} {height}{shape}" for place in places), "var(--bad)")


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _stroke(path: str, colour: str, dash: str = "") -> Html:
    return page.element("path", d=path, style=f"stroke:{colour}" + (f";stroke-dasharray:{dash}" if dash else ""))


def _text(x: float, y: float, text: str, anchor: str) -> Html:
    return page.element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", **{"text-anchor": anchor})


def _figure(title: str, drawn: Iterable[Html], legend: Iterable[Html]) -> Html:
    box = {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "role": "img", "aria-label": title}
    return page.element(
        "figure",
        page.element("h4", page.data(title)),
        page.element("div", *legend, class_="legend"),
        page.element("svg", *drawn, class_="chart", **box),
    )
