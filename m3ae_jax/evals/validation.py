"""Validation losses on fixed examples with fixed masks, and the priors that they must beat."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3ae_jax.objectives.base import total_loss
from m3ae_jax.parallel.mesh import put_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState, eval_step

_PRIOR_EXAMPLES = 2048


class Validation:
    """Evaluates a state on the validation source; compiled once.

    Args:
        setup: the run's parts.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._step = setup.jit(eval_step(setup.objective))

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Loss terms, metrics and the total, as ``val/<name>``; nothing without validation data."""
        sums: dict[str, Any] = {}
        if self._setup.val_batches is None:
            return {}
        for batch in self._setup.val_batches:
            terms = jax.device_get(self._step(state, put_batch(batch, self._setup.mesh)))
            for name, term in terms.items():
                sums[name] = np.add(sums.get(name, (0.0, 0.0)), np.asarray(term, np.float64))
        weights = self._setup.objective.term_weights
        terms = {k: (jnp.float32(sums[k][0]), jnp.float32(sums[k][1])) for k in weights if k in sums}
        total = total_loss(terms, weights)
        means = {f"val/{name}": float(s / w) if w else 0.0 for name, (s, w) in sums.items()}
        return {"val/loss": float(total), **means}


def priors(setup: Setup) -> dict[str, float]:
    """What a predictor that ignores the other tokens reaches on the validation targets.

    Words: cross-entropy of the training words' unigram frequencies, nats per token. Pictures:
    squared error of the training targets' mean at each position, per pixel value. Both use the first training
    batches, their visible tokens too, and the average (over examples or tokens) that the loss takes. Of several
    processes each looks at its own rows.

    Returns:
        ``prior/text_loss`` and ``prior/image_loss``, as far as the modality is trained; nothing without
        validation data.
    """
    if setup.val_batches is None:
        return {}
    targets = jax.jit(setup.objective.targets)  # of this process's rows alone, on its own device
    statistics: dict[str, _Statistics] = {}
    with contextlib.closing(iter(setup.train_batches(0))) as batches:
        some = itertools.islice(batches, -(-_PRIOR_EXAMPLES // setup.config.batch_size))
        for batch in (part for whole in some for part in whole.get("parts", {"": whole}).values()):
            for name, (value, position, valid) in _targets(targets, batch).items():
                if name not in statistics:
                    statistics[name] = _Statistics(value, setup)
                statistics[name].count(value, position, valid)
                if name == "text":
                    seen = batch["groups"][name]["visible"]
                    statistics[name].count(seen["value"], seen["position"], seen["valid"])
    sums = {name: np.zeros(2) for name in statistics}
    for batch in setup.val_batches:
        found = _targets(targets, batch)
        for name, (value, position, valid) in ((n, t) for n, t in found.items() if n in statistics):
            error = np.where(valid, statistics[name].error(value, position), 0.0).sum(axis=-1)
            count = valid.sum(axis=-1)
            if name == "text" and setup.config.loss.text_average == "token":
                sums[name] += [error.sum(), count.sum()]
            else:
                sums[name] += [(error / np.maximum(count, 1)).sum(), (count > 0).sum()]
    return {f"prior/{name}_loss": float(s / w) for name, (s, w) in sums.items() if w}


def _targets(targets: Any, batch: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    values = jax.device_get(targets(batch))
    sets = {name: batch["groups"][name]["target"] for name in values}
    return {name: (np.asarray(values[name]), s["position"], s["valid"]) for name, s in sets.items()}


class _Statistics:
    """Unigram counts of words, or the mean patch at each position."""

    def __init__(self, value: np.ndarray, setup: Setup) -> None:
        self._words = value.ndim == 2
        if self._words:
            assert setup.tokenizer is not None
            # One count in all, spread over the vocabulary: unseen words stay possible, seen ones undisturbed.
            self._counts = np.full(setup.tokenizer.vocab_size, 1.0 / setup.tokenizer.vocab_size)
        else:
            slots = max(group.tokens for group in setup.objective.groups if group.modality == "image")
            self._sum, self._weight = np.zeros((slots, value.shape[-1])), np.full((slots, 1), 1e-9)

    def count(self, value: np.ndarray, position: np.ndarray, valid: np.ndarray) -> None:
        if self._words:
            np.add.at(self._counts, value[valid], 1)
        else:
            np.add.at(self._sum, position[valid], value[valid])
            np.add.at(self._weight, position[valid], 1)

    def error(self, value: np.ndarray, position: np.ndarray) -> np.ndarray:
        """`[B, K] float64`."""
        if self._words:
            return -np.log(self._counts / self._counts.sum())[value]
        return np.square(value - (self._sum / self._weight)[position]).mean(-1)
