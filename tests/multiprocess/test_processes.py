"""Several processes over Gloo are one run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from m3ae_jax.parallel.supervisor import is_of_gloo

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SHRUNK = [
    "--config=configs/tiny.py",
    *(
        f"--config.{field}"
        for field in (
            "batch_size=8",
            "duration=4 steps",
            "log_every=1 steps",
            "checkpoint.every=4 steps",
            "eval.every=4 steps",
            "eval.examples=8",
            "eval.pictures=2",
            "evals=",
            "optimizer.warmup=1 steps",
            "model.width=32",
            "model.depth=2",
            "m3ae.decoder_width=16",
            "mesh.preset=fsdp",
        )
    ),
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(*arguments, devices, program=("-m", "m3ae_jax.main")):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes, timeout=300):
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    outputs = ["".join(line for line in output.splitlines(True) if not is_of_gloo(line.encode())) for output in outputs]
    return [process.returncode for process in processes], outputs


def start_two(*arguments, **options):
    port = free_port()
    cluster = [f"--coordinator=localhost:{port}", "--process_count=2", "--start_timeout=120"]
    return [start(*arguments, *cluster, f"--process_index={i}", devices=4, **options) for i in range(2)]


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return {r["step"]: r["train/loss"] for r in rows(workdir) if "train/loss" in r}


def test_two_processes_train_as_one(tmp_path):
    codes, outputs = finish(start_two(*SHRUNK, f"--workdir={tmp_path / 'two'}"))
    assert codes == [0, 0], outputs
    assert "step 4/4" in outputs[0] and not outputs[1].strip()  # one process tells
    codes, outputs = finish([start(*SHRUNK, f"--workdir={tmp_path / 'one'}", devices=8)])
    assert codes == [0], outputs
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert list(two) == [1, 2, 3, 4]
    assert np.allclose([two[s] for s in two], [one[s] for s in one], rtol=1e-5)
    val = {name: [r["val/loss"] for r in rows(tmp_path / name) if "val/loss" in r] for name in ("two", "one")}
    assert np.allclose(val["two"], val["one"], rtol=1e-5)
    assert (tmp_path / "two" / "pictures" / "step_00000004.png").exists()


MAMO = [
    "--config=configs/binding.py",
    *(
        f"--config.{field}"
        for field in (
            "batch_size=16",
            "duration=4 steps",
            "log_every=1 steps",
            "checkpoint.every=4 steps",
            "eval.every=4 steps",
            "eval.examples=16",
            "eval.pictures=0",
            "evals=",
            "optimizer.warmup=1 steps",
            "model.width=32",
            "model.depth=1",
            "model.heads=2",
            "mamo.queue=32",
            "mamo.negative_rows=4",
            "mesh.preset=fsdp",
        )
    ),
]


def test_two_processes_train_mamo_as_one(tmp_path):
    """Its teacher, queue, negatives of all rows, and hard negatives of groups of rows."""
    codes, outputs = finish(start_two(*MAMO, f"--workdir={tmp_path / 'two'}"))
    assert codes == [0, 0], outputs
    codes, outputs = finish([start(*MAMO, f"--workdir={tmp_path / 'one'}", devices=8)])
    assert codes == [0], outputs
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert list(two) == [1, 2, 3, 4]
    assert np.allclose([two[s] for s in two], [one[s] for s in one], rtol=1e-5)


TOY = """
from m3ae_jax.config import default


def get_config():
    c = default("tests.objectives.toy:Toy")
    c.batch_size, c.duration, c.optimizer.warmup = 16, "4 steps", "1 steps"
    c.log_every, c.checkpoint.every, c.eval.every, c.eval.examples = "1 steps", "4 steps", "4 steps", 16
    c.data.train.source = c.data.val.source = c.data.tokenizer = "scenes"
    c.data.image_size = c.data.scenes.image_size = 32
    c.mesh.preset = "fsdp"
    return c
