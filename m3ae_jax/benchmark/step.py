"""How long a training step takes on ready-made batches, what of the machine's peak that is, and what memory it takes.

No tensorflow is needed. Legend: ``B`` examples.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from m3ae_jax.benchmark.m3ae_reference import M3AEReference
from m3ae_jax.benchmark.vit_mae import ViTMAE
from m3ae_jax.data.order import hidden_count
from m3ae_jax.data.pipeline import Group
from m3ae_jax.data.text import load_tokenizer
from m3ae_jax.errors import UserError, one_of
from m3ae_jax.objectives.base import Batch, Objective, abstract_batches, build
from m3ae_jax.objectives.m3ae import autoencoder_options
from m3ae_jax.parallel.mesh import Rules, batch_parts, make_mesh, mesh_rules, put_whole_batch
from m3ae_jax.plan.estimate import flops_per_example
from m3ae_jax.train.optimizer import optimizer, schedule
from m3ae_jax.train.progress import host_peak_bytes
from m3ae_jax.train.setup import BERT_VOCABULARY
from m3ae_jax.train.step import abstract_state, init_state, jit_train_step

CAPTION_TOKENS = 25.0
"""Mean length of the captions: CC12M's, about."""


class Other(Protocol):
    """A program to compare with: what it is, steps of it, and the most that the device held where that is told."""

    name: str

    def run(self, steps: int) -> None:
        """Runs steps to their end."""

    def peak_bytes(self) -> int | None:
        """Of the device."""


AGAINST: dict[str, Callable[[ConfigDict, float], Other]] = {
    "vit_mae": lambda config, caption_tokens: ViTMAE(config, jax.default_backend() == "gpu"),
    "m3ae": M3AEReference,
    "m3ae_256": functools.partial(M3AEReference, text_tokens=256),
}
"""Programs to compare with, by the name that ``--against`` takes; m3ae at its text length 64."""

_ROUND_SECONDS = 2.0  # about what a round takes
_MOST_STEPS = 50  # of a round
_FLOAT32_SIDE, _ACCELERATOR_SIDE = 3072, 8192  # of the matrices whose product is the peak


@dataclasses.dataclass(frozen=True)
class Timed:
    """A program whose steps were timed.

    Attributes:
        seconds: a step, of each round.
        examples_per_second: by the median round.
        peak_bytes: the most that the device held; None where it does not say (a CPU).
    """

    seconds: list[float]
    examples_per_second: float
    peak_bytes: int | None

    @staticmethod
    def of(seconds: list[float], batch_size: int, peak_bytes: int | None) -> Timed:
        """From the rounds."""
        return Timed(seconds, batch_size / statistics.median(seconds), peak_bytes)

    def text(self) -> str:
        """For people."""
        peak = "" if self.peak_bytes is None else f", at most {self.peak_bytes / 2**30:.2f} GiB of device memory"
        return f"{told(self.seconds)} s, {self.examples_per_second:,.2f} examples/s{peak}"


