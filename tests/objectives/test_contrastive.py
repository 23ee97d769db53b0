"""CLIP and SigLIP as objectives: against formulas in NumPy, in chunks, from other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3ae_jax.checkpoint.manager import Checkpoints
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import pool
from m3ae_jax.objectives.batch import mean
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.train.setup import Setup
from tests.objectives.small import B, batch_of, config_of, part_of, setup_of


def logits_of(setup: Setup, params: Any, part: Any) -> np.ndarray:
    of = {name: np.asarray(x, np.float64) for name, x in setup.objective.embed(params, part).items()}
    for x in of.values():
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, rtol=1e-5)
    return of["image"] @ of["text"].T


def loss_of(setup: Setup, params: Any, part: Any) -> float:
    return float(mean(*setup.objective.loss(params, {}, part, None, jnp.int32(0)).terms["contrast_loss"]))


def infonce(logits: np.ndarray) -> np.ndarray:
    return np.log(np.exp(logits).sum(1)) - np.diagonal(logits)


def test_softmax_is_the_infonce_of_both_directions() -> None:
    setup = setup_of("contrastive")
    params, part = fetch(setup.init_state().params), part_of(setup)
    logits = logits_of(setup, params, part) / 0.07
    want = 0.5 * (infonce(logits).mean() + infonce(logits.T).mean())
    assert np.isclose(loss_of(setup, params, part), want, rtol=1e-5)


def test_sigmoid_is_each_pairs_logistic_loss_at_siglips_start() -> None:
    setup = setup_of("contrastive", **{"contrastive.loss": "sigmoid"})
    params, part = fetch(setup.init_state().params), part_of(setup)
    assert np.isclose(params["contrast"]["scale"], np.log(10)) and params["contrast"]["bias"] == -10
    logits = 10 * logits_of(setup, params, part) - 10
    sign = np.where(np.eye(B), 1.0, -1.0)
    want = np.log1p(np.exp(-sign * logits)).sum(1).mean()
    assert np.isclose(loss_of(setup, params, part), want, rtol=1e-5)


@pytest.mark.parametrize("positives", ["picture", "picture_or_caption"])
def test_equal_pictures_and_equal_captions_are_positives(positives: str) -> None:
    setup = setup_of("contrastive", **{"contrastive.positives": positives})
    params, part = fetch(setup.init_state().params), part_of(setup)
    example = {**part["example"]}
    example["image_id"] = np.array([1, 1, 2, 3, 4, 5, 6, 7], np.int32)
    example["caption_id"] = np.array([1, 2, 3, 3, 4, 5, 6, 7], np.int32)
    right = np.eye(B, dtype=bool)
    right[:2, :2] = True
    if positives == "picture_or_caption":
        right[2:4, 2:4] = True
    logits = logits_of(setup, params, part) / 0.07
    both = []
    for x in (logits, logits.T):
        log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
        both.append(-(log_p * right).sum(1) / right.sum(1))
    assert np.isclose(loss_of(setup, params, {**part, "example": example}), np.mean(both), rtol=1e-5)


def test_an_example_without_a_caption_is_neither_positive_nor_negative() -> None:
    setup = setup_of("contrastive")
    params, part = fetch(setup.init_state().params), part_of(setup)
    text = jax.tree.map(np.array, part["groups"]["text"])
    text["visible"]["valid"][5:] = False
    without = {**part, "groups": {**part["groups"], "text": text}}
    fewer = jax.tree.map(lambda x: x[:5], part)
    assert np.isclose(loss_of(setup, params, without), loss_of(setup, params, fewer), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_micro_batches_embed_in_chunks_and_compare_the_whole_batch(loss: str) -> None:
    figures: dict[int, list[float]] = {1: [], 4: []}
    for micro_batches, losses in figures.items():
        setup = setup_of("contrastive", **{"contrastive.loss": loss, "micro_batches": micro_batches})
        state = setup.init_state()
        for _ in range(3):
            state, metrics = setup.train_step()(state, put_batch(batch_of(setup), setup.mesh))
            losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(figures[1], figures[4], rtol=1e-5)


def test_towers_of_different_sizes_are_pooled_side_by_side() -> None:
    setup = setup_of(
        "contrastive", **{"contrastive.text_width": 16, "contrastive.text_depth": 2, "contrastive.pooling": "mean"}
    )
    params, part = fetch(setup.init_state().params), part_of(setup)
    groups = {name: {**group} for name, group in part["groups"].items()}
    features = pool(setup.objective.encode(params, part), groups)
    assert features["cls"].shape == (B, 48) and features["mean"].shape == (B, 48)
    assert params["text"]["transformer"]["blocks"]["mlp_in"]["kernel"].shape == (2, 16, 64)
    assert np.isfinite(loss_of(setup, params, part))


@pytest.mark.parametrize("objective", ["contrastive", "mamo"])
def test_the_pictures_tower_starts_from_an_m3ae_run(
    objective: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = setup_of("m3ae", **{"m3ae.decoder_width": 16, "m3ae.decoder_heads": 2, "m3ae.decoder_depth": 1, "seed": 5})
    before = source.init_state()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(before, {"config": source.config.to_dict(), "modalities": source.modalities()}, {})
    checkpoints.close()
    setup = setup_of(objective, **{f"{objective}.image_from": str(tmp_path), "model.activation": "gelu"})
    with caplog.at_level("WARNING", "m3ae_jax"):
        state, fresh = fetch(setup.fresh_state()), fetch(setup.init_state())
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "m3ae_jax"]
    assert warning.endswith("its weights were trained with model.activation=gelu_tanh, which here is gelu")
    encoder = fetch(before.params["encoder"])
    np.testing.assert_array_equal(state.params["image"]["cls_token"], encoder["cls_token"])
    for a, b in zip(*(jax.tree.leaves(tree["transformer"]) for tree in (state.params["image"], encoder)), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(*(jax.tree.leaves(one.params["text"]) for one in (state, fresh)), strict=True):
        np.testing.assert_array_equal(a, b)
    if objective == "mamo":  # the teacher is the student that was loaded
        np.testing.assert_array_equal(state.extra["teacher"]["image"]["cls_token"], encoder["cls_token"])


@pytest.mark.parametrize("objective", ["contrastive", "mamo"])
def test_the_captions_tower_starts_from_the_first_layers_of_a_bert(objective: str, tmp_path: Path) -> None:
    bert = {
        "data.modalities": "(text,)",
        "m3ae.layout": "bert",
        "model.depth": 3,
        "data.max_text_tokens": 24,
        "seed": 5,
    }
    decoder = {"m3ae.decoder_width": 16, "m3ae.decoder_heads": 2, "m3ae.decoder_depth": 1}
    source = setup_of("m3ae", **bert, **decoder)
    before = source.init_state()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(before, {"config": source.config.to_dict(), "modalities": source.modalities()}, {})
    checkpoints.close()
    names = {f"{objective}.text_layout": "bert", f"{objective}.text_from": str(tmp_path), f"{objective}.text_depth": 2}
    text, encoder = fetch(setup_of(objective, **names).fresh_state().params["text"]), fetch(before.params["encoder"])
    for a, b in zip(*(jax.tree.leaves(tree["transformer"]) for tree in (text, encoder)), strict=True):
        np.testing.assert_array_equal(a, b[:2])
    np.testing.assert_array_equal(text["other_token"], encoder["other_token"])
    np.testing.assert_array_equal(text["text"]["position_embedding"], encoder["text"]["position_embedding"][:17])
    np.testing.assert_array_equal(text["text"]["embedding"]["embedding"], encoder["text"]["embedding"]["embedding"])


@pytest.mark.parametrize(("image", "text"), [("clip", "clip"), ("siglip", "siglip"), ("plain", "bert")])
def test_the_layouts_of_published_models_train(image: str, text: str) -> None:
    layouts = {"contrastive.image_layout": image, "contrastive.text_layout": text, "contrastive.embedding_width": 32}
    setup = setup_of("contrastive", **layouts)
    params, part = fetch(setup.init_state().params), part_of(setup)
    assert ("norm" in params["text"]["transformer"]) == (text != "bert")
    assert ("projection" in params["image"]) == (image != "siglip")
    gradients = jax.jit(jax.grad(lambda p: setup.objective.loss(p, {}, part, None, 0).terms["contrast_loss"][0]))(
        params
    )
    nothing = [path for path, g in jax.tree_util.tree_leaves_with_path(gradients) if not np.any(g)]
    assert not nothing, [jax.tree_util.keystr(path) for path in nothing]


def test_what_cannot_be_compared_is_refused() -> None:
    setup = setup_of("contrastive")
    part = part_of(setup)
    alone = {**part, "groups": {"image": part["groups"]["image"]}}
    with pytest.raises(UserError, match=r"a part of the data .* has no text"):
        loss_of(setup, fetch(setup.init_state().params), alone)
    for changes, line in (
        ({"data.modalities": "(text,)"}, "lacks 'image': objective='contrastive' compares pictures with captions"),
        ({"contrastive.temperature_range": "(0.2, 0.5)"}, "contrastive.temperature=0.07 is outside"),
        ({"contrastive.temperature": 0.7}, "is outside contrastive.temperature_range"),
        ({"contrastive.temperature_range": "(0.5,)"}, "two numbers, the lower one first"),
        ({"contrastive.text_width": 30}, "contrastive.text_width=30 is not divisible by"),
        ({"contrastive.text_layout": "clip", "contrastive.pooling": "mean"}, "text_layout='clip' has its own summary"),
        ({"contrastive.image_layout": "siglip"}, "embedding_width=256: with contrastive.image_layout='siglip'"),
        ({"contrastive.image_layout": "bert"}, "is not one of clip, plain, siglip"),
        ({"batch_size": 1}, "batch_size=1: contrastive compares the rows of a batch"),
        ({"data.modalities": "(image,audio)"}, "a non-empty choice of 'image' and 'text'"),
        ({"model.width": 36, "model.heads": 5}, "model.width=36 is not divisible by model.heads=5"),
        ({"contrastive.embedding_width": 0}, "contrastive.embedding_width=0 is not from 1 on"),
        ({"mamo.queue": 4}, "--config.mamo.queue: there are such fields with --config.objective=mamo alone"),
    ):
        with pytest.raises(UserError, match=line):
            config_of("contrastive", **changes)
