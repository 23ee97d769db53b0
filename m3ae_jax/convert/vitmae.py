"""Hugging Face's ViTMAE: a folder with ``config.json`` and ``model.safetensors``.

Three spellings of its parameters are about: that of the published checkpoints and of transformers 4; what
transformers 5 saves; and what transformers 5 has in memory. All become the first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.convert import formats, safetensors, torch_file
from m3ae_jax.convert.formats import ERF, IMAGENET_MEAN, IMAGENET_STD, TANH, Foreign, Format, need
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
from m3ae_jax.errors import UserError

ACTIVATIONS = {"gelu": ERF, "gelu_new": TANH, "gelu_pytorch_tanh": TANH}
_LONG = {"q": "query", "k": "key", "v": "value"}
_SPELLINGS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^(embeddings|encoder|layers|layernorm)\.", r"vit.\1."),  # of the encoder saved alone
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.([qkv])_proj\.", lambda m: f".attention.attention.{_LONG[m[1]]}."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def _stack(theirs: str, ours: str) -> KeyMap:
    return (
        Part(theirs + ".{n}.layernorm_before", f"{ours}/blocks/norm_attention", TORCH_NORM),
        Part(theirs + ".{n}.attention.attention.query", f"{ours}/blocks/attention/qkv", TORCH_LINEAR, third=0),
        Part(theirs + ".{n}.attention.attention.key", f"{ours}/blocks/attention/qkv", TORCH_LINEAR, third=1),
        Part(theirs + ".{n}.attention.attention.value", f"{ours}/blocks/attention/qkv", TORCH_LINEAR, third=2),
        Part(theirs + ".{n}.attention.output.dense", f"{ours}/blocks/attention/out", TORCH_FROM_HEADS),
        Part(theirs + ".{n}.layernorm_after", f"{ours}/blocks/norm_mlp", TORCH_NORM),
        Part(theirs + ".{n}.intermediate.dense", f"{ours}/blocks/mlp_in", TORCH_LINEAR),
        Part(theirs + ".{n}.output.dense", f"{ours}/blocks/mlp_out", TORCH_LINEAR),
    )


KEY_MAP: KeyMap = (
    Part("vit.embeddings.cls_token", "cls_token"),
    Part("vit.embeddings.patch_embeddings.projection", "image_embedding", TORCH_PATCHES),
    *_stack("vit.encoder.layer", "encoder"),
    Part("vit.layernorm", "encoder/norm", TORCH_NORM),
    Part("decoder.decoder_embed", "decoder_projection", TORCH_LINEAR),
    Part("decoder.mask_token", "image_mask_embedding"),
    *_stack("decoder.decoder_layers", "decoder"),
    Part("decoder.decoder_norm", "decoder/norm", TORCH_NORM),
    Part("decoder.decoder_pred", "image_output/output", TORCH_LINEAR),
)


def key_map(config: ConfigDict, ours: Mapping[str, np.ndarray]) -> KeyMap:
    """Theirs to ours."""
    del config, ours
    return KEY_MAP


def _spell(name: str) -> str:
    for pattern, replacement in _SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def read(path: Path) -> Foreign:
    """A folder."""
    facts = _json(path / "config.json")
    if facts.get("model_type") != "vit_mae":
        raise UserError(f"{path}/config.json is of a {facts.get('model_type')!r}; 'vit_mae' is needed")
    preprocessor = path / "preprocessor_config.json"
    facts |= {f"pixel_{k}": v for k, v in _json(preprocessor).items()} if preprocessor.is_file() else {}
    whole, torch = path / "model.safetensors", path / "pytorch_model.bin"
    if not whole.is_file() and not torch.is_file():
        raise UserError(f"{path} has neither model.safetensors nor pytorch_model.bin")
    arrays = safetensors.load(whole)[0] if whole.is_file() else torch_file.load(torch)[0]
    return Foreign({_spell(name): value for name, value in arrays.items()}, facts)


def describe(foreign: Foreign, config: ConfigDict, report: Report) -> None:
    """Sets what ``config.json`` says."""
    arrays, facts, m = foreign.arrays, foreign.facts, config.model
    fc1 = need(arrays, "vit.encoder.layer.0.intermediate.dense.weight")
    formats.set_encoder(config, fc1.shape[1], formats.blocks(arrays, "vit.encoder.layer.{n}."), fc1.shape[0])
    m.heads = int(facts.get("num_attention_heads", 12))  # the defaults are transformers'
    if "decoder.decoder_embed.weight" in arrays:
        width = arrays["decoder.decoder_embed.weight"].shape[0]
        formats.set_decoder(config, width, formats.blocks(arrays, "decoder.decoder_layers.{n}."))
        m.decoder_heads = int(facts.get("decoder_num_attention_heads", 16))
        _check_decoder_mlp(arrays, m.mlp_ratio)
    table = read_table("position_embeddings", need(arrays, "vit.embeddings.position_embeddings"))
    kernel = need(arrays, "vit.embeddings.patch_embeddings.projection.weight")
    formats.set_pictures(config, kernel, table.side, report)
    if "pixel_image_mean" in facts:
        config.data.image_mean = tuple(float(x) for x in facts["pixel_image_mean"])
        config.data.image_std = tuple(float(x) for x in facts["pixel_image_std"])
        report.notes[-1] = "pixels: normalised by the mean and deviation of its preprocessor_config.json"
    activation = str(facts.get("hidden_act", "gelu"))
    if activation not in ACTIVATIONS:
        raise UserError(f"its hidden_act={activation!r} is none of {', '.join(ACTIVATIONS)}")
    m.activation, m.layer_norm_epsilon = ACTIVATIONS[activation], float(facts.get("layer_norm_eps", 1e-12))
    m.image_mask_ratio = float(facts.get("mask_ratio", 0.75))
    config.loss.normalize_patches = bool(facts.get("norm_pix_loss", False))
    for name in [n for n in arrays if n.endswith("attention.attention.query.weight")]:
        for part in _LONG.values():
            bias = name.replace("query.weight", f"{part}.bias")
            arrays.setdefault(bias, np.zeros(arrays[name].shape[0], np.float32))  # qkv_bias=False
    report.notes += [
        f"GELU: hidden_act={activation}, model.activation={m.activation}",
        f"LayerNorm epsilon: {m.layer_norm_epsilon}",
        f"pixel targets: norm_pix_loss={config.loss.normalize_patches}",
    ]


def _check_decoder_mlp(arrays: Mapping[str, np.ndarray], ratio: float) -> None:
    fc1 = need(arrays, "decoder.decoder_layers.0.intermediate.dense.weight")
    if fc1.shape[0] != int(fc1.shape[1] * ratio):
        raise UserError(
            f"its decoder's MLP is {fc1.shape[0]} wide, {fc1.shape[1]} times {ratio} as in its encoder is needed"
        )


def write(path: Path, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """A folder that ``ViTMAEForPreTraining.from_pretrained`` takes."""
    m, d = config.model, config.data
    path.mkdir(parents=True, exist_ok=True)
    safetensors.save(path / "model.safetensors", arrays, {"format": "pt"})
    content = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "hidden_size": m.width,
        "num_hidden_layers": m.depth,
        "num_attention_heads": m.heads,
        "intermediate_size": int(m.width * m.mlp_ratio),
        "hidden_act": "gelu" if m.activation == ERF else "gelu_pytorch_tanh",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": m.layer_norm_epsilon,
        "image_size": d.image_size,
        "patch_size": d.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "decoder_hidden_size": m.decoder_width,
        "decoder_num_hidden_layers": m.decoder_depth,
        "decoder_num_attention_heads": m.decoder_heads,
        "decoder_intermediate_size": int(m.decoder_width * m.mlp_ratio),
        "mask_ratio": m.image_mask_ratio,
        "norm_pix_loss": config.loss.normalize_patches,
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    pixels = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": d.image_size, "width": d.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(d.image_mean),
        "image_std": list(d.image_std),
    }
    (path / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n", encoding="utf-8")
    if (tuple(d.image_mean), tuple(d.image_std)) != (IMAGENET_MEAN, IMAGENET_STD):
        report.notes.append("pixels: this model's mean and deviation are in preprocessor_config.json")


FORMAT = Format(
    about="Hugging Face ViTMAE: a folder",
    read=read,
    describe=describe,
    key_map=key_map,
    write=write,
    tables={"encoder": "vit.embeddings.position_embeddings", "decoder": "decoder.decoder_pos_embed"},
    image_only=True,
)
