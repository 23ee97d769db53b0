"""Attacks are what the papers write, corruptions what their names say; every picture is judged once."""

import colorsys
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from m3ae_jax import config as config_lib
from m3ae_jax.data import images
from m3ae_jax.errors import UserError
from m3ae_jax.evals import features, labelled, linear, robustness
from m3ae_jax.evals.clean import clean_batches
from m3ae_jax.evals.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from m3ae_jax.evals.labelled import open_labelled
from m3ae_jax.evals.run import check
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train import setup as run_setup

pytestmark = pytest.mark.usefixtures("one_device")


def config(**changes):
    c = config_lib.load("configs/tiny.py")
    c.model.width, c.model.depth, c.m3ae.decoder_depth = 16, 1, 1
    c.data.image_size = 24
    c.eval.batch_size, c.eval.train_examples, c.eval.test_examples = 8, 170, 21
    c.eval.robustness.epsilons, c.eval.robustness.pgd_steps = (0.0, 8.0), 3
    c.eval.label, c.evals = "color", ("robustness",)
    config_lib.apply_overrides(c, [(k, str(v)) for k, v in changes.items()])
    return config_lib.resolve(c)


@pytest.fixture(scope="module")
def setup():
    return run_setup.prepare(config())


@pytest.fixture(scope="module")
def judged(setup):
    state = setup.init_state()
    return state, robustness.evaluate(setup, state)


# --- attacks


def linear_model(classes=2, n=400, width=12, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.3, 0.7, (n, width)).astype(np.float32)
    weight = rng.normal(size=(width, classes)).astype(np.float32)
    label = (x @ weight + rng.normal(size=(n, classes)) * 0.2).argmax(1)

    def loss(pixels):
        each = jax.nn.log_softmax((pixels - 0.5) @ weight)
        return -jnp.take_along_axis(each, label[:, None], axis=1)[:, 0]

    return x, weight, label, loss


@pytest.mark.parametrize("epsilon", [0.01, 0.05])
def test_of_a_linear_model_both_attacks_are_the_closed_form(epsilon):
    x, weight, label, loss = linear_model()
    towards = weight[:, 1] - weight[:, 0]
    sign = np.where(label == 1, -1.0, 1.0)[:, None] * np.sign(towards)  # away from the label
    wanted = x + epsilon * sign
    start = np.random.default_rng(3).uniform(-1, 1, x.shape).astype(np.float32)
    for found in (robustness.fgsm(loss, x, epsilon), robustness.pgd(loss, x, epsilon, start, 5)):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    margin = np.where(label == 1, 1, -1) * ((x - 0.5) @ towards)
    right = ((np.asarray(robustness.fgsm(loss, x, epsilon)) - 0.5) @ weight).argmax(1) == label
    np.testing.assert_array_equal(right, margin - epsilon * np.abs(towards).sum() > 0)
    assert 0 < right.mean() < (margin > 0).mean()


def test_attacks_stay_in_the_ball_and_in_the_range_of_pixels():
    x, _, _, loss = linear_model(classes=4)
    x[:, :4], x[:, 4:8] = 0.0, 1.0
    start = np.random.default_rng(3).uniform(-1, 1, x.shape).astype(np.float32)
    for epsilon in (0.0, 0.02, 0.5):
        for found in (robustness.fgsm(loss, x, epsilon), robustness.pgd(loss, x, epsilon, start, 4)):
            found = np.asarray(found)
            assert found.min() >= 0 and found.max() <= 1
            assert np.abs(found - x).max() <= epsilon + 1e-6
            assert (epsilon == 0) == np.array_equal(found, x)


def test_one_step_of_pgd_goes_as_far_as_is_said():
    """A step of 2.5 epsilon / steps from the start, then back into the ball."""
    x, weight, label, loss = linear_model()
    sign = np.where(label == 1, -1.0, 1.0)[:, None] * np.sign(weight[:, 1] - weight[:, 0])
    start = np.full_like(x, 0.5)
    found = robustness.pgd(loss, x, 0.08, start, 1)
    np.testing.assert_allclose(found, x + np.clip(0.04 + 0.2 * sign, -0.08, 0.08), atol=1e-6)


