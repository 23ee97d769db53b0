"""Endless drawn scenes with captions: a built-in data set whose every answer is known.

Example `i` is a pure function of (seed, split, i): a few coloured shapes on a muted background and one true
sentence about some of them. Nothing is downloaded or stored. Because the ground truth is known, an evaluation
can ask for exactly those words which the picture and the rest of the caption determine
(`Scene.determined_spans`).

A scene is laid out in units of the picture's side, x to the right and y down, so that every `image_size`
shows the same scene with the same caption. Legend: `S` picture side in pixels, `N` objects, `L` lattice side.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
from PIL import Image

from m3ae_jax.config.fields import FieldGroup, declared, setting
from m3ae_jax.data.sources import base
from m3ae_jax.errors import UserError, one_of

T = TypeVar("T")

SPLITS = ("train", "val", "val_novel")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 28, 36),
    "orange": (255, 134, 0),
    "yellow": (255, 232, 30),
    "green": (22, 160, 48),
    "cyan": (50, 220, 235),
    "blue": (28, 62, 225),
    "purple": (128, 26, 170),
    "pink": (255, 130, 200),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("plain", "shaded", "cloudy", "striped", "checkered")
# Each colour and each shape stands here once, so that the training pairs stay balanced in both.
HELD_OUT = (
    ("red", "diamond"),
    ("orange", "cross"),
    ("yellow", "heart"),
    ("green", "circle"),
    ("cyan", "triangle"),
    ("blue", "star"),
    ("purple", "square"),
    ("pink", "ring"),
)
DETERMINED_VISIBLE = 0.5
MAX_OBJECTS = 6
MAX_WORDS = 16

_VERSION = 1  # part of the fingerprint: raise it with every change that alters a scene
_RADIUS = {"small": (0.14, 0.17), "large": (0.23, 0.28)}  # picture sides; disjoint, so the size word is true
_MENTIONABLE = 0.3  # an object that is hidden more than this leaves unmentioned where another can be named
_OVERLAP = 0.06  # share of the rear object that must be covered before "in front of" is said
_LATTICE = 48  # visibility is measured on this lattice, not in pixels: captions must not depend on `S`
_OUTLINE = 0.014  # picture sides
_TEXTURE_PERIOD = 0.085  # picture sides: three periods across the smallest object
_PREFIXES = ("there is", "this is", "here is", "we see", "a picture of", "a drawing of", "an image with")
_ARTICLE = re.compile(r"\ban? (?=(\w))")
_RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
    "front": ("in front of",),
    "behind": ("behind",),
}


@dataclasses.dataclass(frozen=True)
class SceneOptions(FieldGroup):
    """What the scenes look like.

    Raises:
        UserError: a value is no integer or out of its range.
    """

    seed: int = setting(0, low=0, high=2**63 - 1)
    """Another seed is another data set."""
    image_size: int = setting(64, low=16, high=4096)
    """Side of a picture in pixels."""
    min_objects: int = setting(1, low=1, high=MAX_OBJECTS)
    """Fewest objects of a scene."""
    max_objects: int = setting(3, low=1, high=MAX_OBJECTS)
    """Most objects of a scene."""
    clutter: int = setting(0, low=0, high=1000)
    """Small coloured strokes behind the objects that no caption mentions."""
    num_examples: int = setting(2**31, low=1, high=2**32)
    """Examples of a split, an epoch; more than any run draws."""
    colors: tuple[str, ...] = setting(tuple(COLORS), choices=tuple(COLORS))
    """Of the objects. Fewer colours, shapes and so on make easier scenes, for smaller models and shorter training."""
    shapes: tuple[str, ...] = setting(SHAPES, choices=SHAPES)
    """Of the objects."""
    sizes: tuple[str, ...] = setting(SIZES, choices=SIZES)
    """Of the objects."""
    textures: tuple[str, ...] = setting(TEXTURES, choices=TEXTURES)
    """Of the objects."""
    backgrounds: tuple[str, ...] = setting(BACKGROUNDS, choices=BACKGROUNDS)
    """Behind them."""

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name, field in declared(SceneOptions).items():
            value, low, high = getattr(self, name), field.low or 0, field.high
            if field.choices:
                _check_names(f"scenes.{name}", tuple(value), field.choices)
                # In the order of all, which the draws and the fingerprint depend on.
                object.__setattr__(self, name, tuple(one for one in field.choices if one in value))
            elif not isinstance(value, int) or not low <= value <= high:
                raise UserError(f"scenes.{name}={value!r} is not an integer in {low}..{high}")
        if self.min_objects > self.max_objects:
            raise UserError(
                f"scenes.min_objects={self.min_objects} is above scenes.max_objects={self.max_objects}; "
                f"allowed are 1 <= min_objects <= max_objects <= {MAX_OBJECTS}"
            )
        if not self.pairs(novel=False):
            raise UserError(f"scenes.colors={self.colors}, scenes.shapes={self.shapes}: no training picture has these")

    def pairs(self, novel: bool) -> tuple[tuple[str, str], ...]:
        """The pairs of colour and shape that objects have: those of ``val_novel`` alone, or those of every split."""
        return _pairs(self.colors, self.shapes, novel)

    def identity(self) -> tuple[Any, ...]:
        """What a fingerprint is made of; names that are all there are add nothing, as before they could be chosen."""
        fields = declared(SceneOptions).items()
        numbers = tuple(getattr(self, name) for name, field in fields if not field.choices)
        fewer = [
            (name, getattr(self, name))
            for name, field in fields
            if field.choices and getattr(self, name) != field.default
        ]
        return (numbers, *fewer)


@functools.lru_cache(maxsize=16)
def _pairs(colors: tuple[str, ...], shapes: tuple[str, ...], novel: bool) -> tuple[tuple[str, str], ...]:
    """In the order of `HELD_OUT`, or of `COLORS` and `SHAPES`."""
    pairs = HELD_OUT if novel else tuple((c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT)
    return tuple((c, s) for c, s in pairs if c in colors and s in shapes)


def _check_names(name: str, value: tuple[str, ...], choices: tuple[str, ...]) -> None:
    for one in value:
        if one not in choices:
            raise UserError(one_of(name, one, choices))
    if not value or len(set(value)) < len(value):
        raise UserError(f"{name}={value} must name one of {', '.join(choices)} at least, and none twice")


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One object, in pixels of the picture.

    Attributes:
        shape: one of `SHAPES`.
        color: a key of `COLORS`.
        size: one of `SIZES`.
        texture: one of `TEXTURES`.
        center: x and y.
        radius: nominal radius; a pointed shape reaches up to a quarter further.
        box: x0, y0, x1, y1 around the whole object, its covered part included.
        visible_fraction: share of its own area that no nearer object covers.
    """

    shape: str
    color: str
    size: str
    texture: str
    center: tuple[float, float]
    radius: float
    box: tuple[float, float, float, float]
    visible_fraction: float


