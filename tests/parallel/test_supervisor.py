"""What the parent of a process shows of its console."""

import subprocess
import sys

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


CHILD = """
import os
from m3ae_jax.parallel import supervisor
supervisor.supervise()
os.write(2, b"error: process 0: no such file\\nE0000 coordination_service_agent.cc] gone\\n")
for code in {announced}:
    supervisor.announce(code)
os.abort()
"""


@pytest.mark.parametrize(
    ("announced", "code", "last"),
    [((), 75, "error: lost another process of the run"), ((2,), 2, "no such file"), ((1,), 1, "no such file")],
)
def test_item_4_a_process_that_jax_aborts_on_its_way_out_ends_as_it_meant_to(announced, code, last):
    ended = subprocess.run([sys.executable, "-c", CHILD.format(announced=announced)], capture_output=True, text=True)
    assert ended.returncode == code
    assert last in ended.stderr.splitlines()[-1] and "coordination" not in ended.stderr
