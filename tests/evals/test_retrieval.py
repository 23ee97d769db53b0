"""Recall with ties and several right answers, against enumeration."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3ae_jax.evals import retrieval
from m3ae_jax.evals.clean import identities
from m3ae_jax.evals.retrieval import Pairs, recall


def by_enumeration(score, right, k):
    """Over all orders of the columns that sort the scores."""
    hits = [
        any(right[column] for column in order[:k])
        for order in itertools.permutations(range(len(score)))
        if all(score[a] >= score[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean(hits)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6), st.integers(1, 7))
def test_recall_is_its_expectation_over_the_order_of_ties(row, k):
    score, right = (np.array(x) for x in zip(*row, strict=True))
    right[0] = True
    best = np.where(right, score, -1).max()
    above, tied, tied_right = (score > best).sum(), (score == best).sum(), ((score == best) & right).sum()
    found = retrieval._chance_within(*(np.array([x]) for x in (k - above, tied, tied_right)))[0]
    assert found == pytest.approx(by_enumeration(score, right, k))
    if k in (1, 5):
        assert recall(score[None].astype(float), right[None])[f"recall@{k}"] == pytest.approx(found)


def test_constant_scores_are_chance():
    figures = recall(np.zeros((40, 40)), np.eye(40, dtype=bool))
    assert figures["recall@1"] == pytest.approx(1 / 40)
    assert figures["recall@10"] == pytest.approx(10 / 40)
    assert figures["median_rank"] == pytest.approx(20.5)


def test_any_of_several_right_captions_and_pictures_counts():
    picture, caption = np.array([0, 0, 1, 2, 3]), np.array([0, 1, 2, 3, 3])
    pairs = Pairs.of(picture, caption)
    assert pairs.right.shape == (4, 4)
    assert pairs.right[0].tolist() == [True, True, False, False]
    assert pairs.right[:, 3].tolist() == [False, False, True, True]
    score = np.array([[0, 2, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1.0]])
    assert recall(score, pairs.right)["recall@1"] == 1.0
    backward = recall(score.T, pairs.right.T)  # caption 0 has only ties at 0, one of four right
    assert backward["recall@1"] == pytest.approx((1 / 4 + 1 + 1 / 2 + 1) / 4)


def test_the_first_pairs_are_pairs():
    rng = np.random.default_rng(0)
    pairs = Pairs.of(rng.integers(0, 30, 100), rng.integers(0, 40, 100))
    few = pairs.first(10)
    assert few.right.any(0).all() and few.right.any(1).all()
    assert len(few.pictures) <= 10 and len(few.captions) <= 10
    assert pairs.first(0).right.size == 0


def test_equal_rows_have_one_number():
    assert identities(np.array([[1, 2], [0, 2], [1, 2]])).tolist() == [0, 1, 0]


def test_captions_that_agree_after_being_cut_are_different_ones():
    value = np.array([[5, 6, 7]] * 3 + [[5, 6, 0]] * 2 + [[5, 6, 9]])
    valid = np.array([[True] * 3] * 3 + [[True, True, False]] * 3)
    # The whole texts: three are too long, of which the last two are the same; the others differ in blanks alone.
    numbers = retrieval.numbers_of_captions({"value": value, "valid": valid}, np.array([1, 2, 2, 3, 4, 5]))
    assert numbers.tolist() == [0, 1, 1, 2, 2, 2]


def test_words_are_compared_with_the_words_of_an_untrained_model():
    values = {"trained/cls": 0.2, "untrained/cls": 0.1, "chance": 0.02, "words": 0.8, "words_gain": 0.9}
    values |= {"words_chance": 0.05, "untrained_words": 0.06, "untrained_words_gain": 0.3}
    scalars = {f"{name}/{d}/recall@1": v for name, v in values.items() for d in ("image_to_text", "text_to_image")}
    pairs = Pairs(np.eye(50, dtype=bool), np.arange(50), np.arange(50))
    features, words = list(retrieval._clauses(scalars, list(values), pairs, pairs))[:2]
    assert "trained, cls 0.200" in features and "untrained, cls (0.100)" in features and "words" not in features
    assert "words gain 0.900" in words and "to untrained words gain (0.300)" in words
