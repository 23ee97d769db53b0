"""ParquetSource: columns, row groups, classes, damage. The source never decodes, so a picture is any bytes."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3ae_jax.data import images
from m3ae_jax.data.sources import open_format, parquet
from m3ae_jax.data.sources.base import Source, SourceOptions
from m3ae_jax.data.sources.index import IndexReport
from m3ae_jax.data.sources.parquet import ParquetSource
from m3ae_jax.errors import UserError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Pairs = list[tuple[bytes, bytes]]


def pictures(rows: Sequence[bytes | None]) -> pa.Array:
    """A column as Hugging Face stores pictures."""
    return pa.array([{"bytes": row, "path": None} for row in rows], IMAGE)


def text(rows: Sequence[bytes | None]) -> pa.Array:
    """A column of strings, valid UTF-8 or not."""
    return pa.array(rows, pa.binary()).view(pa.string())


def table_of(pairs: Pairs) -> pa.Table:
    return pa.table({"image": pictures([p for p, _ in pairs]), "caption": text([c for _, c in pairs])})


def write(folder: Path, pairs: Pairs) -> str:
    """Stores pairs of a picture and a caption; the path that the source takes."""
    half = len(pairs) // 2 if len(pairs) >= 4 else len(pairs)
    for number, part in enumerate([pairs[:half], pairs[half:]]):
        if part:
            pq.write_table(table_of(part), folder / f"{number}.parquet", row_group_size=3)
    return str(folder)


def some(count: int) -> Pairs:
    return [(b"picture %d " % i * (i % 7 + 1) + b"\0", "cäption %d".encode() % i) for i in range(count)]


def everything(source: ParquetSource) -> Pairs:
    return [(record["image"], record["caption"]) for record in source.read(np.arange(len(source)))]


def as_far_as_whole(source: ParquetSource) -> Pairs:
    """Of what is damaged, no bytes."""
    return [(record["image"], record.get("caption", b"")) for record in source.read(np.arange(len(source)))]


def one(tmp_path: Path, columns: dict[str, Any] | pa.Table, metadata: Any = None, **options: Any) -> ParquetSource:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({b"huggingface": json.dumps(metadata).encode()})
    pq.write_table(table, tmp_path / "one.parquet", row_group_size=2)
    return ParquetSource(str(tmp_path / "one.parquet"), SourceOptions(**options))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- reading -----------------------------------------------------------------------------------------------


def test_reads_all_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source: Source = ParquetSource(write(tmp_path, some(11)))
    assert source.modalities == ("image", "text") and source.classes == ()
    assert everything(source) == some(11)  # type: ignore[arg-type]
    assert source.report == IndexReport(2, 11, {}, {})  # type: ignore[attr-defined]
    assert source.read(np.array([], np.int64)) == []
    assert not warnings(caplog)


@pytest.mark.parametrize("limit", [0, 400, 2**20])
def test_any_indices_give_their_own_pairs(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_CACHE_BYTES", limit)
    source = ParquetSource(write(tmp_path, some(23)))
    order = np.random.default_rng(limit).permutation(np.repeat(np.arange(23), 2))
    for part in np.split(order, [1, 4, 9, 30]):
        assert [(r["image"], r["caption"]) for r in source.read(part)] == [some(23)[i] for i in part]
        assert source._cache._total == sum(source._cache._sizes.values())
        assert source._cache._total <= limit or len(source._cache._sizes) == 1
        assert set(source._cache._sizes) == set(source._cache._groups)


@pytest.mark.parametrize("limit", [0, 400, 2**20])
def test_threads_read_at_once(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_CACHE_BYTES", limit)
    source = ParquetSource(write(tmp_path, some(40)))
    barrier = threading.Barrier(4)

    def work(seed: int) -> bool:
        barrier.wait()
        order = np.random.default_rng(seed).integers(0, 40, (20, 8))
        return all(
            [(r["image"], r["caption"]) for r in source.read(row)] == [some(40)[i] for i in row] for row in order
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_threads_decode_a_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ParquetSource(write(tmp_path, some(40)))
    decoded: list[int] = []
    decode = source._cache._decode
    monkeypatch.setattr(source._cache, "_decode", lambda number: decoded.append(number) or decode(number))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: source.read(np.arange(40)), range(4)))
    assert sorted(decoded) == list(range(14))


def test_fingerprint(tmp_path: Path) -> None:
    for name, pairs in (("a", some(6)), ("b", some(6)), ("c", some(7))):
        (tmp_path / name).mkdir()
        write(tmp_path / name, pairs)
        os.utime(tmp_path / name / "0.parquet", ns=(len(pairs), ord(name)))
    prints = [ParquetSource(str(tmp_path / name)).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_a_file_gone_or_shortened_later_is_an_os_error(tmp_path: Path) -> None:
    source = ParquetSource(write(tmp_path, some(8)))
    os.truncate(tmp_path / "0.parquet", 1000)
    (tmp_path / "1.parquet").rename(tmp_path / "moved")
    for _ in range(2):  # a failure is not remembered
        with pytest.raises(OSError, match=r"0\.parquet: changed since it was indexed; start again"):
            source.read(np.array([0]))
        with pytest.raises(FileNotFoundError):
            source.read(np.array([7]))
    (tmp_path / "moved").rename(tmp_path / "1.parquet")
    assert source.read(np.array([7]))[0]["caption"] == some(8)[7][1]


def test_a_failing_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ParquetSource(write(tmp_path, some(4)))
    source.read(np.array([0]))  # its footer is known now

    def fail(self: Any, offset: int, size: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("m3ae_jax.data.sources.files._Local.read", fail)
    for index in (1, 3):
        source._cache._groups.clear()
        with pytest.raises(OSError, match="Input/output error"):
            source.read(np.array([index]))
    with pytest.raises(OSError, match="Input/output error"):
        ParquetSource(str(tmp_path))


# --- columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(2), IMAGE, pa.struct([("bytes", pa.binary())])]
)
def test_pictures_of_every_type(tmp_path: Path, kind: pa.DataType) -> None:
    rows: list[Any] = [b"p0", None, b"\xff\0"]
    values = [None if row is None else {"bytes": row} for row in rows] if pa.types.is_struct(kind) else rows
    source = one(tmp_path, {"url": ["u"] * 3, "image": pa.array(values, kind)})
    assert source.modalities == ("image",)
    if pa.types.is_fixed_size_binary(kind):  # of which no statistics are read
        assert source.read(np.array([2, 1, 0])) == [{"image": b"\xff\0"}, {"image": b""}, {"image": b"p0"}]
        return
    assert source.read(np.array([1, 0])) == [{"image": b"\xff\0"}, {"image": b"p0"}]
    assert source.report.skipped == {"no image": 1}


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_captions_of_every_type(tmp_path: Path, kind: pa.DataType) -> None:
    source = one(tmp_path, {"text": pa.array(["ein Käfer", None, ""]).cast(kind)})
    assert source.modalities == ("text",)
    assert source.read(np.array([1, 0])) == [{"caption": b""}, {"caption": "ein Käfer".encode()}]
    assert source.report.skipped == {"no caption": 1}


def test_captions_need_be_no_utf8(tmp_path: Path) -> None:
    assert everything(one(tmp_path, table_of([(b"p", b"caf\xe9\0")]))) == [(b"p", b"caf\xe9\0")]


def test_named_columns(tmp_path: Path) -> None:
    columns = {"image": pictures([b"p"]), "thumb": [b"t"], "caption": ["c"], "alt": ["a"], "y": [4]}
    source = one(tmp_path, columns, image_key="thumb", caption_key="alt", label_key="y")
    assert source.read(np.array([0])) == [{"image": b"t", "caption": b"a", "label": 4}]
    assert source.fingerprint != ParquetSource(str(tmp_path)).fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"no column of pictures .* only bild \(binary\), image \(string\), n \(int64\); name them with"),
        ({"image_key": "bidl"}, r"image_key='bidl'.* has only bild, image, n; did you mean 'bild'"),
        ({"image_key": "image"}, "image_key='image'.* of type string; allowed are binary or struct"),
        ({"caption_key": "n"}, "caption_key='n'.* of type int64; allowed are string or list"),
        ({"label_key": "bild"}, "label_key='bild'.* of type binary; allowed are whole numbers or strings"),
    ],
)
def test_wrong_columns(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        one(tmp_path, {"bild": [b"p"], "image": ["path.jpg"], "n": [1]}, **options)
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_files_of_different_columns(tmp_path: Path) -> None:
    write(tmp_path, some(4))
    bare = pa.struct([("path", pa.string()), ("bytes", pa.large_binary())])
    columns = {"image": pa.array([{"bytes": b"p"}], bare), "caption": pa.array(["c"], pa.large_string())}
    pq.write_table(pa.table(columns), tmp_path / "2.parquet")
    assert everything(ParquetSource(str(tmp_path))) == [*some(4), (b"p", b"c")]
    pq.write_table(pa.table({"image": [b"p"], "caption": ["c"]}), tmp_path / "3.parquet")
    with pytest.raises(
        UserError, match=r"3\.parquet: column 'image' is of type binary, in .*0\.parquet of type struct"
    ):
        ParquetSource(str(tmp_path))
    pq.write_table(pa.table({"image": pictures([b"p"]), "caption": [["c"]]}), tmp_path / "3.parquet")
    with pytest.raises(
        UserError, match=r"3\.parquet: column 'caption' is of type list.*in .*0\.parquet of type string"
    ):
        ParquetSource(str(tmp_path))
    pq.write_table(pa.table({"image": pictures([b"p"]), "txt": ["c"]}), tmp_path / "3.parquet")
    with pytest.raises(UserError, match=r"3\.parquet: column 'caption' is not there.* its columns are image .*, txt"):
        ParquetSource(str(tmp_path))


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no example"):
        one(tmp_path, table_of([]))


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string())])
@pytest.mark.parametrize("mode", ["draw", "all"])
def test_several_captions(tmp_path: Path, kind: pa.DataType, mode: str) -> None:
    captions = pa.array([["a", "b", "c"], [], ["d"], None, [None, "e", ""], [None, None]], kind)
    columns = {"image": pictures([b"%d" % i for i in range(6)]), "captions": captions}
    source = one(tmp_path, columns, captions=mode)
    assert source.report.skipped == {"no caption": 3} and source.report.samples["no caption"] == "one.parquet:row 1"
    assert source.report.unused == {"null in a list of captions": 1}
    assert source.report.samples["null in a list of captions"] == "one.parquet:row 4"
    if mode == "draw":
        records = source.read(np.array([2, 1, 0]))
        assert [record["image"] for record in records] == [b"4", b"2", b"0"]
        assert [record["caption"] for record in records] == [b"e", b"d", b"a"]
        assert [record.get("captions") for record in records] == [(b"e", b""), None, (b"a", b"b", b"c")]
        return
    pairs = [(b"0", b"a"), (b"0", b"b"), (b"0", b"c"), (b"2", b"d"), (b"4", b"e"), (b"4", b"")]
    assert everything(source) == pairs
    order = np.random.default_rng(0).permutation(6)
    assert source.read(order) == [{"image": pairs[i][0], "caption": pairs[i][1]} for i in order]


def test_several_captions_of_a_fixed_number(tmp_path: Path) -> None:
    captions = pa.array([["a", "b"], ["c", "d"]], pa.list_(pa.string(), 2))
    source = one(tmp_path, {"image": pictures([b"0", b"1"]), "captions": captions}, captions="all")
    assert everything(source) == [(b"0", b"a"), (b"0", b"b"), (b"1", b"c"), (b"1", b"d")]


# --- classes -----------------------------------------------------------------------------------------------

NAMED = {"info": {"features": {"label": {"names": ["cat", "dög", "bird"], "_type": "ClassLabel"}, "image": {}}}}


def labelled(labels: Sequence[int | None]) -> dict[str, Any]:
    return {"image": pictures([b"p%d" % i for i in range(len(labels))]), "label": pa.array(labels, pa.int64())}


def test_classes(tmp_path: Path) -> None:
    assert one(tmp_path, labelled([0, 3, 1])).classes == ("0", "1", "2", "3")
    source = one(tmp_path, labelled([0, 1, 1]), NAMED)
    assert source.classes == ("cat", "dög", "bird") and source.modalities == ("image",)
    assert source.read(np.array([2, 0])) == [{"image": b"p2", "label": 1}, {"image": b"p0", "label": 0}]


def test_a_row_without_a_label_has_none(tmp_path: Path) -> None:
    source = one(tmp_path, labelled([0, None, 1]), template="a {}")
    assert source.read(np.arange(3)) == [
        {"image": b"p0", "caption": b"a 0", "label": 0},
        {"image": b"p1"},
        {"image": b"p2", "caption": b"a 1", "label": 1},
    ]


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, -2], "column 'label' has -2 in row group 1; class numbers start at 0"),
        ([-1, None, -1], "column 'label' has -1 in row group 0; class numbers start at 0"),
        ([0, 3, 2, 1], "column 'label' has 3 in row group 0; allowed are 0 to 2"),
    ],
)
def test_labels_out_of_range(tmp_path: Path, labels: list[int], message: str, statistics: bool) -> None:
    table = pa.table(labelled(labels)).replace_schema_metadata({b"huggingface": json.dumps(NAMED).encode()})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=2, write_statistics=statistics)
    for options in (SourceOptions(label_key="label"), SourceOptions(template="a {}")):
        with pytest.raises(UserError, match=message):
            ParquetSource(str(path), options)
    value = message.split()[3]
    source = ParquetSource(str(path))
    assert source.classes == () and source.report.unused == {f"column label: no class, e.g. {value}": len(labels)}
    assert source.read(np.array([0])) == [{"image": b"p0"}]


@pytest.mark.parametrize("value", [-1, 0.73, 10**7])
def test_a_usual_column_of_no_classes_does_not_stop_pretraining(tmp_path: Path, value: float) -> None:
    columns = {"image": pictures([b"p"] * 3), "caption": ["c"] * 3, "label": [value] * 3}
    source = one(tmp_path, columns)
    assert everything(source) == [(b"p", b"c")] * 3 and source.classes == ()
    assert source.report.unused == {f"column label: no class, e.g. {value}": 3} and not source.report.skipped
    del columns["label"]
    assert one(tmp_path, columns).read(np.array([2])) == source.read(np.array([2]))


def test_a_usual_column_that_not_all_files_have_does_not_stop_pretraining(tmp_path: Path) -> None:
    for name, columns in (("a", {"label": [1]}), ("b", {"label": ["x"]}), ("c", {})):
        pq.write_table(pa.table({"image": [b"p"], **columns}), tmp_path / f"{name}.parquet")
    source = ParquetSource(str(tmp_path))
    assert len(source) == 3 and source.report.unused == {"column label: not alike in all files": 2}
    with pytest.raises(UserError, match=r"b\.parquet: column 'label' is of type string"):
        ParquetSource(str(tmp_path), SourceOptions(label_key="label"))


@pytest.mark.parametrize("statistics", [True, False])
def test_minus_one_beside_classes_of_hugging_face_is_unlabelled(tmp_path: Path, statistics: bool) -> None:
    table = pa.table(labelled([2, -1, -1, -1, 0])).replace_schema_metadata({b"huggingface": json.dumps(NAMED).encode()})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2, write_statistics=statistics)
    for options in (SourceOptions(), SourceOptions(label_key="label")):
        source = ParquetSource(str(tmp_path), options)
        assert source.classes == ("cat", "dög", "bird") and not source.report.unused
        assert [record.get("label") for record in source.read(np.arange(5))] == [2, None, None, None, 0]


def test_an_empty_string_is_no_class(tmp_path: Path) -> None:
    source = one(tmp_path, {"image": pictures([b"p"] * 3), "label": ["b", "", "a"]})
    assert source.classes == ("a", "b")
    assert [record.get("label") for record in source.read(np.arange(3))] == [1, None, 0]


def test_template(tmp_path: Path) -> None:
    source = one(tmp_path, labelled([1, 0]), NAMED, template="a photo of a {}")
    assert source.modalities == ("image", "text")
    assert source.read(np.array([0])) == [{"image": b"p0", "label": 1, "caption": "a photo of a dög".encode()}]
    with pytest.raises(UserError, match=r"template='\{name\}' must have one"):
        ParquetSource(str(tmp_path), SourceOptions(template="{name}"))


@pytest.mark.parametrize("metadata", [[], {}, {"info": 3}, {"info": {"features": {"label": {"_type": "ClassLabel"}}}}])
def test_odd_metadata(tmp_path: Path, metadata: Any) -> None:
    assert one(tmp_path, labelled([0, 1]), metadata).classes == ("0", "1")


# --- row groups --------------------------------------------------------------------------------------------


def test_large_row_groups_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.bytes(50_000), b"c") for _ in range(8)]
    monkeypatch.setattr(parquet, "_SLOW_GROUP", 100_000)
    ParquetSource(write(tmp_path, pairs))  # all fit in the cache
    assert not warnings(caplog)
    monkeypatch.setattr(parquet, "_CACHE_BYTES", 200_000)
    ParquetSource(str(tmp_path))
    (line,) = warnings(caplog)
    assert "row groups are of 0 MB on average" in line and "python -m m3ae_jax.data.prepare" in line


# --- issue 19: nothing is left out in silence -----------------------------------------------------------------

LISTS = pa.list_(IMAGE)
PNG = {"bytes": b"png", "path": None}


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_item_1_a_null_caption_is_no_empty_one(tmp_path: Path, statistics: bool, compression: str) -> None:
    table = table_of([(b"%d" % i, None if i in (1, 4, 5) else b"" if i == 2 else b"c") for i in range(7)])  # type: ignore[misc]
    pq.write_table(
        table, tmp_path / "a.parquet", row_group_size=3, write_statistics=statistics, compression=compression
    )
    source = ParquetSource(str(tmp_path))
    assert everything(source) == [(b"0", b"c"), (b"2", b""), (b"3", b"c"), (b"6", b"c")]
    assert source.report.skipped == {"no caption": 3}
    assert source.report.samples == {"no caption": "a.parquet:row 1"}


def test_item_1_nothing_is_read_where_no_caption_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, some(5))
    monkeypatch.setattr(ParquetSource, "_decode_columns", lambda *_: pytest.fail("read"))
    assert len(ParquetSource(str(tmp_path))) == 5


def test_item_1_captions_that_are_all_null_leave_no_example(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no example \(left out: no caption 2 \(e\.g\. one\.parquet:row 0"):
        one(tmp_path, table_of([(b"p", None)] * 2))  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("key", "near"), [("caption", "txet"), ("image", "imgae"), ("label", "lable"), ("group", "ulr")]
)
def test_item_1_a_mistyped_key_is_refused(tmp_path: Path, key: str, near: str) -> None:
    columns = {"image": pictures([b"p"]), "text": ["c"], "label": [0], "url": ["u"]}
    with pytest.raises(UserError, match=rf"{key}_key='{near}'.* did you mean '(text|image|label|url)'"):
        one(tmp_path, columns, **{f"{key}_key": near})


def test_item_1_a_template_that_is_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"template='a \{\}' is not read: the data have captions \(caption\)"):
        one(tmp_path, table_of(some(2)), template="a {}")
    with pytest.raises(UserError, match=r"template='a \{\}' needs classes"):
        one(tmp_path, {"image": pictures([b"p"])}, template="a {}")
    with pytest.raises(UserError, match="caption_per_line=True: the format parquet does not read it"):
        open_format("parquet", str(tmp_path), SourceOptions(caption_per_line=True), "data.train.")


def test_item_2_unused_columns_and_files_are_counted(tmp_path: Path) -> None:
    pq.write_table(table_of(some(3)).append_column("url", [["u"] * 3]), tmp_path / "a.parquet")
    pq.write_table(table_of(some(2)).append_column("url", [["u"] * 2]), tmp_path / "b.parquet")
    (tmp_path / "captions.jsonl").write_text("{}")
    (tmp_path / "raw").mkdir()
    (tmp_path / ".hidden").write_text("")
    report = ParquetSource(str(tmp_path)).report
    assert report.unused == {"column url": 5, "file .jsonl": 1, "folder": 1} and not report.skipped
    assert report.samples == {"column url": "a.parquet", "file .jsonl": "captions.jsonl", "folder": "raw"}


SPLITS = ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001", "more")


def write_splits(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        pq.write_table(table_of([(b"p", name.encode())]), folder / f"{name}.parquet")


@pytest.mark.parametrize("inside", [".", "data"])
@pytest.mark.parametrize(
    ("split", "names"),
    [("train", SPLITS[:2]), ("val", SPLITS[2:3]), ("validation", SPLITS[2:3]), ("test", SPLITS[3:4])],
)
def test_item_2_splits_of_hugging_face_are_kept_apart(
    tmp_path: Path, inside: str, split: str, names: tuple[str, ...]
) -> None:
    write_splits(tmp_path / inside)
    source = ParquetSource(str(tmp_path), SourceOptions(split=split))
    assert [caption.decode() for _, caption in everything(source)] == list(names)
    assert sum(source.report.unused.values()) == 5 - len(names) and source.report.unused["file of no split"] == 1
    if split != "test":
        assert source.report.samples["file of split test"] == f"{SPLITS[3]}.parquet"
    assert len(ParquetSource(str(tmp_path / inside / "*.parquet"), SourceOptions(split=split))) == len(names)


def test_item_2_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write_splits(tmp_path)
    with pytest.raises(UserError, match=r"split='tain' is not one of test, train, validation; did you mean 'train'"):
        ParquetSource(str(tmp_path), SourceOptions(split="tain"))
    alone = str(tmp_path / "more.parquet")
    with pytest.raises(UserError, match=r"split='test'.* do not tell of several splits"):
        ParquetSource(alone, SourceOptions(split="test"))
    assert len(ParquetSource(alone, SourceOptions(split="val"))) == 1
    assert len(ParquetSource(str(tmp_path), SourceOptions(split=""))) == 5
    both = ",".join(str(tmp_path / f"{name}-*.parquet") for name in ("train", "test"))
    assert len(ParquetSource(both)) == 3  # named one by one


def test_item_2_a_damaged_row_group_of_captions_counts_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = table_of([(b"%d" % i, None if i == 4 else b"c") for i in range(6)])  # type: ignore[misc]
    pq.write_table(table, path, row_group_size=3, compression="zstd", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(1).column(2).data_page_offset
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes(20))
    source = ParquetSource(str(path))
    assert len(source) == 3 and source.report.skipped == {"damaged row group": 3}


@pytest.mark.parametrize("kind", [LISTS, pa.large_list(IMAGE), pa.list_(pa.binary()), pa.list_(IMAGE, 2)])
def test_item_4_pictures_in_lists(tmp_path: Path, kind: pa.DataType) -> None:
    of_structs = pa.types.is_struct(kind.value_type)
    rows: list[Any] = [[b"a"], [b"b", b"x"], [b"c"], [], None, [b"d", b"y"], [b"e"], [None, b"z"]]
    if pa.types.is_fixed_size_list(kind):
        rows = [None if not row else [*row, None][:2] for row in rows]
    values = [row and [{"bytes": one, "path": None} if of_structs else one for one in row] for row in rows]
    source = one(tmp_path, {"images": pa.array(values, kind), "texts": ["c"] * len(rows)})
    assert source.modalities == ("image", "text")
    wanted = [first for row in rows if (first := next(filter(None, row or ()), None))]
    assert wanted == [b"a", b"b", b"c", b"d", b"e", b"z"] and source.report.skipped == {"no image": 2}
    order = np.array([5, 0, 3, 1, 2, 4])
    assert [record["image"] for record in source.read(order)] == [wanted[i] for i in order]
    if not pa.types.is_fixed_size_list(kind):
        assert source.report.unused == {"further picture of a row": 3}


@pytest.mark.parametrize("picture", [[None, PNG], [{"bytes": None, "path": None}, PNG], [None, None, PNG, None]])
def test_item_4_of_a_list_the_first_picture_that_is_not_null(tmp_path: Path, picture: list[Any]) -> None:
    source = one(tmp_path, {"images": pa.array([picture, [None], [PNG]], LISTS), "caption": ["a", "b", "c"]})
    assert everything(source) == [(b"png", b"a"), (b"png", b"c")]
    assert source.report.skipped == {"no image": 1}


def failed_downloads(nulls: Sequence[int], captions: Sequence[Any]) -> dict[str, Any]:
    """As img2dataset keeps them in Parquet files."""
    large = b"x" * 5000  # more than Parquet's statistics hold
    rows = [None if i in nulls else b"%d" % i + large for i in range(len(captions))]
    return {"jpg": pa.array(rows, pa.binary()), "caption": captions}


def test_null_pictures_are_counted_without_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = failed_downloads([1, 4, 5, 6], ["c"] * 9)
    with monkeypatch.context() as patched:
        patched.setattr(ParquetSource, "_decode_columns", lambda *_: pytest.fail("read"))
        source = one(tmp_path, columns)
    assert len(source) == 5 and source.report.skipped == {"no image": 4}
    order = np.array([4, 0, 2, 1, 3])
    assert [int(record["image"][:1]) for record in source.read(order)] == [8, 0, 3, 2, 7]
    assert "unusable" not in source.read(order)[0]
    whole = one(tmp_path, failed_downloads([], ["c"] * 9))
    assert len(whole) == 9 and whole.fingerprint != source.fingerprint


@pytest.mark.parametrize("mode", ["draw", "all"])
def test_null_pictures_beside_null_captions(tmp_path: Path, mode: str) -> None:
    captions = [["a"], None, ["b", "c"], ["d"], [None], [None, "e"], ["f"]]
    source = one(tmp_path, failed_downloads([1, 3, 6], captions), captions=mode)
    assert source.report.skipped == {"no image": 3, "no caption": 1}
    assert source.report.samples["no image"] == "one.parquet:row 1"
    assert source.report.unused == {"null in a list of captions": 1}
    result = [(int(picture[:1]), caption) for picture, caption in everything(source)]
    assert result == [(0, b"a"), (2, b"b"), *[(2, b"c")] * (mode == "all"), (5, b"e")]


def test_null_pictures_of_which_no_statistics_tell_come_as_no_bytes(tmp_path: Path) -> None:
    for number, captions in enumerate((["a", "b", "c"], ["a", "b", None])):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table(failed_downloads([1], captions)), path, write_statistics=False)
        records = ParquetSource(str(path)).read(np.arange(3 - number))
        assert [record["image"][:1] for record in records] == [b"0", b"", b"2"][: 3 - number]


def test_item_4_null_bytes_with_a_path(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.jpg").write_bytes(b"one")
    (tmp_path / "data" / "in").mkdir(parents=True)
    (tmp_path / "data" / "in" / "2.jpg").write_bytes(b"two")
    (tmp_path / "data" / "link.jpg").symlink_to(tmp_path / "pictures" / "1.jpg")
    paths = [
        "in/2.jpg",
        "../pictures/1.jpg",
        str(tmp_path / "data/in/2.jpg"),
        "link.jpg",
        "gone.jpg",
        "in",
        "a\0b",
        None,
    ]
    rows = [{"bytes": b"own", "path": "in/2.jpg"}, *({"bytes": None, "path": path} for path in paths)]
    for kind, values in ((IMAGE, rows), (LISTS, [[row] for row in rows])):
        source = one(tmp_path / "data", {"image": pa.array(values, kind)})
        lost = {"image": b"", "unusable": images.NO_BYTES}
        assert source.read(np.arange(8)) == [{"image": b"own"}, {"image": b"two"}, *[lost] * 6]
        assert len(source) == 8 and source.report.skipped == {"no image": 1}


@pytest.mark.parametrize("statistics", [True, False])
def test_item_4_paths_without_any_picture_are_refused(tmp_path: Path, statistics: bool) -> None:
    rows = [{"bytes": None, "path": f"/home/me/{i}.jpg"} for i in range(3)]
    pq.write_table(pa.table({"image": pa.array(rows, IMAGE)}), tmp_path / "a.parquet", write_statistics=statistics)
    with pytest.raises(UserError, match=r"column 'image' has paths in place of pictures, as '/home/me/0\.jpg', and no"):
        ParquetSource(str(tmp_path))


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_item_5_whole_number_floats_are_classes(tmp_path: Path, kind: pa.DataType) -> None:
    source = one(tmp_path, {"image": pictures([b"p"] * 4), "label": pa.array([3.0, None, float("nan"), 0.0], kind)})
    assert source.classes == ("0", "1", "2", "3")
    assert [record.get("label") for record in source.read(np.arange(4))] == [3, None, None, 0]
    for value in (0.5, float("inf")):
        with pytest.raises(UserError, match=rf"column 'label' has {value} in row group 1; a class is a whole number"):
            columns = {"image": pictures([b"p"] * 3), "label": pa.array([1.0, 0.0, value], kind)}
            one(tmp_path, columns, label_key="label")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_item_5_strings_are_names_of_classes(tmp_path: Path, kind: pa.DataType) -> None:
    labels = pa.array(["dog", "cat", None, "dog", "bird"]).cast(kind)
    source = one(tmp_path, {"image": pictures([b"p"] * 5), "class": labels}, template="a {}")
    assert source.classes == ("bird", "cat", "dog")
    assert [record.get("label") for record in source.read(np.arange(5))] == [2, 1, None, 2, 0]
    assert [record.get("caption") for record in source.read(np.array([2, 4]))] == [None, b"a bird"]


def test_item_5_strings_beside_captions_are_classes_where_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"image": pictures([b"p"] * 3), "caption": ["c"] * 3, "label": ["b", "a", "c"]}
    source = one(tmp_path, columns)
    assert source.classes == () and source.report.unused == {"column label": 3}
    assert one(tmp_path, columns, label_key="label").classes == ("a", "b", "c")
    monkeypatch.setattr(parquet, "_MAX_NAMES", 2)
    with pytest.raises(UserError, match="column 'label' has more than 2 different strings"):
        one(tmp_path, columns, label_key="label")


def test_item_6_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    data = [b"1234", b"12345", b"1"]
    (tmp_path / "large.jpg").write_bytes(b"123456")
    lists = [[{"bytes": one, "path": None}] for one in data]
    rows = [*lists, [{"bytes": None, "path": "large.jpg"}]]
    columns = {"image": pa.array(rows, LISTS), "captions": [["a"], ["b"], ["c", "ccccc"], ["d"]]}
    source = one(tmp_path, columns, max_bytes=4)
    lost = {"image": b"", "unusable": images.TOO_MANY_BYTES}
    assert source.read(np.arange(4)) == [
        {"image": b"1234", "caption": b"a"},
        lost | {"caption": b"b"},
        lost,
        lost | {"caption": b"d"},
    ]
    assert source.fingerprint == ParquetSource(str(tmp_path / "one.parquet")).fingerprint


@pytest.mark.parametrize("values", [["x", None, "y"], [7, None, 8], [b"x", None, b"y"]])
def test_item_13_a_group(tmp_path: Path, values: list[Any]) -> None:
    columns = {**labelled([0, 1, 1]), "concept": values}
    plain = one(tmp_path, columns)
    source = one(tmp_path, columns, group_key="concept")
    first, last = (v.decode() if isinstance(v, bytes) else str(v) for v in (values[0], values[2]))
    assert [record.get("group") for record in source.read(np.array([2, 1, 0]))] == [last, None, first]
    assert source.fingerprint != plain.fingerprint and plain.report.unused == {"column concept": 3}
    assert not source.report.unused


# --- damage ------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, some(8))
    data = (tmp_path / "0.parquet").read_bytes()
    (tmp_path / "0.parquet").write_bytes(data[:-100])
    (tmp_path / "2.parquet").write_bytes(b"")
    source = ParquetSource(str(tmp_path))
    assert everything(source) == some(8)[4:]
    assert source.report.shards == 3 and source.report.skipped == {"damaged file": 2}
    assert source.report.samples["damaged file"].startswith("0.parquet:")
    assert "0.parquet is no whole Parquet file and left out" in caplog.text
    (tmp_path / "1.parquet").unlink()
    with pytest.raises(UserError, match=r"holds no example \(left out: damaged file 2 \(e\.g\. 0\.parquet:"):
        ParquetSource(str(tmp_path))


@pytest.mark.parametrize("mode", ["draw", "all"])
def test_a_damaged_row_group_is_replaced(tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.parquet"
    columns = {"image": pictures([b"p%d" % i for i in range(6)]), "caption": [["a", "b"]] * 6}
    pq.write_table(pa.table(columns), path, row_group_size=2, compression="zstd")
    start = pq.ParquetFile(path).metadata.row_group(1).column(2).data_page_offset
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes(20))
    source = ParquetSource(str(path), SourceOptions(captions=mode))
    for _ in range(2):
        result = as_far_as_whole(source)
    if mode == "draw":
        whole = [(b"p%d" % i, b"a") for i in range(6)]
        assert result == [*whole[:2], (b"", b""), (b"", b""), *whole[4:]]
        assert source.read(np.array([2])) == [{"image": b"", "unusable": images.DAMAGED}]
    else:
        assert result == [(b"p%d" % i, caption) for i in (0, 1, 4, 5) for caption in (b"a", b"b")]
        assert source.report.skipped == {"damaged row group": 2}
    assert sum("row group 1 cannot be decoded" in line for line in warnings(caplog)) == 1


def outcome(path: Path, data: bytes, captions: str = "draw") -> Pairs:
    """What the source gives of a file with these bytes; nothing where it is refused in one line."""
    path.write_bytes(data)
    try:
        source = ParquetSource(str(path), SourceOptions(captions=captions))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return []
    # A damaged name is another name, and a length may be any.
    return as_far_as_whole(source) if source.modalities == ("image", "text") and len(source) < 1000 else []


def damageable(tmp_path: Path, **options: Any) -> bytes:
    pq.write_table(table_of(some(12)), tmp_path / "whole", row_group_size=4, **options)
    return (tmp_path / "whole").read_bytes()


def test_cut_anywhere(tmp_path: Path) -> None:
    data = damageable(tmp_path)
    for size in [0, 1, 8, len(data) - 1, *np.random.default_rng(0).integers(0, len(data), 100).tolist()]:
        assert outcome(tmp_path / "cut.parquet", data[:size]) == []
    assert outcome(tmp_path / "cut.parquet", data) == some(12)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("checksum", [False, True])
def test_changed_bytes_anywhere(tmp_path: Path, compression: str, checksum: bool) -> None:
    """With checksums no page comes through changed; without them its bytes may; nothing else may happen."""
    data = damageable(tmp_path, compression=compression, write_page_checksum=checksum)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    rng = np.random.default_rng(checksum)
    refused = unchanged = replaced = 0
    for _ in range(150):
        changed = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, len(data), rng.integers(1, 4))
        changed[places] = rng.integers(0, 256, len(places))
        result = outcome(tmp_path / "flip.parquet", changed.tobytes())
        refused += not result
        replaced += any(picture == b"" for picture, _ in result)
        unchanged += result == some(12)
        if checksum and places.max() < footer:
            assert len(result) == 12
            assert all(f == s or f == (b"", b"") for f, s in zip(result, some(12), strict=True))
    assert refused and unchanged and replaced


def test_changed_bytes_in_lists_and_labels(tmp_path: Path) -> None:
    captions = pa.array([[f"{i}"] * (i % 3) for i in range(12)])
    table = pa.table({"image": pictures([b"p"] * 12), "captions": captions, "label": [i % 3 for i in range(12)]})
    pq.write_table(table, tmp_path / "whole", row_group_size=4, compression="none")
    data, rng = (tmp_path / "whole").read_bytes(), np.random.default_rng(0)
    for i in range(300):
        changed = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, len(data), rng.integers(1, 4))
        changed[places] = rng.integers(0, 256, len(places))
        outcome(tmp_path / "flip.parquet", changed.tobytes(), ("draw", "all")[i % 2])
