"""A sweep: the runs of a grid and their results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m3ae_jax.atomic import write_text
from m3ae_jax.config import apply_overrides, default, difference, resolve
from m3ae_jax.config.schema import identifies, names_weights
from m3ae_jax.errors import UserError
from m3ae_jax.evals.base import stored
from m3ae_jax.evals.named import data_of
from m3ae_jax.evals.run import EVALUATIONS, check
from m3ae_jax.sweep.budget import Budgets
from m3ae_jax.sweep.grid import Axis, Overrides, Run, make_runs, parse_grid
from m3ae_jax.sweep.results import Results, RunResult
from m3ae_jax.sweep.runner import Job, python_command


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """The fields of a resolved config that its results depend on and are not as by default; the seed left out.

    Those that identify a run, and the weights that it starts from: another path counts as other weights.
    """
    objective = config.objective
    changed = {name: new for name, _, new in difference(resolve(default(objective)), config) if name != "seed"}
    named = {n: new for n, new in changed.items() if identifies(n, objective) or names_weights(n, objective)}
    content: dict[str, Any] = json.loads(json.dumps({"objective": objective, **named}))
    return content


def _cells(record: Path | None) -> list[dict[str, Any]]:
    """The runs of a record.

    Raises:
        UserError: it is none.
    """
    if record is None or not record.exists():
        return []
    try:
        cells = json.loads(record.read_bytes())["runs"]
        if all({"seed", "steps", "settings", "scalars"} <= cell.keys() for cell in cells):
            return list(cells)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"--record={record} is no file of results that --record wrote")


@dataclasses.dataclass
class Sweep:
    """The runs of a grid, one for each point and seed.

    Attributes:
        config_file: of the runs.
        config: loaded from it and overridden, not yet resolved; its ``evals`` are the sweep's.
        overrides: those of the command line, of all runs.
        folder: of the sweep.
        grid: axes, as text.
        seeds: runs of each point.
        equal_flops: names of axes, see `Budgets`.
        compare: name of an axis, see `Results`.
        figures: names of scalars, see `Results`.
        conditional: overrides of the fields of some of the grid's objectives, see `grid.split_overrides`.
        record: a JSON file of results, of this and of other machines: a run that is in it is done, and each that gets
            done is added at once; None: there is none.
        data: what the data of each evaluation are called (`Data.name`), by run.

    Raises:
        UserError: a point's config cannot work, or a name is wrong; before anything is run.
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
    record: Path | None = None
    conditional: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        self.axes: tuple[Axis, ...] = parse_grid(self.grid, self.config)
        self._budgets = Budgets(self.config, self.axes, self.equal_flops, self.conditional)
        Results(self.axes, (), (), self.compare)
        self.runs = make_runs(self.axes, self.config, self.seeds)
        self.data: dict[str, dict[str, str]] = {}
        self._settings: dict[str, dict[str, Any]] = {}
        self._cells = _cells(self.record)
        for run in self.runs:
            config = self.config.copy_and_resolve_references()
            apply_overrides(config, self._budgets.overrides(run))
            config = resolve(config)
            check(config)
            self._settings[run.name] = settings_of(config)
            self.data[run.name] = {name: data_of(config, EVALUATIONS[name].parts).name for name in config.evals}

    def jobs(self) -> list[Job]:
        """The jobs that make the runs, one for each."""
        return [self._job(run) for run in self.runs]

    def _job(self, run: Run) -> Job:
        overrides = [*self.overrides, *self._budgets.overrides(run), ("evals", ",".join(self.config.evals))]

        def metrics() -> str:
            results = self._results([run])
            return "  ".join(f"{figure} {results.done[0].scalars[figure]:.3f}" for figure in results.figures)

        folder = self.folder / run.name
        command = python_command(self.config_file, folder, overrides)
        return Job(run.name, command, folder, lambda: bool(self._scalars(run)), metrics, self._save_record)

    def _scalars(self, run: Run) -> dict[str, float]:
        """All metrics of a run's evaluations at its end, of the record too; nothing as long as one is missing."""
        return self._own_scalars(run) or self._recorded(run)

    def _own_scalars(self, run: Run) -> dict[str, float]:
        folder, steps = self.folder / run.name / "evals", self._budgets.of(run).steps
        scalars: dict[str, float] = {}
        for name, data in self.data[run.name].items():
            result = stored(folder, name, steps, data)
            if result is None:
                return {}
            scalars |= result
        return {name: value for name, value in scalars.items() if name != "step" and isinstance(value, int | float)}

    def _recorded(self, run: Run) -> dict[str, float]:
        """Those of the record, if it has the run with these settings and the sweep's evaluations."""
        for cell in self._cells:
            same = cell["seed"] == run.seed and cell["settings"] == self._settings[run.name]
            if same and cell["steps"] == self._budgets.of(run).steps:
                scalars: dict[str, float] = cell["scalars"]
                if all(any(key.startswith(f"{name}/") for key in scalars) for name in self.data[run.name]):
                    return scalars
        return {}

    def _save_record(self) -> None:
        """Writes the record, a line for each run; what it has besides stays."""
        if self.record is None:
            return
        cells = {(c["seed"], c["steps"], json.dumps(c["settings"])): c for c in _cells(self.record)}
        for result in self.results().done:
            run, settings = result.run, self._settings[result.run.name]
            cell = {"values": run.values, "seed": run.seed, **dataclasses.asdict(result.budget)}
            key = run.seed, result.budget.steps, json.dumps(settings)
            cells[key] = {**cell, "settings": settings, "scalars": result.scalars}
        self.record.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(cell) for cell in cells.values())
        write_text(self.record, f'{{"runs": [\n{lines}\n]}}\n')

    def _results(self, runs: Sequence[Run]) -> Results:
        results = [RunResult(run, self._budgets.of(run), self._scalars(run)) for run in runs]
        return Results(self.axes, [one for one in results if one.scalars], self.figures, self.compare)

    def results(self) -> Results:
        """The results of the runs that are done."""
        return self._results(self.runs)

    def about(self) -> dict[str, Any]:
        """The sweep's settings, for the record."""
        return {
            "config": self.config_file,
            "overrides": dict([*self.overrides, *self.conditional]),
            "grid": [dataclasses.asdict(axis) for axis in self.axes],
            "seeds": self.seeds,
            "equal_flops": list(self.equal_flops),
            "evaluations": list(self.config.evals),
        }
