"""Where the labelled examples of the evaluations come from: ``eval.train``, ``eval.test``, ``eval.outside``.

Any source with classes will do. Classes without names, numbers from 0, are as many as the part with more of them has.
Where none is named and the run is on ``scenes``, it is the scenes, whose truth is known: ``eval.label`` says what of it
is the class.
"""

from __future__ import annotations

import itertools
import logging

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.config.fields import declared
from m3ae_jax.config.schema import source_fields
from m3ae_jax.data.order import Order, fold_seed
from m3ae_jax.data.sources import open_source
from m3ae_jax.data.sources.base import Record, Source, called, where_of
from m3ae_jax.data.sources.scenes import MAX_OBJECTS, Scene, SceneOptions, ScenesSource, encode_bmp
from m3ae_jax.errors import UserError
from m3ae_jax.evals.base import amount
from m3ae_jax.evals.fields import LABELS, EvalFields

log = logging.getLogger("m3ae_jax")

UNLABELLED = -1
_COMPARED = 5  # examples that two sources of equal names and sizes are told apart by
_SCENES_SPLIT = {"train": "train", "test": "val", "outside": "val_novel"}


class LabelledScenes(ScenesSource):
    """Scenes with a class: a fact of their largest object, that with the most pixels to be seen, or how many there are.

    Args:
        split: of `ScenesSource`.
        options: what the scenes look like.
        label: one of `LABELS`.
    """

    def __init__(self, split: str, options: SceneOptions, label: str) -> None:
        super().__init__(split, options)
        self._label = label
        self.classes = {
            "shape": options.shapes,
            "color": options.colors,
            "color_shape": tuple(f"{color} {shape}" for color in options.colors for shape in options.shapes),
            "count": tuple(str(n + 1) for n in range(MAX_OBJECTS)),
        }[label]

    def read(self, indices: np.ndarray) -> list[Record]:
        """As `ScenesSource.read`, with a label."""
        scenes = [self.scene(int(index)) for index in indices]
        return [
            Record(image=encode_bmp(s.image), caption=s.caption.encode(), label=self.classes.index(self._fact(s)))
            for s in scenes
        ]

    def _fact(self, scene: Scene) -> str:
        if self._label == "count":
            return str(len(scene.objects))
        seen = np.bincount(scene.segmentation.ravel(), minlength=len(scene.objects) + 1)[1:]
        largest = scene.objects[int(np.argmax(seen))]
        return " ".join(getattr(largest, attribute) for attribute in self._label.split("_"))


class LabelRecorder:
    """A source that records labels and groups of what is read, as the pipeline hands on pictures and words alone.

    Args:
        source: with or without classes.
        examples: of more examples, a random choice of so many is what it holds: the one that `clean_batches` takes.

    Attributes:
        labels: by index.
        groups: of ``eval.group_key``, by index.
    """

    def __init__(self, source: Source, examples: int | None = None) -> None:
        self._source, self._chosen = source, None
        self.modalities, self.classes, self.fingerprint = source.modalities, source.classes, source.fingerprint
        self.where = where_of(source)
        self.labels: dict[int, int] = {}
        self.groups: dict[int, str] = {}
        if examples is not None and examples < len(source):
            self._chosen = np.asarray(Order(len(source), fold_seed("evaluations")).index(np.arange(examples)))

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._source if self._chosen is None else self._chosen)

    def read(self, indices: np.ndarray) -> list[Record]:
        """The source's."""
        records = self._source.read(indices if self._chosen is None else self._chosen[indices])
        for index, record in zip(indices.tolist(), records, strict=True):
            if "label" in record:
                self.labels[index] = record["label"]
            if "group" in record:
                self.groups[index] = record["group"]
        return records

    def label_of(self, indices: np.ndarray) -> np.ndarray:
        """The labels of examples that were read, `[n] int32`; `UNLABELLED` of one without."""
        return np.array([self.labels.get(i, UNLABELLED) for i in indices.tolist()], np.int32)

    def group_of(self, indices: np.ndarray) -> list[str | None]:
        """The groups of examples that were read; None of one without."""
        return [self.groups.get(i) for i in indices.tolist()]


