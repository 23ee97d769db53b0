"""ArrayRecord files of `tf.train.Example`, by index.

An ArrayRecord holds the places of its records at its end, so nothing is walked; the library verifies a hash of
each record as it reads it. A file cut off anywhere has lost its places, and with them all its records.

How large a record is is known once it is read, so one above ``data.max_bytes`` is not left out at the start: it is
read, let go of at once and replaced when its turn comes. The records of a file that could hold such ones are read one
by one.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import zlib
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from m3ae_jax.data.sources.base import MAX_BYTES, SourceOptions
from m3ae_jax.data.sources.example_proto import ExampleSource, Payload
from m3ae_jax.data.sources.files import expand, gzip_line, is_remote, open_file
from m3ae_jax.data.sources.index import Shard, Tally
from m3ae_jax.data.sources.splits import MANIFEST
from m3ae_jax.errors import UserError

_ENDING = r"\.(array_record|arrayrecord)(-\d+-of-\d+)?"
_MAX_OPEN = 256  # readers; each has a descriptor
_READ_BYTES = 32 * 1024
_MANIFEST_BYTES = 64 * 2**20  # a larger one is none
_TAIL = 256 * 1024  # of a file; its last two blocks of 64 KiB hold the end of the list of places
_DAMAGED = "damaged file"
# The first 64 bytes of any such file (Riegeli/records file format, "File signature").
_SIGNATURE = bytes.fromhex(
    "83af70d10d884a3f" "0000000000000000" "4000000000000000" "91bac23c9287e1a9"
    "0000000000000000" "e19f13c0e9b1c372" "7300000000000000" "0000000000000000"
)  # fmt: skip

_FORMS = (
    "it takes a local folder of .array_record files (.arrayrecord, .array_record-00000-of-00010), a glob, a range "
    "or one file, or several separated by commas, e.g. 'coco/train-{00000..00012}.array_record'"
)

_log = logging.getLogger("m3ae_jax")


class ArrayRecordSource(ExampleSource):
    """Pictures, captions and labels of the Examples in ArrayRecord files; see `ExampleSource`."""

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Opens the files.

        Args:
            path: a folder, a glob, a range as ``train-{00000..00012}.array_record``, one file, or several of these
                separated by commas; local.
            options: as `ExampleSource`.

        Raises:
            UserError: as `ExampleSource`, or `path` names no local file.
            OSError: a file cannot be read.
        """
        if is_remote(path):
            raise UserError(f"data.*.path={path!r}: ArrayRecord files are read from local disks; copy or mount them")
        storage = ArrayRecordStorage(options.max_bytes)
        super().__init__(storage, path, lambda part: expand(part, _ENDING, _FORMS), options)
        _warn_of_groups(self._part_paths[0])


class ArrayRecordStorage:
    """How records are stored; see `Storage`.

    Rows are `[number, checksum]`: of the record in the file; of the file's end, for the fingerprint.

    File sizes are multiples of 64 KiB, so that two files are often of the same; their ends are not.

    Args:
        max_bytes: of a record; a larger one is let go of.
    """

    kind, ending, columns, damage = "array_record", _ENDING, 2, "damaged record"
    size_column: int | None = None

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        # One reader serves all threads; it closes itself when its last user lets go of it.
        self._open = functools.lru_cache(maxsize=_MAX_OPEN)(_open_sized)
        self._max_bytes = max_bytes

    def scan(self, path: str) -> Shard:
        """See `Storage`."""
        file = open_file(path)
        tally, held = Tally(os.path.basename(path)), 0
        reader = _open(path)
        if not reader.ok():
            _check_signature(path, file.read_up_to(0, len(_SIGNATURE)))
            problem = "the list of its records is cut off or damaged; none of them is used"
            _log.warning("array_record: %s: %s", path, problem)
            held = _said_to_hold(path)
            tally.add(_DAMAGED, problem, held or 1)
        end = zlib.crc32(file.read_up_to(max(file.size - _TAIL, 0), _TAIL))
        numbers = np.arange(reader.num_records() if reader.ok() else 0, dtype=np.int64)
        rows = np.stack([numbers, np.full_like(numbers, end)], 1)
        return Shard(file.size, file.mtime_ns, rows, tally.skipped, held=held)

    def read(self, path: str, rows: np.ndarray) -> list[Payload]:
        """See `Storage`."""
        opened, limit, numbers = self._open(path), self._max_bytes, rows[:, 0].tolist()
        if not opened.reader.ok():
            raise OSError(f"{path}: cannot be read as when it was indexed; start again to index it anew")
        step = 1 if opened.size > limit else len(numbers)
        payloads: list[Payload] = []
        for start in range(0, len(numbers), max(step, 1)):
            read = _read(path, opened.reader, numbers[start : start + step])
            payloads += [len(one) if one is not None and len(one) > limit else one for one in read]
        return payloads


class _Opened(NamedTuple):
    """A reader, and the bytes of its file."""

    reader: Any
    size: int


def _open_sized(path: str) -> _Opened:
    reader = _open(path)
    return _Opened(reader, os.path.getsize(path) if reader.ok() else 0)


def _open(path: str) -> Any:
    """A reader; of a file that is damaged or not there, one whose `ok()` is False."""
    options = "readahead_buffer_size:0,max_parallelism:0"  # for reading at random
    return array_record_module.ArrayRecordReader(path, options, file_reader_buffer_size=_READ_BYTES)


def _read(path: str, reader: Any, numbers: list[int]) -> list[bytes | None]:
    """Records; None for a damaged one.

    Raises:
        OSError: the storage failed.
    """
    try:
        # Of a file shortened since, the library gives records of no bytes; such a one is no Example either.
        return [payload or None for payload in reader.read(numbers)]
    except RuntimeError as error:  # one of them cannot be read
        if "Corrupted" not in str(error):
            raise OSError(f"{path}: {error}") from None
    if len(numbers) == 1:
        return [None]
    return [payload for number in numbers for payload in _read(path, reader, [number])]


def _said_to_hold(path: str) -> int:
    """Examples of a file by what `data.prepare` wrote beside it, ``SPLIT.manifest.json``; 0: not known."""
    folder, name = os.path.split(path)
    try:
        file = open_file(os.path.join(folder, name.partition(".")[0] + MANIFEST))
        shards = json.loads(file.read(0, min(file.size, _MANIFEST_BYTES)))["shards"].values()
        return next((max(int(shard["examples"]), 0) for shard in shards if shard["file"] == name), 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0


def _check_signature(path: str, start: bytes) -> None:
    if start.startswith(b"\x1f\x8b"):
        raise UserError(gzip_line(path))
    if not _SIGNATURE.startswith(start):
        raise UserError(f"data.*.path: {path} is not an ArrayRecord file; {_FORMS}")


def _warn_of_groups(path: str) -> None:
    """Warns of a file whose records are compressed in groups: reading one decompresses its whole group."""
    reader = _open(path)
    match = re.search(r"group_size:(\d+)", (reader.ok() and reader.writer_options_string()) or "")
    if match and int(match[1]) > 1:
        line = "array_record: %s: written with group_size:%s, slow to read at random; rewrite it with group_size:1: %s"
        _log.warning(line, path, match[1], "python -m m3ae_jax.data.prepare")
