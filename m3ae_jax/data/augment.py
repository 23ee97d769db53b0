"""RandAugment (arXiv 1909.13719), in the form that MAE and M3AE fine-tune with: timm's ``rand-m9-mstd0.5-inc1``.

Of fifteen operations two are drawn, with replacement, and each is applied with probability 1/2, at a magnitude of
mean 9 and standard deviation 0.5 on a scale to 10. In this form ("inc1") a larger magnitude always changes a picture
more. timm switches its colour jitter off where RandAugment is on, so there is none here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageOps

MOST = 10.0
"""The largest magnitude."""
_LAYERS, _PROBABILITY, _DEVIATION = 2, 0.5, 0.5
# What an operation does at the largest magnitude.
_DEGREES, _SHEAR, _SHIFT, _ENHANCE, _BITS, _ADDED = 30.0, 0.3, 0.45, 0.9, 4, 110
_SOLARIZED_BELOW = 128  # of solarize_add: which values are made lighter
_LEAST_FACTOR = 0.1  # of an enhancement

Rgb = tuple[int, int, int]
Operation = Callable[[Image.Image, float, bool, Rgb], Image.Image]
"""Of a picture, the share of the largest magnitude, whether a two-sided change goes down, and what fills the edges."""


def _signed(value: float, down: bool) -> float:
    return -value if down else value


def _rotate(picture: Image.Image, share: float, down: bool, fill: Rgb) -> Image.Image:
    return picture.rotate(_signed(share * _DEGREES, down), Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(picture: Image.Image, share: float, down: bool, fill: Rgb) -> Image.Image:
    return ImageOps.posterize(picture, max(1, _BITS - int(share * _BITS)))  # none would be left at 10: a black picture


def _solarize_add(picture: Image.Image, share: float, down: bool, fill: Rgb) -> Image.Image:
    added = int(share * _ADDED)
    return picture.point([min(255, v + added) if v < _SOLARIZED_BELOW else v for v in range(256)] * 3)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda picture, share, down, fill: kind(picture).enhance(
        max(_LEAST_FACTOR, 1 + _signed(share * _ENHANCE, down))
    )


def _affine(matrix: Callable[[Image.Image, float], tuple[float, ...]], most: float) -> Operation:
    """An operation by the affine matrix for a picture and an amount, which is at most `most`."""

    def change(picture: Image.Image, share: float, down: bool, fill: Rgb) -> Image.Image:
        data = matrix(picture, _signed(share * most, down))
        bicubic = Image.Resampling.BICUBIC
        return picture.transform(picture.size, Image.Transform.AFFINE, data, bicubic, fill=1, fillcolor=fill)

    return change


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda picture, share, down, fill: ImageOps.autocontrast(picture),
    "equalize": lambda picture, share, down, fill: ImageOps.equalize(picture),
    "invert": lambda picture, share, down, fill: ImageOps.invert(picture),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": lambda picture, share, down, fill: ImageOps.solarize(picture, 256 - int(share * 256)),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda picture, amount: (1, amount, 0, 0, 1, 0), _SHEAR),
    "shear_y": _affine(lambda picture, amount: (1, 0, 0, amount, 1, 0), _SHEAR),
    "translate_x": _affine(lambda picture, amount: (1, 0, amount * picture.width, 0, 1, 0), _SHIFT),
    "translate_y": _affine(lambda picture, amount: (1, 0, 0, 0, 1, amount * picture.height), _SHIFT),
}


COLOR_SAFE = ("rotate", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y")
"""What keeps the colours, and what is left and right, as captions name them."""


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """See the module docstring.

    Attributes:
        magnitude: mean of the magnitudes, 0 to `MOST`.
        fill: colour of what a shift uncovers: the data's mean.
        operations: names of `OPERATIONS`, from which two are drawn.
    """

    magnitude: float
    fill: Rgb
    operations: tuple[str, ...] = tuple(OPERATIONS)

    @classmethod
    def of(cls, data: ConfigDict, magnitude: float, operations: tuple[str, ...] = tuple(OPERATIONS)) -> RandAugment:
        """With the mean colour of ``config.data``."""
        red, green, blue = (round(255 * mean) for mean in data.image_mean)
        return cls(magnitude, (red, green, blue), operations)

    def __call__(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Changes a picture, `[H, W, 3] uint8` to the same; a function of the picture and the generator's state."""
        image = Image.fromarray(picture)
        names = self.operations
        for _ in range(_LAYERS):
            name, applied = names[int(rng.random() * len(names))], rng.random() < _PROBABILITY
            share = float(np.clip(rng.normal(self.magnitude, _DEVIATION), 0.0, MOST)) / MOST
            down = rng.random() < 0.5
            if applied:
                image = OPERATIONS[name](image, share, down, self.fill)
        return np.asarray(image)
