"""A sweep: the runs of a grid, what they leave, and what is made of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m3ae_jax import evals
from m3ae_jax.config import apply_overrides, resolve
from m3ae_jax.sweep.budget import Budget, Budgets
from m3ae_jax.sweep.grid import Axis, Overrides, Run, parse_grid, runs_of
from m3ae_jax.sweep.results import Done, Results
from m3ae_jax.sweep.runner import Job, python_command


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line says.

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
    """See the module.

    Args:
        asked: what is to be run.

    Raises:
        UserError: a point's config cannot work, or a name is wrong; before anything is run.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self.axes: tuple[Axis, ...] = parse_grid(asked.grid, asked.config)
        self._budgets = Budgets(asked.config, self.axes, asked.equal_flops)
        Results(self.axes, (), (), asked.compare)
        self.runs = runs_of(self.axes, asked.config, asked.seeds)
        for run in self.runs:
            config = asked.config.copy_and_resolve_references()
            apply_overrides(config, self._budgets.overrides(run))
            evals.check(resolve(config))

    def jobs(self) -> list[Job]:
        """One a run."""
        return [self._job(run, self._budgets.of(run)) for run in self.runs]

    def _job(self, run: Run, budget: Budget) -> Job:
        asked, folder = self._asked, self._asked.folder / run.name
        overrides = [*asked.overrides, *self._budgets.overrides(run), ("evals", ",".join(asked.config.evals))]

        def told() -> str:
            found = self._results([Done(run, budget, self._scalars(run, budget))])
            return "  ".join(f"{figure} {found.done[0].scalars[figure]:.3f}" for figure in found.figures)

        command = python_command(asked.config_file, folder, overrides)
        return Job(run.name, command, folder, lambda: bool(self._scalars(run, budget)), told)

    def _scalars(self, run: Run, budget: Budget) -> dict[str, float]:
        """All figures of a run's evaluations at its end; nothing as long as one is missing."""
        folder = self._asked.folder / run.name / "evals"
        files = [evals.place(folder, name, budget.steps) for name in self._asked.config.evals]
        try:
            found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        except (OSError, ValueError):  # a kill while it was written
            return {}
        return {name: value for of in found for name, value in of.items() if name != "step"}

    def _results(self, done: Sequence[Done]) -> Results:
        return Results(self.axes, done, self._asked.figures, self._asked.compare)

    def results(self) -> Results:
        """Of the runs that are done."""
        with_budget = [(run, self._budgets.of(run)) for run in self.runs]
        found = [Done(run, budget, self._scalars(run, budget)) for run, budget in with_budget]
        return self._results([one for one in found if one.scalars])

    def about(self) -> dict[str, Any]:
        """What was asked, for the record."""
        asked = self._asked
        return {
            "config": asked.config_file,
            "overrides": dict(asked.overrides),
            "grid": [dataclasses.asdict(axis) for axis in self.axes],
            "seeds": asked.seeds,
            "equal_flops": list(asked.equal_flops),
            "evaluations": list(asked.config.evals),
        }
