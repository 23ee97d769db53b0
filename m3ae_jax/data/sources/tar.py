"""The headers of tar files (POSIX.1-1988 ustar, POSIX.1-2001 pax, and GNU's long names): where each member lies.

Python's tarfile takes about 60 us a member, under the interpreter's lock: half an hour for 12M pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from m3ae_jax.data.sources.files import File, ReadAhead, gzip_line
from m3ae_jax.errors import UserError

BLOCK = 512
"""Headers and the data of each member start at multiples of these bytes."""

_ZERO_BLOCK = bytes(BLOCK)
_REGULAR = b"0\0" + b"7"  # 7 is "contiguous", stored as a regular file
_LONG_NAME, _PAX, _GNU_SPARSE, _DIRECTORY = b"L", b"x", b"S", b"5"
_NO_DATA = b"123456"  # links, devices, directories, FIFOs: their size field counts no blocks
_PAX_RECORD = re.compile(rb"(\d{1,18}) ([^=]+)=")
_MOST_NAMES = 2**20  # bytes of a long name or a pax header, which are read whole


class Damaged(Exception):
    """The archive makes no sense from here on; what came before is whole."""


class Member(NamedTuple):
    """A member's name, whether it is a regular file, and where its data lie."""

    name: str
    regular: bool
    offset: int
    size: int


def check_is_tar(path: str, start: bytes, forms: str) -> None:
    """Refuses what does not start as a tar.

    Args:
        path: the file.
        start: its first `BLOCK` bytes.
        forms: what is allowed, for the message.

    Raises:
        UserError: it is no tar, or a compressed one.
    """
    try:
        if start != _ZERO_BLOCK:
            _parse_header(start)
    except Damaged:
        no_tar = f"data.*.path: {path} is not a tar file; {forms}"
        raise UserError(gzip_line(path) if start.startswith(b"\x1f\x8b") else no_tar) from None


def name_at(file: File, offset: int) -> str:
    """The name of the member whose data lie there, as far as it fits the header before them (100 bytes)."""
    try:
        name, _, _ = _parse_header(file.read(offset - BLOCK, BLOCK))
    except (Damaged, OSError):
        return f"at byte {offset}"
    return name.decode("utf-8", "surrogateescape")


def members(reader: ReadAhead, end: int) -> Iterator[Member]:
    """The members of a tar but its directories, reading nothing but headers.

    Args:
        reader: of the file.
        end: its size in bytes.

    Raises:
        Damaged: a header is none, or the file ends before the archive does.
    """
    position, long_name, pax, zeros = 0, None, dict[bytes, bytes](), False
    while True:
        header = reader.read(position, BLOCK)
        if header == _ZERO_BLOCK:  # the end, unless another archive was appended, or a hole is in the file
            position, zeros = position + BLOCK, True
            continue
        if zeros and position >= end:
            return
        name, size, kind = _parse_header(header)
        offset = position + BLOCK
        if b"size" in pax:
            size = int(pax[b"size"])
        if kind in _NO_DATA:
            size = 0
        if kind == _GNU_SPARSE:
            offset += _sparse_map_size(reader, header, offset)
        if kind in (_LONG_NAME, _PAX) and size > _MOST_NAMES:
            raise Damaged(f"a name of {size:,} bytes")
        position = offset + -(-size // BLOCK) * BLOCK
        if offset + size > end:
            raise Damaged(f"cut off after {end} bytes")
        if kind == _LONG_NAME:
            long_name = reader.read(offset, size).partition(b"\0")[0]
        elif kind == _PAX:
            pax = _parse_pax(reader.read(offset, size))
        elif kind not in b"gK":  # g: defaults for all members, K: a link's long target
            name = pax.get(b"path") or long_name or name
            regular = kind in _REGULAR and not any(key.startswith(b"GNU.sparse") for key in pax)
            zeros = False
            if kind != _DIRECTORY and not name.endswith(b"/"):
                yield Member(name.decode("utf-8", "surrogateescape"), regular, offset, size)
            long_name, pax = None, {}


def _parse_header(header: bytes) -> tuple[bytes, int, bytes]:
    """A header's name, size in bytes and type flag."""
    if len(header) < BLOCK:
        raise Damaged("cut off: there is no end-of-archive mark")
    try:
        # A size of 8 GiB or more does not fit octal digits: GNU sets the top bit and stores it in binary.
        large = header[124] & 0x80
        size = int.from_bytes(header[125:136], "big") if large else _octal(header[124:136])
        # The checksum is taken with its own field read as eight spaces.
        valid = sum(header) - sum(header[148:156]) + 8 * ord(" ") == _octal(header[148:156]) and size >= 0
    except ValueError:
        valid = False
    if not valid:
        raise Damaged("a damaged header")
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
            raise Damaged("a damaged pax header")
        fields[match[2]] = data[match.end() : position + length - 1]
        position += length
    size = fields.get(b"size", b"0")
    if not size.isdigit() or len(size) > 18:
        raise Damaged("a damaged pax header")
    return fields


def _sparse_map_size(reader: ReadAhead, header: bytes, position: int) -> int:
    """Bytes of the further blocks of a GNU sparse file's map, each of which says whether one more follows."""
    size, more = 0, header[482]
    while more:
        block = reader.read(position + size, BLOCK)
        if len(block) < BLOCK:
            raise Damaged("cut off within a sparse file's map")
        size, more = size + BLOCK, block[504]
    return size
