"""Batches of whole examples for evaluations: every token visible, none augmented, none twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from m3ae_jax.data.order import Order, fold_seed
from m3ae_jax.data.pipeline import Batches, Feed, View
from m3ae_jax.data.sources.base import Source
from m3ae_jax.evals.labelled import LabelRecorder
from m3ae_jax.train.setup import Setup


def clean_batches(setup: Setup, source: Source, examples: int, size: int = 0) -> Iterator[dict[str, Any]]:
    """A source's examples, or a fixed random choice of them, as this process's rows of each batch, a part each.

    The order is random, as labelled data often lie class by class, and the same for every run. An example whose
    picture does not decode is left out (not ``example.valid``), not replaced by another, which would then count twice.
    Beside what every part tells of its examples, ``label`` is their class (`LabelRecorder.label_of`) and ``real`` is
    False for padding alone.

    Args:
        setup: the run's parts.
        source: what is read; modalities that the run does not train are not looked at.
        examples: at most so many.
        size: rows of a batch, rounded up to what the mesh needs; 0: ``eval.batch_size``.
    """
    end = min(examples, len(source))
    size = setup.eval_rows(end, size)
    seed = fold_seed("evaluations")
    view = View(Order(len(source), seed), seed, augment=False, end=end)
    groups, labels = setup.objective.view(source.modalities), LabelRecorder(source)
    batches = setup.batches(Feed((labels,), (view,)), groups, size, 0, -(-end // size))
    for part in with_labels(batches, labels):
        example = part["example"]
        decoded, real = example["attempt"] == 0, example["position"] < end
        yield {**part, "example": {**example, "valid": example["valid"] & decoded, "real": real}}


def with_labels(batches: Batches, labels: LabelRecorder) -> Iterator[dict[str, Any]]:
    """Batches of a part with ``example.label``, of the source that they read (`LabelRecorder.label_of`)."""
    with contextlib.closing(iter(batches)) as parts:
        for part in parts:
            yield {**part, "example": {**part["example"], "label": labels.label_of(part["example"]["index"])}}


def identities(values: np.ndarray) -> np.ndarray:
    """A number of each row of an array, `[n] int64`: equal rows have the same, from 0 in the order they appear."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(row.tobytes(), len(seen)) for row in np.ascontiguousarray(values)], np.int64)


def concatenated(batches: list[Any]) -> Any:
    """Pytrees of arrays, joined along their first axis."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
