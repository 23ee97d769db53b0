"""Where the labelled examples of the evaluations come from: ``eval.train``, ``eval.test``, ``eval.outside``.

Any source with classes will do. Where none is named and the run is on ``scenes``, it is the scenes, whose truth is
known: ``eval.label`` says what of it is the class.
"""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.config.schema import source_fields
from m3ae_jax.data.order import Order, fold_seed
from m3ae_jax.data.sources import open_source
from m3ae_jax.data.sources.base import Record, Source
from m3ae_jax.data.sources.scenes import COLORS, MAX_OBJECTS, SHAPES, Scene, SceneOptions, ScenesSource, encode_bmp
from m3ae_jax.errors import UserError

UNLABELLED = -1
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
            "shape": SHAPES,
            "color": tuple(COLORS),
            "color_shape": tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES),
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
    """A source that records the labels of what was read from it, as the pipeline hands on pictures and words alone.

    Args:
        source: with or without classes.
        examples: of more examples, a random choice of so many is what it holds: the one that `clean_batches` takes.

    Attributes:
        labels: by index.
    """

    def __init__(self, source: Source, examples: int | None = None) -> None:
        self._source, self._chosen = source, None
        self.modalities, self.classes, self.fingerprint = source.modalities, source.classes, source.fingerprint
        self.labels: dict[int, int] = {}
        if examples is not None and examples < len(source):
            self._chosen = np.asarray(Order(len(source), fold_seed("evaluations")).index(np.arange(examples)))

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._source if self._chosen is None else self._chosen)

    def read(self, indices: np.ndarray) -> list[Record]:
        """The source's."""
        records = self._source.read(indices if self._chosen is None else self._chosen[indices])
        self.labels.update((i, r["label"]) for i, r in zip(indices.tolist(), records, strict=True) if "label" in r)
        return records

    def label_of(self, indices: np.ndarray) -> np.ndarray:
        """The labels of examples that were read, `[n] int32`; `UNLABELLED` of one without."""
        return np.array([self.labels.get(i, UNLABELLED) for i in indices.tolist()], np.int32)


def check_labels(valid: np.ndarray, label: np.ndarray) -> None:
    """Refuses examples without labels, and none at all.

    Args:
        valid: `[n] bool`, which could be read.
        label: `[n]`, of `LabelRecorder.label_of`.

    Raises:
        UserError: an example has no label, or there is none.
    """
    unlabelled = int((label[valid] == UNLABELLED).sum())
    if unlabelled or not valid.any():
        raise UserError(f"eval: {int(valid.sum())} labelled examples can be read, {unlabelled} without a class")


def open_labelled(config: ConfigDict, part: str) -> Source:
    """Opens ``eval.train``, ``eval.test`` or ``eval.outside``.

    Args:
        config: resolved.
        part: ``train``, ``test`` or ``outside``.

    Raises:
        UserError: none is named, it cannot be opened, or it has no classes or no modality that is trained.
    """
    spec, field = config.eval[part], f"eval.{part}."
    if not spec.path and spec.source != "scenes":
        if config.data.val.source != "scenes":
            raise UserError(
                f"evals={tuple(config.evals)!r} needs labelled data, and {field}path is empty: for one, "
                f"--config.{field}source=class_folders --config.{field}path=DIR"
            )
        spec = source_fields()
        spec.update(source="scenes", split=_SCENES_SPLIT[part])
    is_scenes = spec.source == "scenes"
    source: Source = _open_scenes(config, spec.split) if is_scenes else open_source(spec, field, config)
    if not source.classes:
        raise UserError(f"{field}path={spec.path!r}: no classes there; {field}label_key names the class's field")
    if not set(source.modalities) & set(config.data.modalities):
        raise UserError(
            f"{field}path={spec.path!r} holds only {', '.join(source.modalities)}, and data.modalities="
            f"{tuple(config.data.modalities)!r} trains none of it"
        )
    return source


def _open_scenes(config: ConfigDict, split: str) -> LabelledScenes:
    label, options = config.eval.label, SceneOptions(**config.data.scenes.to_dict())
    if label == "count" and options.min_objects == options.max_objects:
        raise UserError(f"eval.label='count': all scenes have {options.max_objects} (data.scenes.max_objects)")
    return LabelledScenes(split, options, label)


def check_labelled(config: ConfigDict, parts: tuple[str, ...]) -> None:
    """Opens the parts that an evaluation needs.

    Raises:
        UserError: as `open_labelled`, or ``eval.train`` and ``eval.test`` number other classes.
    """
    opened = {part: open_labelled(config, part) for part in parts}
    test = opened["test"].classes
    train = opened["train"].classes if "train" in opened else test
    if train != test:
        different = sorted(set(train) ^ set(test))[:5]
        what = f"only one of them has {', '.join(map(repr, different))}" if different else "they are in another order"
        raise UserError(f"eval.train has {len(train)} classes and eval.test {len(test)}: {what}")
    if len(train) < 2:
        raise UserError(f"eval.test has {len(train)} class; an evaluation needs two or more")
