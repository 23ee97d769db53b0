"""How long a large source takes to open, and a run that goes on far into it to its first batch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from pathlib import Path

from ml_collections import ConfigDict

from m3ae_jax.benchmark.timing import Figures
from m3ae_jax.data.pipeline import Batches, Feed, train_view
from m3ae_jax.data.sources.text_lines import TextSource
from m3ae_jax.data.text import load_tokenizer
from m3ae_jax.data.tokens import restricted
from m3ae_jax.objectives.base import build

_RECORDS = 10_000_000
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class IndexFigures(Figures):
    """What was measured.

    Attributes:
        records: lines of text, one file.
        index_seconds: of opening it for the first time.
        reopen_seconds: of opening it with its index there.
        index_bytes: more resident memory after the first opening.
        position: of the run, where its first batch was requested.
        first_batch_seconds: from building the pipeline to the batch.
        pipeline_bytes: more resident memory after that.
    """

    records: int
    index_seconds: float
    reopen_seconds: float
    index_bytes: int
    position: int
    first_batch_seconds: float
    pipeline_bytes: int

    def text(self) -> str:
        """For people."""
        return (
            f"{self.records:,} lines of text: indexed in {self.index_seconds:.2f} s with "
            f"{self.index_bytes / 1e6:.0f} MB more, opened again in {self.reopen_seconds:.2f} s; first batch at "
            f"position {self.position:,} after {self.first_batch_seconds:.2f} s with "
            f"{self.pipeline_bytes / 1e6:.0f} MB more"
        )


def measure(config: ConfigDict, records: int = _RECORDS) -> IndexFigures:
    """Measures a file of `records` short lines that it makes; the text budget is the resolved config's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.txt"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"a red square {number}\n" for number in range(records))
        before, begin = _resident(), time.perf_counter()
        source = TextSource(str(path))
        index_seconds, index_bytes = time.perf_counter() - begin, _resident() - before
        begin = time.perf_counter()
        source = TextSource(str(path))
        reopen_seconds = time.perf_counter() - begin
        tokenizer = load_tokenizer("scenes")
        groups = restricted(build(config, tokenizer.vocab_size).groups, ("text",))
        feed, step = Feed((source,), (train_view(config, source),)), records * 9 // 10 // _BATCH
        before, begin = _resident(), time.perf_counter()
        batches = Batches(config, groups, feed, tokenizer, batch_size=_BATCH, start_step=step)
        with contextlib.closing(iter(batches)) as iterator:
            next(iterator)
            seconds, pipeline_bytes = time.perf_counter() - begin, _resident() - before
    return IndexFigures(records, index_seconds, reopen_seconds, index_bytes, step * _BATCH, seconds, pipeline_bytes)


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
