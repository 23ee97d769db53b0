"""Linear probe and fine-tuning: the parts against NumPy or by hand, both on scenes, on one device and eight."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.evals import finetune, linear_probe, supervised
from m3ae_jax.evals.labelled import LabelRecorder
from m3ae_jax.evals.run import check, run
from m3ae_jax.objectives.parts.pixels import normalize_pixels
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train import setup as run_setup

BLOCKS = "encoder/transformer/blocks"


def config(name, **changes):
    c = config_lib.load("configs/tiny.py")
    c.model.width, c.model.depth, c.model.heads, c.m3ae.decoder_depth = 16, 2, 2, 1
    c.data.image_size = c.data.scenes.image_size = 24
    c.eval.batch_size, c.eval.train_examples, c.eval.test_examples = 16, 40, 21
    c.evals = (name,)
    fields = {f"eval.{name}.batch_size": 16, f"eval.{name}.duration": "3 steps", f"eval.{name}.warmup": "1 steps"}
    config_lib.apply_overrides(c, [(k, str(v)) for k, v in (fields | changes).items()])
    return config_lib.resolve(c)


def prepared(name, **changes):
    return run_setup.prepare(config(name, **changes))


@pytest.fixture
def one_device(monkeypatch):
    """A program for eight devices takes several times as long to compile."""
    monkeypatch.setattr(run_setup, "make_mesh", lambda c: make_mesh(c, jax.devices()[:1]))


@pytest.fixture(scope="module")
def state():
    """Fresh; of all setups here that change nothing of the model's shape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_setup, "make_mesh", lambda c: make_mesh(c, jax.devices()[:1]))
        return prepared("finetune").init_state()


# --- shared parts


