"""What a sweep found: means over seeds with intervals, differences paired by seed, a table and a plot."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from m3ae_jax.atomic import replacing
from m3ae_jax.errors import UserError, one_of
from m3ae_jax.evals.few_shot import half_interval
from m3ae_jax.sweep.budget import Budget
from m3ae_jax.sweep.grid import Axis, Run, told

TRAINED, UNTRAINED = "/trained/", "/untrained/"
_DEFAULT_FIGURES = 4
_COLOURS = ("#1f5fbf", "#c2571a", "#2a8a3e", "#8a3ab9", "#b0207a", "#6b6b00")


@dataclasses.dataclass(frozen=True)
class Done:
    """A run that has its evaluations.

    Attributes:
        scalars: all their figures.
    """

    run: Run
    budget: Budget
    scalars: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Summary:
    """A figure over the seeds.

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
        """From one value a seed."""
        each = list(values.values())
        return Summary(float(np.mean(each)) if each else float("nan"), half_interval(each), values)

    def text(self, sign: str = "") -> str:
        """For a table."""
        if not self.values:
            return ""
        around = f" ± {self.interval:.3f}" if np.isfinite(self.interval) else ""
        return f"{self.mean:{sign}.3f}{around}"

    @property
    def verdict(self) -> str:
        """Of a difference: whether its interval leaves out 0."""
        if not np.isfinite(self.interval) or abs(self.mean) <= self.interval:
            return "inconclusive"
        return "higher" if self.mean > 0 else "lower"


