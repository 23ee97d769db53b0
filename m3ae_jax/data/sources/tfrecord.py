"""TFRecord files of `tf.train.Example`, by index.

A file is a list of records: the length of the data (8 bytes, little-endian), the length's checksum (4), the data,
their checksum (4); a checksum is a masked CRC-32C. The files are indexed once: one pass over the lengths records
where each record lies, and from then on a record is one read at an offset, with its checksum verified at each
read. There is no end mark: a file cut off exactly between two records looks whole.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from m3ae_jax.data.sources.base import MAX_BYTES, SourceOptions
from m3ae_jax.data.sources.example_proto import ExampleSource, Payload
from m3ae_jax.data.sources.files import File, ReadAhead, expand, file_cache, gzip_line, open_file
from m3ae_jax.data.sources.index import Shard, Tally
from m3ae_jax.errors import UserError

_ENDING = r"\.(tfrecord|tfrecords|tfrec|records?)(-\d+-of-\d+)?"
_WITHOUT_ENDING = r"\A[^.]+-\d+-of-\d+"  # as those of ImageNet, train-00000-of-01024
_HEADER, _FOOTER = 12, 4
_AHEAD = 16 * 1024
_DAMAGED = "damaged file"

_FORMS = (
    "it takes a folder of .tfrecord files (.tfrecords, .tfrec, .record, .tfrecord-00000-of-00010), a glob, a range or "
    "one file, or several separated by commas, e.g. 'coco/train-{00000..00012}.tfrecord'"
)

_log = logging.getLogger("m3ae_jax")


class TFRecordSource(ExampleSource):
    """Pictures, captions and labels of the Examples in TFRecord files; see `ExampleSource`."""

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Opens the files, indexing those that are new or changed.

        Args:
            path: a folder, a glob, a range as ``train-{00000..00012}.tfrecord``, one file, or several of these
                separated by commas; local or of a store such as ``gs://``.
            options: as `ExampleSource`.

        Raises:
            UserError: as `ExampleSource`, or `path` names no file.
            OSError: a file cannot be read.
        """
        super().__init__(TFRecordStorage(options.max_bytes), path, _expand, options)


def _expand(part: str) -> list[str]:
    """The files of a path; of a folder without any such ending those that are numbered and have none.

    Raises:
        UserError: there is none.
    """
    try:
        return expand(part, _ENDING, _FORMS)
    except UserError:
        with contextlib.suppress(UserError):
            return expand(part, _WITHOUT_ENDING, _FORMS)
        raise


class TFRecordStorage:
    """How records are stored; see `Storage`. Rows are `[offset, size]` of the data.

    Args:
        max_bytes: of a record; a larger one is not read.
    """

    kind, ending, columns, damage = "tfrecord", _ENDING, 2, "wrong checksum"
    size_column: int | None = 1

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._open, self._max_bytes = file_cache(), max_bytes

    def scan(self, path: str) -> Shard:
        """See `Storage`."""
        tally = Tally(os.path.basename(path))
        file = open_file(path)
        if not file.size:  # an empty list, or a copy that never began
            tally.add("empty file", "no records")
        rows = []
        try:
            for row in _frames(path, file):
                rows.append(row)
        except _Damaged as error:
            _log.warning("tfrecord: %s: %s; the whole records before that are used", path, error)
            tally.add(_DAMAGED, str(error))
        return Shard(file.size, file.mtime_ns, np.array(rows, np.int64).reshape(len(rows), 2), tally.skipped)

    def read(self, path: str, rows: np.ndarray) -> list[Payload]:
        """See `Storage`."""
        file, limit = self._open(path), self._max_bytes
        return [_verified(file, offset, size) if size <= limit else size for offset, size in rows[:, :2].tolist()]


class _Damaged(Exception):
    """The file makes no sense from here on; what came before is whole."""


