"""M3AE (arXiv 2205.14204): restore hidden patches and words from the visible ones.

With pictures alone this is MAE, with text alone masked language modelling. Of patches the pixels are restored, or their
ids in a visual vocabulary (as BEiT, arXiv 2106.08254). Legend: ``B`` batch, ``K`` target slots, ``P`` numbers in a
patch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.data.order import hidden_count
from m3ae_jax.data.tokens import Group, modality_table
from m3ae_jax.errors import UserError
from m3ae_jax.models.decoder import Decoder
from m3ae_jax.models.encoder import LAYOUTS, Encoded, Encoder, Layout, cut
from m3ae_jax.models.fields import check_stack
from m3ae_jax.models.transformer import Tap, stack_options
from m3ae_jax.models.vocabulary import cross_entropy
from m3ae_jax.objectives.base import (
    NOTHING_HIDDEN,
    Boxed,
    Load,
    LossOutput,
    Objective,
    Params,
    Part,
    Restored,
    Terms,
    model_params,
)
from m3ae_jax.objectives.batch import clean, modality_groups, row_total, summed, zeros_part
from m3ae_jax.objectives.parts.frozen import TOKENIZER, Frozen, built, fill_in
from m3ae_jax.objectives.parts.pixels import (
    denormalize_pixels,
    normalize_patches,
    normalize_pixels,
    normalized_tokens,
    patch_statistics,
)
from m3ae_jax.objectives.parts.prior import statistics_loss


class Fields(FieldGroup):
    """What is hidden, how it is restored, and what the loss is; ``config.m3ae``."""

    image_mask_ratio: float = setting(0.75, low=0.0, high=0.95, aliases=("mask_ratio", "masking_ratio"))
    """Share of the patches that is hidden."""
    text_mask_ratio: float = setting(0.75, low=0.0, high=0.95)
    """Share of the words that is hidden."""
    image_target_share: float = setting(1.0, low=0.01, high=1.0)
    """Share of the hidden patches that a training step restores, drawn anew each step."""
    decoder_width: int = setting(512, low=4, aliases=("decoder_dim",))
    """Channels of the decoder."""
    decoder_depth: int = setting(8, low=1, aliases=("decoder_layers",))
    """Layers of the decoder."""
    decoder_heads: int = setting(16, low=1, aliases=("decoder_num_heads",))
    """Attention heads of the decoder."""
    decoder_attention: str = setting("self", choices=("self", "cross"))
    """What the decoder's target tokens attend to: self: each other and the visible ones, as in the paper; cross: the
    visible ones alone, so that none depends on which others are targets (CrossMAE, arXiv 2401.14391)."""
    output_head_depth: int = setting(0, low=0, high=100)
    """0: one linear layer a modality; n: n hidden layers before it."""
    use_type_embedding: bool = setting(True)
    """A learned vector a modality, in encoder and decoder."""
    image_positions: str = setting("sincos", choices=("sincos", "learned"), aliases=("position_embedding", "pos_embed"))
    """In the encoder: sincos (fixed), or learned, as ViTs of other projects have them."""
    layout: str = setting("plain", choices=("plain", "bert"))
    """The encoder's: bert is BERT's, of text alone: LayerNorm after each residual, and learned positions."""
    image_target: str = setting("pixels", choices=("pixels", "ids"))
    """What is restored of a hidden patch: pixels; or its id in the vocabulary of a visual tokenizer (nats a patch)."""
    image_tokenizer: str = setting("", identifies=False, weights=True)
    """Of ids: a run of visual_tokenizer; its patches must be as large as these. Needed at the start alone."""
    image_tokenizer_model: str = setting("")
    """What it is; filled in from its run."""
    image_weight: float = setting(1.0, low=0.0, loss=True)
    """Factor of the pictures' loss."""
    text_weight: float = setting(0.5, low=0.0, loss=True)
    """Factor of the words' loss."""
    normalize_patches: bool = setting(False, loss=True, aliases=("norm_pix_loss", "norm_pix"))
    """Pixel targets with zero mean and unit variance in each patch (MAE's norm_pix_loss)."""
    text_average: str = setting("example", choices=("example", "token"), loss=True)
    """example: mean over captions of each caption's mean; token: mean over tokens."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Refuses a decoder that cannot be computed."""
        o = config.m3ae
        check_stack(config, "m3ae.decoder_", o.decoder_width, o.decoder_heads)
        if o.image_target == "ids" and (o.normalize_patches or "image" not in config.data.modalities):
            raise UserError(
                "m3ae.image_target='ids' restores ids of pictures: set data.modalities and "
                "m3ae.normalize_patches=False so"
            )
        fill_in(config, path, TOKENIZER, o.image_target == "ids", "m3ae.image_target='ids'")
        if config.m3ae.layout == "bert" and tuple(config.data.modalities) != ("text",):
            raise UserError(
                f"m3ae.layout='bert' needs data.modalities=('text',), not {tuple(config.data.modalities)!r}; as the "
                "captions' tower of another objective it takes a picture's beside it"
            )


