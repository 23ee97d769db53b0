"""Hugging Face's ViTMAE: a folder with ``config.json`` and ``model.safetensors``.

Three spellings of its parameters are about: that of the published checkpoints and of transformers 4; what
transformers 5 saves; and what transformers 5 has in memory. All become the first.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.convert import formats, safetensors, torch_file
from m3ae_jax.convert.formats import (
    ACTIVATIONS,
    ERF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Arithmetic,
    Foreign,
    Format,
    need,
)
from m3ae_jax.convert.keymap import QKV, Names, Report
from m3ae_jax.errors import UserError

_SPELLINGS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^(embeddings|encoder|layers|layernorm)\.", r"vit.\1."),  # of the encoder saved alone
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.([qkv])_proj\.", lambda m: f".attention.attention.{QKV['qkv'.index(m[1])]}."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


NAMES = Names(
    {
        "cls": "vit.embeddings.cls_token",
        "image": "vit.embeddings.patch_embeddings.projection",
        "norm1": "{block}.layernorm_before",
        "qkv": "{block}.attention.attention.{part}",
        "proj": "{block}.attention.output.dense",
        "norm2": "{block}.layernorm_after",
        "fc1": "{block}.intermediate.dense",
        "fc2": "{block}.output.dense",
        "encoder_norm": "vit.layernorm",
        "projection": "decoder.decoder_embed",
        "mask": "decoder.mask_token",
        "decoder_norm": "decoder.decoder_norm",
        "head": "decoder.decoder_pred",
    },
    blocks={"encoder": "vit.encoder.layer.{n}", "decoder": "decoder.decoder_layers.{n}"},
    tables={"encoder": "vit.embeddings.position_embeddings", "decoder": "decoder.decoder_pos_embed"},
)


def _spell(name: str) -> str:
    for pattern, replacement in _SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def read(path: Path) -> Foreign:
    """A folder."""
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is a folder without config.json: transformers' ViTMAE, CLIP, SigLIP, BERT and open_clip's "
            "models are read from a folder; of others name the file"
        )
    facts = formats.json_object(path / "config.json")
    if facts.get("model_type") != "vit_mae":
        raise UserError(
            f"{path}/config.json is of a {facts.get('model_type')!r}; read are 'vit_mae', 'clip', 'siglip', 'bert'"
        )
    preprocessor = path / "preprocessor_config.json"
    facts |= {f"pixel_{k}": v for k, v in formats.json_object(preprocessor).items()} if preprocessor.is_file() else {}
    whole, torch = path / "model.safetensors", path / "pytorch_model.bin"
    if not whole.is_file() and not torch.is_file():
        raise UserError(f"{path} has neither model.safetensors nor pytorch_model.bin")
    arrays, _ = torch_file.load_either(whole if whole.is_file() else torch)
    foreign = Foreign.of_torch(arrays, facts)
    return dataclasses.replace(foreign, arrays=formats.renamed(foreign.arrays, _spell))


def arithmetic(facts: Mapping[str, Any]) -> Arithmetic:
    """By ``config.json``, and where it lacks a field by transformers' defaults.

    Raises:
        UserError: its activation is none of `ACTIVATIONS`.
    """
    activation = str(facts.get("hidden_act", "gelu"))
    if activation not in ACTIVATIONS:
        raise UserError(f"its hidden_act={activation!r} is none of {', '.join(ACTIVATIONS)}")
    return Arithmetic(ACTIVATIONS[activation], float(facts.get("layer_norm_eps", 1e-12)))


def describe(foreign: Foreign, config: ConfigDict, report: Report) -> None:
    """Sets the model as in ``config.json``."""
    arrays, facts, m, own = foreign.arrays, foreign.facts, config.model, config.m3ae
    m.heads = int(facts.get("num_attention_heads", 12))  # the defaults are transformers'
    if "decoder.decoder_embed.weight" in arrays:
        own.decoder_heads = int(facts.get("decoder_num_attention_heads", 16))
        _check_decoder_mlp(arrays, m.mlp_ratio)
    formats.set_pictures(config, arrays, NAMES, report)
    if "pixel_image_mean" in facts:
        config.data.image_mean = tuple(float(x) for x in facts["pixel_image_mean"])
        config.data.image_std = tuple(float(x) for x in facts["pixel_image_std"])
        report.notes[-1] = "pixels: normalised by the mean and deviation of its preprocessor_config.json"
    m.activation, m.layer_norm_epsilon = arithmetic(facts)
    own.image_mask_ratio = float(facts.get("mask_ratio", 0.75))
    config.m3ae.normalize_patches = bool(facts.get("norm_pix_loss", False))
    formats.add_biases(arrays, *(f".attention.attention.{part}" for part in QKV))  # of qkv_bias=False
    report.notes += [
        f"GELU: hidden_act={facts.get('hidden_act', 'gelu')}, model.activation={m.activation}",
        f"LayerNorm epsilon: {m.layer_norm_epsilon}",
        f"pixel targets: norm_pix_loss={config.m3ae.normalize_patches}",
    ]


def _check_decoder_mlp(arrays: Mapping[str, np.ndarray], ratio: float) -> None:
    fc1 = need(arrays, "decoder.decoder_layers.0.intermediate.dense.weight")
    if fc1.shape[0] != int(fc1.shape[1] * ratio):
        raise UserError(
            f"its decoder's MLP is {fc1.shape[0]} wide, {fc1.shape[1]} times {ratio} as in its encoder is needed"
        )


def architecture(config: ConfigDict) -> dict[str, Any]:
    """What transformers' ``ViTMAEConfig`` takes, of a resolved config."""
    m, own = config.model, config.m3ae
    return {
        "hidden_size": m.width,
        "num_hidden_layers": m.depth,
        "num_attention_heads": m.heads,
        "intermediate_size": int(m.width * m.mlp_ratio),
        "hidden_act": "gelu" if m.activation == ERF else "gelu_pytorch_tanh",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": m.layer_norm_epsilon,
        "image_size": config.data.image_size,
        "patch_size": config.data.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "decoder_hidden_size": own.decoder_width,
        "decoder_num_hidden_layers": own.decoder_depth,
        "decoder_num_attention_heads": own.decoder_heads,
        "decoder_intermediate_size": int(own.decoder_width * m.mlp_ratio),
        "mask_ratio": own.image_mask_ratio,
        "norm_pix_loss": config.m3ae.normalize_patches,
    }


def write(path: Path, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """A folder that ``ViTMAEForPreTraining.from_pretrained`` takes."""
    d = config.data
    path.mkdir(parents=True, exist_ok=True)
    safetensors.save(path / "model.safetensors", arrays, {"format": "pt"})
    kind = {"architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae"}
    content = {**kind, **architecture(config), "torch_dtype": "float32"}
    (path / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    pixels = formats.image_processor("ViTImageProcessor", config)
    (path / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n", encoding="utf-8")
    if (tuple(d.image_mean), tuple(d.image_std)) != (IMAGENET_MEAN, IMAGENET_STD):
        report.notes.append("pixels: this model's mean and deviation are in preprocessor_config.json")


FORMAT = Format("Hugging Face ViTMAE: a folder", read, describe, write, NAMES, arithmetic, endings=(), folders=True)
