"""Which test examples are training examples too: on these a classifier shows what it remembers, not what it learnt.

Examples are compared by what the model gets of them: the decoded picture, cut and scaled, or of data without pictures
the token ids. So a picture that was packed into another file, under another name and beside another caption is found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from m3ae_jax.data.sources.base import MODALITIES
from m3ae_jax.errors import UserError
from m3ae_jax.evals.base import amount
from m3ae_jax.evals.clean import clean_batches, concatenated, hashes, joined
from m3ae_jax.evals.labelled import labelled_fields, named_part, open_labelled, with_class
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.train.setup import Setup

WITHOUT = "without_overlap"
"""Ends the name of a figure of the test examples that are no training examples."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """What tells the examples of labelled data apart, in the order in which `clean_batches` reads them.

    Attributes:
        hashes: of each group of tokens, `[n] int64`: equal content has the same.
        valid: `[n] bool`, which could be read and have a class.
        unlabelled: how many could be read and have none.
    """

    hashes: Mapping[str, np.ndarray]
    valid: np.ndarray
    unlabelled: int = 0

    @staticmethod
    def of(hashed: Mapping[str, np.ndarray], valid: np.ndarray, real: np.ndarray, unlabelled: int) -> Contents:
        """Contents of whole batches in host memory.

        Args:
            hashed: of `hashed_groups`.
            valid: `[n] bool`.
            real: `[n] bool`, False for padding.
            unlabelled: see `Contents`.
        """
        return Contents({name: joined(halves)[real] for name, halves in hashed.items()}, valid[real], unlabelled)


def hashed_groups(part: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`hashes` of the examples in a part of `clean_batches`, by group: all is visible, in its order."""
    return {name: hashes(map(bytes, sets["visible"]["value"])) for name, sets in part["groups"].items()}


def read(setup: Setup, part: str, examples: int) -> Contents:
    """Reads examples of a part of ``config.eval``, those that evaluations of so many look at.

    Args:
        setup: the run's parts.
        part: ``train`` or ``test``.
        examples: at most so many.

    Raises:
        UserError: as `open_labelled` and `with_class`.
    """
    batches = []
    for batch in clean_batches(setup, open_labelled(setup.config, part), examples):
        example = {name: batch["example"][name] for name in ("valid", "real", "label", "index")}
        batches.append(fetch(put_batch({"hashed": hashed_groups(batch), **example}, setup.mesh)))
    whole = concatenated(batches)
    valid = with_class(named_part(setup.config, part), whole["valid"], whole["label"], whole["index"])
    return Contents.of(whole["hashed"], valid, whole["real"], int(whole["valid"].sum() - valid.sum()))


def unlabelled(*parts: Contents) -> dict[str, float]:
    """The figure ``unlabelled``, how many examples of these parts have no class; nothing where all have one."""
    count = sum(part.unlabelled for part in parts)
    return {"unlabelled": float(count)} if count else {}


def overlap(setup: Setup, part: str, held: Contents, others: Mapping[str, Contents]) -> np.ndarray:
    """Which examples of a part are in others too.

    Args:
        setup: the run's parts.
        part: ``test`` or ``outside``.
        held: its contents.
        others: those of other parts.

    Returns:
        `[n] bool`; False for what is not `Contents.valid`.

    Raises:
        UserError: all of them are. Scenes are not refused: their splits differ, though short captions may not.
    """
    found = np.zeros(len(held.valid), bool)
    for contents in others.values():
        found |= _equal(setup, held, contents)
    if held.valid.any() and found[held.valid].all() and not _all_scenes(setup, (part, *others)):
        named = " or ".join(named_part(setup.config, other) for other in others)
        count = amount(int(held.valid.sum()), "example")
        raise UserError(
            f"{named_part(setup.config, part)}: each of its {count} is in {named} too: what was learnt by heart would "
            "count as right; name other data"
        )
    return found


def _equal(setup: Setup, held: Contents, other: Contents) -> np.ndarray:
    """Compares by the first group of the objective's that both have, a picture's before a caption's."""
    for group in setup.objective.view(MODALITIES):
        if group.name in held.hashes and group.name in other.hashes:
            return held.valid & np.isin(held.hashes[group.name], other.hashes[group.name][other.valid])
    return np.zeros(len(held.valid), bool)


def _all_scenes(setup: Setup, parts: Iterable[str]) -> bool:
    return all(labelled_fields(setup.config, part).source == "scenes" for part in parts)


def note(seen: np.ndarray, part: str = "test", where: str = "eval.train") -> str:
    """A line under a table that tells of the overlap; nothing where there is none.

    Args:
        seen: `[n] bool`, which examples of the part are elsewhere too.
        part: whose examples they are.
        where: else they are.
    """
    count = int(seen.sum())
    if not count:
        return ""
    beside = "" if seen.all() else f"; figures without {'it' if count == 1 else 'them'} stand beside"
    are = "is" if count == 1 else "are"
    return f"\n\n{count} of {amount(len(seen), f'{part} example')} {are} in {where} too{beside}."
