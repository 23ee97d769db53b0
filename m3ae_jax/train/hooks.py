"""What happens beside the steps of a run and is defined outside: validation, evaluations, pictures, the run's page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from m3ae_jax.metrics.writers import MetricWriter
    from m3ae_jax.train.step import TrainState


class Hooks:
    """Called by the loop, in its order of events. These do nothing, so a run without any is one of steps alone."""

    def prior(self) -> dict[str, float]:
        """Figures that the first validation is to be compared with, as ``prior/<name>``."""
        return {}

    def validate(self, state: TrainState, stopping: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Figures on the validation data, as ``val/<name>``.

        Args:
            state: whose parameters are validated.
            stopping: called before each batch; if it is true, the run stops here and the answer is None.
        """
        return {}

    def draw(self, state: TrainState) -> tuple[np.ndarray, str] | None:
        """A picture of what the model does, `[H, W, 3] uint8`, and its texts; the picture is also in the folder."""
        return None

    def evaluate(self, state: TrainState, writer: MetricWriter, stage: Callable[[str], None]) -> dict[str, float]:
        """Runs the evaluations of the config that have no result for this step yet; the figures of all of them.

        Args:
            state: whose parameters are evaluated.
            writer: of the metrics.
            stage: called with what comes next, before each.
        """
        return {}

    def curves(self) -> None:
        """Draws the run's curves."""

    def page(self) -> None:
        """Rebuilds the run's page."""

    def replayed(self, state: TrainState, parts: Sequence[tuple[Any, int]], title: str) -> tuple[Any, list[str]] | None:
        """A sheet of examples, and their captions.

        Args:
            state: whose model looks at them.
            parts: of each example its part of the batch, in host memory, and its row there.
            title: of the sheet.
        """
        return None
