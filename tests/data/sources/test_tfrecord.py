"""TFRecordSource: keys, captions, labels, damage, paths. The source never decodes, so a picture is any bytes."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from m3ae_jax.data.sources import tfrecord
from m3ae_jax.data.sources.base import Record, Source, SourceOptions
from m3ae_jax.data.sources.index import IndexReport
from m3ae_jax.data.sources.tfrecord import TFRecordSource, crc32c
from m3ae_jax.errors import UserError

Value = bytes | int | float | Sequence[bytes | int | float]


def example(features: Mapping[str, Value]) -> bytes:
    message = tf.train.Example()
    for key, value in features.items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        feature = message.features.feature[key]
        if all(isinstance(v, bytes) for v in values):
            feature.bytes_list.value.extend(values)
        elif any(isinstance(v, float) for v in values):
            feature.float_list.value.extend(values)
        else:
            feature.int64_list.value.extend(values)
    return bytes(message.SerializeToString(deterministic=True))


def write_file(path: Path | str, payloads: Sequence[bytes]) -> str:
    if "://" not in str(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for payload in payloads:
            writer.write(payload)
    return str(path)


def write(folder: Path, pairs: list[tuple[bytes, bytes]]) -> str:
    """Stores pairs of picture and caption in one file, or in two from four pairs on."""
    payloads = [example({"image": image, "caption": caption}) for image, caption in pairs]
    half = len(payloads) // 2 if len(payloads) >= 4 else len(payloads)
    for number, part in enumerate([payloads[:half], payloads[half:]]):
        if part:
            write_file(folder / f"{number:05d}.tfrecord", part)
    return str(folder)


def make(count: int, name: str = "x") -> list[tuple[bytes, bytes]]:
    return [(f"picture {name}{i}".encode() * 5, f"caption {name}{i}".encode()) for i in range(count)]


def everything(source: Source) -> list[tuple[bytes, bytes | None]]:
    """Pictures and captions; None: it has none."""
    return [(record["image"], record.get("caption")) for record in source.read(np.arange(len(source)))]


def records(tmp_path: Path, features: Sequence[Mapping[str, Value]], **options: str) -> list[Record]:
    path = write_file(tmp_path / "a.tfrecord", [example(f) for f in features])
    source = TFRecordSource(path, SourceOptions(**options))  # type: ignore[arg-type]
    return source.read(np.arange(len(source)))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test may write into the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, path: str) -> None:
        raise AssertionError(f"{path} was scanned")

    monkeypatch.setattr(tfrecord.TFRecordStorage, "scan", fail)


# --- reading -----------------------------------------------------------------------------------------------


def test_reads_all_in_order(tmp_path: Path) -> None:
    pairs = make(9)
    source: Source = TFRecordSource(write(tmp_path, pairs))
    assert source.modalities == ("image", "text") and source.classes == ()
    assert everything(source) == pairs
    assert source.report == IndexReport(2, 9, {}, {})  # type: ignore[attr-defined]
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(9), 2))
    assert [(r["image"], r["caption"]) for r in source.read(order)] == [pairs[i] for i in order]
    assert source.read(np.array([], np.int64)) == []


def test_large_and_small_records_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = [0, 1, 20_000, 3, 5000, 70_000, 2, 16_384, 4096, 300_000, 7]
    pairs = [(rng.bytes(size) if size else b"p", b"%d" % size) for size in sizes]
    assert everything(TFRecordSource(write(tmp_path, pairs))) == pairs


def test_threads_read_at_once(tmp_path: Path) -> None:
    pairs = make(40)
    source = TFRecordSource(write(tmp_path, pairs))
    barrier = threading.Barrier(4)

    def work(seed: int) -> bool:
        barrier.wait()
        order = np.random.default_rng(seed).integers(0, len(source), 300)
        return [(r["image"], r["caption"]) for r in source.read(order)] == [pairs[i] for i in order]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_a_file_shortened_later_is_an_os_error(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.tfrecord", [example({"jpg": i, "txt": t}) for i, t in make(3)])
    source = TFRecordSource(path)
    os.truncate(path, 100)
    with pytest.raises(OSError, match=r"a\.tfrecord: changed since it was indexed"):
        source.read(np.array([2]))


def test_the_checksum_is_that_of_the_standard() -> None:
    # RFC 3720, appendix B.4, and the check value of the catalogue of CRCs.
    known = [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ]
    for data, crc in known:
        assert crc32c(data) == crc
    rng = np.random.default_rng(0)
    for size in [63, 64, 65, 511, 512, 513, 4096, 262_143, 262_144, 262_145, 262_208, 600_001]:
        data = rng.bytes(size)  # against the textbook's loop over pieces too short for the tables
        register = 0xFFFFFFFF
        for start in range(0, size, 63):
            register = tfrecord._crc32c_chunk(register, data[start : start + 63])
        assert crc32c(data) == register ^ 0xFFFFFFFF, size


# --- keys --------------------------------------------------------------------------------------------------


def test_keys_are_found_or_named(tmp_path: Path) -> None:
    usual: dict[str, Value] = {"image/encoded": b"i", "image/class/label": 3, "caption": b"c", "text": b"t"}
    assert records(tmp_path, [usual]) == [{"image": b"i", "caption": b"c", "label": 3}]
    assert records(tmp_path, [usual], caption_key="text")[0]["caption"] == b"t"
    odd: dict[str, Value] = {"pic": b"i", "alt": b"a", "n": 2, "image": 5, "caption": [1, 2]}
    named = records(tmp_path, [odd], image_key="pic", caption_key="alt", label_key="n")
    assert named == [{"image": b"i", "caption": b"a", "label": 2}]


@pytest.mark.parametrize(
    ("features", "modalities"),
    [({"jpg": b"i"}, ("image",)), ({"txt": b"t"}, ("text",)), ({"jpg": b"i", "txt": b""}, ("image", "text"))],
)
def test_modalities_follow_from_what_is_there(
    tmp_path: Path, features: Mapping[str, bytes], modalities: tuple[str, ...]
) -> None:
    payloads = [example(features), b"\xff no Example"]
    source = TFRecordSource(write_file(tmp_path / "a.tfrecord", payloads))
    assert source.modalities == modalities
    first, bad = source.read(np.arange(2))
    names = [{"image": "image", "text": "caption"}[modality] for modality in modalities]
    assert sorted(first) == sorted(names)
    assert bad == ({"image": b""} if "image" in modalities else {})


def test_a_key_may_lack_in_some_records(tmp_path: Path) -> None:
    features: list[Mapping[str, Value]] = [{"image": b"0"}, {"image": b"1", "caption": b"c"}, {"caption": b"d"}]
    assert records(
        tmp_path, [*features, {"x": 1}, {"image": b"2", "caption": b""}, {"image": b"3", "caption": []}]
    ) == [
        {"image": b"0"},
        {"image": b"1", "caption": b"c"},
        {"image": b"", "caption": b"d"},
        {"image": b""},
        {"image": b"2", "caption": b""},  # of zero characters, not absent
        {"image": b"3"},
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "only alt, n, pic; set data.*.image_key and data.*.caption_key"),
        ({"image_key": "pics"}, "data.*.image_key='pics': {} has only alt, pic; did you mean 'pic'?"),
        ({"caption_key": "n"}, "data.*.caption_key='n': {} has only alt, pic"),
        ({"label_key": "class"}, "data.*.label_key='class': {} has only alt, n, pic"),
        ({"captions": "al"}, "data.*.captions='al' is not one of all, draw; did you mean 'all'?"),
        ({"template": "a photo"}, "data.*.template='a photo' must have one {{}} for the class"),
        ({"template": "a {x}"}, "data.*.template='a {{x}}' must have one {{}} for the class"),
    ],
)
def test_wrong_keys_get_one_line(tmp_path: Path, options: dict[str, str], message: str) -> None:
    path = write_file(tmp_path / "a.tfrecord", [example({"pic": b"i", "alt": b"a", "n": 1})])
    with pytest.raises(UserError) as error:
        TFRecordSource(path, SourceOptions(**options))  # type: ignore[arg-type]
    assert message.format(path) in str(error.value) and "\n" not in str(error.value)


def test_item_1_a_mistyped_caption_key_is_refused(tmp_path: Path) -> None:
    features: list[Mapping[str, Value]] = [{"image": b"i", "text": b"red 0", "TEXT": b"r 0"}] * 3
    with pytest.raises(UserError, match=r"caption_key='txet': .* has only TEXT, image, text; did you mean 'text'\?"):
        records(tmp_path, features, caption_key="txet")
    with pytest.raises(UserError, match=r"group_key='pic': .* has only TEXT, image, text"):
        records(tmp_path, features, group_key="pic")


@pytest.mark.parametrize("options", [{}, {"caption_key": "caption"}])
def test_item_1_an_optional_feature_is_found_in_any_file(tmp_path: Path, options: dict[str, str]) -> None:
    write_file(tmp_path / "a.tfrecord", [example({"image": b"i"})] * 60)
    write_file(tmp_path / "b.tfrecord", [example({"image": b"i", "caption": b"c"})] * 20)
    source = TFRecordSource(str(tmp_path), SourceOptions(**options))  # type: ignore[arg-type]
    assert source.modalities == ("image", "text")
    assert [record.get("caption") for record in source.read(np.array([0, 59, 60, 79]))] == [None, None, b"c", b"c"]
    assert len(TFRecordSource(str(tmp_path), SourceOptions(captions="all"))) == 20


def test_item_2_what_is_not_read_is_counted_at_every_opening(tmp_path: Path) -> None:
    features: list[Mapping[str, Value]] = [
        {"image": b"i", "caption": b"c", "label": 1, "url": b"u", "rare": [1]},
        {"image": b"i", "caption": b"c", "url": b"u", "rare": [], "score": 0.5},
    ]
    write_file(tmp_path / "a.tfrecord", [example(f) for f in features])
    for name in ("b.tfrecord.index", "notes", "classes.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "more").mkdir()
    for _ in range(2):
        report = TFRecordSource(str(tmp_path)).report
        assert report.unused == {
            "feature url": 2,
            "feature rare": 1,
            "feature score": 1,
            "feature label: no class": 1,  # classes.txt names one
            "file .index": 1,
            "file without an ending": 1,
            "folder": 1,
        }
        assert report.samples["feature rare"] == "in 1 of 2 sampled records" and report.skipped == {}


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002.tfrecord", "train-00001-of-00002.tfrecord", "validation-00000-of-00001.tfrecord"),
        ("coco_train2017_0.tfrecord", "coco_train2017_1.tfrecord", "coco_val2017_0.tfrecord"),
        (
            "tiny-train.tfrecord-00000-of-00002",
            "tiny-train.tfrecord-00001-of-00002",
            "tiny-dev.tfrecord-00000-of-00001",
        ),
    ],
)
def test_item_2_a_folder_of_several_splits_is_read_by_split(tmp_path: Path, names: tuple[str, ...]) -> None:
    pairs = make(3)
    for name, (image, caption) in zip(names, pairs, strict=True):
        write_file(tmp_path / name, [example({"image": image, "caption": caption})])
    train, val = (TFRecordSource(str(tmp_path), SourceOptions(split=split)) for split in ("train", "val"))
    assert everything(train) == pairs[:2] and everything(val) == pairs[2:]
    assert train.fingerprint != val.fingerprint
    assert val.report.unused == {"file of split train": 2} and val.report.samples["file of split train"] == names[0]
    assert sum(train.report.unused.values()) == 1 and train.report.skipped == {}
    with pytest.raises(UserError, match=r"data\.\*\.split='novel' is not one of .*train.*by the names of the files"):
        TFRecordSource(str(tmp_path), SourceOptions(split="novel"))
    everywhere = [pair for _, pair in sorted(zip(names, pairs, strict=True))]
    assert everything(TFRecordSource(str(tmp_path), SourceOptions(split=""))) == everywhere
    one = f"{tmp_path}/*train*"
    assert everything(TFRecordSource(one)) == pairs[:2]
    with pytest.raises(UserError, match=r"split='novel': the names of the files of .* do not tell of several splits"):
        TFRecordSource(one, SourceOptions(split="novel"))
    named = ",".join(f"{tmp_path}/{name}" for name in names)
    assert everything(TFRecordSource(named)) == pairs  # one by one: all are meant


# --- captions and labels -----------------------------------------------------------------------------------

SEVERAL: list[Mapping[str, Value]] = [
    {"image": b"i0", "caption": [b"a", b"b", b"c"]},
    {"image": b"i1", "caption": [b"d"]},
    {"image": b"i2", "caption": [b"e", b"f"]},
    {"image": b"i3"},
]


def test_several_captions_drawn(tmp_path: Path) -> None:
    assert records(tmp_path, SEVERAL) == [
        {"image": b"i0", "caption": b"a", "captions": (b"a", b"b", b"c")},
        {"image": b"i1", "caption": b"d"},
        {"image": b"i2", "caption": b"e", "captions": (b"e", b"f")},
        {"image": b"i3"},
    ]


def test_several_captions_each_an_example(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    expected = [(b"i0", b"a"), (b"i0", b"b"), (b"i0", b"c"), (b"i1", b"d"), (b"i2", b"e"), (b"i2", b"f")]
    for name, part in {"a": SEVERAL[:2], "b": SEVERAL[2:]}.items():
        write_file(tmp_path / f"{name}.tfrecord", [example(f) for f in part])
    options = SourceOptions(captions="all")
    source = TFRecordSource(str(tmp_path), options)
    assert everything(source) == expected and source.report.examples == len(source) == 6
    assert source.report.skipped == {"no caption": 1} and source.report.samples == {"no caption": "b.tfrecord:record 1"}
    drawn = TFRecordSource(str(tmp_path))
    assert len(drawn) == 4 and drawn.fingerprint != source.fingerprint
    request.getfixturevalue("no_scan")
    order = np.random.default_rng(0).permutation(6)
    again = TFRecordSource(str(tmp_path), options)
    assert [(r["image"], r["caption"]) for r in again.read(order)] == [expected[i] for i in order]
    assert again.fingerprint == source.fingerprint


def test_damaged_records_are_left_out_where_captions_are_counted(tmp_path: Path) -> None:
    payloads = [*(example(f) for f in SEVERAL), b"\xff no Example"]
    path = Path(write_file(tmp_path / "a.tfrecord", payloads))
    data = bytearray(path.read_bytes())
    data[data.index(b"i1")] ^= 1
    path.write_bytes(data)
    source = TFRecordSource(str(path), SourceOptions(captions="all"))
    assert [i for i, _ in everything(source)] == [b"i0"] * 3 + [b"i2"] * 2
    assert source.report.skipped == {"wrong checksum": 1, "no tf.train.Example": 1, "no caption": 1}
    assert source.report.samples["wrong checksum"] == "a.tfrecord:record 1"


def test_labels_and_template(tmp_path: Path) -> None:
    features = [{"image": b"i", "label": n} for n in (1, 0, 2, -1)]
    assert [r.get("label") for r in records(tmp_path, features)] == [1, 0, 2, None]
    made = records(tmp_path, features, template="a {}")
    assert [r.get("caption") for r in made] == [b"a 1", b"a 0", b"a 2", None]
    (tmp_path / "classes.txt").write_text("cat\nhot dog\n", encoding="utf-8")
    made = records(tmp_path, features, template="a {}")
    assert [r.get("caption") for r in made] == [b"a hot dog", b"a cat", None, None]
    assert [r.get("label") for r in made] == [1, 0, None, None]  # a number out of range is no class
    source = TFRecordSource(str(tmp_path), SourceOptions(template="a {}", captions="all"))
    assert source.classes == ("cat", "hot dog") and source.modalities == ("image", "text") and len(source) == 4
    assert TFRecordSource(str(tmp_path)).modalities == ("image",)


def test_item_1_a_template_that_makes_no_caption_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"template='a \{\}' is not read: the data have captions \(txt\)"):
        records(tmp_path, [{"label": 1, "txt": b"own"}], template="a {}")
    with pytest.raises(UserError, match=r"template='a \{\}' needs classes, and the data have none"):
        records(tmp_path, [{"image": b"i", "n": 1}], template="a {}")


def test_labels_of_bytes(tmp_path: Path) -> None:
    features = [{"image": b"i", "cls": name} for name in (b"dog", b"cat", b"1", b"owl")]
    made = records(tmp_path, features, template="a {}")
    assert [(r.get("label"), r["caption"]) for r in made] == [
        (None, b"a dog"),
        (None, b"a cat"),
        (1, b"a 1"),
        (None, b"a owl"),
    ]
    (tmp_path / "classes.txt").write_text("cat\ndog")
    made = records(tmp_path, features, template="a {}")
    assert [(r.get("label"), r.get("caption")) for r in made] == [
        (1, b"a dog"),
        (0, b"a cat"),
        (1, b"a dog"),
        (None, None),
    ]


def test_item_5_whole_floats_are_labels(tmp_path: Path) -> None:
    features: list[Mapping[str, Value]] = [
        {"image": b"i", "label": value} for value in (3.0, 2.5, -1.0, 0.0, float("nan"), float("inf"), 4)
    ]
    assert [r.get("label") for r in records(tmp_path, features)] == [3, None, None, 0, None, None, 4]
    assert [r.get("caption") for r in records(tmp_path, features, template="a {}")][:4] == [b"a 3", None, None, b"a 0"]


def test_further_values_of_a_picture_and_labels_of_no_class_are_told(tmp_path: Path) -> None:
    features: list[Mapping[str, Value]] = [
        {"image": [b"one", b"two"], "caption": b"c", "label": [0, 1], "g": [b"a", b"b"]},  # of object boxes
        {"image": b"i", "caption": b"c", "label": 0.5, "g": b"a"},
        {"image": b"i", "caption": b"c", "label": 1},
        {"image": b"i", "caption": b"c", "label": []},
    ]
    read = records(tmp_path, features, group_key="g")
    assert [r.get("label") for r in read] == [None, None, 1, None] and read[0]["image"] == b"one"
    report = TFRecordSource(str(tmp_path), SourceOptions(group_key="g")).report
    assert report.unused == {
        "further value of feature image": 1, "further value of feature g": 1, "feature label: no class": 2
    }  # fmt: skip
    assert report.samples["further value of feature image"] == "in 1 of 4 sampled records"
    assert report.samples["feature label: no class"] == "in 2 of 4 sampled records"


def test_several_classes_make_no_caption(tmp_path: Path) -> None:
    features: list[Mapping[str, Value]] = [{"image": b"i", "cls": [b"cat", b"dog"]}, {"image": b"i", "cls": b"owl"}]
    assert [r.get("caption") for r in records(tmp_path, features, template="a {}")] == [None, b"a owl"]
    report = TFRecordSource(str(tmp_path), SourceOptions(template="a {}")).report
    assert report.unused == {"feature cls: no class": 1}


@pytest.mark.parametrize("captions", ["draw", "all"])
def test_item_6_a_record_above_the_limit_is_not_read(
    tmp_path: Path, captions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make(6)
    pairs[1], pairs[4] = (b"x" * 5000, b"large"), (b"y" * 9000, b"larger")
    folder = write(tmp_path, pairs)
    read: list[int] = []
    verified = tfrecord._verified
    monkeypatch.setattr(tfrecord, "_verified", lambda *args: read.append(args[2]) or verified(*args))
    small, middle = (SourceOptions(captions=captions, max_bytes=limit) for limit in (1000, 6000))
    for _ in range(2):  # the limit is not in the index
        source = TFRecordSource(folder, small)
        assert everything(source) == [pair for i, pair in enumerate(pairs) if i not in (1, 4)]
        assert source.report.skipped == {"too many bytes (data.max_bytes)": 2}
        assert source.report.samples["too many bytes (data.max_bytes)"].startswith("00000.tfrecord: 5,0")
        assert max(read) < 1000
        second = TFRecordSource(folder, middle)
        assert everything(second) == pairs[:4] + pairs[5:] and 5000 < max(read) < 6000
        whole = TFRecordSource(folder, SourceOptions(captions=captions))
        assert everything(whole) == pairs and whole.report.skipped == {}
        assert len({source.fingerprint, second.fingerprint, whole.fingerprint}) == 3
        large = TFRecordSource(folder, SourceOptions(captions=captions, max_bytes=20_000))
        assert large.fingerprint == whole.fingerprint
        read.clear()
    with pytest.raises(UserError, match=r"no record of at most 10 bytes \(data.max_bytes\) \(left out: too many bytes"):
        TFRecordSource(folder, SourceOptions(captions=captions, max_bytes=10))


def test_item_13_groups(tmp_path: Path) -> None:
    features: list[Mapping[str, Value]] = [
        {"image": b"i", "concept": b"cat"},
        {"image": b"i", "concept": 7},
        {"image": b"i", "concept": []},
        {"image": b"i"},
    ]
    assert [r.get("group") for r in records(tmp_path, features, group_key="concept")] == ["cat", "7", None, None]
    plain, grouped = (TFRecordSource(str(tmp_path), SourceOptions(group_key=key)) for key in ("", "concept"))
    assert plain.report.unused == {"feature concept": 2} and grouped.report.unused == {}
    assert plain.fingerprint != grouped.fingerprint and "group" not in plain.read(np.array([0]))[0]


# --- damage ------------------------------------------------------------------------------------------------


def file_of(path: Path, pairs: list[tuple[bytes, bytes]]) -> tuple[bytes, list[int]]:
    """A file's bytes and where each record ends."""
    payloads = [example({"image": image, "caption": caption}) for image, caption in pairs]
    data = Path(write_file(path, payloads)).read_bytes()
    return data, np.cumsum([len(payload) + 16 for payload in payloads]).tolist()


