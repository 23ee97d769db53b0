"""How long each run of a sweep trains, and what that costs in floating-point operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from m3ae_jax.config import apply_overrides, resolve, steps
from m3ae_jax.errors import UserError, one_of
from m3ae_jax.sweep.grid import Axis, Overrides, Run


@dataclasses.dataclass(frozen=True)
class Budget:
    """The cost of a run.

    Attributes:
        steps: of training.
        examples: seen in all of them.
        flops: of all of them, by the matrix products in closed form (`train.flops.flops_per_example`).
    """

    steps: int
    examples: int
    flops: float


class Budgets:
    """The budgets of a sweep's runs.

    Args:
        config: as loaded and overridden.
        axes: of the grid.
        equal: names of axes; runs that differ in these alone (and in the seed) train for as many FLOPs as that with
            the first value of each. Their ``duration`` is changed for it, in whole steps.
        conditional: fields of one objective or another, see `grid.split_overrides`.

    Raises:
        UserError: there is no such axis.
    """

    def __init__(
        self,
        config: ConfigDict,
        axes: Sequence[Axis],
        equal: Sequence[str],
        conditional: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._config, self._axes, self._conditional = config, axes, conditional
        by_name = {name: axis for axis in axes for name in (axis.name, *axis.fields)}
        for name in equal:
            if name.removeprefix("config.") not in by_name:
                raise UserError(one_of("--equal_flops", name, sorted(by_name)))
        self._equal = [by_name[name.removeprefix("config.")] for name in equal]
        if any("duration" in axis.fields for axis in self._equal):
            raise UserError("--equal_flops=duration: of runs whose duration differs that cannot be")
        self._cached: dict[tuple[tuple[str, str], ...], Budget] = {}

    def of(self, run: Run) -> Budget:
        """The budget of a run.

        Raises:
            UserError: its config cannot work.
        """
        own = self._plain(run.overrides)
        if not self._equal:
            return own
        first = dict(run.overrides)
        for axis in self._equal:
            first |= dict(axis.overrides(axis.values[0]))
        target, flops_per_step = self._plain(tuple(first.items())).flops, own.flops / own.steps
        count = max(1, round(target / flops_per_step))
        return Budget(count, count * (own.examples // own.steps), flops_per_step * count)

    def overrides(self, run: Run) -> Overrides:
        """The fields that the run's command sets."""
        everything = [*run.overrides, *self._of_objective(run.overrides)]
        if not self._equal:
            return everything
        others = [override for override in everything if override[0] != "duration"]
        return [*others, ("duration", f"{self.of(run).steps} steps")]

    def _of_objective(self, overrides: Iterable[tuple[str, str]]) -> Overrides:
        objective = dict(overrides).get("objective", self._config.objective)
        return [override for override in self._conditional if override[0].partition(".")[0] == objective]

    def _plain(self, overrides: tuple[tuple[str, str], ...]) -> Budget:
        key = tuple(o for o in overrides if o[0] != "seed")
        if key not in self._cached:
            from m3ae_jax.train.flops import flops_per_example
            from m3ae_jax.train.setup import data_sizes

            config = self._config.copy_and_resolve_references()
            apply_overrides(config, [*key, *self._of_objective(key)])
            resolved = resolve(config)
            vocabulary, examples = data_sizes(resolved)
            count = max(1, steps("duration", resolved.duration, resolved.batch_size, max(examples, 1)))
            total = count * resolved.batch_size
            self._cached[key] = Budget(count, total, flops_per_example(resolved, vocabulary) * total)
        return self._cached[key]
