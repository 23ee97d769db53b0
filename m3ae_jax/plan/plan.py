"""``--mode=plan``: what fits where and what it costs, before any hardware is booked.

Memory and collectives come from the real TPU compiler; times are rooflines over published bandwidths, so they are
estimates of the best case.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import m3ae_jax.console as console
from m3ae_jax.config import resolve, steps
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import Itemizes, build
from m3ae_jax.parallel.mesh import AXES, PRESETS, mesh_shape
from m3ae_jax.plan.chips import Topology, parse
from m3ae_jax.plan.compile import Compiled, compile_step, for_tpu, libtpu_path, no_tpu_here
from m3ae_jax.plan.estimate import Estimate, estimate
from m3ae_jax.train.flops import Work, work
from m3ae_jax.train.setup import BERT_VOCABULARY, data_sizes

log = logging.getLogger("m3ae_jax")

CC12M_EXAMPLES = 12_423_374  # pairs listed in the data set's release; an epoch where no data can be opened
_SEARCHED_REMAT = ("none", "dots", "attention", "full")
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Request:
    """What to plan for.

    Attributes:
        topologies: to compile for.
        search: for the best batch per chip, remat and mesh instead of the config's own.
        vocab_size: words.
        epoch_examples: an epoch's examples.
    """

    topologies: Sequence[Topology]
    search: bool = False
    vocab_size: int = BERT_VOCABULARY
    epoch_examples: int = CC12M_EXAMPLES


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to run a config on a topology; `estimate` is None where it does not fit."""

    config: ConfigDict
    topology: Topology
    mesh: dict[str, int]
    work: Work
    compiled: Compiled
    estimate: Estimate | None

    @property
    def modelled_seconds(self) -> float:
        """Of a step, by the compiler's own cost model: each kernel after the other, collectives left out."""
        return self.compiled.cycles / self.topology.chip.clock


def plan(config: ConfigDict, name: str, workdir: Path, topologies: str, price: float, *, search: bool) -> list[Plan]:
    """Prints and saves (``plan.md``, ``plan.json`` in `workdir`) the plans of a config.

    Args:
        config: as loaded and overridden.
        name: for the table.
        workdir: the run's folder.
        topologies: with commas, as `chips.parse` reads them.
        price: of a chip-hour, in the user's currency; 0: no cost is printed.
        search: see `Request`.

    Raises:
        UserError: a topology is unknown, or the config cannot run on TPUs.
    """
    no_tpu_here()
    resolved = for_tpu(resolve(config))
    vocabulary, examples = data_sizes(resolved)
    request = Request(
        tuple(parse(text) for text in topologies.split(",") if text.strip()),
        search,
        vocabulary or BERT_VOCABULARY,
        examples or CC12M_EXAMPLES,
    )
    need = work(resolved, request.vocab_size)
    lines = _closed_form(resolved, name, need, request)
    log.info(console.readable("\n".join(lines)))
    try:
        libtpu_path()
    except UserError as error:
        log.info("%s; until then there is no table of what fits", error)
        return []
    plans: list[Plan] = []
    rows = [_HEADER, _RULE]
    for topology in request.topologies:
        for result in _plans(resolved, request, topology, need):
            rows.append(result if isinstance(result, str) else _row(result, price))
            plans += [result] if isinstance(result, Plan) else []
            log.info("%s\n", console.readable("\n".join([_HEADER, _RULE, rows[-1]])))
            _save(workdir, [f"## {name}", "", "  \n".join(lines), "", *rows], plans, price)
    log.info("saved: %s and plan.json beside it", workdir / "plan.md")
    return plans


def _plans(config: ConfigDict, request: Request, topology: Topology, need: Work) -> Iterator[Plan | str]:
    """The plans of one topology, or a row that says why there is none."""
    plan = None
    try:
        for plan in _search(config, request, topology) if request.search else [_plan(config, request, topology, need)]:
            yield plan
    except UserError as error:
        yield _cells([str(topology), str(error)])
    else:
        if plan is None:
            yield _cells([str(topology), "nothing that was tried fits"])


