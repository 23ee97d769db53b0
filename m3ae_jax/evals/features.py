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
import numpy as np

import m3ae_jax.data.images as images
import m3ae_jax.evals.overlap as overlap
import m3ae_jax.evals.verdict as verdict
from m3ae_jax.data.sources.base import Source
from m3ae_jax.data.tokens import patch_grid, restricted
from m3ae_jax.errors import UserError
from m3ae_jax.evals.base import Result, amount, table
from m3ae_jax.evals.clean import clean_batches, concatenated
from m3ae_jax.evals.labelled import common_classes, named_part, open_labelled, with_class
from m3ae_jax.evals.verdict import Measured, sentence
from m3ae_jax.objectives.base import Encodes, Objective, Params, Part, pool
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
        contents: of what is left out too.
        group: `[n] int64`, equal for examples that belong together; None where no record says so.
    """

    features: dict[str, np.ndarray]
    label: np.ndarray
    classes: tuple[str, ...]
    left_out: int
    contents: overlap.Contents
    group: np.ndarray | None


def encode_source(
    setup: Setup, params: dict[str, Params], source: Source, examples: int, where: str = "eval.test"
) -> Encoded:
    """Encodes a labelled source.

    Args:
        setup: the run's parts.
        params: parameters by the name that stands before their features'.
        source: with classes.
        examples: at most so many, a random choice.
        where: the data, for messages.

    Raises:
        UserError: as `with_class`.
    """
    encode = encoder(setup)
    batches = []
    for part in clean_batches(setup, source, examples):
        example = {name: part["example"][name] for name in ("label", "group", "valid", "real", "index")}
        example["hashed"] = overlap.hashed_groups(part)
        on_device = put_batch({"groups": part["groups"]}, setup.mesh)
        by_kind = {f"{name}/{kind}": x for name, p in params.items() for kind, x in encode(p, on_device).items()}
        by_kind |= put_batch(raw_pixels(setup, part), setup.mesh)
        batches.append(fetch({"features": by_kind, **put_batch(example, setup.mesh)}))
    whole = concatenated(batches)
    readable, label = whole["valid"], whole["label"]
    left_out = int((whole["real"] & ~readable).sum())
    if left_out:
        log.warning("%s: left out: %s whose picture does not decode", where, amount(left_out, "labelled example"))
    valid = with_class(where, readable, label, whole["index"])
    features = {kind: x[valid] for kind, x in whole["features"].items()}
    contents = overlap.Contents.of(whole["hashed"], valid, whole["real"], int(readable.sum() - valid.sum()))
    return Encoded(features, label[valid], tuple(source.classes), left_out, contents, _groups(whole["group"][valid]))


def _groups(hashed: np.ndarray) -> np.ndarray | None:
    """The groups of `[n, 2]` hashes of their names: an example without a name is a group of its own."""
    names = overlap.joined(hashed)
    return np.where(names == 0, np.arange(len(names)), names) if names.any() else None


def pooled(objective: Objective, params: Params, part: Part, rng: jax.Array | None = None) -> dict[str, jax.Array]:
    """`pool`, ``{"image/cls": [B, D] float32, "image/mean": ..., "text/...": ..., ...}`` of what is visible.

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
        features |= {f"{name}/{kind}": x for kind, x in pool(encoded, groups).items()}
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
        UserError: as `open_labelled` and `encode_source`, or no training example has ``eval.group_key``.
    """
    cached: dict[str, tuple[jax.Array, Encoded]] = shared(setup, "features", dict)
    first = jax.tree.leaves(state.params)[0]
    if part not in cached or cached[part][0] is not first:
        config = setup.config
        examples = config.eval.train_examples if part == "train" else config.eval.test_examples
        params = {"trained": state.params, "untrained": fresh_params(setup)}
        found = encode_source(setup, params, open_labelled(config, part), examples, named_part(config, part))
        if part == "train" and config.eval.group_key and found.group is None:
            raise UserError(f"eval.group_key={config.eval.group_key!r}: no example of eval.train has a value there")
        cached[part] = first, found
        shared(setup, f"contents/{part}", lambda: found.contents)
    return cached[part][1]


def contents_of(setup: Setup, part: str) -> overlap.Contents:
    """The contents of ``eval.train`` or ``eval.test``, cached with the setup; read, where nothing has encoded them."""
    examples = setup.config.eval[f"{part}_examples"]
    return shared(setup, f"contents/{part}", lambda: overlap.read(setup, part, examples))


def encoded_pair(setup: Setup, state: TrainState) -> tuple[Encoded, Encoded]:
    """`encoded` training and test examples, of the same classes (`common_classes`)."""
    train, test = encoded(setup, state, "train"), encoded(setup, state, "test")
    classes = common_classes(train.classes, test.classes)
    return dataclasses.replace(train, classes=classes), dataclasses.replace(test, classes=classes)


def kinds(*parts: Encoded) -> Iterator[str]:
    """The kinds of features that all parts have, the trained first."""
    order = ("trained", "untrained", PIXELS)
    common = set.intersection(*(set(part.features) for part in parts))
    yield from sorted(common, key=lambda kind: (order.index(kind.partition("/")[0]), kind))


Figures = dict[str, float]

Judge = Callable[[np.ndarray], Figures]
"""Of `[m] bool`, which test examples count: the figures of these."""


def compared(
    name: str,
    setup: Setup,
    state: TrainState,
    columns: Mapping[str, str],
    measure: Callable[[Encoded, Encoded, str], Judge],
) -> Result:
    """The result of an evaluation of each kind of features, beside that of always saying the majority class.

    Where test examples are training examples too, beside each figure that has a column stands the one without them.

    Args:
        name: of the evaluation.
        setup: the run's parts.
        state: whose parameters encode.
        columns: heads of the table's columns, by the figures that they show.
        measure: what judges by ``eval.train``, ``eval.test`` and a kind of features.

    Raises:
        UserError: as `encoded`, or all test examples are training examples.
    """
    train, test = encoded_pair(setup, state)
    seen = overlap.overlap(setup, "test", test.contents, {"train": train.contents})[test.contents.valid]
    rows = {kind: beside(measure(train, test, kind), seen, columns) for kind in kinds(train, test)}
    always = beside(lambda which: {"majority": majority(train.label, test.label[which])}, seen, ("majority",))
    scalars = {**always, "train_examples": float(len(train.label)), "test_examples": float(len(test.label))}
    scalars |= {"overlap": float(seen.sum()), **overlap.unlabelled(train.contents, test.contents)}
    scalars |= {f"{kind}/{figure}": value for kind, figures in rows.items() for figure, value in figures.items()}
    heads = with_beside(columns, seen)
    cells = [row_of(kind, figures, heads) for kind, figures in rows.items()]
    cells.append(["majority class", *[f"{value:.3f}" for value in always.values()] * len(columns)])
    text = table(["features", *heads.values()], cells) + overlap.note(seen)
    count, ending = counted(seen)
    shares = {
        kind: {
            head: Measured.share("", figures[column + ending], count, figures.get(f"{column}{ending}/interval", 0.0))
            for column, head in columns.items()
        }
        for kind, figures in rows.items()
    }
    floor = Measured.share("the majority class", always[f"majority{ending}"], count)
    return Result.of(name, scalars, text, sentence(against_untrained(shares, floor)))


def counted(seen: np.ndarray) -> tuple[int, str]:
    """How many test examples a verdict is of, and how the names of their figures end: those not seen, where some are.

    Args:
        seen: see `beside`.
    """
    return (int((~seen).sum()), f"/{overlap.WITHOUT}") if seen.any() and not seen.all() else (len(seen), "")


def against_untrained(shown: Mapping[str, Mapping[str, Measured]], floor: Measured) -> Iterator[str]:
    """For each input a clause of the verdict: the best trained features beside the best that nothing was learnt for.

    Args:
        shown: by kind of features and head of a column.
        floor: of a guess.
    """
    named = {
        kind: [
            dataclasses.replace(m, name=_said(kind, head if len(by_head) > 1 else "")) for head, m in by_head.items()
        ]
        for kind, by_head in shown.items()
    }
    for name, modalities in INPUTS.items():
        if trained := [m for kind, of in named.items() if kind.startswith(f"trained/{name}/") for m in of]:
            beside_it = [f"untrained/{name}/", *([PIXELS] if "image" in modalities else [])]
            others = [m for kind, of in named.items() if kind.startswith(tuple(beside_it)) for m in of]
            yield verdict.compared({"image": "pictures", "text": "captions"}.get(name, name), trained, [*others, floor])


def _said(kind: str, head: str) -> str:
    """``trained/image/cls`` as ``trained (cls)``, with the head of a column where there are several."""
    who, *rest = kind.split("/")
    within = ", ".join([*rest[1:], *([head] if head else [])])
    return f"{who} ({within})" if within else who


def beside(judge: Judge, seen: np.ndarray, names: Iterable[str]) -> Figures:
    """Figures of all test examples; where some were trained on, and others not, also those of the others alone.

    Args:
        judge: of which test examples.
        seen: `[m] bool`, those that are training examples too.
        names: of the figures that depend on the test examples; ``<name>/interval`` goes with its figure.
    """
    figures = judge(np.ones(len(seen), bool))
    if seen.any() and not seen.all():
        others = judge(~seen)
        for name in names:
            for ending in ("", "/interval"):
                if name + ending in others:
                    figures[f"{name}/{overlap.WITHOUT}{ending}"] = others[name + ending]
    return figures


def with_beside(columns: Mapping[str, str], seen: np.ndarray) -> dict[str, str]:
    """Columns of a table with those of `beside`, each after its own.

    Args:
        columns: heads by figure.
        seen: see `beside`.
    """
    if not seen.any() or seen.all():
        return dict(columns)
    endings = {"": "", f"/{overlap.WITHOUT}": ", without overlap"}
    return {name + ending: head + more for name, head in columns.items() for ending, more in endings.items()}


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
