"""Key maps: which of another project's parameters is which of ours, and how it lies in memory.

A project's `Names` give its names of the layers of `tree.LAYERS`; from these follows the map, a list of `Line`s.
``{n}`` in their name is the number of a block, an index into the leading axis of ours, where the blocks are stacked.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

import m3ae_jax.console as console
from m3ae_jax.convert import tree
from m3ae_jax.errors import UserError

Arrays = Mapping[str, np.ndarray]


class Layout(NamedTuple):
    """How an array of ours lies in their file.

    Attributes:
        out: ours to theirs.
        back: theirs to ours, of the shape of ours.
    """

    out: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] = lambda x, shape: x.reshape(shape)


def _convolution(x: np.ndarray) -> np.ndarray:
    side = round((x.shape[0] / 3) ** 0.5)  # row, column, channel of a patch; ours is the matrix product
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


_SAME = Layout(lambda x: x)
_FLAT = Layout(lambda x: x.reshape(-1))
_ROWS = Layout(lambda x: x.reshape(x.shape[0], -1))
_COLUMNS = Layout(lambda x: x.reshape(-1, x.shape[-1]))
_ROWS_T = Layout(lambda x: x.reshape(x.shape[0], -1).T, lambda x, shape: x.T.reshape(shape))
_COLUMNS_T = Layout(lambda x: x.reshape(-1, x.shape[-1]).T, lambda x, shape: x.T.reshape(shape))
_CONVOLUTION = Layout(_convolution, lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape))

Kind = tuple[tuple[str, str, Layout], ...]
"""The parameters of a layer: (their name, our name, layout)."""

Kinds = Mapping[str, Kind]
"""The kinds of layers of a library."""

_PLAIN: Kind = (("", "", _SAME),)
_FLAX_LINEAR: Kind = (("/kernel", "/kernel", _ROWS), ("/bias", "/bias", _FLAT))  # a matrix, or to heads
FLAX: Kinds = {
    "plain": _PLAIN,
    "norm": (("/scale", "/scale", _SAME), ("/bias", "/bias", _SAME)),
    "linear": _FLAX_LINEAR,
    "from_heads": (("/kernel", "/kernel", _COLUMNS), ("/bias", "/bias", _SAME)),
    "patches": _FLAX_LINEAR,
}
"""How Flax stores layers: names with slashes, matrices as the product takes them."""

TORCH: Kinds = {
    "plain": _PLAIN,
    "norm": ((".weight", "/scale", _SAME), (".bias", "/bias", _SAME)),
    "linear": ((".weight", "/kernel", _ROWS_T), (".bias", "/bias", _FLAT)),
    "from_heads": ((".weight", "/kernel", _COLUMNS_T), (".bias", "/bias", _SAME)),
    "patches": ((".weight", "/kernel", _CONVOLUTION), (".bias", "/bias", _SAME)),
}
"""How PyTorch stores layers: names with dots, matrices transposed."""

QKV = ("query", "key", "value")
"""Names and order of the three where a project has them apart."""


class Line(NamedTuple):
    """One line of a key map: a parameter.

    Attributes:
        theirs: their name, ``{n}`` for the block's number.
        ours: our path.
        layout: how it lies in their file.
        third: of a parameter that is apart in their file and one of ours: 0 query, 1 key, 2 value.
    """

    theirs: str
    ours: str
    layout: Layout = _SAME
    third: int | None = None


@dataclasses.dataclass(frozen=True)
class Names:
    """What a project calls its layers.

    Attributes:
        layers: names by the role in `tree.LAYERS`. Beside the fields of our paths they may have ``{block}``, a
            block of the stack; ``{part}``, of query, key and value where those are layers of their own; ``{depth}``,
            the number of hidden layers of an output head. Empty: all names are ours.
        blocks: the name of a block by stack, ``{n}`` for its number.
        kinds: how its library stores layers, `FLAX` or `TORCH`.
        tables: names of the position embeddings by stack, where they are in the file.
        modalities: those it knows.
    """

    layers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    blocks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kinds: Kinds = dataclasses.field(default_factory=lambda: TORCH)
    tables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    modalities: tuple[str, ...] = ("image",)

    def of(self, role: str, stack: str = "encoder", **fields: str | int) -> list[str]:
        """Names of a layer, ``{n}`` for the block's number: one; three of query, key and value; none if it has none."""
        if role not in self.layers:
            return []
        name = self.layers[role]
        parts = QKV if "{part}" in name else ("",)
        return [name.format(block=self.blocks[stack], stack=stack, part=part, **fields) for part in parts]

    def kernel(self, role: str) -> str:
        """The name of a layer's weights, of a stack's layer those of the first block of the encoder."""
        return "".join(self.of(role)).format(n=0) + self.kinds["linear"][0][0]

    def key_map(self, depth: int, ours: Iterable[str]) -> list[Line]:
        """Theirs to ours.

        Args:
            depth: hidden layers of an output head.
            ours: paths of the parameters that the model has.
        """
        if not self.layers:
            return [Line(path, path) for path in ours]
        lines = {}
        for stack, modality, k in itertools.product(self.blocks, self.modalities, range(depth + 1)):
            for role in self.layers:
                path, kind = tree.path(role, stack=stack, modality=modality, k=k), tree.LAYERS[role].kind
                names = self.of(role, stack, modality=modality, k=k, depth=depth)
                for (third, name), (end, our_end, layout) in itertools.product(enumerate(names), self.kinds[kind]):
                    line = Line(name + end, path + our_end, layout, third if len(names) > 1 else None)
                    lines[line.theirs, line.ours] = line
        present = set(ours)
        return [line for line in lines.values() if line.ours in present]


