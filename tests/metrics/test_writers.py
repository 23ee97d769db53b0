"""Rows survive a resume, a cut line and a NaN."""

import json

import numpy as np

from m3ae_jax.metrics.writers import MetricWriter, read_rows


def test_rows_are_read_back_once_a_step_and_nan_is_null(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.scalars(1, {"train/loss": 2.0})
    writer.scalars(1, {"val/loss": 3.0})
    writer.scalars(2, {"train/loss": float("nan")})
    writer.image(2, "picture", np.zeros((4, 4, 3), np.uint8))
    writer.close()
    again = MetricWriter(tmp_path)
    again.scalars(2, {"train/loss": 1.5})
    again.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    rows = [{"step": 1, "train/loss": 2.0, "val/loss": 3.0}, {"step": 2, "train/loss": 1.5}]
    assert read_rows(tmp_path) == rows
    resumed = MetricWriter(tmp_path)
    resumed.scalars(4, {"train/loss": 1.0})
    resumed.close()
    assert read_rows(tmp_path) == [*rows, {"step": 4, "train/loss": 1.0}]
    assert read_rows(tmp_path, until=1) == [{"step": 1, "train/loss": 2.0, "val/loss": 3.0}]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])["train/loss"] is None
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_process_that_does_not_write_writes_nothing(tmp_path):
    writer = MetricWriter(tmp_path, enabled=False)
    writer.scalars(1, {"train/loss": 2.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []
    assert read_rows(tmp_path) == []
