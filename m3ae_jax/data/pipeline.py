"""From positions of the run to batches: order, reading, decoding, augmentation, tokens, masks.

The batch contract is that of ``data/tokens.py``; what this file makes are the batches of one part.

The order is tf.data's. A chunk of examples at a time is read, decoded, tokenized and masked by Pillow, the tokenizer
and NumPy, which work side by side in tf.data's threads. TensorFlow's own operations are slower at resizing, know no
Exif, no 16 bits and no alpha, and cannot say why a picture does not decode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import m3ae_jax.data.images as images
from m3ae_jax.data.augment import COLOR_SAFE, OPERATIONS, RandAugment
from m3ae_jax.data.order import ATTEMPTS, Order, RandomStream, fold_seed, keeps_caption
from m3ae_jax.data.sources.base import Record, Source, report_of, where_of
from m3ae_jax.data.sources.index import left_out
from m3ae_jax.data.text import Tokenizer, encode_batch
from m3ae_jax.data.tokens import EXAMPLE, Group, Modality, Spec, TokenSet
from m3ae_jax.errors import UserError

log = logging.getLogger("m3ae_jax")

_READ_TRIES = 4
_CHUNK = 8  # examples that one thread works on at a time
_INT31 = 2**31 - 1
_DRAWS = 8  # uniform numbers of an example before those of its masks: five of the crop, one of the caption


@dataclasses.dataclass(frozen=True)
class View:
    """How a source is looked at.

    Attributes:
        order: which example stands at a draw.
        seed: 31-bit seed of augmentation and masks.
        augment: False takes the centred square and no flip.
        caption_fraction: share of the examples that keep their caption.
        end: draws from here on are padding, not examples.
        change: of each picture, `[H, W, 3] uint8`, after crop and flip; its randomness is a function of the draw.
    """

    order: Order
    seed: int
    augment: bool
    caption_fraction: float = 1.0
    end: int = 2**62
    change: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Feed:
    """What the slots of a batch read, one after the other: of several sources, each in its turn.

    Attributes:
        sources: of the same modalities.
        views: one a source.
        numbers: what ``example.source`` says of each.
        turns: `[P] int64`, which source each of P slots on end takes; then they repeat.
    """

    sources: tuple[Source, ...]
    views: tuple[View, ...]
    numbers: tuple[int, ...] = (0,)
    turns: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1, np.int64))

    def draws(self, slots: Any) -> tuple[Any, Any]:
        """Source (its place) and its draw of each slot; both as `slots`, `[c] int64`."""
        import tensorflow as tf

        period = len(self.turns)
        before = np.zeros(period, np.int64)  # turns of the same source earlier in the period
        for place in range(len(self.sources)):
            mine = self.turns == place
            before[mine] = np.arange(mine.sum())
        count = np.array([(self.turns == place).sum() for place in range(len(self.sources))])
        place = tf.gather(tf.constant(self.turns), slots % period)
        draw = slots // period * tf.gather(tf.constant(count), place) + tf.gather(tf.constant(before), slots % period)
        return place, draw

    def index(self, place: Any, draw: Any) -> Any:
        """The first candidate's index of each (source, draw), `[c] int64`."""
        import tensorflow as tf

        index = self.views[0].order.index(draw)
        for other in range(1, len(self.views)):
            index = tf.where(place == other, self.views[other].order.index(draw), index)
        return index


def train_view(config: ConfigDict, source: Source, name: str = "train") -> View:
    """The endless shuffled view that training draws from; `name` is the source's in a mixture."""
    seed = fold_seed(config.seed, name, "train")  # not of the format: repacked data are the same data
    data, change = config.data, None
    if data.rand_augment:
        names = COLOR_SAFE if data.rand_augment_operations == "color_safe" else tuple(OPERATIONS)
        change = RandAugment.of(data, data.rand_augment, names)
    order = Order(len(source), seed)
    return View(order, seed, augment=True, caption_fraction=data.caption_fraction, change=change)


