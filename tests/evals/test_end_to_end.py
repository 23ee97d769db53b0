"""All evaluations on a small run: at its end, and alone on its checkpoint by their own configs."""

import json
import math

import jax
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.evals.run import EVALUATIONS, evaluate, train_and_evaluate
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train import setup

pytestmark = pytest.mark.slow

SMALL = {
    "batch_size": "16",
    "duration": "2 steps",
    "model.width": "32",
    "model.depth": "1",
    "m3ae.decoder_width": "32",
    "m3ae.decoder_depth": "1",
    "data.scenes.image_size": "32",
    "data.image_size": "32",
    "optimizer.warmup": "1 steps",
    "eval.examples": "16",
    "eval.pictures": "0",
    "eval.train_examples": "40",
    "eval.test_examples": "24",
    "eval.pairs": "20",
    "eval.scored_pairs": "5",
    "eval.batch_size": "16",
    "eval.linear_probe.duration": "2 steps",
    "eval.linear_probe.warmup": "1 steps",
    "eval.finetune.duration": "2 steps",
    "eval.finetune.warmup": "1 steps",
    "checkpoint.every": "2 steps",
}


def test_all_evaluations_run_and_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    names = tuple(name for name in EVALUATIONS if name != "grounding")
    config = config_lib.load("configs/tiny.py")
    config_lib.apply_overrides(config, [*SMALL.items(), ("evals", ",".join(names))])
    train_and_evaluate(config, tmp_path)
    first = {}
    for name in names:
        found = json.loads((tmp_path / "evals" / f"{name}_2.json").read_text())
        first[name] = found
        assert len(found) > 5 and all(math.isfinite(value) for value in found.values()), found
        lines = (tmp_path / "evals" / f"{name}_2.md").read_text().strip().splitlines()
        assert len({line.count("|") for line in lines}) == 1 and lines[0].startswith("| ")
    assert {"knn/trained/image/cls/k=1", "knn/untrained/both/mean/k=5", "knn/pixels/k=1", "knn/majority"} <= set(
        first["knn"]
    )
    assert first["retrieval"]["retrieval/chance/image_to_text/recall@1"] < 0.2
    assert first["masked_prediction"]["masked_prediction/text/0.5/n"] > 10

    again = evaluate(config_lib.load(str(tmp_path / "config.json")), tmp_path)
    for name in names:
        for key, value in first[name].items():
            assert key == "step" or again[key] == pytest.approx(value, abs=1e-4), key
