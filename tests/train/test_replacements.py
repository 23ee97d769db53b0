"""Counting replaced examples: by reason, over a mixture's parts, and the share above which a run stops."""

import numpy as np
import pytest

from m3ae_jax.data.images import DAMAGED, EMPTY, EMPTY_CAPTION, NO_CAPTION, REASONS
from m3ae_jax.data.order import ATTEMPTS
from m3ae_jax.errors import UserError
from m3ae_jax.train.replacements import Replacements


def rows(attempts, reasons, first=0):
    """The rows of a part; captions have words where nothing else is said of them."""
    codes = np.array([REASONS.index(reason) for reason in reasons], np.int32)
    attempt = np.array(attempts, np.int32)
    worded = (codes != REASONS.index(EMPTY_CAPTION)).astype(np.int32)
    position = np.arange(first, first + len(codes), dtype=np.int32)
    return {"example": {"attempt": attempt, "reason": codes, "caption_id": 7 * worded, "position": position}}


def batch(attempts, reasons, first=0):
    return {"all": rows(attempts, reasons, first)}


def test_replacements_are_counted_by_reason():
    tried = Replacements()
    tried.add(batch([0, 1, 3, 0], ["", EMPTY, DAMAGED, ""]))
    tried.add(batch([1, 0, 0, 0], [DAMAGED, "", "", ""]))
    metrics = tried.metrics()
    assert metrics == {"replaced_examples": 3.0, "replaced/empty_file": 1.0, "replaced/damaged_picture": 2.0}
    tried.add(batch([0, 0], ["", ""]))
    assert tried.metrics() == {"replaced_examples": 0.0}
    wanted = "3 of 10 examples of data.train were replaced (30.00%): 1 empty file, 2 damaged picture"
    assert tried.summary() == wanted
    tried.check(0.05)  # too few draws to judge


def test_too_many_bad_examples_stop_the_run():
    tried = Replacements()
    for _ in range(10):
        tried.add(batch([1] * 6 + [0] * 94, [EMPTY] * 6 + [""] * 94))
    tried.metrics()
    tried.check(0.06)
    with pytest.raises(
        UserError, match=r"60 of 1,000 examples of data.train were replaced \(6\.00%\): 60 empty file; data\.max_bad"
    ):
        tried.check(0.05)


def test_nothing_that_decodes_stops_the_run_at_once():
    tried = Replacements()
    tried.add(batch([ATTEMPTS] * 3, [EMPTY] * 3))
    tried.metrics()
    with pytest.raises(UserError, match=r"data\.train: not one of the last 3 draws gave an example.*empty file"):
        tried.check(1.0)


def test_a_part_of_which_nothing_can_be_used_stops_the_run_though_others_can():
    tried = Replacements()
    tried.add({"image": rows([0, 0], ["", ""]), "image+text": rows([ATTEMPTS] * 2, [NO_CAPTION] * 2)})
    assert tried.metrics() == {"replaced_examples": 2.0, "replaced/no_caption": 2.0}
    with pytest.raises(UserError, match=r"data\.train \(image\+text\): not one of the last 2 draws.*no caption"):
        tried.check(1.0)


def test_item_1_captions_that_are_nearly_always_empty_stop_the_run():
    tried = Replacements()
    tried.add(batch([0] * 31, [EMPTY_CAPTION] * 31))
    assert tried.metrics() == {"replaced_examples": 0.0, "empty_captions": 31.0}
    tried.check(0.05, last=False)  # too few
    with pytest.raises(UserError, match=r"data\.train: 31 of 31 captions are empty"):
        tried.check(0.05, last=True)
    tried.add(batch([0], [EMPTY_CAPTION]))
    tried.metrics()
    with pytest.raises(UserError, match=r"32 of 32 captions are empty.*caption_key"):
        tried.check(0.05, last=False)
    tried.add(batch([0], [""]))
    tried.metrics()
    tried.check(0.05, last=True)
    assert tried.by_reason.sum() == 0


def test_padding_is_not_counted():
    tried = Replacements("data.val")
    tried.add(batch([0, 0, ATTEMPTS, ATTEMPTS], ["", "", EMPTY, EMPTY], first=6), end=8)
    assert tried.metrics() == {"replaced_examples": 0.0} and tried.draws == 2
    tried.check()
