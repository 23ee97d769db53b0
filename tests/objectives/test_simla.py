"""What SIMLA promises beyond the contract of all objectives (`test_contract`)."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m3ae_jax
import m3ae_jax.config as config_lib
from m3ae_jax.data.images import unpatchify
from m3ae_jax.errors import UserError
from m3ae_jax.models.vocabulary import cross_entropy, soft_cross_entropy
from m3ae_jax.objectives.base import (
    Embeds,
    Encodes,
    FindsKeywords,
    Grounds,
    LossOutput,
    Matches,
    Restores,
    build,
    model_params,
)
from m3ae_jax.objectives.batch import clean, mean
from m3ae_jax.objectives.parts.keywords import binary_loss, keywords
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.train.flops import flops_per_example
from m3ae_jax.train.setup import Setup
from tests.objectives import small
from tests.objectives.small import B, batch_of, part_of
from tests.objectives.test_visual_tokenizer import QUANTIZERS, saved

WITHOUT_IDS = {"simla.id_weight": 0.0, "model.depth": 2}
config_of, setup_of, state_of = (
    functools.partial(f, "simla") for f in (small.config_of, small.setup_of, small.state_of)
)


def loss(setup: Setup, params: Any, extra: Any, part: Any) -> LossOutput:
    """As one program: operation by operation it would be thousands, each with pages of its own."""
    return jax.jit(setup.objective.loss)(params, extra, part, None, jnp.int32(0))


def terms_of(output: LossOutput) -> dict[str, float]:
    return {name: float(mean(*term)) for name, term in output.terms.items()}


def changed(part: Any, group: str, **sets: Any) -> Any:
    return {**part, "groups": {**part["groups"], group: {**part["groups"][group], **sets}}}


def other_values(part: Any, group: str, sets: tuple[str, ...] = ("visible", "target")) -> Any:
    """The same part with other pixels or words."""
    of = part["groups"][group]
    rng = np.random.default_rng(1)
    drawn = {
        name: {**of[name], "value": rng.integers(1, 40, of[name]["value"].shape).astype(of[name]["value"].dtype)}
        for name in sets
    }
    return changed(part, group, **drawn)


# --- its parts


def test_keywords_are_what_the_heads_look_at_and_nothing_else() -> None:
    """By a hand-made attention: two heads agree on a word; padding, stop words and what nobody looks at are none."""
    attention = np.zeros((1, 2, 6), np.float32)
    attention[0, 0, [1, 2]] = 0.5, 0.4
    attention[0, 1, [2, 4]] = 0.6, 0.3
    ids = np.array([[7, 3, 5, 9, 1, 0]])
    eligible = np.array([[True, True, True, True, True, False]])
    found = keywords(jnp.asarray(attention), jnp.asarray(ids), jnp.asarray(eligible), 12, per_head=2, total=5)
    assert set(np.flatnonzero(found[0])) == {3, 5, 1}
    one = keywords(jnp.asarray(attention), jnp.asarray(ids), jnp.asarray(eligible), 12, per_head=2, total=1)
    assert set(np.flatnonzero(one[0])) == {5}
    stop = keywords(jnp.asarray(attention), jnp.asarray(ids), jnp.asarray(eligible & (ids != 5)), 12, per_head=2)
    assert 5 not in np.flatnonzero(stop[0]) and 0 not in np.flatnonzero(stop[0])
    nothing = keywords(jnp.asarray(attention), jnp.asarray(ids), jnp.zeros((1, 6), bool), 12)
    assert not nothing.any()
    # As their code has it, places without a vote fill up, padding too; what is no word (-1) is dropped.
    ids[0, 3] = -1
    every = jnp.ones((1, 6), bool)
    filled = keywords(jnp.asarray(attention), jnp.asarray(ids), every, 12, per_head=2, total=6, voted=False)
    assert set(np.flatnonzero(filled[0])) == {7, 3, 5, 1, 0}


def test_the_binary_loss_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(4, 9)) * 3, rng.uniform(size=(4, 9))
    p = 1 / (1 + np.exp(-logits))
    want = -(target * np.log(p) + (1 - target) * np.log(1 - p))
    np.testing.assert_allclose(binary_loss(jnp.asarray(logits), jnp.asarray(target)), want, rtol=1e-4)


@pytest.mark.parametrize("blocks", [1, 3])
def test_soft_cross_entropy_in_blocks_is_the_formula_and_so_is_its_gradient(blocks: int) -> None:
    rng = np.random.default_rng(0)

    def drawn() -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 8), (8, 10), (10,)))

    student, teacher = drawn(), drawn()

    def plain(student: Any) -> jax.Array:
        logits, others = (x @ kernel + bias for x, kernel, bias in (student, teacher))
        return -jnp.sum(jax.nn.softmax(others) * jax.nn.log_softmax(logits), axis=-1)

    np.testing.assert_allclose(soft_cross_entropy(student, teacher, blocks), plain(student), rtol=1e-5)
    weights = jnp.asarray(rng.uniform(size=(2, 3)), jnp.float32)
    ours, theirs = (
        jax.grad(lambda s, f=f: jnp.sum(f(s) * weights))(student)
        for f in (lambda s: soft_cross_entropy(s, teacher, blocks), plain)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    slope = jax.grad(lambda t: jnp.sum(soft_cross_entropy(student, t, blocks)))(teacher)
    assert not any(np.any(x) for x in slope)
    # Of a teacher that is sure it is the plain loss.
    labels = jnp.asarray(rng.integers(0, 10, (2, 3)))
    sure = (jax.nn.one_hot(labels, 10) * 1e4, jnp.eye(10), jnp.zeros(10))
    np.testing.assert_allclose(
        soft_cross_entropy(student, sure, blocks), cross_entropy(*student, labels).loss, rtol=1e-5
    )


# --- the model


def test_at_the_base_size_it_has_the_papers_parameters() -> None:
    """By the count of the ViT, BERT with twelve cross-attentions and BERT's head: 223,725,114.

    Ours have CLS, end and mask of captions beside the words' table, and the first place of a reading picture, and not
    the picture's CLS place, which is part of its CLS: three vectors more.
    """
    config = config_lib.default("simla")
    config.data.update(image_size=256, patch_size=16, max_text_tokens=25, tokenizer="scenes")
    config.simla.text_places = 511
    objective = build(config_lib.resolve(config), 30_522)
    params = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0)))
    heads = {"words": params["heads"]["words"]}
    trunk = {name: {k: x for k, x in params[name].items() if k != "projection"} for name in ("image", "text")}
    assert sum(x.size for x in jax.tree.leaves((trunk, heads))) == 223_725_114 + 3 * 768
    others = {"match": 768 * 2 + 2, "keywords": 256 * 30_522 + 30_522, "ids": 768 * 4375 + 4375}
    assert {name: sum(x.size for x in jax.tree.leaves(params["heads"][name])) for name in others} == others
    assert isinstance(objective, Embeds | Matches | Restores | Encodes) and isinstance(objective, Grounds)


def test_a_caption_alone_knows_no_picture_and_one_that_looks_at_it_does() -> None:
    setup, state = setup_of(**WITHOUT_IDS), state_of(**WITHOUT_IDS)
    part, objective = part_of(setup), setup.objective
    other = other_values(part, "image")
    embed, match = jax.jit(objective.embed), jax.jit(objective.match)
    before, after = embed(state.params, part), embed(state.params, other)
    np.testing.assert_array_equal(before["text"], after["text"])
    assert np.abs(before["image"] - after["image"]).max() > 1e-4
    np.testing.assert_allclose(np.linalg.norm(before["text"], axis=1), 1.0, rtol=1e-5)
    assert np.abs(match(state.params, part) - match(state.params, other)).max() > 1e-6
    words = other_values(part, "text", ("visible",))
    assert np.abs(match(state.params, part) - match(state.params, words)).max() > 1e-6


def test_only_what_a_loss_trains_is_offered() -> None:
    offered = {
        "contrast": (Embeds,), "match": (Matches, Grounds), "word": (Restores,), "keyword": (FindsKeywords,),
    }  # fmt: skip
    for loss in offered:
        weights = {f"simla.{name}_weight": float(name == loss) for name in offered}
        objective = small.setup_of("simla", **{**weights, "simla.id_weight": 0.0}).objective
        for name, of in offered.items():
            assert {isinstance(objective, protocol) for protocol in of} == {name == loss}, (loss, name)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = QUANTIZERS["kmeans"]
    setup = small.setup_of("visual_tokenizer", **changes)
    state, _ = setup.train_step()(setup.init_state(), put_batch(batch_of(setup), setup.mesh))
    return saved(tmp_path_factory.mktemp("simla") / "tokenizer", setup, state)


@pytest.fixture(scope="module")
def whole(tokenizer: Path) -> tuple[Setup, Any]:
    setup = setup_of(**{"simla.image_tokenizer": tokenizer, "data.flip": True, "simla.queue": 2 * B})
    return setup, setup.fresh_state()


def test_ids_are_of_the_view_that_is_trained_on_and_gradients_reach_what_they_must(
    whole: tuple[Setup, Any], tokenizer: Path
) -> None:
    setup, state = whole
    part, objective = part_of(setup), setup.objective
    group = fetch(clean(part["groups"]["image"]))
    order = np.argsort(group["position"], axis=1)
    pictures = unpatchify(np.take_along_axis(group["value"], order[..., None], axis=1), 8, (4, 4))
    model: Any = m3ae_jax.load(str(tokenizer))
    ids = model.encode(pictures).reshape(B, 16)
    target = part["groups"]["image"]["target"]
    true = np.asarray(objective._tokenizer.hidden_ids(state.extra["tokenizer"], part["groups"]["image"]))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(true, np.take_along_axis(ids, np.asarray(target["position"]), axis=1))

    def of(params: Any, extra: Any, name: str) -> jax.Array:
        return mean(*objective.loss(params, extra, part, None, jnp.int32(0)).terms[f"{name}_loss"])

    gradient = jax.jit(jax.grad(of, argnums=(0, 1), allow_int=True), static_argnums=2)
    slopes = {name: gradient(state.params, state.extra, name) for name in ("id", "keyword", "word")}
    # The words are reached through what the picture looks at; the picture reads at the places of words.
    text = slopes["id"][0]["text"]
    for name in ("embedding", "position_embedding"):
        leaf = text["text"][name]
        assert np.any(np.asarray(leaf["embedding"] if name == "embedding" else leaf))
    assert np.any(text["first_place"]) and np.any(slopes["id"][0]["image"]["image"]["mask_embedding"])
    # Keywords are predicted of the picture alone.
    assert not any(np.any(x) for x in jax.tree.leaves(slopes["keyword"][0]["text"]))
    assert np.any(slopes["keyword"][0]["heads"]["keywords"]["kernel"])
    for _, of_extra in slopes.values():
        assert not any(np.any(x) for x in jax.tree.leaves(of_extra["teacher"]))
    # The words' output is the table of the words.
    assert np.any(slopes["word"][0]["text"]["text"]["embedding"]["embedding"])


def test_hidden_pixels_change_targets_alone(whole: tuple[Setup, Any]) -> None:
    setup, state = whole
    objective: Any = setup.objective
    part = part_of(setup)
    other = other_values(part, "image", ("target",))

    @jax.jit
    def hidden(part: Any) -> jax.Array:
        words = objective._text(state.params, "words", clean(part["groups"]["text"]), rng=None)
        return objective._masked(state.params, part["groups"]["image"], words, (None,) * 3)

    np.testing.assert_array_equal(hidden(part), hidden(other))
    true = [
        np.asarray(objective._tokenizer.hidden_ids(state.extra["tokenizer"], p["groups"]["image"]))
        for p in (part, other)
    ]
    assert (true[0] != true[1]).any()


def test_what_is_hidden_is_restored_without_sight_of_it(whole: tuple[Setup, Any]) -> None:
    setup, state = whole
    objective: Any = setup.objective
    part, params = part_of(setup), model_params(objective, state.params, state.extra)
    restore = jax.jit(objective.restore)
    before, after = restore(params, part), restore(params, other_values(part, "image", ("target",)))
    np.testing.assert_array_equal(before["text"].loss, after["text"].loss)
    target = part["groups"]["image"]["target"]
    assert before["image"].value.shape == target["value"].shape and before["image"].value.dtype == np.uint8
    # The caption's words are masked for the picture too, and what is visible of both is looked at.
    words = restore(params, other_values(part, "text", ("target",)))
    np.testing.assert_array_equal(before["image"].loss, words["image"].loss)
    for group, restored in (("text", "image"), ("image", "text")):
        changed = restore(params, other_values(part, group, ("visible",)))
        assert not np.allclose(before[restored].loss, changed[restored].loss, atol=1e-6)


def test_the_prediction_of_keywords_sees_no_caption(whole: tuple[Setup, Any]) -> None:
    setup, state = whole
    part = part_of(setup)
    hard = jnp.zeros((B, setup.tokenizer.vocab_size), bool).at[:, 5].set(True)  # type: ignore[union-attr]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(setup.objective), "_keywords", lambda *_: hard)
        figures = [terms_of(loss(setup, state.params, state.extra, p)) for p in (part, other_values(part, "text"))]
    assert figures[0]["keyword_loss"] == pytest.approx(figures[1]["keyword_loss"], rel=1e-6)
    assert figures[0]["word_loss"] != pytest.approx(figures[1]["word_loss"], rel=1e-3)


def test_hard_keywords_are_words_of_the_caption(whole: tuple[Setup, Any]) -> None:
    setup, state = whole
    objective: Any = setup.objective
    groups = part_of(setup)["groups"]
    sets = {name: clean(groups[name]) for name in ("image", "text")}
    outputs = jax.jit(lambda extra: objective._teacher_outputs(extra, groups, sets, None))(state.extra)
    found, text = np.asarray(outputs["keywords"]), sets["text"]
    for row, ids, valid in zip(found, np.asarray(text["value"]), np.asarray(text["valid"]), strict=True):
        assert 1 <= row.sum() <= 5 and set(np.flatnonzero(row)) <= set(ids[valid].tolist())


def test_a_step_with_everything_moves_teacher_and_queue_and_costs_what_is_counted(
    whole: tuple[Setup, Any], tokenizer: Path
) -> None:
    setup, _ = whole
    state, batch = setup.fresh_state(), put_batch(batch_of(setup), setup.mesh)
    before = fetch(state.extra)
    after, figures = setup.train_step()(state, batch)
    extra = fetch(after.extra)
    assert all(np.isfinite(float(x)) for x in jax.tree.leaves(figures))
    assert set(before["teacher"]["heads"]) == {"words", "ids", "keywords"}
    m = np.float32(setup.config.simla.momentum)
    new = {name: fetch(after.params)[name] for name in ("image", "text")}
    for name in ("image", "text"):
        leaves = zip(*map(jax.tree.leaves, (before["teacher"][name], new[name], extra["teacher"][name])), strict=True)
        for old, now, got in leaves:
            np.testing.assert_allclose(got, m * old + (1 - m) * now, rtol=1e-5, atol=1e-7)
    assert int(extra["queue"]["next"]) == B and extra["queue"]["valid"].all()
    for x, y in zip(*map(jax.tree.leaves, (before["tokenizer"], extra["tokenizer"])), strict=True):
        np.testing.assert_array_equal(x, y)
    objective: Any = setup.objective
    counted = flops_per_example(setup.config, setup.tokenizer.vocab_size)  # type: ignore[union-attr]
    assert counted == pytest.approx(sum(objective.products(B).values()), rel=1e-9)


@pytest.mark.parametrize("losses", ["contrast match word keyword", "word"])
def test_albefs_stack_reads_captions_alone_in_its_first_layers_and_costs_what_is_counted(losses: str) -> None:
    weights = {f"simla.{name}_weight": float(name in losses) for name in ("contrast", "match", "word", "id", "keyword")}
    setup = setup_of(**weights, **{"model.depth": 3, "simla.fusion_layer": 2})
    objective: Any = setup.objective
    counted = flops_per_example(setup.config, setup.tokenizer.vocab_size)  # type: ignore[union-attr]
    assert counted == pytest.approx(sum(objective.products(B).values()), rel=1e-9)
    state, part = setup.init_state(), part_of(setup)
    text = state.params["text"]
    lengths = {name: len(text[name]["blocks"]["norm_mlp"]["scale"]) for name in ("lower", "transformer")}
    assert lengths == {"lower": 2, "transformer": 1} and "cross_attention" not in text["lower"]["blocks"]
    alone = {"groups": {"text": part["groups"]["text"]}}
    encode = jax.jit(lambda params: objective.encode(params, alone).pooled["cls"])
    upper = jax.tree.map(lambda x: x + 1.0, text["transformer"])
    moved = {**state.params, "text": {**text, "transformer": upper}}
    np.testing.assert_array_equal(encode(state.params), encode(moved))


def test_without_ids_and_keywords_it_is_albef(whole: tuple[Setup, Any]) -> None:
    setup, state = whole
    part = part_of(setup)
    albef = setup_of(**{"simla.id_weight": 0.0, "simla.keyword_weight": 0.0, "data.flip": True, "simla.queue": 2 * B})
    everything = terms_of(loss(setup, state.params, state.extra, part))
    assert set(everything) == {f"{name}_loss" for name in ("contrast", "match", "word", "id", "keyword")}
    some = terms_of(loss(albef, state.params, state.extra, part))
    assert set(some) == {"contrast_loss", "match_loss", "word_loss"}
    for name, value in some.items():
        assert value == pytest.approx(everything[name], rel=1e-5)


def test_the_teachers_share_grows_in_steps_and_without_it_the_contrast_is_infonce() -> None:
    changes = {**WITHOUT_IDS, "simla.keyword_weight": 0.0, "simla.word_weight": 0.0, "simla.distillation_ramp": 10}
    setup, part = setup_of(**changes), part_of(setup_of(**changes))
    state = setup.init_state()
    noise, objective = jax.random.key(3), cast(Any, setup.objective)
    teacher = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(noise, x.shape), state.extra["teacher"])
    run = jax.jit(lambda step: setup.objective.loss(state.params, {"teacher": teacher}, part, None, step))
    figures = [terms_of(run(jnp.int32(step)))["contrast_loss"] for step in (0, 5, 10, 20)]
    assert figures[2] == figures[3] != figures[0]
    assert figures[1] - figures[0] == pytest.approx((figures[2] - figures[0]) / 2, rel=1e-3)
    of = {k: np.asarray(x, np.float64) for k, x in jax.jit(objective.embed)(state.params, part).items()}
    logits = of["image"] @ of["text"].T / 0.07
    infonce = [np.mean(np.log(np.exp(x).sum(1)) - np.diagonal(x)) for x in (logits, logits.T)]
    assert figures[0] == pytest.approx(np.mean(infonce), rel=1e-4)


def test_faithful_is_their_codes_other_reading() -> None:
    changes = {**WITHOUT_IDS, "model.depth": 1}
    ours, theirs = setup_of(**changes), setup_of(**changes, **{"simla.faithful": True})
    state, part = ours.init_state(), part_of(ours)
    a, b = (terms_of(loss(s, state.params, state.extra, part)) for s in (ours, theirs))
    assert a["contrast_loss"] == pytest.approx(b["contrast_loss"], rel=1e-6)
    assert a["word_loss"] != pytest.approx(b["word_loss"], rel=1e-3)
    # With a key their teacher drops out too.
    sets = {name: clean(part["groups"][name]) for name in ("image", "text")}
    outputs = [
        jax.jit(lambda extra, of=of, k=k: of._teacher_outputs(extra, part["groups"], sets, k))(state.extra)
        for of, k in ((theirs.objective, jax.random.key(0)), (ours.objective, None))
    ]
    assert np.abs(outputs[0]["text_embedding"] - outputs[1]["text_embedding"]).max() > 1e-3


def test_relevance_is_the_gradient_of_the_score_with_respect_to_the_attention() -> None:
    """Against finite differences of the score; none where the score does not depend on it."""
    setup, state = setup_of(**WITHOUT_IDS), state_of(**WITHOUT_IDS)
    objective: Any = setup.objective
    part = part_of(setup)
    from m3ae_jax.models.transformer import Tap

    text, image = (clean(part["groups"][n]) for n in ("text", "image"))
    shape = (B, 2, text["valid"].shape[1] + 2, image["valid"].shape[1] + 1)

    @jax.jit
    def score(delta: jax.Array) -> jax.Array:
        return jnp.sum(objective._score(state.params, part, Tap(1, "context", delta=delta))[0])

    gradient = np.asarray(jax.jit(jax.grad(score))(jnp.zeros(shape)))
    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = jnp.asarray(rng.normal(size=shape), jnp.float32)
        e = 1e-2
        difference = (float(score(e * direction)) - float(score(-e * direction))) / (2 * e)
        assert difference == pytest.approx(float(np.sum(gradient * np.asarray(direction))), rel=2e-2, abs=1e-3)
    map_ = np.asarray(jax.jit(functools.partial(objective.relevance, layer=1))(state.params, part))
    assert map_.shape == (B, 16) and (map_ >= 0).all() and map_.any()
    _, attention = jax.jit(lambda params: objective._score(params, part, Tap(1, "context")))(state.params)
    real = np.concatenate([np.ones((B, 1)), text["valid"], np.ones((B, 1))], axis=1)
    weighted = np.asarray(attention) * np.maximum(gradient, 0) * real[:, None, :, None]
    want = weighted.mean(1).sum(1)[:, 1:] / real.sum(1, keepdims=True)
    order = np.argsort(np.asarray(image["position"]), axis=1)
    np.testing.assert_allclose(map_, np.take_along_axis(want, order, axis=1), rtol=1e-4, atol=1e-8)
    flat = {**state.params, "heads": jax.tree.map(jnp.zeros_like, state.params["heads"])}
    assert not np.any(jax.jit(objective.relevance)(flat, part))


@pytest.mark.slow
def test_eight_pairs_are_learnt_by_heart(tokenizer: Path) -> None:
    changes = {
        "optimizer.learning_rate": 0.1,
        "duration": "400 steps",
        "model.depth": 2,
        "simla.image_tokenizer": tokenizer,
        "simla.text_dropout": 0.0,
        "simla.distillation": 0.0,
    }
    setup = setup_of(**changes)
    step, state = setup.train_step(), setup.fresh_state()
    batch = put_batch(batch_of(setup), setup.mesh)
    for _ in range(300):
        state, figures = step(state, batch)
    assert float(figures["contrast_loss"]) < 0.05 and float(figures["word_loss"]) < 0.05
    assert float(figures["id_loss"]) < 0.1 and float(figures["match_loss"]) < 0.2


def test_stop_words_are_ids_of_the_tokenizer() -> None:
    config = config_of(**{**WITHOUT_IDS, "simla.stop_words": "a red"})
    ids = [int(number) for number in config.simla.stop_ids.split(",")]
    assert len(ids) == 2
    with pytest.raises(UserError, match=r"none of 1 words is one token of data.tokenizer='scenes'"):
        config_of(**{**WITHOUT_IDS, "simla.stop_words": "unpronounceable"})


def test_wrong_fields_are_refused() -> None:
    for changes, line in (
        ({"simla.queue": 12}, "simla.queue=12 is not divisible by batch_size=8"),
        ({"simla.negative_rows": 3}, "batch_size=8 is not divisible by simla.negative_rows=3"),
        ({"simla.text_corruption": "(0.9, 0.3)"}, "two shares whose sum is at most 1"),
        ({"simla.temperature_range": "(0.5, 0.1)"}, "two numbers, the lower one first"),
        ({"data.modalities": "(image,)"}, "lacks 'text'"),
        ({"batch_size": 1}, "the matching needs two rows at least"),
        ({"simla.text_places": 12}, "simla.text_places=12: 16 are needed, for the words and the patches"),
        ({"simla.fusion_layer": 1}, "simla.fusion_layer=1: of the upper stack's 1 layers none would look"),
        (
            {"model.depth": 2, "simla.fusion_layer": 1, "simla.text_from": "bert"},
            "simla.text_from with simla.fusion_layer=1: BERT's layers are not divided; name one",
        ),
        ({"simla.image_tokenizer": "nowhere"}, "simla.image_tokenizer='nowhere' holds no run"),
    ):
        with pytest.raises(UserError, match=re.escape(line)):
            config_of(**changes)
