"""Visual vocabularies: three quantizers in the loop, pictures to ids and back, and ids as another model's targets."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m3ae_jax
from m3ae_jax.checkpoint.manager import Checkpoints
from m3ae_jax.data.images import unpatchify
from m3ae_jax.errors import UserError
from m3ae_jax.evals.run import check_objective
from m3ae_jax.inference import VisualTokenizer
from m3ae_jax.objectives.base import model_params
from m3ae_jax.objectives.batch import clean
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.train.setup import Setup
from tests.objectives.small import batch_of, config_of, one_device, part_of, setup_of, state_of
from tests.objectives.test_contract import assert_equal, batches_of, trained

QUANTIZERS: dict[str, dict[str, Any]] = {
    "fsq": {"visual_tokenizer.quantizer": "fsq"},
    "vq": {"visual_tokenizer.quantizer": "vq", "visual_tokenizer.codes": 64},
    "kmeans": {"visual_tokenizer.quantizer": "kmeans", "visual_tokenizer.codes": 64},
}
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)
every_codebook = pytest.mark.parametrize("quantizer", ["vq", "kmeans"])


def tokenizer_of(quantizer: str, **changes: Any) -> tuple[Setup, Any]:
    changes = {**QUANTIZERS[quantizer], **changes}
    return setup_of("visual_tokenizer", **changes), state_of("visual_tokenizer", **changes)


def saved(folder: Path, setup: Setup, state: Any) -> Path:
    """A run's folder, as far as others read it."""
    from m3ae_jax.config import to_json

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(to_json(setup.config))
    with contextlib.closing(Checkpoints(folder / "checkpoints", keep=1)) as checkpoints:
        meta = {"config": setup.config.to_dict(), "modalities": setup.modalities(), "tokenizer": ""}
        checkpoints.save(state, {**meta, **setup.identity()}, {})
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fresh tokenizers; codebooks have seen a few batches."""
    folder, found = tmp_path_factory.mktemp("tokenizers"), {}
    for name, changes in QUANTIZERS.items():
        setup = setup_of("visual_tokenizer", **changes)
        state, step = setup.init_state(), setup.train_step()
        for batch in batches_of(setup, 0, 4):
            state, _ = step(state, put_batch(batch, setup.mesh))
        found[name] = saved(folder / name, setup, state)
    return found


# --- in the loop (the contract test is of fsq)


@pytest.mark.slow
@every_codebook
def test_codebooks_of_eight_devices_are_that_of_one(quantizer: str) -> None:
    changes = QUANTIZERS[quantizer]
    (one, alone), (eight, spread) = (
        trained("visual_tokenizer", 3, **changes),
        trained("visual_tokenizer", 3, 8, **changes),
    )
    np.testing.assert_allclose(one, eight, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(fetch(alone.extra)), jax.tree.leaves(fetch(spread.extra)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_codebook
def test_a_run_with_a_codebook_goes_on_bit_equal(quantizer: str, tmp_path: Path) -> None:
    changes = QUANTIZERS[quantizer]
    _, whole = trained("visual_tokenizer", 4, **changes)
    _, half = trained("visual_tokenizer", 2, **changes)
    setup = setup_of("visual_tokenizer", batch_size=16, **changes)
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(half, {}, {})
        checkpoints.wait()
        state = checkpoints.restore(2, setup.abstract_state())
    step = setup.train_step()
    from tests.objectives.test_contract import setup_of as contract_setup

    for batch in batches_of(contract_setup("visual_tokenizer", **changes), 2, 4):
        state, _ = step(state, put_batch(batch, setup.mesh))
    assert_equal(state, whole)


@every_quantizer
def test_the_loss_is_the_formula(quantizer: str) -> None:
    setup, state = tokenizer_of(quantizer)
    objective: Any = setup.objective
    part, params = part_of(setup), model_params(objective, state.params, state.extra)
    output = jax.jit(lambda s: objective.loss(s.params, s.extra, part, None, jnp.int32(0)))(state)
    tokens = clean(part["groups"]["image"])
    painted = np.asarray(jax.jit(objective.restore)(params, part)["image"].value, np.float64)
    total, weight = output.terms["pixel_loss"]
    assert weight == len(painted)
    config = setup.config.data
    true = (np.asarray(tokens["value"], np.float64) / 255 - np.tile(config.image_mean, 64)) / np.tile(
        config.image_std, 64
    )
    seen = (painted / 255 - np.tile(config.image_mean, 64)) / np.tile(config.image_std, 64)
    # What is shown is rounded to 8 bits and cut off at black and white.
    assert np.isclose(total / weight, np.mean((true - seen) ** 2), rtol=0.2)
    psnr = np.mean(10 * np.log10(255**2 / np.mean((painted - np.asarray(tokens["value"])) ** 2, axis=(1, 2))))
    assert np.isclose(output.metrics["psnr"][0] / output.metrics["psnr"][1], psnr, rtol=1e-4)
    smooth = setup_of("visual_tokenizer", **{**QUANTIZERS[quantizer], "visual_tokenizer.pixel_loss": "smooth_l1"})
    total, _ = jax.jit(lambda s: smooth.objective.loss(s.params, s.extra, part, None, jnp.int32(0)))(state).terms[
        "pixel_loss"
    ]
    error = np.abs(true - seen)
    assert np.isclose(total / weight, np.mean(np.where(error < 1, 0.5 * error**2, error - 0.5)), rtol=0.2)


def test_a_perceptual_loss_is_of_another_runs_encoder_and_is_zero_for_the_picture_itself(tmp_path: Path) -> None:
    judge = setup_of("m3ae", **{"m3ae.decoder_width": 16, "m3ae.decoder_depth": 1, "m3ae.decoder_heads": 2})
    run = saved(tmp_path / "judge", judge, judge.init_state())
    changes = {"visual_tokenizer.perceptual_weight": 0.5, "visual_tokenizer.perceptual_from": run}
    setup = setup_of("visual_tokenizer", **changes)
    objective: Any = setup.objective
    state, part = setup.fresh_state(), part_of(setup)
    assert_equal(state.extra["judge"]["encoder"]["image"], judge.init_state().params["encoder"]["image"])
    tokens = {k: jnp.asarray(x) for k, x in clean(part["groups"]["image"]).items()}
    from m3ae_jax.objectives.parts.pixels import normalize_pixels

    itself = objective._perceived(state.extra, normalize_pixels(tokens["value"], setup.config), tokens)
    np.testing.assert_allclose(itself, 0.0, atol=1e-5)
    other = objective._perceived(state.extra, jnp.zeros((8, 16, 192)), tokens)
    assert float(other.mean()) > 1e-3
    gradient = jax.grad(
        lambda e: jnp.sum(objective.loss(state.params, e, part, None, jnp.int32(0)).terms["perceptual_loss"][0])
    )
    assert all(not np.any(x) for x in jax.tree.leaves(gradient(state.extra)["judge"]))
    with pytest.raises(UserError, match=r"perceptual_from='nowhere' holds no run"):
        config_of("visual_tokenizer", **{**changes, "visual_tokenizer.perceptual_from": "nowhere"})
    with pytest.raises(UserError, match=r"perceptual_from.*is not used"):
        config_of("visual_tokenizer", **{**changes, "visual_tokenizer.perceptual_weight": 0.0})


# --- pictures to ids, and back


@every_quantizer
def test_what_is_loaded_encodes_pictures_of_any_kind_and_decodes_its_ids(quantizer: str, runs: dict[str, Path]) -> None:
    from PIL import Image

    model = m3ae_jax.load(str(runs[quantizer]))
    assert isinstance(model, VisualTokenizer)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    ids = model.encode(pictures)
    assert ids.shape == (3, 4, 4) and ids.dtype == np.int32 and 0 <= ids.min() <= ids.max() < model.codes
    np.testing.assert_array_equal(ids, model.encode([Image.fromarray(x) for x in pictures]))
    np.testing.assert_array_equal(ids[:1], model.encode(pictures[0]))
    assert model.encode(np.zeros((40, 50), np.uint8)).shape == (1, 4, 4)
    painted = model.decode(ids)
    assert painted.shape == (3, 32, 32, 3) and painted.dtype == np.uint8
    np.testing.assert_array_equal(model.decode(ids[1])[0], painted[1])
    for wrong, message in (
        (ids + model.codes, f"ids are from 0 to {model.codes - 1}"),
        (ids[:, :3], r"shape \[N, 4, 4\]"),
        (ids * 1.0, "whole numbers"),
    ):
        with pytest.raises(UserError, match=message):
            model.decode(wrong)
    assert model.decode(ids[:0]).shape == (0, 32, 32, 3)


def test_ids_of_k_means_survive_their_picture(runs: dict[str, Path]) -> None:
    model: Any = m3ae_jax.load(str(runs["kmeans"]))
    pictures = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    ids = model.encode(pictures)
    used = model.encode(model.decode(ids))
    # Codes that are no pictures (outside black and white) or fall together in 8 bits may change.
    assert np.mean(used == ids) > 0.9


@pytest.mark.slow
def test_ids_of_a_trained_vocabulary_come_back() -> None:
    """An id of a picture that was made of ids is the same one far more often than by chance, and than untrained."""
    setup, fresh = tokenizer_of("fsq", **{"visual_tokenizer.levels": "(4, 4, 4)", "duration": "300 steps"})
    objective: Any = setup.objective
    state, step = fresh, setup.train_step()
    state = setup.init_state()
    stream = setup.train_batches(0)
    for _ in range(300):
        state, _ = step(state, put_batch(next(stream), setup.mesh))
    stream.close()
    tokens = clean(part_of(setup)["groups"]["image"])

    @jax.jit
    def agreement(params: Any) -> jax.Array:
        ids = objective.ids(params, tokens)
        painted = objective.pixels(params, ids, tokens["position"])
        return jnp.mean(objective.ids(params, {**tokens, "value": painted}) == ids)

    before, after = float(agreement(fresh.params)), float(agreement(state.params))
    assert after > max(0.5, 2 * before), (before, after)


def test_a_flipped_picture_has_the_flipped_ids_of_codes_that_are_colours() -> None:
    setup, _ = tokenizer_of("kmeans")
    objective: Any = setup.objective
    colours = jax.random.normal(jax.random.key(0), (64, 3))
    params = {"codebook": {"codes": jnp.tile(colours, (1, 64)), "hits": jnp.ones(64)}}
    tokens = clean(part_of(setup)["groups"]["image"])
    order = np.argsort(np.asarray(tokens["position"]), axis=1)
    value = np.take_along_axis(np.asarray(tokens["value"]), order[..., None], axis=1)
    pictures = unpatchify(value, 8, (4, 4))

    def grid(pictures: np.ndarray) -> np.ndarray:
        from m3ae_jax.data.images import patchify

        patches = patchify(np.ascontiguousarray(pictures), 8)
        position = np.broadcast_to(np.arange(16), patches.shape[:2])
        ids = objective.ids(params, {"value": jnp.asarray(patches), "position": position, "valid": position >= 0})
        return np.asarray(ids).reshape(-1, 4, 4)

    assert len(np.unique(grid(pictures))) > 3
    np.testing.assert_array_equal(grid(pictures[:, :, ::-1]), grid(pictures)[:, :, ::-1])


# --- ids as targets


def m3ae_of(run: Path, **changes: Any) -> Setup:
    decoder = {"m3ae.decoder_width": 16, "m3ae.decoder_depth": 1, "m3ae.decoder_heads": 2}
    ids = {"m3ae.image_target": "ids", "m3ae.image_tokenizer": run}
    return setup_of("m3ae", **{**decoder, **ids, **changes})


@every_quantizer
def test_targets_are_the_ids_of_exactly_the_crop_and_flip_that_the_encoder_sees(
    quantizer: str, runs: dict[str, Path]
) -> None:
    crops = {"data.flip": True, "data.crop_scale": "(0.3, 1.0)"}
    setup = m3ae_of(runs[quantizer], **crops)
    objective: Any = setup.objective
    state, part = setup.fresh_state(), part_of(setup)
    params = model_params(objective, state.params, state.extra)
    sets = objective._with_ids(params, part)["groups"]["image"]
    whole = fetch(clean(sets))
    order = np.argsort(whole["position"], axis=1)
    pictures = unpatchify(np.take_along_axis(whole["value"], order[..., None], axis=1), 8, (4, 4))
    model: Any = m3ae_jax.load(str(runs[quantizer]))
    ids = np.take_along_axis(whole["ids"], order, axis=1).reshape(-1, 4, 4)
    np.testing.assert_array_equal(ids, model.encode(pictures))
    # The loss is the cross-entropy of these ids, and what is restored are pixels that they stand for.
    restored = jax.jit(objective.restore)(params, part)["image"]
    assert restored.value.dtype == np.uint8 and restored.value.shape == sets["target"]["value"].shape
    output = jax.jit(lambda s: objective.loss(s.params, s.extra, part, None, jnp.int32(0)))(state)
    total, weight = output.terms["image_loss"]
    assert np.isclose(total / weight, np.mean(restored.loss), rtol=1e-5)
    assert np.log(model.codes) * 0.8 < total / weight < np.log(model.codes) * 1.3
    assert objective.prior([part], [part])["image_loss"] == np.log(model.codes)


def test_a_tokenizer_is_computed_as_it_was_trained_whatever_the_run_says(
    runs: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """So nothing warns of other pixels or another activation."""
    other = {"data.image_mean": "(0.1,0.2,0.3)", "model.activation": "gelu"}
    setup = m3ae_of(runs["fsq"], **other)
    with caplog.at_level("WARNING", logger="m3ae_jax"):
        setup.fresh_state()
    assert not [record.getMessage() for record in caplog.records]


def test_mamo_restores_the_ids_of_what_it_does_not_see(runs: dict[str, Path]) -> None:
    alone = {f"mamo.{name}_weight": 0.0 for name in ("contrast", "match", "word", "latent")}
    ids = {"mamo.image_target": "ids", "mamo.image_tokenizer": runs["vq"]}
    setup = setup_of("mamo", **{**alone, **ids, "data.flip": True})
    objective: Any = setup.objective
    state, part = setup.fresh_state(), part_of(setup)
    group = part["groups"]["image"]
    true = objective._tokenizer.hidden_ids(state.extra["tokenizer"], group)
    whole = fetch(clean(group))
    order = np.argsort(whole["position"], axis=1)
    pictures = unpatchify(np.take_along_axis(whole["value"], order[..., None], axis=1), 8, (4, 4))
    model: Any = m3ae_jax.load(str(runs["vq"]))
    seen = model.encode(pictures).reshape(len(order), -1)
    np.testing.assert_array_equal(true, np.take_along_axis(seen, np.asarray(group["target"]["position"]), axis=1))
    assert "teacher" not in state.extra
    after, figures = setup.train_step()(state, put_batch(batch_of(setup), setup.mesh))
    assert set(objective.term_weights) == {"feature_loss"} and 0.0 <= float(figures["id_accuracy"]) <= 1.0
    assert np.log(model.codes) * 0.7 < float(figures["feature_loss"]) < np.log(model.codes) * 1.5
    assert_equal(fetch(after.extra["tokenizer"]), fetch(setup.fresh_state().extra["tokenizer"]))


def test_evaluations_of_captions_are_refused_where_none_are_read() -> None:
    setup = setup_of("visual_tokenizer", **{"data.modalities": "(image,text)", "evals": "masked_prediction"})
    with pytest.raises(UserError, match=r"does not read pictures with captions, .*; with it there are codebook"):
        check_objective(setup)
    zero = {"simla.id_weight": 0.0, "simla.keyword_weight": 0.0, "evals": "keywords"}
    with pytest.raises(UserError, match=r"needs \(simla.id_weight=0, simla.keyword_weight=0\); with it there are"):
        check_objective(setup_of("simla", **zero))


def test_a_run_needs_its_tokenizer_at_the_start_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "tokenizer"
    shutil.copytree(runs["kmeans"], run)
    setup = m3ae_of(run)
    state, batch = setup.fresh_state(), batch_of(setup)
    state, _ = setup.train_step()(state, put_batch(batch, setup.mesh))
    state = fetch(state)
    folder = saved(tmp_path / "run", setup, state)
    shutil.rmtree(run)
    from m3ae_jax.config import load, resolve

    again = one_device(resolve(load(str(folder / "config.json"))))
    with contextlib.closing(Checkpoints(folder / "checkpoints", keep=1, read_only=True)) as checkpoints:
        restored = checkpoints.restore(1, again.abstract_state())
    assert_equal(restored.extra, state.extra)
    # Neither does a model that is loaded, which paints what it restores.
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    assert m3ae_jax.load(str(folder)).reconstruct(images).images.shape == images.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m3ae.image_tokenizer": "nowhere"}, "image_tokenizer='nowhere' holds no run"),
        ({"m3ae.image_target": "pixels"}, "m3ae.image_tokenizer='.*' is not used without m3ae.image"),
        ({"m3ae.normalize_patches": True}, "image_target='ids'"),
        ({"data.modalities": "('text',)"}, "image_target='ids'"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(
    changes: dict[str, Any], message: str, runs: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=message):
        m3ae_of(runs["fsq"], **changes)


def test_without_a_tokenizer_a_run_is_planned_but_does_not_begin() -> None:
    setup = m3ae_of(Path(), **{"m3ae.image_tokenizer": ""})
    assert setup.abstract_state().extra["tokenizer"]
    with pytest.raises(UserError, match=r"m3ae.image_tokenizer is empty: name a run of 'visual_tokenizer'"):
        setup.fresh_state()


def test_pictures_that_are_cut_otherwise_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"data.patch_size=4: m3ae.image_tokenizer=.* was trained with 8; set data",
    ):
        m3ae_of(runs["fsq"], **{"data.patch_size": 4})
    with pytest.raises(UserError, match=r"data.image_size=48: m3ae.image_tokenizer=.* was trained with 32"):
        m3ae_of(runs["fsq"], **{"data.image_size": 48})
    assert m3ae_of(runs["kmeans"], **{"data.image_size": 48}).objective.groups[0].spec(1)
    other = setup_of("contrastive")
    run = saved(tmp_path / "other", other, other.init_state())
    with pytest.raises(UserError, match="is a run of 'contrastive', not of 'visual_tokenizer'"):
        m3ae_of(run)
