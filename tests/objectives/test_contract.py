"""What holds for every objective: a new one gets its tests by being in `OBJECTIVES`."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m3ae_jax.config as config_lib
import m3ae_jax.objectives.base as bases
from m3ae_jax.checkpoint.manager import Checkpoints
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import Attends, Encodes, Itemizes, Load, Objective, Prior, Restores
from m3ae_jax.objectives.batch import abstract_part, batch_loss, total_loss
from m3ae_jax.parallel.mesh import fetch, make_mesh, put_batch
from m3ae_jax.plan.chips import parse
from m3ae_jax.plan.compile import compile_step, for_tpu
from m3ae_jax.train import setup as setups
from m3ae_jax.train.flops import flops_per_example, matmul_flops
from m3ae_jax.train.guard import WINDOW, Guard
from m3ae_jax.train.setup import Setup, prepare
from m3ae_jax.train.step import TrainState, train_step

TOY = "tests.objectives.toy:Toy"
OBJECTIVES = ("m3ae", "contrastive", "mamo", "simla", "visual_tokenizer", TOY)

every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def config_of(name: str, **changes: Any) -> Any:
    config = config_lib.default(name)
    config.batch_size, config.duration, config.optimizer.warmup = 16, "8 steps", "0 steps"
    config.optimizer.learning_rate = 0.02
    config.data.update(image_size=32, patch_size=8, max_text_tokens=16, tokenizer="scenes", flip=False)
    config.data.scenes.update(image_size=32)
    config.data.train.source = config.data.val.source = "scenes"
    config.model.update(width=32, depth=1, heads=2)
    if name == "simla":
        config.simla.id_weight = 0.0  # test_simla has a tokenizer
    if name in ("mamo", "simla"):
        # The keys' biases have no gradient but rounding's, of which Adam makes whole steps.
        config.optimizer.learning_rate = 0.002
    if name == "m3ae":
        config.m3ae.update(decoder_width=32, decoder_depth=1, decoder_heads=2)
    config_lib.apply_overrides(config, [(field, str(value)) for field, value in changes.items()])
    return config_lib.resolve(config)


@functools.cache
def setup_of(name: str, devices: int = 1, **changes: Any) -> Setup:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setups, "make_mesh", lambda config: make_mesh(config, jax.devices()[:devices]))
        return prepare(config_of(name, **changes))


@functools.cache
def step_of(name: str, devices: int = 1, **changes: Any) -> Any:
    return setup_of(name, devices, **changes).train_step()


def batches_of(setup: Setup, start: int, stop: int) -> list[Any]:
    stream = setup.train_batches(start)
    batches = [next(stream) for _ in range(start, stop)]
    stream.close()
    return batches


def trained(name: str, steps: int, devices: int = 1, **changes: Any) -> tuple[list[float], TrainState]:
    setup, step = setup_of(name, devices, **changes), step_of(name, devices, **changes)
    state, losses = setup.init_state(), []
    for batch in batches_of(setup, 0, steps):
        state, figures = step(state, put_batch(batch, setup.mesh))
        losses.append(float(figures["loss"]))
    return losses, state


def assert_equal(a: Any, b: Any) -> None:
    """Bit for bit."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(fetch(a)), jax.tree.leaves(fetch(b)), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def loss_of(objective: Objective, state: TrainState, batch: Any, rng: jax.Array | None = None) -> jax.Array:
    output = batch_loss(objective, state.params, state.extra, batch, rng, state.step)
    return total_loss(output.terms, objective.term_weights)


# --- the state


@every_objective
def test_a_fresh_state_is_as_described_and_every_leaf_has_a_buffer_of_its_own(name: str) -> None:
    setup = setup_of(name, 8, **{"mesh.preset": "fsdp"})
    state, abstract = setup.init_state(), setup.abstract_state()
    described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract)
    leaves = jax.tree.leaves((state.params, state.extra))
    buffers = [leaf.addressable_shards[0].data.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(buffers)) == len(buffers)
    assert all(leaf.dtype != jnp.int64 for leaf in jax.tree.leaves(state))


