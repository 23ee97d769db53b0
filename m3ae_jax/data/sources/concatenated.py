"""Examples that lie in several parts (files, slices of files, row groups), numbered one part after the other."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from m3ae_jax.data.sources.base import Record
from m3ae_jax.data.sources.index import IndexReport


class ConcatenatedSource:
    """A `base.Source` over parts; a format says how the records of one part are read.

    Attributes:
        modalities: as in `base.Source`.
        classes: as in `base.Source`.
        fingerprint: as in `base.Source`.
        report: how many examples there are, and what was left out.
    """

    modalities: tuple[str, ...]
    classes: tuple[str, ...] = ()
    fingerprint: str
    report: IndexReport
    _starts: np.ndarray

    def _number_examples(self, lengths: Iterable[int]) -> None:
        """Part p holds the examples `_starts[p]` to `_starts[p + 1]`."""
        self._starts = np.cumsum([0, *lengths], dtype=np.int64)

    def __len__(self) -> int:
        """Number of examples."""
        return int(self._starts[-1])

    def read(self, indices: np.ndarray) -> list[Record]:
        """Reads examples, in the order of `indices`; safe to call from several threads at once.

        Args:
            indices: `[n] int64`, each in `[0, len(self))`.

        Raises:
            OSError: a file cannot be read, or is another one than when it was opened.
        """
        indices = np.asarray(indices, np.int64)
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        records = [Record()] * len(indices)
        for part in np.unique(parts).tolist():
            places = np.flatnonzero(parts == part)
            part_records = self._read_part(part, indices[places] - self._starts[part])
            for place, record in zip(places.tolist(), part_records, strict=True):
                records[place] = record
        return records

    def _read_part(self, part: int, rows: np.ndarray) -> list[Record]:
        """The records of rows of a part, `[n] int64`, each counted from the part's first."""
        raise NotImplementedError
