"""Finding the caption of a picture and the picture of a caption, without a head that was trained for it.

Scores: the cosine of pooled features of the picture alone and the caption alone. Of an objective that embeds, the
cosine of its embeddings (``embedding``); of one that matches besides, the best ``eval.reranked`` of each query by
embedding in the order of its matching logit (``matched``; arXiv 2107.07651, section 4.1), and the others after them. Of
one that restores words, for ``eval.scored_pairs`` of the examples, how well each picture predicts the hidden words of
each caption (``words``: minus their cross-entropy; ``words_gain``: how much less it is than without a picture, so that
easy captions are nobody's favourites).

Equal pictures are one, and so are equal captions; whatever stands together in the data is right. So a picture may
have several right captions, and a caption several pictures: recall at k is the share of queries with one of them among
the k best. Equal scores are taken in random order, and its expectation is counted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from m3ae_jax.evals.base import Result, table
from m3ae_jax.evals.clean import identities
from m3ae_jax.evals.features import encoder, fresh_params, shared, unit
from m3ae_jax.evals.restored import batch_size, hidden_at_random, in_chunks, names_of, read_pairs, scorer
from m3ae_jax.evals.verdict import Measured, compared, sentence
from m3ae_jax.objectives.base import Embeds, Matches, Params, Part, Restores
from m3ae_jax.parallel.mesh import fetch, put_whole_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

RECALL_AT = (1, 5, 10)
_DIRECTIONS = ("image_to_text", "text_to_image")
_WORDS_HIDDEN = 0.5
_BY_WORDS = ("words", "words_gain")


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


def numbers_of_captions(words: Mapping[str, np.ndarray], caption_id: np.ndarray) -> np.ndarray:
    """As `identities`, of captions: a token set in host memory, and `tokens.EXAMPLE`'s hash of the whole text.

    Captions that are cut may differ in what was cut off: they are different ones, which score alike.
    """
    cut = np.where(words["valid"].all(axis=1), caption_id, 0)
    return identities(np.concatenate([np.where(words["valid"], words["value"], -1), cut[:, None]], axis=1))


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Recall among ``eval.pairs`` examples of ``data.val``."""
    encode, params = encoder(setup), {"trained": state.params, "untrained": fresh_params(setup)}
    objective, embed = setup.objective, None
    if isinstance(objective, Embeds):
        embed = shared(setup, "embed", lambda: setup.jit(objective.embed))

    def features(part: Part) -> dict[str, jax.Array]:
        computed: dict[str, jax.Array] = {}
        for who, p in params.items():
            computed |= {f"{who}/{kind}": x for kind, x in encode(p, part).items()}
            if embed is not None:
                computed |= {f"{who}/{name}/embedding": x for name, x in embed(p, part).items()}
        return computed

    data = read_pairs(setup, setup.config.eval.pairs, batch_size(setup), features)
    pixels, words = (data["groups"][name]["visible"] for name in names_of(setup))
    pairs = Pairs.of(identities(pixels["value"]), numbers_of_captions(words, data["caption_id"]))
    scalars = {"pictures": float(len(pairs.pictures)), "captions": float(len(pairs.captions))}
    # Of each name the score of captions for a picture, that of pictures for a caption, and what is right.
    scores: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []
    for kind in ("cls", "mean", *(["embedding"] if embed else [])):
        for who, of_who in params.items():
            image, text = (unit(data["computed"][f"{who}/{m}/{kind}"]) for m in ("image", "text"))
            if image.shape[1] != text.shape[1]:  # towers of different widths
                continue
            score = image[pairs.pictures] @ text[pairs.captions].T
            scores.append((f"{who}/{kind}", score, score.T, pairs.right))
            if kind == "embedding" and isinstance(objective, Matches):
                scores.append((f"{who}/matched", *reranked(setup, of_who, data, pairs, score), pairs.right))
    nothing = np.zeros(pairs.right.shape)
    scores.append(("chance", nothing, nothing.T, pairs.right))
    few = pairs.first(setup.config.eval.scored_pairs)
    if few.right.size and isinstance(objective, Restores):
        for who, of_who in params.items():
            for name, score in _by_words(setup, of_who, data, few).items():
                scores.append((name if who == "trained" else f"{who}_{name}", score, score.T, few.right))
        nothing = np.zeros(few.right.shape)
        scores.append(("words_chance", nothing, nothing.T, few.right))
    columns = [(direction, f"recall@{k}") for direction in _DIRECTIONS for k in RECALL_AT]
    rows = []
    for name, captions_of, pictures_of, right in scores:
        both = {"image_to_text": recall(captions_of, right), "text_to_image": recall(pictures_of, right.T)}
        scalars |= {f"{name}/{d}/{figure}": value for d in both for figure, value in both[d].items()}
        cells = [f"{both[direction][figure]:.3f}" for direction, figure in columns]
        rows.append([name.replace("/", ", "), f"{right.shape[0]}, {right.shape[1]}", *cells])
    heads = [f"{direction.replace('_', ' ')}, {figure}" for direction, figure in columns]
    said = sentence(_clauses(scalars, [name for name, *_ in scores], pairs, few))
    return Result.of("retrieval", scalars, table(["score", "pictures, captions", *heads], rows), said)


