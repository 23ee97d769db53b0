"""`m3ae_jax.load`: features and reconstructions of a checkpoint, without TensorFlow."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import m3ae_jax
from m3ae_jax import config as config_lib
from m3ae_jax import inference
from m3ae_jax.convert.convert import Converted, write_run
from m3ae_jax.convert.formats import Foreign
from m3ae_jax.convert.keymap import Report
from m3ae_jax.data.text import load_tokenizer
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import build

ROOT = Path(__file__).parents[1]
TEXTS = ["a large red circle", "a blue square left of a green triangle", "a small yellow circle"]


def make_run(folder: Path, **data: Any) -> Path:
    """A run with freshly drawn parameters, of 16 patches and 8 words."""
    import flax.linen as nn
    import jax

    c = config_lib.default()
    c.model.update(width=16, depth=1, heads=2)
    c.m3ae.update(decoder_width=16, decoder_depth=1, decoder_heads=2)
    c.data.update(image_size=32, patch_size=8, max_text_tokens=8, tokenizer="scenes", **data)
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
    assert model._compiled["encode"]._cache_size() == len(inference.BATCH_SIZES)
    assert model.encode([]).cls.shape == (0, 16)


def test_pictures_may_be_arrays_pillow_pictures_or_files(model: inference.Model) -> None:
    array = np.full((40, 64, 3), (200, 100, 50), np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    features = model.encode([array, Image.fromarray(array), file.getvalue(), array[:32, :32]]).cls
    np.testing.assert_allclose(features, np.broadcast_to(features[0], features.shape), atol=1e-5)
    grey = model.encode([array[..., 0], Image.fromarray(array[..., 0])]).cls
    np.testing.assert_allclose(grey[0], grey[1], atol=1e-5)


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
        (lambda m: m.encode(texts="a red circle"), "give a list"),
        (lambda m: m.encode([np.zeros((4, 4, 3))]), r"float64 \[4, 4, 3\]"),
        (lambda m: m.encode([b"no picture"]), "not a picture"),
        (lambda m: m.reconstruct(pictures(1), image_mask_ratio=1.5), "image_mask_ratio=1.5"),
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
