"""The headers of tar files; `test_webdataset.py` reads whole ones."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from m3ae_jax.data.sources import tar
from m3ae_jax.data.sources.files import ReadAhead, open_file
from m3ae_jax.data.sources.webdataset import WebDatasetSource
from tests.data.sources.test_webdataset import sample, write_tar


def test_sizes_beyond_octal_digits_are_read() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 9 * 2**30
    header = info.tobuf(tarfile.GNU_FORMAT)
    assert tar._parse_header(header) == (b"a.jpg", 9 * 2**30, b"0")


@pytest.mark.parametrize("record", [b"7 size=x\n", b"0 path=a\n", b"28 size=9999999999999999999\n", b"9" * 30])
def test_damaged_pax_records(record: bytes) -> None:
    if record.startswith(b"9"):
        assert tar._parse_pax(record) == {}
    else:
        with pytest.raises(tar.Damaged):
            tar._parse_pax(record)


def test_a_member_s_name_is_found_by_its_data(tmp_path: Path) -> None:
    file = open_file(str(write_tar(tmp_path / "a.tar", sample("x/a") + sample("b"))))
    found = list(tar.members(ReadAhead(file), file.size))
    assert [member.name for member in found] == ["x/a.jpg", "x/a.txt", "b.jpg", "b.txt"]
    assert [tar.name_at(file, member.offset) for member in found] == [member.name for member in found]


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_item_6_a_name_of_megabytes_is_not_read(tmp_path: Path, format_: int) -> None:
    path = write_tar(tmp_path / "a.tar", [*sample("a"), ("x" * 2**21, b"data")], format=format_)
    file = open_file(str(path))
    with pytest.raises(tar.Damaged, match="a name of 2,097,"):
        list(tar.members(ReadAhead(file), file.size))


def test_a_tar_goes_on_behind_zero_blocks_as_where_two_were_joined(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", sample(name))
    joined = tmp_path / "joined" / "0.tar"
    joined.parent.mkdir()
    joined.write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    source = WebDatasetSource(str(joined.parent))
    assert len(source) == 2 and not source.report.skipped


def test_a_hole_of_zeros_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_tar(path, [member for i in range(20) for member in sample(f"{i:02d}", "caption " * 400)])
    data = bytearray(path.read_bytes())
    half = len(data) // 1024 * 512 + 100
    data[half : half + 6000] = bytes(6000)
    path.write_bytes(data)
    source = WebDatasetSource(str(tmp_path))
    assert len(source) < 20 and "damaged shard" in source.report.skipped
