"""Token and position embeddings, by the table of modalities; a model knows token sets and nothing else.

The fixed position tables are sines and cosines (arXiv 2205.14204, section 1.2 of the method; layout of the reference).
Legend: ``B`` batch, ``K`` slots, ``L`` positions, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from m3ae_jax.data.tokens import MASK, Modality
from m3ae_jax.models.transformer import dense, gathered, named

POSITIONS = "position_embedding"
"""The name of a learned position table, `[L, D]`."""

Tokens = Mapping[str, jax.Array]
"""A token set: ``value`` (of pictures normalised pixels), ``position``, ``valid``."""


def sincos_1d(width: int, positions: np.ndarray) -> np.ndarray:
    """Sine then cosine features, ``omega_i = 10000^(-i / (width/2))``.

    Args:
        width: even number of channels.
        positions: `[L]`, any number type.

    Returns:
        `[L, width] float32`.
    """
    omega = 10000.0 ** -(np.arange(width // 2, dtype=np.float64) / (width / 2))
    angle = np.asarray(positions, np.float64)[:, None] * omega[None, :]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def sincos_2d(width: int, grid: tuple[int, int]) -> np.ndarray:
    """Position table of a grid of patches: the first half of the channels encodes x, the second y.

    Args:
        width: number of channels, divisible by 4.
        grid: (rows, columns).

    Returns:
        `[rows * columns, width] float32`, row-major.
    """
    rows, columns = np.indices(grid)
    return np.concatenate([sincos_1d(width // 2, columns.ravel()), sincos_1d(width // 2, rows.ravel())], axis=1)


def vector(module: nn.Module, name: str, width: int) -> jax.Array:
    """A learned `[1, 1, width]` parameter of a module: a CLS token, a mask token, a type."""
    return module.param(name, named(nn.initializers.normal(0.02), None, None, "embed"), (1, 1, width))


class Places(nn.Module):
    """Where a modality's tokens stand: position and, if `typed`, a learned vector of the modality.

    Attributes:
        modality: whose positions; on a grid they are two-dimensional.
        width: ``D``.
        learned: a learned position table instead of the fixed one.
        typed: add the modality's vector.
        trailing: there is one position more, of a token after the modality's; learned alone.
    """

    modality: Modality
    width: int
    learned: bool = False
    typed: bool = True
    trailing: bool = False

    def setup(self) -> None:
        """Declares what is learned."""
        m = self.modality
        if self.learned:
            initializer = named(nn.initializers.normal(0.02), None, "embed")
            self.table: Any = self.param(POSITIONS, initializer, (m.tokens + self.trailing, self.width))
        else:
            self.table = sincos_2d(self.width, m.grid) if m.grid else sincos_1d(self.width, np.arange(m.tokens))
        if self.typed:
            self.type = vector(self, "type_embedding", self.width)

    def place(self, position: jax.Array) -> jax.Array:
        """Maps `[B, K] int32` to `[B, K, D]`."""
        place = jnp.asarray(self.table)[position]
        return place + self.type if self.typed else place


class Embedding(Places):
    """Tokens of one modality at their places: a linear map of their features, or a table of ids.

    Attributes:
        dtype: of the linear map's products.
        bias: of the linear map.
        masked: token sets may have ``input``, which is shown instead of ``value``, with a learned vector for
            `tokens.MASK`; of patches ``hidden``, `[B, K] bool`, where that vector is shown.
        deviation: of fresh ids' vectors.
    """

    dtype: Any = jnp.float32
    masked: bool = False
    bias: bool = True
    deviation: float = 1.0

    def setup(self) -> None:
        """Declares what is learned."""
        super().setup()
        if self.modality.features:
            self.embedding: Any = dense(self.width, ("patch", "embed"), self.dtype, bias=self.bias)
        else:
            self.embedding = nn.Embed(
                self.modality.vocabulary,
                self.width,
                embedding_init=named(nn.initializers.normal(self.deviation), "vocab", "embed"),
                promote_dtype=gathered("vocab", "embed"),
            )
        if self.masked:
            self.mask = vector(self, "mask_embedding", self.width)

    def __call__(self, tokens: Tokens) -> jax.Array:
        """Maps a token set to `[B, K, D]`."""
        if self.masked and "hidden" in tokens:
            embedded = jnp.where(tokens["hidden"][..., None], self.mask, self.embedding(tokens["value"]))
            return embedded + self.place(tokens["position"])
        shown = tokens["input"] if self.masked and "input" in tokens else tokens["value"]
        if shown is tokens["value"]:
            return self.embedding(shown) + self.place(tokens["position"])
        embedded = jnp.where((shown == MASK)[..., None], self.mask, self.embedding(jnp.maximum(shown, 0)))
        return embedded + self.place(tokens["position"])


class MaskTokens(Places):
    """What stands for the tokens of one modality that are to be restored: a learned vector at their places."""

    def setup(self) -> None:
        """Declares what is learned."""
        super().setup()
        self.mask = vector(self, "mask_embedding", self.width)

    def __call__(self, position: jax.Array) -> jax.Array:
        """Maps `[B, K] int32` to `[B, K, D]`."""
        return self.mask + self.place(position)
