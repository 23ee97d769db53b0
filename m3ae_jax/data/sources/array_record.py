"""ArrayRecord files of `tf.train.Example`, by index.

An ArrayRecord holds the places of its records at its end, so nothing is walked; the library verifies a hash of
each record as it reads it. A file cut off anywhere has lost its places, and with them all its records.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python import array_record_module

from m3ae_jax.data.sources.base import SourceOptions
from m3ae_jax.data.sources.example_proto import ExampleSource
from m3ae_jax.data.sources.files import expand, gzip_line, is_remote, open_file
from m3ae_jax.data.sources.index import Shard, Tally
from m3ae_jax.errors import UserError

_ENDING = r"\.(array_record|arrayrecord)(-\d+-of-\d+)?"
_MAX_OPEN = 256  # readers; each has a descriptor
_READ_BYTES = 32 * 1024
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
        paths = expand(path, _ENDING, _FORMS)
        super().__init__(ArrayRecordStorage(), path, paths, options)
        _warn_of_groups(paths[0])


class ArrayRecordStorage:
    """How records are stored; see `Storage`.

    Rows are `[number, checksum]`: of the record in the file; of the file's end, for the fingerprint.

    File sizes are multiples of 64 KiB, so that two files are often of the same; their ends are not.
    """

    kind, columns, damage = "array_record", 2, "damaged record"

    def __init__(self) -> None:
        # One reader serves all threads; it closes itself when its last user lets go of it.
        self._open = functools.lru_cache(maxsize=_MAX_OPEN)(_open)

    def scan(self, path: str) -> Shard:
        """See `Storage`."""
        file = open_file(path)
        tally = Tally(os.path.basename(path))
        reader = _open(path)
        if not reader.ok():
            _check_signature(path, file.read_up_to(0, len(_SIGNATURE)))
            problem = "the list of its records is cut off or damaged; none of them is used"
            _log.warning("array_record: %s: %s", path, problem)
            tally.add(_DAMAGED, problem)
        end = zlib.crc32(file.read_up_to(max(file.size - _TAIL, 0), _TAIL))
        numbers = np.arange(reader.num_records() if reader.ok() else 0, dtype=np.int64)
        return Shard(file.size, file.mtime_ns, np.stack([numbers, np.full_like(numbers, end)], 1), tally.skipped)

    def first(self, path: str) -> Iterator[bytes]:
        """See `Storage`."""
        open_file(path)  # an OSError where it cannot be opened, which the library takes for damage
        reader = _open(path)
        for number in range(reader.num_records() if reader.ok() else 0):
            for payload in _read(path, reader, [number]):
                if payload is not None:
                    yield payload

    def read(self, path: str, rows: np.ndarray) -> list[bytes | None]:
        """See `Storage`."""
        reader = self._open(path)
        if not reader.ok():
            raise OSError(f"{path}: cannot be read as when it was indexed; start again to index it anew")
        return _read(path, reader, rows[:, 0].tolist())


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