def test_sums_and_cross_entropy_against_numpy():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(9, 7)).astype(np.float32), rng.integers(0, 7, 9).astype(np.int32)
    weight = np.array([1] * 7 + [0] * 2, np.float32)
    label[8] = -1
    batch = {"valid": np.array([True] * 7 + [False, True]), "label": label, "real": np.array([True] * 9)}
    target = np.eye(7)[np.maximum(label, 0)]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = supervised.cross_entropy(jnp.asarray(logits), jnp.asarray(target))
    np.testing.assert_allclose(loss, -(target * log_p).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(supervised.counted(batch), weight)
    found = jax.device_get(supervised.sums(logits, batch, supervised.Answers(target, label, weight)))
    rank = (-logits).argsort(1).argsort(1)[np.arange(9), np.maximum(label, 0)]
    assert found["count"] == 7 and found["left_out"] == 1
    assert found["correct"] == (rank[:7] == 0).sum() and found["top5"] == (rank[:7] < 5).sum()
    assert found["loss"] == pytest.approx(np.asarray(loss)[:7].sum(), rel=1e-5)
    np.testing.assert_array_equal(found["classes"], np.bincount(label[:7], minlength=7))


def test_chosen_examples_are_those_of_the_other_evaluations(one_device):
    from m3ae_jax.data.sources.base import Record
    from m3ae_jax.evals.clean import clean_batches

    class Counting:
        modalities, classes, fingerprint = ("text",), ("a", "b"), "x"

        def __len__(self):
            return 50

        def read(self, indices):
            return [Record(caption=b"a red circle", label=int(i)) for i in indices]

    chosen = LabelRecorder(Counting(), 12)
    assert len(chosen) == 12 and len(LabelRecorder(Counting(), 50)) == len(LabelRecorder(Counting())) == 50
    found = [record["label"] for record in chosen.read(np.arange(12))]
    setup = prepared("linear_probe")
    usual = [b["example"]["index"][b["example"]["valid"]] for b in clean_batches(setup, Counting(), 12)]
    assert sorted(found) == sorted(np.concatenate(usual).tolist()) and len(set(found)) == 12


def test_batches_are_capped_and_each_example_is_trained_on_and_tested_once(one_device, caplog):
    fields = {"eval.linear_probe.batch_size": 2048, "eval.linear_probe.duration": "2 epochs"}
    setup = prepared("linear_probe", **fields)
    with caplog.at_level(logging.INFO, "m3ae_jax"):
        task = supervised.Task(setup, "linear_probe")
    assert (task.batch_size, task.steps, task.warmup) == (40, 2, 1)
    assert "batches of 40, not of 2048" in caplog.text
    batches = [jax.device_get(batch) for batch in task.train_batches()]
    pictures = [{row.tobytes() for row in b["groups"]["image"]["visible"]["value"]} for b in batches]
    assert [len(p) for p in pictures] == [40, 40] and not pictures[0] & pictures[1]  # cropped anew
    assert sorted(batches[0]["label"]) == sorted(batches[1]["label"])
    tested = [jax.device_get(batch) for batch in task.test_batches()]
    assert [b["valid"].sum() for b in tested] == [16, 5]
    assert sum((b["real"] & ~b["valid"]).sum() for b in tested) == 0
    # The rate is that of the real batch: at its peak, after the one step of warmup, 0.1 * 40 / 256.
    task.options.optimizer, task.options.momentum = "sgd", 0.0
    solver = linear_probe.optimizer(task)
    state = solver.init(jnp.zeros(1))
    moved = []
    for _ in range(2):
        update, state = solver.update(jnp.ones(1), state, jnp.zeros(1))
        moved.append(float(update[0]))
    assert moved == pytest.approx([0.0, -0.015625])


@pytest.mark.parametrize("name", supervised.PROTOCOLS)
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"input": "pixels"}, r"input='pixels' is not one of both, image, text"),
        ({"pooling": "max"}, r"pooling='max' is not one of cls, mean"),
        ({"batch_size": 1}, r"batch_size=1 is not from 2 on"),
        ({"duration": "0 epochs"}, r"duration='0 epochs': must be more than 0"),
        ({"warmup": "soon"}, r"warmup='soon': a duration is"),
        ({"crop_scale": "(0.5,0.1)"}, r"crop_scale=\(0\.5, 0\.1\): \(least, most\)"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(name, changes, told):
    with pytest.raises(UserError, match=rf"eval\.{name}\.{told}") as error:
        config(name, **{f"eval.{name}.{field}": value for field, value in changes.items()})
    assert "\n" not in str(error.value)


def test_an_input_that_is_not_there_is_told():
    changes = {"data.modalities": "image", "eval.finetune.input": "both", "m3ae.use_type_embedding": "false"}
    with pytest.raises(UserError, match=r"eval\.finetune\.input='both' needs image and text: data has only image"):
        check(config("finetune", **changes))


def test_divergence_is_said(one_device, caplog):
    setup = prepared("linear_probe", **{"eval.linear_probe.duration": "20 steps"})
    task = supervised.Task(setup, "linear_probe")
    nan = {"count": 16.0, "classes": np.ones(8), "loss": np.nan, "correct": 2.0, "top5": 9.0}
    nan |= {"left_out": 0}
    worse = nan | {"loss": 16 * 3.0}
    with caplog.at_level(logging.INFO, "m3ae_jax"):
        trained = supervised.train(task, lambda state, batch, done: (state + 1, {"a": nan, "b": worse}), 0)
        both = supervised.train(task, lambda state, batch, done: (state + 1, {"a": nan, "b": nan}), 0)
    assert trained.state == 20 and trained.diverged == {"a": 2} and both.state == 2
    assert (
        "the loss of a is nan at step 2" in caplog.text and "eval.linear_probe.learning_rate (now 0.1)" in caplog.text
    )
    assert "b ends at a training loss of 3.0000, no better than guessing (2.0794)" in caplog.text
    assert sum("step " in r.message and " of 20" in r.message for r in caplog.records if r.levelname == "INFO") == 11
    count = supervised.Count(1.0, 0.5, 0.9, 0, np.ones(8))
    found = supervised.result(task, trained, {"a": count, "b": count})
    assert all(math.isfinite(value) for value in found.scalars.values())
    assert found.scalars["linear_probe/diverged_at_step"] == 2 and "a, diverged at step 2" in found.text
    assert len({line.count("|") for line in found.text.split("\n\n")[0].splitlines()}) == 1


# --- linear probe


def clusters(n, width, classes, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    x = 5 * np.random.default_rng(9).normal(size=(classes, width))[y] + rng.normal(size=(n, width))
    return (x * 3 + 7).astype(np.float32), y.astype(np.int32)


def labelled(y):
    valid = np.ones(len(y), bool)
    return {"label": y, "valid": valid, "real": valid}


def stepper(solver):
    return jax.jit(lambda head, x, batch: linear_probe.head_step(head, solver, x, batch))


def test_batch_norm_has_no_scale_and_is_numpys():
    x, _ = clusters(30, 6, 3)
    weight = np.array([1.0] * 25 + [0.0] * 5, np.float32)
    mean, variance = linear_probe.moments(x, weight)
    np.testing.assert_allclose(mean, x[:25].mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, x[:25].var(0), rtol=1e-5)
    wanted = (x - x[:25].mean(0)) / np.sqrt(x[:25].var(0) + 1e-5)
    np.testing.assert_allclose(linear_probe.normalize(x, mean, variance), wanted, atol=1e-4)
    solver = optax.sgd(0.1)
    head, step = linear_probe.fresh(6, 3, 0, solver), stepper(solver)
    assert {k: v.shape for k, v in head.params.items()} == {"kernel": (6, 3), "bias": (3,)}
    # The running averages of a few steps are averages of their batches, with no memory of where they began.
    means = []
    for seed in range(3):
        x, y = clusters(30, 6, 3, seed)
        head, _ = step(head, x, labelled(y))
        means.append(x.mean(0))
    weights = np.array([0.81, 0.9, 1.0])
    np.testing.assert_allclose(head.mean / head.share, weights @ np.array(means) / weights.sum(), rtol=1e-4)


def test_a_lars_step_by_hand():
    x, y = clusters(24, 5, 3)
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.8, 2, 10)
    solver = optax.lars(rate, weight_decay=0.0, momentum=0.9)
    head, head_step = linear_probe.fresh(5, 3, 0, solver), stepper(solver)
    w, b = np.array(head.params["kernel"], np.float64), np.zeros(3)
    momentum = [np.zeros_like(w), np.zeros_like(b)]
    normal = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    for step in range(4):
        p = np.exp(normal @ w + b)
        p = p / p.sum(1, keepdims=True) - np.eye(3)[y]
        for i, (value, grad) in enumerate(((w, normal.T @ p / 24), (b, p.mean(0)))):
            norms = np.linalg.norm(value), np.linalg.norm(grad)
            trust = 0.001 * norms[0] / norms[1] if min(norms) > 0 else 1.0  # (arXiv 1708.03888, equation 6)
            momentum[i] = 0.9 * momentum[i] + float(rate(step)) * trust * grad
        w, b = w - momentum[0], b - momentum[1]
        head, _ = head_step(head, x, labelled(y))
        np.testing.assert_allclose(head.params["kernel"], w, atol=1e-6)
        np.testing.assert_allclose(head.params["bias"], b, atol=1e-6)


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_separable_features_are_learnt(one_device, name):
    changes = {"optimizer": name, "duration": "300 steps", "batch_size": 40, "learning_rate": 5.0}
    setup = prepared("linear_probe", **{f"eval.linear_probe.{k}": v for k, v in changes.items()})
    solver = linear_probe.optimizer(supervised.Task(setup, "linear_probe"))
    head, step = linear_probe.fresh(12, 8, 0, solver), stepper(solver)
    for seed in range(300):
        x, y = clusters(40, 12, 8, seed)
        head, _ = step(head, x, labelled(y))
    x, y = clusters(500, 12, 8, 1000)
    found = linear_probe.tested(head, jnp.asarray(x), labelled(y))
    assert float(found["correct"]) / 500 > 0.99


@pytest.mark.slow
def test_linear_probe_on_scenes_reads_words_and_leaves_the_encoder_alone(one_device, state):
    changes = {"input": "text", "pooling": "mean", "optimizer": "sgd", "duration": "60 steps", "learning_rate": 5.0}
    fields = {f"eval.linear_probe.{k}": v for k, v in changes.items()}
    setup = prepared("linear_probe", **fields, **{"eval.train_examples": 160})
    before = jax.device_get(state.params)
    found = run("linear_probe", setup, state)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))
    # The caption names the shape, so even an untrained encoder tells it.
    assert found.scalars["linear_probe/accuracy"] > found.scalars["linear_probe/majority"] + 0.3
    # A fresh state is the untrained encoder.
    for key in ("accuracy", "top5_accuracy", "train_accuracy", "train_loss"):
        of_both = [found.scalars[f"linear_probe/{who}{key}"] for who in ("", "untrained/")]
        assert of_both[0] == pytest.approx(of_both[1], abs=1e-5)
    assert found.scalars["linear_probe/test_examples"] == 21 and found.scalars["linear_probe/steps"] == 60


