"""A linear probe: multinomial logistic regression on frozen features, its penalty chosen on held-out training ones."""

from __future__ import annotations

from m3ae_jax.evals import Result
from m3ae_jax.evals.features import Figures, compared, encoded
from m3ae_jax.evals.linear import swept
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Accuracy on ``eval.test`` of probes fitted on ``eval.train``.

    Raises:
        UserError: an example has no label.
    """
    train, test = encoded(setup, state, "train"), encoded(setup, state, "test")

    def ask(kind: str) -> Figures:
        probe = swept(train.features[kind], train.label, len(train.classes))
        return {"accuracy": probe.accuracy(test.features[kind], test.label), "l2": probe.l2}

    scalars, lines = compared(train, test, ("accuracy",), ask)
    return Result("probe", {f"probe/{name}": value for name, value in scalars.items()}, "\n".join(lines))
