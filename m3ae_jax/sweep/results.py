"""The results of a sweep: means over seeds with intervals, differences paired by seed, a table and a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from m3ae_jax.atomic import replacing, write_text
from m3ae_jax.errors import UserError, one_of
from m3ae_jax.evals.few_shot import half_interval
from m3ae_jax.evals.overlap import WITHOUT
from m3ae_jax.report.pictures import figure_of_panels
from m3ae_jax.sweep.budget import Budget
from m3ae_jax.sweep.grid import Axis, Run, value_text

TRAINED, UNTRAINED = "/trained/", "/untrained/"
_DEFAULT_FIGURES = 4
Point = tuple[tuple[str, str], ...]
"""A point of the grid: the name of each axis and the text of its value."""

_COLOURS = ("#1f5fbf", "#c2571a", "#2a8a3e", "#8a3ab9", "#b0207a", "#6b6b00")


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A run that has its evaluations.

    Attributes:
        run: which one.
        budget: what it took.
        scalars: all metrics of its evaluations.
    """

    run: Run
    budget: Budget
    scalars: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Summary:
    """A metric over the seeds.

    Attributes:
        mean: over them.
        interval: half the width of the mean's 95 % interval (Student's t); NaN with one seed.
        values: by seed.
    """

    mean: float
    interval: float
    values: dict[int, float]

    @staticmethod
    def of(values: dict[int, float]) -> Summary:
        """Summarises one value for each seed."""
        each = list(values.values())
        return Summary(float(np.mean(each)) if each else float("nan"), half_interval(each), values)

    def text(self, sign: str = "") -> str:
        """Formats mean and interval for a table."""
        if not self.values:
            return ""
        around = f" ± {self.interval:.3f}" if np.isfinite(self.interval) else ""
        return f"{self.mean:{sign}.3f}{around}"

    @property
    def verdict(self) -> str:
        """For a difference: whether its interval leaves out 0."""
        if not np.isfinite(self.interval) or abs(self.mean) <= self.interval:
            return "inconclusive"
        return "higher" if self.mean > 0 else "lower"


