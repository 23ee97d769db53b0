"""What MAMO promises beyond the contract of all objectives (`test_contract`)."""

from __future__ import annotations

import functools
import re
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from ml_collections import ConfigDict

import m3ae_jax.config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.evals.run import run
from m3ae_jax.objectives.base import Embeds, LossOutput, Matches, Restores
from m3ae_jax.objectives.batch import batch_loss, clean, mean
from m3ae_jax.objectives.mamo import MAMO
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.train.flops import step_flops
from m3ae_jax.train.setup import Setup
from tests.objectives import small
from tests.objectives.small import B, batch_of, part_of

config_of, setup_of, state_of = (
    functools.partial(f, "mamo") for f in (small.config_of, small.setup_of, small.state_of)
)
NO_PAIRS = {"mamo.contrast_weight": 0, "mamo.match_weight": 0}


def loss(setup: Setup, params: Any, extra: Any, part: Any, rng: Any = None) -> LossOutput:
    return setup.objective.loss(params, extra, part, rng, jnp.int32(0))


def terms_of(output: LossOutput) -> dict[str, float]:
    return {name: float(mean(*term)) for name, term in output.terms.items()}


def test_a_fresh_teacher_is_the_student_without_heads_and_the_optimizer_knows_none_of_it() -> None:
    state = state_of()
    assert set(state.extra) == {"teacher"} and set(state.extra["teacher"]) == {"image", "text", "fusion"}
    student = {name: state.params[name] for name in state.extra["teacher"]}
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), fetch(student), fetch(state.extra["teacher"])))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len([x for x in jax.tree.leaves(state.params) if x.ndim])


def test_the_teacher_follows_after_the_optimizer_leaf_by_leaf() -> None:
    setup = setup_of(**{"mamo.momentum": 0.9, "mamo.momentum_start": 0.9})
    before = setup.init_state()
    old = fetch(before.extra["teacher"])
    after, _ = setup.train_step()(before, put_batch(batch_of(setup), setup.mesh))
    new = fetch({name: after.params[name] for name in old})
    for o, n, got in zip(*map(jax.tree.leaves, (old, new, fetch(after.extra["teacher"]))), strict=True):
        np.testing.assert_allclose(got, np.float32(0.9) * o + np.float32(0.1) * n, rtol=1e-5, atol=1e-7)


def test_no_loss_has_a_gradient_for_the_teacher_or_the_queue() -> None:
    changes = {"mamo.queue": 2 * B, "mamo.distillation": 0.4}
    setup, state = setup_of(**changes), state_of(**changes)
    part = part_of(setup)
    inexact = {"teacher": state.extra["teacher"], "queue": {k: state.extra["queue"][k] for k in ("image", "text")}}

    def total(extra: Any) -> jax.Array:
        queue = {**state.extra["queue"], **extra["queue"]}
        output = loss(setup, state.params, {"teacher": extra["teacher"], "queue": queue}, part)
        return sum(mean(*term) for term in output.terms.values())

    slopes = jax.jit(jax.grad(total))(inexact)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(slopes["teacher"]))
    # Keys of the queue are constants for the student: their gradient exists in this derivative alone.
    assert jax.tree.structure(slopes["queue"]) == jax.tree.structure(inexact["queue"])


def test_the_queue_holds_the_teachers_embeddings_of_the_batch_after_a_step() -> None:
    changes = {"mamo.queue": 2 * B}
    setup = setup_of(**changes)
    state = setup.init_state()
    assert not np.asarray(fetch(state.extra["queue"]["id"])).any()
    batch = batch_of(setup)
    (part,) = batch.values()
    want = setup.objective.embed({**fetch(state.params), **fetch(state.extra["teacher"])}, part)
    after, _ = setup.train_step()(state, put_batch(batch, setup.mesh))
    queue = fetch(after.extra["queue"])
    assert int(queue["next"]) == B
    np.testing.assert_array_equal(queue["id"], [*part["example"]["image_id"], *[0] * B])
    for name in ("image", "text"):
        np.testing.assert_allclose(queue[name][:B], want[name], atol=1e-5)