@pytest.mark.parametrize("captions", ["draw", "all"])
def test_cut_anywhere_gives_the_whole_records_before(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, captions: str
) -> None:
    pairs = make(3)
    data, ends = file_of(tmp_path / "cut.tfrecord", pairs)
    path, options = tmp_path / "cut.tfrecord", SourceOptions(captions=captions)
    for cut in range(0, len(data), 1 if captions == "draw" else 7):
        path.write_bytes(data[:cut])
        shutil.rmtree(cache, ignore_errors=True)
        caplog.clear()
        whole, exact = sum(end <= cut for end in ends), cut in (0, *ends)
        try:
            source = TFRecordSource(str(path), options)
        except UserError as error:
            assert whole == 0
            assert f"holds no records (left out: {'empty' if cut == 0 else 'damaged'} file 1 (e.g." in str(error)
            continue
        assert everything(source) == pairs[:whole] and whole
        assert source.report.skipped == ({} if exact else {"damaged file": 1})
        warnings = [r.getMessage() for r in caplog.records if "cut.tfrecord: cut off after" in r.getMessage()]
        assert len(warnings) == (not exact)


def test_bits_flipped_anywhere_never_give_a_wrong_pair(tmp_path: Path) -> None:
    pairs = make(6)
    data, ends = file_of(tmp_path / "a.tfrecord", pairs)
    rng = np.random.default_rng(0)
    for trial in range(400):
        noisy = bytearray(data)
        places = rng.integers(0, len(data), rng.integers(1, 4))
        for place in places:
            noisy[place] ^= 1 << rng.integers(8)
        path = tmp_path / f"{trial}.tfrecord"
        path.write_bytes(noisy)
        hit = {int(np.searchsorted(ends, place, side="right")) for place in places}
        try:
            source = TFRecordSource(str(path), SourceOptions(index_dir=str(tmp_path / "none")))
        except UserError:
            assert 0 in hit
            continue
        got = [(record["image"], record.get("caption")) for record in source.read(np.arange(len(source)))]
        for i, pair in enumerate(got):
            assert pair == pairs[i] or (i in hit and pair == (b"", None)), (trial, i)
        assert len(got) > min(hit) or source.report.skipped == {"damaged file": 1}
        assert len(got) >= min(hit)