@pytest.mark.slow
def test_attacks_on_a_model_raise_its_loss_and_more_steps_raise_it_more(setup):
    params = setup.init_state().params
    train = features.encoded(setup, setup.init_state(), "train")
    probe = linear.swept(train.features["trained/image/cls"], train.label, len(train.classes), (1e-3,))
    labels = labelled.LabelRecorder(open_labelled(setup.config, "test"))
    batch = next(clean_batches(setup, labels, 8))
    group, label = batch["groups"]["image"], labels.label_of(batch["example"]["index"])
    pixels = group["visible"]["value"].astype(np.float32) / 255
    encode, pooled = jax.jit(robustness._of_encoder(setup)), features.encoder(setup)
    np.testing.assert_allclose(  # the pixels as they come and in [0, 1] are the same picture
        encode(params, group, pixels),
        pooled(params, {"groups": {"image": group}})["image/cls"],
        atol=1e-4,
    )

    @jax.jit
    def loss(x):
        hidden = (encode(params, group, x) - probe.scale.mean) / probe.scale.deviation
        each = jax.nn.log_softmax(hidden @ probe.weight + probe.bias)
        return -jnp.take_along_axis(each, label[:, None], axis=1)[:, 0]

    epsilon, start = 8 / 255, robustness._starts(np.arange(8), pixels.shape[1:])

    @jax.jit
    def attacked(x):
        return {"fgsm": robustness.fgsm(loss, x, epsilon), "pgd": robustness.pgd(loss, x, epsilon, start, 10)}

    moved = attacked(pixels)
    clean, fgsm, pgd = (np.asarray(loss(x)).mean() for x in (pixels, *moved.values()))
    noise = np.asarray(loss(np.clip(pixels + epsilon * np.sign(start), 0, 1))).mean()
    assert pgd >= fgsm > max(clean, noise) + 0.01
    assert all(np.abs(x - pixels).max() <= epsilon + 1e-6 and x.min() >= 0 and x.max() <= 1 for x in moved.values())


def test_where_pgd_starts_is_the_examples_own():
    whole = robustness._starts(np.arange(6), (4, 5))
    np.testing.assert_array_equal(robustness._starts(np.array([4, 2]), (4, 5)), np.asarray(whole)[[4, 2]])
    assert np.unique(whole).size == whole.size and -1 <= whole.min() < -0.8 and 0.8 < whole.max() <= 1


# --- the evaluation


@pytest.mark.slow
def test_every_picture_is_judged_once_and_the_clean_ones_as_by_the_probe(setup, judged):
    state, result = judged
    found, (train, test) = result.scalars, (features.encoded(setup, state, part) for part in ("train", "test"))
    assert found["robustness/test_examples"] == 21 == len(test.label)  # of batches of 8
    for name, kind in (("trained", "trained/image/cls"), ("untrained", "untrained/image/cls"), ("pixels", "pixels")):
        probe = linear.swept(train.features[kind], train.label, len(train.classes))
        assert found[f"robustness/{name}/clean"] == pytest.approx(probe.accuracy(test.features[kind], test.label))
        for attack in ("fgsm", "pgd"):
            assert found[f"robustness/{name}/{attack}/0"] == found[f"robustness/{name}/clean"]
            assert found[f"robustness/{name}/{attack}/8"] <= found[f"robustness/{name}/clean"]
        of_kinds = [found[f"robustness/{name}/{corruption}"] for corruption in CORRUPTIONS]
        assert found[f"robustness/{name}/corruptions"] == pytest.approx(np.mean(of_kinds))
        hits = np.array(of_kinds) * 21 * len(SEVERITIES)
        np.testing.assert_allclose(hits, np.round(hits), atol=1e-6)  # whole pictures, all of them
    assert found["robustness/majority"] == features.majority(train.label, test.label)
    lines = result.text.split("\n\n")[0].splitlines()
    assert "| PGD, 8/255 |" in result.text and len({line.count("|") for line in lines}) == 1


