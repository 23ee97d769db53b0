"""What words look at in the picture, and patches in the caption: the encoder's attention, all tokens visible.

The weights are those of one layer, the mean of its heads. Drawn are, of a few pairs, where two words look (arXiv
2205.14204, Figure 7) and at which words a marked patch looks (Figure 8); shares are within the modality that is asked.
A word is the mean of its tokens where it looks, and their sum where it is looked at.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.data.images import unpatchify
from m3ae_jax.data.pipeline import grid
from m3ae_jax.data.sources import build_source
from m3ae_jax.errors import UserError
from m3ae_jax.evals import Result
from m3ae_jax.evals.clean import clean_batches
from m3ae_jax.evals.features import kept
from m3ae_jax.evals.restored import names_of
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.report.pictures import Attended, attention_sheet
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

_WEIGHTS = 2**28  # numbers that the attention weights of a batch, of all layers and heads, may be
_WORDS = 2  # a pair, of which it is drawn where they look
_NOTE = (
    "Attention of layer {layer} of {depth}, mean of its heads. The marked patch is the one that the caption's words "
    "look at most. Shares are within the modality that is asked: all patches of a picture have 100% together, and so "
    "have all words of a caption. Even attention would be {patch:.1%} a patch. Drawn are the longest words."
)

Weights = dict[str, dict[str, np.ndarray]]
"""``{asking: {asked: [n, V, W] float64}}`` of ``cls`` and the groups."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pictures with captions, and the attention between their tokens.

    Attributes:
        weights: of each pair; of padding 0 on both sides.
        patches: `[n, L, P] uint8`.
        ids: `[n, T] int32`.
        valid: ``{"cls": [n, 1] bool, group: [n, V] bool}``, which tokens are real.
    """

    weights: Weights
    patches: np.ndarray
    ids: np.ndarray
    valid: dict[str, np.ndarray]


def check_layer(config: ConfigDict) -> None:
    """Raises `UserError` where ``eval.attention.layer`` is none of the encoder's."""
    layer, depth = config.eval.attention.layer, config.model.depth
    if not -depth <= layer < depth:
        raise UserError(
            f"eval.attention.layer={layer}: the encoder has {depth}, 0 to {depth - 1}, or -1 (the last) to {-depth}"
        )


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Asks on ``eval.attention.examples`` pairs of ``data.val``.

    Raises:
        UserError: none of them has a caption.
    """
    pairs = read(setup, state)
    image, text = names_of(setup)
    told = {"cls": "CLS", image: "patches", text: "words"}
    scalars = {"n": float(len(pairs.ids))}
    lines = ["| from | to | share | even share | entropy, nats | even entropy, nats |", "|---|---|---|---|---|---|"]
    for asking, asked in ((text, image), (image, text), (text, text), (image, image), ("cls", image), ("cls", text)):
        figures = measured(pairs, asking, asked)
        scalars |= {f"{asking}_to_{asked}/{name}": value for name, value in figures.items()}
        lines.append(f"| {told[asking]} | {told[asked]} | {' | '.join(f'{value:.3f}' for value in figures.values())} |")
    depth = setup.config.model.depth
    note = _NOTE.format(
        layer=setup.config.eval.attention.layer % depth + 1, depth=depth, patch=1 / pairs.patches.shape[1]
    )
    count = min(setup.config.eval.attention.pictures, len(pairs.ids))
    drawn = [row_of(setup, pairs, i) for i in range(count)]
    sheet = attention_sheet(drawn, f"Attention between words and patches, step {int(state.step)}", note)
    named = {f"attention/{name}": value for name, value in scalars.items()}
    return Result("attention", named, "\n".join(lines), {"maps": np.asarray(sheet)} if drawn else {})


def read(setup: Setup, state: TrainState) -> Pairs:
    """The attention weights of the first pairs, in a fixed random order, that have a picture and words."""
    image, text = names_of(setup)
    options, model = setup.config.eval.attention, setup.config.model
    tokens = 1 + sum(group.tokens for group in setup.objective.groups)
    fitting = max(1, _WEIGHTS // (model.depth * model.heads * tokens**2))
    size = min(fitting, setup.config.eval.batch_size)
    ask = kept(
        setup, "attention", lambda: setup.jit(lambda p, batch: setup.objective.attention(p, batch, options.layer))
    )
    rows: list[Pairs] = []
    for batch in clean_batches(setup, build_source(setup.config, "val"), options.examples, size):
        groups = put_batch({name: batch["groups"][name] for name in (image, text)}, setup.mesh)
        weights = fetch(ask(state.params, {"groups": groups}))
        visible = {name: sets["visible"] for name, sets in fetch(groups).items()}
        there = fetch(put_batch(batch["example"]["valid"], setup.mesh)) & visible[text]["valid"].any(axis=1)
        valid = {"cls": np.ones((len(there), 1), bool), **{name: sets["valid"] for name, sets in visible.items()}}
        found = jax.tree.map(
            lambda x, there=there: x[there], (weights, visible[image]["value"], visible[text]["value"], valid)
        )
        rows.append(Pairs(_of_real(found[0], found[3]), *found[1:]))
    if not sum(len(row.ids) for row in rows):
        raise UserError(f"attention: none of {options.examples} examples of data.val has a picture and a caption")
    return _joined(rows)


def _of_real(weights: Any, valid: dict[str, np.ndarray]) -> Weights:
    """The same in float64, with nothing where padding asks."""
    return {
        asking: {asked: np.where(valid[asking][..., None], x, 0.0).astype(np.float64) for asked, x in row.items()}
        for asking, row in weights.items()
    }


def _joined(rows: list[Pairs]) -> Pairs:
    parts = [(row.weights, row.patches, row.ids, row.valid) for row in rows]
    return Pairs(*jax.tree.map(lambda *x: np.concatenate(x), *parts))


def measured(pairs: Pairs, asking: str, asked: str) -> dict[str, float]:
    """Means over pairs of means over the tokens that ask.

    Returns:
        ``share`` of the attention that goes to the asked tokens, ``even_share`` if it went evenly to all,
        ``entropy`` of how it is shared out among them, nats, and ``even_entropy``, the most that may be.
    """
    weights, real, others = pairs.weights[asking][asked], pairs.valid[asking], pairs.valid[asked].sum(axis=1)
    total = weights.sum(axis=2)
    within = weights / np.maximum(total, 1e-30)[..., None]
    entropy = -np.sum(within * np.log(np.maximum(within, 1e-30)), axis=2)
    every = sum(valid.sum(axis=1) for valid in pairs.valid.values())

    def mean(of_tokens: np.ndarray) -> float:
        return float((of_tokens.sum(axis=1, where=real) / real.sum(axis=1)).mean())

    return {
        "share": mean(total),
        "even_share": float((others / every).mean()),
        "entropy": mean(entropy),
        "even_entropy": float(np.log(others).mean()),
    }


def row_of(setup: Setup, pairs: Pairs, example: int) -> Attended:
    """A pair as it is drawn: the patch that words look at most, and the longest words."""
    image, text = names_of(setup)
    assert setup.tokenizer is not None
    real = np.flatnonzero(pairs.valid[text][example])
    words = whole_words(setup.tokenizer.pieces(pairs.ids[example][real]))
    to_patches = pairs.weights[text][image][example][real]
    to_words = pairs.weights[image][text][example][:, real]
    patch = int(to_patches.sum(axis=0).argmax())
    per_word = np.array([to_words[patch, tokens].sum() for _, tokens in words])
    chosen = longest([word for word, _ in words])
    shape = grid(setup.config)
    picture = unpatchify(pairs.patches[example][None], setup.config.data.patch_size, shape)[0]
    return Attended(
        picture=picture,
        grid=shape,
        words=tuple(word for word, _ in words),
        patch=patch,
        to_words=_shares(per_word),
        to_patches={number: _shares(to_patches[words[number][1]].mean(axis=0)) for number in chosen},
    )


def whole_words(pieces: list[str]) -> list[tuple[str, list[int]]]:
    """Words and the numbers of their pieces.

    Args:
        pieces: of `Tokenizer.pieces`: a word begins with a blank (SentencePiece), or goes on with ``##`` (WordPiece).
    """
    blanks = any(piece.startswith(" ") for piece in pieces)
    words: list[tuple[str, list[int]]] = []
    for number, piece in enumerate(pieces):
        begins = piece.startswith(" ") if blanks else not piece.startswith("##")
        if begins or not words:
            words.append(("", []))
        text, numbers = words[-1]
        more = piece.strip() if blanks else piece.removeprefix("##")
        words[-1] = (text + more, [*numbers, number])
    return words


def longest(words: list[str], count: int = _WORDS) -> list[int]:
    """The numbers of the words with the most letters, of equal ones the first, in their order; none twice."""
    letters = {number: sum(map(str.isalnum, word)) for number, word in enumerate(words) if word not in words[:number]}
    return sorted(sorted(letters, key=lambda number: -letters[number])[:count])


def _shares(weights: np.ndarray) -> np.ndarray:
    return np.asarray(weights / max(float(weights.sum()), 1e-30))
