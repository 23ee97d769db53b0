"""Telling pictures of unknown classes from those of known ones: the area under the ROC curve of two scores.

Mahalanobis: the least squared distance to a class's mean, by the covariance within the classes (arXiv 1807.03888).
Maximum softmax probability of the linear probe, negated (arXiv 1610.02136). The paper's Figure 6 tells CIFAR-100
from CIFAR-10.
"""

from __future__ import annotations

import numpy as np

from m3ae_jax.evals.base import Result, table
from m3ae_jax.evals.features import Encoded, Figures, encoded, kinds, row_of
from m3ae_jax.evals.linear import Scale, swept
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

_SHRINKAGE = 1e-3  # of the mean variance, added to the covariance so that it can be inverted
_COLUMNS = ("mahalanobis", "softmax")


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Scores fitted on ``eval.train`` tell ``eval.outside`` from ``eval.test``.

    Raises:
        UserError: an example has no label.
    """
    train, test, outside = (encoded(setup, state, part) for part in ("train", "test", "outside"))
    areas = {kind: _areas(train, test, outside, kind) for kind in kinds(train, test, outside)}
    scalars = {f"{kind}/{name}": value for kind, figures in areas.items() for name, value in figures.items()}
    rows = [row_of(kind, figures, _COLUMNS) for kind, figures in areas.items()]
    heads = ["features", *(f"AUROC {column}" for column in _COLUMNS)]
    return Result.of("ood", scalars, table(heads, [*rows, ["chance", "0.500", "0.500"]]))


def _areas(train: Encoded, test: Encoded, outside: Encoded, kind: str) -> Figures:
    x, inside, other = (part.features[kind] for part in (train, test, outside))
    distance = Mahalanobis(x, train.label)
    probe = swept(x, train.label, len(train.classes))
    return {
        "mahalanobis": auroc(distance(inside), distance(other)),
        "softmax": auroc(-confidence(probe.logits(inside)), -confidence(probe.logits(other))),
    }


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
