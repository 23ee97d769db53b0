"""An objective that has only the core: evaluations it cannot do are refused, all else of a run works without them."""

import dataclasses
import math

import numpy as np
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.evals import run
from m3ae_jax.evals.run import EVALUATIONS, RunHooks, check_objective
from m3ae_jax.objectives.base import Attends, Encodes, Prior, Restores
from m3ae_jax.train import setup as run_setup

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def setup(one_device):
    c = config_lib.default("tests.objectives.toy:Toy")
    c.batch_size, c.eval.batch_size, c.eval.examples, c.evals = 8, 8, 11, ()
    c.data.update(modalities=("image",), image_size=16, patch_size=8)
    c.data.scenes.image_size = 32
    c.data.train.source = c.data.val.source = "scenes"
    setup = run_setup.prepare(config_lib.resolve(c))
    assert not isinstance(setup.objective, Encodes | Restores | Attends | Prior)
    return setup


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_that_needs_more_is_refused_in_one_line(setup, tmp_path, name):
    config = setup.config.copy_and_resolve_references()
    config.evals = (name,)
    asking = dataclasses.replace(setup, config=config)
    missing = run._ABLE[EVALUATIONS[name].objective[0]]
    message = rf"evals=\('{name}',\): the objective '.*Toy' does not {missing}, .* with it there are none"
    for refuse in (check_objective, lambda setup: RunHooks(setup, tmp_path)):
        with pytest.raises(UserError, match=message) as error:
            refuse(asking)
        assert "\n" not in str(error.value)


def test_without_evaluations_a_run_draws_nothing_and_validates(setup, tmp_path):
    check_objective(setup)
    hooks, state = RunHooks(setup, tmp_path), setup.init_state()
    figures = hooks.validate(state)
    assert set(figures) == {"val/loss", "val/contrast_loss"} and all(map(math.isfinite, figures.values()))
    assert figures["val/loss"] == pytest.approx(figures["val/contrast_loss"])
    assert hooks.validate(state) == figures
    assert hooks.prior() == {}
    assert hooks.draw(state) is None
    part = next(iter(setup.val_batches))
    assert hooks.replayed(state, [(part, 0)], "step 1") is None
    written = []
    hooks.evaluate(state, None, written.append)
    assert not written and not any(tmp_path.iterdir())
    assert np.sum([part["example"]["valid"].sum() for part in setup.val_batches]) == 11
