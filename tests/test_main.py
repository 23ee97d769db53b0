"""The command line as a user meets it."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

TINY = [
    "--config=configs/tiny.py",
    "--config.batch_size=8",
    "--config.duration=4 steps",
    "--config.model.width=32",
    "--config.model.depth=1",
    "--config.m3ae.decoder_width=32",
    "--config.m3ae.decoder_depth=1",
    "--config.data.scenes.image_size=32",
    "--config.data.image_size=32",
    "--config.eval.examples=8",
    "--config.eval.every=2 steps",
    "--config.eval.pictures=2",
    "--config.log_every=1 steps",
    "--config.checkpoint.every=2 steps",
    "--config.evals=()",
]


def main(*arguments, timeout=240):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # the program itself must silence it
    command = [sys.executable, "-m", "m3ae_jax.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config=configs/large.py"], ["data.train.path", "img2dataset", "--config=configs/tiny.py"]),
        (["--config=nosuch"], ["'nosuch'", "there are base, binding, claims", "tiny"]),
        (["--config=configs/lage.py"], ["no such file", "did you mean configs/large.py"]),
        (["--config=configs/tiny.py", "--config.modle.size=base"], ["modle.size", "model.size"]),
        (["--config=configs/tiny.py", "--wrkdir=x"], ["wrkdir", "workdir"]),
        (["--config=configs/tiny.py", "m3ae.text_mask_ratio=0.9"], ["unknown argument", "--config.NAME"]),
        ([], ["--config"]),
        (["--mode=eval", "--config.evals=knn"], ["--config is missing", "--workdir"]),
        (["--config=configs/tiny.py", "--config.log_every=10"], ['did you mean "10 steps"?']),
        (["--config=configs/tiny.py", "--config.data.modalities=image"], ["grounding", "--config.evals="]),
        (["--config=configs/tiny.py", "--mode=trian"], ["--mode='trian'", "did you mean 'train'"]),
        (["--config=configs/tiny.py", "--config.evals=groundng"], ["did you mean 'grounding'"]),
        (["--config=configs/tiny.py", "--config.objective=m4ae"], ["objective='m4ae'", "did you mean 'm3ae'"]),
        (["--config=configs/tiny.py", "--config.data.train.source=scnes"], ["data.train.source", "scenes"]),
        (["--config=configs/tiny.py", "--config.data.tokenizer=none.model"], ["none.model", "train_tokenizer"]),
        (["--config=configs/tiny.py", "--config.data.train.split=trian"], ["'trian'", "train"]),
        (["--config=configs/tiny.py", "--workdir=/proc/nowhere"], ["/proc/nowhere", "cannot be written"]),
        (["--config=configs/tiny.py", "--mode=eval", "--workdir=nothing-there"], ["no checkpoint"]),
    ],
)
def test_a_mistake_is_one_line(arguments, parts):
    result = main(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr + result.stdout
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("name", ["report", "report.html"])
def test_item_6_what_cannot_be_written_is_one_line(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    if name == "report":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    result = main("--mode=report", f"--workdir={tmp_path}")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr in {f"error: {tmp_path / name}: {why}\n" for why in ("File exists", "Is a directory")}


def test_print_config():
    result = main("--config=configs/large.py", "--mode=print_config", "--config.m3ae.text_mask_ratio=0.9")
    assert result.returncode == 0, result.stderr
    assert '"text_mask_ratio": 0.9' in result.stdout
    assert "376155194" in result.stdout
    assert "peak_learning_rate" in result.stdout


def test_train_go_on_and_repeat_from_the_saved_config(tmp_path):
    workdir = tmp_path / "run"
    first = main(*TINY, f"--workdir={workdir}")
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stderr == "", "the console shows the project's own lines alone"
    assert "step 4/4 100%" in first.stdout
    for name in ("config.json", "curves.png", "metrics.jsonl", "log.txt", "tensorboard", "pictures/step_00000004.png"):
        assert (workdir / name).exists(), name
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert steps[-1] == 4

    again = main(*TINY, f"--workdir={workdir}")
    assert again.returncode == 0
    assert "nothing to train" in again.stdout

    changed = main(*TINY, f"--workdir={workdir}", "--config.m3ae.text_mask_ratio=0.25")
    assert changed.returncode == 2
    assert "m3ae.text_mask_ratio=0.25 (the run has 0.5)" in changed.stderr

    repeated = tmp_path / "repeated"
    result = main(f"--config={workdir / 'config.json'}", f"--workdir={repeated}")
    assert result.returncode == 0, result.stderr

    def losses(folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]

    assert losses(repeated) == losses(workdir)

    other = main(*TINY, f"--workdir={workdir}", "--mode=eval", "--config.model.width=64")
    assert other.returncode == 2
    assert "model.width=64 (the checkpoint has 32)" in other.stderr

    evaluated = main(f"--workdir={workdir}", "--mode=eval", "--config.evals=grounding")  # by the run's own config
    assert evaluated.returncode == 0, evaluated.stderr
    assert "accuracy of color" in evaluated.stdout
    assert len(list((workdir / "evals").glob("grounding_4_*.json"))) == 1
