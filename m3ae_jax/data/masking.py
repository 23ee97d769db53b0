"""Maskers: which tokens of an example are visible, and which are targets. True = real and visible, everywhere.

They are NumPy code that everything shares: the pipeline's threads, inference, evaluations and benchmarks.

Legend: ``B`` examples, ``L`` token slots before masking, ``V`` visible slots, ``K`` target slots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from m3ae_jax.data.order import RandomStream, hidden_count, token_budget
from m3ae_jax.data.tokens import MASK, Modality, Spec, TokenSet, token_spec


@dataclasses.dataclass(frozen=True)
class RandomSubset:
    """Hides a uniformly random subset of each example's real tokens; it takes groups of one modality.

    Attributes:
        ratio: mask ratio; of ``n`` real tokens ``hidden_count(n, ratio)`` are targets, the others are visible.
        minimum: of the real tokens at least so many are targets, if there are as many.
    """

    ratio: float
    minimum: int = 0

    def draw(self, stream: RandomStream, modalities: tuple[Modality, ...]) -> np.ndarray:
        """See `tokens.Masker`."""
        (modality,) = modalities
        return stream.take(modality.tokens)

    def spec(self, modalities: tuple[Modality, ...]) -> dict[str, dict[str, Spec]]:
        """See `tokens.Masker`."""
        (modality,) = modalities
        visible, target = self.budget(modality.tokens)
        return {"visible": token_spec(modality, visible), "target": token_spec(modality, target)}

    def __call__(self, noise: np.ndarray, tokens: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, TokenSet]:
        """See `tokens.Masker`."""
        ((value, real),) = tokens.values()
        return split(value, real, random_subset(noise, real, self.ratio, self.minimum), self.budget(real.shape[1]))

    def budget(self, tokens: int) -> tuple[int, int]:
        """The static slots (visible, target) of up to `tokens` real tokens."""
        visible, target = token_budget(tokens, self.ratio)
        return visible, max(target, min(self.minimum, tokens))


WHOLE = RandomSubset(0.0)
"""Everything is visible, nothing is a target."""


@dataclasses.dataclass(frozen=True)
class Corrupted:
    """BERT's masking (arXiv 1810.04805, section 3.1) of a group of ids: targets stay in their places, changed.

    The target set has ``input``: what is shown of it.

    Attributes:
        subset: which tokens are targets.
        masked: share of the targets that is shown as the mask embedding.
        random: share that is shown as a random id, which may be the true one; the rest is shown as it is.
    """

    subset: RandomSubset
    masked: float = 0.8
    random: float = 0.1

    def draw(self, stream: RandomStream, modalities: tuple[Modality, ...]) -> np.ndarray:
        """See `tokens.Masker`: of each token its place in the order of hiding, what is done to it, and an id."""
        (modality,) = modalities
        order, kind = self.subset.draw(stream, modalities), stream.take(modality.tokens)
        # An id as a whole number below 2^24, which float32 holds.
        return np.concatenate([order, kind, np.floor(stream.take(modality.tokens) * modality.vocabulary)])

    def spec(self, modalities: tuple[Modality, ...]) -> dict[str, dict[str, Spec]]:
        """See `tokens.Masker`."""
        sets = self.subset.spec(modalities)
        return {**sets, "target": {**sets["target"], "input": sets["target"]["value"]}}

    def __call__(self, noise: np.ndarray, tokens: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, TokenSet]:
        """See `tokens.Masker`."""
        ((value, _),) = tokens.values()
        order, kind, other = np.split(noise, 3, axis=1)
        sets = self.subset(order, tokens)
        shown = np.where(kind < self.masked, MASK, np.where(kind < self.masked + self.random, other, value))
        target = sets["target"]
        shown = np.take_along_axis(shown.astype(np.int32), target["position"], axis=1)
        sets["target"] = {**target, "input": np.where(target["valid"], shown, 0).astype(np.int32)}
        return sets


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Hides rectangles of a grid of patches (BEiT, arXiv 2106.08254, algorithm 1), then single ones up to the count.

    Attributes:
        ratio: mask ratio; of ``n`` patches ``hidden_count(n, ratio)`` are targets.
        smallest: patches of the smallest rectangle.
        aspect: sides of a rectangle are at most ``1 / aspect`` to 1.
    """

    ratio: float
    smallest: int = 16
    aspect: float = 0.3

    def draw(self, stream: RandomStream, modalities: tuple[Modality, ...]) -> np.ndarray:
        """See `tokens.Masker`: numbers of the tries, then the order in which single patches are hidden."""
        (modality,) = modalities
        return stream.take(4 * _TRIES * _BLOCKS + modality.tokens)

    def spec(self, modalities: tuple[Modality, ...]) -> dict[str, dict[str, Spec]]:
        """See `tokens.Masker`."""
        if modalities[0].grid is None:
            raise ValueError(f"{modalities[0].name} lies on no grid")
        return RandomSubset(self.ratio).spec(modalities)

    def __call__(self, noise: np.ndarray, tokens: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, TokenSet]:
        """See `tokens.Masker`."""
        ((value, real),) = tokens.values()
        patches = real.shape[1]
        side = math.isqrt(patches)
        tries, order = np.split(noise, [noise.shape[1] - patches], axis=1)
        budget = int(hidden_count(patches, self.ratio))
        blocks = [block_mask(row.reshape(-1, 4), (side, side), budget, self.smallest, self.aspect) for row in tries]
        # What lies in a block comes first, so the count is exact and blocks are whole.
        order = np.where(np.reshape(blocks, real.shape), order - 1, order)
        return split(value, real, random_subset(order, real, self.ratio), token_budget(patches, self.ratio))


