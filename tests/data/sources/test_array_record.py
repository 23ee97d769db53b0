"""ArrayRecordSource: reading, damage, paths. Keys, captions and labels are as in test_tfrecord.py."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

array_record_module = pytest.importorskip("array_record.python.array_record_module")

from m3ae_jax.data import images  # noqa: E402
from m3ae_jax.data.sources import array_record  # noqa: E402
from m3ae_jax.data.sources.array_record import ArrayRecordSource  # noqa: E402
from m3ae_jax.data.sources.base import Source, SourceOptions  # noqa: E402
from m3ae_jax.data.sources.index import IndexReport  # noqa: E402
from m3ae_jax.errors import UserError  # noqa: E402

_BLOCK = 64 * 1024


def example(image: bytes, captions: Sequence[bytes], label: int | None = None) -> bytes:
    message = tf.train.Example()
    message.features.feature["image"].bytes_list.value.append(image)
    message.features.feature["caption"].bytes_list.value.extend(captions)
    if label is not None:
        message.features.feature["label"].int64_list.value.append(label)
    return bytes(message.SerializeToString(deterministic=True))


def write_file(path: Path, payloads: Sequence[bytes], options: str = "group_size:1") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for payload in payloads:
        writer.write(payload)
    writer.close()
    return str(path)


def write(folder: Path, pairs: list[tuple[bytes, bytes]], options: str = "group_size:1") -> str:
    """Stores pairs of picture and caption in one file, or in two from four pairs on."""
    payloads = [example(image, [caption]) for image, caption in pairs]
    half = len(payloads) // 2 if len(payloads) >= 4 else len(payloads)
    for number, part in enumerate([payloads[:half], payloads[half:]]):
        if part:
            write_file(folder / f"{number:05d}.array_record", part, options)
    return str(folder)


def make(count: int, name: str = "x") -> list[tuple[bytes, bytes]]:
    return [(f"picture {name}{i}".encode() * 5, f"caption {name}{i}".encode()) for i in range(count)]


def everything(source: Source) -> list[tuple[bytes, bytes | None]]:
    """Pictures and captions; None: it has none."""
    return [(record["image"], record.get("caption")) for record in source.read(np.arange(len(source)))]


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

    monkeypatch.setattr(array_record.ArrayRecordStorage, "scan", fail)


# --- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["group_size:1", "group_size:3", "group_size:1,uncompressed"])
def test_reads_all_in_order(tmp_path: Path, options: str, caplog: pytest.LogCaptureFixture) -> None:
    pairs = make(9)
    source: Source = ArrayRecordSource(write(tmp_path, pairs, options))
    assert source.modalities == ("image", "text") and source.classes == ()
    assert everything(source) == pairs
    assert source.report == IndexReport(2, 9, {}, {})  # type: ignore[attr-defined]
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(9), 2))
    assert [(r["image"], r["caption"]) for r in source.read(order)] == [pairs[i] for i in order]
    assert source.read(np.array([], np.int64)) == []
    slow = "00000.array_record: written with group_size:3, slow to read at random; rewrite it with group_size:1: python"
    assert caplog.text.count("group_size") == caplog.text.count(slow) * 2 == (2 if options == "group_size:3" else 0)


@pytest.mark.parametrize("options", ["group_size:1", "group_size:4"])
def test_threads_read_at_once(tmp_path: Path, options: str) -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.bytes(int(rng.integers(1, 20_000))), b"%d" % i) for i in range(40)]
    source = ArrayRecordSource(write(tmp_path, pairs, options))
    barrier = threading.Barrier(8)

    def work(seed: int) -> bool:
        barrier.wait()
        order = np.random.default_rng(seed).integers(0, len(source), (20, 16))
        return all([(r["image"], r["caption"]) for r in source.read(row)] == [pairs[i] for i in row] for row in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_record, "_MAX_OPEN", 1)
    pairs = make(8)
    source = ArrayRecordSource(write(tmp_path, pairs))
    before = len(os.listdir("/proc/self/fd"))
    orders = [np.random.default_rng(seed).permutation(8) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for order, result in zip(orders, pool.map(source.read, orders), strict=True):
            assert [(r["image"], r["caption"]) for r in result] == [pairs[i] for i in order]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_several_captions_labels_and_template(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    payloads = [example(b"i0", [b"a", b"b"], 1), example(b"i1", [b"c"], 0), example(b"i2", [], 5), b"\xff no Example"]
    path = write_file(tmp_path / "a.array_record", payloads)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    drawn = ArrayRecordSource(path)
    assert drawn.read(np.arange(4)) == [
        {"image": b"i0", "caption": b"a", "captions": (b"a", b"b"), "label": 1},
        {"image": b"i1", "caption": b"c", "label": 0},
        {"image": b"i2"},
        {"image": b""},
    ]
    assert drawn.classes == ("cat", "dog")
    each = ArrayRecordSource(path, SourceOptions(captions="all"))
    assert everything(each) == [(b"i0", b"a"), (b"i0", b"b"), (b"i1", b"c")]
    assert each.report.skipped == {"no tf.train.Example": 1, "no caption": 1}
    request.getfixturevalue("no_scan")
    assert everything(ArrayRecordSource(path, SourceOptions(captions="all"))) == everything(each)


def test_template_makes_captions(tmp_path: Path) -> None:
    message = tf.train.Example()
    message.features.feature["jpg"].bytes_list.value.append(b"i")
    message.features.feature["label"].int64_list.value.append(3)
    path = write_file(tmp_path / "a.array_record", [message.SerializeToString()])
    source = ArrayRecordSource(path, SourceOptions(template="a photo of a {}"))
    assert source.read(np.array([0])) == [{"image": b"i", "caption": b"a photo of a 3", "label": 3}]


# --- damage ------------------------------------------------------------------------------------------------


def test_cut_anywhere_loses_the_file_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The places of the records are at the end. Most of a small file is padding: every byte of the rest is tried."""
    good = Path(write(tmp_path / "whole", make(3)), "00000.array_record").read_bytes()
    assert len(good) == 2 * _BLOCK
    other = Path(write(tmp_path / "other", make(1, "y")), "00000.array_record").rename(tmp_path / "y.array_record")
    path = tmp_path / "cut.array_record"
    used = [i for i, byte in enumerate(good) if byte]
    places = sorted({*used, *range(0, len(good), 8191)})
    storage = array_record.ArrayRecordStorage()
    for cut in places:
        path.write_bytes(good[:cut])
        shard = storage.scan(str(path))
        assert len(shard.rows) == 0 and shard.skipped["damaged file"][0] == 1, cut
    for cut in places[::20]:
        path.write_bytes(good[:cut])
        source = ArrayRecordSource(f"{path},{other}")
        assert everything(source) == make(1, "y"), cut
        assert source.report.skipped == {"damaged file": 1}
    line = "cut.array_record: the list of its records is cut off or damaged; none of them is used"
    assert caplog.text.count(line) == len(places) + len(places[::20])
    with pytest.raises(
        UserError, match=r"holds no records \(left out: damaged file 1 \(e.g. cut.array_record:the list"
    ):
        ArrayRecordSource(str(path))


