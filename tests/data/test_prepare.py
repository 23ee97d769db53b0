"""Preparing ArrayRecord files: the same pairs, the same bytes, after a kill too; TensorFlow Datasets opens them."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

array_record_module = pytest.importorskip("array_record.python.array_record_module")

import m3ae_jax.data.prepare as prepare_module  # noqa: E402
from m3ae_jax.data import images  # noqa: E402
from m3ae_jax.data.prepare import Job, Progress, Summary, _summary_lines, picture, prepare  # noqa: E402
from m3ae_jax.data.sources.array_record import ArrayRecordSource  # noqa: E402
from m3ae_jax.data.sources.base import Record, Source, SourceOptions  # noqa: E402
from m3ae_jax.data.sources.index import IndexReport  # noqa: E402
from m3ae_jax.errors import UserError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may write into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def colours(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of smooth colours."""
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def write_tar(path: Path, pairs: Sequence[tuple[bytes, bytes]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, (image, caption) in enumerate(pairs):
            for suffix, data in (("jpg", image), ("txt", caption)):
                member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


def small(n: int) -> list[tuple[bytes, bytes]]:
    """Pictures that need no shrinking; every third a PNG."""
    return [
        (encode(colours(24 + i % 5, 16, i), "JPEG" if i % 3 else "PNG"), f"größe {i}".encode() * (i != 3))
        for i in range(n)
    ]


def job_of(tmp_path: Path, pairs: Sequence[tuple[bytes, bytes]], **options: Any) -> Job:
    path = write_tar(tmp_path / "in" / "0.tar", pairs)
    return Job(**{"source": "webdataset", "path": path, "output": str(tmp_path / "out"), "workers": 2} | options)


def read(source: Source) -> list[Record]:
    return source.read(np.arange(len(source)))


def read_back(job: Job) -> list[Record]:
    return read(ArrayRecordSource(str(Path(job.output, f"{job.split}.array_record-*"))))


def pairs_of(records: Sequence[Record]) -> list[tuple[bytes, bytes]]:
    return [(record["image"], record["caption"]) for record in records]


def contents(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def manifest(job: Job) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path(job.output, f"{job.split}.manifest.json").read_bytes())
    return result


def one_line(job: Job) -> str:
    """What is said of a mistake."""
    with pytest.raises(UserError) as error:
        prepare(job)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is written ---------------------------------------------------------------------------------------


def test_pairs_come_back_byte_for_byte_in_order(tmp_path: Path) -> None:
    pairs = small(23)
    job = job_of(tmp_path, pairs, shard_examples=5)
    summary = prepare(job)
    names = [f"train.array_record-{k:05d}-of-00005" for k in range(5)]
    assert sorted(contents(job.output)) == [*names, "train.manifest.json"]
    assert (summary.report.examples, summary.report.shards, summary.encoded, summary.reused) == (23, 5, 0, 0)
    assert summary.bytes == sum(Path(job.output, name).stat().st_size for name in names)
    assert pairs_of(read_back(job)) == pairs
    reader = array_record_module.ArrayRecordReader(str(Path(job.output, names[0])))
    assert "group_size:1" in reader.writer_options_string().split(",")


def test_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    pairs = [(encode(colours(90, 70 + i, i)), b"%d" % i) for i in range(20)]
    outputs = []
    for workers in (1, 3):
        job = job_of(
            tmp_path, pairs, shard_examples=3, short_side=32, workers=workers, output=str(tmp_path / str(workers))
        )
        assert prepare(job).encoded == 20
        outputs.append(contents(job.output))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("captions", ["draw", "all"])
@pytest.mark.parametrize("kind", ["array_record", "tfds"])
def test_several_captions(tmp_path: Path, captions: str, kind: str) -> None:
    texts = [["one", "two", "three"], ["four"], [""]]
    folder = tmp_path / "in"
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as file:
        for i, of_picture in enumerate(texts):
            (folder / f"{i}.png").write_bytes(encode(colours(9, 9, i), "PNG"))
            file.write(json.dumps({"file_name": f"{i}.png", "caption": of_picture}) + "\n")
    job = Job("folder", str(folder), str(tmp_path / "out"), SourceOptions(captions=captions), format=kind)
    prepare(job)
    result = [record.get("captions", (record["caption"],)) for record in read_back(job)]
    want = [tuple(text.encode() for text in of_picture) for of_picture in texts]
    assert result == (want if captions == "draw" else [(text,) for of_picture in want for text in of_picture])
    if kind == "tfds":
        tfds_source = pytest.importorskip("m3ae_jax.data.sources.tfds")
        assert read(tfds_source.TFDSSource(job.output)) == read_back(job)


def class_folders(folder: Path) -> str:
    for i, name in enumerate(["a_cat", "dog"]):
        (folder / name).mkdir(parents=True)
        for k in range(2):
            (folder / name / f"{k}.jpg").write_bytes(encode(colours(12, 10, 2 * i + k)))
    return str(folder)


def test_labels_and_classes(tmp_path: Path) -> None:
    path = class_folders(tmp_path / "in")
    job = Job("class_folders", path, str(tmp_path / "out"), SourceOptions(template="a photo of a {}"))
    prepare(job)
    assert Path(job.output, "classes.txt").read_text() == "a_cat\ndog\n"
    source = ArrayRecordSource(job.output)
    assert source.classes == ("a_cat", "dog") and source.modalities == ("image", "text")
    assert [record["label"] for record in read(source)] == [0, 0, 1, 1]
    assert read(source)[0]["caption"] == b"a photo of a a cat"
    # Other splits: one without classes goes with these, one of other classes does not.
    prepare(job_of(tmp_path / "pairs", small(2), output=job.output, name="test"))
    before = contents(job.output)
    (tmp_path / "more" / "bird").mkdir(parents=True)
    (tmp_path / "more" / "bird" / "0.jpg").write_bytes(encode(colours(9, 9)))
    val = Job("class_folders", str(tmp_path / "more"), job.output, SourceOptions(split="val"))
    assert "has other classes" in one_line(val)
    assert {name: data for name, data in contents(job.output).items() if name in before} == before


def test_texts_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    job = Job("text", str(tmp_path / "a.txt"), str(tmp_path / "out"))
    prepare(job)
    assert read_back(job) == [{"caption": b"one"}, {"caption": b"two"}]


# --- pictures ----------------------------------------------------------------------------------------------


def job(**options: Any) -> Job:
    return Job(**{"source": "webdataset", "path": "in", "output": "out"} | options)


def open_picture(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded))


@pytest.mark.parametrize(("width", "height"), [(900, 600), (600, 900), (301, 300), (2000, 257)])
def test_large_pictures_are_shrunk(width: int, height: int) -> None:
    made = open_picture(picture(encode(colours(width, height)), job()))
    assert made.format == "JPEG" and min(made.size) == 256
    assert abs(max(made.size) - 256 * max(width, height) / min(width, height)) <= 0.5
    want = np.asarray(colours(width, height).resize(made.size, Image.Resampling.BICUBIC), np.float32)
    assert np.abs(np.asarray(made, np.float32) - want).mean() < 3


def test_small_pictures_stay_as_they_are() -> None:
    for data in (
        encode(colours(256, 900)),
        encode(colours(40, 30).convert("RGBA"), "WEBP"),
        encode(colours(9, 9), "GIF"),
    ):
        assert picture(data, job()) is data
    large = encode(colours(900, 600))
    assert picture(large, job(short_side=0)) is large
    assert len(picture(large, job(quality=30))) < len(picture(large, job()))
    thread = encode(Image.new("L", (80_000, 300)), "PNG")  # longer than a JPEG may be
    assert picture(thread, job()) is thread


def test_shrunk_pictures_are_upright_and_without_exif() -> None:
    upright = colours(60, 90)
    for turn, stored in (
        (6, upright.transpose(Image.Transpose.ROTATE_90)),
        (3, upright.transpose(Image.Transpose.ROTATE_180)),
        (5, upright.transpose(Image.Transpose.TRANSPOSE)),
    ):
        exif = Image.Exif()
        exif[0x0112] = turn
        made = open_picture(picture(encode(stored, quality=100, subsampling=0, exif=exif), job(short_side=40)))
        assert made.size == (40, 60) and not made.getexif()
        want = np.asarray(upright.resize((40, 60), Image.Resampling.BICUBIC), np.float32)
        assert np.abs(np.asarray(made, np.float32) - want).mean() < 4


def test_transparent_grey_and_deep_pictures() -> None:
    glass = Image.new("RGBA", (80, 60), (255, 0, 0, 0))
    made = open_picture(picture(encode(glass, "PNG"), job(short_side=30)))
    assert made.mode == "RGB" and np.asarray(made).min() > 250
    grey = open_picture(picture(encode(Image.new("L", (80, 60), 77)), job(short_side=30)))
    assert grey.mode == "L" and abs(int(np.asarray(grey)[0, 0]) - 77) <= 1
    deep = Image.fromarray(np.full((60, 80), 257 * 90, np.uint16))
    assert abs(int(np.asarray(open_picture(picture(encode(deep, "PNG"), job(short_side=30))))[0, 0]) - 90) <= 1


def test_broken_pictures_are_left_out_and_counted(tmp_path: Path) -> None:
    pairs, large = small(12), encode(colours(400, 300))
    broken = {2: b"", 5: b"<html>", 6: b"<html>", 9: large[: len(large) // 2], 10: pairs[10][0][:-40]}
    for i, data in broken.items():
        pairs[i] = (data, pairs[i][1])
    job = job_of(tmp_path, pairs, shard_examples=4)
    report = prepare(job).report
    assert pairs_of(read_back(job)) == [pair for i, pair in enumerate(pairs) if i not in broken]
    assert report.examples == 7
    assert report.skipped == {images.EMPTY: 1, images.NO_PICTURE: 2, images.DAMAGED: 2}
    assert report.samples == {images.EMPTY: "example 2", images.NO_PICTURE: "example 5", images.DAMAGED: "example 9"}
    kept = job_of(tmp_path, pairs, check=False, output=str(tmp_path / "kept"))
    assert prepare(kept).report.skipped == {}
    assert pairs_of(read_back(kept)) == pairs


@pytest.mark.parametrize("kind", ["array_record", "tfds"])
def test_a_file_of_nothing_and_a_split_of_nothing(tmp_path: Path, kind: str) -> None:
    pairs = small(9)
    job = job_of(tmp_path, [*pairs[:3], *[(b"", b"")] * 3, *pairs[6:]], shard_examples=3, format=kind)
    assert prepare(job).report.shards == 3
    assert pairs_of(read_back(job)) == pairs[:3] + pairs[6:]
    if kind == "tfds":
        tfds_source = pytest.importorskip("m3ae_jax.data.sources.tfds")
        assert pairs_of(read(tfds_source.TFDSSource(job.output))) == pairs[:3] + pairs[6:]
    nothing = job_of(tmp_path / "nothing", [(b"", b"")] * 3, format=kind)
    assert "no example is left (empty file 3 (e.g. example 0))" in one_line(nothing)


class Odd:
    """A source of pictures and captions of which some have none, or say that they cannot be used."""

    uses: frozenset[str] = frozenset()
    modalities = ("image", "text")
    classes = ()
    fingerprint = "odd"
    report = IndexReport(1, 5, {"no caption": 2}, {"no caption": "a:7", "column url": "b"}, {"column url": 1})

    def __init__(self, path: str, options: SourceOptions) -> None:
        self.options = options

    def __len__(self) -> int:
        return 5

    def read(self, indices: np.ndarray) -> list[Record]:
        image = encode(colours(9, 9))
        records: list[Record] = [
            {"image": image, "caption": b"one"},
            {"image": image},
            {"image": image, "caption": b""},
            {"image": b"", "unusable": images.TOO_MANY_BYTES},
            {"image": b""},
        ]
        return [records[i] for i in indices]


@pytest.mark.parametrize(("kind", "check"), [("array_record", True), ("tfds", True), ("array_record", False)])
def test_item_1_examples_without_a_caption_are_left_out_and_counted(tmp_path: Path, kind: str, check: bool) -> None:
    job = Job(f"{__name__}:Odd", "in", str(tmp_path / "out"), name="test", format=kind, check=check)
    summary = prepare(job)
    assert [record["caption"] for record in read_back(job)] == [b"one", b""]
    other = {images.EMPTY: 1, images.NO_CAPTION: 1} if check else {images.NO_CAPTION: 2}
    assert summary.report.skipped == {images.TOO_MANY_BYTES: 1, **other}
    assert summary.source is Odd.report
    lines = _summary_lines(job, summary)
    assert "no caption 2 (e.g. a:7)" in lines and "column url 1 (e.g. b)" in lines and "example 3" in lines


def test_item_1_what_a_source_does_not_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    read = SourceOptions(caption_key="text")
    assert "caption_key='text': the format text does not read it" in one_line(
        Job("text", str(tmp_path / "a.txt"), str(tmp_path / "out"), read)
    )


def test_item_2_splits_in_one_folder_are_read_apart(tmp_path: Path) -> None:
    texts = {"train": "a\nb\n", "val": "c\n", "val_novel": "d\n", "holdout": "e\n"}
    for split, text in texts.items():
        (tmp_path / f"{split}.txt").write_text(text)
        prepare(Job("text", str(tmp_path / f"{split}.txt"), str(tmp_path / "out"), name=split))
    for split, text in texts.items():
        source = ArrayRecordSource(str(tmp_path / "out"), SourceOptions(split=split))
        assert [record["caption"] for record in read(source)] == text.encode().split()
        assert sum(source.report.unused.values()) == 3 and source.report.skipped == {}
    with pytest.raises(UserError, match=r"split='test' is not one of holdout, train, val, val_novel"):
        ArrayRecordSource(str(tmp_path / "out"), SourceOptions(split="test"))


def test_item_3_a_damaged_file_counts_with_the_examples_of_the_manifest(tmp_path: Path) -> None:
    job = job_of(tmp_path, small(7), shard_examples=3)
    prepare(job)
    os.truncate(Path(job.output, "train.array_record-00001-of-00003"), 100)
    source = ArrayRecordSource(job.output)
    assert source.report.skipped == {"damaged file": 3} and len(source) == 4


def test_a_manifest_from_before_an_option_goes_on_with_its_default(tmp_path: Path) -> None:
    job = job_of(tmp_path, small(3))
    prepare(job)
    before = manifest(job)
    del before["options"]["max_bytes"], before["options"]["caption_per_line"]
    Path(job.output, "train.manifest.json").write_text(json.dumps(before))
    assert prepare(job).reused == 1
    limited = dataclasses.replace(job, read=SourceOptions(max_bytes=2**20))
    assert f"max_bytes={2**28} (now {2**20})" in one_line(limited)


def test_files_of_another_name_than_the_split_read(tmp_path: Path) -> None:
    job = job_of(tmp_path, small(3), name="novel")
    prepare(job)
    assert "novel.array_record-00000-of-00001" in contents(job.output) and prepare(job).reused == 1
    other = one_line(dataclasses.replace(job, read=SourceOptions(split="val")))
    assert "its split 'novel' was begun with read_split='train' (now 'val')" in other


# --- TensorFlow Datasets -----------------------------------------------------------------------------------


def test_tensorflow_datasets_opens_the_folder(tmp_path: Path) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")
    tfds_source = pytest.importorskip("m3ae_jax.data.sources.tfds")
    pairs = small(7)
    for data in (
        encode(colours(40, 30).convert("CMYK")),
        encode(colours(40, 30), "WEBP"),
        encode(colours(40, 30).convert("P"), "PNG"),
        encode(colours(40, 30).convert("RGBA"), "PNG"),
        encode(colours(400, 300)),
    ):
        pairs.append((data, b"other"))
    output = str(tmp_path / "my-pairs" / "1.2.0")
    train = job_of(tmp_path, pairs, shard_examples=5, format="tfds", output=output)
    val = job_of(tmp_path / "val", small(2), format="tfds", output=output, read=SourceOptions(split="val"))
    prepare(train)
    assert set(tfds.builder_from_directory(output).info.splits) == {"train"}
    prepare(val)
    builder = tfds.builder_from_directory(output)
    assert (builder.name, str(builder.version)) == ("my_pairs", "1.2.0")
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 12, "val": 2}
    opened = list(builder.as_data_source(split="train"))
    assert [example["caption"].decode() for example in opened] == [caption.decode() for _, caption in pairs]
    for example, (data, _) in zip(opened, pairs, strict=True):
        size = min(256, min(open_picture(data).size))
        want = images.load(data, size).astype(np.float32)
        assert np.abs(images.load(encode(Image.fromarray(example["image"]), "PNG"), size) - want).mean() < 3
    records = read(tfds_source.TFDSSource(output))
    assert pairs_of(records)[:7] == pairs[:7] and records == read_back(train)
    assert pairs_of(read(tfds_source.TFDSSource(output, SourceOptions(split="val")))) == small(2)
    assert "alike" in one_line(dataclasses.replace(train, format="array_record", name="x"))


def test_tensorflow_datasets_reads_labels(tmp_path: Path) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")
    tfds_source = pytest.importorskip("m3ae_jax.data.sources.tfds")
    job = Job("class_folders", class_folders(tmp_path / "in"), str(tmp_path / "out"), format="tfds")
    prepare(job)
    builder = tfds.builder_from_directory(job.output)
    assert builder.info.features["label"].names == ["a_cat", "dog"]
    assert [int(example["label"]) for example in builder.as_data_source(split="train")] == [0, 0, 1, 1]
    source = tfds_source.TFDSSource(job.output)
    assert source.classes == ("a_cat", "dog") and [record["label"] for record in read(source)] == [0, 0, 1, 1]


# --- going on ----------------------------------------------------------------------------------------------

_WAITING_SOURCE = """
import os, time
from m3ae_jax.data.sources.webdataset import WebDatasetSource

class Waiting(WebDatasetSource):
    def read(self, indices):
        while os.path.exists(os.environ["WAIT_WHILE"]) and indices.max() >= 12:
            time.sleep(0.01)
        return super().read(indices)
"""


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source `waiting_source:Waiting` that stands still at example 12 while a file is there."""
    (tmp_path / "waiting_source.py").write_text(_WAITING_SOURCE)
    gate = tmp_path / "gate"
    gate.touch()
    monkeypatch.setenv("WAIT_WHILE", str(gate))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.syspath_prepend(tmp_path)
    yield gate
    sys.modules.pop("waiting_source", None)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, waiting: Path) -> None:
    pairs = [(encode(colours(60, 50, i)), b"%d" % i) for i in range(22)]
    job = job_of(tmp_path, pairs, source="waiting_source:Waiting", shard_examples=4, short_side=40, workers=2)
    named = {"source": job.source, "path": job.path, "output": job.output}
    flags = [f"--{name}={value}" for name, value in named.items()]
    flags += ["--shard_examples=4", "--short_side=40", "--workers=2"]
    process = subprocess.Popen([sys.executable, "-m", "m3ae_jax.data.prepare", *flags], stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 100
        path = Path(job.output, "train.manifest.json")
        while not (path.exists() and len(manifest(job)["shards"]) == 3):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = set(contents(job.output))
    assert {f"train.array_record-0000{k}-of-00006" for k in range(3)} < left
    assert ".train.array_record-00003-of-00006.tmp" in left
    times = {name: Path(job.output, name).stat().st_mtime_ns for name in left if name[0] == "t" and "00-of" in name}
    waiting.unlink()
    assert prepare(job).reused == 3
    assert {name: Path(job.output, name).stat().st_mtime_ns for name in times} == times
    whole = dataclasses.replace(job, output=str(tmp_path / "whole"))
    prepare(whole)
    assert contents(job.output) == contents(whole.output)


def test_what_is_gone_or_changed_is_written_again(tmp_path: Path) -> None:
    job = job_of(tmp_path, small(12), shard_examples=3, read=SourceOptions(split="val"))
    prepare(job)
    whole, output = contents(job.output), Path(job.output)
    assert prepare(job).reused == 4
    (output / "val.array_record-00000-of-00004").unlink()
    (output / "val.array_record-00001-of-00004").write_bytes(b"cut off")
    changed = bytearray(whole["val.array_record-00002-of-00004"])
    changed[70] ^= 1
    (output / "val.array_record-00002-of-00004").write_bytes(changed)
    assert prepare(job).reused == 2
    assert contents(output) != whole
    assert prepare(dataclasses.replace(job, verify=True)).reused == 3
    assert contents(output) == whole
    # Killed before a whole file was noted, while the manifest was written, and between the two.
    noted = manifest(job)
    del noted["shards"]["3"]
    (output / "val.manifest.json").write_text(json.dumps(noted))
    (output / ".val.manifest.json.tmp").write_text("{")
    (output / ".val.array_record-00003-of-00004.tmp").write_bytes(b"half")
    (output / ".val.lock").touch()
    assert prepare(job).reused == 3
    assert contents(output) == whole


def test_other_options_or_data_are_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path, small(6), read=SourceOptions(split="val"))
    prepare(job)
    before = contents(job.output)
    said = one_line(dataclasses.replace(job, short_side=128, quality=90))
    assert "short_side=256 (now 128), quality=95 (now 90)" in said
    assert "captions='draw' (now 'all')" in one_line(
        dataclasses.replace(job, read=SourceOptions(split="val", captions="all"))
    )
    moved = write_tar(tmp_path / "copy" / "0.tar", small(6))
    assert prepare(dataclasses.replace(job, path=moved, workers=1)).reused == 1
    write_tar(tmp_path / "in" / "0.tar", small(7))
    assert "6 examples in the source (now 7" in one_line(job)
    write_tar(tmp_path / "in" / "0.tar", [(b"x" * 9999, b"x"), *small(5)])
    assert "fingerprint" in one_line(job)
    Path(job.output, "train.array_record-00000-of-00007").touch()
    assert "no train.manifest.json tells of" in one_line(dataclasses.replace(job, read=SourceOptions()))
    after = contents(job.output)
    assert {name: after[name] for name in before} == before
    Path(job.output, "val.manifest.json").write_text("{}")
    assert "no manifest" in one_line(job)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    job = job_of(tmp_path, small(3))
    os.mkdir(job.output)
    with open(Path(job.output, ".train.lock"), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in one_line(job)
        prepare(dataclasses.replace(job, read=SourceOptions(split="val")))


# --- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "webdatset"}, "did you mean 'webdataset'?"),
        ({"source": "scenes"}, "nothing to prepare"),
        ({"path": ""}, "path is empty"),
        ({"path": "nowhere"}, "no such file"),
        ({"format": "array_records"}, "did you mean 'array_record'?"),
        ({"read": SourceOptions(captions="drawn")}, "did you mean 'draw'?"),
        ({"read": SourceOptions(split="train[:9%]")}, "split='train[:9%]' names the files: it takes letters, digits"),
        ({"name": "a/b"}, "name='a/b' names the files: it takes letters, digits"),
        ({"read": SourceOptions(split="novel")}, "; name='novel' instead names the files alone"),
        ({"short_side": -1}, "short_side=-1 must be at least 0"),
        ({"quality": 0}, "quality=0 must be at least 1"),
        ({"quality": 101}, "quality=101 must be at most 100"),
        ({"shard_examples": 0}, "shard_examples=0 must be at least 1"),
        ({"workers": -1}, "workers=-1 must be at least 0"),
        ({"output": "gs://bucket/folder"}, "must be a local folder"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    assert says in one_line(job_of(tmp_path, small(2), **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_the_source_is_not_written_over(tmp_path: Path) -> None:
    job = job_of(tmp_path, small(2))
    assert "another folder" in one_line(dataclasses.replace(job, path=f"{tmp_path}/in/", output=str(tmp_path / "in")))
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["0.tar"]


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    job = job_of(tmp_path, small(2))
    (tmp_path / "file").touch()
    assert "cannot be written" in one_line(dataclasses.replace(job, output=str(tmp_path / "file" / "out")))


def test_a_full_disk(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 200, 200, 3), np.uint8)
    pairs = [(encode(Image.fromarray(of_one), "PNG"), b"") for of_one in noise]
    job = job_of(tmp_path, [*small(4), *pairs], shard_examples=4, workers=1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))
    try:
        said = one_line(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert said == f"output={job.output!r} cannot be written (File too large)"
    assert sorted(contents(job.output)) == ["train.array_record-00000-of-00004", "train.manifest.json"]
    assert prepare(job).reused == 1
    assert pairs_of(read_back(job)) == [*small(4), *pairs]


def test_a_file_that_is_whole_when_another_fails_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both may end before anyone looks, and the failure may be seen first."""

    def failures_first(running: Iterable[Future[Any]], *_: object) -> tuple[list[Future[Any]], set[Future[Any]]]:
        done, rest = wait(running)
        return sorted(done, key=lambda future: future.exception() is None), rest

    monkeypatch.setattr(prepare_module, "wait", failures_first)
    write_shard = prepare_module._write_shard

    def fails_at_the_second(job: Job, source: Source, path: Path, *rest: Any) -> Any:
        if "00001-of" in path.name:
            raise OSError(28, "No space left on device")
        return write_shard(job, source, path, *rest)

    job = job_of(tmp_path, small(12), shard_examples=4)
    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "_write_shard", fails_at_the_second)
        assert one_line(job) == f"output={job.output!r} cannot be written (No space left on device)"
    assert sorted(manifest(job)["shards"]) == ["0", "2"]
    assert prepare(job).reused == 2
    assert pairs_of(read_back(job)) == small(12)


def test_the_command_says_a_mistake_in_one_line(tmp_path: Path) -> None:
    flags = ["--source=webdataset", f"--path={tmp_path}", f"--output={tmp_path / 'out'}", "--quality=0"]
    command = [sys.executable, "-m", "m3ae_jax.data.prepare", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: quality=0 must")
    unknown = subprocess.run([*command, "--qualty=9"], capture_output=True, text=True, timeout=120, check=False)
    assert unknown.returncode == 2 and unknown.stderr.count("\n") == 1 and "quality" in unknown.stderr


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    progress = Progress(10_000, lambda: now[0])
    for i in range(2_000):
        progress.add(left_out=int(i < 3))
    for now[0] in (4.0, 29.0, 31.0, 32.0):
        progress.show()
    now[0] = 4.0
    line = "prepare: 2,000 of 10,000 examples (20 %), 500/s, 16s to go, left out 3"
    assert progress.line() == line
    assert capsys.readouterr().err.count("\n") == 1


def test_a_summary_of_nothing_new(tmp_path: Path) -> None:
    job = job_of(tmp_path, small(3))
    first = prepare(job)
    assert isinstance(first, Summary)
    assert prepare(job) == dataclasses.replace(first, reused=1)
