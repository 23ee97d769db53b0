"""`m3ae_jax.load`: features and reconstructions of a checkpoint, without TensorFlow."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import m3ae_jax
from m3ae_jax import config as config_lib
from m3ae_jax import inference
from m3ae_jax.checkpoint import manifest, meta
from m3ae_jax.convert.convert import Converted, write_run
from m3ae_jax.convert.formats import Foreign
from m3ae_jax.convert.keymap import Report
from m3ae_jax.data.text import load_tokenizer, tokenizer_file
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import build

ROOT = Path(__file__).parents[1]
TEXTS = ["a large red circle", "a blue square left of a green triangle", "a small yellow circle"]


def make_run(folder: Path, learned_positions: bool = False, **data: Any) -> Path:
    """A run with freshly drawn parameters, of 16 patches and 8 words."""
    import flax.linen as nn
    import jax

    c = config_lib.default()
    c.model.update(width=16, depth=1, heads=2)
    c.m3ae.update(decoder_width=16, decoder_depth=1, decoder_heads=2)
    c.m3ae.image_positions = "learned" if learned_positions else "sincos"
    c.data.update(**{"image_size": 32, "patch_size": 8, "max_text_tokens": 8, "tokenizer": "scenes", **data})
    c = config_lib.resolve(c)
    words = load_tokenizer("scenes").vocab_size
    params = jax.device_get(nn.unbox(jax.jit(build(c, words).init)(jax.random.key(0))))
    write_run(Converted("safetensors", c, params, Report(), Foreign({}), words), folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("inference") / "run")


@pytest.fixture(scope="module")
def model(run: Path) -> inference.Model:
    return m3ae_jax.load(str(run))


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (32, 32, 3), np.uint8) for _ in range(count)]


def test_importing_the_package_imports_no_jax() -> None:
    code = "import sys, m3ae_jax; assert not {'jax', 'tensorflow', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
    with pytest.raises(AttributeError, match="lood"):
        _ = m3ae_jax.lood


def test_features(model: inference.Model) -> None:
    both = model.encode(pictures(3), TEXTS)
    assert both.cls.shape == (3, 16) and both.image is not None and both.text is not None
    assert both.image.shape == (3, 16, 16) and both.text.shape == (3, 8, 16)
    assert both.text_valid is not None
    assert both.text_valid.sum(axis=1).tolist() == [len(row[:8]) for row in model.tokenizer.encode(TEXTS)]
    alone = model.encode(images=pictures(3))
    assert alone.text is None and not np.allclose(alone.cls, both.cls)
    assert model.encode(texts=TEXTS).image is None
    assert all(np.isfinite(x).all() for x in (both.cls, both.image, both.text))


def test_any_number_of_examples_is_one_of_a_few_compiled_sizes(run: Path) -> None:
    model = m3ae_jax.load(str(run))
    whole = model.encode(pictures(67)).cls
    for count in (1, 2, 5, 8, 9, 64, 66):
        np.testing.assert_allclose(model.encode(pictures(count)).cls, whole[:count], rtol=1e-4, atol=1e-5)
    (compiled,) = model._compiled.values()
    assert compiled._cache_size() == len(inference.BATCH_SIZES)
    assert model.encode([]).cls.shape == (0, 16)


def test_pictures_may_be_arrays_pillow_pictures_or_files(model: inference.Model) -> None:
    array = np.full((40, 64, 3), (200, 100, 50), np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    features = model.encode([array, Image.fromarray(array), file.getvalue(), array[:32, :32]]).cls
    np.testing.assert_allclose(features, np.broadcast_to(features[0], features.shape), atol=1e-5)
    grey = model.encode([array[..., 0], Image.fromarray(array[..., 0])]).cls
    np.testing.assert_allclose(grey[0], grey[1], atol=1e-5)


def test_item_9_one_picture_or_text_is_one_example(model: inference.Model, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    file = tmp_path / "a.png"
    Image.fromarray(array).save(file)
    want = model.encode([array]).cls
    assert want.shape == (1, 16)
    opened = Image.open(file)
    for one in (array, jnp.asarray(array), str(file), file, opened, file.read_bytes(), array[None], iter([file])):
        np.testing.assert_allclose(model.encode(one).cls, want, atol=1e-5)
    grey = model.encode(array[..., 0]).cls
    for one in (array[..., :1], Image.fromarray(array[..., 0]), array[None, ..., :1]):
        np.testing.assert_allclose(model.encode(one).cls, grey, atol=1e-5)
    opaque = np.dstack([array, np.full((40, 60), 255, np.uint8)])
    np.testing.assert_allclose(model.encode(opaque).cls, want, atol=1e-5)
    three = np.stack([array] * 3)
    for several in (three, list(three), (a for a in three), np.array([str(file)] * 3), [array, file, str(file)]):
        np.testing.assert_allclose(model.encode(several).cls, np.repeat(want, 3, axis=0), atol=1e-5)
    one_text = model.encode(texts=TEXTS[0])
    assert np.array_equal(one_text.cls, model.encode(texts=TEXTS[:1]).cls) and one_text.cls.shape == (1, 16)
    assert model.encode(array, TEXTS[0]).cls.shape == (1, 16)
    assert model.reconstruct(file, TEXTS[0]).texts is not None


def test_item_9_pictures_and_texts_as_other_libraries_hold_them(model: inference.Model, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    file = tmp_path / "a.png"
    Image.fromarray(array).save(file)
    content, want = file.read_bytes(), model.encode(array).cls
    single, text = np.empty((), object), np.empty((), object)
    single[()], text[()] = content, TEXTS[0]  # as a scalar tensor of strings is for NumPy
    for one in (
        single,
        np.bytes_(content),
        np.array(str(file)),
        np.str_(file),
        io.BytesIO(content),
        [io.BytesIO(content)],
    ):
        np.testing.assert_allclose(model.encode(one).cls, want, atol=1e-5)
    with file.open("rb") as opened:
        np.testing.assert_allclose(model.encode(opened).cls, want, atol=1e-5)
    for one in (text, np.array(TEXTS[0]), np.str_(TEXTS[0]), np.array(TEXTS[:1]), np.array(TEXTS[:1], object)):
        assert np.array_equal(model.encode(texts=one).cls, model.encode(texts=TEXTS[0]).cls)
    deep = Image.fromarray(np.full((9, 9), -200, np.int32))  # below black is black, and not white
    np.testing.assert_allclose(model.encode(deep).cls, model.encode(np.zeros((9, 9), np.uint8)).cls, atol=1e-5)
    grey = Image.fromarray(array[..., 0])
    weighed = grey.convert("LA").convert("La")
    np.testing.assert_allclose(model.encode(weighed).cls, model.encode(grey).cls, atol=1e-5)


def closed() -> Image.Image:
    """A picture as it is left by the ``with`` that opened it."""
    picture = Image.new("RGB", (9, 9))
    picture.close()
    return picture


def test_item_9_a_turned_picture_is_seen_upright(model: inference.Model, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pictures(1)[0]).save(tmp_path / "turned.png", exif=exif)
    opened = Image.open(tmp_path / "turned.png")
    upright = np.rot90(pictures(1)[0], k=-1)
    want = model.encode(np.ascontiguousarray(upright)).cls
    np.testing.assert_allclose(model.encode([opened, tmp_path / "turned.png"]).cls, np.repeat(want, 2, 0), atol=1e-5)


def test_item_9_pooling_and_length(model: inference.Model) -> None:
    both = model.encode(pictures(3), TEXTS)
    assert np.array_equal(both.pooled, both.cls)
    mean = model.encode(pictures(3), TEXTS, pooling="mean", normalize=True)
    assert both.image is not None and both.text is not None and both.text_valid is not None
    words = (both.text * both.text_valid[..., None]).sum(axis=1)
    whole = (both.image.sum(axis=1) + words) / (16 + both.text_valid.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(mean.pooled, whole / np.linalg.norm(whole, axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(mean.cls, axis=1), 1.0, rtol=1e-5)
    alone = model.encode(pictures(3), TEXTS, tokens=False)
    np.testing.assert_allclose(alone.cls, both.cls, atol=1e-5)
    assert alone.image is None and alone.text is None


def test_item_9_a_model_says_what_it_is(model: inference.Model, run: Path) -> None:
    assert repr(model) == (
        f"<Model m3ae: 15,109 parameters, image (32 px in patches of 8) and text (8 tokens); step 0 of {run}>"
    )


LOADS = "import sys, m3ae_jax; m3ae_jax.load(sys.argv[1]).encode(texts='a red circle')"


@pytest.mark.slow
def test_item_9_loading_is_quiet(run: Path) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LOADS, str(run)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def make_other(folder: Path, objective: str) -> inference.Model:
    """A model of two towers, with freshly drawn parameters."""
    import flax.linen as nn
    import jax

    c = config_lib.default(objective)
    c.model.update(width=16, depth=1, heads=2)
    c.data.update(image_size=32, patch_size=8, max_text_tokens=8, tokenizer="scenes")
    c = config_lib.resolve(c)
    words = load_tokenizer("scenes").vocab_size
    params = jax.device_get(nn.unbox(jax.jit(build(c, words).init)(jax.random.key(0))))
    write_run(Converted("safetensors", c, params, Report(), Foreign({}), words), folder)
    return m3ae_jax.load(str(folder))


@pytest.mark.parametrize("objective", ["contrastive", "mamo"])
def test_pictures_and_texts_are_compared(objective: str, tmp_path: Path) -> None:
    model = make_other(tmp_path / "run", objective)
    of = model.embed(pictures(2), TEXTS)
    assert of["image"].shape[0] == 2 and of["text"].shape[0] == 3 and of["image"].shape[1] == of["text"].shape[1]
    for name, x in of.items():
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, rtol=1e-5)
        alone = model.embed(**{f"{name}s": pictures(2) if name == "image" else TEXTS})
        assert set(alone) == {name}
        np.testing.assert_allclose(alone[name], x, atol=1e-6)
    with pytest.raises(UserError, match="neither images nor texts"):
        model.embed()
    if objective == "contrastive":
        with pytest.raises(UserError, match="by 'contrastive', which cannot match"):
            model.match(pictures(2), TEXTS[:2])
        return
    # BERT's masks need more draws than a random subset's; masks as in training.
    restored = model.reconstruct(pictures(3), TEXTS, image_mask_ratio=0.0)
    assert restored.text_hidden.any(axis=1).all()
    logits = model.match(pictures(3), TEXTS)
    assert logits.shape == (3,) and logits.dtype == np.float32
    np.testing.assert_allclose(model.match(pictures(3)[1], TEXTS[1]), logits[1:2], atol=1e-5)
    with pytest.raises(UserError, match="equal numbers"):
        model.match(pictures(2), TEXTS)


def test_a_model_that_compares_nothing_says_so(model: inference.Model) -> None:
    with pytest.raises(UserError, match="by 'm3ae', which cannot embed"):
        model.embed(pictures(1))


def test_reconstructions(model: inference.Model) -> None:
    images = pictures(3)
    found = model.reconstruct(images, TEXTS, image_mask_ratio=0.5, text_mask_ratio=0.5, seed=1)
    assert found.images is not None and found.image_hidden is not None
    assert found.images.shape == (3, 32, 32, 3) and found.images.dtype == np.uint8
    assert found.image_hidden.sum(axis=1).tolist() == [8, 8, 8]
    assert not (found.image_hidden[0] == found.image_hidden[1]).all()
    shown = ~np.kron(found.image_hidden.reshape(3, 4, 4), np.ones((8, 8), bool))
    assert (found.images[shown] == np.stack(images)[shown]).all()
    assert (found.images[~shown] != np.stack(images)[~shown]).any()
    assert found.text_hidden is not None and found.tokens is not None and found.texts is not None
    counts = np.array([len(row[:8]) for row in model.tokenizer.encode(TEXTS)])
    assert found.text_hidden.sum(axis=1).tolist() == ((counts + 1) // 2).tolist()
    again = model.reconstruct(images, TEXTS, image_mask_ratio=0.5, text_mask_ratio=0.5, seed=1)
    assert np.array_equal(found.images, again.images) and found.texts == again.texts
    other = model.reconstruct(images, TEXTS, image_mask_ratio=0.5, text_mask_ratio=0.5, seed=2)
    assert not np.array_equal(found.image_hidden, other.image_hidden)


def test_nothing_hidden_changes_nothing(model: inference.Model) -> None:
    found = model.reconstruct(pictures(2), TEXTS[:2], image_mask_ratio=0.0, text_mask_ratio=0.0)
    assert np.array_equal(found.images, np.stack(pictures(2)))
    whole = [model.tokenizer.decode(row[:8]) for row in model.tokenizer.encode(TEXTS[:2])]
    assert found.texts == whole


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: m.encode(), "neither images nor texts"),
        (lambda m: m.encode(pictures(2), TEXTS), "2 images, 3 texts"),
        (lambda m: m.encode(pictures(1), "a red circle", pooling="men"), "'men' is not one of cls, mean; did you mean"),
        (lambda m: m.encode([np.zeros((4, 4, 3))]), r"float64 \[4, 4, 3\]"),
        (lambda m: m.encode(np.zeros((4, 4, 3))), r"images is float64 .* \(255 \* x\)"),
        (
            lambda m: m.encode([*pictures(2), np.zeros((3, 9, 9), np.uint8)]),
            r"images\[2\] is uint8 \[3, 9, 9\].*moveaxis",
        ),
        (lambda m: m.encode(np.zeros((0, 4), np.uint8)), r"images is uint8 \[0, 4\]: it has no pixel"),
        (lambda m: m.encode([b"no picture"]), r"images\[0\] cannot be used: not a picture"),
        (lambda m: m.encode(["nowhere.jpg"]), r"images\[0\]='nowhere.jpg' cannot be read: No such file"),
        (lambda m: m.encode("."), r"images='.' is a folder"),
        (lambda m: m.encode([None]), r"images\[0\] is of type NoneType: a picture is"),
        (lambda m: m.encode({"a.png"}), "images is of type set"),
        (lambda m: m.encode(Image.new("F", (9, 9))), "mode F"),
        (lambda m: m.encode(texts=["a", 3]), r"texts\[1\] is of type int"),
        (lambda m: m.encode(texts=b"a"), "texts is of type bytes"),
        (lambda m: m.encode(texts=[b"a"]), r"texts\[0\] is of type bytes.* x\.decode\(\)"),
        (lambda m: m.encode(texts=np.array([["a", "b"]])), r"texts is a table \[1, 2\]"),
        (lambda m: m.encode(np.array([["a.png"]])), r"images is a table \[1, 1\]"),
        (lambda m: m.encode(np.empty((), object)), "images is of type NoneType"),
        (lambda m: m.encode(Image.new("RGB", (0, 5))), "0 x 5: it has no pixel"),
        (lambda m: m.encode(closed()), "images cannot be decoded: Operation on closed image"),
        (lambda m: m.encode(np.ma.masked_array(pictures(1)[0], mask=True)), "masked out"),
        (lambda m: m.encode("https://example.com/a.png"), "is an address, not a file"),
        (lambda m: m.encode("~nobody-of-this-name/a.png"), "cannot be read: No such file"),
        (lambda m: m.encode(""), "images='' is an empty path"),
        (lambda m: m.encode("iVBORw0K" * 999), "^.{0,400}$"),
        (lambda m: m.encode(io.StringIO("text")), "images is a file of text"),
        (lambda m: m.reconstruct(pictures(1), image_mask_ratio=1.5), "image_mask_ratio=1.5"),
        (lambda m: m.reconstruct(pictures(1), image_mask_ratio="0.5"), "image_mask_ratio='0.5' is not a number"),
        (lambda m: m.reconstruct(pictures(1), seed=-1), "seed=-1 is not a whole number"),
        (lambda m: m.reconstruct(pictures(1), seed=1.5), "seed=1.5 is not a whole number"),
    ],
)
def test_a_wrong_input_is_one_line(model: inference.Model, call: Any, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_a_model_of_pictures_alone(tmp_path: Path) -> None:
    model = m3ae_jax.load(str(make_run(tmp_path / "run", modalities=("image",))))
    assert model.modalities == ("image",)
    assert model.encode(pictures(1)).image is not None
    with pytest.raises(UserError, match="trained on image alone"):
        model.encode(texts=TEXTS)
    with pytest.raises(UserError, match="no tokenizer"):
        _ = model.tokenizer


def test_item_10_the_tokenizer_goes_with_the_run(run: Path, tmp_path: Path) -> None:
    original, moved = tmp_path / "own.model", tmp_path / "elsewhere"
    original.write_bytes(tokenizer_file("scenes").read_bytes())
    made = make_run(tmp_path / "made", tokenizer=str(original))
    want = m3ae_jax.load(str(made)).encode(texts=TEXTS).cls
    original.unlink()
    made.rename(moved)
    assert np.array_equal(m3ae_jax.load(str(moved)).encode(texts=TEXTS).cls, want)
    original.write_bytes(b"another file at the same place")
    assert np.array_equal(m3ae_jax.load(str(moved)).encode(texts=TEXTS).cls, want)
    original.unlink()
    (moved / "tokenizer.model").unlink()
    with pytest.raises(UserError) as error:
        m3ae_jax.load(str(moved)).encode(texts=TEXTS)
    said = str(error.value)
    assert str(original) in said and f"{moved} holds no tokenizer.model" in said and "tokenizer=FILE" in said
    assert "train_tokenizer" not in said
    assert np.array_equal(m3ae_jax.load(str(moved), tokenizer="scenes").encode(texts=TEXTS).cls, want)


def test_another_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        m3ae_jax.load(str(run), tokenizer=str(tmp_path / "none.model")).encode(texts=TEXTS)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[UNK]\na\n")
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    with pytest.raises(UserError, match="has 2 words, the model"):
        m3ae_jax.load(str(run), tokenizer=str(vocabulary)).encode(texts=TEXTS)


def test_a_checkpoint_that_names_code_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Meta(inference.Checkpoints):
        def meta(self, step: int) -> dict[str, Any]:
            found = json.loads(json.dumps(super().meta(step)))
            found["config"]["objective"] = "os:system"
            return found

    monkeypatch.setattr(inference, "Checkpoints", Meta)
    with pytest.raises(UserError, match="names code to import: objective='os:system'"):
        m3ae_jax.load(str(run))


WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None
import numpy as np
import m3ae_jax
model = m3ae_jax.load(sys.argv[1])
found = model.reconstruct([np.zeros((9, 9, 3), np.uint8)], ["a red circle"])
assert found.images.shape == (1, 32, 32, 3) and len(found.texts) == 1
assert not [name for name, module in sys.modules.items() if name.split(".")[0] == "tensorflow" and module]
"""


