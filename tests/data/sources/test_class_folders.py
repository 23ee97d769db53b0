"""ClassFoldersSource: classes, splits, links, templates. It never decodes, so a picture is any bytes."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from m3ae_jax.data import images
from m3ae_jax.data.sources.base import Source, SourceOptions
from m3ae_jax.data.sources.class_folders import ClassFoldersSource
from m3ae_jax.errors import UserError


def write(root: Path, *names: str) -> str:
    """Writes files that hold their own names; what ends with a slash is a folder."""
    for name in names:
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(name.encode())
    return str(root)


def examples(source: Source) -> list[tuple[str, int]]:
    return [(record["image"].decode(), record["label"]) for record in source.read(np.arange(len(source)))]


def test_classes_are_sorted_and_numbered(tmp_path: Path) -> None:
    path = write(tmp_path, "dog/2.JPG", "cat/1.png", "dog/deep/er/0.jpeg", "Zebra/a.webp", "dog/10.jpg")
    source: Source = ClassFoldersSource(path)
    assert source.modalities == ("image",)
    assert source.classes == ("Zebra", "cat", "dog")
    assert examples(source) == [
        ("Zebra/a.webp", 0),
        ("cat/1.png", 1),
        ("dog/10.jpg", 2),
        ("dog/2.JPG", 2),
        ("dog/deep/er/0.jpeg", 2),
    ]
    assert source.report.skipped == {}  # type: ignore[attr-defined]
    assert "caption" not in source.read(np.array([0]))[0]
    assert [r["label"] for r in source.read(np.array([4, 0, 1]))] == [2, 0, 1]
    assert source.read(np.array([], np.int64)) == []


def test_a_template_makes_captions(tmp_path: Path) -> None:
    path = write(tmp_path, "guinea_pig/1.jpg", "jalapeño/1.jpg")
    source = ClassFoldersSource(path, SourceOptions(template="a photo of a {}"))
    assert source.modalities == ("image", "text")
    assert source.classes == ("guinea_pig", "jalapeño")
    captions = [record["caption"].decode() for record in source.read(np.arange(2))]
    assert captions == ["a photo of a guinea pig", "a photo of a jalapeño"]
    assert source.fingerprint != ClassFoldersSource(path).fingerprint


@pytest.mark.parametrize("template", ["a photo", "{name}", "{} and {}", "{", "{0.x}"])
def test_templates_without_a_place_for_the_name(tmp_path: Path, template: str) -> None:
    with pytest.raises(UserError, match=r"data\.\*\.template=.* must have one \{\} for the class's name"):
        ClassFoldersSource(write(tmp_path, "dog/1.jpg"), SourceOptions(template=template))


def test_splits_have_the_same_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/2.jpg", "val/a/2.jpg", "readme/")
    assert examples(ClassFoldersSource(path)) == [("train/a/1.jpg", 0), ("train/b/1.jpg", 1), ("train/c/1.jpg", 2)]
    val = ClassFoldersSource(path, SourceOptions(split="val"))
    assert examples(val) == [("val/a/2.jpg", 0), ("val/c/2.jpg", 2)]
    assert val.classes == ("a", "b", "c")
    assert val.report.skipped == {}
    assert val.report.unused == {"class folder without a picture": 1, "folder that is no split": 1}
    with pytest.raises(UserError, match=r"data\.\*\.split='vall' is not one of train, val; did you mean 'val'\?"):
        ClassFoldersSource(path, SourceOptions(split="vall"))
    assert examples(ClassFoldersSource(f"{path}/val")) == [("val/a/2.jpg", 0), ("val/c/2.jpg", 1)]


def test_a_class_named_as_a_split_is_a_class(tmp_path: Path) -> None:
    source = ClassFoldersSource(write(tmp_path, "boat/1.jpg", "train/1.jpg"))
    assert source.classes == ("boat", "train")


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path, "a/1.jpg", "a/notes.txt", "b/", "stray.png", ".hidden/1.jpg", "c/.x.jpg", "c/2.jpg", "LICENSE"
    )
    (tmp_path / "c" / "broken.jpg").symlink_to("nowhere")
    source = ClassFoldersSource(path)
    assert source.classes == ("a", "b", "c")
    assert examples(source) == [("a/1.jpg", 0), ("c/2.jpg", 2)]
    assert source.report.skipped == {"not in a class folder": 1, "not a regular file": 1}
    assert source.report.unused == {"class folder without a picture": 1, "file .txt": 1, "file without an ending": 1}
    assert source.report.samples["class folder without a picture"].endswith(":b")
    assert source.report.samples["file .txt"].endswith(":a/notes.txt")


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "all", "dog/1.jpg", "cat/1.jpg", "cow/1.jpg")
    subset = tmp_path / "subset"
    subset.mkdir()
    (subset / "dog").symlink_to("../all/dog")
    (subset / "cat").mkdir()
    (subset / "cat" / "x.jpg").symlink_to(tmp_path / "all" / "cat" / "1.jpg")
    (subset / "cat" / "circle").symlink_to("..")
    source = ClassFoldersSource(str(subset))
    assert source.classes == ("cat", "dog")
    assert examples(source) == [("cat/1.jpg", 0), ("dog/1.jpg", 1)]
    assert source.report.skipped["link to a folder that is there already"] == 1


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        (["1.jpg"], "", "holds no folder; it takes a folder with a folder per class, as PATH/dog/1.jpg"),
        ([], "", "is an empty folder; it takes a folder with a folder per class"),
        (["0.tar", "1.tar"], "", "holds no picture, but 2 .tar (e.g. "),
        (["0.tar", "1.tar"], "", "0.tar): source=webdataset"),
        (["dog/1.tiff"], "", "left out: unsupported ending .tiff 1 (e.g. "),
        (["dog/", "cat/"], "", "no picture in its 2 class folders"),
        (["pets/dog/1.jpg"], "pet", "is not there; it takes a folder with"),
        (["pets/dog/1.jpg"], "pet", "did you mean '{}/pets'?"),
        (["a.zip"], "a.zip", "is a file; it takes"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, files: list[str], path: str, message: str) -> None:
    write(tmp_path, *files)
    with pytest.raises(UserError) as error:
        ClassFoldersSource(str(tmp_path / path))
    assert message.format(tmp_path) in str(error.value)
    assert "data.*.path" in str(error.value) and "\n" not in str(error.value)


def test_a_store_is_refused() -> None:
    with pytest.raises(UserError, match="is in a store, where a call for each picture takes long"):
        ClassFoldersSource("gs://bucket/imagenet")


def test_fingerprint_is_of_names_and_sizes(tmp_path: Path) -> None:
    first = ClassFoldersSource(write(tmp_path / "a", "dog/1.jpg", "cat/1.jpg")).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert ClassFoldersSource(str(tmp_path / "b")).fingerprint == first
    (tmp_path / "b" / "cat" / "1.jpg").write_bytes(b"longer than before")
    changed = ClassFoldersSource(str(tmp_path / "b")).fingerprint
    (tmp_path / "a" / "cow").mkdir()
    assert len({first, changed, ClassFoldersSource(str(tmp_path / "a")).fingerprint}) == 3


def test_threads_and_pictures_gone(tmp_path: Path) -> None:
    source = ClassFoldersSource(write(tmp_path, *(f"{c}/{i:02d}.jpg" for c in "abc" for i in range(20))))
    expected = examples(source)

    def work(seed: int) -> bool:
        order = np.random.default_rng(seed).integers(0, 60, 200)
        return [(r["image"].decode(), r["label"]) for r in source.read(order)] == [expected[i] for i in order]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    (tmp_path / "a" / "00.jpg").unlink()
    assert source.read(np.array([0]))[0]["image"] == b""
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    with pytest.raises(OSError):
        source.read(np.array([0]))


def test_item_2_what_is_beside_the_pictures_is_counted(tmp_path: Path) -> None:
    names = ["train/a/1.jpg", "train/a/1.txt", "train/a/2.TIFF", "train/a/3.heic", "train/labels.csv"]
    path = write(tmp_path, *names, "val/a/1.jpg", "1.jpg", "README.md", "docs/a.txt")
    source = ClassFoldersSource(path)
    assert examples(source) == [("train/a/1.jpg", 0)]
    assert source.report.skipped == {
        "not in a class folder": 1,
        "unsupported ending .tiff": 1,
        "unsupported ending .heic": 1,
    }
    assert source.report.unused == {"file .txt": 1, "file .csv": 1, "file .md": 1, "folder that is no split": 1}
    assert source.report.samples["unsupported ending .heic"] == "train:a/3.heic"


def test_item_1_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "test", "a/1.jpg")
    with pytest.raises(UserError, match=r"data\.\*\.split='dev': .* has no folder of that name"):
        ClassFoldersSource(path, SourceOptions(split="dev"))
    assert len(ClassFoldersSource(path, SourceOptions(split="test"))) == 1  # the folder is that split
    assert ClassFoldersSource.uses == {"split", "template"}


def test_item_6_a_picture_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with open(tmp_path / "a" / "1.jpg", "wb") as file:
        file.truncate(2**40)
    (tmp_path / "a" / "2.jpg").write_bytes(b"small")
    source = ClassFoldersSource(str(tmp_path))
    assert source.read(np.arange(2)) == [
        {"image": b"", "label": 0, "unusable": images.TOO_MANY_BYTES},
        {"image": b"small", "label": 0},
    ]


SPLITS = ("train", "valid", "test")


@pytest.mark.parametrize("covered", [SPLITS, ("train",), ("valid",)])
def test_a_stray_picture_makes_no_class_of_a_split(tmp_path: Path, covered: tuple[str, ...]) -> None:
    path = write(
        tmp_path, *(f"{split}/{c}/1.jpg" for split in SPLITS for c in "AB"), *(f"{s}/cover.jpg" for s in covered)
    )
    for split, folder in (("train", "train"), ("val", "valid"), ("test", "test")):
        source = ClassFoldersSource(path, SourceOptions(split=split))
        assert source.classes == ("A", "B")
        assert examples(source) == [(f"{folder}/A/1.jpg", 0), (f"{folder}/B/1.jpg", 1)]
        assert source.report.skipped == ({"not in a class folder": 1} if folder in covered else {})


@pytest.mark.parametrize("beside", [(), ("docs/a.md",), ("test/1.jpg",)])
def test_a_stray_picture_in_the_only_split(tmp_path: Path, beside: tuple[str, ...]) -> None:
    source = ClassFoldersSource(write(tmp_path, "train/A/1.jpg", "train/B/1.jpg", "train/cover.jpg", *beside))
    assert examples(source) == [("train/A/1.jpg", 0), ("train/B/1.jpg", 1)]
    assert source.report.skipped == {"not in a class folder": 1}


def test_a_class_named_as_a_split_may_have_folders(tmp_path: Path) -> None:
    source = ClassFoldersSource(write(tmp_path, "boat/1.jpg", "train/1.jpg", "train/steam/2.jpg"))
    assert source.classes == ("boat", "train") and len(source) == 3


def test_splits_without_class_folders_are_no_classes(tmp_path: Path) -> None:
    path = write(tmp_path, "train/1.jpg", "test/1.jpg")
    with pytest.raises(UserError, match="its splits test, train hold no class folders; it takes"):
        ClassFoldersSource(path)


def test_usual_endings_of_jpeg(tmp_path: Path) -> None:
    source = ClassFoldersSource(write(tmp_path, "a/1.jfif", "a/2.JPE"))
    assert len(source) == 2 and source.report.skipped == {}
