"""Files of a source: what a path names, what is told where it names nothing, and bytes at an offset from any store."""

from __future__ import annotations

import functools
import http.server
import sys
import threading
import urllib.parse
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3ae_jax.data.sources.base import SourceOptions
from m3ae_jax.data.sources.files import encoding_of, expand, open_file, write_remote
from m3ae_jax.data.sources.text_lines import TextSource
from m3ae_jax.errors import UserError

TAR = r"\.tar"
FORMS = "it takes tars"
WHEN = "Wed, 01 Jan 2020 00:00:00 GMT"


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def refusal(path: object, ending: str = TAR) -> str:
    with pytest.raises(UserError) as error:
        expand(str(path), ending, FORMS)
    message = str(error.value)
    assert message.startswith(f"data.*.path={str(path)!r}") and "\n" not in message
    return message


# -- what a path names


def test_item_10_a_range_with_gaps_names_them_all_and_the_folder(tmp_path: Path) -> None:
    there = (0, 1, 2, 4, 5, 6, 11)
    touch(tmp_path, *[f"{n:05d}.tar" for n in there])
    message = refusal(tmp_path / "{00000..00012}.tar")
    assert "no such file (00003.tar, 00007.tar to 00010.tar, 00012.tar of its range)" in message
    assert message.endswith(f"; {str(tmp_path)!r} takes the 7 files that are there")
    assert len(expand(str(tmp_path), TAR, FORMS)) == 7
    assert len(expand(f"{tmp_path}/{{00004..00006}}.tar", TAR, FORMS)) == 3


def test_gaps_of_a_range_in_the_middle_of_a_name_and_of_folders(tmp_path: Path) -> None:
    touch(tmp_path, "a-00001-of-00004.tar")
    assert "(a-00000-of-00004.tar, a-00002-of-00004.tar, a-00003-of-00004.tar of" in refusal(
        tmp_path / "a-{00000..00003}-of-00004.tar"
    )
    touch(tmp_path / "1", "0.tar", "1.tar")
    touch(tmp_path / "2", "1.tar")
    message = refusal(tmp_path / "{1..2}" / "{0..1}.tar")
    assert f"no such file ({tmp_path}/2/0.tar of its range)" in message and "takes the" not in message
    assert "(0.tar to 3.tar of its range); it takes tars" in refusal(tmp_path / "none" / "{0..3}.tar")


def test_item_2_an_empty_folder_is_called_so(tmp_path: Path) -> None:
    assert f"={str(tmp_path)!r} is an empty folder; it takes tars" in refusal(tmp_path)


def test_a_folder_without_such_files_tells_what_it_holds(tmp_path: Path) -> None:
    touch(tmp_path, "a.zip", "b.zip", "c.zip", "README", ".hidden")
    assert " holds no .tar but 3 .zip (e.g. a.zip), 1 without ending (e.g. README); it takes tars" in refusal(tmp_path)
    assert " holds no .h5 or .hdf5 but 3 .zip" in refusal(tmp_path, r"\.(h5|hdf5)")
    touch(tmp_path / "train", "0.tar")
    message = refusal(tmp_path)
    assert "1 folder (e.g. train)" in message and message.endswith(f"; did you mean {str(tmp_path / 'train')!r}?")
    touch(tmp_path, "1.a", "1.b", "2.b", "1.c")
    assert "3 .zip (e.g. a.zip), 2 .b (e.g. 1.b), 1 .a (e.g. 1.a), 3 others" in refusal(tmp_path)


def test_names_with_braces_do_not_disturb_the_message(tmp_path: Path) -> None:
    assert "no such file; it takes tars" in refusal(tmp_path / "{}{x}{0}.tar")


def test_a_glob_takes_folders_and_links_that_lead_nowhere(tmp_path: Path) -> None:
    touch(tmp_path / "d1", "0.tar", "note.txt")
    touch(tmp_path / "d2")
    (tmp_path / "d3.tar").symlink_to(tmp_path / "gone")
    assert expand(f"{tmp_path}/d*", TAR, FORMS) == [f"{tmp_path}/d1/0.tar", f"{tmp_path}/d3.tar"]


# -- stores through fsspec


@pytest.fixture
def memory() -> str:
    """An empty folder of fsspec's own store in memory."""
    pytest.importorskip("fsspec")
    return f"memory://{uuid.uuid4().hex}"


def test_item_10_fsspec_stores_are_listed_and_read(memory: str) -> None:
    for number in range(3):
        write_remote(f"{memory}/{number}.tar", bytes([number]) * 10)
    write_remote(f"{memory}/sub/9.tar", b"")
    write_remote(f"{memory}/note.txt", b"")
    names = [f"{number}.tar" for number in range(3)]
    for path in (memory, f"{memory}/", f"{memory}/*.tar", f"{memory}/{{0..2}}.tar", f"{memory}/?.tar"):
        files = expand(path, TAR, FORMS)
        assert [file.rsplit("/", 1)[1] for file in files] == names, path
        assert open_file(files[2]).read(0, 10) == bytes([2]) * 10
    assert "(3.tar of its range)" in refusal(f"{memory}/{{0..3}}.tar")
    assert "no such file" in refusal(f"{memory}/absent.tar")
    assert " holds no .h5 but 3 .tar (e.g. 0.tar), 1 .txt (e.g. note.txt), 1 folder (e.g. sub)" in refusal(
        memory, r"\.h5"
    )
    with pytest.raises(FileNotFoundError):
        open_file(f"{memory}/absent.tar")


