"""Contrastive pretraining of two towers: CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343).

A picture and a caption, each through a tower of its own, are to lie close together if they belong together, and apart
if not; negatives are all other rows of the part, over all devices. It is the baseline of the other objectives.

Legend: ``B`` batch, ``D`` width of a tower, ``d`` width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.data.tokens import Group, modality_table
from m3ae_jax.errors import UserError
from m3ae_jax.models.encoder import LAYOUTS, Encoded, Encoder
from m3ae_jax.models.fields import check_stack, encoder_size
from m3ae_jax.models.transformer import TransformerOptions, stack_options
from m3ae_jax.objectives.base import NOTHING_HIDDEN, Boxed, Load, LossOutput, Objective, Params, Part, Terms
from m3ae_jax.objectives.batch import clean, modality_groups, summed, zeros_part
from m3ae_jax.objectives.parts.contrast import (
    check_range,
    in_chunks,
    positives,
    projection,
    right_first,
    scale_of,
    sigmoid_loss,
    similarities,
    softmax_loss,
    temperature_parameters,
    unit,
)
from m3ae_jax.objectives.parts.pairs import BOTH, check_both, paired, refuse_unpaired
from m3ae_jax.objectives.parts.towers import encode, init_towers, loads_of


class Fields(FieldGroup):
    """The towers, the space in which they meet, and the loss; ``config.contrastive``."""

    loss: str = setting("softmax", choices=("softmax", "sigmoid"), loss=True)
    """softmax: of each picture over all captions, and of each caption over all pictures (CLIP); sigmoid: each pair for
    itself (SigLIP)."""
    embedding_width: int = setting(256, low=1, aliases=("embed_dim", "projection_dim"))
    """Numbers of an embedding, in which pictures and captions are compared."""
    pooling: str = setting("cls", choices=("cls", "mean"), aliases=("pool",))
    """What of a tower is projected: its CLS token, or the mean of the others."""
    text_width: int = setting(0, low=0)
    """Channels of the captions' tower; 0: as the pictures', which is ``model``."""
    text_depth: int = setting(0, low=0)
    """Layers of the captions' tower; 0: as the pictures'."""
    text_heads: int = setting(0, low=0)
    """Attention heads of the captions' tower; 0: as the pictures'."""
    image_positions: str = setting("sincos", choices=("sincos", "learned"), aliases=("position_embedding", "pos_embed"))
    """Of the patches: sincos (fixed), or learned, as ViTs of other projects have them."""
    image_layout: str = setting("plain", choices=tuple(name for name, of in LAYOUTS.items() if "image" in of))
    """What the pictures' tower has beside tokens and blocks, for weights of others: plain: a CLS token in front; clip:
    a LayerNorm before the blocks too, and no bias of the patches; siglip: no CLS token, but attention with a learned
    query after the blocks, and no projection."""
    text_layout: str = setting("plain", choices=tuple(LAYOUTS))
    """The captions' tower likewise: plain; clip: tokens see those before them alone, a learned one at the end sees all;
    siglip: the same without that order, and padding is read; bert: LayerNorm after each residual. Positions are learned
    but for plain."""
    image_from: str = setting("", identifies=False, weights=True)
    """A run of m3ae, or converted weights (MAE's, timm's): the pictures' tower starts from its encoder. `init_from` is
    for runs of the same objective."""
    text_from: str = setting("", identifies=False, weights=True)
    """Likewise of the captions' tower: a run of m3ae, or converted weights (BERT's, with text_layout=bert)."""
    text_ids: tuple[int, ...] = setting((-1, -1), low=-1, identifies=False)
    """Of converted weights: the ids that the captions' learned tokens had there, start and end (siglip: padding,
    twice); -1: the last two words, and 1. They are written back to these."""
    positives: str = setting("picture", choices=("picture", "picture_or_caption"), loss=True)
    """What is right besides a row's own partner: the captions of equal pictures; or those, and the pictures of equal
    captions too."""
    temperature: float = setting(0.0, low=0.0, high=10.0, loss=True)
    """At the start; it is learned. 0: 0.07 of softmax, 0.1 of sigmoid."""
    temperature_range: tuple[float, ...] = setting((0.01, 0.5), low=1e-4, high=100.0, loss=True)
    """Least and greatest temperature."""
    bias: float = setting(-10.0, low=-100.0, high=100.0, loss=True)
    """Of sigmoid's logits at the start; it is learned. A batch holds far more wrong pairs than right ones."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Refuses towers that cannot be computed, and data without pictures or captions."""
        c = config.contrastive
        check_both("contrastive", config)
        if config.batch_size == 1:
            raise UserError("batch_size=1: contrastive compares the rows of a batch, of which it needs two at least")
        width, _, heads = encoder_size(config)
        check_stack(config, "contrastive.text_", c.text_width or width, c.text_heads or heads)
        if len(c.text_ids) != 2:
            raise UserError(f"contrastive.text_ids={tuple(c.text_ids)!r}: two numbers are wanted")
        low, high = check_range("contrastive.temperature_range", c.temperature_range)
        start = first_temperature(c)
        if not low <= start <= high:
            raise UserError(f"contrastive.temperature={start} is outside contrastive.temperature_range={low, high}")
        layouts = {name: c[f"{name}_layout"] for name in BOTH}
        for name, layout in layouts.items():
            if c.pooling == "mean" and layout != "plain":
                raise UserError(f"contrastive.pooling='mean': contrastive.{name}_layout={layout!r} has its own summary")
        if layouts["image"] == "siglip" and c.embedding_width != width:
            raise UserError(
                f"contrastive.embedding_width={c.embedding_width}: with contrastive.image_layout='siglip' it is that "
                f"of the pictures' tower, {width}"
            )


