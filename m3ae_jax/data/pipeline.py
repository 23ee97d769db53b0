"""From positions of the run to batches: order, reading, decoding, augmentation, tokens, masks.

The batch contract (``B`` examples, ``V`` visible and ``K`` target slots)::

    groups:  {name: {visible: TokenSet, target: TokenSet}}   see masking.TokenSet
    example: {position, index: [B] int64; attempt: [B] int32; valid: [B] bool}
    aux:     {}  (whatever a later objective declares)

`attempt` is the number of candidates that did not decode (`order.ATTEMPTS` if none did: then nothing of the
example is valid).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.data import images, masking
from m3ae_jax.data.order import ATTEMPTS, Order, fold_seed, keeps_caption, token_budget
from m3ae_jax.data.sources.base import Record, Source
from m3ae_jax.data.text import Tokenizer, encode_batch
from m3ae_jax.errors import UserError

_READ_TRIES = 4


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
    """

    order: Order
    seed: int
    augment: bool
    caption_fraction: float = 1.0
    end: int = 2**62


def train_view(config: ConfigDict, source: Source) -> View:
    """The endless shuffled view that training draws from."""
    seed = fold_seed(config.seed, config.data.train.source, "train")
    return View(Order(len(source), seed), seed, augment=True, caption_fraction=config.data.caption_fraction)


def eval_view(config: ConfigDict, source: Source, examples: int) -> View:
    """The first `examples` examples in order, each with one fixed mask."""
    seed = fold_seed(config.seed, config.data.val.source, "val")
    order = Order(len(source), seed, shuffle=False)
    return View(order, seed, augment=False, end=min(examples, len(source)))