@dataclasses.dataclass(frozen=True)
class StepFigures:
    """What was measured.

    Attributes:
        device: how many of which.
        cores: of the host, which this process may use.
        batch_size: examples of a step, on all devices.
        compute_dtype: of the matrix products.
        vocabulary: token ids; 0 without text.
        step: of this project.
        flops_per_example: closed form: three times the matrix products of the loss.
        matmul_flops_per_second: of one large product on one device, in each round: the machine's peak.
        devices: of the mesh.
        tokens_per_second: real ones, visible and hidden.
        padding: share of the encoder's and the decoder's slots, in the batch that was fed.
        lower_seconds: of tracing the step.
        compile_seconds: of compiling it.
        temporary_bytes: that the compiled step takes on a device beside its arguments.
        argument_bytes: parameters, optimizer state and batch, on a device.
        host_peak_bytes: the most that the process held.
        against: the other program, timed in turns with `step`; None: none was asked for.
        against_name: what it is.
    """

    device: str
    cores: int
    batch_size: int
    compute_dtype: str
    vocabulary: int
    step: Timed
    flops_per_example: float
    matmul_flops_per_second: list[float]
    devices: int
    tokens_per_second: float
    padding: dict[str, float]
    lower_seconds: float
    compile_seconds: float
    temporary_bytes: int
    argument_bytes: int
    host_peak_bytes: int
    against: Timed | None = None
    against_name: str = ""

    @property
    def mfu(self) -> float:
        """Share of the measured peak."""
        done = self.flops_per_example * self.step.examples_per_second
        return done / self.devices / statistics.median(self.matmul_flops_per_second)

    def text(self) -> str:
        """For people."""
        peak = statistics.median(self.matmul_flops_per_second)
        padded = ", ".join(f"{share:.1%} of the {name}'s slots" for name, share in self.padding.items())
        lines = [
            f"training step, {self.batch_size} examples, {self.compute_dtype}, ready-made batches "
            f"({self.device}; {self.cores} cores; seconds are the median of the rounds and their range):",
            f"  step              {self.step.text()}, {self.tokens_per_second:,.0f} tokens/s",
            f"  matrix products   {self.flops_per_example / 1e9:,.1f} GFLOP an example (3 x forward, in closed form), "
            f"{self.flops_per_example * self.step.examples_per_second / 1e9:,.0f} GFLOP/s",
            f"  MFU               {self.mfu:.1%} of {peak / 1e9:,.0f} GFLOP/s, one large product in the same rounds",
            f"  memory            {self.argument_bytes / 2**30:.2f} GiB of arguments and "
            f"{self.temporary_bytes / 2**30:.2f} GiB of temporaries a device, by the compiler; "
            f"the process had at most {self.host_peak_bytes / 2**30:.2f} GiB",
            f"  compiling         {self.lower_seconds:.1f} s to trace, {self.compile_seconds:.1f} s to compile",
            f"  padding           {padded}",
        ]
        if self.vocabulary:
            lines.append(f"  vocabulary        {self.vocabulary:,}")
        if self.against is not None:
            ratio = self.step.examples_per_second / self.against.examples_per_second
            lines += [
                f"  {self.against_name}: {self.against.text()}",
                f"  ratio             {ratio:.2f} x its examples/s",
            ]
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """For programs."""
        return {**dataclasses.asdict(self), "mfu": self.mfu}


def device() -> str:
    """How many of which."""
    return f"{jax.device_count()} {jax.devices()[0].device_kind}"


def told(seconds: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(seconds):.4g} ({min(seconds):.4g} to {max(seconds):.4g})"


class Model(NamedTuple):
    """What `init_state` and `abstract_state` take."""

    objective: Objective
    chain: optax.GradientTransformationExtraArgs
    mesh: Mesh
    seed: int
    rules: Rules

    @staticmethod
    def of(config: ConfigDict, vocabulary: int, mesh: Mesh) -> Model:
        """A resolved config's."""
        chain = optimizer(config, schedule(config, 1000, config.batch_size))
        return Model(build(config, vocabulary), chain, mesh, config.seed, mesh_rules(config))


class Runner:
    """A config's compiled step, its state, and a batch to feed it.

    Attributes:
        vocabulary: token ids; 0 without text.
        batch: what each step is fed.
        lower_seconds: of tracing.
        compile_seconds: of compiling.
    """

    def __init__(self, config: ConfigDict, spike: float | None, caption_tokens: float = CAPTION_TOKENS) -> None:
        self.vocabulary = vocabulary_of(config)
        self.mesh = make_mesh(config)
        model = Model.of(config, self.vocabulary, self.mesh)
        abstract = abstract_state(*model)
        step = jit_train_step(
            model.objective, model.chain, config.seed, config.micro_batches, abstract, self.mesh, (), spike
        )
        self._state = init_state(*model)
        self.batch = ready_batch(config, model.objective, batch_parts(self.mesh), self.vocabulary, caption_tokens)
        self._batch = put_whole_batch(self.batch, self.mesh)
        begin = time.perf_counter()
        lowered = step.lower(self._state, self._batch)
        self.lower_seconds = time.perf_counter() - begin
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin - self.lower_seconds

    def start(self) -> dict[str, jax.Array]:
        """Hands one step to the device; what it says."""
        self._state, figures = self.compiled(self._state, self._batch)
        return figures

    def run(self, steps: int) -> None:
        """Runs steps to their end."""
        for _ in range(steps - 1):
            self.start()
        jax.block_until_ready(self.start())


