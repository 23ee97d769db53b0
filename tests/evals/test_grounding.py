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
from m3ae_jax.evals import Result, check, grounding
from m3ae_jax.objectives.m3ae import M3AE
from m3ae_jax.train.setup import prepare


@pytest.fixture(scope="module")
def setup():
    config = config_lib.load("configs/tiny.py")
    config.model.width, config.model.depth, config.model.decoder_depth = 16, 1, 1
    return prepare(config_lib.resolve(config))


@pytest.fixture(scope="module")
def scenes(setup):
    source = ScenesSource("val", SceneOptions(**setup.config.data.scenes.to_dict()))
    return [source.scene(i) for i in range(24)]


def not_asked(params, batch):
    raise AssertionError("these questions are posed without the model")


def asker(setup, reconstruct):
    objective = M3AE(setup.config, setup.tokenizer.vocab_size)
    objective.reconstruct = reconstruct
    stub = dataclasses.replace(setup, objective=objective)
    return grounding._Asker(stub, types.SimpleNamespace(params={}))


def test_one_word_is_hidden_and_it_is_the_one_asked_for(setup, scenes):
    ask = asker(setup, not_asked)
    questions = ask._word_questions(scenes)
    assert {q.attribute for q in questions} == {"color", "shape"}
    for question in questions:
        caption = scenes[question.scene].caption
        (token,) = np.flatnonzero(question.hidden)
        word = caption.split()[token]
        assert word in {getattr(o, question.attribute) for o in scenes[question.scene].objects}


def test_every_pixel_of_the_object_is_hidden(setup, scenes):
    data = setup.config.data
    for question in asker(setup, not_asked)._object_questions(scenes):
        shown = np.repeat(~question.hidden[:, None], 3 * data.patch_size**2, 1).astype(np.uint8)
        side = data.image_size // data.patch_size
        shown = images.unpatchify(shown[None], data.patch_size, (side, side))[0, ..., 0]
        numbers = {m.object for m in scenes[question.scene].mentions}
        segmentation = scenes[question.scene].segmentation
        assert any(not shown[segmentation == n + 1].any() for n in numbers)


def test_a_model_that_knows_all_and_one_that_knows_nothing(setup, scenes):
    vocabulary = setup.tokenizer.vocab_size

    def knows(params, batch):
        groups = batch["groups"]
        guesses = {"text": jax.nn.one_hot(groups["text"]["target"]["value"], vocabulary)}
        return guesses | {"image": M3AE(setup.config, vocabulary).targets(batch)["image"]}

    def knows_nothing(params, batch):
        text = batch["groups"]["text"]["target"]["value"]
        return knows(params, batch) | {"text": jnp.zeros((*text.shape, vocabulary))}

    best = asker(setup, knows)(scenes)
    for attribute in ("color", "shape"):
        assert best[attribute]["true"] == best[attribute]["shuffled"] == 1.0
        assert 0 < best[attribute]["prior"] < 0.5
    assert best["object"]["true"] == 0.0
    worst = asker(setup, knows_nothing)(scenes)
    assert worst["color"]["true"] == worst["shape"]["true"] == 0.0


def test_a_model_that_looks_at_the_picture_is_told_from_one_that_does_not(setup, scenes):
    """The stub answers right only if the picture is the caption's own."""
    vocabulary = setup.tokenizer.vocab_size
    ask = asker(setup, not_asked)
    own = {ask._patches([s])[0].tobytes(): i for i, s in enumerate(scenes)}
    captions = [s.caption for s in scenes]

    def looks(params, batch):
        groups = jax.tree.map(np.asarray, batch["groups"])
        right = []
        for b in range(len(groups["text"]["target"]["value"])):
            caption = captions[own[groups["image"]["visible"]["value"][b].tobytes()]]
            token = setup.tokenizer.encode([caption])[0]
            place = groups["text"]["target"]["position"][b, 0]
            right.append(place < len(token) and token[place] == groups["text"]["target"]["value"][b, 0])
        hot = jax.nn.one_hot(groups["text"]["target"]["value"], vocabulary)
        return {"text": hot * np.asarray(right)[:, None, None]}

    ask._reconstruct = looks
    ids, length = grounding.encode_batch(setup.tokenizer, [c.encode() for c in captions], 16)
    data = {"pixels": ask._patches(scenes), "ids": ids, "real": np.arange(16) < length[:, None]}
    asked = ask._word_questions(scenes)
    other = np.roll(np.arange(len(scenes)), 1)
    true = ask._answers(asked, data, "text", lambda i: (i, i))
    shuffled = ask._answers(asked, data, "text", lambda i: (other[i], i))
    assert true.mean() == 1.0
    assert shuffled.mean() < 0.6
    figures = grounding._compare(asked, true, shuffled)
    assert figures["low"] > 0 and figures["low"] <= figures["difference"] <= figures["high"]


def test_no_difference_has_zero_in_its_interval():
    questions = [grounding._Question(i, "color", np.zeros(1)) for i in range(200)]
    rng = np.random.default_rng(0)
    figures = grounding._compare(questions, rng.random(200), rng.random(200))
    assert figures["low"] < 0 < figures["high"]


def test_wrong_use_is_told(setup, tmp_path):
    with pytest.raises(UserError, match="did you mean 'grounding'"):
        wrong = config_lib.default()
        wrong.evals = ("groundin",)
        check(wrong)
    image_only = dataclasses.replace(setup, config=config_lib.image_only(setup.config.copy_and_resolve_references()))
    with pytest.raises(UserError, match=r"needs data.modalities"):
        grounding.evaluate(image_only, None)
    Result("name", {"name/a": 1.0}, "| table |").save(tmp_path, 7)
    assert (tmp_path / "name_7.json").exists() and (tmp_path / "name_7.md").read_text() == "| table |\n"
