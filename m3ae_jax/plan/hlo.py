"""Reads a compiled program's text (HLO): collectives, memory traffic, the largest arrays.

XLA's own `cost_analysis` counts a loop's body once, and this code base runs its layers in loops; here each
instruction counts as often as the loops around it run.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_FREE = {
    # Move nothing by themselves: names for other arrays, control flow, the second half of an asynchronous pair.
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "opt-barrier", "partition-id", "replica-id", "copy-done", "async-done", "all-gather-done", "all-reduce-done",
    "collective-permute-done", "add-dependency", "domain",
}  # fmt: skip

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")


@dataclasses.dataclass(frozen=True)
class Array:
    """A result in device memory: ``bf16[12,64]`` and its bytes (0 in on-chip memory)."""

    shape: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the program."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """The bytes of all results."""
        return sum(array.bytes for array in self.results)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Traffic of one kind of collective over one network, per step.

    Attributes:
        kind: one of `COLLECTIVES`.
        crosses_slices: over the data-centre network.
        count: executions.
        bytes: that one chip receives, ring algorithms assumed: (n - 1) / n of what is gathered or scattered, twice
            that of what is reduced to all.
    """

    kind: str
    crosses_slices: bool
    count: int
    bytes: float


_Computation = dict[str, Instruction]
"""Instructions by name, in the order of the text."""


