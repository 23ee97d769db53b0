"""A few rounds of the torture; a hundred are `python tests/multiprocess/torture.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TORTURE = Path(__file__).with_name("torture.py")


@pytest.mark.parametrize(("processes", "rounds", "seed"), [(1, 4, 0), (2, 3, 0)])
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(processes, rounds, seed, tmp_path):
    arguments = [f"--processes={processes}", f"--rounds={rounds}", f"--seed={seed}", "--steps=16"]
    done = subprocess.run(
        [sys.executable, str(TORTURE), *arguments, f"--folder={tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"survived {rounds} of {rounds} kills" in done.stdout
