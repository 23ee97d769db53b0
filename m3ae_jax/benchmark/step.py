"""How long a training step takes on ready-made batches, what of the machine's peak that is, and what memory it takes.

No tensorflow is needed. Legend: ``B`` examples.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import m3ae_jax.benchmark.peer as peers
from m3ae_jax.benchmark.timing import Figures, Rounds, compute_dtype, cores, in_turns, spread, timed
from m3ae_jax.config import load, resolve
from m3ae_jax.data.mixture import cut_mixture
from m3ae_jax.data.order import RandomStream
from m3ae_jax.data.pipeline import masked
from m3ae_jax.data.text import load_tokenizer
from m3ae_jax.data.tokens import EXAMPLE, Group, restricted
from m3ae_jax.objectives.base import Batch, Objective, Part, build
from m3ae_jax.parallel.mesh import Rules, batch_parts, make_mesh, mesh_rules, put_whole_batch
from m3ae_jax.train.flops import flops_per_example
from m3ae_jax.train.optimizer import optimizer, schedule
from m3ae_jax.train.progress import host_peak_bytes
from m3ae_jax.train.setup import BERT_VOCABULARY
from m3ae_jax.train.step import abstract_state, init_state, jit_train_step

CONFIG = "config="
"""How ``--against`` begins where it names a config of ours."""
CAPTION_TOKENS = 25.0
"""Mean length of the captions: CC12M's, about."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """A program whose steps were timed.

    Attributes:
        seconds: a step, of each round.
        examples_per_second: by the median round.
        peak_bytes: the most that the device held; None where that is unknown (a CPU).
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
        return f"{spread(self.seconds)} s, {self.examples_per_second:,.2f} examples/s{peak}"


@dataclasses.dataclass(frozen=True)
class StepFigures(Figures):
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
        against: the other program, timed in turns with `step`; None: without one.
        against_name: what it is.
        against_flops_per_example: of another config of ours; 0 of another program.
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
    against_flops_per_example: float = 0.0

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
            lines.append(f"  {self.against_name}: {self.against.text()}")
            lines.append(f"  ratio             {ratio:.2f} x its examples/s")
            if self.against_flops_per_example:
                flops = self.flops_per_example / self.against_flops_per_example
                lines.append(
                    f"  cost              {flops:.2f} x its matrix products, {1 / ratio:.2f} x its time: "
                    f"{1 / ratio / flops:.2f} x what the products say"
                )
        return "\n".join(lines)


class Model(NamedTuple):
    """What `init_state` and `abstract_state` take."""

    objective: Objective
    chain: optax.GradientTransformationExtraArgs
    mesh: Mesh
    seed: int
    rules: Rules

    @staticmethod
    def of(config: ConfigDict) -> Model:
        """A resolved config's, on all devices."""
        objective = build(config, vocabulary_of(config))
        chain = optimizer(config, schedule(config, 1000, config.batch_size))
        return Model(objective, chain, make_mesh(config), config.seed, mesh_rules(config))


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
        model = Model.of(config)
        objective, chain, self.mesh, seed, _ = model
        step = jit_train_step(
            objective, chain, seed, config.micro_batches, abstract_state(*model), self.mesh, (), spike
        )
        self._state = init_state(*model)
        self.batch = ready_batch(config, objective, batch_parts(self.mesh), self.vocabulary, caption_tokens)
        self._batch = put_whole_batch(self.batch, self.mesh)
        with timed(seconds := list[float]()):
            lowered = step.lower(self._state, self._batch)
        with timed(seconds):
            self.compiled = lowered.compile()
        self.lower_seconds, self.compile_seconds = seconds

    def start(self) -> dict[str, jax.Array]:
        """Hands one step to the device; its metrics."""
        self._state, metrics = self.compiled(self._state, self._batch)
        return metrics

    def run(self, steps: int) -> None:
        """Runs steps to their end."""
        for _ in range(steps - 1):
            self.start()
        jax.block_until_ready(self.start())


class OtherConfig:
    """The step of another config of ours, at the sizes of the one that is measured: a `peer.Peer`.

    Raises:
        UserError: there is no such config.
    """

    def __init__(self, path: str, config: ConfigDict, caption_tokens: float) -> None:
        other = load(path)
        for group in ("model", "compute"):
            other[group].update(config[group])
        other.batch_size = config.batch_size
        for field in ("image_size", "patch_size", "max_text_tokens", "tokenizer", "modalities"):
            other.data[field] = config.data[field]
        resolved = resolve(other)
        self.name = f"config {path}"
        self._runner = Runner(resolved, resolved.anomaly.spike, caption_tokens)
        self.flops_per_example = flops_per_example(resolved, self._runner.vocabulary)
        self.run = self._runner.run

    def peak_bytes(self) -> int | None:
        """Not known: both programs share a process."""
        return None


