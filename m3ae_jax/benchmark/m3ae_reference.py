"""A training step that computes what the M3AE reference's does, to compare with.

Written anew after its public code, for timing alone: the caption takes its whole text length, one order
of tokens hides the same places in all examples, the decoder and both heads run over all tokens, layers are not stacked,
and a rate of 0 still draws. Legend: ``B`` batch, ``N`` tokens, ``L`` patches, ``T`` text length.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from m3ae_jax.errors import UserError
from m3ae_jax.models.embeddings import sincos_1d, sincos_2d
from m3ae_jax.train.setup import BERT_VOCABULARY

TEXT_TOKENS = 64
"""Of a caption: the reference's default for pairs."""

_XAVIER, _SMALL = nn.initializers.xavier_uniform(), nn.initializers.normal(0.02)


class M3AEReference:
    """As `benchmark.vit_mae.ViTMAE`: its `name`, and steps to `run`.

    Args:
        config: resolved; of pictures and captions.
        caption_tokens: mean length of a caption.
        text_tokens: slots of a caption.

    Raises:
        UserError: the config is of other modalities.
    """

    def __init__(self, config: ConfigDict, caption_tokens: float, text_tokens: int = TEXT_TOKENS) -> None:
        if tuple(config.data.modalities) != ("image", "text"):
            raise UserError(
                f"--against=m3ae with data.modalities={tuple(config.data.modalities)!r}: it knows pictures with "
                "captions alone; take configs/base.py"
            )
        self.name = f"the M3AE reference's step at text length {text_tokens}, float32"
        data = config.data
        module = _Model(config, text_tokens)
        self.loss = _loss(module, config.loss.text_weight)
        side, patch, size = data.image_size // data.patch_size, 3 * data.patch_size**2, config.batch_size
        rng = np.random.default_rng(0)
        length = np.clip(rng.poisson(caption_tokens, size), 1, min(data.max_text_tokens, text_tokens))
        self.batch = jax.device_put(
            {
                "image": rng.standard_normal((size, side**2, patch)).astype(np.float32),
                "text": rng.integers(0, BERT_VOCABULARY, (size, text_tokens)).astype(np.int32),
                "padding": np.arange(text_tokens) >= length[:, None],
            }
        )
        self._module = module
        self._step: Any = None
        self._state: Any = None

    def init(self) -> Any:
        """Its parameters."""
        rngs = {"params": jax.random.key(0), "noise": jax.random.key(1)}
        return jax.jit(lambda batch: self._module.init(rngs, **batch)["params"])(self.batch)

    def run(self, steps: int) -> None:
        """Runs steps to their end."""
        if self._step is None:
            chain = optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(1e-4, 0.9, 0.95, weight_decay=0.05))

            def step(params: Any, moments: Any, key: jax.Array, batch: Any) -> tuple[Any, ...]:
                key, noise = jax.random.split(key)
                (loss, accuracy), grads = jax.value_and_grad(self.loss, has_aux=True)(params, noise, batch)
                updates, moments = chain.update(grads, moments, params)
                return optax.apply_updates(params, updates), moments, key, (loss, accuracy)

            params = self.init()
            self._state = params, jax.jit(chain.init)(params), jax.random.key(2)
            self._step = jax.jit(step, donate_argnums=(0, 1, 2))
        said = None
        for _ in range(steps):
            *self._state, said = self._step(*self._state, self.batch)
        jax.block_until_ready(said)

    def peak_bytes(self) -> int | None:
        """Not told apart from this project's own, which runs on the same device."""
        return None


