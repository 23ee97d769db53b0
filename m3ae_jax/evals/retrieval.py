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
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from m3ae_jax.data.sources import build_source
from m3ae_jax.evals import Result
from m3ae_jax.evals.clean import clean_batches, identities
from m3ae_jax.evals.features import encoder, fresh_params
from m3ae_jax.evals.restored import batch_size, hidden_at_random, names_of, scorer
from m3ae_jax.parallel.mesh import batch_parts, fetch, put_batch, put_whole_batch
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
    """Asks on ``eval.pairs`` examples of ``data.val``."""
    data = _read(setup, {"trained": state.params, "untrained": fresh_params(setup)})
    pairs = Pairs.of(data.picture, data.caption)
    scalars = {"pictures": float(len(pairs.pictures)), "captions": float(len(pairs.captions))}
    found: list[tuple[str, np.ndarray, np.ndarray]] = []
    for kind in ("cls", "mean"):
        for who in ("trained", "untrained"):
            image, text = (_unit(data.features[f"{who}/{m}/{kind}"]) for m in ("image", "text"))
            found.append((f"{who}/{kind}", image[pairs.pictures] @ text[pairs.captions].T, pairs.right))
    found.append(("chance", np.zeros(pairs.right.shape), pairs.right))
    few = pairs.first(setup.config.eval.scored_pairs)
    if few.right.size:
        for name, score in _by_words(setup, state, data, few).items():
            found.append((name, score, few.right))
        found.append(("words_chance", np.zeros(few.right.shape), few.right))
    asked = [f"recall@{k}" for k in RECALL_AT]
    heads = [f"{d.replace('_', ' ')}, {a}" for d in _DIRECTIONS for a in asked]
    lines = [f"| score | pictures, captions | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for name, score, right in found:
        both = {"image_to_text": recall(score, right), "text_to_image": recall(score.T, right.T)}
        scalars |= {f"{name}/{d}/{figure}": value for d in both for figure, value in both[d].items()}
        cells = " | ".join(f"{both[d][a]:.3f}" for d in _DIRECTIONS for a in asked)
        lines.append(f"| {name.replace('/', ', ')} | {right.shape[0]}, {right.shape[1]} | {cells} |")
    return Result("retrieval", {f"retrieval/{name}": value for name, value in scalars.items()}, "\n".join(lines))


@dataclasses.dataclass(frozen=True)
class _Examples:
    """Examples with picture and caption: features by kind, numbers of both, and the first ones' tokens."""

    features: dict[str, np.ndarray]
    picture: np.ndarray
    caption: np.ndarray
    position: np.ndarray
    groups: dict[str, Any]


def _read(setup: Setup, params: dict[str, Any]) -> _Examples:
    source = build_source(setup.config, "val")
    image, text = names_of(setup)
    encode = encoder(setup)
    rows: list[dict[str, Any]] = []
    for batch in clean_batches(setup, source, setup.config.eval.pairs, batch_size(setup)):
        groups = put_batch({name: batch["groups"][name] for name in (image, text)}, setup.mesh)
        found = {f"{who}/{k}": x for who, p in params.items() for k, x in encode(p, {"groups": groups}).items()}
        example = {name: batch["example"][name] for name in ("position", "valid")}
        row = fetch({"features": found, "groups": groups, **put_batch(example, setup.mesh)})
        words = row["groups"][text]["visible"]
        keep = row.pop("valid") & words["valid"].any(axis=1)
        row = jax.tree.map(lambda x, keep=keep: x[keep], row)
        rows.append(row)
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    pixels, words = (whole["groups"][name]["visible"] for name in (image, text))
    caption = np.where(words["valid"], words["value"], -1)
    return _Examples(
        whole["features"],
        identities(pixels["value"]),
        identities(caption),
        whole["position"],
        whole["groups"],
    )


def _by_words(setup: Setup, state: TrainState, data: _Examples, pairs: Pairs) -> dict[str, np.ndarray]:
    """``words`` and ``words_gain``, `[P, C]` each."""
    image, text = names_of(setup)
    score = scorer(setup)
    pictures = jax.tree.map(lambda x: x[pairs.pictures], data.groups[image])
    whole = jax.tree.map(lambda x: x[pairs.captions], data.groups[text])
    captions = hidden_at_random(whole, data.position[pairs.captions], _WORDS_HIDDEN)

    def losses(rows: list[tuple[int, int]], alone: bool) -> np.ndarray:
        p, c = np.array(rows).T
        groups = {text: jax.tree.map(lambda x: x[c], captions)}
        groups |= {} if alone else {image: jax.tree.map(lambda x: x[p], pictures)}
        sums = fetch(score(state.params, put_whole_batch({"groups": groups}, setup.mesh))[text])
        each: np.ndarray = sums["loss"] / np.maximum(sums["count"], 1.0)
        return each

    shape = pairs.right.shape
    every = list(np.ndindex(*shape))
    once = [(0, c) for c in range(shape[1])]
    with_picture = np.concatenate([losses(rows, alone=False)[:n] for rows, n in _chunks(setup, every)]).reshape(shape)
    without = np.concatenate([losses(rows, alone=True)[:n] for rows, n in _chunks(setup, once)])
    return {"words": -with_picture, "words_gain": without - with_picture}


def _chunks(setup: Setup, rows: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """Equal chunks, one compiled shape, and how many rows of each count: the last is filled up with its first row."""
    parts = batch_parts(setup.mesh)
    size = -(-min(batch_size(setup), len(rows)) // parts) * parts
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        yield chunk + chunk[:1] * (size - len(chunk)), len(chunk)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
