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

    def sums(self, latents: jax.Array, ids: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
        """What `update` needs added over all examples; `valid` is `[B, N] bool`."""

    def update(
        self, state: State, sums: dict[str, jax.Array], latents: jax.Array, valid: jax.Array, rng: jax.Array
    ) -> State:
        """The next codebook.

        Args:
            state: before.
            sums: of all examples.
            latents: `[B, N, d]` of all examples, of which new codes are made.
            valid: `[B, N] bool`.
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

    def sums(self, latents: jax.Array, ids: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
        """See `Quantizer`."""
        return {}

    def update(
        self, state: State, sums: dict[str, jax.Array], latents: jax.Array, valid: jax.Array, rng: jax.Array
    ) -> State:
        """See `Quantizer`."""
        return state

    @property
    def _basis(self) -> np.ndarray:
        return np.cumprod([1, *self.levels[:-1]]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class VQ:
    """A codebook, of which the nearest code is taken, and which is moved to the mean of what it stands for.

    With `cosine` codes are unit vectors and nearest by direction (4M's); without it this is k-means with moving means
    (arXiv 1711.00937, appendix A.1).

    Its state: ``codes`` `[K, d] float32`, and ``hits`` `[K] float32`, the moving mean of how often each was the nearest
    in a step. A code with fewer than 1 / `restart` of the even share is replaced by a latent of the batch; as the hits
    begin at 0, the first steps take the codebook from the data.

    Attributes:
        codes: K.
        width: d.
        cosine: see above.
        decay: of the moving means.
        restart: see above; 0: no code is replaced.
    """

    codes: int
    width: int
    cosine: bool = True
    decay: float = 0.99
    restart: float = 32.0

    def init(self, rng: jax.Array) -> State:
        """See `Quantizer`."""
        return {"codes": self._placed(jax.random.normal(rng, (self.codes, self.width))), "hits": jnp.zeros(self.codes)}

    def __call__(self, state: State, latents: jax.Array) -> Quantized:
        """See `Quantizer`; the loss is the mean squared distance to the code, which stays where it is."""
        latents, codes = latents.astype(jnp.float32), jax.lax.stop_gradient(state["codes"])
        closeness = jnp.einsum("bnd,kd->bnk", jax.lax.stop_gradient(self._placed(latents)), codes)
        if not self.cosine:
            closeness -= 0.5 * jnp.sum(jnp.square(codes), axis=-1)
        ids = jnp.argmax(closeness, axis=-1).astype(jnp.int32)
        nearest = codes[ids]
        value = latents + jax.lax.stop_gradient(nearest - latents)
        return Quantized(ids, value, jnp.mean(jnp.square(nearest - latents), axis=-1))

    def vectors(self, state: State, ids: jax.Array) -> jax.Array:
        """See `Quantizer`."""
        codes: jax.Array = state["codes"]
        return codes[ids]

    def sums(self, latents: jax.Array, ids: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
        """See `Quantizer`: of each code the sum of its latents, and how many they are."""
        weight = valid.reshape(-1).astype(jnp.float32)
        flat, numbers = self._placed(latents.astype(jnp.float32)).reshape(-1, self.width), ids.reshape(-1)
        return {
            "total": jax.ops.segment_sum(flat * weight[:, None], numbers, self.codes),
            "hits": jax.ops.segment_sum(weight, numbers, self.codes),
        }

    def update(
        self, state: State, sums: dict[str, jax.Array], latents: jax.Array, valid: jax.Array, rng: jax.Array
    ) -> State:
        """See `Quantizer`."""
        count = sums["hits"][:, None]
        hits = self.decay * state["hits"] + (1 - self.decay) * sums["hits"]
        mean = self._placed(sums["total"] / jnp.maximum(count, 1.0))
        # Of k-means each latent weighs the same; of directions each step (4M's code).
        rate = 1 - self.decay if self.cosine else (1 - self.decay) * count / jnp.maximum(hits[:, None], 1e-9)
        codes = jnp.where(count > 0, self._placed(state["codes"] + rate * (mean - state["codes"])), state["codes"])
        if self.restart:
            flat, real = latents.astype(jnp.float32).reshape(-1, self.width), valid.reshape(-1)
            number = jnp.sum(real)
            drawn = jnp.floor(jax.random.uniform(rng, (self.codes,)) * number).astype(jnp.int32)
            fresh = self._placed(flat[jnp.argsort(~real, stable=True)[drawn]])
            dead = (hits < number / self.codes / self.restart) & (number > 0)
            codes = jnp.where(dead[:, None], fresh, codes)
        return {"codes": codes, "hits": hits}

    def _placed(self, vectors: jax.Array) -> jax.Array:
        return unit(vectors) if self.cosine else vectors


def usage(hits: jax.Array) -> dict[str, jax.Array]:
    """How a vocabulary is used: the ``share`` of codes that occur, and the ``perplexity`` of their frequencies.

    Args:
        hits: `[K]`, how often each code occurred.
    """
    p = hits / jnp.maximum(jnp.sum(hits), 1.0)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0))
    return {"share": jnp.mean((hits > 0).astype(jnp.float32)), "perplexity": jnp.exp(entropy)}