def test_targets_are_the_same_whatever_the_students_dropout() -> None:
    changes = {"model.dropout": 0.5}
    setup, state = setup_of(**changes), state_of(**changes)
    part = part_of(setup)
    run = jax.jit(lambda key: loss(setup, state.params, state.extra, part, key))
    a, b = run(jax.random.key(1)), run(jax.random.key(2))
    assert terms_of(a) != terms_of(b)
    monitors = [name for name in a.metrics if "/" in name]
    assert len(monitors) == 9
    for name in monitors:
        assert float(a.metrics[name][0]) == float(b.metrics[name][0])


def test_hidden_pixels_change_the_targets_and_nothing_that_the_student_sees_of_the_masked_picture() -> None:
    setup, state = setup_of(**NO_PAIRS), state_of(**NO_PAIRS)
    objective: Any = setup.objective
    part = part_of(setup)
    image = part["groups"]["image"]
    other = {**image, "target": {**image["target"], "value": 255 - image["target"]["value"]}}
    changed = {**part, "groups": {**part["groups"], "image": other}}

    def of(part: Any) -> tuple[Any, Any]:
        groups = part["groups"]
        sets = {name: clean(group) for name, group in groups.items()}
        student = objective._encoded(state.params, sets, None)
        passes = objective._masked_sequences(state.params, student, groups, sets, None)
        fused = objective._fused(state.params, {"masked_picture": passes["masked_picture"]}, None)
        return fused, objective._teacher_outputs(state.extra, sets)

    (seen, targets), (seen_changed, targets_changed) = map(jax.jit(of), (part, changed))
    np.testing.assert_array_equal(seen["masked_picture"], seen_changed["masked_picture"])
    for name in ("fused", "image"):
        assert not np.allclose(targets[name], targets_changed[name], atol=1e-3)


def test_mrm_regresses_fused_latents_and_mim_the_picture_towers() -> None:
    setup, state = setup_of(**NO_PAIRS), state_of(**NO_PAIRS)
    part = part_of(setup)
    teacher = dict(state.extra["teacher"])
    teacher["text"] = jax.tree.map(lambda x: x + 0.3, teacher["text"])
    run = jax.jit(lambda teacher: loss(setup, state.params, {"teacher": teacher}, part))
    before, after = terms_of(run(state.extra["teacher"])), terms_of(run(teacher))
    assert before["feature_loss"] == after["feature_loss"] and before["word_loss"] == after["word_loss"]
    assert before["latent_image_loss"] != after["latent_image_loss"]
    assert before["latent_text_loss"] != after["latent_text_loss"]


def test_without_mrm_and_mim_it_is_albefs_loss_without_a_teacher() -> None:
    changes = {"mamo.latent_weight": 0, "mamo.feature_weight": 0}
    setup, state = setup_of(**changes), state_of(**changes)
    assert state.extra == {}
    assert set(setup.objective.term_weights) == {"contrast_loss", "match_loss", "word_loss"}
    output = loss(setup, state.params, {}, part_of(setup))
    assert set(output.terms) == set(setup.objective.term_weights)
    assert float(output.terms["match_loss"][1]) == 3 * B and float(output.terms["contrast_loss"][1]) == B


def test_its_numbers_without_mrm_and_mim_are_albefs() -> None:
    """Of two pairs, whose negatives are each other: by what it can do for anybody, and NumPy."""
    changes = {
        "batch_size": 2, "mamo.latent_weight": 0, "mamo.feature_weight": 0, "mamo.text_corruption": "(1.0, 0.0)",
    }  # fmt: skip
    setup, state = setup_of(**changes), state_of(**changes)
    objective: Any = setup.objective
    part, params = part_of(setup), fetch(state.params)
    assert len(set(part["example"]["image_id"].tolist())) == len(set(part["example"]["caption_id"].tolist())) == 2
    got = terms_of(jax.jit(functools.partial(loss, setup))(params, state.extra, part))

    embedded = fetch(jax.jit(objective.embed)(params, part))
    logits = np.float64(embedded["image"]) @ np.float64(embedded["text"]).T / 0.07
    rows, columns = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (logits, logits.T))
    assert got["contrast_loss"] == pytest.approx(-0.5 * (np.trace(rows) + np.trace(columns)) / 2, rel=1e-5)

    def match(image: slice, text: slice) -> np.ndarray:
        groups = {"image": image, "text": text}
        mixed = {name: jax.tree.map(itemgetter(groups[name]), of) for name, of in part["groups"].items()}
        return np.float64(objective.match(params, {"groups": mixed}))

    same, other = slice(None), slice(None, None, -1)
    losses = [np.log1p(np.exp(-match(same, same))), np.log1p(np.exp(match(other, same)))]
    losses.append(np.log1p(np.exp(match(same, other))))
    assert got["match_loss"] == pytest.approx(np.mean(losses), rel=1e-5)

    image = part["groups"]["image"]
    whole = {n: np.concatenate([image["visible"][n], image["target"][n]], axis=1) for n in image["visible"]}
    groups = {"image": {"visible": whole, "target": {n: x[:, :0] for n, x in whole.items()}}}
    words = jax.jit(objective.restore)(params, {"groups": {**groups, "text": part["groups"]["text"]}})["text"]
    hidden = part["groups"]["text"]["target"]["valid"]
    assert got["word_loss"] == pytest.approx(np.asarray(words.loss)[hidden].mean(), rel=1e-5)
    assert set(got) == {"contrast_loss", "match_loss", "word_loss"} and set(objective.term_weights.values()) == {1.0}


