"""``--mode=replay --step=N``: computes one step of a run again, exactly, and looks into it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from m3ae_jax import config as config_lib
from m3ae_jax.atomic import replacing
from m3ae_jax.checkpoint import manifest
from m3ae_jax.checkpoint.manager import Checkpoints
from m3ae_jax.errors import UserError
from m3ae_jax.evals.reconstructions import row_of
from m3ae_jax.metrics.writers import read_every_step
from m3ae_jax.objectives.base import Batch, mean
from m3ae_jax.parallel.mesh import batch_parts, fetch, put_batch, put_whole_batch
from m3ae_jax.report.pictures import reconstruction_sheet
from m3ae_jax.train.guard import VERDICTS
from m3ae_jax.train.identity import Identity
from m3ae_jax.train.loop import build_page, fresh_state
from m3ae_jax.train.setup import Setup, prepare
from m3ae_jax.train.step import TrainState, step_gradient

log = logging.getLogger("m3ae_jax")

WORST = 8
"""Examples that are shown."""


def replay(config: ConfigDict, workdir: Path, step: int) -> dict[str, Any]:
    """Restores the nearest checkpoint before a step, does the steps up to it, and looks into the step itself.

    On the device layout and versions of the run the loss is the recorded one, bit for bit. Writes
    ``replay/step_N.json`` and ``.png`` and the run's page; changes nothing else.

    Args:
        config: the run's, as loaded and overridden.
        workdir: the run's folder.
        step: from 1 on.

    Returns:
        What the JSON file holds: ``loss``, ``recorded_loss`` (None if none was), ``equal``, ``terms``,
        ``gradient_norms`` of each layer, and the ``worst`` examples.

    Raises:
        UserError: no such step, or the folder holds another run.
    """
    resolved = config_lib.resolve(config)
    setup = prepare(resolved)
    if not 1 <= step <= setup.total_steps:
        raise UserError(f"--step={step}: the run has the steps 1 to {setup.total_steps}")
    state = _nearest(setup, workdir, step)
    begin = int(state.step)
    log.info("replaying step %d from step %d: %d steps to do", step, begin, step - begin)
    step_fn = setup.train_step()
    look = setup.jit(_look(setup))
    with contextlib.closing(iter(setup.train_batches(begin))) as batches:
        for _ in range(begin + 1, step):
            state, _ = step_fn(state, put_batch(next(batches), setup.mesh))
        batch = put_batch(next(batches), setup.mesh)
    inside = fetch(look(state, batch))
    on_host = fetch(batch)
    worst = _worst(setup, on_host, inside["per_example"])
    sheet = _sheet(setup, state, on_host, worst, step)
    _, figures = step_fn(state, batch)
    found = _report(setup, workdir, step, begin, {k: float(v) for k, v in figures.items()}, inside["norms"], worst)
    if jax.process_index() == 0:
        _write(workdir, found, sheet)
    return found


def _nearest(setup: Setup, workdir: Path, step: int) -> TrainState:
    """The state of the newest whole checkpoint before a step, or the state that the run began with."""
    folder = workdir / "checkpoints"
    identity = Identity(setup.config, setup.identity())
    for before in manifest.finished(folder):
        wrong = manifest.problems(folder / str(before)) if before < step else None
        if wrong:
            log.warning("checkpoint %s is damaged: %s", folder / str(before), manifest.summary(wrong))
        elif before < step:
            with contextlib.closing(Checkpoints(folder, keep=1, read_only=True)) as checkpoints:
                identity.check(str(workdir), checkpoints.meta(before))
                return checkpoints.restore(before, setup.abstract_state())
    saved = workdir / "config.json"
    if not saved.exists():
        raise UserError(f"--workdir={workdir} holds no run")
    identity.check(str(workdir), {"config": config_lib.load(str(saved)).to_dict()})
    log.info("no checkpoint before step %d is left: from the start of the run", step)
    return fresh_state(setup)


def _look(setup: Setup) -> Callable[[TrainState, Batch], dict[str, Any]]:
    """What the step does not tell: gradient norms of each layer, each example's loss."""
    config, objective = setup.config, setup.objective
    gradient = step_gradient(objective, config.seed, config.micro_batches, len(setup.train_data.names))
    axes = nn.get_partition_spec(jax.eval_shape(objective.init, jax.random.key(0)))

    def look(state: TrainState, batch: Batch) -> dict[str, Any]:
        grads, output = gradient(state, batch)
        parts = output.per_example if "parts" in batch else {"train": output.per_example}
        losses = {
            name: sum(objective.term_weights[term] * mean(*pair) for term, pair in terms.items())
            for name, terms in parts.items()
        }
        return {"norms": layer_norms(grads, axes), "per_example": losses}

    return look


