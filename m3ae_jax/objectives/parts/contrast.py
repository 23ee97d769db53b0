"""Which of two lists of embeddings belong together: softmax and sigmoid losses, with any number of positives.

Legend: ``B`` queries, ``N`` keys, ``Q`` places of a queue, ``d`` width of the embeddings.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3ae_jax.errors import UserError
from m3ae_jax.models.transformer import Linear, gathered, named

_NEVER = -1e9  # logit of what is no key; finite, as (-inf) - (-inf) is NaN


def unit(x: jax.Array) -> jax.Array:
    """`[..., d] float32` of length 1; a zero vector stays one."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def clamped(x: jax.Array, low: float, high: float) -> jax.Array:
    """`x` within bounds; at a bound only the gradient that leads back passes, so that `x` never sticks there."""
    return jnp.clip(x, low, high)


def _clamped_forward(x: jax.Array, low: float, high: float) -> tuple[jax.Array, jax.Array]:
    return jnp.clip(x, low, high), x


def _clamped_backward(low: float, high: float, x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    # A step goes against the gradient.
    outwards = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))
    return (jnp.where(outwards, 0.0, gradient),)


clamped.defvjp(_clamped_forward, _clamped_backward)


def check_range(name: str, bounds: tuple[float, ...]) -> tuple[float, float]:
    """The two bounds, the lower one first.

    Raises:
        UserError: there are not two, or they are not in order.
    """
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise UserError(f"{name}={tuple(bounds)} must be two numbers, the lower one first")
    return bounds[0], bounds[1]


def projection(width: int, dtype: Any, name: str | None = None, *, bias: bool = False) -> nn.Dense:
    """From a tower to the space of the embeddings."""
    return Linear(
        width,
        use_bias=bias,
        dtype=dtype,
        kernel_init=named(nn.initializers.xavier_uniform(), "embed", None),
        promote_dtype=gathered("embed", None),
        name=name,
    )


def temperature_parameters(temperature: float, bias: float | None = None) -> dict[str, Any]:
    """Parameters of the contrast, scalars: ``scale``, log 1/temperature, and ``bias`` unless None.

    By their names they are not decayed.
    """
    scalars = {"scale": -math.log(temperature)} | ({} if bias is None else {"bias": bias})
    return {name: nn.LogicallyPartitioned(jnp.float32(value), ()) for name, value in scalars.items()}


def scale_of(parameters: Mapping[str, jax.Array], bounds: tuple[float, float]) -> jax.Array:
    """1/temperature, of a temperature within `bounds`."""
    return jnp.exp(clamped(parameters["scale"], -math.log(bounds[1]), -math.log(bounds[0])))


def positives(query: jax.Array, key: jax.Array) -> jax.Array:
    """`[B, N] bool`: which of the `[N] int32` ids are a query's, `[B] int32`; the id 0 is nobody's."""
    return (query[:, None] == key) & (query[:, None] != 0)


