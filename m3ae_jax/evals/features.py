"""What the encoder says of labelled pictures and captions, computed once for all evaluations of a state.

All tokens are visible. A feature is the CLS token or the mean of the other tokens, from the picture alone, the
caption alone, or both together. Beside the trained encoder's stand what any of it must beat: an untrained encoder's,
and the picture's pixels.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import m3ae_jax.data.images as images
from m3ae_jax.data.sources.base import Source
from m3ae_jax.data.tokens import patch_grid, restricted
from m3ae_jax.evals.base import Result, table
from m3ae_jax.evals.clean import clean_batches, concatenated
from m3ae_jax.evals.labelled import check_labels, open_labelled
from m3ae_jax.objectives.base import Encodes, Objective, Params, Part
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

log = logging.getLogger("m3ae_jax")

T = TypeVar("T")

INPUTS = {"image": ("image",), "text": ("text",), "both": ("image", "text")}
"""The modalities that a kind of features is of."""

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
    encode = encoder(setup)
    batches = []
    for part in clean_batches(setup, source, examples):
        example = {name: part["example"][name] for name in ("label", "valid", "real")}
        on_device = put_batch({"groups": part["groups"]}, setup.mesh)
        by_kind = {f"{name}/{kind}": x for name, p in params.items() for kind, x in encode(p, on_device).items()}
        by_kind |= put_batch(raw_pixels(setup, part), setup.mesh)
        batches.append(fetch({"features": by_kind, **put_batch(example, setup.mesh)}))
    whole = concatenated(batches)
    valid, label = whole["valid"], whole["label"]
    left_out = int((whole["real"] & ~valid).sum())
    if left_out:
        log.warning("%d labelled examples are left out: their pictures do not decode", left_out)
    check_labels(valid, label)
    features = {kind: x[valid] for kind, x in whole["features"].items()}
    return Encoded(features, label[valid], tuple(source.classes), left_out)


def pooled(objective: Objective, params: Params, part: Part, rng: jax.Array | None = None) -> dict[str, jax.Array]:
    """``{"image/cls": [B, D] float32, "image/mean": ..., "text/...": ..., "both/...": ...}`` of what is visible.

    What the objective pools (``cls``) stands beside the mean over real tokens, which is zero for an example without
    any (no caption).

    Args:
        objective: that encodes.
        params: its parameters.
        part: of a batch.
        rng: of dropout; None: none.
    """
    assert isinstance(objective, Encodes)
    views = [group for group in objective.view(("image", "text")) if group.name in part["groups"]]
    present = {modality.name for view in views for modality in view.modalities}
    features: dict[str, jax.Array] = {}
    for name, modalities in INPUTS.items():
        if not present.issuperset(modalities):
            continue
        groups = {view.name: part["groups"][view.name] for view in restricted(views, modalities)}
        encoded = objective.encode(params, {**part, "groups": groups}, rng)
        valid = jnp.concatenate([sets["visible"]["valid"] for sets in groups.values()], axis=1)
        tokens = jnp.concatenate([encoded.tokens[g].astype(jnp.float32) for g in groups], axis=1)
        total = jnp.sum(jnp.where(valid[..., None], tokens, 0.0), axis=1)
        features |= {f"{name}/{kind}": x.astype(jnp.float32) for kind, x in encoded.pooled.items()}
        features[f"{name}/mean"] = total / jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
    return features


def raw_pixels(setup: Setup, part: Part) -> dict[str, np.ndarray]:
    """``{"pixels": [b, s * s * 3] float32}``: the pictures shrunk to about 16 x 16 by means of squares; or nothing."""
    for view in setup.objective.view(("image",)):
        if view.name in part["groups"]:
            return {PIXELS: shrunk(setup, part["groups"][view.name]["visible"]["value"]) / np.float32(255)}
    return {}


def shrunk(setup: Setup, patches: Any) -> Any:
    """Pictures shrunk to about 16 x 16 by means of squares.

    Args:
        setup: says how they were cut into patches.
        patches: `[b, L, P]`, NumPy's or JAX's.

    Returns:
        `[b, s * s * 3] float32`, in the patches' unit.
    """
    whole = images.unpatchify(patches, setup.config.data.patch_size, patch_grid(setup.config))
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

    return shared(setup, "fresh_params", compiled)()


def encoder(setup: Setup) -> Callable[[Params, Part], dict[str, jax.Array]]:
    """`pooled` of the setup's objective, compiled."""
    return shared(setup, "encoder", lambda: setup.jit(lambda p, part: pooled(setup.objective, p, part)))


