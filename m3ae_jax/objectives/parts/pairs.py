"""What objectives that compare pictures with captions ask of the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from m3ae_jax.errors import UserError
from m3ae_jax.objectives.parts.contrast import check_range

BOTH = ("image", "text")


def check_both(objective: str, config: ConfigDict) -> None:
    """Refuses data without pictures or without captions.

    Raises:
        UserError: as said.
    """
    for name in BOTH:
        if name not in config.data.modalities:
            raise UserError(
                f"data.modalities={tuple(config.data.modalities)} lacks {name!r}: objective={objective!r} compares "
                "pictures with captions"
            )


def check_aligned(objective: str, config: ConfigDict, terms: Iterable[str]) -> None:
    """Refuses fields with which contrast, matching and hidden words cannot work; for `FieldGroup.check`.

    Args:
        objective: its name, which is that of its group of fields.
        config: the whole.
        terms: whose weights there are, ``TERM_weight``.

    Raises:
        UserError: as said.
    """
    check_both(objective, config)
    o = config[objective]
    low, high = check_range(f"{objective}.temperature_range", o.temperature_range)
    if not low <= o.temperature <= high:
        raise UserError(
            f"{objective}.temperature={o.temperature} is outside {objective}.temperature_range={(low, high)}"
        )
    if len(o.text_corruption) != 2 or sum(o.text_corruption) > 1:
        raise UserError(
            f"{objective}.text_corruption={tuple(o.text_corruption)} must be two shares whose sum is at most 1: of the "
            "mask embedding, of random words"
        )
    if o.queue and not o.contrast_weight:
        raise UserError(
            f"{objective}.queue={o.queue} is not used without contrast ({objective}.contrast_weight=0): set "
            f"{objective}.queue=0"
        )
    if o.queue % config.batch_size:
        raise UserError(f"{objective}.queue={o.queue} is not divisible by batch_size={config.batch_size}")
    if o.negative_rows and config.batch_size % o.negative_rows:
        raise UserError(
            f"batch_size={config.batch_size} is not divisible by {objective}.negative_rows={o.negative_rows}"
        )
    if o.match_weight and (o.negative_rows == 1 or config.batch_size == 1):
        raise UserError(
            f"{objective}: the matching needs two rows at least, set {objective}.negative_rows or batch_size to 2"
        )
    if not any(o[f"{term}_weight"] for term in terms):
        raise UserError(f"{objective}: all weights are 0, so there is no loss")


def paired(part: Mapping[str, Any]) -> jax.Array:
    """`[B] bool`: the examples that have a picture and a caption."""
    valid = part["example"]["valid"]
    for name in BOTH:
        sets = part["groups"][name].values()
        valid &= jnp.any(jnp.concatenate([tokens["valid"] for tokens in sets], axis=1), axis=1)
    return valid


def refuse_unpaired(objective: str, part: Mapping[str, Any]) -> None:
    """Refuses a part of a mixture that lacks a modality.

    Raises:
        UserError: as said.
    """
    if missing := [name for name in BOTH if name not in part["groups"]]:
        raise UserError(
            f"objective={objective!r}: a part of the data (data.train, data.mixture or data.val) has no {missing[0]}: "
            "it compares pictures with captions, and learns nothing from one of them alone"
        )
