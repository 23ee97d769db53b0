"""Maps by t-SNE: they repeat, the neighbours are scikit-learn's, and another run stands beside."""

import dataclasses
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.convert.convert import Converted, write_run
from m3ae_jax.convert.formats import Foreign
from m3ae_jax.convert.keymap import Report
from m3ae_jax.errors import UserError
from m3ae_jax.evals import features, tsne
from m3ae_jax.evals.labelled import open_labelled
from m3ae_jax.evals.run import check
from m3ae_jax.objectives.base import build
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.report.pictures import ClassMap, class_maps
from m3ae_jax.train import setup as run_setup

pytestmark = pytest.mark.usefixtures("one_device")


def config(**changes):
    c = config_lib.load("configs/tiny.py")
    c.model.width, c.model.depth, c.m3ae.decoder_depth = 16, 1, 1
    c.data.image_size = 24
    c.eval.batch_size, c.eval.test_examples, c.eval.label = 16, 21, "color"
    c.evals = ("tsne",)
    config_lib.apply_overrides(c, [(k, str(v)) for k, v in changes.items()])
    return config_lib.resolve(c)


@pytest.fixture(scope="module")
def setup():
    return run_setup.prepare(config())


def clusters(n=60, classes=3):
    rng = np.random.default_rng(0)
    label = rng.integers(0, classes, n)
    return (rng.normal(size=(classes, 8)) * 6)[label] + rng.normal(size=(n, 8)), label


def test_the_same_features_make_the_same_picture_and_clusters_stay():
    x, label = clusters()
    first, second = tsne.plane(x.astype(np.float32)), tsne.plane(x.astype(np.float32))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (60, 2) and tsne.by_neighbors(first, label) == 1.0
    sheets = [class_maps([ClassMap("a", places, label)] * 2, ("x", "y", "z"), "t") for places in (first, second)]
    np.testing.assert_array_equal(*sheets)
    assert sheets[0].dtype == np.uint8 and sheets[0].shape[1] == 1000


@pytest.mark.parametrize("count", [1, 3, 10])
def test_the_neighbours_are_scikit_learns(count):
    from sklearn.model_selection import LeaveOneOut, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(1)
    label = rng.integers(0, 4, 50)
    x = (rng.normal(size=(4, 5))[label] + rng.normal(size=(50, 5)) + 100).astype(np.float32)
    wanted = cross_val_score(KNeighborsClassifier(count, algorithm="brute"), x.astype(float), label, cv=LeaveOneOut())
    assert 0.3 < wanted.mean() < 0.95
    assert tsne.by_neighbors(x, label, count) == pytest.approx(wanted.mean())


def test_of_many_classes_the_first_ten_are_drawn_and_at_most_a_thousand_examples():
    rng = np.random.default_rng(2)
    label = rng.choice([0, 2, *range(4, 30)], 4000)
    rows, drawn, classes = tsne.chosen(label, tuple(map(str, range(30))))
    assert classes == ("0", "2", *map(str, range(4, 12)))
    assert len(rows) == 1000 and np.all(np.diff(rows) > 0)
    assert [classes[number] for number in drawn] == [str(one) for one in label[rows]]
    with pytest.raises(UserError, match=r"3 examples of eval\.test are too few"):
        tsne.chosen(np.array([0, 0, 1]), ("a", "b"))


@pytest.mark.slow
def test_an_untrained_encoder_stands_beside(setup):
    state = setup.init_state()
    found = tsne.evaluate(setup, state)
    assert set(found.scalars) == {
        f"tsne/{name}"
        for name in (
            "n",
            "classes",
            "majority",
            *(f"{w}/{k}" for w in ("trained", "untrained") for k in ("map", "features")),
        )
    }
    assert found.scalars["tsne/n"] == 21, "of batches of 16"
    test = features.encoded(setup, state, "test")
    assert found.scalars["tsne/classes"] == len(np.unique(test.label))
    assert found.scalars["tsne/majority"] == np.bincount(test.label).max() / 21
    for who in ("trained", "untrained"):
        wanted = tsne.by_neighbors(test.features[f"{who}/image/cls"], test.label)
        assert found.scalars[f"tsne/{who}/features"] == pytest.approx(wanted)
    assert len({line.count("|") for line in found.text.split("\n\n")[0].splitlines()}) == 1


