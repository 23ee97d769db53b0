"""No evaluation drops examples of a last, partial batch, or counts those that fill it up."""

import functools
import re

import jax
import numpy as np
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.evals import grounding, ood
from m3ae_jax.evals.linear import swept
from m3ae_jax.evals.run import EVALUATIONS, run
from m3ae_jax.objectives.base import Embeds, FindsKeywords, Grounds, Tokenizes
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train import setup as run_setup

pytestmark = pytest.mark.slow

EXAMPLES = 21
WHOLE, REST = 21, 8  # batches: one without a rest, three of which the last has five
SMALL = {
    "model.width": "16",
    "model.depth": "1",
    "m3ae.decoder_width": "16",
    "m3ae.decoder_depth": "1",
    "data.image_size": "24",
    "eval.label": "color",
    "eval.train_examples": "170",  # of fewer, rounding decides on the probe's penalty
    "eval.test_examples": str(EXAMPLES),
    "eval.pairs": str(EXAMPLES),
    "eval.scored_pairs": "5",
    "eval.pictures": str(EXAMPLES),
    "eval.attention.examples": str(EXAMPLES),
    "eval.robustness.epsilons": "()",  # attacks amplify rounding, which a batch's size changes
    "eval.linear_probe.batch_size": "16",
    "eval.linear_probe.duration": "2 steps",
    "eval.linear_probe.warmup": "1 steps",
    "eval.finetune.batch_size": "16",
    "eval.finetune.duration": "2 steps",
    "eval.finetune.warmup": "1 steps",
}
COUNTS = ("n", "test_examples", "pictures", "text/0.9/n")
"""Where an evaluation tells how many examples it has counted."""
FREE = {
    # Who is another example's partner depends on the batch, and with the partner, of pictures, who is left out.
    "masked_prediction": r"/image/|shuffled|difference|low|high",
    "tsne": r"/map$",  # where points end is chaotic: rounding moves them
}


@pytest.fixture(scope="module")
def setups():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_setup, "make_mesh", lambda c: make_mesh(c, jax.devices()[:1]))
        found = {}
        for size in (WHOLE, REST):
            config = config_lib.load("configs/tiny.py")
            config_lib.apply_overrides(config, [*SMALL.items(), ("eval.batch_size", str(size))])
            found[size] = run_setup.prepare(config_lib.resolve(config))
        state = found[WHOLE].init_state()
        yield {size: (setup, state) for size, setup in found.items()}


def smooth_auroc(inside, outside):
    """Of all pairs of scores, none negative, the mean of the outer one's share, in 0 to 1.

    The area itself jumps by a whole pair (1 / 441 here) when rounding turns two scores that are nearly equal.
    """
    inside, outside = np.asarray(inside)[:, None], np.asarray(outside)[None]
    return float(np.mean(outside / (outside + inside)))


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, needs in EVALUATIONS.items()
        if not {Embeds, FindsKeywords, Grounds, Tokenizes} & {*needs.objective}
    ],
)
def test_figures_are_those_of_one_whole_batch(setups, name, monkeypatch):
    monkeypatch.setattr(grounding, "SCENES", EXAMPLES)
    monkeypatch.setattr(ood, "auroc", smooth_auroc)
    # Of a weak penalty the optimum is flat: rounding of the features, of 1e-6, moves its confidences by 2e-4.
    monkeypatch.setattr(ood, "swept", functools.partial(swept, penalties=(1e-1,)))
    found = {}
    for size, (setup, state) in setups.items():
        monkeypatch.setattr(grounding, "_BATCH", 8 * size)  # of questions, several a scene
        found[size] = run(name, setup, state).scalars
    for count in (f"{name}/{count}" for count in COUNTS):
        assert found[REST].get(count, EXAMPLES) == EXAMPLES, count
    assert found[REST].keys() == found[WHOLE].keys() and found[REST]
    for key, value in found[WHOLE].items():
        if not re.search(FREE.get(name, "^$"), key):
            assert found[REST][key] == pytest.approx(value, abs=1e-4), key
