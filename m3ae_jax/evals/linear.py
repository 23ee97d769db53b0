"""Multinomial logistic regression with an L2 penalty, solved to its optimum by L-BFGS.

Minimised is the mean cross-entropy in nats plus ``l2 / 2`` times the squared norm of the weights (not the biases) of
standardised features; scikit-learn's ``C`` is ``1 / (n * l2)``. The problem is solved in the features' principal
axes, each scaled by the root of its curvature at the start: that leaves the optimum where it is, and makes
strongly correlated features take tens of iterations instead of thousands.

Legend: ``n`` examples, ``D`` features, ``R`` principal axes, ``C`` classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

L2 = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_HELD_OUT = 0.2
_PATIENCE = 2  # penalties in a row that do worse; then smaller ones are not tried
_ITERATIONS, _MEMORY = 300, 20
_EXACT, _ROUGH = 1e-7, 1e-5  # decrease of the loss below which a step is small; rough fits choose the penalty
_STALLED = 2  # small steps in a row that end a fit


@dataclasses.dataclass(frozen=True)
class Scale:
    """Standardises features.

    Attributes:
        mean: `[D]`.
        deviation: `[D]`; 1 where a feature is constant.
    """

    mean: np.ndarray
    deviation: np.ndarray

    @staticmethod
    def of(features: np.ndarray) -> Scale:
        """Mean and deviation of `[n, D]` features."""
        deviation = features.std(axis=0, dtype=np.float64)
        known = deviation > 1e-6 * np.maximum(1.0, np.abs(features).max(axis=0))
        return Scale(features.mean(axis=0, dtype=np.float64), np.where(known, deviation, 1.0))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """`[n, D] float32`."""
        return ((features - self.mean.astype(np.float32)) / self.deviation.astype(np.float32)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """What was fitted.

    Attributes:
        scale: of its features.
        weight: `[D, C]`, of standardised features.
        bias: `[C]`.
        l2: the penalty.
    """

    scale: Scale
    weight: np.ndarray
    bias: np.ndarray
    l2: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        """`[n, C] float32`."""
        return self.scale(features) @ self.weight.astype(np.float32) + self.bias.astype(np.float32)

    def right(self, features: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Which of `[n]` labels are the most probable class, `[n] bool`."""
        hits: np.ndarray = self.logits(features).argmax(axis=1) == label
        return hits

    def accuracy(self, features: np.ndarray, label: np.ndarray) -> float:
        """Share of `[n]` labels that are the most probable class."""
        return float(self.right(features, label).mean())


class Problem:
    """The training examples in their principal axes; fitted for one penalty after the other.

    Args:
        features: `[n, D]`.
        label: `[n]`, from 0.
        classes: how many there are.
        scale: standardises the features; by default their own.
    """

    def __init__(self, features: np.ndarray, label: np.ndarray, classes: int, scale: Scale | None = None) -> None:
        self._scale = scale or Scale.of(features)
        self._classes = classes
        x = self._scale(features)
        n, width = x.shape
        # Directions in which the examples do not lie have no weight at the optimum. They stay as zeros: the number
        # of axes, for which the loss is compiled, is then that of all draws of so many examples.
        if n < width:
            squared, left = np.linalg.eigh((x @ x.T).astype(np.float64))
            squared = np.where(squared > 1e-9 * squared[-1], squared, 0.0)
            inverse = np.divide(1.0, np.sqrt(squared), out=np.zeros(n), where=squared > 0)
            self._axes, self._curvature = (x.T @ (left * inverse)).astype(np.float32), squared / n
        else:
            squared, axes = np.linalg.eigh((x.T @ x).astype(np.float64) / n)
            self._axes, self._curvature = axes.astype(np.float32), np.maximum(squared, 0.0)
        self._x, self._y = jnp.asarray(x @ self._axes), jnp.asarray(label)
        frequency = (np.bincount(label, minlength=classes) + 1e-2) / (len(label) + 1e-2 * classes)
        self._start = np.concatenate([np.zeros((len(self._curvature), classes)), np.log(frequency)[None]])

    def begin_at(self, weight: np.ndarray, bias: np.ndarray) -> None:
        """Makes the next fit start from weights `[D, C]` and biases `[C]` of standardised features."""
        self._start = np.concatenate([self._axes.T @ weight, bias[None]])

    def fit(self, l2: float, tolerance: float = _EXACT) -> Classifier:
        """The optimum for a penalty; begins at that of the last one."""
        spread = (self._classes - 1) / self._classes**2  # mean of p (1 - p) where all classes are as probable
        scaling = np.append(np.sqrt(self._curvature * spread + l2), np.sqrt(spread))[:, None].astype(np.float32)
        scaled = _minimum((self._start * scaling).astype(np.float32), self._x, self._y, scaling, l2, tolerance)
        self._start = np.asarray(scaled, np.float64) / scaling
        return Classifier(self._scale, self._axes @ self._start[:-1], self._start[-1], l2)


