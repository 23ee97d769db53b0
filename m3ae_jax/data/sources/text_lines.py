"""Plain UTF-8 text files: each line that is not blank is an example.

The files are indexed once, by NumPy searching large blocks for line ends; the index has 8 bytes a line, where it
starts. A line ends where the next one of the index starts, so what lies between, an end of line and blank lines, is
cut off when it is read. Blank lines, and lines longer than `MAX_LINE`, are counted.
"""

from __future__ import annotations

import os
from typing import ClassVar, NoReturn

import numpy as np

from m3ae_jax.data import images
from m3ae_jax.data.sources.base import Record, SourceOptions
from m3ae_jax.data.sources.concatenated import ConcatenatedSource, ignore_beside, path_parts
from m3ae_jax.data.sources.files import File, Stamps, encoding_of, expand, file_cache, gzip_line, open_file
from m3ae_jax.data.sources.index import Index, Shard, Tally, left_out
from m3ae_jax.errors import UserError

MAX_LINE = 1 << 20  # bytes; of a longer line these are its example

_INDEX_VERSION, _FINGERPRINT_VERSION = 2, 1
_BLOCK = 16 << 20
_ENDING = r"\.txt"
_START = 4096  # bytes that tell the encoding
_NEWLINE = ord("\n")
_BLANK = np.zeros(256, bool)
_BLANK[list(b" \t\n\r\v\f")] = True

_BOM = b"\xef\xbb\xbf"

_FORMS = "it takes a folder of .txt files, a glob, or one file, or several separated by commas, e.g. 'books/*.txt'"


class TextSource(ConcatenatedSource):
    """The lines of text files, by index.

    Examples are in the order of the files (as given; a folder's or glob's sorted by name), then of their lines. Line
    ends (``\\n`` or ``\\r\\n``) are no part of an example; all else is passed on as it is, UTF-8 or not. A longer line
    than `MAX_LINE` is cut there; one above ``data.max_bytes`` is not used.

    Attributes:
        modalities: `("text",)`.
        classes: none.
        report: numbers of files and lines; of blank lines and of those that are cut.
        fingerprint: hash of the files' base names and sizes and of where each line starts.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    modalities: tuple[str, ...] = ("text",)

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Opens the files, indexing those that are new or changed.

        Args:
            path: a folder (all its `*.txt`), a glob, one file, or several of these separated by commas.
            options: `max_bytes` and `index_dir` are used, nothing else.

        Raises:
            UserError: `path` names no file, or one that is compressed, in UTF-16 or with line ends of old Macs, or
                there is no text in it.
            OSError: a file cannot be read.
        """
        self._paths = expand(path, _ENDING, _FORMS)
        index = Index("text", _INDEX_VERSION, 1, _scan, options.index_dir)
        shards = index.shards(self._paths)
        tally = Tally()
        for part in path_parts(path):
            ignore_beside(part, self._paths, _ENDING, tally)
        self.report = index.report(shards, tally)
        if not self.report.examples:
            what = f"holds no line that is not blank{left_out(self.report)}"
            raise UserError(f"data.*.path={path!r} {what}; {_FORMS}")
        self._limit = options.max_bytes
        limited = [f"at most {self._limit} bytes"] if self._limit < MAX_LINE else []
        named = Index("text", _FINGERPRINT_VERSION, 1, _scan)
        self.fingerprint = named.fingerprint(self._paths, shards, *limited)
        # Left in one array per file: those of a folder are views of what its index holds.
        self._rows = [shard.rows[:, 0] for shard in shards]
        self._sizes = [shard.size for shard in shards]
        self._number_examples(map(len, self._rows))
        self._open, self._stamps = file_cache(), Stamps(self._paths)

    def _read_part(self, part: int, rows: np.ndarray) -> list[Record]:
        self._stamps.check(self._paths[part])
        starts, records = self._rows[part], []
        for row in rows.tolist():
            start = int(starts[row])
            end = int(starts[row + 1]) if row + 1 < len(starts) else self._sizes[part]
            data = self._open(self._paths[part]).read(start, min(end - start, MAX_LINE))
            line = data.partition(b"\n")[0].removesuffix(b"\r")
            fits = len(line) <= self._limit
            records.append(Record(caption=line) if fits else Record(unusable=images.TOO_MANY_BYTES))
        return records


