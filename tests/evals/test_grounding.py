"""The grounding questions are well posed, and its figures are what they say."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.data import images
from m3ae_jax.data.sources.scenes import SceneOptions, ScenesSource
from m3ae_jax.errors import UserError
from m3ae_jax.evals import grounding
from m3ae_jax.evals.base import Result
from m3ae_jax.evals.clean import scene_tokens
from m3ae_jax.evals.run import check
from m3ae_jax.objectives.base import Restored
from m3ae_jax.objectives.m3ae import M3AE
from m3ae_jax.train.setup import prepare


@pytest.fixture(scope="module")
def setup():
    config = config_lib.load("configs/tiny.py")
    config.model.width, config.model.depth, config.m3ae.decoder_depth = 16, 1, 1
    return prepare(config_lib.resolve(config))


@pytest.fixture(scope="module")
def scenes(setup):
    source = ScenesSource("val", SceneOptions(**setup.config.data.scenes.to_dict()))
    return [source.scene(i) for i in range(24)]


def not_asked(params, batch):
    raise AssertionError("these questions are posed without the model")


def grounding_of(setup, restore):
    objective = M3AE(setup.config, setup.tokenizer.vocab_size)
    objective.restore = restore
    stub = dataclasses.replace(setup, objective=objective)
    return grounding._Grounding(stub, types.SimpleNamespace(params={}))


def test_one_word_is_hidden_and_it_is_the_one_asked_for(setup, scenes):
    ask = grounding_of(setup, not_asked)
    questions = ask._word_queries(scenes)
    assert {q.attribute for q in questions} == {"color", "shape"}
    for question in questions:
        caption = scenes[question.scene].caption
        (token,) = np.flatnonzero(question.hidden)
        word = caption.split()[token]
        assert word in {getattr(o, question.attribute) for o in scenes[question.scene].objects}


def test_every_pixel_of_the_object_is_hidden(setup, scenes):
    data = setup.config.data
    for question in grounding_of(setup, not_asked)._object_queries(scenes):
        shown = np.repeat(~question.hidden[:, None], 3 * data.patch_size**2, 1).astype(np.uint8)
        side = data.image_size // data.patch_size
        shown = images.unpatchify(shown[None], data.patch_size, (side, side))[0, ..., 0]
        numbers = {m.object for m in scenes[question.scene].mentions}
        segmentation = scenes[question.scene].segmentation
        assert any(not shown[segmentation == n + 1].any() for n in numbers)


def test_a_model_that_knows_all_and_one_that_knows_nothing(setup, scenes):
    def knows(params, part):
        image, text = (part["groups"][name]["target"]["value"] for name in ("image", "text"))
        loss = {"image": jnp.zeros(image.shape[:2]), "text": jnp.zeros(text.shape)}
        return {
            "image": Restored(image, loss["image"]),
            "text": Restored(text, loss["text"], jnp.ones(text.shape, bool)),
        }

    def knows_nothing(params, part):
        restored = knows(params, part)
        text = restored["text"]
        return restored | {"text": Restored(jnp.zeros_like(text.value), text.loss, jnp.zeros_like(text.correct))}

    best = grounding_of(setup, knows)(scenes)
    for attribute in ("color", "shape"):
        assert best[attribute]["true"] == best[attribute]["shuffled"] == 1.0
        assert 0 < best[attribute]["prior"] < 0.5
    assert best["object"]["true"] == 0.0
    worst = grounding_of(setup, knows_nothing)(scenes)
    assert worst["color"]["true"] == worst["shape"]["true"] == 0.0


def test_a_model_that_looks_at_the_picture_is_told_from_one_that_does_not(setup, scenes):
    """The stub answers right only if the picture is the caption's own."""
    ask = grounding_of(setup, not_asked)
    tokens = scene_tokens(setup, [s.image for s in scenes], [s.caption for s in scenes])
    own = {patches.tobytes(): i for i, patches in enumerate(tokens["image"][0])}
    captions = [s.caption for s in scenes]

    def looks(params, part):
        groups = jax.tree.map(np.asarray, part["groups"])
        right = []
        for b in range(len(groups["text"]["target"]["value"])):
            caption = captions[own[groups["image"]["visible"]["value"][b].tobytes()]]
            token = setup.tokenizer.encode([caption])[0]
            place = groups["text"]["target"]["position"][b, 0]
            right.append(place < len(token) and token[place] == groups["text"]["target"]["value"][b, 0])
        value = groups["text"]["target"]["value"]
        return {"text": Restored(value, np.zeros(value.shape), np.broadcast_to(np.array(right)[:, None], value.shape))}

    ask._restore = looks
    asked = ask._word_queries(scenes)
    scene = np.arange(len(scenes))
    true = ask._answers(asked, tokens, "text", scene)
    shuffled = ask._answers(asked, tokens, "text", np.roll(scene, 1))
    assert true.mean() == 1.0
    assert shuffled.mean() < 0.6
    figures = grounding._compare(asked, true, shuffled)
    assert figures["low"] > 0 and figures["low"] <= figures["difference"] <= figures["high"]


def test_no_difference_has_zero_in_its_interval():
    questions = [grounding._Query(i, "color", np.zeros(1)) for i in range(200)]
    rng = np.random.default_rng(0)
    figures = grounding._compare(questions, rng.random(200), rng.random(200))
    assert figures["low"] < 0 < figures["high"]


def test_wrong_use_is_told(setup, tmp_path):
    with pytest.raises(UserError, match="did you mean 'grounding'"):
        wrong = config_lib.default()
        wrong.evals = ("groundin",)
        check(wrong)
    pictures = setup.config.copy_and_resolve_references()
    pictures.data.modalities = ("image",)
    with pytest.raises(UserError, match=r"needs data.modalities"):
        check(pictures)
    Result("name", {"name/a": 1.0}, "| table |").save(tmp_path, 7)
    assert (tmp_path / "name_7.json").exists() and (tmp_path / "name_7.md").read_text() == "| table |\n"