class Results:
    """The runs of a sweep that are done, by point of the grid.

    Args:
        axes: of the grid.
        done: what is there.
        figures: names of the scalars that are shown; none: those of trained encoders' pictures, or the first ones.
        compare: the axis whose values are compared with its first; "": the last.

    Raises:
        UserError: no such axis or figure.
    """

    def __init__(self, axes: Sequence[Axis], done: Sequence[Done], figures: Sequence[str], compare: str) -> None:
        self.axes, self.done = list(axes), list(done)
        names = [axis.name for axis in axes]
        if compare and compare.removeprefix("config.") not in names:
            raise UserError(one_of("--compare", compare, names))
        self.compared = compare.removeprefix("config.") or (names[-1] if names else "")
        known = list(dict.fromkeys(name for one in done for name in one.scalars))
        for figure in figures if done else ():
            if figure not in known:
                raise UserError(one_of("--figures", figure, known))
        self.figures = list(figures) or _chosen(known)
        self.points = list(dict.fromkeys(tuple(one.run.values.items()) for one in done))
        order = {axis.name: [told(value) for value in axis.values] for axis in axes}
        self.points.sort(key=lambda point: [order[name].index(value) for name, value in point])

    def summary(self, point: tuple[tuple[str, str], ...], figure: str) -> Summary:
        """A figure of a point, over its seeds."""
        return Summary.of({o.run.seed: o.scalars[figure] for o in self._at(point) if figure in o.scalars})

    def difference(self, point: tuple[tuple[str, str], ...], figure: str) -> Summary | None:
        """Of a point from the one with the compared axis' first value, paired by seed; None for that itself."""
        axis = next((axis for axis in self.axes if axis.name == self.compared), None)
        if axis is None:
            return None
        first = told(axis.values[0])
        if dict(point)[axis.name] == first:
            return None
        base = self.summary(tuple((n, first if n == axis.name else v) for n, v in point), figure).values
        mine = self.summary(point, figure).values
        return Summary.of({seed: value - base[seed] for seed, value in mine.items() if seed in base})

    def _at(self, point: tuple[tuple[str, str], ...]) -> list[Done]:
        return [one for one in self.done if tuple(one.run.values.items()) == point]

    def baselines(self, figure: str) -> list[str]:
        """Of a trained encoder's figure: the same of an untrained one and of raw pixels, and the majority class."""
        if TRAINED not in figure:
            return []
        evaluation, _, rest = figure.partition(TRAINED)
        wanted = [
            f"{evaluation}{UNTRAINED}{rest}",
            f"{evaluation}/pixels/{rest.rpartition('/')[2]}",
            f"{evaluation}/majority",
        ]
        return [name for name in wanted if any(name in one.scalars for one in self.done)]

    def table(self) -> str:
        """Markdown: a row a point, and for each figure its baselines and the paired difference."""
        lines = []
        for figure in self.figures:
            others = self.baselines(figure)
            about = [*(axis.name for axis in self.axes), "seeds", "steps", "TFLOPs", figure]
            against = f"difference from the first {self.compared}, paired"
            head = [*about, *(_short(name, figure) for name in others), against, ""]
            lines += ["", _row(head), "|---" * len(head) + "|"]
            for point in self.points:
                here = self.summary(point, figure)
                budget = self._at(point)[0].budget
                away = self.difference(point, figure)
                cells = [v for _, v in point] + [
                    f"{len(here.values)}",
                    f"{budget.steps:,}",
                    f"{budget.flops / 1e12:,.4g}",
                ]
                cells += [here.text(), *(self.summary(point, name).text() for name in others)]
                lines.append(_row([*cells, away.text("+") if away else "", away.verdict if away else ""]))
        return "\n".join(lines[1:])

    def record(self, about: dict[str, Any]) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            **about,
            "runs": [
                {"values": o.run.values, "seed": o.run.seed, **dataclasses.asdict(o.budget), "scalars": o.scalars}
                for o in self.done
            ],
            "points": [self._recorded(point) for point in self.points],
        }

    def _recorded(self, point: tuple[tuple[str, str], ...]) -> dict[str, Any]:
        of: dict[str, Any] = {"values": dict(point), "figures": {}}
        for figure in self.figures:
            here, away = self.summary(point, figure), self.difference(point, figure)
            of["figures"][figure] = {"mean": here.mean, "interval": _number(here.interval)}
            if away is not None:
                found = {"difference": _number(away.mean), "interval": _number(away.interval), "verdict": away.verdict}
                of["figures"][figure]["paired"] = {**found, "from": f"the first {self.compared}"}
        return of

    def save(self, folder: Path, about: dict[str, Any], title: str) -> None:
        """Writes ``results.json``, ``results.md`` and ``results.png``."""
        with replacing(folder / "results.json") as file:
            file.write_text(json.dumps(self.record(about), indent=1) + "\n", encoding="utf-8")
        with replacing(folder / "results.md") as file:
            file.write_text(self.table() + "\n", encoding="utf-8")
        with replacing(folder / "results.png") as file:
            self.draw(file, title)

    # -- the plot

    def draw(self, path: Path, title: str) -> None:
        """A panel a figure: the compared axis from left to right, a line for each value of the others."""
        count = max(len(self.figures), 1)
        across = min(count, 2)
        down = -(-count // across)
        figure = Figure((6.4 * across, 4.4 * down + 0.4), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle("\n".join(textwrap.wrap(title, 72 * across)), fontsize=11, parse_math=False)
        for place, name in enumerate(self.figures, 1):
            self._panel(figure.add_subplot(down, across, place), name)
        figure.savefig(path, format="png")

    def _panel(self, axes: Axes, figure: str) -> None:
        axis = next((axis for axis in self.axes if axis.name == self.compared), None)
        values = [told(value) for value in axis.values] if axis else [""]
        others = list(dict.fromkeys(tuple(p for p in point if p[0] != self.compared) for point in self.points))
        shared: dict[str, list[float]] = {name: [] for name in self.baselines(figure) if UNTRAINED not in name}
        for number, rest in enumerate(others):
            colour = _COLOURS[number % len(_COLOURS)]
            mine = [p for p in self.points if tuple(x for x in p if x[0] != self.compared) == rest]
            place = [values.index(dict(p)[self.compared]) if axis else 0 for p in mine]
            shift = np.array(place) + 0.06 * (number - (len(others) - 1) / 2)
            label = ", ".join(f"{name} {value}" for name, value in rest) or "trained"
            found = [self.summary(p, figure) for p in mine]
            error = [0.0 if np.isnan(s.interval) else s.interval for s in found]
            axes.errorbar(shift, [s.mean for s in found], error, color=colour, marker="o", capsize=4, label=label)
            for x, one in zip(shift, found, strict=True):
                axes.plot([x] * len(one.values), list(one.values.values()), ".", color=colour, alpha=0.4)
            for name in self.baselines(figure):
                means = [self.summary(p, name).mean for p in mine]
                if name in shared:
                    shared[name] += means
                else:
                    named = "untrained" + (f", {label}" if len(others) > 1 else "")
                    axes.plot(shift, means, "x:", color=colour, alpha=0.7, label=named)
        for name, dashes, grey in zip(shared, ("--", "-."), ("#555555", "#999999"), strict=False):
            axes.axhline(float(np.nanmean(shared[name])), color=grey, linestyle=dashes, label=_short(name, figure))
        axes.set_xticks(range(len(values)), values)
        axes.set_xlim(-0.5, len(values) - 0.5)
        axes.set_title("mean over seeds (dots) and its 95 % interval", fontsize=9)
        axes.set_xlabel(self.compared, parse_math=False)
        axes.set_ylabel(figure.replace("/", ", "), parse_math=False)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def _chosen(known: Sequence[str]) -> list[str]:
    """The figures that are shown unless some are named."""
    pictures = [name for name in known if f"{TRAINED}image/" in name and not name.endswith(("/l2", "/interval"))]
    return (pictures or list(known))[:_DEFAULT_FIGURES]


def _short(name: str, figure: str) -> str:
    if UNTRAINED in name:
        return "untrained"
    return name.removeprefix(figure.partition(TRAINED)[0] + "/").partition("/")[0]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
