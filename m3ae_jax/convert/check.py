"""Does a converted model compute what theirs does? Their forward pass, written once more, on their own arrays.

It is in plain NumPy and float64, reads the file's parameters by the file's names, cuts pictures as their code does, and
shares with our model nothing but the drawn input, and with the conversion the table of their names. Legend: ``N``
examples, ``S`` side of a picture, ``D`` width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from m3ae_jax.convert import albef, bert, check_towers, clip
from m3ae_jax.convert.check_towers import erf_gelu, relative_error, tanh_gelu
from m3ae_jax.convert.convert import FORMATS, Converted
from m3ae_jax.convert.formats import TANH, Format
from m3ae_jax.convert.keymap import FLAX, Arrays
from m3ae_jax.convert.tree import size
from m3ae_jax.data.images import patchify
from m3ae_jax.data.order import hidden_count
from m3ae_jax.data.tokens import patch_grid
from m3ae_jax.models.embeddings import sincos_1d, sincos_2d
from m3ae_jax.objectives.m3ae import M3AE

TOLERANCE = 1e-4
"""Of the norm of what theirs gives."""

_TOKENS = 12  # of a text
_MODALITIES = ("image", "text")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far the two are apart.

    Attributes:
        errors: norm of the difference over the norm of theirs, by activation.
        skipped: what was not compared, and why; "": nothing.
    """

    errors: dict[str, float]
    skipped: str = ""

    @property
    def close(self) -> bool:
        """Whether none is beyond the tolerance."""
        return all(error <= TOLERANCE for error in self.errors.values())

    def text(self) -> str:
        """For people."""
        if not self.errors:
            return f"activations: not compared: {self.skipped}"
        lines = [f"  not compared: {self.skipped}"] if self.skipped else []
        lines += [f"  {name}: {error:.1e} of the norm" for name, error in self.errors.items()]
        verdict = "equal" if self.close else f"DIFFERENT, more than {TOLERANCE}"
        return "\n".join([f"activations, theirs against ours on a drawn input: {verdict}", *lines])


class _Theirs:
    """Their model."""

    def __init__(self, converted: Converted, kind: Format) -> None:
        self._config, self._names = converted.config, kind.names
        self._a = {name: np.asarray(value, np.float64) for name, value in converted.foreign.arrays.items()}
        activation, self._epsilon = kind.arithmetic(converted.foreign.facts)
        self._gelu = tanh_gelu if activation == TANH else erf_gelu
        (self._weight, *_), (self._bias, *_) = kind.names.kinds["linear"]
        self._scale = kind.names.kinds["norm"][0][0]
        self.has_decoder = any(self._get("mask", modality=m) is not None for m in _MODALITIES)

    def _get(self, role: str, **fields: Any) -> Any:
        """A single parameter; None if they have it not."""
        return next((self._a[name] for name in self._names.of(role, **fields) if name in self._a), None)

    def _linear(self, role: str, x: np.ndarray, n: int = 0, **fields: Any) -> np.ndarray:
        names = [name.format(n=n) for name in self._names.of(role, **fields)]
        weights = [self._a[name + self._weight] for name in names]
        kernel = np.concatenate([w if self._names.kinds is FLAX else w.T for w in weights], axis=-1)
        return x @ kernel + np.concatenate([self._a[name + self._bias] for name in names])

    def _norm(self, role: str, x: np.ndarray, n: int = 0, **fields: Any) -> np.ndarray:
        name = self._names.of(role, **fields)[0].format(n=n)
        centred = x - x.mean(-1, keepdims=True)
        normed = centred / np.sqrt(x.var(-1, keepdims=True) + self._epsilon)
        return normed * self._a[name + self._scale] + self._a[name + self._bias]

    def _stack(self, stack: str, x: np.ndarray) -> np.ndarray:
        for n in range(size(self._config, stack, "depth")):
            at: dict[str, Any] = {"stack": stack, "n": n}
            qkv = self._linear("qkv", self._norm("norm1", x, **at), **at)
            heads = size(self._config, stack, "heads")
            q, k, v = np.moveaxis(qkv.reshape(*x.shape[:2], 3, heads, -1), (2, 3), (0, 2))
            scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = weights / weights.sum(-1, keepdims=True) @ v
            x = x + self._linear("proj", mixed.swapaxes(1, 2).reshape(x.shape), **at)
            hidden = self._gelu(self._linear("fc1", self._norm("norm2", x, **at), **at))
            x = x + self._linear("fc2", hidden, **at)
        return self._norm(f"{stack}_norm", x)

    def _place(self, modality: str, stack: str, count: int) -> np.ndarray:
        """What is added to each of `count` tokens, `[count, D]`."""
        if stack in self._names.tables:
            return self._a[self._names.tables[stack]][0, -count:]
        width = size(self._config, stack, "width")
        cells = patch_grid(self._config)
        table = sincos_2d(width, cells) if modality == "image" else sincos_1d(width, np.arange(count))
        kind = self._get("type", stack=stack, modality=modality)
        return table if kind is None else table + kind[0]

    def _embed(self, modality: str, value: np.ndarray) -> np.ndarray:
        if modality == "text":
            return self._get("text")[value]
        patch, side = self._config.data.patch_size, patch_grid(self._config)[0]
        cells = value.reshape(len(value), side, patch, side, patch, 3)
        if self._names.kinds is FLAX:
            return self._linear("image", cells.transpose(0, 1, 3, 2, 4, 5).reshape(len(value), side * side, -1))
        (name,) = self._names.of("image")
        embedded = np.einsum("nhiwjc,dcij->nhwd", cells, self._a[name + self._weight])
        return embedded.reshape(len(value), side * side, -1) + self._a[name + self._bias]

    def encode(self, inputs: Arrays, visible: Arrays) -> np.ndarray:
        """CLS and the visible tokens, `[N, 1 + V, D]`."""
        parts = []
        for m, value in inputs.items():
            tokens = self._embed(m, value)
            parts.append((tokens + self._place(m, "encoder", tokens.shape[1]))[:, visible[m]])
        cls = np.broadcast_to(self._get("cls"), (len(parts[0]), 1, parts[0].shape[-1]))
        if self._names.tables:
            table = self._a[self._names.tables["encoder"]]
            count = patch_grid(self._config)[0] ** 2
            cls = cls + (table[:, :1] if table.shape[1] > count else 0.0)
        return self._stack("encoder", np.concatenate([cls, *parts], axis=1))

    def decode(self, encoded: np.ndarray, visible: Arrays, sizes: dict[str, int]) -> Arrays:
        """Predictions at all positions, ``{modality: [N, L, ...]}``."""
        x = self._linear("projection", encoded)
        parts, start = [x[:, :1]], 1
        for m, count in sizes.items():
            tokens = np.broadcast_to(self._get("mask", modality=m), (len(x), count, x.shape[-1])).copy()
            tokens[:, visible[m]] = x[:, start : start + len(visible[m])]
            start += len(visible[m])
            parts.append(tokens + self._place(m, "decoder", count))
        x = self._stack("decoder", np.concatenate(parts, axis=1))
        ends = np.cumsum([1, *sizes.values()])
        return {m: self._head(m, x[:, end - sizes[m] : end]) for m, end in zip(sizes, ends[1:], strict=True)}

    def _head(self, modality: str, x: np.ndarray) -> np.ndarray:
        depth = self._config.m3ae.output_head_depth
        x = self._norm("head_norm", x, modality=modality, k=0) if depth else x
        for k in range(depth):
            hidden = self._gelu(self._linear("head_hidden", x, modality=modality, k=k))
            hidden = self._norm("head_norm", hidden, modality=modality, k=k + 1)
            x = x + hidden if k else hidden
        return self._linear("head", x, modality=modality, depth=depth)


