"""Processes of a sweep: in order, beside each other, failing, that must be started again, stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m3ae_jax.sweep.runner import CONSOLE, Job, python_command, run_all

ROOT = Path(__file__).parents[2]


def job(folder, name, code):
    where = folder / name
    return Job(name, [sys.executable, "-c", code, str(where)], where, (where / "done").exists, lambda: "accuracy 0.5")


DONE = "import sys, pathlib; pathlib.Path(sys.argv[1], 'done').touch(); print('ready')"
FAILS = "import sys; print('working'); print('error: no such file', file=sys.stderr); sys.exit(2)"
AGAIN = """
import sys, pathlib
mark = pathlib.Path(sys.argv[1], 'once')
if mark.exists():
    pathlib.Path(sys.argv[1], 'done').touch()
else:
    mark.touch()
    sys.exit(75)
"""
WAITS = """
import signal, sys, time, pathlib
def stop(*_):
    pathlib.Path(sys.argv[1], 'saved').touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1], 'up').touch()
time.sleep(60)
"""


@pytest.mark.parametrize("parallel", [1, 2])
def test_runs_what_is_not_done(tmp_path, parallel):
    jobs = [job(tmp_path, "a", DONE), job(tmp_path, "b", FAILS), job(tmp_path, "c", AGAIN)]
    assert [one.name for one in run_all(jobs, parallel)] == ["b"]
    assert jobs[0].is_done() and jobs[2].is_done()
    assert "error: no such file" in (tmp_path / "b" / CONSOLE).read_text()
    jobs[0].command[2] = FAILS  # is not run again
    jobs[1].command[2] = DONE  # is
    assert run_all(jobs, parallel) == []


def test_what_ends_well_without_results_has_failed(tmp_path):
    assert run_all([job(tmp_path, "a", "pass")])


def test_a_run_that_always_asks_to_be_started_again_fails_in_the_end(tmp_path):
    counting = "import sys, pathlib; f = open(sys.argv[1] + '/n', 'a'); f.write('x'); f.close(); sys.exit(75)"
    assert run_all([job(tmp_path, "a", counting)])
    assert 2 < len((tmp_path / "a" / "n").read_text()) < 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopping_the_sweep_stops_its_runs(tmp_path, number):
    program = f"""
import sys, signal
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from m3ae_jax import console
console.exit_on_signals()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from m3ae_jax.sweep.runner import Job, run_all
where = Path({str(tmp_path)!r}, "a")
run_all([Job("a", [sys.executable, "-c", {WAITS!r}, str(where)], where, lambda: False, str)])
"""
    sweep = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "a" / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(sweep.pid, number)
    assert sweep.wait(60) != 0
    deadline = time.monotonic() + 30
    while not (tmp_path / "a" / "saved").exists() and time.monotonic() < deadline:  # a killed one does not wait for it
        time.sleep(0.05)
    assert (tmp_path / "a" / "saved").exists()


def test_the_command_of_a_run_can_be_copied(tmp_path):
    command = python_command("configs/tiny.py", tmp_path / "x y", [("data.modalities", "(image,text)")])
    line = Job("x", command, tmp_path, bool, str).line()
    assert line.startswith("python -m m3ae_jax.main --config=configs/tiny.py ")
    assert "'--config.data.modalities=(image,text)'" in line and f"'--workdir={tmp_path}/x y'" in line
