"""Do the modalities inform each other? Measured on ``scenes``, whose truth is known.

Words: the whole picture and all other words visible, one colour or shape word hidden at a time, of those that
picture and caption determine. Right if the most probable word is the true one; once with the true picture, once
with another scene's. Patches: all patches of a mentioned object hidden, the rest and the caption visible; their loss
(of pixels the squared error, of ids nats) with the true caption and with another scene's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import m3ae_jax.data.masking as masking
from m3ae_jax.data.sources.scenes import Scene, SceneOptions, ScenesSource
from m3ae_jax.data.tokens import group_of
from m3ae_jax.evals.base import Result, table
from m3ae_jax.evals.clean import Tokens, scene_tokens
from m3ae_jax.evals.restored import bootstrap_interval, difference_cell, in_chunks, restorer
from m3ae_jax.evals.verdict import helped
from m3ae_jax.parallel.mesh import fetch, put_whole_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

SCENES = 512
_BATCH = 128


@dataclasses.dataclass(frozen=True)
class _Query:
    """One thing to hide: the tokens of one modality, in one scene."""

    scene: int
    attribute: str
    hidden: np.ndarray  # [L] bool, over the patches or over the caption's tokens


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Figures of the first scenes of ``val`` and of ``val_novel`` (attribute pairs never seen in training).

    It needs both modalities (`run.check`).
    """
    scalars: dict[str, float] = {}
    rows, improvements = [], {}
    grounding = _Grounding(setup, state)
    for split in ("val", "val_novel"):
        source = ScenesSource(split, SceneOptions(**setup.config.data.scenes.to_dict()))
        scenes = [source.scene(i) for i in range(SCENES)]
        for hidden, figures in grounding(scenes).items():
            scalars |= {f"{split}/{hidden}/{key}": value for key, value in figures.items()}
            rows.append([split, *_cells(hidden, figures)])
            low, high = figures["low"], figures["high"]
            improvements[f"{hidden} ({split})"] = (-high, -low) if hidden == "object" else (low, high)
    heads = ("split", "hidden", "n", "other modality true", "shuffled", "prior", "true - shuffled, 95 % interval")
    return Result.of("grounding", scalars, table(heads, rows), helped(improvements))


def _cells(hidden: str, f: dict[str, float]) -> list[str]:
    unit = "loss of patches of" if hidden == "object" else "accuracy of"
    prior = f"{f['prior']:.3f}" if "prior" in f else ""
    means = (f"{f['true']:.3f}", f"{f['shuffled']:.3f}")
    return [f"{unit} {hidden}", f"{f['n']:.0f}", *means, prior, difference_cell(f)]


