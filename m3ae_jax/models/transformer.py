"""Pre-LayerNorm transformer, layers stored stacked, parameters with logical axis names.

Legend: ``B`` batch, ``N`` tokens, ``D`` width, ``H`` heads.

Logical axes: ``layers`` (stacked layers), ``embed`` (D), ``heads``, ``head_dim``, ``mlp``, ``vocab``, ``patch``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class TransformerOptions:
    """Shape and regularisation of one stack.

    Attributes:
        width: channels.
        depth: layers.
        heads: attention heads; divides `width`.
        mlp_ratio: hidden width of the MLP / `width`.
        dropout: rate after the attention's and the MLP's projections.
        attention_dropout: rate on the attention weights.
        drop_path: rate of the last layer's residual branches; earlier layers linearly less, the first 0.
        unroll: compile the layers one by one instead of as a loop.
        dtype: of the matrix products; parameters are float32.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    unroll: bool = False
    dtype: Any = jnp.float32


def named(initializer: Initializer, *axes: str | None) -> Initializer:
    """`initializer` whose parameter carries logical axis names."""
    return nn.with_logical_partitioning(initializer, axes)


def layer_norm(dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with the reference's epsilon; statistics in float32."""
    return nn.LayerNorm(
        epsilon=1e-6,
        dtype=dtype,
        scale_init=named(nn.initializers.ones, "embed"),
        bias_init=named(nn.initializers.zeros, "embed"),
        name=name,
    )


class Linear(nn.Dense):
    """A linear layer over the last axis, as one matrix product over all tokens.

    XLA's CPU back end is slower at the gradient of the same product with the batch and token axes apart;
    elsewhere the reshape costs nothing.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., D]` to `[..., features]`."""
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)


def dense(features: int, axes: tuple[str | None, str | None], dtype: Any, name: str | None = None) -> Linear:
    """A linear layer, Xavier-uniform as the reference's."""
    return Linear(
        features,
        dtype=dtype,
        kernel_init=named(nn.initializers.xavier_uniform(), *axes),
        bias_init=named(nn.initializers.zeros, axes[1]),
        name=name,
    )


def drop(x: jax.Array, rate: float, rng_of: nn.Module, deterministic: bool) -> jax.Array:
    """Dropout; a rate of 0 or determinism adds nothing to the program."""
    if rate == 0.0 or deterministic:
        return x
    keep = jax.random.bernoulli(rng_of.make_rng("dropout"), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


class Attention(nn.Module):
    """Multi-head self-attention in which padding is never a key.

    The weights are sown as ``intermediates/attention`` (`[B, H, N, N] float32`) when that collection is mutable.
    """

    options: TransformerOptions

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, N, D]` to `[B, N, D]`; `valid` is `[B, N] bool`."""
        o = self.options
        head_dim = o.width // o.heads
        batch, tokens, _ = x.shape
        qkv = nn.DenseGeneral(
            (3, o.heads, head_dim),
            dtype=o.dtype,
            kernel_init=named(nn.initializers.xavier_uniform(), "embed", None, "heads", "head_dim"),
            bias_init=named(nn.initializers.zeros, None, "heads", "head_dim"),
            name="qkv",
        )(x.reshape(-1, o.width))  # one product over all tokens: see Linear
        # Heads before tokens: the batched products are then plain (faster on a CPU).
        query, key, value = jnp.transpose(qkv.reshape(batch, tokens, 3, o.heads, head_dim), (2, 0, 3, 1, 4))
        logits = jnp.einsum("bhqd,bhkd->bhqk", query * head_dim**-0.5, key, preferred_element_type=jnp.float32)
        logits = jnp.where(valid[:, None, None, :], logits, -1e7)
        weights = jax.nn.softmax(logits, axis=-1)
        self.sow("intermediates", "attention", weights)
        weights = drop(weights, o.attention_dropout, self, deterministic).astype(o.dtype)
        mixed = jnp.swapaxes(jnp.einsum("bhqk,bhkd->bhqd", weights, value), 1, 2)
        return nn.DenseGeneral(
            o.width,
            axis=(-2, -1),
            dtype=o.dtype,
            kernel_init=named(nn.initializers.xavier_uniform(), "heads", "head_dim", "embed"),
            bias_init=named(nn.initializers.zeros, "embed"),
            name="out",
        )(mixed.reshape(-1, o.heads, head_dim)).reshape(batch, tokens, o.width)


class Block(nn.Module):
    """Pre-LN attention and MLP (tanh-approximated GELU, as the reference), each with a residual."""

    options: TransformerOptions

    @nn.compact
    def __call__(
        self, x: jax.Array, drop_path: jax.Array, valid: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, None]:
        """Maps `[B, N, D]`; `drop_path` is this layer's rate (a scalar). Returns a scan's (carry, None)."""
        o = self.options

        def residual(x: jax.Array, branch: jax.Array) -> jax.Array:
            branch = drop(branch, o.dropout, self, deterministic)
            if o.drop_path > 0.0 and not deterministic:
                keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - drop_path, (x.shape[0], 1, 1))
                branch = jnp.where(keep, branch / (1.0 - drop_path).astype(branch.dtype), 0)
            return x + branch

        x = residual(x, Attention(o, name="attention")(layer_norm(o.dtype, "norm_attention")(x), valid, deterministic))
        hidden = dense(int(o.width * o.mlp_ratio), ("embed", "mlp"), o.dtype, "mlp_in")(
            layer_norm(o.dtype, "norm_mlp")(x)
        )
        hidden = drop(nn.gelu(hidden, approximate=True), o.dropout, self, deterministic)
        return residual(x, dense(o.width, ("mlp", "embed"), o.dtype, "mlp_out")(hidden)), None


class Transformer(nn.Module):
    """A stack of blocks and a final LayerNorm. Parameters of all layers are stacked on a leading axis."""

    options: TransformerOptions

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Runs the stack.

        Args:
            x: `[B, N, D]`.
            valid: `[B, N] bool`, True where a token is real.
            deterministic: False needs a ``dropout`` RNG if any rate is positive.

        Returns:
            `[B, N, D]`.
        """
        o = self.options
        stack = nn.scan(
            Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=o.depth,
            unroll=o.depth if o.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        rates = jnp.asarray(np.linspace(0.0, o.drop_path, o.depth), jnp.float32)
        x, _ = stack(o, name="blocks")(x.astype(o.dtype), rates, valid, deterministic)
        return layer_norm(o.dtype, "norm")(x)


class OutputHead(nn.Module):
    """Logits or pixels of each token: `depth` hidden layers (the reference's output head), then one linear layer.

    ``depth`` 0 is one linear layer; n > 0 is LayerNorm, n x (linear, GELU, LayerNorm; residual from the second on).
    """

    features: int
    depth: int
    axis: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, K, D]` to `[B, K, features] float32`."""
        width = x.shape[-1]
        if self.depth:
            x = layer_norm(self.dtype, "norm_0")(x)
        for layer in range(self.depth):
            hidden = nn.gelu(dense(width, ("embed", "mlp"), self.dtype, f"hidden_{layer}")(x), approximate=True)
            hidden = layer_norm(self.dtype, f"norm_{layer + 1}")(hidden)
            x = x + hidden if layer else hidden
        return dense(self.features, ("embed", self.axis), self.dtype, "output")(x).astype(jnp.float32)
