"""The sentence that ends an evaluation's table."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest

from m3ae_jax.evals import run as evaluations
from m3ae_jax.evals.base import Result
from m3ae_jax.evals.features import against_untrained, counted
from m3ae_jax.evals.verdict import Measured, compared, helped, sentence


def share(value, examples=1000, name="x", **more):
    return Measured.share(name, value, examples, **more)


@pytest.mark.parametrize(
    ("trained", "other", "examples", "told"),
    [
        (0.60, 0.40, 1000, "better"),
        (0.40, 0.60, 1000, "worse"),
        (0.51, 0.50, 1000, "no difference shown"),
        (1.0, 0.0, 1, "no difference shown"),
        (1.0, 0.0, 20, "better"),
        (0.0, 0.0, 5, "no difference shown"),
    ],
)
def test_item_15_a_difference_is_told_with_its_interval(trained, other, examples, told):
    said = compared("pictures", [share(trained, examples, "trained")], [share(other, examples, "pixels")])
    assert said.endswith(f": {told}")
    assert f"trained {trained:.3f}, {trained - other:+.3f} [" in said and f"to pixels ({other:.3f})" in said


def test_item_15_the_best_of_each_side_are_compared():
    said = compared(
        "x", [share(0.2, name="cls"), share(0.3, name="mean")], [share(0.1, name="p"), share(0.6, name="q")]
    )
    assert said.startswith("x: mean 0.300, -0.300 [") and said.endswith("to q (0.600): worse")


def test_item_15_errors_are_those_of_the_statistics_books():
    # Agresti and Caffo: 0.5 of 98 with two added is 0.5 of 100.
    assert share(0.5, 98).error == pytest.approx(0.05)
    assert share(0.5, 98, interval=1.96 * 0.05).error == pytest.approx(math.hypot(0.05, 0.05))
    # An area of 0.5 of n and m examples has the variance (n + m + 1) / (12 n m).
    assert Measured.area("x", 0.5, 400, 300).error == pytest.approx(math.sqrt(701 / (12 * 400 * 300)), rel=1e-3)
    assert 0 < Measured.area("x", 1.0, 400, 300).error < 0.01


def test_item_15_each_input_is_compared_with_what_was_not_learnt():
    shown = {
        "trained/image/cls": {"accuracy": share(0.7)},
        "trained/text/cls": {"accuracy": share(0.5)},
        "untrained/image/cls": {"accuracy": share(0.3)},
        "untrained/text/cls": {"accuracy": share(0.9)},
        "pixels": {"accuracy": share(0.4)},
    }
    pictures, captions = against_untrained(shown, share(0.1, name="the majority class"))
    assert "pictures: trained (cls) 0.700" in pictures and "to pixels (0.400): better" in pictures
    assert "captions: trained (cls) 0.500" in captions and "to untrained (cls) (0.900): worse" in captions


def test_item_15_what_was_seen_in_training_does_not_count():
    assert counted(np.array([True, False, False])) == (2, "/without_overlap")
    assert counted(np.zeros(3, bool)) == (3, "") and counted(np.ones(3, bool)) == (3, "")


def test_item_15_the_other_modality_helps_harms_or_does_nothing():
    said = helped(
        {"color (val)": (0.1, 0.2), "shape (val)": (-0.1, 0.1), "object (val)": (-0.3, -0.2), "x": (0.0, 0.0)}
    )
    assert said == (
        "Verdict: the true picture or caption, beside another example's, helps to restore color (val); it shows no "
        "difference for shape (val), x; it harms object (val)."
    )
    assert sentence([]) == ""


def test_item_15_every_evaluation_ends_with_a_verdict():
    folder = Path(evaluations.__file__).parent
    for name in evaluations.EVALUATIONS:
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        called = {
            node.func.id
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call) and hasattr(node.func, "id")
        }
        # `compared` of features and `result` of supervised make the results of several.
        assert called & {"sentence", "helped"} or {"compared", "result"} & called, name
    assert Result.of("x", {"a": 1.0}, "| a |", "Verdict: it is.") == Result(
        "x", {"x/a": 1.0}, "| a |\n\nVerdict: it is."
    )
