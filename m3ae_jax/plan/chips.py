"""TPU topologies, as a user writes them."""

from __future__ import annotations

import dataclasses
import math
import re

from m3ae_jax.errors import UserError, one_of
from m3ae_jax.parallel.chips import CHIPS, Chip


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
        """Its chip."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """In all slices; for JAX a chip of every generation here is one device."""
        return math.prod(self.shape) * self.slices

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
    wanted = CHIPS[match[1]].dimensions
    if len(shape) != wanted or not all(shape) or not slices:
        raise UserError(f"--topology={text!r}: a {match[1]} slice has {wanted} axes, each of 1 or more")
    return Topology(match[1], shape, slices)