@pytest.mark.parametrize(
    ("weights", "terms", "can"),
    [
        ("latent", {"latent_image_loss", "latent_text_loss"}, (False, False, False)),
        ("word", {"word_loss"}, (False, False, True)),
        ("contrast,match", {"contrast_loss", "match_loss"}, (True, True, False)),
    ],
)
def test_what_has_no_weight_is_neither_computed_nor_offered(weights: str, terms: set[str], can: Any) -> None:
    off = {f"mamo.{name}_weight": 0 for name in ("contrast", "match", "word", "latent", "feature")}
    changes = off | {f"mamo.{name}_weight": 1 for name in weights.split(",")}
    objective = setup_of(**changes).objective
    assert set(objective.term_weights) == terms
    assert tuple(isinstance(objective, kind) for kind in (Embeds, Matches, Restores)) == can
    with pytest.raises(UserError, match="all weights are 0"):
        config_of(**off)


@pytest.mark.parametrize("missing", ["image", "text"])
def test_of_one_modality_alone_the_terms_that_need_no_pair_are_left(missing: str) -> None:
    setup, state = setup_of(), state_of()
    part = part_of(setup)
    groups = {name: group for name, group in part["groups"].items() if name != missing}
    output = loss(setup, state.params, state.extra, {**part, "groups": groups})
    want = {"image": {"word_loss", "latent_text_loss"}, "text": {"feature_loss", "latent_image_loss"}}[missing]
    assert set(output.terms) == want and all(np.isfinite(v) for v in terms_of(output).values())


def test_clusters_are_a_target_that_is_used_evenly() -> None:
    changes = NO_PAIRS | {"mamo.latent_target": "clusters", "mamo.clusters": 8}
    setup, state = setup_of(**changes), state_of(**changes)
    output = loss(setup, state.params, state.extra, part_of(setup))
    figures = terms_of(output)
    assert {"cluster_loss", "latent_image_loss"} <= set(figures) and all(np.isfinite(v) for v in figures.values())
    slope = jax.jit(
        jax.grad(lambda p: mean(*loss(setup, p, state.extra, part_of(setup)).terms["cluster_loss"]))
    )(state.params)  # fmt: skip
    assert np.asarray(slope["heads"]["clusters"]["kernel"]).any()
    assert not any(np.asarray(x).any() for name in ("image", "text", "fusion") for x in jax.tree.leaves(slope[name]))


def test_blocks_and_pixels_are_options() -> None:
    changes = NO_PAIRS | {"mamo.image_mask": "blocks", "mamo.image_target": "pixels", "mamo.latent_weight": 0}
    setup, state = setup_of(**changes), state_of(**changes)
    assert state.extra == {}
    assert set(terms_of(loss(setup, state.params, {}, part_of(setup)))) == {"feature_loss", "word_loss"}


def layer(tokens: int, width: int) -> int:
    """Products of one layer, multiply and add, of one example."""
    return 2 * tokens * width * width * (4 + 2 * 4) + 2 * 2 * tokens * tokens * width


