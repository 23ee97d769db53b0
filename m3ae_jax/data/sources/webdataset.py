"""WebDataset tar shards, as img2dataset writes them: KEY.jpg + KEY.txt and/or KEY.json.

The shards are indexed once: one pass over the tar headers records where each picture and each caption lies,
and from then on example i is two `pread` calls. Nothing is ever extracted to disk.

A member's key is its path up to the first dot of the base name; the rest, lowercased, is its extension. An
example is a picture (the first member of its key with a picture's extension) and a caption (the .txt, or the
.json where there is no .txt or it is of zero bytes; its field may be a list of several captions). What cannot be used
is left out and counted by reason.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from m3ae_jax.data.sources.base import Record, SourceOptions, several
from m3ae_jax.data.sources.concatenated import ConcatenatedSource
from m3ae_jax.data.sources.files import ReadAhead, expand, file_cache, gzip_line, open_file
from m3ae_jax.data.sources.index import Index, Shard, Tally, caption_rows, left_out, report
from m3ae_jax.errors import UserError

_IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
_CAPTION_EXTENSIONS = frozenset({"txt", "json"})
_KIND_TXT, _KIND_JSON, _KIND_NONE = 0, 1, 2

_INDEX_VERSION = 1

_BLOCK = 512
_ZERO_BLOCK = bytes(_BLOCK)
_TAR_REGULAR = b"0\0" + b"7"  # 7 is "contiguous", stored as a regular file
_TAR_LONG_NAME, _TAR_PAX, _TAR_GNU_SPARSE, _TAR_DIRECTORY = b"L", b"x", b"S", b"5"
_TAR_NO_DATA = b"123456"  # links, devices, directories, FIFOs: their size field counts no blocks
_PAX_RECORD = re.compile(rb"(\d{1,18}) ([^=]+)=")

_FORMS = (
    "it takes a folder of .tar shards, a glob, a range or one file, or several separated by commas, "
    "e.g. 'cc12m/{00000..00012}.tar'"
)

_log = logging.getLogger("m3ae_jax")


class WebDatasetSource(ConcatenatedSource):
    """Pairs of picture and caption in local tar shards, by index.

    Examples are in the order of the shards (as given; a folder's or glob's sorted by name), then in the
    order of the pictures within a shard. A caption of zero bytes is a caption: the example stays. A .json that does
    not parse, or whose caption is missing or no string, gives an empty caption.

    Attributes:
        modalities: `("image", "text")`; where no shard holds a pair `("image",)`, or without pictures `("text",)`.
        fingerprint: hash of the shards' base names and sizes and of all offsets (not of times of change), so
            that two copies of the data have the same.
        report: how many examples there are, and what was left out.
    """

    modalities: tuple[str, ...] = ("image", "text")

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Opens the shards, indexing those that are new or changed.

        Args:
            path: a folder (all its `*.tar`), a glob, a range as `{00000..00012}.tar`, one file, or several of
                these separated by commas. A shard named twice counts once.
            options: `caption_key` is the field of the .json that holds the caption, by default ``caption``; with
                ``captions="all"`` every caption of a list is an example (the .json are then read once, for the index).

        Raises:
            UserError: `path` names no shard, or a file that is no tar, or there is no pair in it.
            OSError: a shard cannot be read.
        """
        self._paths = expand(path, r"\.tar", _FORMS)
        self._caption_key = caption_key = options.caption_key or "caption"
        index = Index("webdataset", _INDEX_VERSION, 5, _scan, options.cache_dir)
        self._each = options.captions == "all"
        if self._each:
            kind = "webdataset_all_" + hashlib.sha256(caption_key.encode()).hexdigest()[:8]
            index = Index(kind, _INDEX_VERSION, 6, lambda path: _scan_all(path, caption_key), options.cache_dir)
        shards = index.shards(self._paths)
        self.report = report(shards)
        alone = [f"no {half}" for half in ("caption", "image") if f"no {half}" in self.report.skipped]
        if not self.report.examples and alone:  # not one pair: pictures alone, or texts alone
            self._each, wanted = False, "image" if alone[0] == "no caption" else "text"
            self.modalities = (wanted,)
            scan = functools.partial(_scan, alone=wanted)
            index = Index(f"webdataset_{wanted}", _INDEX_VERSION, 5, scan, options.cache_dir)
            shards = index.shards(self._paths)
            self.report = report(shards)
        if not self.report.examples:
            raise UserError(
                f"data.*.path={path!r} holds no KEY.jpg (png, ...) with a KEY.txt or KEY.json{left_out(self.report)}"
            )
        self._rows = [shard.rows for shard in shards]
        self._number_examples(map(len, self._rows))
        uses_json = any((rows[:, 4] == _KIND_JSON).any() for rows in self._rows)
        self.fingerprint = index.fingerprint(self._paths, shards, *([caption_key] if uses_json else []))
        self._open = file_cache()

    def _read_part(self, part: int, rows: np.ndarray) -> list[Record]:
        opened = self._open(self._paths[part])
        records: list[Record] = []
        for row in self._rows[part][rows].tolist():
            image_offset, image_size, caption_offset, caption_size, kind = row[:5]
            record = Record()
            if kind != _KIND_NONE:
                captions = [opened.read(caption_offset, caption_size)]
                if kind == _KIND_JSON:
                    captions = _json_captions(captions[0], self._caption_key)
                record = several(captions[row[5] : row[5] + 1] if self._each else captions)
            if "image" in self.modalities:
                record["image"] = opened.read(image_offset, image_size)
            records.append(record)
        return records


