"""BERT of transformers and of the original release: its encoder as a captions' tower (`models.encoder.LAYOUTS`).

Older files call the parameters of LayerNorm ``gamma`` and ``beta``. A text's ``[CLS]`` and ``[SEP]``, and the type of a
first sentence, become part of tokens and positions here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.convert import formats, torch_file
from m3ae_jax.convert.formats import ACTIVATIONS, Arithmetic, Foreign, Format, need
from m3ae_jax.convert.keymap import Names, Report
from m3ae_jax.errors import UserError
from m3ae_jax.paths import local

_OLD = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
WORDS, PLACES, TYPES = (f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type"))
_USUAL = {"[CLS]": 101, "[SEP]": 102}  # ids of the published vocabularies
_NAMES = Names(
    {
        "cls": "cls",
        "tower_other": "other",
        "text": WORDS,
        "tower_positions": "positions",
        "tower_norm0": "embeddings.LayerNorm",
        "qkv": "{block}.attention.self.{part}",
        "proj": "{block}.attention.output.dense",
        "norm1": "{block}.attention.output.LayerNorm",
        "fc1": "{block}.intermediate.dense",
        "fc2": "{block}.output.dense",
        "norm2": "{block}.output.LayerNorm",
    },
    blocks={"encoder": "encoder.layer.{n}"},
    modalities=("text",),
)
_BESIDE = (
    (r"pooler\..*", "of its next-sentence head"),
    (r"cls\..*", "of its heads of words and of the next sentence"),
    (r"(classifier|qa_outputs)\..*", "of a task's head"),
    (r".*position_ids", "a table of numbers"),
)


def is_bert(names: Iterable[str]) -> bool:
    """Whether a file's names are BERT's."""
    return any(name.endswith(WORDS) for name in names)


def read(path: Path) -> Foreign:
    """A file, or a folder; ``config.json`` and ``vocab.txt`` beside it are read."""
    file = path
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        file = next((one for one in files if one.is_file()), path / "model.safetensors")
    arrays, _ = torch_file.load_either(file)
    if any(".crossattention." in name for name in arrays):
        raise UserError(
            f"{path} has cross-attention beside BERT's layers: of models of pictures and captions SIMLA's and ALBEF's "
            "are read, whose pictures' tower is visual_encoder"
        )
    beside = file.parent / "config.json"
    facts = formats.json_object(beside) if beside.is_file() else {}
    if (file.parent / "vocab.txt").is_file():
        facts["vocab"] = str(file.parent / "vocab.txt")
    kind = facts.get("model_type", "bert")
    prefix = next(name for name in arrays if name.endswith(WORDS)).removesuffix(WORDS) if is_bert(arrays) else ""
    *_, last = ("", *prefix.rstrip(".").split("."))
    if kind != "bert" or last not in ("", "bert", "module", "model", "_orig_mod"):
        raise UserError(
            f"{path} is of a {kind if kind != 'bert' else last!r}, with other positions and ids of [CLS] and [SEP]; "
            "only 'bert' is read"
        )
    arrays = formats.single(arrays)
    notes = formats.prefix_notes(prefix) if prefix not in ("", "bert.") else []
    return Foreign(formats.renamed(arrays, lambda name: respelled(name.removeprefix(prefix))), facts, notes)


def respelled(name: str) -> str:
    """A parameter's name as today's."""
    return re.sub(r"\.LayerNorm\.(gamma|beta)$", lambda m: _OLD[m[0]], name)


def arithmetic(facts: Mapping[str, Any]) -> Arithmetic:
    """By ``config.json``, else BERT's.

    Raises:
        UserError: an activation that there is none of here, or positions of another kind.
    """
    activation = str(facts.get("hidden_act", "gelu"))
    if activation not in ACTIVATIONS:
        raise UserError(f"its hidden_act={activation!r} is none of {', '.join(ACTIVATIONS)}")
    if facts.get("is_decoder"):
        raise UserError("its is_decoder=true: its tokens see those before them alone; only encoders are read")
    if facts.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"its position_embedding_type={facts['position_embedding_type']!r}: only 'absolute' is read")
    return Arithmetic(ACTIVATIONS[activation], float(facts.get("layer_norm_eps", 1e-12)))


def describe(foreign: Foreign, config: ConfigDict, report: Report) -> None:
    """Sets the model as in ``config.json``, or as its shapes and BERT's habits say."""
    arrays, facts, m = foreign.arrays, foreign.facts, config.model
    if "num_attention_heads" in facts:
        m.heads = int(facts["num_attention_heads"])
    if not m.heads:
        m.heads = max(m.width // 64, 1)
        report.notes.append(f"heads: taken as {m.heads}, 64 channels each: the file does not tell")
    m.activation, m.layer_norm_epsilon = arithmetic(facts)
    config.m3ae.layout, config.m3ae.text_mask_ratio = "bert", 0.15
    config.data.modalities = ("text",)
    config.data.max_text_tokens = len(need(arrays, PLACES)) - 2
    config.data.tokenizer = facts.get("vocab", "")
    if "model_type" not in facts:
        report.notes.append(
            "taken as BERT: relatives, as RoBERTa, have the same names, and there is no config.json beside"
        )
    report.notes += [
        f"LayerNorm after each residual, epsilon {m.layer_norm_epsilon:g}; GELU: model.activation={m.activation}",
        "for a captions' tower: --config.mamo.text_layout=bert --config.mamo.text_from=RUN (contrastive likewise)",
    ]


def adapt(foreign: Foreign, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """Makes the learned tokens of the ids of ``[CLS]`` and ``[SEP]``, and positions for the config's length."""
    ids = ids_of(config.data.tokenizer, len(arrays[WORDS]))
    words, places = arrays[WORDS], arrays.pop(PLACES)
    kind = arrays.pop(TYPES)[0] if TYPES in arrays else np.zeros_like(places[0])
    rows = config.data.max_text_tokens + 1
    if rows > len(places) - 1:
        raise UserError(f"data.max_text_tokens={rows - 1}: its positions are for {len(places) - 2} tokens")
    arrays["cls"] = (words[ids["[CLS]"]] + places[0] + kind)[None, None]
    arrays["other"] = words[ids["[SEP]"]][None, None]
    arrays["positions"] = places[1 : 1 + rows] + kind
    report.notes.append(f"[CLS] is id {ids['[CLS]']} of the words, [SEP] {ids['[SEP]']}")


def ids_of(tokenizer: str, words: int, usual: Mapping[str, int] = _USUAL) -> dict[str, int]:
    """The ids of ``[CLS]`` and ``[SEP]``, or of others: by a vocabulary of lines, else the usual ones.

    Raises:
        UserError: there are not so many words.
    """
    ids = dict(usual)
    if tokenizer.endswith(".txt"):
        file = local(tokenizer, "data.tokenizer")
        with formats.reading(file, "vocabulary in UTF-8"):
            lines = file.read_text(encoding="utf-8").splitlines()
        ids = {name: lines.index(name) for name in ids if name in lines} or ids
    if len(ids) < len(usual) or max(ids.values()) >= words:
        raise UserError(
            f"it does not tell the ids of {' and '.join(usual)}: give its vocabulary, --config.data.tokenizer=vocab.txt"
        )
    return ids


def write(path: Path, arrays: dict[str, np.ndarray], config: ConfigDict, report: Report) -> None:
    """Not there: a run's tower has no next-sentence head, no words' head and no tokens' ids of its own."""
    raise UserError("--to=bert: BERT's weights are read, and not written; --to=safetensors keeps our names")


FORMAT = Format(
    "BERT: a folder with config.json and vocab.txt, or its model.safetensors",
    read,
    describe,
    write,
    _NAMES,
    arithmetic,
    beside=_BESIDE,
    folders=True,
    adapt=adapt,
)
