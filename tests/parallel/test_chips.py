"""Devices by the names that JAX gives them."""

import pytest

from m3ae_jax.parallel.chips import CHIPS, peak_flops


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v4", CHIPS["v4"].flops),
        ("TPU v5 lite", CHIPS["v5e"].flops),
        ("TPU v5e", CHIPS["v5e"].flops),
        ("TPU v5", CHIPS["v5p"].flops),
        ("TPU v5p", CHIPS["v5p"].flops),
        ("TPU v6 lite", CHIPS["v6e"].flops),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_peak_of_a_device(kind, flops):
    assert peak_flops(kind) == flops