@dataclasses.dataclass(frozen=True)
class Span:
    """An attribute word: `caption[start:end]`, characters; attribute is color, shape, size or texture."""

    attribute: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Mention:
    """Where the caption names an object: its index in `Scene.objects` and its attribute words, in order."""

    object: int
    spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture, its caption and the truth behind both.

    Attributes:
        image: `[S, S, 3] uint8` RGB.
        caption: lower-case words, each separated by one space.
        objects: back to front.
        segmentation: `[S, S] uint8`, 0 the background, i + 1 object i.
        depth: `[S, S] float32`, 1 the background, nearer objects smaller.
        background: one of `BACKGROUNDS`.
        mentions: in the caption's order.
    """

    image: np.ndarray
    caption: str
    objects: tuple[SceneObject, ...]
    segmentation: np.ndarray
    depth: np.ndarray
    background: str
    mentions: tuple[Mention, ...]

    def determined_spans(self) -> tuple[tuple[Mention, Span], ...]:
        """The color and shape words that follow from the picture and the other words of their mention.

        With the word hidden, the candidates are all objects visible to at least `DETERMINED_VISIBLE` that
        match every other attribute word of the mention. The word is determined if the object meant is one of
        them and all have the same hidden attribute.
        """
        return tuple(
            (mention, hidden)
            for mention in self.mentions
            for hidden in mention.spans
            if hidden.attribute in ("color", "shape") and self._is_determined(mention, hidden)
        )

    def twin(self, attribute: str) -> str | None:
        """The caption with the colours, or the shapes, of its two objects exchanged: untrue, of the same words.

        None where the caption does not tell two objects apart by it, where the exchange would name a pair of colour and
        shape that the split does not draw, or where the picture happens to show what the twin says.

        Args:
            attribute: ``color`` or ``shape``.
        """
        if len(self.mentions) != 2:
            return None
        words = [{s.attribute: self.caption[s.start : s.end] for s in mention.spans} for mention in self.mentions]
        if any({"color", "shape"} - of.keys() for of in words) or words[0][attribute] == words[1][attribute]:
            return None
        exchanged = [{**of, attribute: other[attribute]} for of, other in zip(words, words[::-1], strict=True)]
        held_out = {(of["color"], of["shape"]) in HELD_OUT for of in words}
        if any(((of["color"], of["shape"]) in HELD_OUT) not in held_out for of in exchanged):
            return None
        shown = [any(all(getattr(o, a) == word for a, word in of.items()) for o in self.objects) for of in exchanged]
        if all(shown):
            return None
        caption = self.caption
        for mention, of in sorted(zip(self.mentions, exchanged, strict=True), key=lambda pair: -pair[0].spans[0].start):
            (span,) = (s for s in mention.spans if s.attribute == attribute)
            caption = caption[: span.start] + of[attribute] + caption[span.end :]
        return _ARTICLE.sub(lambda found: "an " if found[1] in "aeiou" else "a ", caption)

    def _is_determined(self, mention: Mention, hidden: Span) -> bool:
        known = {s.attribute: self.caption[s.start : s.end] for s in mention.spans if s is not hidden}
        candidates = [
            o
            for o in self.objects
            if o.visible_fraction >= DETERMINED_VISIBLE and all(getattr(o, a) == w for a, w in known.items())
        ]
        # Compared by identity: two objects may be equal in every attribute.
        is_candidate = any(o is self.objects[mention.object] for o in candidates)
        return is_candidate and len({getattr(o, hidden.attribute) for o in candidates}) == 1


class ScenesSource:
    """The scenes of one split as a source of records (see `base.Source`).

    Attributes:
        modalities: `("image", "text")`.
        split: one of `SPLITS`; in `val_novel` each scene names an object of a `HELD_OUT` pair, and no other
            split draws one.
        options: what the scenes look like.
    """

    uses: ClassVar[frozenset[str]] = frozenset({"split"})
    modalities: tuple[str, ...] = ("image", "text")
    classes: tuple[str, ...] = ()

    def __init__(self, split: str, options: SceneOptions = SceneOptions()) -> None:
        """Opens a split.

        Raises:
            UserError: there is no such split.
        """
        if split not in SPLITS:
            raise UserError(one_of("scenes.split", split, SPLITS))
        if split == "val_novel" and not options.pairs(novel=True):
            raise UserError(
                f"scenes.colors={options.colors}, scenes.shapes={options.shapes}: val_novel draws pairs that training "
                "does not, and of these there is none"
            )
        self.split = split
        self.options = options

    @property
    def fingerprint(self) -> str:
        """A short hex string that changes with the split, the options and the generator's version."""
        identity = (_VERSION, self.split, *self.options.identity())
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Number of examples."""
        return self.options.num_examples

    def read(self, indices: np.ndarray) -> list[base.Record]:
        """Draws examples, in the order of `indices`; safe to call from several threads.

        Args:
            indices: `[n] int64`, each in `[0, len(self))`.

        Returns:
            Records with a BMP picture and a caption.

        Raises:
            IndexError: an index is out of range.
        """
        scenes = (self.scene(int(index)) for index in indices)
        return [base.Record(image=encode_bmp(s.image), caption=s.caption.encode()) for s in scenes]

    def scene(self, index: int) -> Scene:
        """Draws example `index` with its ground truth.

        Raises:
            IndexError: the index is out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"scenes index {index} is not in 0..{len(self) - 1}")
        options = self.options
        # The seed comes last: it alone may be longer than one 32-bit word.
        draws = _Draws([SPLITS.index(self.split), index, options.seed])
        layout = _draw_layout(draws, options, novel=self.split == "val_novel")
        background = draws.choice(options.backgrounds)
        caption, mentions = _compose_caption(draws, layout, background)
        canvas = _draw_background(draws, background, options.image_size)
        _draw_clutter(draws, canvas, options.clutter)
        segmentation, depth = _draw_objects(canvas, layout.objects)
        objects = tuple(
            _in_pixels(placed, float(visible), options.image_size)
            for placed, visible in zip(layout.objects, layout.visible, strict=True)
        )
        image = np.ascontiguousarray((canvas * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
        return Scene(image, caption, objects, segmentation, depth, background, mentions)


def vocabulary() -> list[str]:
    """All words that a caption can hold, sorted."""
    phrases = [*COLORS, *SHAPES, *SIZES, *TEXTURES, *BACKGROUNDS, *_PREFIXES]
    phrases += [wording for wordings in _RELATIONS.values() for wording in wordings]
    phrases += ["a an and with shape is on background"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def encode_bmp(image: np.ndarray) -> bytes:
    """Encodes a picture as an uncompressed 24-bit BMP, the cheapest format that every decoder reads.

    Args:
        image: `[H, W, 3] uint8` RGB.
    """
    file = io.BytesIO()
    Image.fromarray(image).save(file, "BMP", dpi=(72, 72))
    return file.getvalue()


class _Draws:
    """Random numbers from a bit generator's raw stream.

    NumPy promises that stream for all versions, which it does not for the methods of `Generator`.
    """

    def __init__(self, entropy: list[int]) -> None:
        self._bits = np.random.PCG64(entropy)
        self._numbers = self._stream()

    def _stream(self) -> Iterator[float]:
        while True:
            yield from self.uniforms(64).tolist()

    def uniforms(self, count: int) -> np.ndarray:
        """`[count] float64` in [0, 1)."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def chance(self, probability: float) -> bool:
        return next(self._numbers) < probability

    def integer(self, count: int) -> int:
        return int(next(self._numbers) * count)

    def choice(self, options: Sequence[T]) -> T:
        return options[self.integer(len(options))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        pool = list(items)
        return [pool.pop(self.integer(len(pool))) for _ in items]


# --- Shapes -------------------------------------------------------------------------------------------------
# A shape is a signed distance (negative inside) over its own coordinates u (right) and v (down), in radii.
# Distances need to be exact near the border alone, where they make the anti-aliasing.

_TRIANGLE = 1.25  # circumradius
_STAR, _NOTCH = 1.22, 0.56  # radii of the tips and of the notches between them
_ARM = 0.36  # half the width of the cross' arms
_HOLE = 0.54  # inner radius of the ring
_RHOMB = (0.78, 1.2)  # half axes
_SQUARE = 0.86  # half side
_HEART = 0.84  # half diagonal of the square under its two discs
_HEART_DISC = _HEART * math.sqrt(0.5)
_HEART_SHIFT = (0.5 * _HEART + _HEART_DISC - _HEART) / 2  # centres its box


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v) - 1


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    middle, half_width = (1 + _HOLE) / 2, (1 - _HOLE) / 2
    return np.abs(np.sqrt(u * u + v * v) - middle) - half_width


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - _SQUARE


def _diamond(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    a, b = _RHOMB
    return (np.abs(u) * b + np.abs(v) * a - a * b) / math.hypot(a, b)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    v = v - _TRIANGLE / 4  # centres its box
    return np.maximum(v, np.abs(u) * math.sqrt(0.75) - 0.5 * v) - _TRIANGLE / 2


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(u, v) - _ARM, np.maximum(u, v) - 1)


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), v - _HEART_SHIFT
    square = (u + np.abs(v) - _HEART) * math.sqrt(0.5)
    disc = np.sqrt((u - _HEART / 2) ** 2 + (v + _HEART / 2) ** 2) - _HEART_DISC
    return np.minimum(square, disc)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, up = np.abs(u), -v
    # Mirrored at the notches' axes, all ten edges fall on one.
    for angle in (math.radians(108), math.radians(36)):
        beyond = 2 * np.maximum(u * math.cos(angle) - up * math.sin(angle), 0)
        u, up = u - beyond * math.cos(angle), up + beyond * math.sin(angle)
    edge_u = _NOTCH * math.sin(math.radians(36))
    edge_up = _STAR - _NOTCH * math.cos(math.radians(36))
    return (np.abs(u) * edge_up + (up - _STAR) * edge_u) / math.hypot(edge_u, edge_up)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """A shape's distance, the discs (u, v, radius) whose convex hull is its own, and its free rotation.

    `turn` (radians, either way) is small enough that no shape turns into another.
    """

    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]
    hull: tuple[tuple[float, float, float], ...]
    turn: float

    @functools.cached_property
    def reach(self) -> float:
        return max(math.hypot(u, v) + r for u, v, r in self.hull)


def _corners(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float, float], ...]:
    return tuple((u, v, 0.0) for u, v in points)


def _polar(radius: float, count: int, shift: float = 0.0) -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / count for i in range(count)]
    return [(radius * math.sin(a), shift - radius * math.cos(a)) for a in angles]


_ROUND = ((0.0, 0.0, 1.0),)
_LOBE = (0.5 * _HEART, _HEART_SHIFT - 0.5 * _HEART, _HEART_DISC)
_DRAWN: dict[str, _Shape] = {
    "circle": _Shape(_circle, _ROUND, 0.0),
    "square": _Shape(_square, _corners([(a * _SQUARE, b * _SQUARE) for a in (-1, 1) for b in (-1, 1)]), 0.15),
    "triangle": _Shape(_triangle, _corners(_polar(_TRIANGLE, 3, _TRIANGLE / 4)), 0.2),
    "star": _Shape(_star, _corners(_polar(_STAR, 5)), 0.3),
    "cross": _Shape(_cross, _corners([p for a in (-1, 1) for b in (-_ARM, _ARM) for p in ((a, b), (b, a))]), 0.2),
    "ring": _Shape(_ring, _ROUND, 0.0),
    "diamond": _Shape(_diamond, _corners([(s * _RHOMB[0], 0) for s in (-1, 1)] + _polar(_RHOMB[1], 2)), 0.12),
    "heart": _Shape(_heart, (_LOBE, (-_LOBE[0], *_LOBE[1:]), (0.0, _HEART + _HEART_SHIFT, 0.0)), 0.2),
}


# --- Layout -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Placed:
    """An object in units of the picture's side."""

    shape: str
    color: str
    size: str
    texture: str
    radius: float
    angle: float
    phase: float
    jitter: np.ndarray  # `[3]`, added to its colour
    x: float = 0.0
    y: float = 0.0

    @functools.cached_property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        hull = [(c * u - s * v, s * u + c * v, r) for u, v, r in _DRAWN[self.shape].hull]
        return (
            self.x + self.radius * min(u - r for u, _, r in hull),
            self.y + self.radius * min(v - r for _, v, r in hull),
            self.x + self.radius * max(u + r for u, _, r in hull),
            self.y + self.radius * max(v + r for _, v, r in hull),
        )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Objects back to front, `masks` `[N, L, L] bool`, `visible` `[N] float64`, the novel object's index."""

    objects: list[_Placed]
    masks: np.ndarray
    visible: np.ndarray
    novel: int | None


@dataclasses.dataclass(frozen=True)
class _Region:
    """The pixels around an object: their slices, own coordinates `u`, `v` (radii), distance (pixels)."""

    where: tuple[slice, slice]
    u: np.ndarray
    v: np.ndarray
    distance: np.ndarray


@functools.lru_cache(maxsize=16)
def _pixel_centers(size: int) -> np.ndarray:
    centers = ((np.arange(size) + 0.5) / size).astype(np.float32)
    centers.flags.writeable = False
    return centers


def _region(placed: _Placed, size: int) -> _Region:
    """Evaluates an object's distance within its box on a grid of `size` x `size` pixels."""
    x0, y0, x1, y1 = (edge * size for edge in placed.box)
    rows = slice(max(0, int(y0) - 1), min(size, int(y1) + 2))
    columns = slice(max(0, int(x0) - 1), min(size, int(x1) + 2))
    centers = _pixel_centers(size)
    dx = (centers[columns] - placed.x) / placed.radius
    dy = (centers[rows, None] - placed.y) / placed.radius
    c, s = math.cos(placed.angle), math.sin(placed.angle)
    u, v = c * dx + s * dy, c * dy - s * dx
    distance = _DRAWN[placed.shape].distance(u, v) * (placed.radius * size)
    return _Region((rows, columns), u, v, distance)


def _draw_layout(draws: _Draws, options: SceneOptions, novel: bool) -> _Layout:
    """Draws objects and places them; where one is mostly hidden it places anew, a few times."""
    count = options.min_objects + draws.integer(options.max_objects - options.min_objects + 1)
    novel_index = draws.integer(count) if novel else None
    objects = [_draw_object(draws, options, i == novel_index, crowded=count > 3) for i in range(count)]
    best: _Layout | None = None
    for _ in range(4):
        placed = _place(draws, objects)
        masks, visible = _measure(placed)
        if best is None or visible.min() > best.visible.min():
            best = _Layout(placed, masks, visible, novel_index)
        if best.visible.min() >= _MENTIONABLE:
            break
    assert best is not None
    return best


def _draw_object(draws: _Draws, options: SceneOptions, novel: bool, crowded: bool) -> _Placed:
    color, shape = draws.choice(options.pairs(novel))
    size = "large" if draws.chance(0.25 if crowded else 0.5) else "small"
    size = size if size in options.sizes else options.sizes[0]
    marked = [texture for texture in options.textures if texture != "plain"]
    plain = "plain" in options.textures and draws.chance(0.5)
    texture = "plain" if plain or not marked else draws.choice(marked)
    turn = _DRAWN[shape].turn
    return _Placed(
        shape,
        color,
        size,
        texture,
        radius=draws.uniform(*_RADIUS[size]),
        angle=draws.uniform(-turn, turn),
        phase=draws.uniform(0, 1),
        jitter=np.array([draws.uniform(-0.035, 0.035) for _ in range(3)]),
    )


def _place(draws: _Draws, objects: Sequence[_Placed]) -> list[_Placed]:
    """Places objects inside the picture, each at the one of a few spots that overlaps the earlier least."""
    done: list[_Placed] = []
    for item in objects:
        margin = item.radius * _DRAWN[item.shape].reach
        spots = [(draws.uniform(margin, 1 - margin), draws.uniform(margin, 1 - margin)) for _ in range(4)]
        overlaps = [
            sum(max(0.0, item.radius + o.radius - math.hypot(x - o.x, y - o.y)) for o in done) for x, y in spots
        ]
        x, y = spots[overlaps.index(min(overlaps))]
        done.append(dataclasses.replace(item, x=x, y=y))
    return done


def _measure(objects: Sequence[_Placed]) -> tuple[np.ndarray, np.ndarray]:
    """Masks `[N, L, L] bool` on the lattice and the visible share `[N] float64` of each object."""
    masks = np.zeros((len(objects), _LATTICE, _LATTICE), bool)
    for mask, placed in zip(masks, objects, strict=True):
        region = _region(placed, _LATTICE)
        mask[region.where] = region.distance < 0
    visible = np.ones(len(objects))
    nearer = masks[-1].copy()
    for i in range(len(objects) - 2, -1, -1):
        visible[i] = 1 - np.count_nonzero(masks[i] & nearer) / np.count_nonzero(masks[i])
        nearer |= masks[i]
    return masks, visible


def _in_pixels(placed: _Placed, visible: float, size: int) -> SceneObject:
    x0, y0, x1, y1 = placed.box
    return SceneObject(
        placed.shape,
        placed.color,
        placed.size,
        placed.texture,
        center=(placed.x * size, placed.y * size),
        radius=placed.radius * size,
        box=(x0 * size, y0 * size, x1 * size, y1 * size),
        visible_fraction=visible,
    )


# --- Caption ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Word:
    """A word of the caption, with the attribute that it names (or None) and the object meant."""

    text: str
    attribute: str | None = None
    object: int = -1


def _plain_words(phrase: str) -> list[_Word]:
    return [_Word(text) for text in phrase.split()]


def _compose_caption(draws: _Draws, layout: _Layout, background: str) -> tuple[str, tuple[Mention, ...]]:
    """Says something true about one to three objects, in 3 to `MAX_WORDS` words."""
    named = _choose_mentioned(draws, layout)
    phrases = [_noun_phrase(draws, layout.objects[i], i, brief=len(named) == 3) for i in named]
    words = phrases[0]
    joined_by_is = False
    if len(named) == 2:
        wording = _relation(draws, layout, *named)
        joined_by_is = wording is not None and draws.chance(0.25)
        words = words + _plain_words(("is " if joined_by_is else "") + (wording or "and")) + phrases[1]
    elif len(named) == 3:
        words = words + _plain_words(draws.choice(("and", "with"))) + phrases[1] + [_Word("and")] + phrases[2]
    # No "this is a star is above a ring".
    if not joined_by_is and draws.chance(0.45):
        prefix = _plain_words(draws.choice(_PREFIXES))
        words = prefix + words if len(prefix) + len(words) <= MAX_WORDS else words
    if draws.chance(0.25) and len(words) + 4 <= MAX_WORDS and not joined_by_is:
        words = words + _plain_words(f"on a {background} background")
    return _spell(words, named)


def _choose_mentioned(draws: _Draws, layout: _Layout) -> list[int]:
    """Indices of the objects to name, in the caption's order; the novel one is always among them."""
    clear = [i for i in range(len(layout.objects)) if layout.visible[i] >= _MENTIONABLE]
    order = draws.shuffled(clear)
    count = min(len(order), 1 if draws.chance(0.25) else 3 if draws.chance(0.2) else 2)
    named = order[:count]
    if layout.novel is not None and layout.novel not in named:
        named[draws.integer(count)] = layout.novel
    return named


def _noun_phrase(draws: _Draws, placed: _Placed, index: int, brief: bool) -> list[_Word]:
    """Names an object: nearly always its colour and shape, at times its size and texture."""
    omitted = draws.choice(("color", "shape")) if draws.chance(0.12) else None
    says_texture = draws.chance(0.06 if placed.texture == "plain" else 0.65)
    # A phrase without colour says the size, so that it tells more than the shape.
    says_size = draws.chance(0.4) or (omitted == "color" and not says_texture)
    if brief and says_texture:
        says_size = False
    words = []
    if says_size:
        words.append(_Word(placed.size, "size", index))
    if says_texture:
        words.append(_Word(placed.texture, "texture", index))
    if omitted != "color":
        words.append(_Word(placed.color, "color", index))
    words.append(_Word("shape") if omitted == "shape" else _Word(placed.shape, "shape", index))
    return [_Word("an" if words[0].text[0] in "aeiou" else "a"), *words]


def _relation(draws: _Draws, layout: _Layout, first: int, second: int) -> str | None:
    """A wording that is clearly true of two objects, or None."""
    a, b = layout.objects[first], layout.objects[second]
    dx, dy = b.x - a.x, b.y - a.y
    true = []
    if abs(dx) > max(0.12, 0.6 * abs(dy)):
        true.append("left" if dx > 0 else "right")
    if abs(dy) > max(0.12, 0.6 * abs(dx)):
        true.append("above" if dy > 0 else "below")
    rear = layout.masks[min(first, second)]
    if np.count_nonzero(rear & layout.masks[max(first, second)]) > _OVERLAP * np.count_nonzero(rear):
        true.append("front" if first > second else "behind")
    if not true or draws.chance(0.2):
        return None
    return draws.choice(_RELATIONS[draws.choice(true)])


def _spell(words: Sequence[_Word], named: Sequence[int]) -> tuple[str, tuple[Mention, ...]]:
    """Joins words by spaces and finds the attribute words' places."""
    spans: dict[int, list[Span]] = {i: [] for i in named}
    start = 0
    for word in words:
        end = start + len(word.text)
        if word.attribute is not None:
            spans[word.object].append(Span(word.attribute, start, end))
        start = end + 1
    mentions = tuple(Mention(i, tuple(words_of_object)) for i, words_of_object in spans.items())
    return " ".join(word.text for word in words), mentions


# --- Drawing ------------------------------------------------------------------------------------------------


def _coverage(distance: np.ndarray) -> np.ndarray:
    """Share of a pixel that lies inside a border, from its signed distance in pixels."""
    return np.minimum(np.maximum(0.5 - distance, 0), 1)


def _draw_background(draws: _Draws, kind: str, size: int) -> np.ndarray:
    """Fills a new canvas with two muted tones in a pattern.

    Returns:
        `[3, S, S] float32` in [0, 1]; channels come first while drawing: NumPy is slow over inner axes of 3.
    """
    tone = draws.uniform(0.22, 0.72)
    step = draws.uniform(0.08, 0.15) * (1 if tone < 0.47 else -1)
    tint = [draws.uniform(-0.03, 0.03) for _ in range(3)]
    first = np.array([[[tone + t]] for t in tint], np.float32)
    if kind == "plain":
        return np.broadcast_to(first, (3, size, size)).copy()
    second = np.array([[[tone + step - t]] for t in tint], np.float32)
    pattern = _background_pattern(draws, kind, size)
    return first + pattern * (second - first)


def _background_pattern(draws: _Draws, kind: str, size: int) -> np.ndarray:
    """How much of the second tone each pixel has, `[S, S] float32` in [0, 1]."""
    x = _pixel_centers(size)
    y = x[:, None]
    if kind == "cloudy":
        to_pixels = _interpolation(size)
        return to_pixels @ draws.uniforms(49).reshape(7, 7).astype(np.float32) @ to_pixels.T
    if kind == "checkered":
        cells = 4 + draws.integer(5)
        return (((x * cells).astype(np.int32) + (y * cells).astype(np.int32)) % 2).astype(np.float32)
    angle = draws.uniform(0, 2 * math.pi)
    along = math.cos(angle) * (x - 0.5) + math.sin(angle) * (y - 0.5)
    if kind == "shaded":
        return along * math.sqrt(0.5) + 0.5
    period = draws.uniform(0.12, 0.25)
    return _coverage((np.abs((along / period) % 1 - 0.5) - 0.25) * (period * size))


@functools.lru_cache(maxsize=16)
def _interpolation(size: int) -> np.ndarray:
    """`[S, 7] float32`: linear interpolation from 7 evenly spaced values."""
    position = _pixel_centers(size)[:, None] * 6
    weights = np.maximum(0, 1 - np.abs(position - np.arange(7, dtype=np.float32)))
    weights.flags.writeable = False
    return weights


def _draw_clutter(draws: _Draws, canvas: np.ndarray, count: int) -> None:
    """Draws short coloured strokes."""
    size = canvas.shape[-1]
    centers = _pixel_centers(size)
    for _ in range(count):
        color = np.array(draws.choice(tuple(COLORS.values())), np.float32)[:, None, None] / 255
        x, y, angle = draws.uniform(0.05, 0.95), draws.uniform(0.05, 0.95), draws.uniform(0, math.pi)
        length, width = draws.uniform(0.015, 0.05), draws.uniform(0.008, 0.014)
        reach = length + width + 1 / size
        rows = slice(max(0, int((y - reach) * size)), int((y + reach) * size) + 1)
        columns = slice(max(0, int((x - reach) * size)), int((x + reach) * size) + 1)
        dx, dy = centers[columns] - x, centers[rows, None] - y
        c, s = math.cos(angle), math.sin(angle)
        beyond = np.maximum(np.abs(c * dx + s * dy) - length, 0)
        across = c * dy - s * dx
        distance = np.sqrt(beyond * beyond + across * across) - width
        patch = canvas[:, rows, columns]
        patch += _coverage(distance * size) * (color - patch)


def _draw_objects(canvas: np.ndarray, objects: Sequence[_Placed]) -> tuple[np.ndarray, np.ndarray]:
    """Draws objects onto the canvas, back to front.

    Returns:
        Segmentation `[S, S] uint8` and depth `[S, S] float32`, as in `Scene`.
    """
    size = canvas.shape[-1]
    segmentation = np.zeros((size, size), np.uint8)
    for i, placed in enumerate(objects):
        region = _region(placed, size)
        segmentation[region.where][region.distance < 0] = i + 1
        patch = canvas[:, *region.where]
        patch += _coverage(region.distance) * (_paint(placed, region, size) - patch)
    levels = 1 - np.arange(len(objects) + 1, dtype=np.float32) / (len(objects) + 1)
    return segmentation, levels[segmentation]


def _paint(placed: _Placed, region: _Region, size: int) -> np.ndarray:
    """An object's colour at each pixel of its region, `[3, h, w] float32` in [0, 1]."""
    color = np.minimum(np.maximum(np.array(COLORS[placed.color]) / 255 + placed.jitter, 0), 1)
    # A darker rim parts an object from one of its own colour behind it.
    rim = _coverage(-region.distance - _OUTLINE * size)
    paint = color.astype(np.float32)[:, None, None] * (1 - 0.45 * rim)
    if placed.texture == "plain":
        return paint
    marks = _marks(placed, region, size) * (1 - rim)
    return paint + 0.8 * marks * (1 - paint)


def _marks(placed: _Placed, region: _Region, size: int) -> np.ndarray:
    """How white each pixel of a textured object is, `[h, w] float32` in [0, 1]."""
    scale = placed.radius / _TEXTURE_PERIOD
    to_pixels = _TEXTURE_PERIOD * size
    across = np.abs((region.v * scale + placed.phase) % 1 - 0.5)
    if placed.texture == "striped":
        return _coverage((across - 0.2) * to_pixels)
    along = np.abs((region.u * scale + placed.phase) % 1 - 0.5)
    return _coverage((np.sqrt(across * across + along * along) - 0.3) * to_pixels)
