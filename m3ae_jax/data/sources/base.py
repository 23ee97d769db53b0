"""What a source of examples is: random access by index, nothing more.

Order, replacement, augmentation and masking are the pipeline's (``data/pipeline.py``); a source only
answers "what is example i".
"""

from __future__ import annotations

from typing import Protocol, TypedDict

import numpy as np


class Record(TypedDict, total=False):
    """One example as stored.

    Attributes:
        image: the encoded picture's bytes (JPEG, PNG, WebP, BMP or GIF); absent in a text source.
        caption: UTF-8 bytes, possibly empty; absent in a source of pictures alone.
    """

    image: bytes
    caption: bytes


class Source(Protocol):
    """A finite list of examples read by index.

    Attributes:
        modalities: which of ``"image"``, ``"text"`` its records hold, in that order.
        fingerprint: a short hex string that changes when the content or its order changes.
    """

    modalities: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """See the class docstring."""

    def __len__(self) -> int:
        """Number of examples."""

    def read(self, indices: np.ndarray) -> list[Record]:
        """Reads examples, in the order asked for.

        Must be safe to call from several threads at once.

        Args:
            indices: `[n] int64`, each in `[0, len(self))`.

        Raises:
            OSError: the storage failed (a content error never raises: the bytes are returned as they are).
        """