# --- fine-tuning


def test_layers_and_their_rates():
    shape = jax.ShapeDtypeStruct
    tuned = {
        "encoder": {
            f"{BLOCKS}/mlp_in/kernel": shape((3, 4, 8), jnp.float32),
            f"{BLOCKS}/norm_mlp/scale": shape((3, 4), jnp.float32),
            "encoder/transformer/norm/scale": shape((4,), jnp.float32),
            "encoder/image/embedding/kernel": shape((12, 4), jnp.float32),
            "encoder/image/embedding/bias": shape((4,), jnp.float32),
            "encoder/text/embedding/embedding": shape((9, 4), jnp.float32),
            "encoder/image/position_embedding": shape((9, 4), jnp.float32),
            "encoder/image/type_embedding": shape((1, 1, 4), jnp.float32),
            "encoder/cls_token": shape((1, 1, 4), jnp.float32),
        },
        "norm": {"scale": shape((4,), jnp.float32), "bias": shape((4,), jnp.float32)},
        "head": {"kernel": shape((4, 2), jnp.float32), "bias": shape((2,), jnp.float32)},
    }
    stacked = {f"{BLOCKS}/mlp_in/kernel", f"{BLOCKS}/norm_mlp/scale"}
    rates = finetune.layer_rates(tuned, (BLOCKS, "decoder/transformer/blocks"), 0.5)
    blocks = [0.5**3, 0.5**2, 0.5]  # layers 1, 2 and 3 of 4
    assert rates["encoder"][f"{BLOCKS}/mlp_in/kernel"].shape == (3, 1, 1)
    np.testing.assert_allclose(rates["encoder"][f"{BLOCKS}/mlp_in/kernel"].ravel(), blocks)
    np.testing.assert_allclose(rates["encoder"][f"{BLOCKS}/norm_mlp/scale"][:, 0], blocks)
    others = {name: float(rate) for name, rate in rates["encoder"].items() if name not in stacked}
    assert others.pop("encoder/transformer/norm/scale") == 1.0
    assert set(others.values()) == {0.5**4}
    assert {float(x) for part in ("norm", "head") for x in rates[part].values()} == {1.0}