@pytest.mark.parametrize("options", ["group_size:1", "group_size:1,uncompressed", "group_size:2"])
def test_bits_flipped_anywhere_never_give_a_wrong_pair(tmp_path: Path, options: str) -> None:
    pairs = make(6)
    payloads = [example(image, [caption]) for image, caption in pairs]
    good = Path(write_file(tmp_path / "good", payloads, options)).read_bytes()
    used = np.flatnonzero(np.frombuffer(good, np.uint8))
    rng = np.random.default_rng(0)
    outcomes = set()
    for trial in range(100):
        noisy = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            place = rng.integers(len(good)) if trial % 5 == 0 else rng.choice(used)
            noisy[place] ^= 1 << rng.integers(8)
        path = tmp_path / f"{trial}.array_record"
        path.write_bytes(noisy)
        try:
            got = everything(ArrayRecordSource(str(path)))
        except UserError:
            outcomes.add("refused")
            continue
        finally:
            path.unlink()
        assert len(got) == 6
        for i, pair in enumerate(got):
            assert pair in (pairs[i], (b"", None)), (trial, i)
        outcomes.add("some" if (b"", None) in got else "all")
    assert outcomes == {"refused", "some", "all"}


def test_noise_never_breaks_the_process(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good = Path(write_file(tmp_path / "good", [example(i, [c]) for i, c in make(6)])).read_bytes()
    path = tmp_path / "noisy.array_record"
    for _ in range(100):
        noisy = bytearray(good)
        start = int(rng.choice([0, 64, rng.integers(700), _BLOCK, _BLOCK + rng.integers(128)]))
        size = int(rng.integers(1, 200))
        noisy[start : start + size] = rng.bytes(size)
        path.write_bytes(noisy)
        try:
            got = everything(ArrayRecordSource(str(path)))
        except UserError:
            continue
        assert all(pair in (expected, (b"", None)) for pair, expected in zip(got, make(6), strict=True))


def test_a_damaged_record_is_unusable_and_its_neighbours_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = make(4)
    path = Path(write(tmp_path, pairs, "group_size:1,uncompressed"), "00001.array_record")
    path.write_bytes(path.read_bytes().replace(b"caption x2", b"caption y2"))
    source = ArrayRecordSource(str(tmp_path))
    for _ in range(2):
        assert everything(source) == [*pairs[:2], (b"", None), pairs[3]]
    assert caplog.text.count("00001.array_record: damaged record at 0: not used") == 1
    each = ArrayRecordSource(str(tmp_path), SourceOptions(captions="all"))
    assert everything(each) == [*pairs[:2], pairs[3]]
    assert each.report.skipped == {"damaged record": 1}


def test_a_file_shortened_or_gone_later_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_record, "_MAX_OPEN", 1)
    pairs = make(8)
    folder = write(tmp_path, pairs)
    source = ArrayRecordSource(folder)
    source.read(np.array([0]))
    os.truncate(tmp_path / "00000.array_record", 300)
    with pytest.raises(OSError, match=r"00000\.array_record: changed since it was indexed; start again"):
        source.read(np.arange(4))
    (tmp_path / "00001.array_record").unlink()  # not open yet
    with pytest.raises(OSError, match=r"00001\.array_record: gone since it was indexed; start again"):
        source.read(np.array([5]))


