"""A stack of text layers that reads a caption alone, a caption that looks at a picture, or a picture at a caption.

SIMLA's upper half (arXiv 2203.14395, section 3.1): BERT, with cross-attention in every layer, which is left out where
there is nothing to look at. Or ALBEF's (arXiv 2107.07651, section 3.1): the first layers have none and read captions
alone, the others are left out where there is nothing to look at.
Legend: ``B`` batch, ``L`` words, ``N`` patches, ``D`` width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from m3ae_jax.data.tokens import Modality
from m3ae_jax.models.embeddings import Embedding, Tokens, vector
from m3ae_jax.models.transformer import Tap, Transformer, TransformerOptions, drop, layer_norm


@flax.struct.dataclass
class Stream:
    """What the stack reads, or looks at.

    Attributes:
        x: `[B, S, D]`.
        valid: `[B, S] bool`.
    """

    x: jax.Array
    valid: jax.Array


class TextStack(nn.Module):
    """See the module docstring; its parameters have the names of an `Encoder` with BERT's layout.

    Attributes:
        options: of the transformer, which attends to both.
        modality: of the captions.
        places: rows of the table of positions; for the words, and for the patches of a picture that reads.
        alone: the first so many layers read captions alone, and all that others do is look at something; 0: SIMLA's.
    """

    options: TransformerOptions
    modality: Modality
    places: int
    alone: int = 0

    def setup(self) -> None:
        """Declares the parameters."""
        o = self.options
        table = dataclasses.replace(self.modality, tokens=self.places)
        self.text = Embedding(
            modality=table, width=o.width, learned=True, typed=False, trailing=True, dtype=o.dtype, masked=True,
            deviation=0.02,
        )  # fmt: skip
        self.cls: Any = vector(self, "cls_token", o.width)
        self.other: Any = vector(self, "other_token", o.width)
        self.first_place: Any = vector(self, "first_place", o.width)
        self.embedding_norm = layer_norm(o.epsilon, o.dtype)
        if self.alone:
            self.lower = Transformer(dataclasses.replace(o, depth=self.alone, attends="self"))
        self.transformer = Transformer(dataclasses.replace(o, depth=o.depth - self.alone))

    def words(self, tokens: Tokens, *, deterministic: bool = True) -> Stream:
        """A caption's words between their start and end, `[B, 1 + L + 1, D]`: embedded, and read `alone`."""
        embedded, real = self.text(tokens), tokens["valid"]
        one = jnp.ones((len(real), 1), bool)
        start = jnp.broadcast_to(self.cls, (len(real), 1, self.options.width))
        end = self.other + self.text.place(jnp.sum(real, axis=1, keepdims=True))
        valid = jnp.concatenate([one, real, one], axis=1)
        x = self._normalized(jnp.concatenate([start, embedded, end], axis=1), deterministic)
        return Stream(self.lower(x, valid, deterministic=deterministic) if self.alone else x, valid)

    def picture(self, seen: Stream, position: jax.Array, *, deterministic: bool = True) -> Stream:
        """A picture that reads: CLS and patches of its tower, `[B, 1 + N, D]`, at the places of words."""
        first = jnp.broadcast_to(self.first_place, (len(position), 1, self.options.width))
        places = jnp.concatenate([first, self.text.place(position)], axis=1)
        return Stream(self._normalized(seen.x + places, deterministic), seen.valid)

    def _normalized(self, x: jax.Array, deterministic: bool) -> jax.Array:
        normalized: Any = self.embedding_norm(x)
        return drop(normalized, self.options.dropout, self, deterministic)

    def __call__(
        self, stream: Stream, context: Stream | None = None, tap: Tap | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array | None]:
        """Runs the layers: `[B, S, D]`, and what the tap has seen (`Transformer.tapped`)."""
        if self.alone and context is None:
            return stream.x, None
        seen = {} if context is None else {"context": context.x, "context_valid": context.valid}
        result: Any = self.transformer.tapped(stream.x, stream.valid, tap, **seen, deterministic=deterministic)
        return result

    def first(self, tokens: Tokens, context: Stream) -> jax.Array:
        """Makes all parameters."""
        return self(self.words(tokens), context)[0]