def test_the_state_beside_the_parameters_lies_where_its_own_axes_say() -> None:
    state = setup_of(TOY, 8, **{"mesh.preset": "fsdp"}).init_state()
    split = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.extra)
    }
    assert split["teacher/kernel"] == state.params["encoder"]["kernel"].sharding.spec
    assert "fsdp" in split["teacher/kernel"] and "fsdp" in split["queue"]
    # Its path ends as a parameter's, and it has another shape and other axes.
    assert split["frozen/kernel"][0] == "fsdp" and not any(split["usage"])


@pytest.mark.slow
@every_objective
def test_a_run_starts_from_the_weights_of_another(name: str, tmp_path: Path) -> None:
    _, before = trained(name, 2)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    setup = setup_of(name)
    checkpoints.save(before, {"config": setup.config.to_dict(), "modalities": setup.modalities()}, {})
    checkpoints.close()
    fresh = setup_of(name, 8, **{"mesh.preset": "fsdp", "init_from": str(tmp_path)})
    state = fresh.fresh_state()
    assert_equal(state.params, before.params)
    if name == TOY:
        assert_equal(state.extra["teacher"], before.params["encoder"])
    described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), fresh.abstract_state())
    # Nothing of it is donated twice.
    state, figures = fresh.train_step()(state, put_batch(batches_of(fresh, 0, 1)[0], fresh.mesh))
    assert np.isfinite(float(figures["loss"]))


def test_a_checkpoint_goes_into_a_part_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(TOY)
    _, before = trained(TOY, 2)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(before, {"config": {}, "modalities": []}, {})
    checkpoints.close()
    load = Load(str(tmp_path), into="extra/teacher", source="encoder", complete=True)
    monkeypatch.setattr(setup.objective, "loads", lambda: (load,), raising=False)
    state = setup.fresh_state()
    assert_equal(state.extra["teacher"], before.params["encoder"])
    assert_equal(state.params, setup.init_state().params)
    wrong = dataclasses.replace(load, into="extra/frozen")
    monkeypatch.setattr(setup.objective, "loads", lambda: (wrong,), raising=False)
    with pytest.raises(UserError, match=r"extra|frozen"):
        setup.fresh_state()


# --- the step