class Program:
    """A parsed program.

    Args:
        text: of `jax.stages.Compiled.as_text`.
        slice_size: partitions in a slice; 0 for a single slice. Partitions of a slice are numbered consecutively.
        partitions: in all; collectives without listed groups span all of them.
    """

    def __init__(self, text: str, slice_size: int = 0, partitions: int = 0) -> None:
        self._partitions = partitions
        self._slice_size = slice_size
        self._computations: dict[str, _Computation] = {}
        current: _Computation = {}
        entry = ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self._computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
            elif match := _INSTRUCTION.match(line):
                current[match[2]] = _instruction(match[2], match[3], bool(match[1]))
        self._times: collections.Counter[str] = collections.Counter()
        self._fused: set[str] = set()
        self._visit(entry, 1, fused=False)

    def _visit(self, name: str, times: int, *, fused: bool) -> None:
        self._times[name] += times
        if fused:
            self._fused.add(name)
        for instruction in self._computations.get(name, {}).values():
            trips = self._trip_count(instruction) if instruction.opcode == "while" else 1
            inside = fused or instruction.opcode == "fusion"
            for role, called in _called(instruction.attributes):
                # What a reduction applies to each pair of numbers is no program of its own.
                if role != "to_apply" or instruction.opcode == "call":
                    self._visit(called, times * trips, fused=inside)

    def _trip_count(self, loop: Instruction) -> int:
        """From the compiler's note, or from the constant that the loop's condition compares with; else 1."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        condition = self._computations.get(dict(_called(loop.attributes)).get("condition", ""), {})
        constants = [i.attributes for i in condition.values() if i.opcode == "constant"]
        return max((int(value) for value in constants if value.isdigit()), default=1)

    def _executed(self) -> Iterator[tuple[int, Instruction, _Computation]]:
        """The instructions outside fusions: how often each runs, and the computation that it belongs to."""
        for name, times in self._times.items():
            if name not in self._fused:
                computation = self._computations.get(name, {})
                for instruction in computation.values():
                    yield times, instruction, computation

    def collectives(self) -> list[Collective]:
        """The collectives of each kind over each network, the most bytes first."""
        counts: collections.Counter[tuple[str, bool]] = collections.Counter()
        total: dict[tuple[str, bool], float] = collections.defaultdict(float)
        seen: set[str] = set()
        for name, times in self._times.items():
            for instruction in self._computations.get(name, {}).values():
                kind = instruction.opcode.removesuffix("-start")
                # The TPU compiler spreads one collective over several fusions; its channel stays the same.
                channel = re.search(r"channel_id=\d+", instruction.attributes)
                if kind not in COLLECTIVES or (channel and channel[0] in seen):
                    continue
                seen.update([channel[0]] if channel else ())
                groups = replica_groups(instruction.attributes) or [list(range(max(1, self._partitions)))]
                received = _received(instruction, kind, len(groups[0]))
                if name.startswith("all-reduce-scatter"):  # a fusion of an all-reduce and the slice that is used
                    kind, received = "reduce-scatter", received / 2
                key = kind, any(map(self._crosses_slices, groups))
                counts[key] += times
                total[key] += times * received
        collectives = [Collective(*key, counts[key], total[key]) for key in counts]
        return sorted(collectives, key=lambda c: -c.bytes)

    def _crosses_slices(self, group: list[int]) -> bool:
        return self._slice_size > 0 and len({member // self._slice_size for member in group}) > 1

    def memory_traffic(self) -> int:
        """Bytes read from and written to device memory, per step: an estimate, as every fusion reads its operands."""
        return sum(times * self._moved(instruction, inside) for times, instruction, inside in self._executed())

    def cycles(self) -> int:
        """Cycles of a chip's core per step, by the compiler's cost model; none for collectives and custom kernels."""
        return sum(
            times * int(match[1])
            for times, instruction, _ in self._executed()
            if (match := re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes))
        )

    def largest_arrays(self, count: int = 5) -> list[Array]:
        """The largest results, each shape once."""
        moved = [instruction for _, instruction, _ in self._executed() if instruction.opcode not in _FREE]
        # A shape may lie in HBM here and on the chip there.
        arrays = {array for instruction in moved for array in instruction.results if array.bytes}
        return sorted(arrays, key=lambda a: (-a.bytes, a.shape))[:count]

    def _moved(self, instruction: Instruction, computation: _Computation) -> int:
        if instruction.opcode in _FREE:
            return 0
        operands = [computation[name].bytes for name in instruction.operands if name in computation]
        if instruction.opcode == "dynamic-slice":
            return 2 * instruction.bytes
        if instruction.opcode == "dynamic-update-slice":
            return 2 * (operands[1] if len(operands) > 1 else 0)
        if instruction.opcode == "fusion":
            called = dict(_called(instruction.attributes)).get("calls")
            return self._moved_by_fusion(instruction, operands, called) if called else 0
        if instruction.opcode.endswith("-start"):
            return sum(operands) * 2
        return instruction.bytes + sum(operands)

    def _moved_by_fusion(self, fusion: Instruction, operands: list[int], called: str) -> int:
        """A fusion that reads or writes a slice of a stacked array moves the slice, not the stack."""
        inside = self._computations.get(called, {})
        total = 0
        for number, whole in enumerate(operands):
            part = self._read_of_parameter(called, number)
            total += whole if part is None else min(whole, part)
        root = next((i for i in inside.values() if i.is_root), None)
        if root is None:
            return total + fusion.bytes
        written = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return total + sum(_written(instruction, inside) for instruction in written)

    def _read_of_parameter(self, called: str, number: int) -> int | None:
        """Bytes that a computation reads of a parameter of which it takes slices; None if it takes all."""
        inside = self._computations.get(called, {})
        parameters = {i.attributes: i.name for i in inside.values() if i.opcode == "parameter"}
        name = parameters.get(str(number), "")
        total = 0
        for user in (i for i in inside.values() if name in i.operands):
            place = user.operands.index(name)
            part = None
            if user.opcode == "dynamic-slice" and place == 0:
                part = user.bytes
            elif user.opcode == "dynamic-update-slice" and place == 0:
                part = inside[user.operands[1]].bytes
            elif user.opcode == "fusion":
                part = self._read_of_parameter(dict(_called(user.attributes))["calls"], place)
            if part is None:
                return None
            total += part
        return total


def _written(instruction: Instruction, computation: _Computation) -> int:
    """Bytes that a fusion writes for one of its results: of an updated stack the slice alone."""
    while instruction.opcode == "bitcast" and instruction.operands[0] in computation:
        instruction = computation[instruction.operands[0]]
    if instruction.opcode == "dynamic-update-slice":
        return computation[instruction.operands[1]].bytes
    return 0 if instruction.opcode == "parameter" else instruction.bytes


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    """Splits ``TYPE opcode(operands), attributes``."""
    end = _end_of(rest, " ")  # the type may be a tuple with spaces in it
    kind, (opcode, _, rest) = rest[:end], rest[end + 1 :].partition("(")
    end = _end_of(rest, ")")
    operands = tuple(_NAME.findall(rest[:end]))
    # A parameter's number and a constant's value stand where operands stand.
    attributes = rest[:end] if opcode in ("parameter", "constant") else rest[end + 1 :]
    return Instruction(name, opcode, tuple(_arrays(kind)), operands, attributes, is_root)


def _end_of(text: str, stop: str) -> int:
    """Where `stop` stands outside all brackets."""
    depth = 0
    for place, character in enumerate(text):
        if depth == 0 and character == stop:
            return place
        depth += (character in "({[") - (character in ")}]")
    return len(text)


def _arrays(kind: str) -> Iterator[Array]:
    for dtype, dims, layout in _SHAPE.findall(kind):
        shape = f"{dtype}[{dims}]"
        on_chip = "S(" in layout  # a memory space other than the default, HBM
        yield Array(shape, 0 if on_chip else _size(shape))


def _called(attributes: str) -> Iterator[tuple[str, str]]:
    for role, names in _CALLED.findall(attributes):
        for name in _NAME.findall(names):
            yield role, name


def replica_groups(attributes: str) -> list[list[int]]:
    """The groups of partitions that a collective works in, from any of the notations of XLA's text.

    ``{{0,1},{2,3}}``, ``[2,2]<=[4]`` (rows of an iota, reshaped and transposed), ``mesh['a'=2,'b'=2] {'b'}`` (those
    that differ in these axes alone), and the pairs of a permutation.
    """
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes)
    if listed:
        return [_integers(group) for group in re.findall(r"\{([\d, ]*)\}", listed[1])]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, reshape, order = _integers(iota[1]), _integers(iota[2]), _integers(iota[3] or "")
        ids = np.arange(math.prod(reshape)).reshape(reshape).transpose(order or None)
        return ids.reshape(shape[0], -1).tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if named:
        axes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        inside = re.findall(r"'([^']+)'", named[2])
        ids = np.arange(math.prod(axes.values())).reshape(list(axes.values()))
        last = [list(axes).index(axis) for axis in inside]
        members = math.prod(axes[axis] for axis in inside)
        return np.moveaxis(ids, last, range(-len(last), 0)).reshape(-1, members).tolist()
    return []


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _received(instruction: Instruction, kind: str, group: int) -> float:
    """Bytes that one member receives."""
    sizes = [_size(array.shape) for array in instruction.results]
    total, share = float(sum(sizes)), (group - 1) / group
    if kind == "collective-permute":
        return float(sizes[0]) if sizes else 0.0
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "reduce-scatter"):
        # A start gives its operands too: parts of 1 / group of what is gathered.
        return total * (group - 1) / (group + 1)
    if kind == "reduce-scatter":
        return total * (group - 1)
    return total * share * (2 if kind == "all-reduce" else 1)


def _size(shape: str) -> int:
    """Bytes of an array such as ``bf16[12,64]``, wherever it lies."""
    dtype, _, dims = shape.partition("[")
    bits = re.search(r"\d+", dtype)
    width = _BYTES.get(dtype, max(1, int(bits[0]) // 8) if bits else 4)
    return width * math.prod(int(d) for d in dims.rstrip("]").split(",") if d)
