"""Which box words name, by hand-made maps and by a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from m3ae_jax.data.sources.scenes import SceneOptions
from m3ae_jax.errors import UserError
from m3ae_jax.evals import pointing
from tests.objectives import small

CHANGES = {"simla.id_weight": 0.0, "model.depth": 2, "eval.pairs": 24}


def test_a_boxs_score_is_the_sum_inside_over_the_root_of_its_area() -> None:
    heat = np.zeros((4, 4))
    heat[0, 0], heat[2, 3] = 1.0, 2.0
    boxes = np.array([[0.0, 0.0, 0.25, 0.25], [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], [0.875, 0.5, 1.0, 0.75]])
    score = pointing.box_scores(heat, boxes)
    areas = np.array([1 / 16, 1 / 4, 1 / 4, 1 / 32])
    np.testing.assert_allclose(score, np.array([1.0, 1.0, 2.0, 1.0]) / np.sqrt(areas))
    assert pointing.box_scores(np.ones((4, 4)), boxes)[1] == pytest.approx(4 / 0.5)
    # The size's correction decides between a box and one around it.
    assert score[0] > score[1]


def test_intersection_over_union_of_reference_boxes() -> None:
    box = np.array([0.0, 0.0, 10.0, 10.0])
    assert pointing.iou(box, box) == 1.0
    assert pointing.iou(box, np.array([5.0, 0.0, 15.0, 10.0])) == pytest.approx(1 / 3)
    assert pointing.iou(box, np.array([10.0, 0.0, 20.0, 10.0])) == 0.0


def test_an_expression_fits_one_object_of_its_scene() -> None:
    found = pointing.expressions(SceneOptions(image_size=32), 40)
    assert len(found) == 40
    for e in found:
        words = set(e.words.split())
        named = e.scene.objects[e.object]
        assert words <= {named.color, named.shape, named.size, named.texture}
        others = [o for i, o in enumerate(e.scene.objects) if i != e.object]
        assert others and all(not words <= {o.color, o.shape, o.size, o.texture} for o in others)


def test_a_map_on_the_named_object_is_right_and_an_even_one_goes_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = small.setup_of("simla", **CHANGES)

    def oracle(setup: Any, params: Any, asked: list[pointing.Expression], words: np.ndarray) -> np.ndarray:
        maps = [asked[i].scene.segmentation == asked[i].object + 1 for i in words]
        return np.stack(maps).astype(float)

    state = setup.init_state()
    real = pointing.evaluate(setup, state).scalars
    monkeypatch.setattr(pointing, "_relevance", oracle)
    true = pointing.evaluate(setup, state).scalars
    assert true["pointing/trained/accuracy"] > 0.95
    for scalars in (real, true):
        assert 0.0 <= scalars["pointing/trained/accuracy"] <= 1.0
        assert 0.15 < scalars["pointing/chance/accuracy"] <= 0.5
        assert scalars["pointing/expressions"] == 24
    assert real["pointing/trained/accuracy"] == real["pointing/untrained/accuracy"]  # of the same fresh parameters
    assert real["pointing/even/accuracy"] == true["pointing/even/accuracy"]


def test_scenes_of_one_object_are_refused() -> None:
    with pytest.raises(UserError, match=r"evals=\('pointing',\) needs scenes of several objects"):
        pointing.check_scenes(small.config_of("simla", **CHANGES, **{"data.scenes.max_objects": 1}))
