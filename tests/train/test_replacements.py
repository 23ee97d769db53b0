"""Counting replaced examples: by reason, over a mixture's parts, and the share above which a run stops."""

import numpy as np
import pytest

from m3ae_jax.data.images import DAMAGED, EMPTY, REASONS
from m3ae_jax.data.order import ATTEMPTS
from m3ae_jax.errors import UserError
from m3ae_jax.train.replacements import Replacements


def batch(attempts, reasons):
    codes = [REASONS.index(reason) for reason in reasons]
    return {"all": {"example": {"attempt": np.array(attempts, np.int32), "reason": np.array(codes, np.int32)}}}


def test_replacements_are_counted_by_reason():
    tried = Replacements()
    tried.add(batch([0, 1, 3, 0], ["", EMPTY, DAMAGED, ""]))
    tried.add({"image": batch([1, 0], [DAMAGED, ""])["all"], "text": batch([0, 0], ["", ""])["all"]})
    metrics = tried.metrics()
    assert metrics == {"replaced_examples": 3.0, "replaced/empty_file": 1.0, "replaced/damaged_picture": 2.0}
    tried.add(batch([0, 0], ["", ""]))
    assert tried.metrics() == {"replaced_examples": 0.0}
    assert tried.summary() == "3 of 10 examples were replaced (30.00%): 1 empty file, 2 damaged picture"
    tried.check(0.05)  # too few draws to judge


def test_too_many_bad_examples_stop_the_run():
    tried = Replacements()
    for _ in range(10):
        tried.add(batch([1] * 6 + [0] * 94, [EMPTY] * 6 + [""] * 94))
    tried.metrics()
    tried.check(0.06)
    with pytest.raises(UserError, match=r"60 of 1,000 examples were replaced \(6\.00%\): 60 empty file; data\.max_bad"):
        tried.check(0.05)


def test_nothing_that_decodes_stops_the_run_at_once():
    tried = Replacements()
    tried.add(batch([ATTEMPTS] * 3, [EMPTY] * 3))
    tried.metrics()
    with pytest.raises(UserError, match="not one of the last draws gave a picture that decodes"):
        tried.check(1.0)
