"""Our own parameter tree: the one place where conversion names its paths.

Each line is a layer or a single parameter, by the role under which the formats' tables name theirs. ``{stack}`` is
``encoder`` or ``decoder``, of two towers ``image`` or ``text``; ``{modality}`` is ``image`` or ``text``, ``{place}``
is where a stack has the embeddings of a modality, and ``{k}`` is the number of a hidden layer of an output head. The
blocks of a stack lie stacked along a leading axis.
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
    "cls": Layer("encoder/cls_token"),
    "image": Layer("encoder/image/embedding", "patches"),
    "text": Layer("encoder/text/embedding/embedding"),
    "positions": Layer("encoder/image/position_embedding"),
    "type": Layer("{place}/type_embedding"),
    "norm1": Layer("{stack}/transformer/blocks/norm_attention", "norm"),
    "qkv": Layer("{stack}/transformer/blocks/attention/qkv", "linear"),
    "proj": Layer("{stack}/transformer/blocks/attention/out", "from_heads"),
    "norm2": Layer("{stack}/transformer/blocks/norm_mlp", "norm"),
    "fc1": Layer("{stack}/transformer/blocks/mlp_in", "linear"),
    "fc2": Layer("{stack}/transformer/blocks/mlp_out", "linear"),
    "encoder_norm": Layer("encoder/transformer/norm", "norm"),
    "projection": Layer("decoder/projection", "linear"),
    "mask": Layer("decoder/{modality}_masks/mask_embedding"),
    "decoder_norm": Layer("decoder/transformer/norm", "norm"),
    "head": Layer("decoder/{modality}_output/output", "linear"),
    "head_hidden": Layer("decoder/{modality}_output/hidden_{k}", "linear"),
    "head_norm": Layer("decoder/{modality}_output/norm_{k}", "norm"),
    "tower_cls": Layer("{stack}/cls_token"),
    "tower_other": Layer("{stack}/other_token"),
    "tower_patches": Layer("{stack}/image/embedding", "patches"),
    "tower_first": Layer("{stack}/first_place"),
    "tower_mask": Layer("{stack}/{modality}/mask_embedding"),
    "tower_words": Layer("{stack}/text/embedding/embedding"),
    "tower_positions": Layer("{stack}/{modality}/position_embedding"),
    "tower_norm0": Layer("{stack}/embedding_norm", "norm"),
    "tower_norm": Layer("{stack}/transformer/norm", "norm"),
    "tower_projection": Layer("{stack}/projection", "linear"),
    "cross_norm": Layer("{stack}/transformer/blocks/norm_cross_attention", "norm"),
    "cross_query": Layer("{stack}/transformer/blocks/cross_attention/query", "linear"),
    "cross_key_value": Layer("{stack}/transformer/blocks/cross_attention/key_value", "linear"),
    "cross_proj": Layer("{stack}/transformer/blocks/cross_attention/out", "from_heads"),
    "lower_norm1": Layer("{stack}/lower/blocks/norm_attention", "norm"),
    "lower_qkv": Layer("{stack}/lower/blocks/attention/qkv", "linear"),
    "lower_proj": Layer("{stack}/lower/blocks/attention/out", "from_heads"),
    "lower_norm2": Layer("{stack}/lower/blocks/norm_mlp", "norm"),
    "lower_fc1": Layer("{stack}/lower/blocks/mlp_in", "linear"),
    "lower_fc2": Layer("{stack}/lower/blocks/mlp_out", "linear"),
    "match": Layer("heads/match", "linear"),
    "words_hidden": Layer("heads/words/hidden", "linear"),
    "words_norm": Layer("heads/words/norm", "norm"),
    "words_bias": Layer("heads/words/bias"),
    "keywords": Layer("heads/keywords", "linear"),
    "pool_query": Layer("{stack}/pool/query"),
    "pool_q": Layer("{stack}/pool/attention/query", "linear"),
    "pool_kv": Layer("{stack}/pool/attention/key_value", "linear"),
    "pool_out": Layer("{stack}/pool/attention/out", "from_heads"),
    "pool_norm": Layer("{stack}/pool/norm_mlp", "norm"),
    "pool_fc1": Layer("{stack}/pool/mlp_in", "linear"),
    "pool_fc2": Layer("{stack}/pool/mlp_out", "linear"),
    "scale": Layer("contrast/scale"),
    "bias": Layer("contrast/bias"),
}
"""Our layers by role."""

TEXT_TABLE = "text/embedding/embedding"
"""How the path of a table of words ends, whatever has it."""

DECODER = "decoder/"
"""How the paths of the parameters begin that only the decoder has."""

DECODER_STACK = "decoder/transformer/"
"""How the paths of the decoder's blocks and of its last norm begin."""

VOCABULARY = ("encoder/text/embedding", "decoder/text_output")
"""How the paths of the parameters begin that have an axis of the vocabulary."""


def path(role: str, **fields: str | int) -> str:
    """The path of a role, for a ``stack``, a ``modality`` and a ``k``."""
    stack, modality = fields.get("stack"), fields.get("modality")
    place = f"encoder/{modality}" if stack == "encoder" else f"decoder/{modality}_masks"
    return LAYERS[role].path.format(place=place, **fields)


def field(stack: str, name: str) -> str:
    """The field of the config of a stack's ``width``, ``depth`` or ``heads``."""
    return f"model.{name}" if stack == "encoder" else f"m3ae.decoder_{name}"


def size(config: ConfigDict, stack: str, name: str) -> Any:
    """The value of that field."""
    group, _, last = field(stack, name).partition(".")
    return config[group][last]
