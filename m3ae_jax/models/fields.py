"""The fields of the config that every model reads: its size and regularisation, and how it is computed."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.errors import UserError
from m3ae_jax.models.attention import KERNELS
from m3ae_jax.models.transformer import ACTIVATIONS, REMAT

SIZES: dict[str, tuple[int, int, int]] = {
    # Width, depth and heads of the encoder.
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    # Beyond the paper: encoders of about 1 and 4 billion parameters, heads of 64 channels.
    "giant": (1536, 36, 24),
    "enormous": (2560, 52, 40),
}


class ModelFields(FieldGroup):
    """The shared trunk, an encoder; its regularisation is that of the objective's other stacks too."""

    size: str = setting("base", choices=tuple(SIZES), aliases=("model_size", "preset"))
    """Width, depth and heads of the encoder by name."""
    width: int = setting(0, low=0, aliases=("dim", "embed_dim", "hidden_size", "d_model"))
    """Channels of the encoder; 0: as `size` says."""
    depth: int = setting(0, low=0, aliases=("layers", "num_layers", "n_layers"))
    """Layers of the encoder; 0: as `size` says."""
    heads: int = setting(0, low=0, aliases=("num_heads", "n_heads"))
    """Attention heads of the encoder; 0: as `size` says."""
    mlp_ratio: float = setting(4.0, low=0.01)
    """Hidden width of the MLPs / width."""
    activation: str = setting("gelu_tanh", choices=tuple(ACTIVATIONS))
    """Of the MLPs: gelu_tanh (the reference's approximation), or gelu (by erf, as PyTorch's)."""
    layer_norm_epsilon: float = setting(1e-6, low=1e-15, high=0.1, aliases=("epsilon", "eps", "layer_norm_eps"))
    """Epsilon of the LayerNorms."""
    dropout: float = setting(0.0, low=0.0, high=0.99, aliases=("dropout_rate",))
    """Rate after the projections of attention and MLP."""
    attention_dropout: float = setting(0.0, low=0.0, high=0.99)
    """Rate on the attention weights."""
    drop_path: float = setting(0.0, low=0.0, high=0.99, aliases=("stochastic_depth", "droppath"))
    """Rate of the last layer's residual branches; earlier layers linearly less."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Fills in the encoder's size, and refuses one that cannot be computed."""
        width, depth, heads = encoder_size(config)
        config.model.update(width=width, depth=depth, heads=heads)
        check_stack(config, "model.", width, heads)


def encoder_size(config: ConfigDict) -> tuple[int, int, int]:
    """Width, depth and heads of the encoder; those that are 0 as its size says."""
    m = config.model
    width, depth, heads = SIZES[m.size]
    return m.width or width, m.depth or depth, m.heads or heads


def check_stack(config: ConfigDict, prefix: str, width: int, heads: int) -> None:
    """Refuses a stack of layers whose width, heads and groups of heads do not divide each other.

    Args:
        config: the config.
        prefix: of the fields ``width`` and ``heads``, for the message: ``m3ae.decoder_``.
        width: channels.
        heads: attention heads.

    Raises:
        UserError: as said.
    """
    group, _, last = prefix.rpartition(".")
    own: Any = config.get(group, {})
    # What is 0 is as the encoder's.
    width_at, heads_at = (f"{prefix if own.get(f'{last}{name}', 1) else 'model.'}{name}" for name in ("width", "heads"))
    if heads < 1 or width % heads:
        raise UserError(f"{width_at}={width} is not divisible by {heads_at}={heads}")
    if width % 4:
        raise UserError(f"{width_at}={width} is not divisible by 4, as the 2-D sin-cos positions need")
    groups = config.compute.attention_head_groups
    if heads % groups:
        raise UserError(
            f"{heads_at}={heads} is not divisible by compute.attention_head_groups={groups}; 1 always works"
        )


class ComputeFields(FieldGroup):
    """How a step is computed. But for `dtype` the numbers stay, up to rounding."""

    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16"), aliases=("compute_dtype", "precision"))
    """Of the matrix products; parameters stay float32. auto: bfloat16 on accelerators, float32 on a CPU."""
    attention: str = setting("xla", choices=tuple(KERNELS), program=True, aliases=("attention_kernel",))
    """xla, or a fused kernel: cudnn (NVIDIA GPUs), flash (TPUs)."""
    attention_head_groups: int = setting(1, low=1, program=True)
    """Of xla: in how many groups, one after the other, the heads are computed."""
    remat: str = setting("none", choices=tuple(REMAT), program=True, aliases=("gradient_checkpointing",))
    """What the backward pass computes anew: none, dots (all but products with weights), attention (all but the result
    of attention by head groups), full."""
    unroll: bool = setting(False, program=True, aliases=("scan", "scan_layers"))
    """Compile the layers one by one instead of as a loop; the parameters are the same."""
    vocabulary_blocks: int = setting(1, low=1, high=10_000, program=True)
    """n > 1: logits exist for one of n blocks of words at a time."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Refuses a fused kernel with what it cannot compute."""
        kernel = config.compute.attention
        if kernel != "xla" and (config.model.attention_dropout or config.compute.attention_head_groups > 1):
            raise UserError(
                f"compute.attention={kernel!r} has no dropout and no head groups: set model.attention_dropout=0 "
                "and compute.attention_head_groups=1, or compute.attention=xla"
            )
