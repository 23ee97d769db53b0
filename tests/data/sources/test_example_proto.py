"""ExampleRecords: what any storage of Examples shares; the formats have tests of their own."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from m3ae_jax.data.sources.base import SourceOptions
from m3ae_jax.data.sources.example_proto import ExampleRecords, Layout, Payload
from m3ae_jax.data.sources.index import Shard, Tally


class InMemory:
    """A `Storage` of given records, of one number a row."""

    kind, columns, size_column, damage = "memory", 1, None, "damaged record"

    def __init__(self, payloads: list[bytes]) -> None:
        self._payloads = payloads

    def scan(self, path: str) -> Shard:
        raise NotImplementedError

    def read(self, path: str, rows: np.ndarray) -> list[Payload]:
        return [self._payloads[row] for row in rows[:, 0]]


def test_values_that_are_not_read_are_told_of_records_that_were_not_sampled_before() -> None:
    """As in tfds, whose features are known without any record."""
    payloads = []
    for labels in ([0], [0, 1], [-1], []):
        example = tf.train.Example()
        example.features.feature["image"].bytes_list.value.extend([b"i"] * max(len(labels), 1))
        example.features.feature["label"].int64_list.value.extend(labels)
        payloads.append(example.SerializeToString())
    source = ExampleRecords(InMemory(payloads), Layout("image", None, "label", "", ()), SourceOptions())
    tally, rows = Tally(), np.arange(4)[:, None]
    source._set_parts(["a", "a"], [rows[:3], rows[3:]], [0, 3], tally)
    assert [record.get("label") for record in source.read(np.arange(4))] == [0, None, None, None]
    assert tally.unused == {
        "further value of feature image": (1, "in 1 of 4 sampled records"),
        "feature label: no class": (2, "in 2 of 4 sampled records"),
    }
