"""MAMO (arXiv 2210.04183): masked multimodal modelling with a momentum teacher.

A picture's tower, a caption's tower, and a fusion of both. Beside contrast and matching, three things are asked of
masked pairs, one modality masked at a time: the teacher's fused latents of the clean pair (MRM), the teacher's picture
features (MIM), and the words (MLM). No code of the paper is public; what it leaves open is a field whose text says
"assumed".

Legend: ``B`` batch, ``N`` patches, ``L`` words, ``K`` targets, ``D`` width, ``d`` width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.data.masking import Blocks, Corrupted, RandomSubset
from m3ae_jax.data.mixture import modalities_of
from m3ae_jax.data.tokens import MASK, Group, Masker, modality_table
from m3ae_jax.errors import UserError
from m3ae_jax.models.encoder import LAYOUTS, Encoded, Encoder
from m3ae_jax.models.fusion import Fusion, Sequence
from m3ae_jax.models.transformer import OutputHead, dense, stack_options
from m3ae_jax.models.vocabulary import cross_entropy
from m3ae_jax.objectives.base import NOTHING_HIDDEN, Boxed, Load, LossOutput, Objective, Params, Part, Restored, Terms
from m3ae_jax.objectives.batch import clean, modality_groups, row_total, summed, zeros_part
from m3ae_jax.objectives.parts.contrast import (
    empty_queue,
    momentum_contrast,
    projection,
    pushed,
    scale_of,
    temperature_parameters,
    unit,
)
from m3ae_jax.objectives.parts.frozen import TOKENIZER, Frozen, built, fill_in
from m3ae_jax.objectives.parts.latents import (
    NORMALIZATIONS,
    Projector,
    absolute_error,
    collapse_monitors,
    normalized,
    sinkhorn,
    squared_error,
)
from m3ae_jax.objectives.parts.matching import hard_negatives
from m3ae_jax.objectives.parts.pairs import BOTH, check_aligned, paired
from m3ae_jax.objectives.parts.pixels import normalized_tokens
from m3ae_jax.objectives.parts.teacher import momentum_at, moved, subset
from m3ae_jax.objectives.parts.towers import encode, init_towers, loads_of

_PASSES = ("pair", "other_picture", "other_caption", "masked_picture", "masked_caption")


class Fields(FieldGroup):
    """What is hidden, the towers, the targets and the weights of the losses; ``config.mamo``."""

    image_mask_ratio: float = setting(0.75, low=0.0, high=0.95, aliases=("mask_ratio", "masking_ratio"))
    """Share of the patches that is hidden."""
    text_mask_ratio: float = setting(0.25, low=0.0, high=0.95)
    """Share of the words that is hidden; at least one of each caption."""
    image_mask: str = setting("random", choices=("random", "blocks"))
    """Which patches are hidden: random ones (assumed), or BEiT's blocks."""
    text_corruption: tuple[float, ...] = setting((0.8, 0.1), low=0.0, high=1.0)
    """Of the hidden words so many are shown as the mask embedding and so many as random words, the rest as they are
    (assumed: BERT's)."""
    text_depth: int = setting(0, low=0)
    """Layers of the captions' tower; 0: half of the pictures', which is ``model`` (assumed)."""
    fusion_depth: int = setting(0, low=0)
    """Layers of the fusion; 0: half of the pictures' (assumed)."""
    image_positions: str = setting("sincos", choices=("sincos", "learned"), aliases=("position_embedding", "pos_embed"))
    """Of the patches in their tower: sincos (fixed), or learned, as ViTs of other projects have them."""
    text_layout: str = setting("plain", choices=("plain", "bert"))
    """bert: the captions' tower is made as BERT, with LayerNorm after each residual, for its weights."""
    image_from: str = setting("", identifies=False, weights=True)
    """A run of m3ae, or converted weights (MAE's, timm's): the pictures' tower starts from its encoder. `init_from` is
    for runs of the same objective."""
    text_from: str = setting("", identifies=False, weights=True)
    """Likewise of the captions' tower: a run of m3ae, or converted weights (BERT's, with text_layout=bert); of more
    layers than `text_depth` the first are taken."""
    embedding_width: int = setting(256, low=1, aliases=("embed_dim", "projection_dim"))
    """Numbers of an embedding of the contrast (assumed: ALBEF's)."""
    temperature: float = setting(0.07, low=1e-4, high=10.0, loss=True)
    """Of the contrast at the start; it is learned (assumed: ALBEF's)."""
    temperature_range: tuple[float, ...] = setting((0.001, 0.5), low=1e-4, high=100.0, loss=True)
    """Least and greatest temperature (assumed: ALBEF's)."""
    negative_rows: int = setting(0, low=0, loss=True)
    """Negatives of the matching come from groups of so many consecutive rows; 0: from all."""
    queue: int = setting(0, low=0, loss=True)
    """Earlier pairs whose teacher's embeddings are negatives of the contrast too, a multiple of the batch size (ALBEF:
    65,536; assumed: none)."""
    distillation: float = setting(0.0, low=0.0, high=1.0, loss=True)
    """Share of the teacher's softmax in the targets of the contrast (ALBEF: 0.4; assumed: none)."""
    momentum: float = setting(0.995, low=0.0, high=1.0)
    """Of the teacher (assumed: ALBEF's)."""
    momentum_start: float = setting(0.995, low=0.0, high=1.0)
    """Its momentum at the first step of the ramp."""
    momentum_ramp: int = setting(0, low=0)
    """Steps in which it goes from `momentum_start` to `momentum`."""
    latent_target: str = setting("latents", choices=("latents", "clusters"))
    """What MRM regresses: the teacher's fused latents; or their clusters (arXiv 2502.08769), which cannot collapse."""
    latent_normalization: str = setting("layer_norm", choices=NORMALIZATIONS)
    """Of MRM's target latents (assumed)."""
    clusters: int = setting(256, low=2)
    """Of the target ``clusters``."""
    cluster_temperature: float = setting(0.06, low=1e-3, high=10.0, loss=True)
    """Of the teacher's assignment to clusters; the student's predictions have twice this."""
    image_target: str = setting("features", choices=("features", "pixels", "ids"))
    """What MIM restores: the features of the teacher's picture tower, pixels, or ids of a visual tokenizer."""
    image_tokenizer: str = setting("", identifies=False, weights=True)
    """Of the target ``ids``: a run of visual_tokenizer, whose patches must be as large as these. Needed at the start
    alone."""
    image_tokenizer_model: str = setting("")
    """What it is; filled in from its run."""
    feature_normalization: str = setting("layer_norm", choices=NORMALIZATIONS)
    """Of MIM's target features (assumed)."""
    contrast_weight: float = setting(1.0, low=0.0, loss=True)
    """Factor of the contrast (ITC); what has the factor 0 is not computed."""
    match_weight: float = setting(1.0, low=0.0, loss=True)
    """Factor of the matching (ITM)."""
    word_weight: float = setting(1.0, low=0.0, loss=True)
    """Factor of the words (MLM)."""
    latent_weight: float = setting(1.0, low=0.0, loss=True)
    """Factor of the fused latents (MRM), of pictures and captions each."""
    feature_weight: float = setting(1.0, low=0.0, loss=True)
    """Factor of the picture's features (MIM)."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Refuses towers that cannot be computed, and losses that fit neither each other nor the data."""
        m = config.mamo
        check_aligned("mamo", config, ("contrast", "match", "word", "latent", "feature"))
        ids = m.image_target == "ids" and bool(m.feature_weight)
        fill_in(config, path, TOKENIZER, ids, "mamo.image_target='ids' and mamo.feature_weight")
        if m.momentum_start not in (m.momentum, 0.995) and not m.momentum_ramp:
            raise UserError(f"mamo.momentum_start={m.momentum_start} is not used: set mamo.momentum_ramp to some steps")
        if m.distillation and not m.contrast_weight:
            raise UserError(f"mamo.distillation={m.distillation} is not used without contrast (mamo.contrast_weight=0)")
        if m.queue and len({modalities_of(name, spec, config) for name, spec in config.data.mixture.items()}) > 1:
            raise UserError(
                f"mamo.queue={m.queue}: the queue takes batches of pairs alone, and data.mixture has members without "
                "pictures or captions; set mamo.queue=0"
            )


