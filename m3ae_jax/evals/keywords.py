"""Does a model find the words of a caption that matter, and others that its picture calls for?

Measured on the validation scenes, whose truth is known. Keywords of a caption that looks at its picture: precision and
recall against its attribute words (colour, shape, size, texture); chance are as many words of the caption at random.
Words recommended for the picture alone: for each colour and shape the area under the ROC curve of the scenes that show
it and do not mention it, against those that do not show it; chance is 0.5, whatever the word's frequency. Beside each
stands the same model untrained. Intervals: 95 %, by bootstrap over scenes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy.stats import rankdata

from m3ae_jax.data.sources.scenes import COLORS, SHAPES, Scene, SceneOptions, ScenesSource
from m3ae_jax.data.text import encode_batch
from m3ae_jax.evals.base import Result, table
from m3ae_jax.evals.clean import scene_tokens
from m3ae_jax.evals.features import fresh_params, shared
from m3ae_jax.evals.restored import in_chunks, whole_groups
from m3ae_jax.evals.verdict import sentence, told
from m3ae_jax.objectives.base import FindsKeywords, Params
from m3ae_jax.parallel.mesh import fetch, put_whole_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

_BATCH = 128
_BOOTSTRAP = 200  # draws
Figure = Callable[[np.ndarray], float]
"""A figure of some scenes, by their rows."""

_KINDS = {"color": tuple(COLORS), "shape": SHAPES}


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Figures of the first ``eval.pairs`` scenes of ``val``."""
    source = ScenesSource("val", SceneOptions(**setup.config.data.scenes.to_dict()))
    scenes = [source.scene(i) for i in range(min(setup.config.eval.pairs, len(source)))]
    tokens = scene_tokens(setup, [s.image for s in scenes], [s.caption for s in scenes])
    groups = whole_groups(setup, tokens)
    value, real = tokens["text"]
    words = [set(ids[valid].tolist()) for ids, valid in zip(value, real, strict=True)]
    content = _content(setup, scenes, words)
    shown, mentioned, ids = _attributes(setup, scenes, words)
    draws = np.random.default_rng(0).integers(0, len(scenes), (_BOOTSTRAP, len(scenes)))
    scalars: dict[str, float] = {"scenes": float(len(scenes))}
    rows, clauses = [], []
    for who, params in {"trained": state.params, "untrained": fresh_params(setup)}.items():
        found, recommended = _found(setup, params, groups, len(scenes))
        of_captions = _of_captions(found, words, content)
        measured = {
            "precision": (_mean_of(of_captions["precision"]), float(np.nanmean(of_captions["chance"]))),
            "recall": (_mean_of(of_captions["recall"]), float(np.nanmean(of_captions["chance_recall"]))),
        }
        if (shown & ~mentioned).any():
            measured["AUROC"] = (_area_of(recommended[:, ids], shown, mentioned), 0.5)
        for name, (figure, chance) in measured.items():
            mean = figure(np.arange(len(scenes)))
            low, high = np.percentile([figure(rows) for rows in draws], [2.5, 97.5])
            scalars |= {f"{who}/{name}": mean, f"{who}/{name}/low": float(low), f"{who}/{name}/high": float(high)}
            scalars[f"chance/{name}"] = chance
            rows.append([who, name, f"{mean:.3f} [{low:.3f}, {high:.3f}]", f"{chance:.3f}"])
            if who == "trained":
                clauses.append(f"{name} {mean:.3f}: {told(low - chance, high - chance, 'above', 'below')} chance")
    about = f"{len(scenes)} scenes"
    heads = ("model", "figure", "mean, 95 % interval", "chance")
    return Result.of("keywords", scalars, table(heads, rows), sentence(clauses, about))


def _mean_of(x: np.ndarray) -> Figure:
    return lambda rows: float(np.nanmean(x[rows]))


def _area_of(score: np.ndarray, shown: np.ndarray, mentioned: np.ndarray) -> Figure:
    return lambda rows: _area(score[rows], shown[rows], mentioned[rows])


def _found(setup: Setup, params: Params, groups: dict[str, Any], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Keywords `[n, V] bool` and probabilities `[n, V]` of all scenes."""
    objective = setup.objective
    assert isinstance(objective, FindsKeywords)
    find = shared(setup, "keywords", lambda: setup.jit(objective.keywords))

    def some(rows: list[int]) -> np.ndarray:
        part = {"groups": jax.tree.map(lambda x: x[np.array(rows)], groups)}
        keywords, probability = fetch(find(params, put_whole_batch(part, setup.mesh)))
        both: np.ndarray = np.stack([keywords.astype(np.float32), probability], axis=1)
        return both

    both = in_chunks(list(range(count)), setup.eval_rows(count, _BATCH), some)
    return both[:, 0] > 0, both[:, 1]


def _content(setup: Setup, scenes: list[Scene], words: list[set[int]]) -> list[set[int]]:
    """Ids of the attribute words of each caption, as far as it was not cut."""
    assert setup.tokenizer is not None
    content = []
    for scene, present in zip(scenes, words, strict=True):
        spans = [scene.caption[span.start : span.end] for mention in scene.mentions for span in mention.spans]
        rows, length = encode_batch(setup.tokenizer, [word.encode() for word in spans] or [b""], 8)
        ids = {int(i) for row, n in zip(rows, length, strict=True) for i in row[:n]} if spans else set()
        content.append(ids & present)
    return content


def _of_captions(found: np.ndarray, words: list[set[int]], content: list[set[int]]) -> dict[str, np.ndarray]:
    """Of each caption precision and recall, and what as many of its words at random have; NaN where there is none."""
    figures: dict[str, list[float]] = {name: [] for name in ("precision", "recall", "chance", "chance_recall")}
    for row, present, true in zip(found, words, content, strict=True):
        chosen = set(np.flatnonzero(row).tolist())
        right = len(chosen & true)
        figures["precision"].append(right / len(chosen) if chosen else np.nan)
        figures["recall"].append(right / len(true) if true else np.nan)
        figures["chance"].append(len(true) / len(present) if chosen and present else np.nan)
        figures["chance_recall"].append(len(chosen & present) / len(present) if true else np.nan)
    return {name: np.asarray(values) for name, values in figures.items()}


def _attributes(setup: Setup, scenes: list[Scene], words: list[set[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the colours and shapes that are one token each: in which scenes they are shown and mentioned; their ids.

    Returns:
        `[n, A] bool`, `[n, A] bool`, `[A] int`.
    """
    assert setup.tokenizer is not None
    named = [(kind, word) for kind, of in _KINDS.items() for word in of]
    rows, length = encode_batch(setup.tokenizer, [word.encode() for _, word in named], 8)
    single = [(kind, word, int(row[0])) for (kind, word), row, n in zip(named, rows, length, strict=True) if n == 1]
    shown = [[any(getattr(o, kind) == word for o in scene.objects) for kind, word, _ in single] for scene in scenes]
    mentioned = [[number in present for _, _, number in single] for present in words]
    return np.array(shown, bool), np.array(mentioned, bool), np.array([number for *_, number in single], int)


def _area(score: np.ndarray, shown: np.ndarray, mentioned: np.ndarray) -> float:
    """The mean over words of the area under their ROC curves; words without scenes of either kind are left out."""
    areas = []
    for x, of, said in zip(score.T, shown.T, mentioned.T, strict=True):
        positive, negative = of & ~said, ~of & ~said
        if positive.any() and negative.any():
            ranks = rankdata(np.concatenate([x[positive], x[negative]]))
            n, m = positive.sum(), negative.sum()
            areas.append((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
    return float(np.mean(areas)) if areas else float("nan")
