"""What the evaluations' tests share."""

import jax
import pytest

from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train import setup as run_setup


@pytest.fixture(scope="module")
def one_device():
    """A program for eight devices takes several times as long to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_setup, "make_mesh", lambda c: make_mesh(c, jax.devices()[:1]))
        yield