def first_temperature(group: Any) -> float:
    """The temperature at the start, by the fields; SigLIP starts at log t = log 10."""
    return float(group.temperature or (0.1 if group.loss == "sigmoid" else 0.07))


class Contrastive(Objective):
    """The objective; see `objectives.base` for the methods' contract."""

    Fields = Fields
    name = "contrastive"
    stacks = ("image/transformer/blocks", "text/transformer/blocks")
    couples_examples = True
    chunked = True
    term_weights = {"contrast_loss": 1.0}  # noqa: RUF012

    def __init__(self, config: ConfigDict, vocab_size: int) -> None:
        self._config, o = config, config.contrastive
        self._modalities = modality_table(config, vocab_size)
        self.groups = self.view(self._modalities)
        picture = stack_options(config)
        text = stack_options(
            config,
            width=o.text_width or picture.width,
            depth=o.text_depth or picture.depth,
            heads=o.text_heads or picture.heads,
        )
        options: dict[str, TransformerOptions] = {"image": picture, "text": text}
        learned = {"image": o.image_positions == "learned", "text": o.text_layout != "plain"}
        self._towers = {
            name: Encoder(
                options[name],
                (self._modalities[name],),
                typed=False,
                learned_positions=(name,) if learned[name] else (),
                layout=LAYOUTS[o[f"{name}_layout"]][name],
            )
            for name in BOTH
        }
        siglip = {name: o[f"{name}_layout"] == "siglip" for name in BOTH}
        self._projections = {
            "image": None if siglip["image"] else projection(o.embedding_width, options["image"].dtype),
            "text": projection(o.embedding_width, options["text"].dtype, bias=siglip["text"]),
        }
        self._range = (o.temperature_range[0], o.temperature_range[1])

    def init(self, rng: jax.Array) -> Boxed:
        """See `Objective.init`."""
        part, o = zeros_part(self.groups), self._config.contrastive
        sets = {name: clean(part["groups"][name]) for name in BOTH}
        params, _ = init_towers(rng, self._towers, self._projections, sets, self._config)
        sigmoid = o.loss == "sigmoid"
        return {**params, "contrast": temperature_parameters(first_temperature(o), o.bias if sigmoid else None)}

    def loads(self) -> tuple[Load, ...]:
        """See `Objective.loads`."""
        return loads_of(self._config, "contrastive")

    def view(self, inputs: Iterable[str], hidden: Mapping[str, float] = NOTHING_HIDDEN) -> tuple[Group, ...]:
        """See `Objective.view`: a group for each modality, of its name."""
        return modality_groups(self._modalities, inputs, hidden)

    def loss(self, params: Params, extra: Any, part: Part, rng: jax.Array | None, step: jax.Array) -> LossOutput:
        """Term ``contrast_loss``, nats, the mean of both directions; of sigmoid of each row's pairs."""
        refuse_unpaired("contrastive", part)

        def embed(groups: Any, number: jax.Array) -> dict[str, jax.Array]:
            key = None if rng is None else jax.random.fold_in(rng, number)
            return self.embed(params, {"groups": groups}, key)

        chunks = self._config.micro_batches
        embeddings = in_chunks(embed, part["groups"], chunks if rng is not None else 1)
        example, o = part["example"], self._config.contrastive
        valid, scale = paired(part), scale_of(params["contrast"], self._range)
        positive = positives(example["image_id"], example["image_id"])
        if o.positives == "picture_or_caption":
            positive |= positives(example["caption_id"], example["caption_id"])
        positive |= jnp.eye(len(valid), dtype=bool)
        logits = scale * similarities(embeddings["image"], embeddings["text"])
        if o.loss == "sigmoid":
            losses = sigmoid_loss(logits + params["contrast"]["bias"], positive, valid)
        else:
            losses = 0.5 * (softmax_loss(logits, positive, valid) + softmax_loss(logits.T, positive.T, valid))
        weight = valid.astype(jnp.float32)
        terms: Terms = {"contrast_loss": (losses * weight, weight)}
        ones = jnp.float32(1.0)
        metrics: Terms = {
            "image_to_text_accuracy": summed((right_first(logits, positive, valid) * weight, weight)),
            "text_to_image_accuracy": summed((right_first(logits.T, positive.T, valid) * weight, weight)),
            "temperature": (jax.lax.stop_gradient(1.0 / scale), ones),
        }
        return LossOutput({name: summed(term) for name, term in terms.items()}, metrics, per_example=terms)

    def embed(self, params: Params, part: Part, rng: jax.Array | None = None) -> dict[str, jax.Array]:
        """See `objectives.base.Embeds`."""
        sets = {name: clean(group) for name, group in part["groups"].items()}
        embeddings = {}
        for name, encoded in encode(params, self._towers, sets, self._config, rng).items():
            pooled = encoded.pooled["cls"]
            if self._config.contrastive.pooling == "mean":
                valid = sets[name]["valid"][..., None]
                total = jnp.sum(jnp.where(valid, encoded.tokens[name], 0), axis=1)
                pooled = total / jnp.maximum(jnp.sum(valid, axis=1), 1).astype(total.dtype)
            to_embedding = self._projections[name]
            if to_embedding is not None:
                pooled = jnp.asarray(to_embedding.apply({"params": params[name]["projection"]}, pooled))
            embeddings[name] = unit(pooled)
        return embeddings

    def encode(self, params: Params, part: Part, rng: jax.Array | None = None) -> Encoded:
        """See `objectives.base.Encodes`: of several groups ``cls`` are those of the towers side by side."""
        sets = {name: group["visible"] for name, group in part["groups"].items()}
        encoded = encode(params, self._towers, sets, self._config, rng)
        cls = jnp.concatenate([of.pooled["cls"] for of in encoded.values()], axis=-1)
        return Encoded({"cls": cls}, {name: of.tokens[name] for name, of in encoded.items()})
