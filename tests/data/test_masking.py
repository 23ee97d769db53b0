"""Masks: exact counts, a partition of the real tokens, padding in neither part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3ae_jax.data.masking import WHOLE, Blocks, Corrupted, RandomSubset, block_mask, random_subset, split, take
from m3ae_jax.data.order import RandomStream, hidden_count, token_budget
from m3ae_jax.data.tokens import MASK, Group, Modality, TokenSet

L = 20
RATIOS = [k / 20 for k in range(20)]


def noise(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, L), np.float32)


def prefixes() -> np.ndarray:
    """`[L + 1, L] bool`: captions of every length, none included."""
    return np.arange(L) < np.arange(L + 1)[:, None]


def positions(tokens: TokenSet) -> list[list[int]]:
    """The positions in the valid slots of each row."""
    return [list(p[v]) for p, v in zip(np.asarray(tokens["position"]), np.asarray(tokens["valid"]), strict=True)]


def check_partition(real: np.ndarray, hidden: np.ndarray, ratio: float) -> None:
    """Splits ids that tell their place and checks all that must hold."""
    rows = len(real)
    value = 1 + np.arange(rows * L, dtype=np.int32).reshape(rows, L)
    budget = token_budget(L, ratio)
    parts = split(value, real, hidden, budget)
    counts = hidden_count(real.sum(1), ratio)
    for name, slots, chosen in (("visible", budget[0], real & ~hidden), ("target", budget[1], real & hidden)):
        part: Any = parts[name]
        assert part["value"].shape == part["position"].shape == part["valid"].shape == (rows, slots)
        assert [str(array.dtype) for array in part.values()] == ["int32", "int32", "bool"]
        assert positions(parts[name]) == [list(np.flatnonzero(row)) for row in chosen]
        want = np.take_along_axis(value, part["position"], axis=1)
        np.testing.assert_array_equal(part["value"], np.where(part["valid"], want, 0))
        assert not part["position"][~part["valid"]].any()
    np.testing.assert_array_equal(np.asarray(parts["target"]["valid"]).sum(1), counts)
    np.testing.assert_array_equal(np.asarray(parts["visible"]["valid"]).sum(1), real.sum(1) - counts)


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_caption_length_splits_into_a_partition(ratio: float) -> None:
    real = prefixes()
    hidden = random_subset(noise(L + 1), real, ratio)
    np.testing.assert_array_equal(hidden.sum(1), hidden_count(np.arange(L + 1), ratio))
    assert not (hidden & ~real).any()
    check_partition(real, hidden, ratio)


@settings(max_examples=20, deadline=None)
@given(
    real=st.lists(st.lists(st.booleans(), min_size=L, max_size=L), min_size=1, max_size=4),
    ratio=st.sampled_from(RATIOS),
    ties=st.integers(1, 5),
)
def test_any_real_tokens_and_equal_noise(real: list[list[bool]], ratio: float, ties: int) -> None:
    """Real tokens need not come first, and equal noise may not change a count."""
    mask = np.array(real)
    coarse = np.floor(noise(len(real)) * ties).astype(np.float32) / ties
    check_partition(mask, random_subset(coarse, mask, ratio), ratio)


def test_patches_go_with_their_positions() -> None:
    value = np.random.default_rng(1).integers(0, 256, (3, L, 2, 5), np.uint8)
    chosen = np.random.default_rng(2).random((3, L)) < 0.3
    tokens = take(value, chosen, L)
    assert tokens["value"].dtype == np.uint8 and tokens["value"].shape == (3, L, 2, 5)
    for row in range(3):
        count = chosen[row].sum()
        np.testing.assert_array_equal(tokens["value"][row, :count], value[row, chosen[row]])
        assert not tokens["value"][row, count:].any() and not tokens["valid"][row, count:].any()


def test_ratio_zero_hides_nothing() -> None:
    assert token_budget(L, 0.0) == (L, 0)
    real = prefixes()
    parts = split(np.ones((L + 1, L), np.int32), real, random_subset(noise(L + 1), real, 0.0), (L, 0))
    assert np.asarray(parts["target"]["value"]).shape == (L + 1, 0)
    np.testing.assert_array_equal(parts["visible"]["valid"], real)


def test_rows_without_a_token_are_empty_in_both_parts() -> None:
    real = np.zeros((2, L), bool)
    hidden = random_subset(noise(2), real, 0.75)
    assert not np.asarray(hidden).any()
    for part in split(np.ones((2, L), np.int32), real, hidden, token_budget(L, 0.75)).values():
        assert not any(np.asarray(array).any() for array in part.values())


def test_masks_differ_between_examples_and_follow_the_noise() -> None:
    real = np.ones((64, L), bool)
    masks = random_subset(noise(64), real, 0.5)
    assert len({mask.tobytes() for mask in masks}) > 60
    np.testing.assert_array_equal(random_subset(noise(64), real, 0.5), masks)
    assert (random_subset(noise(64, seed=1), real, 0.5) != masks).any()


def test_every_real_token_is_hidden_equally_often() -> None:
    real = np.arange(L) < np.full((8000, 1), 12)
    share = random_subset(noise(8000), real, 0.25).mean(0)
    np.testing.assert_allclose(share[:12], 0.25, atol=5 * (0.25 * 0.75 / 8000) ** 0.5)
    assert not share[12:].any()


WORDS = Modality("text", "text", L, vocabulary=100)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.75, 1.0])
def test_a_masker_does_what_its_description_says(ratio: float) -> None:
    group = Group("text", (WORDS,), RandomSubset(ratio))
    streams = [RandomStream(3, draw) for draw in range(L + 1)]
    draws = np.stack([group.masker.draw(stream, group.modalities) for stream in streams])
    value, real = np.arange((L + 1) * L, dtype=np.int32).reshape(L + 1, L), prefixes()
    sets = group.masker(draws, {"text": (value, real)})
    described = {name: {key: (x.shape, x.dtype.type) for key, x in tokens.items()} for name, tokens in sets.items()}
    spec = group.spec(L + 1)
    assert described == {name: {key: (x.shape, x.dtype) for key, x in tokens.items()} for name, tokens in spec.items()}
    np.testing.assert_array_equal(sets["target"]["valid"].sum(1), hidden_count(real.sum(1), ratio))
    again = group.masker(draws, {"text": (value, real)})
    assert all(np.array_equal(again[name][key], sets[name][key]) for name in sets for key in sets[name])


def test_a_whole_group_shows_everything() -> None:
    sets = WHOLE(noise(L + 1), {"text": (np.zeros((L + 1, L), np.int32), prefixes())})
    np.testing.assert_array_equal(sets["visible"]["valid"], prefixes())
    assert sets["target"]["valid"].shape == (L + 1, 0)


def test_a_group_is_restricted_to_modalities() -> None:
    image = Modality("image", "picture", 4, features=12, grid=(2, 2))
    group = Group("all", (WORDS, image), WHOLE)
    assert group.restricted(("image", "sound")) == Group("all", (image,), WHOLE)
    assert group.restricted(("text", "image")) == group and group.restricted(("sound",)) is None


@pytest.mark.parametrize("counts", [(8, 5, 5), (1, 17), (3, 0, 1, 1, 1), (18,)])
def test_a_stream_gives_the_same_numbers_in_whatever_pieces_they_are_taken(counts: tuple[int, ...]) -> None:
    whole, stream = RandomStream(7, 2**40 + 1).take(18), RandomStream(7, 2**40 + 1)
    pieces = np.concatenate([stream.take(count) for count in counts])
    np.testing.assert_array_equal(pieces, whole[: len(pieces)])
    assert whole.dtype == np.float32 and (whole >= 0).all() and (whole < 1).all()
    assert not np.array_equal(whole, RandomStream(7, 2**40).take(18))


# --- BERT's corruption, a least count, blocks


WORDS = Modality("text", "text", L, vocabulary=50)
GRID = Modality("image", "picture", 256, features=3, grid=(16, 16))


def masked(masker: Any, modality: Modality, value: np.ndarray, real: np.ndarray) -> dict[str, TokenSet]:
    draws = np.stack([masker.draw(RandomStream(7, row), (modality,)) for row in range(len(real))])
    sets: dict[str, TokenSet] = masker(draws, {modality.name: (value, real)})
    for name, spec in masker.spec((modality,)).items():
        tokens: Any = sets[name]
        assert {k: (v.shape[1:], v.dtype) for k, v in tokens.items()} == {
            k: (s.shape, s.dtype) for k, s in spec.items()
        }
    return sets


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.25, 0.95])
def test_a_least_count_of_targets_holds_for_every_caption_length(ratio: float) -> None:
    real, value = prefixes(), np.ones((L + 1, L), np.int32)
    sets = masked(RandomSubset(ratio, minimum=2), WORDS, value, real)
    tokens = real.sum(1)
    count = np.maximum(hidden_count(tokens, ratio), np.minimum(tokens, 2))
    np.testing.assert_array_equal(sets["target"]["valid"].sum(1), count)
    np.testing.assert_array_equal(sets["visible"]["valid"].sum(1), tokens - count)


def test_corrupted_targets_are_masked_drawn_or_shown_and_nothing_else_is() -> None:
    rows = 4000
    real = np.arange(L) < np.random.default_rng(0).integers(0, L + 1, (rows, 1))
    value = np.where(real, np.random.default_rng(1).integers(0, 50, (rows, L)), 0).astype(np.int32)
    sets = masked(Corrupted(RandomSubset(0.25, minimum=1)), WORDS, value, real)
    target: Any = sets["target"]
    assert "input" not in sets["visible"]
    valid, shown = target["valid"], target["input"]
    assert valid.sum(1).min() == 0 and (valid.sum(1)[real.any(1)] >= 1).all()
    np.testing.assert_array_equal(np.take_along_axis(value, target["position"], 1)[valid], target["value"][valid])
    assert not shown[~valid].any() and shown.min() == MASK and shown.max() < 50
    n = valid.sum()
    share = {
        "mask": (shown == MASK)[valid].mean(),
        "same": (shown == target["value"])[valid].mean(),
    }
    for name, want in {"mask": 0.8, "same": 0.1 + 0.1 / 50}.items():
        assert abs(share[name] - want) < 4 * np.sqrt(want * (1 - want) / n), (name, share)
    # Drawn ids are spread over the vocabulary.
    other = shown[valid & (shown != MASK) & (shown != target["value"])]
    assert len(np.unique(other)) == 50


def test_blocks_of_beit_cover_about_what_its_algorithm_does() -> None:
    """60 to 75 of 256 patches, 74.4 in the mean (re-simulated from the paper's description, 20,000 draws)."""
    noise = np.random.default_rng(0).random((2000, 160, 4), np.float32)
    counts = np.array([block_mask(row, (16, 16), 75).sum() for row in noise])
    assert counts.min() >= 58 and counts.max() == 75
    assert abs(counts.mean() - 74.4) < 0.2 and 0.58 < (counts == 75).mean() < 0.68


def test_blocks_are_topped_up_to_the_exact_count() -> None:
    real, value = np.ones((64, 256), bool), np.zeros((64, 256, 3), np.uint8)
    sets = masked(Blocks(0.75), GRID, value, real)
    assert (sets["target"]["valid"].sum(1) == 192).all() and (sets["visible"]["valid"].sum(1) == 64).all()
    grids = np.zeros((64, 256), bool)
    np.put_along_axis(grids, sets["target"]["position"], True, axis=1)
    assert len(np.unique(grids, axis=0)) == 64
    grid = grids.reshape(64, 16, 16)
    alike = (grid[:, 1:] == grid[:, :-1]).mean()
    assert alike > 0.7  # of neighbours; random subsets: 0.625
    with pytest.raises(ValueError, match="no grid"):
        Blocks(0.5).spec((WORDS,))
