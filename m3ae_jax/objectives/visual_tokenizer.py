"""A visual vocabulary: each patch of a picture becomes one of K ids, from which the picture is made again.

A ViT, a quantizer and a second ViT (4M, arXiv 2312.06647, tokenizers; ViT-VQGAN, arXiv 2110.04627), or k-means of the
pixels, which has neither.

Legend: ``B`` examples, ``N`` patches of a picture, ``P`` numbers in a patch, ``d`` numbers of a latent, ``K`` codes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.data.tokens import Group, modality_table
from m3ae_jax.errors import UserError
from m3ae_jax.models.encoder import Encoder, Layout
from m3ae_jax.models.fields import check_stack, encoder_size
from m3ae_jax.models.transformer import OutputHead, stack_options
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
from m3ae_jax.objectives.parts.contrast import unit
from m3ae_jax.objectives.parts.frozen import Frozen, Slot, built, fill_in
from m3ae_jax.objectives.parts.pixels import denormalize_pixels, normalize_pixels, normalize_unit, psnr, unit_pixels
from m3ae_jax.objectives.parts.quantize import FSQ, VQ, Quantized, Quantizer, usage

_HITS = 0.99  # decay of the moving mean that usage is told of
_JUDGE = Slot("perceptual_from", "perceptual_model", "m3ae")
_NO_SUMMARY = Layout(summary="nothing")


class Fields(FieldGroup):
    """The vocabulary, the decoder and the loss; ``config.visual_tokenizer``. The encoder is ``model``."""

    quantizer: str = setting("fsq", choices=("fsq", "vq", "kmeans"))
    """fsq: finite scalar quantization, in which no codebook can collapse; vq: a codebook by cosine, moved to the mean
    of what it stands for (4M's); kmeans: a codebook of pixels, without encoder and decoder, in minutes."""
    levels: tuple[int, ...] = setting((7, 5, 5, 5, 5), low=2, high=1024)
    """Of fsq: levels of each number of a latent; their product is the number of codes."""
    codes: int = setting(4096, low=2, high=2**24, aliases=("codebook_size", "vocab_size"))
    """Of vq and kmeans."""
    latent_width: int = setting(32, low=1, aliases=("latent_dim", "code_dim"))
    """Of vq: numbers of a latent."""
    decay: float = setting(0.99, low=0.0, high=1.0)
    """Of vq and kmeans: of the codebook's moving means."""
    restart: float = setting(32.0, low=0.0)
    """Of vq and kmeans: a code that is used less than 1 / so much of the even share becomes a latent of the batch; 0:
    none."""
    decoder_width: int = setting(0, low=0)
    """Channels of the decoder; 0: as the encoder."""
    decoder_depth: int = setting(0, low=0)
    """Layers of the decoder; 0: as the encoder."""
    decoder_heads: int = setting(0, low=0)
    """Attention heads of the decoder; 0: as the encoder."""
    pixel_loss: str = setting("squared", choices=("squared", "smooth_l1"), loss=True)
    """Of normalised pixels: the squared error, or smooth L1 (quadratic below 1)."""
    commitment_weight: float = setting(1.0, low=0.0, loss=True)
    """Of vq: factor of the squared distance of a latent to its code."""
    perceptual_weight: float = setting(0.0, low=0.0, loss=True)
    """Factor of the cosine distance between the picture and what is made of it, as the encoder of another run sees them
    patch by patch."""
    perceptual_from: str = setting("", identifies=False, weights=True)
    """A run of m3ae, whose encoder stands still. Needed at the start alone."""
    perceptual_model: str = setting("", loss=True)
    """What it is; filled in from its run."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Refuses a decoder that cannot be computed, and data without pictures."""
        o = config.visual_tokenizer
        if "image" not in config.data.modalities:
            raise UserError(f"visual_tokenizer needs pictures: data.modalities={tuple(config.data.modalities)!r}")
        width, _, heads = encoder_size(config)
        check_stack(config, "visual_tokenizer.decoder_", o.decoder_width or width, o.decoder_heads or heads)
        if o.quantizer == "fsq" and functools.reduce(int.__mul__, o.levels) > 2**24:
            raise UserError(f"visual_tokenizer.levels={tuple(o.levels)!r}: their product is more than 2^24 codes")
        needed = bool(o.perceptual_weight)
        if needed and o.quantizer == "kmeans":
            raise UserError(f"visual_tokenizer.perceptual_weight={o.perceptual_weight}: kmeans trains on pixels alone")
        fill_in(config, path, _JUDGE, needed, "visual_tokenizer.perceptual_weight")


class VisualTokenizer(Objective):
    """The objective; see `objectives.base` for the methods' contract."""

    Fields = Fields
    name = "visual_tokenizer"

    def __init__(self, config: ConfigDict, vocab_size: int) -> None:
        self._config, o = config, config.visual_tokenizer
        self._options = o
        self._modalities = {"image": modality_table(config, vocab_size)["image"]}
        picture = self._modalities["image"]
        # All patches are to be restored.
        self.groups = self.view(self._modalities, {"image": 1.0})
        self._plain = o.quantizer == "kmeans"
        if o.quantizer == "fsq":
            self._quantizer: Quantizer = FSQ(tuple(o.levels))
        else:
            width = picture.features if self._plain else o.latent_width
            self._quantizer = VQ(o.codes, width, not self._plain, o.decay, o.restart)
        self.codes = self._quantizer.codes
        self._encoder: Encoder | None = None
        self._decoder: Encoder | None = None
        if not self._plain:
            self._encoder, self._decoder = self._stacks(picture)
            self.stacks = ("encoder/transformer/blocks", "decoder/transformer/blocks")
        self.model_extra = () if o.quantizer == "fsq" else ("codebook",)
        self.term_weights = {"pixel_loss": 1.0}
        if o.quantizer == "vq":
            self.term_weights["commitment_loss"] = o.commitment_weight
        self._judge: Frozen | None = None
        if o.perceptual_weight:
            self.term_weights["perceptual_loss"] = o.perceptual_weight
            self._judge = built(config, "visual_tokenizer", _JUDGE, branches=("encoder",))

    def _stacks(self, picture: Any) -> tuple[Encoder, Encoder]:
        o, options = self._options, stack_options(self._config)
        latents = dataclasses.replace(picture, features=self._quantizer.width)
        of_decoder = stack_options(
            self._config,
            width=o.decoder_width or options.width,
            depth=o.decoder_depth or options.depth,
            heads=o.decoder_heads or options.heads,
        )
        return (
            Encoder(options, (picture,), typed=False, layout=_NO_SUMMARY),
            Encoder(of_decoder, (latents,), typed=False, layout=_NO_SUMMARY),
        )

    def _heads(self) -> dict[str, OutputHead]:
        """From the encoder's tokens to latents, and from the decoder's to pixels."""
        outputs = {"encoder": self._quantizer.width, "decoder": self._modalities["image"].features}
        stacks = {"encoder": self._encoder, "decoder": self._decoder}
        return {
            name: OutputHead(stack.options.width, outputs[name], 0, "patch", stack.options.dtype)
            for name, stack in stacks.items()
            if stack is not None
        }

    def init(self, rng: jax.Array) -> Boxed:
        """See `Objective.init`."""
        if self._encoder is None or self._decoder is None:
            return {}
        tokens = clean(zeros_part(self.groups)["groups"]["image"])
        params: dict[str, Any] = {}
        values = {"encoder": normalize_pixels(tokens["value"], self._config)}
        values["decoder"] = jnp.zeros((*tokens["valid"].shape, self._quantizer.width))
        for number, (name, stack) in enumerate((("encoder", self._encoder), ("decoder", self._decoder))):
            key, head_key = jax.random.split(jax.random.fold_in(rng, number))
            encoded, of_stack = stack.init_with_output(key, {"image": {**tokens, "value": values[name]}})
            head = self._heads()[name].init(head_key, encoded.tokens["image"])["params"]
            params[name] = {**of_stack["params"], "head": head}
        return params

    def init_extra(self, params: Boxed, rng: jax.Array) -> Boxed:
        """See `Objective.init_extra`: ``codebook`` if there is one, how often each code was ``hit``, ``judge``."""
        extra: dict[str, Any] = {"hits": jnp.zeros(self.codes)}
        if self.model_extra:
            extra["codebook"] = self._quantizer.init(rng)
        if self._judge:
            extra["judge"] = self._judge.init(rng)
        return extra

    def loads(self) -> tuple[Load, ...]:
        """See `Objective.loads`."""
        return self._judge.loads("extra/judge") if self._judge else ()

    def view(self, inputs: Iterable[str], hidden: Mapping[str, float] = NOTHING_HIDDEN) -> tuple[Group, ...]:
        """See `Objective.view`: the pictures, what is hidden or not; all patches are read, and targets restored."""
        return modality_groups(self._modalities, inputs, hidden)

    def loss(self, params: Params, extra: Any, part: Part, rng: jax.Array | None, step: jax.Array) -> LossOutput:
        """Term ``pixel_loss`` a normalised pixel value, mean over patches; ``commitment_loss``, ``perceptual_loss``.

        Metrics: ``psnr``, dB of 8-bit pixels; ``codebook/usage``, the share of codes of which the moving mean of hits
        is above a hundredth of the even share; ``codebook/perplexity``, of the same frequencies.
        """
        if "image" not in part["groups"]:
            return LossOutput({}, {})
        tokens, params = clean(part["groups"]["image"]), model_params(self, params, extra)
        valid = tokens["valid"] & part["example"]["valid"][:, None]
        latents, quantized = self._quantized(params, tokens, rng)
        painted = self._painted(params, quantized.value, tokens, rng)
        target = normalize_pixels(tokens["value"], self._config)
        error = painted - target
        if self._options.pixel_loss == "smooth_l1":
            size = jnp.abs(error)
            each = jnp.where(size < 1.0, 0.5 * jnp.square(error), size - 0.5)
        else:
            each = jnp.square(error)
        losses: Terms = {"pixel_loss": row_total(jnp.mean(each, axis=-1), valid, "example")}
        if "commitment_loss" in self.term_weights:
            losses["commitment_loss"] = row_total(quantized.loss, valid, "example")
        if self._judge:
            losses["perceptual_loss"] = row_total(self._perceived(extra, painted, tokens), valid, "example")
        hits = jax.ops.segment_sum(valid.reshape(-1).astype(jnp.float32), quantized.ids.reshape(-1), self.codes)
        latents = jax.lax.stop_gradient(latents)
        sums: dict[str, Any] = {"hits": hits}
        rows: dict[str, Any] = {}
        if self.model_extra:
            sums["codebook"] = self._quantizer.sums(latents, quantized.ids, valid)
            rows = {"latents": latents, "valid": valid}
        ones, counted = jnp.float32(1.0), part["example"]["valid"].astype(jnp.float32)
        figures = usage(jnp.where(extra["hits"] > 0.01 * jnp.mean(extra["hits"]), extra["hits"], 0.0))
        metrics: Terms = {
            "codebook/usage": (figures["share"], ones),
            "codebook/perplexity": (figures["perplexity"], ones),
            "psnr": summed((psnr(denormalize_pixels(painted, self._config), tokens["value"]) * counted, counted)),
        }
        return LossOutput({n: summed(x) for n, x in losses.items()}, metrics, rows, sums, losses)

    def update_extra(self, extra: Any, params: Params, rows: Mapping[str, Any], sums: Any, step: jax.Array) -> Any:
        """See `Objective.update_extra`: the codebook follows, and the hits are counted."""
        if not sums:
            return extra
        after = {**extra, "hits": _HITS * extra["hits"] + (1 - _HITS) * sums["hits"]}
        if self.model_extra:
            of = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(of for of in rows.values() if of))
            rng = jax.random.fold_in(jax.random.key(self._config.seed), step)
            state, added = extra["codebook"], sums["codebook"]
            after["codebook"] = self._quantizer.update(state, added, of["latents"], of["valid"], rng)
        return after

    # --- what else it can do

    def ids(self, params: Params, tokens: Mapping[str, Any]) -> jax.Array:
        """See `objectives.base.Tokenizes`."""
        return self._quantized(params, tokens, None)[1].ids

    def ids_products(self) -> float:
        """Floating-point operations of the matrix products of `ids`, of a picture."""
        picture, latent = self._modalities["image"], self._quantizer.width
        nearest = 0.0 if self._options.quantizer == "fsq" else 2.0 * picture.tokens * latent * self.codes
        if self._encoder is None:
            return nearest
        of = self._encoder.options
        layer = of.width * (4 * of.width + 2 * int(of.width * of.mlp_ratio)) + 2 * picture.tokens * of.width
        return nearest + 2.0 * picture.tokens * (of.width * (picture.features + latent) + of.depth * layer)

    def pixels(self, params: Params, ids: jax.Array, position: jax.Array) -> jax.Array:
        """See `objectives.base.Tokenizes`."""
        tokens = {"position": position, "valid": jnp.ones(ids.shape, bool)}
        values = self._quantizer.vectors(params.get("codebook", {}), ids)
        return denormalize_pixels(self._painted(params, values, tokens, None), self._config)

    def restore(self, params: Params, part: Part) -> dict[str, Restored]:
        """See `objectives.base.Restores`: the targets, as their ids and those of all other patches paint them."""
        if "image" not in part["groups"]:
            return {}
        sets = part["groups"]["image"]
        tokens = clean(sets)
        painted = self._painted(params, self._quantized(params, tokens, None)[1].value, tokens, None)
        count = sets["target"]["valid"].shape[1]
        painted, target = painted[:, painted.shape[1] - count :], sets["target"]["value"]
        error = jnp.mean(jnp.square(painted - normalize_pixels(target, self._config)), axis=-1)
        return {"image": Restored(denormalize_pixels(painted, self._config), error)}

    # --- its parts

    def _stack(self, params: Params, name: str, tokens: Mapping[str, Any], rng: jax.Array | None) -> jax.Array:
        stack = self._encoder if name == "encoder" else self._decoder
        assert stack is not None
        weights = {key: value for key, value in params[name].items() if key != "head"}
        dropout = {} if rng is None else {"dropout": jax.random.fold_in(rng, len(name))}
        encoded: Any = stack.apply({"params": weights}, {"image": tokens}, deterministic=rng is None, rngs=dropout)
        return jnp.asarray(self._heads()[name].apply({"params": params[name]["head"]}, encoded.tokens["image"]))

    def _quantized(
        self, params: Params, tokens: Mapping[str, Any], rng: jax.Array | None
    ) -> tuple[jax.Array, Quantized]:
        """Latents `[B, N, d] float32` of a token set, and what the quantizer makes of them."""
        pixels = normalize_pixels(tokens["value"], self._config)
        latents = pixels if self._plain else self._stack(params, "encoder", {**tokens, "value": pixels}, rng)
        return latents, self._quantizer(params.get("codebook", {}), latents)

    def _painted(
        self, params: Params, values: jax.Array, tokens: Mapping[str, Any], rng: jax.Array | None
    ) -> jax.Array:
        """Normalised pixels `[B, N, P] float32` of quantized latents at the tokens' places."""
        return values if self._plain else self._stack(params, "decoder", {**tokens, "value": values}, rng)

    def _perceived(self, extra: Any, painted: jax.Array, tokens: Mapping[str, Any]) -> jax.Array:
        """The cosine distance of each patch, `[B, N]`, in the eyes of another run's encoder."""
        assert self._judge is not None
        judge, params = self._judge.objective, jax.lax.stop_gradient(extra["judge"])
        true = normalize_unit(tokens["value"].astype(jnp.float32) / 255.0, self._judge.config)
        ours = normalize_unit(unit_pixels(painted, self._config), self._judge.config)

        def seen(value: jax.Array) -> jax.Array:
            group = {"visible": {**tokens, "value": value}}
            encoded: Any = judge.encode(params, {"groups": {"image": group}})
            return unit(encoded.tokens["image"].astype(jnp.float32))

        return 1.0 - jnp.sum(seen(ours) * jax.lax.stop_gradient(seen(true)), axis=-1)
