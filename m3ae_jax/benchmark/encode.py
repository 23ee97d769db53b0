"""How fast the encoder reads whole examples, nothing hidden, in batches of several sizes."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.benchmark.step import Rounds, device, matmul, told, vocabulary_of
from m3ae_jax.data.pipeline import Group
from m3ae_jax.inference import BATCH_SIZES
from m3ae_jax.objectives.base import Batch, Objective, build
from m3ae_jax.objectives.m3ae import autoencoder_options
from m3ae_jax.plan.flops import matmul_flops


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
class EncodeFigures:
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
            f"{rate.examples_per_second * self.flops_per_example / peak:.1%} of the peak, {told(rate.seconds)} s a "
            f"call; compiled in {rate.compile_seconds:.1f} s"
            for rate in self.rates
        ]
        return "\n".join(
            [
                f"encoding, {self.tokens} visible tokens, {self.compute_dtype}, {self.flops_per_example / 1e9:,.1f} "
                f"GFLOP an example, peak {peak / 1e9:,.0f} GFLOP/s ({self.device}; seconds are the median of the "
                "rounds and their range):",
                *rows,
            ]
        )

    def record(self) -> dict[str, Any]:
        """For programs."""
        return dataclasses.asdict(self)


def whole_batch(objective: Objective, patch_values: int, examples: int, vocabulary: int) -> Batch:
    """A batch of noise in which every token is visible and none is a target."""
    rng = np.random.default_rng(0)

    def tokens(group: Group, count: int) -> dict[str, np.ndarray]:
        shape, top = (examples, count), 256 if group.modality == "image" else vocabulary
        value = rng.integers(0, top, (*shape, patch_values) if group.modality == "image" else shape)
        return {
            "value": value.astype(np.uint8 if group.modality == "image" else np.int32),
            "position": np.broadcast_to(np.arange(count, dtype=np.int32), shape),
            "valid": np.ones(shape, bool),
        }

    return {
        "groups": {g.name: {"visible": tokens(g, g.tokens), "target": tokens(g, 0)} for g in objective.groups},
        "example": {"valid": np.ones(examples, bool)},
    }


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
    patch_values, dtype = 3 * config.data.patch_size**2, autoencoder_options(config, 0).encoder.dtype
    peak, peaks = matmul(dtype), list[float]()
    encode = jax.jit(objective.encode)

    def calls(batch: Batch, count: int) -> None:
        for _ in range(count):
            said = encode(params, batch)
        jax.block_until_ready(said)

    rounds, compiling = {}, {}
    for size in sizes:
        batch = jax.device_put(whole_batch(objective, patch_values, size, vocabulary))
        begin = time.perf_counter()
        calls(batch, 1)
        compiling[size] = time.perf_counter() - begin
        rounds[size] = Rounds(functools.partial(calls, batch))
    for _ in range(repeats):
        for of_size in rounds.values():
            of_size.one()
        peaks.append(peak())
    one = whole_batch(objective, patch_values, 1, vocabulary)
    return EncodeFigures(
        device=device(),
        tokens=sum(group.tokens for group in objective.groups),
        compute_dtype=jnp.dtype(dtype).name,
        flops_per_example=matmul_flops(objective.encode, params, one),
        matmul_flops_per_second=peaks,
        rates=[Rate(size, rounds[size].seconds, compiling[size]) for size in sizes],
    )
