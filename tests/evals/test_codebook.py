"""Usage and PSNR of a visual vocabulary: all of the data counted once, in batches of any size."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from m3ae_jax.data.tokens import group_of
from m3ae_jax.evals.run import run
from m3ae_jax.objectives.batch import clean
from tests.objectives.small import setup_of

CODES = 16
CHANGES: dict[str, Any] = {
    "visual_tokenizer.quantizer": "kmeans",
    "visual_tokenizer.codes": CODES,
    "eval.examples": 100,
    "data.modalities": "('image',)",
}


def state_of(setup: Any) -> Any:
    """Some codes are white, which no picture is: they are never hit."""
    state = setup.init_state()
    codes = jax.random.normal(jax.random.key(3), (CODES, 192)) * np.where(np.arange(CODES) < 10, 0.5, 100.0)[:, None]
    state.extra["codebook"]["codes"] = codes
    return state


@pytest.mark.parametrize("size", [21, 8])
def test_figures_are_those_of_the_formula(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of("visual_tokenizer", **CHANGES, **{"eval.batch_size": size})
    monkeypatch.setattr(type(setup.val_source), "__len__", lambda self: 100)  # in whatever order
    state, objective = state_of(setup), setup.objective
    figures = run("codebook", setup, state).scalars
    assert figures["codebook/codes"] == CODES and figures["codebook/ids"] == 100 * CODES
    params = {"codebook": state.extra["codebook"]}
    hits, psnr = np.zeros(CODES), []
    batches = setup.eval_batches(setup.val_source, 100)  # 100 pictures of 16 patches
    for part in batches:
        tokens = clean(part["groups"][group_of(objective.groups, "image").name])
        ids = np.asarray(objective.ids(params, tokens))
        valid = np.asarray(part["example"]["valid"])
        np.add.at(hits, ids[valid].ravel(), 1)
        painted = np.asarray(objective.pixels(params, ids, tokens["position"]), np.float64)
        error = np.mean((painted - np.asarray(tokens["value"])) ** 2, axis=(1, 2))
        psnr += list(10 * np.log10(255**2 / error[valid]))
    assert hits.sum() == 1600
    assert figures["codebook/trained/usage"] == pytest.approx(np.mean(hits > 0)) and (hits > 0).sum() <= 10
    p = hits[hits > 0] / hits.sum()
    assert figures["codebook/trained/perplexity"] == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-4)
    assert figures["codebook/trained/psnr"] == pytest.approx(np.mean(psnr), rel=1e-4)
    low, high = (figures[f"codebook/trained/psnr/{end}"] for end in ("low", "high"))
    assert low < figures["codebook/trained/psnr"] < high
    assert figures["codebook/mean_colour/psnr"] > figures["codebook/trained/psnr"]


def test_a_source_too_small_is_read_again_with_other_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of("visual_tokenizer", **CHANGES)
    monkeypatch.setattr(type(setup.val_source), "__len__", lambda self: 30)
    result = run("codebook", setup, state_of(setup))
    assert result.scalars["codebook/ids"] == 100 * CODES and "crops of 30 pictures" in result.text
    assert "PSNR of 30 pictures" in result.text


def test_it_is_refused_of_an_objective_without_ids() -> None:
    from m3ae_jax.errors import UserError
    from m3ae_jax.evals.run import check_objective

    setup = setup_of("m3ae", evals="('codebook',)")
    with pytest.raises(UserError, match="does not give ids of pictures"):
        check_objective(setup)