def everything_of(source: Source, indices: range) -> list[tuple[bytes, bytes | None]]:
    return [(record["image"], record.get("caption")) for record in source.read(np.array(indices))]


def test_item_3_a_damaged_file_counts_with_the_examples_it_held(tmp_path: Path) -> None:
    names = [f"train.array_record-0000{i}-of-00002" for i in range(2)]
    for name in names:
        write_file(tmp_path / name, [example(b"i", [b"c"])] * 3)
    folder = str(tmp_path)
    os.truncate(tmp_path / names[1], 300)
    assert ArrayRecordSource(folder).report.skipped == {"damaged file": 1}  # nothing tells how many
    shards = {str(i): {"file": name, "examples": 3} for i, name in enumerate(names)}
    (tmp_path / "train.manifest.json").write_text(json.dumps({"shards": shards}))
    os.truncate(tmp_path / names[1], 299)
    for _ in range(2):
        report = ArrayRecordSource(folder).report
        assert report.skipped == {"damaged file": 3} and report.examples == 3 and report.unused == {}
    for other in ("{}", "[]", '{"shards": {"0": 1}}', "{", '{"shards": {"0": {"file": "' + names[1] + '"}}}'):
        (tmp_path / "train.manifest.json").write_text(other)
        assert array_record._said_to_hold(str(tmp_path / names[1])) == 0


def test_item_3_what_the_index_knew_of_a_file_damaged_later_is_counted(tmp_path: Path) -> None:
    folder = write(tmp_path, make(8))
    ArrayRecordSource(folder)
    os.truncate(tmp_path / "00001.array_record", 300)
    for captions in ("draw", "all"):
        source = ArrayRecordSource(folder, SourceOptions(captions=captions))
        assert source.report.skipped == {"damaged file": 4} and everything(source) == make(8)[:4]


@pytest.mark.parametrize("group_size", [1, 3])
def test_item_6_a_record_above_the_limit_is_let_go_of(tmp_path: Path, group_size: int) -> None:
    rng = np.random.default_rng(0)
    pairs = make(6)
    pairs[1], pairs[4] = (rng.bytes(300_000), b"large"), (rng.bytes(90_000), b"larger")
    folder = write(tmp_path, pairs, f"group_size:{group_size}")
    limited = SourceOptions(max_bytes=80_000)
    source = ArrayRecordSource(folder, limited)
    unusable = {"image": b"", "unusable": images.TOO_MANY_BYTES}
    assert [r for r in source.read(np.arange(6)) if "unusable" in r] == [unusable] * 2
    assert [r["image"] for r in source.read(np.array([0, 1, 5]))] == [pairs[0][0], b"", pairs[5][0]]
    each = ArrayRecordSource(folder, SourceOptions(max_bytes=80_000, captions="all"))
    assert everything(each) == [pair for i, pair in enumerate(pairs) if i not in (1, 4)]
    assert each.report.skipped == {"too many bytes (data.max_bytes)": 2}
    whole = ArrayRecordSource(folder, SourceOptions(captions="all"))  # the limit is not in the index
    assert everything(whole) == pairs and whole.report.skipped == {}
    assert ArrayRecordSource(folder).fingerprint != source.fingerprint
    assert (
        ArrayRecordSource(folder, SourceOptions(max_bytes=2**22)).fingerprint == ArrayRecordSource(folder).fingerprint
    )


