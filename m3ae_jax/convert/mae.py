"""facebookresearch/mae, and the ViT of timm, which is its encoder.

Both are ``.pth`` files (``{"model": state dict}``), or the same parameters as safetensors.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.convert import formats, safetensors, torch_file
from m3ae_jax.convert.formats import ERF, Arithmetic, Foreign, Format
from m3ae_jax.convert.keymap import Names, Report

_ENCODER = {
    "cls": "cls_token",
    "image": "patch_embed.proj",
    "norm1": "{block}.norm1",
    "qkv": "{block}.attn.qkv",
    "proj": "{block}.attn.proj",
    "norm2": "{block}.norm2",
    "fc1": "{block}.mlp.fc1",
    "fc2": "{block}.mlp.fc2",
    "encoder_norm": "norm",
}
_NAMES = Names(
    {
        **_ENCODER,
        "projection": "decoder_embed",
        "mask": "mask_token",
        "decoder_norm": "decoder_norm",
        "head": "decoder_pred",
    },
    blocks={"encoder": "blocks.{n}", "decoder": "decoder_blocks.{n}"},
    tables={"encoder": "pos_embed", "decoder": "decoder_pos_embed"},
)
_TIMM_NAMES = Names(_ENCODER, blocks={"encoder": "blocks.{n}"}, tables={"encoder": "pos_embed"})
_CLASSIFIER = ((r"(head|fc_norm|head_drop)\..*", "of its classifier"),)


def read(path: Path) -> Foreign:
    """A ``.pth`` or a ``.safetensors`` file."""
    return Foreign.of_torch(*torch_file.load_either(path))


def read_timm(path: Path) -> Foreign:
    """A file, or a folder with it; timm's ``config.json`` beside it is read."""
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        path = next((file for file in files if file.is_file()), files[0])
    foreign, beside = read(path), path.parent / "config.json"
    if beside.is_file() and isinstance(stated := formats.json_object(beside).get("pretrained_cfg"), dict):
        foreign = dataclasses.replace(foreign, facts={**foreign.facts, "pretrained_cfg": stated})
    return foreign


def describe(foreign: Foreign, config: ConfigDict, report: Report) -> None:
    """Sets what follows from the shapes and, where the training program's arguments are saved, the pixel loss."""
    _describe_encoder(foreign, config, report)
    config.m3ae.normalize_patches = bool(foreign.facts.get("norm_pix_loss", False))
    config.m3ae.image_mask_ratio = float(foreign.facts.get("mask_ratio", 0.75))
    if "norm_pix_loss" not in foreign.facts:
        report.notes.append(
            "pixel targets: the file does not tell whether they were normalised by patch (norm_pix_loss); taken as not "
            "so, else give --config.m3ae.normalize_patches=true"
        )


def describe_timm(foreign: Foreign, config: ConfigDict, report: Report) -> None:
    """Sets what follows from the shapes; folds LayerScale and missing biases into what our layers have."""
    arrays = foreign.arrays
    _describe_encoder(foreign, config, report)
    for n in range(config.model.depth):
        _fold_layer_scale(arrays, f"blocks.{n}.ls1.gamma", f"blocks.{n}.attn.proj", report)
        _fold_layer_scale(arrays, f"blocks.{n}.ls2.gamma", f"blocks.{n}.mlp.fc2", report)
    if formats.add_biases(arrays, ".attn.qkv"):
        report.notes.append("query, key and value have no bias: zeros here")
    stated = foreign.facts.get("pretrained_cfg", {})
    if "mean" in stated and "std" in stated:
        mean, std = (tuple(float(x) for x in stated[name]) for name in ("mean", "std"))
        config.data.update(image_mean=mean, image_std=std)
        report.notes.append(f"pixels: mean {mean} and deviation {std} by the config.json beside it")
    else:
        report.notes.append(
            "pixels: of models with another mean and deviation (timm's data_config) give data.image_mean"
        )


def _fold_layer_scale(arrays: dict[str, np.ndarray], gamma: str, linear: str, report: Report) -> None:
    """A learned factor on a layer's output is a factor on its weights."""
    if gamma not in arrays:
        return
    factor = arrays.pop(gamma).astype(np.float32)
    arrays[f"{linear}.weight"] = arrays[f"{linear}.weight"] * factor[:, None]
    arrays[f"{linear}.bias"] = arrays[f"{linear}.bias"] * factor
    if gamma == "blocks.0.ls1.gamma":
        report.notes.append("LayerScale is folded into the layers it scales")


def _take_norm_of_mean(arrays: dict[str, np.ndarray], report: Report) -> None:
    """Of a model that was fine-tuned on the mean of its patches the one norm is ``fc_norm``, after the mean."""
    if "norm.weight" in arrays or "fc_norm.weight" not in arrays:
        return
    for end in ("weight", "bias"):
        arrays[f"norm.{end}"] = arrays.pop(f"fc_norm.{end}")
    report.notes.append(
        "DIFFERS: the last norm here is fc_norm, of each token, and the mean of these (pooling mean) comes after it; "
        "there it comes after the mean over the patches (global_pool)"
    )


def _describe_encoder(foreign: Foreign, config: ConfigDict, report: Report) -> None:
    _take_norm_of_mean(foreign.arrays, report)
    formats.set_pictures(config, foreign.arrays, _TIMM_NAMES, report)
    config.model.activation, config.model.layer_norm_epsilon = Arithmetic()
    report.notes.append("GELU by erf: model.activation=gelu; a LayerNorm epsilon of 1e-6, as here")


def write(path: Path, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """A ``.pth`` file, or ``.safetensors``."""
    formats.note_expressed(config, report, "facebookresearch/mae", Arithmetic())
    if path.suffix == ".safetensors":
        safetensors.save(path, arrays, {"format": "pt"})
    else:
        torch_file.save(path, arrays)


def write_timm(path: Path, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """The encoder alone, as safetensors; its classifier is left to be trained."""
    formats.note_expressed(config, report, "timm", Arithmetic())
    if config.model.activation != ERF:
        report.notes.append("make the model with act_layer='gelu_tanh', and there is no difference")
    safetensors.save(path, arrays, {"format": "pt"})


MAE = Format(
    "facebookresearch/mae: FILE.pth, or the same as FILE.safetensors",
    read,
    describe,
    write,
    _NAMES,
    beside=_CLASSIFIER,
    endings=(".pth", ".safetensors"),
)
TIMM = Format(
    "a ViT of timm, the encoder alone: FILE.safetensors, or a folder",
    read_timm,
    describe_timm,
    write_timm,
    _TIMM_NAMES,
    beside=_CLASSIFIER,
    folders=True,
)
