"""Pictures: every format that is promised, no broken one taken for whole, crops within bounds, patches in order."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from m3ae_jax.data import images
from m3ae_jax.data.images import Crop, Unusable, load
from m3ae_jax.data.order import RandomStream, fold_seed

SIDE = 40


def smooth() -> np.ndarray:
    """`[40, 40, 3] uint8`, which JPEG and a colour table keep nearly as it is."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.stack([5 * x, 6 * y, 255 - 3 * (x + y)], axis=-1).astype(np.uint8)


def rough() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def encode(pixels: np.ndarray, form: str, mode: str = "", **options: Any) -> bytes:
    picture = Image.fromarray(pixels)
    file = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(file, form, **options)
    return file.getvalue()


def opaque(pixels: np.ndarray) -> np.ndarray:
    return np.dstack([pixels, np.full((SIDE, SIDE), 255, np.uint8)])


def animation(form: str) -> bytes:
    frames = [Image.fromarray(np.full((10, 10, 3), level, np.uint8)) for level in (10, 200)]
    file, options = io.BytesIO(), {"lossless": True} if form == "WEBP" else {}
    frames[0].save(file, form, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


# -- decoding

WHOLE = {
    "png": encode(rough(), "PNG"),
    "png alpha": encode(opaque(rough()), "PNG"),
    "bmp": encode(rough(), "BMP"),
    "webp lossless": encode(rough(), "WEBP", lossless=True),
    "webp lossless alpha": encode(opaque(rough()), "WEBP", lossless=True, exact=True),
    "webp extended": encode(rough(), "WEBP", lossless=True, icc_profile=b"profile"),
}
NEARLY = {
    "jpeg": encode(smooth(), "JPEG", quality=95),
    "jpeg progressive": encode(smooth(), "JPEG", quality=95, progressive=True),
    "jpeg cmyk": encode(smooth(), "JPEG", mode="CMYK", quality=95),
    "webp lossy": encode(smooth(), "WEBP", quality=95),
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
def test_lossless_pictures_come_as_they_are(name: str) -> None:
    image = load(WHOLE[name], SIDE)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, rough())


@pytest.mark.parametrize("name", NEARLY)
def test_lossy_pictures_come_nearly_so(name: str) -> None:
    image = load(NEARLY[name], SIDE)
    assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - smooth()).mean() < 16


@pytest.mark.parametrize("name", GREYS)
def test_grey_pictures_are_grey(name: str) -> None:
    np.testing.assert_array_equal(load(GREYS[name], SIDE), np.repeat(GREY[..., None], 3, axis=-1))


def test_black_and_white_and_deep_colours() -> None:
    assert set(np.unique(load(encode(GREY, "PNG", mode="1"), SIDE))) == {0, 255}
    assert np.abs(load(encode(GREY, "JPEG", quality=95), SIDE).astype(int) - GREY[..., None]).max() < 8


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame_is_seen(form: str) -> None:
    np.testing.assert_array_equal(load(animation(form), 10), np.full((10, 10, 3), 10))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_what_is_transparent_shows_white_and_hides_its_colour(form: str) -> None:
    """The hidden colour shows neither where it lies nor, once resized, at the rim."""
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[:, :20] = (200, 0, 0, 255)
    pixels[:, 20:] = (0, 255, 0, 0)
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    encoded = encode(pixels, form, **options)
    np.testing.assert_array_equal(load(encoded, SIDE)[0, [0, -1]], [[200, 0, 0], [255, 255, 255]])
    small = load(encoded, 15).astype(int)
    assert (small[..., 0] >= 195).all()  # between red and white there is no green without red
    half = np.dstack([np.zeros((SIDE, SIDE, 3), np.uint8), np.full((SIDE, SIDE), 51, np.uint8)])
    assert np.abs(load(encode(half, form, **options), SIDE).astype(int) - 204).max() <= 1