def test_a_remote_file_changes_its_stamp_with_its_content(memory: str) -> None:
    write_remote(f"{memory}/a", b"0123456789")
    file = open_file(f"{memory}/a")
    assert file.size == 10 and file.mtime_ns == open_file(f"{memory}/a").mtime_ns > 0
    assert (file.read(2, 3), file.read_up_to(8, 5), file.read_up_to(20, 5)) == (b"234", b"89", b"")
    with pytest.raises(OSError, match="shorter than when"):
        file.read(8, 5)
    write_remote(f"{memory}/a", b"9876543210")
    assert open_file(f"{memory}/a").mtime_ns != file.mtime_ns


def test_a_source_of_an_fsspec_store_keeps_its_index_there(memory: str) -> None:
    write_remote(f"{memory}/texts/a.txt", b"one\ntwo\n")
    options = SourceOptions(index_dir=f"{memory}/index")
    for _ in range(2):
        source = TextSource(f"{memory}/texts", options)
        assert [record["caption"] for record in source.read(np.arange(2))] == [b"one", b"two"]
    assert len(expand(f"{memory}/index", r"\.npz", FORMS)) == 1


def test_whatever_a_store_raises_is_an_oserror(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    write_remote(f"{memory}/a.tar", b"0123456789")
    file = open_file(f"{memory}/a.tar")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no\ncredentials")

    for method in ("info", "cat_file", "ls", "glob"):
        monkeypatch.setattr(MemoryFileSystem, method, fail)
    with pytest.raises(OSError, match=r"a\.tar: RuntimeError: no credentials$"):
        file.read(0, 1)
    with pytest.raises(OSError, match="no credentials"):
        open_file(f"{memory}/a.tar")
    assert "cannot be listed: " in refusal(memory) and "no credentials" in refusal(f"{memory}/*.tar")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"s3://b/a\.tar needs a package: pip install 'm3ae_jax\[remote\]'"):
        expand("s3://b/a.tar", TAR, FORMS)


def test_an_unknown_scheme_is_refused() -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(UserError, match=r"s4://b/a\.tar: Protocol not known: s4"):
        expand("s4://b/a.tar", TAR, FORMS)


# -- web servers


class Handler(http.server.SimpleHTTPRequestHandler):
    """Python's own, and parts of files if `ranges` is set."""

    ranges = True
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not self.ranges or not asked or not path.is_file():
            return super().do_GET()
        first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        part = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{path.stat().st_size}")
        self.end_headers()
        self.wfile.write(part)
        return None

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class WithoutRanges(Handler):
    ranges = False


