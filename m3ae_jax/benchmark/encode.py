"""How fast the encoder reads whole examples, nothing hidden, in batches of several sizes."""

from __future__ import annotations

import dataclasses
import functools
import statistics

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from m3ae_jax.benchmark.step import noise, vocabulary_of
from m3ae_jax.benchmark.timing import Figures, Rounds, compute_dtype, device, in_turns, spread, timed
from m3ae_jax.errors import UserError
from m3ae_jax.inference import BATCH_SIZES
from m3ae_jax.objectives.base import Encodes, Part, build
from m3ae_jax.train.flops import matmul_flops

_ENDLESS = 1e6  # tokens of a caption: as many as fit


@dataclasses.dataclass(frozen=True)
class Rate:
    """One batch size.

    Attributes:
        batch_size: examples of a call.
        seconds: a call, of each round.
        compile_seconds: of the first call.
    """

    batch_size: int
    seconds: list[float]
    compile_seconds: float

    @property
    def examples_per_second(self) -> float:
        """By the median round."""
        return self.batch_size / statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class EncodeFigures(Figures):
    """What was measured.

    Attributes:
        device: of which one is used.
        tokens: of an example, CLS left out.
        compute_dtype: of the matrix products.
        flops_per_example: closed form: the matrix products of one pass.
        matmul_flops_per_second: of one large product, in each round.
        rates: by batch size.
    """

    device: str
    tokens: int
    compute_dtype: str
    flops_per_example: float
    matmul_flops_per_second: list[float]
    rates: list[Rate]

    def text(self) -> str:
        """For people."""
        peak = statistics.median(self.matmul_flops_per_second)
        rows = [
            f"  {rate.batch_size:>3} at a time   {rate.examples_per_second:,.2f} examples/s, "
            f"{rate.examples_per_second * self.flops_per_example / peak:.1%} of the peak, {spread(rate.seconds)} s a "
            f"call; compiled in {rate.compile_seconds:.1f} s"
            for rate in self.rates
        ]
        title = (
            f"encoding, {self.tokens} visible tokens, {self.compute_dtype}, {self.flops_per_example / 1e9:,.1f} GFLOP "
            f"an example, peak {peak / 1e9:,.0f} GFLOP/s ({self.device}; seconds are the median of the rounds and "
            "their range):"
        )
        return "\n".join([title, *rows])


def measure(config: ConfigDict, repeats: int, sizes: tuple[int, ...] = BATCH_SIZES) -> EncodeFigures:
    """Times `Objective.encode` of a resolved config with fresh parameters, on one device.

    Args:
        config: resolved.
        repeats: rounds of each batch size.
        sizes: the batch sizes; by default those that `m3ae_jax.load` compiles for.
    """
    vocabulary = vocabulary_of(config)
    objective = build(config, vocabulary)
    params = nn.unbox(jax.jit(objective.init)(jax.random.key(config.seed)))
    dtype = compute_dtype(config)
    if not isinstance(objective, Encodes):
        raise UserError(f"--what=encode: objective={config.objective!r} gives no features")
    encode = jax.jit(objective.encode)
    whole = objective.view(config.data.modalities)

    def part(examples: int) -> Part:
        return noise(whole, examples, vocabulary, _ENDLESS)

    def calls(part: Part, count: int) -> None:
        for _ in range(count):
            features = encode(params, part)
        jax.block_until_ready(features)

    rounds, compiling = list[Rounds](), list[float]()
    for size in sizes:
        run = functools.partial(calls, jax.device_put(part(size)))
        with timed(compiling):
            run(1)
        rounds.append(Rounds(run))
    return EncodeFigures(
        device=device(),
        tokens=sum(m.tokens for group in whole for m in group.modalities),
        compute_dtype=dtype.name,
        flops_per_example=matmul_flops(objective.encode, params, part(1)),
        matmul_flops_per_second=in_turns(rounds, repeats, dtype),
        rates=[Rate(size, r.seconds, seconds) for size, r, seconds in zip(sizes, rounds, compiling, strict=True)],
    )
