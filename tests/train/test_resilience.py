"""What can happen to a run in two weeks: bad batches, spikes, full disks, writers that fail, steps that hang."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from clu import metric_writers

from m3ae_jax.checkpoint import manager, manifest
from m3ae_jax.checkpoint.manager import find, load_params
from m3ae_jax.errors import STOPPED, UserError
from m3ae_jax.evals.run import RunHooks, train_and_evaluate
from m3ae_jax.metrics.writers import read_every_step, read_lines, read_rows
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train import loop, replay, setup
from m3ae_jax.train.guard import WINDOW
from tests.train.test_loop import different, losses, shrunk

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_waits")]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


def events(workdir, kind):
    return [event for event in read_lines(workdir / "events.jsonl") if event["kind"] == kind]


@pytest.fixture
def pixels(monkeypatch):
    """Gives the training pictures as floating-point numbers, those of some steps times a factor: {step: factor}."""
    factors: dict[int, float] = {}
    real = setup.Setup.train_batches

    def train_batches(self, start_step):
        for step, batch in enumerate(real(self, start_step), start_step + 1):
            for tokens in (tokens for part in batch.values() for tokens in part["groups"]["image"].values()):
                tokens["value"] = (tokens["value"] + np.float32(1)) / 255 * factors.get(step, 1.0)
            yield batch

    monkeypatch.setattr(setup.Setup, "train_batches", train_batches)
    return factors


def test_a_batch_that_is_not_finite_is_skipped_counted_and_written_down(pixels, tmp_path):
    pixels[3] = np.nan
    config = shrunk(duration="6 steps", log_every="6 steps")
    state = loop.train(config, tmp_path)
    assert int(state.step) == 6 and int(state.guard.skipped) == 1 and int(state.guard.accepted) == 5
    (event,) = events(tmp_path, "skipped")
    assert event["step"] == 3 and "not finite" in event["text"] and "positions image+text 32-47" in event["text"]
    assert np.isnan(read_every_step(tmp_path, 3)["loss"]) and read_every_step(tmp_path, 3)["skipped"] == 1
    assert all(np.isfinite(read_every_step(tmp_path, step)["loss"]) for step in (1, 2, 4, 5, 6))
    assert [row["train/skipped_steps"] for row in read_rows(tmp_path) if "train/skipped_steps" in row] == [0, 1]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load_params(str(tmp_path))))


def test_a_run_that_only_skips_stops_before_it_saves_and_can_go_on(pixels, tmp_path):
    pixels.update(dict.fromkeys(range(4, 100), np.inf))
    config = shrunk(duration="12 steps", **{"anomaly.stop_after": 3, "log_every": "100 steps"})
    with pytest.raises(
        UserError, match=r"3 steps in a row were skipped, the last of them step 6; .* those of step 3\."
    ) as stop:
        train_and_evaluate(config, tmp_path)
    assert "--mode=replay --step=6" in str(stop.value) and "\n" not in str(stop.value)
    assert manifest.finished(tmp_path / "checkpoints") == [4, 2]  # step 4 has the parameters of step 3
    (failed,) = events(tmp_path, "failed")
    assert "3 steps in a row" in failed["text"] and "3 steps in a row" in (tmp_path / "report.html").read_text()
    pixels.clear()  # the data are mended
    assert int(loop.train(config, tmp_path).step) == 12
    assert events(tmp_path, "resumed")[0]["step"] == 4


def test_a_spike_is_skipped(pixels, tmp_path):
    at = WINDOW + 5
    pixels[at] = 1e4
    changes = {"eval.pictures": 0, "checkpoint.every": "100 steps", "log_every": "50 steps"}
    state = loop.train(shrunk(duration=f"{at + 1} steps", **changes), tmp_path)
    assert int(state.guard.skipped) == 1
    (event,) = events(tmp_path, "skipped")
    assert event["step"] == at and "far above" in event["text"]


def test_a_skipped_step_stays_skipped_when_the_run_goes_on(pixels, tmp_path, monkeypatch):
    pixels.update({2: np.nan, 5: np.nan})
    config = shrunk(duration="8 steps", **{"checkpoint.every": "3 steps"})
    whole = loop.train(config, tmp_path / "whole")

    def dies(self, state):
        if int(state.step) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        save = loop._Loop._save
        patch.setattr(loop._Loop, "_save", lambda self, state: (dies(self, state), save(self, state)))
        loop.train(config, tmp_path / "killed")
    assert events(tmp_path / "killed", "stopped")
    assert different(loop.train(config, tmp_path / "killed"), whole) == []


def test_replay_gives_the_recorded_loss_bit_for_bit(tmp_path):
    config = shrunk(duration="7 steps", log_every="7 steps", **{"model.dropout": 0.1, "checkpoint.keep": 2})
    loop.train(config, tmp_path)
    for step, begin in ((7, 6), (3, 0)):
        found = replay.replay(config, tmp_path, step, RunHooks)
        assert (found["from_step"], found["equal"]) == (begin, True)
        assert found["loss"] == read_every_step(tmp_path, step)["loss"]
        assert json.loads((tmp_path / "replay" / f"step_{step}.json").read_text())["worst"] == found["worst"]
    norms = found["gradient_norms"]
    assert np.isclose(norms.pop("all"), np.sqrt(sum(norm**2 for norm in norms.values())))
    layers = {"encoder/transformer/blocks/0", "encoder/transformer/blocks/1", "decoder/transformer/blocks/0"}
    assert layers | {"encoder/image"} <= set(norms)
    worst = [one["loss"] for one in found["worst"]]
    assert len(worst) == replay.WORST and worst == sorted(worst, reverse=True)
    assert {32 <= one["position"] < 48 for one in found["worst"]} == {True}
    assert "Replay" in (tmp_path / "report.html").read_text()
    assert manifest.finished(tmp_path / "checkpoints") == [7, 6]
    with pytest.raises(UserError, match=r"--step=8: the run has the steps 1 to 7"):
        replay.replay(config, tmp_path, 8)
    with pytest.raises(UserError, match=r"seed=7 \(the run has 42\)"):
        replay.replay(shrunk(duration="7 steps", seed=7, **{"model.dropout": 0.1}), tmp_path, 3)


def test_replay_of_a_skipped_step_of_a_mixture_in_micro_batches(tmp_path):
    config = shrunk("configs/mixture.py", duration="3 steps", micro_batches=2)
    loop.train(config, tmp_path)
    found = replay.replay(config, tmp_path, 3, RunHooks)
    assert found["equal"] and found["from_step"] == 2
    assert {one["source"] for one in found["worst"]} <= {"pairs", "texts", "pictures"}
    assert set(found["slots"]) == {
        part.name for part in setup.prepare(loop.config_lib.resolve(config)).train_data.parts
    }


def test_a_run_goes_on_with_a_field_that_was_allowed_to_change(tmp_path):
    loop.train(shrunk(), tmp_path)
    longer = shrunk(duration="4 steps")
    with pytest.raises(UserError, match=r"duration='4 steps' .*--allow_config_change=duration"):
        loop.train(longer, tmp_path)
    assert int(loop.train(longer, tmp_path, ("duration",)).step) == 4
    assert "duration='4 steps' (the run has '2 steps')" in events(tmp_path, "config")[0]["text"]
    assert int(loop.train(longer, tmp_path).step) == 4  # from now on it is the run's
    wider = shrunk(duration="6 steps", **{"model.width": 64})
    with pytest.raises(UserError, match=r"do not fit the changed config; start a new run .*init_from"):
        loop.train(wider, tmp_path, ("duration", "model.width"))


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_LOCK_WAIT", 0.1)
    identity = loop.Identity(loop.config_lib.resolve(shrunk()), {})
    with loop._opened(tmp_path, identity), pytest.raises(UserError, match="another process trains there now"):
        loop.train(shrunk(), tmp_path)
    assert int(loop.train(shrunk(), tmp_path).step) == 2


@pytest.mark.parametrize("broken", ["tensorboard", "metrics.jsonl", "pictures", "report"])
def test_what_tells_may_fail_and_training_goes_on(broken, tmp_path, monkeypatch):
    if broken == "tensorboard":

        def refuse(*arguments, **keywords):
            raise RuntimeError("the board is gone")

        monkeypatch.setattr(metric_writers.SummaryWriter, "write_scalars", refuse)
    elif broken == "metrics.jsonl":
        (tmp_path / "metrics.jsonl").mkdir()
        (tmp_path / "every_step.jsonl").mkdir()
        (tmp_path / "curves.png").mkdir()
    else:
        (tmp_path / broken).write_text("a file where a folder should be")
    assert int(train_and_evaluate(shrunk(), tmp_path).step) == 2
    told = [event["text"] for event in events(tmp_path, "warning")]
    assert any("cannot be written" in text for text in told), told
    assert find(str(tmp_path))[1] == 2


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_the_run_with_the_last_good_checkpoint_intact(tmp_path, monkeypatch):
    monkeypatch.setattr(manager, "RETRY_AFTER", (0.01, 0.01))
    config = shrunk(duration="40 steps", **{"checkpoint.every": "1 steps", "checkpoint.keep": 100, "eval.pictures": 0})
    with small_disk(tmp_path / "disk", "6m") as disk:
        with pytest.raises(UserError, match=r"could not be saved .*No space left on device.*, is intact") as stop:
            loop.train(config, disk)
        assert "\n" not in str(stop.value)
        before = find(str(disk))[1]
        assert before >= 1
        # Room is made: the same command goes on.
        for step in manifest.finished(disk / "checkpoints")[1:]:
            subprocess.run(["rm", "-r", disk / "checkpoints" / str(step)], check=True)
        assert int(loop.train(shrunk(duration="40 steps", **{"eval.pictures": 0}), disk).step) == 40
        assert events(disk, "resumed")[-1]["step"] == before
    reference = loop.train(shrunk(duration="40 steps", **{"eval.pictures": 0}), tmp_path / "whole")
    assert int(reference.step) == 40


def test_a_disk_that_is_full_for_a_while_does_not_stop_the_run(tmp_path, monkeypatch):
    config = shrunk(duration="4 steps", **{"eval.pictures": 0})
    with small_disk(tmp_path / "disk", "20m") as disk:
        filler = disk / "filler"
        save = loop._Loop._save

        def save_on_a_full_disk(self, state):
            if int(state.step) == 4:
                self._checkpoints.wait()
                with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            save(self, state)

        monkeypatch.setattr(loop._Loop, "_save", save_on_a_full_disk)
        real = manager.Checkpoints.__init__

        def opened(self, *arguments, **keywords):
            real(self, *arguments, **keywords, sleep=lambda seconds: filler.unlink(missing_ok=True))

        monkeypatch.setattr(manager.Checkpoints, "__init__", opened)
        state = loop.train(config, disk)
        assert int(state.step) == 4 and find(str(disk))[1] == 4
        assert any("again in" in event["text"] for event in events(disk, "warning"))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(UserError, match=r"--workdir=.* cannot be written: Read-only file system"):
            loop.train(shrunk(), disk / "run")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--workdir=.* cannot be written: Not a directory"):
        loop.train(shrunk(), tmp_path / "file" / "run")


_SCRIPT = """
import sys, threading
from pathlib import Path
sys.path.insert(0, ".")
from tests.train.test_loop import shrunk
from m3ae_jax import console
console.start_logging()
from m3ae_jax.train import loop, setup
workdir = Path(sys.argv[1])
"""
_HANGS = (
    _SCRIPT
    + """
