"""SIMLA (codezakh/SIMLA) and ALBEF (salesforce/ALBEF), to `simla`: PyTorch files of pretraining and fine-tuning.

Both are a ViT and a BERT with cross-attention, in all layers (SIMLA) or from one on (ALBEF: 6). A file has a momentum
teacher beside the model, by the same names with ``_m`` after the module's, and a queue. All names become those of
`_NAMES`, the teacher's with ``teacher.`` before them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.convert import bert, clip, formats, torch_file
from m3ae_jax.convert.clip import CLIP_MEAN, CLIP_STD, TOWERS, Table
from m3ae_jax.convert.formats import ERF, Arithmetic, Foreign, Format, need
from m3ae_jax.convert.keymap import Names, Report
from m3ae_jax.data.tokens import patch_grid
from m3ae_jax.errors import UserError
from m3ae_jax.models.positions import resize

PLACES, TYPES = "raw.text.table", "raw.text.types"
TEACHER = "teacher."
_MASK = 103  # the id of [MASK] in the published vocabularies
_QUEUE = ("image_queue", "text_queue")
_LAYER = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "proj",
    "attention.output.LayerNorm": "norm1",
    "crossattention.self.query": "cross.query",
    "crossattention.self.key": "cross.key",
    "crossattention.self.value": "cross.value",
    "crossattention.output.dense": "cross.proj",
    "crossattention.output.LayerNorm": "cross.norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "norm2",
}
_VIT = {"norm1": "norm1", "norm2": "norm2", "attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}


def _table() -> Table:
    names = {
        "visual_encoder.cls_token": "raw.image.class",
        "visual_encoder.pos_embed": "raw.image.table",
        "visual_encoder.mask_token": "image.mask",
        "visual_encoder.patch_embed.proj": "image.patches",
        "visual_encoder.norm": "image.norm",
        "vision_proj": "image.projection",
        "text_proj": "text.projection",
        "itm_head": "match",
        "concept_head": "keywords",
        "text_encoder.embeddings.word_embeddings.weight": "text.words",
        "text_encoder.embeddings.position_embeddings.weight": PLACES,
        "text_encoder.embeddings.token_type_embeddings.weight": TYPES,
        "text_encoder.embeddings.LayerNorm": "text.norm0",
        "text_encoder.cls.predictions.bias": "words.bias",
        "text_encoder.cls.predictions.decoder": "words.decoder",
        "text_encoder.cls.predictions.transform.dense": "words.hidden",
        "text_encoder.cls.predictions.transform.LayerNorm": "words.norm",
    }
    names |= {f"visual_encoder.blocks.{{n}}.{name}": f"image.blocks.{{n}}.{role}" for name, role in _VIT.items()}
    layers = {f"text_encoder.encoder.layer.{{n}}.{name}": f"text.blocks.{{n}}.{r}" for name, r in _LAYER.items()}
    return names | layers


_TABLE = _table()
_NAMES = Names(
    {
        "tower_cls": "{stack}.cls",
        "tower_other": "{stack}.other",
        "tower_first": "{stack}.first",
        "tower_patches": "{stack}.patches",
        "tower_words": "{stack}.words",
        "tower_positions": "{stack}.positions",
        "tower_mask": "{stack}.mask",
        "tower_norm0": "{stack}.norm0",
        "norm1": "{block}.norm1",
        "qkv": "{block}.{part}",
        "proj": "{block}.proj",
        "cross_norm": "{block}.cross.norm",
        "cross_query": "{block}.cross.query",
        "cross_key_value": "{block}.cross.kv",
        "cross_proj": "{block}.cross.proj",
        "norm2": "{block}.norm2",
        "fc1": "{block}.fc1",
        "fc2": "{block}.fc2",
        "lower_norm1": "lower.blocks.{{n}}.norm1",
        "lower_qkv": "lower.blocks.{{n}}.{part}",
        "lower_proj": "lower.blocks.{{n}}.proj",
        "lower_norm2": "lower.blocks.{{n}}.norm2",
        "lower_fc1": "lower.blocks.{{n}}.fc1",
        "lower_fc2": "lower.blocks.{{n}}.fc2",
        "tower_norm": "{stack}.norm",
        "tower_projection": "{stack}.projection",
        "match": "match",
        "words_hidden": "words.hidden",
        "words_norm": "words.norm",
        "words_bias": "words.bias",
        "keywords": "keywords",
        "scale": "scale",
    },
    blocks={tower: f"{tower}.blocks.{{n}}" for tower in TOWERS},
    modalities=TOWERS,
)
_BESIDE = (
    (
        r"(match|words\.hidden|words\.norm|keywords)\.(weight|bias)|words\.bias",
        "of a loss with the weight 0, or not of a teacher",
    ),
    (r"(teacher\.)?.*position_ids", "a table of numbers"),
    (r"(teacher\.)?mim_head\..*", "of the ids of DALL-E's visual vocabulary, which is not converted"),
    (r"(teacher\.)?cls_head\..*", "of a task's head"),
    (r"(teacher\.)?text_decoder\..*", "of the answers' decoder"),
    (r"(teacher\.)?text_encoder\.pooler\..*", "of BERT's next-sentence head"),
    (r"idx_queue", "numbers of the queue's pictures in another data set"),
    (r"(image|text)_queue|queue_ptr", "the queue is not whole"),
)
_FRESH = (
    (r"contrast/scale", "fresh: the file has no temperature"),
    (r"image/image/mask_embedding", "what hidden patches are shown as: there are none in this model's pretraining"),
    (r"(image|text)/projection/.*", "FRESH, so embeddings mean nothing: a task's file has none"),
)


def is_albef(names: Any) -> bool:
    """Whether a file's names are SIMLA's or ALBEF's."""
    present = set(names)
    return "visual_encoder.pos_embed" in present and any(name.startswith("text_encoder.") for name in present)