def other_run(folder, **changes):
    c = config(**{"evals": "", **changes})
    params = jax.device_get(nn.unbox(jax.jit(build(c, 0).init)(jax.random.key(7))))
    write_run(Converted("safetensors", c, params, Report(), Foreign({}), 0), folder)
    return params


@pytest.mark.slow
def test_a_run_of_pictures_alone_and_of_another_size_stands_beside(tmp_path):
    changes = {"data.modalities": "image", "data.image_size": 32, "data.patch_size": 16, "model.width": 24}
    params = other_run(tmp_path / "other", **changes, **{"data.scenes.image_size": 40, "data.train.path": "gone"})
    setup = run_setup.prepare(config(**{"eval.tsne.beside": tmp_path / "other", "eval.tsne.feature": "image/mean"}))
    found = tsne.evaluate(setup, setup.init_state())
    # What the run's own program says of the same pictures; they are this run's scenes.
    alone = run_setup.prepare(config(**changes))
    test = features.encode_source(alone, {"beside": params}, open_labelled(setup.config, "test"), 21)
    wanted = test.features["beside/image/mean"]
    assert found.scalars["tsne/beside/features"] == pytest.approx(tsne.by_neighbors(wanted, test.label))
    assert "tsne/untrained/map" not in found.scalars and "other, step 0" in found.text
    np.testing.assert_allclose(tsne.of_other_run(setup, test)[0], wanted, rtol=1e-4, atol=1e-5)
    others = dataclasses.replace(test, label=test.label[::-1])
    with pytest.raises(UserError, match="other pictures decode for it"):
        tsne.of_other_run(setup, others)


@pytest.mark.slow
def test_other_runs_that_make_no_sense_are_refused(tmp_path):
    other_run(tmp_path / "pictures", **{"data.modalities": "image"})
    beside = {"eval.tsne.beside": tmp_path / "pictures"}
    setup = run_setup.prepare(config(**beside, **{"eval.tsne.feature": "text/cls"}))
    with pytest.raises(
        UserError, match=r"'text/cls' needs text: eval\.tsne\.beside=.*pictures' has image alone"
    ) as error:
        tsne.evaluate(setup, setup.init_state())
    assert "\n" not in str(error.value)
    for changes, told in (
        ({"eval.tsne.beside": tmp_path / "nothing"}, "no checkpoint at"),
        (
            {"data.modalities": "image", "eval.tsne.feature": "both/cls"},
            r"needs text: data\.modalities has image alone",
        ),
        ({"eval.tsne.feature": "image/clz"}, "did you mean 'image/cls'"),
    ):
        with pytest.raises(UserError, match=told) as error:
            check(config(**changes))
        assert "\n" not in str(error.value)


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(UserError, match=r"needs scikit-learn: pip install -e '\.\[tsne\]'") as error:
        check(config())
    assert "\n" not in str(error.value)


def test_features_without_differences_are_told():
    with pytest.raises(UserError, match="all examples are alike"):
        tsne.plane(np.ones((20, 4), np.float32))


@pytest.mark.slow
def test_on_eight_devices_it_is_the_same(tmp_path, monkeypatch):
    params = other_run(tmp_path / "other", **{"data.modalities": "image", "model.width": 32})
    beside = {"eval.tsne.beside": tmp_path / "other"}
    one = run_setup.prepare(config(**beside))
    monkeypatch.setattr(run_setup, "make_mesh", make_mesh)
    many = run_setup.prepare(config(**beside, **{"batch_size": 64, "mesh.preset": "fsdp"}))
    assert many.mesh.size == 8 and params
    test = tsne._encoded(one.config, one, {"trained": one.init_state().params})
    found, wanted = (tsne.of_other_run(setup, test) for setup in (many, one))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-3, atol=1e-4)
    assert found[1] == wanted[1]
