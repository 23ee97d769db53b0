"""Do words help to restore a picture, and pictures words? At several mask ratios, with the other modality whole.

Each example is asked with its own picture (caption), with another example's, and with none. Where the other example
has the same picture (caption), or there is none, the example is left out of all three. Intervals are over examples.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3ae_jax.data.sources import build_source
from m3ae_jax.evals import Result
from m3ae_jax.evals.clean import clean_batches
from m3ae_jax.evals.restored import batch_size, hidden_at_random, names_of, scorer
from m3ae_jax.parallel.mesh import batch_parts, fetch, put_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

RATIOS = (0.15, 0.5, 0.75, 0.9)
CONDITIONS = ("true", "shuffled", "none")
_FIGURE = {"text": "correct", "image": "error"}
_TOLD = {"text": "accuracy of words", "image": "squared error of patches"}
_BOOTSTRAP = 1000

Sums = dict[tuple[str, float, str], tuple[np.ndarray, np.ndarray]]
"""(modality, ratio, condition): sums and counts over each example's targets, `[n] float64`."""


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Asks on ``eval.pairs`` examples of ``data.val``."""
    sums = restore(setup, state)
    scalars: dict[str, float] = {}
    lines = [
        "| hidden | n | other modality true | shuffled | none | true - shuffled, 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for modality in ("text", "image"):
        for ratio in RATIOS:
            figures = _figures({c: sums[modality, ratio, c] for c in CONDITIONS})
            scalars |= {f"masked_prediction/{modality}/{ratio}/{name}": value for name, value in figures.items()}
            means = " | ".join(f"{figures[c]:.3f}" for c in CONDITIONS if c in figures)
            interval = f"{figures['difference']:+.3f} [{figures['low']:+.3f}, {figures['high']:+.3f}]"
            lines.append(f"| {_TOLD[modality]}, {ratio:.0%} hidden | {figures['n']:.0f} | {means} | {interval} |")
    return Result("masked_prediction", scalars, "\n".join(lines))


def restore(setup: Setup, state: TrainState) -> Sums:
    """Runs the model on all examples, ratios and conditions."""
    source = build_source(setup.config, "val")
    score, swap = scorer(setup), setup.jit(exchanged)
    image, text = names_of(setup)
    found: dict[tuple[str, float, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    examples = setup.config.eval.pairs
    size = sociable(min(examples, len(source)), batch_size(setup), batch_parts(setup.mesh))
    for batch in clean_batches(setup, source, examples, size):
        whole = {name: batch["groups"][name] for name in (image, text)}
        valid = put_batch(batch["example"]["valid"], setup.mesh)
        for modality, asked, other in (("text", text, image), ("image", image, text)):
            context = put_batch(whole[other], setup.mesh)
            swapped, differs = swap(context, valid)
            counted = fetch(differs)
            for ratio in RATIOS:
                hidden = put_batch(hidden_at_random(whole[asked], batch["example"]["position"], ratio), setup.mesh)
                groups: dict[str, Any] = {
                    "true": {other: context, asked: hidden},
                    "shuffled": {other: swapped, asked: hidden},
                    "none": {asked: hidden},
                }
                for condition in CONDITIONS:
                    sums = fetch(score(state.params, {"groups": groups[condition]})[asked])
                    of = tuple(sums[k][counted].astype(np.float64) for k in (_FIGURE[modality], "count"))
                    found.setdefault((modality, ratio, condition), []).append((of[0], of[1]))
    return {k: (np.concatenate([a for a, _ in v]), np.concatenate([b for _, b in v])) for k, v in found.items()}


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
    """Means over tokens, and the 95 % interval of their difference from a bootstrap over examples."""
    count = of["true"][1]
    if not count.sum():
        return {"n": 0.0, "difference": 0.0, "low": 0.0, "high": 0.0}
    means = {condition: float(total.sum() / count.sum()) for condition, (total, _) in of.items()}
    difference = of["true"][0] - of["shuffled"][0]
    draws = np.random.default_rng(0).integers(0, len(count), (_BOOTSTRAP, len(count)))
    low, high = np.percentile(difference[draws].sum(1) / np.maximum(count[draws].sum(1), 1.0), [2.5, 97.5])
    n = float((count > 0).sum())
    return {"n": n, **means, "difference": means["true"] - means["shuffled"], "low": float(low), "high": float(high)}
