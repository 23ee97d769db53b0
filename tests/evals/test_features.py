"""What is encoded: every example once, all tokens visible, on any mesh; what cannot be is refused."""

import jax
import numpy as np
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.data.sources import build_source
from m3ae_jax.data.sources.scenes import SceneOptions
from m3ae_jax.errors import UserError
from m3ae_jax.evals import features, labelled, linear, masked_prediction, supervised
from m3ae_jax.evals.clean import clean_batches
from m3ae_jax.evals.fields import LABELS
from m3ae_jax.evals.labelled import LabelledScenes, open_labelled
from m3ae_jax.evals.run import check, run
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train import setup as run_setup
from tests.evals.numbers import SOURCE, Numbers

pytestmark = pytest.mark.usefixtures("one_device")


def config(**changes):
    c = config_lib.load("configs/tiny.py")
    c.model.width, c.model.depth, c.m3ae.decoder_depth = 16, 1, 1
    c.data.image_size = 24
    c.eval.batch_size, c.eval.train_examples, c.eval.test_examples = 16, 21, 9
    c.evals = ("knn",)
    config_lib.apply_overrides(c, [(k, str(v)) for k, v in changes.items()])
    return config_lib.resolve(c)


@pytest.fixture(scope="module")
def setup():
    return run_setup.prepare(config())


@pytest.fixture(scope="module")
def encoded(setup):
    state = setup.init_state()
    return state, features.encoded(setup, state, "train")


def test_every_example_is_encoded_once(setup, encoded):
    state, train = encoded
    assert set(train.features) == {
        f"{who}/{what}/{how}"
        for who in ("trained", "untrained")
        for what in ("image", "text", "both")
        for how in ("cls", "mean")
    } | {"pixels"}
    assert {len(x) for x in train.features.values()} == {21} == {len(train.label)}
    assert train.left_out == 0 and len(train.classes) == 8
    assert len(np.unique(train.features["trained/image/cls"], axis=0)) == 21
    # A fresh state is the untrained encoder.
    np.testing.assert_allclose(
        train.features["trained/both/mean"], train.features["untrained/both/mean"], rtol=1e-4, atol=1e-5
    )
    again = features.encoded(setup, state, "test")
    assert features.encoded(setup, state, "test") is again and len(again.label) == 9


@pytest.mark.slow
def test_eight_devices_say_the_same(setup, encoded, monkeypatch):
    monkeypatch.setattr(run_setup, "make_mesh", make_mesh)
    many = run_setup.prepare(config(batch_size=64, **{"eval.batch_size": 9}))
    assert many.mesh.size == 8
    other = features.encoded(many, many.init_state(), "train")
    for kind, value in encoded[1].features.items():
        np.testing.assert_allclose(value, other.features[kind], rtol=1e-3, atol=1e-4, err_msg=kind)
    np.testing.assert_array_equal(encoded[1].label, other.label)


def test_all_tokens_are_visible_and_labels_are_the_scenes(setup):
    source = open_labelled(setup.config, "train")
    for batch in clean_batches(setup, source, 10):
        valid = batch["example"]["valid"]
        assert valid.sum() == 10
        image, text = batch["groups"]["image"], batch["groups"]["text"]
        assert image["visible"]["valid"][valid].all() and image["target"]["valid"].shape[1] == 0
        assert text["target"]["valid"].shape[1] == 0
        for row, index in zip(text["visible"]["value"][valid], batch["example"]["index"][valid], strict=True):
            words = setup.tokenizer.encode([source.scene(int(index)).caption])[0]
            assert row[: len(words)].tolist() == words and not row[len(words) :].any()


@pytest.mark.parametrize("label", LABELS)
def test_scenes_have_labels(label):
    source = LabelledScenes("val", SceneOptions(max_objects=3, image_size=32), label)
    for record, i in zip(source.read(np.arange(20)), range(20), strict=True):
        scene, name = source.scene(i), source.classes[record["label"]]
        if label == "count":
            assert int(name) == len(scene.objects)
        else:
            assert any(all(getattr(o, a) in name.split() for a in label.split("_")) for o in scene.objects)


def test_undecodable_pictures_are_left_out_not_replaced(setup, monkeypatch):
    from m3ae_jax.evals import labelled

    read = labelled.LabelledScenes.read

    def broken(self, indices):
        records = read(self, indices)
        for record, index in zip(records, indices.tolist(), strict=True):
            if index % 3 == 0:
                record["image"] = b"no picture"
        return records

    monkeypatch.setattr(labelled.LabelledScenes, "read", broken)
    found = features.encode_source(setup, {}, open_labelled(setup.config, "train"), 21)
    assert found.left_out > 0 and found.left_out + len(found.label) == 21


