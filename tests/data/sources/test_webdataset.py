"""WebDatasetSource: indexing, pairing, damage, paths. The source never decodes, so a picture is any bytes."""

from __future__ import annotations

import gzip
import io
import logging
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from m3ae_jax.data.sources import files, index, webdataset
from m3ae_jax.data.sources.base import Source, SourceOptions
from m3ae_jax.data.sources.webdataset import WebDatasetSource
from m3ae_jax.errors import UserError

SHARED = Path(__file__).parents[4] / "shared" / "data"

Member = tuple[str, bytes]


def write_tar(path: Path, members: Iterable[Member | tarfile.TarInfo], **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def sample(key: str, caption: str | None = None) -> list[Member]:
    """A picture and a caption that tell which key they are of."""
    text = caption if caption is not None else f"caption of {key}"
    return [(f"{key}.jpg", f"picture of {key}".encode()), (f"{key}.txt", text.encode())]


def everything(source: WebDatasetSource) -> list[tuple[bytes, bytes]]:
    records = source.read(np.arange(len(source)))
    return [(record["image"], record["caption"]) for record in records]


def pairs(*keys: str) -> list[tuple[bytes, bytes]]:
    return [(f"picture of {key}".encode(), f"caption of {key}".encode()) for key in keys]


def read_one(tmp_path: Path, members: Sequence[Member | tarfile.TarInfo], **options: int) -> WebDatasetSource:
    return WebDatasetSource(str(write_tar(tmp_path / "one.tar", members, **options)))


def three_shards(folder: Path, per_shard: int = 5) -> list[str]:
    """Writes 00000.tar to 00002.tar; returns the keys in order."""
    keys = [f"{shard:05d}{i:04d}" for shard in range(3) for i in range(per_shard)]
    for shard in range(3):
        members = [m for key in keys if key.startswith(f"{shard:05d}") for m in sample(key)]
        write_tar(folder / f"{shard:05d}.tar", members)
    return keys


@pytest.fixture
def no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise AssertionError(f"{path} was scanned")

    monkeypatch.setattr(webdataset, "_scan", fail)


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards scanned so far."""
    names: list[str] = []
    scan = webdataset._scan

    def record(path: str) -> index.Shard:
        names.append(os.path.basename(path))
        return scan(path)

    monkeypatch.setattr(webdataset, "_scan", record)
    return names


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test may write into the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


# --- reading -----------------------------------------------------------------------------------------------


def test_reads_all_in_order(tmp_path: Path) -> None:
    keys = three_shards(tmp_path)
    source: Source = WebDatasetSource(str(tmp_path))
    assert source.modalities == ("image", "text")
    assert len(source) == 15
    assert everything(source) == pairs(*keys)  # type: ignore[arg-type]
    assert source.report == index.IndexReport(3, 15, {}, {})  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(5))
def test_any_indices_give_their_own_pairs(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys = []
    for shard in range(4):  # of unequal lengths, one without any example
        of_shard = [f"{shard}-{i}" for i in range(rng.integers(0, 9) if shard != 2 else 0)]
        pad = ("readme.md", rng.bytes(int(rng.integers(0, 2000))))
        write_tar(tmp_path / f"{shard}.tar", [pad, *(m for key in of_shard for m in sample(key))])
        keys += of_shard
    write_tar(tmp_path / "9.tar", sample("last"))
    expected = pairs(*keys, "last")
    source = WebDatasetSource(str(tmp_path))
    order = rng.permutation(np.repeat(np.arange(len(expected)), 2))
    records = source.read(order)
    assert [(r["image"], r["caption"]) for r in records] == [expected[i] for i in order]
    assert source.read(np.array([], np.int64)) == []


def test_threads_read_at_once_with_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MAX_OPEN", 1)
    expected = pairs(*three_shards(tmp_path, per_shard=20))
    source = WebDatasetSource(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    barrier = threading.Barrier(4)

    def work(seed: int) -> bool:
        barrier.wait()
        order = np.random.default_rng(seed).integers(0, len(source), 500)
        return [(r["image"], r["caption"]) for r in source.read(order)] == [expected[i] for i in order]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_shard_shortened_later_is_an_os_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample("0") + sample("1"))
    source = WebDatasetSource(str(path))
    os.truncate(path, 700)
    with pytest.raises(OSError, match=r"a\.tar: shorter than when it was indexed"):
        source.read(np.array([1]))


@pytest.mark.parametrize(
    ("members", "caption"),
    [
        ([("a.txt", b"text"), ("a.json", b'{"caption": "json"}')], b"text"),
        ([("a.txt", b""), ("a.json", b'{"caption": "json"}')], b"json"),
        ([("a.json", b'{"caption": "json"}')], b"json"),
        ([("a.json", '{"caption": "ümläut"}'.encode())], "ümläut".encode()),
        ([("a.json", rb'{"caption": "lone \ud800 surrogate"}')], b"lone ? surrogate"),
        ([("a.json", b'{"caption": 3}')], b""),
        ([("a.json", b'{"caption": null}')], b""),
        ([("a.json", b'{"other": "x"}')], b""),
        ([("a.json", b'["caption"]')], b""),
        ([("a.json", b"{broken")], b""),
        ([("a.json", b'{"caption": "\xff"}')], b""),
        ([("a.json", b"[" * 100_000)], b""),
        ([("a.txt", b"")], b""),
        ([("a.txt", b"caf\xe9 \x00")], b"caf\xe9 \x00"),
    ],
)
def test_caption(tmp_path: Path, members: list[Member], caption: bytes) -> None:
    assert everything(read_one(tmp_path, [("a.jpg", b"picture"), *members])) == [(b"picture", caption)]


@pytest.mark.parametrize("captions", ["draw", "all"])
def test_several_captions_of_a_json(tmp_path: Path, captions: str) -> None:
    members = [("a.jpg", b"A"), ("a.json", b'{"caption": ["one", 2, "three"]}'), *sample("b"), ("c.png", b"C")]
    path = write_tar(tmp_path / "0.tar", [*members, ("c.json", b'{"caption": []}')])
    source = WebDatasetSource(str(path), SourceOptions(captions=captions))
    b = (b"picture of b", b"caption of b")
    if captions == "all":
        assert everything(source) == [(b"A", b"one"), (b"A", b"three"), b, (b"C", b"")]
    else:
        assert everything(source) == [(b"A", b"one"), b, (b"C", b"")]
        assert source.read(np.array([0]))[0]["captions"] == (b"one", b"three")


def test_caption_key(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"i"), ("a.json", b'{"caption": "c", "alt": "other"}')])
    source = WebDatasetSource(str(path), SourceOptions(caption_key="alt"))
    assert everything(source) == [(b"i", b"other")]
    assert source.fingerprint != WebDatasetSource(str(path)).fingerprint


# --- pairing -----------------------------------------------------------------------------------------------


def test_missing_halves_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [*sample("a"), ("b.jpg", b"i"), ("c.txt", b"t"), ("d.png", b"i"), *sample("e")]
    with caplog.at_level(logging.INFO, "m3ae_jax"):
        source = read_one(tmp_path, members)
        WebDatasetSource(str(tmp_path / "one.tar"))  # reads the index: says nothing again
    assert everything(source) == pairs("a", "e")
    assert source.report.skipped == {"no caption": 2, "no image": 1}
    assert source.report.samples == {"no caption": "one.tar:b.jpg", "no image": "one.tar:c.txt"}
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert lines == ["webdataset: left out: no caption 2 (e.g. one.tar:b.jpg), no image 1 (e.g. one.tar:c.txt)"]
    assert sum("indexed 1 files, 2 examples" in r.getMessage() for r in caplog.records) == 1


def test_keys_and_extensions(tmp_path: Path) -> None:
    members = [
        ("v1.0/a.seg.png", b"a mask, no picture"),
        *sample("v1.0/a"),
        ("v1.0/b.JPEG", b"picture of b"),
        ("v1.0/b.Txt", b"caption of b"),
        ("./c.webp", b"picture of c"),
        ("./c.png", b"a second picture"),
        ("./c.txt", b"caption of c"),
        ("v1.0/.jpg", b"no key"),
        ("v1.0/.txt", b"no key"),
        ("._d.jpg", b"AppleDouble"),
        ("v2.0/a.jpg", b"picture of v2.0/a"),
        ("v2.0/a.txt", b"caption of v2.0/a"),
        ("jpg", b"no extension"),
    ]
    source = read_one(tmp_path, members)
    assert everything(source) == pairs("v1.0/a", "b", "c", "v2.0/a")
    assert source.report.skipped == {}


def test_ungrouped_keys_are_paired_by_key_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members: list[Member] = [m for key in "abc" for m in sample(key)]
    members.sort(key=lambda member: member[0][-3:])
    source = read_one(tmp_path, members)
    assert everything(source) == pairs("a", "b", "c")
    assert "keys are not grouped in 1 shards (e.g. one.tar)" in caplog.text


def versions(key: str, *numbers: int) -> list[Member]:
    return [m for n in numbers for m in [(f"{key}.jpg", b"i%d" % n), (f"{key}.txt", b"t%d" % n)]]


@pytest.mark.parametrize(
    ("members", "pairs_used", "duplicates"),
    [
        (versions("a", 1, 2, 3), [(b"i1", b"t1")], 2),
        (versions("a", 1) + sample("b") + versions("a", 2), [(b"i1", b"t1"), *pairs("b")], 1),
        # the first sample has no caption: the second is the first whole one
        ([("a.jpg", b"i1"), *sample("b"), *versions("a", 2)], [*pairs("b"), (b"i2", b"t2")], 1),
        ([("a.jpg", b"i1"), *versions("a", 2), *sample("b")], [(b"i2", b"t2"), *pairs("b")], 1),
        # not the same extension, but two samples all the same
        ([("a.png", b"i1"), *sample("b"), *versions("a", 2)], [*pairs("b"), (b"i2", b"t2")], 1),
        # which picture is the caption's of two? none is kept
        (
            [("a.jpg", b"i1"), ("a.jpg", b"i2"), ("a.txt", b"t1"), ("a.txt", b"t2"), *sample("b")],
            pairs("b"),
            2,
        ),
        # here i2 and t1 are neighbours, of different samples
        (
            [
                ("b.jpg", b"picture of b"),
                ("a.jpg", b"i1"),
                ("a.jpg", b"i2"),
                ("a.txt", b"t1"),
                ("b.txt", b"caption of b"),
                ("a.txt", b"t2"),
            ],
            pairs("b"),
            2,
        ),
        (
            [
                ("a.jpg", b"i1"),
                ("b.jpg", b"picture of b"),
                ("a.jpg", b"i2"),
                ("a.txt", b"t1"),
                ("b.txt", b"caption of b"),
            ],
            pairs("b"),
            2,
        ),
    ],
)
def test_duplicate_keys_never_mix(
    tmp_path: Path, members: list[Member], pairs_used: list[tuple[bytes, bytes]], duplicates: int
) -> None:
    source = read_one(tmp_path, members)
    assert everything(source) == pairs_used
    assert source.report.skipped == {"duplicate key": duplicates}
    assert source.report.samples["duplicate key"].startswith("one.tar:a.")


@pytest.mark.parametrize("seed", range(20))
def test_no_shuffle_of_members_ever_mixes_samples(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [versions(f"k{rng.integers(0, 4)}", n) for n in range(8)] + [versions("sure", 99)]
    order = rng.permutation(len(samples))
    members = [m for i in order for m in samples[i]]
    if seed % 2:  # `tar --sort` by type: nothing but the key tells what belongs together
        members.sort(key=lambda m: m[0][-3:])
    source = read_one(tmp_path, members)
    for image, caption in everything(source):
        assert image[1:] == caption[1:]
    pictures = sum(name.endswith(".jpg") for name, _ in members)
    assert len(source) + source.report.skipped.get("duplicate key", 0) == pictures


# --- what is in a tar --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, format_: int) -> None:
    keys = ["d" * 90 + "/" + "k" * 80, "e" * 140 + "/x", "short"]
    if format_ != tarfile.USTAR_FORMAT:
        keys += ["f" * 300 + "/x", "日本語/ключ", "g" * 95]
    source = read_one(tmp_path, [m for key in keys for m in sample(key)], format=format_)
    assert everything(source) == pairs(*keys)


def test_pax_headers_on_every_member(tmp_path: Path) -> None:
    """As the webdataset package writes them: a fractional mtime."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in sample("a") + sample("b"):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(data))
    assert everything(WebDatasetSource(str(tmp_path))) == pairs("a", "b")


def test_sizes_beyond_octal_digits_are_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 9 * 2**30
    header = info.tobuf(tarfile.GNU_FORMAT)
    assert webdataset._parse_header(header) == (b"a.jpg", 9 * 2**30, b"0")


def test_only_regular_files_count(tmp_path: Path) -> None:
    members: list[Member | tarfile.TarInfo] = [
        special("folder.jpg", tarfile.DIRTYPE),
        special("l.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        ("l.txt", b"caption of a link"),
        *sample("a"),
        special("h.jpg", tarfile.LNKTYPE, "a.jpg"),
        special("f.jpg", tarfile.FIFOTYPE),
        special("c.jpg", tarfile.CHRTYPE),
        *sample("b"),
    ]
    source = read_one(tmp_path, members)
    assert everything(source) == pairs("a", "b")
    assert source.report.skipped == {"not a regular file": 4, "no image": 1}
    assert source.report.samples["not a regular file"] == "one.tar:l.jpg"


def test_unsafe_names_are_left_out(tmp_path: Path) -> None:
    unsafe = [*sample("../../evil"), *sample("x/../../evil"), *sample("/etc/evil")]
    source = read_one(tmp_path / "in", [*unsafe, *sample("a..b"), *sample("a")])
    assert everything(source)[-1:] == pairs("a")
    assert source.report.skipped["unsafe name"] == 6
    assert source.report.samples["unsafe name"] == "one.tar:../../evil.jpg"
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_odd_names_make_printable_reports(tmp_path: Path) -> None:
    source = read_one(tmp_path, [("new\nline \udcff.jpg", b"i"), *sample("a")])
    assert source.report.samples == {"no caption": r"one.tar:new\nline \\udcff.jpg"}
    assert WebDatasetSource(str(tmp_path)).report == source.report


def test_sparse_members_are_skipped_as_tar_skips_them(tmp_path: Path) -> None:
    tar = shutil.which("tar")
    if tar is None or b"GNU" not in subprocess.check_output([tar, "--version"]):
        pytest.skip("no GNU tar here")
    for name, data in sample("a"):
        (tmp_path / name).write_bytes(data)
    with open(tmp_path / "s.jpg", "wb") as file:
        for i in range(40):  # more holes than one header's map holds
            file.seek(i * 65_536)
            file.write(b"x" * 4096)
    for format_ in ("gnu", "posix"):
        command = [tar, f"--format={format_}", "-S", "-cf", f"{format_}.tar", "s.jpg", "a.jpg", "a.txt"]
        subprocess.run(command, cwd=tmp_path, check=True)
        source = WebDatasetSource(str(tmp_path / f"{format_}.tar"))
        assert everything(source) == pairs("a")
        with tarfile.open(tmp_path / f"{format_}.tar") as archive:
            sparse = archive.getmembers()[0].issparse()
        assert source.report.skipped == ({"not a regular file": 1} if sparse else {"no caption": 1})


# --- damage ------------------------------------------------------------------------------------------------


def test_cut_anywhere_gives_the_whole_pairs_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ["a", "b", "c"]
    whole = write_tar(tmp_path / "whole.tar", [m for key in keys for m in sample(key)]).read_bytes()
    write_tar(tmp_path / "z.tar", sample("z"))
    for cut in [0, 600, 1024, 1500, 2048, 2049, 2600, 3000, 3100, 4096, 6144]:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        caplog.clear()
        source = WebDatasetSource(f"{tmp_path / 'cut.tar'},{tmp_path / 'z.tar'}")
        # a pair takes 4 blocks of 512 bytes, the last one's data about 20 of its own
        complete = sum(cut >= 2048 * (i + 1) - 512 + len(f"caption of {k}") for i, k in enumerate(keys))
        assert everything(source) == pairs(*keys[:complete], "z"), cut
        assert source.report.skipped["damaged shard"] == 1
        assert "cut.tar: cut off" in caplog.text


def test_a_damaged_header_ends_its_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = bytearray(write_tar(tmp_path / "a.tar", sample("a") + sample("b")).read_bytes())
    data[2048 + 3] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    source = WebDatasetSource(str(tmp_path))
    assert everything(source) == pairs("a")
    assert "a.tar: a damaged header; the whole pairs before that are used" in caplog.text


@pytest.mark.parametrize("seed", range(3))
def test_noise_never_breaks_the_process(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    members = [m for i in range(4) for m in sample(f"é{i}" * 60)]
    good = write_tar(tmp_path / "good.tar", members, format=tarfile.PAX_FORMAT).read_bytes()
    for _ in range(60):
        data = bytearray(good)
        for at in rng.integers(512, len(good) // 2, 20):
            data[at] = rng.integers(0, 256)
        (tmp_path / "noisy.tar").write_bytes(data)
        shard = webdataset._scan(str(tmp_path / "noisy.tar"))
        assert ((shard.rows[:, :4] >= 0).all()) and (shard.rows[:, :4].max(initial=0) < len(good))


@pytest.mark.parametrize("record", [b"7 size=x\n", b"0 path=a\n", b"28 size=9999999999999999999\n", b"9" * 30])
def test_damaged_pax_records(record: bytes) -> None:
    if record.startswith(b"9"):
        assert webdataset._parse_pax(record) == {}
    else:
        with pytest.raises(webdataset._Damaged):
            webdataset._parse_pax(record)


# --- paths -------------------------------------------------------------------------------------------------


def test_forms_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pairs(*three_shards(tmp_path / "a", 1)), pairs("odd, name")
    odd = write_tar(tmp_path / "b, c" / "x[1].tar", sample("odd, name"))
    monkeypatch.chdir(tmp_path)
    a = str(tmp_path / "a")
    for path, expected in {
        a: first,
        f"{a}/": first,
        "a": first,
        f"{a}/*.tar": first,
        f"{a}/0000[12].tar": first[1:],
        f"{a}/{{00000..00002}}.tar": first,
        f"{a}/{{00001..00001}}.tar": first[1:2],
        f"{a}/000{{0..0}}{{1..2}}.tar": first[1:],
        f"{a}/00002.tar, {a}/00000.tar": [first[2], first[0]],
        f"{a}/00002.tar,{a}": [first[2], first[0], first[1]],
        str(odd): second,
        str(tmp_path / "b, c"): second,
        f"{a[:-1]}?": first,
    }.items():
        assert everything(WebDatasetSource(path)) == expected, path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "data.*.path='{}/nowhere': no such file; it takes a folder of .tar shards"),
        ("wdss", "; did you mean '{}/wds'?"),
        ("wds", "; did you mean '{}/wds/train'?"),
        ("wds/train/*.tra", "no such file"),
        ("wds/train/{{00000..00003}}.tar", "no such file (00003.tar of its range)"),
        ("wds/train/{{00003..00000}}.tar", "no such file"),
        ("wds/train,", "data.*.path='': no such file"),
        ("note.txt", "{}/note.txt is not a tar file"),
        ("packed", "run: gunzip -k {}/packed/00000.tar.gz"),
        ("packed/00000.tar.gz", "run: gunzip -k {}/packed/00000.tar.gz"),
        ("sly.tar", "run: mv {0}/sly.tar {0}/sly.tar.gz && gunzip -k {0}/sly.tar.gz"),
        ("empty.tar", "holds no KEY.jpg (png, ...) with a KEY.txt or KEY.json"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, path: str, message: str) -> None:
    three_shards(tmp_path / "wds" / "train", 1)
    (tmp_path / "note.txt").write_text("<html>404</html>")
    write_tar(tmp_path / "empty.tar", [])
    packed = gzip.compress((tmp_path / "empty.tar").read_bytes())
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "00000.tar.gz").write_bytes(packed)
    (tmp_path / "sly.tar").write_bytes(packed)
    with pytest.raises(UserError) as error:
        WebDatasetSource(f"{tmp_path}/{path.format()}")
    assert message.format(tmp_path) in str(error.value)
    assert "data.*.path" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "problem"),
    [("https://h/a.tar", "cannot be listed: .*'https' not implemented"), ("pipe:cat a", "a stream allows no random")],
)
def test_other_paths_are_refused(path: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        WebDatasetSource(path)


def test_a_store_is_read_as_a_folder(tmp_path: Path, cache: Path) -> None:
    keys = three_shards(tmp_path)
    for name in os.listdir(tmp_path):  # ram:// is TensorFlow's own store in memory
        tf.io.gfile.copy(str(tmp_path / name), f"ram://shards/{name}", overwrite=True)
    for path in ("ram://shards", "ram://shards/*.tar", "ram://shards/{00000..00002}.tar"):
        source = WebDatasetSource(path)
        assert everything(source) == pairs(*keys)  # type: ignore[arg-type]
    assert len(list(cache.rglob("*.npz"))) == 1
    with pytest.raises(UserError, match="no such file"):
        WebDatasetSource("ram://shards/absent.tar")


def test_pictures_alone_and_texts_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "i" / "0.tar", [("a.jpg", b"A"), ("a.cls", b"3"), ("b.png", b"B")])
    write_tar(tmp_path / "i" / "1.tar", [("c.jpg", b"C")])
    write_tar(tmp_path / "t" / "0.tar", [("a.txt", b"one"), ("b.json", b'{"caption": ["two", "three"]}')])
    pictures, texts = WebDatasetSource(str(tmp_path / "i")), WebDatasetSource(str(tmp_path / "t"))
    assert pictures.modalities == ("image",) and texts.modalities == ("text",)
    assert pictures.read(np.arange(3)) == [{"image": b"A"}, {"image": b"B"}, {"image": b"C"}]
    assert texts.read(np.arange(2)) == [
        {"caption": b"one"},
        {"caption": b"two", "captions": (b"two", b"three")},
    ]
    assert not pictures.report.skipped and not texts.report.skipped
    write_tar(tmp_path / "i" / "2.tar", sample("d"))  # one pair, and the others are halves
    assert everything(WebDatasetSource(str(tmp_path / "i"))) == pairs("d")  # type: ignore[arg-type]


