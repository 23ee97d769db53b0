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

from m3ae_jax.data.sources import parquet
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
        with pytest.raises(OSError, match=r"0\.parquet: another size than when it was opened"):
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
    assert source.read(np.array([2, 1, 0])) == [{"image": b"\xff\0"}, {"image": b""}, {"image": b"p0"}]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_captions_of_every_type(tmp_path: Path, kind: pa.DataType) -> None:
    source = one(tmp_path, {"text": pa.array(["ein Käfer", None, ""]).cast(kind)})
    assert source.modalities == ("text",)
    assert source.read(np.array([2, 1, 0])) == [{"caption": b""}, {"caption": b""}, {"caption": "ein Käfer".encode()}]


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
        ({"label_key": "image"}, "label_key='image'.* of type string; allowed are integers"),
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
    captions = pa.array([["a", "b", "c"], [], ["d"], None, ["e", None]], kind)
    source = one(tmp_path, {"image": pictures([b"0", b"1", b"2", b"3", b"4"]), "captions": captions}, captions=mode)
    if mode == "draw":
        records = source.read(np.array([4, 3, 2, 1, 0]))
        assert [record["caption"] for record in records] == [b"e", b"", b"d", b"", b"a"]
        assert [record.get("captions") for record in records] == [(b"e", b""), None, None, None, (b"a", b"b", b"c")]
        return
    pairs = [
        (b"0", b"a"),
        (b"0", b"b"),
        (b"0", b"c"),
        (b"1", b""),
        (b"2", b"d"),
        (b"3", b""),
        (b"4", b"e"),
        (b"4", b""),
    ]
    assert everything(source) == pairs
    order = np.random.default_rng(0).permutation(8)
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


def test_a_row_without_a_label_is_replaced(tmp_path: Path) -> None:
    source = one(tmp_path, labelled([0, None, 1]), template="a {}")
    assert [(r["image"], r["caption"]) for r in source.read(np.arange(3))] == [
        (b"p0", b"a 0"),
        (b"", b""),
        (b"p2", b"a 1"),
    ]


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, -1], "column 'label' has -1 in row group 1; class numbers start at 0"),
        ([0, 3, 2, 1], "column 'label' has 3 in row group 0; allowed are 0 to 2"),
    ],
)
def test_labels_out_of_range(tmp_path: Path, labels: list[int], message: str, statistics: bool) -> None:
    table = pa.table(labelled(labels)).replace_schema_metadata({b"huggingface": json.dumps(NAMED).encode()})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=2, write_statistics=statistics)
    with pytest.raises(UserError, match=message):
        ParquetSource(str(path))


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
        result = everything(source)
    if mode == "draw":
        whole = [(b"p%d" % i, b"a") for i in range(6)]
        assert result == [*whole[:2], (b"", b""), (b"", b""), *whole[4:]]
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
    return everything(source) if source.modalities == ("image", "text") and len(source) < 1000 else []


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
