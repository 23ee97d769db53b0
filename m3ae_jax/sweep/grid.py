"""What a sweep runs: the points of a grid, each with several seeds, as overrides of one config.

A grid is written ``FIELD=VALUE,VALUE``; fields that change together ``FIELD:FIELD=VALUE:VALUE,VALUE:VALUE``; several
axes with ``;`` between them. A value with commas stands in brackets: ``data.modalities=image,(image,text)``. Where the
objective is in the grid, an override of a field of one objective counts for the runs of that one.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from m3ae_jax.config import apply_overrides
from m3ae_jax.config.schema import OBJECTIVES
from m3ae_jax.errors import UserError

Overrides = list[tuple[str, str]]
_UNSAFE = re.compile(r"[^\w.,=+-]+")  # in a folder's name
_ENCLOSED = r"""\([^()]*\)|\[[^][]*\]|'[^']*'|"[^"]*\""""


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a grid.

    Attributes:
        fields: of the config, which change together.
        values: their texts, a tuple each as long as `fields`.
    """

    fields: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        """The names of its fields without their groups: ``text_mask_ratio``."""
        return ":".join(field.rpartition(".")[2] for field in self.fields)

    def values_of(self, field: str) -> tuple[str, ...]:
        """The texts of one of its fields; none if it has it not."""
        return tuple(value[self.fields.index(field)] for value in self.values) if field in self.fields else ()

    def overrides(self, value: tuple[str, ...]) -> Overrides:
        """The fields with one of the values."""
        return list(zip(self.fields, value, strict=True))


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of a sweep.

    Attributes:
        values: by the axis' name, as text; without the seed.
        seed: of the run.
        overrides: all fields that the sweep sets, the seed too.
    """

    values: dict[str, str]
    seed: int
    overrides: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """The name of its folder: ``text_mask_ratio=0.5,seed=42``."""
        parts = [f"{name}={value}" for name, value in self.values.items()] + [f"seed={self.seed}"]
        return _UNSAFE.sub("+", ",".join(parts))


def parse_grid(texts: Sequence[str], config: ConfigDict) -> tuple[Axis, ...]:
    """Parses the axes, each value checked against the config's field.

    Args:
        texts: as the command line has them.
        config: as loaded and overridden, not yet resolved.

    Raises:
        UserError: a part is no axis, a field is unknown or named twice, a value does not fit or stands twice.
    """
    axes = tuple(_axis(part, config) for text in texts for part in _split(text, ";") if part.strip())
    fields = [field for axis in axes for field in axis.fields]
    for field in fields:
        if field == "seed":
            raise UserError("--grid: the seed is no axis; --seeds=N says how many there are of each point")
        if fields.count(field) > 1:
            raise UserError(f"--grid names {field} twice")
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--grid has two axes whose fields end in {name!r}: their runs could not be told apart")
    return axes


def split_overrides(overrides: Overrides, texts: Sequence[str], config: ConfigDict) -> tuple[Overrides, Overrides]:
    """Those that are of all runs, and those of the fields of one objective of several that a grid has.

    Args:
        overrides: of the command line.
        texts: the grid's.
        config: as loaded.

    Raises:
        UserError: as `parse_grid`, or an override does not fit the config.
    """
    group_of = {override: override[0].partition(".")[0] for override in overrides}
    general = [override for override in overrides if group_of[override] not in OBJECTIVES]
    overridden = config.copy_and_resolve_references()
    apply_overrides(overridden, general)
    own = [override for override in overrides if group_of[override] == overridden.objective]
    apply_overrides(overridden, own)
    in_grid = {text for axis in parse_grid(texts, overridden) for text in axis.values_of("objective")}
    conditional = [o for o in overrides if o not in general + own and group_of[o] in in_grid]
    return [o for o in overrides if o not in conditional], conditional


def value_text(value: tuple[str, ...]) -> str:
    """An axis' value as people read it: ``image,text``, ``64:2:2``."""
    return ":".join(part.strip("()[]") for part in value)


def _axis(text: str, config: ConfigDict) -> Axis:
    left, equals, right = text.strip().partition("=")
    fields = tuple(field.strip().removeprefix("--").removeprefix("config.") for field in left.split(":"))
    values = [value.strip() for value in _split(right, ",")]
    if not equals or not all(fields) or not all(values):
        raise UserError(f"--grid={text.strip()!r}: FIELD=VALUE,VALUE, or FIELD:FIELD=VALUE:VALUE,VALUE:VALUE")
    together = [tuple(_split(value, ":")) if len(fields) > 1 else (value,) for value in values]
    for value in together:
        if len(value) != len(fields):
            raise UserError(f"--grid={text.strip()!r}: {':'.join(value)!r} needs {len(fields)} values, one a field")
        if together.count(value) > 1:
            raise UserError(f"--grid={text.strip()!r}: {':'.join(value)!r} stands there twice")
        apply_overrides(config.copy_and_resolve_references(), list(zip(fields, value, strict=True)))
    return Axis(fields, tuple(together))


def _split(text: str, separator: str) -> list[str]:
    """Parts between separators that stand in no brackets and no quotes."""
    # No argument of a command holds a NUL.
    return re.sub(f"({_ENCLOSED})|{separator}", lambda match: match[1] or "\0", text).split("\0")


def make_runs(axes: Sequence[Axis], config: ConfigDict, seeds: int) -> list[Run]:
    """Makes the runs of all points with all seeds.

    A seed's points follow each other, so that a sweep that is stopped early can be compared.

    Args:
        axes: of the grid.
        config: its seed is the first one.
        seeds: how many.
    """
    runs = []
    for seed in range(config.seed, config.seed + seeds):
        for values in itertools.product(*(axis.values for axis in axes)):
            overrides: Overrides = [("seed", str(seed))]
            texts = {}
            for axis, value in zip(axes, values, strict=True):
                overrides += axis.overrides(value)
                texts[axis.name] = value_text(value)
            runs.append(Run(texts, seed, tuple(overrides)))
    return runs
