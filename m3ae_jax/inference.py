"""A trained model in a few lines: ``m3ae_jax.load("runs/tiny")``, then `encode` and `reconstruct`.

Needs no TensorFlow. Legend: ``N`` examples, ``L`` patches, ``T`` text tokens, ``D`` width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import m3ae_jax.config as config_lib
import m3ae_jax.data.given as given
import m3ae_jax.data.images as image_lib
from m3ae_jax.checkpoint import manifest
from m3ae_jax.checkpoint import meta as meta_lib
from m3ae_jax.checkpoint.manager import Checkpoints, differences_of, find
from m3ae_jax.data.given import Picture
from m3ae_jax.data.run_tokenizer import of_run
from m3ae_jax.data.text import Tokenizer, encode_batch
from m3ae_jax.data.tokens import Group, group_of, patch_grid
from m3ae_jax.errors import UserError, one_of
from m3ae_jax.objectives.base import Embeds, Encodes, Matches, Restores, Tokenizes, build, model_params, pool

BATCH_SIZES = (1, 8, 64)
"""What a model is compiled for; other numbers of examples are cut and filled up to these."""

Pictures = Picture | Iterable[Picture]
"""One, or N of them: a list, a generator, an array `[N, H, W, 1 | 3 | 4] uint8` (`data.given`)."""
Texts = str | Iterable[str]
"""One, or N of them."""


@dataclasses.dataclass(frozen=True)
class Features:
    """What the encoder says of examples.

    Attributes:
        cls: `[N, D] float32`, of the whole example.
        pooled: `[N, D] float32`, likewise, by the ``pooling`` that was asked for.
        image: `[N, L, D] float32`, of the patches in row-major order; None without pictures.
        text: `[N, T, D] float32`, of the words; None without texts.
        text_valid: `[N, T] bool`, which of them are words and not padding; None without texts.
    """

    cls: np.ndarray
    pooled: np.ndarray
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
        run: the folder of the run; None of what is in memory alone.
    """

    config: ConfigDict
    params: dict[str, Any]
    step: int
    tokenizer: str
    vocabulary: int
    run: Path | None = None


def read(checkpoint: str, *, objective: str = "") -> Stored:
    """Reads a checkpoint: parameters and the config it was trained under.

    Args:
        checkpoint: a run's folder, or one checkpoint in it.
        objective: the import path that its config names, if it names one: it is code, which will be imported.

    Raises:
        UserError: no whole checkpoint there, or it names code that was not allowed.
    """
    with _quiet():
        folder, step = find(checkpoint)
        place = folder / str(step)
        with contextlib.closing(Checkpoints(folder, keep=1, read_only=True)) as checkpoints:
            meta = checkpoints.meta(step)
            meta_lib.check_version(meta, place)
            config = config_lib.resolve(config_lib.from_json(meta_lib.config_of(meta, place)))
            if ":" in config.objective and config.objective != objective:
                raise UserError(
                    f"{checkpoint} names code to import: objective={config.objective!r}; if you trust it, give "
                    "objective= so"
                )
            vocabulary, tokenizer = meta_lib.vocabulary(meta, place), meta_lib.field(meta, "tokenizer", str, place)
            model = build(config, vocabulary)
            if not vocabulary and any(m.name == "text" for group in model.groups for m in group.modalities):
                raise UserError(
                    f"checkpoint {place} was trained on texts, and its table of modalities has no vocabulary"
                )
            params = checkpoints.params(step, model.model_extra)

    def fresh(rng: jax.Array) -> Any:
        boxed = model.init(rng)
        return model_params(model, boxed, model.init_extra(boxed, rng) if model.model_extra else {})

    wanted = nn.unbox(jax.eval_shape(fresh, jax.random.key(0)))
    if differences := differences_of(params, wanted):
        raise UserError(f"checkpoint {place} holds other parameters than its config: {manifest.summary(differences)}")
    return Stored(config, params, step, tokenizer, vocabulary, folder.parent)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it absl's warnings are not shown: orbax has several for whatever is opened to be read alone."""
    of_absl = logging.getLogger("absl")
    before = of_absl.level
    of_absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        of_absl.setLevel(before)


def load(checkpoint: str, *, tokenizer: str = "", objective: str = "") -> Model:
    """Loads a trained model; of a visual tokenizer a `VisualTokenizer`.

    Args:
        checkpoint: a run's folder, or one checkpoint in it, as ``runs/tiny/checkpoints/1000``.
        tokenizer: the tokenizer's file, if it is neither where it was nor in the run's folder.
        objective: see `read`.

    Raises:
        UserError: no whole checkpoint there, or the tokenizer is another one.
    """
    model = Model(read(checkpoint, objective=objective), tokenizer)
    return VisualTokenizer.of(model) if isinstance(model.objective, Tokenizes) else model


