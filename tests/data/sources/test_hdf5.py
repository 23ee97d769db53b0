"""HDF5Source: layouts, captions, classes, damage. The source never decodes, so a picture is any bytes."""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from m3ae_jax.data import images
from m3ae_jax.data.sources import hdf5, open_format
from m3ae_jax.data.sources.base import Source, SourceOptions
from m3ae_jax.data.sources.hdf5 import HDF5Source
from m3ae_jax.data.sources.index import IndexReport
from m3ae_jax.errors import UserError

VLEN = h5py.vlen_dtype(np.uint8)


def put(file: h5py.File, name: str, rows: Sequence[bytes], **options: Any) -> None:
    """Writes rows as the reference implementation of M3AE reads them."""
    dataset = file.create_dataset(name, (len(rows),), dtype=VLEN, **options)
    for i, row in enumerate(rows):
        dataset[i] = np.frombuffer(row, np.uint8)


def write(folder: Path, pairs: list[tuple[bytes, bytes]]) -> str:
    """Stores pairs of a picture and a caption; the path that the source takes."""
    half = len(pairs) // 2 if len(pairs) >= 4 else len(pairs)
    for number, part in enumerate([pairs[:half], pairs[half:]]):
        if part:
            with h5py.File(folder / f"{number}.h5", "w") as file:
                put(file, "jpg", [picture for picture, _ in part])
                put(file, "caption", [caption for _, caption in part])
    return str(folder)


def some(count: int) -> list[tuple[bytes, bytes]]:
    return [(b"picture %d " % i * (i % 7 + 1) + b"\0", "cäption %d".encode() % i) for i in range(count)]


def everything(source: HDF5Source) -> list[tuple[bytes, bytes]]:
    return [(record["image"], record["caption"]) for record in source.read(np.arange(len(source)))]


def as_far_as_whole(source: HDF5Source) -> list[tuple[bytes, bytes]]:
    """Of what is damaged, no bytes."""
    return [(record["image"], record.get("caption", b"")) for record in source.read(np.arange(len(source)))]


def one(tmp_path: Path, fill: Callable[[h5py.File], Any], **options: Any) -> HDF5Source:
    with h5py.File(tmp_path / "one.h5", "w") as file:
        fill(file)
    return HDF5Source(str(tmp_path / "one.h5"), SourceOptions(**options))


def refused(tmp_path: Path, fill: Callable[[h5py.File], Any], **options: Any) -> str:
    """The message, which is one line and names the file."""
    with pytest.raises(UserError) as caught:
        one(tmp_path, fill, **options)
    message = str(caught.value)
    assert "one.h5" in message and "\n" not in message
    return message


# --- reading -----------------------------------------------------------------------------------------------


def test_reads_all_in_order(tmp_path: Path) -> None:
    source: Source = HDF5Source(write(tmp_path, some(11)))
    assert source.modalities == ("image", "text") and source.classes == ()
    assert everything(source) == some(11)  # type: ignore[arg-type]
    assert source.report == IndexReport(2, 11, {}, {})  # type: ignore[attr-defined]
    assert source.read(np.array([], np.int64)) == []


@pytest.mark.parametrize("seed", range(3))
def test_any_indices_give_their_own_pairs(tmp_path: Path, seed: int) -> None:
    source = HDF5Source(write(tmp_path, some(23)))
    order = np.random.default_rng(seed).permutation(np.repeat(np.arange(23), 2))
    assert [(r["image"], r["caption"]) for r in source.read(order)] == [some(23)[i] for i in order]


