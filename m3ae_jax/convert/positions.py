"""Their table of position embeddings against ours, which is computed.

Legend: ``L`` patches, ``D`` width.
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np

from m3ae_jax.errors import UserError
from m3ae_jax.models.embeddings import sincos_2d

_TOLERANCE = 1e-4  # of a table's numbers, which lie between -1 and 1


@dataclasses.dataclass(frozen=True)
class Table:
    """What a table of theirs is in our terms.

    Attributes:
        side: patches along a side of the picture.
        cls: `[D]`, added to the CLS token; zeros in MAE.
        offset: `[D]`, added to every patch's fixed sin-cos embedding: a type embedding. Zeros in MAE.
        learned: `[L, D]` if it is not the fixed table plus an offset; None if it is.
    """

    side: int
    cls: np.ndarray
    offset: np.ndarray
    learned: np.ndarray | None


def precision(table: np.ndarray) -> float:
    """The spacing of numbers near 1 in a table of half precision; 0 of one in float32 or finer."""
    return float(ml_dtypes.finfo(table.dtype).eps) if table.dtype.itemsize < 4 else 0.0


def read(name: str, table: np.ndarray) -> Table:
    """Takes a table `[1, 1 + L, D]` apart; one without the row for CLS, `[1, L, D]`, too.

    Raises:
        UserError: the patches are no square.
    """
    rows = np.asarray(table, np.float32).reshape(-1, table.shape[-1])
    width = rows.shape[1]
    side = math.isqrt(len(rows))
    has_cls = side * side != len(rows)
    if has_cls:
        side = math.isqrt(len(rows) - 1)
    if side * side != len(rows) - has_cls:
        raise UserError(f"{name} {list(table.shape)} is not of a square of patches")
    cls, patches = (rows[0], rows[1:]) if has_cls else (np.zeros(width, np.float32), rows)
    rest = patches - sincos_2d(width, (side, side))
    offset: np.ndarray = np.asarray(np.mean(rest, axis=0, dtype=np.float64), np.float32)
    learned, rounding = None, precision(table)
    if np.abs(rest - offset).max() > max(_TOLERANCE, rounding):
        learned, offset = patches, np.zeros_like(offset)
    elif np.abs(offset).max() < max(1e-6, rounding):
        offset = np.zeros_like(offset)  # rounding
    return Table(side, cls, offset, learned)


def write(width: int, side: int, offset: np.ndarray | None, learned: np.ndarray | None) -> np.ndarray:
    """The inverse of `read`: `[1, 1 + L, D] float32`, the row for CLS zeros."""
    patches = sincos_2d(width, (side, side)) if learned is None else learned
    patches = patches if offset is None else patches + offset.reshape(-1)
    return np.concatenate([np.zeros((1, width), np.float32), patches])[None].astype(np.float32)
