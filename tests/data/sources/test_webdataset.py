"""WebDatasetSource: indexing, pairing, damage, paths. The source never decodes, so a picture is any bytes."""

from __future__ import annotations

import gzip
import io
import json
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

from m3ae_jax.data.sources import base, files, index, open_format, webdataset, webdataset_shard
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
    def fail(path: str, **spec: object) -> None:
        raise AssertionError(f"{path} was scanned")

    monkeypatch.setattr(webdataset, "scan", fail)
    monkeypatch.setattr(webdataset, "scan_contents", fail)


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards scanned so far."""
    names: list[str] = []
    scan = webdataset.scan

    def record(path: str, spec: webdataset_shard.Members) -> index.Shard:
        names.append(os.path.basename(path))
        return scan(path, spec)

    monkeypatch.setattr(webdataset, "scan", record)
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
    with pytest.raises(OSError, match=r"a\.tar: changed since it was indexed; start again"):
        source.read(np.array([1]))


@pytest.mark.parametrize(
    ("members", "caption"),
    [
        ([("a.txt", b"text"), ("a.json", b'{"caption": "json"}')], b"text"),
        ([("a.txt", b""), ("a.json", b'{"caption": "json"}')], b"json"),
        ([("a.json", b'{"caption": "json"}')], b"json"),
        ([("a.json", '{"caption": "ümläut"}'.encode())], "ümläut".encode()),
        ([("a.json", rb'{"caption": "lone \ud800 surrogate"}')], b"lone ? surrogate"),
        ([("a.json", b'{"caption": 3}')], None),
        ([("a.json", b'{"caption": null}')], None),
        ([("a.json", b'{"other": "x"}')], None),
        ([("a.json", b'["caption"]')], None),
        ([("a.json", b"{broken")], None),
        ([("a.json", b'{"caption": "\xff"}')], None),
        ([("a.json", b"[" * 100_000)], None),
        ([("a.json", b'{"caption": ""}')], b""),
        ([("a.txt", b""), ("a.json", b'{"caption": null}')], None),
        ([("a.txt", b""), ("a.json", b'{"url": "x"}')], b""),
        ([("a.txt", b""), ("a.json", b"{broken")], b""),
        ([("a.txt", b"")], b""),
        ([("a.txt", b"caf\xe9 \x00")], b"caf\xe9 \x00"),
    ],
)
def test_caption(tmp_path: Path, members: list[Member], caption: bytes | None) -> None:
    """None: there is none, and the example is left out and counted."""
    source = read_one(tmp_path, [("a.jpg", b"picture"), *members, *sample("b")])
    assert everything(source) == [(b"picture", caption)] * (caption is not None) + pairs("b")
    assert source.report.skipped == ({} if caption is not None else {"no caption": 1})
    assert source.report.samples.get("no caption", "one.tar:a.jpg") == "one.tar:a.jpg"


@pytest.mark.parametrize("captions", ["draw", "all"])
def test_several_captions_of_a_json(tmp_path: Path, captions: str) -> None:
    members = [("a.jpg", b"A"), ("a.json", b'{"caption": ["one", 2, "three"]}'), *sample("b"), ("c.png", b"C")]
    path = write_tar(tmp_path / "0.tar", [*members, ("c.json", b'{"caption": []}')])
    source = WebDatasetSource(str(path), SourceOptions(captions=captions))
    b = (b"picture of b", b"caption of b")
    if captions == "all":
        assert everything(source) == [(b"A", b"one"), (b"A", b"three"), b]
    else:
        assert everything(source) == [(b"A", b"one"), b]
        assert source.read(np.array([0]))[0]["captions"] == (b"one", b"three")
    assert source.report.skipped == {"no caption": 1}


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
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]  # the run tells the report
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
    assert source.report.unused == {
        "member .seg.png": 1,
        "member .png": 1,
        "hidden member": 3,
        "member without an ending": 1,
    }
    assert source.report.samples["member .seg.png"] == "one.tar:v1.0/a.seg.png"


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
    assert source.report.skipped == {"not a regular file": 4}
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
        shard = webdataset.scan(str(tmp_path / "noisy.tar"), webdataset_shard.Members(webdataset_shard.USUAL_ROLES))
        assert ((shard.rows[:, :4] >= 0).all()) and (shard.rows[:, :4].max(initial=0) < len(good))


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


def test_a_pipe_is_refused() -> None:
    with pytest.raises(UserError, match="a stream allows no random"):
        WebDatasetSource("pipe:cat a")


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
    assert pictures.read(np.arange(3)) == [{"image": b"A", "label": 3}, {"image": b"B"}, {"image": b"C"}]
    assert pictures.classes == ("0", "1", "2", "3") and texts.classes == ()
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
    assert source.report.skipped == {"unusable file": 3} and source.report.unused == {"folder": 1}
    assert any("gunzip" in r.getMessage() for r in caplog.records)
    with pytest.raises(UserError, match="is not a tar file"):
        WebDatasetSource(str(tmp_path / "8.tar"))


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_index_is_built_anew(tmp_path: Path, cache: Path, seed: int) -> None:
    keys = three_shards(tmp_path)
    WebDatasetSource(str(tmp_path))
    (place,), rng = cache.rglob("*.npz"), np.random.default_rng(seed)
    data = bytearray(place.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    place.write_bytes(data)
    assert everything(WebDatasetSource(str(tmp_path))) == pairs(*keys)  # type: ignore[arg-type]


# --- the index file ----------------------------------------------------------------------------------------


def test_index_is_reused(tmp_path: Path, cache: Path, request: pytest.FixtureRequest) -> None:
    keys = three_shards(tmp_path)
    write_tar(tmp_path / "00003.tar", [("x.jpg", b"")])
    first = WebDatasetSource(str(tmp_path))
    (place,) = cache.rglob("*.npz")
    assert os.listdir(place.parent) == [place.name]  # nothing half written either
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


def test_a_broken_index_is_built_anew(tmp_path: Path, cache: Path) -> None:
    keys = three_shards(tmp_path)
    WebDatasetSource(str(tmp_path))
    (index,) = cache.rglob("*.npz")
    good = index.read_bytes()
    for bad in [b"", b"not a zip", good[: len(good) // 2], good[:-30]]:
        index.write_bytes(bad)
        assert everything(WebDatasetSource(str(tmp_path))) == pairs(*keys)
        assert len(index.read_bytes()) == len(good)
    np.savez(index, version=np.array(10**6))
    assert everything(WebDatasetSource(str(tmp_path))) == pairs(*keys)


@pytest.mark.parametrize("explicit", [False, True], ids=["xdg", "index_dir"])
def test_a_read_only_folder_is_indexed_once(tmp_path: Path, cache: Path, explicit: bool, scanned: list[str]) -> None:
    folder, root = tmp_path / "shards", tmp_path / "own" if explicit else cache / "m3ae_jax" / "index"
    keys = three_shards(folder)
    folder.chmod(0o555)
    before = folder.stat().st_mtime_ns
    for _ in range(2):
        source = WebDatasetSource(str(folder), SourceOptions(index_dir=str(root) if explicit else ""))
        assert everything(source) == pairs(*keys)
    assert len(scanned) == 3
    assert len(list(root.glob("*.npz"))) == 1
    assert sorted(p.name for p in folder.iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]
    assert folder.stat().st_mtime_ns == before  # nothing was there for a moment either
    folder.chmod(0o755)


def test_no_place_for_the_index_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = three_shards(tmp_path / "shards")
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.INFO, "m3ae_jax"):
        source = WebDatasetSource(str(tmp_path / "shards"), SourceOptions(index_dir=str(tmp_path / "file")))
    assert everything(source) == pairs(*keys)
    assert "saved in nowhere" in caplog.text


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
    for shard in source.glob("*.tar"):
        (target / shard.name).symlink_to(shard)
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


# --- other people's data (issue 19) ------------------------------------------------------------------------


def with_json(*values: object, key: str = "caption") -> list[Member]:
    """A picture and a .json for each value; `ABSENT` leaves the field out."""
    members = []
    for number, value in enumerate(values):
        fields = {"url": "http://x"} | ({} if value is ABSENT else {key: value})
        members += [(f"{number}.jpg", b"i%d" % number), (f"{number}.json", json.dumps(fields).encode())]
    return members


ABSENT = object()


def test_item_1_the_usual_caption_keys_are_tried(tmp_path: Path) -> None:
    members = [("i.jpg", b"i"), ("i.json", b'{"TEXT": "red 0", "text": "r 0"}')]
    assert everything(read_one(tmp_path, members)) == [(b"i", b"r 0")]
    for key in base.USUAL_KEYS["caption"]:
        source = read_one(tmp_path / key.replace("/", "_"), with_json("one", ["two", "three"], key=key))
        assert everything(source) == [(b"i0", b"one"), (b"i1", b"two")]
        assert source.report.unused == {"json field url": 2}


def test_item_1_a_mistyped_caption_key_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", with_json("red", "blue", key="text"))
    message = r"caption_key='txet': .* has only text, url; did you mean 'text'\?"
    with pytest.raises(UserError, match=message):
        WebDatasetSource(str(tmp_path), SourceOptions(caption_key="txet"))
    write_tar(tmp_path / "t" / "0.tar", sample("a"))
    with pytest.raises(UserError, match=r"caption_key='caption': .* has only \.txt"):
        WebDatasetSource(str(tmp_path / "t"), SourceOptions(caption_key="caption"))


def test_item_1_null_and_absent_captions_are_counted_and_no_empty_ones(tmp_path: Path) -> None:
    source = read_one(tmp_path, [*with_json("a", None, ABSENT, 3, [], [None], "", [None, "b"]), *sample("t")])
    assert everything(source) == [(b"i0", b"a"), (b"i6", b""), (b"i7", b"b"), *pairs("t")]
    assert source.report.skipped == {"no caption": 5} and source.report.samples["no caption"] == "one.tar:1.jpg"
    again = WebDatasetSource(str(tmp_path / "one.tar"))
    assert again.report == source.report and again.fingerprint == source.fingerprint


def test_item_1_a_named_key_without_any_caption_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", with_json(None, None))
    with pytest.raises(UserError, match=r"left out: no caption 2 \(e\.g\. 0\.tar:0\.jpg\)"):
        WebDatasetSource(str(path), SourceOptions(caption_key="caption"))
    assert WebDatasetSource(str(path)).modalities == ("image",)


def test_item_1_without_any_caption_there_are_pictures_alone_and_the_fields_are_named(tmp_path: Path) -> None:
    source = read_one(tmp_path, with_json(*["words"] * 70, key="my own key"))
    assert source.modalities == ("image",) and len(source) == 70
    assert source.report.skipped == {}
    assert source.report.unused == {"json field my own key": 70, "json field url": 70}
    assert source.report.samples["json field url"] == "one.tar:0.json"
    named = WebDatasetSource(str(tmp_path / "one.tar"), SourceOptions(caption_key="my own key"))
    assert named.modalities == ("image", "text") and named.read(np.array([69]))[0]["caption"] == b"words"


def test_item_1_beside_a_txt_no_json_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [m for key in "ab" for m in [*sample(key), (f"{key}.json", b'{"caption": "json", "url": "x"}')]]
    path = write_tar(tmp_path / "0.tar", members)
    monkeypatch.setattr(webdataset, "scan_contents", lambda *_, **__: pytest.fail("reads"))
    source = WebDatasetSource(str(path))
    assert everything(source) == pairs("a", "b") and source.report.unused == {"member .json": 2}
    monkeypatch.undo()
    named = WebDatasetSource(str(path), SourceOptions(caption_key="caption"))
    assert [caption for _, caption in everything(named)] == [b"json"] * 2
    assert named.report.unused == {"member .txt": 2, "json field url": 2}
    assert named.fingerprint != source.fingerprint


def test_item_1_options_of_other_layouts_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", with_json("a"))
    for options, message in {
        SourceOptions(template="a {}"): "template='a {}': the format webdataset does not read it",
        SourceOptions(split="test"): "split='test'.*do not tell of several splits",
        SourceOptions(caption_per_line=True): "caption_per_line=True: .* has no .txt",
        SourceOptions(image_key="left.jpg"): "image_key='left.jpg': .* has only jpg, json",
        SourceOptions(label_key="clas"): "label_key='clas': .* has only caption, url",
        SourceOptions(label_key="url"): "label_key='url': .*'http://x' is no class",
    }.items():
        with pytest.raises(UserError, match=message):
            open_format("webdataset", str(tmp_path), options, "data.train.")


def test_item_2_names_with_dots_are_paired(tmp_path: Path) -> None:
    keys = [f"{i:06d} Photo v1.{i} (copy)" if i % 2 else f"{i:06d}" for i in range(10)]
    source = read_one(tmp_path, [m for key in keys for m in sample(key)])
    assert everything(source) == pairs(*keys) and not source.report.skipped and not source.report.unused


@pytest.mark.parametrize("ending", ["txt", "json"])
def test_item_2_the_picture_s_name_in_the_caption_s(tmp_path: Path, ending: str) -> None:
    caption = b'{"text": "A"}' if ending == "json" else b"A"
    members = [("a.jpg", b"a"), (f"a.jpg.{ending}", caption), (f"x.1.jpg.{ending}", caption), ("x.1.jpg", b"x")]
    source = read_one(tmp_path, [*members, ("p.jpg.png", b"p"), (f"p.jpg.{ending}", caption)])
    assert everything(source) == [(b"a", b"A"), (b"x", b"A"), (b"p", b"A")]
    assert not source.report.skipped and not source.report.unused


def test_item_2_keys_may_be_endings(tmp_path: Path) -> None:
    members = [
        m
        for key in ("a", "b.1")
        for m in [
            (f"{key}.left.jpg", b"left"), (f"{key}.RIGHT.jpg", b"right"),
            (f"{key}.en.txt", b"english"), (f"{key}.de.txt", b"deutsch"),
        ]
    ]  # fmt: skip
    path = str(write_tar(tmp_path / "0.tar", members))
    source = WebDatasetSource(path, SourceOptions(image_key="left.jpg", caption_key="de.txt"))
    assert everything(source) == [(b"left", b"deutsch")] * 2
    assert source.report.unused == {"member .jpg": 2, "member .txt": 2}
    other = WebDatasetSource(path, SourceOptions(image_key=".right.jpg", caption_key="de.txt"))
    assert everything(other) == [(b"right", b"deutsch")] * 2 and other.fingerprint != source.fingerprint


def test_item_2_a_named_ending_is_not_mixed_with_the_index_of_the_usual_ones(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "0.tar", [*sample("a"), *with_json("b")]))
    for _ in range(2):
        assert everything(WebDatasetSource(path)) == [*pairs("a"), (b"i0", b"b")]
        named = WebDatasetSource(path, SourceOptions(caption_key="txt"))
        assert everything(named) == pairs("a") and named.report.skipped == {"no caption": 1}


def test_item_2_what_is_not_understood_is_counted(tmp_path: Path) -> None:
    more = [("a.npy", b"n"), ("b.npy", b"n"), ("a.seg.png", b"s"), ("c.cls", b"1"), ("README", b"r")]
    source = read_one(tmp_path, [*sample("a"), ("a.webp", b"a second picture"), *sample("b"), *more])
    assert everything(source) == pairs("a", "b") and not source.report.skipped
    kinds = {"member .npy": 2, "member .seg.png": 1, "member .cls": 1, "member without an ending": 1, "member .webp": 1}
    assert source.report.unused == kinds
    assert WebDatasetSource(str(tmp_path / "one.tar")).report == source.report
    (tmp_path / "captions.jsonl").write_text("{}")
    (tmp_path / "one_stats.json").write_text("{}")
    assert WebDatasetSource(str(tmp_path)).report.unused == kinds | {"file .jsonl": 1}


@pytest.mark.parametrize("seed", range(30))
def test_item_2_what_went_in_is_read_or_counted(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stems = ("{}", "{} Photo v1.5 (copy)", "a b.c.{}", "{}.x", "v1.5/{}")
    members: list[Member] = []
    for number in range(30):
        stem = stems[rng.integers(len(stems))].format(number)
        members.append((f"{stem}.{('jpg', 'PNG', 'webp')[rng.integers(3)]}", b"i%d" % number))
        words: object = (f"c{number}", None, 3, [f"c{number}", None])[rng.integers(4)]
        kind = rng.integers(4)
        if kind == 0 and isinstance(words, str):
            members.append((f"{stem}.txt", words.encode()))
        elif kind > 1:
            members.append((f"{stem}.json", json.dumps({"text": words, "n": 1}).encode()))
    if seed % 2:
        members.sort(key=lambda member: member[0][-3:])
    members += [("last.jpg", b"i99"), ("last.txt", b"c99")]
    source = read_one(tmp_path, members)
    assert len(source) + sum(source.report.skipped.values()) == 31
    for image, caption in everything(source):
        assert image[1:] == caption[1:]


@pytest.mark.parametrize("text", [b"%d", b"%d\n", b"%d.0", b" %d "])
def test_item_5_cls_members_are_labels(tmp_path: Path, text: bytes) -> None:
    labels = [2, 0, 7, 2]
    members = [m for i, n in enumerate(labels) for m in [*sample(str(i)), (f"{i}.cls", text % n)]]
    source = read_one(tmp_path, [*members, *sample("none"), ("none.cls", b"-1"), *sample("word"), ("word.cls", b"cat")])
    records = source.read(np.arange(6))
    assert [record.get("label") for record in records] == [*labels, None, None]
    assert source.classes == tuple("01234567")
    assert source.report.skipped == {} and source.report.unused == {"label that is no class number": 2}
    (tmp_path / "classnames.txt").write_text("".join(f"class {i}\n" for i in range(8)))
    named = WebDatasetSource(str(tmp_path / "one.tar"))
    assert named.classes[7] == "class 7" and named.fingerprint != source.fingerprint
    (tmp_path / "classnames.txt").write_text("only\n")
    with pytest.raises(UserError, match=r"a label is 7, but classnames\.txt names only 1"):
        WebDatasetSource(str(tmp_path / "one.tar"))


def test_item_5_cls_members_may_be_words(tmp_path: Path) -> None:
    for shard, words in enumerate((["dog", "cat"], ["wolf", "dog"])):
        members = [m for i, word in enumerate(words) for m in [(f"{i}.jpg", b"i"), (f"{i}.cls", word.encode() + b"\n")]]
        write_tar(tmp_path / f"{shard}.tar", members)
    for _ in range(2):
        source = WebDatasetSource(str(tmp_path))
        assert source.classes == ("cat", "dog", "wolf") and source.modalities == ("image",)
        assert [record["label"] for record in source.read(np.arange(4))] == [1, 0, 2, 1]
    (tmp_path / "classnames.txt").write_text("wolf\ncat\nbird\ndog\n")
    source = WebDatasetSource(str(tmp_path))
    assert source.classes == ("wolf", "cat", "bird", "dog")
    assert [record["label"] for record in source.read(np.arange(4))] == [3, 1, 0, 3]


@pytest.mark.parametrize("key", ["label", "class", "species"])
def test_item_5_integers_of_a_json_are_labels(tmp_path: Path, key: str) -> None:
    values = [1, 3.0, None, 2.5, "cat", True, -1, 0]
    members = [m for i in range(8) for m in [*sample(str(i)), (f"{i}.json", json.dumps({key: values[i]}).encode())]]
    path = str(write_tar(tmp_path / "0.tar", members))
    source = WebDatasetSource(path, SourceOptions(label_key=key if key == "species" else ""))
    assert [record.get("label") for record in source.read(np.arange(8))] == [1, 3, None, None, None, None, None, 0]
    assert everything(source) == pairs(*map(str, range(8)))
    assert source.classes == tuple("0123") and source.report.unused == {"label that is no class number": 4}
    if key == "species":
        assert not WebDatasetSource(path).classes


def test_item_6_what_is_larger_than_max_bytes_is_left_out_and_counted(tmp_path: Path) -> None:
    members = [*sample("a"), ("b.jpg", b"x" * 3000), ("b.txt", b"b"), ("c.jpg", b"c"), ("c.txt", b"y" * 3000)]
    members += [("d.jpg", b"d"), ("d.json", b'{"caption": "%s"}' % (b"z" * 3000)), *with_json("e")]
    path = str(write_tar(tmp_path / "0.tar", members))
    whole, small = WebDatasetSource(path), WebDatasetSource(path, SourceOptions(max_bytes=2000))
    assert len(whole) == 5 and not whole.report.skipped
    assert everything(small) == [*pairs("a"), (b"i0", b"e")]
    assert small.report.skipped == {"too many bytes (data.max_bytes)": 3}
    assert small.fingerprint != whole.fingerprint
    assert WebDatasetSource(path, SourceOptions(max_bytes=10_000)).fingerprint == whole.fingerprint


def test_item_7_a_shard_rewritten_in_place_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", sample("a") + sample("b"))
    source = WebDatasetSource(str(path))
    assert everything(source) == pairs("a", "b")
    other = write_tar(tmp_path / "other.tar", sample("b") + sample("a")).read_bytes()
    before = path.stat().st_mtime_ns
    assert len(other) == path.stat().st_size
    with open(path, "r+b") as file:
        file.write(other)
    os.utime(path, ns=(0, before + 1))
    with pytest.raises(OSError, match=r"0\.tar: changed since it was indexed; start again"):
        source.read(np.array([0]))


def clip_benchmark(root: Path, split: str, members: Sequence[Sequence[Member]], kind: str = "") -> None:
    for number, of_shard in enumerate(members):
        write_tar(root / split / f"{number}.tar", of_shard)
    (root / split / "nshards.txt").write_text(f"{len(members)}\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}\n")
    if kind:
        (root / "dataset_type.txt").write_text(f"{kind}\n")


@pytest.mark.parametrize("captions", ["draw", "all"])
@pytest.mark.parametrize("inside", [False, True])
def test_item_10_a_retrieval_folder_of_clip_benchmark(tmp_path: Path, captions: str, inside: bool) -> None:
    text = b"one\ntwo\\nlines\n\nthree"
    shards = [[("s0000000.webp", b"A"), ("s0000000.txt", text)], [("s0000001.webp", b"B"), ("s0000001.txt", b"four\n")]]
    clip_benchmark(tmp_path, "test", shards, "retrieval")
    path, split = (str(tmp_path / "test"), "test") if inside else (str(tmp_path), "val")
    source = WebDatasetSource(path, SourceOptions(split=split, captions=captions))
    three = (b"one", b"two\nlines", b"three")
    if captions == "all":
        assert everything(source) == [*((b"A", caption) for caption in three), (b"B", b"four")]
    else:
        assert [record.get("captions") for record in source.read(np.arange(2))] == [three, None]
    assert source.report.unused == {"file zeroshot_classification_templates.txt": 1} and not source.report.skipped


def test_item_10_a_classification_folder_of_clip_benchmark(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = [[("s0.png", b"A"), ("s0.cls", b"1")], [("s1.png", b"B"), ("s1.cls", b"0")]]
    clip_benchmark(tmp_path, "test", shards)
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    with caplog.at_level(logging.INFO, "m3ae_jax"):
        source = WebDatasetSource(str(tmp_path), SourceOptions(split="val"))
    assert "split val is called test here" in caplog.text
    assert source.classes == ("cat", "dog") and source.modalities == ("image",)
    assert source.read(np.arange(2)) == [{"image": b"A", "label": 1}, {"image": b"B", "label": 0}]
    with pytest.raises(UserError, match=r"split='tets' is not one of test; did you mean 'test'\?"):
        WebDatasetSource(str(tmp_path), SourceOptions(split="tets"))
    (tmp_path / "test" / "nshards.txt").write_text("4")
    with pytest.raises(UserError, match=r"counts 4 shards, but these are missing: 2\.tar, 3\.tar"):
        WebDatasetSource(str(tmp_path), SourceOptions(split="test"))
    assert len(WebDatasetSource(str(tmp_path / "test" / "*.tar"))) == 2


def test_item_10_a_caption_per_line_of_any_shards(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "0.tar", [*sample("a", "one\ntwo"), *sample("b", "")]))
    lines = WebDatasetSource(path, SourceOptions(caption_per_line=True))
    assert [record["caption"] for record in lines.read(np.arange(2))] == [b"one", b""]
    assert lines.read(np.array([0]))[0]["captions"] == (b"one", b"two")
    assert lines.fingerprint != WebDatasetSource(path).fingerprint


def test_item_13_group_key(tmp_path: Path) -> None:
    groups = ["x", 3, None, "x"]
    members = [m for i in range(4) for m in [*sample(str(i)), (f"{i}.json", json.dumps({"of": groups[i]}).encode())]]
    path = str(write_tar(tmp_path / "0.tar", [*members, *sample("5")]))
    source = WebDatasetSource(path, SourceOptions(group_key="of"))
    assert [record.get("group") for record in source.read(np.arange(5))] == ["x", "3", None, "x", None]
    assert everything(source) == pairs("0", "1", "2", "3", "5") and not source.report.unused
    with pytest.raises(UserError, match=r"group_key='off': .* has only of; did you mean 'of'\?"):
        WebDatasetSource(path, SourceOptions(group_key="off"))


def test_options_that_change_nothing_leave_the_fingerprint(tmp_path: Path) -> None:
    three_shards(tmp_path)
    plain = WebDatasetSource(str(tmp_path)).fingerprint
    for options in (
        SourceOptions(captions="all"),
        SourceOptions(image_key="jpg"),
        SourceOptions(caption_key="txt"),
        SourceOptions(max_bytes=1000),
    ):
        assert WebDatasetSource(str(tmp_path), options).fingerprint == plain, options


# --- what a stranger found ---------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", ["draw", "all"])
def test_nulls_and_non_texts_in_a_list_of_captions_are_counted(tmp_path: Path, captions: str) -> None:
    members = [*with_json(["a0", None, "b0", 7], "one", [None, 3], key="captions"), *sample("t")]
    path = str(write_tar(tmp_path / "one.tar", members))
    for _ in range(2):  # from the index too
        source = WebDatasetSource(path, SourceOptions(captions=captions))
        read = [c for r in source.read(np.arange(len(source))) for c in r.get("captions", (r["caption"],))]
        assert read == [b"a0", b"b0", b"one", b"caption of t"]
        assert source.report.skipped == {"no caption": 1}
        assert source.report.unused == {
            "json field url": 3, "null in a list of captions": 1, "no text in a list of captions": 1
        }  # fmt: skip
        assert source.report.samples["null in a list of captions"] == "one.tar:0.json"


def test_a_null_that_img2dataset_wrote_beside_an_empty_txt_is_no_caption(tmp_path: Path) -> None:
    members = [*with_json(None, "a", ABSENT), ("0.txt", b""), ("1.txt", b""), ("2.txt", b""), *sample("t")]
    source = read_one(tmp_path, members)
    assert everything(source) == [(b"i1", b"a"), (b"i2", b""), *pairs("t")]
    assert source.report.skipped == {"no caption": 1} and source.report.samples["no caption"] == "one.tar:0.jpg"
    # Beside a .txt that has a caption no .json is read.
    source = read_one(tmp_path / "full", [*with_json(None), ("0.txt", b"full")])
    assert everything(source) == [(b"i0", b"full")] and source.report.unused == {"member .json": 1}


def test_all_endings_of_pictures_are_read(tmp_path: Path) -> None:
    members = [m for e in base.IMAGE_EXTENSIONS for m in (("x" + e[1:] + e, e.encode()), (f"x{e[1:]}.txt", b""))]
    source = read_one(tmp_path, [*members, ("u.JFIF", b"upper"), ("u.txt", b"")])
    assert [image for image, _ in everything(source)] == [*(e.encode() for e in base.IMAGE_EXTENSIONS), b"upper"]
    assert not source.report.skipped and not source.report.unused


def test_an_index_of_fewer_endings_is_built_anew(
    tmp_path: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write_tar(tmp_path / "0.tar", sample("a")))
    with monkeypatch.context() as earlier:
        earlier.setattr(webdataset, "_INDEX_VERSION", 1)
        before = WebDatasetSource(path).fingerprint
    assert WebDatasetSource(path).fingerprint == before  # which is of what is read
    assert scanned == ["0.tar", "0.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_counts_its_example_once(tmp_path: Path, kind: bytes) -> None:
    members: list[Member | tarfile.TarInfo] = [
        *sample("a"),
        *[special("b.jpg", kind, "a.jpg"), ("b.txt", b"b"), ("b.json", b"{}")],  # the picture is one
        *[("c.jpg", b"c"), special("c.txt", kind, "a.txt")],  # the caption
        *[*sample("d"), special("d.json", kind, "b.json"), special("d.url", kind, "b.json")],  # what is not needed
        special("e.jpg", kind, "a.jpg"),
    ]
    source = read_one(tmp_path, members)
    assert everything(source) == pairs("a", "d")
    assert source.report.skipped == {"not a regular file": 3} and source.report.unused == {"not a regular file": 2}
    assert source.report.samples["not a regular file"] == "one.tar:b.jpg"
    alone = read_one(tmp_path / "alone", [("a.jpg", b"a"), special("b.jpg", kind, "a.jpg")])
    assert alone.modalities == ("image",) and len(alone) == 1
    assert alone.report.skipped == {"not a regular file": 1}
