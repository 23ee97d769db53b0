"""Fixed sin-cos position tables (arXiv 2205.14204, section 1.2 of the method; layout of the reference)."""

from __future__ import annotations

import numpy as np


def sincos_1d(width: int, positions: np.ndarray) -> np.ndarray:
    """Sine then cosine features, ``omega_i = 10000^(-i / (width/2))``.

    Args:
        width: even number of channels.
        positions: `[L]`, any number type.

    Returns:
        `[L, width] float32`.
    """
    omega = 10000.0 ** -(np.arange(width // 2, dtype=np.float64) / (width / 2))
    angle = np.asarray(positions, np.float64)[:, None] * omega[None, :]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def sincos_2d(width: int, grid: tuple[int, int]) -> np.ndarray:
    """Position table of a grid of patches: the first half of the channels encodes x, the second y.

    Args:
        width: number of channels, divisible by 4.
        grid: (rows, columns).

    Returns:
        `[rows * columns, width] float32`, row-major.
    """
    rows, columns = np.indices(grid)
    return np.concatenate([sincos_1d(width // 2, columns.ravel()), sincos_1d(width // 2, rows.ravel())], axis=1)
