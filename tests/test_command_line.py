"""What the programs share of their command lines."""

import subprocess
import sys


def _ended(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "m3ae_jax.data.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_help_ends_well_and_what_is_missing_is_named():
    told = _ended("--help")
    assert told.returncode == 0 and "--source" in told.stdout
    missing = _ended()
    assert missing.returncode == 2
    assert missing.stderr == "error: --source and --output must be given; see --help\n"
