"""The command ``m3ae_jax``: ``python -m m3ae_jax.main`` in fewer letters."""

import os
import sys


def run() -> None:
    """Becomes that program, so that nothing can differ: help, the folder that imports begin with, its name in lists."""
    os.execv(sys.executable, [sys.executable, "-m", "m3ae_jax.main", *sys.argv[1:]])


if __name__ == "__main__":
    run()
