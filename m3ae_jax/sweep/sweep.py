"""A sweep: the runs of a grid and their results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import m3ae_jax.evals as evals
from m3ae_jax.config import apply_overrides, resolve
from m3ae_jax.sweep.budget import Budgets
from m3ae_jax.sweep.grid import Axis, Overrides, Run, parse_grid, runs_of
from m3ae_jax.sweep.results import Results, RunResult
from m3ae_jax.sweep.runner import Job, python_command


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of a sweep, as the command line gives them.

    Attributes:
        config_file: of the runs.
        config: loaded from it and overridden, not yet resolved; its ``evals`` are the sweep's.
        overrides: those of the command line.
        folder: of the sweep.
        grid: axes, as text.
        seeds: runs of each point.
        equal_flops: names of axes, see `Budgets`.
        compare: name of an axis, see `Results`.
        figures: names of scalars, see `Results`.
    """

    config_file: str
    config: ConfigDict
    overrides: Overrides
    folder: Path
    grid: Sequence[str]
    seeds: int = 3
    equal_flops: Sequence[str] = ()
    compare: str = ""
    figures: Sequence[str] = ()


class Sweep:
    """The runs of a grid, one for each point and seed.

    Args:
        options: of the sweep.

    Raises:
        UserError: a point's config cannot work, or a name is wrong; before anything is run.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self.axes: tuple[Axis, ...] = parse_grid(options.grid, options.config)
        self._budgets = Budgets(options.config, self.axes, options.equal_flops)
        Results(self.axes, (), (), options.compare)
        self.runs = runs_of(self.axes, options.config, options.seeds)
        for run in self.runs:
            config = options.config.copy_and_resolve_references()
            apply_overrides(config, self._budgets.overrides(run))
            evals.check(resolve(config))

    def jobs(self) -> list[Job]:
        """The jobs that make the runs, one for each."""
        return [self._job(run) for run in self.runs]

    def _job(self, run: Run) -> Job:
        options, folder = self._options, self._options.folder / run.name
        overrides = [*options.overrides, *self._budgets.overrides(run), ("evals", ",".join(options.config.evals))]

        def metrics() -> str:
            results = self._results([run])
            return "  ".join(f"{figure} {results.done[0].scalars[figure]:.3f}" for figure in results.figures)

        command = python_command(options.config_file, folder, overrides)
        return Job(run.name, command, folder, lambda: bool(self._scalars(run)), metrics)

    def _scalars(self, run: Run) -> dict[str, float]:
        """All metrics of a run's evaluations at its end; nothing as long as one is missing."""
        folder, steps = self._options.folder / run.name / "evals", self._budgets.of(run).steps
        scalars: dict[str, float] = {}
        for name in self._options.config.evals:
            try:
                scalars |= json.loads(evals.place(folder, name, steps).read_text(encoding="utf-8"))
            except (OSError, ValueError):  # a kill while it was written
                return {}
        return {name: value for name, value in scalars.items() if name != "step"}

    def _results(self, runs: Sequence[Run]) -> Results:
        results = [RunResult(run, self._budgets.of(run), self._scalars(run)) for run in runs]
        done = [result for result in results if result.scalars]
        return Results(self.axes, done, self._options.figures, self._options.compare)

    def results(self) -> Results:
        """The results of the runs that are done."""
        return self._results(self.runs)

    def about(self) -> dict[str, Any]:
        """The sweep's settings, for the record."""
        options = self._options
        return {
            "config": options.config_file,
            "overrides": dict(options.overrides),
            "grid": [dataclasses.asdict(axis) for axis in self.axes],
            "seeds": options.seeds,
            "equal_flops": list(options.equal_flops),
            "evaluations": list(options.config.evals),
        }
