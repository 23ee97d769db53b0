"""``eval.label`` and the labelled data: what is said of wrong ones."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict
from PIL import Image

from m3ae_jax import config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.evals.labelled import check_labelled, open_labelled


@pytest.fixture
def scenes() -> ConfigDict:
    config = config_lib.default()
    config.data.train.source = config.data.val.source = "scenes"
    return config


def classes(folder: Path) -> str:
    for i, name in enumerate("ab"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (i, len(folder.name), 0)).save(folder / name / f"{folder.name}.png")
    return str(folder)


def test_item_12_a_wrong_label_names_those_that_there_are_and_what_else_may_be_meant(scenes: ConfigDict) -> None:
    scenes.eval.label = "colour"
    with pytest.raises(UserError) as error:
        config_lib.resolve(scenes)
    said = str(error.value)
    assert "eval.label='colour' is not one of color, color_shape, count, shape; did you mean 'color'?" in said
    assert "of scenes" in said and "eval.train.label_key" in said


def test_item_12_a_label_that_makes_one_class_names_the_others(scenes: ConfigDict) -> None:
    scenes.eval.label, scenes.data.scenes.max_objects = "count", 1
    with pytest.raises(UserError, match=r"all scenes have 1 object.*other labels are shape, color, color_shape"):
        open_labelled(config_lib.resolve(scenes), "test")


def test_item_12_a_scenes_label_is_refused_of_other_data(scenes: ConfigDict, tmp_path: Path) -> None:
    scenes.eval.train.update(source="class_folders", path=classes(tmp_path / "train_data"))
    scenes.eval.test.update(source="class_folders", path=classes(tmp_path / "other"))
    check_labelled(config_lib.resolve(scenes), ("test", "train"))
    scenes.eval.label = "color"
    with pytest.raises(UserError, match=r"eval\.label='color' is a class of scenes, and eval\.test is class_folders"):
        check_labelled(config_lib.resolve(scenes), ("test", "train"))
