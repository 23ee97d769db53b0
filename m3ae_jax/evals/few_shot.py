"""A linear probe on 1, 5, 10 and 25 examples of each class: mean over draws of the examples, and its 95 % interval.

The penalty is scikit-learn's default (C = 1): nothing is left to choose it on. Features are standardised by all
training examples, whose labels that does not look at. A class with fewer examples gives all it has.
"""

from __future__ import annotations

import numpy as np

from m3ae_jax.evals.base import Result
from m3ae_jax.evals.features import Encoded, Figures, Judge, compared
from m3ae_jax.evals.linear import Problem, Scale
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

SHOTS = (1, 5, 10, 25)
DRAWS = 5


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Accuracy on ``eval.test`` from few examples of ``eval.train``.

    Raises:
        UserError: most examples have no class, or all test examples are training examples.
    """

    def measure(train: Encoded, test: Encoded, kind: str) -> Judge:
        scale, right = Scale.of(train.features[kind]), {}
        for shots in SHOTS:
            for seed in range(DRAWS):
                rows = draw(train.label, shots, seed)
                problem = Problem(train.features[kind][rows], train.label[rows], len(train.classes), scale)
                right[shots, seed] = problem.fit(1 / len(rows)).right(test.features[kind], test.label)

        def judge(which: np.ndarray) -> Figures:
            figures = Figures()
            for shots in SHOTS:
                accuracies = [float(right[shots, seed][which].mean()) for seed in range(DRAWS)]
                figures[f"{shots}_shot"] = float(np.mean(accuracies))
                figures[f"{shots}_shot/interval"] = half_interval(accuracies)
            return figures

        return judge

    return compared("few_shot", setup, state, {f"{shots}_shot": f"{shots} a class" for shots in SHOTS}, measure)


def draw(label: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Indices of `shots` examples of each class, or all of a smaller class.

    A draw with more shots holds that with fewer of the same seed.

    Args:
        label: `[n]`.
        shots: examples of a class.
        seed: of the draw.
    """
    order = np.random.default_rng(seed).permutation(len(label))
    return np.concatenate([order[label[order] == c][:shots] for c in np.unique(label)])


def half_interval(values: list[float]) -> float:
    """Half the width of the mean's 95 % interval, by Student's t; NaN for fewer than two values."""
    from scipy.stats import t

    if len(values) < 2:
        return float("nan")
    return float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