def test_bad_shards_are_left_out_beside_good_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = three_shards(tmp_path)
    (tmp_path / "8.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "9.tar").write_bytes(gzip.compress(b"x" * 2000))
    (tmp_path / "7.tar").mkdir()
    (tmp_path / "6.tar").symlink_to(tmp_path / "nowhere")
    (tmp_path / "._0.tar").write_bytes(b"\0\5\x16\7")
    with caplog.at_level(logging.WARNING):
        source = WebDatasetSource(str(tmp_path))
    assert everything(source) == pairs(*keys)  # type: ignore[arg-type]
    assert source.report.skipped == {"unusable file": 4}
    assert any("gunzip" in r.getMessage() for r in caplog.records)
    with pytest.raises(UserError, match="is not a tar file"):
        WebDatasetSource(str(tmp_path / "8.tar"))


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_index_is_built_anew(tmp_path: Path, seed: int) -> None:
    keys = three_shards(tmp_path)
    WebDatasetSource(str(tmp_path))
    place, rng = tmp_path / ".m3ae_jax_index.npz", np.random.default_rng(seed)
    data = bytearray(place.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    place.write_bytes(data)
    assert everything(WebDatasetSource(str(tmp_path))) == pairs(*keys)  # type: ignore[arg-type]


# --- the index file ----------------------------------------------------------------------------------------


def test_index_is_reused(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    keys = three_shards(tmp_path)
    write_tar(tmp_path / "00003.tar", [("x.jpg", b"")])
    first = WebDatasetSource(str(tmp_path))
    assert (tmp_path / ".m3ae_jax_index.npz").is_file()
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))
    request.getfixturevalue("no_scan")
    again = WebDatasetSource(str(tmp_path))
    assert everything(again) == pairs(*keys)
    assert (again.fingerprint, again.report) == (first.fingerprint, first.report)
    part = WebDatasetSource(str(tmp_path / "{00001..00002}.tar"))  # a part of an indexed folder
    assert everything(part) == pairs(*keys[5:])
    assert part.fingerprint != first.fingerprint


def test_only_changed_shards_are_scanned_again(tmp_path: Path, scanned: list[str]) -> None:
    three_shards(tmp_path, 1)
    first = WebDatasetSource(str(tmp_path))
    assert sorted(scanned) == ["00000.tar", "00001.tar", "00002.tar"]
    scanned.clear()
    write_tar(tmp_path / "00001.tar", sample("new") + sample("more"))
    write_tar(tmp_path / "00003.tar", sample("added"))
    (tmp_path / "00002.tar").unlink()
    second = WebDatasetSource(str(tmp_path))
    assert sorted(scanned) == ["00001.tar", "00003.tar"]
    assert everything(second) == pairs("000000000", "new", "more", "added")
    assert second.fingerprint != first.fingerprint


def test_fingerprint_is_of_the_content_not_of_its_place_or_time(tmp_path: Path, scanned: list[str]) -> None:
    three_shards(tmp_path / "a")
    first = WebDatasetSource(str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns(".*"))
    for path in (tmp_path / "b").iterdir():
        os.utime(path, (1, 1))
    scanned.clear()
    assert WebDatasetSource(str(tmp_path / "b")).fingerprint == first.fingerprint
    assert len(scanned) == 3
    reverse = WebDatasetSource(",".join(str(tmp_path / "a" / f"0000{i}.tar") for i in (2, 1, 0)))
    assert reverse.fingerprint != first.fingerprint


def test_a_broken_index_is_built_anew(tmp_path: Path) -> None:
    keys = three_shards(tmp_path)
    index = tmp_path / ".m3ae_jax_index.npz"
    WebDatasetSource(str(tmp_path))
    good = index.read_bytes()
    for bad in [b"", b"not a zip", good[: len(good) // 2], good[:-30]]:
        index.write_bytes(bad)
        assert everything(WebDatasetSource(str(tmp_path))) == pairs(*keys)
        assert len(index.read_bytes()) == len(good)
    np.savez(index, version=np.array(10**6))
    assert everything(WebDatasetSource(str(tmp_path))) == pairs(*keys)


@pytest.mark.parametrize("explicit", [False, True], ids=["xdg", "cache_dir"])
def test_a_read_only_folder_falls_back_to_the_cache(
    tmp_path: Path, cache: Path, explicit: bool, scanned: list[str]
) -> None:
    folder, root = tmp_path / "shards", tmp_path / "own" if explicit else cache
    keys = three_shards(folder)
    folder.chmod(0o555)
    before = folder.stat().st_mtime_ns
    for _ in range(2):
        source = WebDatasetSource(str(folder), SourceOptions(cache_dir=str(root) if explicit else None))
        assert everything(source) == pairs(*keys)
    assert len(scanned) == 3
    assert len(list((root / "m3ae_jax" / "index").glob("*.npz"))) == 1
    assert sorted(p.name for p in folder.iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]
    assert folder.stat().st_mtime_ns == before  # nothing was there for a moment either
    folder.chmod(0o755)


def test_no_place_for_the_index_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = three_shards(tmp_path)
    (tmp_path / ".m3ae_jax_index.npz").mkdir()  # os.replace onto a folder fails, as a read-only disk does
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.INFO, "m3ae_jax"):
        source = WebDatasetSource(str(tmp_path), SourceOptions(cache_dir=str(tmp_path / "file")))
    assert everything(source) == pairs(*keys)
    assert "saved in nowhere" in caplog.text
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_one_index_per_folder_of_several(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for name in "ab":
        write_tar(tmp_path / name / "0.tar", sample(name))
    path = f"{tmp_path}/b,{tmp_path}/a"
    WebDatasetSource(path)
    request.getfixturevalue("no_scan")
    assert everything(WebDatasetSource(path)) == pairs("b", "a")
    assert everything(WebDatasetSource(f"{tmp_path}/a")) == pairs("a")


# --- real shards -------------------------------------------------------------------------------------------


def links(source: Path, target: Path) -> str:
    """Links to `source`'s tars in a folder of our own, where the index may be written."""
    if not source.is_dir():
        pytest.skip(f"{source.name}: the shared data are not here")
    target.mkdir()
    for tar in source.glob("*.tar"):
        (target / tar.name).symlink_to(tar)
    return str(target)


@pytest.mark.parametrize(("split", "examples"), [("train", 4886), ("val", 704)])
def test_openclipart(tmp_path: Path, split: str, examples: int) -> None:
    source = WebDatasetSource(links(SHARED / "openclipart" / "wds" / split, tmp_path / split))
    assert len(source) == examples
    assert source.report.skipped == {}
    for record in source.read(np.random.default_rng(0).permutation(examples)):
        assert record["image"][:3] == b"\xff\xd8\xff"
        assert record["caption"].decode()
    with tarfile.open(tmp_path / split / "00000.tar") as tar:  # the standard library reads the same
        for record in source.read(np.arange(20)):
            contents = [tar.extractfile(m).read() for m in (tar.next(), tar.next(), tar.next()) if m]  # type: ignore[union-attr]
            assert contents[0] == record["image"]
            assert contents[2] == record["caption"]


@pytest.mark.parametrize(
    ("name", "examples", "skipped"),
    [
        ("00000_ok", 20, {}),
        ("00001_truncated_middle", 11, {"damaged shard": 1}),
        ("00002_missing_txt", 20, {}),  # from their .json
        ("00004_duplicate_keys", 10, {"duplicate key": 3}),
        ("00012_interleaved", 20, {}),
    ],
)
def test_corrupt_shards(tmp_path: Path, name: str, examples: int, skipped: dict[str, int]) -> None:
    folder = links(SHARED / "corrupt" / "tar", tmp_path / "tar")
    source = WebDatasetSource(f"{folder}/{name}.tar")
    assert (len(source), source.report.skipped) == (examples, skipped)
    good = everything(WebDatasetSource(f"{folder}/00000_ok.tar"))
    assert everything(source) == good[:examples]


def test_corrupt_shards_together(tmp_path: Path) -> None:
    source = WebDatasetSource(links(SHARED / "corrupt" / "tar", tmp_path / "tar"))
    assert source.report.shards == 6 and len(source) == 20 + 11 + 20 + 10 + 20
    assert source.report.skipped["unsafe name"] == source.report.skipped["not a regular file"] == 1
