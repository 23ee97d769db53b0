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
import pytest

from m3ae_jax.data.sources import folder as folder_module
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


def test_what_is_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    assert "unsafe name 3 (e.g. data:../outside.jpg)" in caplog.text


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
            "link out of the folder": 3,
            "link to a folder": 2,
            "not a regular file": 2,
            "no caption": 1,
        }


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
    assert everything(source) == [("0.jpg", b"zero"), ("3.jpg", b"\xff\xfe\x00 bytes"), ("4.jpg", b"last")]
    assert source.report.skipped == {"unreadable line": 1, "no caption": 1 + 1}


def test_a_line_without_end_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_MAX_LINE", 100)
    pictures(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    metadata(tmp_path, line("1.jpg", "a"), line("2.jpg", "long" * 100), line("3.jpg", "c"))
    source = FolderSource(str(tmp_path))
    assert everything(source) == [("1.jpg", b"a"), ("3.jpg", b"c")]
    assert source.report.skipped == {"unreadable line": 1, "no caption": 1}


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
        (["1.jpg"], '{"image": "1.jpg", "text": "a"}', {}, "has the fields image, text, none named file_name"),
        (["1.jpg"], '{"file_name": "1.jpg", "label": 3}', {}, "label, none named caption; data.*.caption_key"),
        (["1.jpg"], '{"file_name": "1.jpg", "captoin": "a"}', {"caption_key": "caption"}, "did you mean 'captoin'?"),
        (["1.jpg"], "not json", {}, "has no line that can be read, so no field file_name"),
        (["1.jpg"], "", {}, "has no line that can be read"),
        (["1.jpg"], '{"file_name": "2.jpg", "caption": "a"}', {}, "no image 1 (e.g. "),
        ([], None, {}, "holds no image; it takes a folder of pictures with a metadata.jsonl or metadata.csv"),
        (["train/1.jpg", "train/metadata.jsonl"], None, {}, "did you mean '{}/train'?"),
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


def test_names_are_found_by_bisection() -> None:
    names = folder_module.Names()
    for name in (b"ab", b"c", b"de", b"fg"):
        names.append(name)
    assert [names.find(name) for name in (b"fg", b"c", b"ab", b"xy", b"d", b"long")] == [3, 1, 0, None, None, None]
