"""Pictures and texts as people hand them over, made alike: one or many, files, arrays, Pillow pictures.

Legend: ``N`` pictures, ``H`` and ``W`` of one, ``S`` side of the square that a model sees.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

import m3ae_jax.data.images as image_lib
from m3ae_jax.data.fields import MAX_PIXELS
from m3ae_jax.errors import UserError

Picture = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray
"""A file's path, its bytes or the opened file, a Pillow picture, or an array `[H, W]` or `[H, W, 1 | 3 | 4] uint8`, of
any library that NumPy reads: grey, grey, RGB, RGB with opacity."""

_ALLOWED = (
    "a picture is a file's path, its bytes or the opened file, a Pillow picture, or a uint8 array [H, W], [H, W, 1], "
    "[H, W, 3] or [H, W, 4]; several are a list of these, or an array [N, H, W, 1, 3 or 4]"
)
_CHANNELS = ((), (1,), (3,), (4,))  # axes after height and width
_SHOWN = 200  # characters of a path, in a message: it may be a whole picture in base64
_BYTES = (bytes, bytearray, memoryview)


def squares(images: Any, size: int, max_pixels: int = MAX_PIXELS) -> list[np.ndarray]:
    """The centred square of each picture, as validation sees pictures.

    Of an array the number of axes alone decides: two or three are one picture, four are N.

    Args:
        images: one `Picture`, or an iterable of them, or an array `[N, H, W, 1 | 3 | 4] uint8`.
        size: ``S``.
        max_pixels: of a file.

    Returns:
        N arrays `[S, S, 3] uint8`; of one picture one.

    Raises:
        UserError: something is no picture, with its place; or a file cannot be read.
    """
    array = _as_array("images", images)
    several = images if array is None else _unpacked("images", array)
    if isinstance(several, (str, os.PathLike, *_BYTES, Image.Image)) or hasattr(several, "read"):
        return [_square("images", several, size, max_pixels)]
    if isinstance(several, np.ndarray) and several.ndim != 4:
        return [_square("images", several, size, max_pixels)]
    if isinstance(several, (Mapping, Set)) or not isinstance(several, Iterable):
        raise UserError(f"images is of type {type(several).__name__}: {_ALLOWED}")
    return [_square(f"images[{i}]", picture, size, max_pixels) for i, picture in enumerate(several)]


def sentences(texts: Any) -> list[str]:
    """N texts; of one string one.

    Raises:
        UserError: something is no string, with its place.
    """
    array = _as_array("texts", texts)
    several = texts if array is None else _unpacked("texts", array)
    if isinstance(several, str):
        return [several]
    if isinstance(several, (*_BYTES, Mapping, Set)) or not isinstance(several, Iterable):
        raise UserError(f"texts is of type {type(several).__name__}: it takes a string, or a list of strings")
    found = list(several)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            hint = "; bytes are decoded first: x.decode()" if isinstance(text, bytes) else ""
            raise UserError(f"texts[{i}] is of type {type(text).__name__}: each is a string{hint}")
    return found


def _unpacked(where: str, array: np.ndarray) -> Any:
    """An array of objects or strings as a list of them, or of no axis as the one; any other as it is.

    Raises:
        UserError: it has several axes, as a table has.
    """
    if array.dtype.kind not in "OUT":
        return array
    if array.ndim > 1:
        raise UserError(f"{where} is a table {list(array.shape)} of {array.dtype}: give one column of it")
    return array.tolist()


def _as_array(where: str, value: Any) -> np.ndarray | None:
    """What any library's array is for NumPy; None of what is no array, as a list."""
    if not hasattr(value, "__array__") or isinstance(value, (str, bytes)):  # as NumPy's scalars of these are
        return None
    if np.ma.is_masked(value):
        raise UserError(f"{where} is an array of which some numbers are masked out: fill them, x.filled(255)")
    try:
        return np.asarray(value)
    except Exception as error:  # as of a tensor on another device: each library has kinds of its own
        raise UserError(f"{where} does not become a NumPy array: {' '.join(str(error).split())}") from None


def _square(where: str, picture: Any, size: int, max_pixels: int) -> np.ndarray:
    if isinstance(picture, (str, os.PathLike)):
        where = f"{where}={str(picture)[:_SHOWN]!r}"
        picture = _content(where, str(picture))
    elif hasattr(picture, "read"):
        picture = _read(where, picture)
    if isinstance(picture, _BYTES):
        try:
            return image_lib.load(bytes(picture), size, max_pixels=max_pixels)
        except image_lib.Unusable as error:
            known = f" ({', '.join(image_lib.FORMATS)}; of other formats give Pillow's Image.open)"
            raise UserError(
                f"{where} cannot be used: {error}{known if str(error) == image_lib.NO_PICTURE else ''}"
            ) from None
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(_pixels(where, picture))
    if picture.mode == "F":  # of floats, which Pillow would cut to whole numbers
        raise UserError(f"{where} is a Pillow picture of floats (mode F): {_ALLOWED}")
    if not all(picture.size):
        raise UserError(f"{where} is a Pillow picture of {picture.width} x {picture.height}: it has no pixel")
    try:
        return image_lib.from_pillow(picture, size)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow decodes a file late; one that is closed has no pixels
        raise UserError(f"{where} cannot be decoded: {error}") from None


def _content(where: str, path: str) -> bytes:
    if not path or "://" in path:
        kind = "an address, not a file: give the bytes that it leads to" if path else "an empty path"
        raise UserError(f"{where} is {kind}")
    try:
        return Path(os.path.expanduser(path)).read_bytes()
    except IsADirectoryError:
        raise UserError(f"{where} is a folder: name its files; m3ae_jax.encode takes folders") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _read(where: str, file: Any) -> bytes:
    """What is left of an opened file."""
    try:
        content = file.read()
    except (OSError, ValueError) as error:  # closed, or text that does not decode
        raise UserError(f"{where} cannot be read: {error}") from None
    if not isinstance(content, _BYTES):
        raise UserError(f"{where} is a file of text: open it as one of bytes, open(FILE, 'rb')")
    return bytes(content)


def _pixels(where: str, picture: Any) -> np.ndarray:
    """An array that Pillow takes: `[H, W]` or `[H, W, 3 | 4] uint8`.

    Raises:
        UserError: it is none.
    """
    array = _as_array(where, picture)
    if array is None:
        raise UserError(f"{where} is of type {type(picture).__name__}: {_ALLOWED}")
    said = f"{where} is {array.dtype} {list(array.shape)}"
    if array.dtype != np.uint8:
        hint = "; of floats from 0 to 1 it is (255 * x).round().astype('uint8')" if array.dtype.kind == "f" else ""
        raise UserError(f"{said}: {_ALLOWED}{hint}")
    if array.ndim not in (2, 3) or array.shape[2:] not in _CHANNELS:
        hint = "; of channels first it is numpy.moveaxis(x, 0, -1), of N grey pictures x[..., None]"
        raise UserError(f"{said}: {_ALLOWED}{hint if array.ndim == 3 else ''}")
    if not array.size:
        raise UserError(f"{said}: it has no pixel")
    return array[..., 0] if array.shape[2:] == (1,) else array
