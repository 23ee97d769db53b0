"""A transformer, layers stored stacked, parameters with logical axis names; LayerNorm first unless said otherwise.

Legend: ``B`` batch, ``N`` tokens, ``D`` width, ``H`` heads.

Logical axes: ``layers`` (stacked layers), ``embed`` (D), ``heads``, ``head_dim``, ``mlp``, ``vocab``, ``patch``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from ml_collections import ConfigDict

import m3ae_jax.models.attention as attention
from m3ae_jax.models.placement import constrain, gather, splits

Initializer = Callable[..., Any]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "gelu": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}

REMAT: dict[str, Any] = {
    # What a layer keeps for its backward pass besides its input.
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the matrix products with weights
    "attention": jax.checkpoint_policies.save_only_these_names(attention.RESULT),  # what attention by groups gives
    "full": jax.checkpoint_policies.nothing_saveable,
}


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
        remat: what the backward pass computes anew, a key of `REMAT`.
        attention: a key of `attention.KERNELS`.
        attention_head_groups: see `attention.attend`.
        activation: of the MLPs, a key of `ACTIVATIONS`.
        epsilon: of the LayerNorms.
        cross: the tokens attend to a context, not to each other.
        causal: a token attends to itself and those before it alone.
        post_norm: LayerNorm after each residual, as in BERT, instead of before each branch and once at the end.
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
    remat: str = "none"
    attention: str = "xla"
    attention_head_groups: int = 1
    activation: str = "gelu_tanh"
    epsilon: float = 1e-6
    cross: bool = False
    causal: bool = False
    post_norm: bool = False
    dtype: Any = jnp.float32


def stack_options(config: ConfigDict, **changes: Any) -> TransformerOptions:
    """The trunk of a resolved config (``model`` and ``compute``), or a stack with some other `TransformerOptions`."""
    automatic = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    changes["dtype"] = jnp.dtype(automatic if config.compute.dtype == "auto" else config.compute.dtype)
    values = {**config.model, **config.compute, "epsilon": config.model.layer_norm_epsilon, **changes}
    names = [field.name for field in dataclasses.fields(TransformerOptions) if field.name in values]
    return TransformerOptions(**{name: values[name] for name in names})


def named(initializer: Initializer, *axes: str | None) -> Initializer:
    """`initializer` whose parameter carries logical axis names."""
    return nn.with_logical_partitioning(initializer, axes)


def gathered(*axes: str | None) -> Callable[..., Any]:
    """What a flax layer whose kernel has these logical axes takes as its `promote_dtype`: casts, then gathers."""

    def promote(*arrays: Any, **options: Any) -> Any:
        place = 1 if len(arrays) > 1 else 0  # (inputs, kernel, bias), or the table of an embedding
        promoted = list(promote_dtype(*arrays, **options))
        promoted[place] = gather(promoted[place], *axes)
        return promoted

    return promote


def layer_norm(epsilon: float, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm; statistics in float32."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        scale_init=named(nn.initializers.ones, "embed"),
        bias_init=named(nn.initializers.zeros, "embed"),
        name=name,
    )


class Linear(nn.Dense):
    """A linear layer over the last axis, as one matrix product over all tokens.

    XLA's CPU back end is slower at the gradient of the same product with the batch and token axes apart.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., D]` to `[..., features]`."""
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)


def dense(
    features: int, axes: tuple[str | None, str | None], dtype: Any, name: str | None = None, *, bias: bool = True
) -> Linear:
    """A linear layer, Xavier-uniform as the reference's."""
    return Linear(
        features,
        use_bias=bias,
        dtype=dtype,
        kernel_init=named(nn.initializers.xavier_uniform(), *axes),
        bias_init=named(nn.initializers.zeros, axes[1]),
        promote_dtype=gathered(*axes),
        name=name,
    )