def read(path: Path) -> Foreign:
    """A ``.pth`` file of training; the optimizer in it is not read."""
    arrays, _ = torch_file.load_either(path)
    foreign = Foreign.of_torch(arrays)
    if not is_albef(foreign.arrays):
        raise UserError(f"{path} has the names neither of SIMLA nor of ALBEF: visual_encoder and text_encoder")
    with formats.reading(path, "file of SIMLA or ALBEF"):
        return _folded(path, foreign)


def _folded(path: Path, foreign: Foreign) -> Foreign:
    """By the names of `_NAMES`, the teacher's behind `TEACHER`; facts are ``raw``, ``queue`` and ``fusion_layer``."""
    spelled = clip.respelled(formats.renamed(formats.single(foreign.arrays), _plain), _TABLE)
    parts = {
        "": {name: x for name, x in spelled.items() if not name.startswith(TEACHER)},
        TEACHER: {name.removeprefix(TEACHER): x for name, x in spelled.items() if name.startswith(TEACHER)},
    }
    parts[TEACHER] = clip.respelled(parts[TEACHER], _TABLE)
    model = parts[""]
    first, raw = _fusion_layer(path, model), dict(model)  # for the comparison
    for of in parts.values():
        _arrange(of, first)
    queue: dict[str, np.ndarray] = {}
    shapes = {model[name].shape for name in _QUEUE if name in model}
    if len(shapes) == 1 and all(name in model for name in (*_QUEUE, "queue_ptr")):
        queue = {tower: model.pop(name).T for tower, name in zip(TOWERS, _QUEUE, strict=True)}
        queue["next"] = model.pop("queue_ptr").reshape(()) % len(queue["text"])
    if "temp" in model:
        temperature = float(model.pop("temp").reshape(()))
        if not temperature > 0:
            raise UserError(f"{path}: its temp={temperature} is no temperature")
        model["scale"] = -np.log(np.float64(temperature))
    joined = model | {TEACHER + name: x for name, x in parts[TEACHER].items()}
    facts = {"raw": raw, "queue": queue, "fusion_layer": first, "teacher": bool(parts[TEACHER])}
    return Foreign(joined, facts, foreign.notes)


def _plain(name: str) -> str:
    """A name without the ``bert.`` of pretraining's text encoder, the teacher's with ``teacher.`` before it."""
    name = bert.respelled(re.sub(r"^(text_encoder(_m)?)\.bert\.", r"\1.", name))
    module, point, rest = name.partition(".")
    return f"{TEACHER}{module.removesuffix('_m')}{point}{rest}" if module.endswith("_m") else name


