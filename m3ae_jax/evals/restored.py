"""How well hidden words and patches are restored, example by example; of masks that an evaluation chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3ae_jax.data import masking
from m3ae_jax.data.order import fold_seed, token_budget
from m3ae_jax.data.pipeline import uniform_numbers
from m3ae_jax.evals.features import kept
from m3ae_jax.objectives.base import Batch, Params
from m3ae_jax.train.setup import Setup

_LOGITS = 2**28  # numbers that the logits of a batch may be


def hidden_at_random(group: dict[str, Any], position: np.ndarray, ratio: float) -> dict[str, Any]:
    """Hides a share of each example's tokens: the same ones each time.

    Args:
        group: token sets of a clean batch (`clean.clean_batches`), in host memory.
        position: `[B]`, ``example.position``.
        ratio: mask ratio.
    """
    tokens = group["visible"]
    seed = fold_seed("evaluations", "masks")
    noise = np.stack([uniform_numbers(seed, int(p), tokens["valid"].shape[1]) for p in position])
    hidden = masking.random_subset(noise, tokens["valid"], ratio)
    split = masking.split(tokens["value"], tokens["valid"], hidden, token_budget(tokens["valid"].shape[1], ratio))
    return {part: {k: np.asarray(v) for k, v in sets.items()} for part, sets in split.items()}


def scorer(setup: Setup) -> Callable[[Params, Batch], dict[str, dict[str, jax.Array]]]:
    """Compiles what tells, of each group that has targets, ``{name: [B] float32}`` sums over them and their ``count``.

    Of words ``loss`` (nats) and ``correct``; of patches ``error``, the mean squared error of a patch's values, in the
    pixel space of the loss.
    """
    modality = {group.name: group.modality for group in setup.objective.groups}

    def score(params: Params, batch: Batch) -> dict[str, dict[str, jax.Array]]:
        guesses, targets = setup.objective.reconstruct(params, batch), setup.objective.targets(batch)
        found = {}
        for name, guess in guesses.items():
            valid, target = batch["groups"][name]["target"]["valid"], targets[name]
            if not valid.shape[1]:
                continue
            if modality[name] == "image":
                per_token = {"error": jnp.mean(jnp.square(guess - target), axis=-1)}
            else:
                right = jnp.take_along_axis(guess, target[..., None], axis=-1)[..., 0]
                loss = jax.nn.logsumexp(guess, axis=-1) - right
                per_token = {"loss": loss, "correct": (jnp.argmax(guess, axis=-1) == target).astype(jnp.float32)}
            sums = {k: jnp.sum(jnp.where(valid, x, 0.0), axis=1, dtype=jnp.float32) for k, x in per_token.items()}
            found[name] = sums | {"count": jnp.sum(valid, axis=1, dtype=jnp.float32)}
        return found

    return kept(setup, "scorer", lambda: setup.jit(score))


def batch_size(setup: Setup) -> int:
    """``eval.batch_size``, or fewer if the logits of so many captions would not fit."""
    vocabulary = setup.tokenizer.vocab_size if setup.tokenizer else 1
    most = _LOGITS // (vocabulary * setup.config.data.max_text_tokens)
    return max(1, min(setup.config.eval.batch_size, most))


def names_of(setup: Setup) -> tuple[str, str]:
    """The groups of the picture and of the caption."""
    found = {group.modality: group.name for group in reversed(setup.objective.groups)}
    return found["image"], found["text"]
