"""Our own parameters as one safetensors file, by our names, with the config in its metadata."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

import m3ae_jax.config as config_lib
from m3ae_jax.config.schema import objective_groups
from m3ae_jax.convert import safetensors
from m3ae_jax.convert.formats import Foreign, Format, reading
from m3ae_jax.convert.keymap import Names, Report
from m3ae_jax.errors import UserError

METADATA = "m3ae_jax_config"


def read(path: Path) -> Foreign:
    """A ``.safetensors`` file of `write`."""
    foreign = Foreign(*safetensors.load(path))
    if METADATA not in foreign.facts:
        raise UserError(f"{path} has no {METADATA} in its metadata: it was not written by this program")
    return foreign


def objective_of(foreign: Foreign, path: Path) -> str:
    """The objective of the stored config.

    Raises:
        UserError: it cannot be read.
    """
    with reading(path, "file of this program"):
        return config_lib.from_json(foreign.facts[METADATA]).objective


def describe(foreign: Foreign, config: ConfigDict, report: Report) -> None:
    """Sets the model and its inputs as in the stored config; not where its data were."""
    stored = config_lib.from_json(foreign.facts[METADATA])
    for group in ("model", "compute", *objective_groups(stored)):
        config[group].update(stored[group])
    for name in ("modalities", "image_size", "patch_size", "image_mean", "image_std", "max_text_tokens", "tokenizer"):
        config.data[name] = stored.data[name]
    report.notes.append("names, layouts and numbers are ours")


def write(path: Path, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """A ``.safetensors`` file."""
    del report
    safetensors.save(path, arrays, {METADATA: config_lib.to_json(config), "format": "np"})


FORMAT = Format(
    "all parameters by our names: FILE.safetensors",
    read,
    describe,
    write,
    Names(modalities=("image", "text")),
    objective="",
)
