"""Keywords and recommended words, of an objective that is told the truth, or knows nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3ae_jax.data.sources.scenes import SceneOptions, ScenesSource
from m3ae_jax.evals import keywords
from m3ae_jax.train.setup import Setup
from tests.objectives import small

SCENES = 48
CHANGES = {"simla.id_weight": 0.0, "model.depth": 1, "eval.pairs": SCENES}


def setup() -> Setup:
    return small.setup_of("simla", **CHANGES)


def test_figures_are_between_the_bounds_and_chance_is_the_share_of_attribute_words() -> None:
    result = keywords.evaluate(setup(), setup().init_state())
    scalars = {name.removeprefix("keywords/"): x for name, x in result.scalars.items()}
    assert {"trained/precision", "trained/recall", "trained/AUROC", "untrained/AUROC"} <= set(scalars)
    for name in ("precision", "recall", "AUROC"):
        assert 0.0 <= scalars[f"trained/{name}/low"] <= scalars[f"trained/{name}/high"] <= 1.0
    assert 0.2 < scalars["chance/precision"] < 0.9 and scalars["chance/AUROC"] == 0.5
    assert scalars["trained/AUROC"] == scalars["untrained/AUROC"]  # of the same fresh parameters
    assert "chance" in result.text


@pytest.mark.parametrize("knows", [True, False])
def test_an_oracle_reaches_all_and_a_constant_nothing(knows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base = setup()
    options = SceneOptions(**base.config.data.scenes.to_dict())
    scenes = [ScenesSource("val", options).scene(i) for i in range(SCENES)]
    tokenizer: Any = base.tokenizer
    vocabulary = tokenizer.vocab_size

    def ids(words: list[str]) -> list[int]:
        return [int(tokenizer.encode([word])[0][0]) for word in words]

    truth, recommended = np.zeros((SCENES, vocabulary), np.float32), np.zeros((SCENES, vocabulary), np.float32)
    for row, scene in enumerate(scenes):
        spans = [scene.caption[s.start : s.end] for mention in scene.mentions for s in mention.spans]
        truth[row, ids(spans)] = 1.0
        recommended[row, ids([word for o in scene.objects for word in (o.color, o.shape)])] = 0.9

    rows = iter(range(0, 10 * SCENES, 1))

    def found(setup: Any, params: Any, groups: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
        next(rows)
        return (truth > 0, recommended) if knows else (np.zeros_like(truth, bool), np.full_like(truth, 0.3))

    monkeypatch.setattr(keywords, "_found", found)
    scalars = keywords.evaluate(base, base.init_state()).scalars
    figures = {name: scalars[f"keywords/trained/{name}"] for name in ("recall", "AUROC")}
    if knows:
        assert scalars["keywords/trained/precision"] == 1.0 and figures == {"recall": 1.0, "AUROC": 1.0}
    else:
        assert figures == {"recall": 0.0, "AUROC": 0.5}


def test_of_captions_chance_is_as_many_words_at_random() -> None:
    found = np.zeros((2, 8), bool)
    found[0, [1, 2]] = True
    of = keywords._of_captions(found, [{1, 2, 3, 4}, {5, 6}], [{1, 4}, {6}])
    np.testing.assert_allclose(of["precision"], [0.5, np.nan])
    np.testing.assert_allclose(of["recall"], [0.5, 0.0])
    np.testing.assert_allclose(of["chance"], [0.5, np.nan])
    np.testing.assert_allclose(of["chance_recall"], [0.5, 0.0])


def test_the_area_is_that_of_the_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    score, shown = rng.normal(size=(40, 3)), rng.random((40, 3)) < 0.4
    mentioned = shown & (rng.random((40, 3)) < 0.3)
    wanted = []
    for x, of, said in zip(score.T, shown.T, mentioned.T, strict=True):
        inside, outside = x[of & ~said], x[~of & ~said]
        wanted.append(np.mean(inside[:, None] > outside[None]))
    assert keywords._area(score, shown, mentioned) == pytest.approx(np.mean(wanted))
    assert np.isnan(keywords._area(score, shown, shown))


def test_the_objective_is_asked_for_what_it_can_do() -> None:
    from m3ae_jax.objectives.base import FindsKeywords

    objective: Any = setup().objective
    assert isinstance(objective, FindsKeywords)
    found, probability = jax.jit(objective.keywords)(setup().init_state().params, small.part_of(setup()))
    assert found.dtype == jnp.bool_ and found.shape == probability.shape == (small.B, objective._words)
