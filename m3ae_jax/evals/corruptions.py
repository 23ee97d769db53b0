"""Common corruptions of pictures, each at five severities (Hendrycks and Dietterich, arXiv 1903.12261, section 3).

All constants are those of the authors' ``ImageNet-C/create_c/make_imagenet_c.py`` (github.com/hendrycks/robustness),
which are for pictures of 224 pixels. Lengths, of the two blurs, are scaled by the picture's side / 224, so that a blur
keeps its share of the picture; shares, noise in units of the full range and JPEG qualities are taken as they are. Of
the paper's fifteen these are the ones that need no other pictures and no rendering (fog, frost, snow, glass, elastic
and zoom are left out); its held-out ``gaussian_blur`` stands for defocus, whose disk has no meaning below a pixel.
The results are rounded to eight bits, and not saved as JPEG of quality 85 after that as the paper's are.

Legend: ``S`` side of a picture, pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from m3ae_jax.data.order import fold_seed

SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 224  # of the pictures that the constants are for

Rng = np.random.Generator
_Corruption = Callable[[np.ndarray, int, Rng], np.ndarray]
"""Of `[S, S, 3] float64` in [0, 1] and a severity from 0; the result may leave [0, 1]."""


def corrupted(picture: np.ndarray, name: str, severity: int, position: int) -> np.ndarray:
    """A picture with a corruption, a pure function of its arguments.

    Args:
        picture: `[S, S, 3] uint8`.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        position: the example's; other positions have other noise.

    Returns:
        `[S, S, 3] uint8`.
    """
    seed = fold_seed("corruptions", name, severity)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))
    changed = CORRUPTIONS[name](picture / 255.0, severity - 1, rng)
    return np.rint(np.clip(changed, 0.0, 1.0) * 255.0).astype(np.uint8)


def _gaussian_noise(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    return x + rng.normal(scale=(0.08, 0.12, 0.18, 0.26, 0.38)[severity], size=x.shape)


def _shot_noise(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    photons = (60, 25, 12, 5, 3)[severity]  # of a white pixel
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    """Salt and pepper, as likely, on a share of the values."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity]
    draw = rng.random(x.shape)
    return np.where(draw < share / 2, 0.0, np.where(draw < share, 1.0, x))


def _gaussian_blur(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    del rng
    sigma = (1, 2, 3, 4, 6)[severity] * len(x) / _SIDE
    blurred: np.ndarray = gaussian_filter(x, (sigma, sigma, 0), mode="nearest")
    return blurred


def _motion_blur(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    """A one-sided Gaussian along a direction within 45 degrees of the horizontal, as ImageMagick's ``-motion-blur``.

    Its kernel has ``2 * radius + 1`` taps a pixel apart.
    """
    from scipy.signal import fftconvolve

    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity]
    scale, angle = len(x) / _SIDE, np.deg2rad(rng.uniform(-45, 45))
    along = np.arange(0, 2 * radius + 1, 0.5)  # half a pixel apart, for pictures enlarged to up to 448
    weight = np.exp(-0.5 * (along / sigma) ** 2)
    rows, columns = along * scale * np.sin(angle), along * scale * np.cos(angle)
    reach = int(np.ceil(along[-1] * scale)) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for row in (np.floor(rows), np.floor(rows) + 1):  # each tap is shared by the four pixels around it
        for column in (np.floor(columns), np.floor(columns) + 1):
            near = (1 - np.abs(rows - row)) * (1 - np.abs(columns - column))
            np.add.at(kernel, (row.astype(int) + reach, column.astype(int) + reach), weight * near)
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    blurred: np.ndarray = fftconvolve(padded, (kernel / kernel.sum())[..., None], mode="valid", axes=(0, 1))
    return blurred


def _pixelate(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    del rng
    side = max(1, int(len(x) * (0.6, 0.5, 0.4, 0.3, 0.25)[severity]))
    small = _image(x).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small.resize((len(x), len(x)), Image.Resampling.BOX)) / 255.0


def _jpeg(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    del rng
    file = io.BytesIO()
    _image(x).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[severity])
    return np.asarray(Image.open(file, formats=("JPEG",))) / 255.0


def _brightness(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    """More of HSV's value, the greatest of the channels; hue and saturation stay."""
    del rng
    value = x.max(axis=2, keepdims=True)
    brighter = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[severity], 1.0)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)


def _contrast(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    del rng
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity] + mean


def _image(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(x * 255.0).astype(np.uint8))


CORRUPTIONS: dict[str, _Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "gaussian_blur": _gaussian_blur,
    "motion_blur": _motion_blur,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
    "brightness": _brightness,
    "contrast": _contrast,
}