def drop(x: jax.Array, rate: float, module: nn.Module, deterministic: bool) -> jax.Array:
    """Dropout by the random numbers of `module`; a rate of 0 or determinism adds nothing to the program."""
    if rate == 0.0 or deterministic:
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def flat_product(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """`jax.lax.dot_general` of rows `[N, ...]` with a kernel `[..., outputs ...]`, as one plain matrix product.

    XLA's CPU back end transposes the kernel of several axes anew for each of its gradient's products. Heads that are
    split over devices cannot be merged with their neighbours.
    """
    (contracted, _), _ = dimension_numbers
    inputs = len(contracted)
    if splits("heads"):
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    rows, outputs = x.shape[0], kernel.shape[inputs:]
    size = math.prod(kernel.shape[:inputs])
    flat = ((1,), (0,)), ((), ())
    product = jax.lax.dot_general(x.reshape(rows, size), kernel.reshape(size, -1), flat, **options)
    return product.reshape(rows, *outputs)


def heads_product(
    features: tuple[int, ...], axis: int | tuple[int, ...], axes: tuple[str | None, ...], dtype: Any, name: str
) -> nn.DenseGeneral:
    """A linear layer to or from heads, Xavier-uniform on the flat (inputs, outputs) shape.

    Args:
        features: output axes.
        axis: input axes.
        axes: logical axes of the kernel, inputs first.
        dtype: of the product.
        name: of the layer.
    """
    return nn.DenseGeneral(
        features,
        axis=axis,
        dtype=dtype,
        kernel_init=named(nn.initializers.xavier_uniform(), *axes),
        promote_dtype=gathered(*axes),
        bias_init=named(nn.initializers.zeros, *axes[-len(features) :]),
        dot_general=flat_product,
        name=name,
    )


class Attention(nn.Module):
    """Multi-head attention, of tokens to each other or to a context, in which padding is never a key.

    The weights are sown as ``intermediates/attention`` (`[B, H, N, M] float32`) when that collection is mutable.
    """

    options: TransformerOptions

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None, valid: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B N, D]` to `[B N, D]`; `context` is `[B M, D]`, or None: `x`; `valid` of its tokens `[B, M] bool`."""
        o = self.options
        head_dim = o.width // o.heads
        batch = valid.shape[0]

        def project(x: jax.Array, parts: int, name: str) -> list[jax.Array]:
            """Of each part `[B, H, N, C]`."""
            axes = ("embed", None, "heads", "head_dim")
            projected = heads_product((parts, o.heads, head_dim), -1, axes, o.dtype, name)(x)
            # Split, as the gradient of slices is a sum of padded ones. Heads before tokens: the batched products are
            # then plain (faster on a CPU).
            split = jax.lax.split(projected, (1,) * parts, axis=1)
            return [jnp.swapaxes(part.reshape(batch, -1, o.heads, head_dim), 1, 2) for part in split]

        if context is None:
            query, key, value = project(x, 3, "qkv")
        else:
            [query], [key, value] = project(x, 1, "query"), project(context, 2, "key_value")
        if self.is_mutable_collection("intermediates"):  # the caller wants the maps
            self.sow("intermediates", "attention", attention.weights(query, key, valid, o.causal))
        draws = o.attention_dropout > 0.0 and not deterministic
        mixed = attention.attend(
            query,
            key,
            value,
            valid,
            causal=o.causal,
            kernel=o.attention,
            head_groups=o.attention_head_groups,
            dropout=o.attention_dropout,
            rng=self.make_rng("dropout") if draws else None,
        )
        mixed = jnp.swapaxes(mixed, 1, 2)
        out = heads_product((o.width,), (-2, -1), ("heads", "head_dim", "embed"), o.dtype, "out")
        return out(mixed.reshape(-1, o.heads, head_dim))


class Block(nn.Module):
    """Attention and MLP, each with a LayerNorm and a residual; a context has been normalised before."""

    options: TransformerOptions

    @nn.compact
    def __call__(
        self, x: jax.Array, drop_path: jax.Array, context: jax.Array | None, valid: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, None]:
        """Maps `[B N, D]`; `drop_path` is this layer's rate (a scalar). Returns a scan's (carry, None).

        `context` and `valid` are as of `Attention`.
        """
        o = self.options
        x = constrain(x, "batch", None)

        def residual(x: jax.Array, branch: jax.Array) -> jax.Array:
            branch = drop(branch, o.dropout, self, deterministic)
            if o.drop_path > 0.0 and not deterministic:
                keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - drop_path, (valid.shape[0], 1))
                keep = jnp.repeat(keep, x.shape[0] // valid.shape[0], axis=0)
                branch = jnp.where(keep, branch / (1.0 - drop_path).astype(branch.dtype), 0)
            return x + branch

        def sublayer(x: jax.Array, norm: nn.LayerNorm, branch: Callable[[jax.Array], jax.Array]) -> jax.Array:
            return norm(residual(x, branch(x))) if o.post_norm else residual(x, branch(norm(x)))

        def mlp(x: jax.Array) -> jax.Array:
            hidden = dense(int(o.width * o.mlp_ratio), ("embed", "mlp"), o.dtype, "mlp_in")(x)
            hidden = constrain(hidden, "batch", "mlp")
            hidden = drop(ACTIVATIONS[o.activation](hidden), o.dropout, self, deterministic)
            return dense(o.width, ("mlp", "embed"), o.dtype, "mlp_out")(hidden)

        attend = Attention(o, name="attention")
        norms = [layer_norm(o.epsilon, o.dtype, name) for name in ("norm_attention", "norm_mlp")]
        x = sublayer(x, norms[0], lambda x: attend(x, context, valid, deterministic))
        return sublayer(x, norms[1], mlp), None


class Transformer(nn.Module):
    """A stack of blocks and, unless each ends with one, a LayerNorm. Parameters of all layers lie on a leading axis."""

    options: TransformerOptions

    @nn.compact
    def __call__(
        self, x: jax.Array, valid: jax.Array, *, context: jax.Array | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Runs the stack.

        Args:
            x: `[B, N, D]`.
            valid: `[B, N] bool`, True where a token is real; with a context `[B, M] bool`, of its tokens.
            context: with ``cross``, and only then: `[B, M, D]`, what each layer's attention reads.
            deterministic: False needs a ``dropout`` RNG if any rate is positive.

        Returns:
            `[B, N, D]`.
        """
        o = self.options
        if (context is not None) != o.cross:
            raise ValueError(f"a stack with cross={o.cross} {'needs a' if o.cross else 'takes no'} context")
        block = Block
        if o.remat != "none":
            # In a loop nothing can be shared between the passes, so preventing it would only cost.
            block = nn.remat(Block, policy=REMAT[o.remat], prevent_cse=o.unroll, static_argnums=(5,))
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=o.depth,
            unroll=o.depth if o.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        rates = jnp.asarray(np.linspace(0.0, o.drop_path, o.depth), jnp.float32)
        flat_context = None if context is None else context.astype(o.dtype).reshape(-1, o.width)
        start = x.astype(o.dtype).reshape(-1, o.width)
        flat, _ = stack(o, name="blocks")(start, rates, flat_context, valid, deterministic)
        return (flat if o.post_norm else layer_norm(o.epsilon, o.dtype, "norm")(flat)).reshape(x.shape)


class OutputHead(nn.Module):
    """Logits or pixels of each token: `depth` hidden layers (the reference's output head), then one linear layer.

    ``depth`` 0 is one linear layer; n > 0 is LayerNorm, n x (linear, GELU, LayerNorm; residual from the second on).
    """

    width: int
    outputs: int
    depth: int
    axis: str
    dtype: Any = jnp.float32
    activation: str = "gelu_tanh"
    epsilon: float = 1e-6

    def setup(self) -> None:
        """Declares the layers."""
        self.norm = [layer_norm(self.epsilon, self.dtype) for _ in range(self.depth + 1 if self.depth else 0)]
        self.hidden = [dense(self.width, ("embed", "mlp"), self.dtype) for _ in range(self.depth)]
        self.output = dense(self.outputs, ("embed", self.axis), self.dtype)

    def features(self, x: jax.Array) -> jax.Array:
        """What the last layer reads, `[B, K, D]`."""
        x = self.norm[0](x) if self.depth else x
        for layer in range(self.depth):
            hidden = self.norm[layer + 1](ACTIVATIONS[self.activation](self.hidden[layer](x)))
            x = x + hidden if layer else hidden
        return x

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, K, D]` to `[B, K, outputs] float32`."""
        return self.output(self.features(x)).astype(jnp.float32)