def _clauses(scalars: Mapping[str, float], names: Sequence[str], pairs: Pairs, few: Pairs) -> Iterator[str]:
    """Of the verdict: recall at 1 by features and by words, in both directions."""
    compare = (
        ("features", ("trained",), ("untrained", "chance"), pairs),
        ("words", _BY_WORDS, ("words_chance", *(f"untrained_{name}" for name in _BY_WORDS)), few),
    )
    for side, direction in enumerate(_DIRECTIONS):
        subject = f"{direction.replace('_', ' ')}, recall@1"
        for by, learnt, others, of in compare:

            def shares(begins: Sequence[str], examples: int = of.right.shape[side]) -> list[Measured]:
                chosen = [name for name in names if name.partition("/")[0] in begins]
                values = {name: scalars[f"{name}/{direction}/recall@1"] for name in chosen}  # noqa: B023
                return [Measured.share(n.replace("/", ", ").replace("_", " "), v, examples) for n, v in values.items()]

            if trained := shares(learnt):
                yield compared(f"{subject} by {by}", trained, shares(others))


def reranked(
    setup: Setup, params: Params, data: dict[str, Any], pairs: Pairs, score: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Matching logits of each query's best by another score; the others come after all of them, in its order.

    Args:
        setup: of an objective that matches.
        params: its parameters.
        data: of `read_pairs`.
        pairs: of them.
        score: `[P, C]`.

    Returns:
        Scores of the captions of each picture, `[P, C]`, and of the pictures of each caption, `[C, P]`.
    """
    count = setup.config.eval.reranked
    of_picture, of_caption = best(score, count), best(score.T, count)
    logits = matching_logits(setup, params, data["groups"], pairs, of_picture | of_caption.T)
    return put_first(of_picture, logits, score), put_first(of_caption, logits.T, score.T)


def best(score: np.ndarray, count: int) -> np.ndarray:
    """`[Q, N] bool`: the `count` best of each row."""
    chosen = np.zeros(score.shape, bool)
    np.put_along_axis(chosen, np.argsort(-score, axis=1)[:, :count], True, axis=1)
    return chosen


def put_first(chosen: np.ndarray, logits: np.ndarray, score: np.ndarray) -> np.ndarray:
    """The logits of what is chosen, and after all of them the others in the order of their score."""
    return np.where(chosen, logits, score.astype(np.float64) - 1e6)


def matching_logits(
    setup: Setup, params: Params, groups: dict[str, Any], pairs: Pairs, chosen: np.ndarray
) -> np.ndarray:
    """`Matches.match` of chosen pictures (rows) and captions, `[P, C] float64`; 0 elsewhere."""
    image, text = names_of(setup)
    objective = setup.objective
    assert isinstance(objective, Matches)
    match = shared(setup, "match", lambda: setup.jit(objective.match))

    def some(rows: list[tuple[int, int]]) -> np.ndarray:
        p, c = np.array(rows).T
        part = {
            image: jax.tree.map(lambda x: x[pairs.pictures[p]], groups[image]),
            text: jax.tree.map(lambda x: x[pairs.captions[c]], groups[text]),
        }
        each: np.ndarray = fetch(match(params, put_whole_batch({"groups": part}, setup.mesh)))
        return each

    logits = np.zeros(chosen.shape)
    rows = list(zip(*(x.tolist() for x in np.nonzero(chosen)), strict=True))
    logits[chosen] = in_chunks(rows, setup.eval_rows(len(rows), batch_size(setup)), some)
    return logits


def _by_words(setup: Setup, params: Params, data: dict[str, Any], pairs: Pairs) -> dict[str, np.ndarray]:
    """The scores `_BY_WORDS`, `[P, C]` each, of what `read_pairs` gave."""
    image, text = names_of(setup)
    score = scorer(setup)
    pictures = jax.tree.map(lambda x: x[pairs.pictures], data["groups"][image])
    whole = jax.tree.map(lambda x: x[pairs.captions], data["groups"][text])
    captions = hidden_at_random(setup, text, whole, data["position"][pairs.captions], _WORDS_HIDDEN)

    def losses(rows: list[tuple[int, int]], *, alone: bool) -> np.ndarray:
        p, c = np.array(rows).T
        groups = {text: jax.tree.map(lambda x: x[c], captions)}
        groups |= {} if alone else {image: jax.tree.map(lambda x: x[p], pictures)}
        sums = fetch(score(params, put_whole_batch({"groups": groups}, setup.mesh))[text])
        each: np.ndarray = sums["loss"] / np.maximum(sums["count"], 1.0)
        return each

    def losses_of(rows: list[tuple[int, int]], *, alone: bool) -> np.ndarray:
        size = setup.eval_rows(len(rows), batch_size(setup))
        return in_chunks(rows, size, functools.partial(losses, alone=alone))

    shape = pairs.right.shape
    with_picture = losses_of(list(np.ndindex(*shape)), alone=False).reshape(shape)
    without = losses_of([(0, c) for c in range(shape[1])], alone=True)
    return dict(zip(_BY_WORDS, (-with_picture, without - with_picture), strict=True))
