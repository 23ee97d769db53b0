"""Two towers of other projects: CLIP and SigLIP as transformers and as open_clip write them, to `contrastive` and back.

All spellings become one, of names with a point: ``image`` or ``text``, then a layer. In it the tables of positions and
of words are as in the file (``raw``): `fold` takes from them what here are tokens of their own, `unfold` puts it back.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.convert import formats, safetensors, torch_file
from m3ae_jax.convert.formats import ACTIVATIONS, ERF, TANH, Arithmetic, Foreign, Format, need
from m3ae_jax.convert.keymap import QKV, Names, Report
from m3ae_jax.data.tokens import patch_grid
from m3ae_jax.errors import UserError
from m3ae_jax.models.positions import resize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TOWERS = ("image", "text")
QUICK = "quick_gelu"
_WIDE = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # heads of ViTs whose heads are not 64 wide

Table = Mapping[str, str]
"""Their name of a layer or a parameter to the one here; ``{n}`` is a block's number. What follows a name stays."""

_BLOCK = {  # transformers' layers of a block
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.out_proj": "proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
_RESIDUAL = {  # open_clip's own, in which query, key and value are one
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj": "qkv",
    "attn.out_proj": "proj",
    "mlp.c_fc": "fc1",
    "mlp.c_proj": "fc2",
}
_TIMM = {"norm1": "norm1", "norm2": "norm2", "attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}


def _blocks(theirs: str, ours: str, layers: Table) -> dict[str, str]:
    return {f"{theirs}.{{n}}.{name}": f"{ours}.blocks.{{n}}.{role}" for name, role in layers.items()}


TRANSFORMERS: Table = {
    **_blocks("vision_model.encoder.layers", "image", _BLOCK),
    **_blocks("text_model.encoder.layers", "text", _BLOCK),
    "vision_model.embeddings.patch_embedding": "image.patches",
    "vision_model.embeddings.class_embedding": "raw.image.class",
    "vision_model.embeddings.position_embedding.weight": "raw.image.table",
    "vision_model.pre_layrnorm": "image.norm0",
    "vision_model.post_layernorm": "image.norm",
    "vision_model.head.probe": "image.pool.query",
    "vision_model.head.attention.in_proj": "image.pool.qkv",
    "vision_model.head.attention.out_proj": "image.pool.out",
    "vision_model.head.layernorm": "image.pool.norm",
    "vision_model.head.mlp": "image.pool",
    "visual_projection": "image.projection",
    "text_model.embeddings.token_embedding.weight": "raw.text.words",
    "text_model.embeddings.position_embedding.weight": "raw.text.table",
    "text_model.final_layer_norm": "text.norm",
    "text_model.head": "text.projection",
    "text_projection": "text.projection",
    "logit_scale": "scale",
    "logit_bias": "bias",
}
_OPEN_CLIP: Table = {
    **_blocks("visual.transformer.resblocks", "image", _RESIDUAL),
    **_blocks("transformer.resblocks", "text", _RESIDUAL),
    "visual.conv1": "image.patches",
    "visual.class_embedding": "raw.image.class",
    "visual.positional_embedding": "raw.image.table",
    "visual.ln_pre": "image.norm0",
    "visual.ln_post": "image.norm",
    "visual.proj": "turned.image.projection.weight",
    "token_embedding.weight": "raw.text.words",
    "positional_embedding": "raw.text.table",
    "ln_final": "text.norm",
    "text_projection": "turned.text.projection.weight",
    "logit_scale": "scale",
    "logit_bias": "bias",
}
_OPEN_CLIP_SIGLIP: Table = {
    **_blocks("visual.trunk.blocks", "image", _TIMM),
    **_blocks("text.transformer.resblocks", "text", _RESIDUAL),
    "visual.trunk.patch_embed.proj": "image.patches",
    "visual.trunk.pos_embed": "raw.image.table",
    "visual.trunk.norm": "image.norm",
    "visual.trunk.attn_pool.latent": "image.pool.query",
    "visual.trunk.attn_pool.q": "image.pool.q",
    "visual.trunk.attn_pool.kv": "image.pool.kv",
    "visual.trunk.attn_pool.proj": "image.pool.out",
    "visual.trunk.attn_pool.norm": "image.pool.norm",
    "visual.trunk.attn_pool.mlp": "image.pool",
    "text.token_embedding.weight": "raw.text.words",
    "text.positional_embedding": "raw.text.table",
    "text.ln_final": "text.norm",
    "text.text_projection": "text.projection",
    "logit_scale": "scale",
    "logit_bias": "bias",
}
_NAMES = Names(
    {
        "tower_cls": "{stack}.cls",
        "tower_other": "{stack}.other",
        "tower_patches": "{stack}.patches",
        "tower_words": "{stack}.words",
        "tower_positions": "{stack}.positions",
        "tower_norm0": "{stack}.norm0",
        "norm1": "{block}.norm1",
        "qkv": "{block}.{part}",
        "proj": "{block}.proj",
        "norm2": "{block}.norm2",
        "fc1": "{block}.fc1",
        "fc2": "{block}.fc2",
        "tower_norm": "{stack}.norm",
        "pool_query": "{stack}.pool.query",
        "pool_q": "{stack}.pool.q",
        "pool_kv": "{stack}.pool.kv",
        "pool_out": "{stack}.pool.out",
        "pool_norm": "{stack}.pool.norm",
        "pool_fc1": "{stack}.pool.fc1",
        "pool_fc2": "{stack}.pool.fc2",
        "tower_projection": "{stack}.projection",
        "scale": "scale",
        "bias": "bias",
    },
    blocks={tower: f"{tower}.blocks.{{n}}" for tower in TOWERS},
    modalities=TOWERS,
)
_BESIDE = (
    (r".*(position_ids|attn_mask)", "a table of numbers"),
    (r"(input_resolution|context_length|vocab_size)", "a number"),
)


def respelled(arrays: Mapping[str, np.ndarray], table: Table) -> dict[str, np.ndarray]:
    """Arrays by the names of a table's right side; what it does not name stays as it is."""
    # The longest first, as one name may begin another.
    rules = [(_pattern(name), table[name]) for name in sorted(table, key=len, reverse=True)]
    return formats.renamed(arrays, lambda name: _spell(name, rules))


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{n\}", r"(\d+)") + r"(?=$|\.|_weight$|_bias$)")


def _spell(name: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for pattern, ours in rules:
        if match := pattern.match(name):
            end = name[match.end() :]
            # PyTorch's own attention writes in_proj_weight, and a layer of it out_proj.weight.
            return ours.format(n=match[1] if match.groups() else "") + re.sub(r"^_", ".", end)
    return name


def split_three(arrays: dict[str, np.ndarray]) -> None:
    """What attention has as one, query above key above value, becomes three; of the pooling two, ``q`` and ``kv``."""
    for name in [name for name in arrays if re.search(r"\.qkv\.(weight|bias)$", name)]:
        stem, end = name.rsplit(".qkv.", 1)
        three = np.split(arrays.pop(name), 3)
        if stem.endswith(".pool"):
            arrays[f"{stem}.q.{end}"], arrays[f"{stem}.kv.{end}"] = three[0], np.concatenate(three[1:])
        else:
            arrays.update({f"{stem}.{part}.{end}": x for part, x in zip(QKV, three, strict=True)})


def _join_three(arrays: dict[str, np.ndarray], places: Callable[[str], bool]) -> None:
    """Undoes `split_three` at the places, names without their layer."""
    for name in list(arrays):
        match = re.fullmatch(r"(.+)\.(query|q)\.(weight|bias)", name)
        if match and places(match[1]):
            stem, _, end = match.groups()
            parts = ("q", "kv") if match[2] == "q" else QKV
            arrays[f"{stem}.qkv.{end}"] = np.concatenate([arrays.pop(f"{stem}.{part}.{end}") for part in parts])


def _is_siglip(arrays: Mapping[str, np.ndarray]) -> bool:
    return "image.pool.query" in arrays


def fold(arrays: dict[str, np.ndarray], ids: Mapping[str, int]) -> None:
    """Takes the learned tokens out of the tables: `Layout.other` and the CLS token of each tower, by `ids_of`."""
    for name in [name for name in arrays if name.startswith("turned.")]:
        arrays[name.removeprefix("turned.")] = arrays.pop(name).T
    split_three(arrays)
    table = arrays.pop("raw.image.table").reshape(-1, arrays["image.norm.weight"].size)
    if "raw.image.class" in arrays:
        arrays["image.cls"] = (arrays.pop("raw.image.class").reshape(-1) + table[0])[None, None]
        table = table[1:]
    arrays["image.positions"] = table
    words, table = arrays.pop("raw.text.words"), arrays.pop("raw.text.table")
    if _is_siglip(arrays):
        arrays["text.cls"] = words[ids["padding"]][None, None]
    else:
        arrays["text.other"] = (words[ids["start"]] + table[0])[None, None]
        arrays["text.cls"] = words[ids["end"]][None, None]
        table = table[1:]
    arrays["text.words"], arrays["text.positions"] = words, table
    for name in ("scale", "bias"):
        if name in arrays:
            arrays[name] = np.asarray(arrays[name]).reshape(())


def ids_of(facts: Mapping[str, Any], words: int) -> dict[str, int]:
    """The ids of ``start``, ``end`` and ``padding``: by the JSON files beside the weights, else as usual.

    Raises:
        UserError: a stated one is no word.
    """
    usual = {"start": words - 2, "end": words - 1, "padding": 1}
    text = facts.get("config", {}).get("text_config") or {}
    stated = {"start": text.get("bos_token_id"), "end": text.get("eos_token_id"), "padding": text.get("pad_token_id")}
    tokenizer = facts.get("open_clip_config", {}).get("model_cfg", {}).get("text_cfg", {}).get("hf_tokenizer_name")
    if "siglip2" in str(tokenizer).lower():  # Gemma's
        stated["padding"] = 0
    if stated["end"] == 2:  # written by older versions, whose code takes the largest id
        stated |= {"start": None, "end": None}
    ids = {name: usual[name] if stated[name] is None else stated[name] for name in usual}
    wrong = {name: i for name, i in ids.items() if not isinstance(i, int) or not 0 <= i < words}
    if facts.get("siglip"):
        wrong = {name: i for name, i in wrong.items() if name == "padding"}
    else:
        wrong.pop("padding", None)
    if wrong:
        raise UserError(f"its ids {wrong} are no words of its table of {words}")
    return {name: int(i or 0) for name, i in ids.items()}


def written_ids(config: ConfigDict, words: int) -> dict[str, int]:
    """As `ids_of`, of a run: where its text's learned tokens are written to, which is where they came from."""
    first, last = config.contrastive.text_ids
    usual = ids_of({}, words)
    return {
        "start": usual["start"] if first < 0 else first,
        "end": usual["end"] if last < 0 else last,
        "padding": usual["padding"] if first < 0 else first,
    }


def unfold(arrays: dict[str, np.ndarray], ids: Mapping[str, int]) -> None:
    """The inverse of `fold`, but for the first rows of positions, which are part of their tokens now."""
    words, table = arrays.pop("text.words").copy(), arrays.pop("text.positions")
    if _is_siglip(arrays):
        words[ids["padding"]] = arrays.pop("text.cls")[0, 0]
    else:
        words[ids["start"]], words[ids["end"]] = arrays.pop("text.other")[0, 0], arrays.pop("text.cls")[0, 0]
        table = np.concatenate([np.zeros_like(table[:1]), table])
    arrays["raw.text.words"], arrays["raw.text.table"] = words, table
    table = arrays.pop("image.positions")
    if "image.cls" in arrays:
        arrays["raw.image.class"] = arrays.pop("image.cls")[0, 0]
        table = np.concatenate([np.zeros_like(table[:1]), table])
    arrays["raw.image.table"] = table


# --- reading


def table_of(names: Iterable[str]) -> Table | None:
    """The spelling of a file's names; None if it is none of these."""
    present = set(names)
    if any(name.startswith("vision_model.") for name in present):
        return TRANSFORMERS
    if "visual.trunk.pos_embed" in present:
        return _OPEN_CLIP_SIGLIP
    return _OPEN_CLIP if "visual.conv1.weight" in present else None


def _beside(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file of a folder, or the file itself, and what the JSON files beside it say."""
    if path.is_dir():
        names = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
        files = [path / name for name in names]
        file = next((file for file in files if file.is_file()), None)
        if file is None and list(path.glob("*.index.json")):
            raise UserError(f"{path} holds the weights in several files, which are not read: save them as one")
        if file is None:
            raise UserError(f"{path} has none of {', '.join(file.name for file in files)}")
    else:
        file = path
    facts: dict[str, Any] = {}
    for name in ("config", "open_clip_config", "preprocessor_config", "processor_config"):
        beside = file.parent / f"{name}.json"
        if beside.is_file():
            facts[name] = formats.json_object(beside)
    facts.setdefault("preprocessor_config", facts.get("processor_config", {}).get("image_processor") or {})
    tokenizer = file.parent / "tokenizer.json"
    return file, facts | ({"tokenizer": str(tokenizer)} if tokenizer.is_file() else {})


def read(path: Path) -> Foreign:
    """A file, or a folder with ``config.json`` or ``open_clip_config.json``."""
    file, facts = _beside(path)
    arrays, _ = torch_file.load_either(file)
    arrays, prefix = formats.unwrapped(arrays)
    notes = formats.prefix_notes(prefix)
    arrays = formats.single(arrays)
    table = table_of(arrays)
    if table is None:
        raise UserError(f"{path} has the names neither of transformers' CLIP and SigLIP nor of open_clip's")
    facts["open_clip"] = table is not TRANSFORMERS
    foreign = Foreign(respelled(arrays, table), facts, notes)
    if missing := [
        f"raw.{name}" for name in ("image.table", "text.words", "text.table") if f"raw.{name}" not in foreign.arrays
    ]:
        raise UserError(f"{path} has one tower alone, or none: it lacks {', '.join(missing)}")
    facts["raw"], facts["siglip"] = dict(foreign.arrays), _is_siglip(foreign.arrays)  # for the comparison
    with formats.reading(path, "CLIP or SigLIP"):
        _refuse_unknown(facts)
        facts["ids"] = ids_of(facts, len(foreign.arrays["raw.text.words"]))
        fold(foreign.arrays, facts["ids"])
    return foreign


def _refuse_unknown(facts: Mapping[str, Any]) -> None:
    """Refuses what open_clip's config asks for and this model does not compute.

    Raises:
        UserError: as said, by the field's name.
    """
    cfg = facts.get("open_clip_config", {}).get("model_cfg", {})
    siglip = facts["siglip"]
    vision, text = (cfg.get(f"{section}_cfg") or {} for section in ("vision", "text"))
    allowed: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "vision_cfg.pool_type": (vision.get("pool_type", "tok"), ("tok", "map")),
        "vision_cfg.timm_pool": (vision.get("timm_pool", "map"), ("map",)),
        "vision_cfg.global_average_pool": (vision.get("global_average_pool", False), (False,)),
        "vision_cfg.attentional_pool": (vision.get("attentional_pool", False), (False,)),
        "vision_cfg.final_ln_after_pool": (vision.get("final_ln_after_pool", False), (False,)),
        "vision_cfg.act_kwargs": (vision.get("act_kwargs"), (None, text.get("act_kwargs"))),
        "text_cfg.pool_type": (
            text.get("pool_type", "last" if siglip else "argmax"),
            ("last",) if siglip else ("argmax",),
        ),
        "text_cfg.no_causal_mask": (text.get("no_causal_mask", siglip), (siglip,)),
        "text_cfg.norm_kwargs": (text.get("norm_kwargs") if not siglip else None, (None,)),
    }
    for name, (value, known) in allowed.items():
        if value not in known:
            raise UserError(
                f"its open_clip_config.json has {name}={value!r}, of which this model knows {known[0]!r} alone"
            )
    kinds = {"clip", "siglip"}
    kind = facts.get("config", {}).get("model_type", "clip")
    if kind not in kinds:
        raise UserError(f"its config.json is of a {kind!r}; one of {', '.join(sorted(kinds))} is needed")


def _stated(facts: Mapping[str, Any], tower: str, name: str, other: str) -> Any:
    """A number of a tower by transformers' config, or by open_clip's; None if neither says it."""
    section = "vision" if tower == "image" else "text"
    theirs = facts.get("config", {}).get(f"{section}_config") or {}
    open_clip = facts.get("open_clip_config", {}).get("model_cfg", {}).get(f"{section}_cfg") or {}
    return theirs.get(name, open_clip.get(other))


def arithmetic(facts: Mapping[str, Any]) -> Arithmetic:
    """By the JSON files beside the weights, else by the defaults of the code that reads them.

    Raises:
        UserError: an activation that there is none of here.
    """
    known = ACTIVATIONS | {QUICK: QUICK}
    siglip = facts.get("siglip", False)
    epsilon = 1e-6 if siglip else 1e-5
    if facts.get("open_clip", False):
        cfg = facts.get("open_clip_config", {}).get("model_cfg", {})
        tanh = (cfg.get("text_cfg", {}).get("act_kwargs") or {}).get("approximate") == "tanh"
        return Arithmetic(QUICK if cfg.get("quick_gelu") else TANH if tanh else ERF, epsilon)
    stated = [_stated(facts, tower, "hidden_act", "") for tower in TOWERS]
    activations = {known.get(one or ("gelu_pytorch_tanh" if siglip else QUICK)) for one in stated}
    if None in activations or len(activations) > 1:
        raise UserError(
            f"its hidden_act={stated!r} of pictures and texts must be one of {', '.join(known)}, and one only"
        )
    epsilons = {float(_stated(facts, tower, "layer_norm_eps", "") or epsilon) for tower in TOWERS}
    if len(epsilons) > 1:
        raise UserError(f"its layer_norm_eps of pictures and texts, {sorted(epsilons)}, must be one")
    return Arithmetic(str(activations.pop()), epsilons.pop())


def describe(foreign: Foreign, config: ConfigDict, report: Report) -> None:
    """Sets both towers by the shapes, what these do not tell by the JSON files beside, else as usual, with a note."""
    arrays, facts, c = foreign.arrays, foreign.facts, config.contrastive
    siglip = _is_siglip(arrays)
    sizes = {tower: _size(foreign, tower, report) for tower in TOWERS}
    if sizes["image"]["mlp_ratio"] != sizes["text"]["mlp_ratio"]:
        raise UserError(
            f"its MLPs are {sizes['image']['mlp_ratio']:g} and {sizes['text']['mlp_ratio']:g} times as wide as the "
            "towers of pictures and texts; one ratio is needed (model.mlp_ratio)"
        )
    config.model.update(sizes["image"])
    c.update({f"text_{name}": sizes["text"][name] for name in ("width", "depth", "heads")})
    config.model.activation, config.model.layer_norm_epsilon = arithmetic(facts)
    layout = "siglip" if siglip else "clip"
    c.update(image_layout=layout, text_layout=layout, image_positions="learned")
    ids = facts["ids"]
    if ids != ids_of({"siglip": siglip}, len(arrays["text.words"])):
        c.text_ids = (ids["padding"], ids["padding"]) if siglip else (ids["start"], ids["end"])
    if "bias" not in arrays and siglip:
        raise UserError("its picture's tower is SigLIP's, but it has no logit_bias")
    c.loss = "sigmoid" if "bias" in arrays else "softmax"
    c.embedding_width = need(arrays, "text.projection.weight").shape[0]
    kernel = need(arrays, "image.patches.weight")
    if kernel.ndim != 4 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]:
        raise UserError(f"its patch embedding is {list(kernel.shape)}; [width, 3, side, side] is needed")
    patch, side = kernel.shape[2], round(len(arrays["image.positions"]) ** 0.5)
    mean, std = ((0.5,) * 3, (0.5,) * 3) if siglip else (CLIP_MEAN, CLIP_STD)
    pixels = facts.get("preprocessor_config", {}) or facts.get("open_clip_config", {}).get("preprocess_cfg", {})
    config.data.update(
        modalities=TOWERS,
        patch_size=patch,
        image_size=patch * side,
        image_mean=tuple(float(x) for x in pixels.get("image_mean", pixels.get("mean", mean))),
        image_std=tuple(float(x) for x in pixels.get("image_std", pixels.get("std", std))),
        max_text_tokens=len(arrays["text.positions"]) - 1,
        tokenizer=facts.get("tokenizer", ""),
    )
    if pixels.get("do_normalize") is False:
        config.data.update(image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
    scale = float(np.exp(np.float64(need(arrays, "scale"))))
    if not 1e-2 <= scale <= 1e4:
        raise UserError(f"its logit_scale={float(arrays['scale'])} is no logarithm of a factor between 0.01 and 10,000")
    low, high = c.temperature_range
    c.temperature_range = (min(low, 0.999 / scale), max(high, 1.001 / scale))
    stated = "config" in facts or "open_clip_config" in facts
    report.notes += [
        f"GELU: model.activation={config.model.activation}, LayerNorm epsilon {config.model.layer_norm_epsilon:g}: "
        f"{'by the JSON file beside it' if stated else 'taken as usual, the file does not tell'}",
        "positions: learned; those of the learned tokens before the others are added to them",
        f"words: the ids of {_said(facts['ids'], siglip)} are tokens of {layout}'s tower here: texts are given without",
    ]


def _said(ids: Mapping[str, int], siglip: bool) -> str:
    names = ("padding",) if siglip else ("start", "end")
    return " and ".join(f"the {name}, {ids[name]}" for name in names)


def _size(foreign: Foreign, tower: str, report: Report) -> dict[str, Any]:
    arrays = foreign.arrays
    hidden, width = need(arrays, f"{tower}.blocks.0.fc1.weight").shape
    stated = _stated(foreign.facts, tower, "num_attention_heads", "heads")
    head_width = _stated(foreign.facts, tower, "", "head_width")
    heads = int(stated or (width // head_width if head_width else 0) or _WIDE.get(width, width // 64) or 1)
    if not stated and not head_width:
        report.notes.append(f"heads of the {tower} tower: taken as {heads}, the file does not tell")
    depth = formats.blocks(arrays, f"{tower}.blocks.{{n}}")
    return {"width": width, "depth": depth, "heads": heads, "mlp_ratio": formats.mlp_ratio(width, hidden)}


def adapt(foreign: Foreign, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """Brings the tables of positions to the config's picture and text."""
    del foreign
    side, before = patch_grid(config)[0], round(len(arrays["image.positions"]) ** 0.5)
    if side != before:
        arrays["image.positions"] = resize(arrays["image.positions"], (before, before), (side, side))
        report.notes.append(
            f"positions (image): interpolated for {side} x {side} patches, there are {before} x {before}"
        )
    words, rows = config.data.max_text_tokens + 1, len(arrays["text.positions"])
    if words < rows and not _is_siglip(arrays):
        arrays["text.positions"] = arrays["text.positions"][:words]
        report.notes.append(f"positions (text): the first {words - 1} of {rows - 1}")
    elif words != rows:
        raise UserError(f"data.max_text_tokens={words - 1}: its positions are for {rows - 1} tokens")


# --- writing


def _write(theirs: Table, config: ConfigDict, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays = dict(arrays)
    unfold(arrays, written_ids(config, len(arrays["text.words"])))
    open_clip = theirs is not TRANSFORMERS
    _join_three(arrays, lambda stem: (open_clip and ".blocks." in stem) or (not open_clip and stem.endswith(".pool")))
    if theirs is _OPEN_CLIP:
        for tower in TOWERS:
            arrays[f"turned.{tower}.projection.weight"] = arrays.pop(f"{tower}.projection.weight").T
    elif theirs is _OPEN_CLIP_SIGLIP:
        arrays["raw.image.table"] = arrays["raw.image.table"][None]
    siglip = _is_siglip(arrays)
    back = {ours: name for name, ours in theirs.items() if siglip or name != "text_model.head"}
    back |= {} if not siglip or open_clip else {"text.projection": "text_model.head"}
    written = respelled(arrays, back)
    # PyTorch's own attention has its three as parameters of its own, without a layer.
    written = {re.sub(r"\.in_proj\.(weight|bias)$", r".in_proj_\1", name): value for name, value in written.items()}
    number = (1,) if siglip and not open_clip else ()
    shapes = {name: number if name.startswith("logit_") else value.shape for name, value in written.items()}
    return {name: np.ascontiguousarray(value).reshape(shapes[name]) for name, value in written.items()}


def _check(config: ConfigDict, name: str) -> bool:
    """Whether the model is SigLIP's and not CLIP's.

    Raises:
        UserError: it is neither.
    """
    layouts = {config.contrastive[f"{tower}_layout"] for tower in TOWERS}
    if len(layouts) > 1 or not layouts <= {"clip", "siglip"} or config.contrastive.image_positions != "learned":
        raise UserError(
            f"--to={name} needs contrastive.image_layout and text_layout 'clip' or 'siglip', both the same, and "
            f"image_positions='learned'; the run has {config.contrastive.image_layout!r}, "
            f"{config.contrastive.text_layout!r} and {config.contrastive.image_positions!r}"
        )
    return layouts == {"siglip"}


def architecture(config: ConfigDict) -> dict[str, Any]:
    """What transformers' ``CLIPConfig`` or ``SiglipConfig`` takes, of a resolved config."""
    m, c, d = config.model, config.contrastive, config.data
    siglip = _check(config, "clip")
    activation = {ERF: "gelu", TANH: "gelu_pytorch_tanh", QUICK: QUICK}[m.activation]
    common = {"hidden_act": activation, "layer_norm_eps": m.layer_norm_epsilon, "attention_dropout": 0.0}
    widths = {"image": (m.width, m.depth, m.heads)}
    widths["text"] = (c.text_width or m.width, c.text_depth or m.depth, c.text_heads or m.heads)
    towers = {
        tower: {
            **common,
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "intermediate_size": int(width * m.mlp_ratio),
            **({} if siglip else {"projection_dim": c.embedding_width}),
        }
        for tower, (width, depth, heads) in widths.items()
    }
    towers["image"] |= {"image_size": d.image_size, "patch_size": d.patch_size}
    towers["text"] |= {"max_position_embeddings": d.max_text_tokens + (1 if siglip else 2)}
    if siglip:
        towers["text"] |= {"projection_size": c.embedding_width}
    kind = "siglip" if siglip else "clip"
    return {
        "architectures": ["SiglipModel" if siglip else "CLIPModel"],
        "model_type": kind,
        **({} if siglip else {"projection_dim": c.embedding_width}),
        "text_config": {"model_type": f"{kind}_text_model", **towers["text"]},
        "vision_config": {"model_type": f"{kind}_vision_model", **towers["image"]},
        "torch_dtype": "float32",
    }


def write(path: Path, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """A folder that ``CLIPModel.from_pretrained``, or ``SiglipModel``'s, takes; without a tokenizer."""
    content = architecture(config)
    vocabulary = len(arrays["text.words"])
    ids, siglip = written_ids(config, vocabulary), content["model_type"] == "siglip"
    if config.contrastive.text_ids[0] < 0:
        report.notes.append(f"{_said(ids, siglip)} in the table of words that is written, as usual")
    of_tokens = {"bos_token_id": ids["start"], "eos_token_id": ids["end"], "pad_token_id": ids["end"]}
    content["text_config"] |= {
        "vocab_size": vocabulary,
        **({"pad_token_id": ids["padding"]} if siglip else of_tokens),
    }
    path.mkdir(parents=True, exist_ok=True)
    safetensors.save(path / "model.safetensors", _write(TRANSFORMERS, config, arrays), {"format": "pt"})
    kind = "SiglipImageProcessor" if content["model_type"] == "siglip" else "CLIPImageProcessor"
    pixels = {**formats.image_processor(kind, config), "do_center_crop": False}
    for name, text in (("config", content), ("preprocessor_config", pixels)):
        (path / f"{name}.json").write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    report.notes.append("the tokenizer is not written: copy tokenizer.json beside it")


def write_open_clip(path: Path, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """One ``.safetensors`` file that ``open_clip.create_model(NAME, pretrained=FILE)`` takes."""
    siglip = _check(config, "open_clip")
    words = len(arrays["text.words"])
    if not siglip and written_ids(config, words) != ids_of({}, words):
        raise UserError(
            f"--to=open_clip: {_said(written_ids(config, words), siglip)}, and open_clip takes the last word as the "
            "end; use --to=clip"
        )
    safetensors.save(path, _write(_OPEN_CLIP_SIGLIP if siglip else _OPEN_CLIP, config, arrays), {"format": "pt"})
    if config.model.activation == QUICK:
        report.notes.append("make the model with force_quick_gelu=True")


FORMAT = Format(
    "transformers' CLIP or SigLIP: a folder, or its model.safetensors",
    read,
    describe,
    write,
    _NAMES,
    arithmetic,
    beside=_BESIDE,
    endings=(),
    folders=True,
    objective="contrastive",
    adapt=adapt,
)
OPEN_CLIP = dataclasses.replace(
    FORMAT,
    about="open_clip's CLIP or SigLIP: FILE.safetensors, or a folder with open_clip_config.json",
    write=write_open_clip,
    endings=(".safetensors",),
)
