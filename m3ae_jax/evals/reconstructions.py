"""Pictures of what the model restores: the same (validation) examples with the same masks, each time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from m3ae_jax.data.images import patchify, unpatchify
from m3ae_jax.data.text import Tokenizer, read_pieces
from m3ae_jax.data.tokens import patch_grid
from m3ae_jax.evals.restored import restorer
from m3ae_jax.objectives.base import Restored, Restores, model_params
from m3ae_jax.parallel.mesh import batch_parts, fetch, put_batch, put_whole_batch
from m3ae_jax.report.pictures import OWN_STATISTICS, Reconstruction, Word, hatched, reconstruction_sheet
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState


class Reconstructions:
    """Draws ``original | masked | reconstruction`` and captions with the hidden words and their guesses.

    Args:
        setup: the run's parts.
        folder: gets ``step_N.png``.
    """

    def __init__(self, setup: Setup, folder: Path) -> None:
        self._setup, self._folder = setup, folder
        self._on_device: Any = None
        self._part: Any = None
        self._restore = restorer(setup) if isinstance(setup.objective, Restores) else None

    def __call__(self, state: TrainState) -> tuple[np.ndarray, str] | None:
        """Writes and returns one sheet (`[H, W, 3] uint8`) and its captions with the guesses, if there are any.

        None where none is wanted, the objective restores nothing, or another process writes it.
        """
        count = self._setup.config.eval.pictures
        if not count or self._restore is None:
            return None
        if self._part is None:
            source = self._setup.val_source or self._setup.train_data.members[0].source
            with contextlib.closing(iter(self._setup.eval_batches(source, count))) as parts:
                self._on_device = put_batch(next(parts), self._setup.mesh)
            self._part = fetch(self._on_device)  # the rows of all processes
        params = model_params(self._setup.objective, state.params, state.extra)
        restored = fetch(self._restore(params, self._on_device))
        if jax.process_index() > 0:
            return None
        valid = np.flatnonzero(self._part["example"]["valid"]).tolist()
        step = int(state.step)
        examples = [row_of(self._setup, self._part, restored, i) for i in valid]
        sheet = reconstruction_sheet(examples, f"step {step}", note_of(restored))
        self._folder.mkdir(parents=True, exist_ok=True)
        sheet.save(self._folder / f"step_{step:08d}.png")
        captions = [_guessed(number, one.words) for number, one in enumerate(examples, 1) if one.words]
        return np.asarray(sheet), "\n".join(captions)


def replayed_sheet(
    setup: Setup, state: TrainState, rows: Sequence[tuple[Any, int]], title: str
) -> tuple[Image.Image, list[str]] | None:
    """Reconstructions of chosen examples, and their captions; None if the objective restores nothing.

    Args:
        setup: the run's parts.
        state: whose model restores.
        rows: of each example its part of the batch, in host memory, and its row there.
        title: of the sheet.
    """
    if not isinstance(setup.objective, Restores):
        return None
    restore, unit = restorer(setup), batch_parts(setup.mesh)
    params = model_params(setup.objective, state.params, state.extra)
    examples, note = [], ""
    for part, row in rows:  # one at a time, on every device, as parts have different shapes
        one = jax.tree.map(lambda x, row=row: np.repeat(np.asarray(x)[row : row + 1], unit, axis=0), part)
        restored = fetch(restore(params, put_whole_batch(one, setup.mesh)))
        examples.append(row_of(setup, one, restored, 0))
        note = note_of(restored)
    return reconstruction_sheet(examples, title, note), [_caption(example.words) for example in examples]


def note_of(restored: Mapping[str, Restored]) -> str:
    """What to know of pictures of what was restored; nothing where they are the model's alone."""
    return OWN_STATISTICS if any(group.own_statistics for group in restored.values()) else ""


def _caption(words: Sequence[Word]) -> str:
    return "".join(word.text for word in words).strip()


def _guessed(number: int, words: Sequence[Word]) -> str:
    """``1. a red dog | red -> blue``: the caption, and of each hidden word the guess."""
    guesses = [f"{word.text.strip()} -> {(word.predicted or '').strip()}" for word in words if word.hidden]
    return f"{number}. {' | '.join(filter(None, (_caption(words), ', '.join(guesses))))}"


def row_of(setup: Setup, part: Any, restored: Mapping[str, Restored], example: int) -> Reconstruction:
    """One example beside what the model made of it.

    Args:
        setup: the run's parts.
        part: rows of a batch, in host memory.
        restored: what `Restores.restore` made of it, likewise.
        example: its row.
    """
    original = masked = picture = None
    words: tuple[Word, ...] = ()
    for name, group in part["groups"].items():
        sets = jax.tree.map(lambda x: x[example], group)
        # What an objective does not restore stays hidden.
        value = np.asarray(restored[name].value)[example] if name in restored else None
        if sets["target"]["value"].ndim == 2:
            original, masked, picture = _pictures(setup, sets, value)
        elif setup.tokenizer:
            words = _words(sets, value, setup.tokenizer)
    return Reconstruction(original, masked, picture, words)


def _pictures(
    setup: Setup, group: dict[str, Any], value: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    rows, columns = patch_grid(setup.config)
    visible, target, patch = group["visible"], group["target"], setup.config.data.patch_size

    def filled(value: np.ndarray, tokens: dict[str, np.ndarray], base: np.ndarray) -> np.ndarray:
        out = base.copy()
        out[tokens["position"][tokens["valid"]]] = value[tokens["valid"]]
        return out

    nothing = patchify(hatched(rows * patch, columns * patch, patch)[None], patch)[0]
    masked = filled(visible["value"], visible, nothing)
    pictures = [filled(x, target, masked) if x is not None else masked for x in (target["value"], None, value)]
    original, masked, restored = unpatchify(np.stack(pictures), patch, (rows, columns))
    # A visual tokenizer restores everything: then there is nothing to see.
    return original, masked if visible["valid"].any() else None, restored


def _words(group: dict[str, Any], value: np.ndarray | None, tokenizer: Tokenizer) -> tuple[Word, ...]:
    words: dict[int, Word] = {}
    visible, target = group["visible"], group["target"]
    for position, token in zip(visible["position"][visible["valid"]], visible["value"][visible["valid"]], strict=True):
        words[int(position)] = Word(read_pieces(tokenizer, [int(token)])[0], hidden=False, predicted=None)
    for slot in np.flatnonzero(target["valid"]):
        ids = [int(x[slot]) for x in (target["value"], value) if x is not None]
        text, *guesses = read_pieces(tokenizer, ids)
        words[int(target["position"][slot])] = Word(text, hidden=True, predicted=guesses[0] if guesses else None)
    return tuple(words[position] for position in sorted(words))
