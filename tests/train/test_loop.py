"""Runs end to end: stopping and going on, starting from weights, every config."""

import glob

import jax
import numpy as np
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.checkpoint.manager import find, load_params
from m3ae_jax.errors import Stopped, UserError
from m3ae_jax.evals.run import train_and_evaluate
from m3ae_jax.evals.validation import Validation
from m3ae_jax.metrics.writers import read_rows
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train import loop, setup

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """A program for eight devices takes several times as long to compile; test_step compares the two."""
    monkeypatch.setattr(setup, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


def shrunk(path="configs/tiny.py", **changes):
    """A shipped config at a size for tests, on scenes."""
    config = config_lib.load(path)
    small = {
        "batch_size": 16,
        "duration": "2 steps",
        "model.width": 32,
        "model.depth": 2,
        "model.heads": 4,
        "m3ae.decoder_width": 32,
        "m3ae.decoder_depth": 1,
        "m3ae.decoder_heads": 4,
        "data.train.source": "scenes",
        "data.val.source": "scenes",
        "data.scenes.image_size": 32,
        "data.image_size": 32,
        "data.patch_size": 8,
        "data.max_text_tokens": 16,
        "data.tokenizer": "scenes",
        "optimizer.warmup": "1 steps",
        "eval.examples": 16,
        "eval.every": "100 steps",
        "eval.pictures": 2,
        "log_every": "1 steps",
        "checkpoint.every": "2 steps",
        "evals": (),
    }
    for name, value in {**small, **changes}.items():
        group, _, leaf = name.rpartition(".")
        target = config
        for part in group.split(".") if group else []:
            target = target[part]
        target[leaf] = value
    return config


def losses(workdir):
    return {row["step"]: row["train/loss"] for row in read_rows(workdir) if "train/loss" in row}


def different(a, b):
    """Names of the leaves that are not bit-equal."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return [jax.tree_util.keystr(path) for (path, x), y in pairs if not np.array_equal(x, y)]


# Some differ in the size alone, which `shrunk` overrides: one of them is enough.
DISTINCT = {
    config_lib.to_json(shrunk(path, **{"model.size": "base"})): path for path in sorted(glob.glob("configs/*.py"))
}


@pytest.mark.parametrize("path", DISTINCT.values())
def test_every_config_trains_two_steps_shrunk(path, tmp_path):
    state = train_and_evaluate(shrunk(path, **{"eval.pictures": 0}), tmp_path)
    assert int(state.step) == 2
    assert all(np.isfinite(value) for value in losses(tmp_path).values())
    assert (tmp_path / "curves.png").exists()


def test_a_run_that_was_killed_goes_on_bit_equal(tmp_path, monkeypatch):
    config = shrunk(duration="6 steps", **{"model.dropout": 0.1, "model.drop_path": 0.1})
    whole = loop.train(config, tmp_path / "whole")

    log = loop._Loop._log

    def dies_at_four(self, step, *rest):
        log(self, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Loop, "_log", dies_at_four)
        loop.train(config, tmp_path / "killed")
    assert find(str(tmp_path / "killed"))[1] == 2
    resumed = loop.train(config, tmp_path / "killed")

    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert different(resumed, whole) == []


def test_a_mixture_trains_tells_of_each_source_and_goes_on_bit_equal(tmp_path, monkeypatch):
    config = shrunk("configs/mixture.py", duration="4 steps")
    whole = loop.train(config, tmp_path / "whole")
    row = read_rows(tmp_path / "whole")[-1]
    for name, share in (("pairs", 0.5), ("texts", 0.25), ("pictures", 0.25)):
        assert row[f"train/share/{name}"] == share
        assert row[f"train/epochs/{name}"] == pytest.approx(4 * 16 * share / 2**31)
    assert row["train/image_loss/pairs"] > 0 and row["train/image_loss/pictures"] > 0
    assert row["train/text_loss/pairs"] > 0 and row["train/text_loss/texts"] > 0
    assert row["train/text_loss/pictures"] == row["train/image_loss/texts"] == 0
    each = [row[f"train/text_loss/{name}"] for name in ("pairs", "texts")]
    assert min(each) <= row["train/text_loss"] <= max(each)

    log = loop._Loop._log

    def dies_at_three(self, step, *rest):
        log(self, step, *rest)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Loop, "_log", dies_at_three)
        loop.train(config, tmp_path / "killed")
    assert different(loop.train(config, tmp_path / "killed"), whole) == []


def test_a_stop_signal_saves_the_step(tmp_path, monkeypatch):
    class AskedAtOnce(loop.StopFlag):
        def __init__(self):
            super().__init__()
            self.requested = True

    config = shrunk(duration="6 steps")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopFlag", AskedAtOnce)
        with pytest.raises(Stopped, match="stopped at step 1, saved"):
            loop.train(config, tmp_path)
    assert find(str(tmp_path))[1] == 1
    assert int(loop.train(config, tmp_path).step) == 6


def test_other_data_or_config_is_refused_by_name(tmp_path):
    loop.train(shrunk(), tmp_path)
    for _ in ("config.json", "the checkpoints"):  # both know it
        with pytest.raises(UserError, match=r"seed=1 \(the run has 42\)"):
            loop.train(shrunk(seed=1), tmp_path)
        (tmp_path / "config.json").unlink(missing_ok=True)
    free = shrunk(log_every="3 steps", **{"eval.examples": 8, "compute.unroll": True})
    assert int(loop.train(free, tmp_path).step) == 2


def test_checkpoints_kept_are_the_newest_and_the_best(tmp_path, monkeypatch):
    scores = iter([9.0, 5.0, 1.0, 7.0, 8.0, 6.0])
    monkeypatch.setattr(Validation, "__call__", lambda self, state: {"val/loss": next(scores)})
    config = shrunk(
        duration="5 steps", **{"checkpoint.every": "1 steps", "eval.every": "1 steps", "checkpoint.keep": 2}
    )
    train_and_evaluate(config, tmp_path)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [2, 4, 5]


def test_init_from_tells_what_matched(tmp_path):
    loop.train(shrunk("configs/mae.py"), tmp_path / "mae")
    changes = {"data.image_size": 48, "duration": "1 steps", "optimizer.learning_rate": 0.0}
    state = loop.train(shrunk(init_from=str(tmp_path / "mae"), **changes), tmp_path / "m3ae")
    text = (tmp_path / "m3ae" / "log.txt").read_text()
    assert "not in the checkpoint, left fresh: " in text
    assert "encoder/text/embedding/embedding" in text
    assert "unused" not in text
    stored = load_params(str(tmp_path / "mae"))
    assert different(state.params["encoder"]["transformer"], stored["encoder"]["transformer"]) == []

    with pytest.raises(UserError, match="no checkpoint at"):
        loop.train(shrunk(init_from=str(tmp_path / "nothing")), tmp_path / "other")
    checkpoint = str(tmp_path / "mae" / "checkpoints" / "2")
    loop.train(shrunk(init_from=checkpoint, **{"data.patch_size": 16}), tmp_path / "patches")
    assert "other shape, left fresh" in (tmp_path / "patches" / "log.txt").read_text()


def test_without_validation_data_training_goes_on(tmp_path, tar_shard):
    changes = {"data.train.source": "webdataset", "data.train.path": str(tar_shard), "data.val.source": "webdataset"}
    state = train_and_evaluate(shrunk(**changes), tmp_path / "run")
    assert int(state.step) == 2
    assert not any("val/loss" in row for row in read_rows(tmp_path / "run"))
    assert (tmp_path / "run" / "pictures" / "step_00000002.png").exists()
