"""Our own parameter tree: the one place where conversion names its paths.

Each line is a layer or a single parameter, by the role under which the formats' tables name theirs. ``{stack}`` is
``encoder`` or ``decoder``, ``{modality}`` is ``image`` or ``text``, and ``{k}`` is the number of a hidden layer of an
output head. The blocks of a stack lie stacked along a leading axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Layer(NamedTuple):
    """One line of the tree.

    Attributes:
        path: ours.
        kind: which parameters the layer has and how they lie in memory, a key of `keymap.Kinds`.
    """

    path: str
    kind: str = "plain"


LAYERS = {
    "cls": Layer("cls_token"),
    "image": Layer("image_embedding", "patches"),
    "text": Layer("text_embedding/embedding"),
    "positions": Layer("image_position_embedding"),
    "type": Layer("{modality}_{stack}_type_embedding"),
    "norm1": Layer("{stack}/blocks/norm_attention", "norm"),
    "qkv": Layer("{stack}/blocks/attention/qkv", "linear"),
    "proj": Layer("{stack}/blocks/attention/out", "from_heads"),
    "norm2": Layer("{stack}/blocks/norm_mlp", "norm"),
    "fc1": Layer("{stack}/blocks/mlp_in", "linear"),
    "fc2": Layer("{stack}/blocks/mlp_out", "linear"),
    "encoder_norm": Layer("encoder/norm", "norm"),
    "projection": Layer("decoder_projection", "linear"),
    "mask": Layer("{modality}_mask_embedding"),
    "decoder_norm": Layer("decoder/norm", "norm"),
    "head": Layer("{modality}_output/output", "linear"),
    "head_hidden": Layer("{modality}_output/hidden_{k}", "linear"),
    "head_norm": Layer("{modality}_output/norm_{k}", "norm"),
}
"""Our layers by role."""

DECODER = ("decoder", "image_output", "text_output", "image_mask", "text_mask", "image_decoder", "text_decoder")
"""How the paths of the parameters begin that only the decoder has."""

DECODER_STACK = "decoder/"
"""How the paths of the decoder's blocks and of its last norm begin."""

VOCABULARY = ("text_embedding", "text_output")
"""How the paths of the parameters begin that have an axis of the vocabulary."""


def path(role: str, **fields: str | int) -> str:
    """The path of a role, for a ``stack``, a ``modality`` and a ``k``."""
    return LAYERS[role].path.format(**fields)


def field(stack: str, name: str) -> str:
    """The field of ``config.model`` of a stack's ``width``, ``depth`` or ``heads``."""
    return name if stack == "encoder" else f"decoder_{name}"


def size(config: ConfigDict, stack: str, name: str) -> Any:
    """The value of that field."""
    return config.model[field(stack, name)]
