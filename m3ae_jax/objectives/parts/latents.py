"""Losses on latent targets, and figures that tell when such targets collapse.

Legend: ``B`` examples, ``K`` slots, ``D`` channels, ``M`` tokens, ``C`` clusters.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3ae_jax.models.transformer import ACTIVATIONS, TransformerOptions, dense
from m3ae_jax.objectives.parts.contrast import unit

NORMALIZATIONS = ("layer_norm", "l2", "none")


class Projector(nn.Module):
    """An MLP on the student's side alone: of each token a hidden layer, then the outputs, float32.

    Attributes:
        options: of the stack before it, for dtype, activation and the ratio of the hidden layer.
        outputs: its outputs.
    """

    options: TransformerOptions
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., D]` to `[..., outputs] float32`."""
        o = self.options
        hidden = dense(int(x.shape[-1] * o.mlp_ratio), ("embed", "mlp"), o.dtype, "hidden")(x)
        return dense(self.outputs, ("mlp", "embed"), o.dtype, "output")(ACTIVATIONS[o.activation](hidden)).astype(
            jnp.float32
        )


def normalized(x: jax.Array, how: str) -> jax.Array:
    """Targets `[..., D]` in float32: ``layer_norm`` without scale and bias, ``l2`` or ``none``."""
    x = x.astype(jnp.float32)
    if how == "layer_norm":
        mean = jnp.mean(x, axis=-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(jnp.var(x, axis=-1, keepdims=True) + 1e-6)
    return unit(x) if how == "l2" else x


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over the channels of the squared error, `[B, K]`; no gradient goes to the target."""
    return jnp.mean(jnp.square(prediction - jax.lax.stop_gradient(target)), axis=-1)


def absolute_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over the channels of the absolute error, `[B, K]`; no gradient goes to the target."""
    return jnp.mean(jnp.abs(prediction - jax.lax.stop_gradient(target)), axis=-1)


def sinkhorn(logits: jax.Array, valid: jax.Array, rounds: int = 3) -> jax.Array:
    """Assignments of tokens to clusters that use all clusters alike (arXiv 2006.09882, section 3.1).

    Args:
        logits: `[M, C] float32`, over the temperature.
        valid: `[M] bool`.
        rounds: of normalising the clusters, then the tokens.

    Returns:
        `[M, C] float32`; rows of valid tokens sum to 1, others are 0.
    """
    log_p = jnp.where(valid[:, None], jax.nn.log_softmax(logits, axis=1), -jnp.inf)
    for _ in range(rounds):
        of_cluster = jax.nn.logsumexp(log_p, axis=0, keepdims=True)
        log_p = jnp.where(jnp.isfinite(of_cluster), log_p - of_cluster, -jnp.inf)
        of_token = jax.nn.logsumexp(log_p, axis=1, keepdims=True)
        log_p = jnp.where(valid[:, None], log_p - jnp.where(jnp.isfinite(of_token), of_token, 0.0), -jnp.inf)
    return jnp.exp(log_p)


def collapse_monitors(x: jax.Array, valid: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Figures of latent targets: when they collapse to a point or to few directions the loss falls all the same.

    Args:
        x: `[B, K, D]`, targets.
        valid: `[B, K] bool`.

    Returns:
        As terms (sum, weight): ``deviation``, the mean over channels of the standard deviation over tokens;
        ``rank``, the participation ratio (tr C)^2 / tr(C^2) of their covariance C, between 1 and D;
        ``cosine``, the mean cosine of two different tokens.
    """
    x, weight = x.reshape(-1, x.shape[-1]).astype(jnp.float32), valid.reshape(-1, 1).astype(jnp.float32)
    x = jax.lax.stop_gradient(x)
    count = jnp.sum(weight)
    centred = weight * (x - jnp.sum(weight * x, axis=0) / jnp.maximum(count, 1.0))
    covariance = centred.T @ centred / jnp.maximum(count, 1.0)
    trace, square = jnp.trace(covariance), jnp.sum(jnp.square(covariance))
    total = jnp.sum(jnp.square(jnp.sum(weight * unit(x), axis=0)))
    enough = (count > 1.0).astype(jnp.float32)
    figures = {
        "deviation": jnp.mean(jnp.sqrt(jnp.diagonal(covariance))),
        "rank": jnp.square(trace) / jnp.maximum(square, 1e-30),
        "cosine": (total - count) / jnp.maximum(count * (count - 1.0), 1.0),
    }
    return {name: (figure * enough, enough) for name, figure in figures.items()}