def test_a_wrong_checksum_is_an_unusable_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = make(5)
    data, _ = file_of(tmp_path / "a.tfrecord", pairs)
    (tmp_path / "a.tfrecord").write_bytes(data.replace(b"caption x2", b"caption y2").replace(b"n x4", b"n y4"))
    source = TFRecordSource(str(tmp_path))
    for _ in range(2):
        assert everything(source) == [*pairs[:2], (b"", None), pairs[3], (b"", None)]
    assert caplog.text.count("a.tfrecord: wrong checksum at ") == 1


def test_a_damaged_header_ends_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = make(4)
    data, ends = file_of(tmp_path / "a.tfrecord", pairs)
    noisy = bytearray(data)
    noisy[ends[1] + 2] ^= 1
    (tmp_path / "a.tfrecord").write_bytes(noisy)
    write_file(tmp_path / "b.tfrecord", [example({"image": b"i", "caption": b"c"})])
    source = TFRecordSource(str(tmp_path))
    assert everything(source) == [*pairs[:2], (b"i", b"c")]
    assert source.report.skipped == {"damaged file": 1}
    assert f"a.tfrecord: a damaged header at byte {ends[1]}; the whole records before that are used" in caplog.text


def test_an_empty_file_among_others_is_counted(tmp_path: Path) -> None:
    pairs = make(4)
    folder = write(tmp_path, pairs)
    (tmp_path / "00000a.tfrecord").write_bytes(b"")
    source = TFRecordSource(folder)
    assert everything(source) == pairs
    assert source.report == IndexReport(3, 4, {"empty file": 1}, {"empty file": "00000a.tfrecord:no records"})