def _scan(path: str) -> Shard:
    """Finds where the lines of one file start.

    Raises:
        UserError: it is compressed, in UTF-16, or its lines end with carriage returns alone.
    """
    file = open_file(path)
    start = file.read_up_to(0, _START)
    _refuse_foreign(path, start)
    tally = Tally(os.path.basename(path))
    begin = len(_BOM) if start.startswith(_BOM) else 0
    whole_lines, pending, blank = [], begin, True  # the line that the last block left open
    for offset in range(begin, file.size, _BLOCK):
        block = np.frombuffer(file.read(offset, min(_BLOCK, file.size - offset)), np.uint8)
        ends = np.flatnonzero(block == _NEWLINE) + 1
        starts = np.concatenate([[0], ends])  # the last one is the length where the block ends with its line
        blanks = _are_blank(block, starts[:-1] if starts[-1] == len(block) else starts)
        blanks[0] &= blank
        lines = starts + offset
        lines[0] = pending
        whole = len(ends)
        whole_lines.append(lines[:whole][~blanks[:whole]])
        _count(file, lines[:whole], ends + offset, blanks[:whole], tally)
        if len(blanks) > whole:
            pending, blank = int(lines[whole]), bool(blanks[whole])
        else:
            pending, blank = offset + len(block), True
    if pending == begin:
        _refuse_returns(path, file)
    if pending < file.size:  # no line end at the end of the file
        last = np.array([pending])
        whole_lines.append(last[:0] if blank else last)
        _count(file, last, np.array([file.size + 1]), np.array([blank]), tally)
    rows = np.concatenate([np.empty(0, np.int64), *whole_lines])
    return Shard(file.size, file.mtime_ns, rows[:, np.newaxis], unused=tally.unused)


def _refuse_foreign(path: str, start: bytes) -> None:
    """Raises a `UserError` for a file that starts as one that is compressed, or not in UTF-8."""
    if start.startswith(b"\x1f\x8b"):
        raise UserError(gzip_line(path))
    if encoding := encoding_of(start):
        _refuse(path, f"is {encoding}, not UTF-8", f"iconv -f {encoding} -t UTF-8 {path}", "utf8")


def _refuse_returns(path: str, file: File) -> None:
    """Raises a `UserError` for a file without a line feed that has carriage returns."""
    if any(b"\r" in file.read_up_to(offset, _BLOCK) for offset in range(0, file.size, _BLOCK)):
        what = "has lines that end with a carriage return alone, as of old Macs"
        _refuse(path, what, f"tr '\\r' '\\n' < {path}", "lines")


def _refuse(path: str, what: str, command: str, ending: str) -> NoReturn:
    """Raises a `UserError` for a file that a command makes readable."""
    made = f"{os.path.splitext(path)[0]}.{ending}.txt"
    raise UserError(f"data.*.path: {path} {what}; run: {command} > {made}, and move {os.path.basename(path)} away")


def _count(file: File, starts: np.ndarray, ends: np.ndarray, blanks: np.ndarray, tally: Tally) -> None:
    """Counts blank lines, and those of which only the first `MAX_LINE` bytes are read.

    Args:
        file: their file.
        starts: `[n] int64`, their offsets.
        ends: `[n] int64`, one after their line feeds.
        blanks: `[n] bool`.
        tally: counts.
    """
    if len(empty := starts[blanks]):
        tally.ignore("blank line", f"byte {empty[0]}", len(empty))
    for line in np.flatnonzero((ends - starts - 1 > MAX_LINE) & ~blanks).tolist():
        returned = file.read(int(ends[line]) - 2, 1) == b"\r"
        if ends[line] - starts[line] - 1 - returned > MAX_LINE:
            tally.ignore("line cut at 1 MB", f"byte {starts[line]}")


def _are_blank(block: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """`[n] bool`, whether each line of a block holds nothing but white space.

    Args:
        block: `[size] uint8`, not empty.
        starts: `[n] int64`, where the lines start; the first at 0, each holds at least a byte.
    """
    suspects = _BLANK[block[starts]]
    return np.logical_and.reduceat(_BLANK[block], starts) if suspects.any() else suspects
