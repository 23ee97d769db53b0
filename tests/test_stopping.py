"""How a program follows its fellows; signals are tested with whole runs (train/test_loop.py, multiprocess/)."""

import subprocess
import sys

import pytest

PROGRAM = """
from m3ae_jax import stopping

class Fellows:
    def failure(self):
        return {failure}
    def asked_to_stop(self):
        return False
    def depart(self, code):
        print("departed", code, flush=True)

stop = stopping.Stop()
{meet}
stop.wait_for_news()
print("no news", flush=True)
"""


@pytest.mark.parametrize("meet", ["stop.meet(Fellows())", "stop._fellows = Fellows()"], ids=["watched", "not_yet_seen"])
def test_item_4_an_error_that_a_failed_fellow_caused_never_hides_its_account(meet):
    program = PROGRAM.format(failure='(2, "error: process 0: no such file")', meet=meet)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "departed 2\n")
    assert ended.stderr == "error: process 0: no such file\n"


def test_without_a_fellows_account_the_program_goes_on():
    program = PROGRAM.format(failure=None, meet="stop._fellows = Fellows()")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "no news\n")