# --- paths -------------------------------------------------------------------------------------------------


def test_names_of_files(tmp_path: Path) -> None:
    pairs = make(5)
    names = [
        "coco-train.tfrecord-00000-of-00002",
        "coco-train.tfrecord-00001-of-00002",
        "x.tfrec",
        "y.tfrecords",
        "z.TFRecord",
    ]
    for name, (image, caption) in zip(names, pairs, strict=True):
        write_file(tmp_path / name, [example({"image": image, "caption": caption})])
    for other in ("dataset_info.json", "a.tfrecord.index", "coco.tar-00000-of-00002"):
        (tmp_path / other).write_text("{}")
    assert everything(TFRecordSource(str(tmp_path))) == pairs
    assert everything(TFRecordSource(f"{tmp_path}/coco-train.tfrecord-{{00000..00001}}-of-00002")) == pairs[:2]
    assert everything(TFRecordSource(f"{tmp_path}/y.tfrecords, {tmp_path}/x.tfrec")) == [pairs[3], pairs[2]]


@pytest.mark.parametrize(
    "names",
    [
        ("train.record", "train2.records"),  # of TensorFlow's object detection
        ("train.record-00000-of-00002", "train.record-00001-of-00002"),
        ("train-00000-of-00002", "train-00001-of-00002"),  # of ImageNet
    ],
)
def test_names_of_other_tools(tmp_path: Path, names: tuple[str, ...]) -> None:
    pairs = make(2)
    for name, (image, caption) in zip(names, pairs, strict=True):
        write_file(tmp_path / name, [example({"image": image, "caption": caption})])
    for other in ("notes", "notes.txt", "x.array_record-00000-of-00001"):
        (tmp_path / other).write_text("x")
    source = TFRecordSource(str(tmp_path))
    assert everything(source) == pairs and not source.report.skipped
    write_file(tmp_path / "a.tfrecord", [example({"image": b"i", "caption": b"c"})])
    both = [(b"i", b"c"), *pairs] if "record" in names[0] else [(b"i", b"c")]
    assert everything(TFRecordSource(str(tmp_path))) == both


