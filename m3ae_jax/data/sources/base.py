"""What a source of examples is: random access by index, nothing more.

Order, replacement, augmentation and masking are the pipeline's (``data/pipeline.py``); a source only
answers "what is example i".
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, TypedDict, TypeVar

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.errors import UserError

if TYPE_CHECKING:
    from m3ae_jax.data.sources.index import IndexReport

S = TypeVar("S")

MODALITIES = ("image", "text")
CAPTIONS = ("draw", "all")
MAX_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class SourceOptions(FieldGroup):
    """How a source is read, besides its path; a format refuses what does not apply to it (`Source.uses`).

    Attributes:
        split: of formats with named splits.
        image_key: the field or column of the picture's bytes; empty: the first of `USUAL_KEYS` that is there.
        caption_key: of the caption, likewise.
        label_key: of the class, likewise.
        captions: of a picture with several captions: ``draw``, one at each draw; ``all``, an example each.
        template: makes a caption of a class name where there is no other, as ``a photo of a {}``; empty: none.
        caption_per_line: of a caption file of several lines, each line is a caption.
        group_key: of the field or column that says which examples belong together; empty: none.
        max_bytes: of one picture, caption or record; a larger one is not read.
        index_dir: folder of the index files, or one of a store; empty: in the user's cache.
    """

    split: str = setting("train")
    """Of scenes (train, val, val_novel), of tfds, and of files and folders named by splits."""
    image_key: str = setting("")
    """Field or column of the picture; empty: the usual names."""
    caption_key: str = setting("")
    """Field or column of the caption; empty: the usual names."""
    label_key: str = setting("")
    """Field or column of the class; empty: the usual names."""
    captions: str = setting("draw", choices=CAPTIONS)
    """Of a picture with several: draw, one each time; all, an example each."""
    template: str = setting("")
    """Makes a caption of a class name: "a photo of a {}"."""
    caption_per_line: bool = setting(False)
    """Each line of a .txt is a caption of its own."""
    group_key: str = ""
    max_bytes: int = MAX_BYTES
    index_dir: str = ""


class SourceFields(SourceOptions):
    """One source in the config."""

    source: str = setting("webdataset", aliases=("format", "type"))
    """webdataset, tfrecord, array_record, hdf5, parquet, folder, class_folders, text, tfds, scenes or a "module:Class"
    of your own."""
    path: str = setting("", identifies=False, aliases=("dir", "data_dir", "data_path", "files"))
    """Files: a folder, a glob, DIR/{00000..00099}.tar, or several with commas; of tfds a name."""
    modalities: tuple[str, ...] = setting((), choices=MODALITIES)
    """Of a mixture: which of the source's modalities are used; empty: all."""
    weight: float = setting(1.0)
    """Of a mixture: the source's share of the examples."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Refuses a weight that is no share."""
        weight = functools.reduce(lambda group, name: group[name], path.split("."), config).weight
        if not weight > 0:
            raise UserError(f"{path}.weight={weight!r}: must be more than 0")


class HeldOutFields(SourceFields):
    """A source of examples that are not trained on."""

    split: str = setting("val")
    """As of data.train; where there is no val: validation, valid, dev or test."""


USUAL_KEYS: dict[str, tuple[str, ...]] = {
    "image": ("image", "jpg", "jpeg", "png", "webp", "image/encoded", "image_bytes", "img", "images"),
    "caption": ("caption", "captions", "txt", "text", "caption/text", "title", "alt_text", "texts", "comment"),
    "label": ("label", "labels", "class", "image/class/label", "cls"),
}
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp")


class Record(TypedDict, total=False):
    """One example as stored.

    Attributes:
        image: the encoded picture's bytes (JPEG, PNG, WebP, BMP or GIF); absent in a text source.
        caption: UTF-8 bytes, possibly empty. Absent in a source of pictures alone, and in the record of any other that
            has none (a null, a missing field): such an example is replaced where captions are trained, and counted.
        captions: where a picture has several and one is drawn each time: all of them; `caption` is then the first.
        label: class number, from 0; absent in a source without classes.
        group: of `SourceOptions.group_key`; absent where the record has none.
        unusable: one of `images.REASONS`, where the source knows why an example cannot be used; else absent.
    """

    image: bytes
    caption: bytes
    captions: tuple[bytes, ...]
    label: int
    group: str
    unusable: str


class NoClassesError(UserError):
    """What is named as labels holds no classes.

    Args:
        message: that refuses it, where the user named it.
        why: in few words, where it is only counted, as it has a usual name.
    """

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


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
        usual = usual or USUAL_KEYS[kind]
        by_lower = {name.lower(): name for name in reversed(names)}
        exact = next((name for name in usual if name in names), None)
        return exact or next((by_lower[name.lower()] for name in usual if name.lower() in by_lower), None)
    if wanted in names:
        return str(wanted)
    near = [name for name in names if name.lower() == wanted.lower()] or difflib.get_close_matches(wanted, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    group = "eval" if kind == "group" else "data.*"
    raise UserError(f"{group}.{kind}_key={wanted!r}: {where} has only {', '.join(sorted(names)) or 'no fields'}{hint}")


def several(captions: Sequence[bytes]) -> Record:
    """The caption part of a record: nothing where there is none."""
    record = Record(caption=captions[0]) if captions else Record()
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

    A class may further have:

        uses (frozenset of str): the options besides the path that it reads, of `OPTIONS`; others are refused where they
            are set. Without it all may be set.
        report (IndexReport): what of its files is no example, told at each start of a run.
        name (method of an index): what people call an example, as its picture's path.
        where (str): which data of the config it is, as ``data.train``; set where it is opened (`called`).
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


OPTIONS = ("split", "image_key", "caption_key", "label_key", "captions", "template", "caption_per_line", "group_key")
"""What `Source.uses` may name."""


def report_of(source: Source) -> IndexReport | None:
    """What of a source's files is no example; None where it does not say."""
    return getattr(source, "report", None)


def called(source: S, field: str) -> S:
    """A source that knows which data of the config it is (`where_of`): ``data.train.``."""
    if hasattr(source, "__dict__"):  # a class of the user's may have none
        vars(source)["where"] = field.strip(".-")
    return source


def where_of(source: Source) -> str:
    """Which data of the config a source is, for messages; its class where nobody has said it."""
    return getattr(source, "where", "") or type(source).__name__


def name_of(source: Source, index: int) -> str:
    """What people call an example; its number where the source does not say."""
    return str(source.name(index)) if hasattr(source, "name") else str(index)
