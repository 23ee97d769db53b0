"""Decoding, augmentation and patching of pictures, in the tf.data graph."""

from __future__ import annotations

from typing import Any

import numpy as np


def decode(encoded: Any) -> Any:
    """Decodes JPEG, PNG, WebP, GIF (first frame) or BMP to `[h, w, 3] uint8`.

    Grey, CMYK and 16-bit pictures become RGB; alpha is dropped; EXIF orientation is not applied, in
    training and evaluation alike. An animated WebP counts as broken.

    Raises:
        tf.errors.InvalidArgumentError: (when the graph runs) the bytes are not a whole picture.
    """
    import tensorflow as tf

    # \C is any byte; a dot would be a UTF-8 character, which half of all sizes are not.
    is_webp = tf.strings.regex_full_match(tf.strings.substr(encoded, 0, 16), r"RIFF\C{4}WEBP\C*")
    image = tf.cond(
        is_webp,
        lambda: _decode_webp(encoded),
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )
    return tf.ensure_shape(image, [None, None, 3])


def _decode_webp(encoded: Any) -> Any:
    """Decodes a WebP still, without its alpha; TensorFlow wants the number of channels that the file has.

    An animation is refused: TensorFlow would decode all its frames, and with ``channels=0`` writes past its buffer.
    """
    import tensorflow as tf

    kind = tf.strings.substr(encoded, 12, 4)
    head = tf.cast(tf.io.decode_raw(tf.strings.substr(encoded, 0, 25), tf.uint8), tf.int32)
    flags = head[20]  # of VP8X: 0x10 alpha, 0x02 animation
    alpha = ((kind == "VP8X") & (flags & 0x12 == 0x10)) | ((kind == "VP8L") & (head[24] & 0x10 > 0))
    return tf.cond(
        alpha,
        lambda: tf.image.decode_webp(encoded, channels=4)[0, :, :, :3],
        lambda: tf.image.decode_webp(encoded, channels=3)[0],
    )


def random_resized_crop(
    image: Any, size: int, seed: Any, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Any:
    """Crops a random area and aspect ratio, then resizes to a square (bicubic, antialiased).

    The area is uniform in `scale` (share of the picture), the aspect ratio log-uniform in `ratio`. The box
    is then cut to the picture rather than drawn again: no loop, and no picture is too narrow for it.

    Args:
        image: `[h, w, 3] uint8`.
        size: side of the result, pixels.
        seed: `[2] int64` stateless seed.
        scale: least and largest share of the area.
        ratio: least and largest width / height.

    Returns:
        `[size, size, 3] uint8`.
    """
    import tensorflow as tf

    draw = tf.random.stateless_uniform([4], seed)
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    height, width = shape[0], shape[1]
    area = (scale[0] + draw[0] * (scale[1] - scale[0])) * height * width
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = tf.exp(low + draw[1] * (high - low))
    crop_w = tf.clip_by_value(tf.round(tf.sqrt(area * aspect)), 1, width)
    crop_h = tf.clip_by_value(tf.round(tf.sqrt(area / aspect)), 1, height)
    top = tf.floor(draw[2] * (height - crop_h + 1))
    left = tf.floor(draw[3] * (width - crop_w + 1))
    box = tf.cast(tf.minimum([top, left], [height - crop_h, width - crop_w]), tf.int32)
    crop = tf.image.crop_to_bounding_box(image, box[0], box[1], tf.cast(crop_h, tf.int32), tf.cast(crop_w, tf.int32))
    return resize(crop, size)


def resize(image: Any, size: int) -> Any:
    """Resizes `[h, w, 3] uint8` to `[size, size, 3] uint8` (bicubic, antialiased when shrinking)."""
    import tensorflow as tf

    def shrink_or_grow() -> Any:
        resized = tf.image.resize(image, [size, size], method="bicubic", antialias=True)
        return tf.cast(tf.round(tf.clip_by_value(resized, 0, 255)), tf.uint8)

    same = tf.reduce_all(tf.equal(tf.shape(image)[:2], size))
    return tf.ensure_shape(tf.cond(same, lambda: image, shrink_or_grow), [size, size, 3])


def center_crop(image: Any, size: int) -> Any:
    """The largest centred square, resized: what validation sees (`[size, size, 3] uint8`)."""
    import tensorflow as tf

    shape = tf.shape(image)
    side = tf.minimum(shape[0], shape[1])
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    return resize(tf.image.crop_to_bounding_box(image, top, left, side, side), size)


def random_flip(image: Any, seed: Any) -> Any:
    """Mirrors left-right with probability one half; `seed` is `[2] int64`."""
    import tensorflow as tf

    mirror = tf.random.stateless_uniform([], seed) < 0.5
    return tf.cond(mirror, lambda: tf.reverse(image, axis=[1]), lambda: image)


def patchify(images: Any, patch: int) -> Any:
    """Cuts pictures into patches: row-major; within a patch row, column, channel.

    Works on NumPy arrays and tensors alike.

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
    if isinstance(array, np.ndarray):
        return np
    import tensorflow as tf

    return tf
