"""Pictures: every format that is promised, no broken one taken for whole, crops within bounds, patches in order."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3ae_jax.data import images

SIDE = (37, 53)


@pytest.fixture(scope="module")
def decode() -> Callable[[bytes], np.ndarray]:
    """`images.decode` in a graph, as the pipeline runs it."""
    graph = tf.function(images.decode, input_signature=[tf.TensorSpec([], tf.string)])
    return lambda encoded: graph(tf.constant(encoded)).numpy()


def smooth() -> np.ndarray:
    """`[37, 53, 3] uint8`, which JPEG and a colour table keep nearly as it is."""
    y, x = np.mgrid[: SIDE[0], : SIDE[1]]
    return np.stack([4 * x, 6 * y, 255 - 2 * (x + y)], axis=-1).astype(np.uint8)


def rough() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*SIDE, 3), np.uint8)


def encode(pixels: np.ndarray, form: str, mode: str = "", **options: Any) -> bytes:
    picture = Image.fromarray(pixels)
    file = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(file, form, **options)
    return file.getvalue()


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    return np.dstack([pixels, np.random.default_rng(1).integers(0, 256, SIDE, np.uint8)])


def animation(form: str) -> bytes:
    frames = [Image.fromarray(np.full((10, 12, 3), level, np.uint8)) for level in (10, 200)]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    return file.getvalue()


# -- decoding

WHOLE = {
    "png": encode(rough(), "PNG"),
    "png alpha": encode(with_alpha(rough()), "PNG"),
    "bmp": encode(rough(), "BMP"),
    "bmp alpha": encode(with_alpha(rough()), "BMP"),
    "webp lossless": encode(rough(), "WEBP", lossless=True),
    "webp lossless alpha": encode(with_alpha(rough()), "WEBP", lossless=True, exact=True),
    "webp extended alpha": encode(with_alpha(rough()), "WEBP", lossless=True, exact=True, icc_profile=b"profile"),
    "webp extended": encode(rough(), "WEBP", lossless=True, icc_profile=b"profile"),
}
NEARLY = {
    "jpeg": encode(smooth(), "JPEG", quality=95),
    "jpeg progressive": encode(smooth(), "JPEG", quality=95, progressive=True),
    "jpeg cmyk": encode(smooth(), "JPEG", mode="CMYK", quality=95),
    "webp lossy": encode(smooth(), "WEBP", quality=95),
    "webp lossy alpha": encode(np.dstack([smooth(), np.full(SIDE, 99, np.uint8)]), "WEBP", quality=95, exact=True),
    "gif": encode(smooth(), "GIF"),
    "png palette": encode(smooth(), "PNG", mode="P"),
}
GREY = smooth()[..., 0]
GREYS = {
    "png": encode(GREY, "PNG"),
    "png alpha": encode(GREY, "PNG", mode="LA"),
    "png 16 bit": encode(GREY.astype(np.uint16) * 257, "PNG"),
    "bmp": encode(GREY, "BMP"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_decode_lossless(name: str, decode: Callable[[bytes], np.ndarray]) -> None:
    image = decode(WHOLE[name])
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, rough())


@pytest.mark.parametrize("name", NEARLY)
def test_decode_lossy(name: str, decode: Callable[[bytes], np.ndarray]) -> None:
    image = decode(NEARLY[name])
    assert image.shape == (*SIDE, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - smooth()).mean() < 16


@pytest.mark.parametrize("name", GREYS)
def test_decode_grey(name: str, decode: Callable[[bytes], np.ndarray]) -> None:
    np.testing.assert_array_equal(decode(GREYS[name]), np.repeat(GREY[..., None], 3, axis=-1))


def test_decode_grey_jpeg_and_first_frame_of_a_gif(decode: Callable[[bytes], np.ndarray]) -> None:
    image = decode(encode(GREY, "JPEG", quality=95))
    assert np.abs(image.astype(int) - GREY[..., None]).max() < 8
    np.testing.assert_array_equal(decode(animation("GIF")), np.full((10, 12, 3), 10))


def test_decode_webp_of_every_size_in_bytes(decode: Callable[[bytes], np.ndarray]) -> None:
    """The size stands in the header, and is most often no UTF-8."""
    for side in range(8, 40, 3):
        pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
        np.testing.assert_array_equal(decode(encode(pixels, "WEBP", lossless=True)), pixels)


BROKEN = {
    "empty": b"",
    "html": b"<html><body>404 Not Found</body></html>",
    "noise": bytes(range(256)),
    "tiff": encode(rough(), "TIFF"),
    "jpeg header": WHOLE["png"][:8],
    "webp header": b"RIFF\x1a\x00\x00\x00WEBP",
    "webp animation": animation("WEBP"),
    **{f"{name} less {cut} bytes": NEARLY[name][:-cut] for name in ("jpeg", "jpeg progressive") for cut in (1, 2, 200)},
    **{f"{name} cut": WHOLE[name][:-300] for name in WHOLE},
    "gif cut": NEARLY["gif"][:-300],
    "webp lossy cut": NEARLY["webp lossy"][:-100],
}


@pytest.mark.parametrize("name", BROKEN)
def test_decode_refuses_what_is_not_whole(name: str, decode: Callable[[bytes], np.ndarray]) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(BROKEN[name])


# -- the reference folder of bad inputs

SHARED_SHAPES = {
    "00_good.jpg": (256, 197, 3),
    "06_1x1.jpg": (1, 1, 3),
    "08_gray16.png": (256, 197, 3),
    "10_cmyk.jpg": (256, 197, 3),
    "11_gray.jpg": (256, 197, 3),
    "12_animated.gif": (256, 197, 3),
    "18_exif_rotated.jpg": (100, 200, 3),
    "20_gray_alpha.png": (256, 197, 3),
    "24_extreme_aspect_2000x1.png": (1, 2000, 3),
    "30_all_white.jpg": (64, 64, 3),
}
SHARED_BROKEN = (
    "01_truncated_60pct.jpg",
    "03_zero_byte.jpg",
    "14_bomb_header_30000x30000.png",
    "17_html_error_page.jpg",
)


def shared_bytes(shared: Path, name: str) -> bytes:
    path = shared / "data" / "corrupt" / "images" / name
    if not path.exists():
        pytest.skip(f"{name} is not among the reference data")
    return path.read_bytes()


@pytest.mark.parametrize("name", SHARED_SHAPES)
def test_shared_pictures_decode_crop_and_resize(name: str, shared: Path, decode: Callable[[bytes], np.ndarray]) -> None:
    image = decode(shared_bytes(shared, name))
    assert image.shape == SHARED_SHAPES[name]
    for view in (images.center_crop(image, 32), images.random_resized_crop(image, 32, [1, 2], (0.2, 1.0))):
        assert view.shape == (32, 32, 3) and view.dtype == tf.uint8


@pytest.mark.parametrize("name", SHARED_BROKEN)
def test_shared_pictures_that_are_not_whole_raise(
    name: str, shared: Path, decode: Callable[[bytes], np.ndarray]
) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(shared_bytes(shared, name))


def test_shared_colours_are_kept(shared: Path, decode: Callable[[bytes], np.ndarray]) -> None:
    good = decode(shared_bytes(shared, "00_good.jpg")).mean((0, 1))
    np.testing.assert_allclose(decode(shared_bytes(shared, "10_cmyk.jpg")).mean((0, 1)), good, atol=3)
    np.testing.assert_allclose(decode(shared_bytes(shared, "12_animated.gif")).mean((0, 1)), good, atol=3)
    grey = good @ [0.299, 0.587, 0.114]
    for name in ("08_gray16.png", "11_gray.jpg", "20_gray_alpha.png"):
        np.testing.assert_allclose(decode(shared_bytes(shared, name)).mean((0, 1)), grey, atol=3)


# -- crops


def ramp(height: int, width: int) -> np.ndarray:
    """`[h, w, 3] uint8` whose pixels tell their column, row and 7; sides up to 256."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.full_like(x, 7)], axis=-1).astype(np.uint8)


