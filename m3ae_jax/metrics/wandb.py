"""Weights & Biases. Project, entity, mode and the like are set by its own environment variables."""

from __future__ import annotations

import html
import logging
import os
import uuid
from collections.abc import Mapping

import numpy as np

from m3ae_jax.atomic import write_text
from m3ae_jax.errors import UserError
from m3ae_jax.metrics.writers import RunInfo, Writer

log = logging.getLogger("m3ae_jax")

_PROJECT = "m3ae_jax"
_FINISH = 20.0  # seconds for the last uploads: a preempted run must end; `wandb sync` sends the rest


class WandB(Writer):
    """Writes a run of Weights & Biases; a run that goes on goes on there too, by the id in ``WORKDIR/wandb/run_id``.

    Curves are drawn over the figure ``step``: W&B's own count of rows never falls, a run that falls back to its
    checkpoint does. The evaluations of ``--mode=eval`` are W&B runs of their own in the same group.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, run: RunInfo) -> None:
        try:
            import wandb
        except ImportError as error:
            text = "metrics.writers='wandb' needs a package: pip install 'm3ae_jax[wandb]'"
            raise UserError(f"{text} ({error})") from None
        trained = _run_id(run)
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.workdir.name,
            id=f"{trained}-eval-{uuid.uuid4().hex[:4]}" if run.evaluation else trained,
            group=trained,
            job_type="eval" if run.evaluation else "train",
            resume="allow",
            dir=run.workdir,
            config=run.config.to_dict(),
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off", finish_timeout=_FINISH),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        log.info("Weights & Biases: %s", self._run.url or f"offline, in {run.workdir / 'wandb'}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer.scalars`."""
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """See `Writer.image`."""
        self._run.log({"step": step, name: self._wandb.Image(picture)})

    def text(self, step: int, name: str, text: str) -> None:
        """See `Writer.text`."""
        self._run.log({"step": step, name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def close(self) -> None:
        """See `Writer.close`."""
        self._run.finish()


def _run_id(run: RunInfo) -> str:
    """The id of the training's run; a fresh one of a fresh run."""
    file = run.workdir / "wandb" / "run_id"
    if run.step and file.exists():
        return file.read_text(encoding="utf-8").strip()
    new = uuid.uuid4().hex[:8]
    write_text(file, new)
    return new
