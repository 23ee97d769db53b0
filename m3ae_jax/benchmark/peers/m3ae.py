"""A training step that computes what the M3AE reference's does, to compare with.

Written anew after its public code, for timing alone: the caption takes its whole text length, one order
of tokens hides the same places in all examples, the decoder and both heads run over all tokens, layers are not stacked,
and a rate of 0 still draws. Legend: ``B`` batch, ``N`` tokens, ``L`` patches, ``T`` text length.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from m3ae_jax.benchmark.peer import Needs
from m3ae_jax.models.embeddings import sincos_1d, sincos_2d
from m3ae_jax.train.setup import BERT_VOCABULARY

_CHAIN = optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(1e-4, 0.9, 0.95, weight_decay=0.05))
_XAVIER, _SMALL = nn.initializers.xavier_uniform(), nn.initializers.normal(0.02)


class Step:
    """Its step; see `peer.Peer`.

    Attributes:
        text_tokens: slots of a caption; the reference's default for pairs.
    """

    needs = Needs("m3ae", ("image", "text"), "pictures with captions alone; take --config=base")
    text_tokens = 64

    def __init__(self, config: ConfigDict, caption_tokens: float) -> None:
        text_tokens = self.text_tokens
        self.name = f"the M3AE reference's step at text length {text_tokens}, float32"
        data = config.data
        self._module, self._text_weight = _Model(config, text_tokens), config.m3ae.text_weight
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

    def init(self) -> Any:
        """Its parameters."""
        rngs = {"params": jax.random.key(0), "noise": jax.random.key(1)}
        return jax.jit(lambda batch: self._module.init(rngs, **batch)["params"])(self.batch)

    def loss(self, params: Any, noise: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Its loss of a batch, and the share of hidden words that it has right."""
        outputs: Any = self._module.apply({"params": params}, rngs={"noise": noise}, **batch)
        pixels, logits, image_hidden, text_hidden = outputs
        image = batch["image"]
        centred = image - image.mean(-1, keepdims=True)
        target = centred / jnp.sqrt(image.var(-1, keepdims=True) + 1e-6)
        error = jnp.mean(jnp.square(target - pixels), -1)
        image_loss = jnp.mean(jnp.where(image_hidden, error, 0.0).sum(-1) / image_hidden.sum(-1))
        targets = text_hidden & ~batch["padding"]
        words = optax.softmax_cross_entropy_with_integer_labels(logits, batch["text"])
        count = jnp.maximum(targets.sum(-1), 1e-5)
        text_loss = jnp.mean(jnp.where(targets, words, 0.0).sum(-1) / count)
        correct = targets & (jnp.argmax(logits, -1) == batch["text"])
        return image_loss + self._text_weight * text_loss, jnp.mean(correct.sum(-1) / count)

    @functools.cached_property
    def _state(self) -> list[Any]:
        params = self.init()
        return [params, jax.jit(_CHAIN.init)(params), jax.random.key(2)]

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2, 3))
    def _step(self, params: Any, moments: Any, key: jax.Array, batch: Any) -> tuple[Any, ...]:
        key, noise = jax.random.split(key)
        metrics, grads = jax.value_and_grad(self.loss, has_aux=True)(params, noise, batch)
        updates, moments = _CHAIN.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, key, metrics

    def run(self, steps: int) -> None:
        """Runs steps to their end."""
        metrics = None
        for _ in range(steps):
            *self._state, metrics = self._step(*self._state, self.batch)
        jax.block_until_ready(metrics)

    def peak_bytes(self) -> int | None:
        """Not known apart from this project's own, which runs on the same device."""
        return None


class _Model(nn.Module):
    config: ConfigDict
    text_tokens: int

    @nn.compact
    def __call__(self, image: jax.Array, text: jax.Array, padding: jax.Array) -> tuple[jax.Array, ...]:
        m, own, (batch, patches, values) = self.config.model, self.config.m3ae, image.shape
        embedding = nn.Embed(BERT_VOCABULARY, m.width, embedding_init=nn.initializers.normal(1.0))
        embedded = {"image": _dense(m.width)(image), "text": embedding(text)}
        parts = [jnp.broadcast_to(self._vector("cls", m.width), (batch, 1, m.width))]
        orders, hidden = {}, {}
        for name, tokens in embedded.items():
            tokens = tokens + self._table(name, m.width) + self._vector(f"{name}_type", m.width)
            visible, orders[name], hidden[name] = self._hide(tokens, own[f"{name}_mask_ratio"])
            parts.append(visible)
        ends = [1, 1 + parts[1].shape[1]]  # of CLS and of the visible patches
        nothing, visible_padding = jnp.zeros((batch, ends[1]), bool), padding[:, orders["text"][: parts[2].shape[1]]]
        encoder_padding = jnp.concatenate([nothing, visible_padding], 1)
        x = self._stack(jnp.concatenate(parts, 1), encoder_padding, m.width, m.depth, m.heads)

        width = own.decoder_width
        cls, *encoded = jnp.split(_dense(width)(x), ends, axis=1)
        parts = [cls]
        for (name, order), visible in zip(orders.items(), encoded, strict=True):
            masks = jnp.broadcast_to(self._vector(f"{name}_mask", width), (batch, len(order) - visible.shape[1], width))
            whole = jnp.concatenate([visible, masks], 1)[:, jnp.argsort(order)]
            parts.append(whole + self._table(name, width) + self._vector(f"{name}_decoder_type", width))
        padding = jnp.concatenate([jnp.zeros((batch, 1 + patches), bool), padding], 1)
        x = self._stack(jnp.concatenate(parts, 1), padding, width, own.decoder_depth, own.decoder_heads)
        _, pixels, words = jnp.split(x, [1, 1 + patches], axis=1)
        return _dense(values)(pixels), _dense(BERT_VOCABULARY)(words), hidden["image"], hidden["text"]

    def _vector(self, name: str, width: int) -> jax.Array:
        return self.param(name, _SMALL, (1, 1, width))

    def _table(self, name: str, width: int) -> np.ndarray:
        side = self.config.data.image_size // self.config.data.patch_size
        return sincos_2d(width, (side, side)) if name == "image" else sincos_1d(width, np.arange(self.text_tokens))

    def _hide(self, x: jax.Array, ratio: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What stays, the order of all tokens (those that stay come first), and which are hidden `[B, N] bool`."""
        order = jnp.argsort(jax.random.uniform(self.make_rng("noise"), (x.shape[1],)))
        count = int(x.shape[1] * (1 - ratio))
        hidden = jnp.broadcast_to((jnp.arange(x.shape[1]) >= count)[jnp.argsort(order)], x.shape[:2])
        return x[:, order[:count]], order, hidden

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