def test_a_palette_with_a_transparent_colour_shows_white() -> None:
    picture = Image.new("P", (SIDE, SIDE), 1)
    picture.putpalette([9, 9, 9, 0, 0, 255])
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=1)
    np.testing.assert_array_equal(load(file.getvalue(), SIDE), np.full((SIDE, SIDE, 3), 255))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(form: str, turn: int) -> None:
    stored = Image.fromarray(smooth()).resize((90, 60))
    exif = Image.Exif()
    exif[0x0112] = turn
    file = io.BytesIO()
    stored.save(file, form, exif=exif, **({"lossless": True} if form == "WEBP" else {"quality": 95}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
    assert images.size_of(file.getvalue()) == upright.size
    for crop in (Crop(), Crop(np.random.default_rng(turn).random(5))):
        left, top, width, height = crop.box(*upright.size)
        box = (left, top, left + width, top + height)
        want = np.asarray(upright.resize((24, 24), Image.Resampling.BICUBIC, box=box))
        assert np.abs(load(file.getvalue(), 24, crop).astype(int) - want).max() <= 1


def test_a_deep_grey_that_is_transparent_shows_white() -> None:
    pixels = np.full((SIDE, SIDE), 1000, np.uint16)
    pixels[:20] = 65_535 // 2
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", transparency=1000)
    image = load(file.getvalue(), SIDE)
    assert (image[0] == 127).all() and (image[-1] == 255).all()


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_says_nothing_of_the_pixels(form: str) -> None:
    encoded = encode(smooth(), form, exif=b"Exif\0\0garbage that is no TIFF")
    assert images.size_of(encoded) == (SIDE, SIDE)
    assert np.abs(load(encoded, SIDE).astype(int) - smooth()).mean() < 16


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    encoded = NEARLY["jpeg progressive"]
    last = encoded.rindex(b"\xff\xda")
    with pytest.raises(Unusable, match=images.DAMAGED):
        load(encoded[:-2] + encoded[last:-2] * 1000 + encoded[-2:], 16)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


BROKEN = {
    images.EMPTY: {"empty": b""},
    images.NO_PICTURE: {
        "html": b"<html><body>404 Not Found</body></html>",
        "noise": bytes(range(256)),
        "tiff": encode(rough(), "TIFF"),
    },
    images.TOO_LARGE: {
        "just above": png_header(8192, 8193),
        "far above": png_header(30_000, 30_000),
        "absurd": png_header(2**31 - 1, 2**31 - 1),
    },
    images.DAMAGED: {
        "png header": png_header(10, 10),
        **{f"{name} cut": WHOLE[name][:-300] for name in WHOLE},
        **{f"{name} less 200 bytes": NEARLY[name][:-200] for name in ("jpeg", "jpeg progressive")},
        "gif cut": NEARLY["gif"][:-300],
        "webp lossy cut": NEARLY["webp lossy"][:-100],
    },
}


@pytest.mark.parametrize(("reason", "name"), [(r, n) for r, of_reason in BROKEN.items() for n in of_reason])
def test_what_is_no_whole_picture_is_refused_with_the_reason(reason: str, name: str) -> None:
    with pytest.raises(Unusable, match=f"^{reason}$"):
        load(BROKEN[reason][name], 16)
    assert reason in images.REASONS


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_damage_anywhere_gives_a_picture_or_a_reason(form: str) -> None:
    whole = encode(smooth(), form)
    rng = np.random.default_rng(0)
    cases = [whole[: rng.integers(len(whole))] for _ in range(60)]
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        cases.append(bytes(flipped))
    for case in cases:
        try:
            assert load(case, 16).shape == (16, 16, 3)
        except Unusable as error:
            assert str(error) in images.REASONS


# -- the reference folder of bad inputs

SHARED_SIZES = {
    "00_good.jpg": (197, 256),
    "06_1x1.jpg": (1, 1),
    "08_gray16.png": (197, 256),
    "10_cmyk.jpg": (197, 256),
    "11_gray.jpg": (197, 256),
    "12_animated.gif": (197, 256),
    "18_exif_rotated.jpg": (100, 200),  # upright
    "20_gray_alpha.png": (197, 256),
    "24_extreme_aspect_2000x1.png": (2000, 1),
    "30_all_white.jpg": (64, 64),
}
SHARED_BROKEN = {
    "01_truncated_60pct.jpg": images.DAMAGED,
    "03_zero_byte.jpg": images.EMPTY,
    "14_bomb_header_30000x30000.png": images.TOO_LARGE,
    "17_html_error_page.jpg": images.NO_PICTURE,
}


def shared_bytes(shared: Path, name: str) -> bytes:
    path = shared / "data" / "corrupt" / "images" / name
    if not path.exists():
        pytest.skip(f"{name} is not among the reference data")
    return path.read_bytes()


@pytest.mark.parametrize("name", SHARED_SIZES)
def test_shared_pictures_are_seen(name: str, shared: Path) -> None:
    encoded = shared_bytes(shared, name)
    assert images.size_of(encoded) == SHARED_SIZES[name]
    for crop in (Crop(), Crop(np.full(5, 0.3))):
        assert load(encoded, 32, crop).shape == (32, 32, 3)


@pytest.mark.parametrize("name", SHARED_BROKEN)
def test_shared_pictures_that_are_not_whole_are_refused(name: str, shared: Path) -> None:
    with pytest.raises(Unusable, match=SHARED_BROKEN[name]):
        load(shared_bytes(shared, name), 32)


def test_shared_colours_are_kept(shared: Path) -> None:
    def mean(name: str) -> np.ndarray:
        return load(shared_bytes(shared, name), 197).mean((0, 1))

    good = mean("00_good.jpg")
    np.testing.assert_allclose(mean("10_cmyk.jpg"), good, atol=3)
    np.testing.assert_allclose(mean("12_animated.gif"), good, atol=3)
    for name in ("08_gray16.png", "11_gray.jpg", "20_gray_alpha.png"):
        np.testing.assert_allclose(mean(name), good @ [0.299, 0.587, 0.114], atol=3)


# -- crops


def boxes(shape: tuple[int, int], scale: tuple[float, float], draws: int = 3000) -> np.ndarray:
    """`[4, draws]` left, top, width, height of random crops of a (height, width)."""
    rng = np.random.default_rng(0)
    return np.array([Crop(rng.random(5), scale).box(shape[1], shape[0]) for _ in range(draws)]).T


def test_random_crop_is_uniform_in_area_and_place_and_log_uniform_in_aspect() -> None:
    # At most half the area at 4:3: no box is cut to the picture, so nothing is bent.
    left, top, width, height = boxes((240, 240), (0.2, 0.5))
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


@pytest.mark.parametrize("shape", [(240, 240), (90, 240), (240, 40), (1, 2000), (2000, 1), (2, 2), (1, 1)])
def test_random_crop_lies_within_the_picture(shape: tuple[int, int]) -> None:
    left, top, width, height = boxes(shape, (0.2, 1.0), draws=300)
    assert min(left.min(), top.min()) >= 0 and min(width.min(), height.min()) >= 1
    assert (left + width).max() <= shape[1] and (top + height).max() <= shape[0]
    flat = encode(np.full((*shape, 3), 90, np.uint8), "PNG")
    for seed in range(4):
        crop = Crop(np.random.default_rng(seed).random(5))
        np.testing.assert_array_equal(load(flat, 24, crop), np.full((24, 24, 3), 90))


def test_a_crop_is_its_box_resized_by_pillow() -> None:
    picture = Image.fromarray(smooth()).resize((300, 200))
    encoded = encode(np.asarray(picture), "PNG")
    for seed in range(8):
        crop = Crop(np.random.default_rng(seed).random(5), flip=True)
        left, top, width, height = crop.box(300, 200)
        box = (left, top, left + width, top + height)
        want = np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC, box=box))
        got = load(encoded, 64, crop)
        np.testing.assert_array_equal(got[:, ::-1] if crop.mirrored else got, want)