@dataclasses.dataclass
class Report:
    """What a map did.

    Attributes:
        matched: (theirs, ours, shape) of every line that was used, blocks taken together.
        missing: ours that their file has not; left fresh.
        unused: theirs that were not used, with the reason if there is one.
        notes: how the model differs from ours and what was done about it.
    """

    matched: list[tuple[str, str, tuple[int, ...]]] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def text(self) -> str:
        """For people."""
        lines = [f"matched: {len(self.matched)}"]
        if self.matched:
            lines.append(console.table([(theirs, f"{ours} {list(shape)}") for theirs, ours, shape in self.matched]))
        for name, entries in (("missing, left fresh", self.missing), ("unused", self.unused), ("notes", self.notes)):
            lines += [f"{name}: {len(entries)}"] + [f"  {line}" for line in entries]
        return "\n".join(lines)


def _views(line: Line, flat: Arrays) -> tuple[str, dict[str, np.ndarray]]:
    """Their name as a report has it, all blocks together; and the parts of our leaf by their names, one of a block."""
    leaf = flat[line.ours]
    blocks = list(leaf) if "{n}" in line.theirs else [leaf]
    if line.third is not None:
        blocks = [block[..., line.third, :, :] for block in blocks]
    shown = line.theirs.replace("{n}", f"{{0..{len(blocks) - 1}}}")
    return shown, {line.theirs.format(n=n): block for n, block in enumerate(blocks)}


def fill(key_map: list[Line], theirs: Arrays, flat: dict[str, np.ndarray], report: Report) -> None:
    """Writes their arrays over ours.

    Args:
        key_map: which goes where.
        theirs: their arrays.
        flat: ours by path, changed in place; what theirs lack stays as it is.
        report: gets `matched`, `missing` and `unused`.

    Raises:
        UserError: an array has another size than ours; with both.
    """
    unused, missing = set(theirs), set(flat) - {line.ours for line in key_map}
    for line in key_map:
        shown, views = _views(line, flat)
        present = [name for name in views if name in theirs]
        for name in present:
            _write(line, name, theirs[name], views[name])
        if len(present) == len(views):
            report.matched.append((shown, line.ours, flat[line.ours].shape))
        elif present:
            lacking = next(name for name in views if name not in theirs)
            raise UserError(f"the file has {present[0]} but not {lacking}")
        else:
            missing.add(line.ours)
        unused -= set(present)
    report.missing += sorted(missing)
    report.unused += sorted(unused)


def _write(line: Line, name: str, value: np.ndarray, view: np.ndarray) -> None:
    shape = line.layout.out(view).shape
    if value.shape != shape:
        hint = ""
        if line.ours.startswith(tree.VOCABULARY):
            hint = ": the vocabularies differ, so name the tokenizer that it was trained with"
        raise UserError(f"{name} is {list(value.shape)}, {line.ours} here needs {list(shape)}{hint}")
    view[...] = line.layout.back(np.asarray(value, np.float32), view.shape)


def draw(key_map: list[Line], flat: Arrays) -> tuple[dict[str, np.ndarray], Report]:
    """Their arrays, float32, of ours; the report's `unused` are ours that they have no place for."""
    report, arrays = Report(), {}
    for line in key_map:
        shown, views = _views(line, flat)
        for name, view in views.items():
            theirs = line.layout.out(np.asarray(view, np.float32))
            arrays[name] = np.ascontiguousarray(theirs).reshape(theirs.shape)  # which makes a number a row
        report.matched.append((shown, line.ours, flat[line.ours].shape))
    report.unused = sorted(set(flat) - {line.ours for line in key_map})
    return arrays, report
