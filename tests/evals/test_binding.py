"""Retrieval among captions and their untrue twins, and by matching what embeddings put first."""

import jax
import numpy as np
import pytest

import m3ae_jax.config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.evals import binding, run
from m3ae_jax.evals.retrieval import best, put_first, recall
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train import setup as setups


def test_the_best_come_first_by_their_logits_and_the_others_after_them_by_their_score():
    score = np.array([[0.9, 0.8, 0.1, 0.7], [0.2, 0.3, 0.4, 0.1]], np.float32)
    chosen = best(score, 2)
    np.testing.assert_array_equal(chosen, [[True, True, False, False], [False, True, True, False]])
    logits = np.where(chosen, [[-9.0, 5.0, 0, 0], [0, -3.0, -4.0, 0]], 0.0)
    order = np.argsort(-put_first(chosen, logits, score), axis=1)
    np.testing.assert_array_equal(order, [[1, 0, 3, 2], [1, 2, 0, 3]])


def config_of(**changes):
    config = config_lib.load("configs/binding.py")
    shrunk = {
        "model.width": 16,
        "model.depth": 1,
        "model.heads": 2,
        "batch_size": 8,
        "eval.pairs": 12,
        "eval.reranked": 3,
        "eval.batch_size": 16,
        "duration": "2 steps",
        "optimizer.warmup": "0 steps",
    }
    config_lib.apply_overrides(config, [(name, str(value)) for name, value in (shrunk | changes).items()])
    return config_lib.resolve(config)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mamo", "contrastive"])
def test_binding_is_measured_of_what_embeds_and_of_what_matches_besides(objective, monkeypatch):
    changes = {"objective": objective, "data.scenes.max_objects": 3}
    monkeypatch.setattr(setups, "make_mesh", lambda config: make_mesh(config, jax.devices()[:2]))
    setup = setups.prepare(config_of(**changes))
    result = binding.evaluate(setup, setup.init_state())
    kinds = {"embedding", "matched"} if objective == "mamo" else {"embedding"}
    names = {name.split("/")[2] for name in result.scalars if name.startswith("binding/trained/")}
    assert names == kinds and result.scalars["binding/pictures"] == 12
    # Nothing is trained yet, so both are the same model.
    for name in (n for n in result.scalars if "/trained/" in n):
        assert result.scalars[name] == result.scalars[name.replace("/trained/", "/untrained/")]
    captions = result.scalars["binding/captions"]
    assert 12 < captions <= 24
    assert result.scalars["binding/chance/above_twin"] == 0.5
    assert result.scalars["binding/chance/recall@1"] == pytest.approx(1 / captions)
    assert "Verdict: recall@1: trained" in result.text


def test_every_caption_has_a_twin_and_half_of_them_exchange_each_attribute():
    options = config_of().data.scenes.to_dict()
    scenes, twins = binding.with_twins(binding.SceneOptions(**options), 40)
    assert len(scenes) == len(twins) == 40
    by_color = [twin == scene.twin("color") for scene, twin in zip(scenes, twins, strict=True)]
    assert 10 <= sum(by_color) <= 30
    # A model that knows the words of a picture and not their order scores both alike.
    words = [{word for word in scene.caption.split() if word not in ("a", "an")} for scene in scenes]
    own, other = np.arange(40), np.arange(40, 80)
    captions = [*(s.caption for s in scenes), *twins]
    bags = [{word for word in caption.split() if word not in ("a", "an")} for caption in captions]
    score = np.array([[float(bag == of) for bag in bags] for of in words])
    assert binding._above(score, own, other)["above_twin"] == 0.5
    assert recall(score, np.eye(40, 80, dtype=bool))["recall@1"] <= 0.5


def test_scenes_of_one_object_have_no_twins():
    with pytest.raises(UserError, match=r"not data\.scenes\.max_objects=1"):
        run.check(config_of(**{"data.scenes.min_objects": 1, "data.scenes.max_objects": 1}))
