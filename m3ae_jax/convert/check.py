"""Does a converted model compute what theirs does? Their forward pass, written once more, on their own arrays.

It is in plain NumPy and float64, reads the file's parameters by the file's names, cuts pictures as their code does, and
shares with our model nothing but the drawn input. Legend: ``N`` examples, ``S`` side of a picture, ``D`` width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from scipy.special import erf

from m3ae_jax.data.images import patchify
from m3ae_jax.data.order import hidden_count
from m3ae_jax.data.pipeline import grid
from m3ae_jax.models.autoencoder import MaskedAutoencoder
from m3ae_jax.models.embeddings import sincos_1d, sincos_2d
from m3ae_jax.objectives.base import build

if TYPE_CHECKING:
    from m3ae_jax.convert.convert import Converted

TOLERANCE = 1e-4
"""Of the norm of what theirs gives."""

_TOKENS = 12  # of a text
Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far the two are apart.

    Attributes:
        errors: norm of the difference over the norm of theirs, by activation.
        skipped: why nothing was compared; "".
    """

    errors: dict[str, float]
    skipped: str = ""

    @property
    def close(self) -> bool:
        """Whether all are within the tolerance."""
        return all(error <= TOLERANCE for error in self.errors.values())

    def text(self) -> str:
        """For people."""
        if self.skipped:
            return f"activations: not compared: {self.skipped}"
        lines = [f"  {name}: {error:.1e} of the norm" for name, error in self.errors.items()]
        verdict = "equal" if self.close else f"DIFFERENT, more than {TOLERANCE}"
        return "\n".join([f"activations, theirs against ours on a drawn input: {verdict}", *lines])


class _Dialect(NamedTuple):
    """Where a project's parameters are: names by role, ``{}`` for the block."""

    stacks: dict[str, str]
    roles: dict[str, tuple[str, ...]]  # norm1, qkv (one name or three), proj, norm2, fc1, fc2
    norms: dict[str, str]
    pictures: str
    cls: str
    projection: str
    heads: dict[str, str]
    masks: dict[str, str]
    tables: dict[str, str]
    weight: str = ".weight"
    bias: str = ".bias"


_MAE = _Dialect(
    {"encoder": "blocks.{}.", "decoder": "decoder_blocks.{}."},
    {
        "norm1": ("norm1",),
        "qkv": ("attn.qkv",),
        "proj": ("attn.proj",),
        "norm2": ("norm2",),
        "fc1": ("mlp.fc1",),
        "fc2": ("mlp.fc2",),
    },
    {"encoder": "norm", "decoder": "decoder_norm"},
    "patch_embed.proj",
    "cls_token",
    "decoder_embed",
    {"image": "decoder_pred"},
    {"image": "mask_token"},
    {"encoder": "pos_embed", "decoder": "decoder_pos_embed"},
)
_VITMAE = _Dialect(
    {"encoder": "vit.encoder.layer.{}.", "decoder": "decoder.decoder_layers.{}."},
    {
        "norm1": ("layernorm_before",),
        "qkv": tuple(f"attention.attention.{x}" for x in ("query", "key", "value")),
        "proj": ("attention.output.dense",),
        "norm2": ("layernorm_after",),
        "fc1": ("intermediate.dense",),
        "fc2": ("output.dense",),
    },
    {"encoder": "vit.layernorm", "decoder": "decoder.decoder_norm"},
    "vit.embeddings.patch_embeddings.projection",
    "vit.embeddings.cls_token",
    "decoder.decoder_embed",
    {"image": "decoder.decoder_pred"},
    {"image": "decoder.mask_token"},
    {"encoder": "vit.embeddings.position_embeddings", "decoder": "decoder.decoder_pos_embed"},
)
_M3AE = _Dialect(
    {"encoder": "encoder/Block_{}/", "decoder": "decoder/Block_{}/"},
    {
        "norm1": ("LayerNorm_0",),
        "qkv": ("Attention_0/Dense_0",),
        "proj": ("Attention_0/Dense_1",),
        "norm2": ("LayerNorm_1",),
        "fc1": ("TransformerMLP_0/fc1",),
        "fc2": ("TransformerMLP_0/fc2",),
    },
    {"encoder": "encoder/LayerNorm_0", "decoder": "decoder/LayerNorm_0"},
    "image_embedding",
    "cls_token",
    "decoder_input_projection",
    {m: f"decoder_{m}_output" for m in ("image", "text")},
    {m: f"{m}_mask_embedding" for m in ("image", "text")},
    {},
    weight="/kernel",
    bias="/bias",
)
_DIALECTS = {"m3ae": _M3AE, "mae": _MAE, "timm": _MAE, "vitmae": _VITMAE}


