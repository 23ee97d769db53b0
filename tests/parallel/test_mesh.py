"""The mesh: its sizes, its rules, and where parameters lie under each preset."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from m3ae_jax import config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.models.placement import gather
from m3ae_jax.models.transformer import Transformer, TransformerOptions
from m3ae_jax.objectives.base import build
from m3ae_jax.parallel import mesh as mesh_lib
from m3ae_jax.parallel.mesh import make_mesh, mesh_rules, mesh_shape, param_shardings

VOCABULARY = 30_522


def config(**changes):
    c = config_lib.default()
    config_lib.apply_overrides(c, [(name, str(value)) for name, value in changes.items()])
    return config_lib.resolve(c)


@pytest.mark.parametrize(
    ("changes", "devices", "slices", "shape"),
    [
        ({}, 8, 1, (8, 1, 1)),
        ({}, 1, 1, (1, 1, 1)),
        ({"mesh.fsdp": 4}, 8, 1, (2, 4, 1)),
        ({"mesh.preset": "fsdp"}, 8, 1, (1, 8, 1)),
        ({"mesh.preset": "fsdp"}, 256, 1, (16, 16, 1)),
        ({"mesh.preset": "fsdp"}, 32, 4, (4, 8, 1)),
        ({"mesh.preset": "fsdp"}, 24, 1, (3, 8, 1)),
        ({"mesh.preset": "fsdp", "mesh.data": 2}, 8, 1, (2, 4, 1)),
        ({"mesh.preset": "fsdp", "mesh.fsdp": 256}, 256, 1, (1, 256, 1)),
        ({"mesh.preset": "fsdp_tp"}, 8, 1, (1, 4, 2)),
        ({"mesh.preset": "fsdp_tp", "mesh.tensor": 4, "mesh.data": 2}, 8, 1, (2, 1, 4)),
    ],
)
def test_sizes_follow_preset_and_devices(changes, devices, slices, shape):
    assert mesh_shape(config(**changes), devices, slices) == shape


@pytest.mark.parametrize(
    ("changes", "devices", "slices", "message"),
    [
        ({"mesh.data": 3}, 8, 1, r"data=3 x fsdp=1 x tensor=1 = 3 devices, but there are 8"),
        ({"mesh.fsdp": 16}, 8, 1, r"data=1 x fsdp=16 x tensor=1 = 16 devices, but there are 8"),
        ({"mesh.preset": "fsdp", "mesh.data": 3}, 8, 1, r"data=3 x fsdp=2 x tensor=1 = 6 devices, but there are 8"),
        ({"mesh.preset": "fsdp_tp"}, 1, 1, r"tensor=2 = \d+ devices, but there are 1"),
        ({"mesh.fsdp": 4}, 8, 4, r"data=2 is not divisible by the 4 slices"),
    ],
)
def test_an_impossible_mesh_is_refused_with_its_numbers(changes, devices, slices, message):
    with pytest.raises(UserError, match=message):
        mesh_shape(config(**changes), devices, slices)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("vocab", "'vocab' is not LOGICAL:MESH"),
        ("vocap:tensor", "did you mean 'vocab'"),
        ("vocab:tensors", "did you mean 'tensor'"),
        ("batch:data", "batch"),
    ],
)
def test_a_wrong_rule_is_refused(rules, message):
    with pytest.raises(UserError, match=message):
        mesh_rules(config(**{"mesh.rules": rules}))


def test_rules_change_single_axes():
    rules = mesh_rules(config(**{"mesh.rules": "vocab:tensor,embed:"}))
    assert rules == {**mesh_lib.RULES, "vocab": ("tensor",), "embed": ()}


def boxed(**changes):
    return jax.eval_shape(build(config(**changes), VOCABULARY).init, jax.random.key(0))


@pytest.mark.parametrize("preset", mesh_lib.PRESETS)
def test_shardings_of_each_preset(preset, golden):
    mesh = make_mesh(config(**{"mesh.preset": preset}))
    shardings = param_shardings(boxed(), mesh)
    named = jax.tree_util.tree_leaves_with_path(shardings)
    described = {jax.tree_util.keystr(path, simple=True, separator="/"): str(s.spec) for path, s in named}
    golden(f"shardings_{preset}.json", {"mesh": dict(mesh.shape), "parameters": described})


def test_a_parameter_that_cannot_be_split_is_refused_with_its_numbers():
    changes = {"model.width": 36, "model.heads": 3, "mesh.preset": "fsdp"}
    with pytest.raises(UserError, match=r"36 'embed' entries, not divisible by fsdp=8"):
        param_shardings(boxed(**changes), make_mesh(config(**changes)))
    changes = {"model.heads": 3, "model.width": 48, "mesh.preset": "fsdp_tp"}
    with pytest.raises(UserError, match=r"3 'heads' entries, not divisible by tensor=2"):
        param_shardings(boxed(**changes), make_mesh(config(**changes)))


def test_activations_are_constrained_at_block_boundaries():
    mesh = make_mesh(config(**{"mesh.preset": "fsdp_tp"}))
    model = Transformer(TransformerOptions(width=16, depth=2, heads=2))
    x, valid = jnp.zeros((8, 4, 16)), jnp.ones((8, 4), bool)
    params = nn.unbox(model.init(jax.random.key(0), x, valid))

    def trace():
        return str(jax.make_jaxpr(lambda p: model.apply(p, x, valid))(params))

    assert "sharding_constraint" not in trace()
    with mesh_lib.activations_on(mesh):
        # A block's input, its MLP's hidden channels, and four kernels, first in parts, then gathered.
        assert trace().count("sharding_constraint") == 2 + 4 * 2
        assert "spec=P(('data', 'fsdp'), 'tensor')" in trace()
    assert "sharding_constraint" not in trace()


def test_a_kernel_is_gathered_for_use_and_its_gradient_goes_back_to_the_parts():
    mesh = make_mesh(config(**{"mesh.preset": "fsdp_tp"}))
    kernel = jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))

    @jax.jit
    def both(kernel):
        with mesh_lib.activations_on(mesh):
            whole, transpose = jax.vjp(lambda k: gather(k, "embed", "mlp"), kernel)
            return whole, transpose(whole)[0]

    whole, gradient = both(kernel)
    assert whole.sharding.spec == PartitionSpec(None, "tensor")
    assert gradient.sharding.spec == PartitionSpec("fsdp", "tensor")
    assert np.array_equal(whole, kernel)
    assert np.array_equal(gradient, kernel)
    assert gather(kernel, "embed", "mlp") is kernel  # outside a mesh


def test_the_batch_lies_over_data_and_fsdp():
    mesh = make_mesh(config(**{"mesh.preset": "fsdp_tp"}))
    assert mesh_lib.batch_parts(mesh) == 4
    assert mesh_lib.batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))
    put = mesh_lib.put_batch({"a": jnp.arange(8)}, mesh)["a"]
    assert {s.data.shape for s in put.addressable_shards} == {(2,)}
    assert list(mesh_lib.local_rows(mesh, 8)) == list(range(8))
