"""AdamW with decoupled decay by name, warmup and cosine."""

from __future__ import annotations

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from m3ae_jax.config import steps


def schedule(config: ConfigDict, total_steps: int, examples: int) -> optax.Schedule:
    """Linear warmup from 0, then cosine; the peak is ``learning_rate * batch_size / 256``.

    Args:
        config: the resolved config.
        total_steps: steps of the whole run.
        examples: examples in the training source, for a warmup in epochs.
    """
    o = config.optimizer
    scale = config.batch_size / 256
    warmup = min(steps("optimizer.warmup", o.warmup, config.batch_size, examples), total_steps)
    return warmup_cosine(o.learning_rate * scale, o.final_learning_rate * scale, warmup, total_steps)


def warmup_cosine(peak: float, final: float, warmup: int, total_steps: int) -> optax.Schedule:
    """Linear from 0 to `peak` in `warmup` steps, then a cosine to `final` at the last."""
    if total_steps <= warmup:
        return optax.linear_schedule(0.0, peak, max(warmup, 1))
    if not warmup:
        return optax.cosine_decay_schedule(peak, total_steps, alpha=final / peak if peak else 0.0)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total_steps, final)


def decay_mask(params: Any, no_decay: tuple[str, ...]) -> Any:
    """Which parameters are decayed: a pytree of bool like `params`.

    By name, as stacked layers make a LayerNorm scale two-dimensional: a parameter is left out if its path ends
    in one of `no_decay` (``bias``, ``scale``, ...).
    """

    def decayed(path: tuple[Any, ...], _: Any) -> bool:
        return not jax.tree_util.keystr(path, simple=True, separator="/").endswith(no_decay)

    return jax.tree_util.tree_map_with_path(decayed, params)


def optimizer(config: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Clip (if asked for), Adam's moments, decay of the weights, learning rate."""
    o = config.optimizer
    clip = [optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm > 0 else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(o.b1, o.b2, eps=1e-8, mu_dtype=o.first_moment_dtype),
        optax.add_decayed_weights(o.weight_decay, lambda params: decay_mask(params, tuple(o.no_decay))),
        optax.scale_by_learning_rate(learning_rate),
    )
