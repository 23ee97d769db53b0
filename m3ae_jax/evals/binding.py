"""Does a model bind colours to shapes? Pictures of two objects, and captions each of which has an untrue twin.

A caption's twin is of the same words: the colours, or the shapes, of its two objects are exchanged. Who knows which
words a picture calls for, and not which of them belong together, cannot tell the two apart. Measured on the validation
scenes (attribute pairs as in training): recall at k of a picture's caption among all captions and all twins, by
embedding and, of an objective that matches, its best ``eval.reranked`` in the order of its matching logit; and how
often the caption scores above its own twin. Beside each stand the same model untrained, and chance.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.data.sources.scenes import Scene, SceneOptions, ScenesSource
from m3ae_jax.errors import UserError
from m3ae_jax.evals.base import Result, table
from m3ae_jax.evals.clean import identities, scene_tokens
from m3ae_jax.evals.features import fresh_params, shared
from m3ae_jax.evals.restored import batch_size, in_chunks, names_of, whole_groups
from m3ae_jax.evals.retrieval import RECALL_AT, Pairs, best, matching_logits, put_first, recall
from m3ae_jax.evals.verdict import Measured, compared, sentence
from m3ae_jax.objectives.base import Embeds, Matches, Params
from m3ae_jax.parallel.mesh import fetch, put_whole_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

_LOOKED_AT = 20  # scenes for each that is wanted
_KINDS = ("color", "shape")


def check_scenes(config: ConfigDict) -> None:
    """Refuses scenes of one object.

    Raises:
        UserError: as said.
    """
    most = config.data.scenes.max_objects
    if most < 2:
        raise UserError(f"evals=('binding',) needs scenes of two objects, not data.scenes.max_objects={most}")


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Figures of ``eval.pairs`` scenes of ``val`` whose caption has a twin.

    Raises:
        UserError: there is none.
    """
    scenes, twins = with_twins(SceneOptions(**setup.config.data.scenes.to_dict()), setup.config.eval.pairs)
    if not scenes:
        raise UserError("binding: no caption of the validation scenes names two objects; set data.scenes.max_objects=2")
    count = len(scenes)
    pictures = [scene.image for scene in scenes]
    captions = [*(scene.caption for scene in scenes), *twins]
    tokens = scene_tokens(setup, pictures, captions)
    groups = whole_groups(setup, tokens)
    # Equal captions are one, and right for every picture of theirs.
    number = identities(np.where(tokens["text"][1], tokens["text"][0], -1))
    _, first = np.unique(number, return_index=True)
    pairs = Pairs(number[:count, None] == np.arange(len(first)), np.arange(count), first)
    own, other = number[:count], number[count:]
    objective = setup.objective
    assert isinstance(objective, Embeds)
    rows: list[tuple[str, dict[str, float]]] = []
    for who, params in {"trained": state.params, "untrained": fresh_params(setup)}.items():
        score = _similarity(setup, params, groups, count, pairs)
        rows.append((f"{who}/embedding", recall(score, pairs.right) | _above(score, own, other)))
        if isinstance(objective, Matches):
            first_by_embedding = best(score, setup.config.eval.reranked)
            looked_at = first_by_embedding.copy()
            looked_at[np.arange(count)[:, None], np.stack([own, other], axis=1)] = True  # for the twins alone
            logits = matching_logits(setup, params, groups, pairs, looked_at)
            matched = put_first(first_by_embedding, logits, score)
            rows.append((f"{who}/matched", recall(matched, pairs.right) | _above(logits, own, other)))
    nothing = np.zeros(pairs.right.shape)
    rows.append(("chance", recall(nothing, pairs.right) | _above(nothing, own, other)))
    figures = (*(f"recall@{k}" for k in RECALL_AT), "above_twin")
    scalars = {f"{name}/{figure}": value for name, of in rows for figure, value in of.items()}
    scalars |= {"pictures": float(count), "captions": float(len(first))}
    cells = [[name.replace("/", ", "), *(f"{of[figure]:.3f}" for figure in figures)] for name, of in rows]
    text_table = table(["score", *(figure.replace("_", " ") for figure in figures)], cells)
    clauses = []
    for figure in ("recall@1", "above_twin"):
        measured = [Measured.share(name.replace("/", ", "), of[figure], count) for name, of in rows]
        trained = [one for one in measured if one.name.startswith("trained")]
        clauses.append(compared(figure.replace("_", " "), trained, [one for one in measured if one not in trained]))
    about = f"{count} pictures, {len(first)} captions and twins"
    return Result.of("binding", scalars, text_table, sentence(clauses, about))


def with_twins(options: SceneOptions, wanted: int) -> tuple[list[Scene], list[str]]:
    """The first scenes of ``val`` whose caption has a twin, and the twins: exchanged colours and shapes in turn."""
    source = ScenesSource("val", options)
    scenes: list[Scene] = []
    twins: list[str] = []
    for index in range(min(wanted * _LOOKED_AT, len(source))):
        scene = source.scene(index)
        kinds = _KINDS if len(scenes) % 2 == 0 else _KINDS[::-1]
        found = next((twin for kind in kinds if (twin := scene.twin(kind)) is not None), None)
        if found is not None:
            scenes.append(scene)
            twins.append(found)
        if len(scenes) == wanted:
            break
    return scenes, twins


def _similarity(setup: Setup, params: Params, groups: dict[str, Any], count: int, pairs: Pairs) -> np.ndarray:
    """Cosines `[P, C]` of the pictures and the captions."""
    objective = setup.objective
    assert isinstance(objective, Embeds)
    embed = shared(setup, "embed", lambda: setup.jit(objective.embed))
    size = setup.eval_rows(len(pairs.captions), batch_size(setup))
    image, text = names_of(setup)

    def embeddings(name: str, rows: np.ndarray) -> np.ndarray:
        def some(rows: list[int]) -> np.ndarray:
            part = {"groups": {name: jax.tree.map(lambda x: x[np.array(rows)], groups[name])}}
            (embedded,) = fetch(embed(params, put_whole_batch(part, setup.mesh))).values()
            each: np.ndarray = embedded
            return each

        return in_chunks(rows.tolist(), size, some)

    similarity: np.ndarray = embeddings(image, np.arange(count)) @ embeddings(text, pairs.captions).T
    return similarity


def _above(score: np.ndarray, own: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How often the caption scores above its twin; equal scores count a half."""
    rows = np.arange(len(own))
    difference = score[rows, own] - score[rows, other]
    return {"above_twin": float(((difference > 0) + 0.5 * (difference == 0)).mean())}
