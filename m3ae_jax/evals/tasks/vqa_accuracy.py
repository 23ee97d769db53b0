"""The accuracy of answers to VQA's questions: the official one, to the letter, and that of ALBEF's and SIMLA's copies.

Ten people have answered each question; an answer counts by how many of them agree (arXiv 1505.00468, section 4.2), and
texts are compared after some cleaning. The official code's oddities are kept, as figures are compared with its own
(vqaEval.py of the VQA toolkit, 2021): see `cleaned_punctuation`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_ARTICLES = frozenset(("a", "an", "the"))

# The table of the VQA toolkit (https://github.com/GT-Vision-Lab/VQA, vqaEval.py; 2-clause BSD licence, copyright
# (c) 2014 Aishwarya Agrawal), its mistakes too: four of its words begin with a capital and are therefore never met, and
# somebody'd loses its apostrophe.
_TABLE = """
aint>ain't arent>aren't cant>can't couldve>could've couldnt>couldn't couldn'tve>couldn't've couldnt've>couldn't've
didnt>didn't doesnt>doesn't dont>don't hadnt>hadn't hadnt've>hadn't've hadn'tve>hadn't've hasnt>hasn't havent>haven't
hed>he'd hed've>he'd've he'dve>he'd've hes>he's howd>how'd howll>how'll hows>how's Id've>I'd've I'dve>I'd've Im>I'm
Ive>I've isnt>isn't itd>it'd itd've>it'd've it'dve>it'd've itll>it'll let's>let's maam>ma'am mightnt>mightn't
mightnt've>mightn't've mightn'tve>mightn't've mightve>might've mustnt>mustn't mustve>must've neednt>needn't
notve>not've oclock>o'clock oughtnt>oughtn't ow's'at>'ow's'at 'ows'at>'ow's'at 'ow'sat>'ow's'at shant>shan't
shed've>she'd've she'dve>she'd've she's>she's shouldve>should've shouldnt>shouldn't shouldnt've>shouldn't've
shouldn'tve>shouldn't've somebody'd>somebodyd somebodyd've>somebody'd've somebody'dve>somebody'd've
somebodyll>somebody'll somebodys>somebody's someoned>someone'd someoned've>someone'd've someone'dve>someone'd've
someonell>someone'll someones>someone's somethingd>something'd somethingd've>something'd've
something'dve>something'd've somethingll>something'll thats>that's thered>there'd thered've>there'd've
there'dve>there'd've therere>there're theres>there's theyd>they'd theyd've>they'd've they'dve>they'd've theyll>they'll
theyre>they're theyve>they've twas>'twas wasnt>wasn't wed've>we'd've we'dve>we'd've weve>we've werent>weren't
whatll>what'll whatre>what're whats>what's whatve>what've whens>when's whered>where'd wheres>where's whereve>where've
whod>who'd whod've>who'd've who'dve>who'd've wholl>who'll whos>who's whove>who've whyll>why'll whyre>why're whys>why's
wont>won't wouldve>would've wouldnt>wouldn't wouldnt've>wouldn't've wouldn'tve>wouldn't've yall>y'all yall'll>y'all'll
y'allll>y'all'll yall'd've>y'all'd've y'alld've>y'all'd've y'all'dve>y'all'd've youd>you'd youd've>you'd've
you'dve>you'd've youll>you'll youre>you're youve>you've
"""
_CONTRACTIONS = dict(pair.split(">") for pair in _TABLE.split())

VARIANTS = ("official", "albef")
"""official: answers and prediction are cleaned only where the people disagree. albef: the prediction always, the
answers of punctuation alone, and those only where the people disagree."""


def _stripped(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def cleaned_punctuation(text: str) -> str:
    """Without 21 signs: deleted where they stand beside a space or where the text has a comma within a number, else
    replaced by a space. Then the first 32 periods that no digit follows are deleted, those after a digit too.

    Whether a sign stands beside a space is looked up in the text as it was given.
    """
    cleaned, in_number = text, _COMMA_IN_NUMBER.search(text) is not None
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if beside_space or in_number else " ")
    return _PERIOD.sub("", cleaned, count=_MOST_PERIODS)


def cleaned_words(text: str) -> str:
    """Lower-case words with one space between: number words as digits, no articles, apostrophes where they belong."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(prediction: str, answers: Sequence[str], variant: str = "official") -> float:
    """How right a prediction is, in [0, 1]: the mean, over each person left out, of min(1, agreeing others / 3).

    Args:
        prediction: of a model.
        answers: of the people, ten as a rule.
        variant: one of `VARIANTS`.

    Raises:
        ValueError: there is no answer, or no such variant.
    """
    if not answers or variant not in VARIANTS:
        raise ValueError(f"{len(answers)} answers, variant {variant!r}: one of {', '.join(VARIANTS)}")
    said, people = _stripped(prediction), list(answers)
    if variant == "official":
        people = [_stripped(answer) for answer in people]
    disagree = len(set(people)) > 1
    if disagree:
        people = [cleaned_punctuation(answer) for answer in people]
        people = [cleaned_words(answer) for answer in people] if variant == "official" else people
    if disagree or variant == "albef":
        said = cleaned_words(cleaned_punctuation(said))
    agreeing = Counter(people)[said]
    # Who agrees is one of the agreeing, and leaves one fewer.
    whole, left = min(1.0, agreeing / 3), min(1.0, max(agreeing - 1, 0) / 3)
    return (agreeing * left + (len(people) - agreeing) * whole) / len(people)
