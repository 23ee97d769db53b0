"""A checkpoint of eight devices is evaluated on one, and one of one device on eight, with the same figures."""

import contextlib

import jax
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.evals.run import evaluate
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train import loop, setup

pytestmark = pytest.mark.slow

SMALL = {
    "batch_size": "16",
    "duration": "2 steps",
    "mesh.preset": "fsdp",
    "model.width": "32",
    "model.depth": "1",
    "m3ae.decoder_width": "32",
    "m3ae.decoder_depth": "1",
    "data.scenes.image_size": "32",
    "data.image_size": "32",
    "optimizer.warmup": "1 steps",
    "eval.examples": "20",
    "eval.pictures": "0",
    "checkpoint.every": "2 steps",
    "evals": "",
}
ALONE = {
    # Of 12 and 16 in a batch something is left over on either mesh; of fewer, rounding decides on the probe's penalty.
    "eval.train_examples": "170",
    "eval.test_examples": "21",
    "eval.pairs": "21",
    "eval.scored_pairs": "5",
    "eval.batch_size": "12",
    "evals": "knn,probe,retrieval",
}


@contextlib.contextmanager
def devices(count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda config: make_mesh(config, jax.devices()[:count]))
        yield


@pytest.mark.parametrize(("trained_on", "moved_to"), [(8, 1), (1, 8)])
def test_another_number_of_devices_finds_the_same(tmp_path, trained_on, moved_to):
    config = config_lib.load("configs/tiny.py")
    config_lib.apply_overrides(config, list(SMALL.items()))
    figures = {}
    with devices(trained_on):
        loop.train(config, tmp_path)
    for count in (trained_on, moved_to):
        alone = config_lib.load(str(tmp_path / "config.json"))
        config_lib.apply_overrides(alone, list(ALONE.items()))
        with devices(count):
            figures[count] = evaluate(alone, tmp_path)
    assert figures[1].keys() == figures[8].keys()
    assert {"val/loss", "knn/trained/both/cls/k=5", "probe/pixels/accuracy"} <= set(figures[1])
    assert figures[8]["knn/test_examples"] == 21 and figures[8]["knn/train_examples"] == 170
    for name, value in figures[8].items():
        assert figures[1][name] == pytest.approx(value, abs=1e-4), name
