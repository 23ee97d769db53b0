"""Runs evaluations: at the end of training, at an interval, or with ``--mode=eval`` on a run's checkpoint.

Each evaluation is one file beside this one. Those of frozen features share `features.encoded`, which encodes the
labelled data once for all of them. What an evaluation needs of the objective is a protocol of ``objectives/base.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import m3ae_jax.config as config_lib
from m3ae_jax.checkpoint.manager import Checkpoints, find
from m3ae_jax.config.schema import objective_groups
from m3ae_jax.data.sources import build_source
from m3ae_jax.errors import UserError, one_of
from m3ae_jax.evals.attention import check_layer
from m3ae_jax.evals.base import Result, place
from m3ae_jax.evals.labelled import check_labelled
from m3ae_jax.evals.reconstructions import Reconstructions, replayed_sheet
from m3ae_jax.evals.robustness import check_pictures
from m3ae_jax.evals.supervised import check_inputs
from m3ae_jax.evals.tsne import check_tsne
from m3ae_jax.evals.validation import Validation, priors
from m3ae_jax.metrics.writers import MetricWriter, read_rows
from m3ae_jax.objectives.base import Attends, Encodes, Restores
from m3ae_jax.report.pictures import curves
from m3ae_jax.report.run import build_run
from m3ae_jax.train.hooks import Hooks
from m3ae_jax.train.loop import may_fail, train
from m3ae_jax.train.setup import Setup, prepare
from m3ae_jax.train.step import TrainState

log = logging.getLogger("m3ae_jax")


@dataclasses.dataclass(frozen=True)
class Needs:
    """What an evaluation needs.

    Attributes:
        objective: protocols that the objective must have.
        labelled: parts of ``config.eval`` with classes.
        paired: pictures with captions in ``data.val``; grounding makes its own.
        check: refuses a config under which it cannot work.
        check_setup: refuses a run's parts that it cannot work with.
    """

    objective: tuple[Any, ...]
    labelled: tuple[str, ...] = ()
    paired: bool = False
    check: Callable[[ConfigDict], None] = lambda config: None
    check_setup: Callable[[Setup], None] = lambda setup: None


EVALUATIONS: dict[str, Needs] = {
    "grounding": Needs((Restores,), paired=True),
    "masked_prediction": Needs((Restores,), paired=True),
    "retrieval": Needs((Encodes, Restores), paired=True),
    "attention": Needs((Attends,), paired=True, check_setup=check_layer),
    "mask_ratios": Needs((Restores,)),
    "knn": Needs((Encodes,), ("train", "test")),
    "probe": Needs((Encodes,), ("train", "test")),
    "few_shot": Needs((Encodes,), ("train", "test")),
    "linear_probe": Needs((Encodes,), ("train", "test"), check=check_inputs),
    "finetune": Needs((Encodes,), ("train", "test"), check=check_inputs),
    "robustness": Needs((Encodes,), ("train", "test"), check=check_pictures),
    "ood": Needs((Encodes,), ("train", "test", "outside")),
    "tsne": Needs((Encodes,), ("test",), check=check_tsne),
}


def check(config: ConfigDict) -> None:
    """Refuses an evaluation that is unknown or cannot work; before a run begins, not at its end.

    Args:
        config: resolved.

    Raises:
        UserError: there is such an evaluation.
    """
    for name in config.evals:
        if name not in EVALUATIONS:
            raise UserError(one_of("evals", name, EVALUATIONS))
        if EVALUATIONS[name].paired and set(config.data.modalities) != {"image", "text"}:
            raise UserError(
                f"evals=({name!r},) needs data.modalities=('image', 'text'), not {tuple(config.data.modalities)!r}; "
                "add --config.evals="
            )
    _check_pairs(config)
    parts = sorted({part for name in config.evals for part in EVALUATIONS[name].labelled})
    if parts:
        check_labelled(config, tuple(parts))
    for name in config.evals:
        EVALUATIONS[name].check(config)


def check_objective(setup: Setup) -> None:
    """Refuses an evaluation that needs what the objective cannot do.

    Raises:
        UserError: there is such an evaluation.
    """
    for name in setup.config.evals:
        for protocol in EVALUATIONS[name].objective:
            if not isinstance(setup.objective, protocol):
                raise UserError(
                    f"evals=({name!r},): the objective {type(setup.objective).__name__} has no method for "
                    f"{protocol.__name__}, which this evaluation needs"
                )
        EVALUATIONS[name].check_setup(setup)


def _check_pairs(config: ConfigDict) -> None:
    paired = [name for name in config.evals if EVALUATIONS[name].paired and name != "grounding"]
    if not paired or config.data.val.source == "scenes":
        return
    if not config.data.val.path:
        raise UserError(f"evals=({paired[0]!r},) needs pictures with captions: data.val.path is empty")
    held = build_source(config, "val").modalities
    if set(held) != {"image", "text"}:
        raise UserError(f"evals=({paired[0]!r},) needs pictures with captions: data.val holds only {', '.join(held)}")


def run(name: str, setup: Setup, state: TrainState) -> Result:
    """Runs one evaluation on a state's parameters."""
    evaluation: Any = importlib.import_module(f"m3ae_jax.evals.{name}")
    result: Result = evaluation.evaluate(setup, state)
    return result


