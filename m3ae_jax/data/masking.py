"""Masks, per example, in the tf.data graph. True = real and visible, everywhere.

Legend: ``B`` examples, ``L`` token slots, ``V`` visible slots, ``K`` target slots.
"""

from __future__ import annotations

from typing import Any, TypedDict

from m3ae_jax.data.order import hidden_count


class TokenSet(TypedDict):
    """A set of tokens: the order of its slots carries no meaning, `position` does.

    Attributes:
        value: `[B, K, ...]` patch values (uint8) or token ids (int32).
        position: `[B, K] int32`.
        valid: `[B, K] bool`, False in padding slots (whose value and position are 0).
    """

    value: Any
    position: Any
    valid: Any


def random_subset(noise: Any, real: Any, ratio: float) -> Any:
    """Hides a uniformly random subset of each example's real tokens.

    Args:
        noise: `[B, L] float32`, i.i.d. uniform.
        real: `[B, L] bool`.
        ratio: mask ratio; of ``n`` real tokens ``hidden_count(n, ratio)`` are hidden.

    Returns:
        `[B, L] bool`, True where hidden; never True at padding.
    """
    import tensorflow as tf

    # Rank among the real tokens: padding sorts last. The stable sort settles equal noise by position.
    order = tf.argsort(tf.where(real, noise, 2.0), axis=-1, stable=True)
    rank = tf.argsort(order, axis=-1, stable=True)
    count = hidden_count(tf.reduce_sum(tf.cast(real, tf.int32), axis=-1, keepdims=True), ratio)
    return rank < count


def take(value: Any, chosen: Any, slots: int) -> TokenSet:
    """Gathers the chosen tokens of each example, in order of position, into `slots` slots.

    Args:
        value: `[B, L, ...]`.
        chosen: `[B, L] bool`, at most `slots` True a row.
        slots: static number of slots.
    """
    import tensorflow as tf

    position = tf.argsort(tf.cast(~chosen, tf.int32), axis=-1, stable=True)[:, :slots]
    count = tf.reduce_sum(tf.cast(chosen, tf.int32), axis=-1, keepdims=True)
    valid = tf.range(slots) < count
    position = tf.where(valid, position, 0)
    gathered = tf.gather(value, position, batch_dims=1)
    keep = tf.reshape(valid, tf.concat([tf.shape(valid), tf.ones([tf.rank(gathered) - 2], tf.int32)], 0))
    # A product: of bytes faster than tf.where.
    return TokenSet(value=gathered * tf.cast(keep, gathered.dtype), position=position, valid=valid)


def split(value: Any, real: Any, hidden: Any, budget: tuple[int, int]) -> dict[str, TokenSet]:
    """Splits real tokens into `visible` and `target`: a partition of the real ones.

    Args:
        value: `[B, L, ...]`.
        real: `[B, L] bool`.
        hidden: `[B, L] bool`.
        budget: static slots (visible, target); see `order.token_budget`.
    """
    return {
        "visible": take(value, real & ~hidden, budget[0]),
        "target": take(value, real & hidden, budget[1]),
    }