def _fusion_layer(path: Path, arrays: Mapping[str, np.ndarray]) -> int:
    """Layers below the first with cross-attention.

    Raises:
        UserError: a layer above it has none, or none has.
    """
    depth = formats.blocks(arrays, "text.blocks.{n}")
    looking = [n for n in range(depth) if f"text.blocks.{n}.cross.key.weight" in arrays]
    if not looking or looking != list(range(looking[0], depth)):
        raise UserError(f"{path}: of {depth} text layers {looking} have cross-attention, not the upper ones")
    keys = [arrays[f"text.blocks.{n}.cross.key.weight"] for n in looking]
    if any(np.array_equal(one, other) for one, other in itertools.pairwise(keys)):
        raise UserError(
            f"{path}: pairs of its text layers share what they look at: NLVR2's pictures have no place here"
        )
    if not looking[0] and "image.mask" not in arrays:
        raise UserError(
            f"{path} has cross-attention in all text layers, as SIMLA, and not its visual_encoder.mask_token: of BLIP "
            "and others, whose captions begin otherwise, nothing is read"
        )
    return looking[0]


def _arrange(arrays: dict[str, np.ndarray], first: int) -> None:
    """Splits and joins what is one here and several there, and numbers the layers of each stack from 0."""
    clip.split_three(arrays)
    for name in [name for name in arrays if ".cross.key." in name]:
        other = name.replace(".key.", ".value.")
        arrays[name.replace(".key.", ".kv.")] = np.concatenate([arrays.pop(name), need(arrays, other)])
        arrays.pop(other)
    layers = {name: re.fullmatch(r"text\.blocks\.(\d+)\.(.+)", name) for name in arrays}
    moved = {}
    for name, match in layers.items():
        if match and first:
            n = int(match[1])
            moved[name] = f"lower.blocks.{n}.{match[2]}" if n < first else f"text.blocks.{n - first}.{match[2]}"
    values = {ours: arrays.pop(name) for name, ours in moved.items()}
    arrays.update(values)
    decoder = {name: arrays.pop(name) for name in ("words.decoder.weight", "words.decoder.bias") if name in arrays}
    for name, value in decoder.items():
        same = "text.words" if name.endswith("weight") else "words.bias"
        if same in arrays and not np.array_equal(arrays[same], value):
            raise UserError(f"its {name} is not {same}, with which it is one here")
    if "raw.image.table" in arrays:
        table = arrays.pop("raw.image.table")
        table = table.reshape(-1, table.shape[-1])
        arrays["image.cls"] = (need(arrays, "raw.image.class").reshape(-1) + table[0])[None, None]
        del arrays["raw.image.class"]
        arrays["image.positions"] = table[1:]


