"""FolderSource: metadata of all kinds, damage, links, names that lead outside. A picture is any bytes here."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3ae_jax.data import images
from m3ae_jax.data.sources import metadata as metadata_module
from m3ae_jax.data.sources.base import Source, SourceOptions
from m3ae_jax.data.sources.folder import FolderSource
from m3ae_jax.errors import UserError


def write(folder: Path, pairs: list[tuple[bytes, bytes]]) -> str:
    """Stores pictures and captions as this source reads them; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (picture, caption) in enumerate(pairs):
        suffix = "png" if picture.startswith(b"\x89PNG") else "jpg"
        (folder / f"{i:06d}.{suffix}").write_bytes(picture)
        text = json.dumps(line(f"{i:06d}.{suffix}", caption.decode("utf-8", "surrogateescape")), ensure_ascii=False)
        lines.append(text.encode("utf-8", "surrogateescape") + b"\n")
    (folder / "metadata.jsonl").write_bytes(b"".join(lines))
    return str(folder)


def pictures(root: Path, *names: str) -> str:
    """Writes files that hold their own names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return str(root)


def metadata(root: Path, *lines: Any) -> str:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (root / "metadata.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    return str(root)


def line(name: str, caption: Any) -> dict[str, Any]:
    return {"file_name": name, "caption": caption}


def everything(source: Source) -> list[tuple[str, bytes]]:
    return [(r["image"].decode(), r["caption"]) for r in source.read(np.arange(len(source)))]


# --- the three layouts -------------------------------------------------------------------------------------


def test_write_gives_what_was_written(tmp_path: Path) -> None:
    pairs = [
        (b"\x89PNG 1\0", b"one"),
        (b"\xff\xd8 2", 'größe "q" \\ \n'.encode()),
        (b"\xff\xd8", b"\xff bad \xc3"),
        (b"x", b""),
    ]
    source = FolderSource(write(tmp_path, pairs))
    assert [(r["image"], r["caption"]) for r in source.read(np.arange(4))] == pairs
    assert source.modalities == ("image", "text") and source.classes == ()
    assert source.report.skipped == {} and source.report.examples == 4


def test_examples_are_in_the_order_of_the_names(tmp_path: Path) -> None:
    names = ["b.jpg", "a/2.PNG", "a/1.webp", "a.jpg", "a-b.gif", "c/d/e.bmp"]
    pictures(tmp_path, *names, "notes.md")
    source = FolderSource(metadata(tmp_path, *(line(f"./{name}".replace("/d/", "//d/"), name) for name in names)))
    assert everything(source) == [(name, name.encode()) for name in sorted(names)]
    assert [r["image"] for r in source.read(np.array([5, 0, 5]))] == [sorted(names)[i].encode() for i in (5, 0, 5)]
    assert source.read(np.array([], np.int64)) == []


@pytest.mark.parametrize(("captions", "number"), [("draw", 3), ("all", 5)])
def test_several_captions(tmp_path: Path, captions: str, number: int) -> None:
    pictures(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    metadata(tmp_path, line("2.jpg", ["c", "d", "e"]), line("1.jpg", "a"), line("3.jpg", ["f", None, 4]))
    source = FolderSource(str(tmp_path), SourceOptions(captions=captions))
    records = source.read(np.arange(number))
    assert len(source) == number
    if captions == "draw":
        assert records[1] == {"image": b"2.jpg", "caption": b"c", "captions": (b"c", b"d", b"e")}
        assert records[2] == {"image": b"3.jpg", "caption": b"f"}
    else:
        assert [(r["image"][:1], r["caption"]) for r in records] == [
            (b"1", b"a"),
            *((b"2", c) for c in (b"c", b"d", b"e")),
            (b"3", b"f"),
        ]


def test_a_picture_of_several_lines_is_several_examples(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg", "2.jpg")
    metadata(tmp_path, line("2.jpg", "b"), line("1.jpg", "x"), line("2.jpg", "a"))
    assert everything(FolderSource(str(tmp_path))) == [("1.jpg", b"x"), ("2.jpg", b"b"), ("2.jpg", b"a")]


def test_csv(tmp_path: Path) -> None:
    captions = ["plain", 'with "quotes", commas', "of\ntwo\r\nlines", "größe \u2028 \x85", "", " spaces "]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["id", "file_name", "text"])
    names = [f"{i}.jpg" for i in range(len(captions))]
    for i, caption in enumerate(captions):
        writer.writerow([i, names[i], caption])
    pictures(tmp_path, *names)
    for data in (text.getvalue().encode(), b"\xef\xbb\xbf" + text.getvalue().encode().removesuffix(b"\r\n")):
        (tmp_path / "metadata.csv").write_bytes(data)
        source = FolderSource(str(tmp_path))
        assert everything(source) == [(n, c.encode()) for n, c in zip(names, captions, strict=True)]
        assert source.report.skipped == {}


def test_texts_beside_pictures(tmp_path: Path) -> None:
    pictures(tmp_path, "a/1.jpg", "a/1.txt", "b.png", "b.txt", "alone.jpg", "a/lonely.txt", "c.tar.jpg", "c.tar.txt")
    source = FolderSource(str(tmp_path))
    assert everything(source) == [("a/1.jpg", b"a/1.txt"), ("b.png", b"b.txt"), ("c.tar.jpg", b"c.tar.txt")]
    assert source.report.skipped == {"no caption": 1, "no image": 1}
    assert source.report.samples["no image"].endswith(":a/lonely.txt")
    assert source.modalities == ("image", "text")


def test_pictures_alone(tmp_path: Path) -> None:
    source = FolderSource(pictures(tmp_path, "b/1.jpg", "a.jpg", "readme.txt", ".hidden.jpg", ".git/1.jpg"))
    assert source.modalities == ("image",)
    assert source.read(np.arange(2)) == [{"image": b"a.jpg"}, {"image": b"b/1.jpg"}]
    assert source.report.skipped == {}


# --- what is left out --------------------------------------------------------------------------------------


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    pictures(tmp_path / "data", "1.jpg", "2.jpg", "3.jpg", "unnamed.jpg", "null.jpg")
    pictures(tmp_path, "outside.jpg")
    metadata(
        tmp_path / "data",
        line("1.jpg", "kept"),
        line("../outside.jpg", "x"),
        line("a/../1.jpg", "x"),
        line(f"{tmp_path}/outside.jpg", "x"),
        line("gone.jpg", "x"),
        line("metadata.jsonl", "x"),
        line("1.jpg/", "a slash at the end is no matter"),
        line("null.jpg", None),
        {"caption": "no name"},
        line(5, "x"),  # type: ignore[arg-type]
        "{not json",
        "[1, 2]",
        "",
        line("2.jpg\0", "x"),
        '{"file_name": "2.jpg", "caption": "\udcff\udcc3 bytes"}',
        '{"file_name": "3.jpg", "caption": "half a pair \\ud800"}',
        '{"file_name": "\udcff.jpg", "caption": "x"}',
    )
    source = FolderSource(str(tmp_path / "data"))
    assert everything(source) == [
        ("1.jpg", b"kept"),
        ("1.jpg", b"a slash at the end is no matter"),
        ("2.jpg", b"\xff\xc3 bytes"),
        ("3.jpg", b"half a pair ?"),
    ]
    assert source.report.skipped == {
        "unsafe name": 3,
        "no image": 4,
        "no caption": 2,
        "no file name": 2,
        "unreadable line": 2,
    }
    assert source.report.samples["unsafe name"] == "data:../outside.jpg"


def test_links(tmp_path: Path) -> None:
    pictures(tmp_path, "secret.jpg", "data2/near.jpg", "secret.txt")
    data = tmp_path / "data"
    pictures(data, "1.jpg", "1.txt", "sub/2.jpg", "sub/2.txt", "4.jpg")
    (data / "out.jpg").symlink_to("../secret.jpg")
    (data / "4.txt").symlink_to("../secret.txt")
    (data / "near.jpg").symlink_to("../data2/near.jpg")  # the folder's name and more
    (data / "3.jpg").symlink_to("1.jpg")
    (data / "3.txt").symlink_to("sub/2.txt")
    (data / "again").symlink_to("sub")
    (data / "all").symlink_to("..")
    (data / "broken.jpg").symlink_to("nowhere")
    os.mkfifo(data / "pipe.jpg")
    (tmp_path / "link").symlink_to("data")
    for path in (data, tmp_path / "link"):
        source = FolderSource(str(path))
        assert everything(source) == [("1.jpg", b"1.txt"), ("1.jpg", b"sub/2.txt"), ("sub/2.jpg", b"sub/2.txt")]
        assert source.report.skipped == {
            "link out of the folder": 2,
            "link to a folder": 2,
            "not a regular file": 2,
            "no caption": 1,
        }
        assert source.report.unused == {"link out of the folder, .txt": 1}  # the caption of 4.jpg, which has none so


def test_names_of_any_bytes(tmp_path: Path) -> None:
    name = b"\xff\n\xc3.jpg"
    (tmp_path / os.fsdecode(name)).write_bytes(b"odd")
    metadata(tmp_path, '{"file_name": "\udcff\\n\udcc3.jpg", "caption": "found"}', line("x\n.jpg", "x"))
    source = FolderSource(str(tmp_path))
    assert everything(source) == [("odd", b"found")]
    assert "\n" not in source.report.samples["no image"]


def test_csv_that_does_not_parse(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"{i}.jpg" for i in range(5)))
    rows = [
        b"file_name,caption",
        b"0.jpg,zero",
        b'1.jpg,"never closed' + b"x" * 200_000,
        b"2.jpg",
        b"",
        b"3.jpg,\xff\xfe\x00 bytes",
        b"4.jpg,last,too,many",
    ]
    (tmp_path / "metadata.csv").write_bytes(b"\r\n".join(rows))
    source = FolderSource(str(tmp_path))
    assert everything(source) == [("0.jpg", b"zero"), ("3.jpg", b"\xff\xfe\x00 bytes"), ("4.jpg", b"last,too,many")]
    assert source.report.skipped == {"unreadable line": 1, "no caption": 1}


def test_a_line_without_end_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_module, "_MAX_LINE", 100)
    pictures(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    metadata(tmp_path, line("1.jpg", "a"), line("2.jpg", "long" * 100), line("3.jpg", "c"))
    source = FolderSource(str(tmp_path))
    assert everything(source) == [("1.jpg", b"a"), ("3.jpg", b"c")]
    assert source.report.skipped == {"unreadable line": 1}  # and its picture with it, which the line names


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("seed", range(3))
def test_noise_never_breaks_the_process(tmp_path: Path, suffix: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"{i}.jpg" for i in range(20)]
    pictures(tmp_path, *names)
    if suffix == "csv":
        good = b"file_name,caption\n" + b"".join(f'{n},"a caption, of {n}"\n'.encode() for n in names)
    else:
        good = b"".join(json.dumps(line(n, [f"caption of {n}", "x"])).encode() + b"\n" for n in names)
    for _ in range(30):
        data = bytearray(good)
        for at in rng.integers(40, len(good), 25):
            data[at] = rng.integers(0, 256)
        (tmp_path / f"metadata.{suffix}").write_bytes(data)
        source = FolderSource(str(tmp_path))
        assert len(source.read(np.arange(len(source)))) == len(source)


# --- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "text", "options", "message"),
    [
        (["1.jpg"], '{"picture": "1.jpg", "text": "a"}', {}, "has the fields picture, text, none named file_name"),
        (["1.jpg"], '{"file_name": "1.jpg", "score": 3}', {}, "score, none named caption; data.*.caption_key"),
        (["1.jpg"], '{"file_name": "1.jpg", "captoin": "a"}', {"caption_key": "caption"}, "did you mean 'captoin'?"),
        (["1.jpg"], "not json", {}, "has no line that can be read, so no field file_name"),
        (["1.jpg"], "", {}, "has no line that can be read"),
        (["1.jpg"], '{"file_name": "2.jpg", "caption": "a"}', {}, "no image 1 (e.g. "),
        ([], None, {}, "is an empty folder; it takes a folder of pictures with a metadata.jsonl, .csv, .tsv or"),
        (["a.md"], None, {}, "holds no picture (not read: file .md 1 (e.g. "),
        (["0.tiff"], None, {}, "holds no picture (left out: unsupported ending .tiff 1 (e.g. "),
        ([f"{i}.tar" for i in range(12)], None, {}, "holds no picture, but 12 .tar (e.g. "),
        (["0.tar"], None, {}, "0.tar): source=webdataset"),
        (["a.tfrecord-00000-of-00002", "a.tfrecord-00001-of-00002"], None, {}, "but 2 .tfrecord (e.g. "),
        (["part/1.jpg", "part/metadata.jsonl"], None, {}, "did you mean '{}/part'?"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(
    tmp_path: Path, files: list[str], text: str | None, options: dict[str, str], message: str
) -> None:
    pictures(tmp_path, *files)
    if text is not None:
        (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        FolderSource(str(tmp_path), SourceOptions(**options))  # type: ignore[arg-type]
    assert message.format(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("flickr", "is not there; it takes a folder .*; did you mean '.*/flickr30k'"),
        ("flickr30k/metadata.jsonl", "is a file; it takes a folder"),
    ],
)
def test_paths_that_are_no_folder(tmp_path: Path, path: str, message: str) -> None:
    pictures(tmp_path, "flickr30k/metadata.jsonl")
    with pytest.raises(UserError, match=message):
        FolderSource(str(tmp_path / path))


def test_a_store_is_refused() -> None:
    with pytest.raises(UserError, match="source webdataset"):
        FolderSource("gs://bucket/pictures")


def test_fields_are_chosen_by_options(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg")
    metadata(tmp_path, {"picture": "1.jpg", "caption": "no", "alt": "yes"})
    options = SourceOptions(image_key="picture", caption_key="alt")
    assert everything(FolderSource(str(tmp_path), options)) == [("1.jpg", b"yes")]


# --- identity, threads, size -------------------------------------------------------------------------------


def test_fingerprint_is_of_the_content_not_of_its_place_or_time(tmp_path: Path) -> None:
    pairs = [(b"picture %d" % i, b"caption %d" % i) for i in range(5)]
    first = FolderSource(write(tmp_path / "a", pairs)).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in (tmp_path / "b").iterdir():
        os.utime(path, (1, 1))
    assert FolderSource(str(tmp_path / "b")).fingerprint == first
    seen = {first, FolderSource(str(tmp_path / "b"), SourceOptions(captions="all")).fingerprint}
    assert len(seen) == 2
    (tmp_path / "b" / "000000.jpg").write_bytes(b"another picture")
    seen.add(FolderSource(str(tmp_path / "b")).fingerprint)
    write(tmp_path / "b", [*pairs[:4], (b"picture 4", b"another caption")])
    seen.add(FolderSource(str(tmp_path / "b")).fingerprint)
    (tmp_path / "b" / "metadata.jsonl").unlink()
    seen.add(FolderSource(str(tmp_path / "b")).fingerprint)
    (tmp_path / "b" / "000000.txt").write_bytes(b"x")
    seen.add(FolderSource(str(tmp_path / "b")).fingerprint)
    assert len(seen) == 6


def test_threads_read_at_once(tmp_path: Path) -> None:
    pairs = [(b"picture %d" % i, b"caption %d" % i) for i in range(100)]
    source = FolderSource(write(tmp_path, pairs))

    def work(seed: int) -> bool:
        order = np.random.default_rng(seed).integers(0, 100, 300)
        return [(r["image"], r["caption"]) for r in source.read(order)] == [pairs[i] for i in order]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_a_picture_that_is_gone_is_empty_and_a_folder_that_is_gone_an_error(tmp_path: Path) -> None:
    source = FolderSource(write(tmp_path, [(b"1", b"one"), (b"2", b"two")]))
    (tmp_path / "000001.jpg").unlink()
    assert source.read(np.array([1]))[0] == {"image": b"", "caption": b"two"}
    os.truncate(tmp_path / "metadata.jsonl", 10)
    with pytest.raises(OSError, match=r"metadata\.jsonl: shorter than when it was indexed"):
        source.read(np.array([0]))


# --- issue 19: nothing is left out in silence --------------------------------------------------------------


def parquet(path: Path, columns: dict[str, Any]) -> None:
    pq.write_table(pa.table(columns), path, row_group_size=2)


def captions_of(source: Source) -> dict[str, Any]:
    return {r["image"].decode(): r.get("caption") for r in source.read(np.arange(len(source)))}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("stem", ["metadata", "captions", "mine"])
def test_item_2_caption_files_beside_pictures_are_read(tmp_path: Path, stem: str, ending: str) -> None:
    pictures(tmp_path, "1.jpg", "2.jpg", "3.jpg", "notes.md", "a.json")
    names, texts = ["2.jpg", "1.jpg", "2.jpg"], ["größe", "one, two", "b"]
    if ending == "parquet":
        parquet(tmp_path / f"{stem}.parquet", {"image": names, "text": texts, "url": ["x"] * 3})
    elif ending == "jsonl":
        rows = [{"image": name, "text": text, "url": "x"} for name, text in zip(names, texts, strict=True)]
        (tmp_path / f"{stem}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        separator = "," if ending == "csv" else "\t"
        with open(tmp_path / f"{stem}.{ending}", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=separator)
            writer.writerows([("image", "text", "url"), *((n, t, "x") for n, t in zip(names, texts, strict=True))])
    source = FolderSource(str(tmp_path))
    assert everything(source) == [("1.jpg", b"one, two"), ("2.jpg", "größe".encode()), ("2.jpg", b"b")]
    assert source.report.skipped == {"no caption": 1}
    assert source.report.unused == {"column url": 1, "file .md": 1, "file .json": 1}
    assert source.report.samples["column url"].endswith(f":{stem}.{ending}")


def test_item_2_captions_txt_of_flickr8k(tmp_path: Path) -> None:
    pictures(tmp_path, "Images/1.jpg", "Images/2.jpg")
    lines = 'image,caption\nImages/1.jpg,"a dog , running"\nImages/1.jpg,a dog\nImages/2.jpg,a cat\n'
    (tmp_path / "captions.txt").write_text(lines)
    source = FolderSource(str(tmp_path))
    assert everything(source) == [
        ("Images/1.jpg", b"a dog , running"),
        ("Images/1.jpg", b"a dog"),
        ("Images/2.jpg", b"a cat"),
    ]
    assert source.report.skipped == {} and source.report.unused == {}
    (tmp_path / "captions.txt").write_text("of the pictures\n")  # no table
    assert FolderSource(str(tmp_path)).report.unused == {"file .txt": 1}


def test_item_2_tables_that_are_not_read_are_counted(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg", "2.jpg", "1.txt", "sub/captions.csv", "movie.mp4", "LICENSE", "3.tif", "4.HEIC")
    for name in ("metadata.csv", "metadata.tsv", "captions.csv", "annotations.csv"):
        (tmp_path / name).write_text("file_name,caption\n1.jpg,from a table\n")
    metadata(tmp_path, line("1.jpg", "first"), line("2.jpg", "second"))
    source = FolderSource(str(tmp_path))
    assert everything(source) == [("1.jpg", b"first"), ("2.jpg", b"second")]
    assert source.report.skipped == {"unsupported ending .tif": 1, "unsupported ending .heic": 1}
    assert source.report.unused == {
        "file .csv": 4,
        "file .tsv": 1,
        "file .txt": 1,
        "file .mp4": 1,
        "file without an ending": 1,
    }


def test_item_2_a_picture_that_a_line_names_and_that_cannot_be_used_is_counted_once(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg", "2.tiff", "3.tiff")
    source = FolderSource(metadata(tmp_path, line("1.jpg", "a"), line("2.tiff", "b")))
    assert len(source) == 1 and source.report.skipped == {"unsupported ending .tiff": 2}


def test_item_2_texts_named_after_the_whole_picture(tmp_path: Path) -> None:
    source = FolderSource(pictures(tmp_path, "1.jpg", "1.jpg.txt", "2.png", "2.txt", "2.png.txt", "3.tif", "3.txt"))
    assert everything(source) == [("1.jpg", b"1.jpg.txt"), ("2.png", b"2.txt")]
    assert source.report.skipped == {"unsupported ending .tif": 1}
    assert source.report.unused == {"second .txt of a picture": 1}


def test_item_2_two_tables_by_other_names_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg")
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("file_name,caption\n1.jpg,c\n")
    with pytest.raises(UserError, match=r"several tables of names and captions \(a\.csv, b\.csv\); rename"):
        FolderSource(str(tmp_path))


def test_item_2_a_split_with_metadata_of_its_own(tmp_path: Path) -> None:
    pictures(tmp_path, "train/1.jpg", "test/1.jpg", "test/2.jpg", "stray.jpg", "docs/a.md", "README.md")
    metadata(tmp_path / "train", line("1.jpg", "of train"))
    metadata(tmp_path / "test", line("1.jpg", "of test"))
    source = FolderSource(str(tmp_path))
    assert captions_of(source) == {"train/1.jpg": b"of train"}
    assert source.report.skipped == {"not in the folder of a split": 1}
    assert source.report.unused == {"file .md": 1, "folder without metadata": 1, "folder of split test": 1}
    test = FolderSource(str(tmp_path), SourceOptions(split="test"))
    assert captions_of(test) == {"test/1.jpg": b"of test"} and test.report.skipped["no caption"] == 1
    with pytest.raises(UserError, match=r"data\.\*\.split='tset' is not one of test, train; did you mean 'test'\?"):
        FolderSource(str(tmp_path), SourceOptions(split="tset"))
    with pytest.raises(UserError, match="has no folder of that name"):
        FolderSource(str(tmp_path / "train"), SourceOptions(split="dev"))
    assert captions_of(FolderSource(str(tmp_path), SourceOptions(split="val"))) == {"test/1.jpg": b"of test"}


@pytest.mark.parametrize("option", ["image_key", "caption_key", "label_key", "group_key"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_item_1_a_mistyped_key_is_refused_with_the_nearest(tmp_path: Path, kind: str, option: str) -> None:
    pictures(tmp_path, "1.jpg")
    row = {"image_key": "1.jpg", "caption_key": "a", "label_key": 1, "group_key": "g"}
    if kind == "jsonl":
        metadata(tmp_path, row)
    elif kind == "csv":
        (tmp_path / "metadata.csv").write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    else:
        parquet(tmp_path / "metadata.parquet", {name: [value] for name, value in row.items()})
    right = {name: name for name in row}
    assert len(FolderSource(str(tmp_path), SourceOptions(**right))) == 1  # type: ignore[arg-type]
    wrong = right | {option: option[:-3] + "kye"}
    with pytest.raises(UserError, match=rf"{option}='.*_kye': .*metadata\.{kind}.* has only .*did you mean '{option}'"):
        FolderSource(str(tmp_path), SourceOptions(**wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["image_key", "caption_key", "label_key", "group_key", "template"])
@pytest.mark.parametrize("text", ["1.txt", "2.png"])
def test_item_1_options_of_a_table_are_refused_without_one(tmp_path: Path, text: str, option: str) -> None:
    pictures(tmp_path, "1.jpg", text)
    (tmp_path / "other.csv").write_text("id,sentence\n1,a\n")
    options = SourceOptions(**{option: "a {}"})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"{option}='a \{{\}}': .* has no table of captions .* has id, sentence"):
        FolderSource(str(tmp_path), options)


def test_item_1_a_template_without_classes_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg")
    with pytest.raises(UserError, match=r"template='a \{\}': .*metadata\.jsonl has no field of classes"):
        FolderSource(metadata(tmp_path, line("1.jpg", "a")), SourceOptions(template="a {}"))


def test_item_1_a_null_or_absent_caption_is_counted_and_an_empty_one_is_none(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"{i}.jpg" for i in range(6)))
    lines = [line("0.jpg", ""), line("1.jpg", None), {"file_name": "2.jpg"}, line("3.jpg", []), line("4.jpg", [None])]
    metadata(tmp_path, *lines, line("5.jpg", ["a", None]))
    source = FolderSource(str(tmp_path))
    assert everything(source) == [("0.jpg", b""), ("5.jpg", b"a")]
    assert source.report.skipped == {"no caption": 4} and source.report.unused == {"null in a list of captions": 1}
    each = FolderSource(str(tmp_path), SourceOptions(captions="all"))
    assert len(each) == 2 and each.report.skipped == {"no caption": 5}


@pytest.mark.parametrize(
    ("separator", "name"), [("\t", "tabs"), (";", "semicolons"), ("|", "vertical bars"), (",", "commas")]
)
def test_item_10_separators(tmp_path: Path, separator: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    pictures(tmp_path, "1.jpg", "2.jpg")
    rows = [("filepath", "title"), ("1.jpg", "a, b; c| d"), ("2.jpg", "two")]
    for file_name in ("metadata.csv", "metadata.tsv"):
        with open(tmp_path / file_name, "w", newline="") as file:
            csv.writer(file, delimiter=separator).writerows(rows)
        with caplog.at_level("INFO", "m3ae_jax"):
            source = FolderSource(str(tmp_path))
        assert everything(source) == [("1.jpg", b"a, b; c| d"), ("2.jpg", b"two")]
        assert f"{file_name} (separated by {name})" in caplog.text
        with pytest.raises(UserError, match=rf"{file_name} \(separated by {name}\) has only filepath, title"):
            FolderSource(str(tmp_path), SourceOptions(caption_key="titel"))
        (tmp_path / file_name).unlink()


def test_item_10_separators_of_a_header_that_has_no_usual_name(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg")
    (tmp_path / "metadata.csv").write_text("image_name| number| remark\n1.jpg| 0| a dog\n")
    with pytest.raises(UserError, match=r"\(separated by vertical bars\) has the fields image_name, number, remark"):
        FolderSource(str(tmp_path))
    assert everything(FolderSource(str(tmp_path), SourceOptions(caption_key="remark"))) == [("1.jpg", b"a dog")]


@pytest.mark.parametrize(
    ("row", "caption"),
    [
        ("0.jpg,Hello, world, more", "Hello, world, more"),
        ("0.jpg,a dog,running,", "a dog,running,"),
        ('0.jpg,"Hello," she said, "you"', '"Hello," she said, "you"'),
        ('"0.jpg","Hello", world', "Hello, world"),
        ("0.jpg,Hello,,", "Hello"),
        ('0.jpg,"Hello, world"', "Hello, world"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_commas_without_quotes_belong_to_a_caption_that_is_last(
    tmp_path: Path, row: str, caption: str, end: str
) -> None:
    pictures(tmp_path, "0.jpg")
    (tmp_path / "metadata.csv").write_bytes(f"image,caption\n{row}{end}".encode())
    source = FolderSource(str(tmp_path))
    assert everything(source) == [("0.jpg", caption.encode())]
    assert source.report.skipped == {} and source.report.unused == {}


@pytest.mark.parametrize("order", [["image", "caption", "label"], ["caption", "image", "label"], ["caption", "image"]])
def test_commas_without_quotes_before_another_column_are_counted(tmp_path: Path, order: list[str]) -> None:
    pictures(tmp_path, "0.jpg", "1.jpg")
    rows = [
        {"image": "0.jpg", "caption": "Hello, world", "label": "1"},
        {"image": "1.jpg", "caption": "whole", "label": "0"},
    ]
    lines = [",".join(order), *(",".join(row[name] for name in order) for row in rows)]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    source = FolderSource(str(tmp_path))
    assert everything(source) == [("1.jpg", b"whole")]
    assert source.report.skipped == {"more values than the header": 1} and source.report.unused == {}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("captions", ["draw", "all"])
def test_item_7_metadata_rewritten_in_place_is_refused(tmp_path: Path, kind: str, captions: str) -> None:
    names = [f"{i}.jpg" for i in range(4)]
    pictures(tmp_path, *names)

    def rewrite(order: list[int], text: str) -> None:
        rows = [line(names[i], f"{text} {i}") for i in order]
        lines = [json.dumps(row) for row in rows] if kind == "jsonl" else ["file_name,caption"]
        lines += [] if kind == "jsonl" else [",".join(row.values()) for row in rows]
        with open(tmp_path / f"metadata.{kind}", "r+" if (tmp_path / f"metadata.{kind}").exists() else "w") as file:
            file.truncate(0)
            file.write("\n".join(lines) + "\n")

    rewrite([0, 1, 2, 3], "of")
    source = FolderSource(str(tmp_path), SourceOptions(captions=captions))
    assert [r["caption"] for r in source.read(np.arange(4))] == [b"of 0", b"of 1", b"of 2", b"of 3"]
    rewrite([1, 0, 2, 3], "of")
    assert source.read(np.array([2]))[0]["caption"] == b"of 2"
    with pytest.raises(
        OSError, match=r"is not that of 0\.jpg any more: the file has changed since it was indexed; start"
    ):
        source.read(np.array([0]))
    rewrite([0, 1, 2, 3, 0], "longer")
    for i in (1, 2, 3):
        with pytest.raises(OSError, match="has changed since it was indexed"):
            source.read(np.array([i]))


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        ([2, 0.0, None], ("0", "1", "2"), [2, 0, None]),
        (["dog", "cat", "dog"], ("cat", "dog"), [1, 0, 1]),
        (["10", "9", None], ("10", "9"), [0, 1, None]),  # names, as JSON has numbers
    ],
)
def test_item_5_labels_of_json(tmp_path: Path, values: list[Any], classes: tuple[str, ...], labels: list[Any]) -> None:
    pictures(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    metadata(tmp_path, *(line(f"{i}.jpg", "a") | {"label": value} for i, value in enumerate(values)))
    source = FolderSource(str(tmp_path))
    assert source.classes == classes and source.report.unused == {}
    assert [r.get("label") for r in source.read(np.arange(3))] == labels


def test_item_5_labels_of_csv_and_parquet(tmp_path: Path) -> None:
    pictures(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    (tmp_path / "metadata.csv").write_text("file_name,text,label\n0.jpg,a,3.0\n1.jpg,b,1\n2.jpg,c,\n")
    source = FolderSource(str(tmp_path))
    assert source.classes == ("0", "1", "2", "3")
    assert [r.get("label") for r in source.read(np.arange(3))] == [3, 1, None]
    (tmp_path / "metadata.csv").unlink()
    columns = {"file_name": ["0.jpg", "1.jpg", "2.jpg"], "text": ["a", "b", "c"], "kind": [1.0, None, float("nan")]}
    parquet(tmp_path / "metadata.parquet", columns)
    source = FolderSource(str(tmp_path), SourceOptions(label_key="kind"))
    assert [r.get("label") for r in source.read(np.arange(3))] == [1, None, None]


@pytest.mark.parametrize("value", [-1, 2.5, True, [1], "dog", 10**7])
def test_item_5_what_is_no_class_is_refused_or_not_read(tmp_path: Path, value: Any) -> None:
    pictures(tmp_path, "0.jpg", "1.jpg")
    metadata(tmp_path, line("0.jpg", "a") | {"label": 0}, line("1.jpg", "b") | {"label": value})
    source = FolderSource(str(tmp_path))
    assert source.classes == () and [r.get("label") for r in source.read(np.arange(2))] == [None, None]
    assert source.report.unused == {"column label (no classes)": 1} and len(source) == 2
    with pytest.raises(UserError, match=r"label_key='label': .* which is no class; classes are integers from 0"):
        FolderSource(str(tmp_path), SourceOptions(label_key="label"))


def test_item_5_classes_without_captions(tmp_path: Path) -> None:
    pictures(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    metadata(tmp_path, {"file_name": "0.jpg", "label": "a_dog"}, {"file_name": "1.jpg", "label": "cat"})
    source = FolderSource(str(tmp_path))
    assert source.modalities == ("image",) and source.report.skipped == {"no label": 1}
    assert source.read(np.arange(2)) == [{"image": b"0.jpg", "label": 0}, {"image": b"1.jpg", "label": 1}]
    made = FolderSource(str(tmp_path), SourceOptions(template="a photo of {}"))
    assert made.modalities == ("image", "text") and made.fingerprint != source.fingerprint
    assert captions_of(made) == {"0.jpg": b"a photo of a dog", "1.jpg": b"a photo of cat"}


def test_item_5_a_template_makes_captions_where_there_are_none(tmp_path: Path) -> None:
    pictures(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    rows = [line("0.jpg", "own") | {"label": "dog"}, line("1.jpg", None) | {"label": "dog"}, line("2.jpg", None)]
    source = FolderSource(metadata(tmp_path, *rows), SourceOptions(template="a {}"))
    assert captions_of(source) == {"0.jpg": b"own", "1.jpg": b"a dog"}
    assert source.report.skipped == {"no caption": 1}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_item_13_groups(tmp_path: Path, kind: str) -> None:
    pictures(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    rows = [line(f"{i}.jpg", "a") | {"concept": value} for i, value in enumerate([7, None, 8])]
    if kind == "jsonl":
        metadata(tmp_path, *rows)
    else:
        parquet(tmp_path / "metadata.parquet", {name: [row[name] for row in rows] for name in rows[0]})
    source = FolderSource(str(tmp_path), SourceOptions(group_key="concept"))
    assert [r.get("group") for r in source.read(np.arange(3))] == ["7", None, "8"]
    assert source.report.unused == {}
    assert source.fingerprint != FolderSource(str(tmp_path)).fingerprint


def test_item_6_pictures_and_captions_of_too_many_bytes_are_not_read(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg", "1.txt", "2.jpg", "2.txt", "3.jpg", "3.txt")
    for name in ("2.jpg", "3.txt"):
        os.truncate(tmp_path / name, 2**40)
    records = FolderSource(str(tmp_path)).read(np.arange(3))
    assert records[0] == {"image": b"1.jpg", "caption": b"1.txt"}
    assert records[1] == {"image": b"", "caption": b"2.txt", "unusable": images.TOO_MANY_BYTES}
    assert records[2] == {"image": b"", "unusable": images.TOO_MANY_BYTES}


def test_item_6_lines_of_too_many_bytes_are_counted(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg", "2.jpg")
    metadata(tmp_path, line("1.jpg", "a"), line("2.jpg", "b" * 1000))
    source = FolderSource(str(tmp_path), SourceOptions(max_bytes=500))
    assert len(source) == 1 and source.report.skipped == {"too many bytes (data.max_bytes)": 1}
    assert len(FolderSource(str(tmp_path))) == 2


def test_parquet_of_any_bytes_lists_and_damage(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg", "2.jpg")
    texts = pa.array([[b"\xff bytes", b"b"], None], pa.list_(pa.binary())).cast(pa.list_(pa.string()), safe=False)
    file_names = pa.array(["1.jpg", "2.jpg"]).dictionary_encode()
    pq.write_table(pa.table({"file_name": file_names, "caption": texts}), tmp_path / "metadata.parquet")
    source = FolderSource(str(tmp_path))
    assert source.read(np.arange(1))[0] == {
        "image": b"1.jpg",
        "caption": b"\xff bytes",
        "captions": (b"\xff bytes", b"b"),
    }
    assert source.report.skipped == {"no caption": 1}
    data = (tmp_path / "metadata.parquet").read_bytes()
    (tmp_path / "metadata.parquet").write_bytes(data[:-10])
    with pytest.raises(UserError, match=r"metadata\.parquet is no whole Parquet file"):
        FolderSource(str(tmp_path))


# --- other people's folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [(), ("train/1.txt", "valid/2.txt", "test/3.txt"), ("README.md",)])
def test_folders_called_as_splits_are_not_mixed(tmp_path: Path, beside: tuple[str, ...]) -> None:
    pictures(tmp_path, "train/1.jpg", "train/in/1.jpg", "valid/2.jpg", "test/3.jpg", "docs/a.png", *beside)
    for split, names in (
        ("train", {"train/1.jpg", "train/in/1.jpg"}),
        ("val", {"valid/2.jpg"}),
        ("test", {"test/3.jpg"}),
    ):
        source = FolderSource(str(tmp_path), SourceOptions(split=split))
        told = len(names) - len(source)  # without a .txt
        assert {r["image"].decode() for r in source.read(np.arange(len(source)))} <= names
        assert sum(source.report.skipped.values()) == told
        unused = {kind for kind in source.report.unused if kind.startswith("folder")}
        there = {"train", "valid", "test"} - {"valid" if split == "val" else split}
        assert unused == {f"folder of split {other}" for other in there} | {"folder of no split"}
    with pytest.raises(
        UserError, match=r"data\.\*\.split='tset' is not one of test, train, valid; did you mean 'test'\?"
    ):
        FolderSource(str(tmp_path), SourceOptions(split="tset"))
    if not beside:
        assert len(FolderSource(str(tmp_path), SourceOptions(split=""))) == 5


def test_a_split_may_be_written_with_capitals(tmp_path: Path) -> None:
    pictures(tmp_path, "Train/1.jpg", "Test/2.jpg")
    source = FolderSource(str(tmp_path))
    assert len(source) == 1 and source.report.unused == {"folder of split Test": 1}
    with pytest.raises(UserError, match=r"split='tset' is not one of Test, Train"):
        FolderSource(str(tmp_path), SourceOptions(split="tset"))


@pytest.mark.parametrize("table", ["metadata.csv", "captions.csv", "mine.csv"])
def test_folders_called_as_splits_below_a_table_are_what_it_says(tmp_path: Path, table: str) -> None:
    pictures(tmp_path, "train/1.jpg", "test/2.jpg")
    (tmp_path / table).write_text("file_name,caption\ntrain/1.jpg,a\ntest/2.jpg,b\n")
    assert captions_of(FolderSource(str(tmp_path))) == {"train/1.jpg": b"a", "test/2.jpg": b"b"}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "captions.txt", "captions.tsv", "mine.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_a_table_in_utf_16_is_refused_with_the_command(tmp_path: Path, name: str, encoding: str) -> None:
    pictures(tmp_path, "1.jpg")
    text = json.dumps(line("1.jpg", "a dog")) if name.endswith("jsonl") else "file_name,caption\n1.jpg,a dog\n"
    (tmp_path / name).write_text(text, encoding=encoding)
    wanted = encoding.upper().removesuffix("-LE")
    with pytest.raises(UserError, match=f"is {wanted}[LE]*, not UTF-8; run: iconv -f {wanted}") as error:
        FolderSource(str(tmp_path))
    command = str(error.value).partition("run: ")[2]
    assert os.system(command) == 0
    assert everything(FolderSource(str(tmp_path))) == [("1.jpg", b"a dog")]


def test_captions_beside_pictures_in_utf_16_are_no_captions(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg", "1.txt", "2.jpg")
    (tmp_path / "2.txt").write_text("ein Hund", encoding="utf-16")
    assert FolderSource(str(tmp_path)).read(np.arange(2)) == [
        {"image": b"1.jpg", "caption": b"1.txt"},
        {"image": b"2.jpg"},
    ]
    (tmp_path / "1.txt").unlink()
    with pytest.raises(UserError, match=r"2\.txt is UTF-16, not UTF-8; run: iconv -f UTF-16 "):
        FolderSource(str(tmp_path))


@pytest.mark.parametrize("folder", ["Images", "Flicker8k_Dataset/deep"])
def test_flickr8k_as_kaggle_packs_it(tmp_path: Path, folder: str) -> None:
    pictures(tmp_path, f"{folder}/1.jpg", f"{folder}/2.jpg", f"{folder}/3.tif")
    lines = ["image,caption", '1.jpg,"a dog , running"', f"{folder}/1.jpg,a dog", "2.jpg,a cat", "3.tif,x", "4.jpg,y"]
    (tmp_path / "captions.txt").write_text("\n".join([*lines, "../1.jpg,z"]))
    source = FolderSource(str(tmp_path))
    captions = [("1", b"a dog , running"), ("1", b"a dog"), ("2", b"a cat")]
    assert everything(source) == [(f"{folder}/{name}.jpg", caption) for name, caption in captions]
    assert source.report.skipped == {"unsupported ending .tif": 1, "no image": 1, "unsafe name": 1}
    assert source.report.unused == {}
    pictures(tmp_path, "top.jpg")
    with pytest.raises(UserError, match="no image"):
        (tmp_path / "captions.txt").write_text("image,caption\n1.jpg,a dog\n")
        FolderSource(str(tmp_path))


@pytest.mark.parametrize("folder", ["", "flickr30k_images/"])
def test_flickr30k(tmp_path: Path, folder: str) -> None:
    pictures(tmp_path, f"{folder}1.jpg", f"{folder}2.jpg")
    rows = [
        "image_name| comment_number| comment",
        '1.jpg| 0| Two "men" , here .',
        "1.jpg| 1| A man .",
        "2.jpg| 4   A dog",
    ]
    (tmp_path / "results.csv").write_text("\n".join(rows))
    source = FolderSource(str(tmp_path))
    assert everything(source) == [(f"{folder}1.jpg", b'Two "men" , here .'), (f"{folder}1.jpg", b"A man .")]
    assert source.report.skipped == {"no caption": 1} and source.report.unused == {"column comment_number": 1}


def test_texts_and_pictures_in_capitals(tmp_path: Path) -> None:
    pictures(tmp_path, "1.JPG", "1.TXT", "2.jpg", "2.jpg.TXT", "3.jfif", "3.Txt", "4.jpe", "4.txt", "4.TXT", "5.TXT")
    source = FolderSource(str(tmp_path))
    assert everything(source) == [
        ("1.JPG", b"1.TXT"),
        ("2.jpg", b"2.jpg.TXT"),
        ("3.jfif", b"3.Txt"),
        ("4.jpe", b"4.txt"),
    ]
    assert source.report.skipped == {"no image": 1} and source.report.unused == {"second .txt of a picture": 1}


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_label_is_none(tmp_path: Path, empty: str) -> None:
    pictures(tmp_path, "0.jpg", "1.jpg")
    source = FolderSource(
        metadata(tmp_path, line("0.jpg", "a") | {"label": "dog"}, line("1.jpg", "b") | {"label": empty})
    )
    assert source.classes == ("dog",) and [r.get("label") for r in source.read(np.arange(2))] == [0, None]


def test_an_unreadable_line_counts_with_its_picture_where_it_names_it(tmp_path: Path) -> None:
    pictures(tmp_path, "a/my 1.jpg", "a/2.jpg", "a/3.jpg", "a/4.jpg")
    broken = [
        '{"file_name": "a/my 1.jpg", "caption": "cut',
        '{"file_name": "2.jpg", "cap',
        '{"file_na',
        '{"x": "4.jpg", }',
    ]
    source = FolderSource(metadata(tmp_path, line("4.jpg", "read"), *broken))
    assert everything(source) == [("a/4.jpg", b"read")]
    assert source.report.skipped == {"unreadable line": 4, "no caption": 1}


def test_a_link_that_leads_to_itself_is_counted(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg")
    (tmp_path / "2.jpg").symlink_to(tmp_path / "2.jpg")
    source = FolderSource(str(tmp_path))
    assert len(source) == 1 and source.report.skipped == {"not a regular file": 1}
