"""What is restored of the same examples at several mask ratios, side by side.

All modalities are hidden at the same ratio, at random; what is hidden at one ratio is hidden at the larger ones too.
The figures are of few examples: `masked_prediction` asks of many, and of one modality at a time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from m3ae_jax.evals import Result
from m3ae_jax.evals.clean import clean_batches
from m3ae_jax.evals.features import kept, shown
from m3ae_jax.evals.reconstructions import row_of
from m3ae_jax.evals.restored import batch_size, hidden_at_random
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.report.pictures import Reconstruction, ratio_sheet
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

RATIOS = (0.25, 0.5, 0.75, 0.9)
_DRAWN = 4  # a sheet of more would be made too small to read on the run's page
_FIGURE = {"image": ("error", "squared error per pixel value"), "text": ("accuracy", "words restored")}

Sums = dict[tuple[str, float], np.ndarray]
"""By group and ratio: `[2] float64`, the sum over hidden tokens and their number."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What came of hiding at `RATIOS`.

    Attributes:
        drawn: the first examples, by ratio.
        sums: of all.
        count: how many there are.
    """

    drawn: list[dict[float, Reconstruction]]
    sums: Sums
    count: int


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Restores ``eval.pictures`` examples of ``data.val``, or of the training data where there is none; draws four."""
    found = restore(setup, state)
    scalars, sums = {"n": float(found.count)}, found.sums
    groups = [group for group in setup.objective.groups if any(sums[group.name, ratio][1] for ratio in RATIOS)]
    heads = [head for group in groups for head in (_FIGURE[group.modality][1], f"{group.name} tokens hidden")]
    lines = [f"| hidden | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for ratio in RATIOS:
        cells = []
        for group in groups:
            total, hidden = sums[group.name, ratio]
            figures = {"hidden": float(hidden)}
            if hidden:  # of a caption of one word, a quarter is none
                figures[_FIGURE[group.modality][0]] = float(total / hidden)
            scalars |= {f"{group.name}/{ratio}/{name}": value for name, value in figures.items()}
            cells += [shown(figures, _FIGURE[group.modality][0]), f"{hidden:.0f}"]
        lines.append(f"| {ratio:.0%} | {' | '.join(cells)} |")
    sheet = ratio_sheet(found.drawn, f"Restored at several mask ratios, step {int(state.step)}")
    named = {f"mask_ratios/{name}": value for name, value in scalars.items()}
    return Result("mask_ratios", named, "\n".join(lines), {"restored": np.asarray(sheet)})


def restore(setup: Setup, state: TrainState) -> Restored:
    """Hides and restores."""
    source = setup.val_source or setup.train_data.members[0].source
    objective, asked = setup.objective, setup.config.eval.pictures or _DRAWN
    ask = kept(
        setup,
        "mask_ratios",
        lambda: setup.jit(lambda p, batch: (objective.reconstruct(p, batch), objective.targets(batch))),
    )
    sums: Sums = {(group.name, ratio): np.zeros(2) for group in objective.groups for ratio in RATIOS}
    examples: list[dict[float, Reconstruction]] = []
    count = 0
    for batch in clean_batches(setup, source, asked, batch_size(setup)):
        position = batch["example"]["position"]
        valid = np.flatnonzero(fetch(put_batch(batch["example"]["valid"], setup.mesh)))
        drawn: dict[int, dict[float, Reconstruction]] = {i: {} for i in valid[: _DRAWN - len(examples)].tolist()}
        for ratio in RATIOS:
            hidden = {name: hidden_at_random(group, position, ratio) for name, group in batch["groups"].items()}
            on_device = put_batch({"groups": hidden}, setup.mesh)
            whole = fetch(on_device)  # the rows of all processes
            guesses, targets = fetch(ask(state.params, on_device))
            for name, guess in guesses.items():
                sums[name, ratio] += _sums(guess[valid], targets[name][valid], whole["groups"][name]["target"], valid)
            for i in drawn:
                drawn[i][ratio] = row_of(setup, whole, guesses, i)
        examples += drawn.values()
        count += len(valid)
    return Restored(examples, sums, count)


def _sums(guess: np.ndarray, target: np.ndarray, tokens: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    """Of patches `[B, K, P]` the squared error; of words, whose `guess` is logits, how many are right."""
    hidden = tokens["valid"][rows]
    right = np.square(guess - target).mean(-1) if target.ndim == 3 else guess.argmax(-1) == target
    return np.array([np.where(hidden, right, 0.0).sum(dtype=np.float64), hidden.sum()], np.float64)
