"""What is restored of the same examples at several mask ratios, side by side.

All modalities are hidden at the same ratio, at random; what is hidden at one ratio is hidden at the larger ones too.
The figures are of few examples: `masked_prediction` restores many, and one modality at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from m3ae_jax.evals.base import Result, amount, table
from m3ae_jax.evals.clean import clean_batches
from m3ae_jax.evals.features import shown
from m3ae_jax.evals.reconstructions import note_of, row_of
from m3ae_jax.evals.restored import batch_size, hidden_at_random, restorer
from m3ae_jax.evals.verdict import sentence
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.report.pictures import Reconstruction, ratio_sheet
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

RATIOS = (0.25, 0.5, 0.75, 0.9)
_DRAWN = 4  # a sheet of more would be made too small to read on the run's page
_HEADS = {"error": "squared error per pixel value", "accuracy": "words restored"}

Sums = dict[tuple[str, float], np.ndarray]
"""By group and ratio: `[2] float64`, the sum over hidden tokens and their number."""


@dataclasses.dataclass(frozen=True)
class RestoredAtRatios:
    """What came of hiding at `RATIOS`.

    Attributes:
        drawn: the first examples, by ratio.
        sums: of all.
        figure: by group, what is summed: ``error`` of patches, ``accuracy`` of words.
        count: how many examples there are.
        note: what to know of the pictures.
    """

    drawn: list[dict[float, Reconstruction]]
    sums: Sums
    figure: dict[str, str]
    count: int
    note: str


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Restores ``eval.pictures`` examples of ``data.val``, or of the training data where there is none; draws four."""
    result = restore(setup, state)
    scalars = {"n": float(result.count)}
    groups = [name for name in result.figure if any(result.sums[name, ratio][1] for ratio in RATIOS)]
    heads = [head for name in groups for head in (_HEADS[result.figure[name]], f"{name} tokens hidden")]
    rows = []
    for ratio in RATIOS:
        cells = [f"{ratio:.0%}"]
        for name in groups:
            total, hidden = result.sums[name, ratio]
            figures = {"hidden": float(hidden)}
            if hidden:  # of a caption of one word, a quarter is none
                figures[result.figure[name]] = float(total / hidden)
            scalars |= {f"{name}/{ratio}/{figure}": value for figure, value in figures.items()}
            cells += [shown(figures, result.figure[name]), f"{hidden:.0f}"]
        rows.append(cells)
    sheet = ratio_sheet(result.drawn, f"Restored at several mask ratios, step {int(state.step)}", result.note)
    text = table(["hidden", *heads], rows) + (f"\n\n{result.note}" if result.note else "")
    said = sentence(_clauses(scalars, result), f"of {amount(result.count, 'example')}, too few for an interval")
    return Result.of("mask_ratios", scalars, text, said, {"restored": np.asarray(sheet)})


def _clauses(scalars: Mapping[str, float], result: RestoredAtRatios) -> Iterator[str]:
    """Of the verdict: from the smallest ratio at which anything was hidden to the largest."""
    for name, figure in result.figure.items():
        known = [ratio for ratio in RATIOS if f"{name}/{ratio}/{figure}" in scalars]
        if known:
            first, last = (scalars[f"{name}/{ratio}/{figure}"] for ratio in (known[0], known[-1]))
            span = f"from {known[0]:.0%} to {known[-1]:.0%} hidden"
            yield f"{name}, {_HEADS[figure]}, {span}: {first:.3f} to {last:.3f}"


def restore(setup: Setup, state: TrainState) -> RestoredAtRatios:
    """Hides and restores."""
    source = setup.val_source or setup.train_data.members[0].source
    restore_part = restorer(setup)
    names = [view.name for view in setup.objective.view(source.modalities)]
    sums: Sums = {(name, ratio): np.zeros(2) for name in names for ratio in RATIOS}
    figure: dict[str, str] = {}
    examples: list[dict[float, Reconstruction]] = []
    count, note = 0, ""
    for part in clean_batches(setup, source, setup.config.eval.pictures or _DRAWN, batch_size(setup)):
        position = part["example"]["position"]
        valid = np.flatnonzero(fetch(put_batch(part["example"]["valid"], setup.mesh)))
        drawn: dict[int, dict[float, Reconstruction]] = {i: {} for i in valid[: _DRAWN - len(examples)].tolist()}
        for ratio in RATIOS:
            groups = part["groups"]
            hidden = {name: hidden_at_random(setup, name, group, position, ratio) for name, group in groups.items()}
            on_device = put_batch({"groups": hidden}, setup.mesh)
            whole = fetch(on_device)  # the rows of all processes
            restored = fetch(restore_part(state.params, on_device))
            note = note_of(restored)
            for name, tokens in restored.items():
                figure[name] = "error" if tokens.correct is None else "accuracy"
                per_token = tokens.loss if tokens.correct is None else tokens.correct
                targets = whole["groups"][name]["target"]["valid"][valid]
                total = np.where(targets, per_token[valid], 0.0).sum(dtype=np.float64)
                sums[name, ratio] += np.array([total, targets.sum()], np.float64)
            for i in drawn:
                drawn[i][ratio] = row_of(setup, whole, restored, i)
        examples += drawn.values()
        count += len(valid)
    return RestoredAtRatios(examples, sums, figure, count, note)