def test_a_large_jpeg_is_decoded_coarser_and_looks_the_same() -> None:
    """Within 2 / 255 in the mean of decoding it whole."""
    y, x = np.mgrid[:1000, :1500]
    pixels = np.stack([127 + 120 * np.sin(x / 9), 127 + 120 * np.cos(y / 7), 127 + 120 * np.sin((x + y) / 11)], -1)
    encoded = encode(pixels.astype(np.uint8), "JPEG", quality=90)
    for seed in range(4):
        crop = Crop(np.random.default_rng(seed).random(5), (0.5, 1.0))
        left, top, width, height = crop.box(1500, 1000)
        whole = Image.open(io.BytesIO(encoded))
        box = (left, top, left + width, top + height)
        want = np.asarray(whole.resize((224, 224), Image.Resampling.BICUBIC, box=box))
        assert np.abs(load(encoded, 224, crop).astype(int) - want).mean() < 2


@pytest.mark.parametrize(("shape", "box"), [((20, 11), (0, 4, 11, 11)), ((11, 20), (4, 0, 11, 11))])
def test_without_draws_the_middle_square_is_seen(shape: tuple[int, int], box: images.Box) -> None:
    assert Crop().box(shape[1], shape[0]) == box


def test_flip_mirrors_half_of_the_draws() -> None:
    assert not Crop(np.zeros(5)).mirrored and not Crop(flip=True).mirrored
    draws = np.random.default_rng(0).random((1000, 5))
    assert 450 < sum(Crop(d, flip=True).mirrored for d in draws) < 550
    whole = Crop(np.array([0.999, 0.5, 0, 0, 0.1]), (1.0, 1.0), (1.0, 1.0), flip=True)
    np.testing.assert_array_equal(load(WHOLE["png"], SIDE, whole), rough()[:, ::-1])


