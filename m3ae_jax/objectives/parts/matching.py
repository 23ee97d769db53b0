"""Hard negatives of image-text matching (ALBEF, arXiv 2107.07651, section 3.2).

Legend: ``B`` rows, ``R`` rows of a group, ``G`` groups, ``d`` width of the embeddings.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from m3ae_jax.models.placement import constrain

_NEVER = -1e9


@flax.struct.dataclass
class Negatives:
    """Of each row another one, whose picture (or caption) does not belong to it.

    Attributes:
        row: `[G, R] int32`, its place in the group.
        exists: `[B] bool`; False where all others of the group are equal pictures or padding.
    """

    row: jax.Array
    exists: jax.Array

    def of(self, x: jax.Array) -> jax.Array:
        """The negatives' rows of `[B, ...]`; their gradient goes where they come from."""
        # Whole rows: with an index for each number a TPU would pad each of these to 128.
        taken = jax.vmap(lambda rows, index: rows[index])(x.reshape(*self.row.shape, *x.shape[1:]), self.row)
        return constrain(taken.reshape(x.shape), "batch", *[None] * (x.ndim - 1))


def hard_negatives(
    rng: jax.Array | None,
    queries: jax.Array,
    keys: jax.Array,
    scale: Any,
    same: tuple[jax.Array, ...],
    valid: jax.Array,
    rows: int = 0,
) -> Negatives:
    """Draws for each query a key that is not its own, the likelier the more alike they are.

    Args:
        rng: of the draw; None takes the most alike.
        queries: `[B, d]`, unit vectors.
        keys: `[B, d]`, likewise.
        scale: of the cosines: chances are the softmax of their product.
        same: `[B] int32` ids each; rows that share one of them, which is not 0, are no negatives of each other.
        valid: `[B] bool`, False for padding.
        rows: negatives come from groups of so many consecutive rows; 0: from all.
    """
    size = rows or len(valid)

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(-1, size, *x.shape[1:])

    queries, keys = jax.lax.stop_gradient((grouped(queries), grouped(keys)))
    logits = scale * jnp.einsum("grd,gsd->grs", queries, keys, preferred_element_type=jnp.float32)
    possible = grouped(valid)[:, None, :] & ~jnp.eye(size, dtype=bool)
    for ids in map(grouped, same):
        possible &= (ids[:, :, None] != ids[:, None, :]) | (ids[:, :, None] == 0)
    noise = 0.0 if rng is None else jax.random.gumbel(rng, logits.shape)
    row = jnp.argmax(jnp.where(possible, jax.lax.stop_gradient(logits) + noise, _NEVER), axis=2)
    exists = jnp.any(possible, axis=2).reshape(-1) & valid
    return Negatives(row.astype(jnp.int32), exists)