def vocabulary_of(config: ConfigDict) -> int:
    """Token ids of a config's text, `BERT_VOCABULARY` where it names no tokenizer; 0 without text."""
    if "text" not in config.data.modalities:
        return 0
    return load_tokenizer(config.data.tokenizer).vocab_size if config.data.tokenizer else BERT_VOCABULARY


def ready_batch(config: ConfigDict, objective: Objective, unit: int, vocabulary: int, caption_tokens: float) -> Batch:
    """A batch of noise, masked as the config says.

    Args:
        config: resolved.
        objective: what the batch is for.
        unit: divides the rows of every part of a mixture.
        vocabulary: token ids.
        caption_tokens: mean length of a caption; lengths are Poisson's, within 1 and what the config keeps.
    """
    rng = np.random.default_rng(0)

    def filled(shapes: dict[str, Any]) -> Batch:
        groups = {
            group.name: _masked(group, shapes["groups"][group.name], rng, vocabulary, caption_tokens)
            for group in objective.groups
            if group.name in shapes["groups"]
        }
        return {"groups": groups, "example": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["example"])}

    shapes = abstract_batches(config, objective, config.batch_size, unit)
    if "parts" in shapes:
        return {"parts": {name: filled(part) for name, part in shapes["parts"].items()}}
    return filled(shapes)


def _masked(
    group: Group, shapes: dict[str, Any], rng: np.random.Generator, vocabulary: int, caption_tokens: float
) -> dict[str, dict[str, np.ndarray]]:
    examples = shapes["visible"]["valid"].shape[0]
    length = np.full(examples, group.tokens)
    if group.modality == "text":
        length = np.clip(rng.poisson(caption_tokens, examples), 1, group.tokens)
    hidden = hidden_count(length, group.mask_ratio)
    # Real tokens in a random order, then padding.
    draws = rng.random((examples, group.tokens)) + (np.arange(group.tokens) >= length[:, None])
    order = np.argsort(draws, axis=1).astype(np.int32)
    sets = {}
    for name, first, count in (
        ("visible", np.zeros_like(length), length - hidden),
        ("target", length - hidden, hidden),
    ):
        slots = np.arange(shapes[name]["valid"].shape[1])
        valid = slots < count[:, None]
        place = np.minimum(first[:, None] + slots, group.tokens - 1)
        value = shapes[name]["value"]
        top = 256 if group.modality == "image" else vocabulary
        sets[name] = {
            "value": rng.integers(0, top, value.shape).astype(value.dtype),
            "position": np.where(valid, np.take_along_axis(order, place, axis=1), 0),
            "valid": valid,
        }
    return sets


def padding(batch: Batch) -> dict[str, float]:
    """Share of the ``encoder``'s and ``decoder``'s slots, CLS left out, that hold no real token."""
    parts = list(batch["parts"].values()) if "parts" in batch else [batch]
    groups = [group for part in parts for group in part["groups"].values()]
    read = {"encoder": ("visible",), "decoder": ("visible", "target")}
    return {
        name: 1 - float(np.concatenate([g[kind]["valid"].ravel() for g in groups for kind in kinds]).mean())
        for name, kinds in read.items()
    }


def tokens(batch: Batch) -> int:
    """Real tokens of a batch."""
    return sum(int(leaf.sum()) for path, leaf in jax.tree_util.tree_leaves_with_path(batch) if path[-1].key == "valid")


