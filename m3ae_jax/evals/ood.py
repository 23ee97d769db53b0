"""Telling pictures of unknown classes from those of known ones: the area under the ROC curve of two scores.

Mahalanobis: the least squared distance to a class's mean, by the covariance within the classes (arXiv 1807.03888).
Maximum softmax probability of the linear probe, negated (arXiv 1610.02136). The paper's Figure 6 tells CIFAR-100
from CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from m3ae_jax.evals.base import Result, table
from m3ae_jax.evals.features import (
    Encoded,
    Figures,
    Judge,
    against_untrained,
    beside,
    counted,
    encoded,
    encoded_pair,
    kinds,
    row_of,
    with_beside,
)
from m3ae_jax.evals.linear import Scale, swept
from m3ae_jax.evals.overlap import note, overlap
from m3ae_jax.evals.verdict import Measured, sentence
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

_SHRINKAGE = 1e-3  # of the mean variance, added to the covariance so that it can be inverted
_COLUMNS = {"mahalanobis": "AUROC mahalanobis", "softmax": "AUROC softmax"}


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Scores fitted on ``eval.train`` tell ``eval.outside`` from ``eval.test``.

    Test examples that are training examples too, and those outside that are either, are counted as elsewhere.

    Raises:
        UserError: most examples have no class, or all examples of a part are in another too.
    """
    (train, test), outside = encoded_pair(setup, state), encoded(setup, state, "outside")
    of = {"train": train.contents, "test": test.contents}
    in_train = overlap(setup, "test", test.contents, {"train": train.contents})[test.contents.valid]
    known = overlap(setup, "outside", outside.contents, of)[outside.contents.valid]
    seen = np.concatenate([in_train, known])
    if in_train.all() or known.all():  # nothing to compare without them
        seen[:] = False
    areas = {kind: beside(_judge(train, test, outside, kind), seen, _COLUMNS) for kind in kinds(train, test, outside)}
    scalars = {f"{kind}/{name}": value for kind, figures in areas.items() for name, value in figures.items()}
    scalars |= {"overlap": float(in_train.sum()), "outside_overlap": float(known.sum())}
    heads = with_beside(_COLUMNS, seen)
    rows = [row_of(kind, figures, heads) for kind, figures in areas.items()]
    text = table(["features", *heads.values()], [*rows, ["chance", *["0.500"] * len(heads)]])
    for part, found, where in (("test", in_train, "eval.train"), ("outside", known, "eval.train or eval.test")):
        text += note(found, part, where)
    return Result.of("ood", scalars, text, sentence(_clauses(areas, seen, len(in_train))))


def _clauses(areas: Mapping[str, Figures], seen: np.ndarray, tested: int) -> Iterator[str]:
    """Of the verdict: whether what was learnt tells the unknown apart; the first `tested` of `seen` are known."""
    _, ending = counted(seen)
    inside, outside = (int((~part).sum()) if ending else len(part) for part in (seen[:tested], seen[tested:]))
    shown = {
        kind: {name: Measured.area("", figures[name + ending], inside, outside) for name in _COLUMNS}
        for kind, figures in areas.items()
    }
    return against_untrained(shown, Measured.area("chance", 0.5, inside, outside))


def _judge(train: Encoded, test: Encoded, outside: Encoded, kind: str) -> Judge:
    """Of which test examples and which outside, one after the other, count: the areas."""
    x, inside, other = (part.features[kind] for part in (train, test, outside))
    distance = Mahalanobis(x, train.label)
    probe = swept(x, train.label, len(train.classes), group=train.group)
    scores = {
        "mahalanobis": (distance(inside), distance(other)),
        "softmax": (-confidence(probe.logits(inside)), -confidence(probe.logits(other))),
    }
    count = len(inside)
    return lambda which: {name: auroc(a[which[:count]], b[which[count:]]) for name, (a, b) in scores.items()}


class Mahalanobis:
    """The score of features: the squared distance to the nearest class's mean.

    Args:
        features: `[n, D]`.
        label: `[n]`.
    """

    def __init__(self, features: np.ndarray, label: np.ndarray) -> None:
        self._scale = Scale.of(features)
        x = self._scale(features).astype(np.float64)
        classes, place = np.unique(label, return_inverse=True)
        self._means = np.stack([x[place == c].mean(axis=0) for c in range(len(classes))])
        centred = x - self._means[place]
        covariance = centred.T @ centred / len(x)
        shrinkage = _SHRINKAGE * max(float(np.trace(covariance)) / len(covariance), 1e-12)
        # Distances in the whitened space are Mahalanobis' own.
        self._whiten = np.linalg.inv(np.linalg.cholesky(covariance + shrinkage * np.eye(len(covariance)))).T

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """`[m] float64`."""
        x = self._scale(features).astype(np.float64) @ self._whiten
        means = self._means @ self._whiten
        squared = (x**2).sum(axis=1)[:, None] - 2 * x @ means.T + (means**2).sum(axis=1)
        nearest: np.ndarray = squared.min(axis=1)
        return nearest


def confidence(logits: np.ndarray) -> np.ndarray:
    """The greatest softmax probability of `[n, C]` logits, as its logarithm, which does not round to 1."""
    top = logits.max(axis=1, keepdims=True).astype(np.float64)
    others = np.exp(logits - top)
    others[np.arange(len(logits)), logits.argmax(axis=1)] = 0.0
    result: np.ndarray = -np.log1p(others.sum(axis=1))
    return result


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """The chance that a score from `outside` is above one from `inside`, equal ones counted half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([inside, outside]))[len(inside) :]
    above = ranks.sum() - len(outside) * (len(outside) + 1) / 2
    return float(above / (len(inside) * len(outside)))