def with_class(where: str, valid: np.ndarray, label: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Which examples can be read and have a class, `[n] bool`; tells of those that can be read and have none.

    Args:
        where: the data, of `named_part`.
        valid: `[n] bool`, which can be read.
        label: `[n]`, of `LabelRecorder.label_of`.
        index: `[n]`, their numbers in the source.

    Raises:
        UserError: none can be read, or more than half of those have no class.
    """
    readable, without = int(valid.sum()), valid & (label == UNLABELLED)
    if not readable:
        raise UserError(f"{where}: not one of its examples can be read")
    if count := int(without.sum()):
        have, are = ("has", "is") if count == 1 else ("have", "are")
        text, first = f"{where}: {count} of {amount(readable, 'example')} {have} no class", index[without].min()
        if count > readable / 2:
            raise UserError(
                f"{text}, e.g. example {first}: more than half; give them one, or take them out of the data"
            )
        log.warning("%s and %s left out, e.g. example %d", text, are, first)
    return valid & ~without


def labelled_fields(config: ConfigDict, part: str) -> ConfigDict:
    """The fields of ``eval.train``, ``eval.test`` or ``eval.outside``, or those of scenes that stand in for it.

    Raises:
        UserError: none is named, and the run is not on scenes.
    """
    spec, field = config.eval[part], f"eval.{part}."
    if spec.path or spec.source == "scenes":
        return spec
    if config.data.val.source != "scenes":
        raise UserError(
            f"evals={tuple(config.evals)!r} needs labelled data, and {field}path is empty: for one, "
            f"--config.{field}source=class_folders --config.{field}path=DIR"
        )
    spec = source_fields()
    spec.update(source="scenes", split=_SCENES_SPLIT[part])
    return spec


def named_part(config: ConfigDict, part: str) -> str:
    """A part of ``config.eval`` and its data, for messages.

    Raises:
        UserError: as `labelled_fields`.
    """
    spec = labelled_fields(config, part)
    return f"eval.{part} ({spec.path or f'{spec.source}, {spec.split}'})"


def open_labelled(config: ConfigDict, part: str) -> Source:
    """Opens ``eval.train``, ``eval.test`` or ``eval.outside``.

    Args:
        config: resolved.
        part: ``train``, whose records have a group by ``eval.group_key``, ``test`` or ``outside``.

    Raises:
        UserError: none is named, it cannot be opened, it lacks the key, or it has no classes or no modality that is
            trained.
    """
    spec, field = labelled_fields(config, part), f"eval.{part}."
    group_key = config.eval.group_key if part == "train" else ""
    source: Source
    if spec.source == "scenes":
        if group_key:
            raise UserError(f"eval.group_key={group_key!r}: scenes have no fields, and no two belong together")
        source = _open_scenes(config, spec.split, field)
    else:
        source = open_source(spec, field, config, group_key)
    if not source.classes:
        uses = getattr(source, "uses", None)
        knows_classes = uses is None or "label_key" in uses
        hint = f"{field}label_key names the class's field" if knows_classes else f"the format {spec.source} has none"
        raise UserError(f"{field}path={spec.path!r}: no classes there; {hint}")
    if not set(source.modalities) & set(config.data.modalities):
        raise UserError(
            f"{field}path={spec.path!r} holds only {', '.join(source.modalities)}, and data.modalities="
            f"{tuple(config.data.modalities)!r} trains none of it"
        )
    return source


def _open_scenes(config: ConfigDict, split: str, field: str) -> LabelledScenes:
    label, options = config.eval.label, SceneOptions(**config.data.scenes.to_dict())
    if label == "count" and options.min_objects == options.max_objects:
        others = ", ".join(name for name in LABELS if name != label)
        raise UserError(
            f"eval.label='count': all scenes have {amount(options.max_objects, 'object')}, which makes one class "
            f"(data.scenes.min_objects and max_objects are equal); other labels are {others}"
        )
    source: LabelledScenes = called(LabelledScenes(split, options, label), field)
    if len(source.classes) == 1:
        raise UserError(f"eval.label={label!r}: data.scenes has one alone, {source.classes[0]}")
    return source


def common_classes(train: tuple[str, ...], test: tuple[str, ...]) -> tuple[str, ...]:
    """The classes that ``eval.train`` and ``eval.test`` number; those without names by the larger count.

    Args:
        train: of the one.
        test: of the other, equal where the classes have names (`check_labelled`).
    """
    return max(train, test, key=len) if _unnamed(train) and _unnamed(test) else train


def _unnamed(classes: tuple[str, ...]) -> bool:
    """Whether classes are but numbers: a part whose examples lack the last ones then has fewer of the same."""
    return classes == tuple(map(str, range(len(classes))))


def check_labelled(config: ConfigDict, parts: tuple[str, ...]) -> None:
    """Opens the parts that an evaluation needs.

    Raises:
        UserError: as `open_labelled`, ``eval.train`` and ``eval.test`` number other classes, or two parts are the same
            data.
    """
    opened = {part: open_labelled(config, part) for part in parts}
    _check_label(config, parts)
    test = opened["test"].classes
    train = opened["train"].classes if "train" in opened else test
    classes = common_classes(train, test)
    if train != test and not (_unnamed(train) and _unnamed(test)):
        different = sorted(set(train) ^ set(test))[:5]
        what = f"only one of them has {', '.join(map(repr, different))}" if different else "they are in another order"
        raise UserError(f"eval.train has {amount(len(train), 'class', 'classes')} and eval.test {len(test)}: {what}")
    if len(classes) < 2:
        raise UserError(f"eval.test has {amount(len(classes), 'class', 'classes')}; an evaluation needs two or more")
    if config.eval.group_key and "train" in opened:
        # Read by group, it has another fingerprint than the same data have as another part.
        ungrouped = config.copy_and_resolve_references()
        ungrouped.eval.group_key = ""
        opened["train"] = open_labelled(ungrouped, "train")
    _check_others(config, opened)


def _check_label(config: ConfigDict, parts: tuple[str, ...]) -> None:
    """Refuses a class of scenes for data that are none: it would change nothing.

    Raises:
        UserError: as said.
    """
    specs = {part: labelled_fields(config, part) for part in parts}
    default = declared(EvalFields)["label"].default
    if config.eval.label == default or any(spec.source == "scenes" for spec in specs.values()):
        return
    part, spec = next(iter(specs.items()))
    raise UserError(
        f"eval.label={config.eval.label!r} is a class of scenes, and eval.{part} is {spec.source} ({spec.path}), which "
        f"has classes of its own: leave it out; eval.{part}.label_key names their field where a format has several"
    )


def _check_others(config: ConfigDict, opened: dict[str, Source]) -> None:
    """Refuses the same data as two parts.

    Raises:
        UserError: there are such parts.
    """
    for one, other in itertools.combinations(opened, 2):
        if _same(opened[one], opened[other]):
            raise UserError(
                f"{named_part(config, other)} holds the same examples as {named_part(config, one)}: what was learnt by "
                "heart would count as right; name other data or another split"
            )


def _same(one: Source, other: Source) -> bool:
    if one.fingerprint != other.fingerprint or one.modalities != other.modalities or len(one) != len(other):
        return False
    # A fingerprint tells of names and sizes: those of uncompressed pictures may be equal in two folders of numbers.
    few = np.unique(np.linspace(0, len(one) - 1, _COMPARED, dtype=np.int64))
    contents = ([(r.get("image"), r.get("caption")) for r in source.read(few)] for source in (one, other))
    return next(contents) == next(contents)