def _run_all(
    names: Sequence[str], setup: Setup, state: TrainState, stage: Callable[[str], None] = lambda name: None
) -> Iterator[Result]:
    for number, name in enumerate(names, 1):
        stage(f"evaluating: {name}")
        log.info("evaluation %d of %d: %s", number, len(names), name)
        result = run(name, setup, state)
        log.info(result.text)
        yield result


class RunHooks(Hooks):
    """What a run does beside its steps: validation, pictures, evaluations, its page.

    Args:
        setup: the run's parts.
        workdir: its folder.

    Raises:
        UserError: an evaluation of the config needs what the objective cannot do.
    """

    def __init__(self, setup: Setup, workdir: Path) -> None:
        check_objective(setup)
        self._setup, self._workdir = setup, workdir
        self._validation = Validation(setup)
        self._reconstructions = Reconstructions(setup, workdir / "pictures")

    def prior(self) -> dict[str, float]:
        """See `validation.priors`."""
        return priors(self._setup)

    def validate(self, state: TrainState) -> dict[str, float]:
        """See `validation.Validation`."""
        return self._validation(state)

    def draw(self, state: TrainState) -> np.ndarray | None:
        """See `reconstructions.Reconstructions`."""
        return self._reconstructions(state)

    def evaluate(self, state: TrainState, writer: MetricWriter, stage: Callable[[str], None]) -> None:
        """See `Hooks.evaluate`; the results are saved in ``evals/``."""
        folder, step = self._workdir / "evals", int(state.step)
        missing = [name for name in self._setup.config.evals if not place(folder, name, step).exists()]
        for result in _run_all(missing, self._setup, state, stage):
            result.write(writer, step)
            if jax.process_index() == 0:
                with may_fail(folder):
                    result.save(folder, step)

    def curves(self, step: int) -> None:
        """Draws ``curves.png``."""
        curves(read_rows(self._workdir, until=step), self._workdir / "curves.png", self._workdir.name)

    def page(self) -> None:
        """See `report.run.build_run`."""
        build_run(self._workdir)

    def replayed(self, state: TrainState, parts: Sequence[tuple[Any, int]], title: str) -> tuple[Any, list[str]] | None:
        """See `reconstructions.replayed_sheet`."""
        return replayed_sheet(self._setup, state, parts, title)


def train_and_evaluate(config: ConfigDict, workdir: Path, allow_config_change: tuple[str, ...] = ()) -> TrainState:
    """`train.loop.train` with all that a run does beside its steps; the arguments are the same."""
    check(config_lib.resolve(config))
    return train(config, workdir, allow_config_change, RunHooks)


def evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """``--mode=eval``: validation losses, pictures and ``config.evals`` of the newest checkpoint in `workdir`.

    Raises:
        UserError: there is no checkpoint, or it does not fit the config.
    """
    folder, step = find(str(workdir))
    resolved = config_lib.resolve(config)
    check(resolved)
    setup = prepare(resolved)
    check_objective(setup)
    with contextlib.closing(Checkpoints(folder, keep=1, read_only=True)) as checkpoints:
        _check_fits(checkpoints.meta(step), setup, folder.parent)
        state = checkpoints.restore(step, setup.abstract_state())
    log.info("step %d of %s", step, workdir)
    losses = Validation(setup)(state)
    results = [Result("validation", losses, "\n".join(f"{k} {v:.4f}" for k, v in losses.items()))]
    log.info(results[0].text)
    Reconstructions(setup, folder.parent / "evals")(state)
    results += _run_all(setup.config.evals, setup, state)
    first = jax.process_index() == 0
    with contextlib.closing(MetricWriter(folder.parent, enabled=first)) as writer:
        for result in results:
            result.write(writer, step)
    if first:
        for result in results:
            result.save(folder.parent / "evals", step)
        build_run(folder.parent)
    return {key: value for result in results for key, value in result.scalars.items()}


def _check_fits(meta: dict[str, Any], setup: Setup, run: Path) -> None:
    """Refuses a config under which a checkpoint's parameters would mean something else."""
    if meta.get("state_version") != setup.identity()["state_version"]:
        raise UserError(
            f"the checkpoint's state_version is {meta.get('state_version')!r}, this program reads "
            f"{setup.identity()['state_version']!r}: its weights alone can be used, with --config.init_from={run}"
        )
    groups = ("model.", *(f"{name}." for name in objective_groups(setup.config)))
    data = ("data.modalities", "data.image_size", "data.patch_size", "data.max_text_tokens")
    settings = config_lib.fields(setup.config)
    stored = config_lib.from_json(json.dumps(meta["config"]))
    changed = [
        f"{name}={new!r} (the checkpoint has {old!r})"
        for name, old, new in config_lib.difference(stored, setup.config)
        if name in data or (name.startswith(groups) and not settings[name].loss)
    ]
    if meta["tokenizer"] != setup.identity()["tokenizer"]:
        changed.append("data.tokenizer names another tokenizer than the run's")
    if changed:
        raise UserError(
            f"the checkpoint was made under another config: {'; '.join(changed)}. Use --config={run}/config.json"
        )