@pytest.mark.slow
def test_it_works_where_tensorflow_is_not_installed(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, str(run)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((ROOT / "docs" / "use_a_model.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells and all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    monkeypatch.setenv("M3AE_RUN", str(make_run(tmp_path / "run")))
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert names["features"].cls.shape[0] == len(names["texts"])


def test_item_6_load_refuses_what_a_resigned_meta_does_not_fit(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    checkpoint = copy / "checkpoints" / "0"
    good = json.loads((checkpoint / meta.FILE).read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"state_version": 99}, "made by a newer program .*update m3ae_jax"),
        ({"state_version": 2}, "state_version is 2, .*init_from"),
        ({"config": None}, "config=None, not of type dict"),
        ({"config": {**good["config"], "model": {"width": False}}}, r"model\.width=False is not of type int"),
        ({"config": {**good["config"], "model": {}}}, "holds other parameters than its config: .*instead of"),
        ({"modalities": []}, "no vocabulary"),
        ({"modalities": [{"vocabulary": 2**40}]}, "modality without a vocabulary"),
        ({"tokenizer": 3}, "tokenizer=3, not of type str"),
    ]
    for change, match in changes:
        (checkpoint / meta.FILE).write_text(json.dumps(good | change))
        manifest.write(checkpoint)
        with pytest.raises(UserError, match=match) as refusal:
            m3ae_jax.load(str(copy))
        assert "\n" not in str(refusal.value)
    for name in ("state_version", "config", "modalities", "tokenizer"):
        (checkpoint / meta.FILE).write_text(json.dumps({key: good[key] for key in good if key != name}))
        manifest.write(checkpoint)
        with pytest.raises(UserError, match=name):
            m3ae_jax.load(str(copy))
