"""Operations in closed form, and the roofline."""

import jax
import jax.numpy as jnp
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.plan.chips import parse
from m3ae_jax.plan.compile import Compiled
from m3ae_jax.plan.estimate import estimate, work
from m3ae_jax.plan.flops import matmul_flops
from m3ae_jax.plan.hlo import Collective


def config(**changes):
    c = config_lib.default()
    config_lib.apply_overrides(c, [(name, str(value)) for name, value in changes.items()])
    return config_lib.resolve(c)


def test_products_in_a_loop_count_each_time():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    assert matmul_flops(layers, jnp.zeros((3, 8)), jnp.zeros((5, 8, 8))) == 5 * 2 * 3 * 8 * 8


def by_formula(width, depth, tokens, visible, vocabulary):
    """The paper's model at 224 px: 2 m n k of every product, forward, of one example."""
    patches, seen = 196, 49

    def stack(n, d, layers):
        return layers * (2 * n * 12 * d * d + 2 * 2 * n * n * d)

    encoder, decoder = 1 + seen + visible, 1 + patches + tokens
    heads = 2 * (patches - seen) * 512 * 768 + 2 * (tokens - visible) * 512 * vocabulary
    embed = 2 * seen * 768 * width + 2 * encoder * width * 512
    return stack(encoder, width, depth) + stack(decoder, 512, 8) + heads + embed


@pytest.mark.parametrize(("size", "width", "depth"), [("base", 768, 12), ("huge", 1280, 32)])
def test_flops_per_example_equal_the_formula(size, width, depth):
    got = work(config(**{"model.size": size, "data.image_size": 224}), 30_522)
    assert got.flops_per_example == pytest.approx(3 * by_formula(width, depth, 64, 16, 30_522), rel=1e-6)


def test_remat_and_blocks_repeat_work_but_are_not_asked_for():
    plain = work(config(**{"model.size": "small"}), 30_522)
    full = work(config(**{"model.size": "small", "model.remat": "full", "loss.vocabulary_blocks": 8}), 30_522)
    assert full.flops_per_example == pytest.approx(plain.flops_per_example, rel=0.01)
    assert 1.15 < full.executed_flops / plain.executed_flops < 4 / 3  # the heads are not done twice
    assert plain.executed_flops == pytest.approx(plain.flops_per_example * 4096, rel=0.02)


def test_the_slowest_resource_bounds_the_step():
    need = work(config(**{"model.size": "small", "data.image_size": 224}), 30_522)
    topology = parse("v5e:4x4")
    gathered = Collective("all-gather", False, 1, 4e9)
    compiled = Compiled(fits=True, traffic=int(819e6), collectives=(gathered,))
    found = estimate(need, compiled, topology, 4096, 1000)
    assert found.memory == pytest.approx(1e-3) and found.interconnect == pytest.approx(4e9 / 200e9)
    assert found.compute == pytest.approx(need.executed_flops / 16 / 197e12)
    assert found.bound == "compute" and found.seconds == found.compute
    assert found.mfu == pytest.approx(need.flops_per_example * 4096 / need.executed_flops)
    assert found.examples_per_second == pytest.approx(4096 / found.seconds)
    assert found.chip_hours == pytest.approx(found.seconds * 1000 * 16 / 3600)
    slow = Compiled(fits=True, collectives=(Collective("all-reduce", True, 1, 3.125e9 * 9),))
    assert estimate(need, slow, parse("v5e:4x4*2"), 4096, 1).bound == "network"