class _Theirs:
    """Their model."""

    def __init__(self, converted: Converted, dialect: _Dialect) -> None:
        self._config, self._d = converted.config, dialect
        self._a = {name: np.asarray(value, np.float64) for name, value in converted.foreign.arrays.items()}
        m, facts = converted.config.model, converted.foreign.facts
        tanh = dialect is _M3AE or facts.get("hidden_act", "gelu") != "gelu"
        self._gelu: Callable[[np.ndarray], np.ndarray] = _tanh_gelu if tanh else _erf_gelu
        self._epsilon = float(facts.get("layer_norm_eps", 1e-12)) if dialect is _VITMAE else 1e-6
        self._heads = {"encoder": m.heads, "decoder": m.decoder_heads}
        self.has_decoder = dialect.masks["image"] in self._a or dialect.masks.get("text") in self._a

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        weight = self._a[name + self._d.weight]
        return x @ (weight if self._d is _M3AE else weight.T) + self._a[name + self._d.bias]

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        scale = self._a[name + ("/scale" if self._d is _M3AE else ".weight")]
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + self._epsilon) * scale + self._a[name + self._d.bias]

    def _stack(self, stack: str, x: np.ndarray) -> np.ndarray:
        depth = self._config.model.depth if stack == "encoder" else self._config.model.decoder_depth
        for n in range(depth):
            at = {r: [self._d.stacks[stack].format(n) + name for name in x] for r, x in self._d.roles.items()}
            normed = self._norm(at["norm1"][0], x)
            qkv = np.concatenate([self._linear(name, normed) for name in at["qkv"]], axis=-1)
            q, k, v = np.moveaxis(qkv.reshape(*x.shape[:2], 3, self._heads[stack], -1), (2, 3), (0, 2))
            scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = weights / weights.sum(-1, keepdims=True) @ v
            x = x + self._linear(at["proj"][0], mixed.swapaxes(1, 2).reshape(x.shape))
            hidden = self._gelu(self._linear(at["fc1"][0], self._norm(at["norm2"][0], x)))
            x = x + self._linear(at["fc2"][0], hidden)
        return self._norm(self._d.norms[stack], x)

    def _place(self, modality: str, stack: str, count: int) -> np.ndarray:
        """What is added to each of `count` tokens, `[count, D]`."""
        if stack in self._d.tables:
            return self._a[self._d.tables[stack]][0, -count:]
        width = self._config.model.width if stack == "encoder" else self._config.model.decoder_width
        table = sincos_2d(width, grid(self._config)) if modality == "image" else sincos_1d(width, np.arange(count))
        kind = self._a.get(f"{stack}_{modality}_type_embedding")
        return table if kind is None else table + kind[0]

    def _embed(self, modality: str, value: np.ndarray) -> np.ndarray:
        if modality == "text":
            return self._a["text_embedding/embedding"][value]
        patch, side = self._config.data.patch_size, grid(self._config)[0]
        cells = value.reshape(len(value), side, patch, side, patch, 3)
        if self._d is _M3AE:
            patches = cells.transpose(0, 1, 3, 2, 4, 5).reshape(len(value), side * side, -1)
            return self._linear(self._d.pictures, patches)
        kernel, bias = self._a[self._d.pictures + ".weight"], self._a[self._d.pictures + ".bias"]
        return np.einsum("nhiwjc,dcij->nhwd", cells, kernel).reshape(len(value), side * side, -1) + bias

    def encode(self, inputs: dict[str, np.ndarray], visible: dict[str, np.ndarray]) -> np.ndarray:
        """CLS and the visible tokens, `[N, 1 + V, D]`."""
        parts = []
        for m, value in inputs.items():
            tokens = self._embed(m, value)
            parts.append((tokens + self._place(m, "encoder", tokens.shape[1]))[:, visible[m]])
        cls = np.broadcast_to(self._a[self._d.cls], (len(parts[0]), 1, parts[0].shape[-1]))
        if self._d.tables:
            table = self._a[self._d.tables["encoder"]]
            count = grid(self._config)[0] ** 2
            cls = cls + (table[:, :1] if table.shape[1] > count else 0.0)
        return self._stack("encoder", np.concatenate([cls, *parts], axis=1))

    def decode(
        self, encoded: np.ndarray, visible: dict[str, np.ndarray], sizes: dict[str, int]
    ) -> dict[str, np.ndarray]:
        """Predictions at all positions, ``{modality: [N, L, ...]}``."""
        x = self._linear(self._d.projection, encoded)
        parts, start = [x[:, :1]], 1
        for m, count in sizes.items():
            tokens = np.broadcast_to(self._a[self._d.masks[m]], (len(x), count, x.shape[-1])).copy()
            tokens[:, visible[m]] = x[:, start : start + len(visible[m])]
            start += len(visible[m])
            parts.append(tokens + self._place(m, "decoder", count))
        x = self._stack("decoder", np.concatenate(parts, axis=1))
        found, start = {}, 1
        for m, count in sizes.items():
            found[m] = self._head(self._d.heads[m], x[:, start : start + count])
            start += count
        return found

    def _head(self, name: str, x: np.ndarray) -> np.ndarray:
        depth = self._config.model.output_head_depth  # of M3AE alone
        if self._d is not _M3AE:
            return self._linear(name, x)
        x = self._norm(f"{name}/LayerNorm_0", x) if depth else x
        for k in range(depth):
            hidden = self._norm(f"{name}/LayerNorm_{k + 1}", self._gelu(self._linear(f"{name}/Dense_{k}", x)))
            x = x + hidden if k else hidden
        return self._linear(f"{name}/Dense_{depth}", x)


