"""Cross-entropy over a large vocabulary, a block of words at a time.

Legend: ``B`` batch, ``K`` slots, ``E`` width, ``V`` words.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from m3ae_jax.models.placement import gather

_Three = tuple[jax.Array, jax.Array, jax.Array]
_Four = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

_NEVER = -1e30  # logit of the columns that fill up the last block; finite, as (-inf) - (-inf) is NaN


@flax.struct.dataclass
class WordLoss:
    """Of each slot.

    Attributes:
        loss: `[B, K] float32`, nats.
        best: `[B, K] int32`, the word with the largest logit.
    """

    loss: jax.Array
    best: jax.Array


def cross_entropy(x: jax.Array, kernel: jax.Array, bias: jax.Array, labels: jax.Array, blocks: int = 1) -> WordLoss:
    """Softmax cross-entropy of ``x @ kernel + bias``.

    With several blocks the logits exist for one block of words at a time, forward and backward: the forward pass
    keeps the logarithm of the running sum of exponentials, the backward pass computes each block's logits anew.

    Args:
        x: `[B, K, E]`; products are taken in its dtype, sums in float32.
        kernel: `[E, V] float32`.
        bias: `[V] float32`.
        labels: `[B, K] int32`.
        blocks: 1 keeps all logits.
    """
    kernel = gather(kernel.astype(x.dtype), "embed", "vocab")
    if blocks == 1:
        logits = _logits(x, kernel, bias)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return WordLoss(loss, jnp.argmax(logits, axis=-1).astype(jnp.int32))
    return _blockwise(x, kernel, bias, labels, blocks)


def soft_cross_entropy(student: _Three, teacher: _Three, blocks: int = 1) -> jax.Array:
    """Cross-entropy of a student's softmax under a teacher's, in blocks of words forward and backward.

    Args:
        student: `x`, `kernel` and `bias` as of `cross_entropy`.
        teacher: likewise; it gets no gradient.
        blocks: as of `cross_entropy`.

    Returns:
        `[B, K] float32`, nats.
    """
    of = [(x, gather(kernel.astype(x.dtype), "embed", "vocab"), bias) for x, kernel, bias in (student, teacher)]
    (x, kernel, bias), (other, other_kernel, other_bias) = of[0], jax.lax.stop_gradient(of[1])

    def grown(top: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The new greatest logit, the factor of sums so far, and the exponentials."""
        new = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(logits, axis=-1)))
        return new, jnp.exp(top - new), jnp.exp(logits - new[..., None])

    def block(carry: tuple[jax.Array, ...], part: tuple[_Three, _Three]) -> tuple[tuple[jax.Array, ...], None]:
        top, total, of_teacher, teacher_total, dot = carry
        (weight, offset, _), (other_weight, other_offset, _) = part
        logits = _logits(x, weight, offset)
        top, shrink, exponentials = grown(top, logits)
        total = total * shrink + jnp.sum(exponentials, axis=-1)
        of_teacher, shrink, exponentials = grown(of_teacher, _logits(other, other_weight, other_offset))
        teacher_total = teacher_total * shrink + jnp.sum(exponentials, axis=-1)
        return (top, total, of_teacher, teacher_total, dot * shrink + jnp.sum(exponentials * logits, axis=-1)), None

    zero = jnp.zeros(x.shape[:-1], jnp.float32)
    start = (zero + _NEVER, zero, zero + _NEVER, zero, zero)
    parts = (_cut(kernel, bias, blocks), _cut(other_kernel, other_bias, blocks))
    (top, total, _, teacher_total, dot), _ = jax.lax.scan(jax.checkpoint(block), start, parts)
    return top + jnp.log(total) - dot / teacher_total


def _logits(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    product = jnp.einsum("bke,ev->bkv", x, kernel, preferred_element_type=jnp.float32)
    return product + bias.astype(jnp.float32)


def _cut(kernel: jax.Array, bias: jax.Array, blocks: int) -> _Three:
    """Kernel `[n, E, size]`, bias `[n, size]` and first word `[n]` of each block."""
    words = bias.shape[0]
    size = -(-words // blocks)
    padding = size * blocks - words
    kernel = jnp.pad(kernel, ((0, 0), (0, padding))).reshape(kernel.shape[0], blocks, size)
    bias = jnp.pad(bias, (0, padding), constant_values=_NEVER).reshape(blocks, size)
    return jnp.moveaxis(kernel, 1, 0), bias, jnp.arange(blocks, dtype=jnp.int32) * size


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(x: jax.Array, kernel: jax.Array, bias: jax.Array, labels: jax.Array, blocks: int) -> WordLoss:
    return _blockwise_forward(x, kernel, bias, labels, blocks)[0]


def _blockwise_forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, labels: jax.Array, blocks: int
) -> tuple[WordLoss, tuple[jax.Array, ...]]:
    def block(carry: _Four, part: _Three) -> tuple[_Four, None]:
        largest, total, label_logit, best = carry
        weight, offset, first = part
        logits = _logits(x, weight, offset)
        top = jnp.max(logits, axis=-1)
        best = jnp.where(top > largest, first + jnp.argmax(logits, axis=-1).astype(jnp.int32), best)
        new = jnp.maximum(largest, top)
        total = total * jnp.exp(largest - new) + jnp.sum(jnp.exp(logits - new[..., None]), axis=-1)
        is_label = labels[..., None] == first + jnp.arange(logits.shape[-1], dtype=jnp.int32)
        label_logit += jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
        return (new, total, label_logit, best), None

    zero = jnp.zeros(labels.shape, jnp.float32)
    start = (zero + _NEVER, zero, zero, jnp.zeros(labels.shape, jnp.int32))
    (largest, total, label_logit, best), _ = jax.lax.scan(block, start, _cut(kernel, bias, blocks))
    log_sum = largest + jnp.log(total)
    return WordLoss(log_sum - label_logit, best), (x, kernel, bias, labels, log_sum)


def _blockwise_backward(blocks: int, saved: tuple[jax.Array, ...], gradient: WordLoss) -> tuple[Any, ...]:
    x, kernel, bias, labels, log_sum = saved

    def block(dx: jax.Array, part: _Three) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        weight, offset, first = part
        probability = jnp.exp(_logits(x, weight, offset) - log_sum[..., None])
        is_label = labels[..., None] == first + jnp.arange(offset.shape[0], dtype=jnp.int32)
        error = (probability - is_label) * gradient.loss[..., None]
        low = error.astype(x.dtype)
        dx += jnp.einsum("bkv,ev->bke", low, weight, preferred_element_type=jnp.float32)
        dkernel = jnp.einsum("bke,bkv->ev", x, low, preferred_element_type=jnp.float32)
        return dx, (dkernel, jnp.sum(error, axis=(0, 1)))

    dx, (dkernel, dbias) = jax.lax.scan(block, jnp.zeros(x.shape, jnp.float32), _cut(kernel, bias, blocks))
    width, words = kernel.shape
    dkernel = jnp.moveaxis(dkernel, 0, 1).reshape(width, -1)[:, :words]
    no_gradient = np.zeros(labels.shape, jax.dtypes.float0)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype), dbias.reshape(-1)[:words].astype(bias.dtype), no_gradient


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
