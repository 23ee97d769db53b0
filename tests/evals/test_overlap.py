"""Test examples that are training examples too: refused, counted, left out (item 12 of issue 19)."""

import dataclasses
import functools

import numpy as np
import pytest
from PIL import Image

from m3ae_jax import config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.evals import features, overlap, probe, supervised
from m3ae_jax.evals.clean import hashes, joined
from m3ae_jax.evals.overlap import WITHOUT
from m3ae_jax.evals.run import EVALUATIONS, check, run
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train import setup as run_setup
from tests.evals.numbers import SOURCE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

COMPARING = tuple(name for name, needs in EVALUATIONS.items() if {"train", "test"} <= set(needs.labelled))


def quick(*names):
    """All evaluations that compare, of which those but `names` are slow to compile."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in COMPARING]


def config(train, test, outside="900:910:2", source=SOURCE, **changes):
    c = config_lib.load("configs/tiny.py")
    c.model.width, c.model.depth, c.model.heads, c.m3ae.decoder_depth = 16, 1, 2, 1
    c.data.image_size = c.data.scenes.image_size = 24
    c.eval.batch_size, c.eval.train_examples, c.eval.test_examples = 16, 60, 40
    c.eval.robustness.epsilons, c.eval.robustness.pgd_steps = (8.0,), 1
    for name in supervised.PROTOCOLS:
        c.eval[name].batch_size, c.eval[name].duration, c.eval[name].warmup = 16, "2 steps", "1 steps"
    for part, path in (("train", train), ("test", test), ("outside", outside)):
        c.eval[part].source, c.eval[part].path = source, str(path)
    c.evals = ("knn",)
    config_lib.apply_overrides(c, [(k, str(v)) for k, v in changes.items()])
    return config_lib.resolve(c)


@functools.cache  # the evaluations of a setup share what they encode
def prepared(*parts, **changes):
    return run_setup.prepare(config(*parts, **changes))


@pytest.fixture(scope="module")
def state(one_device):
    return prepared("0:30:2", "20:40:2").init_state()


# --- the same data


@pytest.mark.parametrize("name", COMPARING)
def test_item_12_equal_sources_are_refused_before_a_run(name):
    with pytest.raises(UserError, match=r"eval\.\w+ \(0:30:2\) holds the same examples as eval\.\w+ \(") as error:
        check(config("0:30:2", "0:30:2", evals=name))
    assert "\n" not in str(error.value)
    check(config("0:30:2", "20:40:2", evals=name))


def test_item_12_the_same_scenes_are_refused_and_other_splits_are_not():
    c = config_lib.load("configs/tiny.py")
    c.evals = ("ood",)
    check(config_lib.resolve(c))
    c.eval.test.update(source="scenes", split="train")
    with pytest.raises(UserError, match=r"\(scenes, train\) holds the same examples as .*\(scenes, train\)"):
        check(config_lib.resolve(c))


def test_equal_sources_are_found_when_only_one_is_read_by_group():
    with pytest.raises(UserError, match="holds the same examples"):
        check(config("0:30:2", "0:30:2", **{"eval.group_key": "concept"}))


def test_item_12_a_copied_folder_is_refused_and_one_of_equal_names_and_sizes_is_not(tmp_path):
    for folder, shift in (("train", 0), ("copy", 0), ("other", 100)):
        for i in range(8):
            (tmp_path / folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i + shift).integers(0, 256, (24, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"class{i % 2}" / f"{i}.bmp")
    with pytest.raises(UserError, match=r"eval\.\w+ \(.*\) holds the same examples as eval\.\w+"):
        check(config(tmp_path / "train", tmp_path / "copy", source="class_folders", evals="knn"))
    check(config(tmp_path / "train", tmp_path / "other", source="class_folders", evals="knn"))


# --- a part of them


@pytest.mark.parametrize("name", quick("knn"))
def test_item_12_overlap_is_counted_and_figures_without_it_stand_beside(name, state):
    found = run(name, prepared("0:30:2", "20:40:2"), state)
    alone = run(name, prepared("0:30:2", "30:40:2"), state)
    assert found.scalars[f"{name}/overlap"] == 10 and alone.scalars[f"{name}/overlap"] == 0
    assert "10 of 20 test examples are in eval.train too; figures without them stand beside." in found.text
    assert " too" not in alone.text and not [key for key in alone.scalars if WITHOUT in key]
    beside = {key for key in found.scalars if WITHOUT in key}
    assert len(beside) >= 2
    for key in beside:
        if name != "robustness" or "clean" in key:  # what is drawn at random depends on the place in the order
            assert found.scalars[key] == pytest.approx(alone.scalars[key.replace(f"/{WITHOUT}", "")], abs=1e-4), key
    assert set(found.scalars) - beside == set(alone.scalars)
    lines = found.text.split("\n\n")[0].splitlines()
    assert len({line.count("|") for line in lines}) == 1 and ", without overlap" in lines[0].replace("_", " ")


def test_a_nearest_neighbour_of_itself_is_right_and_does_not_count(state):
    found = run("knn", prepared("0:30:10", "20:40:10"), state).scalars
    assert found["knn/trained/image/cls/k=1"] >= 0.5 + found[f"knn/trained/image/cls/k=1/{WITHOUT}"] / 2 - 1e-6
    assert found[f"knn/trained/image/cls/k=1/{WITHOUT}"] < 0.5


@pytest.mark.slow
def test_the_probe_is_not_fitted_again(state, monkeypatch):
    fits = []
    swept = probe.swept
    monkeypatch.setattr(probe, "swept", lambda *args, **more: fits.append(1) or swept(*args, **more))
    found = run("probe", prepared("0:30:2", "20:40:2"), state).scalars
    assert len(fits) == len([key for key in found if key.endswith("/l2")])


def test_an_outside_example_that_is_known_is_left_out(state):
    found = run("ood", prepared("0:30:2", "25:45:2", "40:60:2"), state)
    assert found.scalars["ood/overlap"] == 5 and found.scalars["ood/outside_overlap"] == 5
    alone = run("ood", prepared("0:30:2", "30:45:2", "45:60:2"), state)
    key = "ood/trained/image/cls/mahalanobis"
    assert found.scalars[f"{key}/{WITHOUT}"] == pytest.approx(alone.scalars[key], abs=1e-5)
    assert "5 of 20 outside examples are in eval.train or eval.test too" in found.text


# --- all of them


@pytest.mark.parametrize("name", quick("knn", "linear_probe", "finetune"))
def test_item_12_nothing_but_training_examples_is_refused_and_both_are_named(name, state):
    with pytest.raises(UserError, match=r"eval\.test \(5:15:2\): each of its 10 examples is in eval\.train \(0:30:2\)"):
        run(name, prepared("0:30:2", "5:15:2"), state)


def test_a_training_does_not_begin_where_it_would_be_refused(state, monkeypatch):
    task = supervised.Task(prepared("0:30:2", "5:15:2"), "linear_probe")
    with pytest.raises(UserError, match="each of its 10 examples"):
        supervised.train(task, lambda *args: pytest.fail("a step"), None)


def test_outside_examples_that_are_all_known_are_refused(state):
    with pytest.raises(UserError, match=r"eval\.outside \(5:15:2\): each .* in eval\.train \(.*\) or eval\.test \("):
        run("ood", prepared("0:30:2", "30:45:2", "5:15:2"), state)


# --- how they are compared


def test_pictures_are_equal_as_the_model_gets_them():
    """Not as files: packed losslessly by another program they are other bytes."""
    setup = prepared("0:30:2", "20:40:2")
    first, second = (features.contents_of(setup, part) for part in ("train", "test"))
    assert list(first.hashes) == ["image"] and len(np.unique(first.hashes["image"])) == 30 and first.valid.all()
    assert len(np.intersect1d(first.hashes["image"], second.hashes["image"])) == 10
    assert features.contents_of(setup, "train") is first


def test_words_alone_are_compared_by_their_tokens(state):
    setup = prepared("0:6:2:text", "3:9:2:text", **{"data.max_text_tokens": 40})
    found = run("knn", setup, setup.init_state())
    assert found.scalars["knn/overlap"] == 3 and f"knn/trained/text/cls/k=1/{WITHOUT}" in found.scalars


def test_short_captions_of_scenes_may_all_be_known(state):
    """Their splits differ by how they are made, yet 57 % of tiny.py's validation captions are in 4,000 of training."""
    c = config_lib.load("configs/tiny.py")
    c.data.image_size, c.eval.batch_size, c.eval.train_examples, c.evals = 24, 16, 20, ("knn",)
    setup = run_setup.prepare(config_lib.resolve(c))
    contents = features.contents_of(setup, "train")
    seen = overlap.overlap(setup, "test", contents, {"train": contents})
    assert seen.all() and overlap.note(seen) == "\n\n20 of 20 test examples are in eval.train too."
    assert overlap.note(seen[:1]) == "\n\n1 of 1 test example is in eval.train too."
    columns = {"accuracy": "accuracy"}
    assert features.beside(lambda which: {"accuracy": which.mean()}, seen, columns) == {"accuracy": 1.0}
    assert features.with_beside(columns, seen) == columns


def test_unreadable_examples_are_equal_to_nothing():
    setup = prepared("0:30:2", "20:40:2")
    held = features.contents_of(setup, "train")
    broken = dataclasses.replace(held, valid=np.arange(30) >= 10)
    assert (
        overlap.overlap(setup, "test", broken, {"train": dataclasses.replace(held, valid=np.arange(30) < 15)}).sum()
        == 5
    )


def test_hashes_are_of_64_bits_and_survive_devices():
    rows = [b"a", b"b", None, b"a"]
    halves = hashes(rows)
    assert halves.dtype == np.int32 and halves.shape == (4, 2) and not halves[2].any()
    whole = joined(halves)
    assert whole.dtype == np.int64 and whole[0] == whole[3] != whole[1]
    assert hashes([]).shape == (0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("knn", "linear_probe"))
def test_eight_devices_count_the_same(name, monkeypatch):
    monkeypatch.setattr(run_setup, "make_mesh", make_mesh)
    many = prepared.__wrapped__("0:30:2", "20:40:2")
    assert many.mesh.size == 8
    found = run(name, many, many.init_state())
    assert found.scalars[f"{name}/overlap"] == 10 and [key for key in found.scalars if WITHOUT in key]
