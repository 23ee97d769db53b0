"""Runs end to end: stopping and going on, starting from weights, every config."""

import contextlib
import glob
import json
import os
import re
import signal

import jax
import numpy as np
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.checkpoint import origin
from m3ae_jax.checkpoint.manager import Checkpoints, find, load_params
from m3ae_jax.config.schema import OBJECTIVES
from m3ae_jax.data.text import tokenizer_file
from m3ae_jax.errors import Stopped, UserError
from m3ae_jax.evals import run
from m3ae_jax.evals.base import Result
from m3ae_jax.evals.run import evaluate, train_and_evaluate
from m3ae_jax.evals.validation import Validation
from m3ae_jax.metrics.writers import read_rows
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.stopping import Stop
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
        if group in OBJECTIVES and group != config.objective:
            continue
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
    config = shrunk(path, **{"eval.pictures": 0})
    if config.objective == "simla":
        config.simla.id_weight = 0.0  # it has no tokenizer
    state = train_and_evaluate(config, tmp_path)
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


def asked_at(boundary):
    """A `Stop` that is asked to when the loop comes to a boundary: after a step, and before a batch of validation."""

    class Asked(Stop):
        def at_boundary(self):
            if self._boundary + 1 == boundary:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().at_boundary()

    return Asked()


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_item_3_a_stop_signal_saves_the_step(tmp_path):
    config = shrunk(duration="6 steps")
    with pytest.raises(Stopped, match="stopped at step 1, saved"):
        loop.train(config, tmp_path, stop=asked_at(1))
    assert find(str(tmp_path))[1] == 1
    assert int(loop.train(config, tmp_path).step) == 6


def test_item_3_a_stop_at_the_last_step_leaves_the_closing_evaluations_to_the_next_start(tmp_path, monkeypatch):
    def ended(self, state):
        raise KeyboardInterrupt

    config = shrunk(duration="3 steps", **{"eval.every": "3 steps"})
    with pytest.raises(Stopped, match="stopped at step 3, saved"):
        train_and_evaluate(config, tmp_path, stop=asked_at(3))
    assert [row["step"] for row in rows(tmp_path) if "val/loss" in row] == [0]
    assert not (tmp_path / "curves.png").exists()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run.RunHooks, "draw", ended)  # when that start has validated: it counts
        train_and_evaluate(config, tmp_path)
    train_and_evaluate(config, tmp_path)
    assert [row["step"] for row in rows(tmp_path) if "val/loss" in row] == [0, 3]
    assert (tmp_path / "curves.png").exists()
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", keep=2)) as checkpoints:
        assert checkpoints.is_evaluated(3) and checkpoints.best() == 3
    train_and_evaluate(config, tmp_path)  # and not again
    assert [row["step"] for row in rows(tmp_path) if "val/loss" in row] == [0, 3]


def test_item_3_a_stop_within_a_validation_saves_and_the_next_start_validates(tmp_path):
    config = shrunk(duration="4 steps", **{"eval.every": "2 steps", "checkpoint.every": "4 steps"})
    with pytest.raises(Stopped, match="stopped at step 2, saved"):
        train_and_evaluate(config, tmp_path, stop=asked_at(3))
    train_and_evaluate(config, tmp_path)
    interrupted = [row for row in rows(tmp_path) if "val/loss" in row]
    train_and_evaluate(config, tmp_path.with_name("whole"))
    assert interrupted == [row for row in rows(tmp_path.with_name("whole")) if "val/loss" in row]


def test_item_3_evaluations_at_an_interval_are_of_a_saved_step_and_go_on_at_the_next_start(tmp_path, monkeypatch):
    def evaluated(name, setup, state):
        if not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        return Result(name, {"masked_prediction/step": int(state.step)}, "")

    monkeypatch.setattr(run, "run", evaluated)
    intervals = {"eval.evals_every": "2 steps", "checkpoint.every": "4 steps"}
    config = shrunk(duration="4 steps", evals=("masked_prediction",), **intervals)
    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(config, tmp_path)
    assert find(str(tmp_path))[1] == 2
    train_and_evaluate(config, tmp_path)
    assert [row["step"] for row in rows(tmp_path) if "masked_prediction/step" in row] == [2, 4]


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
    monkeypatch.setattr(Validation, "__call__", lambda self, state, stopping: {"val/loss": next(scores)})
    config = shrunk(
        duration="5 steps", **{"checkpoint.every": "1 steps", "eval.every": "1 steps", "checkpoint.keep": 2}
    )
    train_and_evaluate(config, tmp_path)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [2, 4, 5]


