"""Validation losses on fixed examples with fixed masks, and the priors that they must beat."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from m3ae_jax.objectives.base import Prior
from m3ae_jax.objectives.batch import total_loss
from m3ae_jax.parallel.mesh import put_batch
from m3ae_jax.train.replacements import Replacements
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState, eval_step

_PRIOR_EXAMPLES = 2048

log = logging.getLogger("m3ae_jax")


class Validation:
    """Evaluates a state on the validation source; compiled once.

    Args:
        setup: the run's parts.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._step = setup.jit(eval_step(setup.objective))
        self._told = False

    def __call__(self, state: TrainState, stopping: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Loss terms, metrics, the total, and how many examples were replaced, as ``val/<name>``.

        Nothing without validation data; None if `stopping`, called before each batch, was true.

        Raises:
            UserError: not one of the validation examples can be used, or nearly all captions are empty.
        """
        setup = self._setup
        if setup.val_batches is None:
            return {}
        replaced, batches = Replacements("data.val"), []
        for part in setup.val_batches:
            if stopping():
                return None
            replaced.add({"val": part}, end=min(setup.config.eval.examples, len(setup.val_source or ())))
            batches.append(jax.device_get(self._step(state, put_batch({"val": part}, setup.mesh))))
        counted = {name: value for name, value in replaced.metrics().items() if value}
        replaced.check()
        if counted and not self._told:  # the same examples each time
            log.warning("%s", replaced.summary())
            self._told = True
        sums = jax.tree.map(lambda *values: sum(map(np.float64, values)), *batches)
        weights = setup.objective.term_weights
        total = total_loss({k: jax.tree.map(jnp.float32, sums[k]) for k in weights if k in sums}, weights)
        means = {f"val/{name}": float(s / w) if w else 0.0 for name, (s, w) in sums.items()}
        return {"val/loss": float(total), **means, **{f"val/{name}": value for name, value in counted.items()}}


def priors(setup: Setup) -> dict[str, float]:
    """What a predictor that ignores the other tokens reaches on the validation targets, by the first training batches.

    Of several processes each looks at its own rows.

    Returns:
        ``prior/<term>``; nothing without validation data, or if the objective knows no prior.
    """
    if setup.val_batches is None or not isinstance(setup.objective, Prior):
        return {}
    count = -(-_PRIOR_EXAMPLES // setup.config.batch_size)
    with contextlib.closing(iter(setup.train_batches(0))) as batches:
        parts = (part for batch in itertools.islice(batches, count) for part in batch.values())
        figures = setup.objective.prior(parts, setup.val_batches)
    return {f"prior/{name}": value for name, value in figures.items()}
