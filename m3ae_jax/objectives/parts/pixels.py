"""Pixels of patches: normalised for the model and back, by the data set's statistics or by each patch's own.

Legend: ``P`` numbers in a patch, of which the channel is the last axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict


def _channels(values: tuple[float, ...], size: int) -> jax.Array:
    """Per-channel constants for the `size` numbers of a patch."""
    return jnp.tile(jnp.asarray(values, jnp.float32), size // len(values))


def normalize_pixels(patches: jax.Array, config: ConfigDict) -> jax.Array:
    """`[..., P] uint8` to zero mean and unit variance by the data set's channel statistics (float32).

    Float input is taken as normalised already.
    """
    if jnp.issubdtype(patches.dtype, jnp.floating):
        return patches
    return normalize_unit(patches.astype(jnp.float32) / 255.0, config)


def normalized_tokens(tokens: Mapping[str, Any], config: ConfigDict) -> dict[str, Any]:
    """A token set as a model reads it: patches by `normalize_pixels`, ids as they are."""
    patches = tokens["value"].ndim == 3
    return {**tokens, "value": normalize_pixels(tokens["value"], config)} if patches else dict(tokens)


def normalize_unit(patches: jax.Array, config: ConfigDict) -> jax.Array:
    """As `normalize_pixels`, of `[..., P] float32` in [0, 1]."""
    size = patches.shape[-1]
    mean, std = _channels(config.data.image_mean, size), _channels(config.data.image_std, size)
    return (patches - mean) / std


def unit_pixels(patches: jax.Array, config: ConfigDict) -> jax.Array:
    """Inverse of `normalize_unit`."""
    size = patches.shape[-1]
    return patches * _channels(config.data.image_std, size) + _channels(config.data.image_mean, size)


def denormalize_pixels(patches: jax.Array, config: ConfigDict) -> jax.Array:
    """Inverse of `normalize_pixels`, to `[..., P] uint8`."""
    return jnp.round(jnp.clip(unit_pixels(patches, config), 0.0, 1.0) * 255.0).astype(jnp.uint8)


def psnr(painted: jax.Array, value: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of pictures in dB, `[B] float32`; both `[B, N, P]`, 8-bit numbers."""
    error = jnp.square(painted.astype(jnp.float32) - value.astype(jnp.float32))
    return 10.0 * jnp.log10(255.0**2 / jnp.maximum(jnp.mean(error, axis=(1, 2)), 1e-4))


def patch_statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of each patch, `[..., 1]`; unbiased, 1e-6 under the root as in MAE's code."""
    return jnp.mean(patches, -1, keepdims=True), jnp.sqrt(jnp.var(patches, -1, keepdims=True, ddof=1) + 1e-6)


def normalize_patches(patches: jax.Array) -> jax.Array:
    """Zero mean and unit variance within each patch, `[..., P] float32` (arXiv 2111.06377, section 3)."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std