def _loss(module: _Model, text_weight: float) -> Any:
    def loss(params: Any, noise: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
        found: Any = module.apply({"params": params}, rngs={"noise": noise}, **batch)
        pixels, logits, image_hidden, text_hidden = found
        image = batch["image"]
        centred = image - image.mean(-1, keepdims=True)
        target = centred / jnp.sqrt(image.var(-1, keepdims=True) + 1e-6)
        error = jnp.mean(jnp.square(target - pixels), -1)
        of_image = jnp.mean(jnp.where(image_hidden, error, 0.0).sum(-1) / image_hidden.sum(-1))
        asked = text_hidden & ~batch["padding"]
        words = optax.softmax_cross_entropy_with_integer_labels(logits, batch["text"])
        count = jnp.maximum(asked.sum(-1), 1e-5)
        of_text = jnp.mean(jnp.where(asked, words, 0.0).sum(-1) / count)
        right = asked & (jnp.argmax(logits, -1) == batch["text"])
        return of_image + text_weight * of_text, jnp.mean(right.sum(-1) / count)

    return loss


class _Model(nn.Module):
    config: ConfigDict
    text_tokens: int

    @nn.compact
    def __call__(self, image: jax.Array, text: jax.Array, padding: jax.Array) -> tuple[jax.Array, ...]:
        m, batch = self.config.model, image.shape[0]
        side = self.config.data.image_size // self.config.data.patch_size

        def vector(name: str, width: int) -> jax.Array:
            return self.param(name, _SMALL, (1, 1, width))

        def tables(width: int) -> tuple[np.ndarray, np.ndarray]:
            return sincos_2d(width, (side, side)), sincos_1d(width, np.arange(self.text_tokens))

        patches, words = tables(m.width)
        embedded = _dense(m.width)(image) + patches + vector("image_type", m.width)
        seen, image_order, image_hidden = self._hide(embedded, m.image_mask_ratio)
        embedding = nn.Embed(BERT_VOCABULARY, m.width, embedding_init=nn.initializers.normal(1.0))
        read = embedding(text) + words + vector("text_type", m.width)
        kept, text_order, text_hidden = self._hide(read, m.text_mask_ratio)
        kept_padding = padding[:, text_order[: kept.shape[1]]]
        cls = jnp.broadcast_to(vector("cls", m.width), (batch, 1, m.width))
        nothing = jnp.zeros((batch, 1 + seen.shape[1]), bool)
        x = jnp.concatenate([cls, seen, kept], 1)
        x = self._stack(x, jnp.concatenate([nothing, kept_padding], 1), m.width, m.depth, m.heads)

        project, (patches, words) = _dense(m.decoder_width), tables(m.decoder_width)
        x = project(x)
        cls, seen, kept = jnp.split(x, [1, 1 + seen.shape[1]], axis=1)

        def restored(name: str, part: jax.Array, order: jax.Array, table: np.ndarray) -> jax.Array:
            masks = jnp.broadcast_to(
                vector(f"{name}_mask", m.decoder_width), (batch, table.shape[0] - part.shape[1], m.decoder_width)
            )
            whole = jnp.concatenate([part, masks], 1)[:, jnp.argsort(order)]
            return whole + table + vector(f"{name}_decoder_type", m.decoder_width)

        pixels, spelt = restored("image", seen, image_order, patches), restored("text", kept, text_order, words)
        hidden = jnp.concatenate([jnp.zeros((batch, 1 + pixels.shape[1]), bool), padding], 1)
        x = jnp.concatenate([cls, pixels, spelt], 1)
        x = self._stack(x, hidden, m.decoder_width, m.decoder_depth, m.decoder_heads)
        _, pixels, spelt = jnp.split(x, [1, 1 + pixels.shape[1]], axis=1)
        return _dense(image.shape[-1])(pixels), _dense(BERT_VOCABULARY)(spelt), image_hidden, text_hidden

    def _hide(self, x: jax.Array, ratio: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What stays, the order of all tokens (those that stay come first), and which are hidden `[B, N] bool`."""
        order = jnp.argsort(jax.random.uniform(self.make_rng("noise"), (x.shape[1],)))
        keep = int(x.shape[1] * (1 - ratio))
        hidden = jnp.broadcast_to((jnp.arange(x.shape[1]) >= keep)[jnp.argsort(order)], x.shape[:2])
        return x[:, order[:keep]], order, hidden

    def _drop_path(self, x: jax.Array) -> jax.Array:
        drawn = jax.random.uniform(self.make_rng("noise"), (x.shape[0], 1, 1))
        return x * jnp.floor(1.0 + drawn)

    def _stack(self, x: jax.Array, padding: jax.Array, width: int, depth: int, heads: int) -> jax.Array:
        batch, count, _ = x.shape
        for _ in range(depth):
            qkv = _dense(3 * width)(nn.LayerNorm()(x)).reshape(batch, count, 3, heads, -1)
            query, key, value = jnp.transpose(qkv, (2, 0, 3, 1, 4))
            logits = query @ jnp.swapaxes(key, -2, -1) * query.shape[-1] ** -0.5
            weights = jax.nn.softmax(jnp.where(padding[:, None, None], -1e7, logits), -1)
            mixed = jnp.swapaxes(weights @ value, 1, 2).reshape(batch, count, width)
            x = x + self._drop_path(_dense(width)(mixed))
            x = x + self._drop_path(_dense(width)(nn.gelu(_dense(4 * width)(nn.LayerNorm()(x)))))
        return nn.LayerNorm()(x)


def _dense(features: int) -> nn.Dense:
    return nn.Dense(features, kernel_init=_XAVIER)
