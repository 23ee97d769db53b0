"""Tables of captions: classes of their values, Parquet that is damaged. test_folder has what a folder makes of them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3ae_jax.data.sources.base import SourceOptions
from m3ae_jax.data.sources.metadata import Classes, fits, open_table
from m3ae_jax.errors import UserError


@pytest.mark.parametrize(
    ("values", "is_text", "classes", "labels"),
    [
        ([], False, (), []),
        ([1, 0.0, None, float("nan")], False, ("0", "1"), [1, 0, -1, -1]),
        (["2", "0.0", ""], True, ("0", "1", "2"), [2, 0, -1]),
        (["b", "", " ", "a"], False, ("a", "b"), [1, -1, -1, 0]),
        (["2", "b", "10"], True, ("10", "2", "b"), [1, 2, 0]),
        (["2", "10"], False, ("10", "2"), [1, 0]),
    ],
)
def test_item_5_classes(values: list[Any], is_text: bool, classes: tuple[str, ...], labels: list[int]) -> None:
    collected = Classes(is_text)
    codes = np.array([collected.add(value) for value in values], np.int32)
    names, numbers = collected.finish()
    assert names == classes and numbers[codes].tolist() == labels


@pytest.mark.parametrize(
    ("values", "is_text"),
    [
        ([-1], False),
        ([0, 1.5], False),
        ([True], False),
        ([[1]], False),
        ([1, "a"], False),
        (["-1"], True),
        (["1.5"], True),
    ],
)
def test_item_5_values_that_are_no_classes(values: list[Any], is_text: bool) -> None:
    collected = Classes(is_text)
    for value in values:
        collected.add(value)
    with pytest.raises(ValueError):
        collected.finish()


def test_which_tables_fit() -> None:
    assert fits(["file_name", "text"], SourceOptions())
    assert fits(["Image", "Caption"], SourceOptions())  # as `find_key` has it
    assert not fits(["file_name", "label"], SourceOptions())
    assert fits(["file_name", "label"], SourceOptions(), ("caption", "label"))
    assert not fits(["file_name", "text"], SourceOptions(caption_key="txet"))


def test_item_4_pictures_in_a_parquet_are_no_names(tmp_path: Path) -> None:
    columns = {"image": [{"bytes": b"x", "path": "a"}], "raw": [b"x"], "text": ["a"], "several": [["a"]]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    table = open_table(os.fsencode(tmp_path / "a.parquet"), SourceOptions())
    assert table.fields == ["text", "several"] and table.others == ["image", "raw"]


@pytest.mark.parametrize("seed", range(3))
def test_noise_in_a_parquet_is_refused_or_read(tmp_path: Path, seed: int) -> None:
    rng, path = np.random.default_rng(seed), tmp_path / "a.parquet"
    columns = {"file_name": [f"{i}.jpg" for i in range(50)], "caption": [["a", f"b{i}"] for i in range(50)]}
    pq.write_table(pa.table(columns), path, row_group_size=20)
    good = path.read_bytes()
    for _ in range(30):
        data = bytearray(good)
        for at in rng.integers(4, len(good) - 8, rng.integers(1, 10)):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            table = open_table(os.fsencode(path), SourceOptions())
            used = [name for name in ("file_name", "caption") if name in table.fields]
            for line in table.lines(used):
                assert table.read(line.offset, line.size) is not None