def compare(converted: Converted, seed: int = 0) -> Comparison:
    """Encoder outputs, and predictions for hidden tokens, of theirs and of ours, on one drawn example."""
    config, kind = converted.config, FORMATS[converted.format]
    if not kind.names.layers:
        return Comparison({}, "the file is our own")
    if kind in (clip.FORMAT, clip.OPEN_CLIP, bert.FORMAT, albef.FORMAT):
        return Comparison(*check_towers.compare(converted, seed))
    table = converted.foreign.arrays.get(kind.names.tables.get("encoder", ""))
    patches = patch_grid(config)[0] ** 2
    if table is not None and table.shape[1] not in (patches, patches + 1):
        return Comparison({}, "the pictures have another size here than there")
    rng = np.random.default_rng(seed)
    side, words = config.data.image_size, min(_TOKENS, config.data.max_text_tokens)
    inputs: dict[str, np.ndarray] = {}
    if "image" in config.data.modalities:
        inputs["image"] = rng.standard_normal((1, side, side, 3))
    if "text" in config.data.modalities:
        inputs["text"] = rng.integers(0, converted.vocabulary, (1, words))
    sizes = {m: patches if m == "image" else words for m in inputs}
    hidden = {m: np.sort(rng.permutation(n)[: hidden_count(n, 0.75)]) for m, n in sizes.items()}
    visible = {m: np.setdiff1d(np.arange(n), hidden[m]) for m, n in sizes.items()}
    theirs = _Theirs(converted, kind)
    encoded = theirs.encode(inputs, visible)
    our_encoded, our_predictions = _ours(converted, inputs, visible, hidden)
    errors = {"encoder": relative_error(our_encoded, encoded)}
    if theirs.has_decoder:
        for m, outputs in theirs.decode(encoded, visible, sizes).items():
            errors[f"{m} predictions"] = relative_error(our_predictions[m], outputs[:, hidden[m]])
    return Comparison(errors)


def _ours(converted: Converted, inputs: Arrays, visible: Arrays, hidden: Arrays) -> tuple[np.ndarray, Arrays]:
    config = converted.config.copy_and_resolve_references()
    config.compute.dtype = "float32"
    objective = M3AE(config, converted.vocabulary)

    def tokens(m: str, positions: np.ndarray) -> dict[str, np.ndarray]:
        image = m == "image"
        value = patchify(inputs[m].astype(np.float32), config.data.patch_size) if image else inputs[m].astype(np.int32)
        at = positions.astype(np.int32)[None]
        return {"value": value[:, positions], "position": at, "valid": np.ones(at.shape, bool)}

    part = {"groups": {m: {"visible": tokens(m, visible[m]), "target": tokens(m, hidden[m])} for m in inputs}}
    with jax.default_matmul_precision("highest"):
        encoded = jax.device_get(jax.jit(objective.encode)(converted.params, part))
        predictions = jax.device_get(jax.jit(objective.predict)(converted.params, part))
    tokens_of = [encoded.tokens[m] for m in inputs]
    return np.concatenate([encoded.pooled["cls"][:, None], *tokens_of], axis=1), predictions
