"""A linear probe: multinomial logistic regression on frozen features, its penalty chosen on held-out training ones."""

from __future__ import annotations

from m3ae_jax.evals.base import Result
from m3ae_jax.evals.features import Encoded, Judge, compared
from m3ae_jax.evals.linear import swept
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Accuracy on ``eval.test`` of probes fitted on ``eval.train``.

    Raises:
        UserError: most examples have no class, or all test examples are training examples.
    """

    def measure(train: Encoded, test: Encoded, kind: str) -> Judge:
        probe = swept(train.features[kind], train.label, len(train.classes), group=train.group)
        right = probe.right(test.features[kind], test.label)
        return lambda which: {"accuracy": float(right[which].mean()), "l2": probe.l2}

    return compared("probe", setup, state, {"accuracy": "accuracy"}, measure)