def _json_captions(data: bytes, key: str) -> list[bytes]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        return []
    value = fields.get(key) if isinstance(fields, dict) else None
    captions = value if isinstance(value, list) else [value]
    return [caption.encode("utf-8", "replace") for caption in captions if isinstance(caption, str)]


# --- one shard ---------------------------------------------------------------------------------------------


class _Damaged(Exception):
    """The archive makes no sense from here on; what came before is whole."""


class _Member(NamedTuple):
    name: str
    regular: bool
    offset: int
    size: int


class _Part(NamedTuple):
    """A picture or a caption; `run` numbers the stretches of neighbouring members with the same key."""

    extension: str
    run: int
    offset: int
    size: int
    name: str


def _scan(path: str, alone: str = "") -> Shard:
    """Reads one shard's headers and pairs its members.

    Args:
        path: the shard.
        alone: ``image`` takes every picture without a caption, ``text`` every caption without a picture.

    Raises:
        UserError: it is no uncompressed tar.
    """
    tally = Tally(os.path.basename(path))
    file = open_file(path)
    reader = ReadAhead(file)
    if file.size:  # an empty file is a shard cut off at once
        _check_is_tar(path, reader.read(0, _BLOCK))
    keys = _collect(path, reader, file.size, tally)
    grouped = all(len({part.run for part in parts}) == 1 for parts in keys.values() if not _repeats(parts))
    rows = []
    for parts in keys.values():
        row = _pair(_first_sample(parts, grouped, tally) if _repeats(parts) else parts, tally, alone)
        if row is not None:
            rows.append(row)
    table = np.array(sorted(rows), np.int64).reshape(len(rows), 5)
    return Shard(file.size, file.mtime_ns, table, tally.skipped, grouped)


def _scan_all(path: str, caption_key: str) -> Shard:
    """As `_scan`, with a row for each caption; its number is a sixth column."""
    shard, file = _scan(path), open_file(path)
    counts = [
        len(_json_captions(file.read(offset, size), caption_key)) if kind == _KIND_JSON else 1
        for _, _, offset, size, kind in shard.rows.tolist()
    ]
    return dataclasses.replace(shard, rows=caption_rows(shard.rows, np.array(counts, np.int64)))


def _check_is_tar(path: str, start: bytes) -> None:
    try:
        if start != _ZERO_BLOCK:
            _parse_header(start)
    except _Damaged:
        no_tar = f"data.*.path: {path} is not a tar file; {_FORMS}"
        raise UserError(gzip_line(path) if start.startswith(b"\x1f\x8b") else no_tar) from None


def _collect(path: str, reader: ReadAhead, size: int, tally: Tally) -> dict[str, list[_Part]]:
    """The pictures and captions of a shard by key, in the order of the tar."""
    parts: dict[str, list[_Part]] = {}
    run, last_key = 0, None
    try:
        for member in _members(reader, size):
            if not member.regular:
                tally.add("not a regular file", member.name)
                continue
            if member.name.startswith("/") or ".." in member.name.split("/"):
                tally.add("unsafe name", member.name)
                continue
            folder, slash, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key, extension = folder + slash + stem, extension.lower()
            if key != last_key:
                run, last_key = run + 1, key
            if stem and (extension in _IMAGE_EXTENSIONS or extension in _CAPTION_EXTENSIONS):
                part = _Part(extension, run, member.offset, member.size, member.name)
                parts.setdefault(key, []).append(part)
    except _Damaged as error:
        _log.warning("webdataset: %s: %s; the whole pairs before that are used", path, error)
        tally.add("damaged shard", str(error))
    return parts


def _repeats(parts: list[_Part]) -> bool:
    """Whether a key's members must come from more than one sample."""
    if len(parts) == 1:
        return False
    pictures = {part.run for part in parts if part.extension in _IMAGE_EXTENSIONS}
    return len(pictures) > 1 or len({part.extension for part in parts}) < len(parts)


def _first_sample(parts: list[_Part], grouped: bool, tally: Tally) -> list[_Part]:
    """The first whole sample of a repeated key, or nothing where samples cannot be told apart.

    A sample is a stretch of neighbours without a repeated extension. That says nothing in a shard whose
    keys are not grouped, nor where a picture and a caption are left over, which may belong together.
    """
    samples = [[parts[0]]]
    for part in parts[1:]:
        last = samples[-1]
        if part.run != last[-1].run or part.extension in {other.extension for other in last}:
            samples.append([])
        samples[-1].append(part)
    whole = [sample for sample in samples if all(_roles(sample))]
    rest = [part for sample in samples if not all(_roles(sample)) for part in sample]
    selected = whole[0] if whole and grouped and not all(_roles(rest)) else []
    pictures = sum(_roles(sample)[0] for sample in samples)
    tally.add("duplicate key", parts[0].name, max(pictures - bool(selected), 1))
    return selected