def similarities(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Cosines `[B, N] float32` of unit vectors `[B, d]` and `[N, d]`."""
    return jnp.einsum("bd,nd->bn", queries, keys, preferred_element_type=jnp.float32)


def softmax_loss(
    logits: jax.Array, positive: jax.Array, key_valid: jax.Array, soft: jax.Array | None = None, share: Any = 0.0
) -> jax.Array:
    """Cross-entropy of each query's softmax over the keys (InfoNCE, arXiv 1807.03748).

    The target is even over the positives (arXiv 2004.11362, L_out with the mean outside the logarithm).

    Args:
        logits: `[B, N]`, cosines over the temperature.
        positive: `[B, N] bool`; a query without a valid one has loss 0.
        key_valid: `[N] bool`; the others are neither positive nor negative.
        soft: `[B, N]`, a teacher's logits, whose softmax takes the place of a part of the target.
        share: how large a part, in [0, 1].

    Returns:
        `[B] float32`, nats.
    """
    positive = positive & key_valid
    count = jnp.sum(positive, axis=1, keepdims=True)
    target = positive / jnp.maximum(count, 1)
    if soft is not None:
        teacher = jax.nn.softmax(jnp.where(key_valid, soft, _NEVER), axis=1)
        target = jax.lax.stop_gradient(share * teacher + (1.0 - share) * target)
    log_probability = jax.nn.log_softmax(jnp.where(key_valid, logits, _NEVER), axis=1)
    loss = -jnp.sum(jnp.where(key_valid, target * log_probability, 0.0), axis=1)
    return jnp.where(count[:, 0] > 0, loss, 0.0)


def sigmoid_loss(logits: jax.Array, positive: jax.Array, key_valid: jax.Array) -> jax.Array:
    """Each pair for itself: -log sigmoid(+-logit), summed over a query's keys (SigLIP, arXiv 2303.15343, eq. 1).

    Args:
        logits: `[B, N]`, scaled cosines plus a bias.
        positive: `[B, N] bool`.
        key_valid: `[N] bool`; of the others no pair is made.

    Returns:
        `[B] float32`, nats.
    """
    sign = jnp.where(positive, 1.0, -1.0)
    return -jnp.sum(jnp.where(key_valid, jax.nn.log_sigmoid(sign * logits), 0.0), axis=1)


def right_first(logits: jax.Array, positive: jax.Array, key_valid: jax.Array) -> jax.Array:
    """`[B] float32`: 1 where a positive has the highest logit of the keys."""
    best = jnp.argmax(jnp.where(key_valid, logits, _NEVER), axis=1)
    return jnp.take_along_axis(positive, best[:, None], axis=1)[:, 0].astype(jnp.float32)


def in_chunks(embed: Callable[[Any, jax.Array], Any], rows: Any, chunks: int) -> Any:
    """`embed` of a batch, a part of the rows at a time, forward and backward (GradCache, arXiv 2101.06983).

    Only what `embed` returns exists for all rows; in the backward pass each part is embedded anew.

    Args:
        embed: of (rows, number of the part); it returns leaves `[b, ...]`.
        rows: pytree of `[B, ...]` leaves.
        chunks: divides B. Every chunks-th row goes into a part, so that each device cuts its own rows.
    """
    if chunks == 1:
        return embed(rows, jnp.int32(0))
    cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(len(x) // chunks, chunks, *x.shape[1:]), 1, 0), rows)
    embedded = jax.lax.map(jax.checkpoint(lambda item: embed(*item)), (cut, jnp.arange(chunks)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), embedded)


def empty_queue(rng: jax.Array, places: int, width: int, names: tuple[str, ...] = ("image", "text")) -> dict[str, Any]:
    """A queue of earlier embeddings: random unit vectors, whose id is nobody's (MoCo, arXiv 1911.05722).

    Returns:
        Of each name `[Q, d] float32`; ``id`` `[Q] int32`; ``valid`` `[Q] bool`, which places count, at first all;
        ``next``, the oldest place.
    """
    keys = jax.random.split(rng, len(names))
    features = {n: unit(jax.random.normal(key, (places, width))) for n, key in zip(names, keys, strict=True)}
    return {**features, "id": jnp.zeros(places, jnp.int32), "valid": jnp.ones(places, bool), "next": jnp.int32(0)}


def pushed(queue: Mapping[str, jax.Array], newest: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The queue with its oldest entries overwritten.

    Args:
        queue: of `empty_queue`.
        newest: leaves `[n, ...]` by the same names, without ``next``; n divides Q.

    Raises:
        ValueError: it does not.
    """
    places, count = len(queue["id"]), len(newest["id"])
    if places % count:
        raise ValueError(f"a queue of {places} is not divisible by the {count} rows of a push")
    start = queue["next"]
    filled = {name: jax.lax.dynamic_update_slice_in_dim(queue[name], x, start, axis=0) for name, x in newest.items()}
    return {**filled, "next": (start + count) % places}


def momentum_contrast(
    embeddings: Mapping[str, jax.Array],
    teacher: Mapping[str, jax.Array],
    queue: Mapping[str, jax.Array] | None,
    scale: jax.Array,
    ids: jax.Array,
    valid: jax.Array,
    share: Any = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Contrast of pairs with each other and with a queue of earlier ones (ALBEF, arXiv 2107.07651, section 3.2).

    Args:
        embeddings: of ``image`` and ``text``, `[B, d]` unit vectors.
        teacher: a teacher's of the same; with a queue they are the keys. None are needed without queue and `share`.
        queue: as it was before this batch is pushed; what is not filled yet are random vectors: negatives.
        scale: 1 / temperature.
        ids: `[B] int32` of the pictures; equal ones are no negatives.
        valid: `[B] bool`.
        share: of the teacher's softmax in the targets; 0, and no number of the program: none.

    Returns:
        The loss of both directions, `[B]` nats, and of each ``A_to_B_accuracy`` whether the right one came first.
    """
    keys, key_valid = dict(embeddings), valid
    of_teacher = dict(teacher)
    positive = positives(ids, ids) | jnp.eye(len(ids), dtype=bool)
    if queue is not None:
        keys = of_teacher = {name: jnp.concatenate([of_teacher[name], queue[name]]) for name in ("image", "text")}
        key_valid = jnp.concatenate([valid, queue["valid"]])
        positive = jnp.concatenate([positive, positives(ids, queue["id"])], axis=1)
    loss, figures = jnp.float32(0.0), {}
    for query, key in (("image", "text"), ("text", "image")):
        logits = scale * similarities(embeddings[query], keys[key])
        soft = None
        if not isinstance(share, float) or share:
            soft = jax.lax.stop_gradient(scale) * similarities(of_teacher[query][: len(ids)], of_teacher[key])
        loss += 0.5 * softmax_loss(logits, positive, key_valid, soft, share)
        figures[f"{query}_to_{key}_accuracy"] = right_first(logits, positive, key_valid)
    return loss, figures
