"""The M3AE release (young-geng/m3ae_public): its checkpoint ``model.pkl``, and its parameters alone.

The checkpoint also pickles the optimizer, as code; `unpickle` reads past that.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.config import CC12M_MEAN, CC12M_STD
from m3ae_jax.convert import formats, unpickle
from m3ae_jax.convert.formats import IMAGENET_MEAN, IMAGENET_STD, TANH, Foreign, Format, need
from m3ae_jax.convert.keymap import FLAX_FROM_HEADS, FLAX_LINEAR, FLAX_NORM, KeyMap, Part, Report
from m3ae_jax.errors import UserError

_STACK = (
    Part("{stack}/Block_{n}/LayerNorm_0", "{stack}/blocks/norm_attention", FLAX_NORM),
    Part("{stack}/Block_{n}/Attention_0/Dense_0", "{stack}/blocks/attention/qkv", FLAX_LINEAR),
    Part("{stack}/Block_{n}/Attention_0/Dense_1", "{stack}/blocks/attention/out", FLAX_FROM_HEADS),
    Part("{stack}/Block_{n}/LayerNorm_1", "{stack}/blocks/norm_mlp", FLAX_NORM),
    Part("{stack}/Block_{n}/TransformerMLP_0/fc1", "{stack}/blocks/mlp_in", FLAX_LINEAR),
    Part("{stack}/Block_{n}/TransformerMLP_0/fc2", "{stack}/blocks/mlp_out", FLAX_LINEAR),
    Part("{stack}/LayerNorm_0", "{stack}/norm", FLAX_NORM),
)
_MODALITY = (
    Part("encoder_{modality}_type_embedding", "{modality}_encoder_type_embedding"),
    Part("decoder_{modality}_type_embedding", "{modality}_decoder_type_embedding"),
    Part("{modality}_mask_embedding", "{modality}_mask_embedding"),
)
_REST = (
    Part("cls_token", "cls_token"),
    Part("image_embedding", "image_embedding", FLAX_LINEAR),
    Part("text_embedding/embedding", "text_embedding/embedding"),
    Part("decoder_input_projection", "decoder_projection", FLAX_LINEAR),
)
_NORMALIZATIONS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "cc12m": (CC12M_MEAN, CC12M_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def _named(part: Part, **names: str) -> Part:
    def put(text: str) -> str:
        for name, value in names.items():
            text = text.replace("{" + name + "}", value)
        return text

    return part._replace(theirs=put(part.theirs), ours=put(part.ours))


def key_map(config: ConfigDict, ours: Mapping[str, np.ndarray]) -> KeyMap:
    """Theirs to ours."""
    del ours
    depth = config.model.output_head_depth
    heads = [Part("decoder_{modality}_output/Dense_" + str(depth), "{modality}_output/output", FLAX_LINEAR)]
    for k in range(depth):
        heads.append(Part(f"decoder_{{modality}}_output/Dense_{k}", f"{{modality}}_output/hidden_{k}", FLAX_LINEAR))
    for k in range(depth + 1 if depth else 0):
        heads.append(Part(f"decoder_{{modality}}_output/LayerNorm_{k}", f"{{modality}}_output/norm_{k}", FLAX_NORM))
    return (
        *_REST,
        *(_named(part, stack=stack) for stack in ("encoder", "decoder") for part in _STACK),
        *(_named(part, modality=m) for m in ("image", "text") for part in (*_MODALITY, *heads)),
    )


def read(path: Path) -> Foreign:
    """A pickle, or the parameters as an ``.npz``.

    Raises:
        UserError: it holds no such parameters.
    """
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as stored:
                return _without_prefix({name: stored[name] for name in stored.files}, {})
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read as .npz: {error}") from None
    root = unpickle.fields(unpickle.load(path)) or {}
    state = unpickle.fields(root.get("state")) or root
    variant = unpickle.fields(root.get("variant")) or {}
    return _without_prefix(unpickle.arrays(state.get("params", state)), variant)


def _without_prefix(arrays: dict[str, np.ndarray], facts: Mapping[str, Any]) -> Foreign:
    for prefix in ("params/", "base_model/"):  # the second in a fine-tuned checkpoint
        inside = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
        outside = {name: value for name, value in arrays.items() if not name.startswith(prefix)}
        arrays = {**{f"outside/{name}": value for name, value in outside.items()}, **inside} if inside else arrays
    if "cls_token" not in arrays:
        raise UserError(f"it has no M3AE parameters, but {', '.join(sorted(arrays)[:5]) or 'no arrays'}")
    return Foreign(arrays, facts)


def describe(foreign: Foreign, config: ConfigDict, report: Report) -> None:
    """Sets what shapes and, in a full checkpoint, its flags tell."""
    arrays, facts, m = foreign.arrays, foreign.facts, config.model
    fc1 = need(arrays, "encoder/Block_0/TransformerMLP_0/fc1/kernel")
    formats.set_encoder(config, fc1.shape[0], formats.blocks(arrays, "encoder/Block_{n}/"), fc1.shape[1])
    if "decoder_input_projection/kernel" in arrays:
        width = arrays["decoder_input_projection/kernel"].shape[1]
        formats.set_decoder(config, width, formats.blocks(arrays, "decoder/Block_{n}/"))
    if not facts.get("m3ae.model_type", facts.get("mae.model_type", True)):  # else the sizes' table counts, as there
        group = "m3ae." if "m3ae.num_heads" in facts else "mae."
        m.heads, m.decoder_heads = int(facts[group + "num_heads"]), int(facts[group + "dec_num_heads"])
    config.data.modalities = tuple(x for x in ("image", "text") if f"{x}_mask_embedding" in arrays)
    m.use_type_embedding = any(name.endswith("type_embedding") for name in arrays)
    heads = [formats.blocks(arrays, f"decoder_{x}_output/Dense_{{n}}/") for x in config.data.modalities]
    m.output_head_depth = max(0, max(heads, default=1) - 1)
    m.activation, m.layer_norm_epsilon = TANH, 1e-6
    if "image_embedding/kernel" in arrays:
        config.data.patch_size = round((arrays["image_embedding/kernel"].shape[0] / 3) ** 0.5)
    config.data.image_size = int(facts.get("data.image_size", config.data.image_size))
    config.data.max_text_tokens = int(facts.get("data.tokenizer_max_length", config.data.max_text_tokens))
    mean, std = _NORMALIZATIONS[str(facts.get("data.image_normalization", "cc12m"))]
    config.data.image_mean, config.data.image_std = mean, std
    for x in ("image", "text"):
        m[f"{x}_mask_ratio"] = float(facts.get(f"m3ae.{x}_mask_ratio", m[f"{x}_mask_ratio"]))
    report.notes += [
        "GELU by tanh and a LayerNorm epsilon of 1e-6, as here",
        "positions: fixed sin-cos, not in the file; they follow data.image_size and data.max_text_tokens"
        + ("" if facts else ", which the file does not tell"),
        "pixels: normalised by the mean and deviation of "
        + str(facts.get("data.image_normalization", "CC12M, as the file does not tell")),
    ]


def write(path: Path, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """The parameters alone, in plain nested dicts: ``{'params': {...}}``, pickled; or an ``.npz``."""
    formats.note_expressed(config, report, "M3AE", activation=TANH, epsilon=1e-6)
    if config.loss.normalize_patches:
        report.notes.append("DIFFERS: M3AE's pixels are not normalised by patch, this model's are")
    if path.suffix == ".npz":
        np.savez(path, allow_pickle=False, **{f"params/{name}": value for name, value in arrays.items()})
        return
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        *groups, leaf = name.split("/")
        inside = tree
        for group in groups:
            inside = inside.setdefault(group, {})
        inside[leaf] = value
    path.write_bytes(pickle.dumps({"params": tree}, protocol=4))


FORMAT = Format(
    about="M3AE's own checkpoint or parameters: FILE.pkl, FILE.npz",
    read=read,
    describe=describe,
    key_map=key_map,
    write=write,
    beside=((r"outside/.*", "of its classifier"),),
)
