"""Do the modalities inform each other? Asked on ``scenes``, whose truth is known.

Words: the whole picture and all other words visible, one colour or shape word hidden at a time, of those that
picture and caption determine. Right if the most probable word is the true one; once with the true picture, once
with another scene's. Patches: all patches of a mentioned object hidden, the rest and the caption visible; the error
with the true caption and with another scene's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from m3ae_jax.data import images, masking
from m3ae_jax.data.pipeline import token_slots
from m3ae_jax.data.sources.scenes import Scene, SceneOptions, ScenesSource, encode_bmp
from m3ae_jax.data.text import encode_batch
from m3ae_jax.evals import Result, check
from m3ae_jax.parallel.mesh import batch_parts, fetch, put_whole_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

SCENES = 512
_BATCH = 128
_BOOTSTRAP = 1000


@dataclasses.dataclass(frozen=True)
class _Question:
    """One thing to hide: the tokens of one modality, in one scene."""

    scene: int
    attribute: str
    hidden: np.ndarray  # [L] bool, over the patches or over the caption's tokens


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Asks on the first scenes of ``val`` and of ``val_novel`` (attribute pairs never seen in training).

    Raises:
        UserError: the model has not both modalities (`evals.check`).
    """
    check(setup.config)
    scalars: dict[str, float] = {}
    lines = [
        "| split | hidden | n | other modality true | shuffled | prior | true - shuffled, 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    ask = _Asker(setup, state)
    for split in ("val", "val_novel"):
        source = ScenesSource(split, SceneOptions(**setup.config.data.scenes.to_dict()))
        scenes = [source.scene(i) for i in range(SCENES)]
        for hidden, figures in ask(scenes).items():
            scalars |= {f"grounding/{split}/{hidden}/{key}": value for key, value in figures.items()}
            lines.append(_line(split, hidden, figures))
    return Result("grounding", scalars, "\n".join(lines))


def _line(split: str, hidden: str, f: dict[str, float]) -> str:
    unit = "squared error of" if hidden == "object" else "accuracy of"
    prior = f"{f['prior']:.3f}" if "prior" in f else ""
    return (
        f"| {split} | {unit} {hidden} | {f['n']:.0f} | {f['true']:.3f} | {f['shuffled']:.3f} | {prior} | "
        f"{f['difference']:+.3f} [{f['low']:+.3f}, {f['high']:+.3f}] |"
    )


class _Asker:
    def __init__(self, setup: Setup, state: TrainState) -> None:
        assert setup.tokenizer is not None
        self._setup, self._params, self._tokenizer = setup, state.params, setup.tokenizer
        self._slots = token_slots(setup.config)
        self._reconstruct = setup.jit(setup.objective.reconstruct)
        self._targets = setup.jit(setup.objective.targets)

    def __call__(self, scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
        """Figures by what was hidden: ``color``, ``shape`` (accuracies) and ``object`` (squared error)."""
        pixels = self._patches(scenes)
        ids, length = encode_batch(self._tokenizer, [s.caption.encode() for s in scenes], self._slots["text"])
        real = np.arange(self._slots["text"]) < length[:, None]
        other = np.roll(np.arange(len(scenes)), 1)
        data = {"pixels": pixels, "ids": ids, "real": real}
        results = {}
        words = self._word_questions(scenes)
        for attribute in ("color", "shape"):
            asked = [q for q in words if q.attribute == attribute]
            if not asked:
                continue
            true = self._answers(asked, data, "text", lambda i: (i, i))
            shuffled = self._answers(asked, data, "text", lambda i: (other[i], i))
            names = [ids[q.scene][q.hidden].tobytes() for q in asked]
            results[attribute] = {
                **_compare(asked, true, shuffled),
                "prior": max(names.count(name) for name in set(names)) / len(names),
            }
        asked = self._object_questions(scenes)
        if not asked:
            return results
        true = self._answers(asked, data, "image", lambda i: (i, i))
        shuffled = self._answers(asked, data, "image", lambda i: (i, other[i]))
        results["object"] = _compare(asked, true, shuffled)
        return results

    def _patches(self, scenes: Sequence[Scene]) -> np.ndarray:
        data = self._setup.config.data
        pictures = np.stack([images.load(encode_bmp(s.image), data.image_size) for s in scenes])
        return images.patchify(pictures, data.patch_size)

    def _word_questions(self, scenes: Sequence[Scene]) -> list[_Question]:
        questions = []
        for i, scene in enumerate(scenes):
            tokens = self._tokenizer.spans(scene.caption)[: self._slots["text"]]
            for _, span in scene.determined_spans():
                hidden = np.zeros(self._slots["text"], bool)
                hidden[: len(tokens)] = [start < span.end and end > span.start for start, end in tokens]
                if hidden.any():
                    questions.append(_Question(i, span.attribute, hidden))
        return questions

    def _object_questions(self, scenes: Sequence[Scene]) -> list[_Question]:
        questions = []
        for i, scene in enumerate(scenes):
            for number in sorted({mention.object for mention in scene.mentions}):
                hidden = self._touched(scene.segmentation == number + 1)
                if hidden.any() and not hidden.all():
                    questions.append(_Question(i, "object", hidden))
        return questions

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

    def _answers(
        self,
        questions: Sequence[_Question],
        data: dict[str, np.ndarray],
        asked: str,
        context: Callable[[int], tuple[int, int]],
    ) -> np.ndarray:
        """1.0 for a right word, or an object's mean squared error; `context` gives (picture, caption) of a scene."""
        parts = batch_parts(self._setup.mesh)
        size = -(-_BATCH // parts) * parts
        answers = [self._answer(chunk, data, asked, context) for chunk in _chunks(questions, size)]
        return np.concatenate(answers)[: len(questions)]

    def _answer(
        self,
        questions: Sequence[_Question],
        data: dict[str, np.ndarray],
        asked: str,
        context: Callable[[int], tuple[int, int]],
    ) -> np.ndarray:
        picture, caption = np.array([context(q.scene) for q in questions]).T
        hidden = np.stack([q.hidden for q in questions])
        pixels, ids, real = data["pixels"][picture], data["ids"][caption], data["real"][caption]
        nothing = {m: np.zeros((len(questions), slots), bool) for m, slots in self._slots.items()}
        masks = nothing | {asked: hidden}
        budget = {m: (slots, slots if m == asked else 0) for m, slots in self._slots.items()}
        groups = {
            "image": masking.split(pixels, ~nothing["image"], masks["image"], budget["image"]),
            "text": masking.split(ids, real, masks["text"], budget["text"]),
        }
        groups = jax.tree.map(np.asarray, groups)
        batch: Any = put_whole_batch({"groups": groups}, self._setup.mesh)
        guess = fetch(self._reconstruct(self._params, batch)[asked])
        target = fetch(self._targets(batch)[asked])
        valid = groups[asked]["target"]["valid"]
        if asked == "text":
            return ((np.argmax(guess, -1) == target) | ~valid).all(axis=-1).astype(np.float64)
        error = np.square(guess - target).mean(axis=-1)
        return np.where(valid, error, 0.0).sum(axis=-1) / valid.sum(axis=-1)


def _chunks(questions: Sequence[_Question], size: int) -> Iterator[list[_Question]]:
    """Equal chunks, one compiled shape: the last is filled up with its first question."""
    for start in range(0, len(questions), size):
        chunk = list(questions[start : start + size])
        yield chunk + chunk[:1] * (size - len(chunk))


def _compare(questions: Sequence[_Question], true: np.ndarray, shuffled: np.ndarray) -> dict[str, float]:
    """Means, and the difference's 95 % interval from a bootstrap over scenes (their questions go together)."""
    scene = np.array([q.scene for q in questions])
    count = np.bincount(scene).astype(np.float64)
    total = np.bincount(scene, weights=true - shuffled)
    draws = np.random.default_rng(0).integers(0, len(count), (_BOOTSTRAP, len(count)))
    differences = total[draws].sum(axis=1) / np.maximum(count[draws].sum(axis=1), 1.0)
    low, high = np.percentile(differences, [2.5, 97.5])
    means = {"true": true.mean(), "shuffled": shuffled.mean(), "difference": (true - shuffled).mean()}
    return {
        "n": float(len(questions)),
        **{k: float(v) for k, v in means.items()},
        "low": float(low),
        "high": float(high),
    }