class Batches:
    """The batches of steps ``start_step, start_step + 1, ...``.

    Args:
        config: the resolved config.
        groups: what the objective asks for.
        source: where examples come from.
        tokenizer: needed when a group is text.
        view: how the source is looked at.
        batch_size: global batch.
        rows: `[b] int` rows of the global batch that this process reads; all of them by default.
        start_step: first step.
        stop_step: one past the last step; None never ends.
    """

    def __init__(
        self,
        config: ConfigDict,
        groups: tuple[Group, ...],
        source: Source,
        tokenizer: Tokenizer | None,
        view: View,
        *,
        batch_size: int,
        rows: np.ndarray | None = None,
        start_step: int = 0,
        stop_step: int | None = None,
    ) -> None:
        _check_modalities(groups, source, tokenizer)
        self._stages = _Stages(config, groups, source, tokenizer, view)
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._batch_size = batch_size
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

        rows, stages = tf.constant(self._rows, tf.int64), self._stages
        parallel = tf.data.AUTOTUNE
        dataset = tf.data.Dataset.range(*self._range)
        dataset = dataset.map(lambda step: stages.read(step * self._batch_size + rows), num_parallel_calls=2)
        dataset = dataset.unbatch()
        if "image" in stages.modalities:
            dataset = dataset.interleave(
                stages.candidates, cycle_length=16, num_parallel_calls=parallel, deterministic=True
            )
        else:
            dataset = dataset.map(stages.without_image, num_parallel_calls=parallel)
        dataset = dataset.batch(len(self._rows), drop_remainder=True, num_parallel_calls=parallel)
        dataset = dataset.map(stages.finish, num_parallel_calls=2).prefetch(2)
        options = tf.data.Options()
        options.deterministic = True
        options.autotune.enabled = True
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
        source: Source,
        tokenizer: Tokenizer | None,
        view: View,
    ) -> None:
        self._config, self._groups, self._source, self._view = config, groups, source, view
        self._tokenizer = tokenizer
        self.modalities = {group.modality for group in groups}
        self.failure: UserError | None = None

    # -- reading

    def read(self, draws: Any) -> dict[str, Any]:
        """Reads the first candidate of each draw: `[b] int64` to a dict of `[b]` tensors."""
        import tensorflow as tf

        index = self._view.order.index(draws)
        image, caption = tf.numpy_function(self._read, [index], (tf.string, tf.string))
        shape = draws.shape
        return {
            "position": draws,
            "index": index,
            "image": tf.ensure_shape(image, shape),
            "caption": tf.ensure_shape(caption, shape),
        }

    def _read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        records = self._read_patiently(np.atleast_1d(indices))
        shape = np.shape(indices)
        columns = [np.array([r.get(key, b"") for r in records], dtype=object) for key in ("image", "caption")]
        return columns[0].reshape(shape), columns[1].reshape(shape)

    def _read_patiently(self, indices: np.ndarray) -> list[Record]:
        """Retries a failing storage, then stops the run: skipping would make two runs differ."""
        # Once given up, every candidate of every example under way would be as patient again.
        for attempt in range(0 if self.failure else _READ_TRIES):
            try:
                return self._source.read(indices)
            except OSError as error:
                if attempt == _READ_TRIES - 1:
                    self.failure = UserError(f"reading the data failed {_READ_TRIES} times: {error}")
                else:
                    time.sleep(0.2 * 4**attempt)
        return [Record() for _ in indices]

    # -- one example

    def candidates(self, example: dict[str, Any]) -> Any:
        """A data set of one: the first candidate that decodes, else an example with nothing valid."""
        import tensorflow as tf

        def attempt(number: Any) -> dict[str, Any]:
            first = number == 0
            index = tf.cond(
                first, lambda: example["index"], lambda: self._view.order.index(example["position"], number)
            )
            image, caption = tf.cond(
                first,
                lambda: (example["image"], example["caption"]),
                lambda: tuple(tf.numpy_function(self._read, [index], (tf.string, tf.string))),
            )
            return self._example(example["position"], index, number, caption, images.decode(image))

        def nothing() -> dict[str, Any]:
            number = tf.constant(ATTEMPTS, tf.int64)
            blank = tf.zeros([1, 1, 3], tf.uint8)
            return self._example(example["position"], example["index"], number, tf.constant(b""), blank)

        tries = tf.data.Dataset.range(ATTEMPTS).map(attempt).ignore_errors(log_warning=False)
        last = tf.data.Dataset.range(1).map(lambda _: nothing())
        return tries.concatenate(last).take(1)

    def without_image(self, example: dict[str, Any]) -> dict[str, Any]:
        """An example whose picture is not asked for: nothing to decode, nothing to replace."""
        import tensorflow as tf

        attempt = tf.constant(0, tf.int64)
        return self._example(example["position"], example["index"], attempt, example["caption"], None)

    def _example(self, position: Any, index: Any, attempt: Any, caption: Any, image: Any | None) -> dict[str, Any]:
        import tensorflow as tf

        tokens = sum(group.tokens for group in self._groups)
        out = {
            "position": position,
            "index": index,
            "attempt": tf.cast(attempt, tf.int32),
            "caption": tf.ensure_shape(caption, []),
            "noise": tf.random.stateless_uniform([tokens], self._seed("mask", position)),
        }
        if image is not None:
            out["image"] = self._augment(image, position)
        return out

    def _augment(self, image: Any, position: Any) -> Any:
        data = self._config.data
        if not self._view.augment:
            return images.center_crop(image, data.image_size)
        seed = self._seed("crop", position)
        image = images.random_resized_crop(image, data.image_size, seed, tuple(data.crop_scale), tuple(data.crop_ratio))
        return images.random_flip(image, self._seed("flip", position)) if data.flip else image

    def _seed(self, purpose: str, position: Any) -> Any:
        """A stateless seed of (run and source, purpose, draw)."""
        import tensorflow as tf

        return tf.stack([tf.constant(fold_seed(self._view.seed, purpose), tf.int64), position])

    # -- a batch

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Tokens, masks and the batch contract."""
        import tensorflow as tf

        valid = (batch["attempt"] < ATTEMPTS) & (batch["position"] < self._view.end)
        tokens = {"image": self._patches, "text": self._words}
        values = {m: tokens[m](batch, valid) for m in sorted(self.modalities)}
        groups, offset = {}, 0
        for group in self._groups:
            value, real = values[group.modality]
            noise = batch["noise"][:, offset : offset + group.tokens]
            offset += group.tokens
            hidden = masking.random_subset(noise, real, group.mask_ratio)
            groups[group.name] = masking.split(value, real, hidden, group.budget)
        example = {
            "position": batch["position"],
            "index": batch["index"],
            "attempt": batch["attempt"],
            "valid": valid,
        }
        if self.modalities == {"text"}:
            example["attempt"] = tf.zeros_like(batch["attempt"])
        return {"groups": groups, "example": example, "aux": {}}

    def _patches(self, batch: dict[str, Any], valid: Any) -> tuple[Any, Any]:
        import tensorflow as tf

        patches = images.patchify(batch["image"], self._config.data.patch_size)
        return patches, tf.tile(valid[:, None], [1, patches.shape[1]])

    def _words(self, batch: dict[str, Any], valid: Any) -> tuple[Any, Any]:
        import tensorflow as tf

        budget = self._config.data.max_text_tokens
        tokenizer = self._tokenizer
        assert tokenizer is not None

        def encode(captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return encode_batch(tokenizer, captions, budget)

        ids, length = tf.numpy_function(encode, [batch["caption"]], (tf.int32, tf.int32))
        ids = tf.ensure_shape(ids, [batch["caption"].shape[0], budget])
        view = self._view
        keep = valid
        if view.caption_fraction < 1.0:
            keep &= keeps_caption(batch["index"], view.order.n, view.caption_fraction, view.seed)
        real = (tf.range(budget) < tf.reshape(length, [-1, 1])) & keep[:, None]
        return tf.where(real, ids, 0), real


def grid(config: ConfigDict) -> tuple[int, int]:
    """Rows and columns of patches."""
    side = config.data.image_size // config.data.patch_size
    return side, side


def token_slots(config: ConfigDict) -> dict[str, int]:
    """Token slots of each modality before masking."""
    rows, columns = grid(config)
    return {"image": rows * columns, "text": config.data.max_text_tokens}
