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
import flax.struct
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


_LOOKED_AT = {"self": ("self",), "context": ("context",), "both": ("self", "context")}


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
        attends: to what tokens attend: to each other (``self``); to a context (``context``); or to each other and then,
            where there is one, to a context (``both``).
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
    attends: str = "self"
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


@flax.struct.dataclass
class Tap:
    """Attention weights that are looked at, of one layer; and may be moved, for gradients with respect to them.

    Attributes:
        layer: from 0; negative from the end.
        of: ``self`` or ``context``, what the layer attends to there.
        query: the row that is looked at; None: all of them.
        delta: `[B, H, N, M] float32`, added to the weights after the softmax; None: nothing. The gradient of a score
            with respect to it, at 0, is that with respect to the weights.
    """

    layer: int = flax.struct.field(pytree_node=False, default=-1)
    of: str = flax.struct.field(pytree_node=False, default="self")
    query: int | None = flax.struct.field(pytree_node=False, default=None)
    delta: jax.Array | None = None


class Attention(nn.Module):
    """Multi-head attention, of tokens to each other or to a context, in which padding is never a key."""

    options: TransformerOptions

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None,
        valid: jax.Array,
        deterministic: bool,
        tap: Tap | None = None,
        tapped: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Attends.

        Args:
            x: `[B N, D]`.
            context: `[B M, D]`, or None: `x`.
            valid: `[B, M] bool`, of the context's tokens.
            deterministic: without dropout.
            tap: its `query` and `delta`.
            tapped: a bool scalar: whether this is the tap's layer; the weights of another are not moved. None: it is.

        Returns:
            `[B N, D]`; with a tap its weights `[B, H, N or 1, M] float32`.
        """
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
        draws = o.attention_dropout > 0.0 and not deterministic
        rng = self.make_rng("dropout") if draws else None
        causal = o.causal and context is None
        weights = None if tap is None else attention.weights(query, key, valid, causal)
        if tap is not None and weights is not None and tap.delta is not None:
            weights = weights + (tap.delta if tapped is None else jnp.where(tapped, tap.delta, 0.0))
            mixed = attention.mix(weights, value, o.attention_dropout, rng)
        else:
            mixed = attention.attend(
                query,
                key,
                value,
                valid,
                causal=causal,
                kernel=o.attention,
                head_groups=o.attention_head_groups,
                dropout=o.attention_dropout,
                rng=rng,
            )
        mixed = jnp.swapaxes(mixed, 1, 2)
        out = heads_product((o.width,), (-2, -1), ("heads", "head_dim", "embed"), o.dtype, "out")
        if tap is not None and weights is not None and tap.query is not None:
            weights = weights[:, :, tap.query, None]
        return out(mixed.reshape(-1, o.heads, head_dim)), weights


class Block(nn.Module):
    """Attention (to the tokens, a context, or both) and MLP, each with a LayerNorm and a residual.

    A context has been normalised before.
    """

    options: TransformerOptions

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, jax.Array | None],
        of_layer: tuple[jax.Array, jax.Array],
        context: jax.Array | None,
        valid: jax.Array,
        context_valid: jax.Array | None,
        tap: Tap | None,
        deterministic: bool,
    ) -> tuple[tuple[jax.Array, jax.Array | None], None]:
        """One layer, as a scan's (carry, None).

        Args:
            carry: `[B N, D]`, and what the tap has seen, if there is one.
            of_layer: its rate of drop path and its number, scalars.
            context: `[B M, D]`, or None.
            valid: `[B, N] bool`, of the tokens.
            context_valid: `[B, M] bool`, of the context's.
            tap: of which layer the weights are looked at; `layer` from 0.
            deterministic: without dropout.
        """
        o = self.options
        (x, seen), (drop_path, number) = carry, of_layer
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

        def attending(name: str, context: jax.Array | None, valid: jax.Array) -> Callable[[jax.Array], jax.Array]:
            attend = Attention(o, name=name)

            def branch(x: jax.Array) -> jax.Array:
                nonlocal seen
                if tap is None or tap.of != ("self" if context is None else "context"):
                    return attend(x, context, valid, deterministic)[0]
                here = number == tap.layer
                mixed, weights = attend(x, context, valid, deterministic, tap, here)
                assert seen is not None and weights is not None
                seen = jnp.where(here, weights, seen)
                return mixed

            return branch

        def mlp(x: jax.Array) -> jax.Array:
            hidden = dense(int(o.width * o.mlp_ratio), ("embed", "mlp"), o.dtype, "mlp_in")(x)
            hidden = constrain(hidden, "batch", "mlp")
            hidden = drop(ACTIVATIONS[o.activation](hidden), o.dropout, self, deterministic)
            return dense(o.width, ("mlp", "embed"), o.dtype, "mlp_out")(hidden)

        norm = functools.partial(layer_norm, o.epsilon, o.dtype)
        if o.attends == "context":
            assert context is not None and context_valid is not None
            x = sublayer(x, norm("norm_attention"), attending("attention", context, context_valid))
        else:
            x = sublayer(x, norm("norm_attention"), attending("attention", None, valid))
        if o.attends == "both" and context is not None:
            assert context_valid is not None
            x = sublayer(x, norm("norm_cross_attention"), attending("cross_attention", context, context_valid))
        return (sublayer(x, norm("norm_mlp"), mlp), seen), None


class Transformer(nn.Module):
    """A stack of blocks and, unless each ends with one, a LayerNorm. Parameters of all layers lie on a leading axis."""

    options: TransformerOptions

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        *,
        context: jax.Array | None = None,
        context_valid: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Runs the stack; as `tapped`, without a tap."""
        return self.tapped(x, valid, None, context=context, context_valid=context_valid, deterministic=deterministic)[0]

    @nn.compact
    def tapped(
        self,
        x: jax.Array,
        valid: jax.Array,
        tap: Tap | None,
        *,
        context: jax.Array | None = None,
        context_valid: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Runs the stack, and looks at the attention of one layer.

        Args:
            x: `[B, N, D]`.
            valid: `[B, N] bool`, True where a token is real.
            tap: what is looked at; None: nothing.
            context: `[B, M, D]`, what each layer's attention reads where it `attends` to a context; it may be left out
                where it attends to ``both``, but not when parameters are made.
            context_valid: `[B, M] bool`, likewise.
            deterministic: False needs a ``dropout`` RNG if any rate is positive.

        Returns:
            `[B, N, D]`, and the tap's weights `[B, H, N or 1, N or M] float32`.
        """
        o = self.options
        needs = o.attends == "context" or (o.attends == "both" and self.is_initializing())
        if (context is None) != (context_valid is None):
            raise ValueError("a context comes with its context_valid")
        if (context is None and needs) or (context is not None and o.attends == "self"):
            raise ValueError(f"a stack that attends to {o.attends} {'needs a' if needs else 'takes no'} context")
        seen = None
        if tap is not None:
            if tap.of not in _LOOKED_AT[o.attends] or (tap.of == "context" and context is None):
                raise ValueError(f"a tap of {tap.of}: the stack attends to {o.attends}")
            if not -o.depth <= tap.layer < o.depth:
                raise ValueError(f"a tap of layer {tap.layer}: the stack has {o.depth}")
            tap = dataclasses.replace(tap, layer=tap.layer % o.depth)
            keys = valid if tap.of == "self" or context_valid is None else context_valid
            rows = x.shape[1] if tap.query is None else 1
            seen = jnp.zeros((x.shape[0], o.heads, rows, keys.shape[1]), jnp.float32)
        block = Block
        if o.remat != "none":
            # In a loop nothing can be shared between the passes, so preventing it would only cost.
            block = nn.remat(Block, policy=REMAT[o.remat], prevent_cse=o.unroll, static_argnums=(7,))
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *[nn.broadcast] * 5),
            length=o.depth,
            unroll=o.depth if o.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        rates = jnp.asarray(np.linspace(0.0, o.drop_path, o.depth), jnp.float32)
        flat_context = None if context is None else context.astype(o.dtype).reshape(-1, o.width)
        start = x.astype(o.dtype).reshape(-1, o.width)
        of_layer = (rates, jnp.arange(o.depth))
        of_all = (flat_context, valid, context_valid, tap, deterministic)
        (flat, seen), _ = stack(o, name="blocks")((start, seen), of_layer, *of_all)
        return (flat if o.post_norm else layer_norm(o.epsilon, o.dtype, "norm")(flat)).reshape(x.shape), seen


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