def layer_norms(grads: Any, axes: Any) -> dict[str, jax.Array]:
    """Norms of each module's gradients; of stacked layers one each, as ``encoder/blocks/3``.

    Args:
        grads: like the parameters.
        axes: logical axes of each, `jax.sharding.PartitionSpec` leaves.
    """
    squares: dict[str, jax.Array] = {}
    for (path, leaf), names in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(axes), strict=True):
        keys = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        name = "/".join(keys[:2]) if len(keys) > 2 else keys[0]
        stacked = tuple(names)[:1] == ("layers",)
        layers = {f"{name}/{i}": leaf[i] for i in range(leaf.shape[0])} if stacked else {name: leaf}
        for key, layer in layers.items():
            squares[key] = squares.get(key, jnp.float32(0.0)) + jnp.sum(jnp.square(layer))
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def _worst(setup: Setup, batch: Batch, losses: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The examples with the largest loss, those first whose loss is not finite."""
    found = []
    for name, values in losses.items():
        example = (batch["parts"][name] if "parts" in batch else batch)["example"]
        for row, loss in enumerate(np.asarray(values, np.float64).tolist()):
            source = int(example["source"][row])
            told = {
                "position": int(example["position"][row]),
                "source": setup.train_data.members[source].name,
                "index": int(example["index"][row]),
                "loss": loss,
            }
            found.append({"part": name, "row": row, **told})
    return sorted(found, key=lambda one: (math.isfinite(one["loss"]), -one["loss"]))[:WORST]


def _sheet(setup: Setup, state: TrainState, batch: Batch, worst: list[dict[str, Any]], step: int) -> Any:
    """Pictures and captions of the worst examples, and what the model makes of them; adds their captions to `worst`."""
    reconstruct = setup.jit(setup.objective.reconstruct)
    drawn: dict[int, Any] = {}
    unit = batch_parts(setup.mesh)
    for part in {one["part"] for one in worst}:
        mine = [i for i, one in enumerate(worst) if one["part"] == part]
        rows = [worst[i]["row"] for i in mine]
        rows += rows[:1] * (-len(rows) % unit)
        whole = batch["parts"][part] if "parts" in batch else batch
        few = jax.tree.map(lambda x, rows=rows: np.asarray(x)[np.array(rows)], whole)
        guesses = fetch(reconstruct(state.params, put_whole_batch(few, setup.mesh)))
        for place, i in enumerate(mine):
            drawn[i] = row_of(setup, few, guesses, place)
            worst[i]["caption"] = "".join(word.text for word in drawn[i].words).strip()
    return reconstruction_sheet([drawn[i] for i in range(len(worst))], f"step {step}: the largest losses first")


def _report(
    setup: Setup,
    workdir: Path,
    step: int,
    begin: int,
    figures: dict[str, float],
    norms: dict[str, np.ndarray],
    worst: list[dict[str, Any]],
) -> dict[str, Any]:
    recorded = read_every_step(workdir, step)
    loss = figures["loss"]
    equal = None if recorded is None else np.array_equal(loss, recorded["loss"], equal_nan=True)
    found: dict[str, Any] = {
        "step": step,
        "from_step": begin,
        "loss": loss,
        "recorded_loss": None if recorded is None else recorded["loss"],
        "equal": equal,
        "verdict": VERDICTS[int(figures["skipped"])],
        "terms": {name: value for name, value in figures.items() if name.endswith(("loss", "accuracy"))},
        "gradient_norms": {"all": figures["gradient_norm"], **{name: float(norm) for name, norm in norms.items()}},
        "slots": setup.slots(step),
        "worst": [{k: v for k, v in one.items() if k not in ("part", "row")} for one in worst],
    }
    said = {None: "no loss was recorded", True: "the recorded one, bit for bit"}
    log.info(
        "step %d: loss %.9g, %s; %s",
        step,
        loss,
        said.get(equal, f"NOT the recorded {found['recorded_loss']}: another device layout, machine or version?"),
        found["verdict"],
    )
    for name, norm in found["gradient_norms"].items():
        log.info("  gradient norm %-28s %.6g", name, norm)
    for one in found["worst"]:
        log.info("  loss %.4f  %s %d (position %d)", one["loss"], one["source"], one["index"], one["position"])
    return found


def _write(workdir: Path, found: dict[str, Any], sheet: Any) -> None:
    place = workdir / "replay" / f"step_{found['step']}.json"
    try:
        with replacing(place) as fresh:
            fresh.write_text(json.dumps(_finite(found), indent=1) + "\n", encoding="utf-8")
        sheet.save(place.with_suffix(".png"))
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    build_page(workdir)
    log.info("in %s and on the run's page %s", place.parent, workdir / "report.html")


def _finite(value: Any) -> Any:
    """As JSON can hold it: null for what is not a finite number."""
    if isinstance(value, dict):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
