"""Scaled dot-product attention in which padding is never a key, by XLA or by a backend's fused kernel.

Legend: ``B`` batch, ``H`` heads, ``N`` tokens, ``C`` channels of a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from m3ae_jax.models.placement import on_each_device

KERNELS = {
    # Which accelerator has it; None: all.
    "xla": None,
    "cudnn": "gpu",
    "flash": "tpu",
}
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

    def group(parts: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v, index = parts
        rng_of_group = None if rng is None else jax.random.fold_in(rng, index)
        return mix(weights(q, k, valid), v, dropout, rng_of_group)

    batch, heads, tokens, channels = query.shape
    shape = (batch, heads // head_groups, head_groups, tokens, channels)
    parts = [jnp.moveaxis(x.reshape(shape), 2, 0) for x in (query, key, value)]
    mixed = jax.lax.map(jax.checkpoint(group), (*parts, jnp.arange(head_groups)))
    return jnp.moveaxis(mixed, 0, 2).reshape(query.shape)


def weights(query: jax.Array, key: jax.Array, valid: jax.Array) -> jax.Array:
    """Attention weights `[B, H, N, N] float32` of `[B, H, N, C]` queries (rows) and keys."""
    scaled = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("bhqd,bhkd->bhqk", scaled, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(jnp.where(valid[:, None, None, :], logits, -1e7), axis=-1)


def mix(weights: jax.Array, value: jax.Array, dropout: float = 0.0, rng: jax.Array | None = None) -> jax.Array:
    """Values `[B, H, N, C]` mixed by weights `[B, H, N, N]`."""
    if rng is not None and dropout > 0.0:
        keep = jax.random.bernoulli(rng, 1.0 - dropout, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout), 0.0)
    return jnp.einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value)


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