class Results:
    """The runs of a sweep that are done, by point of the grid.

    Args:
        axes: of the grid.
        done: the results that are there.
        figures: names of the scalars that are shown; none: those of trained encoders' pictures, or the first ones. Of
            several with ``|`` between them each run shows the first that it has.
        compare: the axis whose values are compared with its first; "": the last.

    Raises:
        UserError: no such axis or figure.
    """

    def __init__(self, axes: Sequence[Axis], done: Sequence[RunResult], figures: Sequence[str], compare: str) -> None:
        self.done = list(done)
        names = [axis.name for axis in axes]
        self.compared = compare.removeprefix("config.") or (names[-1] if names else "")
        if compare and self.compared not in names:
            raise UserError(one_of("--compare", compare, names))
        known = list(dict.fromkeys(name for result in done for name in result.scalars))
        for figure in figures if done else ():
            for name in figure.split("|"):
                if name not in known:
                    raise UserError(one_of("--figures", name, known))
        self.figures = list(figures) or _chosen(known)
        self._values = {axis.name: [value_text(value) for value in axis.values] for axis in axes}
        self.points = list(dict.fromkeys(tuple(result.run.values.items()) for result in done))
        self.points.sort(key=lambda point: [self._values[name].index(value) for name, value in point])

    def summary(self, point: Point, figure: str) -> Summary:
        """Summarises a metric of a point over its seeds."""
        found = {o.run.seed: [o.scalars[n] for n in figure.split("|") if n in o.scalars] for o in self._at(point)}
        return Summary.of({seed: values[0] for seed, values in found.items() if values})

    def difference(self, point: Point, figure: str) -> Summary | None:
        """The difference from the point with the compared axis' first value, paired by seed; None for that itself."""
        first = self._values[self.compared][0] if self._values else ""
        base = tuple((name, first if name == self.compared else value) for name, value in point)
        if point == base:
            return None
        before, after = self.summary(base, figure).values, self.summary(point, figure).values
        return Summary.of({seed: value - before[seed] for seed, value in after.items() if seed in before})

    def _at(self, point: Point) -> list[RunResult]:
        return [result for result in self.done if tuple(result.run.values.items()) == point]

    def baselines(self, figure: str) -> list[str]:
        """The baselines of a trained encoder's metric: an untrained encoder, raw pixels and the majority class."""
        known = {name for result in self.done for name in result.scalars}
        of_each = []
        for one in figure.split("|"):
            if TRAINED not in one:
                return []
            evaluation, _, rest = one.partition(TRAINED)
            rest, without, _ = rest.partition(f"/{WITHOUT}")
            metric = rest.rpartition("/")[2]
            names = [f"{evaluation}{UNTRAINED}{rest}", f"{evaluation}/pixels/{metric}", f"{evaluation}/majority"]
            of_each.append([name + without for name in names])
        alike = [
            "|".join(dict.fromkeys(name for name in names if name in known)) for names in zip(*of_each, strict=True)
        ]
        return [names for names in alike if names]

    def table(self) -> str:
        """A Markdown table: a row for each point, and for each metric its baselines and the paired difference."""
        lines = []
        for figure in self.figures:
            others = self.baselines(figure)
            shown = figure.replace("|", " or ")
            head = [*self._values, "seeds", "steps", "TFLOPs", shown, *(_short(name, figure) for name in others)]
            head += [f"difference from the first {self.compared}, paired", ""]
            lines += ["", _row(head), "|---" * len(head) + "|"]
            for point in self.points:
                summary, difference = self.summary(point, figure), self.difference(point, figure)
                budget = self._at(point)[0].budget
                cells = [value for _, value in point]
                cells += [f"{len(summary.values)}", f"{budget.steps:,}", f"{budget.flops / 1e12:,.4g}"]
                cells += [summary.text(), *(self.summary(point, name).text() for name in others)]
                cells += [difference.text("+"), difference.verdict] if difference else ["", ""]
                lines.append(_row(cells))
        return "\n".join(lines[1:])

    def record(self, about: dict[str, Any]) -> dict[str, Any]:
        """Everything as one object for JSON."""
        return {
            **about,
            "runs": [
                {"values": o.run.values, "seed": o.run.seed, **dataclasses.asdict(o.budget), "scalars": o.scalars}
                for o in self.done
            ],
            "points": [
                {"values": dict(point), "figures": {figure: self._recorded(point, figure) for figure in self.figures}}
                for point in self.points
            ],
        }

    def _recorded(self, point: Point, figure: str) -> dict[str, Any]:
        summary, difference = self.summary(point, figure), self.difference(point, figure)
        record: dict[str, Any] = {"mean": summary.mean, "interval": _number(summary.interval)}
        if difference is not None:
            paired = {"difference": _number(difference.mean), "interval": _number(difference.interval)}
            record["paired"] = {**paired, "verdict": difference.verdict, "from": f"the first {self.compared}"}
        return record

    def save(self, folder: Path, about: dict[str, Any], title: str) -> None:
        """Writes ``results.json``, ``results.md`` and ``results.png``."""
        write_text(folder / "results.json", json.dumps(self.record(about), indent=1) + "\n")
        write_text(folder / "results.md", self.table() + "\n")
        with replacing(folder / "results.png") as file:
            self.draw(file, title)

    # -- the plot

    def draw(self, path: Path, title: str) -> None:
        """Draws a panel for each metric: the compared axis from left to right, a line for each value of the others."""
        figure, panels = figure_of_panels(title, len(self.figures), 2, (6.4, 4.4))
        for axes, name in zip(panels, self.figures, strict=True):
            self._panel(axes, name)
        figure.savefig(path, format="png")

    def _panel(self, axes: Axes, figure: str) -> None:
        values, baselines = self._values.get(self.compared, [""]), self.baselines(figure)
        lines = list(dict.fromkeys(tuple(p for p in point if p[0] != self.compared) for point in self.points))
        for number, rest in enumerate(lines):
            colour = _COLOURS[number % len(_COLOURS)]
            points = [point for point in self.points if set(rest) <= set(point)]
            places = [values.index(dict(point).get(self.compared, "")) for point in points]
            x = np.array(places) + 0.06 * (number - (len(lines) - 1) / 2)
            label = ", ".join(f"{name} {value}" for name, value in rest)
            summaries = [self.summary(point, figure) for point in points]
            means, errors = [one.mean for one in summaries], [np.nan_to_num(one.interval) for one in summaries]
            axes.errorbar(x, means, errors, color=colour, marker="o", capsize=4, label=label or "trained")
            for place, one in zip(x, summaries, strict=True):
                axes.plot([place] * len(one.values), list(one.values.values()), ".", color=colour, alpha=0.4)
            for name in baselines:
                if UNTRAINED in name:
                    means = [self.summary(point, name).mean for point in points]
                    untrained = f"untrained, {label}" if len(lines) > 1 else "untrained"
                    axes.plot(x, means, "x:", color=colour, alpha=0.7, label=untrained)
        others = [name for name in baselines if UNTRAINED not in name]
        for name, dashes, grey in zip(others, ("--", "-."), ("#555555", "#999999"), strict=False):
            mean = float(np.nanmean([self.summary(point, name).mean for point in self.points]))
            axes.axhline(mean, color=grey, linestyle=dashes, label=_short(name, figure))
        axes.set_xticks(range(len(values)), values)
        axes.set_xlim(-0.5, len(values) - 0.5)
        axes.set_title("mean over seeds (dots) and its 95 % interval", fontsize=9)
        axes.set_xlabel(self.compared, parse_math=False)
        axes.set_ylabel(figure.replace("/", ", ").replace("|", "\nor "), parse_math=False)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def _chosen(known: Sequence[str]) -> list[str]:
    """The metrics that are shown unless some are named."""
    beside = ("/l2", "/interval", f"/{WITHOUT}")
    pictures = [name for name in known if f"{TRAINED}image/" in name and not name.endswith(beside)]
    return (pictures or list(known))[:_DEFAULT_FIGURES]


def _short(name: str, figure: str) -> str:
    if UNTRAINED in name:
        return "untrained"
    return name.removeprefix(figure.partition(TRAINED)[0] + "/").partition("/")[0]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