class M3AE(Objective):
    """The objective; see `objectives.base` for the methods' contract."""

    Fields = Fields
    stacks = ("encoder/transformer/blocks", "decoder/transformer/blocks")

    def __init__(self, config: ConfigDict, vocab_size: int) -> None:
        self._config, o = config, config.m3ae
        self._modalities = modality_table(config, vocab_size)
        self.groups = self.view(self._modalities, {"image": o.image_mask_ratio, "text": o.text_mask_ratio})
        weights = {"image": o.image_weight, "text": o.text_weight}
        self.term_weights = {f"{m}_loss": weights[m] for m in self._modalities}
        modalities = tuple(self._modalities.values())
        if o.layout == "bert":
            layout, learned, typed = LAYOUTS["bert"]["text"], ("text",), False
        else:
            layout, learned, typed = Layout(), ("image",) * (o.image_positions == "learned"), o.use_type_embedding
        self._encoder = Encoder(stack_options(config), modalities, typed, learned, layout=layout)
        options = stack_options(
            config,
            width=o.decoder_width,
            depth=o.decoder_depth,
            heads=o.decoder_heads,
            attends="context" if o.decoder_attention == "cross" else "self",
        )
        self._tokenizer: Frozen | None = None
        if o.image_target == "ids":
            self._tokenizer = built(config, "m3ae", TOKENIZER)
            self.model_extra = ("tokenizer",)
            codes = self._tokenizer.objective.codes
            ids = dataclasses.replace(self._modalities["image"], features=0, vocabulary=codes)
            modalities = tuple(ids if m.name == "image" else m for m in modalities)
        self._restored = {m.name: m for m in modalities}
        self._decoder = Decoder(options, modalities, o.use_type_embedding, o.output_head_depth)
        self.attention_maps = (config.model.depth, config.model.heads)

    def init(self, rng: jax.Array) -> Boxed:
        """See `Objective.init`."""
        part = zeros_part(self.groups)
        visible, target = self._visible(part), _targets(part)
        encoder, decoder = jax.random.split(rng)
        encoded, of_encoder = self._encoder.init_with_output(encoder, visible)
        of_decoder = self._decoder.init(decoder, encoded, visible, target)
        return {"encoder": of_encoder["params"], "decoder": of_decoder["params"]}

    def init_extra(self, params: Boxed, rng: jax.Array) -> Boxed:
        """See `Objective.init_extra`: the ``tokenizer``, if there is one."""
        return {"tokenizer": self._tokenizer.init(rng)} if self._tokenizer else {}

    def loads(self) -> tuple[Load, ...]:
        """See `Objective.loads`."""
        return self._tokenizer.loads("extra/tokenizer") if self._tokenizer else ()

    def view(self, inputs: Iterable[str], hidden: Mapping[str, float] = NOTHING_HIDDEN) -> tuple[Group, ...]:
        """See `Objective.view`: a group for each modality, of its name."""
        return modality_groups(self._modalities, inputs, hidden)

    def loss(self, params: Params, extra: Any, part: Part, rng: jax.Array | None, step: jax.Array) -> LossOutput:
        """Terms ``image_loss`` (squared error a pixel value, or nats a patch) and ``text_loss`` (nats a token)."""
        part = self._restored_share(self._with_ids(model_params(self, params, extra), part), rng)
        losses: Terms = {}
        metrics: Terms = {}
        for name, restored in self._token_losses(params, part, rng).items():
            valid = part["groups"][name]["target"]["valid"]
            average = self._config.m3ae.text_average if name == "text" else "example"
            losses[f"{name}_loss"] = row_total(restored.loss, valid, average)
            if restored.correct is not None:
                metrics[f"{name}_accuracy"] = summed(row_total(restored.correct, valid, "token"))
        return LossOutput({name: summed(loss) for name, loss in losses.items()}, metrics, per_example=losses)

    def restore(self, params: Params, part: Part) -> dict[str, Restored]:
        """See `objectives.base.Restores`."""
        part = self._with_ids(params, part)
        restored = self._token_losses(params, part, None)
        if self._tokenizer and "image" in restored:
            guess = restored["image"]
            pixels = self._tokenizer.painted(params["tokenizer"], part["groups"]["image"], guess.value)
            restored["image"] = Restored(pixels, guess.loss)
        return restored

    def encode(self, params: Params, part: Part, rng: jax.Array | None = None) -> Encoded:
        """See `objectives.base.Encodes`; pooled is ``cls``."""
        encoded: Any = self._encoder.apply(
            {"params": params["encoder"]}, self._visible(part), deterministic=rng is None, rngs=_dropout(rng)
        )
        return encoded

    def attention(self, params: Params, part: Part, layer: int = -1) -> dict[str, dict[str, jax.Array]]:
        """See `objectives.base.Attends`; these are the weights whatever ``compute.attention`` computes with."""
        visible = self._visible(part)
        encoded: Any = self._encoder.apply({"params": params["encoder"]}, visible, tap=Tap(layer))
        names = ["cls", *(m for m in self._modalities if m in visible)]
        ends = np.cumsum([1, *(visible[m]["valid"].shape[1] for m in names[1:])])
        place = {name: slice(start, end) for name, start, end in zip(names, [0, *ends[:-1]], ends, strict=True)}
        weights = jnp.mean(encoded.attention, axis=1)
        return {query: {key: weights[:, place[query], place[key]] for key in names} for query in names}

    def prior(self, train: Iterable[Part], validation: Iterable[Part]) -> dict[str, float]:
        """See `objectives.base.Prior`: unigram frequencies of the words, the mean patch at each position.

        Of ids of pictures, whose tokenizer is not at hand here, a code as probable as another.
        """
        average, ids = self._config.m3ae.text_average, self._tokenizer is not None

        def values(part: Part) -> dict[str, jax.Array]:
            groups = {name: group for name, group in part["groups"].items() if not (ids and name == "image")}
            return self._values({**part, "groups": groups})

        found = statistics_loss(self._modalities, jax.jit(values), average, train, validation)
        return {"image_loss": math.log(self._restored["image"].vocabulary), **found} if ids else found

    def predict(
        self, params: Params, part: Part, rng: jax.Array | None = None, features_of: tuple[str, ...] = ()
    ) -> dict[str, jax.Array]:
        """Predictions of the target tokens: of patches in the loss's pixel space, of words logits; float32.

        Args:
            params: parameters.
            part: of a batch.
            rng: of dropout; None: none.
            features_of: groups of which what the last layer reads is returned instead.
        """
        encoded = self.encode(params, part, rng)
        predicted: Any = self._decoder.apply(
            {"params": params["decoder"]},
            encoded,
            self._visible(part),
            _targets(part),
            features_of=features_of,
            deterministic=rng is None,
            rngs=_dropout(None if rng is None else jax.random.fold_in(rng, 2)),
        )
        return predicted

    def _token_losses(self, params: Params, part: Part, rng: jax.Array | None) -> dict[str, Restored]:
        """Loss and restored value of each target token."""
        ids = tuple(name for name, m in self._restored.items() if m.vocabulary)
        predicted = self.predict(params, part, rng, features_of=ids)
        values = self._values(part)
        restored = {}
        for name, prediction in predicted.items():
            if name in ids:
                head = params["decoder"][f"{name}_output"]["output"]
                blocks = self._config.compute.vocabulary_blocks
                words = cross_entropy(prediction, head["kernel"], head["bias"], values[name], blocks)
                restored[name] = Restored(words.best, words.loss, words.best == values[name])
            else:
                error = jnp.mean(jnp.square(prediction - values[name]), axis=-1)
                own = bool(self._config.m3ae.normalize_patches)
                restored[name] = Restored(self._pixels(part, prediction), error, own_statistics=own)
        return restored

    def _values(self, part: Part) -> dict[str, jax.Array]:
        """What is to be restored: `image`: `[B, K, P] float32` in the loss's pixel space; ids: `[B, K] int32`."""
        values = {name: group["target"]["value"] for name, group in part["groups"].items()}
        if "image" in values and self._tokenizer:
            values["image"] = part["groups"]["image"]["target"]["ids"]
        elif "image" in values:
            values["image"] = normalize_pixels(values["image"], self._config)
            if self._config.m3ae.normalize_patches:
                values["image"] = normalize_patches(values["image"])
        return values

    def _with_ids(self, params: Params, part: Part) -> Part:
        """The part with the ``ids`` of all patches, `[B, K] int32` of each set, if they are what is restored."""
        if not self._tokenizer or "image" not in part["groups"]:
            return part
        sets = part["groups"]["image"]
        ids = self._tokenizer.objective.ids(jax.lax.stop_gradient(params["tokenizer"]), clean(sets))
        of_set = dict(
            zip(("visible", "target"), cut(ids, [sets["visible"]["valid"], sets["target"]["valid"]]), strict=True)
        )
        image = {name: {**tokens, "ids": of_set[name]} for name, tokens in sets.items()}
        return {**part, "groups": {**part["groups"], "image": image}}

    def _pixels(self, part: Part, prediction: jax.Array) -> jax.Array:
        """`[B, K, P] uint8` of predicted patches."""
        if self._config.m3ae.normalize_patches:
            # Only the patch's own statistics give such a prediction a colour, as in MAE's pictures.
            target = part["groups"]["image"]["target"]["value"]
            mean, std = patch_statistics(normalize_pixels(target, self._config))
            prediction = prediction * std + mean
        return denormalize_pixels(prediction, self._config)

    def _restored_share(self, part: Part, rng: jax.Array | None) -> Part:
        """The part with as many target patches as a training step restores; without `rng` all of them."""
        share = self._config.m3ae.image_target_share
        if rng is None or share == 1.0 or "image" not in part["groups"]:
            return part
        group = part["groups"]["image"]
        valid = group["target"]["valid"]
        count = max(int(hidden_count(valid.shape[1], share)), 1)
        # Real patches in a random order, then padding.
        draws = jax.random.uniform(jax.random.fold_in(rng, 1), valid.shape) + ~valid
        chosen = jnp.argsort(draws, axis=1)[:, :count]
        target = {
            name: jnp.take_along_axis(x, chosen.reshape(*chosen.shape, *[1] * (x.ndim - 2)), axis=1)
            for name, x in group["target"].items()
        }
        return {**part, "groups": {**part["groups"], "image": {**group, "target": target}}}

    def _visible(self, part: Part) -> dict[str, dict[str, jax.Array]]:
        return {name: normalized_tokens(group["visible"], self._config) for name, group in part["groups"].items()}


def _targets(part: Part) -> dict[str, Any]:
    return {name: group["target"] for name, group in part["groups"].items()}


def _dropout(rng: jax.Array | None) -> dict[str, jax.Array]:
    return {} if rng is None else {"dropout": rng}
