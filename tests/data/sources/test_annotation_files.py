"""Pictures with an annotation file of this field beside them, as people have them, read as a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3ae_jax.data.sources.base import SourceOptions
from m3ae_jax.data.sources.folder import FolderSource
from m3ae_jax.errors import UserError


def pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 10 * number, np.uint8)).save(folder / name)


def read(folder: Path, **options: Any) -> tuple[FolderSource, list[tuple[str, tuple[bytes, ...]]]]:
    source = FolderSource(str(folder), SourceOptions(**options))
    records = source.read(np.arange(len(source)))
    return source, [(source.name(i), r.get("captions", (r["caption"],))) for i, r in enumerate(records)]


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


KARPATHY_SPLITS = ("train", "restval", "val", "test", "test")


def karpathy(folder: Path, *, filepath: bool) -> None:
    rows = [
        {
            **({"filepath": "val2014"} if filepath else {}),
            "filename": f"{n}.jpg",
            "split": split,
            "imgid": n,
            "sentences": [{"raw": f"caption {n} {k} . ", "tokens": ["x"]} for k in range(2)],
        }
        for n, split in enumerate(KARPATHY_SPLITS)
    ]
    write(folder / "dataset_coco.json", {"images": rows, "dataset": "coco"})


@pytest.mark.parametrize("filepath", [True, False])
@pytest.mark.parametrize(("split", "numbers"), [("train", (0, 1)), ("val", (2,)), ("test", (3, 4))])
def test_karpathys_splits(split: str, numbers: tuple[int, ...], filepath: bool, tmp_path: Path) -> None:
    pictures(tmp_path, *(f"val2014/{n}.jpg" for n in range(5)))
    karpathy(tmp_path, filepath=filepath)
    source, found = read(tmp_path, split=split)
    assert found == [(f"val2014/{n}.jpg", (f"caption {n} 0 .".encode(), f"caption {n} 1 .".encode())) for n in numbers]
    left = dict(source.report.unused)
    counted = {"train": 2, "val": 1, "test": 2}
    assert left == {f"row of split {other}": n for other, n in counted.items() if other != split}
    assert not source.report.skipped
    every, found = read(tmp_path, split=split, captions="all")
    assert len(every) == 2 * len(numbers) and all(len(captions) == 1 for _, captions in found)


def test_rows_of_other_splits_need_no_pictures_and_missing_ones_are_counted(tmp_path: Path) -> None:
    pictures(tmp_path, "2.jpg", "3.jpg")
    karpathy(tmp_path, filepath=False)
    source, found = read(tmp_path, split="test")
    assert [name for name, _ in found] == ["3.jpg"]
    assert source.report.skipped == {"no image": 1}
    with pytest.raises(UserError, match="split='minival' is not one of test, train, val"):
        read(tmp_path, split="minival")


def coco(folder: Path, split: str, numbers: tuple[int, ...]) -> None:
    images = [{"id": n, "file_name": f"COCO_{split}2014_{n:012d}.jpg"} for n in numbers]
    captions = [{"id": 9 * n + k, "image_id": n, "caption": f"{split} {n} {k}\n"} for k in range(2) for n in numbers]
    write(folder / f"annotations/captions_{split}2014.json", {"info": {}, "images": images, "annotations": captions})
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [0, 0, 1, 1]} for n in numbers]
    write(folder / f"annotations/instances_{split}2014.json", {"images": images, "annotations": boxes})


def test_cocos_own_layout_with_a_file_for_each_split(tmp_path: Path) -> None:
    for split, numbers in (("train", (1, 2)), ("val", (3,))):
        pictures(tmp_path, *(f"{split}2014/COCO_{split}2014_{n:012d}.jpg" for n in numbers))
        coco(tmp_path, split, numbers)
    for split, numbers in (("train", (1, 2)), ("val", (3,))):
        source, found = read(tmp_path, split=split)
        wanted = [
            (f"{split}2014/COCO_{split}2014_{n:012d}.jpg", (f"{split} {n} 0".encode(), f"{split} {n} 1".encode()))
            for n in numbers
        ]
        assert found == wanted
        assert source.report.unused["file .json"] == 3  # the other split's captions, and both files of boxes
    (tmp_path / "annotations/captions_val2014.json").rename(tmp_path / "annotations/more_train.json")
    with pytest.raises(UserError, match=r"several tables of names and captions \(captions_train2014.json, more_train"):
        read(tmp_path, split="train")


@pytest.mark.parametrize("absolute", [True, False])
def test_albefs_lists(absolute: bool, tmp_path: Path) -> None:
    pictures(tmp_path, "images/a.jpg", "images/b.jpg")
    start = "/export/share/flickr30k-images/" if absolute else "images/"
    rows = [{"image": f"{start}{n}.jpg", "caption": f"a {n} {k}", "image_id": n} for n in "ab" for k in range(2)]
    write(tmp_path / "flickr30k_train.json", rows)
    write(tmp_path / "config.json", {"model": "none of these"})
    source, found = read(tmp_path)
    assert found == [(f"images/{n}.jpg", (f"a {n} 0".encode(), f"a {n} 1".encode())) for n in "ab"]
    assert source.report.unused == {"file .json": 1}
    again = FolderSource(str(tmp_path))
    assert again.fingerprint == source.fingerprint


def test_two_pictures_of_one_name_are_not_taken_for_each_other(tmp_path: Path) -> None:
    pictures(tmp_path, "x/a.jpg", "y/a.jpg", "y/b.jpg")
    write(tmp_path / "list.json", [{"image": f"/elsewhere/{n}.jpg", "caption": n} for n in "ab"])
    source, found = read(tmp_path)
    assert found == [("y/b.jpg", (b"b",))]
    assert "unsafe name" in source.report.skipped or "no image" in source.report.skipped


def test_damaged_rows_are_counted(tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg")
    write(tmp_path / "list.json", [{"image": "a.jpg", "caption": ["one", "two"]}, {"image": "a.jpg"}, 7, None])
    source, found = read(tmp_path)
    assert found == [("a.jpg", (b"one", b"two"))]
    assert source.report.skipped["unreadable line"] == 3


def test_a_table_with_lists_in_cells_and_splits(tmp_path: Path) -> None:
    """As Flickr30k's on Hugging Face."""
    pictures(tmp_path, *(f"{n}.jpg" for n in range(3)))
    lines = ["raw,split,filename"]
    for n, split in enumerate(("train", "val", "test")):
        cell = json.dumps([f'says "hi" {n}', f"b {n}"]).replace('"', '""')
        lines.append(f'"{cell}",{split},{n}.jpg')
    (tmp_path / "flickr_annotations_30k.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source, found = read(tmp_path, split="test", caption_key="raw")
    assert found == [("2.jpg", (b'says "hi" 2', b"b 2"))]
    assert source.report.unused == {"row of split train": 1, "row of split val": 1}
    # One split alone is no choice.
    (tmp_path / "flickr_annotations_30k.csv").write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    _, found = read(tmp_path, split="val", caption_key="raw")
    assert [name for name, _ in found] == ["0.jpg"]


def test_files_beside_pictures_that_are_no_annotations_stop_nothing(tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg")
    write(tmp_path / "list.json", [{"image": "a.jpg", "caption": "one"}])
    (tmp_path / "empty.json").touch()
    (tmp_path / "cut.json").write_text('[{"image": "a.jpg", "caption": "o', encoding="utf-8")
    listed = [{"id": [1], "file_name": "a.jpg"}, {"id": 2}, 3]
    write(tmp_path / "odd.json", {"images": listed, "annotations": [7, {"image_id": [1], "caption": "two"}]})
    with pytest.raises(UserError, match="several tables of names and captions"):  # of which one has no rows
        read(tmp_path)
    (tmp_path / "odd.json").unlink()
    source, found = read(tmp_path)
    assert found == [("a.jpg", (b"one",))] and source.report.unused == {"file .json": 2}
