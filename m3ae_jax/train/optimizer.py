"""AdamW with decoupled decay by name, warmup and cosine."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from m3ae_jax.config.durations import steps
from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.errors import UserError, one_of


class OptimizerFields(FieldGroup):
    """AdamW and its learning rate."""

    learning_rate: float = setting(1.5e-4, low=0.0, aliases=("lr", "base_lr", "blr"))
    """For 256 examples: the peak is this times batch_size / 256."""
    final_learning_rate: float = setting(0.0, low=0.0, aliases=("min_lr", "end_lr"))
    """Where the cosine ends, scaled likewise."""
    warmup: str = setting("5 epochs", duration=True, low=0, aliases=("warmup_steps", "warmup_epochs"))
    """How long the rate rises from 0."""
    b1: float = setting(0.9, low=0.0, high=0.999999, aliases=("beta1",))
    """Decay of Adam's first moment."""
    b2: float = setting(0.95, low=0.0, high=0.999999, aliases=("beta2",))
    """Decay of Adam's second moment."""
    weight_decay: float = setting(0.05, low=0.0, aliases=("wd",))
    """Decay of the weights, times the learning rate."""
    no_decay: tuple[str, ...] = setting(("bias", "scale", "embedding", "cls_token"))
    """Parameters whose name ends so are not decayed."""
    rates: tuple[str, ...] = setting(())
    """Factors of the learning rate, "PATH=FACTOR": image/transformer=0.1 is a slower tower, text=0 a frozen one; of
    several paths that hold a parameter the longest counts."""
    clip_norm: float = setting(0.0, low=0.0, aliases=("grad_clip", "clip", "clip_grad"))
    """Greatest norm of the whole gradient; 0: any."""
    first_moment_dtype: str = setting("float32", choices=("float32", "bfloat16"), aliases=("mu_dtype",))
    """bfloat16 takes two bytes a parameter less."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Refuses rates that are none."""
        parsed_rates(tuple(config.optimizer.rates))


def parsed_rates(rates: tuple[str, ...]) -> dict[str, float]:
    """``optimizer.rates`` by path.

    Raises:
        UserError: one is not PATH=FACTOR, or its factor no number from 0 on.
    """
    parsed: dict[str, float] = {}
    for rate in rates:
        path, _, factor = rate.partition("=")
        path = path.strip("/ ")
        if path in parsed:
            raise UserError(f"optimizer.rates: {path!r} is there twice")
        try:
            parsed[path] = value = float(factor)
        except ValueError:
            value = math.nan
        if not path or not 0 <= value < math.inf:
            raise UserError(f"optimizer.rates: {rate!r} is not PATH=FACTOR with a factor from 0 on, as image=0.1")
    return parsed


def rate_factors(params: Any, rates: tuple[str, ...]) -> Any:
    """The factor of each parameter's learning rate, a pytree of float like `params`.

    Raises:
        UserError: no parameter is at a path; it names the nearest.
    """
    parsed, known = parsed_rates(rates), set[str]()

    def factor(path: tuple[Any, ...], _: Any) -> float:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        parts = name.split("/")
        above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        known.update(above)
        return next((parsed[prefix] for prefix in reversed(above) if prefix in parsed), 1.0)

    factors = jax.tree_util.tree_map_with_path(factor, params)
    for path in parsed:
        if path not in known:
            depth = path.count("/")
            raise UserError(one_of("optimizer.rates", path, (name for name in known if name.count("/") == depth)))
    return factors


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


def optimizer(config: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Clip (by `clip_norm`), Adam's moments, decay of the weights, learning rate.

    Its update takes ``fine``, a scalar bool: where it is False, the optimizer's state stays as it was. None: True.
    """
    o = config.optimizer
    clip = [optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm > 0 else []
    chain = optax.chain(
        *clip,
        scale_by_adam(o.b1, o.b2, 1e-8, o.first_moment_dtype),
        optax.add_decayed_weights(o.weight_decay, lambda params: decay_mask(params, tuple(o.no_decay))),
        optax.scale_by_learning_rate(learning_rate),
        *([_scale_by_rates(tuple(o.rates))] if o.rates else []),
    )

    def update(updates: Any, state: Any, params: Any = None, *, fine: jax.Array | None = None) -> tuple[Any, Any]:
        updates, new = chain.update(updates, state, params, fine=fine)
        # The counts; the moments are dealt with already.
        return updates, jax.tree.map(lambda n, old: _where(fine, n, old) if n.ndim == 0 else n, new, state)

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _scale_by_rates(rates: tuple[str, ...]) -> optax.GradientTransformation:
    def scale(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda x, factor: x * factor, updates, rate_factors(params, rates))

    return optax.stateless(scale)


def scale_by_adam(b1: float, b2: float, eps: float, first_moment_dtype: Any) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, whose moments stay as they were where ``fine`` is False.

    The update is made of the moments that are stored. When they were chosen after it, XLA's CPU back end computed them
    for themselves and once more for the parameters, of copies of the old ones (docs/performance.md).
    """
    of = optax.scale_by_adam(b1, b2, eps=eps, mu_dtype=first_moment_dtype)

    def update(
        updates: Any, state: optax.ScaleByAdamState, params: Any = None, *, fine: jax.Array | None = None, **_: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        first = optax.tree.update_moment(updates, state.mu, b1, 1)
        second = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        first = jax.tree.map(lambda new, old: _where(fine, new, old), first, state.mu)
        second = jax.tree.map(lambda new, old: _where(fine, new, old), second, state.nu)
        count = optax.safe_increment(state.count)
        unbiased = optax.tree.bias_correction(first, b1, count), optax.tree.bias_correction(second, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), *unbiased)
        stored = jax.tree.map(lambda m, old: m.astype(old.dtype), first, state.mu)
        return updates, optax.ScaleByAdamState(count, stored, second)

    return optax.GradientTransformationExtraArgs(of.init, update)


def _where(fine: jax.Array | None, new: jax.Array, old: jax.Array) -> jax.Array:
    return new if fine is None else jnp.where(fine, new, old)
