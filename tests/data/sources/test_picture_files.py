"""What the sources of picture files share: names in one piece, kinds of files, messages."""

from __future__ import annotations

from m3ae_jax.data.sources.picture_files import Names, file_kind, unsupported


def test_names_are_found_by_bisection() -> None:
    names = Names()
    for name in (b"ab", b"c", b"de", b"fg"):
        names.append(name)
    assert [names.find(name) for name in (b"fg", b"c", b"ab", b"xy", b"d", b"long")] == [3, 1, 0, None, None, None]


def test_kinds_of_files() -> None:
    kinds = [file_kind(name) for name in (b"a.csv", b"a.tar.gz", b"LICENSE", b"a.tfrecord-00000-of-00012")]
    assert kinds == ["file .csv", "file .gz", "file without an ending", "file .tfrecord"]
    assert [unsupported(name) for name in (b"a.TIFF", b"a.jpg", b"a", b"a.jfif", b"a.jpe")] == [
        "unsupported ending .tiff"
    ] + [""] * 4
