"""Does a model know where in a picture an object is that words name? Measured on the validation scenes.

The expression is how the caption names an object, where no other object of the scene fits it; the proposals are the
true boxes of all its objects and as many of the same sizes at random places. A box's score is the sum of the relevance
inside it, over the square root of its area (ALBEF, arXiv 2107.07651; SIMLA, arXiv 2203.14395, section 4.4); right is a
best box that overlaps the named object's by half of their union. Beside it stand chance (one box of all), an even
relevance, which prefers by size alone, and that of another scene's expression.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.data.sources.scenes import Scene, SceneOptions, ScenesSource
from m3ae_jax.errors import UserError
from m3ae_jax.evals.base import Result, table
from m3ae_jax.evals.clean import scene_tokens
from m3ae_jax.evals.features import fresh_params, shared
from m3ae_jax.evals.restored import batch_size, in_chunks, whole_groups
from m3ae_jax.evals.verdict import Measured, compared, sentence
from m3ae_jax.objectives.base import Grounds, Params
from m3ae_jax.parallel.mesh import fetch, put_whole_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

_LOOKED_AT = 20  # scenes for each expression that is wanted
_OVERLAP = 0.5  # of a right box
_LEAST_VISIBLE = 0.3  # of an object that is asked for


@dataclasses.dataclass(frozen=True)
class Expression:
    """One question: words, and the object that they name, of `Scene.objects`."""

    scene: Scene
    words: str
    object: int


def check_scenes(config: ConfigDict) -> None:
    """Refuses scenes of one object.

    Raises:
        UserError: as said.
    """
    most = config.data.scenes.max_objects
    if most < 2:
        raise UserError(f"evals=('pointing',) needs scenes of several objects, not data.scenes.max_objects={most}")


def box_scores(heat: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The sum of a map inside each box over the square root of the box's area; a cell counts by the share inside.

    Args:
        heat: `[h, w]`, over the unit square.
        boxes: `[K, 4]`, x0, y0, x1, y1 in the unit square.

    Returns:
        `[K]`.
    """
    height, width = heat.shape
    inside = []
    for low, high, cells in ((boxes[:, 1], boxes[:, 3], height), (boxes[:, 0], boxes[:, 2], width)):
        edges = np.arange(cells) / cells
        overlap = np.minimum(high[:, None], edges + 1 / cells) - np.maximum(low[:, None], edges)
        inside.append(np.clip(overlap, 0.0, None) * cells)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    total: np.ndarray = np.einsum("kh,kw,hw->k", *inside, heat) / np.sqrt(np.maximum(area, 1e-12))
    return total


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes `[..., 4]`, x0, y0, x1, y1."""
    low, high = np.maximum(first[..., :2], second[..., :2]), np.minimum(first[..., 2:], second[..., 2:])
    shared_area = np.prod(np.clip(high - low, 0.0, None), axis=-1)
    areas = [np.prod(box[..., 2:] - box[..., :2], axis=-1) for box in (first, second)]
    ratio: np.ndarray = shared_area / np.maximum(areas[0] + areas[1] - shared_area, 1e-12)
    return ratio


def expressions(options: SceneOptions, wanted: int) -> list[Expression]:
    """One of each of the first scenes of ``val`` in which a caption's words fit one object alone."""
    source = ScenesSource("val", options)
    found: list[Expression] = []
    for index in range(min(wanted * _LOOKED_AT, len(source))):
        scene = source.scene(index)
        unique = [e for e in _of_scene(scene) if scene.objects[e.object].visible_fraction >= _LEAST_VISIBLE]
        if len(scene.objects) > 1 and unique:
            found.append(unique[index % len(unique)])
        if len(found) == wanted:
            break
    return found


