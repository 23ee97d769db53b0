"""Durations in steps, examples or epochs, and ranges of steps."""

from __future__ import annotations

import math
import re

from m3ae_jax.errors import UserError, one_of

DURATION_UNITS = ("steps", "examples", "epochs")


def parse_duration(name: str, text: str) -> tuple[float, str]:
    """Splits "100 epochs" into (100.0, "epochs").

    Raises:
        UserError: not a positive number and one of steps, examples, epochs.
    """
    match = re.fullmatch(r"\s*([\d_.]+(?:e\d+)?)\s*([a-z]*)\s*", str(text))
    forms = 'a duration is "N steps", "N examples" or "N epochs"'
    try:
        amount = float(match[1]) if match else math.nan
    except ValueError:
        amount = math.nan
    if not match or not math.isfinite(amount):
        raise UserError(f"{name}={text!r}: {forms}")
    if not match[2]:
        raise UserError(f'{name}={text!r}: {forms}; did you mean "{match[1]} steps"?')
    unit = match[2] if match[2].endswith("s") else match[2] + "s"
    if unit not in DURATION_UNITS:
        raise UserError(f"{one_of(name + ' unit', match[2], DURATION_UNITS)}: {forms}")
    return amount, unit


def steps(name: str, text: str, batch_size: int, examples: int) -> int:
    """A duration in steps.

    Args:
        name: the field, for the message.
        text: the duration.
        batch_size: examples a step.
        examples: examples in the training source (an epoch).
    """
    amount, unit = parse_duration(name, text)
    per_step = {"steps": 1.0, "examples": batch_size, "epochs": batch_size / examples}[unit]
    return round(amount / per_step)


def parse_profile(text: str) -> tuple[int, int] | None:
    """First and last step of the field `profile`, ``"A-B"``; None if it is empty.

    Raises:
        UserError: not of this form.
    """
    match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", text)
    if not text:
        return None
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f'profile={text!r}: "A-B", the first and the last step, from 1 on')
    return int(match[1]), int(match[2])