@jax.jit
def _minimum(
    start: jax.Array, x: jax.Array, y: jax.Array, scaling: jax.Array, l2: jax.Array, tolerance: jax.Array
) -> jax.Array:
    """The scaled weights at which the loss is least, `[R + 1, C]`, the biases last."""

    def loss(scaled: jax.Array) -> jax.Array:
        weight = scaled / scaling
        with jax.default_matmul_precision("highest"):
            logits = x @ weight[:-1] + weight[-1]
        right = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        penalty = 0.5 * l2 * jnp.sum(jnp.square(weight[:-1]))
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - right) + penalty

    # The loss is convex, so a step that makes it smaller is enough; nearly always the whole one does.
    search = optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=12, max_learning_rate=1.0, increase_factor=float("inf"), store_grad=True
    )
    solver = optax.lbfgs(memory_size=_MEMORY, linesearch=search)
    value_and_slope = optax.value_and_grad_from_state(loss)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        scaled, state, before, stalled, done = carry
        value, slope = value_and_slope(scaled, state=state)
        change, state = solver.update(slope, state, scaled, value=value, grad=slope, value_fn=loss)
        small = before - value <= tolerance * jnp.maximum(jnp.abs(value), 1.0)
        return optax.apply_updates(scaled, change), state, value, jnp.where(small, stalled + 1, 0), done + 1

    def goes_on(carry: tuple[Any, ...]) -> jax.Array:
        return (carry[-1] < _ITERATIONS) & (carry[-2] < _STALLED)

    first = (start, solver.init(start), jnp.float32(jnp.inf), jnp.int32(0), jnp.int32(0))
    minimum: jax.Array = jax.lax.while_loop(goes_on, step, first)[0]
    return minimum


def swept(
    features: np.ndarray,
    label: np.ndarray,
    classes: int,
    penalties: Sequence[float] = L2,
    group: np.ndarray | None = None,
) -> Classifier:
    """Fits on all examples with the penalty that does best on a fifth of them, held out for that.

    Of equally good penalties the largest is taken.

    Args:
        features: `[n, D]`.
        label: `[n]`, from 0.
        classes: how many there are.
        penalties: to choose from, falling.
        group: `[n]`, equal for examples of which all or none are held out; None: each by itself.
    """
    held, rest = held_out(len(label), group)
    if not len(rest):
        return Problem(features, label, classes).fit(penalties[0])
    problem = Problem(features[rest], label[rest], classes)
    best, best_accuracy, worse = None, -1.0, 0
    for l2 in penalties:
        probe = problem.fit(l2, _ROUGH)
        accuracy = probe.accuracy(features[held], label[held])
        worse = worse + 1 if accuracy < best_accuracy else 0
        if best is None or accuracy > best_accuracy:
            best, best_accuracy = probe, accuracy
        if worse == _PATIENCE:
            break
    assert best is not None
    whole = Problem(features, label, classes)
    whole.begin_at(best.weight, best.bias)
    return whole.fit(best.l2)


def held_out(examples: int, group: np.ndarray | None) -> list[np.ndarray]:
    """A random fifth of so many examples, or whole groups that are about so many, and the rest; the same each time.

    Args:
        examples: how many there are.
        group: see `swept`; of a single one there is no rest.
    """
    wanted, rng = max(1, round(_HELD_OUT * examples)), np.random.default_rng(0)
    if group is None:
        return np.split(rng.permutation(examples), [wanted])
    names, place = np.unique(group, return_inverse=True)
    order = rng.permutation(len(names))
    reached = np.cumsum(np.bincount(place)[order])
    # The groups that come nearest to what is wanted, and of several at least one on either side.
    count = min(1 + int(np.abs(reached - wanted).argmin()), max(1, len(names) - 1))
    held = np.isin(place, order[:count])
    return [np.flatnonzero(held), np.flatnonzero(~held)]