def second(seed: int) -> Callable[[], RandomStream]:
    """The numbers of further trials, as of draw `seed`."""
    return lambda: RandomStream(fold_seed(1, "crop"), seed)


MEAN_AREAS = {(256, 256): (0.593, 0.540), (512, 256): (0.512, 0.368)}


@pytest.mark.parametrize("shape", MEAN_AREAS)
def test_item_8_crops_follow_the_rule_of_the_papers_recipe(shape: tuple[int, int]) -> None:
    """Rule 2 is torchvision's; by rule 1 a box is cut at the edge, which makes it larger and bends its aspect."""
    width, height = shape
    rng = np.random.default_rng(0)
    draws = [rng.random(5, np.float32) for _ in range(6000)]
    ours = np.array([Crop(d).box(width, height) for d in draws])
    rule = np.array([Crop(d, more=second(i)).box(width, height) for i, d in enumerate(draws)])
    for boxes_, area in zip((ours, rule), MEAN_AREAS[shape], strict=True):
        assert (boxes_[:, 2] * boxes_[:, 3]).mean() / (width * height) == pytest.approx(area, abs=0.008)
    assert (rule[:, 2] / rule[:, 3]).min() > 0.74 and (rule[:, 2] / rule[:, 3]).max() < 1.35
    sides = np.array([Crop(d)._trial(d, width, height) for d in draws])
    inside = (sides <= shape).all(axis=1)
    same = (ours == rule).all(axis=1)
    assert same[inside].all() and 0.3 < inside.mean() < 0.95  # the first trial is rule 1's


def test_the_first_trial_that_fits_is_taken() -> None:
    """By torchvision's loop, spelt out on the same numbers."""
    for seed in range(300):
        draws = np.random.default_rng(seed).random(5, np.float32)
        crop = Crop(draws, (0.6, 1.0), more=second(seed))
        pairs, stream = [draws[:2]], second(seed)()
        pairs += [stream.take(2) for _ in range(9)]
        sides = [crop._trial(pair, 300, 200) for pair in pairs]
        fits = [one for one in sides if 0 < one[0] <= 300 and 0 < one[1] <= 200]
        assert crop.box(300, 200)[2:] == (fits[0] if fits else (267, 200))


@pytest.mark.parametrize(("width", "height", "box"), [(400, 100, (133, 0, 133, 100)), (100, 400, (0, 133, 100, 133))])
def test_where_no_trial_fits_the_centre_is_taken(width: int, height: int, box: images.Box) -> None:
    assert Crop(np.full(5, 0.9), (1.0, 1.0), more=second(0)).box(width, height) == box
    assert Crop(np.full(5, 0.9), (1.0, 1.0), (0.2, 5.0), more=second(7)).box(1, 1) == (0, 0, 1, 1)


