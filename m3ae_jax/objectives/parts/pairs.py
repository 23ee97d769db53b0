"""What objectives that compare pictures with captions ask of the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from m3ae_jax.errors import UserError

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