# --- paths -------------------------------------------------------------------------------------------------


def test_names_of_files(tmp_path: Path) -> None:
    pairs = make(4)
    names = ["a.array_record-00000-of-00002", "a.array_record-00001-of-00002", "b.array_record", "c.arrayrecord"]
    for name, (image, caption) in zip(names, pairs, strict=True):
        write_file(tmp_path / name, [example(image, [caption])])
    (tmp_path / "features.json").write_text("{}")
    assert everything(ArrayRecordSource(str(tmp_path))) == pairs
    assert everything(ArrayRecordSource(f"{tmp_path}/c.arrayrecord,{tmp_path}/a*")) == [pairs[3], *pairs[:2]]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "data.*.path='{}/nowhere': no such file; it takes a local folder of .array_record files"),
        ("note.array_record", "{}/note.array_record is not an ArrayRecord file; it takes"),
        ("empty.array_record", "holds no records (left out: damaged file 1 (e.g. empty.array_record:"),
        ("none.array_record", "holds no records"),
        ("text.array_record", "holds no tf.train.Example"),
        ("sly.array_record", "run: mv {0}/sly.array_record {0}/sly.array_record.gz && gunzip -k "),
        ("records", "only caption, image, label; set"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "note.array_record").write_text("<html>404 not found</html>")
    (tmp_path / "empty.array_record").write_bytes(b"")
    (tmp_path / "sly.array_record").write_bytes(gzip.compress(b"whatever"))
    write_file(tmp_path / "none.array_record", [])
    write_file(tmp_path / "text.array_record", [b"a line of text"])
    numbers = tf.train.Example()
    for key in ("image", "caption", "label"):
        numbers.features.feature[key].int64_list.value.append(1)
    write_file(tmp_path / "records" / "a.array_record", [numbers.SerializeToString()])
    with pytest.raises(UserError) as error:
        ArrayRecordSource(f"{tmp_path}/{path}")
    assert message.format(tmp_path) in str(error.value)
    assert "data.*.path" in str(error.value) and "\n" not in str(error.value)


def test_stores_are_refused() -> None:
    with pytest.raises(UserError, match="are read from local disks"):
        ArrayRecordSource("gs://bucket/records")


# --- index and fingerprint ---------------------------------------------------------------------------------


def test_index_is_reused(tmp_path: Path, cache: Path, request: pytest.FixtureRequest) -> None:
    pairs = make(6)
    first = ArrayRecordSource(write(tmp_path, pairs))
    assert [path.name.partition("_")[2] for path in cache.glob("m3ae_jax/index/*")] == ["array_record.npz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.array_record", "00001.array_record"]
    request.getfixturevalue("no_scan")
    again = ArrayRecordSource(str(tmp_path))
    assert everything(again) == pairs
    assert (again.fingerprint, again.report) == (first.fingerprint, first.report)


def test_fingerprint_is_of_the_content_not_of_its_place_or_time(tmp_path: Path) -> None:
    first = ArrayRecordSource(write(tmp_path / "a", make(6)))
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns(".*"))
    for path in (tmp_path / "b").iterdir():
        os.utime(path, (1, 1))
    assert ArrayRecordSource(str(tmp_path / "b")).fingerprint == first.fingerprint
    swapped = ArrayRecordSource(f"{tmp_path}/a/00001.array_record,{tmp_path}/a/00000.array_record")
    # of as many records, and of files of the same size, as they are padded
    other = ArrayRecordSource(write(tmp_path / "c", [(image + b"longer", caption) for image, caption in make(6)]))
    assert len({first.fingerprint, swapped.fingerprint, other.fingerprint}) == 3


def test_further_values_of_a_picture_and_labels_of_no_class_are_told(tmp_path: Path) -> None:
    message = tf.train.Example.FromString(example(b"one", [b"c"], 0))
    message.features.feature["image"].bytes_list.value.append(b"two")
    message.features.feature["label"].int64_list.value.append(1)
    source = ArrayRecordSource(write_file(tmp_path / "a.array_record", [message.SerializeToString()]))
    assert source.read(np.array([0])) == [{"image": b"one", "caption": b"c"}]
    assert source.report.unused == {"further value of feature image": 1, "feature label: no class": 1}
