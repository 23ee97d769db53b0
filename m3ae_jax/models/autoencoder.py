"""The masked multimodal autoencoder: one encoder over visible tokens, a light decoder that restores the hidden.

Attention does not care about the order of its tokens, only about their position embeddings: the encoder reads
CLS and the visible token sets as they come; the decoder reads the encoded tokens followed by mask tokens at the
target positions, or the mask tokens alone, each of which attends to the encoded ones (``decoder.cross``). The heads
run on target slots alone.

Legend: ``B`` batch, ``V`` visible and ``K`` target slots, ``D`` encoder width, ``E`` decoder width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from m3ae_jax.models.embeddings import sincos_1d, sincos_2d
from m3ae_jax.models.transformer import OutputHead, Transformer, TransformerOptions, dense, gathered, named

TokenSets = Mapping[str, Mapping[str, jax.Array]]
"""``{modality: {value, position, valid}}``; an image's values are already normalised pixels."""


@dataclasses.dataclass(frozen=True)
class AutoencoderOptions:
    """What there is to restore, and with what.

    Attributes:
        modalities: of ``image`` and ``text``, which have parameters.
        grid: (rows, columns) of patches.
        patch_values: numbers in a patch (side * side * 3).
        text_tokens: positions a caption may have.
        vocab_size: token ids.
        use_type_embedding: a learned vector a modality, in the encoder and in the decoder.
        output_head_depth: hidden layers of each output head.
        learned_positions: of the patches in the encoder a learned table in place of the fixed one.
    """

    encoder: TransformerOptions
    decoder: TransformerOptions
    modalities: tuple[str, ...]
    grid: tuple[int, int]
    patch_values: int
    text_tokens: int
    vocab_size: int
    use_type_embedding: bool = True
    output_head_depth: int = 0
    learned_positions: bool = False


@flax.struct.dataclass
class Encoded:
    """What the encoder says.

    Attributes:
        cls: `[B, D]`.
        tokens: ``{modality: [B, V, D]}``.
    """

    cls: jax.Array
    tokens: dict[str, jax.Array]


