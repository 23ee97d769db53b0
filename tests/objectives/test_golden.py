"""M3AE's numbers, which no change of the code may move: those of commit 377e22f, before encoder and decoder were apart.

Losses, gradients, parameters and batches of 200 steps of tiny, and all evaluations after them, are bit-equal where JAX,
the processor and the number of cores are those that the file was made with. Elsewhere rounding differs, and 200 steps
enlarge it: there the batches, and the numbers of the first step, to 1e-6, are compared.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
FILE = HERE.parent / "golden" / "m3ae.json"
ROUNDED = re.compile(r"grounding/\w+/object/|mask_ratios/image/[\d.]+/error")
"""Evaluations whose error of a patch is a mean taken on the device now, which was NumPy's: equal to 1e-6."""
RUNS = ("tiny", "share", "mae", "words", "cross", "mixture")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The golden numbers, and today's: made in a program of their own, by XLA's usual optimisations on one device."""
    output = tmp_path_factory.mktemp("golden") / "m3ae.json"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(HERE / "golden_run.py"), str(output)],
        cwd=HERE.parents[1],
        env=environment | {"PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if request.config.getoption("--update-golden"):
        FILE.write_text(output.read_text(encoding="utf-8"), encoding="utf-8")
    return tuple(json.loads(path.read_text(encoding="utf-8")) for path in (FILE, output))


def exact(numbers: tuple[Any, Any]) -> bool:
    return bool(numbers[0]["made_with"] == numbers[1]["made_with"])


@pytest.mark.parametrize("run", RUNS)
def test_every_batch_holds_the_same_values_and_masks(numbers: tuple[Any, Any], run: str) -> None:
    want, got = (of[run]["batches"] for of in numbers)
    assert len(want) == len(got) and want == got


@pytest.mark.parametrize("run", RUNS)
def test_losses_are_the_same(numbers: tuple[Any, Any], run: str) -> None:
    want, got = ({"loss": of[run]["loss"], **of[run]["terms"]} for of in numbers)
    if exact(numbers):
        assert want == got
    assert want.keys() == got.keys()
    for name, values in want.items():
        assert math.isclose(values[0], got[name][0], rel_tol=1e-6), name


@pytest.mark.parametrize("run", RUNS)
def test_gradients_and_parameters_are_the_same(numbers: tuple[Any, Any], run: str) -> None:
    want, got = (of[run] for of in numbers)
    if exact(numbers):
        assert want["gradients"] == got["gradients"] and want["params"] == got["params"]
    first_want, first_got = want["gradients"]["1"], got["gradients"]["1"]
    assert first_want.keys() == first_got.keys() and want["params"].keys() == got["params"].keys()
    whole = math.hypot(*(norm for norm, _ in first_want.values()))
    for name, (norm, _) in first_want.items():
        assert math.isclose(norm, first_got[name][0], rel_tol=1e-6, abs_tol=1e-6 * whole), name


def test_every_evaluation_says_the_same(numbers: tuple[Any, Any]) -> None:
    want, got = (of["tiny"]["evals"] for of in numbers)
    assert want.keys() == got.keys()
    for evaluation, figures in want.items():
        assert figures.keys() == got[evaluation].keys(), evaluation
        if not exact(numbers):
            continue
        for name, value in figures.items():
            if ROUNDED.search(name):
                assert math.isclose(value, got[evaluation][name], rel_tol=1e-6, abs_tol=1e-6), name
            else:
                assert value == got[evaluation][name], name


@pytest.mark.parametrize("run", ("tiny", "mae", "words", "cross", "mixture"))
def test_validation_and_priors_are_the_same(numbers: tuple[Any, Any], run: str) -> None:
    want, got = ({**of[run]["validation"], **of[run]["priors"]} for of in numbers)
    assert want.keys() == got.keys()
    if exact(numbers):
        assert want == got
    for name in (name for name in want if name.startswith("prior/")):
        assert math.isclose(want[name], got[name], rel_tol=1e-6), name


@pytest.mark.parametrize("run", ("tiny", "mae", "words", "cross", "mixture"))
def test_fresh_parameters_are_drawn_as_they_were(numbers: tuple[Any, Any], run: str) -> None:
    want, got = (of[run]["fresh"] for of in numbers)
    assert want.keys() == got.keys()
    for name, leaf in want.items():
        for same in ("shape", "axes", "decay"):
            assert leaf[same] == got[name][same], (name, same)
        count = math.prod(leaf["shape"])
        # Means and deviations of so many draws from one distribution.
        noise = 6 * max(leaf["std"], 1e-12) / math.sqrt(count)
        assert abs(leaf["mean"] - got[name]["mean"]) <= 2 * noise, name
        assert abs(leaf["std"] - got[name]["std"]) <= 2 * noise, name