def boxes(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], scale: tuple[float, float], draws: int = 1500
) -> np.ndarray:
    """`[draws, 4]` left, top, width, height of random crops, read from the pixels before they are resized."""
    monkeypatch.setattr(images, "resize", lambda image, size: image)
    picture = tf.constant(ramp(*shape))

    def box(seed: Any) -> Any:
        crop = images.random_resized_crop(picture, 8, tf.stack([seed, 3]), scale)
        first, last = tf.cast(crop[0, 0, :2], tf.int32), tf.cast(crop[-1, -1, :2], tf.int32)
        return tf.concat([first, last - first + 1], axis=0)

    data = tf.data.Dataset.range(draws).map(box).batch(draws)
    return data.get_single_element().numpy()


def test_random_crop_is_uniform_in_area_and_place_and_log_uniform_in_aspect(monkeypatch: pytest.MonkeyPatch) -> None:
    # At most half the area at 4:3: no box is cut to the picture, so nothing is bent.
    left, top, width, height = boxes(monkeypatch, (240, 240), (0.2, 0.5)).T
    for share in (
        (width * height / 240**2 - 0.2) / 0.3,
        (np.log(width / height) - np.log(3 / 4)) / (2 * np.log(4 / 3)),
        (left + 0.5) / (241 - width),
        (top + 0.5) / (241 - height),
    ):
        assert share.min() > -0.03 and share.max() < 1.03
        np.testing.assert_allclose(
            np.quantile(share, [0.1, 0.25, 0.5, 0.75, 0.9]), [0.1, 0.25, 0.5, 0.75, 0.9], atol=0.06
        )


