"""What a predictor reaches that ignores the other tokens: the figures that a restoring model must beat.

Words: cross-entropy of unigram frequencies, nats per token. Pictures: squared error of the mean patch at each position,
per pixel value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from m3ae_jax.data.tokens import Modality
from m3ae_jax.objectives.base import Part


def statistics_loss(
    modalities: Mapping[str, Modality],
    values: Callable[[Part], dict[str, jax.Array]],
    text_average: str,
    train: Iterable[Part],
    validation: Iterable[Part],
) -> dict[str, float]:
    """Losses of statistics of the training targets (of words, the visible ones too) on the validation targets.

    Args:
        modalities: by name, which is that of a group.
        values: of a part, what is to be restored, ``{group: [B, K, ...]}``.
        text_average: ``example`` or ``token``, how the loss averages words; patches are averaged by example.
        train: parts in host memory.
        validation: likewise.

    Returns:
        ``<group>_loss``, as far as the group occurs in both.
    """
    statistics: dict[str, _Statistics] = {}
    for part in train:
        for name, value in jax.device_get(values(part)).items():
            counted = statistics.setdefault(name, _Statistics(modalities[name]))
            group = part["groups"][name]
            counted.count(value, group["target"])
            if modalities[name].vocabulary:
                counted.count(group["visible"]["value"], group["visible"])
    sums = {name: np.zeros(2) for name in statistics}
    for part in validation:
        for name, value in jax.device_get(values(part)).items():
            if name not in statistics:
                continue
            target = part["groups"][name]["target"]
            error = np.where(target["valid"], statistics[name].error(value, target["position"]), 0.0).sum(axis=-1)
            count = target["valid"].sum(axis=-1)
            if modalities[name].vocabulary and text_average == "token":
                sums[name] += [error.sum(), count.sum()]
            else:
                sums[name] += [(error / np.maximum(count, 1)).sum(), (count > 0).sum()]
    return {f"{name}_loss": float(total / weight) for name, (total, weight) in sums.items() if weight}


class _Statistics:
    """Unigram counts of words, or the mean patch at each position."""

    def __init__(self, modality: Modality) -> None:
        self._vocabulary = modality.vocabulary
        if modality.vocabulary:
            # One count in all, spread over the vocabulary: unseen words stay possible, seen ones undisturbed.
            self._counts = np.full(modality.vocabulary, 1.0 / modality.vocabulary)
        else:
            self._sum, self._weight = (
                np.zeros((modality.tokens, modality.features)),
                np.full((modality.tokens, 1), 1e-9),
            )

    def count(self, value: np.ndarray, tokens: Mapping[str, np.ndarray]) -> None:
        valid = tokens["valid"]
        if self._vocabulary:
            np.add.at(self._counts, value[valid], 1)
        else:
            np.add.at(self._sum, tokens["position"][valid], value[valid])
            np.add.at(self._weight, tokens["position"][valid], 1)

    def error(self, value: np.ndarray, position: np.ndarray) -> np.ndarray:
        """`[B, K] float64`."""
        if self._vocabulary:
            return -np.log(self._counts / self._counts.sum())[value]
        return np.square(value - (self._sum / self._weight)[position]).mean(-1)
