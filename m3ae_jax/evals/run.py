"""Runs evaluations: at the end of training, at an interval, or with ``--mode=eval`` on a run's checkpoint.

Each evaluation is one file beside this one. Those of frozen features share `features.encoded`, which encodes the
labelled data once for all of them. What an evaluation needs of the objective is a protocol of ``objectives/base.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import m3ae_jax.config as config_lib
import m3ae_jax.console as console
import m3ae_jax.evals.pointing as pointing
from m3ae_jax.checkpoint import meta as meta_lib
from m3ae_jax.checkpoint.manager import Checkpoints, find
from m3ae_jax.config.schema import objective_groups
from m3ae_jax.data.run_tokenizer import held
from m3ae_jax.data.sources import build_source
from m3ae_jax.errors import UserError, one_of
from m3ae_jax.evals.attention import check_layer
from m3ae_jax.evals.base import Data, Result, stored, table
from m3ae_jax.evals.binding import check_scenes
from m3ae_jax.evals.features import shared
from m3ae_jax.evals.labelled import check_labelled
from m3ae_jax.evals.named import SCENES, Part, data_of, part_of
from m3ae_jax.evals.reconstructions import Reconstructions, replayed_sheet
from m3ae_jax.evals.robustness import check_pictures
from m3ae_jax.evals.supervised import check_inputs
from m3ae_jax.evals.tsne import check_tsne
from m3ae_jax.evals.validation import Validation, priors
from m3ae_jax.evals.verdict import sentence
from m3ae_jax.metrics.writers import ROWS, MetricWriter, read_rows
from m3ae_jax.objectives.base import Attends, Embeds, Encodes, FindsKeywords, Grounds, Restores, Tokenizes, model_params
from m3ae_jax.report import card
from m3ae_jax.report.pictures import curves
from m3ae_jax.report.run import build_run
from m3ae_jax.stopping import Stop
from m3ae_jax.train.data_report import tell
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
        data: what it looks at, as `named.data_of` takes it; by default `labelled`, or the validation data.
        paired: pictures with captions in ``data.val``; grounding makes its own.
        check: refuses a config under which it cannot work.
        check_setup: refuses a run's parts that it cannot work with.
    """

    objective: tuple[Any, ...]
    labelled: tuple[str, ...] = ()
    paired: bool = False
    data: tuple[str, ...] = ()
    check: Callable[[ConfigDict], None] = lambda config: None
    check_setup: Callable[[Setup], None] = lambda setup: None

    @property
    def parts(self) -> tuple[str, ...]:
        """The data by which its results are named."""
        return self.data or self.labelled or ("val",)