def describe(foreign: Foreign, config: ConfigDict, report: Report) -> None:
    """Sets the model by the shapes, and by which heads there are what is trained."""
    arrays, facts, s = foreign.arrays, foreign.facts, config.simla
    hidden, width = need(arrays, "image.blocks.0.fc1.weight").shape
    depth = formats.blocks(arrays, "image.blocks.{n}")
    first = facts["fusion_layer"]
    config.model.update(width=width, depth=depth, heads=max(width // 64, 1))
    config.model.update(mlp_ratio=formats.mlp_ratio(width, hidden), activation=ERF, layer_norm_epsilon=1e-6)
    s.text_depth, s.fusion_layer = first + formats.blocks(arrays, "text.blocks.{n}"), first
    s.text_places, s.text_layer_norm_epsilon = len(need(arrays, PLACES)) - 2, 1e-12
    s.image_positions = "learned"
    s.id_weight = 0.0
    for name, head in (("match", "match.weight"), ("word", "words.bias"), ("keyword", "keywords.weight")):
        s[f"{name}_weight"] = 1.0 if head in arrays else 0.0
    for projection in (arrays.get(f"{tower}.projection.weight") for tower in TOWERS):
        if projection is not None:
            s.embedding_width = len(projection)
    if "keywords.weight" in arrays:
        s.keyword_input = "embedding" if arrays["keywords.weight"].shape[1] == s.embedding_width else "cls"
    if "scale" in arrays:
        temperature = float(np.exp(-arrays["scale"]))
        low, high = s.temperature_range
        s.temperature_range = (min(low, 0.999 * temperature), max(high, 1.001 * temperature))
    if facts["queue"]:
        s.queue = len(facts["queue"]["text"])
        config.batch_size = math.gcd(config.batch_size, s.queue)
    kernel = need(arrays, "image.patches.weight")
    patch, side = kernel.shape[-1], round(len(arrays["image.positions"]) ** 0.5)
    config.data.update(
        modalities=TOWERS,
        patch_size=patch,
        image_size=patch * side,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        max_text_tokens=min(23, s.text_places),  # their 25 with [CLS] and [SEP]
    )
    there = [name for name in ("match", "word", "keyword") if s[f"{name}_weight"]]
    report.notes += [
        f"cross-attention in {f'the text layers from {first} on: ALBEF' if first else 'all text layers: SIMLA'}",
        f"losses: contrast{''.join(f', {name}' for name in there)}, by the heads that the file has",
        f"heads: taken as {config.model.heads}, 64 channels each: the file does not tell",
        "GELU: exact; LayerNorm epsilon 1e-6 in the ViT, 1e-12 in BERT: taken as in their code",
        "pixels: normalised by CLIP's mean and deviation, as their code does",
        f"teacher: {'taken' if facts['teacher'] else 'the file has none: it starts as a copy of the model'}; queue: "
        + (f"{s.queue} pairs taken" if s.queue else "the file has none"),
    ]
    if "keywords.weight" in arrays:
        report.notes.append("ids of hidden patches: not trained (simla.id_weight=0): they need a tokenizer of ours")


def adapt(foreign: Foreign, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """Makes the learned tokens of ids, and positions for the config's picture, of the model and of its teacher."""
    tokenizer = config.data.tokenizer
    ids = bert.ids_of(tokenizer, len(arrays["text.words"]))
    mask = bert.ids_of(tokenizer, len(arrays["text.words"]), {"[MASK]": _MASK})["[MASK]"]
    side, before = patch_grid(config)[0], round(len(arrays["image.positions"]) ** 0.5)
    for prefix in ("", TEACHER) if foreign.facts["teacher"] else ("",):
        words, places = (need(arrays, f"{prefix}{name}") for name in ("text.words", PLACES))
        arrays.pop(f"{prefix}{PLACES}")
        types = arrays.pop(f"{prefix}{TYPES}", np.zeros_like(places[:1]))
        placed = places + types[0]
        arrays[f"{prefix}text.cls"] = (words[ids["[CLS]"]] + placed[0])[None, None]
        arrays[f"{prefix}text.other"] = words[ids["[SEP]"]][None, None]
        arrays[f"{prefix}text.mask"] = words[mask][None, None]
        arrays[f"{prefix}text.first"] = placed[:1][None]
        rows = config.simla.text_places or config.data.max_text_tokens
        if rows > len(placed) - 2:
            raise UserError(f"simla.text_places={rows}: its positions are for {len(placed) - 2}")
        arrays[f"{prefix}text.positions"] = placed[1 : 2 + rows]
        if side != before:
            positions = need(arrays, f"{prefix}image.positions")
            arrays[f"{prefix}image.positions"] = resize(positions, (before, before), (side, side))
    if side != before:
        report.notes.append(
            f"positions (image): interpolated for {side} x {side} patches, there are {before} x {before}"
        )
    report.notes.append(f"[CLS] is id {ids['[CLS]']} of the words, [SEP] {ids['[SEP]']}, [MASK] {mask}")


def beside_params(
    foreign: Foreign, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report
) -> dict[str, dict[str, np.ndarray]]:
    """See `Format`: the teacher and the queue, whose numbers of pictures are nobody's here."""
    queue, rows = foreign.facts["queue"], config.simla.queue
    theirs = [name for name in arrays if name.startswith(TEACHER)]
    beside = {"teacher": {name.removeprefix(TEACHER): arrays.pop(name) for name in theirs}}
    if queue and rows:
        if rows != len(queue["text"]):
            raise UserError(f"simla.queue={rows}: the file's has {len(queue['text'])} pairs; 0 leaves it out")
        start = queue["next"] - queue["next"] % config.batch_size  # a push must not reach beyond the end
        beside["queue"] = queue | {"id": np.zeros(rows, np.int32), "valid": np.ones(rows, bool), "next": start}
    elif queue:
        report.notes.append(f"simla.queue=0: the file's queue of {len(queue['text'])} pairs is left out")
    return {name: of for name, of in beside.items() if of}


def write(path: Path, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """Not there: their code reads training files that hold more than a run has."""
    raise UserError("--to=albef: ALBEF's and SIMLA's weights are read, not written; --to=safetensors keeps our names")


FORMAT = Format(
    "SIMLA or ALBEF, of pretraining or fine-tuned: FILE.pth",
    read,
    describe,
    write,
    _NAMES,
    lambda facts: Arithmetic(ERF),
    beside=_BESIDE,
    objective="simla",
    adapt=adapt,
    fresh=_FRESH,
    beside_params=beside_params,
)
