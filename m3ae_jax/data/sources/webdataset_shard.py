"""What one shard of a WebDataset holds: its members by key, paired, and what of their contents goes into the index."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from m3ae_jax.data.sources.base import IMAGE_EXTENSIONS, MAX_BYTES
from m3ae_jax.data.sources.files import File, ReadAhead, open_file
from m3ae_jax.data.sources.index import Shard, Tally
from m3ae_jax.data.sources.tar import BLOCK, Damaged, check_is_tar, members, name_at

FORMS = (
    "it takes a folder of .tar shards, a glob, a range or one file, or several separated by commas, "
    "e.g. 'cc12m/{00000..00012}.tar'"
)

IMAGE, TEXT, FIELDS, LABEL = "image", "text", "fields", "label"
IMAGE_ENDINGS = tuple(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)
TXT, JSON, CLS = "txt", "json", "cls"
USUAL_ROLES = {**dict.fromkeys(IMAGE_ENDINGS, IMAGE), TXT: TEXT, JSON: FIELDS, CLS: LABEL}

COLUMNS = 7
"""Of a shard's rows: offset (0: there is none) and size of the picture, the .txt and the .json, and the class."""
NO_LABEL = -1
"""The class of an example without one; of a word it is -2 - offset of the member that holds it."""
NO_CLASS = "label that is no class number"
"""What is counted of other labels."""
NO_FIELD = -1
"""In place of the number of captions of a .json that has no such field."""

_IRREGULAR = "not a regular file"  # in place of a role, of a link and the like; and what is counted of it

_log = logging.getLogger("m3ae_jax")


# --- names -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Members:
    """What the members are, by their endings.

    Attributes:
        roles: ``image``, ``text``, ``fields`` (of a JSON) or ``label``, by ending in lower case.
        captions_in_fields: whether a JSON may hold the caption.
        alone: ``image`` takes every picture without a caption, ``text`` every caption without a picture.
    """

    roles: Mapping[str, str]
    captions_in_fields: bool = True
    alone: str = ""

    @property
    def kind(self) -> str:
        """Of the index."""
        usual = self.roles == USUAL_ROLES and self.captions_in_fields
        others = [] if usual else [short((sorted(self.roles.items()), self.captions_in_fields))]
        return "_".join(["webdataset", *[self.alone] * bool(self.alone), *others])

    def ending(self, role: str) -> str:
        """The first one of a role; empty where there is none."""
        return next((ending for ending, of in self.roles.items() if of == role), "")

    def split(self, base: str) -> tuple[str, str] | None:
        """Key and ending of a base name; None where it is hidden or no ending of it is known."""
        dot = base.find(".")
        while dot > 0:
            ending = base[dot + 1 :].lower()
            if ending in self.roles:
                return base[:dot], ending
            dot = base.find(".", dot + 1)
        return None


def short(value: object) -> str:
    """A hash of what `repr` gives, for names of indices."""
    return hashlib.sha256(repr(value).encode("utf-8", "replace")).hexdigest()[:8]


# --- the contents of members -------------------------------------------------------------------------------


def parse(data: bytes) -> dict[str, Any]:
    """The fields of a .json; none where it is no JSON, or no object."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        return {}
    return fields if isinstance(fields, dict) else {}


def captions_in(fields: Mapping[str, Any], key: str) -> list[bytes]:
    """The captions of a field: a text, or those of a list that are texts."""
    value = fields.get(key)
    captions = value if isinstance(value, list) else [value]
    return [caption.encode("utf-8", "replace") for caption in captions if isinstance(caption, str)]


def _no_captions(value: Any) -> list[str]:
    """What is counted of the values of a list that are no captions; of a list without any caption nothing."""
    if not isinstance(value, list) or not any(isinstance(one, str) for one in value):
        return []
    kinds = ("null" if one is None else "no text" for one in value if not isinstance(one, str))
    return [f"{kind} in a list of captions" for kind in kinds]


def lines_of(data: bytes) -> list[bytes]:
    r"""The captions of a .txt with one a line, in which ``\n`` stands for a line's end; without any an empty one."""
    lines = [line.strip() for line in data.split(b"\n")]
    return [line.replace(rb"\n", b"\n") for line in lines if line] or [b""]