@pytest.mark.slow
@every_objective
@pytest.mark.parametrize("preset", ["dp", "fsdp"])
def test_eight_devices_train_as_one(name: str, preset: str) -> None:
    (one, alone), (eight, spread) = trained(name, 3), trained(name, 3, 8, **{"mesh.preset": preset})
    np.testing.assert_allclose(one, eight, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(fetch(alone.extra)), jax.tree.leaves(fetch(spread.extra)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_objective
def test_a_run_that_goes_on_ends_bit_equal(name: str, tmp_path: Path) -> None:
    setup, step = setup_of(name), step_of(name)
    _, whole = trained(name, 4)
    _, half = trained(name, 2)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(half, {}, {})
    checkpoints.wait()
    state = checkpoints.restore(2, setup.abstract_state())
    checkpoints.close()
    for batch in batches_of(setup, 2, 4):
        state, _ = step(state, put_batch(batch, setup.mesh))
    assert_equal(state, whole)


@every_objective
def test_a_skipped_step_changes_nothing_but_its_count(name: str) -> None:
    setup, step = setup_of(name), step_of(name)
    state = setup.init_state()
    # All losses before were minus one, so any other is a spike.
    spiked = Guard(jnp.full(WINDOW, -1.0), jnp.int32(WINDOW), jnp.int32(0), jnp.int32(0))
    state = dataclasses.replace(state, guard=spiked)
    before = fetch(state)
    after, figures = step(state, put_batch(batches_of(setup, 0, 1)[0], setup.mesh))
    assert int(figures["skipped"]) and int(after.step) == 1 and int(after.guard.skipped) == 1
    assert_equal((after.params, after.opt_state, after.extra), (before.params, before.opt_state, before.extra))


@pytest.mark.slow
@every_objective
def test_a_batch_is_cut_into_micro_batches_or_refused(name: str) -> None:
    setup = setup_of(name)
    if setup.objective.couples_examples and not setup.objective.chunked:
        with pytest.raises(UserError, match=r"micro_batches=2: the objective \w+ compares the examples"):
            train_step(setup.objective, setup.optimizer, 0, micro_batches=2)
        with pytest.raises(UserError, match="micro_batches=2"):
            prepare(config_of(name, micro_batches=2))
        return
    one, cut = trained(name, 2)[0], trained(name, 2, micro_batches=2)[0]
    np.testing.assert_allclose(one, cut, rtol=1e-5)


def test_sums_and_rows_of_micro_batches_are_those_of_the_whole() -> None:
    setup = setup_of(TOY)

    class Uncoupled(type(setup.objective)):  # type: ignore[misc]
        couples_examples = False

    objective = Uncoupled(setup.config, 0)
    batch, state = batches_of(setup, 0, 1)[0], setup.init_state()
    whole, _ = jax.jit(train_step(objective, setup.optimizer, 0))(state, batch)
    cut, _ = jax.jit(train_step(objective, setup.optimizer, 0, micro_batches=4))(state, batch)
    assert float(whole.extra["usage"].sum()) == setup.config.batch_size
    np.testing.assert_array_equal(whole.extra["usage"], cut.extra["usage"])
    np.testing.assert_allclose(whole.extra["queue"], cut.extra["queue"], atol=1e-6)


@every_objective
def test_padding_and_its_content_change_no_loss(name: str) -> None:
    setup, state = setup_of(name), setup_of(name).init_state()
    ((part_name, part),) = batches_of(setup, 0, 1)[0].items()

    def padded(tokens: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        def more(x: np.ndarray, fill: int) -> np.ndarray:
            return np.pad(x, [(0, 0), (0, 3), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)

        fill = {"value": 7, "input": 5, "position": 3, "valid": 0}
        return {name: more(x, fill[name]) for name, x in tokens.items()}

    groups = {g: {s: padded(tokens) for s, tokens in sets.items()} for g, sets in part["groups"].items()}
    loss = jax.jit(functools.partial(loss_of, setup.objective))
    plain, more = (float(loss(state, {part_name: p})) for p in (part, {**part, "groups": groups}))
    assert np.isfinite(plain) and np.isclose(plain, more, rtol=1e-5)


@every_objective
def test_the_loss_is_deterministic_without_a_key_and_nothing_in_a_batch_is_wide(name: str) -> None:
    setup, state = setup_of(name), setup_of(name).init_state()
    batch = batches_of(setup, 0, 1)[0]
    assert all(np.asarray(leaf).dtype.itemsize <= 4 for leaf in jax.tree.leaves(batch))
    for part_name, part in batch.items():
        (data_part,) = [p for p in setup.train_data.parts if p.name == part_name]
        groups = [group for group in setup.objective.groups if group.restricted(data_part.modalities)]
        described = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_part(groups, data_part.size))
        assert jax.tree.map(lambda x: (x.shape, np.asarray(x).dtype), part) == described
    loss = jax.jit(functools.partial(loss_of, setup.objective))
    assert float(loss(state, batch)) == float(loss(state, batch))


# --- what it costs


@every_objective
def test_operations_are_counted_three_times_forward_but_for_what_has_no_gradient(name: str) -> None:
    config = config_of(name)
    vocabulary = setup_of(name).tokenizer.vocab_size
    objective, rows = setup_of(name).objective, config.batch_size
    params = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0)))
    extra = jax.eval_shape(lambda: nn.unbox(objective.init_extra(objective.init(jax.random.key(0)), jax.random.key(0))))
    batch = {"image": abstract_part(objective.groups, rows)}
    forward = matmul_flops(
        lambda p, e, b: batch_loss(objective, p, e, b, None, jnp.int32(0)).terms, params, extra, batch
    )
    counted = flops_per_example(config, vocabulary) * rows
    if isinstance(objective, Itemizes):
        assert counted == rows * sum(objective.products(rows).values())
        return
    if name != TOY:
        assert counted == 3 * forward
        return
    features, width, codes = 3 * 8 * 8, config.toy.width, 8
    student = 2 * rows * features * width + 2 * rows * width * (rows + config.toy.queue)
    teacher = 2 * rows * features * width + 2 * rows * width * codes
    assert forward == student + teacher and counted == 3 * student + teacher


