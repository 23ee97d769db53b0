"""The light decoder: it restores the target tokens from the encoded visible ones.

It reads the encoded tokens followed by mask tokens at the targets' places, or the mask tokens alone, each of which
attends to the encoded ones (``options.attends`` is ``context``). The heads run on target slots alone.

Legend: ``B`` batch, ``V`` visible and ``K`` target slots, ``D`` encoder width, ``E`` decoder width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3ae_jax.data.tokens import Modality
from m3ae_jax.models.embeddings import MaskTokens
from m3ae_jax.models.encoder import Encoded, TokenSets, cut, with_cls
from m3ae_jax.models.transformer import OutputHead, Transformer, TransformerOptions, dense


class Decoder(nn.Module):
    """See the module docstring.

    Attributes:
        options: of the transformer.
        modalities: whose tokens it restores.
        typed: add a learned vector of its modality to each token.
        output_head_depth: hidden layers of each output head.
    """

    options: TransformerOptions
    modalities: tuple[Modality, ...]
    typed: bool = True
    output_head_depth: int = 0

    def setup(self) -> None:
        """Declares the parameters of all modalities."""
        o = self.options
        self.projection = dense(o.width, ("embed", None), o.dtype)
        self.transformer = Transformer(o)
        for m in self.modalities:
            setattr(self, f"{m.name}_masks", MaskTokens(m, o.width, typed=self.typed))
            size, axis = (m.features, "patch") if m.features else (m.vocabulary, "vocab")
            head = OutputHead(o.width, size, self.output_head_depth, axis, o.dtype, o.activation, o.epsilon)
            setattr(self, f"{m.name}_output", head)

    def __call__(
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
            encoded: what an encoder made of `visible`, with CLS.
            visible: the token sets that were encoded; their `value` is not read.
            target: token sets; likewise.
            features_of: modalities of which not the prediction is returned but what its last layer reads,
                `[B, K, E]`, for a loss that applies this layer itself.
            deterministic: False needs a ``dropout`` RNG if any rate is positive.

        Returns:
            ``{modality: [B, K, features or vocabulary] float32}``.
        """
        present = list(encoded.tokens)
        masks_of: dict[str, MaskTokens] = {m: getattr(self, f"{m}_masks") for m in present}
        heads: dict[str, OutputHead] = {m: getattr(self, f"{m}_output") for m in present}
        context = self.projection(jnp.concatenate([encoded.pooled["cls"][:, None], *encoded.tokens.values()], axis=1))
        parts = [context[:, :1]]
        for m, part in zip(present, cut(context[:, 1:], list(encoded.tokens.values())), strict=True):
            parts.append(part + masks_of[m].place(visible[m]["position"]))
        masks = [masks_of[m](target[m]["position"]) for m in present]
        shown, hidden = ([tokens[m]["valid"] for m in present] for tokens in (visible, target))
        if self.options.attends == "context":
            memory, x = (jnp.concatenate(several, axis=1) for several in (parts, masks))
            x = self.transformer(
                x,
                jnp.concatenate(hidden, axis=1),
                context=memory,
                context_valid=with_cls(shown),
                deterministic=deterministic,
            )
        else:
            x = jnp.concatenate([*parts, *masks], axis=1)
            x = self.transformer(x, with_cls(shown + hidden), deterministic=deterministic)[:, context.shape[1] :]
        return {
            m: heads[m].features(part) if m in features_of else heads[m](part)
            for m, part in zip(present, cut(x, masks), strict=True)
        }
