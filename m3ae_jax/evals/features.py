"""What the encoder says of labelled pictures and captions, computed once for all evaluations of a state.

All tokens are visible. A feature is the CLS token or the mean of the other tokens, from the picture alone, the
caption alone, or both together. Beside the trained encoder's stand what any of it must beat: an untrained encoder's,
and the picture's pixels.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from m3ae_jax.data import images
from m3ae_jax.data.pipeline import grid
from m3ae_jax.data.sources.base import Source
from m3ae_jax.evals.clean import clean_batches
from m3ae_jax.evals.labelled import Noted, check_labels, open_labelled
from m3ae_jax.objectives.base import Batch, Objective, Params
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

log = logging.getLogger("m3ae_jax")

T = TypeVar("T")

PIXELS = "pixels"
_PIXELS_SIDE = 16


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A labelled source as features.

    Attributes:
        features: `[n, D] float32` by kind: ``trained/image/cls``, ``untrained/both/mean``, ``pixels``, ...
        label: `[n] int32`.
        classes: their names.
        left_out: examples whose picture did not decode.
    """

    features: dict[str, np.ndarray]
    label: np.ndarray
    classes: tuple[str, ...]
    left_out: int


def encode_source(setup: Setup, params: dict[str, Params], source: Source, examples: int) -> Encoded:
    """Encodes a labelled source.

    Args:
        setup: the run's parts.
        params: parameters by the name that stands before their features'.
        source: with classes.
        examples: at most so many, a random choice.

    Raises:
        UserError: an example has no label, or none can be read.
    """
    noted = Noted(source)
    encode = encoder(setup)
    rows: list[dict[str, np.ndarray]] = []
    for batch in clean_batches(setup, noted, examples):
        extra = {
            "label": noted.label_of(batch["example"]["index"]),
            "valid": batch["example"]["valid"],
            "real": batch["example"]["position"] < min(examples, len(source)),
            **raw_pixels(setup, batch),
        }
        on_device = put_batch({"groups": batch["groups"]}, setup.mesh)
        found = {f"{name}/{kind}": x for name, p in params.items() for kind, x in encode(p, on_device).items()}
        rows.append(fetch(found | put_batch(extra, setup.mesh)))
    columns = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    valid, label = columns.pop("valid"), columns.pop("label")
    left_out = int((columns.pop("real") & ~valid).sum())
    if left_out:
        log.warning("%d labelled examples are left out: their pictures do not decode", left_out)
    check_labels(valid, label)
    return Encoded({k: x[valid] for k, x in columns.items()}, label[valid], tuple(source.classes), left_out)


def pooled(objective: Objective, params: Params, batch: Batch, rng: jax.Array | None = None) -> dict[str, jax.Array]:
    """``{"image/cls": [B, D] float32, "image/mean": ..., "text/...": ..., "both/...": ...}`` of what is visible.

    The mean is over real tokens; of an example without any (no caption) it is zero. `rng` is of dropout; None: none.
    """
    modality = {group.name: group.modality for group in objective.groups}
    present = sorted({modality[name] for name in batch["groups"]})
    inputs = {m: (m,) for m in present} | ({"both": tuple(present)} if len(present) > 1 else {})
    found = {}
    for name, wanted in inputs.items():
        groups = {g: sets for g, sets in batch["groups"].items() if modality[g] in wanted}
        encoded = objective.encode(params, {**batch, "groups": groups}, rng)
        valid = jnp.concatenate([sets["visible"]["valid"] for sets in groups.values()], axis=1)
        tokens = jnp.concatenate([encoded[g].astype(jnp.float32) for g in groups], axis=1)
        total = jnp.sum(jnp.where(valid[..., None], tokens, 0.0), axis=1)
        found[f"{name}/cls"] = encoded["cls"].astype(jnp.float32)
        found[f"{name}/mean"] = total / jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
    return found


def raw_pixels(setup: Setup, batch: Batch) -> dict[str, np.ndarray]:
    """``{"pixels": [b, s * s * 3] float32}``: the pictures shrunk to about 16 x 16 by means of squares; or nothing."""
    group = next((g.name for g in setup.objective.groups if g.modality == "image" and g.name in batch["groups"]), None)
    if group is None:
        return {}
    return {PIXELS: shrunk(setup, batch["groups"][group]["visible"]["value"]) / np.float32(255)}


