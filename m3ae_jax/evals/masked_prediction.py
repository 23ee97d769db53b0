"""Do words help to restore a picture, and pictures words? At several mask ratios, with the other modality whole.

Each example is restored with its own picture (caption), with another example's, and with none. Where the other example
has the same picture (caption), or there is none, the example is left out of all three. Intervals are over examples.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import m3ae_jax.evals.restored as restored
from m3ae_jax.data.sources import build_source
from m3ae_jax.evals.base import Result, table
from m3ae_jax.evals.clean import clean_batches, concatenated
from m3ae_jax.evals.verdict import helped
from m3ae_jax.objectives.batch import abstract_part
from m3ae_jax.parallel.mesh import batch_parts, fetch, put_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

RATIOS = (0.15, 0.5, 0.75, 0.9)
CONDITIONS = ("true", "shuffled", "none")
_FIGURE = {"text": "correct", "image": "loss"}
_MEANING = {"text": "accuracy of words", "image": "loss of patches"}

Sums = dict[tuple[str, float, str], tuple[np.ndarray, np.ndarray]]
"""(modality, ratio, condition): sums and counts over each example's targets, `[n] float64`."""


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Figures of ``eval.pairs`` examples of ``data.val``."""
    sums = restore(setup, state)
    scalars: dict[str, float] = {}
    rows, improvements = [], {}
    for modality in ("text", "image"):
        if (modality, RATIOS[0], CONDITIONS[0]) not in sums:
            continue
        for ratio in RATIOS:
            figures = _figures({c: sums[modality, ratio, c] for c in CONDITIONS})
            scalars |= {f"{modality}/{ratio}/{name}": value for name, value in figures.items()}
            means = [f"{figures[c]:.3f}" if c in figures else "" for c in CONDITIONS]
            hidden = f"{_MEANING[modality]}, {ratio:.0%} hidden"
            rows.append([hidden, f"{figures['n']:.0f}", *means, restored.difference_cell(figures)])
            low, high = figures["low"], figures["high"]
            subject = f"{'words' if modality == 'text' else 'patches'}, {ratio:.0%} hidden"
            improvements[subject] = (low, high) if modality == "text" else (-high, -low)
    heads = ("hidden", "n", "other modality true", "shuffled", "none", "true - shuffled, 95 % interval")
    return Result.of("masked_prediction", scalars, table(heads, rows), helped(improvements))


def restore(setup: Setup, state: TrainState) -> Sums:
    """Runs the model on all examples, ratios and conditions."""
    source = build_source(setup.config, "val")
    score, swap = restored.scorer(setup), setup.jit(exchanged)
    image, text = restored.names_of(setup)
    objective: Any = setup.objective
    halves = objective.view(("image", "text"), {"image": 0.5, "text": 0.5})
    known = jax.eval_shape(objective.restore, state.params, abstract_part(halves, 1))  # not every one restores both
    batches: list[Sums] = []
    examples = setup.config.eval.pairs
    size = sociable(min(examples, len(source)), restored.batch_size(setup), batch_parts(setup.mesh))
    for batch in clean_batches(setup, source, examples, size):
        whole = {name: batch["groups"][name] for name in (image, text)}
        valid = put_batch(batch["example"]["valid"], setup.mesh)
        of_batch: Sums = {}
        for modality, target, other in (("text", text, image), ("image", image, text)):
            if target not in known:
                continue
            context = put_batch(whole[other], setup.mesh)
            swapped, differs = swap(context, valid)
            counted = fetch(differs)
            for ratio in RATIOS:
                hidden = put_batch(
                    restored.hidden_at_random(setup, target, whole[target], batch["example"]["position"], ratio),
                    setup.mesh,
                )
                groups: dict[str, Any] = {
                    "true": {other: context, target: hidden},
                    "shuffled": {other: swapped, target: hidden},
                    "none": {target: hidden},
                }
                for condition in CONDITIONS:
                    sums = fetch(score(state.params, {"groups": groups[condition]})[target])
                    total, count = (sums[k][counted].astype(np.float64) for k in (_FIGURE[modality], "count"))
                    of_batch[modality, ratio, condition] = total, count
        batches.append(of_batch)
    joined: Sums = concatenated(batches)
    return joined


def sociable(examples: int, size: int, parts: int) -> int:
    """The largest multiple of `parts` up to about `size`, as batch size, that leaves no example alone.

    In a batch of its own it would have no partner to exchange with.
    """
    whole = -(-size // parts) * parts
    return next((c for c in range(whole, 0, -parts) if c > 1 and examples % c != 1), whole + parts)


def exchanged(group: dict[str, Any], valid: jax.Array) -> tuple[dict[str, Any], jax.Array]:
    """Gives each example of a batch another's tokens.

    Args:
        group: token sets `[B, ...]`, all visible.
        valid: `[B] bool`, which examples are any.

    Returns:
        The token sets, and `[B] bool`: which examples got others than their own, and had any.
    """
    count = jnp.sum(valid)
    order = jnp.argsort(~valid, stable=True)
    rank = jnp.argsort(order)
    # Half a batch further, as neighbours may be captions of one picture.
    partner = order[(rank + jnp.maximum(count // 2, 1)) % jnp.maximum(count, 1)]
    swapped = jax.tree.map(lambda x: x[partner], group)

    def equal(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.all((a == b).reshape(len(a), -1), axis=1)

    mine, others = group["visible"], swapped["visible"]
    same = equal(mine["value"], others["value"]) & equal(mine["valid"], others["valid"])
    there = jnp.any(mine["valid"], axis=1) & jnp.any(others["valid"], axis=1)
    return swapped, valid & there & ~same


def _figures(of: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Means over tokens, and the 95 % interval of their difference."""
    count = of["true"][1]
    if not count.sum():
        return {"n": 0.0, "difference": 0.0, "low": 0.0, "high": 0.0}
    means = {condition: float(total.sum() / count.sum()) for condition, (total, _) in of.items()}
    n, difference = float((count > 0).sum()), means["true"] - means["shuffled"]
    interval = restored.bootstrap_interval(of["true"][0] - of["shuffled"][0], count)
    return {"n": n, **means, "difference": difference, **interval}
