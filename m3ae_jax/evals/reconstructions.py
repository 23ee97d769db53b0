"""Pictures of what the model restores: the same (validation) examples with the same masks, each time."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.data.images import unpatchify
from m3ae_jax.data.pipeline import grid
from m3ae_jax.data.text import Tokenizer, read_pieces
from m3ae_jax.objectives.m3ae import denormalize_pixels, normalize_pixels, patch_statistics
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.report.pictures import Reconstruction, Word, reconstruction_sheet
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

_HIDDEN_GREY = 128


class Reconstructions:
    """Draws ``original | masked | reconstruction`` and captions with the hidden words and their guesses.

    Args:
        setup: the run's parts.
        folder: gets ``step_N.png``.
    """

    def __init__(self, setup: Setup, folder: Path) -> None:
        self._setup, self._folder = setup, folder
        self._on_device: Any = None
        self._batch: Any = None
        self._reconstruct = setup.jit(setup.objective.reconstruct)

    def __call__(self, state: TrainState) -> np.ndarray | None:
        """Writes and returns one sheet (`[H, W, 3] uint8`); None if none is asked for, or another process does it."""
        count = self._setup.config.eval.pictures
        if not count:
            return None
        if self._batch is None:
            source = self._setup.val_source or self._setup.train_data.members[0].source
            with contextlib.closing(iter(self._setup.eval_batches(source, count))) as batches:
                self._on_device = put_batch(next(batches), self._setup.mesh)
            self._batch = fetch(self._on_device)  # the rows of all processes
        guesses = fetch(self._reconstruct(state.params, self._on_device))
        if jax.process_index() > 0:
            return None
        valid = np.flatnonzero(self._batch["example"]["valid"]).tolist()
        step = int(state.step)
        sheet = reconstruction_sheet([row_of(self._setup, self._batch, guesses, i) for i in valid], f"step {step}")
        self._folder.mkdir(parents=True, exist_ok=True)
        sheet.save(self._folder / f"step_{step:08d}.png")
        return np.asarray(sheet)


def row_of(setup: Setup, batch: Any, guesses: dict[str, np.ndarray], example: int) -> Reconstruction:
    """One example of a batch beside what the model made of it.

    Args:
        setup: the run's parts.
        batch: in host memory.
        guesses: of `Objective.reconstruct`, likewise.
        example: its row.
    """
    groups = {
        name: {part: {k: v[example] for k, v in tokens.items()} for part, tokens in group.items()}
        for name, group in batch["groups"].items()
    }
    original = masked = restored = None
    if "image" in groups:
        original, masked, restored = _pictures(setup.config, groups["image"], guesses["image"][example])
    words: tuple[Word, ...] = ()
    if "text" in groups and setup.tokenizer:
        words = _words(groups["text"], guesses["text"][example], setup.tokenizer)
    return Reconstruction(original, masked, restored, words)


def _pictures(
    config: ConfigDict, group: dict[str, Any], guess: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if config.loss.normalize_patches:
        # Only the patch's own statistics give such a guess a colour, as in MAE's pictures.
        mean, std = patch_statistics(normalize_pixels(group["target"]["value"], config))
        guess = guess * std + mean
    rows, columns = grid(config)
    visible, target = group["visible"], group["target"]
    patches = np.full((rows * columns, visible["value"].shape[-1]), _HIDDEN_GREY, np.uint8)

    def filled(values: dict[str, np.ndarray], where: dict[str, np.ndarray], base: np.ndarray) -> np.ndarray:
        out = base.copy()
        out[where["position"][where["valid"]]] = values["value"][where["valid"]]
        return out

    masked = filled(visible, visible, patches)
    original = filled(target, target, masked)
    restored = filled({"value": np.asarray(denormalize_pixels(jnp.asarray(guess), config))}, target, masked)
    whole = unpatchify(np.stack([original, masked, restored]), config.data.patch_size, (rows, columns))
    return whole[0], whole[1], whole[2]


def _words(group: dict[str, Any], logits: np.ndarray, tokenizer: Tokenizer) -> tuple[Word, ...]:
    words: dict[int, Word] = {}
    visible, target = group["visible"], group["target"]
    for position, token in zip(visible["position"][visible["valid"]], visible["value"][visible["valid"]], strict=True):
        words[int(position)] = Word(read_pieces(tokenizer, [int(token)])[0], hidden=False, predicted=None)
    best = np.argmax(logits, axis=-1)
    for slot in np.flatnonzero(target["valid"]):
        text, guess = read_pieces(tokenizer, [int(target["value"][slot]), int(best[slot])])
        words[int(target["position"][slot])] = Word(text, hidden=True, predicted=guess)
    return tuple(words[position] for position in sorted(words))
