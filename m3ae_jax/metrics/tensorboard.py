"""TensorBoard: event files, with the run's config, its hyperparameters and charts of losses beside its figures."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

import m3ae_jax.config as config_lib
from m3ae_jax.config.schema import leaves
from m3ae_jax.metrics.writers import RunInfo, Writer

_CHARTS = {
    "loss": r"^(train|val)/loss$",
    "losses by term": r"^(train|val)/\w+_loss$",
    "accuracies": r"^(train|val)/\w*accuracy$",
}
"""Charts of the tab "Custom Scalars": of each the tags, as a regular expression."""


class TensorBoard(Writer):
    """Writes ``WORKDIR/tensorboard``.

    A run that goes on begins with a mark, from which on TensorBoard forgets what it has read of the steps to come. The
    figures of ``--mode=eval`` are a TensorBoard run of their own in there, ``eval_step_N``: among those of a run that
    is at a later step, TensorBoard would take them for such a mark.
    """

    def __init__(self, run: RunInfo) -> None:
        folder = run.workdir / "tensorboard"
        self._folder = folder / f"eval_step_{run.step}" if run.evaluation else folder
        self._file: Any = None
        if run.evaluation:
            self._mark(0)  # the evaluation of this step before
        else:
            self._mark(run.first)
            self._about(run)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer.scalars`."""
        self._summary(step, [{"tag": name, "simple_value": value} for name, value in values.items()])

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """See `Writer.image`."""
        encoded = io.BytesIO()
        Image.fromarray(picture).save(encoded, "PNG")
        height, width, _ = picture.shape
        image = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": encoded.getvalue()}
        self._summary(step, [{"tag": name, "image": image}])

    def text(self, step: int, name: str, text: str) -> None:
        """See `Writer.text`."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        # Shown as Markdown: indented, it is taken as it is.
        self._summary(step, text_pb(name, "\n".join(f"    {line}" for line in text.splitlines())).value)

    def close(self) -> None:
        """See `Writer.close`."""
        if self._file is not None:
            self._file.close()

    def _mark(self, first: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def _about(self, run: RunInfo) -> None:
        """At the first step to come, so that the next start's mark takes it away if this one gets no further."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        self.text(run.first, "config", config_lib.to_json(run.config))
        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in leaves(run.config).items()
        }
        self._summary(run.first, hparams_pb(plain).value)
        self._summary(run.first, [_charts()])

    def _summary(self, step: int, values: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Any) -> None:
        try:
            if self._file is None:
                self._file = self._opened()
            event.wall_time = time.time()
            self._file.write(event.SerializeToString())
            self._file.flush()  # a kill loses no more than the rows lose
        except Exception:
            self._file = None  # nothing is read after a record that was cut: the next event begins a file
            raise

    def _opened(self) -> Any:
        import tensorflow as tf
        from tensorboard.compat.proto.event_pb2 import Event

        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names: two starts may begin in the same second.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        file = tf.io.TFRecordWriter(str(self._folder / name))
        file.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        return file


def _charts() -> Any:
    """The layout of the tab "Custom Scalars": training and validation in one chart."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[tags]))
        for title, tags in _CHARTS.items()
    ]
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title="training and validation", chart=charts)])
    return Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG,
        metadata=metadata.create_summary_metadata(),
        tensor=make_tensor_proto(layout.SerializeToString(), dtype=np.object_),
    )