"""


def test_two_processes_train_an_objective_of_ones_own_as_one(tmp_path):
    """With a teacher, a queue and negatives of the whole batch."""
    config = tmp_path / "toy.py"
    config.write_text(TOY)
    codes, outputs = finish(start_two(f"--config={config}", f"--workdir={tmp_path / 'two'}"))
    assert codes == [0, 0], outputs
    codes, outputs = finish([start(f"--config={config}", f"--workdir={tmp_path / 'one'}", devices=8)])
    assert codes == [0], outputs
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert list(two) == [1, 2, 3, 4]
    assert np.allclose([two[s] for s in two], [one[s] for s in one], rtol=1e-5)


def test_item_11_one_process_writes_the_index_and_both_read_it(tmp_path, tar_shard):
    data = [f"--config.data.train.{name}" for name in ("source=webdataset", f"path={tar_shard.parent}")]
    data += [f"--config.data.index_dir={tmp_path / 'indices'}", "--config.data.val.source=webdataset"]
    codes, outputs = finish(start_two(*SHRUNK, *data, f"--workdir={tmp_path / 'two'}"))
    assert codes == [0, 0], outputs
    assert len(list((tmp_path / "indices").iterdir())) == 1
    missing = [*data, f"--config.data.train.path={tmp_path / 'nowhere'}"]
    codes, outputs = finish(start_two(*SHRUNK, *missing, f"--workdir={tmp_path / 'none'}"))
    assert codes == [2, 2], outputs
    assert "nowhere" in outputs[0] and "process 0: " in outputs[1] and "nowhere" in outputs[1]


def test_a_mistake_on_one_host_and_other_data_there_end_all_with_2(tmp_path, tar_shard):
    data = [f"--config.data.train.{name}" for name in ("source=webdataset", f"path={tar_shard.parent}")]
    data += ["--config.data.val.source=webdataset", f"--workdir={tmp_path / 'run'}"]
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(tar_shard, half / "00000.tar")
    shutil.copy(tar_shard, half / "00001.tar")
    for other, said in ((tmp_path / "nowhere", "nowhere"), (half, "process 0 has 40 examples")):
        port = free_port()
        cluster = [f"--coordinator=localhost:{port}", "--process_count=2", "--start_timeout=120"]
        mine = [*SHRUNK, *data, *cluster]
        two = [start(*mine, "--process_index=0", devices=4)]
        two.append(start(*mine, "--process_index=1", f"--config.data.train.path={other}", devices=4))
        codes, outputs = finish(two)
        assert codes == [2, 2], outputs
        assert all(said in output for output in outputs), outputs


def test_a_signal_to_one_stops_both_after_the_same_step_and_one_goes_on_from_their_checkpoint(tmp_path):
    same = [*SHRUNK, "--config.duration=5000 steps", "--config.checkpoint.every=5000 steps", f"--workdir={tmp_path}"]
    processes = start_two(*same)
    log = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (log.exists() and len(log.read_text().splitlines()) > 4) and time.monotonic() < deadline:
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(processes)
    assert codes == [75, 75], outputs
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(saved) == 1 and f"stopped at step {saved[0]}" in outputs[0]
    # One process on one device, its parameters whole, goes on from what two wrote in eight parts.
    log_before = len(rows(tmp_path))
    alone = start(*same, "--config.mesh.preset=dp", devices=1)
    deadline = time.monotonic() + 240
    while len(rows(tmp_path)) < log_before + 3 and alone.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    alone.send_signal(signal.SIGTERM)
    (code,), (output,) = finish([alone])
    assert code == 75 and f"going on from step {saved[0]}" in output, output
    assert next(r["step"] for r in rows(tmp_path)[log_before:]) == saved[0] + 1


def wait_until(condition, processes):
    deadline = time.monotonic() + 240
    while not condition() and all(one.poll() is None for one in processes) and time.monotonic() < deadline:
        time.sleep(0.1)


def test_item_3_a_signal_to_one_ends_both_in_start_up_and_in_the_closing_evaluations(tmp_path):
    same = [*SHRUNK, "--config.evals=attention", f"--workdir={tmp_path}"]
    log, events = tmp_path / "log.txt", tmp_path / "events.jsonl"
    for sign, number in (("compiling the step", 1), ("evaluation 1 of 1", 0)):
        processes = start_two(*same)
        wait_until(lambda sign=sign: log.exists() and sign in log.read_text(), processes)
        processes[number].send_signal(signal.SIGTERM)
        codes, outputs = finish(processes)
        assert codes == [75, 75], outputs
        assert all("the same command goes on" in output for output in outputs), outputs
        assert json.loads(events.read_text().splitlines()[-1])["kind"] == "preempted"
    codes, outputs = finish(start_two(*same))
    assert codes == [0, 0], outputs
    assert "nothing to train" in outputs[0] and "evaluation 1 of 1: attention" in outputs[0], outputs
    assert any("attention" in file.name for file in (tmp_path / "evals").iterdir())


FAILS = """
import sys
import jax
from m3ae_jax import main
from m3ae_jax.errors import UserError
from m3ae_jax.train import loop