def eval_view(config: ConfigDict, source: Source, examples: int) -> View:
    """The first `examples` examples in order, each with one fixed mask."""
    seed = fold_seed(config.seed, "val", "val")
    order = Order(len(source), seed, shuffle=False)
    return View(order, seed, augment=False, end=min(examples, len(source)))


class Batches:
    """The batches of steps ``start_step, start_step + 1, ...``.

    Args:
        config: the resolved config.
        groups: what the objective asks for.
        feed: where examples come from.
        tokenizer: needed when a group is text.
        batch_size: global batch.
        rows: `[b] int` rows of the global batch that this process reads; all of them by default.
        start_step: first step.
        stop_step: one past the last step; None never ends.
    """

    def __init__(
        self,
        config: ConfigDict,
        groups: tuple[Group, ...],
        feed: Feed,
        tokenizer: Tokenizer | None,
        *,
        batch_size: int,
        rows: np.ndarray | None = None,
        start_step: int = 0,
        stop_step: int | None = None,
    ) -> None:
        for source in feed.sources:
            check_modalities(groups, source, tokenizer)
        self._stages = _Stages(config, groups, feed, tokenizer)
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._batch_size = batch_size
        self._threads = config.data.threads or len(os.sched_getaffinity(0))
        self._range = (start_step, 2**62 if stop_step is None else stop_step)
        self._built = self._dataset()

    def __iter__(self) -> Generator[dict[str, Any], None, None]:
        """Yields batches as NumPy arrays, from the first step on, each time anew.

        Raises:
            UserError: the storage failed several times.
        """
        import tensorflow as tf

        iterator = self._built.as_numpy_iterator()
        try:
            for batch in iterator:
                if self._stages.failure:
                    raise self._stages.failure
                yield batch
        except tf.errors.OpError as error:
            raise self._stages.failure or error from None
        finally:
            del iterator  # stops its threads: they must not call into Python while the interpreter shuts down

    def _dataset(self) -> Any:
        import tensorflow as tf

        stages, examples = self._stages, len(self._rows)
        chunk = max(size for size in range(1, _CHUNK + 1) if examples % size == 0)
        parts = examples // chunk
        rows = tf.constant(self._rows.reshape(parts, chunk), tf.int64)
        first, last = (min(step * parts, 2**62) for step in self._range)
        dataset = tf.data.Dataset.range(first, last)
        dataset = dataset.map(
            lambda number: stages.load(number // parts * self._batch_size + rows[number % parts]),
            num_parallel_calls=self._threads,
        )
        dataset = dataset.batch(parts, drop_remainder=True)
        dataset = dataset.map(_joined, num_parallel_calls=2).prefetch(2)
        options = tf.data.Options()
        options.deterministic = True
        options.autotune.enabled = False
        options.threading.private_threadpool_size = self._threads + 2
        return dataset.with_options(options)


def together(parts: Mapping[str, Batches]) -> Generator[dict[str, Any], None, None]:
    """Whole batches, ``{part: rows}``, of the batches of each part."""
    with contextlib.ExitStack() as stack:
        streams = {name: stack.enter_context(contextlib.closing(iter(batches))) for name, batches in parts.items()}
        for rows in zip(*streams.values(), strict=True):
            yield dict(zip(streams, rows, strict=True))


def _joined(chunks: Any) -> Any:
    """Chunks `[parts, c, ...]` as one batch `[parts c, ...]`."""
    import tensorflow as tf

    return tf.nest.map_structure(lambda x: tf.reshape(x, [-1, *x.shape[2:]]), chunks)


def check_modalities(groups: tuple[Group, ...], source: Source, tokenizer: Tokenizer | None) -> None:
    """Refuses a source that does not hold what groups ask for, and text without a tokenizer.

    Raises:
        UserError: as said.
    """
    for modality in _modalities(groups).values():
        if modality.name not in source.modalities:
            beside, held = report_of(source), ", ".join(source.modalities)
            makes = "template" in getattr(source, "uses", ()) and bool(source.classes) and modality.name == "text"
            hint = "; template='a photo of a {}' would make captions of its classes" if makes else ""
            raise UserError(
                f"data.modalities asks for {modality.name!r}, but {where_of(source)} holds only {held}: "
                f"--config.data.modalities={source.modalities[0]} trains on that alone, if the objective can{hint}"
                f"{left_out(beside) if beside else ''}"
            )
        if modality.reader == "text" and tokenizer is None:
            raise UserError("data.tokenizer is empty, and text needs one")


def _modalities(groups: tuple[Group, ...]) -> dict[str, Modality]:
    """Those of all groups by the reader that makes their tokens."""
    return {modality.reader: modality for group in groups for modality in group.modalities}


@dataclasses.dataclass
class _Chunk:
    """Examples on their way to a batch.

    Attributes:
        places: of each example's source in the feed.
        draws: of that source.
        streams: random numbers of each example, from which the first `_DRAWS` are taken.
        uniform: these, `[c, _DRAWS] float32`.
        records: what is read.
        example: columns of `EXAMPLE`.
    """

    places: list[int]
    draws: list[int]
    streams: list[RandomStream]
    uniform: np.ndarray
    records: list[Record]
    example: dict[str, np.ndarray]

    def caption(self, row: int) -> bytes:
        """The caption of an example, or the drawn one of several."""
        several = self.records[row].get("captions")
        return several[int(self.uniform[row, 5] * len(several))] if several else self.records[row].get("caption", b"")


class _Stages:
    """What is done to a chunk of examples; what its stages share is fixed at construction."""

    def __init__(
        self,
        config: ConfigDict,
        groups: tuple[Group, ...],
        feed: Feed,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._config, self._groups, self._feed = config, groups, feed
        self._tokenizer = tokenizer
        self._modalities = _modalities(groups)
        self.failure: UserError | None = None

    def load(self, slots: Any) -> dict[str, Any]:
        """The batch of a chunk of slots, `[c] int64`."""
        import tensorflow as tf

        place, draws = self._feed.draws(slots)
        spec = self._spec(slots.shape[0])
        flat = tf.nest.flatten(spec)
        arguments = [place, draws, self._feed.index(place, draws)]
        arrays = tf.numpy_function(self._load, arguments, [tf.as_dtype(one.dtype) for one in flat])
        shaped = [tf.ensure_shape(x, one.shape) for x, one in zip(arrays, flat, strict=True)]
        batch: dict[str, Any] = tf.nest.pack_sequence_as(spec, shaped)
        return batch

    def _spec(self, count: int) -> dict[str, Any]:
        """Shapes and dtypes of a chunk."""
        example = {name: Spec((count, *spec.shape), spec.dtype) for name, spec in EXAMPLE.items()}
        return {"groups": {group.name: group.spec(count) for group in self._groups}, "example": example}

    def _load(self, places: np.ndarray, draws: np.ndarray, indices: np.ndarray) -> list[np.ndarray]:
        import tensorflow as tf

        try:
            batch = self.chunk(places, draws, indices)
        except Exception as error:  # in tf.data's threads it would become a page of C++ and Python
            log.debug("reading examples %s failed", indices, exc_info=True)
            names = ", ".join(sorted({where_of(self._feed.sources[place]) for place in places.tolist()}))
            said = " ".join(f"{type(error).__name__}: {error}".split())
            self.failure = self.failure or UserError(f"{names}: reading examples {indices.tolist()} failed: {said}")
            batch = tf.nest.map_structure(lambda one: np.zeros(one.shape, one.dtype), self._spec(len(draws)))
        arrays: list[np.ndarray] = tf.nest.flatten(batch)
        return arrays

    def chunk(self, places: np.ndarray, draws: np.ndarray, indices: np.ndarray) -> dict[str, Any]:
        """Reads, decodes, tokenizes and masks.

        Args:
            places: of each example's source in the feed, `[c] int64`.
            draws: of that source, `[c] int64`.
            indices: each draw's first candidate, `[c] int64`.
        """
        chunk = self._begun(places, draws, indices)
        values: dict[str, np.ndarray] = {}
        counts: dict[str, Any] = {}
        if picture := self._modalities.get("picture"):
            values[picture.name], counts[picture.name] = self._patches(chunk, picture), picture.tokens
        if text := self._modalities.get("text"):
            values[text.name], length = self._words(chunk, text)
            captioned = self._captioned(chunk)
            counts[text.name] = np.where(captioned, length, 0)
            chunk.example["caption_id"] *= counts[text.name] > 0
            empty = captioned & (length == 0) & (chunk.example["attempt"] == 0)
            chunk.example["reason"][empty] = images.REASONS.index(images.EMPTY_CAPTION)
        ends = np.array([view.end for view in self._feed.views])
        valid = (chunk.example["attempt"] < ATTEMPTS) & (draws < ends[places])
        chunk.example["valid"] = valid
        tokens = {
            name: (value, np.arange(value.shape[1]) < (valid * counts[name])[:, None]) for name, value in values.items()
        }
        groups = {group.name: masked(group, chunk.streams, tokens) for group in self._groups}
        example = {name: column.astype(EXAMPLE[name].dtype) for name, column in chunk.example.items()}
        return {"groups": groups, "example": example}

    def _begun(self, places: np.ndarray, draws: np.ndarray, indices: np.ndarray) -> _Chunk:
        """The first candidates' records, of which nothing is decoded yet."""
        views = [self._feed.views[place] for place in places.tolist()]
        streams = [RandomStream(view.seed, draw) for view, draw in zip(views, draws.tolist(), strict=True)]
        records = [Record()] * len(draws)
        for place in set(places.tolist()):
            rows = np.flatnonzero(places == place)
            for row, record in zip(rows.tolist(), self._read(place, indices[rows]), strict=True):
                records[row] = record
        example = {name: np.zeros(len(draws), np.int64) for name in EXAMPLE}
        example |= {"position": draws & _INT31, "index": indices.copy(), "source": np.array(self._feed.numbers)[places]}
        uniform = np.stack([stream.take(_DRAWS) for stream in streams])
        return _Chunk(places.tolist(), draws.tolist(), streams, uniform, records, example)

    def _patches(self, chunk: _Chunk, picture: Modality) -> np.ndarray:
        """Patches of each example's first candidate that decodes, `[c, L, P] uint8`."""
        patches = np.zeros((len(chunk.records), picture.tokens, picture.features), np.uint8)
        for row in range(len(patches)):
            pixels = self._decoded(chunk, row)
            if pixels is not None:
                patches[row] = images.patchify(pixels[None], self._config.data.patch_size)[0]
                chunk.example["image_id"][row] = content_id(chunk.records[row].get("image"))
        return patches

    def _decoded(self, chunk: _Chunk, row: int) -> np.ndarray | None:
        data, view, draw = self._config.data, self._feed.views[chunk.places[row]], chunk.draws[row]
        crop = images.Crop()
        if view.augment:
            more = (lambda: RandomStream(fold_seed(view.seed, "crop"), draw)) if data.crop_rule == 2 else None
            crop = images.Crop(chunk.uniform[row, :5], tuple(data.crop_scale), tuple(data.crop_ratio), data.flip, more)
        for attempt, record in self._candidates(chunk, row):
            try:
                if reason := self._refused(record):
                    raise images.Unusable(reason)
                pixels = images.load(record.get("image", b""), data.image_size, crop, data.max_pixels)
            except images.Unusable as error:
                if not attempt:
                    chunk.example["reason"][row] = images.REASONS.index(str(error))
            else:
                return view.change(pixels, generator(fold_seed(view.seed, "change"), draw)) if view.change else pixels
        return None

    def _refused(self, record: Record) -> str:
        """Why an example cannot be used, before anything of it is decoded; empty: it may."""
        absent = "text" in self._modalities and "caption" not in record
        return record.get("unusable") or (images.NO_CAPTION if absent else "")

    def _words(self, chunk: _Chunk, text: Modality) -> tuple[np.ndarray, np.ndarray]:
        """Token ids `[c, T] int32` of each example's caption, and how many there are, `[c] int32`."""
        assert self._tokenizer is not None
        ids, length = encode_batch(
            self._tokenizer, [chunk.caption(row) for row in range(len(chunk.records))], text.tokens
        )
        if "picture" not in self._modalities:  # beside a picture an empty caption is none; alone it is nothing
            for row in np.flatnonzero(length == 0).tolist():
                reason = self._refused(chunk.records[row]) or images.NO_WORDS
                chunk.example["reason"][row] = images.REASONS.index(reason)
                for _ in self._candidates(chunk, row):
                    one, count = encode_batch(self._tokenizer, [chunk.caption(row)], text.tokens)
                    if count[0]:
                        ids[row], length[row] = one[0], count[0]
                        break
        chunk.example["caption_id"] = np.array([content_id(chunk.caption(row)) for row in range(len(ids))])
        return ids, length

    def _candidates(self, chunk: _Chunk, row: int) -> Iterator[tuple[int, Record]]:
        """Attempts and records of an example, until one is used; what is at hand stands in `chunk` meanwhile."""
        place, draw, first = chunk.places[row], chunk.draws[row], chunk.example["index"][row]
        yield 0, chunk.records[row]
        for attempt in range(1, ATTEMPTS):
            index = int(self._feed.views[place].order.index(draw, attempt))
            chunk.records[row] = self._read(place, np.array([index]))[0]
            chunk.example["attempt"][row], chunk.example["index"][row] = attempt, index
            yield attempt, chunk.records[row]
        chunk.records[row] = Record()
        chunk.example["attempt"][row], chunk.example["index"][row] = ATTEMPTS, first

    def _captioned(self, chunk: _Chunk) -> np.ndarray:
        """Which examples may have their caption, `[c] bool`."""
        index, captioned = chunk.example["index"], np.ones(len(chunk.records), bool)
        for place, view in enumerate(self._feed.views):
            if view.caption_fraction < 1.0:
                keeps = keeps_caption(index % view.order.n, view.order.n, view.caption_fraction, view.seed)
                captioned &= np.asarray(keeps) | (np.array(chunk.places) != place)
        return captioned

    def _read(self, place: int, indices: np.ndarray) -> list[Record]:
        """Retries a failing storage, then stops the run: skipping would make two runs differ."""
        # Once given up, every candidate of every example under way would be as patient again.
        for attempt in range(0 if self.failure else _READ_TRIES):
            try:
                return self._feed.sources[place].read(indices)
            except OSError as error:
                if attempt == _READ_TRIES - 1:
                    where = where_of(self._feed.sources[place])
                    self.failure = UserError(f"{where}: reading the data failed {_READ_TRIES} times: {error}")
                else:
                    time.sleep(0.2 * 4**attempt)
        return [Record() for _ in indices]


def masked(
    group: Group, streams: Sequence[RandomStream], tokens: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, TokenSet]:
    """The token sets of a group.

    Args:
        group: whose masker decides.
        streams: of each example, from which its masker draws.
        tokens: values and which of them are real, as `tokens.Masker` takes them; of other modalities too.
    """
    noise = np.stack([group.masker.draw(stream, group.modalities) for stream in streams])
    return group.masker(noise, {modality.name: tokens[modality.name] for modality in group.modalities})


def content_id(content: bytes | None) -> int:
    """A 31-bit hash of a picture's encoded bytes or of a caption; 0 without any."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "big") >> 1 if content else 0


def generator(seed: int, draw: int) -> np.random.Generator:
    """NumPy's random numbers, a function of seed and draw alone."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, draw], np.uint64)))