def test_files_without_ending_are_told_apart_by_split(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001", "validation-00000-of-00001"):
        write_file(tmp_path / name, [example({"image": name.encode(), "caption": b"c"})])
    source = TFRecordSource(str(tmp_path), SourceOptions(split="val"))
    assert everything(source) == [(b"validation-00000-of-00001", b"c")]
    assert source.report.unused == {"file of split train": 1}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "data.*.path='{}/nowhere': no such file; it takes a folder of .tfrecord files"),
        ("recrds", "; did you mean '{}/records'?"),
        ("note.tfrecord", "{}/note.tfrecord is not a TFRecord file; it takes"),
        ("zeros.tfrecord", "{}/zeros.tfrecord is not a TFRecord file"),
        ("empty.tfrecord", "holds no records (left out: empty file 1 (e.g. empty.tfrecord:no records))"),
        ("text.tfrecord", "holds no tf.train.Example"),
        ("sly.tfrecord", "run: mv {0}/sly.tfrecord {0}/sly.tfrecord.gz && gunzip -k {0}/sly.tfrecord.gz"),
        ("packed", "run: gunzip -k {}/packed/a.tfrecord.gz"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, path: str, message: str) -> None:
    good = Path(write(tmp_path / "records", make(2)), "00000.tfrecord").read_bytes()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.tfrecord.gz").write_bytes(gzip.compress(good))
    (tmp_path / "sly.tfrecord").write_bytes(gzip.compress(good))
    (tmp_path / "note.tfrecord").write_text("<html>404 not found</html>")
    (tmp_path / "zeros.tfrecord").write_bytes(bytes(4096))
    (tmp_path / "empty.tfrecord").write_bytes(b"")
    write_file(tmp_path / "text.tfrecord", [b"a line of text", b"\xff\xff"])
    with pytest.raises(UserError) as error:
        TFRecordSource(f"{tmp_path}/{path}")
    assert message.format(tmp_path) in str(error.value)
    assert "data.*.path" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["GZIP", "ZLIB"])
