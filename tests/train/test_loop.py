"""Runs end to end: stopping and going on, starting from weights, every config."""

import glob

import jax
import numpy as np
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.checkpoint.manager import find, load_params
from m3ae_jax.errors import UserError
from m3ae_jax.metrics.writers import read_rows
from m3ae_jax.train import loop

pytestmark = pytest.mark.slow


def shrunk(path="configs/tiny.py", **changes):
    """A shipped config at a size for tests, on scenes."""
    config = config_lib.load(path)
    small = {
        "batch_size": 16,
        "duration": "2 steps",
        "model.width": 32,
        "model.depth": 2,
        "model.heads": 2,
        "model.decoder_width": 32,
        "model.decoder_depth": 1,
        "model.decoder_heads": 2,
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


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("path", sorted(glob.glob("configs/*.py")))
def test_every_config_trains_two_steps_shrunk(path, tmp_path):
    state = loop.train(shrunk(path), tmp_path)
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

    monkeypatch.setattr(loop._Loop, "_log", dies_at_four)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "killed")
    monkeypatch.undo()
    assert find(str(tmp_path / "killed"))[1] == 2
    resumed = loop.train(config, tmp_path / "killed")

    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert equal(resumed, whole)


def test_a_stop_signal_saves_the_step(tmp_path, monkeypatch):
    class AskedAtOnce(loop._StopFlag):
        def __init__(self):
            super().__init__()
            self.asked = True

    config = shrunk(duration="6 steps")
    monkeypatch.setattr(loop, "_StopFlag", AskedAtOnce)
    assert int(loop.train(config, tmp_path).step) == 1
    monkeypatch.undo()
    assert find(str(tmp_path))[1] == 1
    assert int(loop.train(config, tmp_path).step) == 6


def test_other_data_or_config_is_refused_by_name(tmp_path):
    loop.train(shrunk(), tmp_path)
    with pytest.raises(UserError, match=r"seed=1 \(the run has 42\)"):
        loop.train(shrunk(seed=1), tmp_path)
    free = shrunk(log_every="3 steps", **{"eval.examples": 8, "model.unroll": True})
    assert int(loop.train(free, tmp_path).step) == 2


def test_checkpoints_kept_are_the_newest_and_the_best(tmp_path, monkeypatch):
    scores = iter([9.0, 5.0, 1.0, 7.0, 8.0, 6.0])
    monkeypatch.setattr(loop.Validation, "__call__", lambda self, state: {"val/loss": next(scores)})
    config = shrunk(
        duration="5 steps", **{"checkpoint.every": "1 steps", "eval.every": "1 steps", "checkpoint.keep": 2}
    )
    loop.train(config, tmp_path)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [2, 4, 5]


def test_init_from_tells_what_matched(tmp_path, caplog, monkeypatch):
    loop.train(shrunk("configs/mae_small.py"), tmp_path / "mae")
    monkeypatch.setattr(loop.log, "propagate", True)
    changes = {"data.image_size": 48, "duration": "1 steps", "optimizer.learning_rate": 0.0}
    with caplog.at_level("INFO", logger="m3ae_jax"):
        state = loop.train(shrunk(init_from=str(tmp_path / "mae"), **changes), tmp_path / "m3ae")
    text = caplog.text
    assert "not in the checkpoint, left fresh: " in text
    assert "text_embedding/embedding" in text
    assert "unused" not in text
    stored = load_params(str(tmp_path / "mae"))
    assert equal(state.params["encoder"], stored["encoder"])

    with pytest.raises(UserError, match="no checkpoint at"):
        loop.train(shrunk(init_from=str(tmp_path / "nothing")), tmp_path / "other")
    caplog.clear()
    with caplog.at_level("INFO", logger="m3ae_jax"):
        loop.train(
            shrunk(init_from=str(tmp_path / "mae" / "checkpoints" / "2"), **{"data.patch_size": 16}), tmp_path / "p"
        )
    assert "other shape, left fresh" in caplog.text


def test_without_validation_data_training_goes_on(tmp_path, tar_shard):
    changes = {"data.train.source": "webdataset", "data.train.path": str(tar_shard), "data.val.source": "webdataset"}
    state = loop.train(shrunk(**changes), tmp_path / "run")
    assert int(state.step) == 2
    assert not any("val/loss" in row for row in read_rows(tmp_path / "run"))
    assert (tmp_path / "run" / "pictures" / "step_00000002.png").exists()