class MaskedAutoencoder(nn.Module):
    """See the module docstring."""

    options: AutoencoderOptions

    def setup(self) -> None:
        """Declares the parameters of the configured modalities."""
        o = self.options
        normal = nn.initializers.normal
        self.cls_token = self.param("cls_token", named(normal(0.02), None, None, "embed"), (1, 1, o.encoder.width))
        self.encoder = Transformer(o.encoder)
        self.decoder = Transformer(o.decoder)
        self.decoder_projection = dense(o.decoder.width, ("embed", None), o.decoder.dtype)
        if "image" in o.modalities:
            self.image_embedding = dense(o.encoder.width, ("patch", "embed"), o.encoder.dtype)
            if o.learned_positions:
                shape = (o.grid[0] * o.grid[1], o.encoder.width)
                self.image_positions = self.param("image_position_embedding", named(normal(0.02), None, "embed"), shape)
        if "text" in o.modalities:
            self.text_embedding = nn.Embed(
                o.vocab_size,
                o.encoder.width,
                embedding_init=named(normal(1.0), "vocab", "embed"),
                promote_dtype=gathered("vocab", "embed"),
            )

        def vectors(name: str, width: int) -> dict[str, jax.Array]:
            return {
                m: self.param(f"{m}_{name}", named(normal(0.02), None, None, "embed"), (1, 1, width))
                for m in o.modalities
            }

        self.mask_embedding = vectors("mask_embedding", o.decoder.width)
        if o.use_type_embedding:
            self.encoder_type = vectors("encoder_type_embedding", o.encoder.width)
            self.decoder_type = vectors("decoder_type_embedding", o.decoder.width)
        features = {"image": (o.patch_values, "patch"), "text": (o.vocab_size, "vocab")}
        for m in o.modalities:
            size, axis = features[m]
            d = o.decoder
            head = OutputHead(d.width, size, o.output_head_depth, axis, d.dtype, d.activation, d.epsilon)
            setattr(self, f"{m}_output", head)

    def encode(self, visible: TokenSets, *, deterministic: bool = True) -> Encoded:
        """Encodes the visible tokens of one, or of both modalities.

        Args:
            visible: token sets; `value` is `[B, V, patch_values] float32` or `[B, V] int32`.
            deterministic: False needs a ``dropout`` RNG if any rate is positive.
        """
        present = [m for m in self.options.modalities if m in visible]
        parts, valid = [], []
        for m in present:
            tokens = visible[m]
            embedding = self.image_embedding if m == "image" else self.text_embedding
            parts.append(embedding(tokens["value"]) + self._place(m, "encoder", tokens["position"]))
            valid.append(tokens["valid"])
        batch = parts[0].shape[0]
        cls = jnp.broadcast_to(self.cls_token, (batch, 1, self.options.encoder.width))
        x = jnp.concatenate([cls, *parts], axis=1)
        x = self.encoder(x, _with_cls(valid), deterministic=deterministic)
        return Encoded(cls=x[:, 0], tokens=dict(zip(present, _cut(x[:, 1:], parts), strict=True)))

    def decode(
        self,
        encoded: Encoded,
        visible: TokenSets,
        target: TokenSets,
        *,
        features_of: tuple[str, ...] = (),
        deterministic: bool = True,
    ) -> dict[str, jax.Array]:
        """Restores the target tokens.

        Args:
            encoded: what `encode` made of `visible`.
            visible: the token sets that were encoded.
            target: token sets; their `value` is not looked at.
            features_of: modalities of which not the prediction is returned but what its last layer reads,
                `[B, K, E]`, for a loss that applies this layer itself.
            deterministic: as in `encode`.

        Returns:
            ``{modality: [B, K, patch_values or vocab_size] float32}``.
        """
        present = list(encoded.tokens)
        context = self.decoder_projection(jnp.concatenate([encoded.cls[:, None], *encoded.tokens.values()], axis=1))
        parts = [context[:, :1]]
        for m, part in zip(present, _cut(context[:, 1:], list(encoded.tokens.values())), strict=True):
            parts.append(part + self._place(m, "decoder", visible[m]["position"]))
        masks = [self.mask_embedding[m] + self._place(m, "decoder", target[m]["position"]) for m in present]
        shown, asked = ([tokens[m]["valid"] for m in present] for tokens in (visible, target))
        if self.options.decoder.cross:
            x = jnp.concatenate(masks, axis=1)
            given = jnp.concatenate(parts, axis=1)
            x = self.decoder(x, _with_cls(shown), context=given, deterministic=deterministic)
        else:
            x = jnp.concatenate([*parts, *masks], axis=1)
            x = self.decoder(x, _with_cls(shown + asked), deterministic=deterministic)[:, context.shape[1] :]
        restored = _cut(x, masks)
        heads = {m: getattr(self, f"{m}_output") for m in present}
        return {
            m: heads[m].features(part) if m in features_of else heads[m](part)
            for m, part in zip(present, restored, strict=True)
        }

    def __call__(
        self, visible: TokenSets, target: TokenSets, *, features_of: tuple[str, ...] = (), deterministic: bool = True
    ) -> dict[str, jax.Array]:
        """`encode`, then `decode`."""
        encoded = self.encode(visible, deterministic=deterministic)
        return self.decode(encoded, visible, target, features_of=features_of, deterministic=deterministic)

    def _place(self, modality: str, stack: str, position: jax.Array) -> jax.Array:
        """Position (and type) embedding: `[B, K] int32` to `[B, K, D]`."""
        o = self.options
        width = o.encoder.width if stack == "encoder" else o.decoder.width
        is_image = modality == "image"
        table: Any = sincos_2d(width, o.grid) if is_image else sincos_1d(width, np.arange(o.text_tokens))
        if is_image and o.learned_positions and stack == "encoder":
            table = self.image_positions
        place: Any = jnp.asarray(table)[position]
        if o.use_type_embedding:
            place = place + (self.encoder_type if stack == "encoder" else self.decoder_type)[modality]
        return place


def _with_cls(valid: list[jax.Array]) -> jax.Array:
    """Prepends the always valid CLS token: a list of `[B, K_i] bool` to `[B, 1 + sum K_i] bool`."""
    return jnp.concatenate([jnp.ones((valid[0].shape[0], 1), bool), *valid], axis=1)


def _cut(x: jax.Array, like: list[jax.Array]) -> list[jax.Array]:
    """Cuts axis 1 of `x` into the lengths of `like`."""
    ends = np.cumsum([part.shape[1] for part in like])
    return [x[:, end - part.shape[1] : end] for end, part in zip(ends, like, strict=True)]