def test_labelled_hdf5(shared, setup):
    path = str(shared / "data/openclipart/openclipart_topdir_labelled.h5")
    sources = {f"eval.{p}.{k}": v for p in ("train", "test") for k, v in (("source", "hdf5"), ("path", path))}
    found = run_setup.prepare(config(**sources, **{"eval.train_examples": 33}))
    train = features.encoded(found, found.init_state(), "train")
    assert len(train.label) + train.left_out == 33 and len(set(train.label.tolist())) > 5
    assert "trained/text/cls" not in train.features and train.classes[0] == "animals"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data.val.source": "hdf5"}, r"eval\.test\.path is empty.*class_folders"),
        ({"eval.label": "colour"}, r"eval\.label='colour' is not one of .*did you mean 'color'"),
        ({"eval.label": "count"}, r"all scenes have 1"),
        ({"evals": "retrieval", "data.modalities": "image"}, r"needs data\.modalities"),
        ({"evals": "retrieval", "data.val.source": "hdf5"}, r"data\.val\.path is empty"),
        ({"evals": "prob"}, r"did you mean 'probe'"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(changes, told):
    with pytest.raises(UserError, match=told) as error:
        check(config(**changes))
    assert "\n" not in str(error.value)


def test_sources_without_classes_and_with_others_are_refused(shared, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / f"only_{name}").mkdir()
        (tmp_path / name / "x" / "1.png").write_bytes(b"")
    sides = {"eval.train.source": "class_folders", "eval.test.source": "class_folders"}
    with pytest.raises(UserError, match=r"eval\.train has 2 classes and eval\.test 2: only one of them has 'only_a'"):
        check(config(**sides, **{"eval.train.path": tmp_path / "a", "eval.test.path": tmp_path / "b"}))
    h5 = {"eval.test.source": "hdf5", "eval.test.path": shared / "data/openclipart/openclipart_val.h5"}
    with pytest.raises(UserError, match=r"no classes there; eval\.test\.label_key"):
        check(config(**h5))


def numbers(train, test, **changes):
    paths = {f"eval.{part}.path": path for part, path in (("train", train), ("test", test))}
    return config(**{f"eval.{part}.source": SOURCE for part in ("train", "test")}, **paths, **changes)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        pytest.param("0:30:10", "30:46:8", marks=pytest.mark.slow),
        pytest.param("0:30:8", "30:46:10", marks=pytest.mark.slow),
    ],
)
def test_item_5_unnamed_classes_are_as_many_as_the_larger_count(train, test):
    c = numbers(train, test)
    check(c)
    setup = run_setup.prepare(c)
    first, second = features.encoded_pair(setup, setup.init_state())
    assert first.classes == second.classes == tuple(map(str, range(10)))
    assert supervised.Task(setup, "linear_probe").classes == supervised.Task(setup, "finetune").classes == 10
    probe = linear.swept(first.features["pixels"], first.label, len(first.classes))
    assert probe.logits(second.features["pixels"]).shape[1] == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knn", "probe", "few_shot", "linear_probe", "finetune", "robustness", "ood"])
def test_item_5_every_evaluation_bears_classes_without_examples(name):
    fields = {"eval.outside.source": SOURCE, "eval.outside.path": "60:70:3", "eval.robustness.epsilons": "()"}
    fields |= {f"eval.{protocol}.duration": "2 steps" for protocol in supervised.PROTOCOLS}
    fields |= {f"eval.{protocol}.warmup": "1 steps" for protocol in supervised.PROTOCOLS}
    setup = run_setup.prepare(numbers("0:30:8", "30:46:10", evals=name, **fields))
    found = run(name, setup, setup.init_state()).scalars
    assert all(np.isfinite(value) for value in found.values())


def test_item_5_named_classes_are_compared_as_they_are(monkeypatch):
    monkeypatch.setattr(labelled, "_unnamed", lambda classes: False)
    with pytest.raises(UserError, match=r"eval\.train has 1 class and eval\.test 3: only one of them has '1', '2'"):
        check(numbers("0:30:1", "30:46:3"))
    monkeypatch.undo()
    assert labelled.common_classes(("0", "1"), ("0", "1", "2")) == ("0", "1", "2")
    assert labelled.common_classes(("1", "2"), ("1", "2")) == ("1", "2")
    with pytest.raises(UserError, match=r"eval\.test has 1 class; an evaluation needs two or more"):
        check(numbers("0:30:1", "30:46:1"))


def test_item_5_a_key_that_the_format_does_not_read_is_not_recommended(tmp_path):
    (tmp_path / "a.txt").write_text("a red circle\n")
    for source, path in (("tests.evals.numbers:NoClasses", "0:9:2"), ("text", str(tmp_path / "a.txt"))):
        c = config(**{"eval.test.source": source, "eval.test.path": path})
        with pytest.raises(UserError, match=f"no classes there; the format {source} has none") as error:
            open_labelled(c, "test")
        assert "label_key" not in str(error.value)


def unlabelled(monkeypatch, every):
    """Every so many numbers have no class."""
    record = Numbers._record

    def without(self, number):
        made = record(self, number)
        if number % every == 0:
            del made["label"]
        return made

    monkeypatch.setattr(Numbers, "_record", without)


LABELLED = ("knn", "probe", "few_shot", "ood", "robustness", "linear_probe", "finetune")