def shared(setup: Setup, name: str, make: Callable[[], T]) -> T:
    """What several evaluations of a setup share: made once, and cached with it."""
    of_setup: dict[str, T] = vars(setup).setdefault("shared_by_evaluations", {})
    if name not in of_setup:
        of_setup[name] = make()
    return of_setup[name]


def encoded(setup: Setup, state: TrainState, part: str) -> Encoded:
    """The features of ``eval.train``, ``eval.test`` or ``eval.outside``.

    They are cached with the setup until those of another state, which has other arrays, are needed.

    Args:
        setup: the run's parts.
        state: whose parameters encode.
        part: ``train``, ``test`` or ``outside``.

    Raises:
        UserError: as `open_labelled` and `encode_source`.
    """
    cached: dict[str, tuple[jax.Array, Encoded]] = shared(setup, "features", dict)
    first = jax.tree.leaves(state.params)[0]
    if part not in cached or cached[part][0] is not first:
        config = setup.config
        examples = config.eval.train_examples if part == "train" else config.eval.test_examples
        params = {"trained": state.params, "untrained": fresh_params(setup)}
        cached[part] = first, encode_source(setup, params, open_labelled(config, part), examples)
    return cached[part][1]


def kinds(*parts: Encoded) -> Iterator[str]:
    """The kinds of features that all parts have, the trained first."""
    order = ("trained", "untrained", PIXELS)
    common = set.intersection(*(set(part.features) for part in parts))
    yield from sorted(common, key=lambda kind: (order.index(kind.partition("/")[0]), kind))


Figures = dict[str, float]


def compared(
    name: str,
    setup: Setup,
    state: TrainState,
    columns: Mapping[str, str],
    measure: Callable[[Encoded, Encoded, str], Figures],
) -> Result:
    """The result of an evaluation of each kind of features, beside that of always saying the majority class.

    Args:
        name: of the evaluation.
        setup: the run's parts.
        state: whose parameters encode.
        columns: heads of the table's columns, by the figures that they show.
        measure: figures of ``eval.train``, ``eval.test`` and a kind of features.

    Raises:
        UserError: as `encoded`.
    """
    train, test = encoded(setup, state, "train"), encoded(setup, state, "test")
    always = majority(train.label, test.label)
    scalars = {"majority": always, "train_examples": float(len(train.label)), "test_examples": float(len(test.label))}
    rows = []
    for kind in kinds(train, test):
        figures = measure(train, test, kind)
        scalars |= {f"{kind}/{figure}": value for figure, value in figures.items()}
        rows.append(row_of(kind, figures, columns))
    rows.append(["majority class", *[f"{always:.3f}"] * len(columns)])
    return Result.of(name, scalars, table(["features", *columns.values()], rows))


def row_of(kind: str, figures: Figures, columns: Iterable[str]) -> list[str]:
    """A kind of features and its figures, for a table."""
    return [kind.replace("/", ", "), *(shown(figures, column) for column in columns)]


def shown(figures: Figures, name: str) -> str:
    """A figure for a table, with half its interval if it has one (``<name>/interval``)."""
    if name not in figures:
        return ""
    value = figures[name]
    around = f" ± {figures[name + '/interval']:.3f}" if name + "/interval" in figures else ""
    return (f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.0e}") + around


def unit(x: np.ndarray) -> np.ndarray:
    """Features `[n, D]`, each divided by its length."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def majority(train: np.ndarray, test: np.ndarray) -> float:
    """Accuracy on `[m]` labels of always saying the most frequent of `[n]` training labels."""
    return float((test == np.bincount(train).argmax()).mean())