def _frames(path: str, file: File) -> Iterator[tuple[int, int]]:
    """Offset and size of each record's data, reading nothing but headers.

    Small records are read over: neighbouring headers then cost one call to the system.

    Raises:
        UserError: it is no TFRecord file.
        _Damaged: a header is none, or the file ends within a record.
    """
    position, size, reader = 0, 0, ReadAhead(file)
    while position < file.size:
        header = reader.read(position, _HEADER, _AHEAD if size < _AHEAD // 4 else _HEADER)
        if len(header) < _HEADER:
            raise _Damaged(f"cut off after {file.size} bytes")
        length, checksum = struct.unpack("<QI", header)
        if _mask(crc32c(header[:8])) != checksum:
            if position == 0:
                raise UserError(_no_tfrecord(path, file))
            raise _Damaged(f"a damaged header at byte {position}")
        offset, size = position + _HEADER, length
        if offset + size + _FOOTER > file.size:
            raise _Damaged(f"cut off after {file.size} bytes")
        yield offset, size
        position = offset + size + _FOOTER


def _no_tfrecord(path: str, file: File) -> str:
    """What to say of a file that does not begin as one."""
    start = file.read_up_to(0, _AHEAD)
    if start.startswith(b"\x1f\x8b"):
        return gzip_line(path)
    try:
        header = zlib.decompressobj().decompress(start, _HEADER)
    except zlib.error:
        header = b""
    if len(header) == _HEADER and _mask(crc32c(header[:8])) == int.from_bytes(header[8:], "little"):
        code = "import sys, zlib; sys.stdout.buffer.write(zlib.decompress(sys.stdin.buffer.read()))"
        run = f'python -c "{code}" < {path} > {path}.unpacked && mv {path}.unpacked {path}'
        return f"data.*.path: {path} is compressed, which allows no random access; run: {run}"
    return f"data.*.path: {path} is not a TFRecord file; {_FORMS}"


def _verified(file: File, offset: int, size: int) -> bytes | None:
    """A record's data; None where their checksum is wrong."""
    data = file.read(offset, size + _FOOTER)
    payload = data[:size]
    return payload if _mask(crc32c(payload)) == int.from_bytes(data[size:], "little") else None


# --- CRC-32C (Castagnoli; RFC 3720, appendix B.4) ----------------------------------------------------------
# The checksum is linear over GF(2): that of a block is the exclusive or over its bytes of a table's entry for
# (distance from the end, value). Blocks of bytes, then the blocks' 4-byte checksums, are looked up all at once.
# TensorFlow computes it too, but offers no call.

_POLYNOMIAL = 0x82F63B78  # reversed
_PER_BLOCK = 512  # bytes of a block; and blocks of a chunk, so that a chunk has 256 KiB


def _byte_table() -> np.ndarray:
    """`[256] uint32`: what a step does to the register's low byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


_BYTES = _byte_table()
_BYTES_LIST = _BYTES.tolist()


def _mask(crc: int) -> int:
    """As stored: a checksum over data that hold checksums would be weak."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _shifted(registers: np.ndarray, places: int) -> np.ndarray:
    """Registers after as many zero bytes."""
    for _ in range(places):
        registers = _BYTES[registers & 255] ^ (registers >> np.uint32(8))
    return registers


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Contribution of a byte of a block, and of a byte of a block's checksum in a chunk.

    Returns:
        `[_PER_BLOCK * 256] uint32` by place in the block and value, and `[_PER_BLOCK * 4 * 256] uint32` by number
        of the block, place in its checksum, and value.
    """
    byte_tables = [_BYTES]
    single = np.arange(256, dtype=np.uint32)[None, :] << np.array([[0], [8], [16], [24]], np.uint32)
    checksum_tables = [single]
    # Shifting by a whole block is linear in the register's bytes: four look-ups.
    block = _shifted(single, _PER_BLOCK)
    for _ in range(_PER_BLOCK - 1):
        byte_tables.append(_shifted(byte_tables[-1], 1))
        last = checksum_tables[-1]
        parts = [block[k][(last >> np.uint32(8 * k)) & 255] for k in range(4)]
        checksum_tables.append(np.bitwise_xor.reduce(parts))
    return np.concatenate(byte_tables[::-1]), np.stack(checksum_tables[::-1]).ravel()


_PLACES = np.arange(_PER_BLOCK * 4) * 256


def crc32c(data: bytes) -> int:
    """The CRC-32C of `data`, unmasked."""
    register, chunk = 0xFFFFFFFF, _PER_BLOCK * _PER_BLOCK
    for start in range(0, len(data), chunk):
        register = _crc32c_chunk(register, data[start : start + chunk])
    return register ^ 0xFFFFFFFF


def _crc32c_chunk(register: int, data: bytes) -> int:
    """The register after up to 256 KiB more."""
    if len(data) < 64:  # the textbook's loop is faster
        for byte in data:
            register = _BYTES_LIST[(register ^ byte) & 255] ^ (register >> 8)
        return register
    byte_table, checksum_table = _tables()
    # Leading zeros leave a register of zero as it is, and the register is added to the first four bytes.
    padding = -len(data) % _PER_BLOCK
    padded = np.zeros(padding + len(data), np.uint8)
    padded[padding:] = np.frombuffer(data, np.uint8)
    padded[padding : padding + 4] ^= np.frombuffer(register.to_bytes(4, "little"), np.uint8)
    entries = byte_table.take(padded.reshape(-1, _PER_BLOCK) + _PLACES[:_PER_BLOCK])
    checksums = np.bitwise_xor.reduce(entries, axis=1).astype("<u4").view(np.uint8)
    return int(np.bitwise_xor.reduce(checksum_table.take(checksums + _PLACES[-len(checksums) :])))
