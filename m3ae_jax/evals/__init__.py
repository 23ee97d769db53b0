"""Evaluations: one file each, run at the end of training or with ``--mode=eval`` on a run's checkpoint.

Those of frozen features share `features.encoded`, which encodes the labelled data once for all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from m3ae_jax.errors import UserError, one_of

if TYPE_CHECKING:
    from m3ae_jax.metrics.writers import MetricWriter
    from m3ae_jax.train.setup import Setup
    from m3ae_jax.train.step import TrainState

log = logging.getLogger("m3ae_jax")

LABELLED: dict[str, tuple[str, ...]] = {
    "knn": ("train", "test"),
    "probe": ("train", "test"),
    "few_shot": ("train", "test"),
    "linear_probe": ("train", "test"),
    "finetune": ("train", "test"),
    "robustness": ("train", "test"),
    "ood": ("train", "test", "outside"),
    "tsne": ("test",),
}
"""Evaluations on labelled data, and which parts of ``config.eval`` each needs."""
PAIRED = ("grounding", "masked_prediction", "retrieval", "attention")
"""Those that need pictures with captions."""
NAMES = (*PAIRED, "mask_ratios", *LABELLED)


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        name: the evaluation.
        scalars: figures, as ``<name>/...``.
        text: a table for people.
        pictures: `[H, W, 3] uint8` by name.
    """

    name: str
    scalars: dict[str, float]
    text: str
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

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


def check(config: ConfigDict) -> None:
    """Raises `UserError` for an evaluation that is unknown or cannot work; before a run begins, not at its end."""
    if config.eval.alone:
        raise UserError(
            "eval.alone=True: this config holds evaluations alone, for --mode=eval on the checkpoint in --workdir"
        )
    for name in config.evals:
        if name not in NAMES:
            raise UserError(one_of("evals", name, NAMES))
        if name in PAIRED and set(config.data.modalities) != {"image", "text"}:
            raise UserError(
                f"evals=({name!r},) needs data.modalities=('image', 'text'), not {tuple(config.data.modalities)!r}; "
                "add --config.evals="
            )
    _check_pairs(config)
    parts = sorted({part for name in config.evals for part in LABELLED.get(name, ())})
    if parts:
        from m3ae_jax.evals.labelled import check_labelled

        check_labelled(config, tuple(parts))
    if "linear_probe" in config.evals or "finetune" in config.evals:
        from m3ae_jax.evals import supervised

        supervised.check(config)
    if "robustness" in config.evals:
        from m3ae_jax.evals.robustness import check_pictures

        check_pictures(config)
    if "attention" in config.evals:
        from m3ae_jax.evals.attention import check_layer

        check_layer(config)
    if "tsne" in config.evals:
        from m3ae_jax.evals.tsne import check_tsne

        check_tsne(config)


def _check_pairs(config: ConfigDict) -> None:
    asked = [name for name in config.evals if name in PAIRED and name != "grounding"]
    if not asked or config.data.val.source == "scenes":
        return
    from m3ae_jax.data.sources import build_source

    if not config.data.val.path:
        raise UserError(f"evals=({asked[0]!r},) needs pictures with captions: data.val.path is empty")
    held = build_source(config, "val").modalities
    if set(held) != {"image", "text"}:
        raise UserError(f"evals=({asked[0]!r},) needs pictures with captions: data.val holds only {', '.join(held)}")


def _check_fits(meta: dict[str, Any], setup: Setup, run: Path) -> None:
    """Refuses a config under which a checkpoint's parameters would mean something else."""
    from m3ae_jax.config import PROGRAM_FIELDS, difference, from_json, is_among

    if meta.get("state_version") != setup.identity()["state_version"]:
        raise UserError(
            f"the checkpoint's state_version is {meta.get('state_version')!r}, this program reads "
            f"{setup.identity()['state_version']!r}: its weights alone can be used, with --config.init_from={run}"
        )
    fields = ("model.", "data.modalities", "data.image_size", "data.patch_size", "data.max_text_tokens")
    stored = from_json(json.dumps(meta["config"]))
    changed = [
        f"{name}={new!r} (the checkpoint has {old!r})"
        for name, old, new in difference(stored, setup.config)
        if name.startswith(fields) and not is_among(name, (*PROGRAM_FIELDS, "model.compute_dtype"))
    ]
    if meta["tokenizer"] != setup.identity()["tokenizer"]:
        changed.append("data.tokenizer names another tokenizer than the run's")
    if changed:
        raise UserError(
            f"the checkpoint was made under another config: {'; '.join(changed)}. Use --config={run}/config.json"
        )


def _completed(config: ConfigDict, meta: dict[str, Any], run: Path) -> ConfigDict:
    """A checkpoint's config with what `config` sets: all fields in which it is not the default.

    Raises:
        UserError: the checkpoint's config names code to import, and `config` does not name it too.
    """
    from m3ae_jax.config import apply_difference, check_named_code, default, difference, from_json

    changes = difference(default(), config)
    whole = from_json(json.dumps(meta["config"]))
    apply_difference(whole, changes)
    whole.eval.alone = False
    check_named_code(f"{run}/config.json", whole, [(name, str(value)) for name, _, value in changes])
    return whole


def run(name: str, setup: Setup, state: TrainState) -> Result:
    """Runs one evaluation on a state's parameters."""
    evaluation: Any = importlib.import_module(f"m3ae_jax.evals.{name}")
    return evaluation.evaluate(setup, state)


def evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """``--mode=eval``: validation losses, pictures and ``config.evals`` of the newest checkpoint in `workdir`.

    Raises:
        UserError: there is no checkpoint, or it does not fit the config.
    """
    from m3ae_jax.checkpoint.manager import Checkpoints, find
    from m3ae_jax.config import resolve
    from m3ae_jax.evals.reconstructions import Reconstructions
    from m3ae_jax.evals.validation import Validation
    from m3ae_jax.metrics.writers import MetricWriter
    from m3ae_jax.train.loop import build_page
    from m3ae_jax.train.setup import prepare

    folder, step = find(str(workdir))
    checkpoints = Checkpoints(folder, keep=1, read_only=True)
    if config.eval.alone:
        config = _completed(config, checkpoints.meta(step), folder.parent)
    setup = prepare(resolve(config))
    _check_fits(checkpoints.meta(step), setup, folder.parent)
    state = checkpoints.restore(step, setup.abstract_state())
    checkpoints.close()
    log.info("step %d of %s", step, workdir)
    losses = Validation(setup)(state)
    log.info("\n".join(f"  {name}  {value:.4f}" for name, value in losses.items()))
    results = [Result("validation", losses, "\n".join(f"{k} {v:.4f}" for k, v in losses.items()))]
    Reconstructions(setup, folder.parent / "evals")(state)
    for number, name in enumerate(setup.config.evals, 1):
        log.info("evaluation %d of %d: %s", number, len(setup.config.evals), name)
        results.append(run(name, setup, state))
        log.info(results[-1].text)
    first = jax.process_index() == 0
    with contextlib.closing(MetricWriter(folder.parent, enabled=first)) as writer:
        for result in results:
            result.write(writer, step)
    if first:
        for result in results:
            result.save(folder.parent / "evals", step)
        build_page(folder.parent)
    return {key: value for result in results for key, value in result.scalars.items()}