def counted(setup: Setup, **changes: Any) -> float:
    """Operations of an example by the traced program."""
    state, part = state_of(**changes), part_of(setup)

    def total(params: Any, extra: Any) -> Any:
        output = batch_loss(setup.objective, params, extra, {"pairs": part}, jax.random.key(0), jnp.int32(0))
        return sum(term for term, _ in output.terms.values())

    return step_flops(total, state.params, state.extra) / B


def test_the_step_costs_what_its_terms_do() -> None:
    """Closed form by hand: towers, five fusion passes, heads; the teacher once, and forward alone."""
    setup = setup_of()
    config, part = setup.config, part_of(setup)
    assert setup.tokenizer is not None
    d, e, vocabulary, f = 32, config.mamo.embedding_width, setup.tokenizer.vocab_size, 3 * 8 * 8
    sets = {name: {s: x["valid"].shape[1] for s, x in group.items()} for name, group in part["groups"].items()}
    n, length = (sum(sets[name].values()) for name in ("image", "text"))
    visible, k, words = sets["image"]["visible"], sets["image"]["target"], sets["text"]["target"]
    fused = layer(1 + n + length, d)

    def image(tokens: int) -> int:
        return 2 * tokens * f * d + layer(1 + tokens, d)

    text = layer(1 + length, d)
    student = image(n) + image(visible) + 2 * text + 5 * fused
    projections, contrast = 2 * 2 * d * e, 2 * 2 * B * e  # of each example, as all others
    heads = 3 * 2 * d * 2 + 2 * words * (d * d + d * vocabulary) + 2 * (2 * k + words) * (4 * d * d + 4 * d * d)
    teacher = image(n) + text + fused
    negatives, monitors = 2 * 2 * B * e, 2 * (2 * k + words) * d * d
    want = 3 * (student + projections + contrast + heads) + teacher + negatives + monitors
    parts = setup.objective.products(B)
    assert counted(setup) == sum(parts.values()) == want
    assert parts["teacher"] == teacher and parts["5 fusion passes"] == 15 * fused


def shapes_in(program: Any) -> set[tuple[int, ...]]:
    """Of everything that a traced program makes, loops and calls within it too."""
    shapes = {out.aval.shape for equation in program.eqns for out in equation.outvars}
    for equation in program.eqns:
        for inner in jaxprs_in_params(equation.params):
            shapes |= shapes_in(inner)
    return shapes


def test_two_examples_have_a_number_and_never_tokens() -> None:
    rows = 13  # no other size of the model
    setup, state = setup_of(batch_size=rows), state_of(batch_size=rows)
    part = part_of(setup)

    def total(params: Any) -> jax.Array:
        output = loss(setup, params, state.extra, part, jax.random.key(0))
        return sum(mean(*term) for term in output.terms.values())

    shapes = shapes_in(jax.make_jaxpr(jax.grad(total))(state.params).jaxpr)
    assert (rows, rows) in shapes
    assert [shape for shape in shapes if shape.count(rows) > 1 and np.prod(shape) > rows * rows] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"mamo.queue": 2 * B, "mamo.distillation": 0.4, "mamo.negative_rows": 4},
        {"mamo.latent_weight": 0, "mamo.feature_weight": 0},
        {"mamo.latent_target": "clusters", "mamo.clusters": 8, "compute.unroll": False},
        {"mamo.image_target": "pixels", "mamo.match_weight": 0, "mamo.latent_weight": 0},
        {"mamo.image_target": "ids", "mamo.word_weight": 0},
        {"mamo.contrast_weight": 0, "mamo.match_weight": 0, "mamo.word_weight": 0},
        {"mamo.text_depth": 2, "mamo.fusion_depth": 3, "model.mlp_ratio": 2.0, "mamo.image_mask": "blocks"},
    ],
)
def test_whatever_is_asked_the_parts_of_a_step_add_up_to_the_traced_program(changes: Any) -> None:
    setup = setup_of(**changes)
    assert counted(setup, **changes) == sum(setup.objective.products(B).values())


