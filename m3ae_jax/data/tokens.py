"""What a batch is made of: modalities, their token sets, and the groups that an objective declares.

    Batch = {part: {"groups": {group: {set: TokenSet}}, "example": {name: [B]}}}

A part holds the rows whose source has the same modalities, and has one static shape (`data/mixture.py`). Every array
is described by a `Spec`; `EXAMPLE` describes what each part tells of its examples besides their tokens.

Legend: ``B`` examples, ``K`` token slots, ``F`` numbers in a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.data.order import RandomStream

MASK = -1
"""In `TokenSet.input`: the mask embedding is shown."""


@dataclasses.dataclass(frozen=True)
class Modality:
    """One kind of token; a table of these describes a run, and is stored with its checkpoints.

    Attributes:
        name: ``image``, ``text``, ...
        reader: who makes its tokens of a record: ``picture`` (patches) or ``text`` (token ids).
        tokens: slots before masking.
        features: numbers of a token; 0: a token is an id.
        vocabulary: number of ids.
        grid: rows and columns of the tokens, if they lie on a grid.
    """

    name: str
    reader: str
    tokens: int
    features: int = 0
    vocabulary: int = 0
    grid: tuple[int, int] | None = None


class TokenSet(TypedDict):
    """A set of tokens: the order of its slots carries no meaning, `position` does.

    Attributes:
        value: `[B, K, F] uint8` patch values, or `[B, K] int32` token ids.
        position: `[B, K] int32`.
        valid: `[B, K] bool`, False in padding slots (whose value and position are 0).
        modality: `[B, K] int32`, place in `Group.modalities`; only where a group mixes modalities.
        input: `[B, K] int32`, what is shown instead of `value`, or `MASK`; only where a masker says so.
    """

    value: Any
    position: Any
    valid: Any
    modality: NotRequired[Any]
    input: NotRequired[Any]


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and dtype of an array of a batch."""

    shape: tuple[int, ...]
    dtype: Any


def token_spec(modality: Modality, slots: int) -> dict[str, Spec]:
    """The `TokenSet` of one example that holds up to `slots` tokens of a modality."""
    value = Spec((slots, modality.features), np.uint8) if modality.features else Spec((slots,), np.int32)
    return {"value": value, "position": Spec((slots,), np.int32), "valid": Spec((slots,), np.bool_)}


EXAMPLE: Mapping[str, Spec] = {
    **dict.fromkeys(("position", "index", "image_id", "caption_id", "source", "attempt", "reason"), Spec((), np.int32)),
    "valid": Spec((), np.bool_),
}
"""What a part tells of each example.

``position`` is the draw of its source modulo 2^31, ``index`` the example there, ``source`` the source's number.
``image_id`` and ``caption_id`` are 31-bit hashes: equal pictures (captions) have equal ids, 0 stands for none.
``attempt`` is the number of candidates that did not decode (`order.ATTEMPTS` if none did: nothing of the example is
valid then), ``reason`` says why the first of them did not: its place in `images.REASONS`. Where not ``valid`` the
row is padding.
"""


class Masker(Protocol):
    """Decides which tokens are visible and which are targets; one code for the pipeline and everything else."""

    def draw(self, stream: RandomStream, modalities: tuple[Modality, ...]) -> np.ndarray:
        """All randomness of one example, `[n] float32`, from its stream of uniform numbers."""

    def spec(self, modalities: tuple[Modality, ...]) -> dict[str, dict[str, Spec]]:
        """Shapes and dtypes of each token set, of one example."""

    def __call__(self, noise: np.ndarray, tokens: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, TokenSet]:
        """Splits tokens into sets; a pure function.

        Args:
            noise: `[B, n]`, the draws of `B` examples.
            tokens: of each modality `value` `[B, L, ...]` and which are real, `[B, L] bool`.
        """


@dataclasses.dataclass(frozen=True)
class Group:
    """One group of token sets in a batch, as an objective declares it.

    Attributes:
        name: its key in the batch.
        modalities: whose tokens it holds.
        masker: which of them are visible, and which are targets.
    """

    name: str
    modalities: tuple[Modality, ...]
    masker: Masker

    def spec(self, batch: int) -> dict[str, dict[str, Spec]]:
        """Shapes and dtypes of the token sets of `batch` examples."""
        return {
            name: {field: Spec((batch, *spec.shape), spec.dtype) for field, spec in tokens.items()}
            for name, tokens in self.masker.spec(self.modalities).items()
        }

    def restricted(self, names: Iterable[str]) -> Group | None:
        """The group with those of its modalities alone that are among `names`; None if it has none of them."""
        modalities = tuple(modality for modality in self.modalities if modality.name in names)
        return dataclasses.replace(self, modalities=modalities) if modalities else None


def restricted(groups: Iterable[Group], names: Iterable[str]) -> tuple[Group, ...]:
    """`Group.restricted` of several groups; those without such a modality are left out."""
    return tuple(group for every in groups if (group := every.restricted(names)) is not None)


def group_of(groups: Iterable[Group], modality: str) -> Group:
    """The first group that holds a modality alone.

    Raises:
        LookupError: there is none.
    """
    for group in groups:
        if [m.name for m in group.modalities] == [modality]:
            return group
    raise LookupError(f"no group holds {modality!r} alone")


def patch_grid(config: ConfigDict) -> tuple[int, int]:
    """Rows and columns of the patches of a picture."""
    side = config.data.image_size // config.data.patch_size
    return side, side


def modality_table(config: ConfigDict, vocab_size: int) -> dict[str, Modality]:
    """The modalities of ``data.modalities``, by name.

    Args:
        config: resolved.
        vocab_size: ids of the tokenizer; 0 without text.
    """
    grid, data = patch_grid(config), config.data
    table = {
        "image": Modality("image", "picture", grid[0] * grid[1], features=3 * data.patch_size**2, grid=grid),
        "text": Modality("text", "text", data.max_text_tokens, vocabulary=vocab_size),
    }
    return {name: table[name] for name in data.modalities}
