"""The M3AE release (young-geng/m3ae_public): its checkpoint ``model.pkl``, and its parameters alone.

The checkpoint also pickles the optimizer, as code; `unpickle` reads past that.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from m3ae_jax.convert import formats, unpickle
from m3ae_jax.convert.formats import IMAGENET_MEAN, IMAGENET_STD, TANH, Arithmetic, Foreign, Format
from m3ae_jax.convert.keymap import FLAX, Names, Report
from m3ae_jax.data.fields import CC12M_MEAN, CC12M_STD
from m3ae_jax.errors import UserError

NAMES = Names(
    {
        "cls": "cls_token",
        "image": "image_embedding",
        "text": "text_embedding/embedding",
        "type": "{stack}_{modality}_type_embedding",
        "norm1": "{block}/LayerNorm_0",
        "qkv": "{block}/Attention_0/Dense_0",
        "proj": "{block}/Attention_0/Dense_1",
        "norm2": "{block}/LayerNorm_1",
        "fc1": "{block}/TransformerMLP_0/fc1",
        "fc2": "{block}/TransformerMLP_0/fc2",
        "encoder_norm": "encoder/LayerNorm_0",
        "projection": "decoder_input_projection",
        "mask": "{modality}_mask_embedding",
        "decoder_norm": "decoder/LayerNorm_0",
        "head": "decoder_{modality}_output/Dense_{depth}",
        "head_hidden": "decoder_{modality}_output/Dense_{k}",
        "head_norm": "decoder_{modality}_output/LayerNorm_{k}",
    },
    blocks={stack: stack + "/Block_{n}" for stack in ("encoder", "decoder")},
    kinds=FLAX,
    modalities=("image", "text"),
)
_NORMALIZATIONS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "cc12m": (CC12M_MEAN, CC12M_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_ARITHMETIC = Arithmetic(TANH, 1e-6)


def read(path: Path) -> Foreign:
    """A pickle, or the parameters as an ``.npz``.

    Raises:
        UserError: it holds no such parameters.
    """
    if path.suffix == ".npz":
        with formats.reading(path, ".npz"):
            with path.open("rb") as file:
                if not zipfile.is_zipfile(file):
                    raise ValueError("it is no zip file, or cut")
            with np.load(path, allow_pickle=False) as stored:
                return _without_prefix(dict(stored), {})
    root = unpickle.fields(unpickle.load(path)) or {}
    state = unpickle.fields(root.get("state")) or root
    variant = unpickle.plain(root.get("variant"))
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
    """Sets what follows from the names and, in a full checkpoint, from its flags."""
    arrays, facts, m, own = foreign.arrays, foreign.facts, config.model, config.m3ae
    if not facts.get("m3ae.model_type", facts.get("mae.model_type", True)):  # else the sizes' table counts, as there
        group = "m3ae." if "m3ae.num_heads" in facts else "mae."
        m.heads, own.decoder_heads = int(facts[group + "num_heads"]), int(facts[group + "dec_num_heads"])
    config.data.modalities = tuple(x for x in ("image", "text") if f"{x}_mask_embedding" in arrays)
    own.use_type_embedding = any(name.endswith("type_embedding") for name in arrays)
    heads = [formats.blocks(arrays, f"decoder_{x}_output/Dense_{{n}}/") for x in config.data.modalities]
    own.output_head_depth = max(0, max(heads, default=1) - 1)
    m.activation, m.layer_norm_epsilon = _ARITHMETIC
    if "image_embedding/kernel" in arrays:
        config.data.patch_size = round((arrays["image_embedding/kernel"].shape[0] / 3) ** 0.5)
    config.data.image_size = int(facts.get("data.image_size", config.data.image_size))
    config.data.max_text_tokens = int(facts.get("data.tokenizer_max_length", config.data.max_text_tokens))
    normalization = str(facts.get("data.image_normalization", "cc12m"))
    config.data.image_mean, config.data.image_std = _NORMALIZATIONS[normalization]
    for x in ("image", "text"):
        own[f"{x}_mask_ratio"] = float(facts.get(f"m3ae.{x}_mask_ratio", own[f"{x}_mask_ratio"]))
    report.notes += [
        "GELU by tanh and a LayerNorm epsilon of 1e-6, as here",
        "positions: fixed sin-cos, not in the file; they follow data.image_size and data.max_text_tokens"
        + ("" if facts else ", which the file does not tell"),
        "pixels: normalised by the mean and deviation of "
        + str(facts.get("data.image_normalization", "CC12M, as the file does not tell")),
    ]


def write(path: Path, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """The parameters alone, in plain nested dicts: ``{'params': {...}}``, pickled; or an ``.npz``."""
    formats.note_expressed(config, report, "M3AE", _ARITHMETIC)
    if config.m3ae.normalize_patches:
        report.notes.append("DIFFERS: M3AE's pixels are not normalised by patch, this model's are")
    if path.suffix == ".npz":
        # No allow_pickle: older NumPy takes it for one more array.
        named: dict[str, Any] = {f"params/{name}": value for name, value in arrays.items()}
        np.savez(path, **named)
        return
    path.write_bytes(pickle.dumps({"params": unflatten_dict(arrays, sep="/")}, protocol=4))


FORMAT = Format(
    "M3AE's own checkpoint or parameters: FILE.pkl, FILE.npz",
    read,
    describe,
    write,
    NAMES,
    arithmetic=lambda facts: _ARITHMETIC,
    beside=((r"outside/.*", "of its classifier"),),
    endings=(".pkl", ".npz"),
)
