"""What an evaluation returns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from m3ae_jax.metrics.writers import MetricWriter


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of an evaluation.

    Attributes:
        name: the evaluation.
        scalars: figures, as ``<name>/...``.
        text: a table for people.
        pictures: `[H, W, 3] uint8` by name.
    """

    name: str
    scalars: dict[str, float]
    text: str
    pictures: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, name: str, scalars: Mapping[str, float], table: str, pictures: Mapping[str, np.ndarray] | None = None
    ) -> Result:
        """A result of figures that lack the evaluation's name."""
        return cls(name, {f"{name}/{key}": value for key, value in scalars.items()}, table, pictures or {})

    def save(self, folder: Path, step: int) -> None:
        """Writes ``<name>_<step>.json`` and ``.md``, and of each picture ``<name>_<step>_<picture>.png``."""
        folder.mkdir(parents=True, exist_ok=True)
        file = place(folder, self.name, step)
        file.with_suffix(".md").write_text(self.text + "\n")
        for picture, pixels in self.pictures.items():
            Image.fromarray(pixels).save(folder / f"{self.name}_{step}_{picture}.png")
        # Last, as a result that is there is not computed again.
        file.write_text(json.dumps({"step": step, **self.scalars}, indent=2) + "\n")

    def write(self, writer: MetricWriter, step: int) -> None:
        """Writes figures and pictures to TensorBoard and the rows of metrics."""
        writer.scalars(step, self.scalars)
        for picture, pixels in self.pictures.items():
            writer.image(step, f"{self.name}/{picture}", pixels)


def place(folder: Path, name: str, step: int) -> Path:
    """The JSON file of an evaluation's result."""
    return folder / f"{name}_{step}.json"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, of the columns' heads and the rows' cells."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return "\n".join([line(heads), "|---" * len(heads) + "|", *map(line, rows)])
