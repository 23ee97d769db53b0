"""Maskers: which tokens of an example are visible, and which are targets. True = real and visible, everywhere.

They are NumPy code that everything shares: the pipeline's threads, inference, evaluations and benchmarks.

Legend: ``B`` examples, ``L`` token slots before masking, ``V`` visible slots, ``K`` target slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from m3ae_jax.data.order import RandomStream, hidden_count, token_budget
from m3ae_jax.data.tokens import Modality, Spec, TokenSet, token_spec


@dataclasses.dataclass(frozen=True)
class RandomSubset:
    """Hides a uniformly random subset of each example's real tokens; it takes groups of one modality.

    Attributes:
        ratio: mask ratio; of ``n`` real tokens ``hidden_count(n, ratio)`` are targets, the others are visible.
    """

    ratio: float

    def draw(self, stream: RandomStream, modalities: tuple[Modality, ...]) -> np.ndarray:
        """See `tokens.Masker`."""
        (modality,) = modalities
        return stream.take(modality.tokens)

    def spec(self, modalities: tuple[Modality, ...]) -> dict[str, dict[str, Spec]]:
        """See `tokens.Masker`."""
        (modality,) = modalities
        visible, target = token_budget(modality.tokens, self.ratio)
        return {"visible": token_spec(modality, visible), "target": token_spec(modality, target)}

    def __call__(self, noise: np.ndarray, tokens: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, TokenSet]:
        """See `tokens.Masker`."""
        ((value, real),) = tokens.values()
        return split(value, real, random_subset(noise, real, self.ratio), token_budget(real.shape[1], self.ratio))


WHOLE = RandomSubset(0.0)
"""Everything is visible, nothing is a target."""


def random_subset(noise: np.ndarray, real: np.ndarray, ratio: float) -> np.ndarray:
    """Which tokens are hidden.

    Args:
        noise: `[B, L]`, i.i.d. uniform in [0, 1).
        real: `[B, L] bool`.
        ratio: mask ratio.

    Returns:
        `[B, L] bool`, True where hidden; never True at padding.
    """
    # Padding sorts last. The stable sort settles equal noise by position.
    order = np.argsort(np.where(real, noise, noise.dtype.type(2)), axis=-1, kind="stable")
    count = hidden_count(real.sum(axis=-1, keepdims=True), ratio)
    hidden = np.zeros(real.shape, bool)
    np.put_along_axis(hidden, order, np.arange(real.shape[1]) < count, axis=-1)
    return hidden


def take(value: np.ndarray, chosen: np.ndarray, slots: int) -> TokenSet:
    """Gathers the chosen tokens of each example, in order of position, into `slots` slots.

    Args:
        value: `[B, L, ...]`.
        chosen: `[B, L] bool`, at most `slots` True a row.
        slots: static number of slots.
    """
    position = np.argsort(~chosen, axis=-1, kind="stable")[:, :slots]
    valid = np.arange(slots) < chosen.sum(axis=-1, keepdims=True)
    position = np.where(valid, position, 0)
    # Of a flat array whole tokens are copied at once.
    rows, length = chosen.shape
    flat = np.take(value.reshape(rows * length, *value.shape[2:]), np.arange(rows)[:, None] * length + position, axis=0)
    flat[~valid] = 0
    return TokenSet(value=flat, position=position.astype(np.int32), valid=valid)


def split(value: np.ndarray, real: np.ndarray, hidden: np.ndarray, budget: tuple[int, int]) -> dict[str, TokenSet]:
    """Splits real tokens into `visible` and `target`: a partition of the real ones.

    Args:
        value: `[B, L, ...]`.
        real: `[B, L] bool`.
        hidden: `[B, L] bool`.
        budget: static slots (visible, target); see `order.token_budget`.
    """
    return {"visible": take(value, real & ~hidden, budget[0]), "target": take(value, real & hidden, budget[1])}
