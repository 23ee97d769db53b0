"""What a source of examples is: random access by index, nothing more.

Order, replacement, augmentation and masking are the pipeline's (``data/pipeline.py``); a source only
answers "what is example i".
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import Protocol, TypedDict

import numpy as np

from m3ae_jax.errors import UserError

CAPTIONS = ("draw", "all")


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """What a source is told besides its path; each takes what it knows of.

    Attributes:
        split: of formats with named splits.
        image_key: the field or column of the picture's bytes; empty: the first that is there of `IMAGE_KEYS`.
        caption_key: of the caption; empty: the first of `CAPTION_KEYS`.
        label_key: of the class; empty: the first of `LABEL_KEYS`.
        captions: of a picture with several captions: ``draw``, one at each draw; ``all``, an example each.
        template: makes a caption of a class name where there is no other, as ``a photo of a {}``; empty: none.
        cache_dir: where an index goes that cannot be written beside its data.
    """

    split: str = "train"
    image_key: str = ""
    caption_key: str = ""
    label_key: str = ""
    captions: str = "draw"
    template: str = ""
    cache_dir: str | None = None


IMAGE_KEYS = ("image", "jpg", "jpeg", "png", "webp", "image/encoded", "image_bytes", "img")
CAPTION_KEYS = ("caption", "captions", "txt", "text", "caption/text", "title", "alt_text")
LABEL_KEYS = ("label", "labels", "class", "image/class/label", "cls")
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


class Record(TypedDict, total=False):
    """One example as stored.

    Attributes:
        image: the encoded picture's bytes (JPEG, PNG, WebP, BMP or GIF); absent in a text source.
        caption: UTF-8 bytes, possibly empty; absent in a source of pictures alone.
        captions: where a picture has several and one is drawn each time: all of them; `caption` is then the first.
        label: class number, from 0; absent in a source without classes.
    """

    image: bytes
    caption: bytes
    captions: tuple[bytes, ...]
    label: int


def find_key(wanted: str, usual: Sequence[str], found: Iterable[str], what: str, where: str) -> str | None:
    """The name of a field: `wanted`, or the first usual one that is there, or None.

    Args:
        wanted: what the user named; empty: nothing.
        usual: names that are tried then.
        found: names that are there.
        what: as ``data.*.image_key``, for the message.
        where: the file.

    Raises:
        UserError: what the user named is not there.
    """
    there = list(found)
    if not wanted:
        return next((name for name in usual if name in there), None)
    if wanted in there:
        return wanted
    near = difflib.get_close_matches(wanted, there, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{what}={wanted!r}: {where} has only {', '.join(sorted(there)) or 'no fields'}{hint}")


def several(captions: Sequence[bytes]) -> Record:
    """The caption part of a record."""
    record = Record(caption=captions[0] if captions else b"")
    if len(captions) > 1:
        record["captions"] = tuple(captions)
    return record


def class_captions(template: str, classes: Sequence[str]) -> tuple[bytes, ...]:
    """A caption for each class.

    Args:
        template: with ``{}`` where the name goes.
        classes: names; an underscore is read as a space.

    Raises:
        UserError: the template has no place for the name, or others.
    """
    try:
        captions = [template.format(name.replace("_", " ")) for name in classes]
        takes_names = template.format("a") != template.format("b")
    except (ValueError, LookupError, AttributeError):
        takes_names = False
    if not takes_names:
        raise UserError(f"data.*.template={template!r} must have one {{}} for the class's name, as 'a photo of a {{}}'")
    return tuple(caption.encode("utf-8", "surrogateescape") for caption in captions)


class Source(Protocol):
    """A finite list of examples read by index.

    Attributes:
        modalities: which of ``"image"``, ``"text"`` its records hold, in that order.
        fingerprint: a short hex string that changes when the content or its order changes.
        classes: names of the classes that `Record.label` numbers; empty in a source without classes.
    """

    modalities: tuple[str, ...]
    classes: tuple[str, ...]

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
