"""A tower for each modality, and the projection of its CLS token to where towers meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from m3ae_jax.models.encoder import Encoded, Encoder
from m3ae_jax.objectives.base import Load
from m3ae_jax.objectives.parts.pairs import BOTH
from m3ae_jax.objectives.parts.pixels import normalized_tokens


def loads_of(config: ConfigDict, group: str) -> tuple[Load, ...]:
    """What the fields ``image_from`` and ``text_from`` of a group say: encoders of m3ae for the towers."""
    fields = {name: f"{name}_from" for name in BOTH}
    return tuple(
        Load(config[group][field], into=f"params/{name}", source="encoder", field=f"{group}.{field}")
        for name, field in fields.items()
        if config[group][field]
    )


def init_towers(
    rng: jax.Array,
    towers: Mapping[str, Encoder],
    projections: Mapping[str, nn.Module | None],
    sets: Mapping[str, Any],
    config: ConfigDict,
) -> tuple[dict[str, Any], dict[str, Encoded]]:
    """Fresh parameters of each tower with its ``projection``, if any, and what the towers make of some tokens.

    Args:
        rng: of the draw.
        towers: by modality.
        projections: likewise; None: there is none.
        sets: a token set of each.
        config: says how pixels are normalised.
    """
    params: dict[str, Any] = {}
    encoded: dict[str, Encoded] = {}
    for number, name in enumerate(BOTH):
        tower, projected = jax.random.split(jax.random.fold_in(rng, number))
        tokens = {name: normalized_tokens(sets[name], config)}
        encoded[name], of_tower = towers[name].init_with_output(tower, tokens)
        params[name], projection = dict(of_tower["params"]), projections[name]
        if projection is not None:
            params[name]["projection"] = projection.init(projected, encoded[name].pooled["cls"])["params"]
    return params, encoded


def encode(
    params: Mapping[str, Any],
    towers: Mapping[str, Encoder],
    sets: Mapping[str, Any],
    config: ConfigDict,
    rng: jax.Array | None,
) -> dict[str, Encoded]:
    """What the tower of each token set makes of it.

    Args:
        params: of `init_towers`.
        towers: by modality.
        sets: token sets of some of them.
        config: says how pixels are normalised.
        rng: of dropout; None: none.
    """
    encoded: dict[str, Any] = {}
    for number, name in enumerate(BOTH):
        if name in sets:
            encoded[name] = towers[name].apply(
                {"params": {key: value for key, value in params[name].items() if key != "projection"}},
                {name: normalized_tokens(sets[name], config)},
                deterministic=rng is None,
                rngs={} if rng is None else {"dropout": jax.random.fold_in(rng, number)},
            )
    return encoded