class Model:
    """A trained model on this machine's first device.

    Args:
        stored: what `read` gave.
        tokenizer: its file, where neither the config nor the run's folder leads to it.

    Attributes:
        config: what it was trained under.
        modalities: what it was trained on, of ``image`` and ``text``.
        step: of training.
        batch_sizes: what it is compiled for, ascending.
        objective: by which it was trained.
    """

    def __init__(self, stored: Stored, tokenizer: str = "") -> None:
        self.config, self.step = stored.config, stored.step
        self._stored = dataclasses.replace(stored, params={})  # those on the device are enough
        self.config.compute.update(attention="xla", remat="none")  # for one device, and no gradient
        self.objective: Any = build(self.config, stored.vocabulary)
        self._params = jax.device_put(stored.params, jax.devices()[0])
        self._given_tokenizer = tokenizer
        self._compiled: dict[str, Any] = {}
        self.batch_sizes = list(BATCH_SIZES)
        views = {m: self.objective.view((m,)) for m in self.config.data.modalities}  # none of what it does not know
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
        path, run = self._given_tokenizer, None
        if not path:
            path, run = self.config.data.tokenizer, self._stored.run
        how = "give the file of that which it was trained with: load(..., tokenizer=FILE)"
        return of_run(path, run, how, self._stored.tokenizer, self._stored.vocabulary)

    def __repr__(self) -> str:
        """What it is: objective, size, modalities, and where it comes from."""
        count = sum(x.size for x in jax.tree.leaves(self._params))
        amount = f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,}"
        data = self.config.data
        sees = {
            "image": f"image ({data.image_size} px in patches of {data.patch_size})",
            "text": f"text ({data.max_text_tokens} tokens)",
        }
        inputs = " and ".join(sees.get(m, m) for m in self.modalities)
        where = f" of {self._stored.run}" if self._stored.run else ""
        return f"<Model {self.config.objective}: {amount} parameters, {inputs}; step {self.step}{where}>"

    def encode(
        self,
        images: Pictures | None = None,
        texts: Texts | None = None,
        *,
        pooling: str = "cls",
        normalize: bool = False,
        tokens: bool = True,
    ) -> Features:
        """Features of pictures, of texts, or of pairs of both; nothing is hidden.

        One picture or one text is one example: the results' first axis is then 1. Of a picture of any size the centred
        square is taken and resized.

        Args:
            images: a picture, or N of them. Of an array the number of axes decides: `[H, W]` and `[H, W, 1 | 3 | 4]`
                are one, `[N, H, W, 1 | 3 | 4]` are N; all uint8. A string is a file's path.
            texts: a text, or N of them; those that are too long lose their end.
            pooling: of what `Features.pooled` is, by the names that the evaluations use: ``cls``, or the ``mean`` of
                the patches and words.
            normalize: divides `cls` and `pooled` by their length, so that a product of two is their cosine.
            tokens: False leaves out `image` and `text`, which take by far the most memory.

        Raises:
            UserError: neither is given, their numbers differ, one is no picture or text, or the model was not trained
                on one of them.
        """
        values = self._tokens(images, texts)
        groups = {self._views[m].name: _masked(self._views[m], pair) for m, pair in values.items()}
        encoded, whole = self._run(self._encoder(tokens), groups)
        if pooling not in whole:
            raise UserError(one_of("pooling", pooling, whole))
        if normalize:
            whole = {name: _unit(x) for name, x in whole.items()}
        features = {m: encoded[self._views[m].name] for m in values if tokens}
        real = values["text"][1] if "text" in values else None
        return Features(whole["cls"], whole[pooling], features.get("image"), features.get("text"), real)

    def embed(self, images: Pictures | None = None, texts: Texts | None = None) -> dict[str, np.ndarray]:
        """Where pictures and texts lie in the space in which those that belong together are close.

        Args:
            images: as of `encode`; their number may be another than that of the texts.
            texts: likewise.

        Returns:
            ``image`` and ``text``, as far as given, `[N, d] float32` of length 1: a product of two is their cosine.

        Raises:
            UserError: as `encode`, or the model does not embed.
        """
        embed = self._compile("embed", self._able("embed", Embeds))
        if images is None and texts is None:
            self._tokens(None, None)  # refuses that
        given: dict[str, Any] = {"image": (images, None), "text": (None, texts)}
        found: dict[str, np.ndarray] = {}
        for m, pair in given.items():
            if any(one is not None for one in pair):
                tokens = self._tokens(*pair)[m]
                found |= self._run(embed, {self._views[m].name: _masked(self._views[m], tokens)})
        return found

    def match(self, images: Pictures, texts: Texts) -> np.ndarray:
        """Whether pictures and texts belong together, by a look at both.

        Args:
            images: as of `encode`, N of them.
            texts: N of them.

        Returns:
            Logits `[N] float32`, the higher the better they fit.

        Raises:
            UserError: as `encode`, or the model does not match.
        """
        match = self._compile("match", self._able("match", Matches))
        values = self._tokens(images, texts)
        logits: np.ndarray = self._run(match, {self._views[m].name: _masked(self._views[m], values[m]) for m in values})
        return logits

    def reconstruct(
        self,
        images: Pictures | None = None,
        texts: Texts | None = None,
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
            UserError: as `encode`; a ratio is not between 0 and 1, or the seed is no whole number from 0 on.
        """
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise UserError(f"seed={seed!r} is not a whole number from 0 on")
        restore = self._compile("restore", self._able("restore", Restores))
        tokens = self._tokens(images, texts)
        ratios = {"image": image_mask_ratio, "text": text_mask_ratio}
        rng = np.random.default_rng(int(seed))
        groups = {}
        for m, pair in tokens.items():
            view = self._hidden(m, ratios[m])
            groups[view.name] = _masked(view, pair, rng)
        restored = self._run(restore, groups)
        result: dict[str, Any] = {}
        for m, (value, real) in tokens.items():
            name = self._views[m].name
            target = groups[name]["target"]
            if name not in restored:
                if target["valid"].any():
                    raise UserError(
                        f"{m}_mask_ratio={ratios[m]!r}: the objective {self.config.objective!r} restores no {m}; "
                        f"set {m}_mask_ratio=0"
                    )
                continue
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

    def _encoder(self, tokens: bool) -> Any:
        """Features of the tokens, `{group: [N, K, D]}`, empty without `tokens`, and of whole examples, compiled."""
        encode = self._able("encode", Encodes)

        def features(params: Any, part: Any) -> Any:
            encoded = encode(params, part)
            return encoded.tokens if tokens else {}, pool(encoded, part["groups"])

        return self._compile(f"encode, tokens={tokens}", features)

    def _able(self, name: str, protocol: Any) -> Any:
        """A method of the objective."""
        if not isinstance(self.objective, protocol):
            raise UserError(f"this model was trained by {self.config.objective!r}, which cannot {name}")
        return getattr(self.objective, name)

    def _compile(self, name: str, function: Any) -> Any:
        """What runs a function of parameters and a part, traced once a name."""
        return self._compiled.setdefault(name, jax.jit(function))

    def _hidden(self, modality: str, ratio: float | None) -> Group:
        """The view of a modality of which a share is hidden; None: as much as in training."""
        if ratio is None:
            return group_of(self.objective.groups, modality)
        if not isinstance(ratio, (int, float, np.number)) or not 0.0 <= ratio <= 1.0:
            raise UserError(f"{modality}_mask_ratio={ratio!r} is not a number between 0 and 1")
        return group_of(self.objective.view((modality,), {modality: float(ratio)}), modality)

    def _tokens(self, images: Pictures | None, texts: Texts | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each modality given: values `[N, K, ...]` and which are real, `[N, K] bool`."""
        data = self.config.data
        squares = None if images is None else given.squares(images, data.image_size, data.max_pixels)
        sentences = None if texts is None else given.sentences(texts)
        examples = {m: x for m, x in (("image", squares), ("text", sentences)) if x is not None}
        if not examples or len({len(x) for x in examples.values()}) > 1:
            counts = ", ".join(f"{len(x)} {m}s" for m, x in examples.items()) or "neither images nor texts"
            raise UserError(f"images and texts must be given in equal numbers, or one of them: here are {counts}")
        for m in examples:
            if m not in self.modalities:
                raise UserError(f"{m}s were given, the model was trained on {' and '.join(self.modalities)} alone")
        tokens = {}
        if squares is not None:
            whole = np.stack(squares) if squares else np.zeros((0, data.image_size, data.image_size, 3), np.uint8)
            patches = image_lib.patchify(whole, data.patch_size)
            tokens["image"] = patches, np.ones(patches.shape[:2], bool)
        if sentences is not None:
            slots = self._views["text"].modalities[0].tokens
            ids, length = encode_batch(self.tokenizer, [t.encode("utf-8", "replace") for t in sentences], slots)
            tokens["text"] = ids, np.arange(slots) < length[:, None]
        return tokens

    def _run(self, function: Any, groups: Mapping[str, Any]) -> Any:
        """`function` of all examples, in batches of `batch_sizes`."""
        results, largest = [], self.batch_sizes[-1]
        for start in range(0, max(len(jax.tree.leaves(groups)[0]), 1), largest):  # of none, a batch of padding alone
            rows = jax.tree.map(lambda x, start=start: x[start : start + largest], dict(groups))
            count = len(jax.tree.leaves(rows)[0])
            size = next(size for size in self.batch_sizes if size >= count)
            padded = jax.tree.map(lambda x, size=size: _fill_up(x, size), rows)
            result = jax.device_get(function(self._params, {"groups": padded}))
            results.append(jax.tree.map(lambda x, count=count: _exact(x)[:count], result))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


class VisualTokenizer(Model):
    """A model that turns pictures into ids of a visual vocabulary, and ids into pictures.

    Pictures are given as everywhere, uint8 of any size; what the model reads of them is its own affair.
    """

    @classmethod
    def of(cls, model: Model) -> VisualTokenizer:
        """The same model, which then has these methods."""
        tokenizer = cls.__new__(cls)
        vars(tokenizer).update(vars(model))
        return tokenizer

    @property
    def params(self) -> Any:
        """Its numbers, those of the codebook too."""
        return self._params

    @property
    def codes(self) -> int:
        """How many ids there are."""
        codes: int = self.objective.codes
        return codes

    def encode(self, images: Pictures) -> np.ndarray:  # type: ignore[override]
        """Ids of pictures.

        Args:
            images: as of `Model.encode`.

        Returns:
            `[N, h, w] int32`, one a patch.

        Raises:
            UserError: one is no picture.
        """
        value, real = self._tokens(images, None)["image"]
        position = np.broadcast_to(np.arange(value.shape[1], dtype=np.int32), value.shape[:2])
        ids: np.ndarray = self._run(
            self._compile("ids", lambda params, part: self.objective.ids(params, part["groups"])),
            {"value": value, "position": position, "valid": real},
        )
        return ids.reshape(-1, *patch_grid(self.config))

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Pictures of ids.

        Args:
            ids: `[N, h, w]` whole numbers, or `[h, w]` of one picture.

        Returns:
            `[N, S, S, 3] uint8`.

        Raises:
            UserError: they have another shape, or are no ids of this vocabulary.
        """
        grid, given = patch_grid(self.config), np.asarray(ids)
        if given.shape[-2:] != grid or given.ndim not in (2, 3) or not np.issubdtype(given.dtype, np.integer):
            raise UserError(
                f"ids must be whole numbers of shape [N, {grid[0]}, {grid[1]}]: here are {given.dtype} of shape "
                f"{list(given.shape)}"
            )
        flat = given.reshape(-1, grid[0] * grid[1])
        if flat.size and not 0 <= flat.min() <= flat.max() < self.codes:
            raise UserError(f"ids are from 0 to {self.codes - 1}: here are {flat.min()} to {flat.max()}")
        position = np.broadcast_to(np.arange(flat.shape[1], dtype=np.int32), flat.shape)

        def paint(params: Any, part: Any) -> Any:
            return self.objective.pixels(params, part["groups"]["ids"], part["groups"]["position"])

        patches = self._run(self._compile("pixels", paint), {"ids": flat.astype(np.int32), "position": position})
        return image_lib.unpatchify(patches, self.config.data.patch_size, grid)


def _exact(x: np.ndarray) -> np.ndarray:
    """In float32, what the device has in bfloat16."""
    return np.asarray(x, np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1; zeros stay."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _fill_up(x: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])


def _masked(
    view: Group, tokens: tuple[np.ndarray, np.ndarray], rng: np.random.Generator | None = None
) -> dict[str, Any]:
    """Token sets of a group, of values and which of them are real; what is hidden is random."""
    (modality,) = view.modalities
    noise = np.zeros(tokens[1].shape)
    if rng is not None and len(noise):
        stream: Any = _Uniform(rng)
        noise = np.stack([view.masker.draw(stream, view.modalities) for _ in noise])
    return dict(view.masker(noise, {modality.name: tokens}))


class _Uniform:
    """Numbers of a generator, for a masker, as `data.order.RandomStream` gives them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def take(self, count: int) -> np.ndarray:
        """The next `[count]`."""
        return self._rng.random(count)


def _put(value: np.ndarray, target: Mapping[str, np.ndarray], guess: np.ndarray) -> np.ndarray:
    """`value` with the guesses at the target's valid slots."""
    out = value.copy()
    row, slot = np.nonzero(target["valid"])
    out[row, target["position"][row, slot]] = guess[row, slot]
    return out
