"""Steps that would do harm: detected and skipped on the device, so that the host need not wait for a verdict.

A step is skipped if its loss or its gradient is not finite, or if its loss lies far above those of the steps before
(as Levanter and others do). All devices decide alike: they judge the same two numbers.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from m3ae_jax.config.fields import FieldGroup, setting

WINDOW = 128
"""Accepted steps whose losses are the recent distribution; before so many nothing is called a spike."""

FINE, NOT_FINITE, SPIKE = 0, 1, 2
VERDICTS = ("fine", "its loss or gradient was not finite", "its loss was far above the recent ones")

_LEAST_DEVIATION = 0.01  # of the mean: a run that hardly varies any more must not skip every ripple


class AnomalyFields(FieldGroup):
    """Steps that are skipped: they change nothing, but are counted."""

    spike: float = setting(10.0, low=0.0)
    """Standard deviations above the mean of the last 128 losses from which on a step is skipped; 0: never."""
    stop_after: int = setting(20, low=1, identifies=False)
    """Skipped steps in a row after which the run stops."""


@flax.struct.dataclass
class Guard:
    """What the verdict on a step needs to know of those before; part of the training state.

    Attributes:
        losses: of the last accepted steps, in a ring, `[WINDOW] float32`.
        accepted: steps so far, int32.
        skipped: steps so far, int32.
        in_a_row: steps skipped since the last accepted one, int32.
    """

    losses: jax.Array
    accepted: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array


def fresh() -> Guard:
    """Of a run that begins."""
    return Guard(jnp.zeros(WINDOW, jnp.float32), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def judge(guard: Guard, loss: jax.Array, gradient_norm: jax.Array, spike: float) -> jax.Array:
    """`FINE`, `NOT_FINITE` or `SPIKE`, a scalar int32.

    Args:
        guard: of the steps before.
        loss: the whole batch's, a scalar.
        gradient_norm: of all parameters, a scalar; not finite if one gradient is not.
        spike: standard deviations above the mean of the recent losses from which on a loss is one; 0: none is.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    mean = jnp.mean(guard.losses)
    deviation = jnp.maximum(jnp.std(guard.losses), _LEAST_DEVIATION * jnp.abs(mean))
    far = (guard.accepted >= WINDOW) & (loss > mean + spike * deviation) if spike else jnp.bool_(False)
    return jnp.where(finite, jnp.where(far, SPIKE, FINE), NOT_FINITE).astype(jnp.int32)


def after(guard: Guard, loss: jax.Array, verdict: jax.Array) -> Guard:
    """The guard after a step with this verdict."""
    fine = verdict == FINE
    here = jnp.arange(WINDOW) == guard.accepted % WINDOW
    return Guard(
        losses=jnp.where(fine & here, loss, guard.losses),
        accepted=guard.accepted + fine,
        skipped=guard.skipped + ~fine,
        in_a_row=jnp.where(fine, 0, guard.in_a_row + 1),
    )
