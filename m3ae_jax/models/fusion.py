"""The fusion of two towers: CLS and the tokens of both through one transformer, so that every token sees both.

Legend: ``B`` batch, ``N`` slots of a modality, ``S`` of the whole sequence, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from m3ae_jax.data.tokens import Modality
from m3ae_jax.models.embeddings import MaskTokens, Tokens
from m3ae_jax.models.encoder import with_cls
from m3ae_jax.models.transformer import Transformer, TransformerOptions


@flax.struct.dataclass
class Sequence:
    """What one pass of the fusion reads.

    Attributes:
        x: `[B, S, D]`, CLS first.
        valid: `[B, S] bool`.
    """

    x: jax.Array
    valid: jax.Array


class Fusion(nn.Module):
    """See the module docstring.

    Attributes:
        options: of the transformer.
        modalities: whose tokens it reads, in the order of the sequence.
    """

    options: TransformerOptions
    modalities: tuple[Modality, ...]

    def setup(self) -> None:
        """Declares the parameters of all modalities."""
        self.transformer = Transformer(self.options)
        for m in self.modalities:
            setattr(self, f"{m.name}_masks", MaskTokens(m, self.options.width))

    def sequence(self, cls: jax.Array, tokens: Mapping[str, jax.Array], sets: Mapping[str, Tokens]) -> Sequence:
        """Puts together what a pass reads.

        Args:
            cls: `[B, D]`, what stands for the whole at the start.
            tokens: what the towers made of the first slots of each modality, `[B, n, D]`; the mask embedding stands for
                the others, ``n <= N``.
            sets: ``position`` and ``valid`` of all slots, `[B, N]`.
        """
        parts, valid = [cls[:, None]], []
        for m in self.modalities:
            if m.name in sets:
                masks: MaskTokens = getattr(self, f"{m.name}_masks")
                shown, place = tokens[m.name], masks.place(sets[m.name]["position"])
                hidden = jnp.broadcast_to(
                    masks.mask, (*place.shape[:1], place.shape[1] - shown.shape[1], cls.shape[-1])
                )
                parts.append(jnp.concatenate([shown, hidden.astype(shown.dtype)], axis=1) + place)
                valid.append(sets[m.name]["valid"])
        return Sequence(jnp.concatenate(parts, axis=1), with_cls(valid))

    def __call__(self, sequence: Sequence, *, deterministic: bool = True) -> jax.Array:
        """Maps a sequence to `[B, S, D]`."""
        return self.transformer(sequence.x, sequence.valid, deterministic=deterministic)

    def first(self, cls: jax.Array, tokens: Mapping[str, jax.Array], sets: Mapping[str, Tokens]) -> jax.Array:
        """Both, which makes all parameters."""
        return self(self.sequence(cls, tokens, sets))