def matmul(dtype: Any) -> Callable[[], float]:
    """A function that measures the operations per second of one large matrix product on one device."""
    on_cpu = jax.default_backend() == "cpu"
    side, times = (_FLOAT32_SIDE, 1) if on_cpu else (_ACCELERATOR_SIDE, 20)
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    # Scaled, so that a chain of products neither grows nor vanishes.
    # Unrolled, for within a loop XLA's CPU back end gives a product one core.
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: (y @ x) * side**-0.5, x, unroll=times))
    jax.block_until_ready(chain(a))

    def measured() -> float:
        seconds = []
        for _ in range(4):  # the first after a step is slower: the fastest is the peak
            begin = time.perf_counter()
            jax.block_until_ready(chain(a))
            seconds.append(time.perf_counter() - begin)
        return 2.0 * side**3 * times / min(seconds)

    return measured


def measure(config: ConfigDict, repeats: int, caption_tokens: float = CAPTION_TOKENS, against: str = "") -> StepFigures:
    """Times steps, in turns with the peak and with the other program.

    Args:
        config: resolved.
        repeats: rounds of each.
        caption_tokens: as of `ready_batch`.
        against: a name of `AGAINST`; "": nothing.

    Raises:
        UserError: the other program cannot run this config, or is not installed.
    """
    if against and against not in AGAINST:
        raise UserError(one_of("--against", against, AGAINST))
    other = AGAINST[against](config, caption_tokens) if against else None
    if other:
        _check_alike(config, against)
    runner = Runner(config, config.anomaly.spike, caption_tokens)
    dtype = autoencoder_options(config, 0).encoder.dtype
    peak = matmul(dtype)
    ours = Rounds(runner.run)
    theirs = Rounds(other.run) if other else None
    peaks = []
    for _ in range(repeats):
        ours.one()
        if theirs:
            theirs.one()
        peaks.append(peak())
    analysis: Any = runner.compiled.memory_analysis()
    batch_size, devices = config.batch_size, runner.mesh.size
    stats = jax.devices()[0].memory_stats() or {}
    step = Timed.of(ours.seconds, batch_size, stats.get("peak_bytes_in_use"))
    return StepFigures(
        device=f"{devices} {jax.devices()[0].device_kind}",
        cores=len(os.sched_getaffinity(0)),
        batch_size=batch_size,
        compute_dtype=jnp.dtype(dtype).name,
        vocabulary=runner.vocabulary,
        step=step,
        flops_per_example=flops_per_example(config, runner.vocabulary),
        matmul_flops_per_second=peaks,
        devices=devices,
        tokens_per_second=tokens(runner.batch) / batch_size * step.examples_per_second,
        padding=padding(runner.batch),
        lower_seconds=runner.lower_seconds,
        compile_seconds=runner.compile_seconds,
        temporary_bytes=analysis.temp_size_in_bytes,
        argument_bytes=analysis.argument_size_in_bytes,
        host_peak_bytes=host_peak_bytes(),
        against=Timed.of(theirs.seconds, batch_size, other.peak_bytes()) if theirs and other else None,
        against_name=other.name if other else "",
    )


def _check_alike(config: ConfigDict, against: str) -> None:
    """Refuses what the other programs do not compute.

    Raises:
        UserError: as said.
    """
    devices = make_mesh(config).size
    if devices > 1:
        raise UserError(f"--against={against} on {devices} devices: the other program runs on one")
    if config.objective != "m3ae":
        raise UserError(f"--against={against} with objective={config.objective!r}: it computes what m3ae does")
    if config.data.mixture:
        raise UserError(f"--against={against} with data.mixture: the other program has one source")


class Rounds:
    """Seconds a step of each round, of as many steps as its first one says.

    Before each round a step is not timed: the system may have taken back memory that the program will ask for again.
    """

    def __init__(self, run: Callable[[int], None]) -> None:
        self._run, self.seconds = run, list[float]()
        run(1)
        begin = time.perf_counter()
        run(1)
        self._steps = int(np.clip(_ROUND_SECONDS / (time.perf_counter() - begin), 1, _MOST_STEPS))

    def one(self) -> None:
        """Runs a round."""
        self._run(1)
        begin = time.perf_counter()
        self._run(self._steps)
        self.seconds.append((time.perf_counter() - begin) / self._steps)