def fails(self, step, *rest):
    if step == 2 and jax.process_index() == {number}:
        raise {error}("the storage is gone")
    return log(self, step, *rest)

log, loop._Loop._log = loop._Loop._log, fails
main.command_line.run(main.main, main._overrides)
"""


@pytest.mark.parametrize(("number", "error", "code"), [(0, "UserError", 2), (1, "UserError", 2), (1, "KeyError", 1)])
def test_item_4_a_failure_of_one_at_a_step_ends_both_with_its_code_and_line(number, error, code, tmp_path):
    program = FAILS.format(number=number, error=error)
    processes = start_two(*SHRUNK, f"--workdir={tmp_path}", program=["-c", program])
    codes, outputs = finish(processes)
    assert codes == [code, code], outputs
    line = "the storage is gone" if code == 2 else "KeyError: 'the storage is gone'"
    assert line in outputs[number] and ("Traceback" in outputs[number]) == (code == 1), outputs
    other = outputs[1 - number]
    assert f"error: process {number}: {line}" in other.splitlines(), outputs
    assert "lost another process" not in other and "Traceback" not in other, other


def test_item_4_a_config_that_one_host_lacks_is_told_to_all(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text((ROOT / "configs" / "tiny.py").read_text())
    port = free_port()
    cluster = [f"--coordinator=localhost:{port}", "--process_count=2", f"--workdir={tmp_path / 'run'}"]
    two = [start(f"--config={config}", *cluster, "--process_index=0", devices=1)]
    two.append(start(f"--config={tmp_path / 'other.py'}", *cluster, "--process_index=1", devices=1))
    codes, outputs = finish(two)
    assert codes == [2, 2], outputs
    assert "error: process 1: --config=" in outputs[0] and "no such file" in outputs[0], outputs
    assert "error: --config=" in outputs[1] and "no such file" in outputs[1], outputs


def test_who_does_not_come_is_named_in_one_line(tmp_path):
    cluster = [f"--coordinator=localhost:{free_port()}", "--start_timeout=20", f"--workdir={tmp_path}"]
    processes = [start(*SHRUNK, *cluster, "--process_count=3", f"--process_index={i}", devices=1) for i in (0, 2)]
    codes, outputs = finish(processes)
    assert codes == [2, 2]
    for output in outputs:
        assert output.strip().startswith("error: process 1 of 3 did not come to localhost"), output
        assert len(output.strip().splitlines()) == 1


def test_a_cluster_that_is_not_there_is_one_line():
    (code,), (output,) = finish([start(*SHRUNK, "--distributed", devices=1)])
    assert code == 2 and "--coordinator=HOST:PORT" in output and len(output.strip().splitlines()) == 1, output
