"""Compiles a config's very train step for TPUs that are not there, with the real TPU compiler (libtpu)."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from m3ae_jax.errors import UserError
from m3ae_jax.models.attention import KERNELS
from m3ae_jax.objectives.base import Objective, build
from m3ae_jax.objectives.batch import abstract_batch
from m3ae_jax.parallel.mesh import activations_on, batch_parts, batch_sharding, check_batch_size, make_mesh, mesh_rules
from m3ae_jax.plan.chips import Topology
from m3ae_jax.plan.hlo import Array, Collective, Program
from m3ae_jax.train.optimizer import optimizer, schedule
from m3ae_jax.train.step import abstract_state, jit_train_step


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler reports of one step on one chip; bytes.

    Attributes:
        fits: whether it compiles within the chip's memory.
        missing: bytes too many, if it does not fit and the compiler reports it.
        arguments: state and batch (the new state takes the old one's place).
        temporaries: everything else at the worst moment.
        code: the program.
        peak: the compiler's own peak, which is less than the sum above where they share memory.
        traffic: between chip and HBM a step, estimated.
        cycles: of the chip's core a step, by the compiler's own cost model, which leaves collectives out.
        collectives: traffic with other chips.
        largest: arrays.
        seconds: that compiling took here.
        note: the compiler's message where it failed.
    """

    fits: bool
    missing: int = 0
    arguments: int = 0
    temporaries: int = 0
    code: int = 0
    peak: int = 0
    traffic: int = 0
    cycles: int = 0
    collectives: tuple[Collective, ...] = ()
    largest: tuple[Array, ...] = ()
    seconds: float = 0.0
    note: str = ""


def for_tpu(config: ConfigDict) -> ConfigDict:
    """A resolved config as it would run on TPUs.

    Raises:
        UserError: it needs what TPUs lack.
    """
    config = config.copy_and_resolve_references()
    if KERNELS[config.compute.attention] not in (None, "tpu"):
        raise UserError(f"compute.attention={config.compute.attention!r} is not for TPUs: use xla or flash")
    if config.compute.dtype == "auto":
        config.compute.dtype = "bfloat16"
    return config


def no_tpu_here() -> None:
    """Keeps libtpu from looking for a TPU, before JAX first looks for devices; else it warns of what it lacks."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server: this is not a TPU VM
    for name, value in (("TPU_WORKER_HOSTNAMES", "localhost"), ("TPU_ACCELERATOR_TYPE", "v5litepod-16")):
        # Not used here; libtpu puts a warning in place of what it does not find, and later warns of it.
        if os.environ.get(name, "WARNING").startswith("WARNING"):
            os.environ[name] = value


def devices(topology: Topology) -> list[jax.Device]:
    """The topology's devices, described by libtpu.

    Raises:
        UserError: libtpu is not installed, or knows no such topology.
    """
    no_tpu_here()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_LIBRARY_PATH", libtpu_path())
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if topology.generation == "v4":
        options["chip_config_name"] = "megacore"
    if topology.generation == "v5e" and topology.shape == (2, 4):
        options["chips_per_host_bounds"] = (2, 4, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = str(dataclasses.replace(topology, slices=1))
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:  # whatever libtpu raises: it has no class of its own
        raise UserError(f"--topology={topology}: libtpu refuses it: {str(error).splitlines()[0]}") from None


def libtpu_path() -> str:
    """Where libtpu lies.

    Raises:
        UserError: it is not installed.
    """
    try:
        import libtpu
    except ImportError:
        raise UserError("libtpu, the TPU compiler, is not installed: pip install libtpu") from None
    return str(libtpu.get_library_path())


def compile_step(config: ConfigDict, vocab_size: int, topology: Topology) -> Compiled:
    """Compiles the step of a config (`for_tpu`) for all devices of a topology.

    Raises:
        UserError: the mesh or the batch does not fit the number of chips.
    """
    objective = build(config, vocab_size)
    mesh = make_mesh(config, devices(topology))
    check_batch_size(config, mesh)
    begin = time.perf_counter()
    try:
        compiled = _lower(objective, config, mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_large(str(error), time.perf_counter() - begin)
    memory: Any = compiled.memory_analysis()
    slice_size = mesh.size // topology.slices if topology.slices > 1 else 0
    program = Program(compiled.as_text() or "", slice_size, mesh.size)
    return Compiled(
        fits=True,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        traffic=program.memory_traffic(),
        cycles=program.cycles(),
        collectives=tuple(program.collectives()),
        largest=tuple(program.largest_arrays()),
        seconds=time.perf_counter() - begin,
    )


def _lower(objective: Objective, config: ConfigDict, mesh: Any) -> Any:
    rules = mesh_rules(config)
    chain = optimizer(config, schedule(config, 100_000, 10_000_000))  # the lengths change constants alone
    state = abstract_state(objective, chain, mesh, config.seed, rules)
    rows = batch_sharding(mesh)
    shapes = abstract_batch(config, objective, config.batch_size, batch_parts(mesh) * config.micro_batches)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), shapes)
    names = tuple(sorted(config.data.mixture))
    jitted = jit_train_step(
        objective, chain, config.seed, config.micro_batches, state, mesh, names, config.anomaly.spike
    )
    with activations_on(mesh, rules):
        return jitted.lower(state, batch)


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


def _too_large(message: str, seconds: float) -> Compiled:
    """Reads the compiler's report of a program that does not fit."""

    def amount(pattern: str) -> int:
        match = re.search(pattern, message)
        return int(float(match[1]) * _UNITS[match[2]]) if match else 0

    number = r"([\d.]+)([KMGT]?)i?B?"
    used = amount(rf"(?:Used|temporaries \(|requires?) ?{number} ?(?:of|\)|)")
    available = amount(rf"(?:of|available HBM \(|limit of) ?{number}\)? ?(?:hbm)?")
    missing = amount(rf"[Ee]xceeded hbm capacity by {number}") or max(0, used - available)
    sizes = re.findall(r"Size: ([\d.]+)([KMGT]?).*?Shape: (\w+\[[\d,]*\])", message, flags=re.DOTALL)
    arrays = {shape: Array(shape, int(float(size) * _UNITS[unit])) for size, unit, shape in sizes}
    return Compiled(
        fits=False,
        missing=missing,
        temporaries=used,
        largest=tuple(sorted(arrays.values(), key=lambda a: -a.bytes)[:5]),
        seconds=seconds,
        note=message,
    )
