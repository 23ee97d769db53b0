"""A trained model in a few lines: ``m3ae_jax.load("runs/tiny")``, then `encode` and `reconstruct`.

Needs no TensorFlow. Legend: ``N`` examples, ``L`` patches, ``T`` text tokens, ``D`` width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

import m3ae_jax.config as config_lib
import m3ae_jax.data.images as image_lib
from m3ae_jax.checkpoint.manager import Checkpoints, find, load_params
from m3ae_jax.data.text import Tokenizer, encode_batch, load_tokenizer
from m3ae_jax.data.tokens import Group, group_of, patch_grid
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import Encodes, Restores, build

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
        vocabulary: its number of ids; 0 without text.
    """

    config: ConfigDict
    params: dict[str, Any]
    step: int
    tokenizer: str
    vocabulary: int


def read(checkpoint: str, *, objective: str = "") -> Stored:
    """Reads a checkpoint: parameters and the config it was trained under.

    Args:
        checkpoint: a run's folder, or one checkpoint in it.
        objective: the import path that its config names, if it names one: it is code, which will be imported.

    Raises:
        UserError: no whole checkpoint there, or it names code that was not allowed.
    """
    folder, step = find(checkpoint)
    with contextlib.closing(Checkpoints(folder, keep=1, read_only=True)) as checkpoints:
        meta = checkpoints.meta(step)
    config = config_lib.resolve(config_lib.from_json(json.dumps(meta["config"])))
    if ":" in config.objective and config.objective != objective:
        raise UserError(
            f"{checkpoint} names code to import: objective={config.objective!r}; if you trust it, give objective= so"
        )
    vocabulary = max((modality["vocabulary"] for modality in meta["modalities"]), default=0)
    return Stored(config, load_params(str(folder / str(step))), step, str(meta.get("tokenizer", "")), vocabulary)


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
        self._stored = dataclasses.replace(stored, params={})  # those on the device are enough
        self.config.compute.update(attention="xla", remat="none")  # for one device, and no gradient
        self._objective = build(self.config, stored.vocabulary)
        self._params = jax.device_put(stored.params, jax.devices()[0])
        self._compiled: dict[str, Any] = {}
        views = {m: self._objective.view((m,)) for m in self.config.data.modalities}  # none of what it does not know
        self._views = {m: group_of(groups, m) for m, groups in views.items() if groups}
        self.modalities = tuple(self._views)

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
        tokenizer, words, fingerprint = load_tokenizer(path), self._stored.vocabulary, self._stored.tokenizer
        if tokenizer.vocab_size != words:
            raise UserError(f"tokenizer={path!r} has {tokenizer.vocab_size} words, the model {words}")
        if fingerprint and tokenizer.fingerprint != fingerprint:
            raise UserError(f"tokenizer={path!r} is another one than the model was trained with")
        return tokenizer

    def encode(self, images: Sequence[Picture] | None = None, texts: Sequence[str] | None = None) -> Features:
        """Features of pictures, of texts, or of pairs of both; nothing is hidden.

        Args:
            images: N pictures of any size; the centred square is taken and resized.
            texts: N texts; those that are too long lose their end.

        Raises:
            UserError: neither is given, their numbers differ, or the model was not trained on one of them.
        """
        encode = self._method("encode", Encodes)
        tokens = self._tokens(images, texts)
        encoded = self._run(encode, {self._views[m].name: _masked(self._views[m], pair) for m, pair in tokens.items()})
        features = {m: encoded.tokens[self._views[m].name] for m in tokens}
        real = tokens["text"][1] if "text" in tokens else None
        return Features(encoded.pooled["cls"], features.get("image"), features.get("text"), real)

    def reconstruct(
        self,
        images: Sequence[Picture] | None = None,
        texts: Sequence[str] | None = None,
        image_mask_ratio: float | None = None,
        text_mask_ratio: float | None = None,
        seed: int = 0,
    ) -> Reconstruction:
        """Hides a random part of each example and lets the model restore it.

        Args:
            images: as of `encode`.
            texts: as of `encode`.
            image_mask_ratio: share of the patches that is hidden; None: as in training.
            text_mask_ratio: share of the words that is hidden; None: as in training.
            seed: of what is hidden.

        Raises:
            UserError: as `encode`; a ratio is not between 0 and 1.
        """
        restore = self._method("restore", Restores)
        tokens = self._tokens(images, texts)
        ratios = {"image": image_mask_ratio, "text": text_mask_ratio}
        rng = np.random.default_rng(seed)
        groups = {}
        for m, pair in tokens.items():
            view = self._hidden(m, ratios[m])
            groups[view.name] = _masked(view, pair, rng)
        restored = self._run(restore, groups)
        result: dict[str, Any] = {}
        for m, (value, real) in tokens.items():
            name = self._views[m].name
            target = groups[name]["target"]
            hidden = _put(np.zeros_like(real), target, target["valid"])
            filled = _put(value, target, restored[name].value)
            if m == "image":
                size = self.config.data.patch_size
                result["images"] = image_lib.unpatchify(filled, size, patch_grid(self.config))
                result["image_hidden"] = hidden
            else:
                result["tokens"], result["text_hidden"] = filled, hidden
                result["texts"] = [self.tokenizer.decode(row[of]) for row, of in zip(filled, real, strict=True)]
        return Reconstruction(**result)

    def _method(self, name: str, protocol: Any) -> Any:
        """A method of the objective, compiled once."""
        if not isinstance(self._objective, protocol):
            raise UserError(f"this model was trained by {self.config.objective!r}, which cannot {name}")
        if name not in self._compiled:
            self._compiled[name] = jax.jit(getattr(self._objective, name))
        return self._compiled[name]

    def _hidden(self, modality: str, ratio: float | None) -> Group:
        """The view of a modality of which a share is hidden; None: as much as in training."""
        if ratio is None:
            return group_of(self._objective.groups, modality)
        if not 0.0 <= ratio <= 1.0:
            raise UserError(f"{modality}_mask_ratio={ratio!r} is not between 0 and 1")
        return group_of(self._objective.view((modality,), {modality: float(ratio)}), modality)

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
        tokens = {}
        if images is not None:
            data = self.config.data
            square = [_square(picture, data.image_size) for picture in images]
            whole = np.stack(square) if square else np.zeros((0, data.image_size, data.image_size, 3), np.uint8)
            patches = image_lib.patchify(whole, data.patch_size)
            tokens["image"] = patches, np.ones(patches.shape[:2], bool)
        if texts is not None:
            if isinstance(texts, str):
                raise UserError("texts is one text; give a list of them")
            slots = self._views["text"].modalities[0].tokens
            ids, length = encode_batch(self.tokenizer, [t.encode("utf-8", "replace") for t in texts], slots)
            tokens["text"] = ids, np.arange(slots) < length[:, None]
        return tokens

    def _run(self, function: Any, groups: Mapping[str, Any]) -> Any:
        """`function` of all examples, in batches of `BATCH_SIZES`."""
        results, largest = [], BATCH_SIZES[-1]
        for start in range(0, max(len(jax.tree.leaves(groups)[0]), 1), largest):  # of none, a batch of padding alone
            rows = jax.tree.map(lambda x, start=start: x[start : start + largest], dict(groups))
            count = len(jax.tree.leaves(rows)[0])
            size = next(size for size in BATCH_SIZES if size >= count)
            padded = jax.tree.map(lambda x, size=size: _fill_up(x, size), rows)
            result = jax.device_get(function(self._params, {"groups": padded}))
            results.append(jax.tree.map(lambda x, count=count: _exact(x)[:count], result))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def _exact(x: np.ndarray) -> np.ndarray:
    """In float32, what the device has in bfloat16."""
    return np.asarray(x, np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


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


def _fill_up(x: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])


def _masked(
    view: Group, tokens: tuple[np.ndarray, np.ndarray], rng: np.random.Generator | None = None
) -> dict[str, Any]:
    """Token sets of a group, of values and which of them are real; what is hidden is random."""
    (modality,) = view.modalities
    noise = np.zeros(tokens[1].shape) if rng is None else rng.random(tokens[1].shape)
    return dict(view.masker(noise, {modality.name: tokens}))


def _put(value: np.ndarray, target: Mapping[str, np.ndarray], guess: np.ndarray) -> np.ndarray:
    """`value` with the guesses at the target's valid slots."""
    out = value.copy()
    row, slot = np.nonzero(target["valid"])
    out[row, target["position"][row, slot]] = guess[row, slot]
    return out
