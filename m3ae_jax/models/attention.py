"""Scaled dot-product attention in which padding is never a key, by XLA or by a backend's fused kernel.

Legend: ``B`` batch, ``H`` heads, ``N`` queries, ``M`` keys, ``C`` channels of a head.
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
RESULT = "attention_result"  # what a remat policy may save
_FLASH_BLOCK = 128  # tokens; the kernel takes whole blocks


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    valid: jax.Array,
    *,
    causal: bool = False,
    kernel: str = "xla",
    head_groups: int = 1,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Mixes values by the softmax of scaled products (float32 inside).

    Args:
        query: `[B, H, N, C]`.
        key, value: `[B, H, M, C]`; in self-attention of the same tokens.
        valid: `[B, M] bool`, True where a key is real.
        causal: a query reads the keys up to its own place alone; N = M.
        kernel: one of `KERNELS`.
        head_groups: ``xla`` alone: how many groups of heads are worked on one after the other, so that the weights
            `[B, H, N, M]` exist for one group at a time, in the backward pass too. Divides H. A group takes every
            `head_groups`-th head, so that heads split over devices stay where they are.
        dropout: rate on the weights, with `rng`; ``xla`` alone.

    Returns:
        `[B, H, N, C]`.
    """
    if kernel == "cudnn":
        return _cudnn(query, key, value, valid, causal)
    if kernel == "flash":
        return _flash(query, key, value, valid, causal)
    if head_groups == 1:
        return mix(weights(query, key, valid, causal), value, dropout, rng)

    if rng is None or dropout == 0.0:
        return _in_groups(query, key, value, valid, head_groups, causal)

    def group(parts: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v, index = parts
        return mix(weights(q, k, valid, causal), v, dropout, jax.random.fold_in(rng, index))

    parts = [_cut(x, head_groups) for x in (query, key, value)]
    return _join(jax.lax.map(jax.checkpoint(group), (*parts, jnp.arange(head_groups))))


def weights(query: jax.Array, key: jax.Array, valid: jax.Array, causal: bool = False) -> jax.Array:
    """Attention weights `[B, H, N, M] float32` of `[B, H, N, C]` queries (rows) and keys."""
    return jax.nn.softmax(_logits(query, key, valid, causal), axis=-1)


def _logits(query: jax.Array, key: jax.Array, valid: jax.Array, causal: bool) -> jax.Array:
    scaled = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("bhqd,bhkd->bhqk", scaled, key, preferred_element_type=jnp.float32)
    seen = valid[:, None, None, :]
    if causal:
        seen = seen & np.tri(logits.shape[-1], dtype=bool)
    return jnp.where(seen, logits, -1e7)


def mix(weights: jax.Array, value: jax.Array, dropout: float = 0.0, rng: jax.Array | None = None) -> jax.Array:
    """Values `[B, H, M, C]` mixed by weights `[B, H, N, M]`."""
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _in_groups(
    query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array, groups: int, causal: bool
) -> jax.Array:
    return _in_groups_forward(query, key, value, valid, groups, causal)[0]


def _in_groups_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array, groups: int, causal: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Saves no weights, but of each row the logarithm of its sum, from which one pass makes them anew."""

    def group(parts: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, k, v = parts
        logits = _logits(q, k, valid, causal)
        top = jnp.max(logits, axis=-1)
        exponentials = jnp.exp(logits - top[..., None])
        total = jnp.sum(exponentials, axis=-1)
        return mix(exponentials / total[..., None], v), top + jnp.log(total)

    parts = jax.lax.map(group, tuple(_cut(x, groups) for x in (query, key, value)))
    mixed, log_total = (checkpoint_name(_join(x), RESULT) for x in parts)
    return mixed, (query, key, value, valid, mixed, log_total)


def _in_groups_backward(
    groups: int, causal: bool, saved: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[Any, ...]:
    query, key, value, valid, mixed, log_total = saved
    # The softmax's backward pass needs sum_k p dp of each row, which is the result times its gradient.
    inner = jnp.sum(mixed.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)

    def group(parts: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v, log_sum, dot, g = parts
        p = jnp.exp(_logits(q, k, valid, causal) - log_sum[..., None])
        dv = jnp.einsum("bhqk,bhqd->bhkd", p.astype(g.dtype), g)
        dp = jnp.einsum("bhqd,bhkd->bhqk", g, v, preferred_element_type=jnp.float32)
        ds = (p * (dp - dot[..., None])).astype(q.dtype)
        scale = q.shape[-1] ** -0.5
        return jnp.einsum("bhqk,bhkd->bhqd", ds, k) * scale, jnp.einsum("bhqk,bhqd->bhkd", ds, q * scale), dv

    parts = jax.lax.map(group, tuple(_cut(x, groups) for x in (query, key, value, log_total, inner, gradient)))
    return (*map(_join, parts), np.zeros(valid.shape, jax.dtypes.float0))


_in_groups.defvjp(_in_groups_forward, _in_groups_backward)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array, causal: bool) -> jax.Array:
    # Its backward pass takes no odd length together with a mask.
    q, k, v = (jnp.swapaxes(_padded(x, 2), 1, 2) for x in (query, key, value))
    is_key = jnp.pad(valid, ((0, 0), (0, k.shape[1] - valid.shape[1])))[:, None, None, :]
    mask = jnp.broadcast_to(is_key, (is_key.shape[0], 1, q.shape[1], k.shape[1]))
    mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="cudnn")
    return jnp.swapaxes(mixed, 1, 2)[:, :, : query.shape[2]]


def _padded(x: jax.Array, block: int) -> jax.Array:
    """`[B, H, N, C]` with whole blocks of tokens."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))


def _flash(query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array, causal: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    q, k, v = (_padded(x, _FLASH_BLOCK) for x in (query, key, value))
    # Real keys are segment 1, padding 0; all queries are of segment 1, for nobody reads the result of padding.
    keys = jnp.pad(valid, ((0, 0), (0, k.shape[2] - valid.shape[1]))).astype(jnp.int32)
    queries = jnp.ones((q.shape[0], q.shape[2]), jnp.int32)

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, queries: jax.Array, keys: jax.Array) -> jax.Array:
        ids = flash.SegmentIds(queries, keys)
        return flash.flash_attention(q, k, v, segment_ids=ids, causal=causal, sm_scale=query.shape[-1] ** -0.5)

    heads = ("batch", "heads", None, None)
    rows = ("batch", None)
    mixed = on_each_device(kernel, [heads, heads, heads, rows, rows], heads)(q, k, v, queries, keys)
    return mixed[:, :, : query.shape[2]]
