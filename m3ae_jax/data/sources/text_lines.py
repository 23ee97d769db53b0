"""Plain UTF-8 text files: each line that is not blank is an example.

The files are indexed once, by NumPy searching large blocks for line ends; the index has 8 bytes a line, where it
starts. A line ends where the next one of the index starts, so what lies between, an end of line and blank lines, is
cut off when it is read.
"""

from __future__ import annotations

import os

import numpy as np

from m3ae_jax.data.sources.base import Record, SourceOptions
from m3ae_jax.data.sources.concatenated import ConcatenatedSource
from m3ae_jax.data.sources.files import expand, file_cache, gzip_line, open_file
from m3ae_jax.data.sources.index import Index, Shard, report
from m3ae_jax.errors import UserError

MAX_LINE = 1 << 20  # bytes; of a longer line these are its example

_INDEX_VERSION = 1
_BLOCK = 16 << 20
_NEWLINE = ord("\n")
_BLANK = np.zeros(256, bool)
_BLANK[list(b" \t\n\r\v\f")] = True

_BOM = b"\xef\xbb\xbf"
_FOREIGN = {  # the longer ones first: that of UTF-32 starts as that of UTF-16
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}

_FORMS = "it takes a folder of .txt files, a glob, or one file, or several separated by commas, e.g. 'books/*.txt'"


class TextSource(ConcatenatedSource):
    """The lines of text files, by index.

    Examples are in the order of the files (as given; a folder's or glob's sorted by name), then of their lines. Line
    ends (``\\n`` or ``\\r\\n``) are no part of an example; all else is passed on as it is, UTF-8 or not.

    Attributes:
        modalities: `("text",)`.
        classes: none.
        report: numbers of files and lines.
        fingerprint: hash of the files' base names and sizes and of where each line starts.
    """

    modalities: tuple[str, ...] = ("text",)

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Opens the files, indexing those that are new or changed.

        Args:
            path: a folder (all its `*.txt`), a glob, one file, or several of these separated by commas.
            options: `cache_dir` is used, nothing else.

        Raises:
            UserError: `path` names no file, or one that is compressed or in UTF-16, or there is no text in it.
            OSError: a file cannot be read.
        """
        self._paths = expand(path, r"\.txt", _FORMS)
        index = Index("text", _INDEX_VERSION, 1, _scan, options.cache_dir)
        shards = index.shards(self._paths)
        self.report = report(shards)
        if not self.report.examples:
            raise UserError(f"data.*.path={path!r} holds no line that is not blank; {_FORMS}")
        self.fingerprint = index.fingerprint(self._paths, shards)
        # Left in one array per file: those of a folder are views of what its index holds.
        self._rows = [shard.rows[:, 0] for shard in shards]
        self._sizes = [shard.size for shard in shards]
        self._number_examples(map(len, self._rows))
        self._open = file_cache()

    def _read_part(self, part: int, rows: np.ndarray) -> list[Record]:
        starts, records = self._rows[part], []
        for row in rows.tolist():
            start = int(starts[row])
            end = int(starts[row + 1]) if row + 1 < len(starts) else self._sizes[part]
            data = self._open(self._paths[part]).read(start, min(end - start, MAX_LINE))
            records.append(Record(caption=data.partition(b"\n")[0].removesuffix(b"\r")))
        return records


def _scan(path: str) -> Shard:
    """Finds where the lines of one file start.

    Raises:
        UserError: it is compressed, or in UTF-16.
    """
    file = open_file(path)
    start = file.read_up_to(0, 4)
    if start.startswith(b"\x1f\x8b"):
        raise UserError(gzip_line(path))
    for mark, encoding in _FOREIGN.items():
        if start.startswith(mark):
            stem = os.path.splitext(path)[0]
            raise UserError(
                f"data.*.path: {path} is {encoding}, not UTF-8; run: "
                f"iconv -f {encoding} -t UTF-8 {path} > {stem}.utf8.txt, and move {os.path.basename(path)} away"
            )
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
        if len(blanks) > whole:
            pending, blank = int(lines[whole]), bool(blanks[whole])
        else:
            pending, blank = offset + len(block), True
    if not blank:
        whole_lines.append(np.array([pending]))
    rows = np.concatenate([np.empty(0, np.int64), *whole_lines])
    return Shard(file.size, file.mtime_ns, rows[:, np.newaxis])


def _are_blank(block: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """`[n] bool`, whether each line of a block holds nothing but white space.

    Args:
        block: `[size] uint8`, not empty.
        starts: `[n] int64`, where the lines start; the first at 0, each holds at least a byte.
    """
    suspects = _BLANK[block[starts]]
    return np.logical_and.reduceat(_BLANK[block], starts) if suspects.any() else suspects
