"""What is stored beside the state of a checkpoint: the config, and what else identifies the run. Needs no JAX."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3ae_jax.checkpoint import manifest
from m3ae_jax.errors import UserError

FILE = "meta/metadata"
METRICS = "metrics/metrics"
STATE_VERSION = 3
"""Of what `train.step.TrainState` holds: 2 has the guard, 3 has encoder and decoder apart."""


def read(checkpoint: Path, name: str = FILE) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint, which is not checked.

    Raises:
        UserError: it holds none.
    """
    try:
        content = json.loads((checkpoint / name).read_bytes())
    except OSError as error:
        raise UserError(f"checkpoint {checkpoint} is damaged: {name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {checkpoint} is damaged: {name} is not a JSON object")
    return content


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in a folder whose small files are whole, and what `read` gives of it; None if none is.

    Raises:
        UserError: a newer program made it.
    """
    finished = manifest.finished(folder)
    for step in finished or manifest.steps(folder):
        checkpoint = folder / str(step)
        if finished and manifest.problems(checkpoint, large=False):
            continue
        try:
            return checkpoint, read(checkpoint)
        except UserError:
            continue
    return None


def config_of(meta: Mapping[str, Any], where: object) -> str:
    """The stored config, as JSON.

    Args:
        meta: as stored.
        where: the checkpoint or the run, for the message.

    Raises:
        UserError: there is none.
    """
    return json.dumps(field(meta, "config", dict, where))


def field(meta: Mapping[str, Any], name: str, kind: type, where: object) -> Any:
    """What is stored by a name.

    Raises:
        UserError: nothing, or something of another type.
    """
    if name not in meta:
        raise UserError(f"{where} is no checkpoint of this program: {FILE} has no {name!r}")
    if not isinstance(meta[name], kind):
        raise UserError(
            f"{where} is no checkpoint of this program: {FILE} has {name}={meta[name]!r:.50}, not of type "
            f"{kind.__name__}"
        )
    return meta[name]


def vocabulary(meta: Mapping[str, Any], where: object) -> int:
    """The number of token ids of the model; 0 without text.

    Raises:
        UserError: the table of modalities is none.
    """
    table = field(meta, "modalities", list, where)
    counts = [one["vocabulary"] for one in table if isinstance(one, dict) and type(one.get("vocabulary")) is int]
    if len(counts) < len(table) or not all(0 <= count < 2**31 for count in counts):
        raise UserError(f"{where} is no checkpoint of this program: {FILE} has a modality without a vocabulary")
    return max(counts, default=0)


def refuse_newer(meta: Mapping[str, Any], where: object) -> None:
    """Refuses the state of a newer program.

    Raises:
        UserError: as said.
    """
    version = meta.get("state_version")
    if isinstance(version, int) and version > STATE_VERSION:
        raise UserError(
            f"{where} was made by a newer program (its state_version is {version}, this one reads up to "
            f"{STATE_VERSION}): update m3ae_jax"
        )


def check_version(meta: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuses parameters that mean something else here.

    Raises:
        UserError: as said.
    """
    refuse_newer(meta, f"checkpoint {checkpoint}")
    if meta.get("state_version") != STATE_VERSION:
        raise UserError(
            f"checkpoint {checkpoint}: its state_version is {meta.get('state_version')!r}, this program reads "
            f"{STATE_VERSION!r}: its weights alone can be used, with --config.init_from={checkpoint}"
        )