def class_number(value: Any) -> int | None:
    """The class that a JSON's value is: a whole number from 0; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        return None
    return int(value) if value == int(value) else None


def is_class(value: Any) -> bool:
    """Whether it is a class number."""
    return class_number(value) is not None


def _label_at(file: File, offset: int, size: int) -> tuple[int, bool]:
    """The class of a .cls as in the index, and whether it is one: a word may be the name of a class."""
    text = file.read(offset, size).decode("utf-8", "replace").strip() if size <= BLOCK else ""
    try:
        number = class_number(float(text))
    except ValueError:
        return (-2 - offset, True) if text else (NO_LABEL, False)
    return (NO_LABEL, False) if number is None else (number, True)


def class_name(file: File, label: int) -> str:
    """The text of a .cls by its place in the index; its block is filled up with zeros."""
    return file.read_up_to(-2 - label, BLOCK).rstrip(b"\0").decode("utf-8", "replace").strip()


def _name_code(name: str) -> int:
    """A number for a class's name, until all names are known."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:7], "big")


# --- one shard ---------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A member of an example; `run` numbers the stretches of neighbouring members with the same key."""

    role: str
    ending: str
    run: int
    offset: int
    size: int
    name: str


class _Unread(dict[str, list[Any]]):
    """How often members and fields occur that are not read, with the first name: `Tally.ignore` costs more."""

    def count(self, kind: str, name: str) -> None:
        """Counts one."""
        self.setdefault(kind, [0, name])[0] += 1

    def tell(self, tally: Tally) -> None:
        """Adds all."""
        for kind, (count, name) in self.items():
            tally.ignore(kind, name, count)


def scan(path: str, spec: Members) -> Shard:
    """Reads one shard's headers and pairs its members.

    Raises:
        UserError: it is no uncompressed tar.
    """
    tally, unread = Tally(os.path.basename(path)), _Unread()
    file = open_file(path)
    reader = ReadAhead(file)
    if file.size:  # an empty file is a shard cut off at once
        check_is_tar(path, reader.read(0, BLOCK), FORMS)
    keys = _collect(path, reader, file.size, spec, tally, unread)
    _join_double_endings(keys, spec)
    grouped = all(len({part.run for part in parts}) == 1 for parts in keys.values() if not _repeats(parts))
    rows = []
    for key, parts in keys.items():
        if _is_inside(key, keys, parts):
            for part in parts:
                unread.count(f"member {part.name[len(_stem(key)) :]}", part.name)
            continue
        row = _pair(_first_sample(parts, grouped, tally) if _repeats(parts) else parts, file, spec, tally, unread)
        if row is not None:
            rows.append(row)
    rows.sort(key=lambda row: (row[0], row[2] or row[4]))
    unread.tell(tally)
    table = np.array(rows, np.int64).reshape(len(rows), COLUMNS)
    return Shard(file.size, file.mtime_ns, table, tally.skipped, grouped, tally.unused)


def _collect(
    path: str, reader: ReadAhead, size: int, spec: Members, tally: Tally, unread: _Unread
) -> dict[str, list[_Part]]:
    """The members of a shard that have a role, by key, in the order of the tar."""
    parts: dict[str, list[_Part]] = {}
    run, last_key, stem_run, last_stem = 0, None, 0, None
    try:
        for member in members(reader, size):
            if member.name.startswith("/") or ".." in member.name.split("/"):
                tally.add("unsafe name", member.name)
                continue
            folder, slash, base = member.name.rpartition("/")
            stem = folder + slash + base.partition(".")[0]
            if stem != last_stem:
                stem_run, last_stem = stem_run + 1, stem
            named = spec.split(base)
            if named is None:
                unread.count(_unknown(base) if member.regular else _IRREGULAR, member.name)
                continue
            key, ending = folder + slash + named[0], named[1]
            if key != last_key:
                run, last_key = run + 1, key
            # Members of a key with dots may lie between those of the key before its first dot.
            role = spec.roles[ending] if member.regular else _IRREGULAR
            part = _Part(role, ending, stem_run if key == stem else run, *member[2:], member.name)
            parts.setdefault(key, []).append(part)
    except Damaged as error:
        _log.warning("webdataset: %s: %s; the whole pairs before that are used", path, error)
        tally.add("damaged shard", str(error))
    return parts