def vocabulary_of(config: ConfigDict) -> int:
    """Token ids of a config's text, `BERT_VOCABULARY` where it names no tokenizer; 0 without text."""
    if "text" not in config.data.modalities:
        return 0
    return load_tokenizer(config.data.tokenizer).vocab_size if config.data.tokenizer else BERT_VOCABULARY


def ready_batch(config: ConfigDict, objective: Objective, unit: int, vocabulary: int, caption_tokens: float) -> Batch:
    """A batch of noise, masked by the config's ratios.

    Args:
        config: resolved.
        objective: what the batch is for.
        unit: divides the rows of every part of a mixture.
        vocabulary: token ids.
        caption_tokens: mean length of a caption; lengths are Poisson's, within 1 and what the config allows.
    """
    return {
        part.name: noise(restricted(objective.groups, part.modalities), part.size, vocabulary, caption_tokens)
        for part in cut_mixture(config, config.batch_size, unit)
    }


def noise(groups: Iterable[Group], rows: int, vocabulary: int, caption_tokens: float) -> Part:
    """A part of `rows` examples, masked by its groups; otherwise as `ready_batch`."""
    rng, tokens = np.random.default_rng(0), {}
    groups = tuple(groups)
    for modality in {m.name: m for group in groups for m in group.modalities}.values():
        shape, length = (rows, modality.tokens), np.full(rows, modality.tokens)
        if modality.features:
            value = rng.integers(0, 256, (*shape, modality.features), np.uint8)
        else:
            length = np.clip(rng.poisson(caption_tokens, rows), 1, modality.tokens)
            value = rng.integers(0, vocabulary, shape, np.int32)
        tokens[modality.name] = value, np.arange(modality.tokens) < length[:, None]
    streams = [RandomStream(0, row) for row in range(rows)]
    example = {name: np.zeros((rows, *spec.shape), spec.dtype) for name, spec in EXAMPLE.items()}
    example["valid"][:] = True
    return {"groups": {group.name: masked(group, streams, tokens) for group in groups}, "example": example}


def padding(batch: Batch) -> dict[str, float]:
    """Share of the ``encoder``'s and ``decoder``'s slots, CLS left out, that hold no real token."""
    groups = [group for part in batch.values() for group in part["groups"].values()]
    sets = {"encoder": ("visible",), "decoder": ("visible", "target")}
    return {
        name: 1 - float(np.concatenate([g[kind]["valid"].ravel() for g in groups for kind in kinds]).mean())
        for name, kinds in sets.items()
    }


def tokens(batch: Batch) -> int:
    """Real tokens of a batch."""
    groups = [group for part in batch.values() for group in part["groups"].values()]
    return sum(int(tokens["valid"].sum()) for group in groups for tokens in group.values())


def measure(config: ConfigDict, repeats: int, caption_tokens: float = CAPTION_TOKENS, against: str = "") -> StepFigures:
    """Times steps, in turns with the peak and with the other program.

    Args:
        config: resolved.
        repeats: rounds of each.
        caption_tokens: as of `ready_batch`.
        against: one of `peer.names`, or ``config=`` and a config of ours; "": nothing.

    Raises:
        UserError: the other program cannot run this config, or is not installed.
    """
    other: peers.Peer | OtherConfig | None = None
    if against.startswith(CONFIG):
        other = OtherConfig(against.removeprefix(CONFIG), config, caption_tokens)
    elif against:
        other = peers.build(against, config, caption_tokens, make_mesh(config).size)
    runner = Runner(config, config.anomaly.spike, caption_tokens)
    dtype = compute_dtype(config)
    ours, *theirs = [Rounds(program.run) for program in (runner, other) if program]
    peaks = in_turns([ours, *theirs], repeats, dtype)
    analysis: Any = runner.compiled.memory_analysis()
    batch_size, devices = config.batch_size, runner.mesh.size
    stats = jax.devices()[0].memory_stats() or {}
    step = Timed.of(ours.seconds, batch_size, stats.get("peak_bytes_in_use"))
    return StepFigures(
        device=f"{devices} {jax.devices()[0].device_kind}",
        cores=cores(),
        batch_size=batch_size,
        compute_dtype=dtype.name,
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
        against=Timed.of(theirs[0].seconds, batch_size, other.peak_bytes()) if other else None,
        against_name=other.name if other else "",
        against_flops_per_example=other.flops_per_example if isinstance(other, OtherConfig) else 0.0,
    )
