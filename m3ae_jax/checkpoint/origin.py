"""Where the weights that a run began with come from, and under which licence: ``weights.json`` in the run's folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from m3ae_jax.atomic import write_text
from m3ae_jax.checkpoint.manager import located

FILE = "weights.json"


def converted(file: str, format: str, license: str) -> dict[str, Any]:
    """What is told of another project's weights.

    Args:
        file: that was converted.
        format: of it.
        license: as the user told it; empty: not told.
    """
    return {"file": file, "format": format, "license": license}


def save(run: Path, origins: Iterable[dict[str, Any]]) -> None:
    """Writes the file, or removes that of a former start where there are no origins.

    Raises:
        OSError: it cannot be written.
    """
    told = list(origins)
    if told:
        write_text(run / FILE, json.dumps({"weights": told}, indent=1) + "\n")
    else:
        (run / FILE).unlink(missing_ok=True)


def of_checkpoint(path: str) -> list[dict[str, Any]]:
    """A checkpoint of ours that a run begins with, after what that run itself began with.

    Raises:
        UserError: no checkpoint there.
    """
    folder, step = located(path)
    return [*read(folder.parent), {"run": str(folder.parent), "step": step}]


def read(run: Path) -> list[dict[str, Any]]:
    """What a run's folder tells; nothing where it tells nothing, or what is no such file."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return [dict(origin) for origin in json.loads((run / FILE).read_text(encoding="utf-8"))["weights"]]
    return []
