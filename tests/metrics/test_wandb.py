"""Weights & Biases, offline: what is in the file that `wandb sync` would send."""

import json
import struct
import sys
import time

import numpy as np
import pytest

from m3ae_jax.errors import UserError
from m3ae_jax.metrics.writers import MetricWriter
from tests.metrics.test_writers import config_of, metrics

BLOCK = 32768


def test_item_13_without_the_package_wandb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"metrics.writers='wandb' needs a package: pip install 'm3ae_jax\[wandb\]'"):
        metrics(tmp_path, "wandb")
    metrics(tmp_path, "wandb", enabled=False).close()


@pytest.fixture
def offline(monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install 'm3ae_jax[wandb]'")
    for name in ("WANDB_RUN_ID", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield wandb
    wandb.teardown()


def records(path):
    """The records of a ``.wandb`` file: LevelDB's log format after a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def rows(record):
    items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
    return {name: value for name, value in items.items() if not name.startswith("_")}


def starts(workdir):
    return sorted((workdir / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.slow
def test_item_13_wandb_offline_goes_on_with_the_same_run(tmp_path, offline):
    workdir = tmp_path / "my_run"
    workdir.mkdir()
    for step, last in ((0, 6), (4, 8)):
        writer = metrics(workdir, "wandb", step=step)
        for one in range(step + 1, last + 1):
            writer.scalars(one, {"train/loss": one / 2, "train/odd": float("nan")})
        writer.image(last, "reconstructions", np.zeros((4, 6, 3), np.uint8))
        writer.text(last, "reconstructions/captions", "1. a <dog>\n2. a cat")
        writer.close()
        time.sleep(1.1)  # W&B names a start's folder by the second
    trained = (workdir / "wandb" / "run_id").read_text()
    first, second = starts(workdir)
    assert first.name == second.name == f"run-{trained}.wandb"
    found = [*records(second)]
    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.display_name, run.project, run.job_type) == (trained, "my_run", "m3ae_jax", "train")
    assert json.loads({item.key: item.value_json for item in run.config.update}["batch_size"]) == 4096
    got = [rows(record) for record in found if record.WhichOneof("record_type") == "history"]
    assert [row["step"] for row in got] == [5, 6, 7, 8, 8, 8]  # lost ones again: the x axis of all curves is "step"
    assert got[0]["train/loss"] == 2.5
    over = {
        record.metric.glob_name or record.metric.name: record.metric.step_metric for record in found if record.metric
    }
    assert over["*"] == "step"
    assert list(second.parent.glob("files/media/images/reconstructions*.png"))
    (captions,) = second.parent.glob("files/media/html/reconstructions/captions*.html")
    assert "1. a &lt;dog&gt;\n2. a cat" in captions.read_text()


@pytest.mark.slow
def test_item_13_wandb_takes_a_fresh_start_and_an_evaluation_as_other_runs(tmp_path, offline):
    ids = []
    for _ in range(2):
        metrics(tmp_path, "wandb").close()
        ids.append((tmp_path / "wandb" / "run_id").read_text())
    assert ids[0] != ids[1]
    writer = MetricWriter(tmp_path, config_of("wandb"))
    writer.start(4, evaluation=True)
    writer.scalars(4, {"knn/accuracy": 0.5})
    writer.close()
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*-eval-*.wandb")
    (run,) = [record.run for record in records(path) if record.WhichOneof("record_type") == "run"]
    assert run.run_id.startswith(f"{ids[1]}-eval-") and (run.run_group, run.job_type) == (ids[1], "eval")
