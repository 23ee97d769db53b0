"""Topologies as a user writes them."""

import pytest

from m3ae_jax.errors import UserError
from m3ae_jax.plan.chips import parse


@pytest.mark.parametrize(("text", "chips"), [("v5e:4x4", 16), ("v5e:4x4*2", 32), ("v4:2x2x4", 16), ("v6e:16x16", 256)])
def test_a_topology_reads_back(text, chips):
    topology = parse(text)
    assert str(topology) == text and topology.chips == chips


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e", "as v5e:4x4"),
        ("v5f:4x4", "did you mean 'v5"),
        ("v4:4x4", "a v4 slice has 3 axes"),
        ("v5e:0x4", "each of 1 or more"),
        ("v5e:4x4*0", "each of 1 or more"),
    ],
)
def test_a_wrong_topology_is_one_line(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)
