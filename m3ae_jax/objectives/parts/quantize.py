"""Quantizers: a token's latent vector becomes one of K ids, and an id a vector again.

Legend: ``B`` examples, ``N`` tokens, ``d`` numbers of a latent, ``K`` codes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from m3ae_jax.objectives.parts.contrast import unit

State = Any
"""Of a codebook that is moved beside the optimizer; ``{}`` of one that has none."""


@flax.struct.dataclass
class Quantized:
    """What a quantizer makes of latents.

    Attributes:
        ids: `[B, N] int32`, in [0, K).
        value: `[B, N, d] float32`, the code's vector; its gradient goes to the latent as if nothing was rounded.
        loss: `[B, N] float32`, by which the latent is drawn to its code.
    """

    ids: jax.Array
    value: jax.Array
    loss: jax.Array


class Quantizer(Protocol):
    """What every quantizer has."""

    @property
    def codes(self) -> int:
        """K."""

    @property
    def width(self) -> int:
        """d."""

    def init(self, rng: jax.Array) -> State:
        """A fresh codebook."""

    def __call__(self, state: State, latents: jax.Array) -> Quantized:
        """Quantizes latents `[B, N, d] float32`; no gradient goes to the state."""

    def vectors(self, state: State, ids: jax.Array) -> jax.Array:
        """The vectors `[..., d] float32` of ids `[...]`."""

    def sums(self, latents: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
        """What `update` needs added over all examples."""

    def update(self, state: State, sums: dict[str, jax.Array], latents: jax.Array, rng: jax.Array) -> State:
        """The next codebook.

        Args:
            state: before.
            sums: of all examples.
            latents: `[B, N, d]` of all examples, of which new codes are made.
            rng: of the draw.
        """


@dataclasses.dataclass(frozen=True)
class FSQ:
    """Finite scalar quantization (arXiv 2309.15505, section 3): each number is bounded and rounded to a few levels.

    There is no codebook that could collapse.

    Attributes:
        levels: of each number, at least 2; their product is K.
    """

    levels: tuple[int, ...]

    @property
    def codes(self) -> int:
        """See `Quantizer`."""
        return math.prod(self.levels)

    @property
    def width(self) -> int:
        """See `Quantizer`."""
        return len(self.levels)

    def init(self, rng: jax.Array) -> State:
        """See `Quantizer`."""
        return {}

    def __call__(self, state: State, latents: jax.Array) -> Quantized:
        """See `Quantizer`; the loss is 0."""
        levels = np.asarray(self.levels)
        half = (levels - 1) * (1 + 1e-3) / 2  # a little more, or the outer levels were reached at infinity alone
        offset = np.where(levels % 2, 0.0, 0.5)  # an even number of levels lies around a half
        shift = np.arctanh(offset / half).astype(np.float32)
        bounded = jnp.tanh(latents.astype(jnp.float32) + shift) * half.astype(np.float32) - offset.astype(np.float32)
        rounded = jnp.round(bounded)
        ids = jnp.sum((rounded.astype(jnp.int32) + levels // 2) * self._basis, axis=-1)
        value = (bounded + jax.lax.stop_gradient(rounded - bounded)) / (levels // 2).astype(np.float32)
        return Quantized(ids, value, jnp.zeros(ids.shape, jnp.float32))

    def vectors(self, state: State, ids: jax.Array) -> jax.Array:
        """See `Quantizer`; numbers of [-1, 1]."""
        levels = np.asarray(self.levels)
        digits = ids[..., None] // self._basis % levels
        return (digits - levels // 2).astype(jnp.float32) / (levels // 2).astype(np.float32)

    def sums(self, latents: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
        """See `Quantizer`."""
        return {}

    def update(self, state: State, sums: dict[str, jax.Array], latents: jax.Array, rng: jax.Array) -> State:
        """See `Quantizer`."""
        return state

    @property
    def _basis(self) -> np.ndarray:
        return np.cumprod([1, *self.levels[:-1]]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class CosineVQ:
    """A codebook of unit vectors, the nearest by cosine, moved to the mean of what it stands for (4M's).

    Its state: ``codes`` `[K, d] float32`, unit vectors, and ``hits`` `[K] float32`, the moving mean of how often each
    was the nearest in a step. A code with fewer than 1 / `restart` of the even share is replaced by a latent of the
    batch; as the hits begin at 0, the first steps take the codebook from the data.

    Attributes:
        codes: K.
        width: d.
        decay: of the moving means.
        restart: see above; 0: no code is replaced.
    """

    codes: int
    width: int
    decay: float = 0.99
    restart: float = 32.0

    def init(self, rng: jax.Array) -> State:
        """See `Quantizer`."""
        return {"codes": unit(jax.random.normal(rng, (self.codes, self.width))), "hits": jnp.zeros(self.codes)}

    def __call__(self, state: State, latents: jax.Array) -> Quantized:
        """See `Quantizer`; the loss is the mean squared distance to the code, which stays where it is."""
        latents, codes = latents.astype(jnp.float32), jax.lax.stop_gradient(state["codes"])
        ids = jnp.argmax(jnp.einsum("bnd,kd->bnk", unit(latents), codes), axis=-1).astype(jnp.int32)
        nearest = codes[ids]
        value = latents + jax.lax.stop_gradient(nearest - latents)
        return Quantized(ids, value, jnp.mean(jnp.square(nearest - latents), axis=-1))

    def vectors(self, state: State, ids: jax.Array) -> jax.Array:
        """See `Quantizer`."""
        codes: jax.Array = state["codes"]
        return codes[ids]

    def sums(self, latents: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
        """See `Quantizer`: of each code the sum of its latents' directions, and how many they are."""
        flat, numbers = unit(latents.astype(jnp.float32)).reshape(-1, self.width), ids.reshape(-1)
        return {
            "total": jax.ops.segment_sum(flat, numbers, self.codes),
            "hits": jax.ops.segment_sum(jnp.ones(numbers.shape), numbers, self.codes),
        }

    def update(self, state: State, sums: dict[str, jax.Array], latents: jax.Array, rng: jax.Array) -> State:
        """See `Quantizer`."""
        hit = sums["hits"][:, None] > 0
        moved = self.decay * state["codes"] + (1 - self.decay) * unit(sums["total"])
        codes = jnp.where(hit, unit(moved), state["codes"])
        hits = self.decay * state["hits"] + (1 - self.decay) * sums["hits"]
        if self.restart:
            flat = latents.astype(jnp.float32).reshape(-1, self.width)
            drawn = unit(flat[jax.random.randint(rng, (self.codes,), 0, len(flat))])
            dead = hits < len(flat) / self.codes / self.restart
            codes = jnp.where(dead[:, None], drawn, codes)
        return {"codes": codes, "hits": hits}


def usage(hits: jax.Array) -> dict[str, jax.Array]:
    """How a vocabulary is used: the ``share`` of codes that occur, and the ``perplexity`` of their frequencies.

    Args:
        hits: `[K]`, how often each code occurred.
    """
    p = hits / jnp.maximum(jnp.sum(hits), 1.0)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0))
    return {"share": jnp.mean((hits > 0).astype(jnp.float32)), "perplexity": jnp.exp(entropy)}
