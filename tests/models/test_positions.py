"""Position tables at another number of tokens."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.checkpoint.manager import load_params
from m3ae_jax.data.tokens import Modality
from m3ae_jax.models import positions
from m3ae_jax.train.setup import prepare
from tests.test_inference import make_run

IMAGE = Modality("image", "picture", 16, features=192, grid=(4, 4))
TEXT = Modality("text", "text", 6, vocabulary=9)


def table(count: int, width: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)


def test_item_11_a_grid_is_resized() -> None:
    """Smooth in, smooth out, and the same as the conversion's, which is this function."""
    rows, columns = np.indices((8, 8)) / 8 + 1 / 16
    smooth = np.stack([rows, columns], axis=-1).reshape(64, 2).astype(np.float32)
    rows, columns = np.indices((4, 4)) / 4 + 1 / 8
    want = np.stack([rows, columns], axis=-1)
    got = positions.resize(smooth, (8, 8), (4, 4)).reshape(4, 4, 2)
    np.testing.assert_allclose(got[1:-1, 1:-1], want[1:-1, 1:-1], atol=0.02)
    assert positions.resize(smooth, (8, 8), (8, 8)) is smooth
    assert positions.resize(table(6), (2, 3), (4, 5)).shape == (20, 3)


def test_item_11_what_is_taken_of_tables_of_another_size() -> None:
    name = "encoder/image/position_embedding"
    found = positions.fitted(name, table(64), jnp.zeros((16, 3)), [TEXT, IMAGE])
    assert found is not None and found[1] == "resized (bicubic) from 8 x 8 to 4 x 4 patches"
    assert np.array_equal(found[0], positions.resize(table(64), (8, 8), (4, 4)))
    for count, how in (
        (9, "the first 6 of 9, the others are cut off"),
        (4, "the first 4 of 4, the other 2 stay fresh"),
    ):
        fresh = jnp.full((6, 3), 7.0)
        found = positions.fitted("encoder/text/position_embedding", table(count), fresh, [IMAGE, TEXT])
        assert found is not None and found[1] == how
        kept = min(count, 6)
        assert np.array_equal(found[0][:kept], table(count)[:kept]) and (found[0][kept:] == 7.0).all()
    for wrong, value in (
        ("encoder/image/embedding/kernel", table(64)),  # no table of positions
        ("encoder/depth/position_embedding", table(64)),  # of no modality here
        (name, table(60)),  # of no square
        (name, table(64, width=5)),
    ):
        assert positions.fitted(wrong, value, jnp.zeros((16, 3)), [IMAGE, TEXT]) is None


def test_item_11_fixed_positions_are_told_of_where_the_sizes_differ() -> None:
    stored: list[dict[str, Any]] = [
        {"name": "image", "tokens": 64, "grid": [8, 8]},
        {"name": "text", "tokens": 6, "grid": None},
    ]
    (line,) = positions.computed_anew(stored, [IMAGE, TEXT])
    assert line.startswith("image: 4 x 4 patches here, 8 x 8 patches there: fixed sin-cos") and "computed anew" in line
    stored[0] |= {"tokens": 16, "grid": [4, 4]}
    assert not positions.computed_anew(stored, [IMAGE, TEXT])


@pytest.mark.slow
def test_item_11_init_from_resizes_learned_positions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = make_run(tmp_path / "old", learned_positions=True)
    config = config_lib.load(str(old / "config.json"))
    config.batch_size, config.init_from, config.data.image_size, config.data.max_text_tokens = 8, str(old), 64, 12
    config.data.train.source = "scenes"
    logging.getLogger("m3ae_jax").propagate = True
    with caplog.at_level(logging.INFO, "m3ae_jax"):
        params = jax.device_get(prepare(config_lib.resolve(config)).fresh_state().params)
    stored = load_params(str(old))["encoder"]["image"]["position_embedding"]
    want = positions.resize(stored, (4, 4), (8, 8))
    np.testing.assert_allclose(params["encoder"]["image"]["position_embedding"], want, rtol=1e-6)
    said = [record.getMessage() for record in caplog.records]
    for line in (
        "taken at another size: encoder/image/position_embedding: resized (bicubic) from 4 x 4 to 8 x 8 patches",
        "image: 8 x 8 patches here, 4 x 4 patches there: fixed sin-cos positions",
        "text: 12 tokens here, 8 tokens there: fixed sin-cos positions",
    ):
        assert any(line in one for one in said), (line, said)
