"""`m3ae_jax.encode`: features of a folder, or of any source, into one file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import m3ae_jax
from m3ae_jax import encode, inference
from m3ae_jax.data.sources.class_folders import ClassFoldersSource
from m3ae_jax.data.sources.folder import FolderSource
from m3ae_jax.data.sources.scenes import ScenesSource
from m3ae_jax.errors import UserError
from tests.test_inference import make_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("encode") / "run")


@pytest.fixture(scope="module")
def model(run: Path) -> inference.Model:
    return m3ae_jax.load(str(run))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures in two folders, and one file that is none."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(5):
        place = folder / "ab"[i % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(place / f"{i}.png")
    (folder / "a" / "broken.jpg").write_bytes(b"no picture")
    return folder


def job(model: inference.Model, source: Any, inputs: tuple[str, ...] = ("image",), **options: Any) -> encode.Job:
    return encode.Job(model, source, inputs, batch_size=2, **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_item_9_a_folder_becomes_an_array_with_a_row_for_each_picture(
    model: inference.Model, pictures: Path, tmp_path: Path
) -> None:
    source = FolderSource(str(pictures))
    tally = encode.write(job(model, source, pooling="mean", normalize=True), tmp_path / "new" / "features.npy")
    features, told = np.load(tmp_path / "new" / "features.npy"), lines(tmp_path / "new" / "features.jsonl")
    assert features.shape == (6, 16) and features.dtype == np.float32
    assert [one["row"] for one in told] == list(range(6))
    assert [one["name"] for one in told] == ["a/0.png", "a/2.png", "a/4.png", "a/broken.jpg", "b/1.png", "b/3.png"]
    assert [one.get("unusable") for one in told] == [None] * 3 + ["not a picture"] + [None] * 2
    assert tally.skipped == {"not a picture": (1, "a/broken.jpg")}
    assert np.isnan(features[3]).all()
    usable = [i for i in range(6) if i != 3]
    paths = [pictures / told[i]["name"] for i in usable]
    want = model.encode(paths, pooling="mean", normalize=True).pooled
    np.testing.assert_allclose(features[usable], want, atol=1e-5)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["features.jsonl", "features.npy"]


def test_item_9_pairs_texts_and_classes_of_any_source(model: inference.Model, pictures: Path, tmp_path: Path) -> None:
    class Few(ScenesSource):
        def __len__(self) -> int:
            return 3

    source = Few("val")
    scenes = [source.scene(i) for i in range(3)]
    captions = [scene.caption for scene in scenes]
    for inputs, want in (
        (("image", "text"), model.encode([scene.image for scene in scenes], captions)),
        (("text",), model.encode(texts=captions)),
    ):
        encode.write(job(model, source, inputs), tmp_path / "f.npy")
        np.testing.assert_allclose(np.load(tmp_path / "f.npy"), want.cls, atol=1e-5)
    assert [one["name"] for one in lines(tmp_path / "f.jsonl")] == ["0", "1", "2"]
    encode.write(job(model, ClassFoldersSource(str(pictures))), tmp_path / "f.npy")
    assert [one["class"] for one in lines(tmp_path / "f.jsonl")] == ["a"] * 4 + ["b"] * 2


def test_item_9_nothing_half_written_is_left(
    model: inference.Model, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "f.npy"
    old.write_bytes(b"old")
    rows = encode.Job.rows

    def stopped(self: encode.Job) -> Any:
        yield next(rows(self))
        raise KeyboardInterrupt

    monkeypatch.setattr(encode.Job, "rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        encode.write(job(model, FolderSource(str(pictures))), old)
    assert old.read_bytes() == b"old" and os.listdir(tmp_path) == ["f.npy"]


def test_item_9_a_file_of_another_is_not_replaced(model: inference.Model, pictures: Path, tmp_path: Path) -> None:
    captions = tmp_path / "metadata.jsonl"
    captions.write_text("mine")
    with pytest.raises(UserError, match=r"would replace .*metadata\.jsonl"):
        encode.write(job(model, FolderSource(str(pictures))), tmp_path / "metadata.npy")
    assert captions.read_text() == "mine" and os.listdir(tmp_path) == ["metadata.jsonl"]


def test_item_9_data_of_which_nothing_can_be_used_are_refused(model: inference.Model, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"nothing can be encoded of 1 examples .*not a picture 1 \(e\.g\. x\.jpg\)"):
        encode.write(job(model, FolderSource(str(tmp_path / "data"))), tmp_path / "f.npy")
    assert os.listdir(tmp_path) == ["data"]
    with pytest.raises(UserError, match=r"--output='.*f\.npz' must be a file that ends in \.npy"):
        encode.write(job(model, FolderSource(str(tmp_path / "data"))), tmp_path / "f.npz")


@pytest.mark.slow
def test_item_9_the_command(run: Path, pictures: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "m3ae_jax.encode", f"--workdir={run}", *arguments]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    done = command(f"--path={pictures}", f"--output={tmp_path}/f.npy")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "not a picture 1 (e.g. a/broken.jpg)" in done.stdout
    assert np.load(tmp_path / "f.npy").shape == (6, 16)
    for arguments, said in (
        ([f"--path={tmp_path}/none"], f"--path='{tmp_path}/none' is not there"),
        ([f"--path={pictures}", "--pooling=men"], "pooling='men' is not one of cls, mean; did you mean 'mean'?"),
        ([f"--path={pictures}", "--input=text"], "--input='text': the data hold image alone, not text"),
        ([f"--path={pictures}", "--source=foldr"], "did you mean 'folder'?"),
    ):
        wrong = command(*arguments, f"--output={tmp_path}/g.npy")
        assert wrong.returncode == 2 and said in wrong.stderr and len(wrong.stderr.splitlines()) == 1, wrong.stderr
