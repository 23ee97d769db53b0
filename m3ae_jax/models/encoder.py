"""The encoder: CLS and the visible tokens of all modalities through one transformer.

Attention does not care about the order of its tokens, only about their place: the encoder reads the token sets as they
come. Legend: ``B`` batch, ``V`` visible slots, ``D`` width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from m3ae_jax.data.tokens import Modality
from m3ae_jax.models.embeddings import Embedding, Tokens, vector
from m3ae_jax.models.transformer import (
    ACTIVATIONS,
    Attention,
    Tap,
    Transformer,
    TransformerOptions,
    dense,
    layer_norm,
)

TokenSets = Mapping[str, Tokens]
"""``{modality: token set}``."""


@flax.struct.dataclass
class Encoded:
    """Features of examples, and of their tokens.

    Attributes:
        pooled: of the whole example: ``{"cls": [B, D]}``, or nothing.
        tokens: of each token, ``{group: [B, V, D]}``.
        attention: what a tap has looked at, `[B, H, N or 1, N] float32` of CLS and the tokens; None: there was none.
    """

    pooled: dict[str, jax.Array]
    tokens: dict[str, jax.Array]
    attention: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """What an encoder has besides the tokens and the blocks; the default is M3AE's.

    Attributes:
        summary: what stands for the whole: a learned token that is the ``first`` or the ``last`` one; or what
            ``attention`` with a learned query takes from all tokens after the blocks; or ``nothing`` does.
        other: there is another learned token, at the other end.
        padding: it is read as if it were the token of the summary.
        norm: the embedded tokens go through a LayerNorm before the blocks.
        bias: the map of features to channels has one.
        causal: of the blocks, see `TransformerOptions`.
        post_norm: likewise.

    A token that comes after the others has a learned position, the one after the last real token's.
    """

    summary: str = "first"
    other: bool = False
    padding: bool = False
    norm: bool = False
    bias: bool = True
    causal: bool = False
    post_norm: bool = False

    @property
    def trailing(self) -> bool:
        """Whether a learned token comes after the others."""
        return self.summary == "last" or (self.summary == "first" and self.other)


LAYOUTS: dict[str, dict[str, Layout]] = {
    "plain": {"image": Layout(), "text": Layout()},
    "clip": {"image": Layout(norm=True, bias=False), "text": Layout("last", other=True, causal=True)},
    "siglip": {"image": Layout("attention"), "text": Layout("last", padding=True)},
    "bert": {"text": Layout(other=True, norm=True, post_norm=True)},
}
"""The layouts of published models by name and modality: CLIP (arXiv 2103.00020), SigLIP (arXiv 2303.15343), BERT (arXiv
1810.04805). Their token in front of a text is its start, ``[CLS]``; that behind it its end, ``[SEP]``."""


class Pool(nn.Module):
    """What a learned query takes from all tokens by attention, and an MLP (SigLIP's head)."""

    options: TransformerOptions

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """Maps `[B, N, D]` to `[B, D]`; `valid` is `[B, N] bool`."""
        o = self.options
        query = jnp.broadcast_to(vector(self, "query", o.width)[0], (x.shape[0], o.width)).astype(x.dtype)
        pooled, _ = Attention(o, name="attention")(query, x.reshape(-1, o.width), valid, True)
        hidden = layer_norm(o.epsilon, o.dtype, "norm_mlp")(pooled)
        hidden = dense(int(o.width * o.mlp_ratio), ("embed", "mlp"), o.dtype, "mlp_in")(hidden)
        return pooled + dense(o.width, ("mlp", "embed"), o.dtype, "mlp_out")(ACTIVATIONS[o.activation](hidden))


class Encoder(nn.Module):
    """See the module docstring.

    Attributes:
        options: of the transformer.
        modalities: whose tokens it embeds.
        typed: add a learned vector of its modality to each token.
        learned_positions: names of the modalities whose positions are learned.
        masked: names of the modalities that are shown with masks, see `Embedding`.
        layout: what it has besides; another than the default takes one modality.
    """

    options: TransformerOptions
    modalities: tuple[Modality, ...]
    typed: bool = True
    learned_positions: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()
    layout: Layout = Layout()

    @nn.compact
    def __call__(self, visible: TokenSets, *, deterministic: bool = True, tap: Tap | None = None) -> Encoded:
        """Encodes the visible tokens of one or more modalities.

        Args:
            visible: token sets; `value` is `[B, V, features] float32` or `[B, V] int32`.
            deterministic: False needs a ``dropout`` RNG if any rate is positive.
            tap: of whose layer the attention is looked at.
        """
        o, layout = self.options, self.layout
        o = dataclasses.replace(o, causal=layout.causal, post_norm=layout.post_norm)
        present = [m for m in self.modalities if m.name in visible]
        embeddings = [
            Embedding(
                modality=m,
                width=o.width,
                learned=m.name in self.learned_positions,
                typed=self.typed,
                trailing=layout.trailing,
                dtype=o.dtype,
                masked=m.name in self.masked,
                bias=layout.bias,
                name=m.name,
            )
            for m in present
        ]
        parts = [embed(visible[m.name]) for embed, m in zip(embeddings, present, strict=True)]
        valid = [visible[m.name]["valid"] for m in present]
        ends = {
            "first": ("cls_token", "other_token"),
            "last": ("other_token", "cls_token"),
            "attention": ("", ""),
            "nothing": ("", ""),
        }
        leading, trailing = ends[layout.summary]
        x, one = list(parts), jnp.ones((parts[0].shape[0], 1), bool)
        if layout.padding:
            [embed], [real] = embeddings, valid
            cls = vector(self, "cls_token", o.width)
            place = embed.place(jnp.broadcast_to(jnp.arange(real.shape[1]), real.shape))
            x, valid = [jnp.where(real[..., None], parts[0], cls + place)], [jnp.ones_like(real)]
        if layout.trailing:
            [embed], [real] = embeddings, valid
            token = cls if layout.padding else vector(self, trailing, o.width)
            x, valid = [*x, token + embed.place(jnp.sum(real, axis=1, keepdims=True))], [*valid, one]
        if leading and (layout.summary == "first" or layout.other):
            token = vector(self, leading, o.width)
            x = [jnp.broadcast_to(token, (parts[0].shape[0], 1, o.width)), *x]
            valid = [one, *valid]
        before = len(x) - len(parts) - layout.trailing
        joined, real = jnp.concatenate(x, axis=1), jnp.concatenate(valid, axis=1)
        if layout.norm:
            joined = layer_norm(o.epsilon, o.dtype, "embedding_norm")(joined)
        y, attention = Transformer(o, name="transformer").tapped(joined, real, tap, deterministic=deterministic)
        pooled = {}
        if layout.summary == "attention":
            pooled["cls"] = Pool(o, name="pool")(y, real)
        elif layout.summary != "nothing":
            pooled["cls"] = y[:, -1 if layout.summary == "last" else 0]
        tokens = cut(y[:, before : y.shape[1] - layout.trailing], parts)
        return Encoded(pooled, {m.name: part for m, part in zip(present, tokens, strict=True)}, attention)


def with_cls(valid: Sequence[jax.Array]) -> jax.Array:
    """Prepends the always valid CLS token: several `[B, K_i] bool` to `[B, 1 + sum K_i] bool`."""
    return jnp.concatenate([jnp.ones((valid[0].shape[0], 1), bool), *valid], axis=1)


def cut(x: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """Cuts axis 1 of `x` into the lengths of `like`."""
    ends = np.cumsum([part.shape[1] for part in like])
    return [x[:, end - part.shape[1] : end] for end, part in zip(ends, like, strict=True)]
