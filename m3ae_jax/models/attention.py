"""Scaled dot-product attention in which padding is never a key, by XLA or by a backend's fused kernel.

Legend: ``B`` batch, ``H`` heads, ``N`` tokens, ``C`` channels of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from m3ae_jax.models.placement import on_each_device

KERNELS = {
    # Which accelerator has it; None: all.
    "xla": None,
    "cudnn": "gpu",
    "flash": "tpu",
}
RESULT = "attention_result"  # what a remat policy may keep
_FLASH_BLOCK = 128  # tokens; the kernel takes whole blocks


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    valid: jax.Array,
    *,
    kernel: str = "xla",
    head_groups: int = 1,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Mixes values by the softmax of scaled products (float32 inside).

    Args:
        query: `[B, H, N, C]`, key and value alike.
        valid: `[B, N] bool`, True where a token is real.
        kernel: one of `KERNELS`.
        head_groups: ``xla`` alone: how many groups of heads are worked on one after the other, so that the weights
            `[B, H, N, N]` exist for one group at a time, in the backward pass too. Divides H. A group takes every
            `head_groups`-th head, so that heads split over devices stay where they are.
        dropout: rate on the weights, with `rng`; ``xla`` alone.

    Returns:
        `[B, H, N, C]`.
    """
    if kernel == "cudnn":
        return _cudnn(query, key, value, valid)
    if kernel == "flash":
        return _flash(query, key, value, valid)
    if head_groups == 1:
        return mix(weights(query, key, valid), value, dropout, rng)

    if rng is None or dropout == 0.0:
        return _in_groups(query, key, value, valid, head_groups)

    def group(parts: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v, index = parts
        return mix(weights(q, k, valid), v, dropout, jax.random.fold_in(rng, index))

    parts = [_cut(x, head_groups) for x in (query, key, value)]
    return _join(jax.lax.map(jax.checkpoint(group), (*parts, jnp.arange(head_groups))))


def weights(query: jax.Array, key: jax.Array, valid: jax.Array) -> jax.Array:
    """Attention weights `[B, H, N, N] float32` of `[B, H, N, C]` queries (rows) and keys."""
    return jax.nn.softmax(_logits(query, key, valid), axis=-1)


def _logits(query: jax.Array, key: jax.Array, valid: jax.Array) -> jax.Array:
    scaled = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("bhqd,bhkd->bhqk", scaled, key, preferred_element_type=jnp.float32)
    return jnp.where(valid[:, None, None, :], logits, -1e7)


def mix(weights: jax.Array, value: jax.Array, dropout: float = 0.0, rng: jax.Array | None = None) -> jax.Array:
    """Values `[B, H, N, C]` mixed by weights `[B, H, N, N]`."""
    if rng is not None and dropout > 0.0:
        keep = jax.random.bernoulli(rng, 1.0 - dropout, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout), 0.0)
    return jnp.einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value)


def _cut(x: jax.Array, groups: int) -> jax.Array:
    """`[B, H, ...]` to `[groups, B, H / groups, ...]`: every groups-th head."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, groups, *x.shape[2:]), 2, 0)


def _join(x: jax.Array) -> jax.Array:
    """Undoes `_cut`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _in_groups(query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array, groups: int) -> jax.Array:
    return _in_groups_forward(query, key, value, valid, groups)[0]


def _in_groups_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array, groups: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Keeps no weights, but of each row the logarithm of its sum, from which one pass makes them anew."""

    def group(parts: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, k, v = parts
        logits = _logits(q, k, valid)
        top = jnp.max(logits, axis=-1)
        exponentials = jnp.exp(logits - top[..., None])
        total = jnp.sum(exponentials, axis=-1)
        return mix(exponentials / total[..., None], v), top + jnp.log(total)

    parts = jax.lax.map(group, tuple(_cut(x, groups) for x in (query, key, value)))
    mixed, log_total = (checkpoint_name(_join(x), RESULT) for x in parts)
    return mixed, (query, key, value, valid, mixed, log_total)


def _in_groups_backward(groups: int, saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[Any, ...]:
    query, key, value, valid, mixed, log_total = saved
    # The softmax's backward pass needs sum_k p dp of each row, which is the result times its gradient.
    inner = jnp.sum(mixed.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)

    def group(parts: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v, log_sum, dot, g = parts
        p = jnp.exp(_logits(q, k, valid) - log_sum[..., None])
        dv = jnp.einsum("bhqk,bhqd->bhkd", p.astype(g.dtype), g)
        dp = jnp.einsum("bhqd,bhkd->bhqk", g, v, preferred_element_type=jnp.float32)
        ds = (p * (dp - dot[..., None])).astype(q.dtype)
        scale = q.shape[-1] ** -0.5
        return jnp.einsum("bhqk,bhkd->bhqd", ds, k) * scale, jnp.einsum("bhqk,bhqd->bhkd", ds, q * scale), dv

    parts = jax.lax.map(group, tuple(_cut(x, groups) for x in (query, key, value, log_total, inner, gradient)))
    return (*map(_join, parts), np.zeros(valid.shape, jax.dtypes.float0))


_in_groups.defvjp(_in_groups_forward, _in_groups_backward)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array) -> jax.Array:
    tokens = query.shape[2]
    more = tokens % 2  # its backward pass takes no odd length together with a mask
    q, k, v = (jnp.swapaxes(jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))), 1, 2) for x in (query, key, value))
    is_key = jnp.pad(valid, ((0, 0), (0, more)))[:, None, None, :]
    mask = jnp.broadcast_to(is_key, (*is_key.shape[:2], tokens + more, tokens + more))
    mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return jnp.swapaxes(mixed, 1, 2)[:, :, :tokens]


def _flash(query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    tokens = query.shape[2]
    more = -tokens % _FLASH_BLOCK
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (query, key, value))
    # Real tokens attend within segment 1, padding (whose outputs nobody reads) within 0.
    segment = jnp.pad(valid, ((0, 0), (0, more))).astype(jnp.int32)

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array) -> jax.Array:
        ids = flash.SegmentIds(segment, segment)
        return flash.flash_attention(q, k, v, segment_ids=ids, sm_scale=query.shape[-1] ** -0.5)

    heads = ("batch", "heads", None, None)
    mixed = on_each_device(kernel, [heads, heads, heads, ("batch", None)], heads)(q, k, v, segment)
    return mixed[:, :, :tokens]
