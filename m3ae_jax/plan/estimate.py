"""From what the compiler says to what a run takes: step time and its bound, chip-hours. Estimates, not measurements."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from m3ae_jax.objectives.base import abstract_batches, batch_loss, build
from m3ae_jax.plan.chips import Topology
from m3ae_jax.plan.compile import Compiled
from m3ae_jax.plan.flops import matmul_flops


@dataclasses.dataclass(frozen=True)
class Work:
    """What a config asks for, independent of any machine; from the traced program's matrix products.

    Attributes:
        flops_per_example: of a step: three times those of the loss (forward, and twice that backward).
        executed_flops: of a whole step as it runs: what remat computes anew counts again.
        parameters: numbers.
    """

    flops_per_example: float
    executed_flops: float
    parameters: int


def work(config: ConfigDict, vocab_size: int) -> Work:
    """Counts the operations of a resolved config's step; traces, compiles nothing."""
    objective = build(config, vocab_size)
    params = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0)))

    def loss(params: Any, batch: Any) -> Any:
        output = batch_loss(objective, params, objective.init_extra(params), batch, None, jnp.int32(0))
        return sum(total for total, _ in output.terms.values())

    examples = min(config.batch_size, 840)  # traced alone; divides well
    batch = abstract_batches(config, objective, examples, 1)
    return Work(
        flops_per_example=3 * matmul_flops(loss, params, batch) / examples,
        executed_flops=matmul_flops(jax.grad(loss), params, batch) / examples * config.batch_size,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
    )


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