def test_threads_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5, "_MAX_OPEN", 1)
    source = HDF5Source(write(tmp_path, some(40)))
    barrier = threading.Barrier(4)

    def work(seed: int) -> bool:
        barrier.wait()
        order = np.random.default_rng(seed).integers(0, 40, (20, 16))
        return all(
            [(r["image"], r["caption"]) for r in source.read(row)] == [some(40)[i] for i in row] for row in order
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_fingerprint(tmp_path: Path) -> None:
    for name, pairs in (("a", some(6)), ("b", some(6)), ("c", some(7))):
        (tmp_path / name).mkdir()
        write(tmp_path / name, pairs)
        os.utime(tmp_path / name / "0.h5", ns=(len(pairs), hash(name) % 10**9))
    prints = [HDF5Source(str(tmp_path / name)).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_a_file_gone_or_shortened_later_is_an_os_error(tmp_path: Path) -> None:
    source = HDF5Source(write(tmp_path, some(6)))
    assert len(source.read(np.arange(6))) == 6
    os.truncate(tmp_path / "0.h5", 1000)
    with pytest.raises(OSError, match=r"0\.h5: changed since it was indexed; start again"):
        source.read(np.array([0]))
    (tmp_path / "1.h5").unlink()
    with pytest.raises(FileNotFoundError):
        source.read(np.array([5]))


# --- layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "options", "modalities"),
    [
        ({"jpg": b"p", "caption": b"c"}, {}, ("image", "text")),
        ({"images/jpg": b"p", "images/caption": b"c"}, {"split": "images"}, ("image", "text")),
        ({"train_jpg": b"p", "train_text": b"c", "val_jpg": b"q"}, {}, ("image", "text")),
        ({"val_jpg": b"p", "train_jpg": b"q"}, {"split": "val"}, ("image",)),
        ({"validation_jpg": b"p", "train_jpg": b"q"}, {"split": "val"}, ("image",)),
        ({"test/image": b"p", "train/image": b"q"}, {"split": "val"}, ("image",)),
        ({"jpg": b"p"}, {}, ("image",)),
        ({"text": b"c"}, {}, ("text",)),
        ({"x": b"p", "y": b"c", "jpg": b"q"}, {"image_key": "x", "caption_key": "y"}, ("image", "text")),
        ({"val_x": b"p", "val_text": b"c", "train_x": b"q"}, {"image_key": "x", "split": "val"}, ("image", "text")),
        ({"g/x": b"p", "caption": b"c"}, {"image_key": "g/x"}, ("image", "text")),
    ],
)
def test_layouts(tmp_path: Path, names: dict[str, bytes], options: dict[str, str], modalities: tuple[str, ...]) -> None:
    source = one(tmp_path, lambda file: [put(file, name, [row] * 3) for name, row in names.items()], **options)
    assert source.modalities == modalities
    expected = {"image": b"p"} if "image" in modalities else {}
    assert source.read(np.array([2])) == [expected | ({"caption": b"c"} if "text" in modalities else {})]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("bild titel", {}, "no data set of pictures or captions under a usual name, only bild, titel"),
        ("", {}, "only none at all"),
        (
            "jpg caption",
            {"caption_key": "captoin"},
            r"caption_key='captoin'.* has only caption, jpg; did you mean 'capt",
        ),
        ("train_jpg val_jpg", {"split": "tran"}, r"split='tran'.* only the splits train, val .*did you mean 'train'"),
        ("train_jpg", {"split": "val"}, r"split='val'.* only the splits train \(data sets train_jpg\)"),
        ("a/train/jpg", {"split": "val"}, r"split='val'.* only the splits a/train \(data sets a/train/jpg\)"),
        ("jpg caption", {"split": "tset"}, r"split='tset'.* has no splits \(data sets caption, jpg\)"),
        ("train_jpg train_txt", {"caption_key": "txet"}, r"caption_key='txet'.*did you mean 'txt'"),
        ("jpg label", {"group_key": "groop"}, r"group_key='groop'.* has only jpg, label"),
        ("g/jpg g/concept", {"group_key": "conzept"}, r"group_key='conzept'.*did you mean 'concept'"),
        ("jpg caption", {"template": "a {}"}, r"template='a \{\}' is not read: the data have captions \(caption\)"),
        ("jpg", {"template": "a {}"}, r"template='a \{\}' needs classes"),
    ],
)
def test_item_1_wrong_keys(tmp_path: Path, names: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        one(tmp_path, lambda f: [put(f, name, [b"x"]) for name in names.split()], **options)
    assert "\n" not in str(caught.value)


def test_unequal_lengths(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        put(file, "jpg", [b"p"] * 5)
        put(file, "caption", [b"c"] * 4)

    assert "jpg has 5 rows, caption has 4 rows" in refused(tmp_path, fill)


def test_files_of_different_layouts(tmp_path: Path) -> None:
    write(tmp_path, some(4))
    with h5py.File(tmp_path / "2.h5", "w") as file:
        put(file, "text", [b"t"])
    with pytest.raises(UserError, match=r"2\.h5 has text, but .*0\.h5 jpg \+ caption"):
        HDF5Source(str(tmp_path))


def test_no_rows_no_file_and_stores(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no example: jpg has no rows"):
        one(tmp_path, lambda file: put(file, "jpg", []))
    with pytest.raises(UserError, match="no such file"):
        HDF5Source(str(tmp_path / "none.h5"))
    with pytest.raises(UserError, match=r"gs://b/a\.h5'.*copy it or mount"):
        HDF5Source("gs://b/a.h5")


@pytest.mark.parametrize("kind", ["vlen str", "vlen bytes", "fixed", "uint8", "opaque", "chunked"])
def test_captions_of_every_type(tmp_path: Path, kind: str) -> None:
    captions = ["ein Käfer".encode(), b"", b"two words"]

    def fill(file: h5py.File) -> None:
        put(file, "jpg", [b"p\0"] * 3)
        if kind in ("vlen str", "vlen bytes"):
            dtype = h5py.string_dtype("utf-8" if kind == "vlen str" else "ascii")
            file.create_dataset("caption", data=captions, dtype=dtype)
        elif kind == "fixed":
            file["caption"] = np.array(captions)
        elif kind == "opaque":
            file["caption"] = np.array([caption.ljust(12) for caption in captions], "V12")
        else:
            put(file, "caption", captions, **({"chunks": (2,), "compression": "gzip"} if kind == "chunked" else {}))

    result = everything(one(tmp_path, fill))
    wanted = [caption.ljust(12) for caption in captions] if kind == "opaque" else captions
    assert result == [(b"p\0", caption) for caption in wanted]


@pytest.mark.parametrize("shape", [(4, 5, 7, 3), (4, 5, 7)])
def test_decoded_pictures_come_as_bmp(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    source = one(tmp_path, lambda file: file.create_dataset("image", data=pixels))
    for i, record in zip((3, 1, 3), source.read(np.array([3, 1, 3])), strict=True):
        image = Image.open(io.BytesIO(record["image"]))
        assert image.format == "BMP"
        expected = pixels[i] if len(shape) == 4 else np.repeat(pixels[i][..., None], 3, -1)
        np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("jpg", np.zeros((3, 4), np.float32), r"jpg is float32 \[3, 4\]; allowed are variable-length uint8"),
        ("jpg", np.zeros((3, 3, 8, 8), np.uint8), r"jpg is uint8 \[3, 3, 8, 8\]"),
        ("jpg", np.zeros(3, [("a", "i4")]), "jpg is "),
        ("jpg", np.array(["a", "b"], object), "holds strings, which HDF5 ends at their first zero byte"),
        ("caption", np.arange(3), r"caption is int64 \[3\]; allowed are"),
        ("text", np.uint8(3), "text is one value"),
    ],
)
def test_wrong_types(tmp_path: Path, name: str, data: Any, message: str) -> None:
    def fill(file: h5py.File) -> None:
        is_text = data.dtype.kind == "O"
        file.create_dataset(name, data=data, **({"dtype": h5py.string_dtype()} if is_text else {}))

    assert re.search(message, refused(tmp_path, fill))


def several_captions(file: h5py.File) -> None:
    put(file, "jpg", [b"p0", b"p1"])
    file.create_dataset("captions", data=[["a", "b", "c"], ["d", "", ""]], dtype=h5py.string_dtype())


def test_several_captions_one_drawn(tmp_path: Path) -> None:
    assert one(tmp_path, several_captions).read(np.array([1, 0])) == [
        {"image": b"p1", "caption": b"d"},
        {"image": b"p0", "caption": b"a", "captions": (b"a", b"b", b"c")},
    ]


def test_several_captions_all(tmp_path: Path) -> None:
    source = one(tmp_path, several_captions, captions="all")
    pairs = [(b"p0", b"a"), (b"p0", b"b"), (b"p0", b"c"), (b"p1", b"d")]
    assert everything(source) == pairs
    assert source.read(np.array([3, 1])) == [{"image": b"p1", "caption": b"d"}, {"image": b"p0", "caption": b"b"}]


# --- classes -----------------------------------------------------------------------------------------------


def labelled(labels: Sequence[int], **attributes: Any) -> Callable[[h5py.File], None]:
    def fill(file: h5py.File) -> None:
        put(file, "train_jpg", [b"p%d" % i for i in range(len(labels))])
        file["train_labels"] = np.array(labels)
        file.attrs.update(attributes)

    return fill


@pytest.mark.parametrize(
    ("labels", "attributes", "classes"),
    [
        ([0, 1, 2, 1], {}, ("0", "1", "2")),
        ([0, 3, 3, 1, 0], {}, ("0", "1", "2", "3")),  # a gap, but below the number of examples
        ([999, 0], {"num_classes": 1000}, tuple(map(str, range(1000)))),
        ([1, 0], {"class_names": '["cat", "dog", "bird"]'}, ("cat", "dog", "bird")),
        ([1, 0], {"classes": np.array([b"cat", b"dog"])}, ("cat", "dog")),
    ],
)
def test_classes(tmp_path: Path, labels: list[int], attributes: dict[str, Any], classes: tuple[str, ...]) -> None:
    source = one(tmp_path, labelled(labels, **attributes))
    assert source.classes == classes and source.modalities == ("image",)
    order = np.arange(len(labels))[::-1]
    assert source.read(order) == [{"image": b"p%d" % i, "label": labels[i]} for i in order]


def test_classes_are_those_of_all_splits(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        labelled([0, 1, 2])(file)
        put(file, "val_jpg", [b"v"])
        file["val_labels"] = np.array([[1]])

    assert one(tmp_path, fill, split="val").classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("labels", "attributes", "message"),
    [
        ([0, 1, -1, 0], {}, "train_labels has -1 at row 2; class numbers start at 0"),
        ([0, 1, 2, 1000], {}, r"train_labels has 1000 at row 3; .*number of examples \(4\)"),
        ([0, 2, 1], {"class_names": '["a", "b"]'}, "has 2 at row 1; class numbers are 0 to 1"),
        ([-1] * 9, {}, "-1 at row 0, -1 at row 1, -1 at row 2 and 6 more"),
        ([0.5], {}, r"train_labels is float64 \[1\]; allowed are integers"),
    ],
)
def test_labels_out_of_range(tmp_path: Path, labels: list[int], attributes: dict[str, Any], message: str) -> None:
    assert re.search(message, refused(tmp_path, labelled(labels, **attributes), label_key="labels"))
    assert re.search(message, refused(tmp_path, labelled(labels, **attributes), template="a {}"))


@pytest.mark.parametrize(
    ("labels", "attributes", "why"),
    [
        ([-1, -1], {}, "no class, e.g. -1"),
        ([0, 1, -1, 0], {}, "no class, e.g. -1"),
        ([0.73], {}, "no class, e.g. 0.73"),
        ([0, 10**7], {}, "no class, e.g. 10000000"),
        ([0, 2, 1], {"class_names": '["a", "b"]'}, "no class, e.g. 2"),
        ([b"a", b"b"], {}, "no class numbers"),
    ],
)
def test_a_usual_data_set_of_no_classes_does_not_stop_pretraining(
    tmp_path: Path, labels: list[Any], attributes: dict[str, Any], why: str
) -> None:
    source = one(tmp_path, labelled(labels, **attributes))
    assert source.classes == () and source.read(np.array([0])) == [{"image": b"p0"}]
    assert source.report.unused == {f"data set train_labels: {why}": len(labels)}


def test_a_usual_data_set_that_not_all_files_have_does_not_stop_pretraining(tmp_path: Path) -> None:
    for name, labels in (("a", [0, 1]), ("b", [])):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            put(file, "jpg", [b"p"] * 2)
            if labels:
                file["label"] = labels
    source = HDF5Source(str(tmp_path))
    assert source.read(np.array([0, 3])) == [{"image": b"p"}] * 2
    assert source.report.unused == {"data set label: not in all files": 2}
    with pytest.raises(UserError, match=r"label_key='label': .*b\.h5 has only jpg"):
        HDF5Source(str(tmp_path), SourceOptions(label_key="label"))


def test_template(tmp_path: Path) -> None:
    source = one(tmp_path, labelled([1, 0], class_names='["cat", "dög"]'), template="a photo of a {}")
    assert source.modalities == ("image", "text")
    assert source.read(np.array([0])) == [{"image": b"p0", "label": 1, "caption": "a photo of a dög".encode()}]
    with pytest.raises(UserError, match=r"template='a \{\} \{\}' must have one"):
        HDF5Source(str(tmp_path / "one.h5"), SourceOptions(template="a {} {}"))


# --- issue 19: nothing is left out in silence -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [VLEN, h5py.string_dtype(), np.dtype("S5")])
def test_item_1_a_caption_of_zero_characters_is_one(tmp_path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    def fill(file: h5py.File) -> None:
        put(file, "jpg", [b"p"] * 2)
        data = file.create_dataset("caption", (2, *shape), dtype=dtype)
        data[(1, *[0] * len(shape))] = (
            np.frombuffer(b"c", np.uint8) if h5py.check_vlen_dtype(dtype) == np.uint8 else b"c"
        )

    assert everything(one(tmp_path, fill)) == [(b"p", b""), (b"p", b"c")]


def test_item_1_of_several_captions_empty_ones_are_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(file: h5py.File) -> None:
        put(file, "jpg", [b"%d" % i for i in range(4)])
        captions = [["", "a"], ["", ""], ["b", "c"], ["", ""]]
        file.create_dataset("captions", data=captions, dtype=h5py.string_dtype())

    records = one(tmp_path, fill).read(np.arange(4))
    assert [record.get("caption") for record in records] == [b"a", None, b"b", None]
    assert [record.get("captions") for record in records] == [None, None, (b"b", b"c"), None]
    monkeypatch.setattr(hdf5, "_BLOCK", 3)
    source = one(tmp_path, fill, captions="all")
    assert everything(source) == [(b"0", b"a"), (b"2", b"b"), (b"2", b"c")]
    assert source.report.skipped == {"no caption": 2} and source.report.samples == {"no caption": "one.h5:row 1"}


def test_item_1_an_option_that_is_not_read_is_refused(tmp_path: Path) -> None:
    one(tmp_path, lambda file: put(file, "jpg", [b"p"]))
    with pytest.raises(UserError, match="caption_per_line=True: the format hdf5 does not read it"):
        open_format("hdf5", str(tmp_path), SourceOptions(caption_per_line=True), "data.train.")


def test_item_2_unused_data_sets_and_files_are_counted(tmp_path: Path) -> None:
    for name in "ab":
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            labelled([0, 1, 2], class_names='["x", "y", "z"]')(file)
            put(file, "val_jpg", [b"v"] * 2)
            file["meta/deep/url"] = np.arange(3)
            file["version"] = 3
            file["classes"] = np.array([b"x", b"y", b"z"])
    (tmp_path / "captions.csv").write_text("")
    report = HDF5Source(str(tmp_path)).report
    assert not report.skipped and report.unused == {
        "data set val_jpg": 4,
        "data set meta/deep/url": 6,
        "data set version": 2,
        "file .csv": 1,
    }
    assert report.samples["data set meta/deep/url"] == "a.h5" and report.samples["file .csv"] == "captions.csv"


@pytest.mark.parametrize(
    ("names", "options", "wanted"),
    [
        ("images texts", {}, ("images", "texts")),
        ("data/jpg data/caption", {}, ("data/jpg", "data/caption")),
        ("data/jpg data/caption", {"split": "val"}, ("data/jpg", "data/caption")),
        ("a/b/c/jpg a/b/c/text", {}, ("a/b/c/jpg", "a/b/c/text")),
        ("a/train/jpg a/train/text a/val/jpg a/val/text", {}, ("a/train/jpg", "a/train/text")),
        ("train/a/jpg train/a/text val/a/jpg val/a/text", {"split": "val"}, ("val/a/jpg", "val/a/text")),
        ("a/train_jpg a/train_text a/test_jpg", {"split": "val"}, ("a/test_jpg", "")),
        ("jpg text thumbs/jpg", {}, ("jpg", "text")),
        ("a/jpg a/caption b/jpg b/caption", {"split": "b"}, ("b/jpg", "b/caption")),
        ("a/jpg a/caption b/jpg b/caption", {"image_key": "b/jpg"}, ("b/jpg", "b/caption")),
        ("jpg image text", {"image_key": "image"}, ("image", "text")),
        ("train_alt_text train_jpg", {}, ("train_jpg", "train_alt_text")),
    ],
)
def test_item_4_candidates_that_are_clear(
    tmp_path: Path, names: str, options: dict[str, str], wanted: tuple[str, str]
) -> None:
    source = one(tmp_path, lambda f: [put(f, name, [name.encode()]) for name in names.split()], **options)
    (record,) = source.read(np.array([0]))
    assert (record["image"].decode(), record.get("caption", b"").decode()) == wanted
    unread = set(names.split()) - set(wanted)
    assert source.report.unused == {f"data set {name}": 1 for name in unread}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("jpg image text", r"several data sets of pictures, image, jpg; set image_key='image' or image_key='jpg'"),
        ("data/jpg data/img", r"pictures, data/jpg, data/img; set image_key='jpg' or image_key='img'"),
        (
            "a/jpg a/caption b/jpg b/caption",
            r"split='train': .* has only the splits a, b \(data sets a/caption, a/jpg, b/caption, b/jpg\)",
        ),
        ("a/train/jpg b/train/jpg", r"only the splits a/train, b/train \(data sets"),
    ],
)
def test_item_4_candidates_are_named_where_several_may_be_meant(tmp_path: Path, names: str, message: str) -> None:
    assert re.search(message, refused(tmp_path, lambda f: [put(f, name, [b"x"]) for name in names.split()]))


@pytest.mark.parametrize("picture", [np.void(b"\xff\xd8\xff\0"), np.frombuffer(b"\xff\xd8\xff\0", np.uint8)])
def test_item_4_a_group_for_each_example_is_refused_by_name(tmp_path: Path, picture: Any) -> None:
    """As the text-to-image files of CUB are."""

    def fill(file: h5py.File) -> None:
        for i in range(12):
            for split in ("train", "valid"):
                group = file.create_group(f"{split}/Albatross_{i:02}_0")
                group["img"], group["class"], group["embeddings"] = picture, "Albatross", np.zeros((5, 4))
                group.create_dataset("txt", data=["a bird"] * 5, dtype=h5py.string_dtype())

    for options in ({}, {"caption_key": "txt"}, {"split": "test"}):
        message = refused(tmp_path, fill, **options)
        assert "has a group for each example (train/Albatross_00_0/img, train/Albatross_01_0/img, " in message
        assert " and 14 more), which neither hdf5 nor data.prepare reads" in message
        assert message.count("_0/img") == 10 and len(message) < 600


def test_item_4_a_message_names_few_data_sets(tmp_path: Path) -> None:
    message = refused(tmp_path, lambda file: [put(file, f"x{i:03}", [b"x"]) for i in range(30)])
    assert "only x000, x001," in message and "x009 and 20 more; name them" in message and "x010" not in message


def test_item_4_of_two_data_sets_one_may_hold_no_pictures(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        file["image"] = np.arange(2)
        put(file, "jpg", [b"p", b"q"])
        file["loop"] = file["/"]

    source = one(tmp_path, fill)
    assert [record["image"] for record in source.read(np.arange(2))] == [b"p", b"q"]
    assert source.report.unused == {"data set image": 2}


def test_item_5_whole_number_floats_are_classes(tmp_path: Path) -> None:
    for value in (0.5, float("nan"), float("inf")):
        message = rf"train_labels is float64 \[2\]; .* whole numbers, which {value} at row 1 is not"
        assert re.search(message, refused(tmp_path, labelled([0.0, value]), label_key="labels"))  # type: ignore[list-item]
    source = one(tmp_path, labelled([0.0, 2.0, 1.0]))  # type: ignore[list-item]
    assert source.classes == ("0", "1", "2")
    assert [record["label"] for record in source.read(np.arange(3))] == [0, 2, 1]


@pytest.mark.parametrize("options", [{}, {"chunks": (2,)}])
def test_item_6_what_is_too_large_is_not_read(tmp_path: Path, options: dict[str, Any]) -> None:
    def fill(file: h5py.File) -> None:
        put(file, "jpg", [b"1234", b"12345", b"1"], **options)
        put(file, "caption", [b"c", b"d", b"eeeee"], **options)

    source = one(tmp_path, fill, max_bytes=4)
    lost = {"unusable": images.TOO_MANY_BYTES}
    assert source.read(np.array([2, 1, 0])) == [
        lost | {"image": b"1"},
        lost | {"image": b"", "caption": b"d"},
        {"image": b"1234", "caption": b"c"},
    ]
    assert source.fingerprint == HDF5Source(str(tmp_path / "one.h5")).fingerprint


def test_item_6_decoded_pictures_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    source = one(tmp_path, lambda file: file.create_dataset("image", data=pixels), max_bytes=47)
    assert source.read(np.array([1])) == [{"image": b"", "unusable": images.TOO_MANY_BYTES}]
    assert "unusable" not in HDF5Source(str(tmp_path / "one.h5"), SourceOptions(max_bytes=48)).read(np.array([1]))[0]


@pytest.mark.parametrize("values", [np.array([3, 4]), np.array([b"x", b"y"]), np.array(["x", "y"], object)])
def test_item_13_a_group(tmp_path: Path, values: np.ndarray) -> None:
    def fill(file: h5py.File) -> None:
        labelled([0, 1])(file)
        file.create_dataset("train_concept", data=values, dtype=h5py.string_dtype() if values.dtype == "O" else None)

    plain = one(tmp_path, fill)
    source = HDF5Source(str(tmp_path / "one.h5"), SourceOptions(group_key="concept"))
    wanted = [value.decode() if isinstance(value, bytes) else str(value) for value in values]
    assert [record["group"] for record in source.read(np.array([1, 0]))] == wanted[::-1]
    assert source.fingerprint != plain.fingerprint
    assert plain.report.unused == {"data set train_concept": 2} and not source.report.unused


# --- damage ------------------------------------------------------------------------------------------------


def outcome(path: Path, data: bytes) -> list[tuple[bytes, bytes]]:
    """What the source gives of a file with these bytes; nothing where it is refused in one line."""
    path.write_bytes(data)
    try:
        source = HDF5Source(str(path))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return []
    # A damaged name is another name, and a length may be any.
    return as_far_as_whole(source) if source.modalities == ("image", "text") and len(source) < 1000 else []


def damageable(tmp_path: Path, **options: Any) -> bytes:
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        put(file, "jpg", [picture for picture, _ in some(12)], **options)
        put(file, "caption", [caption for _, caption in some(12)], **options)
    return (tmp_path / "whole.h5").read_bytes()


def test_cut_anywhere(tmp_path: Path) -> None:
    data = damageable(tmp_path)
    for size in [0, 1, 8, len(data) - 1, *np.random.default_rng(0).integers(0, len(data), 100).tolist()]:
        assert outcome(tmp_path / "cut.h5", data[:size]) == []
    assert outcome(tmp_path / "cut.h5", data) == some(12)


@pytest.mark.parametrize("chunked", [False, True])
def test_changed_bytes_anywhere(tmp_path: Path, chunked: bool) -> None:
    """HDF5 has no checksum of its own, so bytes may come through changed; nothing else may happen."""
    checked = {"chunks": (3,), "compression": "gzip"}
    data = damageable(tmp_path, **(checked if chunked else {}))
    rng = np.random.default_rng(chunked)
    refused = unchanged = replaced = 0
    for _ in range(300):
        changed = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, len(data), rng.integers(1, 4))
        changed[places] = rng.integers(0, 256, len(places))
        result = outcome(tmp_path / "flip.h5", changed.tobytes())
        refused += not result
        replaced += any(picture == b"" for picture, _ in result)
        unchanged += result == some(12)
    assert refused and unchanged and replaced


def test_a_length_that_cannot_be_is_not_allocated(tmp_path: Path) -> None:
    """HDF5 itself takes 4 GB and 20 s here."""
    damageable(tmp_path)
    path = tmp_path / "whole.h5"
    with h5py.File(path) as file:
        place = file["jpg"].id.get_offset()
    with open(path, "r+b") as raw:
        raw.seek(place + 16 * 5)
        raw.write(b"\xff\xff\xff\xff")
    source = HDF5Source(str(path))
    expected = [(b"" if i == 5 else picture, caption) for i, (picture, caption) in enumerate(some(12))]
    assert everything(source) == expected
    assert source.read(np.array([5]))[0]["image"] == b""


def test_a_damaged_chunk_spoils_its_own_rows_only(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=pixels, chunks=(1, 8, 8, 3), fletcher32=True)
        place = file["image"].id.get_chunk_info(2).byte_offset
    with open(path, "r+b") as raw:
        raw.seek(place)
        raw.write(bytes(20))
    records = HDF5Source(str(path)).read(np.array([5, 2, 0, 2]))
    assert [record["image"][:2] for record in records] == [b"BM", b"", b"BM", b""]
    assert [record.get("unusable") for record in records] == [None, images.DAMAGED, None, images.DAMAGED]


# --- the shared files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ok", ""),
        ("labelled_ok", ""),
        ("length_mismatch", "jpg has 20 rows, caption has 18 rows"),
        ("truncated", r"truncated\.h5 is no whole HDF5 file: .*truncated file"),
        ("labelled_out_of_range", "train_labels has -1 at row 18, 1000 at row 19"),
    ],
)
def test_shared_files(shared: Path, name: str, message: str) -> None:
    path = shared / "data" / "corrupt" / "h5" / f"{name}.h5"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    if message:
        with pytest.raises(UserError, match=message):
            HDF5Source(str(path), SourceOptions(label_key="labels" if name.startswith("labelled") else ""))
        return
    source = HDF5Source(str(path))
    assert len(source) == 20
    for record in source.read(np.arange(20)):
        assert record["image"][:3] == b"\xff\xd8\xff"
        assert record.get("caption") if name == "ok" else record["label"] in range(3)
    assert source.classes == (() if name == "ok" else ("0", "1", "2"))


def test_shared_class_names(shared: Path) -> None:
    path = shared / "data" / "openclipart" / "openclipart_topdir_labelled.h5"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    source = HDF5Source(str(path), SourceOptions(split="val", template="a drawing of {}"))
    assert len(source) == 666 and len(source.classes) == 15
    for record in source.read(np.array([0, 665])):
        assert record["caption"].decode() == f"a drawing of {source.classes[record['label']].replace('_', ' ')}"


def test_a_damaged_file_is_left_out_beside_a_good_one(tmp_path: Path) -> None:
    pairs = [(b"%d" % i, b"caption %d" % i) for i in range(6)]
    path = Path(write(tmp_path, pairs))
    last = sorted(path.glob("*.h5"))[-1]
    last.write_bytes(last.read_bytes()[:500])
    source = HDF5Source(str(path))
    assert [r["image"] for r in source.read(np.arange(len(source)))] == [image for image, _ in pairs[: len(source)]]
    assert 0 < len(source) < 6 and source.report.skipped == {"unusable file": 1}
