"""Decoding, augmentation and patching of pictures.

Pillow decodes and resizes: it knows the formats' oddities, and it lets go of the interpreter's lock while it works, so
that the pipeline's threads run side by side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, WebPImagePlugin  # noqa: F401  # Pillow finds a format once its plugin is imported

from m3ae_jax.data.fields import MAX_PIXELS
from m3ae_jax.data.order import RandomStream

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
EMPTY, NO_PICTURE, TOO_LARGE, DAMAGED = "empty file", "not a picture", "too many pixels", "damaged picture"

NO_WORDS = "no words"  # of a text that stands alone
NO_CAPTION = "no caption"  # the record has none: a null, a missing field; not one of zero characters
TOO_MANY_BYTES, NO_BYTES = "too many bytes", "a path without its picture"
EMPTY_CAPTION = "empty caption"  # beside a picture: counted, not replaced
REASONS = (
    "", EMPTY, NO_PICTURE, TOO_LARGE, DAMAGED, NO_WORDS, NO_CAPTION, TOO_MANY_BYTES, NO_BYTES, EMPTY_CAPTION,
)  # fmt: skip
"""Why an example was replaced by another; of `EMPTY_CAPTION` none was."""
_MOST_SCANS = 200  # of a progressive JPEG; real ones have about ten, and each is a pass over all pixels

_ORIENTATION = 0x0112  # Exif's tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture as stored becomes upright (Exif 2.32, tag Orientation)."""
DETAIL = 1.5
"""A JPEG is decoded at the smallest 1/2, 1/4 or 1/8 that is still this many times finer than the result."""
_STRIP = 2**20  # pixels of a decoded picture that are converted at a time
_SUPPORT = 2  # pixels to each side that Pillow's bicubic filter sees, in those of the coarser of the two pictures
_TRIALS = 10  # of a crop, as in torchvision's RandomResizedCrop

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit above is lower


class Unusable(Exception):
    """A picture that cannot be used; its text is one of the reasons above."""


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Turns whatever a codec raises on damage into `Unusable`: it is never the program's fault."""
    try:
        yield
    except (Unusable, MemoryError):
        raise  # a lack of memory says nothing of the picture
    except Exception as error:
        raise Unusable(TOO_LARGE if isinstance(error, Image.DecompressionBombError) else DAMAGED) from error


Box = tuple[float, float, float, float]
"""Left, top, width and height in pixels of the upright picture."""


@dataclasses.dataclass(frozen=True)
class Crop:
    """Which part of a picture is seen.

    Attributes:
        draws: `[5] float`, uniform in [0, 1): area, aspect, top, left, flip; None: the centred square, not mirrored.
        scale: least and largest share of the area.
        ratio: least and largest width / height.
        flip: mirror half of the pictures left-right.
        more: the random numbers of the trials after the first, by crop rule 2; None: rule 1, with one trial.
    """

    draws: np.ndarray | None = None
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    more: Callable[[], RandomStream] | None = None

    def box(self, width: int, height: int) -> Box:
        """The part of a picture of this size.

        The area is uniform in `scale`, the aspect ratio log-uniform in `ratio`. Of boxes that reach beyond the picture
        rule 2, torchvision's ``RandomResizedCrop``, draws another, up to ten, and then takes the centre; rule 1 cuts
        the box at the picture's edge.
        """
        if self.draws is None:
            side = min(width, height)
            return (width - side) // 2, (height - side) // 2, side, side
        crop = self._sides(self.draws, width, height)
        if crop is None:
            return self._centre(width, height)
        crop_width, crop_height = crop
        top = int(self.draws[2] * (height - crop_height + 1))
        left = int(self.draws[3] * (width - crop_width + 1))
        return left, top, crop_width, crop_height

    def _sides(self, draws: np.ndarray, width: int, height: int) -> tuple[int, int] | None:
        """Width and height of the box; None where no trial fits into the picture."""
        first = self._trial(draws, width, height)
        if self.more is None:
            return min(max(first[0], 1), width), min(max(first[1], 1), height)
        if _fits(first, width, height):
            return first
        stream = self.more()
        others = (self._trial(stream.take(2), width, height) for _ in range(_TRIALS - 1))
        return next((other for other in others if _fits(other, width, height)), None)

    def _trial(self, draws: np.ndarray, width: int, height: int) -> tuple[int, int]:
        """Width and height of a box, which may be larger than the picture, or have no pixel."""
        area = (self.scale[0] + draws[0] * (self.scale[1] - self.scale[0])) * width * height
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = math.exp(low + draws[1] * (high - low))
        return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))

    def _centre(self, width: int, height: int) -> Box:
        """The largest part in the middle whose aspect is the picture's, or the nearest one in `ratio`."""
        crop_width = min(width, max(round(height * self.ratio[1]), 1))
        crop_height = min(height, max(round(width / self.ratio[0]), 1))
        return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height

    @property
    def mirrored(self) -> bool:
        """Whether this one is mirrored."""
        return self.flip and self.draws is not None and self.draws[4] < 0.5


