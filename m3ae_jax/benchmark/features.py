"""How long the classifiers of frozen features take: nearest neighbours and the fast linear probe."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

import m3ae_jax.evals.knn as knn
import m3ae_jax.evals.linear as linear
from m3ae_jax.benchmark.timing import Figures, cores, device, spread, timed

_EXAMPLES, _WIDTH, _CLASSES = 10_000, 768, (15, 100)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one number of classes.

    Attributes:
        classes: how many.
        knn_seconds: of all queries, each repeat.
        probe_seconds: of choosing the penalty and fitting, each repeat; the first with compiling.
        cpu_seconds: of both together and all cores, each repeat: a measure on a machine with other work, too.
        knn_accuracy: of the most neighbours.
        probe_accuracy: on examples that were not fitted.
        l2: the penalty that was chosen.
    """

    classes: int
    knn_seconds: list[float]
    probe_seconds: list[float]
    cpu_seconds: list[float]
    knn_accuracy: float
    probe_accuracy: float
    l2: float


@dataclasses.dataclass(frozen=True)
class FeaturesFigures(Figures):
    """What was measured, of `examples` training and as many test features of `width` numbers."""

    examples: int
    width: int
    cores: int
    device: str
    timings: list[Timing]

    def text(self) -> str:
        """For people."""
        lines = [
            f"{self.examples:,} training and {self.examples:,} test features of {self.width} numbers "
            f"({self.cores} cores; {self.device}), seconds:"
        ]
        for t in self.timings:
            neighbours, probe, cpu = (spread(s, ".1f") for s in (t.knn_seconds, t.probe_seconds, t.cpu_seconds))
            lines.append(
                f"  {t.classes:3d} classes   kNN (k = {', '.join(map(str, knn.NEIGHBORS))}) {neighbours}, "
                f"accuracy {t.knn_accuracy:.3f}   probe {probe}, accuracy {t.probe_accuracy:.3f} "
                f"(l2 {t.l2:g})   CPU seconds of both {cpu}"
            )
        return "\n".join(lines)


def measure(repeats: int, examples: int = _EXAMPLES, width: int = _WIDTH) -> FeaturesFigures:
    """Measures on features that it makes.

    Args:
        repeats: of each measurement.
        examples: to fit on, and as many to classify.
        width: of the features.
    """
    timings = []
    for classes in _CLASSES:
        x, y = synthetic(examples, width, classes, seed=0)
        queries, truth = synthetic(examples, width, classes, seed=1)
        knn_seconds, probe_seconds, cpu_seconds = list[float](), list[float](), list[float]()
        counts = [k for k in knn.NEIGHBORS if k <= examples]
        for _ in range(repeats):
            with timed(cpu_seconds, time.process_time):
                with timed(knn_seconds):
                    guesses = knn.classify(x, y, queries, counts)
                with timed(probe_seconds):
                    probe = linear.swept(x, y, classes)
        knn_accuracy, probe_accuracy = float((guesses[counts[-1]] == truth).mean()), probe.accuracy(queries, truth)
        timings.append(Timing(classes, knn_seconds, probe_seconds, cpu_seconds, knn_accuracy, probe_accuracy, probe.l2))
    return FeaturesFigures(examples, width, cores(), device(), timings)


def synthetic(examples: int, width: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features as an encoder's: strongly correlated, with classes that overlap.

    The variance within a class falls as 1 / rank of the principal axis, and the squared distance between classes, in
    such variances, again as 1 / rank; summed over all axes it is about 9 for 768 numbers: three deviations.

    Args:
        examples: how many.
        width: of the features.
        classes: how many.
        seed: of the examples; classes and axes are the same for all.

    Returns:
        `[examples, width] float32` and `[examples]`.
    """
    fixed, rng = np.random.default_rng(12345), np.random.default_rng(seed)
    falling = np.arange(1, width + 1) ** -0.5
    axes = np.linalg.qr(fixed.normal(size=(width, width)))[0] * falling[:, None]
    centers = fixed.normal(size=(classes, width)) * 0.8 * falling
    label = rng.integers(0, classes, examples)
    x = (centers[label] + rng.normal(size=(examples, width))) @ axes
    return (x + fixed.normal(size=width)).astype(np.float32), label
