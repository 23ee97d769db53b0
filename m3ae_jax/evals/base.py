"""What an evaluation returns, and the files that keep it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from m3ae_jax.atomic import write_text

if TYPE_CHECKING:
    from m3ae_jax.metrics.writers import MetricWriter

log = logging.getLogger("m3ae_jax")


@dataclasses.dataclass(frozen=True)
class Data:
    """The data that an evaluation is of.

    Attributes:
        name: short, of letters, digits and dashes, other for other data; empty for none.
        parts: by part (``train``, ``test``, ``val``, ...) what it is: ``source``, ``path``, ``split``, ``fingerprint``
            and ``examples``.
    """

    name: str = ""
    parts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of an evaluation.

    Attributes:
        name: the evaluation.
        scalars: figures, as ``<name>/...``.
        text: for people: a table in Markdown, lines about it, and last a sentence on what it shows.
        pictures: `[H, W, 3] uint8` by name.
    """

    name: str
    scalars: dict[str, float]
    text: str
    pictures: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        scalars: Mapping[str, float],
        table: str,
        verdict: str,
        pictures: Mapping[str, np.ndarray] | None = None,
    ) -> Result:
        """A result of figures without the evaluation's name, whose table ends with a sentence (`verdict.sentence`)."""
        figures = {f"{name}/{key}": value for key, value in scalars.items()}
        return cls(name, figures, f"{table}\n\n{verdict}", pictures or {})

    def save(self, folder: Path, step: int, data: Data = Data()) -> None:
        """Writes the file of `place`, beside it the text as ``.md``, and each picture as ``<file>_<picture>.png``.

        Args:
            folder: of all results.
            step: of the state.
            data: that it is of.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file = place(folder, self.name, step, data.name)
        file.with_suffix(".md").write_text(self.text + "\n")
        for picture, pixels in self.pictures.items():
            Image.fromarray(pixels).save(folder / f"{file.stem}_{picture}.png")
        about = {"data": data.parts} if data.parts else {}
        # Last, as a result that is there is not computed again.
        write_text(file, json.dumps({"step": step, **about, **self.scalars}, indent=2) + "\n")

    @classmethod
    def saved(cls, folder: Path, name: str, step: int, data: Data) -> Result | None:
        """What `save` wrote, but for the text; None if there is nothing that can be read."""
        file = place(folder, name, step, data.name)
        try:
            scalars = json.loads(file.read_bytes())
            found = {one.stem.removeprefix(f"{file.stem}_"): one for one in folder.glob(f"{file.stem}_*.png")}
            pictures = {picture: np.asarray(Image.open(one, formats=("PNG",))) for picture, one in found.items()}
        except (OSError, ValueError):
            return None
        return cls(name, {key: value for key, value in scalars.items() if key not in ("step", "data")}, "", pictures)

    def write(self, writer: MetricWriter, step: int) -> None:
        """Writes figures and pictures to the rows of metrics and the writers."""
        writer.scalars(step, self.scalars)
        for picture, pixels in self.pictures.items():
            writer.image(step, f"{self.name}/{picture}", pixels)


def stored(folder: Path, name: str, step: int, data: str) -> dict[str, Any] | None:
    """What `Result.save` wrote, as JSON; None if it is not there, or cannot be read, with a warning.

    Args:
        folder: as of `place`.
        name: as of `place`.
        step: as of `place`.
        data: as of `place`.
    """
    file = place(folder, name, step, data)
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        log.warning("%s cannot be read: this evaluation counts as not done", file)
        return None
    return content


def place(folder: Path, name: str, step: int, data: str) -> Path:
    """The JSON file of an evaluation's result: ``<name>_<step>_<data>.json``, of other data another.

    Args:
        folder: of all results.
        name: of the evaluation.
        step: of the state.
        data: `Data.name`.
    """
    return folder / f"{'_'.join((name, str(step), *([data] if data else [])))}.json"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, of the columns' heads and the rows' cells."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return "\n".join([line(heads), "|---" * len(heads) + "|", *map(line, rows)])


def amount(count: int, one: str, more: str = "") -> str:
    """A number of things, as ``1 class`` and ``2 classes``; `more` is by default `one` with an s."""
    return f"{count} {one if count == 1 else more or one + 's'}"
