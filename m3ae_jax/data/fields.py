"""The fields of the config that say what the data are and how they become batches."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.data.sources.base import MAX_BYTES, MODALITIES
from m3ae_jax.errors import UserError, one_of

CC12M_MEAN = (0.5762, 0.5503, 0.5213)
CC12M_STD = (0.3207, 0.3169, 0.3307)
MAX_PIXELS = 2**26


class DataFields(FieldGroup):
    """What all sources share; each has a group of its own."""

    modalities: tuple[str, ...] = setting(MODALITIES)
    """A choice of image and text; image alone is MAE, text alone masked language modelling."""
    mixture_rows: int = setting(0, low=0)
    """Of a mixture: every kind of data has a multiple of these rows in a batch; 0: the largest power of two up to 256
    and an eighth of the batch."""
    epoch_source: str = setting("")
    """Of a mixture: the source whose passes durations in epochs count; empty: that with the largest weight."""
    image_size: int = setting(256, low=1, aliases=("resolution", "img_size"))
    """Side of a picture in pixels."""
    patch_size: int = setting(16, low=1, aliases=("patch",))
    """Side of a patch in pixels."""
    image_mean: tuple[float, float, float] = setting(CC12M_MEAN)
    """Mean of the channels; the default is CC12M's."""
    image_std: tuple[float, float, float] = setting(CC12M_STD)
    """Standard deviation of the channels, likewise."""
    crop_scale: tuple[float, float] = setting((0.2, 1.0))
    """Least and greatest share of a picture that a crop takes."""
    crop_ratio: tuple[float, float] = setting((3 / 4, 4 / 3))
    """Least and greatest width / height of a crop."""
    crop_rule: int = setting(2, low=1, high=2, identifies=False)
    """2: torchvision's rule; 1: boxes cut at the picture's edge, as runs before 2026-11-29."""
    flip: bool = setting(True)
    """Mirror half of the pictures; false where captions speak of left and right."""
    rand_augment: float = setting(0.0, low=0.0, high=10.0, aliases=("randaugment", "randaug"))
    """Magnitude of RandAugment (two operations a picture) in training; 0: none; ALBEF: 7."""
    rand_augment_operations: str = setting("color_safe", choices=("color_safe", "all"))
    """color_safe: those that keep colours, as captions name them; all: those of fine-tuning."""
    tokenizer: str = setting("", identifies=False, aliases=("vocab", "vocabulary"))
    """FILE.model (SentencePiece), vocab.txt (BERT's WordPiece), tokenizer.json (Hugging Face's) or scenes. A run's
    folder holds a copy, which counts where the file is gone; by its content it identifies the run."""
    max_text_tokens: int = setting(64, low=1, high=100_000, aliases=("max_length", "text_length", "seq_len"))
    """Tokens of a caption at most."""
    max_bad_fraction: float = setting(0.05, low=0, high=1, identifies=False)
    """Share of unreadable examples above which (and after 1,000) a run stops."""
    max_bytes: int = setting(MAX_BYTES, low=1)
    """Bytes of one picture, caption or record at most; a larger one is not read, but counted."""
    max_pixels: int = setting(MAX_PIXELS, low=1, high=2**27)
    """Pixels of a picture at most; a larger one is not decoded, but counted. Each thread decodes one at a time, at 4
    bytes a pixel, of a progressive JPEG 8, of a WebP 16."""
    index_dir: str = setting("", identifies=False)
    """Folder of the index files of the data, of a store too; then one process writes and all read. Empty: the user's
    cache."""
    threads: int = setting(0, low=0, high=1024, identifies=False, aliases=("workers", "num_workers"))
    """Threads of each process that read and decode; 0: one a core. More help where reading waits."""
    caption_fraction: float = setting(1.0, low=0.0, high=1.0)
    """Share of the training examples that keep their caption."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Puts the modalities in order; refuses sizes, channels, crops and names that cannot work."""
        data = config.data
        modalities = tuple(data.modalities)
        if not modalities or not set(modalities) <= set(MODALITIES) or len(set(modalities)) != len(modalities):
            raise UserError(f"data.modalities={modalities!r}: a non-empty choice of 'image' and 'text'")
        data.modalities = tuple(m for m in MODALITIES if m in modalities)
        if data.epoch_source and data.epoch_source not in data.mixture:
            raise UserError(one_of("data.epoch_source", data.epoch_source, tuple(data.mixture)))
        for name, least in (("image_mean", -math.inf), ("image_std", 0.0)):
            if len(data[name]) != 3 or not all(value > least for value in data[name]):
                raise UserError(f"data.{name}={data[name]!r}: 3 positive numbers")
        check_crops(data, path)
        if data.image_size % data.patch_size:
            raise UserError(f"data.image_size={data.image_size} is not divisible by data.patch_size={data.patch_size}")


def check_crops(group: ConfigDict, path: str) -> None:
    """Refuses crops that are no range of shares or of ratios.

    Raises:
        UserError: as said.
    """
    for name, most in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
        value = group[name]
        if len(value) != 2 or not all(number > 0 for number in value):
            raise UserError(f"{path}.{name}={value!r}: 2 positive numbers")
        if not value[0] <= value[1] <= most:
            raise UserError(f"{path}.{name}={value!r}: (least, most), shares of the picture at most 1")