def _save(workdir: Path, lines: list[str], plans: list[Plan], price: float) -> None:
    """After each row, as a table takes long."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "plan.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (workdir / "plan.json").write_text(json.dumps([_record(p, price) for p in plans], indent=1) + "\n")


def _closed_form(config: ConfigDict, name: str, need: Work, request: Request) -> list[str]:
    total = steps("duration", config.duration, config.batch_size, request.epoch_examples)
    return [
        f"{name}: {need.parameters:,} parameters, batch {config.batch_size:,}, {total:,} steps "
        f"(an epoch is {request.epoch_examples:,} examples), vocabulary {request.vocab_size:,}",
        f"matrix products in closed form: {need.flops_per_example / 1e9:,.1f} GFLOP an example (forward and backward), "
        f"{need.flops_per_example * config.batch_size / 1e12:,.1f} TFLOP a step, "
        f"{need.executed_flops / 1e12:,.1f} TFLOP with what remat repeats",
        *_itemized(config, request.vocab_size),
        "memory and collectives are the TPU compiler's; times are rooflines, estimates of the best case",
    ]


def _itemized(config: ConfigDict, vocab_size: int) -> list[str]:
    """What the parts of a step cost, if the objective says."""
    objective = build(config, vocab_size)
    if not isinstance(objective, Itemizes):
        return []
    parts = objective.products(config.batch_size)
    return ["of them, GFLOP an example: " + ", ".join(f"{name} {cost / 1e9:,.2f}" for name, cost in parts.items())]


def _plan(config: ConfigDict, request: Request, topology: Topology, need: Work) -> Plan:
    shape = mesh_shape(config, topology.chips, topology.slices)
    compiled = compile_step(config, request.vocab_size, topology)
    total = steps("duration", config.duration, config.batch_size, request.epoch_examples)
    roofline = estimate(need, compiled, topology, config.batch_size, total) if compiled.fits else None
    return Plan(config, topology, dict(zip(AXES, shape, strict=True)), need, compiled, roofline)


def _search(config: ConfigDict, request: Request, topology: Topology) -> Iterator[Plan]:
    """Tries remat x mesh x micro-batches of the configured batch; yields each better than all before, the best last.

    Of each mesh and remat the micro-batches are doubled until it fits: fewer are never slower.
    """
    best = 0.0
    for remat in _SEARCHED_REMAT:
        tried = config.copy_and_resolve_references()
        tried.compute.remat = remat
        need = work(tried, request.vocab_size)
        for mesh in _meshes(topology):
            tried.mesh.update(mesh)
            plan = _fewest_parts(tried, request, topology, need)
            if plan and plan.estimate and plan.estimate.examples_per_second > best:
                best = plan.estimate.examples_per_second
                yield plan


def _fewest_parts(config: ConfigDict, request: Request, topology: Topology, need: Work) -> Plan | None:
    """The plan with the fewest micro-batches that fits; None if none does, or the mesh cannot be made."""
    parts = 1
    while config.batch_size % parts == 0:
        config.micro_batches = parts
        try:
            plan = _plan(config.copy_and_resolve_references(), request, topology, need)
        except UserError as error:
            log.debug("%s: %s", topology, error)
            return None
        if plan.estimate:
            return plan
        parts *= 2
    return None


def _meshes(topology: Topology) -> Iterator[dict[str, Any]]:
    """The presets, and parameters over all chips of a slice."""
    none = {"data": 0, "fsdp": 0, "tensor": 0}
    for preset in PRESETS:
        yield {**none, "preset": preset}
    if topology.chips // topology.slices > PRESETS["fsdp"][0]:
        yield {**none, "preset": "fsdp", "fsdp": topology.chips // topology.slices}


_COLUMNS = (
    "topology", "mesh (data x fsdp x tensor)", "a chip", "remat", "fits", "GiB of HBM: state + temporaries + code",
    "largest array", "from other chips a step", "step at least, bound by (roofline)",
    "step by the compiler's cost model", "MFU at most", "examples/s", "chip-hours", "cost",
)  # fmt: skip
_HEADER = "| " + " | ".join(_COLUMNS) + " |"
_RULE = "|" + "---|" * len(_COLUMNS)


def _row(plan: Plan, price: float) -> str:
    c, e, hbm = plan.compiled, plan.estimate, plan.topology.chip.hbm / _GIB
    parts = plan.config.micro_batches
    fits = "yes" if c.fits else "no" + (f", {c.missing / _GIB:.2f} GiB too much" if c.missing else "")
    memory = (
        f"{c.peak / _GIB:.2f} of {hbm:.0f}: {c.arguments / _GIB:.2f} + {c.temporaries / _GIB:.2f} + {c.code / _GIB:.2f}"
    )
    cells = [
        str(plan.topology),
        " x ".join(str(size) for size in plan.mesh.values()),
        f"{plan.config.batch_size / plan.topology.chips:g}" + (f" in {parts} parts" if parts > 1 else ""),
        plan.config.compute.remat,
        fits,
        memory if c.fits else f"{c.temporaries / _GIB:.2f} of {hbm:.0f}",
        f"{c.largest[0].shape} {c.largest[0].bytes / _GIB:.2f} GiB" if c.largest else "",
    ]
    if e is None:
        return _cells(cells)
    cells.append(
        ", ".join(f"{k.kind}{' across slices' * k.crosses_slices} {k.bytes / 1e9:.3g} GB" for k in c.collectives)
    )
    cost = f"{e.chip_hours * price:,.0f}" if price else ""
    cells += [f"{e.seconds * 1e3:,.1f} ms, {e.bound}", f"{plan.modelled_seconds * 1e3:,.1f} ms", f"{e.mfu:.0%}"]
    return _cells([*cells, f"{e.examples_per_second:,.0f}", f"{e.chip_hours:,.0f}", cost])


def _cells(cells: list[str]) -> str:
    """A row of the table, filled up."""
    return "| " + " | ".join([*cells, *[""] * (len(_COLUMNS) - len(cells))]) + " |"


def _record(plan: Plan, price: float) -> dict[str, Any]:
    roofline = None
    if plan.estimate:
        roofline = {
            **dataclasses.asdict(plan.estimate),
            "step_seconds": plan.estimate.seconds,
            "bound": plan.estimate.bound,
            "cost": plan.estimate.chip_hours * price if price else None,
        }
    return {
        "topology": str(plan.topology),
        "chips": plan.topology.chips,
        "mesh": plan.mesh,
        "batch_size": plan.config.batch_size,
        "micro_batches": plan.config.micro_batches,
        "remat": plan.config.compute.remat,
        "work": dataclasses.asdict(plan.work),
        "compiled": dataclasses.asdict(plan.compiled),
        "cost_model_seconds": plan.modelled_seconds,
        "estimate": roofline,
    }