def shrunk(setup: Setup, patches: Any) -> Any:
    """Pictures shrunk to about 16 x 16 by means of squares.

    Args:
        setup: says how they were cut into patches.
        patches: `[b, L, P]`, NumPy's or JAX's.

    Returns:
        `[b, s * s * 3] float32`, in the patches' unit.
    """
    whole = images.unpatchify(patches, setup.config.data.patch_size, grid(setup.config))
    side = setup.config.data.image_size
    sides = [s for s in range(1, side + 1) if side % s == 0]
    small = min(sides, key=lambda s: abs(np.log(s / _PIXELS_SIDE)))
    cut = whole.reshape(len(whole), small, side // small, small, side // small, 3)
    return cut.mean(axis=(2, 4), dtype=np.float32).reshape(len(whole), -1)


def fresh_params(setup: Setup) -> Params:
    """An untrained encoder's parameters on the mesh, without an optimizer's state."""

    def compiled() -> Callable[[], Params]:
        shardings = jax.tree.map(lambda x: x.sharding, setup.abstract_state().params)
        key = jax.random.key(setup.config.seed)
        return jax.jit(lambda: nn.unbox(setup.objective.init(key)), out_shardings=shardings)

    return kept(setup, "fresh_params", compiled)()


def encoder(setup: Setup) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """`pooled` of the setup's objective, compiled."""
    return kept(setup, "encoder", lambda: setup.jit(lambda p, batch: pooled(setup.objective, p, batch)))


def kept(setup: Setup, name: str, make: Callable[[], T]) -> T:
    """What several evaluations of a setup share: made once, and kept with it."""
    of_setup: dict[str, T] = vars(setup).setdefault("kept_by_evaluations", {})
    if name not in of_setup:
        of_setup[name] = make()
    return of_setup[name]


@dataclasses.dataclass
class _OfState:
    """Features by part, of the state whose first parameter is `mark`."""

    mark: object = None
    parts: dict[str, Encoded] = dataclasses.field(default_factory=dict)


def encoded(setup: Setup, state: TrainState, part: str) -> Encoded:
    """The features of ``eval.train``, ``eval.test`` or ``eval.outside``.

    They are kept with the setup until those of another state are asked for.

    Args:
        setup: the run's parts.
        state: whose parameters encode.
        part: ``train``, ``test`` or ``outside``.

    Raises:
        UserError: as `open_labelled` and `encode_source`.
    """
    mark, of_state = jax.tree.leaves(state.params)[0], kept(setup, "features", _OfState)
    if of_state.mark is not mark:
        of_state.mark, of_state.parts = mark, {}
    if part not in of_state.parts:
        config = setup.config
        examples = config.eval.train_examples if part == "train" else config.eval.test_examples
        params = {"trained": state.params, "untrained": fresh_params(setup)}
        of_state.parts[part] = encode_source(setup, params, open_labelled(config, part), examples)
    return of_state.parts[part]


def kinds(*parts: Encoded) -> Iterator[str]:
    """The kinds of features that all parts have, the trained first."""
    order = ("trained", "untrained", PIXELS)
    common = set.intersection(*(set(part.features) for part in parts))
    yield from sorted(common, key=lambda kind: (order.index(kind.partition("/")[0]), kind))


Figures = dict[str, float]


def compared(
    train: Encoded, test: Encoded, columns: tuple[str, ...], ask: Callable[[str], Figures]
) -> tuple[dict[str, float], list[str]]:
    """Asks of each kind of features, beside the majority class.

    Args:
        train: labelled examples.
        test: others.
        columns: which figures the table shows.
        ask: figures of a kind of features.

    Returns:
        Scalars, as ``<kind>/<figure>``, and the lines of a Markdown table.
    """
    always = majority(train, test)
    scalars = {"majority": always, "train_examples": float(len(train.label)), "test_examples": float(len(test.label))}
    lines = [f"| features | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for kind in kinds(train, test):
        figures = ask(kind)
        scalars |= {f"{kind}/{name}": value for name, value in figures.items()}
        lines.append(f"| {kind.replace('/', ', ')} | {' | '.join(shown(figures, c) for c in columns)} |")
    lines.append(f"| majority class | {' | '.join(f'{always:.3f}' for _ in columns)} |")
    return scalars, lines


def shown(figures: Figures, name: str) -> str:
    """A figure for a table, with half its interval if it has one (``<name>/interval``)."""
    if name not in figures:
        return ""
    value = figures[name]
    around = f" ± {figures[name + '/interval']:.3f}" if name + "/interval" in figures else ""
    return (f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.0e}") + around


def majority(train: Encoded, test: Encoded) -> float:
    """Accuracy of always saying the training examples' most frequent class."""
    return float((test.label == np.bincount(train.label).argmax()).mean())
