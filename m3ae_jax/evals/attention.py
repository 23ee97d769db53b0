"""What words look at in the picture, and patches in the caption: the encoder's attention, all tokens visible.

The weights are those of one layer, the mean of its heads. Drawn are, of a few pairs, where two words look (arXiv
2205.14204, Figure 7) and at which words a marked patch looks (Figure 8); shares are within the modality that is looked
at. A word is the mean of its tokens where it looks, and their sum where it is looked at.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.data.images import unpatchify
from m3ae_jax.data.tokens import patch_grid
from m3ae_jax.errors import UserError
from m3ae_jax.evals.base import Result, table
from m3ae_jax.evals.features import shared
from m3ae_jax.evals.restored import names_of, read_pairs
from m3ae_jax.evals.verdict import sentence
from m3ae_jax.objectives.base import Attends
from m3ae_jax.report.pictures import Attended, attention_sheet
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

_WEIGHTS = 2**28  # numbers that the attention weights of a batch, of all heads, may be
_WORDS = 2  # a pair, of which it is drawn where they look
_NOTE = (
    "Attention of layer {layer} of {depth}, mean of its heads. The marked patch is the one that the caption's words "
    "look at most. Shares are within the modality that is looked at: all patches of a picture have 100% together, and "
    "so have all words of a caption. Even attention would be {patch:.1%} a patch. Drawn are the longest words."
)

Weights = dict[str, dict[str, np.ndarray]]
"""``{query: {key: [n, V, W] float64}}`` of ``cls`` and the groups."""


class AttentionFields(FieldGroup):
    """Attention of pictures and captions to each other."""

    layer: int = setting(-1)
    """Of the encoder, from 0; -1: the last."""
    examples: int = setting(64, low=1)
    """Examples of data.val over which figures are means."""
    pictures: int = setting(4, low=0, high=100)
    """Pairs that are drawn."""


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


def check_layer(setup: Setup) -> None:
    """Raises `UserError` where ``eval.attention.layer`` is none of the encoder's."""
    layer, depth = setup.config.eval.attention.layer, _depth(setup)
    if not -depth <= layer < depth:
        raise UserError(
            f"eval.attention.layer={layer}: the encoder has {depth}, 0 to {depth - 1}, or -1 (the last) to {-depth}"
        )


def _depth(setup: Setup) -> int:
    assert isinstance(setup.objective, Attends)
    return setup.objective.attention_maps[0]


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Attention in ``eval.attention.examples`` pairs of ``data.val``.

    Raises:
        UserError: none of them has a caption.
    """
    pairs = read(setup, state)
    image, text = names_of(setup)
    tokens = {"cls": "CLS", image: "patches", text: "words"}
    scalars: dict[str, float] = {"n": float(len(pairs.ids))}
    rows, clauses = [], []
    for query, key in ((text, image), (image, text), (text, text), (image, image), ("cls", image), ("cls", text)):
        figures = measured(pairs, query, key)
        scalars |= {f"{query}_to_{key}/{name}": value for name, value in figures.items()}
        rows.append([tokens[query], tokens[key], *(f"{value:.3f}" for value in figures.values())])
        if {query, key} == {image, text}:
            clauses.append(
                f"{tokens[query]} give {tokens[key]} {figures['share']:.0%} of their attention, "
                f"{figures['share'] / figures['even_share']:.2f} times an even share"
            )
    options, depth = setup.config.eval.attention, _depth(setup)
    note = _NOTE.format(layer=options.layer % depth + 1, depth=depth, patch=1 / pairs.patches.shape[1])
    drawn = [attended(setup, pairs, i) for i in range(min(options.pictures, len(pairs.ids)))]
    sheet = attention_sheet(drawn, f"Attention between words and patches, step {int(state.step)}", note)
    heads = ("from", "to", "share", "even share", "entropy, nats", "even entropy, nats")
    said = sentence(clauses, "where they look, not what it is good for")
    return Result.of("attention", scalars, table(heads, rows), said, {"maps": np.asarray(sheet)} if drawn else {})


def read(setup: Setup, state: TrainState) -> Pairs:
    """The attention weights of the first pairs, in a fixed random order, that have a picture and words."""
    image, text = names_of(setup)
    options, objective = setup.config.eval.attention, setup.objective
    assert isinstance(objective, Attends)
    tokens = 1 + sum(m.tokens for view in objective.view((image, text)) for m in view.modalities)
    fitting = max(1, _WEIGHTS // (objective.attention_maps[1] * tokens**2))
    size = min(fitting, setup.config.eval.batch_size)
    attend = shared(setup, "attention", lambda: setup.jit(lambda p, part: objective.attention(p, part, options.layer)))
    pairs = read_pairs(setup, options.examples, size, lambda part: attend(state.params, part))
    count = len(pairs["position"])
    if not count:
        raise UserError(f"attention: none of {options.examples} examples of data.val has a picture and a caption")
    visible = {name: sets["visible"] for name, sets in pairs["groups"].items()}
    valid = {"cls": np.ones((count, 1), bool), **{name: sets["valid"] for name, sets in visible.items()}}
    weights = {
        query: {key: np.where(valid[query][..., None], x, 0.0).astype(np.float64) for key, x in by_key.items()}
        for query, by_key in pairs["computed"].items()
    }
    return Pairs(weights, visible[image]["value"], visible[text]["value"], valid)


def measured(pairs: Pairs, query: str, key: str) -> dict[str, float]:
    """Means over pairs of means over the query tokens.

    Returns:
        ``share`` of the attention that goes to the key tokens, ``even_share`` if it went evenly to all tokens,
        ``entropy`` of how it is shared out among the keys, nats, and ``even_entropy``, the most that may be.
    """
    weights, real, others = pairs.weights[query][key], pairs.valid[query], pairs.valid[key].sum(axis=1)
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


def attended(setup: Setup, pairs: Pairs, example: int) -> Attended:
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
    shape = patch_grid(setup.config)
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
