"""Several sources in one run: paired data, texts alone, pictures alone, several sets.

Every global batch holds fixed counts of each kind. Sources that hold the same modalities form one part of the batch,
with its own static shape; within a part the sources take turns in a fixed pattern. Each source keeps its own draw
counter, a closed form of the step, hence its own epochs: nothing to save, and the same on any number of hosts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.data.pipeline import Feed, train_view
from m3ae_jax.data.sources import build_source, open_source
from m3ae_jax.data.sources.base import Source
from m3ae_jax.errors import UserError

_PATTERN = 1000
"""Slots of a part after which its sources' turns repeat: weights within a part are rounded to thousandths."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One source of a mixture.

    Attributes:
        name: its name in ``data.mixture``; ``train`` where there is no mixture.
        source: the source.
        weight: its share of all examples, before rounding.
    """

    name: str
    source: Source
    modalities: tuple[str, ...]
    weight: float


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of a batch that hold the same modalities.

    Attributes:
        modalities: of its rows.
        members: places in `Mixture.members`.
        size: rows of the global batch.
        turns: `[P]`, which of its members each of P slots on end takes.
    """

    modalities: tuple[str, ...]
    members: tuple[int, ...]
    size: int
    turns: np.ndarray

    @property
    def name(self) -> str:
        """``image+text``, ``image`` or ``text``."""
        return "+".join(self.modalities)

    def drawn(self, member: int, step: int) -> int:
        """Draws of a member before a step."""
        place, slots = self.members.index(member), step * self.size
        whole, rest = divmod(slots, len(self.turns))
        return int(whole * (self.turns == place).sum() + (self.turns[:rest] == place).sum())


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What a run trains on.

    Attributes:
        members: all sources, by name.
        parts: of every batch.
        batch_size: rows of all parts.
        epoch_source: the member whose passes are epochs.
    """

    members: tuple[Member, ...]
    parts: tuple[Part, ...]
    batch_size: int
    epoch_source: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the members; empty where there is one alone."""
        return tuple(member.name for member in self.members) if len(self.members) > 1 else ()

    def share(self, member: int) -> float:
        """Of the examples, exactly."""
        part = self._part_of(member)
        return part.size / self.batch_size * float((part.turns == part.members.index(member)).mean())

    @property
    def epoch_examples(self) -> int:
        """Examples of all sources until `epoch_source` has been passed once."""
        return round(len(self.members[self.epoch_source].source) / self.share(self.epoch_source))

    def progress(self, step: int) -> dict[str, float]:
        """``share/NAME`` and ``epochs/NAME`` after a step; nothing where there is one source alone."""
        values = {}
        for place, name in enumerate(self.names):
            drawn = self._part_of(place).drawn(place, step)
            values[f"share/{name}"] = self.share(place)
            values[f"epochs/{name}"] = drawn / len(self.members[place].source)
        return values

    @property
    def fingerprint(self) -> str:
        """Of the sources' content and of how they take turns."""
        if len(self.members) == 1:
            return self.members[0].source.fingerprint
        digest = hashlib.sha256()
        for member in self.members:
            digest.update(f"{member.name} {member.source.fingerprint} {member.modalities}\n".encode())
        for part in self.parts:
            digest.update(f"{part.name} {part.size} ".encode() + part.turns.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def feed(self, part: Part, config: ConfigDict) -> Feed:
        """What the pipeline reads for a part."""
        views = []
        for place in part.members:
            member = self.members[place]
            view = train_view(config, member.source, member.name)
            if self.names and part.modalities == ("text",):
                # A share of the pictures keeps its caption; texts that have no picture are all kept.
                view = dataclasses.replace(view, caption_fraction=1.0)
            views.append(view)
        sources = tuple(self.members[place].source for place in part.members)
        return Feed(sources, tuple(views), part.members, part.turns)

    def _part_of(self, member: int) -> Part:
        return next(part for part in self.parts if member in part.members)


def open_mixture(config: ConfigDict, unit: int) -> Mixture:
    """Opens ``data.mixture``, or ``data.train`` where that is empty.

    Args:
        config: resolved.
        unit: rows into which every part must be divisible: devices along ``data`` and ``fsdp`` x micro-batches.

    Raises:
        UserError: a source is missing, or the batch is too small for its parts.
    """
    grain = grain_of(config, unit)
    if not config.data.mixture:
        source = build_source(config, "train")
        members: tuple[Member, ...] = (Member("train", source, tuple(config.data.modalities), 1.0),)
    else:
        opened = []
        for name, spec in sorted(config.data.mixture.items()):  # a run's config.json has them sorted
            source = open_source(spec, f"data.mixture.{name}.", config)
            wanted = modalities_of(name, spec, config, source.modalities)
            opened.append(Member(name, source, wanted, spec.weight))
        members = tuple(opened)
    parts = cut([m.modalities for m in members], [m.weight for m in members], config.batch_size, grain)
    names = [member.name for member in members]
    largest = max(range(len(members)), key=lambda i: members[i].weight)
    counted = names.index(config.data.epoch_source) if config.data.epoch_source else largest
    return Mixture(members, parts, config.batch_size, counted)


def grain_of(config: ConfigDict, unit: int) -> int:
    """Rows of which every part of a batch has a multiple: of the config alone, so that no mesh changes the numbers.

    Args:
        config: resolved.
        unit: what the mesh and the micro-batches need.

    Raises:
        UserError: it is not divisible by `unit`.
    """
    if not config.data.mixture:
        return unit
    power_of_two = config.batch_size & -config.batch_size  # the largest that divides it
    most = min(256, power_of_two, max(1, config.batch_size // 8))
    grain = config.data.mixture_rows or 1 << (most.bit_length() - 1)
    if config.batch_size % grain:
        raise UserError(f"batch_size={config.batch_size} is not divisible by data.mixture_rows={grain}")
    if grain % unit:
        raise UserError(
            f"data.mixture_rows={grain} (0: the largest power of two up to 256 and an eighth of the batch) is not "
            f"divisible by {unit} (mesh: data x fsdp, times micro_batches); set it to a multiple (another run)"
        )
    return grain


_HELD = {"text": ("text",)}
"""Modalities of formats that hold no others, where the data need not be there."""


def modalities_of(
    name: str, spec: ConfigDict, config: ConfigDict, held: Sequence[str] | None = None
) -> tuple[str, ...]:
    """What a member of a mixture gives to the run.

    Args:
        name: of the member.
        spec: its fields.
        config: the whole.
        held: modalities that its source holds; None: not known.

    Raises:
        UserError: it holds none that is trained, or not what is requested of it.
    """
    requested = tuple(spec.modalities)
    if held is not None and any(m not in held for m in requested):
        raise UserError(f"data.mixture.{name}.modalities={requested!r}, but the source holds only {', '.join(held)}")
    usable = requested or tuple(held if held is not None else _HELD.get(spec.source, config.data.modalities))
    modalities = tuple(m for m in config.data.modalities if m in usable)
    if not modalities:
        raise UserError(
            f"data.mixture.{name} gives {', '.join(usable)}, and data.modalities={tuple(config.data.modalities)!r} "
            "trains none of it"
        )
    return modalities


def cut(
    modalities: Sequence[tuple[str, ...]], weights: Sequence[float], batch_size: int, unit: int
) -> tuple[Part, ...]:
    """The parts of a batch.

    Args:
        modalities: of each member.
        weights: of each member, positive.
        batch_size: rows.
        unit: divides the rows of every part.

    Raises:
        UserError: there are more parts than units.
    """
    kinds = list(dict.fromkeys(modalities))
    rows = batch_size // unit
    if rows < len(kinds):
        raise UserError(
            f"batch_size={batch_size} is too small for {len(kinds)} kinds of data ({', '.join(map('+'.join, kinds))}): "
            f"each needs {unit} rows (mesh: data x fsdp, times micro_batches)"
        )
    of_kind = [[i for i, m in enumerate(modalities) if m == kind] for kind in kinds]
    sizes = apportion([sum(weights[i] for i in members) for members in of_kind], rows)
    parts = []
    for kind, members, size in zip(kinds, of_kind, sizes, strict=True):
        counts = apportion([weights[i] for i in members], _PATTERN) if len(members) > 1 else np.array([1])
        parts.append(Part(kind, tuple(members), int(size) * unit, spread(counts)))
    return tuple(parts)


def apportion(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers, at least 1, that add up to `total` and are nearest to `weights` (largest remainders)."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while (rest := total - counts.sum()) != 0:
        owed = np.where((counts > 1) | (rest > 0), exact - counts, np.inf)
        counts[np.argmax(owed) if rest > 0 else np.argmin(owed)] += np.sign(rest)
    return counts


def spread(counts: np.ndarray) -> np.ndarray:
    """`[sum(counts)]`: each i stands `counts[i]` times, as evenly as can be."""
    places = [((k + 0.5) / n, i) for i, n in enumerate(counts.tolist()) for k in range(n)]
    return np.array([i for _, i in sorted(places)], np.int64)


def cut_mixture(config: ConfigDict, batch_size: int, unit: int) -> tuple[Part, ...]:
    """The parts of a batch of a config, whose data need not be there.

    Args:
        config: resolved.
        batch_size: the config's, or a smaller one of which operations are counted.
        unit: as `grain_of` takes it, of the config's own batch.
    """
    specs = sorted(config.data.mixture.items())
    if not specs:
        return cut([tuple(config.data.modalities)], [1.0], batch_size, unit)
    grain = grain_of(config, unit) if batch_size == config.batch_size else unit
    modalities = [modalities_of(name, spec, config) for name, spec in specs]
    return cut(modalities, [spec.weight for _, spec in specs], batch_size, grain)