def test_the_best_checkpoint_by_an_evaluation(tmp_path, monkeypatch):
    scores = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2}
    monkeypatch.setattr(
        run, "run", lambda name, setup, state: Result(name, {"masked_prediction/right": scores[int(state.step)]}, "")
    )
    name = "masked_prediction/right"
    fields = {"checkpoint.every": "4 steps", "eval.evals_every": "1 steps", "checkpoint.keep": 1}
    fields |= {"checkpoint.best": name, "checkpoint.best_is": "greatest"}
    config = shrunk(duration="4 steps", evals=("masked_prediction",), **fields)
    train_and_evaluate(config, tmp_path)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [2, 4]
    assert f"best by {name}: {tmp_path / 'checkpoints' / '2'}" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("best", "fields", "said"),
    [
        ("val/los", {}, r"checkpoint.best='val/los' is not one of .*; did you mean 'val/loss'"),
        ("retrieval/x", {}, r"checkpoint.best='retrieval/x' is not one of masked_prediction/..., val/loss"),
        ("masked_prediction/x", {}, "needs eval.evals_every"),
        ("masked_prediction/x", {"eval.evals_every": "1 steps"}, r"is not one of masked_prediction/.*"),
    ],
)
def test_a_figure_for_the_best_that_nothing_measures_is_refused(best, fields, said, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run", lambda name, setup, state: Result(name, {"masked_prediction/right": 0.5}, ""))
    config = shrunk(duration="2 steps", evals=("masked_prediction",), **fields, **{"checkpoint.best": best})
    with pytest.raises(UserError, match=said):
        train_and_evaluate(config, tmp_path)


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
    wider = {"model.width": 48, "m3ae.decoder_width": 48, "duration": "1 steps"}
    loop.train(shrunk(init_from=checkpoint, **wider), tmp_path / "wider")
    assert re.search(
        r"WARNING.*init_from=.*: only \d+ of the \d+ parameters here are in it with the same shape, \d+ % of",
        (tmp_path / "wider" / "log.txt").read_text(),
    )


def test_without_validation_data_training_goes_on(tmp_path, tar_shard):
    changes = {"data.train.source": "webdataset", "data.train.path": str(tar_shard), "data.val.source": "webdataset"}
    state = train_and_evaluate(shrunk(**changes), tmp_path / "run")
    assert int(state.step) == 2
    assert not any("val/loss" in row for row in read_rows(tmp_path / "run"))
    assert (tmp_path / "run" / "pictures" / "step_00000002.png").exists()


def test_item_10_a_run_can_be_moved_and_its_weights_keep_their_licence(tmp_path):
    tokenizer = tmp_path / "own.model"
    tokenizer.write_bytes(tokenizer_file("scenes").read_bytes())
    first = shrunk(**{"data.tokenizer": str(tokenizer)})
    train_and_evaluate(first, tmp_path / "first")
    origin.save(tmp_path / "first", [origin.converted("x.pth", "mae", "CC BY-NC 4.0")])
    tokenizer.unlink()
    moved = (tmp_path / "first").rename(tmp_path / "moved")
    card = (moved / "MODEL.md").read_text()
    assert "- 2 steps; finished" in card and "- 32 examples seen, 16 a step" in card and "`tokenizer.model`" in card
    evaluate(config_lib.load(str(moved / "config.json")), moved)
    (moved / "MODEL.md").unlink()
    train_and_evaluate(first, moved)  # goes on, though it has nothing to do
    assert "- starts: 2" in (moved / "MODEL.md").read_text()
    begun = {"init_from": str(moved), "data.tokenizer": str(tokenizer)}
    with pytest.raises(UserError, match=rf"go with theirs: --config\.data\.tokenizer={moved}/tokenizer\.model"):
        train_and_evaluate(shrunk(**begun), tmp_path / "second")
    begun["data.tokenizer"] = str(moved / "tokenizer.model")
    train_and_evaluate(shrunk(**begun), tmp_path / "second")
    card = (tmp_path / "second" / "MODEL.md").read_text()
    assert f"licence: CC BY-NC 4.0\n- step 2 of `{moved}`" in card


def test_item_10_a_run_without_its_tokenizer_is_not_told_to_train_another(tmp_path):
    tokenizer = tmp_path / "own.model"
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    config = config_lib.resolve(shrunk(**{"data.tokenizer": str(tokenizer)}))
    with pytest.raises(UserError) as error:
        setup.prepare(config, tmp_path / "run")
    assert "--config.data.tokenizer=FILE" in str(error.value) and "train_tokenizer" not in str(error.value)
    with pytest.raises(UserError, match="train_tokenizer"):
        setup.prepare(config, tmp_path / "new")
