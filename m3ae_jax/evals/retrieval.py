"""Finding the caption of a picture and the picture of a caption, without a head that was trained for it.

Scores: the cosine of pooled features of the picture alone and the caption alone; and, of ``eval.scored_pairs`` of
them, how well each picture predicts the hidden words of each caption (``words``: minus their cross-entropy;
``words_gain``: how much less it is than without a picture, so that easy captions are nobody's favourites).

Equal pictures are one, and so are equal captions; whatever stands together in the data is right. So a picture may
have several right captions, and a caption several pictures: recall at k is the share of queries with one of them among
the k best. Equal scores are taken in random order, and its expectation is counted.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from m3ae_jax.evals.base import Result, table
from m3ae_jax.evals.clean import identities
from m3ae_jax.evals.features import encoder, fresh_params, unit
from m3ae_jax.evals.restored import batch_size, hidden_at_random, in_chunks, names_of, read_pairs, scorer
from m3ae_jax.objectives.base import Part
from m3ae_jax.parallel.mesh import fetch, put_whole_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

RECALL_AT = (1, 5, 10)
_DIRECTIONS = ("image_to_text", "text_to_image")
_WORDS_HIDDEN = 0.5


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Different pictures and captions, and what belongs together.

    Attributes:
        right: `[P, C] bool`.
        pictures: `[P]`, a row of the examples for each picture.
        captions: `[C]`, likewise.
    """

    right: np.ndarray
    pictures: np.ndarray
    captions: np.ndarray

    @staticmethod
    def of(picture: np.ndarray, caption: np.ndarray) -> Pairs:
        """From the numbers of each example's picture and caption, `[n]` each."""
        _, pictures, p = np.unique(picture, return_index=True, return_inverse=True)
        _, captions, c = np.unique(caption, return_index=True, return_inverse=True)
        right = np.zeros((len(pictures), len(captions)), bool)
        right[p, c] = True
        return Pairs(right, pictures, captions)

    def first(self, count: int) -> Pairs:
        """Of the first pictures and captions alone, as many as `count` each; what then has no partner is left out."""
        right = self.right[:count][:, : count * 8]
        rows = np.flatnonzero(right.any(axis=1))
        columns = np.flatnonzero(right[rows].any(axis=0))[:count]
        rows = rows[right[rows][:, columns].any(axis=1)]
        return Pairs(right[np.ix_(rows, columns)], self.pictures[rows], self.captions[columns])


def recall(score: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Expected recall at k of each row's best columns, with equal scores in random order; and the median rank.

    Args:
        score: `[Q, N]`, higher is better.
        right: `[Q, N] bool`, at least one a row.

    Returns:
        ``recall@1``, ..., each of at most N; ``median_rank``, of the first right one, expected.
    """
    best = np.where(right, score, -np.inf).max(axis=1, keepdims=True)
    above = (score > best).sum(axis=1)
    tied, tied_right = (score == best).sum(axis=1), ((score == best) & right).sum(axis=1)
    figures = {f"recall@{k}": float(_chance_within(k - above, tied, tied_right).mean()) for k in RECALL_AT}
    return figures | {"median_rank": float(np.median(above + (tied + 1) / (tied_right + 1)))}


def _chance_within(places: np.ndarray, tied: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The chance that one of `right` of `tied` in random order is among the first `places`: 1 - C(t-r, p) / C(t, p)."""
    missed = np.ones(len(places))
    for taken in range(int(np.clip(places, 0, tied).max(initial=0))):
        still = np.maximum(tied - right - taken, 0) / np.maximum(tied - taken, 1)
        missed = np.where(taken < places, missed * still, missed)
    chance: np.ndarray = 1.0 - missed
    return chance


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Recall among ``eval.pairs`` examples of ``data.val``."""
    encode, params = encoder(setup), {"trained": state.params, "untrained": fresh_params(setup)}

    def features(part: Part) -> dict[str, jax.Array]:
        return {f"{who}/{kind}": x for who, p in params.items() for kind, x in encode(p, part).items()}

    data = read_pairs(setup, setup.config.eval.pairs, batch_size(setup), features)
    pixels, words = (data["groups"][name]["visible"] for name in names_of(setup))
    captions = np.where(words["valid"], words["value"], -1)
    pairs = Pairs.of(identities(pixels["value"]), identities(captions))
    scalars = {"pictures": float(len(pairs.pictures)), "captions": float(len(pairs.captions))}
    scores: list[tuple[str, np.ndarray, np.ndarray]] = []
    for kind in ("cls", "mean"):
        for who in ("trained", "untrained"):
            image, text = (unit(data["computed"][f"{who}/{m}/{kind}"]) for m in ("image", "text"))
            scores.append((f"{who}/{kind}", image[pairs.pictures] @ text[pairs.captions].T, pairs.right))
    scores.append(("chance", np.zeros(pairs.right.shape), pairs.right))
    few = pairs.first(setup.config.eval.scored_pairs)
    if few.right.size:
        for name, score in _by_words(setup, state, data, few).items():
            scores.append((name, score, few.right))
        scores.append(("words_chance", np.zeros(few.right.shape), few.right))
    columns = [(direction, f"recall@{k}") for direction in _DIRECTIONS for k in RECALL_AT]
    rows = []
    for name, score, right in scores:
        both = {"image_to_text": recall(score, right), "text_to_image": recall(score.T, right.T)}
        scalars |= {f"{name}/{d}/{figure}": value for d in both for figure, value in both[d].items()}
        cells = [f"{both[direction][figure]:.3f}" for direction, figure in columns]
        rows.append([name.replace("/", ", "), f"{right.shape[0]}, {right.shape[1]}", *cells])
    heads = [f"{direction.replace('_', ' ')}, {figure}" for direction, figure in columns]
    return Result.of("retrieval", scalars, table(["score", "pictures, captions", *heads], rows))


def _by_words(setup: Setup, state: TrainState, data: dict[str, Any], pairs: Pairs) -> dict[str, np.ndarray]:
    """``words`` and ``words_gain``, `[P, C]` each, of what `read_pairs` gave."""
    image, text = names_of(setup)
    score = scorer(setup)
    pictures = jax.tree.map(lambda x: x[pairs.pictures], data["groups"][image])
    whole = jax.tree.map(lambda x: x[pairs.captions], data["groups"][text])
    captions = hidden_at_random(setup, text, whole, data["position"][pairs.captions], _WORDS_HIDDEN)

    def losses(rows: list[tuple[int, int]], *, alone: bool) -> np.ndarray:
        p, c = np.array(rows).T
        groups = {text: jax.tree.map(lambda x: x[c], captions)}
        groups |= {} if alone else {image: jax.tree.map(lambda x: x[p], pictures)}
        sums = fetch(score(state.params, put_whole_batch({"groups": groups}, setup.mesh))[text])
        each: np.ndarray = sums["loss"] / np.maximum(sums["count"], 1.0)
        return each

    def losses_of(rows: list[tuple[int, int]], *, alone: bool) -> np.ndarray:
        size = setup.eval_rows(len(rows), batch_size(setup))
        return in_chunks(rows, size, functools.partial(losses, alone=alone))

    shape = pairs.right.shape
    with_picture = losses_of(list(np.ndindex(*shape)), alone=False).reshape(shape)
    without = losses_of([(0, c) for c in range(shape[1])], alone=True)
    return {"words": -with_picture, "words_gain": without - with_picture}
