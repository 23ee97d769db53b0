"""Keywords of captions: those to which a teacher's attention goes (SIMLA, arXiv 2203.14395, section 3.4).

Legend: ``B`` examples, ``H`` heads, ``L`` words, ``V`` vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def keywords(
    attention: jax.Array,
    ids: jax.Array,
    eligible: jax.Array,
    vocabulary: int,
    *,
    per_head: int = 4,
    total: int = 5,
    voted: bool = True,
) -> jax.Array:
    """Each head votes for the words that it looks at most; the words with most votes are the keywords.

    Args:
        attention: `[B, H, L]`, of CLS to the words.
        ids: `[B, L] int32`; negative: no word.
        eligible: `[B, L] bool`, which may be chosen.
        vocabulary: V.
        per_head: votes of each head.
        total: keywords of a caption, at most.
        voted: a word that nobody voted for is none; else the first ones fill up, as in SIMLA's code.

    Returns:
        `[B, V] bool`.
    """
    words = ids.shape[1]
    _, chosen = jax.lax.top_k(jnp.where(eligible[:, None], attention, -1.0), min(per_head, words))
    votes = jnp.sum(jax.nn.one_hot(chosen, words), axis=(1, 2)) * eligible
    most, place = jax.lax.top_k(jnp.where(eligible, votes, -1.0), min(total, words))
    counts = most > (0.0 if voted else -1.0)
    found = jnp.take_along_axis(ids, place, axis=1)
    # What does not count goes beyond the vocabulary, where it is dropped.
    found = jnp.where(counts & (found >= 0), found, vocabulary)
    rows = jnp.arange(len(ids))[:, None]
    return jnp.zeros((len(ids), vocabulary), bool).at[rows, found].set(True, mode="drop")


def binary_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Binary cross-entropy of each word, `[..., V] float32`, nats; `target` in [0, 1]."""
    return jax.nn.softplus(logits) - logits * target.astype(jnp.float32)
