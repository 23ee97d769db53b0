"""RandAugment gives 8-bit RGB, is a function of (seed, draw), and its operations do what their numbers say."""

import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from m3ae_jax.config import default
from m3ae_jax.data.augment import COLOR_SAFE, OPERATIONS, RandAugment
from m3ae_jax.data.images import unpatchify
from m3ae_jax.data.masking import WHOLE
from m3ae_jax.data.order import Order, fold_seed
from m3ae_jax.data.pipeline import Batches, Feed, View, eval_view, generator, train_view
from m3ae_jax.data.sources.scenes import SceneOptions, ScenesSource
from m3ae_jax.data.tokens import Group, modality_table

FILL = (10, 20, 30)


def noise(size=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("down", [False, True])
def test_every_operation_gives_eight_bit_rgb(name, share, down):
    before = noise()
    result = OPERATIONS[name](Image.fromarray(before), share, down, FILL)
    assert result.mode == "RGB" and result.size == (24, 24)
    # A larger magnitude changes more: at none the picture stays, but for those that have no magnitude.
    if name in ("auto_contrast", "equalize", "invert"):
        return
    same = (np.asarray(result) == before).all()
    assert same == (share == 0.0 and name != "posterize"), name


def test_operations_against_numpy():
    before = noise()
    picture = Image.fromarray(before)

    def done(name, share, down=False):
        return np.asarray(OPERATIONS[name](picture, share, down, FILL))

    np.testing.assert_array_equal(done("invert", 0.9), 255 - before)
    np.testing.assert_array_equal(done("posterize", 0.5), before & 0b11000000)  # 4 - 2 bits are kept
    np.testing.assert_array_equal(done("posterize", 1.0), before & 0b10000000)  # one, rather than none
    np.testing.assert_array_equal(done("solarize", 0.5), np.where(before < 128, before, 255 - before))
    added = np.minimum(before.astype(int) + 99, 255)  # 110 * 0.9
    np.testing.assert_array_equal(done("solarize_add", 0.9), np.where(before < 128, added, before))
    np.testing.assert_allclose(done("brightness", 0.5, True), before * 0.55, atol=1)  # 1 - 0.9 / 2
    # 45 % of 20 pixels are 9: what stands at x comes from x + 9, and beyond the edge is the fill.
    square = noise(20)
    moved = np.asarray(OPERATIONS["translate_x"](Image.fromarray(square), 1.0, False, FILL))
    np.testing.assert_array_equal(moved[:, :11], square[:, 9:])
    assert (moved[:, 11:] == FILL).all()
    moved = np.asarray(OPERATIONS["translate_y"](Image.fromarray(square), 1.0, True, FILL))
    np.testing.assert_array_equal(moved[9:], square[:11])
    assert (moved[:9] == FILL).all()


def test_it_is_a_function_of_seed_and_draw_and_differs_between_draws():
    change, picture = RandAugment(9.0, FILL), noise()
    result = [change(picture, generator(3, draw)) for draw in range(200)]
    for draw in (0, 7, 199):
        np.testing.assert_array_equal(result[draw], change(picture, generator(3, draw)))
    assert all(x.dtype == np.uint8 and x.shape == picture.shape for x in result)
    untouched = np.mean([(x == picture).all() for x in result])
    # Two operations with probability 1/2 each: a quarter of the pictures stay (standard deviation 0.03).
    assert 0.15 < untouched < 0.35
    assert len({x.tobytes() for x in result}) > 100
    assert any((change(picture, generator(4, d)) != result[d]).any() for d in range(8))


def config() -> ConfigDict:
    c = default()
    c.data.image_size, c.data.patch_size = 24, 8
    c.data.scenes.image_size = 24
    return c


def pictures(change, rows=None, augment=True):
    source = ScenesSource("train", SceneOptions(image_size=24))
    view = View(Order(len(source), 5), 5, augment=augment, change=change)
    group = Group("image", (modality_table(config(), 0)["image"],), WHOLE)
    batches = Batches(config(), (group,), Feed((source,), (view,)), None, batch_size=8, rows=rows, stop_step=2)
    result = [batch["groups"]["image"]["visible"]["value"] for batch in batches]
    return unpatchify(np.concatenate(result), 8, (3, 3))


def test_the_pipeline_changes_pictures_after_crop_and_flip_by_their_draw():
    plain = pictures(None)
    change = RandAugment(9.0, FILL)
    by_hand = np.stack([change(x, generator(fold_seed(5, "change"), draw)) for draw, x in enumerate(plain)])
    np.testing.assert_array_equal(pictures(change), by_hand)
    assert (by_hand != plain).any()
    # Another process's rows are the same pictures.
    np.testing.assert_array_equal(pictures(change, rows=np.array([2, 3])), by_hand[[2, 3, 10, 11]])


def test_a_view_changes_nothing_by_default():
    assert {f.name: f.default for f in dataclasses.fields(View)}["change"] is None


@pytest.mark.parametrize("operations", ["color_safe", "all"])
def test_training_changes_pictures_where_it_is_asked_to_and_validation_never(operations):
    c = default()
    source = ScenesSource("train")
    assert train_view(c, source).change is None
    c.data.rand_augment, c.data.rand_augment_operations = 7.0, operations
    change = train_view(c, source).change
    assert change == RandAugment.of(c.data, 7.0, COLOR_SAFE if operations == "color_safe" else tuple(OPERATIONS))
    assert eval_view(c, source, 8).change is None


def test_colours_stay_under_the_operations_that_keep_them():
    """Of a picture of two colours no pixel gets a third hue, but between them and the fill."""
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[8:24, 8:24] = (222, 28, 36)
    change = RandAugment(10.0, (0, 0, 0), COLOR_SAFE)
    for draw in range(40):
        changed = change(picture, generator(1, draw)).astype(int)
        bright = changed[changed[..., 0] > 60]
        assert len(bright) and (bright[:, 0] > 2 * bright[:, 1]).all() and (bright[:, 0] > 2 * bright[:, 2]).all()
