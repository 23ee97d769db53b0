"""The index of files: where it lies, and that each start tells what was left out, also of files damaged or gone."""

import json
import os

import numpy as np
import pytest
import tensorflow as tf

from m3ae_jax.data.sources import open_format
from m3ae_jax.data.sources.base import SourceOptions
from m3ae_jax.data.sources.index import Index, IndexReport, Tally, skip_line, unused_line
from m3ae_jax.data.sources.webdataset import WebDatasetSource
from m3ae_jax.errors import UserError
from tests.data.sources.test_webdataset import write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """No test may write into the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def shards(folder, count=3, pairs=4):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        members = []
        for i in range(pairs):
            members += [(f"{shard}{i}.jpg", b"picture"), (f"{shard}{i}.txt", b"caption")]
        write_tar(folder / f"{shard:05d}.tar", members)
    return str(folder)


def test_nothing_is_written_beside_the_data(tmp_path, cache):
    path = shards(tmp_path / "data")
    WebDatasetSource(path)
    assert sorted(os.listdir(path)) == ["00000.tar", "00001.tar", "00002.tar"]
    assert len(list((cache / "m3ae_jax" / "index").iterdir())) == 1


def test_item_11_the_index_goes_to_a_folder_of_the_users(tmp_path, cache):
    path = shards(tmp_path / "data")
    options = SourceOptions(index_dir=str(tmp_path / "indices"))
    first = WebDatasetSource(path, options)
    assert len(list((tmp_path / "indices").iterdir())) == 1 and not list(cache.iterdir())
    assert WebDatasetSource(path, options).report == first.report


def test_item_11_the_index_goes_to_a_bucket(tmp_path, monkeypatch):
    path = shards(tmp_path / "data")
    options = SourceOptions(index_dir="ram://indices")
    first = WebDatasetSource(path, options)
    assert len(tf.io.gfile.listdir("ram://indices")) == 1
    monkeypatch.setattr(Index, "_scan_or_leave_out", lambda *args: pytest.fail("scanned again"))
    again = WebDatasetSource(path, options)
    assert again.report == first.report and again.fingerprint == first.fingerprint


def test_item_3_what_was_left_out_is_told_by_a_start_that_builds_no_index(tmp_path):
    path = shards(tmp_path / "data")
    write_tar(tmp_path / "data" / "00003.tar", [("a.jpg", b"picture"), ("b.txt", b"caption"), ("b.npy", b"numbers")])
    first = WebDatasetSource(path).report
    assert first.skipped == {"no caption": 1, "no image": 1} and first.unused == {"member .npy": 1}
    assert WebDatasetSource(path).report == first


@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_item_3_a_lost_shard_counts_with_the_examples_it_held(tmp_path, damage):
    path = shards(tmp_path / "data")
    assert len(WebDatasetSource(path)) == 12
    victim = tmp_path / "data" / "00001.tar"
    victim.write_bytes(b"no tar at all" if damage == "garbage" else victim.read_bytes()[: 512 * 5])
    for _ in range(2):
        source = WebDatasetSource(path)
        assert len(source) + sum(source.report.skipped.values()) == 12, source.report
        assert source.report.skipped


def test_item_3_img2dataset_says_how_many_a_shard_held_that_was_never_whole(tmp_path):
    path = shards(tmp_path / "data")
    (tmp_path / "data" / "00001.tar").write_bytes(b"no tar at all")
    (tmp_path / "data" / "00001_stats.json").write_text(json.dumps({"successes": 4}))
    assert WebDatasetSource(path).report.skipped == {"unusable file": 4}


def test_item_3_a_file_that_is_gone_counts_with_the_examples_it_held(tmp_path):
    path = shards(tmp_path / "data")
    WebDatasetSource(path)
    (tmp_path / "data" / "00001.tar").unlink()
    for _ in range(2):
        source = WebDatasetSource(path)
        assert len(source) == 8 and source.report.shards == 2
        assert source.report.skipped == {"file that is gone": 4}
    # One of the files alone is another source, and of new files alone nothing is gone.
    assert not WebDatasetSource(f"{path}/00000.tar").report.skipped
    for name in ("00000.tar", "00002.tar"):
        (tmp_path / "data" / name).unlink()
    write_tar(tmp_path / "data" / "new.tar", [("a.jpg", b"picture"), ("a.txt", b"caption")])
    assert not WebDatasetSource(path).report.skipped


def test_a_tally_names_the_first_of_each_kind_and_counts_too_many_kinds_together():
    tally = Tally("0.tar")
    tally.add("no caption", "a.jpg")
    tally.add("no caption", "b.jpg", 2)
    tally.add("nothing", "c.jpg", 0)
    for number in range(60):
        tally.ignore(f"member .{number}", "x")
    report = tally.report(1, 5)
    assert report.skipped == {"no caption": 3} and report.samples["no caption"] == "0.tar:a.jpg"
    assert len(report.unused) <= 41 and sum(report.unused.values()) == 60 and report.unused["others"] > 0
    assert skip_line(report) == "no caption 3 (e.g. 0.tar:a.jpg)"
    assert unused_line(report).endswith("kinds more")


def test_an_index_of_hostile_names_is_read_back(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_tar(folder / "0.tar", [("a.jpg", b"picture"), ("a.txt", b"x"), ("new\nline.weird\n", b"x")])
    first = WebDatasetSource(str(folder)).report
    assert first == WebDatasetSource(str(folder)).report
    assert isinstance(first, IndexReport) and all("\n" not in kind for kind in first.unused)
    assert np.sum(list(first.unused.values())) == 1


def test_item_3_a_file_of_any_name_that_is_gone_is_counted_but_none_of_another_split(tmp_path):
    shards(tmp_path / "data", count=1)
    for name in ("photos", "val-0"):
        write_tar(tmp_path / "data" / f"{name}.tar", [("a.jpg", b"picture"), ("a.txt", b"caption")])
    path = str(tmp_path / "data")
    assert len(WebDatasetSource(path, SourceOptions(split=""))) == 6
    (tmp_path / "data" / "photos.tar").unlink()
    assert WebDatasetSource(path, SourceOptions(split="")).report.skipped == {"file that is gone": 1}


def test_item_3_a_file_with_fewer_examples_than_before_is_told(tmp_path):
    path = shards(tmp_path / "data")
    WebDatasetSource(path)
    write_tar(tmp_path / "data" / "00001.tar", [("x.jpg", b"picture"), ("x.txt", b"caption")])
    for _ in range(2):
        report = WebDatasetSource(path).report
        assert report.unused == {"examples fewer than when it was indexed before": 3} and not report.skipped


def test_an_index_whose_rows_do_not_add_up_is_built_anew(tmp_path, caplog):
    path, folder = shards(tmp_path / "data"), tmp_path / "indices"
    WebDatasetSource(path, SourceOptions(index_dir=str(folder)))
    (index,) = folder.iterdir()
    with np.load(index) as file:
        whole = dict(file)
    np.savez(index, **(whole | {"rows": whole["rows"][:-3]}))
    assert len(WebDatasetSource(path, SourceOptions(index_dir=str(folder)))) == 12


def test_item_2_a_compressed_shard_and_a_folder_of_shards_are_left_out_not_merely_unread(tmp_path):
    path = shards(tmp_path / "data")
    (tmp_path / "data" / "00003.tar.gz").write_bytes(b"packed")
    (tmp_path / "data" / "notes.gz").write_bytes(b"packed")
    shards(tmp_path / "data" / "more", count=1)
    (tmp_path / "data" / "other").mkdir()
    report = WebDatasetSource(path).report
    assert report.skipped == {"compressed or unfinished file": 1, "folder of such files": 1}
    assert report.unused == {"file .gz": 1, "folder": 1}


def test_messages_name_the_field_of_the_config(tmp_path):
    path = shards(tmp_path / "data")
    for field, name in (("eval.test.", "eval.test.caption_key='txet'"), ("data.val.", "data.val.caption_key='txet'")):
        with pytest.raises(UserError, match=name):
            open_format("webdataset", path, SourceOptions(caption_key="txet"), field)


def test_a_store_that_fails_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    path, tries = shards(tmp_path / "data"), []

    def failing(where, options):
        tries.append(where)
        if len(tries) < 3:
            raise OSError("500 Internal Server Error")
        return WebDatasetSource(path, options)

    monkeypatch.setattr("m3ae_jax.data.sources._WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr("m3ae_jax.data.sources.webdataset.WebDatasetSource", failing)
    assert len(open_format("webdataset", "https://host/0.tar", SourceOptions(), "data.train.")) == 12
    assert len(tries) == 3


def test_item_3_files_of_one_name_that_are_gone_from_two_folders_are_both_counted(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    path = ",".join(shards(folder) for folder in folders)
    WebDatasetSource(path)
    for folder in folders:
        (folder / "00001.tar").unlink()
    assert WebDatasetSource(path).report.skipped == {"file that is gone": 8}