class _Embedding:
    """What a MAMO with contrast can do."""

    def embed(self: Any, params: Params, part: Part, rng: jax.Array | None = None) -> dict[str, jax.Array]:
        """See `objectives.base.Embeds`."""
        encoded = self._encoded(params, {name: clean(group) for name, group in part["groups"].items()}, rng)
        return {name: self._embedding(params, name, of) for name, of in encoded.items()}


class _Matching:
    """What a MAMO with matching can do."""

    def match(self: Any, params: Params, part: Part) -> jax.Array:
        """See `objectives.base.Matches`: the logit of belonging together less that of not."""
        fused = self._whole(params, {name: clean(group) for name, group in part["groups"].items()})
        logits = self._head(params, "match", fused[:, 0]).astype(jnp.float32)
        return logits[:, 1] - logits[:, 0]


class _Restoring:
    """What a MAMO that is asked for words can do."""

    def restore(self: Any, params: Params, part: Part) -> dict[str, Restored]:
        """See `objectives.base.Restores`: hidden words, from the picture and the words that are visible."""
        if "text" not in part["groups"]:
            return {}
        group = part["groups"]["text"]
        target = group["target"]
        masked = {**target, "input": jnp.full_like(target["value"], MASK)}
        sets = {name: clean(g) for name, g in part["groups"].items() if name != "text"}
        seen = {name: part["groups"][name]["visible"] for name in sets}
        seen["text"] = sets["text"] = clean({"visible": group["visible"], "target": masked}, shown=True)
        fused = self._whole(params, seen, sets)
        words = self._words(params, self._hidden(fused, "text", sets, target["valid"].shape[1]), target["value"])
        return {"text": Restored(words.best, words.loss, words.best == target["value"])}


