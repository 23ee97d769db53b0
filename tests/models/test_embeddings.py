"""The position tables: their formula, their layout, and grids that are not square."""

import math

import numpy as np
import pytest

from m3ae_jax.models.embeddings import sincos_1d, sincos_2d

GRIDS = [(4, 4), (2, 6), (5, 1), (16, 16)]


def test_1d_is_sine_then_cosine() -> None:
    table = sincos_1d(8, np.arange(5))
    assert table.shape == (5, 8)
    assert table.dtype == np.float32
    for position in range(5):
        for i in range(4):
            angle = position / 10000 ** (i / 4)
            assert table[position, i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 4 + i] == pytest.approx(math.cos(angle), abs=1e-6)


def test_1d_takes_any_positions() -> None:
    assert np.array_equal(sincos_1d(12, np.array([3, 0, 3])), sincos_1d(12, np.arange(4))[[3, 0, 3]])
    assert np.isfinite(sincos_1d(12, np.array([0.5, 1e4]))).all()


def test_1d_dot_products_depend_on_the_distance_alone() -> None:
    table = sincos_1d(32, np.arange(20)).astype(np.float64)
    products = table @ table.T
    for distance in range(20):
        assert np.ptp(np.diagonal(products, distance)) < 1e-4
    assert np.allclose(np.diagonal(products), 16, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_2d_is_row_major_with_x_first(grid: tuple[int, int]) -> None:
    rows, columns = grid
    table = sincos_2d(16, grid)
    assert table.shape == (rows * columns, 16)
    assert table.dtype == np.float32
    cells = table.reshape(rows, columns, 16)
    assert np.array_equal(cells[..., :8], np.broadcast_to(sincos_1d(8, np.arange(columns)), (rows, columns, 8)))
    assert np.array_equal(cells[..., 8:], np.broadcast_to(sincos_1d(8, np.arange(rows))[:, None], (rows, columns, 8)))


@pytest.mark.parametrize("grid", GRIDS)
def test_2d_tells_all_cells_apart(grid: tuple[int, int]) -> None:
    table = sincos_2d(64, grid)
    distance = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert (distance[~np.eye(len(table), dtype=bool)] > 0.1).all()
