"""SIMLA (arXiv 2203.14395): a single stream of picture and text layers, aligned at several levels.

A ViT below, BERT with cross-attention in every layer above (`models.single_stream`). Five things are asked: contrast
and matching of pairs, hidden words of a picture's caption, ids of hidden patches (in a visual vocabulary) of a
caption's picture, and keywords of the caption, of the picture alone. A momentum teacher softens all targets but the
matching's.

Legend: ``B`` batch, ``N`` patches, ``L`` words, ``K`` targets, ``D`` width, ``d`` width of the embeddings, ``V`` words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.data.masking import Blocks, Corrupted, RandomSubset
from m3ae_jax.data.text import encode_batch, load_tokenizer
from m3ae_jax.data.tokens import MASK, Group, Masker, modality_table
from m3ae_jax.errors import UserError
from m3ae_jax.models.encoder import Encoded, Encoder, with_cls
from m3ae_jax.models.single_stream import Stream, TextStack
from m3ae_jax.models.transformer import ACTIVATIONS, Tap, dense, layer_norm, named, stack_options
from m3ae_jax.models.vocabulary import cross_entropy, soft_cross_entropy
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
from m3ae_jax.objectives.parts.keywords import binary_loss, keywords
from m3ae_jax.objectives.parts.matching import hard_negatives
from m3ae_jax.objectives.parts.pairs import BOTH, check_aligned, paired, refuse_unpaired
from m3ae_jax.objectives.parts.pixels import normalized_tokens
from m3ae_jax.objectives.parts.teacher import moved, subset
from m3ae_jax.objectives.parts.towers import loads_of

_TEACHER = ("image", "text", "heads/words", "heads/ids", "heads/keywords")


class Fields(FieldGroup):
    """The stack, what is hidden, the teacher, the keywords and the weights of the losses; ``config.simla``."""

    image_mask_ratio: float = setting(75 / 256, low=0.0, high=0.95, aliases=("mask_ratio", "masking_ratio"))
    """Share of the patches that is hidden, in BEiT's blocks."""
    text_mask_ratio: float = setting(0.15, low=0.0, high=0.95)
    """Share of the words that is hidden; at least one of each caption."""
    text_corruption: tuple[float, ...] = setting((0.8, 0.1), low=0.0, high=1.0)
    """Of the hidden words so many are shown as the mask embedding and so many as random words, the rest as they are."""
    text_depth: int = setting(0, low=0)
    """Layers of the upper stack; 0: as the pictures', which is ``model``."""
    fusion_layer: int = setting(0, low=0)
    """So many of them read captions alone, without cross-attention, and the others only where there is something to
    look at (ALBEF's: 6 of 12); 0: all do both (SIMLA's single stream)."""
    text_dropout: float = setting(0.1, low=0.0, high=0.99)
    """Rate in the upper stack, of its attention weights too."""
    text_layer_norm_epsilon: float = setting(1e-12, low=1e-15, high=0.1)
    """Of the upper stack (BERT's)."""
    text_places: int = setting(0, low=0)
    """Rows of the upper stack's table of positions (BERT's: 510); 0: as many as the words need, and
    the patches where ids of theirs are asked."""
    image_positions: str = setting(
        "learned", choices=("sincos", "learned"), aliases=("position_embedding", "pos_embed")
    )
    """Of the patches in the lower stack: learned, or sincos (fixed)."""
    image_from: str = setting("", identifies=False, weights=True)
    """A run of m3ae, or converted weights (MAE's, timm's): the lower stack starts from its encoder. `init_from` is for
    runs of the same objective."""
    text_from: str = setting("", identifies=False, weights=True)
    """Likewise of the upper stack: converted weights of BERT; cross-attention starts fresh."""
    image_tokenizer: str = setting("", identifies=False, weights=True)
    """A run of visual_tokenizer, in whose ids hidden patches are restored; its patches must be as large as these.
    Needed at the start alone."""
    image_tokenizer_model: str = setting("")
    """What it is; filled in from its run."""
    embedding_width: int = setting(256, low=1, aliases=("embed_dim", "projection_dim"))
    """Numbers of an embedding of the contrast."""
    temperature: float = setting(0.07, low=1e-4, high=10.0, loss=True)
    """Of the contrast at the start; it is learned."""
    temperature_range: tuple[float, ...] = setting((0.001, 0.5), low=1e-4, high=100.0, loss=True)
    """Least and greatest temperature."""
    negative_rows: int = setting(0, low=0, loss=True)
    """Negatives of the matching come from groups of so many consecutive rows; 0: from all."""
    queue: int = setting(0, low=0, loss=True)
    """Earlier pairs whose teacher's embeddings are negatives of the contrast too, a multiple of the batch size (the
    paper's: 65,536)."""
    momentum: float = setting(0.995, low=0.0, high=1.0)
    """Of the teacher."""
    distillation: float = setting(0.4, low=0.0, high=1.0, loss=True)
    """Share of the teacher's predictions in the targets."""
    distillation_ramp: int = setting(0, low=0, loss=True)
    """Steps in which that share grows from 0 (the paper's: an epoch)."""
    keyword_votes: int = setting(4, low=1, loss=True)
    """Words that each head of the teacher's last layer votes for."""
    keywords: int = setting(5, low=1, loss=True)
    """Words of a caption with most votes that are its keywords."""
    keyword_input: str = setting("embedding", choices=("embedding", "cls"))
    """Of what keywords are predicted: the picture's embedding (SIMLA's code), or its CLS token (the paper's text)."""
    keyword_average: str = setting("words", choices=("words", "none"), loss=True)
    """words: mean over the vocabulary, whose gradient is small where it is large; none: sum over it."""
    stop_words: str = setting("", loss=True)
    """Words that are no keywords, with blanks between, as "a the of"; those that are one token each count."""
    stop_ids: str = setting("", loss=True)
    """Their ids; filled in."""
    faithful: bool = setting(False, loss=True)
    """As SIMLA's code where that is at odds with its paper or with itself: distillation of words over the places
    instead of the vocabulary, places without a vote and padding as keywords, and dropout in the teacher."""
    contrast_weight: float = setting(1.0, low=0.0, loss=True)
    """Factor of the contrast (ITC); what has the factor 0 is not computed."""
    match_weight: float = setting(1.0, low=0.0, loss=True)
    """Factor of the matching (ITM)."""
    word_weight: float = setting(1.0, low=0.0, loss=True)
    """Factor of the words (MLM)."""
    id_weight: float = setting(1.0, low=0.0, loss=True)
    """Factor of the hidden patches' ids (MIM)."""
    keyword_weight: float = setting(1.0, low=0.0, loss=True)
    """Factor of the keywords (PSL)."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Refuses stacks that cannot be computed, and losses that fit neither each other nor the data."""
        o = config.simla
        check_aligned("simla", config, ("contrast", "match", "word", "id", "keyword"))
        needed = config.data.max_text_tokens
        if o.id_weight:  # pictures read, too
            needed = max(needed, (config.data.image_size // config.data.patch_size) ** 2)
        if o.text_places and o.text_places < needed:
            raise UserError(f"simla.text_places={o.text_places}: {needed} are needed, for the words and the patches")
        depth = o.text_depth or config.model.depth
        if o.fusion_layer and o.fusion_layer >= depth:
            raise UserError(
                f"simla.fusion_layer={o.fusion_layer}: of the upper stack's {depth} layers none would look; it is 0 to "
                f"{depth - 1}"
            )
        for name in ("keyword_votes", "keywords"):
            if o.keyword_weight and o[name] > config.data.max_text_tokens:
                raise UserError(
                    f"simla.{name}={o[name]}: a caption has data.max_text_tokens={config.data.max_text_tokens} words"
                )
        if o.fusion_layer and o.text_from:
            raise UserError(
                f"simla.text_from with simla.fusion_layer={o.fusion_layer}: BERT's layers are not divided; name one"
            )
        if o.stop_words and (config.data.tokenizer or not o.stop_ids):
            o.stop_ids = ",".join(map(str, _ids_of_words(o.stop_words.split(), config.data.tokenizer)))
        fill_in(config, path, TOKENIZER, bool(o.id_weight), "simla.id_weight")


def _ids_of_words(words: list[str], tokenizer: str) -> list[int]:
    """Ids of those of the words that are one token each.

    Raises:
        UserError: the tokenizer is not there, or none of them is.
    """
    loaded = load_tokenizer(tokenizer, "simla.stop_words needs it")
    rows, length = encode_batch(loaded, [word.encode() for word in words], 2)
    if not (length == 1).any():
        raise UserError(f"simla.stop_words: none of {len(words)} words is one token of data.tokenizer={tokenizer!r}")
    return sorted({int(number) for number in rows[length == 1, 0]})


class WordsHead(nn.Module):
    """BERT's: a layer before the words, whose output is the table of the words themselves, and a bias."""

    width: int
    words: int
    activation: str
    epsilon: float
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares the parameters."""
        self.hidden = dense(self.width, ("embed", "mlp"), self.dtype)
        self.norm = layer_norm(self.epsilon, self.dtype)
        self.bias: Any = self.param("bias", named(nn.initializers.zeros, "vocab"), (self.words,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """What is multiplied with the table, `[..., D]`."""
        features: jax.Array = self.norm(ACTIVATIONS[self.activation](self.hidden(x)))
        return features


class _Embedding:
    """What a SIMLA with contrast can do."""

    def embed(self: Any, params: Params, part: Part, rng: jax.Array | None = None) -> dict[str, jax.Array]:
        """See `objectives.base.Embeds`."""
        keys = (None,) * 3 if rng is None else tuple(jax.random.split(rng, 3))
        sets, cls = {name: clean(group) for name, group in part["groups"].items()}, {}
        if "image" in sets:
            cls["image"] = self._picture(params, sets["image"], keys[0]).pooled["cls"]
        if "text" in sets:
            words = self._text(params, "words", sets["text"], rng=keys[1])
            cls["text"] = self._layers(params, words, None, keys[2])[:, 0]
        return {name: self._embedding(params, name, x) for name, x in cls.items()}


class _Matching:
    """What a SIMLA with matching can do."""

    def match(self: Any, params: Params, part: Part) -> jax.Array:
        """See `objectives.base.Matches`: the logit of belonging together less that of not."""
        return self._score(params, part, None)[0]

    def relevance(self: Any, params: Params, part: Part, layer: int = -1) -> jax.Array:
        """See `objectives.base.Grounds`: of one layer's cross-attention, weighted by its gradient (Grad-CAM).

        The mean over heads and words of the weights times the positive part of the score's gradient (ALBEF, arXiv
        2107.07651, section 4; layer 8 of 12 there).
        """
        upper = self._stack.options
        below = self._options.fusion_layer
        layer = layer if layer >= 0 else max(round(upper.depth * 2 / 3) - below, 0)
        text, image = (clean(part["groups"][name]) for name in BOTH[::-1])
        rows, keys = text["valid"].shape[1] + 2, image["valid"].shape[1] + 1
        start = jnp.zeros((len(text["valid"]), upper.heads, rows, keys), jnp.float32)

        def score(delta: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits, attention = self._score(params, part, Tap(layer, "context", delta=delta))
            return jnp.sum(logits), attention

        gradient, attention = jax.grad(score, has_aux=True)(start)
        one = jnp.ones((len(start), 1), bool)
        real = jnp.concatenate([one, text["valid"], one], axis=1).astype(jnp.float32)[:, None, :, None]
        weighted = jnp.mean(attention * jnp.maximum(gradient, 0.0) * real, axis=1)
        each = jnp.sum(weighted, axis=1) / jnp.sum(real[:, 0], axis=1)
        # In the order of their positions.
        order = jnp.argsort(image["position"], axis=1)
        return jnp.take_along_axis(each[:, 1:], order, axis=1)


class _Keywords:
    """What a SIMLA that is asked for keywords can do."""

    def keywords(self: Any, params: Params, part: Part) -> tuple[jax.Array, jax.Array]:
        """See `objectives.base.FindsKeywords`."""
        sets = {name: clean(group) for name, group in part["groups"].items()}
        encoded = self._picture(params, sets["image"], None)
        seen, words = self._seen(encoded, sets["image"]), self._text(params, "words", sets["text"], rng=None)
        cls = encoded.pooled["cls"]
        given = self._keyword_input(cls, self._embedding(params, "image", cls))
        found = self._keywords(params, words, seen, sets["text"], None)
        return found, jax.nn.sigmoid(self._head(params, "keywords", given))


class _Restoring:
    """What a SIMLA that is asked for words, or for ids of patches, can do."""

    def restore(self: Any, params: Params, part: Part) -> dict[str, Restored]:
        """See `objectives.base.Restores`: hidden words, from the picture and the words that are visible; hidden patches
        of a pair, from the caption and the patches that are visible."""
        groups = {name: dict(group) for name, group in part["groups"].items()}
        restored: dict[str, Restored] = {}
        hidden = {name for name, group in groups.items() if group["target"]["valid"].shape[1]}
        if "text" in hidden:  # masks are shown, whoever looks
            target = groups["text"]["target"]
            groups["text"]["target"] = {**target, "input": jnp.full_like(target["value"], MASK)}
        if "text" in hidden and "words" in self._heads:
            seen = None
            if "image" in groups:
                visible = groups["image"]["visible"]
                seen = self._seen(self._picture(params, visible, None), visible)
            features = self._corrupted(params, groups["text"], seen, (None, None))
            blocks, value = self._config.compute.vocabulary_blocks, groups["text"]["target"]["value"]
            x, kernel, bias = self._words_output(params, features)
            guess = cross_entropy(x, kernel, bias, value, blocks)
            restored["text"] = Restored(guess.best, guess.loss, guess.best == value)
        if "image" in hidden and "text" in groups and self._tokenizer:
            words = self._text(params, "words", clean(groups["text"], shown=True), rng=None)
            logits = self._head(params, "ids", self._masked(params, groups["image"], words, (None, None, None)))
            true, best = self._tokenizer.hidden_ids(params["tokenizer"], groups["image"]), jnp.argmax(logits, axis=-1)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), true)
            restored["image"] = Restored(self._tokenizer.painted(params["tokenizer"], groups["image"], best), loss)
        return restored


class Simla(Objective):
    """The objective; see `objectives.base` for the methods' contract."""

    Fields = Fields
    name = "simla"
    stacks: tuple[str, ...] = ("image/transformer/blocks", "text/transformer/blocks")
    couples_examples = True

    def __new__(cls, config: ConfigDict, vocab_size: int) -> Simla:
        """Only what a loss trains is offered: `Embeds`, `Matches` and `Grounds`, `FindsKeywords`, `Restores`."""
        o = config.simla
        offered = {
            _Embedding: o.contrast_weight,
            _Matching: o.match_weight,
            _Keywords: o.keyword_weight,
            _Restoring: o.word_weight or o.id_weight,
        }
        kinds = [kind for kind, weight in offered.items() if weight]
        return object.__new__(type(cls.__name__, (cls, *kinds), {}))

    def __init__(self, config: ConfigDict, vocab_size: int) -> None:
        self._config, self._options, self._words = config, config.simla, vocab_size
        o = self._options
        self._modalities = modality_table(config, vocab_size)
        image, text = (self._modalities[name] for name in BOTH)
        maskers: dict[str, Masker] = {
            "image": Blocks(o.image_mask_ratio),
            "text": Corrupted(RandomSubset(o.text_mask_ratio, minimum=1), *o.text_corruption),
        }
        self.groups = tuple(Group(name, (self._modalities[name],), maskers[name]) for name in BOTH)
        lower = stack_options(config)
        upper = stack_options(
            config,
            depth=o.text_depth or lower.depth,
            dropout=o.text_dropout,
            attention_dropout=o.text_dropout,
            epsilon=o.text_layer_norm_epsilon,
            attends="both",
            post_norm=True,
            drop_path=0.0,
        )
        learned = ("image",) if o.image_positions == "learned" else ()
        self._tower = Encoder(lower, (image,), typed=False, learned_positions=learned, masked=("image",))
        places = max(text.tokens, image.tokens) if o.id_weight else text.tokens
        self._stack = TextStack(upper, text, o.text_places or places, o.fusion_layer)
        if o.fusion_layer:
            self.stacks = ("image/transformer/blocks", "text/lower/blocks", "text/transformer/blocks")
        self._projection = projection(o.embedding_width, lower.dtype, bias=True)
        self._tokenizer: Frozen | None = None
        if o.id_weight:
            self._tokenizer = built(config, "simla", TOKENIZER)
            self.model_extra = ("tokenizer",)
        self._heads: dict[str, Any] = {}
        if o.match_weight:
            self._heads["match"] = dense(2, ("embed", None), upper.dtype)
        if o.word_weight:
            self._heads["words"] = WordsHead(upper.width, vocab_size, upper.activation, upper.epsilon, upper.dtype)
        if self._tokenizer:
            self._heads["ids"] = dense(self._tokenizer.objective.codes, ("embed", "vocab"), upper.dtype)
        if o.keyword_weight:
            self._heads["keywords"] = dense(vocab_size, ("embed", "vocab"), jnp.float32)
        weights = {f"{name}_loss": o[f"{name}_weight"] for name in ("contrast", "match", "word", "id", "keyword")}
        self.term_weights = {name: weight for name, weight in weights.items() if weight}
        self._teacher = self._teacher_paths()
        self._range = (o.temperature_range[0], o.temperature_range[1])

    # --- the state

    def _teacher_paths(self) -> tuple[str, ...]:
        """Which parameters have a momentum teacher: those that a target is made of."""
        o = self._options
        if not (
            o.keyword_weight or o.queue or (o.distillation and (o.contrast_weight or o.word_weight or o.id_weight))
        ):
            return ()
        return tuple(path for path in _TEACHER if not path.startswith("heads/") or path[6:] in self._heads)

    def init(self, rng: jax.Array) -> Boxed:
        """See `Objective.init`."""
        part = zeros_part(self.groups)
        sets = {name: clean(part["groups"][name], shown=True) for name in BOTH}
        keys = jax.random.split(rng, 4)
        hidden = jnp.zeros(sets["image"]["valid"].shape, bool)
        picture = normalized_tokens({**sets["image"], "hidden": hidden}, self._config)
        encoded, of_tower = self._tower.init_with_output(keys[0], {"image": picture})
        context = self._seen(encoded, picture)
        fused, of_stack = self._stack.init_with_output(keys[1], sets["text"], context, method="first")
        params: dict[str, Any] = {"image": dict(of_tower["params"]), "text": dict(of_stack["params"])}
        for name, key in zip(BOTH, jax.random.split(keys[2]), strict=True):
            params[name]["projection"] = self._projection.init(key, fused[:, 0])["params"]
        inputs = {"keywords": self._keyword_input(fused[:, 0], jnp.zeros((1, self._options.embedding_width)))}
        heads = {
            name: head.init(jax.random.fold_in(keys[3], number), inputs.get(name, fused))["params"]
            for number, (name, head) in enumerate(sorted(self._heads.items()))
        }
        params |= {"heads": heads} if heads else {}
        return {**params, "contrast": temperature_parameters(self._options.temperature)}

    def init_extra(self, params: Boxed, rng: jax.Array) -> Boxed:
        """See `Objective.init_extra`: ``teacher``, ``queue`` if there is one, ``tokenizer``."""
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
        after = dict(extra)
        if self._teacher:
            after["teacher"] = moved(extra["teacher"], params, self._teacher, self._options.momentum)
        if "queue" in extra:
            newest = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(of for of in rows.values() if of))
            after["queue"] = pushed(extra["queue"], newest)
        return after

    def loads(self) -> tuple[Load, ...]:
        """See `Objective.loads`."""
        tokenizer = self._tokenizer.loads("extra/tokenizer") if self._tokenizer else ()
        return (*loads_of(self._config, "simla"), *tokenizer)

    def view(self, inputs: Iterable[str], hidden: Mapping[str, float] = NOTHING_HIDDEN) -> tuple[Group, ...]:
        """See `Objective.view`: a group for each modality, of its name."""
        return modality_groups(self._modalities, inputs, hidden)

    # --- the passes

    def _picture(self, params: Params, tokens: Mapping[str, Any], rng: jax.Array | None) -> Encoded:
        weights = {key: value for key, value in params["image"].items() if key != "projection"}
        dropout = {} if rng is None else {"dropout": rng}
        encoded: Any = self._tower.apply(
            {"params": weights},
            {"image": normalized_tokens(tokens, self._config)},
            deterministic=rng is None,
            rngs=dropout,
        )
        return encoded

    def _seen(self, encoded: Encoded, tokens: Mapping[str, Any]) -> Stream:
        """CLS and patches, as what captions look at."""
        x = jnp.concatenate([encoded.pooled["cls"][:, None], encoded.tokens["image"]], axis=1)
        return Stream(x, with_cls([tokens["valid"]]))

    def _text(self, params: Params, method: str, *inputs: Any, rng: jax.Array | None) -> Any:
        """A method of the upper stack."""
        weights = {key: value for key, value in params["text"].items() if key != "projection"}
        dropout = {} if rng is None else {"dropout": rng}
        return self._stack.apply({"params": weights}, *inputs, deterministic=rng is None, rngs=dropout, method=method)

    def _layers(self, params: Params, stream: Stream, context: Stream | None, rng: jax.Array | None) -> jax.Array:
        result: jax.Array = self._text(params, "__call__", stream, context, rng=rng)[0]
        return result

    def _embedding(self, params: Params, name: str, cls: jax.Array) -> jax.Array:
        """`[B, d] float32`."""
        projected: Any = self._projection.apply({"params": params[name]["projection"]}, cls)
        return unit(projected)

    def _head(self, params: Params, name: str, x: jax.Array) -> jax.Array:
        result: Any = self._heads[name].apply({"params": params["heads"][name]}, x)
        return jnp.asarray(result)

    def _keyword_input(self, cls: jax.Array, embedding: jax.Array) -> jax.Array:
        return embedding if self._options.keyword_input == "embedding" else cls.astype(jnp.float32)

    def _corrupted(self, params: Params, group: Any, context: Stream | None, keys: tuple[Any, Any]) -> jax.Array:
        """What the stack makes of the hidden words, `[B, K, D]`."""
        words = self._text(params, "words", clean(group, shown=True), rng=keys[0])
        fused, shown = self._layers(params, words, context, keys[1]), group["visible"]["valid"].shape[1]
        return fused[:, 1 + shown : 1 + shown + group["target"]["valid"].shape[1]]

    def _masked(self, params: Params, group: Any, words: Stream, keys: tuple[Any, Any, Any]) -> jax.Array:
        """What the stack makes of the hidden patches, `[B, K, D]`: the picture reads, and looks at the caption."""
        tokens, count = clean(group), group["target"]["valid"].shape[1]
        patches = tokens["valid"].shape[1]
        hidden = jnp.broadcast_to(jnp.arange(patches) >= patches - count, tokens["valid"].shape)
        seen = self._seen(self._picture(params, {**tokens, "hidden": hidden}, keys[0]), tokens)
        stream = self._text(params, "picture", seen, tokens["position"], rng=keys[1])
        return self._layers(params, stream, words, keys[2])[:, 1 + patches - count :]

    # --- the loss

    def loss(self, params: Params, extra: Any, part: Part, rng: jax.Array | None, step: jax.Array) -> LossOutput:
        """Terms, all in nats: ``contrast_loss`` and ``match_loss`` a pair, ``word_loss`` a hidden word, ``id_loss`` a
        hidden patch, ``keyword_loss`` a word of the vocabulary (or an example)."""
        refuse_unpaired("simla", part)
        o, groups, valid = self._options, part["groups"], paired(part)
        weight, sets = valid.astype(jnp.float32), {name: clean(part["groups"][name]) for name in BOTH}

        def key(number: int) -> jax.Array | None:
            return None if rng is None else jax.random.fold_in(rng, number)

        picture = self._picture(params, sets["image"], key(0))
        read = bool(o.contrast_weight or o.match_weight or self._tokenizer)
        words: Any = self._text(params, "words", sets["text"], rng=key(1)) if read else None
        seen = self._seen(picture, sets["image"])
        cls = {"image": picture.pooled["cls"]}
        if o.contrast_weight or o.match_weight:
            cls["text"] = self._layers(params, words, None, key(2))[:, 0]
        embeddings = {name: self._embedding(params, name, x) for name, x in cls.items()}
        teacher = self._teacher_outputs(extra, groups, sets, key(50) if o.faithful else None)
        share = self._share(step)
        terms: Terms = {}  # of each example
        metrics: Terms = {}
        rows: dict[str, jax.Array] = {}
        scale = scale_of(params["contrast"], self._range)
        if o.contrast_weight:
            of_teacher = {name: teacher[f"{name}_embedding"] for name in BOTH if f"{name}_embedding" in teacher}
            ids = part["example"]["image_id"]
            losses, first = momentum_contrast(embeddings, of_teacher, extra.get("queue"), scale, ids, valid, share)
            terms["contrast_loss"] = (losses * weight, weight)
            metrics |= {name: summed((x * weight, weight)) for name, x in first.items()}
            metrics["temperature"] = (jax.lax.stop_gradient(1.0 / scale), jnp.float32(1.0))
            if "queue" in extra:
                rows = {**of_teacher, "id": ids, "valid": valid}
        if o.match_weight:
            terms["match_loss"], metrics["match_accuracy"] = self._matching(
                params, words, seen, embeddings, scale, part, valid, (key(3), key(4))
            )
        if o.word_weight:
            target = groups["text"]["target"]
            hidden = self._corrupted(params, groups["text"], seen, (key(5), key(6)))
            losses, right = self._hidden_words(params, extra, hidden, target, teacher, share)
            terms["word_loss"] = row_total(losses, target["valid"], "token")
            metrics["word_accuracy"] = summed(row_total(right, target["valid"], "token"))
        if self._tokenizer:
            target = groups["image"]["target"]
            logits = self._head(params, "ids", self._masked(params, groups["image"], words, (key(7), key(8), key(9))))
            true = self._tokenizer.hidden_ids(extra["tokenizer"], groups["image"])
            logits = logits.astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, true)
            if "ids" in teacher:
                soft = jax.nn.softmax(teacher["ids"].astype(jnp.float32))
                losses = (1.0 - share) * losses + share * optax.softmax_cross_entropy(logits, soft)
            terms["id_loss"] = row_total(losses, target["valid"] & valid[:, None], "token")
            right = (jnp.argmax(logits, axis=-1) == true).astype(jnp.float32)
            metrics["id_accuracy"] = summed(row_total(right, target["valid"] & valid[:, None], "token"))
        if o.keyword_weight:
            logits = self._head(params, "keywords", self._keyword_input(cls["image"], embeddings["image"]))
            hard = teacher["keywords"]
            losses = binary_loss(logits, hard)
            if o.distillation:
                losses = (1.0 - share) * losses + share * binary_loss(logits, teacher["recommended"])
            losses = jnp.mean(losses, axis=-1) if o.keyword_average == "words" else jnp.sum(losses, axis=-1)
            known = valid & jnp.any(hard, axis=-1)
            counted = known.astype(jnp.float32)
            terms["keyword_loss"] = (losses * counted, counted)
            metrics["keywords"] = summed((jnp.sum(hard, axis=-1) * weight, weight))
        return LossOutput({name: summed(term) for name, term in terms.items()}, metrics, rows, per_example=terms)

    def _share(self, step: jax.Array) -> Any:
        """Of the teacher's predictions in the targets, at a step."""
        o = self._options
        if not o.distillation or not o.distillation_ramp:
            return float(o.distillation)
        return o.distillation * jnp.minimum(step / o.distillation_ramp, 1.0).astype(jnp.float32)

    def _teacher_outputs(
        self, extra: Any, groups: Mapping[str, Any], sets: Mapping[str, Any], rng: jax.Array | None
    ) -> dict[str, Any]:
        """What the targets are made of: embeddings, hidden ``words``, ``ids``, ``keywords``, ``recommended`` words."""
        o = self._options
        if not self._teacher:
            return {}

        def key(number: int) -> jax.Array | None:
            return None if rng is None else jax.random.fold_in(rng, number)

        weights, outputs = jax.lax.stop_gradient(extra["teacher"]), {}
        encoded = self._picture(weights, sets["image"], key(0))
        seen, cls = self._seen(encoded, sets["image"]), encoded.pooled["cls"]
        contrasts = bool(o.contrast_weight and (o.queue or o.distillation))
        read = bool(contrasts or o.keyword_weight or (self._tokenizer and o.distillation))
        words: Any = self._text(weights, "words", sets["text"], rng=key(1)) if read else None
        if contrasts or o.keyword_weight:
            outputs["image_embedding"] = self._embedding(weights, "image", cls)
        if contrasts:
            caption = self._layers(weights, words, None, key(2))[:, 0]
            outputs["text_embedding"] = self._embedding(weights, "text", caption)
        if o.word_weight and o.distillation:
            outputs["words"] = self._corrupted(weights, groups["text"], seen, (key(3), key(4)))
        if self._tokenizer and o.distillation:
            hidden = self._masked(weights, groups["image"], words, (key(5), key(6), key(7)))
            outputs["ids"] = self._head(weights, "ids", hidden)
        if o.keyword_weight:
            outputs["keywords"] = self._keywords(weights, words, seen, sets["text"], key(8))
            given = self._keyword_input(cls, outputs["image_embedding"])
            outputs["recommended"] = jax.nn.sigmoid(self._head(weights, "keywords", given))
        return jax.lax.stop_gradient(outputs)

    def _keywords(
        self, weights: Params, words: Stream, seen: Stream, text: Mapping[str, Any], rng: jax.Array | None
    ) -> jax.Array:
        """The keywords of captions, `[B, V] bool`, by the attention of the last layer's CLS."""
        o = self._options
        _, attention = self._text(weights, "__call__", words, seen, Tap(-1, "self", query=0), rng=rng)
        ids, eligible = text["value"], text["valid"]
        attention = attention[:, :, 0, 1:]
        if o.faithful:  # the end of the caption may be chosen, and padding too
            ids = jnp.pad(ids, ((0, 0), (0, 1)), constant_values=-1)
            eligible = jnp.ones_like(ids, bool)
        else:
            attention = attention[:, :, :-1]
            if o.stop_ids:
                stop = jnp.asarray([int(number) for number in o.stop_ids.split(",")])
                eligible = eligible & ~jnp.any(ids[..., None] == stop, axis=-1)
        return keywords(
            attention, ids, eligible, self._words, per_head=o.keyword_votes, total=o.keywords, voted=not o.faithful
        )

    def _matching(
        self,
        params: Params,
        words: Stream,
        seen: Stream,
        embeddings: Mapping[str, jax.Array],
        scale: jax.Array,
        part: Part,
        valid: jax.Array,
        keys: tuple[Any, Any],
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        """Loss of each example over the pair and two hard negatives, and the accuracy."""
        example, streams = part["example"], {"image": seen, "text": words}
        same = (example["image_id"], example["caption_id"])
        loss = weight = right = jnp.float32(0.0)
        draws = (None, None) if keys[0] is None else tuple(jax.random.split(keys[0]))
        passes: list[tuple[dict[str, Stream], int, jax.Array]] = [(streams, 1, valid)]
        for name, other, draw in zip(BOTH, BOTH[::-1], draws, strict=True):
            negatives = hard_negatives(
                draw, embeddings[other], embeddings[name], jax.lax.stop_gradient(scale), same, valid,
                self._options.negative_rows,
            )  # fmt: skip
            passes.append(({**streams, name: jax.tree.map(negatives.of, streams[name])}, 0, negatives.exists))
        for number, (of, label, counts) in enumerate(passes):
            key = None if keys[1] is None else jax.random.fold_in(keys[1], number)
            fused = self._layers(params, of["text"], of["image"], key)
            logits = self._head(params, "match", fused[:, 0]).astype(jnp.float32)
            each = counts.astype(jnp.float32)
            loss += -jax.nn.log_softmax(logits)[:, label] * each
            right += (jnp.argmax(logits, axis=1) == label) * each
            weight += each
        return (loss, weight), summed((right, weight))

    def _words_output(self, params: Params, hidden: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the words' logits are made of: features, the table as a kernel, and the bias."""
        table = params["text"]["text"]["embedding"]["embedding"]
        return self._head(params, "words", hidden), table.T, params["heads"]["words"]["bias"]

    def _hidden_words(
        self, params: Params, extra: Any, hidden: jax.Array, target: Mapping[str, Any], teacher: Any, share: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Loss of each hidden word, `[B, K]`, and whether the guess is right."""
        blocks, student = self._config.compute.vocabulary_blocks, self._words_output(params, hidden)
        words = cross_entropy(*student, target["value"], blocks)
        losses, right = words.loss, (words.best == target["value"]).astype(jnp.float32)
        if "words" in teacher:
            of_teacher = self._words_output(extra["teacher"], teacher["words"])
            if self._options.faithful:  # over the places, as their code has it
                logits = [x @ kernel.astype(x.dtype) + bias for x, kernel, bias in (student, of_teacher)]
                logits = [jnp.where(target["valid"][..., None], x.astype(jnp.float32), -1e9) for x in logits]
                soft = jax.lax.stop_gradient(jax.nn.softmax(logits[1], axis=-1))
                distilled = -jnp.sum(soft * jax.nn.log_softmax(logits[0], axis=1), axis=-1)
            else:
                distilled = soft_cross_entropy(student, of_teacher, blocks)
            losses = (1.0 - share) * losses + share * distilled
        return losses, right

    # --- what else it can do

    def products(self, rows: int) -> dict[str, float]:
        """See `objectives.base.Itemizes`; of a pair.

        Three times forward what is trained, once what is not. A layer of n tokens, width w and an MLP r times as wide
        costs ``2 n w^2 (4 + 2 r) + 4 n^2 w``; one that looks at m others besides ``4 w^2 (n + m) + 4 n m w`` more.
        """
        o, upper, lower = self._options, self._stack.options, self._tower.options
        spec = {g.name: {name: sets["valid"].shape[1] for name, sets in g.spec(1).items()} for g in self.groups}
        patches, words = (sum(spec[name].values()) for name in BOTH)
        hidden, hidden_words = (spec[name]["target"] for name in BOTH)
        contrast, match, word, keyword = (
            bool(o[f"{term}_weight"]) for term in ("contrast", "match", "word", "keyword")
        )
        ids, width = self._tokenizer is not None, upper.width

        def linear(tokens: int, inputs: float, outputs: float) -> float:
            return 2.0 * tokens * inputs * outputs

        def stack(tokens: int, depth: int, of: Any = upper) -> float:
            mlp = 2 * int(width * of.mlp_ratio)
            return depth * (linear(tokens, width, 4 * width + mlp) + 4.0 * tokens * tokens * width)

        fused = upper.depth - o.fusion_layer

        def looking(tokens: int, at: int) -> float:
            of_layer = linear(tokens + at, width, 2 * width) + 4.0 * tokens * at * width
            return stack(tokens, fused) + fused * of_layer

        caption, picture, embedded = words + 2, patches + 1, o.embedding_width
        tower = linear(patches, self._modalities["image"].features, width) + stack(picture, lower.depth, lower)
        below = stack(caption, o.fusion_layer)  # of ALBEF's stack, in which it is all that a caption alone costs
        alone = 0.0 if o.fusion_layer else stack(caption, upper.depth)
        reading = looking(caption, picture)
        masked = tower + looking(picture, caption)
        of_words = linear(hidden_words, width, width) + linear(hidden_words, width, self._words)
        given = embedded if o.keyword_input == "embedding" else width
        codes = self._tokenizer.objective.codes if self._tokenizer else 0
        distilled, in_contrast = bool(o.distillation), contrast and bool(o.queue or o.distillation)
        compared = linear(2, embedded, rows + o.queue)
        trained = {
            "picture": tower,
            "caption": alone * (contrast or match) + below * (contrast or match or ids),
            "3 matching passes": 3 * (reading + linear(1, width, 2)) * match,
            "corrupted caption": (below + reading + of_words) * word,
            "distillation of words": linear(hidden_words, width, self._words) * (word and distilled),
            "masked picture": (masked + linear(hidden, width, codes)) * ids,
            "embeddings": linear(1 + (contrast or match), width, embedded),
            "contrast": compared * contrast,
            "keywords": linear(1, given, self._words) * keyword,
        }
        teacher = {
            "teacher: picture": tower,
            "teacher: caption": alone * in_contrast + below * (in_contrast or keyword or (ids and distilled)),
            "teacher: embeddings": linear(1, width, embedded) * ((in_contrast or keyword) + in_contrast),
            "teacher: corrupted caption": (below + reading + of_words) * (word and distilled),
            "teacher: masked picture": (masked + linear(hidden, width, codes)) * (ids and distilled),
            # The weights that are looked at are computed beside those that are mixed with.
            "teacher: keywords": (
                reading + 2.0 * fused * caption * caption * width + linear(1, given, self._words)
            ) * keyword,
        }  # fmt: skip
        fixed = {
            **(teacher if self._teacher else {}),
            "distillation of contrast": compared * (contrast and distilled),
            "negatives": linear(2, embedded, o.negative_rows or rows) * match,
            "tokenizer": self._tokenizer.objective.ids_products() if self._tokenizer else 0.0,
        }
        parts = {name: 3.0 * cost for name, cost in trained.items()} | fixed
        return {name: cost for name, cost in parts.items() if cost}

    def encode(self, params: Params, part: Part, rng: jax.Array | None = None) -> Encoded:
        """See `objectives.base.Encodes`: of a pair the caption that looks at the picture, and the picture's patches."""
        keys = (None,) * 3 if rng is None else tuple(jax.random.split(rng, 3))
        sets = {name: group["visible"] for name, group in part["groups"].items()}
        picture = self._picture(params, sets["image"], keys[0]) if "image" in sets else None
        if "text" not in sets:
            assert picture is not None
            return picture
        words = self._text(params, "words", sets["text"], rng=keys[1])
        fused = self._layers(params, words, None if picture is None else self._seen(picture, sets["image"]), keys[2])
        tokens = {} if picture is None else dict(picture.tokens)
        return Encoded({"cls": fused[:, 0]}, {**tokens, "text": fused[:, 1:-1]})

    def _score(self, params: Params, part: Part, tap: Tap | None) -> tuple[jax.Array, Any]:
        sets = {name: clean(group) for name, group in part["groups"].items()}
        seen = self._seen(self._picture(params, sets["image"], None), sets["image"])
        words = self._text(params, "words", sets["text"], rng=None)
        fused, attention = self._text(params, "__call__", words, seen, tap, rng=None)
        logits = self._head(params, "match", fused[:, 0]).astype(jnp.float32)
        return logits[:, 1] - logits[:, 0], attention