def _of_scene(scene: Scene) -> list[Expression]:
    unique = []
    for mention in scene.mentions:
        said = {span.attribute: scene.caption[span.start : span.end] for span in mention.spans}
        fitting = [o for o in scene.objects if all(getattr(o, name) == word for name, word in said.items())]
        if len(fitting) == 1 and mention.spans:
            words = scene.caption[mention.spans[0].start : mention.spans[-1].end]
            unique.append(Expression(scene, words, mention.object))
    return unique


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Figures of at most ``eval.pairs`` expressions.

    Raises:
        UserError: there is none.
    """
    asked = expressions(SceneOptions(**setup.config.data.scenes.to_dict()), setup.config.eval.pairs)
    if not asked:
        raise UserError("pointing: no words of the validation captions fit one object alone")
    boxes = _proposals(asked)
    right = [iou(of, of[e.object]) >= _OVERLAP for e, of in zip(asked, boxes, strict=True)]
    own = np.arange(len(asked))
    side = setup.config.data.image_size // setup.config.data.patch_size
    maps = {
        "trained": _relevance(setup, state.params, asked, own),
        "another's words": _relevance(setup, state.params, asked, np.roll(own, 1)),
        "untrained": _relevance(setup, fresh_params(setup), asked, own),
        "even": np.ones((len(asked), side, side)),
    }
    shares = {who: _accuracy(heat, boxes, right) for who, heat in maps.items()}
    shares["chance"] = float(np.mean([one.mean() for one in right]))
    scalars = {f"{who.replace(' ', '_')}/accuracy": share for who, share in shares.items()}
    scalars["expressions"] = float(len(asked))
    rows = [[who, f"{share:.3f}"] for who, share in shares.items()]
    measured = [Measured.share(who, share, len(asked)) for who, share in shares.items()]
    clause = compared("the named object's box", measured[:1], measured[1:])
    about = f"{len(asked)} expressions, {np.mean([len(of) for of in boxes]):.1f} boxes each on average"
    return Result.of("pointing", scalars, table(("relevance", "accuracy"), rows), sentence([clause], about))


def _proposals(asked: Sequence[Expression]) -> list[np.ndarray]:
    """Of each expression's scene `[2 K, 4]` boxes in the unit square, the true ones first."""
    rng, proposals = np.random.default_rng(0), []
    for e in asked:
        true = np.asarray([o.box for o in e.scene.objects], float) / e.scene.image.shape[0]
        size = true[:, 2:] - true[:, :2]
        corner = rng.random(size.shape) * (1.0 - size)
        proposals.append(np.concatenate([true, np.concatenate([corner, corner + size], axis=1)]))
    return proposals


def _accuracy(heat: np.ndarray, boxes: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    """The share of expressions whose best box is right; equal ones share it."""
    shares = []
    for one, of, good in zip(heat, boxes, right, strict=True):
        score = box_scores(one, of)
        best = np.isclose(score, score.max(), rtol=1e-9, atol=0.0)
        shares.append(good[best].mean())
    return float(np.mean(shares))


def _relevance(setup: Setup, params: Params, asked: Sequence[Expression], words: np.ndarray) -> np.ndarray:
    """Maps `[n, h, w]` of the scenes with the words of the expressions `words`, `[n]`."""
    objective = setup.objective
    assert isinstance(objective, Grounds)
    look = shared(setup, "relevance", lambda: setup.jit(objective.relevance))
    tokens = scene_tokens(setup, [e.scene.image for e in asked], [asked[i].words for i in words])
    groups = whole_groups(setup, tokens)

    def some(rows: list[int]) -> np.ndarray:
        part: Any = {"groups": jax.tree.map(lambda x: x[np.array(rows)], groups)}
        heat: np.ndarray = fetch(look(params, put_whole_batch(part, setup.mesh)))
        return heat

    heat = in_chunks(list(range(len(asked))), setup.eval_rows(len(asked), batch_size(setup)), some)
    side = setup.config.data.image_size // setup.config.data.patch_size
    return heat.reshape(len(asked), side, side)
