"""Plain UTF-8 text files: each line that is not blank is an example.

The files are indexed once, by NumPy searching large blocks for line ends; kept are 8 bytes a line, where it starts.
A line ends where the next one of the index starts, so what lies between, an end of line and blank lines, is cut off
when it is read.
"""

from __future__ import annotations

import os

import numpy as np

from m3ae_jax.data.sources.base import Record, SourceOptions
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


class TextSource:
    """The lines of text files, by index.

    Examples are in the order of the files (as given; a folder's or glob's sorted by name), then of their lines. Line
    ends (``\\n`` or ``\\r\\n``) are no part of an example; all else is passed on as it is, UTF-8 or not.

    Attributes:
        modalities: `("text",)`.
        classes: none.
        report: what was found.
        fingerprint: hash of the files' base names and sizes and of where each line starts.
    """

    modalities: tuple[str, ...] = ("text",)
    classes: tuple[str, ...] = ()

    def __init__(self, path: str, options: SourceOptions = SourceOptions()) -> None:
        """Opens the files, indexing those that are new or changed.

        Args:
            path: a folder (all its `*.txt`), a glob, one file, or several of these separated by commas.
            options: `cache_dir` is used, nothing else.

        Raises:
            UserError: `path` names no file, or one that is compressed or in UTF-16, or there is no text in it.
            OSError: a file cannot be read.
        """
        self._paths = expand(path, (".txt",), _FORMS)
        index = Index("text", _INDEX_VERSION, 1, _scan, options.cache_dir)
        shards = index.of(self._paths)
        self.report = report(shards)
        if not self.report.examples:
            raise UserError(f"data.*.path={path!r} holds no line that is not blank; {_FORMS}")
        self._fingerprint = index.fingerprint(self._paths, shards)
        # Left in one array per file: those of a folder are views of what its index holds.
        self._rows = [shard.rows[:, 0] for shard in shards]
        self._sizes = [shard.size for shard in shards]
        self._starts = np.cumsum([0] + [len(rows) for rows in self._rows], dtype=np.int64)
        self._open = file_cache()

    @property
    def fingerprint(self) -> str:
        """See the class docstring."""
        return self._fingerprint

    def __len__(self) -> int:
        """Number of examples."""
        return int(self._starts[-1])

    def read(self, indices: np.ndarray) -> list[Record]:
        """Reads examples, in the order asked for; safe to call from several threads at once.

        Args:
            indices: `[n] int64`, each in `[0, len(self))`.

        Raises:
            OSError: a file cannot be read, or is shorter than when it was indexed.
        """
        files = np.searchsorted(self._starts, indices, side="right") - 1
        places = np.asarray(indices) - self._starts[files]
        return [Record(caption=self._line(*at)) for at in zip(files.tolist(), places.tolist(), strict=True)]

    def _line(self, file: int, place: int) -> bytes:
        rows = self._rows[file]
        start = int(rows[place])
        end = int(rows[place + 1]) if place + 1 < len(rows) else self._sizes[file]
        data = self._open(self._paths[file]).read(start, min(end - start, MAX_LINE))
        return data.partition(b"\n")[0].removesuffix(b"\r")


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
    found, pending, blank = [], begin, True  # the line that the last block left open
    for offset in range(begin, file.size, _BLOCK):
        block = np.frombuffer(file.read(offset, min(_BLOCK, file.size - offset)), np.uint8)
        ends = np.flatnonzero(block == _NEWLINE) + 1
        starts = np.concatenate([[0], ends])  # the last one is the length where the block ends with its line
        blanks = _are_blank(block, starts[:-1] if starts[-1] == len(block) else starts)
        blanks[0] &= blank
        lines = starts + offset
        lines[0] = pending
        whole = len(ends)
        found.append(lines[:whole][~blanks[:whole]])
        if len(blanks) > whole:
            pending, blank = int(lines[whole]), bool(blanks[whole])
        else:
            pending, blank = offset + len(block), True
    if not blank:
        found.append(np.array([pending]))
    rows = np.concatenate(found).astype(np.int64, copy=False) if found else np.empty(0, np.int64)
    return Shard(file.size, file.mtime_ns, rows[:, np.newaxis])


def _are_blank(block: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """`[n] bool`, whether each line of a block holds nothing but white space.

    Args:
        block: `[size] uint8`, not empty.
        starts: `[n] int64`, where the lines start; the first at 0, each holds at least a byte.
    """
    suspects = _BLANK[block[starts]]
    return np.logical_and.reduceat(_BLANK[block], starts) if suspects.any() else suspects
