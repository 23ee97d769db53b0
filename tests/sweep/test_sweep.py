"""The program: a sweep that is killed goes on, and ends with table, JSON and plot."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.evals.base import Data, Result
from m3ae_jax.sweep.sweep import Sweep

ROOT = Path(__file__).parents[2]
SMALL = {
    "batch_size": 8,
    "duration": "2 steps",
    "model.width": 32,
    "model.depth": 1,
    "model.heads": 2,
    "m3ae.decoder_width": 32,
    "eval.examples": 8,
    "eval.pictures": 0,
    "eval.train_examples": 40,
    "eval.test_examples": 20,
    "eval.batch_size": 20,
}


def command(folder, *more, grid="data.modalities=image,(image,text)"):
    fields = [f"--config.{name}={value}" for name, value in SMALL.items()]
    options = ["--config=configs/claims.py", f"--workdir={folder}", "--seeds=1", "--eval=probe", f"--grid={grid}"]
    return [sys.executable, "-m", "m3ae_jax.sweep", *options, *fields, *more]


def run(arguments):
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path):
    sweep = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL)
    folder, deadline = tmp_path / "modalities=image,seed=42" / "evals", time.monotonic() + 300
    while not (found := list(folder.glob("probe_2_scenes-*.json"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    (first,) = found
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    written = first.stat().st_mtime_ns
    again = run(command(tmp_path))
    assert again.returncode == 0, again.stdout + again.stderr
    assert first.stat().st_mtime_ns == written
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["values"]["modalities"] for run in results["runs"]] == ["image", "image,text"]
    assert "2 of 2 runs" in again.stdout and "probe/trained/image/cls/accuracy" in again.stdout
    assert "| probe/trained/image/cls/accuracy |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").exists()


@pytest.mark.slow
def test_commands_are_printed(tmp_path):
    done = run(command(tmp_path, "--print_commands", "--equal_flops=modalities"))
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0 and len(lines) == 2 and not any(tmp_path.iterdir()), done.stderr
    assert all(line.startswith("python -m m3ae_jax.main --config=configs/claims.py") for line in lines)
    assert "--config.seed=42" in lines[0] and "'--config.data.modalities=(image,text)'" in lines[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval=prob"], "evals='prob' is not one of"),
        (["--eval=grounding"], "needs data.modalities=('image', 'text')"),  # of the point without texts
        (["--seeds=0"], "--seeds=0"),
        (["--compare=x"], "--compare='x' is not one of"),
        (["--gird=a=1"], "unknown argument|Unknown command line flag 'gird'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, more, message):
    import re

    done = run(command(tmp_path, *more))
    assert done.returncode == 2 and re.search(message if "|" in message else re.escape(message), done.stderr)
    assert done.stderr.count("\n") == 1 and not any(tmp_path.iterdir())


def test_item_13_results_of_other_data_are_not_a_points(tmp_path):
    config = config_lib.load("configs/claims.py")
    config_lib.apply_overrides(config, [(name, str(value)) for name, value in SMALL.items()])
    config.evals = ("probe",)
    sweep = Sweep("configs/claims.py", config, [], tmp_path, ["eval.label=shape,color"], seeds=1)
    result = Result("probe", {"probe/trained/image/cls/accuracy": 0.5}, "")
    result.save(tmp_path / sweep.runs[0].name / "evals", 2, Data("scenes-shape-000000"))
    assert not sweep.results().done
    labels = [sweep.data[run.name]["probe"] for run in sweep.runs]
    assert [label.rpartition("-")[0] for label in labels] == ["scenes-shape", "scenes-color"]
    result.save(tmp_path / sweep.runs[1].name / "evals", 2, Data(labels[1], {"test": {"source": "scenes"}}))
    (done,) = sweep.results().done
    assert done.run == sweep.runs[1] and done.scalars == result.scalars


def test_a_run_of_the_record_is_done_and_each_that_gets_done_is_added(tmp_path):
    def sweep(folder, **changes):
        config = config_lib.load("configs/claims.py")
        overrides = [(name, str(value)) for name, value in (SMALL | changes).items()]
        config_lib.apply_overrides(config, overrides)
        config.evals = ("probe",)
        return Sweep(
            "configs/claims.py", config, [], folder, ["m3ae.text_mask_ratio=0.5,0.9"], 1, record=tmp_path / "x.json"
        )

    here = sweep(tmp_path / "here")
    data = here.data[here.runs[0].name]["probe"]
    assert [job.is_done() for job in here.jobs()] == [False, False]
    result = Result("probe", {"probe/trained/image/cls/accuracy": 0.5}, "")
    result.save(tmp_path / "here" / here.runs[0].name / "evals", 2, Data(data))
    here.jobs()[0].finished()
    assert len((tmp_path / "x.json").read_text().splitlines()) == 3  # a line for the run
    elsewhere = sweep(tmp_path / "elsewhere")
    assert [job.is_done() for job in elsewhere.jobs()] == [True, False]
    assert elsewhere.results().done[0].scalars == result.scalars
    for changes in ({"duration": "3 steps"}, {"model.width": 64}, {"seed": 7}, {"init_from": "runs/other"}):
        assert not any(job.is_done() for job in sweep(tmp_path / "other", **changes).jobs()), changes
    other = Result("probe", {"probe/trained/image/cls/accuracy": 0.7}, "")
    other.save(tmp_path / "elsewhere" / here.runs[1].name / "evals", 2, Data(data))
    elsewhere.jobs()[1].finished()
    assert [run["scalars"] for run in json.loads((tmp_path / "x.json").read_text())["runs"]] == [
        result.scalars,
        other.scalars,
    ]
    (tmp_path / "x.json").write_text('{"runs": [1]}')
    with pytest.raises(UserError, match=r"x\.json is no file of results"):
        sweep(tmp_path / "elsewhere")
