"""The roofline."""

import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.plan.chips import parse
from m3ae_jax.plan.compile import Compiled
from m3ae_jax.plan.estimate import estimate
from m3ae_jax.plan.hlo import Collective
from m3ae_jax.train.flops import work


def config(**changes):
    c = config_lib.default()
    config_lib.apply_overrides(c, [(name, str(value)) for name, value in changes.items()])
    return config_lib.resolve(c)


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