def test_words_are_restored_without_sight_of_hidden_patches_and_words() -> None:
    setup, state = setup_of(), state_of()
    part = part_of(setup)
    restore = jax.jit(setup.objective.restore)
    groups = {
        name: {**group, "target": {**group["target"], "value": group["target"]["value"] * 0 + 3}}
        for name, group in part["groups"].items()
    }
    before, after = restore(state.params, part), restore(state.params, {**part, "groups": groups})
    np.testing.assert_array_equal(before["text"].value, after["text"].value)
    image = part["groups"]["image"]
    other = {**image, "visible": {**image["visible"], "value": 255 - image["visible"]["value"]}}
    seen = restore(state.params, {**part, "groups": {**part["groups"], "image": other}})
    assert not np.allclose(seen["text"].loss, before["text"].loss)


@pytest.mark.slow
def test_eight_pairs_are_learnt_by_heart() -> None:
    setup = setup_of(**{"optimizer.learning_rate": 0.1, "duration": "400 steps", "model.depth": 2})
    step, state = setup.train_step(), setup.init_state()
    batch = put_batch(batch_of(setup), setup.mesh)
    for _ in range(300):
        state, figures = step(state, batch)
    assert float(figures["contrast_loss"]) < 0.05 and float(figures["word_loss"]) < 0.05
    assert float(figures["match_loss"]) < 0.1


def test_wrong_fields_are_refused() -> None:
    for changes, line in (
        ({"mamo.queue": 12}, "mamo.queue=12 is not divisible by batch_size=8"),
        ({"mamo.negative_rows": 3}, "batch_size=8 is not divisible by mamo.negative_rows=3"),
        ({"mamo.text_corruption": "(0.9, 0.3)"}, "two shares whose sum is at most 1"),
        ({"mamo.temperature_range": "(0.5, 0.1)"}, "two numbers, the lower one first"),
        ({"data.modalities": "(image,)"}, "lacks 'text'"),
        ({"batch_size": 1}, "the matching needs two rows at least"),
        ({"mamo.momentum_start": 0.5}, "mamo.momentum_start=0.5 is not used: set mamo.momentum_ramp"),
        (
            {"mamo.contrast_weight": 0, "mamo.queue": 16},
            "mamo.queue=16 is not used without contrast (mamo.contrast_weight=0)",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(line)):
            config_of(**changes)
    config_of(**{"batch_size": 1, "mamo.match_weight": 0})


def test_rows_without_a_partner_are_no_negatives_of_later_steps() -> None:
    """Captions that are missing have one embedding, which would fill the queue."""
    setup = setup_of(**{"mamo.queue": 2 * B, "mamo.distillation": 0.4})
    part = part_of(setup)
    text = part["groups"]["text"]
    lone = np.arange(B) % 2 == 1
    sets = {name: {**x, "valid": x["valid"] & ~lone[:, None]} for name, x in text.items()}
    alone = {**part, "groups": {**part["groups"], "text": sets}}
    state, step = setup.init_state(), setup.train_step()
    state, _ = step(state, put_batch({"train": alone}, setup.mesh))
    queue = fetch(state.extra["queue"])
    np.testing.assert_array_equal(queue["valid"], [*~lone, *[True] * B])

    # What such places hold changes no loss.
    def contrast(extra: Any) -> float:
        return terms_of(jax.jit(lambda e: loss(setup, state.params, e, part))(extra))["contrast_loss"]

    noise = {name: queue[name] + 9.0 * ~queue["valid"][:, None] for name in ("image", "text")}
    other = {**state.extra, "queue": {**queue, **noise}}
    assert contrast(other) == pytest.approx(contrast(state.extra), rel=1e-6)


def test_masked_prediction_is_of_what_it_restores() -> None:
    setup = setup_of(**{"eval.pairs": B, "eval.batch_size": B})
    figures = run("masked_prediction", setup, setup.init_state()).scalars
    assert figures and all(name.startswith("masked_prediction/text/") for name in figures)


def test_a_queue_takes_pairs_alone() -> None:
    config = config_lib.load("configs/mixture.py")
    mixture = {name: spec.to_dict() for name, spec in config.data.mixture.items()}
    wanted = config_of().copy_and_resolve_references()
    wanted.data.mixture = ConfigDict(mixture)
    wanted.mamo.queue = 2 * B
    with pytest.raises(UserError, match=r"mamo\.queue=16: the queue takes batches of pairs alone"):
        MAMO.Fields.check(wanted, "mamo")
