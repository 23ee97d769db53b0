"""All evaluations on a small run: at its end, and alone on its checkpoint by their own configs."""

import json
import logging
import math

import jax
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.evals import grounding
from m3ae_jax.evals.run import EVALUATIONS, evaluate, train_and_evaluate
from m3ae_jax.objectives.base import Embeds, FindsKeywords, Grounds, Tokenizes
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


def test_item_15_all_evaluations_run_repeat_and_end_with_a_verdict(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "m3ae_jax")
    # A run takes the root logger's handlers away.
    monkeypatch.setattr(logging.getLogger("m3ae_jax"), "handlers", [caplog.handler])
    monkeypatch.setattr(setup, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    monkeypatch.setattr(grounding, "SCENES", 16)
    names = tuple(
        name
        for name, needs in EVALUATIONS.items()
        if not {Embeds, FindsKeywords, Grounds, Tokenizes} & {*needs.objective}
    )
    config = config_lib.load("configs/tiny.py")
    config_lib.apply_overrides(config, [*SMALL.items(), ("evals", ",".join(names))])
    train_and_evaluate(config, tmp_path)
    first = {}
    for name in names:
        (file,) = (tmp_path / "evals").glob(f"{name}_2_scenes*.json")
        found = json.loads(file.read_text())
        assert found.pop("data")
        first[name] = found
        assert len(found) > 5 and all(math.isfinite(value) for value in found.values()), found
        *lines, empty, said = file.with_suffix(".md").read_text().strip().splitlines()
        assert len({line.count("|") for line in lines}) == 1 and lines[0].startswith("| ")
        assert not empty and said.startswith("Verdict: ") and said.endswith(".")
        shown = next(text for text in caplog.messages if said[:40] in text)
        assert max(map(len, shown.splitlines())) <= 100, "on the console"
    last = caplog.messages[-1]
    assert f"m3ae_jax.load('{tmp_path}')" in last and f"--mode=eval --workdir={tmp_path}" in last
    assert (tmp_path / "report.html").exists() and f"{tmp_path}/report.html" in last
    assert f"--config={tmp_path}/config.json" in last and '--config.duration="4 steps"' in last
    assert {"knn/trained/image/cls/k=1", "knn/untrained/both/mean/k=5", "knn/pixels/k=1", "knn/majority"} <= set(
        first["knn"]
    )
    assert first["retrieval"]["retrieval/chance/image_to_text/recall@1"] < 0.2
    assert first["masked_prediction"]["masked_prediction/text/0.5/n"] > 10

    again = evaluate(config_lib.load(str(tmp_path / "config.json")), tmp_path)
    (file,) = (tmp_path / "evals").glob("validation_2*.md")
    assert "Verdict: val/image_loss" in file.read_text()
    for name in names:
        for key, value in first[name].items():
            assert key == "step" or again[key] == pytest.approx(value, abs=1e-4), key
