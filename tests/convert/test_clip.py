"""CLIP, SigLIP and BERT without PyTorch: written as theirs, our models compute the same by NumPy, and come back."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

import m3ae_jax.config as config_lib
import m3ae_jax.inference as inference
from m3ae_jax.convert import bert, check, convert, safetensors
from m3ae_jax.convert.convert import Converted
from m3ae_jax.convert.formats import Foreign
from m3ae_jax.convert.keymap import Report
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import build

WORDS = 40


def run_of(layout: str, folder: Path) -> inference.Stored:
    """A run with random numbers in all its parameters."""
    config = config_lib.default("contrastive")
    config.model.update(width=32, depth=2, heads=4, activation="quick_gelu" if layout == "clip" else "gelu_tanh")
    config.model.layer_norm_epsilon = 1e-5 if layout == "clip" else 1e-6
    config.data.update(image_size=24, patch_size=8, max_text_tokens=10)
    config.contrastive.update(image_layout=layout, text_layout=layout, image_positions="learned")
    config.contrastive.update(embedding_width=32, loss="softmax" if layout == "clip" else "sigmoid")
    resolved = config_lib.resolve(config)
    rng = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(build(resolved, WORDS).init, jax.random.key(0)))
    params = jax.tree.map(lambda x: np.float32(rng.standard_normal(x.shape) * 0.3 + (x.ndim == 1) * 0.5), shapes)
    params["contrast"]["scale"] = np.float32(3.0)
    convert.write_run(Converted("clip", resolved, params, Report(), Foreign({}), WORDS), folder)
    return inference.read(str(folder))


@pytest.mark.parametrize("format", ["clip", "open_clip"])
@pytest.mark.parametrize("layout", ["clip", "siglip"])
def test_what_is_written_computes_the_same_by_numpy_and_comes_back(layout: str, format: str, tmp_path: Path) -> None:
    stored = run_of(layout, tmp_path / "run")
    path = tmp_path / ("theirs" if format == "clip" else "theirs.safetensors")
    assert not convert.export_weights(stored, format, path).unused
    given = [
        ("model.heads", "4"),
        ("contrastive.text_heads", "4"),
        ("model.activation", stored.config.model.activation),
    ]
    again = convert.import_weights(path, overrides=given)
    assert again.format == format and not again.report.missing and not again.report.unused
    compared = check.compare(again)
    if format == "clip":  # a file of open_clip tells no activation
        assert compared.close and set(compared.errors) == {"image embeddings", "text embeddings"}, compared.text()
    tables = ("text/embedding/embedding",)  # rows of the start, the end and the padding are the tokens' now
    for place, x in jax.tree_util.tree_leaves_with_path(again.params):
        name = jax.tree_util.keystr(place, simple=True, separator="/")
        before: Any = stored.params
        for key in name.split("/"):
            before = before[key]
        if not name.endswith(tables):
            np.testing.assert_array_equal(x, before, err_msg=name)


@pytest.mark.parametrize(
    ("layout", "ids"), [("clip", {"bos_token_id": 3, "eos_token_id": 4}), ("siglip", {"pad_token_id": 0})]
)
def test_tokens_go_back_to_the_ids_that_they_came_from(layout: str, ids: dict[str, int], tmp_path: Path) -> None:
    """And no word is overwritten: the tokenizer of the weights says these ids."""
    convert.export_weights(run_of(layout, tmp_path / "run"), "clip", tmp_path / "usual")
    content = json.loads((tmp_path / "usual" / "config.json").read_bytes())
    text = content["text_config"] | ids
    theirs = changed(tmp_path / "usual", "config.json", text_config=text)
    before, _ = safetensors.load(theirs / "model.safetensors")
    converted = convert.import_weights(theirs)
    convert.write_run(converted, tmp_path / "again")
    stored = inference.read(str(tmp_path / "again"))
    convert.export_weights(stored, "clip", tmp_path / "back")
    after, _ = safetensors.load(tmp_path / "back" / "model.safetensors")
    words, back = (x["text_model.embeddings.token_embedding.weight"] for x in (before, after))
    untouched = np.setdiff1d(np.arange(WORDS), list(ids.values()))
    np.testing.assert_array_equal(words[untouched], back[untouched])
    written = json.loads((tmp_path / "back" / "config.json").read_bytes())["text_config"]
    assert {name: written[name] for name in ids} == ids
    assert check.compare(convert.import_weights(tmp_path / "back")).close
    if layout == "clip":
        with pytest.raises(
            UserError, match="--to=open_clip: the start, 3 and the end, 4, and open_clip takes the last"
        ):
            convert.export_weights(stored, "open_clip", tmp_path / "other.safetensors")


def test_a_parameter_by_two_names_is_refused_and_one_that_is_not_finite(tmp_path: Path) -> None:
    convert.export_weights(run_of("siglip", tmp_path / "run"), "clip", tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    arrays, metadata = safetensors.load(file)
    twice = arrays | {"text_projection.weight": arrays["text_model.head.weight"]}
    safetensors.save(file, twice, metadata)
    with pytest.raises(UserError, match=r"both text_model.head.weight and text_projection.weight, names of one"):
        convert.import_weights(tmp_path / "theirs")
    words = "text_model.embeddings.token_embedding.weight"
    bad = arrays[words].copy()
    bad[5, 0] = np.nan
    safetensors.save(file, arrays | {words: bad}, metadata)
    with pytest.raises(UserError, match="numbers that are not finite"):
        convert.import_weights(tmp_path / "theirs")
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = f"{{{entry}, {entry}}}".encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(UserError, match="'a' is there twice"):
        safetensors.load(file)


def test_the_comparison_sees_what_is_wrong(tmp_path: Path) -> None:
    stored = run_of("clip", tmp_path / "run")
    convert.export_weights(stored, "clip", tmp_path / "theirs")
    again = convert.import_weights(tmp_path / "theirs")
    assert check.compare(again).close
    for change in ("mlp_in", "position_embedding", "cls_token", "other_token", "embedding_norm"):
        wrong = jax.tree_util.tree_map_with_path(
            lambda path, x, change=change: x * 1.1 if change in jax.tree_util.keystr(path) else x, again.params
        )
        assert not check.compare(Converted(again.format, again.config, wrong, again.report, again.foreign, WORDS)).close


@pytest.mark.parametrize("old", [False, True])
def test_a_bert_computes_the_same_by_numpy(old: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ends = ("gamma", "beta") if old else ("weight", "bias")
    arrays: dict[str, np.ndarray] = {
        bert.WORDS: rng.standard_normal((120, 64)), bert.PLACES: rng.standard_normal((12, 64)),
        bert.TYPES: rng.standard_normal((2, 64)), "pooler.dense.weight": np.ones((64, 64)),
    }  # fmt: skip
    linear = {"attention.self.query": (64, 64), "attention.self.key": (64, 64), "attention.self.value": (64, 64)}
    linear |= {"attention.output.dense": (64, 64), "intermediate.dense": (128, 64), "output.dense": (64, 128)}
    for n in range(2):
        for name, shape in linear.items():
            arrays[f"encoder.layer.{n}.{name}.weight"] = rng.standard_normal(shape) * 0.2
            arrays[f"encoder.layer.{n}.{name}.bias"] = rng.standard_normal(shape[0]) * 0.2
    norms = ["embeddings"] + [f"encoder.layer.{n}.{at}output" for n in range(2) for at in ("attention.", "")]
    arrays |= {f"{norm}.LayerNorm.{end}": rng.standard_normal(64) * 0.2 + 0.5 for norm in norms for end in ends}
    path = tmp_path / "model.safetensors"
    safetensors.save(path, {f"bert.{name}": np.float32(x) for name, x in arrays.items()}, {})
    converted = convert.import_weights(path, overrides=[("model.heads", "2")])
    assert converted.format == "bert" and converted.config.model.heads == 2
    compared = check.compare(converted)
    assert compared.close and compared.errors, compared.text()
    with pytest.raises(UserError, match=r"--to=bert: BERT's weights are read, and not written"):
        convert.write_run(converted, tmp_path / "run")
        convert.export_weights(inference.read(str(tmp_path / "run")), "bert", tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["clip", "mae"])
def test_a_bert_is_not_written_as_another(name: str) -> None:
    config = config_lib.default()
    config.m3ae.layout = "bert"
    with pytest.raises(UserError, match=r"holds models of contrastive|has no such encoder; --to=safetensors has"):
        convert._check_expressible(convert.FORMATS[name], config, name, encoder_only=True)


def changed(folder: Path, file: str, **content: Any) -> Path:
    path = folder / file
    before = json.loads(path.read_bytes()) if path.exists() else {}
    path.write_text(json.dumps(before | content))
    return folder


@pytest.mark.parametrize("kind", ["float16", "prefix", "ids"])
def test_other_habits_give_the_same_model(kind: str, tmp_path: Path) -> None:
    stored = run_of("clip", tmp_path / "run")
    convert.export_weights(stored, "clip", tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    arrays = dict(safetensors.load(file)[0])
    if kind == "ids":
        words = arrays["text_model.embeddings.token_embedding.weight"].copy()
        words[[3, 4, -2, -1]] = words[[-2, -1, 3, 4]]
        arrays["text_model.embeddings.token_embedding.weight"] = words
        text = json.loads((tmp_path / "theirs" / "config.json").read_bytes())["text_config"]
        changed(tmp_path / "theirs", "config.json", text_config=text | {"bos_token_id": 3, "eos_token_id": 4})
    if kind == "prefix":
        arrays = {f"module.{name}": x for name, x in arrays.items()}
    halves = {name: x.astype(np.float16) for name, x in arrays.items()} if kind == "float16" else {}
    safetensors.save(file, arrays, {})
    with pytest.MonkeyPatch.context() as patch:
        if halves:
            patch.setattr(safetensors, "load", lambda path: (halves, {}))
        again = convert.import_weights(tmp_path / "theirs")
    assert check.compare(again).close
    if kind != "float16":
        for name in ("cls_token", "other_token"):
            np.testing.assert_array_equal(again.params["text"][name], stored.params["text"][name])


def test_padding_is_what_the_config_says(tmp_path: Path) -> None:
    convert.export_weights(run_of("siglip", tmp_path / "run"), "clip", tmp_path / "theirs")
    text = json.loads((tmp_path / "theirs" / "config.json").read_bytes())["text_config"]
    words = safetensors.load(tmp_path / "theirs" / "model.safetensors")[0][
        "text_model.embeddings.token_embedding.weight"
    ]
    for pad in (1, 0):
        changed(tmp_path / "theirs", "config.json", text_config=text | {"pad_token_id": pad})
        again = convert.import_weights(tmp_path / "theirs")
        np.testing.assert_array_equal(again.params["text"]["cls_token"][0, 0], words[pad])
        assert check.compare(again).close
    changed(tmp_path / "theirs", "config.json", text_config=text | {"pad_token_id": WORDS})
    with pytest.raises(UserError, match="'padding': 40} are no words of its table of 40"):
        convert.import_weights(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", {"model_type": "chinese_clip"}, "read are 'vit_mae', 'clip', 'siglip', 'bert'"),
        (
            "config.json",
            {"vision_config": {"layer_norm_eps": 0.01}},
            r"layer_norm_eps of pictures and texts, .* must be",
        ),
        ("config.json", {"vision_config": {"hidden_act": "relu"}}, "hidden_act"),
        ("open_clip_config.json", {"model_cfg": {"vision_cfg": {"pool_type": "avg"}}}, r"vision_cfg.pool_type='avg'"),
        (
            "open_clip_config.json",
            {"model_cfg": {"text_cfg": {"no_causal_mask": True}}},
            r"text_cfg.no_causal_mask=True",
        ),
    ],
)
def test_what_this_model_does_not_compute_is_refused(file: str, content: Any, said: str, tmp_path: Path) -> None:
    format = "open_clip" if file.startswith("open") else "clip"
    path = tmp_path / ("theirs" if format == "clip" else "theirs/open_clip_model.safetensors")
    path.parent.mkdir(exist_ok=True)
    convert.export_weights(run_of("clip", tmp_path / "run"), format, path)
    with pytest.raises(UserError, match=said):
        convert.import_weights(changed(tmp_path / "theirs", file, **content))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"model_type": "roberta"}, "is of a 'roberta'"), ({"is_decoder": True}, "its is_decoder=true")],
)
def test_a_relative_of_bert_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    arrays = {bert.WORDS: np.zeros((120, 64), np.float32), bert.PLACES: np.zeros((12, 64), np.float32)}
    arrays |= {"encoder.layer.0.intermediate.dense.weight": np.zeros((128, 64), np.float32)}
    safetensors.save(tmp_path / "model.safetensors", arrays, {})
    with pytest.raises(UserError, match=said):
        convert.import_weights(changed(tmp_path, "config.json", **change), "bert")


def test_a_run_is_neither_overwritten_nor_changed(tmp_path: Path) -> None:
    stored = run_of("clip", tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UserError, match="is a run's folder: name another"):
        convert.export_weights(stored, "clip", tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    for workdir, said in ((tmp_path / "run", "holds a run already"), (tmp_path / "run" / "config.json", "is a file")):
        with pytest.raises(UserError, match=said):
            convert.check_free(workdir)
    convert.export_weights(stored, "clip", tmp_path / "theirs")
    with pytest.raises(UserError, match=r"--config.objective: a clip becomes a run of contrastive"):
        convert.import_weights(tmp_path / "theirs", overrides=[("objective", "mamo")])
