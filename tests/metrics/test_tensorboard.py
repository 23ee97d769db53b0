"""What TensorBoard's own readers see of a run that was killed, was evaluated, or met a full disk."""

import json
import re

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray

from m3ae_jax.metrics.writers import MetricWriter
from tests.metrics.test_writers import config_of, metrics


def read(folder, module=plugin_event_accumulator):
    everything = dict.fromkeys((module.TENSORS, *(["scalars", "images"] if module is event_accumulator else [])), 0)
    board = module.EventAccumulator(str(folder), size_guidance=everything, purge_orphaned_data=True)
    return board.Reload()


def steps(folder):
    """Of each tag the steps, as TensorBoard shows them."""
    board = read(folder)
    return {tag: [event.step for event in board.Tensors(tag)] for tag in board.Tags()["tensors"]}


def texts(folder, tag):
    return [make_ndarray(event.tensor_proto).item().decode() for event in read(folder).Tensors(tag)]


def write(writer, step):
    writer.scalars(step, {"train/loss": float(step), "val/loss": float(step)})
    writer.image(step, "reconstructions", np.full((4, 6, 3), step, np.uint8))
    writer.text(step, "reconstructions/captions", f"1. a dog at *step* {step}\n2. <b> & |")


def killed_and_resumed(folder):
    """Killed after step 6, resumed at 4 and killed after 5, resumed at 4 and stopped at once, resumed at 4."""
    for step, last in ((0, 6), (4, 5), (4, 4), (4, 8)):
        writer = metrics(folder, "tensorboard", step=step)
        for one in range(step or 0, last + 1):
            if one > step or step == 0:
                write(writer, one)  # a kill: it is not closed
    return folder / "tensorboard"


def test_item_7_each_tag_has_each_step_once(tmp_path):
    found = steps(killed_and_resumed(tmp_path))
    figures = {tag: found.pop(tag) for tag in ("train/loss", "val/loss", "reconstructions", "reconstructions/captions")}
    assert figures == {key: [*range(9)] for key in figures}
    assert found == {key: [0, 5] for key in ("config", "_hparams_/session_start_info", "custom_scalars__config__")}


def test_item_7_readers_of_the_old_kind_see_each_step_once(tmp_path):
    board = read(killed_and_resumed(tmp_path), event_accumulator)
    for tag in ("train/loss", "val/loss"):
        assert [(event.step, event.value) for event in board.Scalars(tag)] == [(step, step) for step in range(9)]
    assert [event.step for event in board.Images("reconstructions")] == [*range(9)]


def test_item_7_a_fresh_start_takes_away_what_a_failed_one_wrote(tmp_path):
    for _ in range(2):
        for step in range(3):
            write(metrics(tmp_path, "tensorboard"), step)
    assert steps(tmp_path / "tensorboard")["train/loss"] == [2]  # each writer of the loop was a fresh start


def test_item_7_an_evaluation_takes_away_its_like_alone(tmp_path):
    writer = metrics(tmp_path, "tensorboard")
    for step in range(6):
        write(writer, step)
    for step in (4, 2, 2):
        beside = MetricWriter(tmp_path, config_of("tensorboard"))
        beside.start(step, evaluation=True)
        write(beside, step)
        beside.close()
    assert steps(tmp_path / "tensorboard")["val/loss"] == [*range(6)]
    for step in (2, 4):
        assert steps(tmp_path / "tensorboard" / f"eval_step_{step}")["val/loss"] == [step]


def test_item_7_what_comes_after_a_failure_can_be_read(tmp_path, monkeypatch):
    writer = metrics(tmp_path, "tensorboard")
    write(writer, 1)
    target = writer._targets[0]._writer

    def full(record):
        raise OSError(28, "No space left on device")

    target._file = type("Full", (), {"write": staticmethod(full), "flush": None, "close": None})
    writer.scalars(2, {"train/loss": 2.0})  # lost
    write(writer, 3)
    assert steps(tmp_path / "tensorboard")["train/loss"] == [1, 3]


def test_item_13_config_and_captions_are_texts_as_they_are(tmp_path):
    writer = metrics(tmp_path, "tensorboard")
    write(writer, 3)
    folder = tmp_path / "tensorboard"
    assert texts(folder, "reconstructions/captions") == ["    1. a dog at *step* 3\n    2. <b> & |"]
    (config,) = texts(folder, "config")
    assert json.loads(config)["data"]["image_size"] == 256
    board = read(folder)
    assert board.SummaryMetadata("config").plugin_data.plugin_name == "text"
    assert board.SummaryMetadata("reconstructions/captions").plugin_data.plugin_name == "text"
    assert board.SummaryMetadata("reconstructions").plugin_data.plugin_name == "images"


def test_item_13_hparams(tmp_path):
    metrics(tmp_path, "tensorboard").close()
    content = read(tmp_path / "tensorboard").SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    told = HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["batch_size"].number_value == 4096 and told["data.flip"].bool_value in (True, False)
    assert told["objective"].string_value == "m3ae" and told["metrics.writers"].string_value == "('tensorboard',)"
    assert told["optimizer.learning_rate"].WhichOneof("kind") == "number_value"


@pytest.mark.parametrize(
    ("tag", "charts"),
    [
        ("train/loss", ["loss"]),
        ("val/loss", ["loss"]),
        ("train/image_loss", ["losses by term"]),
        ("val/text_loss", ["losses by term"]),
        ("train/text_accuracy", ["accuracies"]),
        ("train/image_loss/pairs", []),
        ("retrieval/val/loss", []),
    ],
)
def test_item_13_training_and_validation_are_in_one_chart(tmp_path, tag, charts):
    metrics(tmp_path, "tensorboard").close()
    (event,) = read(tmp_path / "tensorboard").Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(make_ndarray(event.tensor_proto).item())
    found = [
        chart.title
        for category in layout.category
        for chart in category.chart
        if any(re.match(one, tag) for one in chart.multiline.tag)
    ]
    assert found == charts