@pytest.mark.slow
def test_item_5_examples_without_a_class_are_left_out_and_counted(monkeypatch, caplog):
    unlabelled(monkeypatch, 8)
    fields = {"eval.outside.source": SOURCE, "eval.outside.path": "60:70:2", "eval.robustness.epsilons": "()"}
    for protocol in supervised.PROTOCOLS:
        fields |= {f"eval.{protocol}.{k}": v for k, v in (("duration", "2 steps"), ("warmup", "1 steps"))}
    setup = run_setup.prepare(numbers("0:21:2", "30:38:2", evals=LABELLED, **fields))
    state = setup.init_state()
    for name in LABELLED:
        found = run(name, setup, state).scalars
        assert all(np.isfinite(value) for value in found.values())
        if name != "ood":
            assert found[f"{name}/test_examples"] == 7 and found[f"{name}/train_examples"] == 18
        if name not in ("ood", "robustness"):
            assert found[f"{name}/unlabelled"] == 4
    assert "eval.test (30:38:2): 1 of 8 examples has no class and is left out, e.g. example 2" in caplog.text
    assert "eval.train (0:21:2): 3 of 21 examples have no class and are left out, e.g. example 0" in caplog.text


@pytest.mark.parametrize("name", supervised.PROTOCOLS)
def test_item_5_most_examples_without_a_class_are_refused_before_the_training(name, monkeypatch):
    unlabelled(monkeypatch, 1)
    setup = run_setup.prepare(numbers("0:21:2", "30:38:2", evals=name))
    told = r"eval\.train \(0:21:2\): 21 of 21 examples have no class, e\.g\. example 0: more than half; give them one"
    with pytest.raises(UserError, match=told):
        supervised.train(supervised.Task(setup, name), lambda *_: pytest.fail("trained"), None)


def test_item_5_half_without_a_class_is_borne_and_more_is_refused():
    label, index = np.array([-1, 0, -1, 1, -1]), np.array([9, 8, 4, 6, 7])
    valid = np.array([True, True, True, True, False])
    assert labelled.with_class("x", valid, label, index).tolist() == [False, True, False, True, False]
    with pytest.raises(UserError, match=r"x: 3 of 5 examples have no class, e\.g\. example 4: more than half"):
        labelled.with_class("x", valid | True, label, index)
    with pytest.raises(UserError, match="x: not one of its examples can be read"):
        labelled.with_class("x", valid & False, label, index)


def test_item_13_groups_of_training_examples_are_read():
    setup = run_setup.prepare(numbers("0:21:2", "30:46:2", **{"eval.group_key": "concept"}))
    train, test = (features.encode_source(setup, {}, open_labelled(setup.config, p), 21) for p in ("train", "test"))
    assert test.group is None
    order = np.concatenate(
        [
            b["example"]["index"][b["example"]["valid"]]
            for b in clean_batches(setup, open_labelled(setup.config, "train"), 21)
        ]
    )
    for i in range(21):
        for j in range(21):
            same = order[i] // 3 == order[j] // 3 and order[i] % 7 and order[j] % 7
            assert (train.group[i] == train.group[j]) == bool(same or i == j)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"eval.group_key": "concept"}, r"eval\.group_key='concept': scenes have no fields"),
        (
            {"eval.group_key": "x", "eval.train.source": "tests.evals.numbers:NoClasses", "eval.train.path": "0:9:2"},
            r"eval\.group_key='x': the format tests\.evals\.numbers:NoClasses does not read it",
        ),
    ],
)
def test_item_13_a_group_key_that_is_not_read_is_refused(fields, told):
    with pytest.raises(UserError, match=told):
        check(config(**fields))


@pytest.mark.slow
def test_item_13_a_group_key_without_a_value_is_refused():
    setup = run_setup.prepare(numbers("0:21:2", "30:46:2", **{"eval.group_key": "other"}))
    with pytest.raises(UserError, match=r"eval\.group_key='other': no example of eval\.train has a value there"):
        features.encoded(setup, setup.init_state(), "train")


def test_shuffled_partners_are_others(setup):
    source = build_source(setup.config, "val")
    for batch in clean_batches(setup, source, 11):
        group, valid = jax.tree.map(np.array, batch["groups"]["image"]), batch["example"]["valid"]
        group["visible"]["value"][1] = group["visible"]["value"][0]
        swapped, differs = jax.device_get(jax.jit(masked_prediction.exchanged)(group, valid))
        assert differs[:11].all() and not differs[11:].any()
        assert (swapped["visible"]["value"] != group["visible"]["value"]).any(axis=(1, 2))[:11].all()
        alone = np.arange(len(valid)) == 3
        assert not jax.device_get(masked_prediction.exchanged(group, alone)[1]).any()


@pytest.mark.parametrize(
    ("examples", "size", "parts"), [(21, 10, 1), (21, 20, 1), (25, 8, 8), (17, 16, 8), (2, 1, 1), (9, 64, 8)]
)
def test_no_example_is_alone_in_its_batch(examples, size, parts):
    # Alone it has no other's picture to be shown, and was left out.
    found = masked_prediction.sociable(examples, size, parts)
    assert found % parts == 0 and 1 < found <= -(-size // parts) * parts + parts
    assert examples % found != 1
