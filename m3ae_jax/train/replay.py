"""``--mode=replay --step=N``: computes one step of a run again, exactly, and looks into it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import m3ae_jax.checkpoint.manifest as manifest
import m3ae_jax.config as config_lib
import m3ae_jax.console as console
from m3ae_jax.atomic import replacing
from m3ae_jax.checkpoint.manager import Checkpoints
from m3ae_jax.errors import UserError
from m3ae_jax.metrics.writers import read_every_step
from m3ae_jax.objectives.base import Batch
from m3ae_jax.objectives.batch import mean
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.train.guard import VERDICTS
from m3ae_jax.train.hooks import Hooks
from m3ae_jax.train.identity import Identity
from m3ae_jax.train.setup import Setup, prepare
from m3ae_jax.train.step import TrainState, step_gradient

log = logging.getLogger("m3ae_jax")

WORST = 8
"""Examples that are shown."""


def replay(
    config: ConfigDict,
    workdir: Path,
    step: int,
    hooks: Callable[[Setup, Path], Hooks] = lambda setup, workdir: Hooks(),
) -> dict[str, Any]:
    """Restores the nearest checkpoint before a step, does the steps up to it, and looks into the step itself.

    On the device layout and versions of the run the loss is the recorded one, bit for bit. Writes
    ``replay/step_N.json`` and ``.png`` and the run's page; changes nothing else.

    Args:
        config: the run's, as loaded and overridden.
        workdir: the run's folder.
        step: from 1 on.
        hooks: draw the worst examples and the run's page.

    Returns:
        What the JSON file holds: ``loss``, ``recorded_loss`` (None if none was), ``equal``, ``terms``,
        ``gradient_norms`` of each layer, and the ``worst`` examples.

    Raises:
        UserError: no such step, or the folder holds another run.
    """
    resolved = config_lib.resolve(config)
    setup = prepare(resolved, workdir)
    if not 1 <= step <= setup.total_steps:
        raise UserError(f"--step={step}: the run has the steps 1 to {setup.total_steps}")
    state = _nearest(setup, workdir, step)
    begin = int(state.step)
    log.info("replaying step %d from step %d: %d steps to do", step, begin, step - begin)
    step_fn = setup.train_step()
    inspect = setup.jit(_inspection(setup))
    with contextlib.closing(iter(setup.train_batches(begin))) as batches:
        for _ in range(begin + 1, step):
            state, _ = step_fn(state, put_batch(next(batches), setup.mesh))
        batch = put_batch(next(batches), setup.mesh)
    inside = fetch(inspect(state, batch))
    on_host = fetch(batch)
    worst = _worst(setup, on_host, inside["per_example"])
    beside = hooks(setup, workdir)
    rows = [(on_host[one["part"]], one["row"]) for one in worst]
    drawn = beside.replayed(state, rows, f"step {step}: the largest losses first")
    if drawn is not None:
        for one, caption in zip(worst, drawn[1], strict=True):
            one["caption"] = caption
    _, metrics = step_fn(state, batch)
    report = _report(setup, workdir, step, begin, {k: float(v) for k, v in metrics.items()}, inside["norms"], worst)
    if jax.process_index() == 0:
        _write(workdir, report, drawn and drawn[0])
        beside.page()
        log.info("in %s and on the run's page %s", workdir / "replay", workdir / "report.html")
    return report


def _nearest(setup: Setup, workdir: Path, step: int) -> TrainState:
    """The state of the newest whole checkpoint before a step, or the state that the run began with."""
    folder = workdir / "checkpoints"
    identity = Identity(setup.config, setup.identity())
    for before in manifest.steps(folder):
        if before >= step:
            continue
        if wrong := manifest.problems(folder / str(before)):
            log.warning("checkpoint %s is damaged: %s", folder / str(before), manifest.summary(wrong))
        else:
            with contextlib.closing(Checkpoints(folder, keep=1, read_only=True)) as checkpoints:
                identity.check(str(workdir), checkpoints.meta(before))
                return checkpoints.restore(before, setup.abstract_state())
    saved = workdir / "config.json"
    if not saved.exists() and not manifest.steps(folder):
        raise UserError(f"--workdir={workdir} holds no run")
    identity.check(str(workdir), {"config": config_lib.load(str(saved)).to_dict()})
    log.info("no checkpoint before step %d is left: from the start of the run", step)
    return setup.fresh_state()


def _inspection(setup: Setup) -> Callable[[TrainState, Batch], dict[str, Any]]:
    """What the step does not report: gradient norms of each layer, each example's loss."""
    config, objective = setup.config, setup.objective
    gradient = step_gradient(objective, config.seed, config.micro_batches, len(setup.train_data.names))

    def inspect(state: TrainState, batch: Batch) -> dict[str, Any]:
        grads, output = gradient(state, batch)
        losses = {
            name: sum(objective.term_weights[term] * mean(*pair) for term, pair in terms.items())
            for name, terms in output.per_example.items()
            if terms
        }
        return {"norms": layer_norms(grads, objective.stacks), "per_example": losses}

    return inspect


