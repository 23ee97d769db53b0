"""Batches of whole examples for evaluations: every token visible, none augmented, none twice."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from m3ae_jax.data.order import Order, fold_seed
from m3ae_jax.data.pipeline import Batches, Feed, View
from m3ae_jax.data.sources.base import Source
from m3ae_jax.parallel.mesh import batch_parts, local_rows
from m3ae_jax.train.setup import Setup


def clean_batches(setup: Setup, source: Source, examples: int, size: int = 0) -> Iterator[dict[str, Any]]:
    """A source's examples, or a fixed random choice of them, as this process's rows of each batch.

    The order is random, as labelled data often lie class by class, and the same for every run. An example whose
    picture does not decode is left out (not ``example.valid``), not replaced by another, which would then count twice.

    Args:
        setup: the run's parts.
        source: what is read; modalities that the run does not train are not looked at.
        examples: at most so many.
        size: rows of a batch, rounded up to what the mesh needs; 0: ``eval.batch_size``.
    """
    parts = batch_parts(setup.mesh)
    end = min(examples, len(source))
    size = -(-min(size or setup.config.eval.batch_size, end) // parts) * parts
    seed = fold_seed("evaluations")
    view = View(Order(len(source), seed), seed, augment=False, end=end)
    groups = tuple(
        dataclasses.replace(group, mask_ratio=0.0)
        for group in setup.objective.groups
        if group.modality in source.modalities
    )
    batches = Batches(
        setup.config,
        groups,
        Feed((source,), (view,)),
        setup.tokenizer,
        batch_size=size,
        rows=local_rows(setup.mesh, size),
        stop_step=-(-end // size),
    )
    with contextlib.closing(iter(batches)) as found:
        for batch in found:
            example = batch["example"]
            yield {**batch, "example": {**example, "valid": example["valid"] & (example["attempt"] == 0)}}


def identities(values: np.ndarray) -> np.ndarray:
    """A number of each row of an array, `[n] int64`: equal rows have the same, from 0 in the order they appear."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(row.tobytes(), len(seen)) for row in np.ascontiguousarray(values)], np.int64)
