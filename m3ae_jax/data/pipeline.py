"""From positions of the run to batches: order, reading, decoding, augmentation, tokens, masks.

The batch contract (``B`` examples, ``V`` visible and ``K`` target slots)::

    groups:  {name: {visible: TokenSet, target: TokenSet}}   see masking.TokenSet
    example: {source: [B] int32; position, index: [B] int64; attempt, reason: [B] int32; valid: [B] bool}
    aux:     {}  (whatever a later objective declares)

`position` is the draw of its source, `index` the example there. `attempt` is the number of candidates that did not
decode (`order.ATTEMPTS` if none did: then nothing of the example is valid), `reason` says why the first of them did
not: its place in `images.REASONS`. Of a mixture of sources a step has one such batch for each kind of data:
``{"parts": {name: batch}}``.

Order, masks and the batch are tf.data's; a chunk of examples at a time is read, decoded and tokenized by Pillow and the
tokenizer, which work side by side in tf.data's threads. TensorFlow's own operations are slower at resizing, know no
Exif, no 16 bits and no alpha, and cannot say why a picture does not decode.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.data import images, masking
from m3ae_jax.data.order import ATTEMPTS, Order, fold_seed, keeps_caption, token_budget
from m3ae_jax.data.sources.base import Record, Source
from m3ae_jax.data.text import Tokenizer, encode_batch
from m3ae_jax.errors import UserError

log = logging.getLogger("m3ae_jax")

_READ_TRIES = 4
_CHUNK = 8  # examples that one thread works on at a time
_DRAWS = 8  # uniform numbers of an example before those of its masks: five of the crop, one of the caption


@dataclasses.dataclass(frozen=True)
class Group:
    """One group of the batch, as an objective declares it.

    Attributes:
        name: the group's key in the batch.
        modality: ``image`` or ``text``.
        tokens: token slots before masking (patches, or the text budget).
        mask_ratio: share of the real tokens that is hidden.
    """

    name: str
    modality: str
    tokens: int
    mask_ratio: float

    @property
    def budget(self) -> tuple[int, int]:
        """Static slots (visible, target)."""
        return token_budget(self.tokens, self.mask_ratio)


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

        found = self.views[0].order.index(draw)
        for other in range(1, len(self.views)):
            found = tf.where(place == other, self.views[other].order.index(draw), found)
        return found


def train_view(config: ConfigDict, source: Source, name: str = "train") -> View:
    """The endless shuffled view that training draws from; `name` is the source's in a mixture."""
    seed = fold_seed(config.seed, name, "train")  # not of the format: repacked data are the same data
    return View(Order(len(source), seed), seed, augment=True, caption_fraction=config.data.caption_fraction)


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
            _check_modalities(groups, source, tokenizer)
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

    @property
    def finish(self) -> Any:
        """The last stage, masks and the batch contract, of ``[parts, c, ...]`` columns: for benchmarks."""
        import tensorflow as tf

        return tf.function(self._stages.finish)

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
        dataset = dataset.map(stages.finish, num_parallel_calls=2).prefetch(2)
        options = tf.data.Options()
        options.deterministic = True
        options.autotune.enabled = False
        options.threading.private_threadpool_size = self._threads + 2
        return dataset.with_options(options)


def _check_modalities(groups: tuple[Group, ...], source: Source, tokenizer: Tokenizer | None) -> None:
    for group in groups:
        if group.modality not in source.modalities:
            raise UserError(
                f"data.modalities asks for {group.modality!r}, but the source holds only {', '.join(source.modalities)}"
            )
        if group.modality == "text" and tokenizer is None:
            raise UserError("data.tokenizer is empty, and text needs one")