def layer_norms(grads: Any, stacks: Sequence[str]) -> dict[str, jax.Array]:
    """Norms of each module's gradients; of stacked layers one each, as ``encoder/transformer/blocks/3``.

    Args:
        grads: like the parameters.
        stacks: paths of the layer stacks (`Objective.stacks`), whose leaves have the layers as first axis.
    """
    squares: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        stack = next((stack for stack in stacks if name.startswith(f"{stack}/")), None)
        module = "/".join(name.split("/")[:-1][:2]) or name
        layers = {f"{stack}/{i}": leaf[i] for i in range(leaf.shape[0])} if stack else {module: leaf}
        for key, layer in layers.items():
            squares[key] = squares.get(key, jnp.float32(0.0)) + jnp.sum(jnp.square(layer))
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def _worst(setup: Setup, batch: Batch, losses: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The examples with the largest loss, those first whose loss is not finite."""
    examples = []
    for part, values in losses.items():
        columns = [batch[part]["example"][name].tolist() for name in ("position", "source", "index")]
        rows = zip(*columns, np.asarray(values, np.float64).tolist(), strict=True)
        for row, (position, number, index, loss) in enumerate(rows):
            source = setup.train_data.members[number].name
            examples.append(
                {"part": part, "row": row, "position": position, "source": source, "index": index, "loss": loss}
            )
    return sorted(examples, key=lambda one: (math.isfinite(one["loss"]), -one["loss"]))[:WORST]


def _report(
    setup: Setup,
    workdir: Path,
    step: int,
    begin: int,
    metrics: dict[str, float],
    norms: dict[str, np.ndarray],
    worst: list[dict[str, Any]],
) -> dict[str, Any]:
    loss, recorded = metrics["loss"], (read_every_step(workdir, step) or {}).get("loss")
    equal = None if recorded is None else np.array_equal(loss, recorded, equal_nan=True)
    report: dict[str, Any] = {
        "step": step,
        "from_step": begin,
        "loss": loss,
        "recorded_loss": recorded,
        "equal": equal,
        "verdict": VERDICTS[int(metrics["skipped"])],
        "terms": {name: value for name, value in metrics.items() if name.endswith(("loss", "accuracy"))},
        "gradient_norms": {"all": metrics["gradient_norm"], **{name: float(norm) for name, norm in norms.items()}},
        "slots": setup.slots(step),
        "worst": [{k: v for k, v in one.items() if k not in ("part", "row")} for one in worst],
    }
    other = f"NOT the recorded {recorded}: another device layout, machine or version?"
    comparison = {None: "no loss was recorded", True: "the recorded one, bit for bit", False: other}[equal]
    log.info("step %d: loss %.9g, %s; %s", step, loss, comparison, report["verdict"])
    lines = [(name, f"{norm:.6g}") for name, norm in report["gradient_norms"].items()]
    log.info("%s", console.table(lines, ("gradient norm of", "L2")))
    examples = [(f"{one['loss']:.4f}", one["source"], one["index"], one["position"]) for one in report["worst"]]
    log.info("%s", console.table(examples, ("loss", "source", "example", "position")))
    return report


def _write(workdir: Path, report: dict[str, Any], sheet: Any | None) -> None:
    place = workdir / "replay" / f"step_{report['step']}.json"
    try:
        with replacing(place) as fresh:
            fresh.write_text(json.dumps(_finite(report), indent=1) + "\n", encoding="utf-8")
        if sheet is not None:
            sheet.save(place.with_suffix(".png"))
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None


def _finite(value: Any) -> Any:
    """As JSON can hold it: null for what is not a finite number."""
    if isinstance(value, dict):
        return {key: _finite(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