@pytest.mark.slow
def test_what_is_trained_and_how_fast(one_device, state):
    """Adam's first step, a sign, moves each layer by its rate; decay spares what it should."""
    setup = prepared("finetune", **{"eval.finetune.warmup": "0 steps", "eval.finetune.weight_decay": 0.5})
    task = supervised.Task(setup, "finetune")
    (tuned, moments), solver, _ = finetune._begin(task, state.params)
    names = set(tuned["encoder"])
    assert {f"{BLOCKS}/attention/qkv/kernel", "encoder/cls_token", "encoder/image/embedding/kernel"} <= names
    assert not [name for name in names if "decoder" in name or "text" in name or "mask" in name or "output" in name]
    assert {name for name in names if name.startswith(setup.objective.stacks)} == {n for n in names if "/blocks/" in n}
    ones = jax.tree.map(jnp.ones_like, tuned)
    updates, _ = solver.update(ones, moments, tuned)
    # -rate * layer * (sign + decay * value); the rate is 1e-3 at first, depth 2.
    kernel = tuned["encoder"][f"{BLOCKS}/mlp_in/kernel"]
    wanted = -1e-3 * np.array([0.75**2, 0.75]).reshape(2, 1, 1) * (1 + 0.5 * np.asarray(kernel))
    np.testing.assert_allclose(updates["encoder"][f"{BLOCKS}/mlp_in/kernel"], wanted, rtol=1e-4)
    layers = {
        "encoder/cls_token": 0.75**3,
        "encoder/transformer/norm/scale": 1.0,
        "encoder/image/embedding/bias": 0.75**3,
    }
    for name, layer in layers.items():
        np.testing.assert_allclose(updates["encoder"][name], -1e-3 * layer, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(updates["head"]["kernel"], -1e-3 * (1 + 0.5 * tuned["head"]["kernel"]), rtol=1e-4)
    np.testing.assert_allclose(updates["norm"]["scale"], -1e-3, rtol=1e-4)
    merged = finetune.merged(state.params, jax.tree.map(lambda x: x + 1, tuned["encoder"]))
    assert jax.tree.structure(merged) == jax.tree.structure(state.params)
    before, after = state.params["encoder"], merged["encoder"]
    np.testing.assert_allclose(after["cls_token"], before["cls_token"] + 1)
    assert jax.tree.leaves(merged["decoder"])[0] is jax.tree.leaves(state.params["decoder"])[0]


PLACES = finetune.places(4, (3, 3))


def test_places_are_those_of_the_patches():
    from m3ae_jax.data.images import patchify

    picture = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    patches = patchify(picture[None], 4)[0]
    channel = np.tile(np.arange(3), 16)
    np.testing.assert_array_equal(patches, picture[PLACES[0], PLACES[1], channel])


def test_mixup_and_cutmix_draws():
    draw = jax.jit(lambda key: finetune.draw_weights(key, PLACES, 0.8, 1.0, 0.5))
    found = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 400)))
    cut = np.array([set(np.unique(w)) <= {0.0, 1.0} for w in found])
    assert 0.4 < cut.mean() < 0.6  # half, standard deviation 0.025
    assert len(np.unique(found[~cut].reshape(-1, found[0].size)[:, 0])) > 150
    assert all(np.ptp(w) == 0 for w in found[~cut])
    for weight in found[cut]:
        rows, columns = PLACES[0][weight == 0], PLACES[1][weight == 0]
        if rows.size:  # what is cut is one box, counted in pixels of three channels
            box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            assert (weight == 0).sum() == 3 * box
            assert np.mean(weight) == pytest.approx(1 - box / 144, abs=1e-5)
    # A beta distribution of equal parameters has the mean 1/2; that of 0.8 the variance 1 / (4 * 2.6).
    share = found[~cut].mean(axis=(1, 2))
    assert share.mean() == pytest.approx(0.5, abs=0.07) and share.var() == pytest.approx(1 / 10.4, abs=0.03)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_one_of_the_two_alone(mixup, cutmix):
    for seed in range(5):
        weight = np.asarray(finetune.draw_weights(jax.random.key(seed), PLACES, mixup, cutmix, 0.5))
        assert (set(np.unique(weight)) <= {0.0, 1.0}) == bool(cutmix)


