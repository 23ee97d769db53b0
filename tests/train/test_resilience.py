"""What can happen to a run in two weeks: bad batches, spikes, full disks, writers that fail, steps that hang."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from m3ae_jax.checkpoint import manager, manifest
from m3ae_jax.checkpoint.manager import find, load_params
from m3ae_jax.errors import STOPPED, UserError
from m3ae_jax.evals import run as evaluations
from m3ae_jax.evals.base import Result
from m3ae_jax.evals.run import RunHooks, evaluate, train_and_evaluate
from m3ae_jax.metrics.tensorboard import TensorBoard
from m3ae_jax.metrics.writers import read_every_step, read_lines, read_rows
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train import loop, replay, setup
from m3ae_jax.train.guard import WINDOW
from tests.metrics.test_tensorboard import steps, texts
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
    with pytest.raises(UserError, match=r"do not fit the changed config .*; start a new run .*init_from"):
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

        monkeypatch.setattr(TensorBoard, "scalars", refuse)
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
    (tmp_path / "run" / "log.txt").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--workdir=.*: .*/run/log.txt cannot be written: Is a directory"):
        loop.train(shrunk(), tmp_path / "run")


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


_KILLED = (
    _SCRIPT
    + """
import os, signal
from m3ae_jax.evals import run
from tests.train.test_resilience import scored
run.run = scored
save = loop._Loop._save
def killed(self, state):
    if int(state.step) == 8:
        self._checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, state)
