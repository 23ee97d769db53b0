"""Validation losses repeat exactly, and the priors are what a blind predictor reaches."""

import math

import numpy as np
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.evals.reconstructions import Reconstructions, _pictures
from m3ae_jax.evals.validation import Validation, priors
from m3ae_jax.train import setup as run_setup

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def setup():
    config = config_lib.load("configs/tiny.py")
    config.model.width, config.model.depth, config.m3ae.decoder_depth = 16, 1, 1
    config.eval.examples, config.eval.batch_size, config.eval.pictures = 20, 16, 3
    config.m3ae.normalize_patches = True
    return run_setup.prepare(config_lib.resolve(config))


def test_validation_repeats_and_counts_each_example_once(setup):
    state = setup.init_state()
    validate = Validation(setup)
    first = validate(state)
    assert first == validate(state)
    assert set(first) >= {"val/loss", "val/image_loss", "val/text_loss", "val/text_accuracy"}
    weights = setup.config.m3ae
    total = weights.image_weight * first["val/image_loss"] + weights.text_weight * first["val/text_loss"]
    assert math.isclose(first["val/loss"], total, rel_tol=1e-5)
    examples = sum(batch["example"]["valid"].sum() for batch in setup.val_batches)
    assert examples == 20


def test_priors(setup):
    found = priors(setup)
    assert found["prior/text_loss"] < math.log(setup.tokenizer.vocab_size)
    # Targets of unit variance in each patch leave a mean picture little to say.
    assert 0.8 < found["prior/image_loss"] < 1.05


def test_pictures_show_the_examples_and_undo_the_normalisation(setup, tmp_path):
    draw = Reconstructions(setup, tmp_path)
    drawn = draw(setup.init_state())
    assert drawn is not None
    sheet, captions = drawn
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3 and captions
    assert (tmp_path / "step_00000000.png").exists()
    # A guess that is the target itself must give the original back.
    part = draw._part
    group = {name: {k: v[0] for k, v in tokens.items()} for name, tokens in part["groups"]["image"].items()}
    truth = np.asarray(setup.objective._pixels(part, setup.objective._values(part)["image"]))[0]
    original, masked, restored = _pictures(setup, group, truth)
    assert np.abs(original.astype(int) - restored).max() <= 1
    assert (original != masked).any()