def test_blended_pictures_and_answers(one_device):
    setup = prepared("finetune")
    mix = finetune._mixer(setup)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 9, 192), np.uint8)
    visible = {"value": jnp.asarray(pixels), "valid": np.ones((4, 9), bool), "position": np.tile(np.arange(9), (4, 1))}
    label = np.array([0, 1, 2, 3], np.int32)
    batch = {"groups": {"image": {"visible": visible}}, "label": label, "valid": np.array([1, 1, 1, 0], bool)}
    places, normal = finetune.places(8, (3, 3)), np.asarray(normalize_pixels(pixels, setup.config))
    shares = []
    for seed in range(12):
        key = jax.random.key(seed)
        mixed, answers = finetune.blended(mix, key, batch, 5, 0.1)
        target, larger, weight = answers.target, answers.label, answers.weight
        own = np.asarray(finetune.draw_weights(key, places, 0.8, 1.0, 0.5))
        wanted = own * normal + (1 - own) * normal[::-1]
        np.testing.assert_allclose(mixed["groups"]["image"]["visible"]["value"], wanted, atol=1e-5)
        smooth = 0.9 * np.eye(5)[label] + 0.02
        share = own.mean()
        np.testing.assert_allclose(target, share * smooth + (1 - share) * smooth[::-1], atol=1e-5)
        np.testing.assert_allclose(np.sum(target, axis=1), 1.0, rtol=1e-5)
        assert larger.tolist() == (label if share >= 0.5 else label[::-1]).tolist()
        assert weight.tolist() == [0, 1, 1, 0]  # the last picture does not decode, and is part of the first
        shares.append(share)
    assert len(set(shares)) > 8
    _, answers = finetune.blended(None, jax.random.key(0), batch, 5, 0.0)
    np.testing.assert_array_equal(answers.target, np.eye(5)[label])
    assert answers.label is label and answers.weight.tolist() == [1, 1, 1, 0]


