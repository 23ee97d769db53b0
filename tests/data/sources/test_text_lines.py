"""TextSource: lines of any files, how they are found across blocks, what is refused."""

from __future__ import annotations

import gzip
import logging
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from m3ae_jax.data import images
from m3ae_jax.data.sources import open_format, text_lines
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
    data = bytes(rng.choice(list(b"ab \r\n\n\t\0\xc3"), int(rng.integers(1, 80))).tolist()) + b"\n"
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


def test_item_2_blank_and_cut_lines_are_counted(tmp_path: Path) -> None:
    long = b"x" * (text_lines.MAX_LINE + 1)
    exact = b"y" * text_lines.MAX_LINE
    data = b"\n" + long + b"\n  \n" + exact + b"\r\n\n\nz" + exact + b"\r\n" + exact + b"\n \t"
    (tmp_path / "b.md").write_bytes(b"no\n")
    source_of(tmp_path, data)
    for _ in range(2):
        report = TextSource(str(tmp_path)).report
        assert report.unused == {"blank line": 5, "line cut at 1 MB": 2, "file .md": 1} and report.skipped == {}
        assert report.samples["line cut at 1 MB"] == "a.txt:byte 1" and report.examples == 4


@pytest.mark.parametrize("seed", range(20))
def test_item_2_blank_lines_are_counted_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(text_lines, "_BLOCK", int(rng.integers(1, 12)))
    monkeypatch.setattr(text_lines, "MAX_LINE", 5)
    data = b"begin" + bytes(rng.choice(list(b"abcd \r\n\n\t"), int(rng.integers(1, 80))))
    lines = data.split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    unused = source_of(tmp_path, data).report.unused
    assert unused.get("blank line", 0) == sum(not line.strip() for line in lines)
    cut = [line for line in lines if line.strip() and len(line.removesuffix(b"\r")) > 5]
    assert unused.get("line cut at 1 MB", 0) == len(cut)


def test_item_1_options_that_are_not_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n")
    for option in ({"caption_key": "text"}, {"captions": "all"}, {"template": "a {}"}, {"split": "test"}):
        with pytest.raises(UserError, match=r"the format text does not read it; it takes none of these options"):
            open_format("text", str(tmp_path), SourceOptions(**option), "data.train.")  # type: ignore[arg-type]


def test_item_6_a_line_above_the_limit_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"short\nlonger than ten\n")
    source = TextSource(str(tmp_path), SourceOptions(max_bytes=10))
    assert source.read(np.arange(2)) == [{"caption": b"short"}, {"unusable": images.TOO_MANY_BYTES}]
    assert source.fingerprint != TextSource(str(tmp_path)).fingerprint


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
        ("a.txt", "two\nlines".encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8 {0}/a.txt > {0}/a.utf8.txt"),
        ("a.txt", "two\nlines".encode("utf-16-be"), "a.txt is UTF-16BE, not UTF-8; run: iconv -f UTF-16BE "),
        (
            "a.txt",
            b"one\rtwo\r",
            "alone, as of old Macs; run: tr '\\r' '\\n' < {0}/a.txt > {0}/a.lines.txt, and move a",
        ),
        ("a.txt", b"\xef\xbb\xbfone\rtwo", "with a carriage return alone"),
        ("a.txt", gzip.compress(b"text\n", mtime=0), "run: mv {0}/a.txt {0}/a.txt.gz && gunzip -k {0}/a.txt.gz"),
        ("a.txt.gz", gzip.compress(b"text\n", mtime=0), "run: gunzip -k {0}/a.txt.gz"),
        ("a.txt", b"\n  \r\n", "holds no line that is not blank"),
        ("a.txt", b"", "holds no line that is not blank"),
        ("a.md", b"text\n", "holds no .txt but 1 .md (e.g. a.md); it takes a folder of .txt files"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        TextSource(str(tmp_path))
    assert message.format(tmp_path) in str(error.value)
    assert "data.*.path" in str(error.value) and "\n" not in str(error.value)


def test_index_is_reused_and_small(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"".join(b"line %d\n" % i for i in range(10_000)))
    first = TextSource(str(tmp_path))
    (index,) = cache.glob("m3ae_jax/index/*_text.npz")
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
    with pytest.raises(OSError, match=r"a\.txt: changed since it was indexed"):
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


@pytest.mark.parametrize("data", [b"red\rblue\r", "red\nblue\n".encode("utf-16-le"), "red\nblue\n".encode("utf-16")])
def test_the_command_of_a_refusal_makes_the_file_readable(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError) as error:
        source_of(tmp_path, data)
    subprocess.run(str(error.value).partition("run: ")[2].partition(", and move")[0], shell=True, check=True)
    (tmp_path / "a.txt").unlink()
    assert lines(TextSource(str(tmp_path))) == [b"red", b"blue"]


def test_a_carriage_return_within_a_line_is_a_part_of_it(tmp_path: Path) -> None:
    assert lines(source_of(tmp_path, b"one\rtwo\nthree")) == [b"one\rtwo", b"three"]


def test_carriage_returns_alone_are_found_beyond_the_first_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_lines, "_BLOCK", 4)
    with pytest.raises(UserError, match="carriage return alone"):
        source_of(tmp_path, b"one line\rtwo")
