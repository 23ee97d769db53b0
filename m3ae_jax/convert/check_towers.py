"""The forward passes of CLIP, SigLIP, BERT and ALBEF once more, in plain NumPy and float64, on the file's own arrays.

They share with the conversion its spelling of names (`clip.respelled`), and with our model nothing but the drawn input:
texts are given here with the ids of start, end and padding, as the other projects' tokenizers make them.
Legend: ``N`` examples, ``L`` tokens, ``D`` width, ``H`` heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from scipy.special import erf

from m3ae_jax.convert import bert
from m3ae_jax.convert.convert import FORMATS, Converted
from m3ae_jax.convert.formats import ERF, TANH
from m3ae_jax.data.images import patchify
from m3ae_jax.data.tokens import patch_grid
from m3ae_jax.objectives.base import Embeds, Matches, build

_LENGTHS = (1, 4, 9)  # of the drawn texts, in tokens

Arrays = Mapping[str, np.ndarray]


_OTHER_SIZE = "pictures, which have another size here than there"


def compare(converted: Converted, seed: int = 0) -> tuple[dict[str, float], str]:
    """The `relative_error` of each output, and what was not compared; "": nothing."""
    config, facts = converted.config, converted.foreign.facts
    side, longest = config.data.image_size, config.data.max_text_tokens
    rng = np.random.default_rng(seed)
    lengths = [min(n, longest) for n in _LENGTHS]
    words = [rng.integers(3, max(converted.vocabulary - 2, 4), n) for n in lengths]
    activation, epsilon = FORMATS[converted.format].arithmetic(facts)
    ours = _ours(converted, rng, words)
    if converted.format == "bert":
        a = {name: np.asarray(x, np.float64) for name, x in converted.foreign.arrays.items()}
        net = _Net(a, activation, epsilon)
        ids = bert.ids_of(config.data.tokenizer, len(a[bert.WORDS]))
        return {"text features": relative_error(ours["text"], net.bert(words, ids, config.model.heads))}, ""
    if converted.format == "albef":
        return _of_albef(converted, ours, words, (activation, epsilon))
    raw = {name: np.asarray(x, np.float64) for name, x in facts["raw"].items()}
    net, siglip = _Net(raw, activation, epsilon), bool(facts["siglip"])
    net.ids = facts["ids"]
    heads = {"image": config.model.heads, "text": config.contrastive.text_heads or config.model.heads}
    errors, skipped = {}, _OTHER_SIZE
    if len(raw["raw.image.table"].reshape(-1, config.model.width)) in (
        n := (side // config.data.patch_size) ** 2,
        n + 1,
    ):
        errors["image embeddings"] = relative_error(ours["image"], net.picture(ours["pixels"], heads["image"], siglip))
        skipped = ""
    errors["text embeddings"] = relative_error(ours["text"], net.text(words, heads["text"], siglip))
    return errors, skipped


def _of_albef(
    converted: Converted, ours: Arrays, words: list[np.ndarray], arithmetic: tuple[str, float]
) -> tuple[dict[str, float], str]:
    """Their three passes: a picture, a caption, and a caption that looks at the picture; CLS of each, and the heads."""
    config, errors, skipped = converted.config, {}, _OTHER_SIZE
    raw = {name: np.asarray(x, np.float64) for name, x in converted.foreign.facts["raw"].items()}
    activation, epsilon = arithmetic
    vit, text = _Net(raw, activation, epsilon), _Net(raw, activation, config.simla.text_layer_norm_epsilon)
    ids, heads = bert.ids_of(config.data.tokenizer, converted.vocabulary), config.model.heads
    captions = [text.albef_words(one, ids) for one in words]
    cls = {"text": np.stack([text.albef_layers(x, heads)[0] for x in captions])}
    if raw["raw.image.table"].size == (patch_grid(config)[0] ** 2 + 1) * config.model.width:
        seen, skipped = [vit.albef_picture(pixels, heads) for pixels in ours["pixels"]], ""
        cls["image"] = np.stack([x[0] for x in seen])
        fused = [text.albef_layers(x, heads, picture) for x, picture in zip(captions, seen, strict=True)]
        cls["fused"] = np.stack([x[0] for x in fused])
    for name, features in cls.items():
        errors[f"{name} CLS"] = relative_error(ours[f"{name} CLS"], features)
    for name in ("image", "text"):
        if name in cls and name in ours and f"{name}.projection.weight" in raw:
            errors[f"{name} embeddings"] = relative_error(
                ours[name], _unit(vit.linear(f"{name}.projection", cls[name]))
            )
    if "match" in ours and "fused" in cls:
        logits = text.linear("match", cls["fused"])
        errors["matching"] = relative_error(ours["match"], logits[:, 1] - logits[:, 0])
    return errors, skipped


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """The norm of the difference over the norm of what is wanted."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _ours(converted: Converted, rng: np.random.Generator, words: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Our outputs for texts, and for pictures of normalised pixels ``pixels`` `[N, S, S, 3]` where there are any."""
    config = converted.config.copy_and_resolve_references()
    config.compute.dtype, d = "float32", config.data
    objective: Any = build(config, converted.vocabulary)
    shape, lengths = (len(words), d.max_text_tokens), np.asarray([len(w) for w in words])
    valid = np.arange(shape[1]) < lengths[:, None]
    value = np.zeros(shape, np.int32)
    value[valid] = np.concatenate(words)
    nothing = np.zeros((shape[0], 0), np.int32)

    def group(value: np.ndarray, valid: np.ndarray) -> dict[str, Any]:
        position = np.broadcast_to(np.arange(value.shape[1], dtype=np.int32), valid.shape)
        hidden = {"value": value[:, :0], "position": nothing, "valid": nothing.astype(bool)}
        return {"visible": {"value": value, "position": position, "valid": valid}, "target": hidden}

    groups, pixels = {"text": group(value, valid)}, None
    if "image" in d.modalities:
        pixels = rng.standard_normal((shape[0], d.image_size, d.image_size, 3)).astype(np.float32)
        patches = patchify(pixels, d.patch_size)
        groups["image"] = group(patches, np.ones(patches.shape[:2], bool))
    part = {"groups": groups}
    with jax.default_matmul_precision("highest"):
        if converted.format == "bert":
            encoded = jax.device_get(jax.jit(objective.encode)(converted.params, part))
            tokens = encoded.tokens["text"]
            rows = [np.concatenate([encoded.pooled["cls"][i, None], tokens[i, :n]]) for i, n in enumerate(lengths)]
            return {"text": np.concatenate(rows)}
        if converted.format == "albef":
            return {
                **jax.device_get(jax.jit(_albef_outputs(objective))(converted.params, part)),
                "pixels": np.asarray(pixels),
            }
        embedded = jax.device_get(jax.jit(objective.embed)(converted.params, part))
    return {**embedded, "pixels": np.asarray(pixels)}