@pytest.mark.parametrize("shape", [(240, 240), (90, 240), (240, 40), (1, 200), (2, 2)])
def test_random_crop_lies_within_the_picture(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    left, top, width, height = boxes(monkeypatch, shape, (0.2, 1.0), draws=300).T
    assert min(left.min(), top.min()) >= 0 and min(width.min(), height.min()) >= 1
    assert (left + width).max() <= shape[1] and (top + height).max() <= shape[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 2000), (2000, 1), (3, 500), (64, 64)])
def test_random_crop_gives_the_size_whatever_the_shape(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 90, np.uint8)
    for seed in range(4):
        crop = images.random_resized_crop(image, 24, [seed, 0], (0.2, 1.0))
        assert crop.dtype == tf.uint8
        np.testing.assert_array_equal(crop, np.full((24, 24, 3), 90))


def test_random_crop_follows_its_seed() -> None:
    crops = [
        images.random_resized_crop(ramp(90, 120), 16, seed, (0.2, 0.8)).numpy() for seed in ([1, 5], [1, 5], [1, 6])
    ]
    np.testing.assert_array_equal(crops[0], crops[1])
    assert (crops[0] != crops[2]).any()


def test_random_crop_of_everything_is_the_picture() -> None:
    image = rough()[:32, :32]
    np.testing.assert_array_equal(images.random_resized_crop(image, 32, [0, 0], (1.0, 1.0), (1.0, 1.0)), image)


@pytest.mark.parametrize("shape", [(20, 11), (11, 20), (11, 11)])
def test_center_crop_is_the_middle_square(shape: tuple[int, int]) -> None:
    top, left = (shape[0] - 11) // 2, (shape[1] - 11) // 2
    np.testing.assert_array_equal(images.center_crop(ramp(*shape), 11), ramp(*shape)[top : top + 11, left : left + 11])


def test_resize_neither_wraps_around_nor_moves_the_mean() -> None:
    edge = np.zeros((16, 16, 3), np.uint8)
    edge[:, 8:] = 255
    for size in (7, 40):
        result = images.resize(edge, size).numpy().astype(int)
        assert result[:, : size // 2 - 1].max() < 50 and result[:, size // 2 + 2 :].min() > 205
        assert abs(result.mean() - 127.5) < 2


def test_flip_mirrors_half_of_the_seeds() -> None:
    image = rough()
    flipped = 0
    for seed in range(200):
        result = images.random_flip(tf.constant(image), [seed, 1]).numpy()
        mirrored = bool((result == image[:, ::-1]).all())
        assert mirrored or (result == image).all()
        flipped += mirrored
    assert 70 < flipped < 130


# -- patches


def test_patch_layout() -> None:
    batch = np.random.default_rng(0).integers(0, 256, (2, 6, 9, 3), np.uint8)
    patches = images.patchify(batch, 3)
    assert patches.shape == (2, 2 * 3, 27) and patches.dtype == np.uint8
    for row, column, y, x, channel in np.ndindex(2, 3, 3, 3, 3):
        in_patch = patches[:, row * 3 + column, (y * 3 + x) * 3 + channel]
        np.testing.assert_array_equal(in_patch, batch[:, row * 3 + y, column * 3 + x, channel])


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    count=st.integers(1, 3),
)
def test_unpatchify_undoes_patchify(rows: int, columns: int, patch: int, channels: int, count: int) -> None:
    shape = (count, rows * patch, columns * patch, channels)
    batch = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    patches = images.patchify(batch, patch)
    np.testing.assert_array_equal(images.unpatchify(patches, patch, (rows, columns)), batch)
    in_graph = images.patchify(tf.constant(batch), patch)
    assert tf.is_tensor(in_graph)
    np.testing.assert_array_equal(in_graph, patches)
    np.testing.assert_array_equal(images.unpatchify(in_graph, patch, (rows, columns)), batch)
