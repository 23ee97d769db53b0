"""Batches of whole examples for evaluations: every token visible, none augmented, none twice."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

import m3ae_jax.data.images as images
from m3ae_jax.data.order import Order, fold_seed
from m3ae_jax.data.pipeline import Batches, Feed, View
from m3ae_jax.data.sources.base import Source
from m3ae_jax.data.sources.scenes import encode_bmp
from m3ae_jax.data.text import encode_batch
from m3ae_jax.evals.labelled import LabelRecorder
from m3ae_jax.train.setup import Setup

Tokens = dict[str, tuple[np.ndarray, np.ndarray]]
"""Of each modality the values `[n, L, ...]` and which tokens are real, `[n, L] bool`."""


def clean_batches(setup: Setup, source: Source, examples: int, size: int = 0) -> Iterator[dict[str, Any]]:
    """A source's examples, or a fixed random choice of them, as this process's rows of each batch, a part each.

    The order is random, as labelled data often lie class by class, and the same for every run. An example whose
    picture does not decode is left out (not ``example.valid``), not replaced by another, which would then count twice.
    Beside what every part tells of its examples, ``label`` is their class (`LabelRecorder.label_of`), ``group`` the
    hash of their group's name (`LabelRecorder.group_of`) and ``real`` is False for padding alone.

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
    """Batches of a part with ``example.label`` and ``example.group`` of the source that they read; see `clean_batches`.

    ``group`` is `[b, 2] int32`, zeros for an example without one.
    """
    with contextlib.closing(iter(batches)) as parts:
        for part in parts:
            index = part["example"]["index"]
            group = [None if name is None else name.encode("utf-8", "surrogatepass") for name in labels.group_of(index)]
            yield {**part, "example": {**part["example"], "label": labels.label_of(index), "group": hashes(group)}}


def scene_tokens(setup: Setup, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> Tokens:
    """Tokens of drawn pictures, and of captions.

    Args:
        setup: of a run of pictures and captions.
        pictures: `[S, S, 3] uint8` each.
        captions: of the pictures, or others.
    """
    data, tokenizer = setup.config.data, setup.tokenizer
    assert tokenizer is not None
    loaded = np.stack([images.load(encode_bmp(picture), data.image_size) for picture in pictures])
    patches = images.patchify(loaded, data.patch_size)
    ids, length = encode_batch(tokenizer, [caption.encode() for caption in captions], data.max_text_tokens)
    return {
        "image": (patches, np.ones(patches.shape[:2], bool)),
        "text": (ids, np.arange(ids.shape[1]) < length[:, None]),
    }


def hashes(rows: Iterable[bytes | None]) -> np.ndarray:
    """64 bits of each row's hash, `[n, 2] int32`, as devices have no int64; zeros for None."""
    digests = [bytes(8) if row is None else hashlib.blake2b(row, digest_size=8).digest() for row in rows]
    return np.frombuffer(b"".join(digests), np.int32).reshape(-1, 2)


def joined(halves: np.ndarray) -> np.ndarray:
    """The `[n] int64` of `hashes` from their `[n, 2] int32`."""
    whole: np.ndarray = np.ascontiguousarray(halves, np.int32).view(np.int64)[:, 0]
    return whole


def identities(values: np.ndarray) -> np.ndarray:
    """A number of each row of an array, `[n] int64`: equal rows have the same, from 0 in the order they appear."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(row.tobytes(), len(seen)) for row in np.ascontiguousarray(values)], np.int64)


def concatenated(batches: list[Any]) -> Any:
    """Pytrees of arrays, joined along their first axis."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
