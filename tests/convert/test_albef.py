"""SIMLA and ALBEF, small and with random weights: the same numbers by NumPy, and by PyTorch's own functions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import m3ae_jax.inference as inference
from m3ae_jax.convert import albef, check, convert, safetensors
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import build

WIDTH, DEPTH, PATCH, SIDE, JOINT, WORDS, ROWS, QUEUE = 64, 4, 8, 2, 24, 120, 20, 16
FUSION = {"simla": 0, "albef": 2}
IDS = {"[CLS]": 101, "[SEP]": 102}
CHANGES = [("data.max_text_tokens", "8"), ("batch_size", "4")]
TEXT = "text_encoder.bert."
FEATURES = ("image CLS", "text CLS", "fused CLS")
State = dict[str, np.ndarray]


def state_of(kind: str) -> State:
    """The tensors of a file of pretraining; one head, 64 wide, as wide as the model."""
    rng, state, simla = np.random.default_rng(0), {}, kind == "simla"

    def draw(name: str, *shape: int) -> None:
        state[name] = np.float32(rng.standard_normal(shape) * 0.2 + (len(shape) == 1) * 0.5)

    def linear(name: str, inputs: int, outputs: int) -> None:
        draw(f"{name}.weight", outputs, inputs)
        draw(f"{name}.bias", outputs)

    def norm(name: str) -> None:
        draw(f"{name}.weight", WIDTH)
        draw(f"{name}.bias", WIDTH)

    for end in ("", "_m"):
        vit, bert = f"visual_encoder{end}", f"text_encoder{end}.bert"
        draw(f"{vit}.cls_token", 1, 1, WIDTH)
        draw(f"{vit}.pos_embed", 1, 1 + SIDE**2, WIDTH)
        draw(f"{vit}.patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH)
        draw(f"{vit}.patch_embed.proj.bias", WIDTH)
        norm(f"{vit}.norm")
        for n in range(DEPTH):
            at = f"{vit}.blocks.{n}"
            linear(f"{at}.attn.qkv", WIDTH, 3 * WIDTH)
            linear(f"{at}.attn.proj", WIDTH, WIDTH)
            linear(f"{at}.mlp.fc1", WIDTH, 4 * WIDTH)
            linear(f"{at}.mlp.fc2", 4 * WIDTH, WIDTH)
            norm(f"{at}.norm1")
            norm(f"{at}.norm2")
            at = f"{bert}.encoder.layer.{n}"
            for name in ("attention", "crossattention") if n >= FUSION[kind] else ("attention",):
                for part in ("query", "key", "value"):
                    linear(f"{at}.{name}.self.{part}", WIDTH, WIDTH)
                linear(f"{at}.{name}.output.dense", WIDTH, WIDTH)
                norm(f"{at}.{name}.output.LayerNorm")
            linear(f"{at}.intermediate.dense", WIDTH, 4 * WIDTH)
            linear(f"{at}.output.dense", 4 * WIDTH, WIDTH)
            norm(f"{at}.output.LayerNorm")
        tables = {"word": WORDS, "position": ROWS} | ({} if simla else {"token_type": 2})
        for name, rows in tables.items():
            draw(f"{bert}.embeddings.{name}_embeddings.weight", rows, WIDTH)
        norm(f"{bert}.embeddings.LayerNorm")
        state[f"{bert}.embeddings.position_ids"] = np.arange(ROWS)[None]
        cls = f"text_encoder{end}.cls.predictions"
        linear(f"{cls}.transform.dense", WIDTH, WIDTH)
        norm(f"{cls}.transform.LayerNorm")
        draw(f"{cls}.bias", WORDS)
        state[f"{cls}.decoder.weight"] = state[f"{bert}.embeddings.word_embeddings.weight"]
        state[f"{cls}.decoder.bias"] = state[f"{cls}.bias"]
        linear(f"vision_proj{end}", WIDTH, JOINT)
        linear(f"text_proj{end}", WIDTH, JOINT)
        if simla:
            draw(f"{vit}.mask_token", 1, 1, WIDTH)
            linear(f"mim_head{end}", WIDTH, 50)
            linear(f"concept_head{end}", JOINT, WORDS)
    linear("itm_head", WIDTH, 2)
    state["temp"], state["queue_ptr"] = np.float32(0.05), np.array([4])
    for name in ("image", "text"):
        draw(f"{name}_queue", JOINT, QUEUE)
    return state


class Theirs:
    """The passes of section 2.1 of SIMLA's paper, or of 3.1 of ALBEF's, on a file's tensors, by PyTorch."""

    def __init__(self, state: State, first: int) -> None:
        self.torch: Any = pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
        self.f, self.first = self.torch.nn.functional, first
        self.a = {n: self.torch.from_numpy(np.array(x)).double() for n, x in state.items() if x.dtype == np.float32}

    def linear(self, name: str, x: Any) -> Any:
        return self.f.linear(x, self.a[f"{name}.weight"], self.a[f"{name}.bias"])

    def norm(self, name: str, x: Any, epsilon: float = 1e-12) -> Any:
        return self.f.layer_norm(x, (WIDTH,), self.a[f"{name}.weight"], self.a[f"{name}.bias"], epsilon)

    def picture(self, pixels: Any) -> Any:
        at, f = "visual_encoder", self.f
        proj = f"{at}.patch_embed.proj"
        x = f.conv2d(pixels, self.a[f"{proj}.weight"], self.a[f"{proj}.bias"], stride=PATCH).flatten(2).transpose(1, 2)
        x = self.torch.cat([self.a[f"{at}.cls_token"].expand(len(x), 1, -1), x], 1) + self.a[f"{at}.pos_embed"]
        for n in range(DEPTH):
            block = f"{at}.blocks.{n}"
            q, k, v = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.linear(f"{block}.attn.proj", f.scaled_dot_product_attention(q, k, v))
            hidden = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", f.gelu(hidden))
        return self.norm(f"{at}.norm", x, 1e-6)

    def places(self, rows: int) -> Any:
        return self.a[f"{TEXT}embeddings.position_embeddings.weight"][:rows]

    def words(self, ids: Any) -> Any:
        x = self.a[f"{TEXT}embeddings.word_embeddings.weight"][ids] + self.places(ids.shape[1])
        types = self.a.get(f"{TEXT}embeddings.token_type_embeddings.weight")
        return self.norm(f"{TEXT}embeddings.LayerNorm", x if types is None else x + types[0])

    def attended(self, at: str, x: Any, seen: Any, valid: Any) -> Any:
        q, k, v = (self.linear(f"{at}.self.{name}", y) for name, y in (("query", x), ("key", seen), ("value", seen)))
        mixed = self.f.scaled_dot_product_attention(q, k, v, None if valid is None else valid[:, None])
        return self.norm(f"{at}.output.LayerNorm", self.linear(f"{at}.output.dense", mixed) + x)

    def layers(self, x: Any, valid: Any, layers: range, seen: Any = None, seen_valid: Any = None) -> Any:
        for n in layers:
            at = f"{TEXT}encoder.layer.{n}"
            x = self.attended(f"{at}.attention", x, x, valid)
            if seen is not None:
                x = self.attended(f"{at}.crossattention", x, seen, seen_valid)
            hidden = self.linear(f"{at}.output.dense", self.f.gelu(self.linear(f"{at}.intermediate.dense", x)))
            x = self.norm(f"{at}.output.LayerNorm", hidden + x)
        return x

    def outputs(self, pixels: np.ndarray, ids: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
        """Of normalised pixels `[N, S, S, 3]` and captions from ``[CLS]`` to ``[SEP]``."""
        real = self.torch.from_numpy(valid)
        seen, words = self.picture(self.torch.from_numpy(pixels).double().permute(0, 3, 1, 2)), self.words(ids)
        alone = self.layers(words, real, range(self.first or DEPTH))
        fused = self.layers(alone if self.first else words, real, range(self.first, DEPTH), seen)
        of_words = "text_encoder.cls.predictions"
        hidden = self.norm(
            f"{of_words}.transform.LayerNorm", self.f.gelu(self.linear(f"{of_words}.transform.dense", fused))
        )
        match = self.linear("itm_head", fused[:, 0])
        out = {
            "image": self.f.normalize(self.linear("vision_proj", seen[:, 0])),
            "text": self.f.normalize(self.linear("text_proj", alone[:, 0])),
            "match": match[:, 1] - match[:, 0],
            "words": self.linear(f"{of_words}.decoder", hidden),
        }
        if not self.first:  # a picture that reads: its states at BERT's positions, of words that are embedded alone
            picture = self.norm(f"{TEXT}embeddings.LayerNorm", seen + self.places(seen.shape[1]))
            out["reading"] = self.layers(picture, None, range(DEPTH), words, real)
        return {name: x.numpy() for name, x in out.items()}


@pytest.fixture(params=["simla", "albef"])
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[State, int, Path]:
    """Tensors, the layer from which on there is cross-attention, and the file."""
    path, state = tmp_path / f"{request.param}.safetensors", state_of(request.param)
    safetensors.save(path, state, {})
    return state, FUSION[request.param], path


def test_every_name_is_accounted_for_and_numpy_computes_the_same(theirs: tuple[State, int, Path]) -> None:
    _, first, path = theirs
    converted = convert.import_weights(path, overrides=CHANGES)
    config, report = converted.config, converted.report
    assert (converted.format, config.objective) == ("albef", "simla")
    assert config.simla.fusion_layer == first and config.simla.text_depth == DEPTH
    compared = check.compare(converted)
    assert compared.close and set(compared.errors) == {*FEATURES, "image embeddings", "text embeddings", "matching"}
    assert all("mim_head" in line or "position_ids" in line for line in report.unused)
    assert report.missing == ([] if first == 0 else ["image/image/mask_embedding"])
    for change in ("cross_attention/query", "norm_cross_attention", "other_token", "heads/match", "position_embedding"):
        wrong = jax.tree_util.tree_map_with_path(
            lambda path, x, change=change: (
                x * 1.1 if change in jax.tree_util.keystr(path, simple=True, separator="/") else x
            ),
            converted.params,
        )
        changed = convert.Converted("albef", config, wrong, report, converted.foreign, converted.vocabulary)
        assert not check.compare(changed).close


def test_all_passes_are_those_of_pytorch(theirs: tuple[State, int, Path]) -> None:
    state, first, path = theirs
    of_torch = Theirs(state, first)
    converted = convert.import_weights(path, overrides=CHANGES)
    rng, lengths, longest = np.random.default_rng(1), np.asarray([1, 4, 8]), 8
    pixels = rng.standard_normal((3, PATCH * SIDE, PATCH * SIDE, 3)).astype(np.float32)
    valid = np.arange(longest) < lengths[:, None]
    value = np.where(valid, rng.integers(3, 100, valid.shape), 0).astype(np.int32)
    ids = np.zeros((3, longest + 2), np.int64)
    ids[:, 0], ids[:, 1:-1] = IDS["[CLS]"], value
    ids[np.arange(3), lengths + 1] = IDS["[SEP]"]
    wanted = of_torch.outputs(pixels, ids, np.arange(longest + 2) < lengths[:, None] + 2)
    objective: Any = build(converted.config, converted.vocabulary)
    patches = pixels.reshape(3, SIDE, PATCH, SIDE, PATCH, 3).swapaxes(2, 3).reshape(3, SIDE**2, -1)

    def tokens(value: np.ndarray, valid: np.ndarray) -> dict[str, Any]:
        position = np.broadcast_to(np.arange(value.shape[1], dtype=np.int32), valid.shape)
        return {"value": value, "position": position, "valid": valid}

    sets = {"image": tokens(patches, np.ones((3, SIDE**2), bool)), "text": tokens(value, valid)}
    groups = {n: {"visible": x, "target": {k: leaf[:, :0] for k, leaf in x.items()}} for n, x in sets.items()}

    @jax.jit
    def ours(params: Any) -> dict[str, Any]:
        part = {"groups": groups}
        seen = objective._seen(objective._picture(params, sets["image"], None), sets["image"])
        words = objective._text(params, "words", sets["text"], rng=None)
        features, table, bias = objective._words_output(params, objective._layers(params, words, seen, None))
        logits = features @ table + bias
        out = {**objective.embed(params, part), "match": objective.match(params, part), "words": logits}
        if not first:
            stream = objective._text(params, "picture", seen, sets["image"]["position"], rng=None)
            out["reading"] = objective._layers(params, stream, words, None)
        return out

    with jax.default_matmul_precision("highest"):
        got = jax.device_get(ours(converted.params))
    assert set(got) == set(wanted)
    # The end stands behind the last place here, and behind the last word there.
    rows, inside = np.arange(3), np.concatenate([np.ones((3, 1), bool), valid], axis=1)
    for x, end in ((got, -1), (wanted, lengths + 1)):
        x["words"] = np.concatenate([x["words"][:, :-1][inside], x["words"][rows, end]])
    for name, want in wanted.items():
        np.testing.assert_allclose(got[name], want, rtol=1e-3, atol=2e-3, err_msg=name)


def test_teacher_and_queue_are_taken_where_they_are(theirs: tuple[State, int, Path], tmp_path: Path) -> None:
    state, _, path = theirs
    converted = convert.import_weights(path, overrides=CHANGES)
    teacher, queue = converted.extra["teacher"], converted.extra["queue"]
    np.testing.assert_array_equal(teacher["image"]["projection"]["kernel"], state["vision_proj_m.weight"].T)
    words = state["text_encoder_m.bert.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(teacher["text"]["text"]["embedding"]["embedding"], words)
    np.testing.assert_array_equal(queue["image"], state["image_queue"].T)
    assert queue["next"] == 4 and queue["valid"].all() and converted.config.simla.queue == QUEUE
    convert.write_run(converted, tmp_path / "run")
    assert inference.read(str(tmp_path / "run")).config.simla.queue == QUEUE


def saved(folder: Path, arrays: State) -> Path:
    safetensors.save(folder / "other.safetensors", arrays, {})
    return folder / "other.safetensors"


def plain(state: State) -> State:
    """As fine-tuning saves it."""
    return {name.replace(".bert.", "."): x for name, x in state.items() if ".cls.predictions" not in name}


def encoders(state: State) -> State:
    names = ("visual_encoder.", "text_encoder.")
    return {n: x for n, x in plain(state).items() if n.startswith(names)} | {"cls_head.0.weight": np.ones((9, 9), "f4")}


def test_files_of_tasks(theirs: tuple[State, int, Path], tmp_path: Path) -> None:
    state, _, _ = theirs
    file = saved(tmp_path, plain(state) | {"idx_queue": np.zeros((1, QUEUE), int)})
    retrieval = convert.import_weights(file, overrides=CHANGES)
    assert retrieval.config.simla.word_weight == 0.0 and retrieval.config.simla.match_weight == 1.0
    assert check.compare(retrieval).close
    # Without a queue, and without the matching.
    less = [*CHANGES, ("simla.queue", "0"), ("simla.match_weight", "0")]
    converted = convert.import_weights(file, overrides=less)
    assert "queue" not in converted.extra and "match" not in converted.params.get("heads", {})
    assert any("queue of 16 pairs is left out" in note for note in converted.report.notes)
    assert sum(line.startswith("match.") for line in converted.report.unused) == 2
    with pytest.raises(UserError, match=r"simla.queue=8: the file's has 16 pairs; 0 leaves it out"):
        convert.import_weights(file, overrides=[*CHANGES, ("simla.queue", "8")])
    # A task's without heads of ours: all that it has is compared.
    alone = convert.import_weights(
        saved(tmp_path, encoders(state)), overrides=[*CHANGES, ("simla.embedding_width", "8")]
    )
    assert any("FRESH" in note for note in alone.report.notes)
    assert any("it starts as a copy" in note for note in alone.report.notes)
    compared = check.compare(alone)
    assert compared.close and set(compared.errors) == {*FEATURES}
    got = alone.extra["teacher"]["image"]["transformer"]["norm"]["scale"]
    np.testing.assert_array_equal(got, alone.params["image"]["transformer"]["norm"]["scale"])
    with pytest.raises(UserError, match="--to=albef: ALBEF's and SIMLA's weights are read, not written"):
        albef.write(tmp_path, {}, alone.config, alone.report)


def test_a_picture_may_have_more_patches_than_a_caption_has_places(
    theirs: tuple[State, int, Path], tmp_path: Path
) -> None:
    """As after fine-tuning at 384 px, 576 patches and 512 places."""
    state, _, _ = theirs
    table = np.random.default_rng(1).standard_normal((1, 1 + 5**2, WIDTH)).astype(np.float32)
    file = saved(tmp_path, {n: table if n.endswith("pos_embed") else x for n, x in state.items()})
    converted = convert.import_weights(file, overrides=CHANGES)
    assert converted.config.data.image_size == 5 * PATCH and check.compare(converted).close
    smaller = convert.import_weights(file, overrides=[*CHANGES, ("data.image_size", str(2 * PATCH))])
    compared = check.compare(smaller)
    assert "not compared: pictures, which have another size" in compared.text()
    assert compared.close and set(compared.errors) == {"text CLS", "text embeddings"}


def test_older_names_and_a_part_of_the_teacher_and_of_the_queue(
    theirs: tuple[State, int, Path], tmp_path: Path
) -> None:
    state, _, path = theirs
    ends = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    old = {next((n.replace(a, b) for a, b in ends.items() if n.endswith(a)), n): x for n, x in state.items()}
    first, again = (convert.import_weights(f, overrides=CHANGES) for f in (path, saved(tmp_path, old)))
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    some = {n: x for n, x in state.items() if not n.startswith("visual_encoder_m") and n != "queue_ptr"}
    converted = convert.import_weights(saved(tmp_path, some), overrides=CHANGES)
    assert any(note.startswith("teacher: ") and "not in the file" in note for note in converted.report.notes)
    assert sum("the queue is not whole" in line for line in converted.report.unused) == 2
    got = converted.extra["teacher"]["image"]["transformer"]["norm"]["scale"]
    np.testing.assert_array_equal(got, converted.params["image"]["transformer"]["norm"]["scale"])


def shaped(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: state | {name: np.ones(shape, np.float32)}


def without(*parts: str) -> Callable[[State], State]:
    return lambda state: {n: x for n, x in state.items() if not any(part in n for part in parts)}


LAST = f"{TEXT}encoder.layer.{DEPTH - 1}.crossattention"
KEYS = [f"{TEXT}encoder.layer.{n}.crossattention.self.key.weight" for n in (DEPTH - 2, DEPTH - 1)]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (without(f"{LAST}.output.dense.weight"), r"but not text.blocks.\d.cross.proj.weight"),
        (shaped("itm_head.more", 3), "has no place for: match.more"),
        (shaped("mystery_m.weight", 3), r"model of format albef \(teacher\) has no place for: mystery.weight"),
        (
            shaped("text_encoder.cls.predictions.decoder.weight", WORDS, WIDTH),
            "its words.decoder.weight is not text.wo",
        ),
        (without("crossattention"), "have cross-attention, not the upper ones"),
        (lambda state: state | {KEYS[1]: state[KEYS[0]]}, "NLVR2's pictures have no place here"),
        (without("word_embeddings", "decoder.weight"), "text.words"),
        (shaped("temp", 2), "is not a whole file of SIMLA or ALBEF"),
        (lambda state: state | {"temp": np.float32(-1.0)}, "its temp=-1.0 is no temperature"),
        (shaped("queue_ptr", 2), "is not a whole file of SIMLA or ALBEF"),
        (shaped("visual_encoder.blocks.0.attn.qkv.weight", 190, 64), "is not a whole file of SIMLA or ALBEF"),
        (shaped(f"{LAST}.self.value.weight", 64, 32), "is not a whole file of SIMLA or ALBEF"),
        (shaped("visual_encoder.pos_embed", 1, 5, 32), "is not a whole file of SIMLA or ALBEF"),
        (shaped(f"{TEXT}embeddings.position_embeddings.weight", 20, 32), "is not a whole model of format albef"),
    ],
)
def test_damaged_files_are_refused_in_a_line(change: Callable[[State], State], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line):
        convert.import_weights(saved(tmp_path, change(state_of("albef"))), overrides=CHANGES)


def test_relatives_are_not_taken_for_what_they_are_not(tmp_path: Path) -> None:
    blip = encoders(state_of("simla"))
    del blip["visual_encoder.mask_token"]
    with pytest.raises(UserError, match=r"not its visual_encoder.mask_token: of BLIP and others"):
        convert.import_weights(saved(tmp_path, blip), overrides=CHANGES)
    other = {n.replace("visual_encoder.", "vision_encoder."): x for n, x in encoders(state_of("albef")).items()}
    with pytest.raises(UserError, match="has cross-attention beside BERT's layers"):
        convert.import_weights(saved(tmp_path, other), overrides=CHANGES)
