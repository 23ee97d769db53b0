"""M3AE (arXiv 2205.14204): restore hidden patches and words from the visible ones.

With pictures alone this is MAE, with text alone masked language modelling. Legend: ``B`` batch, ``K`` target
slots, ``P`` numbers in a patch.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.data.order import hidden_count
from m3ae_jax.data.pipeline import Group, grid, token_slots
from m3ae_jax.models.autoencoder import AutoencoderOptions, MaskedAutoencoder
from m3ae_jax.models.transformer import TransformerOptions
from m3ae_jax.models.vocabulary import cross_entropy
from m3ae_jax.objectives.base import Batch, LossOutput, Params, Terms, abstract_batch


class M3AE:
    """The objective; see `objectives.base.Objective` for the methods' contract."""

    couples_examples = False

    def __init__(self, config: ConfigDict, vocab_size: int) -> None:
        self._config = config
        slots = token_slots(config)
        ratios = {"image": config.model.image_mask_ratio, "text": config.model.text_mask_ratio}
        self.groups = tuple(Group(m, m, slots[m], ratios[m]) for m in config.data.modalities)
        weights = {"image": config.loss.image_weight, "text": config.loss.text_weight}
        self.term_weights = {f"{m}_loss": weights[m] for m in config.data.modalities}
        self.model = MaskedAutoencoder(autoencoder_options(config, vocab_size))

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters, boxed with their logical axis names."""
        shapes = abstract_batch(self.groups, 1, self.model.options.patch_values)
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        target = {name: group["target"] for name, group in batch["groups"].items()}
        return self.model.init(rng, self._visible(batch), target)["params"]

    def init_extra(self, params: Params) -> dict[str, Any]:
        """Nothing beside the parameters."""
        del params
        return {}

    def update_extra(self, extra: Any, new_params: Params, aux: Any, step: jax.Array) -> Any:
        """Nothing to update."""
        del new_params, aux, step
        return extra

    def loss(self, params: Params, extra: Any, batch: Batch, rng: jax.Array | None, step: jax.Array) -> LossOutput:
        """Terms ``image_loss`` (squared error per pixel value) and ``text_loss`` (nats per token)."""
        del extra, step
        batch = self._asked(batch, rng)
        restored = self._restore(params, batch, rng, features_of=("text",))
        losses: dict[str, tuple[jax.Array, jax.Array]] = {}
        metrics: Terms = {}
        for name, target in self.targets(batch).items():
            valid = batch["groups"][name]["target"]["valid"]
            if name == "image":
                error = jnp.mean(jnp.square(restored[name] - target), axis=-1)
                losses["image_loss"] = _per_example(error, valid, "example")
            else:
                head, blocks = params["text_output"]["output"], self._config.loss.vocabulary_blocks
                words = cross_entropy(restored[name], head["kernel"], head["bias"], target, blocks)
                losses["text_loss"] = _per_example(words.loss, valid, self._config.loss.text_average)
                metrics["text_accuracy"] = _sum(_per_example(words.correct, valid, "token"))
        return LossOutput({name: _sum(loss) for name, loss in losses.items()}, metrics, per_example=losses)

    def targets(self, batch: Batch) -> dict[str, jax.Array]:
        """`image`: `[B, K, P] float32` in the loss's pixel space; `text`: `[B, K] int32`."""
        values = {name: group["target"]["value"] for name, group in batch["groups"].items()}
        if "image" in values:
            values["image"] = normalize_pixels(values["image"], self._config)
            if self._config.loss.normalize_patches:
                values["image"] = normalize_patches(values["image"])
        return values

    def reconstruct(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """`image`: `[B, K, P]` in the loss's pixel space; `text`: logits `[B, K, vocabulary]`; float32."""
        return self._restore(params, batch, None)

    def encode(self, params: Params, batch: Batch, rng: jax.Array | None = None) -> dict[str, jax.Array]:
        """``{"cls": [B, D], "image": [B, V, D], "text": [B, V, D]}`` of what is visible."""
        encoded: Any = self.model.apply(
            {"params": params},
            self._visible(batch),
            deterministic=rng is None,
            rngs={} if rng is None else {"dropout": rng},
            method=MaskedAutoencoder.encode,
        )
        return {"cls": encoded.cls, **encoded.tokens}

    def attention(self, params: Params, batch: Batch, layer: int = -1) -> dict[str, dict[str, jax.Array]]:
        """See `Objective.attention`; these are the weights whatever ``model.attention`` computes with."""
        visible = self._visible(batch)
        _, found = self.model.apply(
            {"params": params}, visible, method=MaskedAutoencoder.encode, mutable=["intermediates"]
        )
        (maps,) = found["intermediates"]["encoder"]["blocks"]["attention"]["attention"]
        names = ["cls", *(m for m in self.model.options.modalities if m in visible)]
        ends = np.cumsum([1, *(visible[m]["valid"].shape[1] for m in names[1:])])
        part = {name: slice(start, end) for name, start, end in zip(names, [0, *ends[:-1]], ends, strict=True)}
        weights = jnp.mean(maps[layer], axis=1)
        return {asking: {asked: weights[:, part[asking], part[asked]] for asked in names} for asking in names}

    def _restore(
        self, params: Params, batch: Batch, rng: jax.Array | None, features_of: tuple[str, ...] = ()
    ) -> dict[str, jax.Array]:
        target = {name: group["target"] for name, group in batch["groups"].items()}
        rngs = {} if rng is None else {"dropout": rng}
        restored: Any = self.model.apply(
            {"params": params},
            self._visible(batch),
            target,
            features_of=features_of,
            deterministic=rng is None,
            rngs=rngs,
        )
        return restored

    def _asked(self, batch: Batch, rng: jax.Array | None) -> Batch:
        """The batch with as many target patches as a training step restores; without `rng` all of them."""
        share = self._config.model.image_target_share
        if rng is None or share == 1.0 or "image" not in batch["groups"]:
            return batch
        group = batch["groups"]["image"]
        valid = group["target"]["valid"]
        count = max(int(hidden_count(valid.shape[1], share)), 1)
        # Real patches in a random order, then padding.
        draws = jax.random.uniform(jax.random.fold_in(rng, 1), valid.shape) + ~valid
        chosen = jnp.argsort(draws, axis=1)[:, :count]
        target = {
            name: jnp.take_along_axis(x, chosen.reshape(*chosen.shape, *[1] * (x.ndim - 2)), axis=1)
            for name, x in group["target"].items()
        }
        return {**batch, "groups": {**batch["groups"], "image": {**group, "target": target}}}

    def _visible(self, batch: Batch) -> dict[str, dict[str, jax.Array]]:
        visible = {name: dict(group["visible"]) for name, group in batch["groups"].items()}
        if "image" in visible:
            visible["image"]["value"] = normalize_pixels(visible["image"]["value"], self._config)
        return visible


def autoencoder_options(config: ConfigDict, vocab_size: int) -> AutoencoderOptions:
    """The model that a resolved config describes."""
    m = config.model
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(("float32" if on_cpu else "bfloat16") if m.compute_dtype == "auto" else m.compute_dtype)

    def stack(width: int, depth: int, heads: int, cross: bool = False) -> TransformerOptions:
        return TransformerOptions(
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=m.mlp_ratio,
            dropout=m.dropout,
            attention_dropout=m.attention_dropout,
            drop_path=m.drop_path,
            unroll=m.unroll,
            remat=m.remat,
            attention=m.attention,
            attention_head_groups=m.attention_head_groups,
            activation=m.activation,
            epsilon=m.layer_norm_epsilon,
            cross=cross,
            dtype=dtype,
        )

    return AutoencoderOptions(
        encoder=stack(m.width, m.depth, m.heads),
        decoder=stack(m.decoder_width, m.decoder_depth, m.decoder_heads, m.decoder_attention == "cross"),
        modalities=tuple(config.data.modalities),
        grid=grid(config),
        patch_values=3 * config.data.patch_size**2,
        text_tokens=config.data.max_text_tokens,
        vocab_size=vocab_size,
        use_type_embedding=m.use_type_embedding,
        output_head_depth=m.output_head_depth,
        learned_positions=m.image_positions == "learned",
    )


def _channels(values: tuple[float, ...], size: int) -> jax.Array:
    """Per-channel constants for the `size` numbers of a patch, whose last axis is the channel."""
    return jnp.tile(jnp.asarray(values, jnp.float32), size // len(values))


def normalize_pixels(patches: jax.Array, config: ConfigDict) -> jax.Array:
    """`[..., P] uint8` to zero mean and unit variance by the data set's channel statistics (float32).

    Float input is taken as normalised already.
    """
    if jnp.issubdtype(patches.dtype, jnp.floating):
        return patches
    size = patches.shape[-1]
    mean, std = _channels(config.data.image_mean, size), _channels(config.data.image_std, size)
    return (patches.astype(jnp.float32) / 255.0 - mean) / std


def denormalize_pixels(patches: jax.Array, config: ConfigDict) -> jax.Array:
    """Inverse of `normalize_pixels`, to `[..., P] uint8`."""
    size = patches.shape[-1]
    pixels = patches * _channels(config.data.image_std, size) + _channels(config.data.image_mean, size)
    return jnp.round(jnp.clip(pixels, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def patch_statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of each patch, `[..., 1]`; unbiased, 1e-6 under the root as in MAE's code."""
    return jnp.mean(patches, -1, keepdims=True), jnp.sqrt(jnp.var(patches, -1, keepdims=True, ddof=1) + 1e-6)


def normalize_patches(patches: jax.Array) -> jax.Array:
    """Zero mean and unit variance within each patch, `[..., P] float32` (arXiv 2111.06377, section 3)."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def _per_example(values: jax.Array, valid: jax.Array, over: str) -> tuple[jax.Array, jax.Array]:
    """(sum, weight), `[B] float32`, of `[B, K]` values over valid slots.

    ``token``: every valid slot counts the same. ``example``: every example that has one counts the same.
    """
    count = jnp.sum(valid, axis=-1, dtype=jnp.float32)
    total = jnp.sum(jnp.where(valid, values, 0.0), axis=-1, dtype=jnp.float32)
    if over == "token":
        return total, count
    return total / jnp.maximum(count, 1.0), (count > 0).astype(jnp.float32)


def _sum(per_example: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(per_example[0]), jnp.sum(per_example[1])