class _Grounding:
    def __init__(self, setup: Setup, state: TrainState) -> None:
        assert setup.tokenizer is not None
        self._setup, self._params, self._tokenizer = setup, state.params, setup.tokenizer
        views = {modality: group_of(setup.objective.view((modality,)), modality) for modality in ("image", "text")}
        self._names = {modality: view.name for modality, view in views.items()}
        self._slots = {modality: view.modalities[0].tokens for modality, view in views.items()}
        self._restore = restorer(setup)

    def __call__(self, scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
        """Figures by what was hidden: ``color``, ``shape`` (accuracies) and ``object`` (loss)."""
        tokens = scene_tokens(self._setup, [s.image for s in scenes], [s.caption for s in scenes])
        own = np.arange(len(scenes))
        queries = self._word_queries(scenes) + self._object_queries(scenes)
        results = {}
        for attribute in ("color", "shape", "object"):
            chosen = [query for query in queries if query.attribute == attribute]
            if not chosen:
                continue
            modality = "image" if attribute == "object" else "text"
            true, shuffled = (self._answers(chosen, tokens, modality, other) for other in (own, np.roll(own, 1)))
            if np.isnan(true).all():  # this modality is not restored
                continue
            results[attribute] = _compare(chosen, true, shuffled)
            if modality == "text":
                words = [tokens["text"][0][query.scene][query.hidden].tobytes() for query in chosen]
                results[attribute]["prior"] = max(words.count(word) for word in set(words)) / len(words)
        return results

    def _word_queries(self, scenes: Sequence[Scene]) -> list[_Query]:
        queries = []
        for i, scene in enumerate(scenes):
            tokens = self._tokenizer.spans(scene.caption)[: self._slots["text"]]
            for _, span in scene.determined_spans():
                hidden = np.zeros(self._slots["text"], bool)
                hidden[: len(tokens)] = [start < span.end and end > span.start for start, end in tokens]
                if hidden.any():
                    queries.append(_Query(i, span.attribute, hidden))
        return queries

    def _object_queries(self, scenes: Sequence[Scene]) -> list[_Query]:
        queries = []
        for i, scene in enumerate(scenes):
            for number in sorted({mention.object for mention in scene.mentions}):
                hidden = self._touched(scene.segmentation == number + 1)
                if hidden.any() and not hidden.all():
                    queries.append(_Query(i, "object", hidden))
        return queries

    def _touched(self, inside: np.ndarray) -> np.ndarray:
        """Which patches of the model's picture a region of the scene's (`[S, S] bool`) touches, `[L] bool`."""
        data = self._setup.config.data
        side, scale = data.image_size // data.patch_size, data.image_size / inside.shape[0]
        rows, columns = np.nonzero(inside)
        hidden = np.zeros((side, side), bool)
        for dy in (0.0, 1.0 - 1e-9):  # both ends of a pixel: enlarged, it may span two patches
            for dx in (0.0, 1.0 - 1e-9):
                y, x = (rows + dy) * scale // data.patch_size, (columns + dx) * scale // data.patch_size
                hidden[y.astype(int), x.astype(int)] = True
        return hidden.ravel()

    def _answers(self, queries: Sequence[_Query], tokens: Tokens, modality: str, other: np.ndarray) -> np.ndarray:
        """1.0 for a right word, or the mean loss of an object's patches.

        Args:
            queries: which of the modality's tokens are hidden.
            tokens: of all scenes.
            modality: that of the hidden tokens.
            other: of each scene, from which one the other modality is taken.
        """

        def answer(queries: list[_Query]) -> np.ndarray:
            scene = np.array([query.scene for query in queries])
            hidden = np.stack([query.hidden for query in queries])
            groups = {}
            for name, (value, real) in tokens.items():
                taken, slots = (scene if name == modality else other[scene]), self._slots[name]
                mask = hidden if name == modality else np.zeros((len(queries), slots), bool)
                budget = (slots, slots if name == modality else 0)
                groups[self._names[name]] = masking.split(value[taken], real[taken], mask, budget)
            part: Any = put_whole_batch({"groups": groups}, self._setup.mesh)
            restored = fetch(self._restore(self._params, part).get(self._names[modality]))
            if restored is None:
                return np.full(len(queries), np.nan)
            valid = groups[self._names[modality]]["target"]["valid"]
            if modality == "text":
                return (restored.correct | ~valid).all(axis=-1).astype(np.float64)
            return np.where(valid, restored.loss, 0.0).sum(axis=-1) / valid.sum(axis=-1)

        return in_chunks(queries, self._setup.eval_rows(_BATCH, _BATCH), answer)


def _compare(queries: Sequence[_Query], true: np.ndarray, shuffled: np.ndarray) -> dict[str, float]:
    """Means, and the difference's 95 % interval from a bootstrap over scenes (their queries go together)."""
    scene = np.array([query.scene for query in queries])
    means = {"true": true.mean(), "shuffled": shuffled.mean(), "difference": (true - shuffled).mean()}
    return {
        "n": float(len(queries)),
        **{name: float(mean) for name, mean in means.items()},
        **bootstrap_interval(np.bincount(scene, weights=true - shuffled), np.bincount(scene).astype(np.float64)),
    }
