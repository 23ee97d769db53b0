"""Learned position tables at another number of tokens: what weights that are taken over need.

Fixed sin-cos tables are no parameters: for another grid or length they are computed anew.
Legend: ``L`` positions, ``D`` width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from m3ae_jax.data.tokens import Modality
from m3ae_jax.models.embeddings import POSITIONS

Grid = tuple[int, int]
"""Rows and columns."""


def resize(table: np.ndarray, old: Grid, new: Grid) -> np.ndarray:
    """A learned table `[L, D] float32` of one grid for another: bicubic, each channel for itself."""
    if old == new:
        return table
    channels = np.moveaxis(np.asarray(table, np.float32).reshape(*old, -1), -1, 0)
    resized = [Image.fromarray(c).resize(new[::-1], Image.Resampling.BICUBIC) for c in channels.copy()]
    return np.stack([np.asarray(c) for c in resized], axis=-1).reshape(new[0] * new[1], -1)


def fitted(name: str, table: np.ndarray, fresh: jax.Array, modalities: Iterable[Modality]) -> tuple[Any, str] | None:
    """A stored table of learned positions for the model that is here, and in words what was done.

    Those on a grid are resized. Of those in a row the first are taken: of a longer row the last are cut off, in a
    shorter one's place the others stay fresh, so that what is short is read as before.

    Args:
        name: the parameter's path.
        table: as stored, `[L, D]`.
        fresh: the parameter here.
        modalities: of the model.

    Returns:
        None of what is no such table, has another width, or lies on a grid that is no square.
    """
    *_, owner, last = ("", *name.split("/"))
    modality = next((m for m in modalities if owner == m.name or owner.startswith(f"{m.name}_")), None)
    if last != POSITIONS or modality is None or table.ndim != 2 or table.shape[1] != fresh.shape[1]:
        return None
    if modality.grid is None:
        kept = min(len(table), len(fresh))
        rest = "the others are cut off" if kept < len(table) else f"the other {len(fresh) - kept} stay fresh"
        return fresh.at[:kept].set(table[:kept].astype(fresh.dtype)), f"the first {kept} of {len(table)}, {rest}"
    side = math.isqrt(len(table))
    if side * side != len(table):
        return None
    how = f"resized (bicubic) from {side} x {side} to {modality.grid[0]} x {modality.grid[1]} patches"
    return resize(table, (side, side), modality.grid), how


def computed_anew(stored: Iterable[Mapping[str, Any]], modalities: Iterable[Modality]) -> list[str]:
    """What fixed positions do where a model has other numbers of tokens than its weights were trained with.

    Args:
        stored: table of modalities of a checkpoint's ``meta``.
        modalities: of the model.

    Returns:
        A line for each modality that differs.
    """
    before = {m["name"]: m for m in stored}
    return [
        f"{m.name}: {_size(m.tokens, m.grid)} here, {_size(old['tokens'], old['grid'])} there: fixed sin-cos positions "
        "are no parameters, they are computed anew"
        for m in modalities
        if (old := before.get(m.name)) and (old["tokens"], old["grid"] and tuple(old["grid"])) != (m.tokens, m.grid)
    ]


def _size(tokens: int, grid: Grid | None) -> str:
    return f"{grid[0]} x {grid[1]} patches" if grid else f"{tokens} tokens"