def _fits(box: tuple[int, int], width: int, height: int) -> bool:
    return 0 < box[0] <= width and 0 < box[1] <= height


def size_of(encoded: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of the upright picture, from its header.

    Raises:
        Unusable: it is none, or one of more than `max_pixels`.
    """
    image = open_picture(encoded, max_pixels)
    width, height = image.size
    return (width, height) if turn_of(image) < 5 else (height, width)


def load(encoded: bytes, size: int, crop: Crop = Crop(), max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes a part of a picture and resizes it (bicubic, antialiased) to a square.

    JPEG, PNG, WebP, GIF or BMP; of an animation the first frame. Grey, CMYK, palette and 16-bit pictures (scaled, not
    clipped) become RGB; what is transparent shows white; Exif's orientation is applied.

    Args:
        encoded: the file's bytes.
        size: side of the result, pixels.
        crop: which part.
        max_pixels: of the picture as stored. Decoded it costs up to 4 bytes a pixel (a WebP 16, a progressive JPEG 8).

    Returns:
        `[size, size, 3] uint8`.

    Raises:
        Unusable: the bytes are no whole picture, or one of more than `max_pixels`.
    """
    image = open_picture(encoded, max_pixels)
    with decoding():
        turn = turn_of(image)
        stored = image.size
        width, height = stored if turn < 5 else stored[::-1]
        left, top, right, bottom = _as_stored(crop.box(width, height), (width, height), turn)
        load_reduced(image, int(min(right - left, bottom - top) / (size * DETAIL)))
        x, y = image.size[0] / stored[0], image.size[1] / stored[1]
        box = (left * x, top * y, min(right * x, image.size[0]), min(bottom * y, image.size[1]))
        part = _resized(image, size, box)
        if turn in TURNS:
            part = part.transpose(TURNS[turn])
        if crop.mirrored:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(on_white(part))


def upright_size(encoded: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of a picture as `load` crops it.

    Raises:
        Unusable: as `load`, as far as the header tells.
    """
    image = open_picture(encoded, max_pixels)
    with decoding():
        return image.size if turn_of(image) < 5 else image.size[::-1]


def from_pillow(image: Image.Image, size: int) -> np.ndarray:
    """The centred square of a Pillow picture, upright, `[size, size, 3] uint8`; as `load` makes it of a file.

    Raises:
        OSError: it is of a file, and does not decode.
    """
    turn = turn_of(image)
    upright = image.transpose(TURNS[turn]) if turn in TURNS else image
    left, top, width, height = Crop().box(*upright.size)
    box = (left, top, left + width, top + height)
    part = eight_bit(upright).resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(on_white(part))


def load_reduced(image: Image.Image, scale: int) -> None:
    """Decodes an opened picture; a JPEG at the smallest 1/2, 1/4 or 1/8 that is not below 1 / `scale`."""
    if image.format in ("JPEG", "MPO") and scale > 1:
        image.draft(image.mode, (image.width // scale, image.height // scale))
    image.load()


def open_picture(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads the header; decodes nothing yet.

    Raises:
        Unusable: it is no picture, or one of more than `max_pixels`.
    """
    if not encoded:
        raise Unusable(EMPTY)
    with decoding():
        try:
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        except Image.UnidentifiedImageError as error:
            raise Unusable(NO_PICTURE) from error
    if image.size[0] * image.size[1] > max_pixels:
        raise Unusable(TOO_LARGE)
    if image.format in ("JPEG", "MPO") and encoded.count(b"\xff\xda") > _MOST_SCANS:
        raise Unusable(DAMAGED)
    return image


def turn_of(image: Image.Image) -> int:
    """Exif's orientation, 1 to 8."""
    # Most files have no Exif; and of a PNG without it Pillow would decode everything to look behind the pixels.
    try:
        turn = image.getexif().get(_ORIENTATION, 1) if "exif" in image.info else 1
    except Exception:  # damaged Exif, of which Pillow raises many kinds, says nothing of the pixels
        turn = 1
    return turn if turn in TURNS else 1


def _as_stored(box: Box, upright: tuple[int, int], turn: int) -> Box:
    """Left, top, right and bottom, in the picture as stored, of a box of the upright one."""
    left, top, width, height = box
    right, bottom = left + width, top + height
    w, h = upright
    return {
        1: (left, top, right, bottom),
        2: (w - right, top, w - left, bottom),
        3: (w - right, h - bottom, w - left, h - top),
        4: (left, h - bottom, right, h - top),
        5: (top, left, bottom, right),
        6: (top, w - right, bottom, w - left),
        7: (h - bottom, w - right, h - top, w - left),
        8: (h - bottom, left, h - top, right),
    }[turn]


def _resized(image: Image.Image, size: int, box: Box) -> Image.Image:
    """``eight_bit(image).resize((size, size), BICUBIC, box)``, of a large picture without a whole one in between.

    Pillow resizes along the rows first, then along the columns: the rows are done strip by strip here, which gives the
    same to the last bit. (So would not what is cropped first: the filter's weights would be rounded otherwise.)
    """
    width, height = image.size
    if width * height <= _STRIP or (width, height) == (size, size) or _is_plain(image):
        return eight_bit(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
    left, top, right, bottom = box
    reach = _SUPPORT * max((bottom - top) / size, 1) + 1
    first, last = max(int(top - reach), 0), min(math.ceil(bottom + reach), height)
    rows, strips = max(_STRIP // width, 1), {}
    for start in range(first, last, rows):
        stop = min(start + rows, last)
        strip = eight_bit(image.crop((0, start, width, stop)))
        if strip.mode == "RGBA":  # colours weighed by their alpha, as Pillow does before it resizes
            strip = strip.convert("RGBa")
        rows_box = (left, 0, right, stop - start)
        strips[start] = strip.resize((size, stop - start), Image.Resampling.BICUBIC, box=rows_box)
    narrow = Image.new(strips[first].mode, (size, height))
    for start, strip in strips.items():
        narrow.paste(strip, (0, start))
    part = narrow.resize((size, size), Image.Resampling.BICUBIC, box=(0, top, size, bottom))
    return part.convert("RGBA") if part.mode == "RGBa" else part


def eight_bit(image: Image.Image) -> Image.Image:
    """The picture in L, RGB or RGBA, eight bits a channel."""
    if image.mode.startswith("I"):  # 16 bits: 65535 is white, and Pillow would clip at 255
        deep = np.asarray(image).astype(np.int64)
        grey = ((deep.clip(0, 65_535) + 128) // 257).astype(np.uint8)
        if "transparency" not in image.info:
            return Image.fromarray(grey)
        seen = np.where(deep == image.info["transparency"], 0, 255).astype(np.uint8)
        return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(seen))).convert("RGBA")
    if image.mode == "La":  # for which Pillow has no other way out
        image = image.convert("LA")
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "RGBa"):
        return image.convert("RGBA")
    return image if _is_plain(image) else image.convert("RGB")


def _is_plain(image: Image.Image) -> bool:
    """Whether a picture needs no conversion."""
    return image.mode in ("L", "RGB") and "transparency" not in image.info


def on_white(image: Image.Image) -> Image.Image:
    """RGB, what is transparent on white; resizing has weighed colours by their alpha already."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def patchify(images: Any, patch: int) -> Any:
    """Cuts pictures into patches: row-major; within a patch row, column, channel.

    Works on NumPy's and JAX's arrays and on tensors alike.

    Args:
        images: `[B, H, W, C]`.
        patch: side of a patch, pixels; divides H and W.

    Returns:
        `[B, H/p * W/p, p*p*C]`, dtype as given.
    """
    xp = _namespace(images)
    _, height, width, channels = images.shape
    rows, columns = height // patch, width // patch
    grid = xp.reshape(images, [-1, rows, patch, columns, patch, channels])
    return xp.reshape(xp.transpose(grid, [0, 1, 3, 2, 4, 5]), [-1, rows * columns, patch * patch * channels])


def unpatchify(patches: Any, patch: int, grid: tuple[int, int]) -> Any:
    """Inverse of `patchify`: `[B, rows*columns, p*p*C]` to `[B, rows*p, columns*p, C]`."""
    xp = _namespace(patches)
    rows, columns = grid
    channels = patches.shape[-1] // (patch * patch)
    cells = xp.reshape(patches, [-1, rows, columns, patch, patch, channels])
    return xp.reshape(xp.transpose(cells, [0, 1, 3, 2, 4, 5]), [-1, rows * patch, columns * patch, channels])


def _namespace(array: Any) -> Any:
    if hasattr(array, "__array_namespace__"):  # NumPy's and JAX's
        return array.__array_namespace__()
    import tensorflow as tf

    return tf