@pytest.mark.slow
def test_corrupted_pictures_are_judged_as_the_probe_judges_them(setup, judged):
    """Features of corrupted files, by the path of every other evaluation: decoded, encoded, classified."""
    state, result = judged
    train = features.encoded(setup, state, "train")
    probe = linear.swept(train.features["pixels"], train.label, len(train.classes))
    labels, hits = labelled.LabelRecorder(open_labelled(setup.config, "test")), []
    for batch in clean_batches(setup, labels, 21):
        value, example = batch["groups"]["image"]["visible"]["value"], batch["example"]
        for severity in SEVERITIES:
            whole = images.unpatchify(value, 8, (3, 3))
            changed = [corrupted(x, "contrast", severity, p) for x, p in zip(whole, example["position"], strict=True)]
            patches = {"visible": {"value": images.patchify(np.stack(changed), 8)}}
            x = features.raw_pixels(setup, {"groups": {"image": patches}})["pixels"]
            hits.append((probe.logits(x).argmax(1) == labels.label_of(example["index"]))[example["valid"]])
    assert result.scalars["robustness/pixels/contrast"] == pytest.approx(np.concatenate(hits).mean())


@pytest.mark.slow
def test_pictures_alone_will_do_and_fewer_may_be_asked_for():
    changes = {"data.modalities": "image", "eval.robustness.examples": 5, "eval.robustness.pooling": "mean"}
    alone = run_setup.prepare(config(**changes, **{"eval.robustness.epsilons": "4"}))
    found = robustness.evaluate(alone, alone.init_state()).scalars
    assert found["robustness/test_examples"] == 5
    assert all(np.isfinite(value) for value in found.values())
    assert {"robustness/trained/fgsm/4", "robustness/pixels/pgd/4", "robustness/untrained/jpeg"} <= set(found)


def test_texts_alone_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"attacks pictures: data\.modalities=\('text',\) has none") as error:
        check(config(**{"data.modalities": "text"}))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(labelled.LabelledScenes, "modalities", ("text",))
    with pytest.raises(UserError, match=r"eval\.train holds only text"):
        check(config())


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("epsilons", "1,300", r"epsilons=\(1\.0, 300\.0\): numbers between 0 and 255"),
        ("epsilons", "one", r"epsilons='one' is not a tuple"),
        ("pgd_steps", 0, "not between 1 and"),
        ("pooling", "men", "did you mean 'mean'"),
    ],
)
def test_fields_out_of_their_range_are_told(field, value, told):
    with pytest.raises(UserError, match=told):
        config(**{f"eval.robustness.{field}": value})


@pytest.mark.slow
def test_eight_devices_judge_the_same(judged, monkeypatch):
    monkeypatch.setattr(run_setup, "make_mesh", make_mesh)
    many = run_setup.prepare(config(batch_size=64, **{"mesh.preset": "fsdp"}))
    assert many.mesh.size == 8
    found = robustness.evaluate(many, many.init_state()).scalars
    for name, value in judged[1].scalars.items():
        # A gradient of about zero may have either sign: an attack may end elsewhere for a picture or so.
        assert found[name] == pytest.approx(value, abs=2 / 21 if "gd" in name or "fgsm" in name else 1e-6), name


# --- corruptions