def _unknown(base: str) -> str:
    if base.startswith("."):
        return "hidden member"
    ending = os.path.splitext(base)[1].lower()
    return f"member {ending or 'without an ending'}"


def _stem(key: str) -> str:
    """A key up to the first dot of its base name."""
    folder, slash, base = key.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _join_double_endings(keys: dict[str, list[_Part]], spec: Members) -> None:
    """Puts the members of ``a.jpg``, as ``a.jpg.txt``, to those of ``a``, where the picture is ``a.jpg``."""
    endings = {ending for ending, role in spec.roles.items() if role == IMAGE}
    for key in [key for key in keys if key.rpartition(".")[2].lower() in endings]:
        shorter, _, ending = key.rpartition(".")
        has_picture = any(part.role == IMAGE for part in keys[key])
        others = {part.ending: part.run for part in keys.get(shorter, ())}
        run = others.get(ending.lower())
        if run is not None and not has_picture and not any(part.ending in others for part in keys[key]):
            parts = [*keys[shorter], *(part._replace(run=run) for part in keys.pop(key))]
            keys[shorter] = sorted(parts, key=lambda part: part.offset)


def _is_inside(key: str, keys: Mapping[str, list[_Part]], parts: list[_Part]) -> bool:
    """Whether ``a.seg.png`` is something more of the example ``a``, and none of its own."""
    return not all(_halves(parts)) and (stem := _stem(key)) != key and stem in keys


def _repeats(parts: list[_Part]) -> bool:
    """Whether a key's members must come from more than one sample."""
    if len(parts) == 1:
        return False
    pictures = {part.run for part in parts if part.role == IMAGE}
    return len(pictures) > 1 or len({part.ending for part in parts}) < len(parts)


def _first_sample(parts: list[_Part], grouped: bool, tally: Tally) -> list[_Part]:
    """The first whole sample of a repeated key, or nothing where samples cannot be told apart.

    A sample is a stretch of neighbours without a repeated ending. That says nothing in a shard whose
    keys are not grouped, nor where a picture and a caption are left over, which may belong together.
    """
    samples = [[parts[0]]]
    for part in parts[1:]:
        last = samples[-1]
        if part.run != last[-1].run or part.ending in {other.ending for other in last}:
            samples.append([])
        samples[-1].append(part)
    whole = [sample for sample in samples if all(_halves(sample))]
    rest = [part for sample in samples if not all(_halves(sample)) for part in sample]
    selected = whole[0] if whole and grouped and not all(_halves(rest)) else []
    pictures = sum(_halves(sample)[0] for sample in samples)
    tally.add("duplicate key", parts[0].name, max(pictures - bool(selected), 1))
    return selected


def _halves(parts: list[_Part]) -> tuple[bool, bool]:
    """Whether there is a picture, and whether there is what may hold a caption."""
    roles = {part.role for part in parts}
    return IMAGE in roles, bool(roles & {TEXT, FIELDS})