class Bucket(Handler):
    """As much of S3 as s3fs asks for: the objects are the files of a folder, the bucket is a folder in it."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        path = Path(self.translate_path(self.path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(200)

    def do_GET(self) -> None:
        address = urllib.parse.urlparse(self.path)
        query = urllib.parse.parse_qs(address.query)
        path = Path(self.translate_path(self.path))
        if "list-type" in query:
            return self.answer(200, listing(path, query.get("prefix", [""])[0]))
        if not path.is_file():
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = path.read_bytes()[int(first) : int(last) + 1 if last else None]
        return self.answer(206 if last else 200, part, **{"ETag": '"1"', "Last-Modified": WHEN})

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def listing(bucket: Path, prefix: str) -> bytes:
    inside = sorted((bucket / prefix).iterdir()) if (bucket / prefix).is_dir() else []
    files = "".join(
        f"<Contents><Key>{prefix}{one.name}</Key><Size>{one.stat().st_size}</Size><ETag>1</ETag>"
        "<LastModified>2020-01-01T00:00:00.000Z</LastModified></Contents>"
        for one in inside
        if one.is_file()
    )
    folders = "".join(
        f"<CommonPrefixes><Prefix>{prefix}{one.name}/</Prefix></CommonPrefixes>" for one in inside if one.is_dir()
    )
    return f"<ListBucketResult><KeyCount>{len(inside)}</KeyCount>{files}{folders}</ListBucketResult>".encode()


@pytest.fixture(params=[Handler])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a server of `tmp_path`."""
    pytest.importorskip("aiohttp")
    handler = functools.partial(request.param, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


def test_item_10_web_servers_are_listed_and_read(server: str, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(300_000)
    touch(tmp_path / "shards", "0.tar", "2.tar", "note.txt")
    (tmp_path / "shards" / "1.tar").write_bytes(content)
    names = ["0.tar", "1.tar", "2.tar"]
    for path in ("shards", "shards/", "shards/*.tar", "shards/{0..2}.tar"):
        files = expand(f"{server}/{path}", TAR, FORMS)
        assert [file.rsplit("/", 1)[1] for file in files] == names, path
    file = open_file(files[1])
    assert file.size == len(content) and file.mtime_ns > 0
    with ThreadPoolExecutor(8) as pool:
        offsets = list(range(0, 299_000, 5_000))
        assert list(pool.map(lambda offset: file.read(offset, 700), offsets)) == [content[o : o + 700] for o in offsets]
    assert file.read_up_to(299_990, 100) == content[-10:] and file.read_up_to(300_000, 1) == b""
    assert "(3.tar of its range)" in refusal(f"{server}/shards/{{0..3}}.tar")
    assert "no such file" in refusal(f"{server}/absent.tar") and "no such file" in refusal(f"{server}/absent")
    assert " holds no .h5 but 3 .tar (e.g. 0.tar), 1 .txt" in refusal(f"{server}/shards", r"\.h5")


def test_a_source_is_read_from_a_web_server(server: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n")
    source = TextSource(f"{server}/a.txt", SourceOptions(index_dir=str(tmp_path / "index")))
    assert [record["caption"] for record in source.read(np.arange(2))] == [b"one", b"two"]


@pytest.mark.parametrize("server", [WithoutRanges], indirect=True)
def test_a_server_that_gives_no_parts_of_files_is_told_in_one_line(server: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(100_000))
    with pytest.raises(OSError, match=r"a\.tar: the server gives no parts of a file, which random access needs"):
        open_file(f"{server}/a.tar").read(50_000, 100)


@pytest.mark.parametrize("server", [Bucket], indirect=True)
def test_item_10_s3_is_listed_read_and_written(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    import fsspec

    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server, "key": "k", "secret": "s"})
    for number in range(3):
        write_remote(f"s3://b/texts/{number}.txt", b"line %d\n" % number)
    names = [f"s3://b/texts/{number}.txt" for number in range(3)]
    stamps = []
    for path in ("s3://b/texts", "s3://b/texts/*.txt", "s3://b/texts/{0..2}.txt"):
        assert expand(path, r"\.txt", FORMS) == names
        stamps.append([open_file(name).mtime_ns for name in names])
        fsspec.filesystem("s3").invalidate_cache()
    assert stamps[0] == stamps[1] == stamps[2]  # of a listing and of a file's own header
    assert open_file(names[1]).read(2, 4) == b"ne 1"
    assert "(3.txt, 4.txt of its range)" in refusal("s3://b/texts/{0..4}.txt", r"\.txt")
    assert "no such file" in refusal("s3://b/none")
    for _ in range(2):
        source = TextSource("s3://b/texts", SourceOptions(index_dir="s3://b/index"))
        assert source.read(np.array([2])) == [{"caption": b"line 2"}]
    assert len(list((tmp_path / "b" / "index").glob("*.npz"))) == 1


def test_a_server_that_is_not_there_is_no_missing_file() -> None:
    pytest.importorskip("aiohttp")
    assert "cannot be listed: " in refusal("http://127.0.0.1:9/a.tar")
    with pytest.raises(OSError, match="Cannot connect") as error:
        open_file("http://127.0.0.1:9/a.tar")
    assert not isinstance(error.value, FileNotFoundError)


TEXTS = (
    "красный куб\n",
    "a red cube\n",
    "größe, ÿ\r\n",
    "Ā long line of text with one letter beyond Latin 1\n",
    "the 日本 of 日本語\n",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [8, 13, 4096])
def test_encodings_without_a_byte_order_mark_are_told_by_their_nulls(text: str, size: int) -> None:
    text *= 100
    for name in ("UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"):
        if size > 13 or text.isascii():
            assert encoding_of(text.encode(name)[:size]) == name
    assert encoding_of(text.encode("utf-16")[:size]) == "UTF-16"
    assert encoding_of(text.encode("utf-32")[:size]) == "UTF-32"
    for name in ("utf-8", "utf-8-sig"):
        assert encoding_of(text.encode(name)[:size]) == ""


@pytest.mark.parametrize(
    "start", [b"", b"a", b"a\0", b"one\0two\0three\0", bytes(4096), bytes(range(256)), b"\xff\0\xfe"]
)
def test_other_bytes_are_of_no_foreign_encoding(start: bytes) -> None:
    assert encoding_of(start) == ""


def test_item_12_a_folder_that_is_there_is_not_called_missing(tmp_path: Path) -> None:
    for name in ("set1", "set2"):
        (tmp_path / name / "x").mkdir(parents=True)
    found = refusal(tmp_path / "set*")
    assert f"finds folders alone: '{tmp_path}/set1' holds no .tar but 1 folder (e.g. x)" in found
    assert ": no .tar in the folders set1, set2 of its range; " in refusal(tmp_path / "set{1..2}")
    both = refusal(tmp_path / "set{1..3}")
    assert ": no such file (set3 of its range); no .tar in the folders set1, set2 of its range; " in both
    assert "no such file" in refusal(tmp_path / "other*")
