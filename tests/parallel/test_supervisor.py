"""What the parent of a process shows of its console."""

import pytest

from m3ae_jax.parallel.supervisor import is_of_gloo

GLOO = "[Gloo] Rank 1 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n"


@pytest.mark.parametrize("cut", range(len(GLOO.split())))
def test_two_lines_of_gloo_are_known_however_its_threads_mix_them(cut):
    pieces = ["[Gloo] Rank ", "1", " is connected to ", "1", " peer ranks. "]
    pieces += ["Expected number of connected peer ranks is : ", "1", "\n"]
    mixed = "".join([*pieces[:cut], GLOO, *pieces[cut:]])
    assert all(is_of_gloo(line.encode()) for line in mixed.splitlines(True))


@pytest.mark.parametrize("line", ["", "step 4/4", "error: process 1: no such file", "Rank 1 of [Gloo] Rank "])
def test_other_lines_are_not_of_gloo(line):
    assert not is_of_gloo(line.encode())