def _pair(parts: list[_Part], file: File, spec: Members, tally: Tally, unread: _Unread) -> tuple[int, ...] | None:
    """The row of one sample, or None (counted once) where it has no picture or no caption (see `Members.alone`)."""
    if not parts:
        return None
    first: dict[str, _Part] = {}
    for part in parts:
        if first.setdefault(part.role, part) is not part and part.role == IMAGE:
            unread.count(f"member .{part.ending}", part.name)
    has_caption = TEXT in first or (FIELDS in first and spec.captions_in_fields)
    lacks_image = IMAGE not in first and spec.alone != "text"
    lacks_caption = not has_caption and spec.alone != "image"
    if _IRREGULAR in first and (lacks_image or lacks_caption):
        tally.add(_IRREGULAR, first[_IRREGULAR].name)
        return None
    if IMAGE not in first and not has_caption:
        for part in parts:
            unread.count(f"member .{part.ending}", part.name)
        return None
    if lacks_image or lacks_caption:
        tally.add("no image" if IMAGE not in first else "no caption", parts[0].name)
        return None
    for part in parts:
        if part.role == _IRREGULAR:
            unread.count(_IRREGULAR, part.name)
    row = [place for role in (IMAGE, TEXT, FIELDS) for place in (first[role][3:5] if role in first else (0, 0))]
    label, known = NO_LABEL, True
    if LABEL in first:
        label, known = _label_at(file, *first[LABEL][3:5])
    if not known:
        unread.count(NO_CLASS, first[LABEL].name)
    return (*row, label)


# --- the contents of a shard's JSON and text members --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Contents:
    """What of the contents is read for the index.

    Attributes:
        caption: the JSON's field of the caption; empty: none is known.
        before_text: whether that field is read in place of a .txt.
        label: the JSON's field of the class; empty: none.
        words: whether the .cls hold names.
        lines: whether the lines of the .txt are counted.
        all_fields: whether every JSON is read, to find the class or to name its fields.
    """

    caption: str = ""
    before_text: bool = False
    label: str = ""
    words: bool = False
    lines: bool = False
    all_fields: bool = False

    def takes_fields(self, rows: np.ndarray, spec: Members) -> np.ndarray:
        """Whose caption is to be in the JSON, `[n] bool`, of rows of the index."""
        if not spec.captions_in_fields or spec.alone == "image":
            return np.zeros(len(rows), np.bool_)
        return self.before_text | ((rows[:, 4] > 0) & ((rows[:, 2] == 0) | (rows[:, 3] == 0)))


def scan_contents(path: str, known: Mapping[str, Shard], spec: Members, contents: Contents) -> Shard:
    """For each row of a shard's index the number of captions and the class, `[n, 2] int64`.

    The number is `NO_FIELD` where the .json has no field of captions; of classes that are words there are codes.
    """
    shard, file = known[path], open_file(path)
    if (file.size, file.mtime_ns) != (shard.size, shard.mtime_ns):
        raise OSError(f"{path}: changed while it was indexed; start again")
    tally, unread = Tally(os.path.basename(path)), _Unread()
    takes = contents.takes_fields(shard.rows, spec).tolist()
    found = [
        _content(file, row, takes_fields, contents, unread)
        for row, takes_fields in zip(shard.rows.tolist(), takes, strict=True)
    ]
    unread.tell(tally)
    return Shard(file.size, file.mtime_ns, np.array(found, np.int64).reshape(-1, 2), unused=tally.unused)


def _content(file: File, row: list[int], takes_fields: bool, contents: Contents, unread: _Unread) -> tuple[int, int]:
    _, _, text, text_size, place, size, label = row
    captions, fields = 1, dict[str, Any]()
    if place and size <= MAX_BYTES and (takes_fields or contents.all_fields):
        fields = parse(file.read(place, size))
        read = {contents.label, contents.caption if takes_fields else ""}
        kinds = [f"json field {name}" for name in fields.keys() - read]
        for kind in kinds + (_no_captions(fields.get(contents.caption)) if takes_fields else []):
            unread.count(kind, "" if kind in unread else name_at(file, place))
    if takes_fields and size <= MAX_BYTES:
        captions = len(captions_in(fields, contents.caption)) if contents.caption in fields else NO_FIELD
    elif contents.lines and text and text_size <= MAX_BYTES:
        captions = len(lines_of(file.read(text, text_size)))
    if contents.label:
        number = class_number(fields.get(contents.label))
        if number is None and fields.get(contents.label) is not None:
            unread.count(NO_CLASS, "" if NO_CLASS in unread else name_at(file, place))
        label = NO_LABEL if number is None else number
    elif contents.words and label < NO_LABEL:
        label = _name_code(class_name(file, label))
    return captions, label