_TRIES = 10  # at a block
_BLOCKS = 16


def block_mask(
    noise: np.ndarray, grid: tuple[int, int], budget: int, smallest: int = 16, aspect: float = 0.3
) -> np.ndarray:
    """Rectangles at random places, until `budget` patches are covered or ten tries in a row found no room.

    Args:
        noise: `[n, 4]` uniform in [0, 1): a row a try; it also ends when they are used up.
        grid: rows and columns.
        budget: of patches, never exceeded.
        smallest: a rectangle's area is drawn between this and what is left, whichever is more.
        aspect: the logarithm of height / width is uniform between those of `aspect` and ``1 / aspect``.

    Returns:
        `[rows, columns] bool`, True where hidden.
    """
    rows, columns = grid
    hidden = np.zeros(grid, bool)
    failed = 0
    for area_at, aspect_at, row_at, column_at in noise.astype(np.float64):
        left = budget - int(hidden.sum())
        if left <= 0 or failed == _TRIES:
            break
        failed += 1
        area = smallest + area_at * (left - smallest)
        ratio = math.exp((2 * aspect_at - 1) * math.log(1 / aspect))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, first = int(row_at * (rows - height + 1)), int(column_at * (columns - width + 1))
        block = hidden[top : top + height, first : first + width]
        if 0 < block.size - int(block.sum()) <= left:
            block[:] = True
            failed = 0
    return hidden


def random_subset(noise: np.ndarray, real: np.ndarray, ratio: float, minimum: int = 0) -> np.ndarray:
    """Which tokens are hidden.

    Args:
        noise: `[B, L]`, i.i.d. uniform below 1.
        real: `[B, L] bool`.
        ratio: mask ratio.
        minimum: at least so many, if there are as many.

    Returns:
        `[B, L] bool`, True where hidden; never True at padding.
    """
    # Padding sorts last. The stable sort settles equal noise by position.
    order = np.argsort(np.where(real, noise, noise.dtype.type(2)), axis=-1, kind="stable")
    tokens = real.sum(axis=-1, keepdims=True)
    count = np.maximum(hidden_count(tokens, ratio), np.minimum(tokens, minimum))
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
