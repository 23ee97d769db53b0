"""TPU generations and topologies: what a plan needs to know of them."""

from __future__ import annotations

import dataclasses
import math
import re

from m3ae_jax.errors import UserError, one_of


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, by the vendor's published figures (cloud.google.com/tpu/docs, system architecture, read in 2026).

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


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one shape: ``v5e:4x4``, or two of them ``v5e:4x4*2``.

    Attributes:
        generation: a key of `CHIPS`.
        shape: chips along each axis of a slice.
        slices: how many.
    """

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """The figures of its chip."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """The number of chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """The number of JAX's devices: a chip of every generation here is one device."""
        return self.chips

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}" + (f"*{self.slices}" if self.slices > 1 else "")


def parse(text: str) -> Topology:
    """Reads ``GENERATION:AxB[xC][*SLICES]``.

    Raises:
        UserError: not of this form, or an unknown generation.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)(?:\*(\d+))?", text.strip())
    if not match:
        raise UserError(f"--topology={text!r}: as v5e:4x4, v4:2x2x4, or v5e:16x16*2 for two slices")
    if match[1] not in CHIPS:
        raise UserError(one_of(f"--topology={text!r}: generation", match[1], CHIPS))
    shape, slices = tuple(int(n) for n in match[2].split("x")), int(match[3] or 1)
    dimensions = CHIPS[match[1]].dimensions
    if len(shape) != dimensions or not all(shape) or not slices:
        raise UserError(f"--topology={text!r}: a {match[1]} slice has {dimensions} axes, each of 1 or more")
    return Topology(match[1], shape, slices)
