"""An objective outside the package, by import path: it trains, goes on, is planned, reported and evaluated."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

OBJECTIVE = '''
import jax
import jax.numpy as jnp
from flax import linen as nn

from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.data.masking import RandomSubset
from m3ae_jax.data.tokens import Group, modality_table
from m3ae_jax.models.encoder import Encoded
from m3ae_jax.objectives.base import NOTHING_HIDDEN, LossOutput, Objective


class Mean(Objective):
    """Restores the mean colour of the hidden patches from that of the visible ones. It has only the core."""

    class Fields(FieldGroup):
        ratio: float = setting(0.5, low=0.1, high=0.9)
        """Share of the patches that is hidden."""

    term_weights = {"mean_loss": 1.0}

    def __init__(self, config, vocab_size):
        self._image = modality_table(config, vocab_size)["image"]
        self.groups = self.view(["image"], {"image": config.mean.ratio})

    def view(self, inputs, hidden=NOTHING_HIDDEN):
        group = Group("image", (self._image,), RandomSubset(hidden.get("image", 0.0)))
        return (group,) if "image" in inputs else ()

    def init(self, rng):
        boxed = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, "embed"))
        return {"layer": {"kernel": boxed(rng, (3, 3))}}

    def loss(self, params, extra, part, rng, step):
        sets = part["groups"]["image"]
        error = colour(sets["visible"]) @ params["layer"]["kernel"] - colour(sets["target"])
        weight = part["example"]["valid"].astype(jnp.float32)
        return LossOutput({"mean_loss": (jnp.sum(jnp.mean(error**2, -1) * weight), jnp.sum(weight))}, {})


class Encoding(Mean):
    """The same, and it gives features."""

    name = "mean"

    def encode(self, params, part, rng=None):
        tokens = part["groups"]["image"]["visible"]
        patches = tokens["value"].reshape(*tokens["value"].shape[:2], -1, 3).mean(2) / 255.0
        return Encoded({"cls": colour(tokens) @ params["layer"]["kernel"]}, {"image": patches})


def colour(tokens):
    """Of the valid patches, `[B, 3]`."""
    pixels = tokens["value"].reshape(*tokens["value"].shape[:2], -1, 3).mean(2) / 255.0
    valid = tokens["valid"][..., None]
    return jnp.sum(pixels * valid, 1) / jnp.maximum(valid.sum(1), 1)
'''
CONFIG = """
from m3ae_jax.config import default


def get_config():
    c = default("mine:{name}")
    c.batch_size, c.duration, c.log_every = 8, "4 steps", "1 steps"
    c.checkpoint.every = c.eval.every = "2 steps"
    c.eval.examples, c.eval.train_examples, c.eval.test_examples = 16, 64, 32
    c.data.modalities = ("image",)
    c.data.train.source = c.data.val.source = "scenes"
    c.data.image_size = c.data.scenes.image_size = 32
    c.optimizer.warmup = "1 steps"
    return c
"""


def main(folder: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "m3ae_jax.main", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def written(folder: Path, name: str) -> str:
    (folder / "mine.py").write_text(OBJECTIVE)
    config = folder / f"{name.lower()}.py"
    config.write_text(CONFIG.format(name=name))
    return f"--config={config}"


def test_one_that_has_only_the_core_trains_goes_on_and_is_planned_and_reported(tmp_path: Path) -> None:
    config, run = written(tmp_path, "Mean"), tmp_path / "run"
    said = main(tmp_path, config, f"--workdir={run}")
    assert "step 4/4" in said and (run / "report.html").exists() and not (run / "pictures").exists()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["val/mean_loss"] for row in rows if "val/mean_loss" in row]
    last = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}[4]
    # As if it had been killed after its first checkpoint.
    shutil.rmtree(run / "checkpoints" / "4")
    said = main(tmp_path, config, f"--workdir={run}")
    assert "going on from step 2" in said
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}[4] == last
    assert "matrix products in closed form" in main(tmp_path, config, f"--workdir={run}", "--mode=plan", "--topology=")
    changed = main(tmp_path, config, f"--workdir={run}", "--config.mean.ratio=0.25", code=2)
    assert "mean.ratio=0.25 (the run has 0.5)" in changed
    named = ["--mode=eval", f"--workdir={run}", "--config.objective=mine:Mean"]
    refused = main(tmp_path, *named, "--config.evals=knn", code=2)
    assert "does not encode" in refused and len(refused.strip().splitlines()) == 1
    # What a run's config.json names is imported only if the command line names it too.
    assert "names code to import" in main(tmp_path, "--mode=eval", f"--workdir={run}", code=2)


def test_one_that_encodes_is_evaluated(tmp_path: Path) -> None:
    config, run = written(tmp_path, "Encoding"), tmp_path / "run"
    said = main(tmp_path, config, f"--workdir={run}", "--config.evals=knn")
    assert "trained, image, cls" in said and "majority class" in said
    (file,) = (run / "evals").glob("knn_4_*.json")
    figures = json.loads(file.read_text())
    assert {name for name in figures if name.startswith("knn/trained/")} >= {"knn/trained/image/cls/k=1"}
    mistake = main(tmp_path, config, "--config.mean.ration=0.5", code=2)
    assert "did you mean --config.mean.ratio" in mistake
