"""Classification by the nearest training examples: cosine similarity, exact, votes weighted by it.

A neighbour's vote is ``exp(similarity / 0.07)`` (arXiv 1805.01978, section 3.4).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m3ae_jax.evals.base import Result
from m3ae_jax.evals.features import Encoded, Judge, compared, encoded, unit
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

NEIGHBORS = (1, 5, 20, 100)
_TEMPERATURE = 0.07
_BLOCK = 512


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Accuracy on ``eval.test`` by the neighbours in ``eval.train``.

    Raises:
        UserError: most examples have no class, or all test examples are training examples.
    """
    counts = [k for k in NEIGHBORS if k <= len(encoded(setup, state, "train").label)]

    def measure(train: Encoded, test: Encoded, kind: str) -> Judge:
        guesses = classify(train.features[kind], train.label, test.features[kind], counts)
        right = {f"k={k}": guess == test.label for k, guess in guesses.items()}
        return lambda which: {name: float(hits[which].mean()) for name, hits in right.items()}

    return compared("knn", setup, state, {f"k={k}": f"k={k}" for k in counts}, measure)


def classify(
    train: np.ndarray, label: np.ndarray, test: np.ndarray, counts: Sequence[int], block: int = _BLOCK
) -> dict[int, np.ndarray]:
    """The class with the most votes; of equally near neighbours the first counts, of equal votes the first class.

    Args:
        train: `[n, D]` features.
        label: `[n]`, from 0.
        test: `[m, D]`.
        counts: numbers of neighbours, at most n.
        block: rows of `test` that are compared at a time.

    Returns:
        `[m] int` by number of neighbours.
    """
    near, queries = jnp.asarray(unit(train)), unit(test)
    classes = int(label.max()) + 1
    guesses: dict[int, list[np.ndarray]] = {k: [] for k in counts}
    for start in range(0, len(test), block):
        rows = queries[start : start + block]
        padded = np.concatenate([rows, np.zeros((min(block, len(test)) - len(rows), rows.shape[1]), rows.dtype)])
        similarity, index = (np.asarray(x)[: len(rows)] for x in _nearest(padded, near, max(counts)))
        vote = np.exp((similarity - similarity[:, :1]).astype(np.float64) / _TEMPERATURE)
        for k in counts:
            cells = np.arange(len(rows))[:, None] * classes + label[index[:, :k]]
            votes = np.bincount(cells.ravel(), vote[:, :k].ravel(), minlength=len(rows) * classes)
            guesses[k].append(votes.reshape(len(rows), classes).argmax(axis=1))
    return {k: np.concatenate(classes) for k, classes in guesses.items()}


@functools.partial(jax.jit, static_argnums=2)
def _nearest(queries: jax.Array, near: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    with jax.default_matmul_precision("highest"):
        return jax.lax.top_k(queries @ near.T, count)