def test_compressed_files_are_refused_with_a_command_that_works(tmp_path: Path, kind: str) -> None:
    pairs, path = make(3), tmp_path / "a.tfrecord"
    with tf.io.TFRecordWriter(str(path), kind) as writer:
        for image, caption in pairs:
            writer.write(example({"image": image, "caption": caption}))
    assert kind == "GZIP" or zlib.decompress(path.read_bytes())
    with pytest.raises(UserError, match="is compressed, which allows no random access; run: ") as error:
        TFRecordSource(str(path))
    command = str(error.value).partition("run: ")[2]
    subprocess.run(command.replace("python ", f"{sys.executable} ", 1), shell=True, check=True)
    assert everything(TFRecordSource(str(path))) == pairs


def test_a_store_is_read_as_a_folder(tmp_path: Path, cache: Path) -> None:
    pairs = make(6)
    for number in range(2):  # ram:// is TensorFlow's own store in memory
        part = [example({"image": i, "label": n}) for n, (i, _) in enumerate(pairs[number * 3 :][:3])]
        write_file(f"ram://records/coco.tfrecord-0000{number}-of-00002", part)
    with tf.io.gfile.GFile("ram://records/classes.txt", "w") as file:
        file.write("cat\ndog\nowl")
    expected = [(image, b"a %s" % name) for (image, _), name in zip(pairs, [b"cat", b"dog", b"owl"] * 2, strict=True)]
    for path in ("ram://records", "ram://records/coco*", "ram://records/coco.tfrecord-{00000..00001}-of-00002"):
        assert everything(TFRecordSource(path, SourceOptions(template="a {}"))) == expected
    assert len(list(cache.rglob("*.npz"))) == 1
    with pytest.raises(UserError, match="no such file"):
        TFRecordSource("ram://records/absent.tfrecord")


