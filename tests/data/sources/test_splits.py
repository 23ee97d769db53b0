"""Which files and folders are of which split, by the names that people give them."""

import pytest

from m3ae_jax.data.sources import splits
from m3ae_jax.data.sources.index import Tally
from m3ae_jax.errors import UserError
from tests.data.sources.test_webdataset import sample, write_tar


def test_splits_that_are_not_there() -> None:
    for split in ("train", "val", "", "dev"):
        splits.check("/data/dev", split, [])
    splits.check("/data", "dev", ["dev", "train"])
    with pytest.raises(UserError, match=r"split='dev': /data has no folder of that name"):
        splits.check("/data", "dev", [])
    with pytest.raises(UserError, match=r"split='val' is not one of dev, train"):
        splits.check("/data", "val", ["dev", "train"])


@pytest.mark.parametrize(
    ("names", "split", "wanted"),
    [
        (("train-0.x", "train-1.x", "val-0.x", "notes.x"), "train", ["train-0.x", "train-1.x"]),
        (("train-0.x", "validation-0.x"), "val", ["validation-0.x"]),
        (("coco_train2017-3.x", "coco_val2017-3.x"), "train", ["coco_train2017-3.x"]),
        (("train-0.x", "train-1.x"), "val", ["train-0.x", "train-1.x"]),  # one split alone is no choice
        (("train-0.x", "val-0.x"), "", ["train-0.x", "val-0.x"]),
        (("training.x", "testing.x"), "train", ["training.x"]),
        (("latest-0.x", "protest-1.x"), "train", ["latest-0.x", "protest-1.x"]),
    ],
)
def test_item_2_files_of_several_splits_are_told_apart_by_their_names(names, split, wanted):
    tally = Tally()
    files = [f"/data/{name}" for name in names]
    assert splits.of_files({"/data": files}, split, tally) == [f"/data/{name}" for name in wanted]
    assert sum(count for count, _ in tally.unused.values()) == len(names) - len(wanted)


def test_each_part_of_a_path_is_looked_at_by_itself():
    files = splits.of_files({f"/d/{name}-*": [f"/d/{name}-0.x"] for name in ("train", "val")}, "train", Tally())
    assert files == ["/d/train-0.x", "/d/val-0.x"]


def test_a_split_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"split='tain' is not one of train, val; did you mean 'train'"):
        splits.of_files({"/data": ["/data/train-0.x", "/data/val-0.x"]}, "tain", Tally())


def test_item_2_tars_of_two_splits_in_one_folder_are_not_mixed(tmp_path):
    from m3ae_jax.data.sources.base import SourceOptions
    from m3ae_jax.data.sources.webdataset import WebDatasetSource

    for name in ("train-0", "train-1", "val-0"):
        write_tar(tmp_path / f"{name}.tar", sample(name))
    train, val = (WebDatasetSource(str(tmp_path), SourceOptions(split=split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 1)
    assert train.report.unused == {"file of split val": 1} and val.report.unused == {"file of split train": 2}