EVALUATIONS: dict[str, Needs] = {
    "grounding": Needs((Restores,), paired=True, data=SCENES),
    "masked_prediction": Needs((Restores,), paired=True),
    "retrieval": Needs((Encodes,), paired=True),
    "binding": Needs((Embeds,), paired=True, data=SCENES[:1], check=check_scenes),
    "keywords": Needs((FindsKeywords,), paired=True, data=SCENES[:1]),
    "pointing": Needs((Grounds,), paired=True, data=SCENES[:1], check=pointing.check_scenes),
    "codebook": Needs((Tokenizes,)),
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


_ABLE = {
    Attends: "show its attention",
    Embeds: "embed pictures and captions",
    Encodes: "encode",
    FindsKeywords: "find keywords",
    Grounds: "say where in a picture a caption is",
    Restores: "restore what is hidden",
    Tokenizes: "give ids of pictures",
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
        if lacking := _lacking(setup, EVALUATIONS[name]):
            able = [other for other, of in EVALUATIONS.items() if not _lacking(setup, of)]
            raise UserError(
                f"evals=({name!r},): the objective {setup.config.objective!r} does not {lacking}, which this "
                f"evaluation needs{_weights_of_zero(setup.config)}; with it there are {', '.join(able) or 'none'}"
            )
        EVALUATIONS[name].check_setup(setup)


def _lacking(setup: Setup, needs: Needs) -> str:
    """What the objective cannot do, of what an evaluation needs; "": nothing."""
    unable = next((_ABLE[p] for p in needs.objective if not isinstance(setup.objective, p)), "")
    read = {modality.name for group in setup.objective.groups for modality in group.modalities}
    return unable or ("read pictures with captions" if needs.paired and not {"image", "text"} <= read else "")


def _weights_of_zero(config: ConfigDict) -> str:
    """The objective's losses that are switched off, for a message."""
    off = [
        f"{path}.{name}=0"
        for path in objective_groups(config)
        for name, value in config[path].items()
        if name.endswith("_weight") and value == 0
    ]
    return f" ({', '.join(off)})" if off else ""


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
    if Restores in EVALUATIONS[name].objective:
        state = dataclasses.replace(state, params=model_params(setup.objective, state.params, state.extra))
    evaluation: Any = importlib.import_module(f"m3ae_jax.evals.{name}")
    result: Result = evaluation.evaluate(setup, state)
    return result


def _data(setup: Setup, names: tuple[str, ...]) -> Data:
    """What an evaluation is of; a part is opened once, and what of it is left out or not read is logged then."""

    def opened(config: ConfigDict, name: str) -> Part:
        part = part_of(config, name)
        if name in config.eval:  # of other data the loop has told
            tell({f"eval.{name}": part.report})
        return part

    return data_of(
        setup.config, names, lambda config, name: shared(setup, f"data/{name}", lambda: opened(config, name))
    )


def _run_all(
    names: Sequence[str], setup: Setup, state: TrainState, stage: Callable[[str], None] = lambda name: None
) -> Iterator[Result]:
    for number, name in enumerate(names, 1):
        stage(f"evaluating: {name}")
        log.info("evaluation %d of %d: %s", number, len(names), name)
        result = run(name, setup, state)
        log.info(console.readable(result.text))
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

    def validate(self, state: TrainState, stopping: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """See `validation.Validation`."""
        return self._validation(state, stopping)

    def draw(self, state: TrainState) -> tuple[np.ndarray, str] | None:
        """See `reconstructions.Reconstructions`."""
        return self._reconstructions(state)

    def evaluate(self, state: TrainState, writer: MetricWriter, stage: Callable[[str], None]) -> dict[str, float]:
        """See `Hooks.evaluate`; the results are saved in ``evals/``, those of other data beside each other."""
        folder, step = self._workdir / "evals", int(state.step)
        data = {name: _data(self._setup, EVALUATIONS[name].parts) for name in self._setup.config.evals}
        done = {name: stored(folder, name, step, of.name) for name, of in data.items()}
        missing = [name for name, result in done.items() if result is None]
        figures = {key: x for result in done.values() for key, x in (result or {}).items() if isinstance(x, float)}
        if jax.process_index() == 0 and len(missing) < len(data):
            with may_fail(self._workdir / ROWS):
                self._tell_again({name: of for name, of in data.items() if name not in missing}, writer, step)
        for result in _run_all(missing, self._setup, state, stage):
            if jax.process_index() == 0:
                with may_fail(folder):
                    result.save(folder, step, data[result.name])
            result.write(writer, step)  # then: what is saved and not written is told again
            figures |= result.scalars
        return figures

    def _tell_again(self, data: Mapping[str, Data], writer: MetricWriter, step: int) -> None:
        """Writes saved results of which there are no rows: they were cut when the run fell back to its checkpoint."""
        told = next((row for row in read_rows(self._workdir) if row["step"] == step), {})
        for name, of in data.items():
            result = Result.saved(self._workdir / "evals", name, step, of)
            if result and not result.scalars.keys() <= told.keys():
                result.write(writer, step)

    def curves(self) -> None:
        """Draws ``curves.png``."""
        curves(read_rows(self._workdir), self._workdir / "curves.png", self._workdir.name)

    def page(self) -> None:
        """See `report.run.build_run`; of a run that is done also its card, `report.card`."""
        _report(self._workdir)

    def replayed(self, state: TrainState, parts: Sequence[tuple[Any, int]], title: str) -> tuple[Any, list[str]] | None:
        """See `reconstructions.replayed_sheet`."""
        return replayed_sheet(self._setup, state, parts, title)


def train_and_evaluate(
    config: ConfigDict, workdir: Path, allow_config_change: tuple[str, ...] = (), stop: Stop | None = None
) -> TrainState:
    """`train.loop.train` with all that a run does beside its steps; the arguments are the same."""
    check(config_lib.resolve(config))
    return train(config, workdir, allow_config_change, RunHooks, stop)


def evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """``--mode=eval``: validation losses, pictures and ``config.evals`` of the newest checkpoint in `workdir`.

    Raises:
        UserError: there is no checkpoint, or it does not fit the config.
    """
    folder, step = find(str(workdir))
    resolved = config_lib.resolve(config)
    check(resolved)
    first = jax.process_index() == 0
    writer = MetricWriter(folder.parent, resolved, enabled=first)
    setup = prepare(resolved, folder.parent)
    check_objective(setup)
    with contextlib.closing(Checkpoints(folder, keep=1, read_only=True)) as checkpoints:
        _check_fits(checkpoints.meta(step), setup, folder / str(step))
        state = checkpoints.restore(step, setup.abstract_state())
    log.info("step %d of %s", step, workdir)
    writer.start(step, evaluation=True)
    tell(setup.reports())
    data = {name: _data(setup, EVALUATIONS[name].parts) for name in setup.config.evals}
    data["validation"] = _data(setup, ("val",) if setup.val_source else ())
    losses = Validation(setup)(state) or {}
    results = [_validated(losses, priors(setup))]
    log.info(console.readable(results[0].text))
    Reconstructions(setup, folder.parent / "evals")(state)
    results += _run_all(setup.config.evals, setup, state)
    with contextlib.closing(writer):
        for result in results:
            result.write(writer, step)
    if first:
        for result in results:
            result.save(folder.parent / "evals", step, data[result.name])
        _report(folder.parent)
    return {key: value for result in results for key, value in result.scalars.items()}


def _validated(losses: Mapping[str, float], prior: Mapping[str, float]) -> Result:
    """The validation losses, each beside that of a model that ignores its input."""
    beaten = {name: prior.get(f"prior/{name.removeprefix('val/')}") for name in losses}
    rows = [[name, f"{value:.4f}", _figure(beaten[name])] for name, value in losses.items()]
    clauses = [
        f"{name} {losses[name]:.4f}, {losses[name] / before:.2f} times what ignoring the input costs"
        for name, before in beaten.items()
        if before
    ]
    return Result("validation", dict(losses), f"{table(('figure', 'value', 'prior'), rows)}\n\n{sentence(clauses)}")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _report(workdir: Path) -> None:
    """The run's page, and the card of one that is done."""
    build_run(workdir)
    if card.is_done(workdir):
        card.write(workdir)


def _check_fits(meta: dict[str, Any], setup: Setup, checkpoint: Path) -> None:
    """Refuses a config under which a checkpoint's parameters would mean something else."""
    meta_lib.check_version(meta, checkpoint)
    groups = ("model.", *(f"{name}." for name in objective_groups(setup.config)))
    data = ("data.modalities", "data.image_size", "data.patch_size", "data.max_text_tokens")
    settings = config_lib.fields(setup.config)
    before = config_lib.from_json(meta_lib.config_of(meta, checkpoint))
    changed = [
        f"{name}={new!r} (the checkpoint has {old!r})"
        for name, old, new in config_lib.same_objective(before, setup.config)
        if name in data or name == "objective" or (name.startswith(groups) and not settings[name].loss)
    ]
    if meta_lib.field(meta, "tokenizer", str, checkpoint) != setup.identity()["tokenizer"]:
        own = held(checkpoint.parents[1])
        changed.append(f"data.tokenizer names another tokenizer than the run's{f', {own}' if own else ''}")
    if changed:
        raise UserError(
            f"the checkpoint was made under another config: {'; '.join(changed)}. Use "
            f"--config={checkpoint.parents[1]}/config.json"
        )
