"""What the data of an evaluation are called, and the files of its results (item 13 of issue 19)."""

import json

import numpy as np
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.evals import run as evaluations
from m3ae_jax.evals.base import Data, Result, amount, place
from m3ae_jax.evals.named import SCENES, _slug, data_of
from m3ae_jax.evals.run import EVALUATIONS, RunHooks
from m3ae_jax.train import setup as run_setup
from tests.evals.numbers import SOURCE

pytestmark = pytest.mark.usefixtures("one_device")


def config(test="20:40:2", train="0:20:2", **changes):
    c = config_lib.load("configs/tiny.py")
    c.model.width, c.model.depth, c.model.heads, c.m3ae.decoder_depth = 16, 1, 2, 1
    c.data.image_size, c.evals = 24, ("knn",)
    for part, path in (("train", train), ("test", test)):
        c.eval[part].source, c.eval[part].path = SOURCE, path
    config_lib.apply_overrides(c, [(k, str(v)) for k, v in changes.items()])
    return config_lib.resolve(c)


@pytest.mark.parametrize(
    ("about", "slug"),
    [
        ({"source": "scenes", "path": "", "label": "shape"}, "scenes-shape"),
        ({"source": "scenes", "path": ""}, "scenes"),
        ({"source": "tfds", "path": "cifar10:3.0.2@/data/sets"}, "cifar10-3-0-2"),
        ({"source": "tfds", "path": "food/small"}, "food-small"),
        ({"source": "webdataset", "path": "/data/cc12m/{00000..00099}.tar,/x/y.tar"}, "cc12m"),
        ({"source": "parquet", "path": "gs://bucket/My Birds/*.parquet"}, "My-Birds"),
        ({"source": "hdf5", "path": "/data/val.h5/"}, "val-h5"),
        ({"source": "folder", "path": "/"}, "data"),
        ({"source": "folder", "path": "/" + "a" * 300}, "a" * 40),
        ({"source": "folder", "path": "\u9ce5"}, "data"),
    ],
)
def test_data_are_called_by_their_path(about, slug):
    assert _slug(about) == slug


def test_data_have_another_name_where_they_are_others():
    first = data_of(config(), ("train", "test"))
    assert data_of(config(), ("train", "test")) == first and first.name.startswith("20-40-2-")
    others = [data_of(config(**change), ("train", "test")) for change in ({"test": "20:41:2"}, {"train": "0:19:2"})]
    others += [data_of(config(), (part,)) for part in ("test", "val", "train")] + [data_of(config(), SCENES)]
    assert len({data.name for data in [first, *others]}) == 7
    about = first.parts["test"]
    assert about == {"source": SOURCE, "path": "20:40:2", "split": "val"} | {
        k: about[k] for k in ("fingerprint", "examples")
    }
    assert about["examples"] == 20 and len(about["fingerprint"]) == 16
    assert data_of(config(), ()) == Data()


def test_scenes_are_called_by_their_label():
    c = config_lib.load("configs/tiny.py")
    c.evals = ("knn",)
    by_label = {}
    for label in ("shape", "color"):
        c.eval.label = label
        by_label[label] = data_of(config_lib.resolve(c), ("train", "test"))
        assert by_label[label].name.startswith(f"scenes-{label}-")
        assert by_label[label].parts["train"]["split"] == "train" and by_label[label].parts["test"]["label"] == label
    assert data_of(config_lib.resolve(c), SCENES).name.startswith("scenes-")


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_evaluation_has_data(name):
    assert data_of(
        config(**{"eval.outside.source": SOURCE, "eval.outside.path": "50:60:2"}), EVALUATIONS[name].parts
    ).name


def test_results_say_what_they_are_of(tmp_path):
    data = Data("birds-0123ab", {"test": {"source": "folder", "path": "/birds", "examples": 3}})
    picture = np.zeros((4, 4, 3), np.uint8)
    result = Result("knn", {"knn/n": 1.0}, "| a |", {"map": picture})
    result.save(tmp_path, 4, data)
    result.save(tmp_path, 4)
    assert {file.name for file in tmp_path.iterdir()} == {
        *("knn_4_birds-0123ab.json", "knn_4_birds-0123ab.md", "knn_4_birds-0123ab_map.png"),
        *("knn_4.json", "knn_4.md", "knn_4_map.png"),
    }
    written = json.loads(place(tmp_path, "knn", 4, data.name).read_text())
    assert written == {"step": 4, "data": data.parts, "knn/n": 1.0}
    assert json.loads(place(tmp_path, "knn", 4, "").read_text()) == {"step": 4, "knn/n": 1.0}


def test_item_13_the_same_evaluation_on_other_data_replaces_nothing(tmp_path, monkeypatch):
    done = []

    def instead(name, setup, state):
        done.append(setup.config.eval.test.path)
        return Result(name, {f"{name}/n": 1.0}, "| a |")

    class Writer:
        scalars = image = staticmethod(lambda *args: None)

    monkeypatch.setattr(evaluations, "run", instead)
    state = None
    for path in ("20:40:2", "20:40:2", "30:40:2", "20:40:2"):
        setup = run_setup.prepare(config(path))
        state = state or setup.init_state()
        RunHooks(setup, tmp_path).evaluate(state, Writer(), lambda name: None)
    assert done == ["20:40:2", "30:40:2"], "each once"
    files = sorted((tmp_path / "evals").glob("knn_0_*.json"))
    assert [json.loads(file.read_text())["data"]["test"]["path"] for file in files] == ["20:40:2", "30:40:2"]


def test_amounts():
    assert [amount(n, "class", "classes") for n in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert amount(1, "labelled example") == "1 labelled example" and amount(3, "example") == "3 examples"


def test_an_unnamed_path_is_told():
    with pytest.raises(UserError, match=r"eval\.test\.path is empty"):
        data_of(config(test="", **{"data.val.source": "hdf5", "eval.test.source": "hdf5"}), ("test",))
