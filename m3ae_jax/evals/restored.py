"""How well hidden words and patches are restored, example by example; of masks that an evaluation chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from m3ae_jax.data.masking import split
from m3ae_jax.data.order import RandomStream, fold_seed
from m3ae_jax.data.pipeline import masked
from m3ae_jax.data.sources import build_source
from m3ae_jax.data.tokens import group_of
from m3ae_jax.evals.clean import Tokens, clean_batches, concatenated
from m3ae_jax.evals.features import shared
from m3ae_jax.objectives.base import Params, Part, Restored, Restores
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.train.setup import Setup

T = TypeVar("T")

_LOGITS = 2**28  # numbers that the logits of a batch may be
_BOOTSTRAP = 1000  # draws


def hidden_at_random(setup: Setup, name: str, group: dict[str, Any], position: np.ndarray, ratio: float) -> Any:
    """Hides a share of each example's tokens: the same ones each time.

    Args:
        setup: the run's parts.
        name: of the group, which is that of its modality's view.
        group: token sets of a clean batch (`clean.clean_batches`), in host memory.
        position: `[B]`, ``example.position``.
        ratio: mask ratio.

    Returns:
        Token sets, as `group`.
    """
    modality = next(m for m in setup.config.data.modalities if group_name(setup, m) == name)
    (view,) = setup.objective.view([modality], {modality: ratio})
    seed = fold_seed("evaluations", "masks")
    streams = [RandomStream(seed, draw) for draw in position.tolist()]
    return masked(view, streams, {modality: (group["visible"]["value"], group["visible"]["valid"])})


def restorer(setup: Setup) -> Callable[[Params, Part], dict[str, Restored]]:
    """The objective's `Restores.restore`, compiled."""
    objective = setup.objective
    assert isinstance(objective, Restores)
    return shared(setup, "restorer", lambda: setup.jit(objective.restore))


def scorer(setup: Setup) -> Callable[[Params, Part], dict[str, dict[str, jax.Array]]]:
    """Compiles what computes, of each group that has targets, sums over them and their ``count``, `[B] float32`.

    They are ``loss``, as `Restored.loss`, and of ids ``correct``.
    """
    objective = setup.objective
    assert isinstance(objective, Restores)

    def score(params: Params, part: Part) -> dict[str, dict[str, jax.Array]]:
        scores = {}
        for name, restored in objective.restore(params, part).items():
            valid = part["groups"][name]["target"]["valid"]
            if not valid.shape[1]:
                continue
            per_token = {"loss": restored.loss, "count": jnp.ones_like(restored.loss)}
            if restored.correct is not None:
                per_token["correct"] = restored.correct.astype(jnp.float32)
            scores[name] = {
                key: jnp.sum(jnp.where(valid, x, 0.0), axis=1, dtype=jnp.float32) for key, x in per_token.items()
            }
        return scores

    return shared(setup, "scorer", lambda: setup.jit(score))


def batch_size(setup: Setup) -> int:
    """``eval.batch_size``, or fewer if the logits of so many captions would not fit."""
    vocabulary = setup.tokenizer.vocab_size if setup.tokenizer else 1
    most = _LOGITS // (vocabulary * setup.config.data.max_text_tokens)
    return max(1, min(setup.config.eval.batch_size, most))


def names_of(setup: Setup) -> tuple[str, str]:
    """The groups of the picture and of the caption."""
    groups = setup.objective.view(("image", "text"))
    return group_of(groups, "image").name, group_of(groups, "text").name


def whole_groups(setup: Setup, tokens: Tokens) -> dict[str, Any]:
    """Token sets of pictures and captions by group, every token visible, in host memory."""
    groups = {}
    for name, modality in zip(names_of(setup), ("image", "text"), strict=True):
        value, real = tokens[modality]
        groups[name] = split(value, real, np.zeros_like(real), (real.shape[1], 0))
    return groups


def group_name(setup: Setup, modality: str) -> str:
    """The group of a modality in the objective's view of it."""
    return group_of(setup.objective.view((modality,)), modality).name


def read_pairs(setup: Setup, examples: int, size: int, compute: Callable[[Part], Any]) -> dict[str, Any]:
    """Examples of ``data.val`` that have a picture and words, all of them visible, and what is computed of them.

    Args:
        setup: the run's parts.
        examples: at most so many, a random choice.
        size: rows of a batch.
        compute: of a batch on the mesh, of which it has ``groups`` alone: a pytree of `[B, ...]` arrays.

    Returns:
        In host memory ``groups``, ``position`` and ``caption_id`` (as `tokens.EXAMPLE`), and ``computed``.
    """
    image, text = names_of(setup)
    batches = []
    for part in clean_batches(setup, build_source(setup.config, "val"), examples, size):
        groups = put_batch({name: part["groups"][name] for name in (image, text)}, setup.mesh)
        example = put_batch({name: part["example"][name] for name in ("position", "caption_id", "valid")}, setup.mesh)
        batch = fetch({"groups": groups, **example, "computed": compute({"groups": groups})})
        paired = batch.pop("valid") & batch["groups"][text]["visible"]["valid"].any(axis=1)
        batches.append(jax.tree.map(lambda x, paired=paired: x[paired], batch))
    pairs: dict[str, Any] = concatenated(batches)
    return pairs


def in_chunks(items: Sequence[T], size: int, compute: Callable[[list[T]], np.ndarray]) -> np.ndarray:
    """The results of all items, computed of `size` at a time: the last chunk is filled up with its first item."""
    results = []
    for start in range(0, len(items), size):
        chunk = list(items[start : start + size])
        results.append(compute(chunk + chunk[:1] * (size - len(chunk)))[: len(chunk)])
    return np.concatenate(results)


def bootstrap_interval(total: np.ndarray, count: np.ndarray) -> dict[str, float]:
    """The 95 % interval of a mean, ``low`` and ``high``, from a bootstrap over examples.

    Args:
        total: `[n]`, each example's sum.
        count: `[n]`, over how many.
    """
    draws = np.random.default_rng(0).integers(0, len(count), (_BOOTSTRAP, len(count)))
    low, high = np.percentile(total[draws].sum(axis=1) / np.maximum(count[draws].sum(axis=1), 1.0), [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def difference_cell(figures: dict[str, float]) -> str:
    """``difference`` with its interval, ``low`` and ``high``, for a table."""
    return f"{figures['difference']:+.3f} [{figures['low']:+.3f}, {figures['high']:+.3f}]"
