"""A trained model in a few lines: ``m3ae_jax.load("runs/tiny")``, then `encode` and `reconstruct`.

Needs no TensorFlow. Legend: ``N`` examples, ``L`` patches, ``T`` text tokens, ``D`` width.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from m3ae_jax import config as config_lib
from m3ae_jax.checkpoint.manager import Checkpoints, find, load_params
from m3ae_jax.data import images as image_lib
from m3ae_jax.data.order import hidden_count, token_budget
from m3ae_jax.data.pipeline import grid, token_slots
from m3ae_jax.data.text import Tokenizer, encode_batch, load_tokenizer
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import build
from m3ae_jax.objectives.m3ae import denormalize_pixels, normalize_pixels, patch_statistics

BATCH_SIZES = (1, 8, 64)
"""What the model is compiled for; other numbers of examples are cut and filled up to these."""

Picture = np.ndarray | Image.Image | bytes
"""`[H, W, 3] uint8` (or `[H, W]`, grey), a Pillow image, or the bytes of a picture file."""


@dataclasses.dataclass(frozen=True)
class Features:
    """What the encoder says of examples.

    Attributes:
        cls: `[N, D] float32`, of the whole example.
        image: `[N, L, D] float32`, of the patches in row-major order; None without pictures.
        text: `[N, T, D] float32`, of the words; None without texts.
        text_valid: `[N, T] bool`, which of them are words and not padding; None without texts.
    """

    cls: np.ndarray
    image: np.ndarray | None = None
    text: np.ndarray | None = None
    text_valid: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """What the model makes of hidden tokens; None is what was not given.

    Attributes:
        images: `[N, S, S, 3] uint8`, the hidden patches as the model paints them.
        image_hidden: `[N, L] bool`.
        texts: with the model's guesses in place of the hidden words.
        tokens: `[N, T] int32` of `texts`.
        text_hidden: `[N, T] bool`.
    """

    images: np.ndarray | None = None
    image_hidden: np.ndarray | None = None
    texts: list[str] | None = None
    tokens: np.ndarray | None = None
    text_hidden: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Stored:
    """A checkpoint, read.

    Attributes:
        config: resolved.
        params: nested dicts of NumPy arrays.
        step: of training.
        tokenizer: its fingerprint; "" without text.
    """

    config: ConfigDict
    params: dict[str, Any]
    step: int
    tokenizer: str


def read(checkpoint: str, *, objective: str = "") -> Stored:
    """Reads a checkpoint: parameters and the config it was trained under.

    Args:
        checkpoint: a run's folder, or one checkpoint in it.
        objective: the import path that its config names, if it names one: it is code, which will be imported.

    Raises:
        UserError: no whole checkpoint there, or it names code that was not allowed.
    """
    folder, step = find(checkpoint)
    checkpoints = Checkpoints(folder, keep=1, read_only=True)
    meta = checkpoints.meta(step)
    checkpoints.close()
    config = config_lib.resolve(config_lib.from_json(json.dumps(meta["config"])))
    if ":" in config.objective and config.objective != objective:
        raise UserError(
            f"{checkpoint} names code to import: objective={config.objective!r}; if you trust it, give objective= so"
        )
    return Stored(config, load_params(str(folder / str(step))), step, str(meta.get("tokenizer", "")))


def vocabulary(params: Mapping[str, Any]) -> int:
    """Words of a model; 0 without text."""
    return params["text_embedding"]["embedding"].shape[0] if "text_embedding" in params else 0


def load(checkpoint: str, *, tokenizer: str = "", objective: str = "") -> Model:
    """Loads a trained model.

    Args:
        checkpoint: a run's folder, or one checkpoint in it, as ``runs/tiny/checkpoints/1000``.
        tokenizer: where the tokenizer's file lies now, if not where it was.
        objective: see `read`.

    Raises:
        UserError: no whole checkpoint there, or the tokenizer is another one.
    """
    stored = read(checkpoint, objective=objective)
    if tokenizer:
        stored.config.data.tokenizer = tokenizer
    return Model(stored)


class Model:
    """A trained model on this machine's first device.

    Attributes:
        config: what it was trained under.
        modalities: what it was trained on, of ``image`` and ``text``.
        step: of training.
    """

    def __init__(self, stored: Stored) -> None:
        self.config, self.step = stored.config, stored.step
        self.config.model.update(attention="xla", remat="none")  # for one device, and no gradient
        self.modalities = tuple(self.config.data.modalities)
        self._fingerprint = stored.tokenizer
        self._vocabulary = vocabulary(stored.params)
        self._objective = build(self.config, self._vocabulary)
        self._params = jax.device_put(stored.params, jax.devices()[0])
        self._slots = token_slots(self.config)
        self._encode = jax.jit(self._objective.encode)
        self._reconstruct = jax.jit(self._objective.reconstruct)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the training.

        Raises:
            UserError: the model knows no text, or its tokenizer is not there any more, or is another one.
        """
        if "text" not in self.modalities:
            raise UserError("this model was trained on pictures alone: it has no tokenizer")
        path = self.config.data.tokenizer
        if not path:
            raise UserError("the checkpoint names no tokenizer: give load(..., tokenizer=FILE)")
        found = load_tokenizer(path)
        if found.vocab_size != self._vocabulary:
            raise UserError(f"tokenizer={path!r} has {found.vocab_size} words, the model {self._vocabulary}")
        if self._fingerprint and found.fingerprint != self._fingerprint:
            raise UserError(f"tokenizer={path!r} is another one than the model was trained with")
        return found

    def encode(self, images: Sequence[Picture] | None = None, texts: Sequence[str] | None = None) -> Features:
        """Features of pictures, of texts, or of pairs of both; nothing is hidden.

        Args:
            images: N pictures of any size; the centred square is taken and resized.
            texts: N texts; those that are too long lose their end.

        Raises:
            UserError: neither is given, their numbers differ, or the model was not trained on one of them.
        """
        tokens = self._tokens(images, texts)
        visible = {m: {"visible": _all_of(value, real)} for m, (value, real) in tokens.items()}
        found = self._run(self._encode, visible)
        real = tokens["text"][1] if "text" in tokens else None
        return Features(found["cls"], found.get("image"), found.get("text"), real)

    def reconstruct(
        self,
        images: Sequence[Picture] | None = None,
        texts: Sequence[str] | None = None,
        image_mask_ratio: float | None = None,
        text_mask_ratio: float | None = None,
        seed: int = 0,
    ) -> Reconstruction:
        """Hides a random part of each example and asks the model for it.

        Args:
            images: as of `encode`.
            texts: as of `encode`.
            image_mask_ratio: share of the patches that is hidden; None: as in training.
            text_mask_ratio: share of the words that is hidden; None: as in training.
            seed: of what is hidden.

        Raises:
            UserError: as `encode`; a ratio is not between 0 and 1.
        """
        tokens = self._tokens(images, texts)
        ratios = {"image": image_mask_ratio, "text": text_mask_ratio}
        rng = np.random.default_rng(seed)
        groups, hidden = {}, {}
        for m, (value, real) in tokens.items():
            asked = ratios[m]
            ratio = float(self.config.model[f"{m}_mask_ratio"]) if asked is None else float(asked)
            if not 0.0 <= ratio <= 1.0:
                raise UserError(f"{m}_mask_ratio={asked!r} is not between 0 and 1")
            hidden[m] = _draw(rng, real, ratio)
            slots = token_budget(real.shape[1], ratio)
            groups[m] = {
                "visible": _take(value, real & ~hidden[m], slots[0]),
                "target": _take(value, hidden[m], slots[1]),
            }
        guesses = self._run(self._reconstruct, groups)
        result: dict[str, Any] = {}
        if "image" in tokens:
            result["images"] = self._paint(tokens["image"][0], groups["image"]["target"], guesses["image"])
            result["image_hidden"] = hidden["image"]
        if "text" in tokens:
            ids = _put(tokens["text"][0], groups["text"]["target"], np.argmax(guesses["text"], axis=-1))
            result["tokens"], result["text_hidden"] = ids, hidden["text"]
            rows = zip(ids, tokens["text"][1], strict=True)
            result["texts"] = [self.tokenizer.decode(row[real]) for row, real in rows]
        return Reconstruction(**result)

    def _tokens(
        self, images: Sequence[Picture] | None, texts: Sequence[str] | None
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each modality given: values `[N, K, ...]` and which are real, `[N, K] bool`."""
        given = {m: x for m, x in (("image", images), ("text", texts)) if x is not None}
        if not given or len({len(x) for x in given.values()}) > 1:
            counts = ", ".join(f"{len(x)} {m}s" for m, x in given.items()) or "neither images nor texts"
            raise UserError(f"images and texts must be given in equal numbers, or one of them: here are {counts}")
        for m in given:
            if m not in self.modalities:
                raise UserError(f"{m}s were given, the model was trained on {' and '.join(self.modalities)} alone")
        found = {}
        if images is not None:
            data = self.config.data
            square = [_square(picture, data.image_size) for picture in images]
            patches = image_lib.patchify(np.stack(square), data.patch_size) if square else _none(data, self._slots)
            found["image"] = patches, np.ones(patches.shape[:2], bool)
        if texts is not None:
            if isinstance(texts, str):
                raise UserError("texts is one text; give a list of them")
            ids, length = encode_batch(
                self.tokenizer, [t.encode("utf-8", "replace") for t in texts], self._slots["text"]
            )
            found["text"] = ids, np.arange(self._slots["text"]) < length[:, None]
        return found

    def _run(self, function: Any, groups: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """`function` of all examples, in batches of `BATCH_SIZES`."""
        count = len(jax.tree.leaves(groups)[0])
        parts = []
        for start, stop, size in _batches(count):
            padded = jax.tree.map(
                lambda x, start=start, stop=stop, size=size: _fill_up(x[start:stop], size), dict(groups)
            )
            found = jax.device_get(function(self._params, {"groups": padded}))
            parts.append({name: np.asarray(x, np.float32)[: stop - start] for name, x in found.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _paint(self, patches: np.ndarray, target: Mapping[str, np.ndarray], guess: np.ndarray) -> np.ndarray:
        """Pictures `[N, S, S, 3] uint8` with the guesses in place of the target patches."""
        if self.config.loss.normalize_patches:
            # Only the patch's own statistics give such a guess a colour, as in MAE's pictures.
            mean, std = patch_statistics(normalize_pixels(jnp.asarray(target["value"]), self.config))
            guess = guess * np.asarray(std) + np.asarray(mean)
        pixels = np.asarray(denormalize_pixels(jnp.asarray(guess), self.config))
        return image_lib.unpatchify(_put(patches, target, pixels), self.config.data.patch_size, grid(self.config))


def _none(data: ConfigDict, slots: Mapping[str, int]) -> np.ndarray:
    return np.zeros((0, slots["image"], 3 * data.patch_size**2), np.uint8)


def _square(picture: Picture, size: int) -> np.ndarray:
    """The centred square, `[size, size, 3] uint8`, as validation sees pictures."""
    if isinstance(picture, bytes):
        try:
            return image_lib.load(picture, size)
        except image_lib.Unusable as error:
            raise UserError(f"a picture cannot be used: {error}") from None
    if not isinstance(picture, Image.Image):
        array = np.asarray(picture)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)):
            raise UserError(f"a picture is {array.dtype} {list(array.shape)}; uint8 [H, W, 3] is needed")
        picture = Image.fromarray(array)
    box = image_lib.Crop().box(*picture.size)
    area = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    part = image_lib.eight_bit(picture).resize((size, size), Image.Resampling.BICUBIC, box=area)
    return np.asarray(image_lib.on_white(part))


def _batches(count: int) -> Iterator[tuple[int, int, int]]:
    """Start, end and padded size of each batch of `count` examples; one, of padding alone, of none."""
    largest = BATCH_SIZES[-1]
    for start, stop in itertools.pairwise([*range(0, max(count, 1), largest), max(count, 1)]):
        stop = min(stop, count)
        yield start, stop, next(size for size in BATCH_SIZES if size >= stop - start)


def _fill_up(x: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])


def _all_of(value: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    position = np.broadcast_to(np.arange(real.shape[1], dtype=np.int32), real.shape)
    return {"value": value, "position": np.where(real, position, 0), "valid": real}


def _draw(rng: np.random.Generator, real: np.ndarray, ratio: float) -> np.ndarray:
    """Which of the real tokens are hidden, `[N, K] bool`: of n of them ``hidden_count(n, ratio)``, at random."""
    noise = np.where(real, rng.random(real.shape), 2.0)
    rank = np.argsort(np.argsort(noise, axis=-1, kind="stable"), axis=-1, kind="stable")
    return rank < hidden_count(real.sum(axis=-1, keepdims=True), ratio)


def _take(value: np.ndarray, chosen: np.ndarray, slots: int) -> dict[str, np.ndarray]:
    """The chosen tokens of each example, in order of position, in `slots` slots (`data.masking.take`)."""
    position = np.argsort(~chosen, axis=-1, kind="stable")[:, :slots].astype(np.int32)
    valid = np.arange(slots) < chosen.sum(axis=-1, keepdims=True)
    position = np.where(valid, position, 0).astype(np.int32)
    taken = np.take_along_axis(value, position.reshape(*position.shape, *[1] * (value.ndim - 2)), axis=1)
    keep = valid.reshape(*valid.shape, *[1] * (value.ndim - 2))
    return {"value": np.where(keep, taken, 0).astype(value.dtype), "position": position, "valid": valid}


def _put(value: np.ndarray, target: Mapping[str, np.ndarray], guess: np.ndarray) -> np.ndarray:
    """`value` with the guesses at the target's valid slots."""
    out = value.copy()
    row, slot = np.nonzero(target["valid"])
    out[row, target["position"][row, slot]] = guess[row, slot]
    return out