def _roles(parts: list[_Part]) -> tuple[bool, bool]:
    """Whether there is a picture, and whether there is a caption."""
    pictures = sum(part.extension in _IMAGE_EXTENSIONS for part in parts)
    return pictures > 0, pictures < len(parts)


def _pair(parts: list[_Part], tally: Tally, alone: str = "") -> tuple[int, int, int, int, int] | None:
    """The row of one sample, or None (counted) where it has no picture or no caption (`alone`: see `_scan`)."""
    if not parts:
        return None
    image = next((part for part in parts if part.extension in _IMAGE_EXTENSIONS), None)
    captions = {part.extension: part for part in parts if part.extension in _CAPTION_EXTENSIONS}
    if image is not None and not captions and alone == "image":
        return image.offset, image.size, 0, 0, _KIND_NONE
    if (image is None and alone != "text") or not captions:
        tally.add("no image" if image is None else "no caption", parts[0].name)
        return None
    image = image or _Part("", 0, 0, 0, "")
    text, fields = captions.get("txt"), captions.get("json")
    if text is not None and (text.size or fields is None):
        return image.offset, image.size, text.offset, text.size, _KIND_TXT
    assert fields is not None
    return image.offset, image.size, fields.offset, fields.size, _KIND_JSON


# --- tar headers (POSIX.1-1988 ustar, POSIX.1-2001 pax, and GNU's long names) ------------------------------
# Python's tarfile takes about 60 us a member, under the interpreter's lock: half an hour for 12M pairs.


def _members(reader: ReadAhead, end: int) -> Iterator[_Member]:
    """The members of a tar but its directories, reading nothing but headers.

    Raises:
        _Damaged: a header is none, or the file ends before the archive does.
    """
    position, long_name, pax = 0, None, dict[bytes, bytes]()
    while (header := reader.read(position, _BLOCK)) != _ZERO_BLOCK:
        name, size, kind = _parse_header(header)
        offset = position + _BLOCK
        if b"size" in pax:
            size = int(pax[b"size"])
        if kind in _TAR_NO_DATA:
            size = 0
        if kind == _TAR_GNU_SPARSE:
            offset += _sparse_map_size(reader, header, offset)
        position = offset + -(-size // _BLOCK) * _BLOCK
        if offset + size > end:
            raise _Damaged(f"cut off after {end} bytes")
        if kind == _TAR_LONG_NAME:
            long_name = reader.read(offset, size).partition(b"\0")[0]
        elif kind == _TAR_PAX:
            pax = _parse_pax(reader.read(offset, size))
        elif kind not in b"gK":  # g: defaults for all members, K: a link's long target
            name = pax.get(b"path") or long_name or name
            regular = kind in _TAR_REGULAR and not any(key.startswith(b"GNU.sparse") for key in pax)
            if kind != _TAR_DIRECTORY and not name.endswith(b"/"):
                yield _Member(name.decode("utf-8", "surrogateescape"), regular, offset, size)
            long_name, pax = None, {}


def _parse_header(header: bytes) -> tuple[bytes, int, bytes]:
    """A header's name, size in bytes and type flag."""
    if len(header) < _BLOCK:
        raise _Damaged("cut off: there is no end-of-archive mark")
    try:
        # A size of 8 GiB or more does not fit octal digits: GNU sets the top bit and stores it in binary.
        large = header[124] & 0x80
        size = int.from_bytes(header[125:136], "big") if large else _octal(header[124:136])
        # The checksum is taken with its own field read as eight spaces.
        valid = sum(header) - sum(header[148:156]) + 8 * ord(" ") == _octal(header[148:156]) and size >= 0
    except ValueError:
        valid = False
    if not valid:
        raise _Damaged("a damaged header")
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name, size, header[156:157]


def _octal(field: bytes) -> int:
    return int(field.strip(b" \0") or b"0", 8)


def _parse_pax(data: bytes) -> dict[bytes, bytes]:
    """The records `LENGTH KEY=VALUE\\n` of an extended header."""
    fields, position = {}, 0
    while (match := _PAX_RECORD.match(data, position)) is not None:
        length = int(match[1])
        if length < len(match[0]) + 1:
            raise _Damaged("a damaged pax header")
        fields[match[2]] = data[match.end() : position + length - 1]
        position += length
    size = fields.get(b"size", b"0")
    if not size.isdigit() or len(size) > 18:
        raise _Damaged("a damaged pax header")
    return fields


def _sparse_map_size(reader: ReadAhead, header: bytes, position: int) -> int:
    """Bytes of the further blocks of a GNU sparse file's map, each of which says whether one more follows."""
    size, more = 0, header[482]
    while more:
        block = reader.read(position + size, _BLOCK)
        if len(block) < _BLOCK:
            raise _Damaged("cut off within a sparse file's map")
        size, more = size + _BLOCK, block[504]
    return size
