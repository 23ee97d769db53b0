"""Ids on disk: the same bytes by any number of jobs, what is missing alone, and nothing else's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import m3ae_jax
from m3ae_jax import config as config_lib
from m3ae_jax import tokenize
from m3ae_jax.config.schema import source_fields
from m3ae_jax.data.images import load
from m3ae_jax.data.sources import open_source
from m3ae_jax.errors import UserError
from m3ae_jax.tokenize import Crops, Job, parsed_shard
from tests.objectives.small import setup_of
from tests.objectives.test_visual_tokenizer import QUANTIZERS, saved


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    setup = setup_of("visual_tokenizer", **QUANTIZERS["kmeans"])
    state = setup.init_state()
    return m3ae_jax.load(str(saved(tmp_path_factory.mktemp("tokenize") / "run", setup, state)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(7):
        size = (40 + 9 * number, 60, 3)
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(folder / f"{number}.png")
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:300])
    return folder


def job(model: Any, pictures: Path, output: Path, **options: Any) -> Job:
    spec = source_fields()
    spec.update(source="folder", path=str(pictures))
    return Job(model, open_source(spec, "--", config_lib.default()), output, shard_examples=3, **options)


def test_ids_are_those_of_the_crops_that_are_told(model: Any, pictures: Path, tmp_path: Path) -> None:
    crops = Crops(2, (0.3, 0.9), flip=True)
    tally = job(model, pictures, tmp_path / "ids", crops=crops).run()
    assert sum(count for count, _ in tally.skipped.values()) == 1
    files = sorted((tmp_path / "ids").glob("*.npz"))
    assert [file.name for file in files] == [f"ids-0000{n}-of-00003.npz" for n in range(3)]
    usable = []
    for file in files:
        with np.load(file) as found:
            usable += found["usable"].tolist()
            for row, (ids, boxes, mirrored) in enumerate(
                zip(found["ids"], found["box"], found["mirrored"], strict=True)
            ):
                example = int(found["first"]) + row
                if not found["usable"][row]:
                    assert not ids.any()
                    continue
                path = pictures / f"{example}.png"
                assert len(set(map(tuple, boxes))) == 2
                for crop, id_, box, mirror in zip(crops.of(example), ids, boxes, mirrored, strict=True):
                    np.testing.assert_allclose(crop.box(*Image.open(path).size), box)
                    assert crop.mirrored == mirror
                    seen = load(path.read_bytes(), 32, crop)
                    np.testing.assert_array_equal(model.encode(seen)[0], id_)
    assert usable == [True] * 5 + [False, True]
    about = json.loads((tmp_path / "ids" / tokenize.MANIFEST).read_bytes())
    assert about["codes"] == 64 and about["grid"] == [4, 4] and about["examples"] == 7


def test_jobs_of_an_array_write_what_one_does_and_a_new_start_what_is_missing(
    model: Any, pictures: Path, tmp_path: Path
) -> None:
    job(model, pictures, tmp_path / "one").run()
    for number in (1, 0):
        job(model, pictures, tmp_path / "two", shard=(number, 2)).run()
    whole = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert whole == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    second = tmp_path / "two" / "ids-00001-of-00003.npz"
    second.write_bytes(second.read_bytes()[:100])
    kept = (tmp_path / "two" / "ids-00000-of-00003.npz").stat().st_mtime_ns
    job(model, pictures, tmp_path / "two").run()
    assert second.read_bytes() == whole[second.name]
    assert (tmp_path / "two" / "ids-00000-of-00003.npz").stat().st_mtime_ns == kept


def test_a_folder_of_other_ids_is_refused(model: Any, pictures: Path, tmp_path: Path) -> None:
    job(model, pictures, tmp_path / "ids").run()
    with pytest.raises(UserError, match=r"holds ids of something else: crops_number 0, here 2; name another folder"):
        job(model, pictures, tmp_path / "ids", crops=Crops(2)).run()
    (tmp_path / "ids" / tokenize.MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"ids\.json is damaged"):
        job(model, pictures, tmp_path / "ids").run()
    (tmp_path / "ids" / tokenize.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"has ids-00000-of-00003\.npz and no ids\.json"):
        job(model, pictures, tmp_path / "ids").run()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output="):
        job(model, pictures, tmp_path / "file" / "ids").run()


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "a/b", "1/0"])
def test_a_wrong_shard_is_refused(text: str) -> None:
    assert parsed_shard("1/2") == (1, 2)
    with pytest.raises(UserError, match=r"is not i/n with i from 0 to n - 1, as 0/8"):
        parsed_shard(text)


def test_of_a_source_without_end_some_are_taken(model: Any, tmp_path: Path) -> None:
    spec = source_fields()
    spec.update(source="scenes")
    source = open_source(spec, "--", config_lib.default("visual_tokenizer"))
    job = Job(model, source, tmp_path / "ids", shard_examples=4, most=10)
    assert len(source) > 2**30 and job.examples == 10 and len(job.files()) == 3
    job.run()
    with np.load(job.files()[2]) as last:
        assert last["ids"].shape[0] == 2 and int(last["first"]) == 8
    assert json.loads((tmp_path / "ids" / tokenize.MANIFEST).read_bytes())["examples"] == 10