@pytest.fixture(scope="module")
def picture():
    """Coloured noise with the spectrum of photographs, amplitude 1 / frequency, `[64, 64, 3] uint8`."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64), indexing="ij"))
    frequency[0, 0] = 1
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(64, 64, 3)), axes=(0, 1)) / frequency[..., None], axes=(0, 1))
    found = noise.real / noise.real.std() * 50 + 110
    return np.clip(np.rint(found), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_repeat_and_grow_with_their_severity(picture, name):
    before = picture.copy()
    found = [corrupted(picture, name, severity, 7) for severity in SEVERITIES]
    assert all(x.dtype == np.uint8 and x.shape == picture.shape for x in found)
    np.testing.assert_array_equal(picture, before)
    np.testing.assert_array_equal(found[2], corrupted(picture, name, 3, 7))
    distance = [np.sqrt(np.square(x.astype(float) - picture).mean()) for x in found]
    assert distance[0] > 0 and np.all(np.diff(distance) > 0), distance
    random = name.endswith("noise") or name == "motion_blur"
    assert random != np.array_equal(found[2], corrupted(picture, name, 3, 8))


def test_the_noises_have_their_sizes():
    grey = np.full((100, 100, 3), 128, np.uint8)
    gaussian = corrupted(grey, "gaussian_noise", 1, 0) / 255.0
    assert gaussian.std() == pytest.approx(0.08, rel=0.03) and gaussian.mean() == pytest.approx(128 / 255, abs=2e-3)
    shot = corrupted(grey, "shot_noise", 1, 0) / 255.0  # a Poisson number of 60 photons: its variance is its mean
    assert shot.var() == pytest.approx(128 / 255 / 60, rel=0.05)
    impulse = corrupted(grey, "impulse_noise", 4, 0)
    assert (impulse != 128).mean() == pytest.approx(0.17, rel=0.05) and set(np.unique(impulse)) == {0, 128, 255}
    assert (impulse == 255).sum() == pytest.approx((impulse == 0).sum(), rel=0.1)


def test_brightness_contrast_and_jpeg_against_other_programs(picture):
    bright = corrupted(picture, "brightness", 2, 0)
    for (row, column), wanted in np.ndenumerate(picture[..., 0]):
        del wanted
        h, s, v = colorsys.rgb_to_hsv(*(picture[row, column] / 255.0))
        rgb = np.array(colorsys.hsv_to_rgb(h, s, min(v + 0.2, 1.0))) * 255
        np.testing.assert_allclose(bright[row, column], rgb, atol=0.51)
    mean = picture.reshape(-1, 3).mean(0)
    np.testing.assert_allclose(corrupted(picture, "contrast", 3, 0), mean + 0.2 * (picture - mean), atol=0.51)
    assert (corrupted(np.zeros((8, 8, 3), np.uint8), "brightness", 1, 0) == 26).all()
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=7)
    np.testing.assert_array_equal(corrupted(picture, "jpeg", 5, 0), np.asarray(Image.open(file)))


def test_pixelate_and_the_blurs():
    rng = np.random.default_rng(0)
    squares = corrupted(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8), "pixelate", 5, 0)
    cells = squares.reshape(12, 4, 12, 4, 3)  # a quarter of the side
    np.testing.assert_array_equal(cells, np.broadcast_to(cells[:, :1, :, :1], cells.shape))
    dot = np.zeros((224, 224, 3), np.uint8)
    dot[100:124, 100:124] = 255
    for name in ("gaussian_blur", "motion_blur"):
        for severity in SEVERITIES:
            blurred = corrupted(dot, name, severity, 3).astype(float)
            assert blurred.sum() == pytest.approx(dot.sum(), rel=0.02)  # light is spread, not lost
    y, x = np.indices((224, 224))

    def moments(light):
        at = [(light * axis).sum() / light.sum() for axis in (y, x)]
        return at, [(light * (axis - mean) ** 2).sum() / light.sum() for axis, mean in zip((y, x), at, strict=True)]

    (_, before), (_, after) = moments(dot[..., 0]), moments(corrupted(dot, "gaussian_blur", 4, 0)[..., 0])
    np.testing.assert_allclose(np.sqrt(np.subtract(after, before)), 4, rtol=0.1)  # sigma, in pixels
    at, _ = moments(corrupted(dot, "motion_blur", 4, 0)[..., 0])
    weight = np.exp(-0.5 * (np.arange(31) / 12) ** 2)
    assert np.hypot(*np.subtract(at, 111.5)) == pytest.approx((weight * np.arange(31)).sum() / weight.sum(), rel=0.05)
    assert abs(at[0] - 111.5) <= abs(at[1] - 111.5)  # within 45 degrees of the horizontal