# --- index and fingerprint ---------------------------------------------------------------------------------


def test_index_is_reused(
    tmp_path: Path, cache: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = make(6)
    with caplog.at_level(logging.INFO, "m3ae_jax"):
        first = TFRecordSource(write(tmp_path, pairs))
    assert "tfrecord: indexed 2 files, 6 examples" in caplog.text
    assert [path.name.partition("_")[2] for path in cache.glob("m3ae_jax/index/*")] == ["tfrecord.npz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tfrecord", "00001.tfrecord"]
    request.getfixturevalue("no_scan")
    again = TFRecordSource(str(tmp_path))
    assert everything(again) == pairs
    assert (again.fingerprint, again.report) == (first.fingerprint, first.report)


def test_fingerprint_is_of_the_content_not_of_its_place_or_time(tmp_path: Path) -> None:
    first = TFRecordSource(write(tmp_path / "a", make(6)))
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns(".*"))
    for path in (tmp_path / "b").iterdir():
        os.utime(path, (1, 1))
    assert TFRecordSource(str(tmp_path / "b")).fingerprint == first.fingerprint
    swapped = TFRecordSource(f"{tmp_path}/a/00001.tfrecord,{tmp_path}/a/00000.tfrecord")
    assert (
        len({swapped.fingerprint, first.fingerprint, TFRecordSource(f"{tmp_path}/a/00001.tfrecord").fingerprint}) == 3
    )


