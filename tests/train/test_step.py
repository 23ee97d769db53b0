"""The step: the loss does not depend on devices or padding; nothing is ever NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import build
from m3ae_jax.objectives.batch import batch_loss, total_loss
from m3ae_jax.parallel.mesh import activations_on, make_mesh, mesh_rules, put_batch, replicated
from m3ae_jax.train.optimizer import decay_mask, optimizer, schedule
from m3ae_jax.train.step import (
    TrainState,
    abstract_state,
    check_micro_batches,
    init_state,
    jit_train_step,
    train_step,
)

VOCABULARY = 40


def config(**changes):
    c = config_lib.default()
    c.batch_size = 16
    c.model.width, c.model.depth, c.model.heads = 32, 2, 2
    c.m3ae.decoder_width, c.m3ae.decoder_depth, c.m3ae.decoder_heads = 16, 1, 2
    c.data.image_size, c.data.patch_size, c.data.max_text_tokens = 16, 4, 12
    pairs = [(name, str(value)) for name, value in changes.items()]
    config_lib.apply_overrides(c, pairs)
    return config_lib.resolve(c)


def token_set(rng, rows, slots, total, real, value):
    """`real[b]` random tokens of `total` in `slots` slots."""
    position = np.stack([rng.permutation(total)[:slots] for _ in range(rows)]).astype(np.int32)
    return {"value": value, "position": position, "valid": np.arange(slots) < np.asarray(real)[:, None]}


def batch(rows=16, seed=0, text_lengths=None):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 13, rows) if text_lengths is None else np.asarray(text_lengths)

    def patches(slots):
        return rng.integers(0, 256, (rows, slots, 48), dtype=np.uint8)

    def words(slots):
        return rng.integers(0, VOCABULARY, (rows, slots), dtype=np.int32)

    hidden = (lengths * 3 + 2) // 4
    groups = {
        "image": {
            "visible": token_set(rng, rows, 4, 16, [4] * rows, patches(4)),
            "target": token_set(rng, rows, 12, 16, [12] * rows, patches(12)),
        },
        "text": {
            "visible": token_set(rng, rows, 3, 12, lengths - hidden, words(3)),
            "target": token_set(rng, rows, 9, 12, hidden, words(9)),
        },
    }
    return {"all": {"groups": groups, "example": {"source": np.zeros(rows, np.int32)}}}


def loss(objective, params, data):
    output = batch_loss(objective, params, {}, data, None, jnp.int32(0))
    return total_loss(output.terms, objective.term_weights), output


@functools.cache
def compiled(objective):
    return jax.jit(jax.value_and_grad(functools.partial(loss, objective), has_aux=True))


def loss_and_gradients(objective, params, data):
    (value, _), gradients = compiled(objective)(params, data)
    return value, gradients


def assert_close(a, b, tolerance=1e-5):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        name = jax.tree_util.keystr(path)
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if name.endswith("['qkv']['bias']"):
            # A key's bias shifts all of a query's logits alike: its true gradient is zero.
            assert np.abs(x[:, 1]).max() < 1e-6
            x, y = np.delete(x, 1, axis=1), np.delete(y, 1, axis=1)
        assert np.linalg.norm(x - y) <= tolerance * max(np.linalg.norm(x), 1e-12), name


@functools.cache
def fresh(**changes):
    """The objective of a config, and its parameters on one device; made once for all tests."""
    c = config(**changes)
    objective = build(c, VOCABULARY)
    return objective, init_state(objective, optax.sgd(1.0), make_mesh(devices=jax.devices()[:1]), 0).params


@pytest.mark.slow
def test_loss_is_the_same_on_one_and_eight_devices():
    c = config(**{"optimizer.warmup": "0 steps"})
    objective, data = build(c, VOCABULARY), batch()
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = make_mesh(devices=devices)
        opt = optimizer(c, schedule(c, 10, 100))
        params = jax.device_put(fresh()[1], replicated(mesh))
        state = TrainState(jnp.int32(0), params, opt.init(params), {})
        value, gradients = loss_and_gradients(objective, params, put_batch(data, mesh))
        _, figures = jax.jit(train_step(objective, opt, 0))(state, put_batch(data, mesh))
        results.append((value, gradients, figures["loss"]))
    assert len(jax.devices()) == 8
    assert np.isclose(results[0][0], results[1][0], rtol=1e-5)
    assert np.isclose(results[0][2], results[1][2], rtol=1e-5)
    assert_close(results[0][1], results[1][1])


@pytest.mark.slow
def test_loss_is_the_same_with_more_padding():
    objective, params = fresh()
    data = batch()

    def padded(tokens):
        def more(x, fill):
            width = [(0, 0), (0, 5)] + [(0, 0)] * (x.ndim - 2)
            return np.pad(x, width, constant_values=fill)

        # Garbage in the padding must not matter.
        return {
            "value": more(tokens["value"], 7),
            "position": more(tokens["position"], 3),
            "valid": more(tokens["valid"], 0),
        }

    part = data["all"]
    groups = {name: {kind: padded(t) for kind, t in sets.items()} for name, sets in part["groups"].items()}
    more = {"all": {**part, "groups": groups}}
    value, gradients = loss_and_gradients(objective, params, data)
    value_padded, gradients_padded = loss_and_gradients(objective, params, more)
    assert np.isclose(value, value_padded, rtol=1e-5)
    assert_close(gradients, gradients_padded)


@pytest.mark.slow
def test_text_average_over_tokens_weighs_every_word_the_same():
    objective, params = fresh(**{"m3ae.text_average": "token"})
    data = batch()
    _, output = jax.jit(functools.partial(loss, objective))(params, data)
    term = output.terms["text_loss"]
    assert term[1] == data["all"]["groups"]["text"]["target"]["valid"].sum()


@pytest.mark.slow
def test_an_empty_caption_has_no_text_weight():
    objective, params = fresh()
    lengths = [0, 12, 5, 0] * 4
    (_, output), _ = compiled(objective)(params, batch(text_lengths=lengths))
    assert output.terms["text_loss"][1] == 8
    assert output.terms["image_loss"][1] == 16
    value, gradients = loss_and_gradients(objective, params, batch(text_lengths=[0] * 16))
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert not np.asarray(gradients["decoder"]["text_output"]["output"]["kernel"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["image", "text"])
def test_a_batch_of_one_modality(missing):
    objective, params = fresh()
    data = batch(text_lengths=[12] * 16)
    del data["all"]["groups"][missing]
    value, gradients = loss_and_gradients(objective, params, data)
    assert np.isfinite(value) and value > 0
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradients["encoder"][missing]))


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_model_of_one_modality(modality):
    objective, params = fresh(**{"data.modalities": modality})
    data = batch()
    other = {"image": "text", "text": "image"}[modality]
    del data["all"]["groups"][other]
    assert not any(other in name for group in params.values() for name in group)
    value, _ = jax.jit(functools.partial(loss, objective))(params, data)
    assert np.isfinite(value)


def test_patch_normalised_targets_survive_a_constant_picture():
    grey = {"data.image_mean": "(0.5, 0.5, 0.5)", "data.image_std": "(0.5, 0.5, 0.5)"}
    objective = build(config(**{"m3ae.normalize_patches": "true", **grey}), VOCABULARY)
    data = batch()
    data["all"]["groups"]["image"]["target"]["value"][:] = 255
    target = objective._values(data["all"])["image"]
    assert np.allclose(target, 0.0, atol=1e-3)
    value, _ = jax.jit(functools.partial(loss, objective))(fresh()[1], data)
    assert np.isfinite(value)
    target = np.asarray(objective._values(batch()["all"])["image"])
    assert np.allclose(target.mean(-1), 0, atol=1e-5) and np.allclose(target.std(-1, ddof=1), 1, atol=1e-3)


def test_decay_by_name_and_schedule():
    c = config(**{"optimizer.warmup": "2 steps", "batch_size": "512"})
    mask = decay_mask(fresh()[1], tuple(c.optimizer.no_decay))
    by_name = {
        jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in jax.tree_util.tree_leaves_with_path(mask)
    }
    assert all(value == name.endswith("kernel") for name, value in by_name.items())
    rate = schedule(c, 10, 10**6)
    assert np.allclose([rate(0), rate(1), rate(2)], [0.0, 1.5e-4, 3e-4])
    assert np.isclose(rate(10), 0.0, atol=1e-9)
    assert np.isclose(rate(6), 1.5e-4)
    flat = schedule(config(**{"optimizer.warmup": "0 steps"}), 10, 100)
    assert np.isclose(flat(0), 1.5e-4 * 16 / 256)


def test_abstract_state_is_the_states_shape():
    c = config()
    objective, opt, mesh = build(c, VOCABULARY), optax.adam(1e-3), make_mesh()
    abstract, state = abstract_state(objective, opt, mesh, 0), init_state(objective, opt, mesh, 0)
    described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract)


@pytest.mark.slow
def test_the_step_lowers_the_loss():
    c = config(**{"optimizer.learning_rate": "0.02", "optimizer.warmup": "0 steps"})
    objective, params = fresh()
    opt, data = optimizer(c, schedule(c, 60, 100)), batch()
    state = TrainState(jnp.int32(0), params, opt.init(params), {})
    step = jax.jit(train_step(objective, opt, 0))
    first = None
    for _ in range(30):
        state, figures = step(state, data)
        first = figures if first is None else first
    assert figures["loss"] < 0.8 * first["loss"]
    assert int(state.step) == 30


def trained(devices, steps=5, **changes):
    """Losses and final parameters of `steps` steps on fixed batches."""
    c = config(**{"optimizer.warmup": "0 steps", "optimizer.learning_rate": "0.01", **changes})
    mesh, rules = make_mesh(c, devices), mesh_rules(c)
    objective, opt = build(c, VOCABULARY), optimizer(c, schedule(c, 10, 100))
    abstract = abstract_state(objective, opt, mesh, 0, rules)
    step = jit_train_step(objective, opt, 0, c.micro_batches, abstract, mesh)
    losses = []
    with activations_on(mesh, rules):
        state = init_state(objective, opt, mesh, 0, rules)
        for number in range(steps):
            state, figures = step(state, put_batch(batch(seed=number), mesh))
            losses.append(float(figures["loss"]))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract)
    return losses, jax.device_get(state.params)


@functools.cache
def trained_on_one_device():
    return trained(jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "micro_batches"), [("dp", 1), ("dp", 2), ("fsdp", 1), ("fsdp_tp", 1), ("fsdp_tp", 2)]
)
def test_every_mesh_trains_alike(preset, micro_batches):
    losses, params = trained(jax.devices(), **{"mesh.preset": preset, "micro_batches": micro_batches})
    assert np.allclose(losses, trained_on_one_device()[0], rtol=1e-5)
    assert_params_close(params, trained_on_one_device()[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batches": 16},
        {"compute.remat": "dots"},
        {"compute.remat": "full", "compute.unroll": "true"},
        {"compute.attention_head_groups": 2, "compute.vocabulary_blocks": 3, "compute.remat": "full"},
        {"m3ae.text_average": "token", "micro_batches": 2},
    ],
    ids=str,
)
def test_how_a_step_is_computed_changes_no_number(changes):
    same = {name: value for name, value in changes.items() if name == "m3ae.text_average"}
    losses, params = trained(jax.devices()[:1], **changes)
    want = trained(jax.devices()[:1], **same) if same else trained_on_one_device()
    assert np.allclose(losses, want[0], rtol=1e-5)
    assert_params_close(params, want[1])


def assert_params_close(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jax.tree_util.keystr(path).endswith("['qkv']['bias']"):
            x, y = np.delete(x, 1, axis=1), np.delete(y, 1, axis=1)  # Adam blows up the noise of a zero gradient
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y), path


def test_micro_batches_are_refused_where_examples_are_compared():
    check_micro_batches(fresh()[0], 2)

    class Contrast:
        couples_examples, chunked = True, False

    with pytest.raises(UserError, match="micro_batches=2: the objective Contrast compares the examples"):
        check_micro_batches(Contrast(), 2)


def test_the_first_moment_may_be_half():
    c = config(**{"optimizer.first_moment_dtype": "bfloat16"})
    state = jax.eval_shape(optimizer(c, schedule(c, 10, 100)).init, fresh()[1])
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert dtypes == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
