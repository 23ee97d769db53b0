"""The encoder: CLS and the visible tokens of all modalities through one transformer.

Attention does not care about the order of its tokens, only about their place: the encoder reads the token sets as they
come. Legend: ``B`` batch, ``V`` visible slots, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from m3ae_jax.data.tokens import Modality
from m3ae_jax.models.embeddings import Embedding, Tokens, vector
from m3ae_jax.models.transformer import Transformer, TransformerOptions

TokenSets = Mapping[str, Tokens]
"""``{modality: token set}``."""


@flax.struct.dataclass
class Encoded:
    """Features of examples, and of their tokens.

    Attributes:
        pooled: of the whole example: ``{"cls": [B, D]}``, or nothing.
        tokens: of each token, ``{group: [B, V, D]}``.
    """

    pooled: dict[str, jax.Array]
    tokens: dict[str, jax.Array]


class Encoder(nn.Module):
    """See the module docstring.

    Attributes:
        options: of the transformer.
        modalities: whose tokens it embeds.
        typed: add a learned vector of its modality to each token.
        learned_positions: names of the modalities whose positions are learned.
        masked: names of the modalities that are shown with masks, see `Embedding`.
    """

    options: TransformerOptions
    modalities: tuple[Modality, ...]
    typed: bool = True
    learned_positions: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, visible: TokenSets, *, deterministic: bool = True) -> Encoded:
        """Encodes the visible tokens of one or more modalities.

        Args:
            visible: token sets; `value` is `[B, V, features] float32` or `[B, V] int32`.
            deterministic: False needs a ``dropout`` RNG if any rate is positive.
        """
        o = self.options
        present = [m for m in self.modalities if m.name in visible]
        parts = [
            Embedding(
                m, o.width, m.name in self.learned_positions, self.typed, o.dtype, m.name in self.masked, name=m.name
            )(visible[m.name])
            for m in present
        ]
        cls = jnp.broadcast_to(vector(self, "cls_token", o.width), (parts[0].shape[0], 1, o.width))
        x = jnp.concatenate([cls, *parts], axis=1)
        valid = with_cls([visible[m.name]["valid"] for m in present])
        x = Transformer(o, name="transformer")(x, valid, deterministic=deterministic)
        tokens = cut(x[:, 1:], parts)
        return Encoded({"cls": x[:, 0]}, {m.name: part for m, part in zip(present, tokens, strict=True)})


def with_cls(valid: Sequence[jax.Array]) -> jax.Array:
    """Prepends the always valid CLS token: several `[B, K_i] bool` to `[B, 1 + sum K_i] bool`."""
    return jnp.concatenate([jnp.ones((valid[0].shape[0], 1), bool), *valid], axis=1)


def cut(x: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """Cuts axis 1 of `x` into the lengths of `like`."""
    ends = np.cumsum([part.shape[1] for part in like])
    return [x[:, end - part.shape[1] : end] for end, part in zip(ends, like, strict=True)]