# --- shared files ------------------------------------------------------------------------------------------


def test_shared_corrupt_files(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shared / "data" / "corrupt" / "tfrecord"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    good = everything(TFRecordSource(f"{folder}/ok.tfrecord"))
    assert len(good) == 20
    for image, caption in good:
        assert image[:3] == b"\xff\xd8\xff" and caption.decode()
    damaged = everything(TFRecordSource(f"{folder}/data_crc.tfrecord"))
    wrong = [i for i in range(20) if damaged[i] != good[i]]
    assert len(wrong) == 1 and damaged[wrong[0]] == (b"", None)
    cut = TFRecordSource(f"{folder}/truncated.tfrecord")
    assert 10 < len(cut) < 20 and everything(cut) == good[: len(cut)]
    assert cut.report.skipped == {"damaged file": 1} and "truncated.tfrecord: cut off" in caplog.text
    other = f"{folder}/other_keys.tfrecord"  # jpg, txt and key: usual names
    assert everything(TFRecordSource(other)) == good
    assert everything(TFRecordSource(other, SourceOptions(image_key="jpg", caption_key="key")))[3][1] == b"00000003"
    with pytest.raises(UserError, match=r"image_key='image': .* has only jpg, key, txt"):
        TFRecordSource(other, SourceOptions(image_key="image"))