class _Stages:
    """The stages of the pipeline as graph functions; what they share is fixed at construction."""

    def __init__(
        self,
        config: ConfigDict,
        groups: tuple[Group, ...],
        feed: Feed,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._config, self._groups, self._feed = config, groups, feed
        self._tokenizer = tokenizer
        self.modalities = {group.modality for group in groups}
        self.failure: UserError | None = None

    # -- a chunk of examples

    def load(self, slots: Any) -> dict[str, Any]:
        """Reads, decodes and tokenizes: slots `[c] int64` to a dict of `[c, ...]` tensors."""
        import tensorflow as tf

        place, draws = self._feed.draws(slots)
        columns = self._columns(slots.shape[0])
        kinds = [tf.as_dtype(dtype) for _, dtype in columns.values()]
        found = tf.numpy_function(self._load, [place, draws, self._feed.index(place, draws)], kinds)
        shaped = [tf.ensure_shape(x, shape) for x, (shape, _) in zip(found, columns.values(), strict=True)]
        return {"place": place, "position": draws, **dict(zip(columns, shaped, strict=True))}

    def _columns(self, count: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shapes and dtypes of what `_load` makes."""
        data = self._config.data
        columns: dict[str, tuple[tuple[int, ...], Any]] = {
            "index": ((count,), np.int64),
            "attempt": ((count,), np.int32),
            "reason": ((count,), np.int32),
            "noise": ((count, sum(group.tokens for group in self._groups)), np.float32),
        }
        if "image" in self.modalities:
            rows, across = grid(self._config)
            columns["patches"] = ((count, rows * across, 3 * data.patch_size**2), np.uint8)
        if "text" in self.modalities:
            columns |= {"ids": ((count, data.max_text_tokens), np.int32), "length": ((count,), np.int32)}
        return columns

    def _load(self, places: np.ndarray, draws: np.ndarray, indices: np.ndarray) -> list[np.ndarray]:
        try:
            return self._loaded(places, draws, indices)
        except Exception as error:  # in tf.data's threads it would become a page of C++ and Python
            log.debug("reading examples %s failed", indices, exc_info=True)
            names = ", ".join(sorted({type(self._feed.sources[place]).__name__ for place in places.tolist()}))
            said = " ".join(f"{type(error).__name__}: {error}".split())
            self.failure = self.failure or UserError(f"{names}: reading examples {indices.tolist()} failed: {said}")
            return [np.zeros(shape, dtype) for shape, dtype in self._columns(len(draws)).values()]

    def _loaded(self, places: np.ndarray, draws: np.ndarray, indices: np.ndarray) -> list[np.ndarray]:
        out = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self._columns(len(draws)).items()}
        records = [Record()] * len(draws)
        for place in set(places.tolist()):
            rows = np.flatnonzero(places == place)
            for row, record in zip(rows.tolist(), self._read(place, indices[rows]), strict=True):
                records[row] = record
        captions = []
        for row, (place, draw, index) in enumerate(zip(places.tolist(), draws.tolist(), indices.tolist(), strict=True)):
            uniform = uniform_numbers(self._feed.views[place].seed, draw, _DRAWS + out["noise"].shape[1])
            out["index"][row], out["noise"][row] = index, uniform[_DRAWS:]
            if "image" in self.modalities:
                of_row = {name: column[row : row + 1] for name, column in out.items()}
                records[row] = self._first_usable(place, draw, records[row], uniform, of_row)
            captions.append(_drawn(records[row], uniform[5]))
        if "text" in self.modalities:
            assert self._tokenizer is not None
            out["ids"], out["length"] = encode_batch(self._tokenizer, captions, self._config.data.max_text_tokens)
            if "image" not in self.modalities:  # beside a picture an empty caption is none; alone it is nothing
                for row in np.flatnonzero(out["length"] == 0).tolist():
                    self._replace_text(places[row], draws[row], {n: column[row : row + 1] for n, column in out.items()})
        return list(out.values())

    def _replace_text(self, place: int, draw: int, out: dict[str, np.ndarray]) -> None:
        """Puts the first candidate with words in the place of a caption without any."""
        assert self._tokenizer is not None
        out["reason"][0] = images.REASONS.index(images.NO_WORDS)
        uniform = uniform_numbers(self._feed.views[place].seed, int(draw), _DRAWS)
        for attempt, index, record in self._others(place, draw):
            caption = _drawn(record, uniform[5])
            ids, length = encode_batch(self._tokenizer, [caption], self._config.data.max_text_tokens)
            if length[0]:
                out["ids"][:], out["length"][:] = ids, length
                out["attempt"][0], out["index"][0] = attempt, index
                return
        out["attempt"][0] = ATTEMPTS

    def _first_usable(
        self, place: int, draw: int, record: Record, uniform: np.ndarray, out: dict[str, np.ndarray]
    ) -> Record:
        """Fills in the picture of the first candidate that decodes; returns its record, or an empty one."""
        data, view = self._config.data, self._feed.views[place]
        crop = images.Crop()
        if view.augment:
            crop = images.Crop(uniform[:5], tuple(data.crop_scale), tuple(data.crop_ratio), data.flip)
        first = (0, int(out["index"][0]), record)
        for attempt, index, candidate in itertools.chain([first], self._others(place, draw)):
            try:
                picture = images.load(candidate.get("image", b""), data.image_size, crop)
            except images.Unusable as error:
                if not attempt:
                    out["reason"][0] = images.REASONS.index(str(error))
            else:
                if view.change is not None:
                    picture = view.change(picture, generator(fold_seed(view.seed, "change"), draw))
                out["patches"][:] = images.patchify(picture[None], data.patch_size)
                out["attempt"][0], out["index"][0] = attempt, index
                return candidate
        out["attempt"][0] = ATTEMPTS
        return Record()

    def _others(self, place: int, draw: int) -> Iterator[tuple[int, int, Record]]:
        """The candidates of a draw after the first: attempt, index, record."""
        for attempt in range(1, ATTEMPTS):
            index = int(self._feed.views[place].order.index(draw, attempt))
            yield attempt, index, self._read(place, np.array([index]))[0]

    def _read(self, place: int, indices: np.ndarray) -> list[Record]:
        """Retries a failing storage, then stops the run: skipping would make two runs differ."""
        # Once given up, every candidate of every example under way would be as patient again.
        for attempt in range(0 if self.failure else _READ_TRIES):
            try:
                return self._feed.sources[place].read(indices)
            except OSError as error:
                if attempt == _READ_TRIES - 1:
                    self.failure = UserError(f"reading the data failed {_READ_TRIES} times: {error}")
                else:
                    time.sleep(0.2 * 4**attempt)
        return [Record() for _ in indices]

    # -- a batch

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Masks and the batch contract, of chunks `[parts, c, ...]`."""
        import tensorflow as tf

        batch = {name: tf.reshape(x, [-1, *x.shape[2:]]) for name, x in batch.items()}
        valid = batch["attempt"] < ATTEMPTS
        for place, view in enumerate(self._feed.views):
            valid &= (batch["place"] != place) | (batch["position"] < view.end)
        tokens = {"image": self._patches, "text": self._words}
        values = {m: tokens[m](batch, valid) for m in sorted(self.modalities)}
        groups, offset = {}, 0
        for group in self._groups:
            value, real = values[group.modality]
            noise = batch["noise"][:, offset : offset + group.tokens]
            offset += group.tokens
            hidden = masking.random_subset(noise, real, group.mask_ratio)
            groups[group.name] = masking.split(value, real, hidden, group.budget)
        example = {name: batch[name] for name in ("position", "index", "attempt", "reason")}
        number = tf.gather(tf.constant(self._feed.numbers, tf.int32), batch["place"])
        return {"groups": groups, "example": {"source": number, **example, "valid": valid}, "aux": {}}

    def _patches(self, batch: dict[str, Any], valid: Any) -> tuple[Any, Any]:
        import tensorflow as tf

        patches = batch["patches"]
        return patches, tf.tile(valid[:, None], [1, patches.shape[1]])

    def _words(self, batch: dict[str, Any], valid: Any) -> tuple[Any, Any]:
        import tensorflow as tf

        ids = batch["ids"]
        keep = valid
        for place, view in enumerate(self._feed.views):
            if view.caption_fraction < 1.0:
                kept = keeps_caption(batch["index"] % view.order.n, view.order.n, view.caption_fraction, view.seed)
                keep &= kept | (batch["place"] != place)
        real = (tf.range(ids.shape[1]) < batch["length"][:, None]) & keep[:, None]
        return tf.where(real, ids, 0), real


def uniform_numbers(seed: int, draw: int, count: int) -> np.ndarray:
    """`[count] float32` in [0, 1), a function of seed and draw alone (Philox 4x64-10, Salmon et al. 2011)."""
    words = np.random.Philox(key=np.array([seed, draw], np.uint64)).random_raw((count + 1) // 2)
    return (words.view(np.uint32)[:count] >> 8).astype(np.float32) * np.float32(2**-24)


def generator(seed: int, draw: int) -> np.random.Generator:
    """NumPy's random numbers, a function of seed and draw alone."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, draw], np.uint64)))


def _drawn(record: Record, uniform: float) -> bytes:
    """The caption, or one of several."""
    several = record.get("captions")
    return several[int(uniform * len(several))] if several else record.get("caption", b"")


def grid(config: ConfigDict) -> tuple[int, int]:
    """Rows and columns of patches."""
    side = config.data.image_size // config.data.patch_size
    return side, side


def token_slots(config: ConfigDict) -> dict[str, int]:
    """Token slots of each modality before masking."""
    rows, columns = grid(config)
    return {"image": rows * columns, "text": config.data.max_text_tokens}
