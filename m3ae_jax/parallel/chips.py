"""Accelerators by the figures that their vendors publish."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip (cloud.google.com/tpu/docs, system architecture, read in 2026).

    Attributes:
        hbm: bytes.
        flops: bfloat16 operations per second.
        hbm_bandwidth: bytes per second.
        ici_bandwidth: bytes per second into one chip, over all its links to others of its slice.
        clock: cycles per second of a core; from `flops` over the products that its matrix units do in a cycle.
        dcn_bandwidth: bytes per second into one chip from other slices; 100 Gbit/s a host of four chips is assumed.
        dimensions: axes of a slice.
    """

    hbm: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    clock: float
    dcn_bandwidth: float = 3.125e9
    dimensions: int = 2


_GIB = 2**30
CHIPS = {
    "v4": Chip(32 * _GIB, 275e12, 1228e9, 300e9, 1.05e9, dimensions=3),
    "v5e": Chip(16 * _GIB, 197e12, 819e9, 200e9, 1.5e9),
    "v5p": Chip(95 * _GIB, 459e12, 2765e9, 600e9, 1.75e9, dimensions=3),
    "v6e": Chip(32 * _GIB, 918e12, 1640e9, 448e9, 1.75e9),
}
_PEAKS = (
    # Name of the device as JAX gives it, and its bfloat16 operations per second by the vendor's data sheet (dense).
    (r"TPU v4", CHIPS["v4"].flops),
    (r"TPU v5 ?(lite|e)", CHIPS["v5e"].flops),
    (r"TPU v5p?", CHIPS["v5p"].flops),
    (r"TPU v6 ?(lite|e)", CHIPS["v6e"].flops),
    (r"NVIDIA (H100|H200|GH200)(?!.*(PCIe|NVL)).*", 989.4e12),
    (r"NVIDIA A100.*", 312e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Published bfloat16 operations per second of one device; None if it is not in the table."""
    return next((flops for pattern, flops in _PEAKS if re.fullmatch(pattern, device_kind)), None)
