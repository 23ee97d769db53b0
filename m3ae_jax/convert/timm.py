"""A ViT of timm, the encoder alone: ``.safetensors`` or ``.pth``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.convert import formats, mae, safetensors
from m3ae_jax.convert.formats import ERF, Foreign, Format
from m3ae_jax.convert.keymap import KeyMap, Report


def key_map(config: ConfigDict, ours: Mapping[str, np.ndarray]) -> KeyMap:
    """Theirs to ours."""
    del config, ours
    return mae.ENCODER


def describe(foreign: Foreign, config: ConfigDict, report: Report) -> None:
    """Sets what the shapes tell; brings into our form what can be."""
    arrays = foreign.arrays
    mae.describe_encoder(arrays, config, report)
    for n in range(config.model.depth):
        _fold_layer_scale(arrays, f"blocks.{n}.ls1.gamma", f"blocks.{n}.attn.proj", report)
        _fold_layer_scale(arrays, f"blocks.{n}.ls2.gamma", f"blocks.{n}.mlp.fc2", report)
        if f"blocks.{n}.attn.qkv.weight" in arrays and f"blocks.{n}.attn.qkv.bias" not in arrays:
            arrays[f"blocks.{n}.attn.qkv.bias"] = np.zeros(3 * config.model.width, np.float32)
            if n == 0:
                report.notes.append("query, key and value have no bias: zeros here")
    report.notes.append("pixels: of models with another mean and deviation (timm's data_config) give data.image_mean")


def _fold_layer_scale(arrays: dict[str, np.ndarray], gamma: str, linear: str, report: Report) -> None:
    """A learned factor on a layer's output is a factor on its weights."""
    if gamma not in arrays:
        return
    factor = arrays.pop(gamma).astype(np.float32)
    arrays[f"{linear}.weight"] = arrays[f"{linear}.weight"] * factor[:, None]
    arrays[f"{linear}.bias"] = arrays[f"{linear}.bias"] * factor
    if gamma == "blocks.0.ls1.gamma":
        report.notes.append("LayerScale is folded into the layers it scales")


def write(path: Path, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """The encoder alone, as safetensors; its classifier is left to be trained."""
    formats.note_expressed(config, report, "timm", activation=ERF, epsilon=1e-6)
    if config.model.activation != ERF:
        report.notes.append("make the model with act_layer='gelu_tanh', and there is no difference")
    safetensors.save(path, arrays, {"format": "pt"})


FORMAT = Format(
    about="a ViT of timm, the encoder alone: FILE.safetensors",
    read=mae.read,
    describe=describe,
    key_map=key_map,
    write=write,
    tables={"encoder": "pos_embed"},
    beside=mae.CLASSIFIER,
    image_only=True,
)
