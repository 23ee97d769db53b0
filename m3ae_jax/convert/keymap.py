"""Key maps: which of another project's parameters is which of ours, and how it lies in memory.

A map is a table of `Part`s; each is a layer or a single parameter. ``{n}`` in their name is the number of a block, an
index into the leading axis of ours, where the blocks are stacked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from m3ae_jax.errors import UserError

Arrays = Mapping[str, np.ndarray]


class Layout(NamedTuple):
    """How an array of ours lies in their file.

    Attributes:
        out: ours to theirs.
        back: theirs to ours, of the shape of ours.
    """

    out: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def _convolution(x: np.ndarray) -> np.ndarray:
    side = round((x.shape[0] / 3) ** 0.5)  # row, column, channel of a patch; ours is the matrix product
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


_SAME = Layout(lambda x: x, lambda x, shape: x.reshape(shape))
_FLAT = Layout(lambda x: x.reshape(-1), lambda x, shape: x.reshape(shape))
_ROWS = Layout(lambda x: x.reshape(x.shape[0], -1), lambda x, shape: x.reshape(shape))
_COLUMNS = Layout(lambda x: x.reshape(-1, x.shape[-1]), lambda x, shape: x.reshape(shape))
_ROWS_T = Layout(lambda x: x.reshape(x.shape[0], -1).T, lambda x, shape: x.T.reshape(shape))
_COLUMNS_T = Layout(lambda x: x.reshape(-1, x.shape[-1]).T, lambda x, shape: x.T.reshape(shape))
_CONVOLUTION = Layout(_convolution, lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape))

Kind = tuple[tuple[str, str, Layout], ...]
"""The parameters of a layer: (their name, our name, layout)."""

PLAIN: Kind = (("", "", _SAME),)
FLAX_NORM: Kind = (("/scale", "/scale", _SAME), ("/bias", "/bias", _SAME))
FLAX_LINEAR: Kind = (("/kernel", "/kernel", _ROWS), ("/bias", "/bias", _FLAT))  # a matrix, or to heads
FLAX_FROM_HEADS: Kind = (("/kernel", "/kernel", _COLUMNS), ("/bias", "/bias", _SAME))
TORCH_NORM: Kind = ((".weight", "/scale", _SAME), (".bias", "/bias", _SAME))
TORCH_LINEAR: Kind = ((".weight", "/kernel", _ROWS_T), (".bias", "/bias", _FLAT))
TORCH_FROM_HEADS: Kind = ((".weight", "/kernel", _COLUMNS_T), (".bias", "/bias", _SAME))
TORCH_PATCHES: Kind = ((".weight", "/kernel", _CONVOLUTION), (".bias", "/bias", _SAME))


class Part(NamedTuple):
    """One line of a key map.

    Attributes:
        theirs: their name, ``{n}`` for the block's number.
        ours: our path.
        kind: the layer's parameters.
        third: of a layer that is apart in their file and one of ours: 0 query, 1 key, 2 value.
    """

    theirs: str
    ours: str
    kind: Kind = PLAIN
    third: int | None = None


KeyMap = tuple[Part, ...]


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
        width = max((len(theirs) for theirs, _, _ in self.matched), default=0)
        lines = [f"matched: {len(self.matched)}"]
        lines += [f"  {theirs:<{width}}  {ours} {list(shape)}" for theirs, ours, shape in self.matched]
        for name, found in (("missing, left fresh", self.missing), ("unused", self.unused), ("notes", self.notes)):
            lines += [f"{name}: {len(found)}"] + [f"  {line}" for line in found]
        return "\n".join(lines)


class _Place(NamedTuple):
    theirs: str
    ours: np.ndarray  # a view of one of our leaves
    layout: Layout
    path: str


def _places(part: Part, flat: Arrays) -> Iterator[tuple[str, str, list[_Place]]]:
    """Of each parameter of a part: their name (with ``{n}``), our path, and where it goes block by block."""
    for theirs_end, ours_end, layout in part.kind:
        name, path = part.theirs + theirs_end, part.ours + ours_end
        if path not in flat:
            continue  # a part that this model has not
        leaf = flat[path]
        blocks = list(leaf) if "{n}" in name else [leaf]
        if part.third is not None:
            blocks = [block[..., part.third, :, :] for block in blocks]
        yield name, path, [_Place(name.format(n=n), block, layout, path) for n, block in enumerate(blocks)]


def fill(key_map: KeyMap, theirs: Arrays, flat: dict[str, np.ndarray], report: Report) -> None:
    """Writes their arrays over ours.

    Args:
        key_map: which goes where.
        theirs: their arrays.
        flat: ours by path, changed in place; what theirs lack stays as it is.
        report: gets `matched`, `missing` and `unused`.

    Raises:
        UserError: an array has another size than ours; with both.
    """
    used: set[str] = set()
    filled: set[tuple[str, int | None]] = set()
    for part in key_map:
        for name, path, places in _places(part, flat):
            there = [place for place in places if place.theirs in theirs]
            for place in there:
                _write(place, theirs[place.theirs])
            used.update(place.theirs for place in there)
            if len(there) == len(places):
                shown = name.replace("{n}", f"{{0..{len(places) - 1}}}")
                report.matched.append((shown, path, flat[path].shape))
                filled.add((path, part.third))
            elif there:
                lacking = next(place.theirs for place in places if place.theirs not in theirs)
                raise UserError(f"the file has {there[0].theirs} but not {lacking}")
    whole = {path for path, third in filled if third is None or {(path, n) for n in range(3)} <= filled}
    report.missing += sorted(set(flat) - whole)
    report.unused += sorted(set(theirs) - used)


def _write(place: _Place, value: np.ndarray) -> None:
    want = place.layout.out(place.ours).shape
    if value.shape != want:
        hint = ""
        if place.path.startswith(("text_embedding", "text_output")):
            hint = ": the vocabularies differ, so name the tokenizer that it was trained with"
        raise UserError(f"{place.theirs} is {list(value.shape)}, {place.path} here needs {list(want)}{hint}")
    place.ours[...] = place.layout.back(np.asarray(value, np.float32), place.ours.shape)


def draw(key_map: KeyMap, flat: Arrays) -> tuple[dict[str, np.ndarray], Report]:
    """Their arrays, float32, of ours; the report's `unused` are ours that they have no place for."""
    report, found = Report(), {}
    for part in key_map:
        for name, path, places in _places(part, flat):
            for place in places:
                found[place.theirs] = np.ascontiguousarray(place.layout.out(np.asarray(place.ours, np.float32)))
            report.matched.append((name.replace("{n}", f"{{0..{len(places) - 1}}}"), path, flat[path].shape))
    report.unused = sorted(set(flat) - {path for _, path, _ in report.matched})
    return found, report
