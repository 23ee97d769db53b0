"""facebookresearch/mae: ``.pth`` (``{"model": state dict}``), or the same parameters as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.convert import formats, safetensors, torch_file
from m3ae_jax.convert.formats import ERF, Foreign, Format, need
from m3ae_jax.convert.keymap import (
    TORCH_FROM_HEADS,
    TORCH_LINEAR,
    TORCH_NORM,
    TORCH_PATCHES,
    KeyMap,
    Part,
    Report,
)
from m3ae_jax.convert.positions import read as read_table


def stack(theirs: str, ours: str) -> KeyMap:
    """Blocks as timm's ViT has them, which MAE uses too."""
    return (
        Part(theirs + ".{n}.norm1", f"{ours}/blocks/norm_attention", TORCH_NORM),
        Part(theirs + ".{n}.attn.qkv", f"{ours}/blocks/attention/qkv", TORCH_LINEAR),
        Part(theirs + ".{n}.attn.proj", f"{ours}/blocks/attention/out", TORCH_FROM_HEADS),
        Part(theirs + ".{n}.norm2", f"{ours}/blocks/norm_mlp", TORCH_NORM),
        Part(theirs + ".{n}.mlp.fc1", f"{ours}/blocks/mlp_in", TORCH_LINEAR),
        Part(theirs + ".{n}.mlp.fc2", f"{ours}/blocks/mlp_out", TORCH_LINEAR),
    )


ENCODER: KeyMap = (
    Part("cls_token", "cls_token"),
    Part("patch_embed.proj", "image_embedding", TORCH_PATCHES),
    *stack("blocks", "encoder"),
    Part("norm", "encoder/norm", TORCH_NORM),
)
DECODER: KeyMap = (
    Part("decoder_embed", "decoder_projection", TORCH_LINEAR),
    Part("mask_token", "image_mask_embedding"),
    *stack("decoder_blocks", "decoder"),
    Part("decoder_norm", "decoder/norm", TORCH_NORM),
    Part("decoder_pred", "image_output/output", TORCH_LINEAR),
)
CLASSIFIER = ((r"(head|fc_norm|head_drop)\..*", "of its classifier"),)


def key_map(config: ConfigDict, ours: Mapping[str, np.ndarray]) -> KeyMap:
    """Theirs to ours."""
    del config, ours
    return ENCODER + DECODER


def read(path: Path) -> Foreign:
    """A ``.pth`` or a ``.safetensors`` file."""
    if path.suffix == ".safetensors":
        return Foreign(safetensors.load(path)[0])
    return Foreign(*torch_file.load(path))


def describe(foreign: Foreign, config: ConfigDict, report: Report) -> None:
    """Sets what the shapes tell; where the training program's arguments are saved, also the pixel loss."""
    arrays = foreign.arrays
    describe_encoder(arrays, config, report)
    if "decoder_embed.weight" in arrays:
        formats.set_decoder(
            config, arrays["decoder_embed.weight"].shape[0], formats.blocks(arrays, "decoder_blocks.{n}.")
        )
    config.loss.normalize_patches = bool(foreign.facts.get("norm_pix_loss", False))
    config.model.image_mask_ratio = float(foreign.facts.get("mask_ratio", 0.75))
    if "norm_pix_loss" not in foreign.facts:
        report.notes.append(
            "pixel targets: the file does not tell whether they were normalised by patch (norm_pix_loss); taken as not "
            "so, else give --config.loss.normalize_patches=true"
        )


def describe_encoder(arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """Of a ViT as timm names its parameters."""
    fc1 = need(arrays, "blocks.0.mlp.fc1.weight")
    depth = formats.blocks(arrays, "blocks.{n}.")
    formats.set_encoder(config, fc1.shape[1], depth, fc1.shape[0])
    side = read_table("pos_embed", need(arrays, "pos_embed")).side
    formats.set_pictures(config, need(arrays, "patch_embed.proj.weight"), side, report)
    config.model.activation, config.model.layer_norm_epsilon = ERF, 1e-6
    report.notes.append("GELU by erf: model.activation=gelu; a LayerNorm epsilon of 1e-6, as here")


def write(path: Path, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """A ``.pth`` file, or ``.safetensors``."""
    formats.note_expressed(config, report, "facebookresearch/mae", activation=ERF, epsilon=1e-6)
    if path.suffix == ".safetensors":
        safetensors.save(path, arrays, {"format": "pt"})
    else:
        torch_file.save(path, arrays)


FORMAT = Format(
    about="facebookresearch/mae: FILE.pth, or the same as FILE.safetensors",
    read=read,
    describe=describe,
    key_map=key_map,
    write=write,
    tables={"encoder": "pos_embed", "decoder": "decoder_pos_embed"},
    beside=CLASSIFIER,
    image_only=True,
)
