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
    """How a source is read, besides its path; each format uses what applies to it.

    Attributes:
        split: of formats with named splits.
        image_key: the field or column of the picture's bytes; empty: the first of `USUAL_KEYS` that is there.
        caption_key: of the caption, likewise.
        label_key: of the class, likewise.
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


USUAL_KEYS: dict[str, tuple[str, ...]] = {
    "image": ("image", "jpg", "jpeg", "png", "webp", "image/encoded", "image_bytes", "img"),
    "caption": ("caption", "captions", "txt", "text", "caption/text", "title", "alt_text"),
    "label": ("label", "labels", "class", "image/class/label", "cls"),
}
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


def find_key(
    kind: str, options: SourceOptions, names: Iterable[str], where: str, usual: Sequence[str] | None = None
) -> str | None:
    """The name of a field: the one that the options name, or the first usual one that is there, or None.

    Args:
        kind: ``image``, ``caption`` or ``label``.
        options: with `image_key`, `caption_key` or `label_key`.
        names: those that are there.
        where: the file, for the message.
        usual: names that are tried where the options name none; by default those of `USUAL_KEYS`.

    Raises:
        UserError: what the options name is not there.
    """
    wanted, names = getattr(options, f"{kind}_key"), list(names)
    if not wanted:
        return next((name for name in usual or USUAL_KEYS[kind] if name in names), None)
    if wanted in names:
        return str(wanted)
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"data.*.{kind}_key={wanted!r}: {where} has only {', '.join(sorted(names)) or 'no fields'}{hint}")


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
        """Reads examples, in the order of `indices`.

        Must be safe to call from several threads at once.

        Args:
            indices: `[n] int64`, each in `[0, len(self))`.

        Raises:
            OSError: the storage failed (a content error never raises: the bytes are returned as they are).
        """