@settings(max_examples=300, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    scale=st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)).map(sorted),
    ratio=st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)).map(sorted),
    seed=st.integers(0, 2**31 - 1),
    rule=st.sampled_from([1, 2]),
)
def test_any_crop_lies_within_the_picture(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], seed: int, rule: int
) -> None:
    draws = np.random.default_rng(seed).random(5, np.float32)
    crop = Crop(draws, scale, ratio, more=second(seed) if rule == 2 else None)
    left, top, width, height = box = crop.box(*size)
    assert 0 <= left <= left + width <= size[0] and 0 <= top <= top + height <= size[1] and min(width, height) > 0
    assert crop.box(*size) == box


# -- large pictures


def in_mode(mode: str) -> bytes:
    """A PNG of 300 x 200 in a mode, of which a part is transparent where it says ``+``."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (200, 300, 4), np.uint8)
    file, options = io.BytesIO(), {}
    if mode.startswith("I;16"):
        picture = Image.fromarray(rng.integers(0, 2**16, (200, 300)).astype(np.uint16))
        options = {"transparency": int(np.asarray(picture)[3, 3])}
    elif mode.startswith("P"):
        picture = Image.frombytes("P", (300, 200), pixels[..., 0].tobytes())
        picture.putpalette(rng.integers(0, 256, 768).tolist())
        options = {"transparency": bytes(range(256))}
    else:
        picture = Image.fromarray(pixels, "RGBA").convert(mode.rstrip("+"))
        options = {"transparency": tuple(pixels[3, 3, :3].tolist())}
    picture.save(file, "PNG", **(options if mode.endswith("+") else {}))
    return file.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "P+", "RGB", "RGB+", "RGBA", "I;16", "I;16+"])
@pytest.mark.parametrize("size", [40, 200, 333])
def test_item_6_a_large_picture_converted_in_strips_is_the_same_to_the_last_bit(
    mode: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = in_mode(mode)
    crops = [Crop(), *[Crop(np.random.default_rng(seed).random(5), flip=True) for seed in range(5)]]
    whole = [load(encoded, size, crop) for crop in crops]
    for pixels in (300 * 7, 100):
        monkeypatch.setattr(images, "_STRIP", pixels)
        for crop, want in zip(crops, whole, strict=True):
            np.testing.assert_array_equal(load(encoded, size, crop), want)


def test_item_6_pixels_are_bounded_by_a_field() -> None:
    load(WHOLE["png"], 16, max_pixels=SIDE**2)
    for call in (
        lambda **limit: load(WHOLE["png"], 16, **limit),
        lambda **limit: images.size_of(WHOLE["png"], **limit),
    ):
        with pytest.raises(Unusable, match=images.TOO_LARGE):
            call(max_pixels=SIDE**2 - 1)


PEAK = """
import io, sys
import numpy as np
from PIL import Image
from m3ae_jax.data import images
file, mode = io.BytesIO(), sys.argv[1]
rows = np.zeros((4096, 4096), np.uint16 if mode == "I;16" else np.uint8)
(Image.fromarray(rows) if mode == "I;16" else Image.fromarray(rows).convert(mode)).save(file, "PNG", compress_level=1)
encoded = file.getvalue()
del rows, file
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
status = lambda name: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name))
before = status("VmRSS")
images.load(encoded, 224)
print((status("VmHWM") - before) / 1024)
"""


@pytest.mark.parametrize(
    ("mode", "bytes_a_pixel"), [("L", 1), ("P", 1), ("I;16", 2), ("LA", 4), ("RGB", 4), ("RGBA", 4)]
)
def test_item_6_a_pixel_costs_what_decoding_it_takes(mode: str, bytes_a_pixel: int) -> None:
    """Of 2^24 pixels, in MB; converted as a whole it were 14 bytes a pixel of 16-bit grey, and 12 with alpha."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of memory cannot be measured")
    result = subprocess.run([sys.executable, "-c", PEAK, mode], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 16 * bytes_a_pixel + 28


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