@pytest.mark.slow
@every_objective
def test_it_is_planned(name: str) -> None:
    pytest.importorskip("libtpu")
    config = for_tpu(config_of(name, batch_size=64, **{"mesh.preset": "fsdp"}))
    compiled = compile_step(config, 64, parse("v5e:2x4"))
    assert compiled.fits and compiled.arguments > 0


# --- what it can do besides


@every_objective
def test_what_it_can_do_does_what_its_protocol_says(name: str) -> None:
    setup, state = setup_of(name), setup_of(name).init_state()
    objective, batch = setup.objective, batches_of(setup, 0, 1)[0]
    (part,) = batch.values()
    rows = setup.config.batch_size
    if isinstance(objective, Encodes):
        encoded = jax.eval_shape(objective.encode, state.params, part)
        assert all(x.shape[0] == rows and x.ndim == 2 for x in encoded.pooled.values())
        for group, tokens in encoded.tokens.items():
            assert tokens.shape[:2] == part["groups"][group]["visible"]["valid"].shape
    if isinstance(objective, Restores):
        for group, restored in jax.jit(objective.restore)(state.params, part).items():
            target = part["groups"][group]["target"]
            assert restored.value.shape == target["value"].shape and restored.value.dtype == target["value"].dtype
            assert restored.loss.shape == target["valid"].shape and np.isfinite(restored.loss).all()
            if restored.correct is not None:
                np.testing.assert_array_equal(restored.correct, restored.value == target["value"])
    if isinstance(objective, Attends):
        weights = jax.jit(objective.attention)(state.params, part)
        for query in weights.values():
            total = sum(x.sum(-1) for x in query.values())
            np.testing.assert_allclose(total, 1.0, rtol=1e-5)
    if isinstance(objective, Prior):
        figures = objective.prior([part], [part])
        assert set(figures) == set(objective.term_weights) and all(np.isfinite(v) for v in figures.values())


@every_objective
def test_its_views_hide_what_is_asked_for_and_leave_out_what_is_not_given(name: str) -> None:
    objective = setup_of(name).objective
    for group in objective.view(("image", "text")):
        spec = group.spec(2)
        assert spec["target"]["valid"].shape == (2, 0)
        assert spec["visible"]["valid"].shape == (2, sum(m.tokens for m in group.modalities))
    assert objective.view(("sound",)) == ()
    (image,) = objective.view(("image",), {"image": 0.5})
    assert image.spec(1)["target"]["valid"].shape == (1, 8)


class Unfinished(Objective):
    """It forgot its loss and what it gives weight to."""

    def init(self, rng: jax.Array) -> Any:
        return {}


def test_an_objective_that_lacks_a_part_of_the_contract_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("m3ae")
    monkeypatch.setattr(bases, "objective_class", lambda name: Unfinished)
    with pytest.raises(UserError, match="lacks loss, view, see"):
        bases.build(config, 0)
    monkeypatch.setattr(bases, "objective_class", lambda name: len)
    with pytest.raises(UserError, match="lacks couples_examples, chunked, alarms, model_extra, stacks, init"):
        bases.build(config, 0)