real = setup.Setup.train_batches
def train_batches(self, start):
    for step, batch in enumerate(real(self, start), start + 1):
        if step == 3:
            threading.Event().wait()
        yield batch
setup.Setup.train_batches = train_batches
changes = {"stall.report_after": 2.0, "stall.stop_after": 10.0, "eval.pictures": 0, "checkpoint.every": "1 steps"}
loop.train(shrunk(duration="4 steps", **changes), workdir)
"""
)
# The profiler crashes where libtpu is loaded, as other tests do in this process.
_TRACES = (
    _SCRIPT
    + """
loop.train(shrunk(duration="4 steps", profile="2-3", **{"eval.pictures": 0}), workdir)
"""
)


def run_script(script, workdir):
    """In a process of its own, on one device."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, str(workdir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)


def test_a_step_that_hangs_is_told_with_its_stacks_and_the_process_is_ended_to_be_started_again(tmp_path):
    done = run_script(_HANGS, tmp_path / "run")
    assert done.returncode == STOPPED, done.stdout + done.stderr
    *_, first, second = events(tmp_path / "run", "stalled")  # compiling may take longer, too
    assert "last completed: step 2; now: waiting for data" in first["text"]
    assert "the same command goes on from the last checkpoint" in second["text"]
    assert "in train_batches" in done.stdout and "thread MainThread" in (tmp_path / "run" / "log.txt").read_text()
    assert find(str(tmp_path / "run"))[1] == 2
    state = loop.train(shrunk(duration="4 steps", **{"eval.pictures": 0}), tmp_path / "run")
    assert int(state.step) == 4
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_a_trace_of_some_steps(tmp_path):
    done = run_script(_TRACES, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "steps 2 to 3" in events(tmp_path, "profile")[0]["text"]


def test_rows_tell_where_time_and_tokens_went(tmp_path):
    loop.train(shrunk(), tmp_path)
    row = next(row for row in read_rows(tmp_path) if row["step"] == 2)
    assert sum(value for name, value in row.items() if name.startswith("time/")) == pytest.approx(1.0)
    assert row["memory/host_gib"] > 0.1
    assert row["tokens/image_visible"] + row["tokens/image_target"] == 16
    assert 1 <= row["tokens/text_visible"] + row["tokens/text_target"] <= 16
    total = np.sqrt(sum(value**2 for name, value in row.items() if name.startswith("train/gradient_norm/")))
    assert row["train/gradient_norm"] == pytest.approx(total, rel=1e-5)
    assert row["train/examples_per_second_per_chip"] == row["train/examples_per_second"]
    assert "no peak of 'cpu' is known" in (tmp_path / "log.txt").read_text()
