"""VQA's accuracy against values worked out by hand, for each of the official code's traps."""

import itertools

import pytest

from m3ae_jax.evals.tasks import vqa_accuracy
from m3ae_jax.evals.tasks.vqa_accuracy import accuracy, cleaned_punctuation, cleaned_words


def by_enumeration(prediction: str, answers: list[str]) -> float:
    """As the paper says it: of each nine of ten."""
    nines = itertools.combinations(answers, len(answers) - 1)
    return sum(min(1.0, nine.count(prediction) / 3) for nine in nines) / len(answers)


@pytest.mark.parametrize("agreeing", range(11))
def test_of_every_nine_of_ten_three_must_agree(agreeing: int) -> None:
    answers = ["red"] * agreeing + [f"other{n}" for n in range(10 - agreeing)]
    wanted = by_enumeration("red", answers)
    assert accuracy("red", answers) == pytest.approx(wanted)
    assert accuracy("red", answers, "albef") == pytest.approx(wanted)
    # 1 agrees: nine times 1/3, once none: 0.3; 2: 0.6; 3: 7 of 10 whole, 3 times 2/3: 0.9.
    assert wanted == pytest.approx({0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9}.get(agreeing, 1.0))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("t-shirt", "t shirt"),  # within a word: a space
        ("t - shirt", "t  shirt"),  # beside a space: nothing
        ("yes, sir-e", "yes sir e"),  # sign by sign: the comma stands beside a space, the hyphen does not
        ("1,000 $-bills", "1000 $bills"),  # a comma within a number: every sign is deleted
        ("3.5", "3.5"),
        ("no. 3.", "no 3"),
        ("3. ", "3 "),  # after a digit too: the look-behind is a typo
        ("what's up: ok", "what's up: ok"),  # apostrophes and colons stay
        ("." * 40, "." * 8),  # 32 at the most
        ("(a) b", " a b"),
    ],
)
def test_signs_are_deleted_beside_spaces_and_replaced_within_words(text: str, cleaned: str) -> None:
    assert cleaned_punctuation(text) == cleaned


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("The  Two dogs", "2 dogs"),
        ("none", "0"),
        ("an a the", ""),
        ("dont", "don't"),
        ("IM", "im"),  # the table's Im begins with a capital: never met
        ("somebody'd", "somebodyd"),
        ("eleven", "eleven"),
    ],
)
def test_words_become_digits_and_contractions(text: str, cleaned: str) -> None:
    assert cleaned_words(text) == cleaned


def test_texts_are_cleaned_only_where_people_disagree() -> None:
    agreed = ["Yes"] * 10
    assert accuracy("yes", agreed) == 0.0 and accuracy("Yes", agreed) == 1.0  # raw, so case matters
    disagreed = ["Yes"] * 9 + ["no"]
    assert accuracy("yes", disagreed) == 1.0
    assert accuracy("a yes!", disagreed) == 1.0
    # Blanks are stripped before the comparison of the ten.
    assert accuracy("two", ["two"] * 9 + ["two "]) == 1.0


def test_the_variants_differ_where_they_should() -> None:
    agreed = ["Two"] * 10
    assert accuracy("Two", agreed) == 1.0
    assert accuracy("Two", agreed, "albef") == 0.0  # the prediction alone is cleaned: "2"
    disagreed = ["two"] * 9 + ["three"]
    assert accuracy("two", disagreed) == 1.0
    assert accuracy("two", disagreed, "albef") == 0.0  # answers lose their signs alone
    assert accuracy("t-shirt", ["t-shirt"] * 9 + ["coat"], "albef") == 1.0


def test_the_tables_have_the_sizes_of_the_official_ones() -> None:
    assert len(vqa_accuracy._CONTRACTIONS) == 120 and len(vqa_accuracy._NUMBERS) == 12
    assert len(set(vqa_accuracy._PUNCTUATION)) == 21
    for arguments in (("x", []), ("x", ["y"], "other")):
        with pytest.raises(ValueError, match="official, albef"):
            accuracy(*arguments)