loop._Loop._save = killed
run.train_and_evaluate(shrunk(**{CHANGES}), workdir)
"""
)
_CHANGES = {
    "duration": "8 steps",
    "eval.every": "1 steps",
    "checkpoint.every": "3 steps",
    "eval.evals_every": "5 steps",
    "evals": ("masked_prediction",),
    "metrics.writers": ("tensorboard", "tests.train.test_resilience:Told"),
}


def scored(name, setup, state):
    """In place of an evaluation that takes its time."""
    return Result.of(name, {"score": 1.0}, "a table", "Verdict: none.", {"sheet": np.zeros((4, 4, 3), np.uint8)})


class Told:
    """A writer outside the package: a line of each call in ``told.txt``."""

    def __init__(self, run):
        self._file = run.workdir / "told.txt"
        self._tell("start", run.step, run.evaluation)

    def scalars(self, step, values):
        self._tell("scalars", step, *sorted(values))

    def image(self, step, name, picture):
        self._tell("image", step, name, picture.ndim)

    def text(self, step, name, text):
        self._tell("text", step, name, len(text.splitlines()))

    def close(self):
        self._tell("close")

    def _tell(self, *values):
        with self._file.open("a") as file:
            file.write(f"{' '.join(map(str, values))}\n")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed by SIGKILL in step 8's save and went on from step 6; then evaluated."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    done = run_script(_KILLED.replace("{CHANGES}", repr(_CHANGES)), workdir)
    assert done.returncode == -9, done.stdout + done.stderr
    assert max(row["step"] for row in read_lines(workdir / "metrics.jsonl")) == 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        patch.setattr(evaluations, "run", scored)
        assert int(train_and_evaluate(shrunk(**_CHANGES), workdir).step) == 8
        lines = (workdir / "metrics.jsonl").read_bytes()
        evaluate(shrunk(**_CHANGES), workdir)
    assert events(workdir, "resumed")[0]["step"] == 6
    return workdir, lines


def test_item_7_after_a_hard_kill_nothing_holds_a_step_twice(killed):
    workdir, lines = killed
    rows = [json.loads(line) for line in lines.splitlines()]
    for name, expected in (("train/loss", range(1, 9)), ("val/loss", range(9)), ("masked_prediction/", (5, 8))):
        assert [row["step"] for row in rows if any(one.startswith(name) for one in row)] == [*expected], name
    whole = [step for row in read_lines(workdir / "every_step.jsonl") for step in range(row["step"], row["step"] + 1)]
    assert whole == [*range(1, 9)]
    assert (workdir / "metrics.jsonl").read_bytes().startswith(lines)


def test_item_7_after_a_hard_kill_tensorboard_shows_each_step_once(killed):
    workdir, _ = killed
    found = steps(workdir / "tensorboard")
    assert found["train/loss"] == [*range(1, 9)] and found["val/loss"] == [*range(9)]
    assert found["reconstructions"] == found["reconstructions/captions"] == [*range(9)]
    assert {tag: at for tag, at in found.items() if len(set(at)) < len(at)} == {}
    assert found["masked_prediction/score"] == found["masked_prediction/sheet"] == [5, 8]
    evaluated = steps(workdir / "tensorboard" / "eval_step_8")
    assert evaluated["val/loss"] == [8] and not any("train" in tag for tag in evaluated)


def test_item_13_a_writer_of_the_user_is_told_of_a_whole_run(killed):
    workdir, _ = killed
    told = (workdir / "told.txt").read_text().splitlines()
    assert [line for line in told if line.startswith(("start", "close"))] == [
        "start 0 False", "start 6 False", "close", "start 8 True", "close"
    ]  # fmt: skip
    second = told[told.index("start 6 False") : told.index("start 8 True")]
    for what in ("scalars", "image", "text"):
        assert {int(line.split()[1]) for line in second if line.startswith(what)} == {7, 8}
    written = {name for row in read_lines(workdir / "metrics.jsonl") for name in row} - {"step"}
    assert {name for line in told if line.startswith("scalars") for name in line.split()[2:]} == written
    assert "image 7 reconstructions 3" in told and "text 7 reconstructions/captions 2" in told


def test_item_13_captions_tell_the_guesses(killed):
    workdir, _ = killed
    captions = texts(workdir / "tensorboard", "reconstructions/captions")
    assert len(captions) == 9
    for line in captions[-1].splitlines():
        assert re.fullmatch(r" +[12]\. \S.* \| \S+ -> .*", line), line


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


def test_item_5_a_folder_without_a_step_is_free_and_mixes_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no data"):

        def breaks(self, start):
            raise UserError("no data")

        patch.setattr(setup.Setup, "train_batches", breaks)
        loop.train(shrunk(), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "of_the_failed_start": 1}\n')
    assert int(loop.train(shrunk(seed=7), tmp_path).step) == 2
    line, *_ = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "no step was saved" in line]
    assert str(tmp_path / "config.json") in line and str(tmp_path / "unsaved_1") in line
    assert "of_the_failed_start" in (tmp_path / "unsaved_1" / "metrics.jsonl").read_text()
    assert "of_the_failed_start" not in (tmp_path / "metrics.jsonl").read_text() and not events(tmp_path, "failed")
    with pytest.raises(UserError, match=r"seed=42 \(the run has 7\)"):
        loop.train(shrunk(), tmp_path)
    assert not (tmp_path / "unsaved_2").exists()


@pytest.mark.parametrize("content", [b"", b'{"seed": 4', b"null"])
def test_item_5_a_run_goes_on_whatever_its_config_file_holds(content, tmp_path):
    loop.train(shrunk(), tmp_path)
    file = tmp_path / "config.json"
    good = file.read_bytes()
    file.write_bytes(content)
    config = loop.config_lib.load(str(file))
    assert f"{file} is damaged: not " in (log := (tmp_path / "log.txt").read_text()) and "checkpoints/2" in log
    assert replay.replay(config, tmp_path, 1)["equal"]
    assert int(loop.train(config, tmp_path).step) == 2 and file.read_bytes() == good
    file.write_bytes(content)
    assert int(loop.train(shrunk(), tmp_path).step) == 2 and file.read_bytes() == good
    assert not list(tmp_path.glob("unsaved*"))


def test_item_5_a_folder_deleted_during_the_run_stops_it_and_stays_deleted(tmp_path, monkeypatch):
    workdir, save = tmp_path / "run", loop._Loop._save

    def delete(self, state):
        if int(state.step) == 4:
            self._checkpoints.wait()
            shutil.rmtree(workdir)
        save(self, state)

    monkeypatch.setattr(loop._Loop, "_save", delete)
    with pytest.raises(UserError, match=r"run/checkpoints was deleted or replaced while the run went on") as stop:
        train_and_evaluate(shrunk(duration="9 steps"), workdir)
    assert "\n" not in str(stop.value) and not workdir.exists()


def test_item_1_a_damaged_result_is_evaluated_again(tmp_path):
    config = shrunk(evals=("mask_ratios",))
    train_and_evaluate(config, tmp_path)
    (file,) = (tmp_path / "evals").glob("*.json")
    good = json.loads(file.read_text())
    file.write_bytes(b"null")
    train_and_evaluate(config, tmp_path)
    assert json.loads(file.read_text()) == good
    assert f"{file} cannot be read: this evaluation counts as not done" in (tmp_path / "log.txt").read_text()
