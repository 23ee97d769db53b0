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
    traced = _Traced(config, vocab_size)
    return Work(
        flops_per_example=traced.flops_per_example(),
        executed_flops=matmul_flops(jax.grad(traced.loss), *traced.arguments) / traced.examples * config.batch_size,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(traced.arguments[0])),
    )


def flops_per_example(config: ConfigDict, vocab_size: int) -> float:
    """`Work.flops_per_example` alone, which is quicker to count."""
    return _Traced(config, vocab_size).flops_per_example()


class _Traced:
    """The loss of a config, and shapes of its arguments."""

    def __init__(self, config: ConfigDict, vocab_size: int) -> None:
        self._objective = build(config, vocab_size)
        self.examples = min(config.batch_size, 840)  # traced alone; divides well
        params = nn.unbox(jax.eval_shape(self._objective.init, jax.random.key(0)))
        self.arguments = (params, abstract_batches(config, self._objective, self.examples, 1))

    def loss(self, params: Any, batch: Any) -> Any:
        extra = self._objective.init_extra(params)
        output = batch_loss(self._objective, params, extra, batch, jax.random.key(0), jnp.int32(0))
        return sum(total for total, _ in output.terms.values())

    def flops_per_example(self) -> float:
        return 3 * matmul_flops(self.loss, *self.arguments) / self.examples


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