def _erf_gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1.0 + erf(x / np.sqrt(2.0)))


def _tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def compare(converted: Converted, seed: int = 0) -> Comparison:
    """Encoder outputs, and predictions for hidden tokens, of theirs and of ours, on one drawn example."""
    config, facts = converted.config, converted.foreign
    if converted.format not in _DIALECTS:
        return Comparison({}, "the file is our own")
    dialect = _DIALECTS[converted.format]
    table = facts.arrays.get(dialect.tables.get("encoder", ""))
    if table is not None and table.shape[1] not in (grid(config)[0] ** 2, grid(config)[0] ** 2 + 1):
        return Comparison({}, "the pictures have another size here than there")
    rng = np.random.default_rng(seed)
    side, words = config.data.image_size, min(_TOKENS, config.data.max_text_tokens)
    inputs: dict[str, np.ndarray] = {}
    if "image" in config.data.modalities:
        inputs["image"] = rng.standard_normal((1, side, side, 3))
    if "text" in config.data.modalities:
        vocabulary = converted.params["text_embedding"]["embedding"].shape[0]
        inputs["text"] = rng.integers(0, vocabulary, (1, words))
    sizes = {m: grid(config)[0] ** 2 if m == "image" else words for m in inputs}
    hidden = {m: np.sort(rng.permutation(n)[: hidden_count(n, 0.75)]) for m, n in sizes.items()}
    visible = {m: np.setdiff1d(np.arange(n), hidden[m]) for m, n in sizes.items()}
    theirs = _Theirs(converted, dialect)
    encoded = theirs.encode(inputs, visible)
    ours_encoded, ours_decoded = _ours(converted, inputs, visible, hidden)
    errors = {"encoder": _error(ours_encoded, encoded)}
    if theirs.has_decoder:
        for m, outputs in theirs.decode(encoded, visible, sizes).items():
            errors[f"{m} predictions"] = _error(ours_decoded[m], outputs[:, hidden[m]])
    return Comparison(errors)


def _error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _ours(
    converted: Converted,
    inputs: dict[str, np.ndarray],
    visible: dict[str, np.ndarray],
    hidden: dict[str, np.ndarray],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    config = converted.config.copy_and_resolve_references()
    config.model.compute_dtype = "float32"
    vocabulary = converted.params["text_embedding"]["embedding"].shape[0] if "text" in inputs else 0
    objective: Any = build(config, vocabulary)

    def tokens(m: str, positions: np.ndarray) -> dict[str, np.ndarray]:
        image = m == "image"
        value = patchify(inputs[m].astype(np.float32), config.data.patch_size) if image else inputs[m].astype(np.int32)
        at = positions.astype(np.int32)[None]
        return {"value": value[:, positions], "position": at, "valid": np.ones(at.shape, bool)}

    seen = {m: tokens(m, p) for m, p in visible.items()}
    asked = {m: tokens(m, p) for m, p in hidden.items()}

    @jax.jit
    def run(params: Any) -> Any:
        encoded: Any = objective.model.apply({"params": params}, seen, method=MaskedAutoencoder.encode)
        decoded = objective.model.apply({"params": params}, encoded, seen, asked, method=MaskedAutoencoder.decode)
        return encoded, decoded

    with jax.default_matmul_precision("highest"):
        encoded, decoded = jax.device_get(run(converted.params))
    parts = [encoded.cls[:, None], *(encoded.tokens[m] for m in inputs)]
    return np.concatenate(parts, axis=1), decoded