class MAMO(Objective):
    """The objective; see `objectives.base` for the methods' contract."""

    Fields = Fields
    name = "mamo"
    stacks = ("image/transformer/blocks", "text/transformer/blocks", "fusion/transformer/blocks")
    couples_examples = True

    def __new__(cls, config: ConfigDict, vocab_size: int) -> MAMO:
        """Only what a loss trains is offered: `Embeds`, `Matches`, `Restores`."""
        o = config.mamo
        offered = {_Embedding: o.contrast_weight, _Matching: o.match_weight, _Restoring: o.word_weight}
        kinds = [kind for kind, weight in offered.items() if weight]
        return object.__new__(type(cls.__name__, (cls, *kinds), {}))

    def __init__(self, config: ConfigDict, vocab_size: int) -> None:
        self._config, self._options = config, config.mamo
        o = self._options
        self._modalities = modality_table(config, vocab_size)
        maskers: dict[str, Masker] = {
            "image": Blocks(o.image_mask_ratio) if o.image_mask == "blocks" else RandomSubset(o.image_mask_ratio),
            "text": Corrupted(RandomSubset(o.text_mask_ratio, minimum=1), *o.text_corruption),
        }
        self.groups = tuple(Group(name, (self._modalities[name],), maskers[name]) for name in BOTH)
        picture = stack_options(config)
        text = stack_options(config, depth=o.text_depth or max(picture.depth // 2, 1))
        fusion = stack_options(config, depth=o.fusion_depth or max(picture.depth // 2, 1))
        learned = ("image",) if o.image_positions == "learned" else ()
        self._towers = {
            "image": Encoder(picture, (self._modalities["image"],), typed=False, learned_positions=learned),
            "text": Encoder(
                text,
                (self._modalities["text"],),
                typed=False,
                learned_positions=() if o.text_layout == "plain" else ("text",),
                masked=("text",),
                layout=LAYOUTS[o.text_layout]["text"],
            ),
        }
        self._fusion = Fusion(fusion, tuple(self._modalities[name] for name in BOTH))
        self._projection = projection(o.embedding_width, picture.dtype)
        width, pixels = picture.width, self._modalities["image"].features
        self._heads: dict[str, Any] = {"match": dense(2, ("embed", None), picture.dtype)}
        if o.word_weight:
            self._heads["words"] = OutputHead(
                width, vocab_size, 1, "vocab", picture.dtype, picture.activation, picture.epsilon
            )
        if o.latent_weight:
            self._heads["latents"] = Projector(fusion, width if o.latent_target == "latents" else o.clusters)
        if o.latent_weight and o.latent_target == "clusters":
            self._heads["clusters"] = projection(o.clusters, jnp.float32)
        self._tokenizer: Frozen | None = None
        if o.feature_weight:
            outputs = {"features": width, "pixels": pixels}
            if o.image_target == "ids":
                self._tokenizer = built(config, "mamo", TOKENIZER)
                outputs["ids"] = self._tokenizer.objective.codes
            self._heads["features"] = Projector(fusion, outputs[o.image_target])
        weights = {"contrast_loss": o.contrast_weight, "match_loss": o.match_weight, "word_loss": o.word_weight}
        weights |= {"feature_loss": o.feature_weight}
        weights |= dict.fromkeys(("latent_image_loss", "latent_text_loss"), o.latent_weight)
        if "clusters" in self._heads:
            weights["cluster_loss"] = o.latent_weight
        self.term_weights = {name: weight for name, weight in weights.items() if weight}
        self._teacher = self._teacher_paths()
        self.alarms = {f"{kind}/cosine": (-1.0, 0.99) for kind in self._monitored()}
        self._range = (o.temperature_range[0], o.temperature_range[1])

    # --- the state

    def _teacher_paths(self) -> tuple[str, ...]:
        """Which parameters have a momentum teacher: those that a target is made of."""
        o = self._options
        contrast = bool(o.contrast_weight and (o.queue or o.distillation))
        if o.latent_weight:
            return ("image", "text", "fusion")
        if contrast:
            return ("image", "text")
        return ("image",) if o.feature_weight and o.image_target == "features" else ()

    def _monitored(self) -> tuple[str, ...]:
        """Latent targets that may collapse."""
        o = self._options
        features = o.feature_weight and o.image_target == "features"
        kinds = (["latent_image", "latent_text"] if o.latent_weight else []) + (["feature"] if features else [])
        return tuple(kinds)

    def init(self, rng: jax.Array) -> Boxed:
        """See `Objective.init`."""
        part = zeros_part(self.groups)
        sets = {name: clean(part["groups"][name], shown=True) for name in BOTH}
        projections = dict.fromkeys(BOTH, self._projection)
        params, encoded = init_towers(rng, self._towers, projections, sets, self._config)
        cls, tokens = _joined(encoded)
        fused, of_fusion = self._fusion.init_with_output(jax.random.fold_in(rng, 2), cls, tokens, sets, method="first")
        heads = {
            name: head.init(jax.random.fold_in(rng, 3 + number), fused)["params"]
            for number, (name, head) in enumerate(sorted(self._heads.items()))
        }
        contrast = temperature_parameters(self._options.temperature)
        return {**params, "fusion": of_fusion["params"], "heads": heads, "contrast": contrast}

    def init_extra(self, params: Boxed, rng: jax.Array) -> Boxed:
        """See `Objective.init_extra`: ``teacher``, ``queue`` and ``tokenizer``, those that there are."""
        extra: dict[str, Any] = {}
        if self._teacher:
            extra["teacher"] = subset(params, self._teacher)
        if self._options.queue and self._options.contrast_weight:
            extra["queue"] = empty_queue(rng, self._options.queue, self._options.embedding_width)
        if self._tokenizer:
            extra["tokenizer"] = self._tokenizer.init(rng)
        return extra

    def update_extra(self, extra: Any, params: Params, rows: Mapping[str, Any], sums: Any, step: jax.Array) -> Any:
        """See `Objective.update_extra`: the teacher follows, the queue takes the teacher's embeddings of the batch."""
        o, after = self._options, dict(extra)
        if self._teacher:
            momentum = momentum_at(step, o.momentum_start, o.momentum, o.momentum_ramp)
            after["teacher"] = moved(extra["teacher"], params, self._teacher, momentum)
        if "queue" in extra:
            newest = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(of for of in rows.values() if of))
            after["queue"] = pushed(extra["queue"], newest)
        return after

    # --- the loss

    def loads(self) -> tuple[Load, ...]:
        """See `Objective.loads`."""
        tokenizer = self._tokenizer.loads("extra/tokenizer") if self._tokenizer else ()
        return (*loads_of(self._config, "mamo"), *tokenizer)

    def view(self, inputs: Iterable[str], hidden: Mapping[str, float] = NOTHING_HIDDEN) -> tuple[Group, ...]:
        """See `Objective.view`: a group for each modality, of its name."""
        return modality_groups(self._modalities, inputs, hidden)

    def loss(self, params: Params, extra: Any, part: Part, rng: jax.Array | None, step: jax.Array) -> LossOutput:
        """Terms of MAMO; of a part without captions, or without pictures, those that need no pair.

        ``contrast_loss`` and ``match_loss``, nats a pair; ``word_loss``, nats a hidden word; ``latent_image_loss`` and
        ``latent_text_loss``, squared error a channel of a hidden token (nats with clusters); ``feature_loss``, absolute
        error a channel of a hidden patch, or of ids nats; ``cluster_loss``, nats.
        """
        o, groups = self._options, part["groups"]
        sets = {name: clean(group) for name, group in groups.items()}
        pairs = set(BOTH) <= set(groups)
        terms: Terms = {}  # of each example
        metrics: Terms = {}
        rows: dict[str, jax.Array] = {}
        teacher = self._teacher_outputs(extra, sets)

        student = self._encoded(params, sets, rng, 0)
        sequences: dict[str, Sequence] = {}
        if pairs and (o.contrast_weight or o.match_weight):
            valid = paired(part)
            weight = valid.astype(jnp.float32)
            embeddings = {name: self._embedding(params, name, of) for name, of in student.items()}
            scale = scale_of(params["contrast"], self._range)
            metrics["temperature"] = (jax.lax.stop_gradient(1.0 / scale), jnp.float32(1.0))
            if o.contrast_weight:
                losses, first = momentum_contrast(
                    embeddings,
                    {name: teacher[f"{name}_embedding"] for name in BOTH if f"{name}_embedding" in teacher},
                    extra.get("queue"),
                    scale,
                    part["example"]["image_id"],
                    valid,
                    o.distillation,
                )
                terms["contrast_loss"] = (losses * weight, weight)
                metrics |= {name: summed((x * weight, weight)) for name, x in first.items()}
                if "queue" in extra:
                    rows = {name: teacher[f"{name}_embedding"] for name in BOTH}
                    rows |= {"id": part["example"]["image_id"], "valid": valid}
            if o.match_weight:
                sequences, exists = self._matching_sequences(params, student, sets, embeddings, scale, part, valid, rng)
        sequences |= self._masked_sequences(params, student, groups, sets, rng)
        fused = self._fused(params, sequences, rng)

        if "pair" in fused:
            labelled = (("pair", 1, valid), ("other_picture", 0, exists[0]), ("other_caption", 0, exists[1]))
            terms["match_loss"], metrics["match_accuracy"] = self._matching(params, fused, labelled)
        for name, of_pass in (("image", "masked_picture"), ("text", "masked_caption")):
            if of_pass not in fused:
                continue
            target = groups[name]["target"]
            hidden = self._hidden(fused[of_pass], name, sets, target["valid"].shape[1])
            if o.latent_weight:
                losses, more = self._latents(params, hidden, teacher["fused"], name, sets, target["valid"])
                terms[f"latent_{name}_loss"] = row_total(losses, target["valid"], "token")
                metrics |= more.pop("metrics")
                for extra_name, term in more.items():
                    previous = terms.get(extra_name, (0.0, 0.0))
                    terms[extra_name] = (previous[0] + term[0], previous[1] + term[1])
            if name == "image" and o.feature_weight:
                losses, figures = self._features(params, hidden, teacher, extra, groups["image"])
                terms["feature_loss"] = row_total(losses, target["valid"], "token")
                metrics |= figures
            if name == "text" and o.word_weight:
                words = self._words(params, hidden, target["value"])
                terms["word_loss"] = row_total(words.loss, target["valid"], "token")
                metrics["word_accuracy"] = summed(row_total(words.best == target["value"], target["valid"], "token"))
        return LossOutput({name: summed(term) for name, term in terms.items()}, metrics, rows, per_example=terms)

    def _encoded(
        self, params: Params, sets: Mapping[str, Any], rng: jax.Array | None, number: int = 0
    ) -> dict[str, Encoded]:
        """Of the tower of each token set; the `number` tells passes of a step apart."""
        key = None if rng is None else jax.random.fold_in(rng, number)
        return encode(params, self._towers, sets, self._config, key)

    def _embedding(self, params: Params, name: str, encoded: Encoded) -> jax.Array:
        """`[B, d] float32`."""
        projected: Any = self._projection.apply({"params": params[name]["projection"]}, encoded.pooled["cls"])
        return unit(projected)

    def _teacher_outputs(self, extra: Any, sets: Mapping[str, Any]) -> dict[str, Any]:
        """What the teacher makes of the clean pair, once: ``fused``, ``image`` (`[B, N, D]`), embeddings."""
        o = self._options
        if not self._teacher:
            return {}
        weights = jax.lax.stop_gradient(extra["teacher"])
        encoded = self._encoded(weights, {name: x for name, x in sets.items() if name in self._teacher}, None)
        outputs: dict[str, Any] = {}
        if "image" in encoded:
            outputs["image"] = encoded["image"].tokens["image"]
        if "fusion" in self._teacher:
            cls, tokens = _joined(encoded)
            outputs["fused"] = self._fused(weights, {"pair": self._sequence(weights, cls, tokens, sets)}, None)["pair"]
        if o.contrast_weight and (o.queue or o.distillation) and len(encoded) == len(BOTH):
            outputs |= {f"{name}_embedding": self._embedding(weights, name, of) for name, of in encoded.items()}
        return jax.lax.stop_gradient(outputs)

    def _matching_sequences(
        self,
        params: Params,
        student: Mapping[str, Encoded],
        sets: Mapping[str, Any],
        embeddings: Mapping[str, jax.Array],
        scale: jax.Array,
        part: Part,
        valid: jax.Array,
        rng: jax.Array | None,
    ) -> tuple[dict[str, Sequence], tuple[jax.Array, jax.Array]]:
        """The pair, each caption with another picture, each picture with another caption; which of the two exist."""
        example = part["example"]
        same = (example["image_id"], example["caption_id"])
        keys = (None, None) if rng is None else tuple(jax.random.split(jax.random.fold_in(rng, 101)))
        negatives = {
            name: hard_negatives(
                key, embeddings[other], embeddings[name], jax.lax.stop_gradient(scale), same, valid,
                self._options.negative_rows,
            )
            for name, other, key in zip(BOTH, BOTH[::-1], keys, strict=True)
        }  # fmt: skip

        def sequence(encoded: Mapping[str, Encoded], tokens: Mapping[str, Any]) -> Sequence:
            return self._sequence(params, *_joined(encoded), tokens)

        others = {name: jax.tree.map(negatives[name].of, (student[name], sets[name])) for name in BOTH}
        passes = {"pair": sequence(student, sets)}
        for of_pass, name in (("other_picture", "image"), ("other_caption", "text")):
            encoded, tokens = others[name]
            passes[of_pass] = sequence({**student, name: encoded}, {**sets, name: tokens})
        return passes, (negatives["image"].exists, negatives["text"].exists)

    def _masked_sequences(
        self,
        params: Params,
        student: Mapping[str, Encoded],
        groups: Mapping[str, Any],
        sets: Mapping[str, Any],
        rng: jax.Array | None,
    ) -> dict[str, Sequence]:
        """One modality masked at a time: the visible patches alone, the corrupted caption."""
        o, passes = self._options, {}
        if "image" in groups and (o.latent_weight or o.feature_weight):
            visible = self._encoded(params, {"image": groups["image"]["visible"]}, rng, 1)
            cls, tokens = _joined({**student, **visible})
            passes["masked_picture"] = self._sequence(params, cls, tokens, sets)
        if "text" in groups and (o.latent_weight or o.word_weight):
            corrupted = self._encoded(params, {"text": clean(groups["text"], shown=True)}, rng, 1)
            cls, tokens = _joined({**student, **corrupted})
            passes["masked_caption"] = self._sequence(params, cls, tokens, sets)
        return passes

    def _sequence(
        self, params: Params, cls: jax.Array, tokens: Mapping[str, jax.Array], sets: Mapping[str, Any]
    ) -> Sequence:
        sequence: Any = self._fusion.apply({"params": params["fusion"]}, cls, tokens, sets, method="sequence")
        return sequence

    def _fused(self, params: Params, sequences: Mapping[str, Sequence], rng: jax.Array | None) -> dict[str, jax.Array]:
        """All passes of the fusion, `[B, S, D]` each; they have one shape, so its program is compiled once."""

        def one(sequence: Sequence, number: Any) -> jax.Array:
            key = {} if rng is None else {"dropout": jax.random.fold_in(jax.random.fold_in(rng, 102), number)}
            fused: Any = self._fusion.apply({"params": params["fusion"]}, sequence, deterministic=rng is None, rngs=key)
            return fused

        if self._config.compute.unroll or len(sequences) < 2:
            return {name: one(s, _PASSES.index(name)) for name, s in sequences.items()}
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *sequences.values())
        numbers = jnp.asarray([_PASSES.index(name) for name in sequences])
        fused = jax.lax.map(lambda item: one(*item), (stacked, numbers))
        return dict(zip(sequences, fused, strict=True))

    def _hidden(self, fused: jax.Array, name: str, sets: Mapping[str, Any], count: int) -> jax.Array:
        """Of a fused sequence the last `count` slots of a modality, which are its targets."""
        end = 1
        for m in BOTH:
            end += sets[m]["valid"].shape[1] if m in sets else 0
            if m == name:
                break
        return fused[:, end - count : end]

    def _head(self, params: Params, name: str, x: jax.Array, **options: Any) -> jax.Array:
        result: Any = self._heads[name].apply({"params": params["heads"][name]}, x, **options)
        return result

    def _matching(
        self, params: Params, fused: Mapping[str, jax.Array], labelled: Iterable[tuple[str, int, jax.Array]]
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        """Loss of each example over its pairs, and the accuracy."""
        loss = weight = right = jnp.float32(0.0)
        for name, label, counts in labelled:
            logits = self._head(params, "match", fused[name][:, 0]).astype(jnp.float32)
            each = counts.astype(jnp.float32)
            loss += -jax.nn.log_softmax(logits)[:, label] * each
            right += (jnp.argmax(logits, axis=1) == label) * each
            weight += each
        return (loss, weight), summed((right, weight))

    def _latents(
        self,
        params: Params,
        hidden: jax.Array,
        fused: jax.Array,
        name: str,
        sets: Mapping[str, Any],
        valid: jax.Array,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """MRM of a modality, `[B, K]`; besides the terms of clustering, and metrics."""
        o = self._options
        target = self._hidden(fused, name, sets, valid.shape[1])
        predicted = self._head(params, "latents", hidden)
        monitors = collapse_monitors(normalized(target, o.latent_normalization), valid)
        more: dict[str, Any] = {"metrics": {f"latent_{name}/{key}": x for key, x in monitors.items()}}
        if o.latent_target == "latents":
            return squared_error(predicted, normalized(target, o.latent_normalization)), more
        clusters = unit(self._head(params, "clusters", unit(target)))
        logits = clusters / o.cluster_temperature
        flat = jax.lax.stop_gradient(logits.reshape(-1, o.clusters))
        assigned = sinkhorn(flat, valid.reshape(-1)).reshape(logits.shape)
        more["cluster_loss"] = row_total(-jnp.sum(assigned * jax.nn.log_softmax(logits), axis=-1), valid, "token")
        guess = jax.nn.log_softmax(unit(predicted) / (2 * o.cluster_temperature))
        return -jnp.sum(assigned * guess, axis=-1), more

    def _features(
        self, params: Params, hidden: jax.Array, teacher: Mapping[str, Any], extra: Any, group: Mapping[str, Any]
    ) -> tuple[jax.Array, Terms]:
        """MIM, `[B, K]`."""
        predicted, target = self._head(params, "features", hidden), group["target"]
        if self._tokenizer:
            true = self._tokenizer.hidden_ids(extra["tokenizer"], group)
            right = (jnp.argmax(predicted, axis=-1) == true).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(predicted.astype(jnp.float32), true)
            return losses, {"id_accuracy": summed(row_total(right, target["valid"], "token"))}
        if self._options.image_target == "pixels":
            return absolute_error(predicted, normalized_tokens(target, self._config)["value"]), {}
        features = teacher["image"][:, -predicted.shape[1] :] if predicted.shape[1] else teacher["image"][:, :0]
        features = normalized(features, self._options.feature_normalization)
        monitors = collapse_monitors(features, target["valid"])
        return absolute_error(predicted, features), {f"feature/{key}": x for key, x in monitors.items()}

    def _words(self, params: Params, hidden: jax.Array, labels: jax.Array) -> Any:
        features = self._head(params, "words", hidden, method="features")
        output = params["heads"]["words"]["output"]
        blocks = self._config.compute.vocabulary_blocks
        return cross_entropy(features, output["kernel"], output["bias"], labels, blocks)

    # --- what else it can do

    def products(self, rows: int) -> dict[str, float]:
        """See `objectives.base.Itemizes`; of a pair.

        Three times forward what is trained, once what is not. A layer of n tokens, width w and an MLP r times as wide
        costs ``2 n w^2 (4 + 2 r) + 4 n^2 w``.
        """
        o, width, ratio = self._options, self._fusion.options.width, self._fusion.options.mlp_ratio
        spec = {g.name: {name: sets["valid"].shape[1] for name, sets in g.spec(1).items()} for g in self.groups}
        patches, words = (sum(spec[name].values()) for name in BOTH)
        hidden, hidden_words = (spec[name]["target"] for name in BOTH)
        contrast, match, latent, feature, word = (
            bool(o[f"{term}_weight"]) for term in ("contrast", "match", "latent", "feature", "word")
        )
        features = feature and o.image_target == "features"
        of_teacher = contrast and bool(o.queue or o.distillation)

        def linear(tokens: int, inputs: float, outputs: float) -> float:
            return 2.0 * tokens * inputs * outputs

        def stack(tokens: int, depth: int) -> float:
            return depth * (linear(tokens, width, width * (4 + 2 * ratio)) + 4.0 * tokens * tokens * width)

        def projector(tokens: int, name: str) -> float:
            return linear(tokens, ratio * width, width + self._heads[name].outputs) if name in self._heads else 0.0

        def picture(tokens: int) -> float:
            inputs = self._modalities["image"].features
            return linear(tokens, inputs, width) + stack(1 + tokens, self._towers["image"].options.depth)

        caption = stack(1 + words + self._towers["text"].layout.trailing, self._towers["text"].options.depth)
        fusion = stack(1 + patches + words, self._fusion.options.depth)
        passes = 3 * match + (latent or feature) + (latent or word)
        embeddings, vocabulary = linear(2, width, o.embedding_width), self._modalities["text"].vocabulary
        latents = hidden + hidden_words
        clusters = linear(latents, width, o.clusters) if "clusters" in self._heads else 0.0
        trained = {
            "picture": picture(patches) * (contrast or match or latent or word),
            "visible patches": picture(spec["image"]["visible"]) * (latent or feature),
            "caption": caption * (contrast or match or latent or feature),
            "corrupted caption": caption * (latent or word),
            f"{passes} fusion passes": fusion * passes,
            "embeddings": embeddings * (contrast or match),
            "contrast": linear(2, o.embedding_width, rows + o.queue) * contrast,
            "matching head": linear(3, width, 2) * match,
            "words head": linear(hidden_words, width, width + vocabulary) * word,
            "latents head": projector(latents, "latents") + clusters,
            "features head": projector(hidden, "features"),
        }
        towers = {"image": picture(patches), "text": caption, "fusion": fusion}
        fixed = {
            "teacher": sum(towers[name] for name in self._teacher) + embeddings * of_teacher,
            "distillation": linear(2, o.embedding_width, rows + o.queue) * bool(contrast and o.distillation),
            "negatives": linear(2, o.embedding_width, o.negative_rows or rows) * match,
            "tokenizer": self._tokenizer.objective.ids_products() if self._tokenizer else 0.0,
            "collapse monitors": linear(latents * latent + hidden * features, width, width),
        }
        parts = {name: 3.0 * cost for name, cost in trained.items()} | fixed
        return {name: cost for name, cost in parts.items() if cost}

    def encode(self, params: Params, part: Part, rng: jax.Array | None = None) -> Encoded:
        """See `objectives.base.Encodes`: of a pair what the fusion makes of it, of one modality what its tower does."""
        sets = {name: group["visible"] for name, group in part["groups"].items()}
        if len(sets) == 1:
            ((_, encoded),) = self._encoded(params, sets, rng).items()
            return encoded
        fused = self._whole(params, sets, rng=rng)
        tokens = {name: self._hidden(fused, name, sets, of["valid"].shape[1]) for name, of in sets.items()}
        return Encoded({"cls": fused[:, 0]}, tokens)

    def _whole(
        self, params: Params, seen: Mapping[str, Any], sets: Mapping[str, Any] | None = None, rng: Any = None
    ) -> jax.Array:
        """The fusion of what the towers make of `seen`, `[B, S, D]`; with the masks of all further slots of `sets`."""
        sequence = self._sequence(params, *_joined(self._encoded(params, seen, rng)), sets or seen)
        return self._fused(params, {"pair": sequence}, rng)["pair"]


def _joined(encoded: Mapping[str, Encoded]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What the fusion starts from: the sum of the towers' CLS tokens (assumed), and their tokens."""
    cls = sum((of.pooled["cls"] for of in encoded.values()), jnp.float32(0.0))
    return jnp.asarray(cls), {name: of.tokens[name] for name, of in encoded.items()}