def test_nothing_is_mixed_with_captions(one_device):
    for changes in ({"input": "both"}, {"input": "text"}, {"mixup": 0.0, "cutmix": 0.0}):
        setup = prepared("finetune", **{f"eval.finetune.{k}": v for k, v in changes.items()})
        assert finetune._mixer(setup) is None


@pytest.mark.slow
def test_each_step_draws_anew_and_the_same_when_repeated(one_device, state):
    found = {}
    for name, changes in {"mix": {"drop_path": 0.0}, "drop": {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.9}}.items():
        setup = prepared("finetune", **{f"eval.finetune.{k}": v for k, v in changes.items()})
        task = supervised.Task(setup, "finetune")
        batch = next(task.train_batches())
        carry, solver, _ = finetune._begin(task, state.params)
        step = jax.jit(finetune._step(task, solver))
        found[name] = [float(step(carry, batch, np.int32(n), state.params)[1]["fine-tuned"]["loss"]) for n in (0, 1, 0)]
    for first, second, again in found.values():
        assert first == again != second


def test_drop_path_is_off_without_a_key(one_device, state):
    setup = prepared("finetune", **{"model.drop_path": 0.5})
    params, batch = state.params, next(supervised.Task(setup, "finetune").train_batches())
    encode = jax.jit(lambda key: setup.objective.encode(params, batch, key).pooled["cls"])
    plain = setup.objective.encode(params, batch).pooled["cls"]
    first, second = encode(jax.random.key(1)), encode(jax.random.key(2))
    # The first of two blocks is never left out, the second with probability 1/2: then its input is the result.
    differs = np.abs(np.asarray(first - second)).max(1) > 1e-6
    assert differs.sum() > 0
    assert (np.abs(np.asarray(first - plain)).max(1) > 1e-6).any()
    np.testing.assert_array_equal(first, encode(jax.random.key(1)))
    np.testing.assert_allclose(plain, setup.objective.encode(params, batch, None).pooled["cls"])


PLAIN = {"mixup": 0.0, "cutmix": 0.0, "rand_augment": 0.0, "crop_scale": "(1.0,1.0)", "crop_ratio": "(1.0,1.0)"}
PLAIN |= {"label_smoothing": 0.0, "flip": "false", "drop_path": 0.0}


@pytest.mark.slow
def test_finetuning_beats_the_majority_and_keeps_the_state(one_device, state):
    changes = PLAIN | {"duration": "100 steps", "learning_rate": 1e-2, "batch_size": 40}
    fields = {f"eval.finetune.{k}": v for k, v in changes.items()}
    setup = prepared("finetune", **fields, **{"eval.train_examples": 160, "eval.label": "color"})
    before = jax.device_get(state.params)
    found = run("finetune", setup, state).scalars
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))
    assert found["finetune/accuracy"] > found["finetune/majority"] + 0.3
    assert found["finetune/train_loss"] < 1.0 and found["finetune/test_examples"] == 21


@pytest.mark.slow
@pytest.mark.parametrize("name", supervised.PROTOCOLS)
def test_eight_devices_say_what_one_does(name, monkeypatch):
    """With everything that is drawn at random; the test examples do not divide by the batch."""
    found = []
    for devices, extra in ((1, {}), (8, {}), (8, {"mesh.preset": "fsdp"})):
        monkeypatch.setattr(run_setup, "make_mesh", lambda c, n=devices: make_mesh(c, jax.devices()[:n]))
        setup = prepared(name, **extra)
        assert setup.mesh.size == devices
        found.append(run(name, setup, setup.init_state()).scalars)
        assert found[-1][f"{name}/test_examples"] == 21
    for other in found[1:]:
        assert set(other) == set(found[0])
        assert other[f"{name}/train_loss"] == pytest.approx(found[0][f"{name}/train_loss"], abs=1e-4)
        assert other[f"{name}/accuracy"] == pytest.approx(found[0][f"{name}/accuracy"], abs=0.05)
