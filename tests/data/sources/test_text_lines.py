"""TextSource: lines of any files, how they are found across blocks, what is refused."""

from __future__ import annotations

import gzip
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from m3ae_jax.data.sources import text_lines
from m3ae_jax.data.sources.base import Source, SourceOptions
from m3ae_jax.data.sources.text_lines import TextSource
from m3ae_jax.errors import UserError


def lines(source: Source) -> list[bytes]:
    return [record["caption"] for record in source.read(np.arange(len(source)))]


def source_of(tmp_path: Path, data: bytes) -> TextSource:
    (tmp_path / "a.txt").write_bytes(data)
    return TextSource(str(tmp_path / "a.txt"))


def expected(data: bytes) -> list[bytes]:
    """The plain way."""
    result = [line.removesuffix(b"\r") for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    return [line[: text_lines.MAX_LINE] for line in result if line.strip()]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test may write into the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.mark.parametrize(
    "data",
    [
        b"one\ntwo\nthree\n",
        b"no final newline\nlast",
        b"carriage\r\nreturns\r\n\r\nlast\r\n",
        b"\n\n first\n   \n\t\n\nsecond \n\n\n",
        b"one",
        b"\xef\xbb\xbfmark\nof byte order\n",
        b"\xef\xbb\xbf\nblank first\n",
        "größe\n日本語\n\u2028still one\x85line\n".encode(),
        b"a\x00b\n\x00\x00\x00\n\xff\xfe\xfd\n",
        b"vertical\vtab\fand form feed\n\v\f\n",
    ],
)
def test_lines_of_all_kinds(tmp_path: Path, data: bytes) -> None:
    source = source_of(tmp_path, data)
    assert lines(source) == expected(data) != []
    assert source.modalities == ("text",) and source.classes == ()
    assert source.report.examples == len(source) and source.report.skipped == {}


@pytest.mark.parametrize("seed", range(40))
def test_blocks_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(text_lines, "_BLOCK", int(rng.integers(1, 12)))
    data = bytes(rng.choice(list(b"ab \r\n\n\t\0\xc3"), int(rng.integers(1, 80))))
    data = b"begin" + data if seed % 2 else data + b"end"
    source = source_of(tmp_path, data)
    assert lines(source) == expected(data)
    order = rng.integers(0, len(source), 20)
    assert [r["caption"] for r in source.read(order)] == [expected(data)[i] for i in order]
    assert source.read(np.array([], np.int64)) == []


def test_long_lines_are_cut(tmp_path: Path) -> None:
    long = b"x" * (text_lines.MAX_LINE + 7)
    exact = b"y" * text_lines.MAX_LINE
    assert lines(source_of(tmp_path, long + b"\nshort\n" + exact + b"\n" + long)) == [
        long[:-7],
        b"short",
        exact,
        long[:-7],
    ]


def test_several_files_in_order(tmp_path: Path) -> None:
    for name, data in {"b.txt": b"3\n4\n", "a.txt": b"1\n\n2", "empty.txt": b"", "other.md": b"no\n"}.items():
        (tmp_path / name).write_bytes(data)
    assert lines(TextSource(str(tmp_path))) == [b"1", b"2", b"3", b"4"]
    both = TextSource(f"{tmp_path}/b.txt,{tmp_path}/a.txt")
    assert lines(both) == [b"3", b"4", b"1", b"2"]
    assert lines(TextSource(f"{tmp_path}/?.txt")) == [b"1", b"2", b"3", b"4"]
    assert lines(TextSource(f"{tmp_path}/other.md")) == [b"no"]
    assert TextSource(str(tmp_path)).fingerprint != both.fingerprint


def test_a_store_is_read_as_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo")
    tf.io.gfile.copy(str(tmp_path / "a.txt"), "ram://text_lines/a.txt", overwrite=True)
    source = TextSource("ram://text_lines")
    assert lines(source) == [b"one", b"two"]
    assert source.fingerprint == TextSource(str(tmp_path)).fingerprint


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "two\nlines".encode("utf-16"), "iconv -f UTF-16 -t UTF-8 {0}/a.txt > {0}/a.utf8.txt"),
        ("a.txt", "two".encode("utf-16-be").join([b"\xfe\xff", b""]), "a.txt is UTF-16, not UTF-8"),
        ("a.txt", "two\nlines".encode("utf-32"), "iconv -f UTF-32 "),
        ("a.txt", gzip.compress(b"text\n", mtime=0), "run: mv {0}/a.txt {0}/a.txt.gz && gunzip -k {0}/a.txt.gz"),
        ("a.txt.gz", gzip.compress(b"text\n", mtime=0), "run: gunzip -k {0}/a.txt.gz"),
        ("a.txt", b"\n  \r\n", "holds no line that is not blank"),
        ("a.txt", b"", "holds no line that is not blank"),
        ("a.md", b"text\n", "no such file; it takes a folder of .txt files"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        TextSource(str(tmp_path))
    assert message.format(tmp_path) in str(error.value)
    assert "data.*.path" in str(error.value) and "\n" not in str(error.value)


def test_index_is_reused_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"".join(b"line %d\n" % i for i in range(10_000)))
    first = TextSource(str(tmp_path))
    index = tmp_path / ".m3ae_jax_index_text.npz"
    assert index.stat().st_size < 8 * 10_000 + 4096

    def fail(path: str) -> None:
        raise AssertionError(f"{path} was scanned")

    with monkeypatch.context() as patch:
        patch.setattr(text_lines, "_scan", fail)
        again = TextSource(str(tmp_path))
    assert again.fingerprint == first.fingerprint and lines(again) == lines(first)
    (tmp_path / "a.txt").write_bytes(b"other\n")
    changed = TextSource(str(tmp_path), SourceOptions())
    assert lines(changed) == [b"other"] and changed.fingerprint != first.fingerprint


def test_a_file_shortened_later_is_an_os_error(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"one\ntwo\nthree\n")
    (tmp_path / "a.txt").write_bytes(b"one\n")
    with pytest.raises(OSError, match=r"a\.txt: shorter than when it was indexed"):
        source.read(np.array([2]))


def test_threads_read_at_once(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"".join(b"line %d\n" % i for i in range(1000)))

    def work(seed: int) -> bool:
        order = np.random.default_rng(seed).integers(0, 1000, 500)
        return [r["caption"] for r in source.read(order)] == [b"line %d" % i for i in order]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_a_million_lines_index_in_a_second(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes(b"a line of text, and some more\n  \n" * 500_000)
    with caplog.at_level(logging.INFO, "m3ae_jax"):
        source = TextSource(str(tmp_path))
    assert len(source) == 500_000
    result = next(record for record in caplog.records if "indexed 1 files" in record.getMessage())
    assert result.args[3] < 5  # type: ignore[index,operator]  # seconds; some 0.1 on an idle core
