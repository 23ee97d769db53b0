"""From what the compiler says to what a run takes: step time and its bound, chip-hours. Estimates, not measurements."""

from __future__ import annotations

import dataclasses

from m3ae_jax.plan.chips import Topology
from m3ae_jax.plan.compile import Compiled
from m3ae_jax.train.flops import Work


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A roofline: the step takes as long as its slowest resource, all others hidden behind it.

    Attributes:
        compute: seconds at the chip's peak.
        memory: seconds at the HBM's bandwidth.
        interconnect: seconds at the bandwidth to the slice's other chips.
        network: seconds at the bandwidth to other slices.
        mfu: model FLOPs (without what remat repeats) over what the chips could do in that time: an upper bound.
        examples_per_second: of all chips.
        chip_hours: of the configured duration.
    """

    compute: float
    memory: float
    interconnect: float
    network: float
    mfu: float
    examples_per_second: float
    chip_hours: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return max(self.terms.values())

    @property
    def bound(self) -> str:
        """The slowest resource."""
        return max(self.terms, key=self.terms.__getitem__)

    @property
    def terms(self) -> dict[str, float]:
        """Seconds by resource."""
        return {
            "compute": self.compute,
            "HBM": self.memory,
            "interconnect": self.interconnect,
            "network": self.network,
        }


def estimate(work: Work, compiled: Compiled, topology: Topology, batch_size: int, total_steps: int) -> Estimate:
    """The roofline of a compiled step."""
    chip, chips = topology.chip, topology.chips
    inside = sum(c.bytes for c in compiled.collectives if not c.crosses_slices)
    across = sum(c.bytes for c in compiled.collectives if c.crosses_slices)
    terms = (
        work.executed_flops / chips / chip.flops,
        compiled.traffic / chip.hbm_bandwidth,
        inside / chip.ici_bandwidth,
        across / chip.dcn_bandwidth,
    )
    seconds = max(terms)
    return Estimate(
        *terms,
        mfu=work.flops_per_example * batch_size / (seconds * chips * chip.flops),
        examples_per_second=batch_size / seconds,
        chip_hours=seconds * total_steps * chips / 3600,
    )