def _albef_outputs(objective: Any) -> Any:
    """What a run of simla makes of pairs, as far as its losses go."""

    def outputs(params: Any, part: Any) -> dict[str, Any]:
        alone = {name: {"groups": {name: group}} for name, group in part["groups"].items()}
        found = {f"{name} CLS": objective.encode(params, of).pooled["cls"] for name, of in alone.items()}
        found["fused CLS"] = objective.encode(params, part).pooled["cls"]
        if isinstance(objective, Embeds):
            found |= objective.embed(params, part)
        if isinstance(objective, Matches):
            found["match"] = objective.match(params, part)
        return found

    return outputs


class _Net:
    """Their layers, on their arrays."""

    def __init__(self, arrays: Arrays, activation: str, epsilon: float) -> None:
        self._a, self._epsilon = arrays, epsilon
        self.ids: Mapping[str, int] = {}
        self._act = {ERF: erf_gelu, TANH: tanh_gelu}.get(activation, lambda x: x / (1.0 + np.exp(-1.702 * x)))

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """A layer of theirs."""
        kernel = self._a.get(f"{name}.weight")
        if kernel is None:
            return x @ self._a[f"turned.{name}.weight"]
        return x @ kernel.T + self._a.get(f"{name}.bias", 0.0)

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        normed = centred / np.sqrt(x.var(-1, keepdims=True) + self._epsilon)
        return normed * self._a[f"{name}.weight"] + self._a[f"{name}.bias"]

    def _three(self, at: str, x: np.ndarray, context: np.ndarray, names: tuple[str, str, str]) -> list[np.ndarray]:
        if f"{at}.qkv.weight" in self._a:
            weights, biases = (np.split(self._a[f"{at}.qkv.{end}"], 3) for end in ("weight", "bias"))
            inputs = (x, context, context)
            return [i @ w.T + b for i, w, b in zip(inputs, weights, biases, strict=True)]
        if f"{at}.kv.weight" in self._a:
            return [self.linear(f"{at}.q", x), *np.split(self.linear(f"{at}.kv", context), 2, axis=-1)]
        return [self.linear(f"{at}{name}", i) for name, i in zip(names, (x, context, context), strict=True)]

    @staticmethod
    def _mixed(three: list[np.ndarray], heads: int, causal: bool = False) -> np.ndarray:
        q, k, v = (x.reshape(*x.shape[:-1], heads, -1).swapaxes(0, 1) for x in three)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        if causal:
            scores = np.where(np.tri(*scores.shape[-2:]) > 0, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        return mixed.swapaxes(0, 1).reshape(len(three[0]), -1)

    def _stack(self, tower: str, x: np.ndarray, heads: int, causal: bool = False) -> np.ndarray:
        n = 0
        while f"{tower}.blocks.{n}.norm1.weight" in self._a:
            at = f"{tower}.blocks.{n}"
            normed = self._norm(f"{at}.norm1", x)
            three = self._three(at, normed, normed, (".query", ".key", ".value"))
            x = x + self.linear(f"{at}.proj", self._mixed(three, heads, causal))
            x = x + self.linear(f"{at}.fc2", self._act(self.linear(f"{at}.fc1", self._norm(f"{at}.norm2", x))))
            n += 1
        return x

    def _patches(self, picture: np.ndarray) -> np.ndarray:
        """Their convolution of a picture `[S, S, 3]`: `[N, D]`."""
        kernel = self._a["image.patches.weight"]
        size = kernel.shape[-1]
        rows, columns = (n // size for n in picture.shape[:2])
        cut = picture.reshape(rows, size, columns, size, 3)
        embedded = np.einsum("ipjqc,dcpq->ijd", cut, kernel).reshape(rows * columns, -1)
        return embedded + self._a.get("image.patches.bias", 0.0)

    def picture(self, pixels: np.ndarray, heads: int, siglip: bool) -> np.ndarray:
        """Embeddings of length one, `[N, d]`; a picture is cut by their convolution."""
        out = []
        for picture in pixels:
            x = self._patches(picture)
            if not siglip:
                x = np.concatenate([self._a["raw.image.class"].reshape(1, -1), x])
            x = x + self._a["raw.image.table"].reshape(-1, x.shape[-1])
            if siglip:
                x = self._norm("image.norm", self._stack("image", x, heads))
                query = self._a["image.pool.query"].reshape(1, -1)
                pooled = self.linear(
                    "image.pool.out", self._mixed(self._three("image.pool", query, x, ("",) * 3), heads)
                )
                hidden = self._act(self.linear("image.pool.fc1", self._norm("image.pool.norm", pooled)))
                out.append((pooled + self.linear("image.pool.fc2", hidden))[0])
            else:
                x = self._stack("image", self._norm("image.norm0", x), heads)
                out.append(self.linear("image.projection", self._norm("image.norm", x[0])))
        return _unit(np.stack(out))

    def text(self, words: list[np.ndarray], heads: int, siglip: bool) -> np.ndarray:
        """Embeddings of length one, `[N, d]`."""
        table, places = self._a["raw.text.words"], self._a["raw.text.table"]
        out = []
        for ids in words:
            if siglip:
                padded = np.concatenate([ids, np.full(len(places) - len(ids), self.ids["padding"])])
                last = self._norm("text.norm", self._stack("text", table[padded] + places, heads))[-1]
            else:
                whole = np.concatenate([[self.ids["start"]], ids, [self.ids["end"]]])
                x = self._stack("text", table[whole] + places[: len(whole)], heads, causal=True)
                last = self._norm("text.norm", x)[-1]
            out.append(self.linear("text.projection", last))
        return _unit(np.stack(out))

    def bert(self, words: list[np.ndarray], ids: Mapping[str, int], heads: int) -> np.ndarray:
        """The last layer's features of ``[CLS]`` and of the words, one text after the other, `[sum L + 1, D]`."""
        out = []
        for text in words:
            whole = np.concatenate([[ids["[CLS]"]], text, [ids["[SEP]"]]])
            x = self._a[bert.WORDS][whole] + self._a[bert.PLACES][: len(whole)]
            x = self._norm("embeddings.LayerNorm", x + (self._a[bert.TYPES][0] if bert.TYPES in self._a else 0.0))
            n = 0
            while f"encoder.layer.{n}.output.dense.weight" in self._a:
                at = f"encoder.layer.{n}"
                three = self._three(f"{at}.attention.self", x, x, (".query", ".key", ".value"))
                mixed = self.linear(f"{at}.attention.output.dense", self._mixed(three, heads))
                x = self._norm(f"{at}.attention.output.LayerNorm", x + mixed)
                hidden = self._act(self.linear(f"{at}.intermediate.dense", x))
                x = self._norm(f"{at}.output.LayerNorm", x + self.linear(f"{at}.output.dense", hidden))
                n += 1
            out.append(x[:-1])
        return np.concatenate(out)

    def albef_picture(self, pixels: np.ndarray, heads: int) -> np.ndarray:
        """CLS and patches of ALBEF's ViT, `[1 + N, D]`."""
        x = self._patches(pixels)
        x = np.concatenate([self._a["raw.image.class"].reshape(1, -1), x])
        return self._norm("image.norm", self._stack("image", x + self._a["raw.image.table"][0], heads))

    def albef_words(self, words: np.ndarray, ids: Mapping[str, int]) -> np.ndarray:
        """A caption's embedded words, `[1 + L + 1, D]`."""
        whole = np.concatenate([[ids["[CLS]"]], words, [ids["[SEP]"]]])
        x = self._a["text.words"][whole] + self._a["raw.text.table"][: len(whole)]
        return self._norm("text.norm0", x + (self._a["raw.text.types"][0] if "raw.text.types" in self._a else 0.0))

    def albef_layers(self, x: np.ndarray, heads: int, seen: np.ndarray | None = None) -> np.ndarray:
        """The text layers of a caption, that looks at a picture; alone, ALBEF's stop below cross-attention."""
        n, names = 0, (".query", ".key", ".value")
        albef = "text.blocks.0.cross.query.weight" not in self._a
        while (at := f"text.blocks.{n}") and f"{at}.fc1.weight" in self._a:
            looks = f"{at}.cross.query.weight" in self._a
            if looks and albef and seen is None:
                break
            mixed = self.linear(f"{at}.proj", self._mixed(self._three(at, x, x, names), heads))
            x = self._norm(f"{at}.norm1", x + mixed)
            if looks and seen is not None:
                three = self._three(f"{at}.cross", x, seen, names)
                x = self._norm(f"{at}.cross.norm", x + self.linear(f"{at}.cross.proj", self._mixed(three, heads)))
            hidden = self.linear(f"{at}.fc2", self._act(self.linear(f"{at}.fc1", x)))
            x = self._norm(f"{at}.norm2", x + hidden)
            n += 1
        return x


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def erf_gelu(x: np.ndarray) -> np.ndarray:
    """GELU as it is defined."""
    return x * 0.5 * (1.0 + erf(x / np.sqrt(2.0)))


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    """GELU as the tanh approximates it."""
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))
