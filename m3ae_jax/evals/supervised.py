"""What linear probe and fine-tuning share: labelled batches on the mesh, the loop over them, figures, the table.

Both train on ``eval.train`` by a recipe in ``config.eval.<name>`` and count ``eval.test`` once. Their state lives in
memory alone: an evaluation that is stopped starts anew. Nothing is chosen by the test examples: what is reported is
the state after the last step.

Legend: ``B`` examples of a batch, ``C`` classes, ``D`` width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.config import steps
from m3ae_jax.data.order import Order, fold_seed
from m3ae_jax.data.pipeline import Batches, Feed, View
from m3ae_jax.data.sources.base import Record, Source
from m3ae_jax.errors import UserError
from m3ae_jax.evals import Result
from m3ae_jax.evals.clean import clean_batches
from m3ae_jax.evals.features import Figures, pooled, shown
from m3ae_jax.evals.labelled import UNLABELLED, Noted, open_labelled
from m3ae_jax.objectives.base import Batch, Objective, Params
from m3ae_jax.parallel.mesh import batch_parts, fetch, local_rows, put_batch
from m3ae_jax.train.setup import Setup

log = logging.getLogger("m3ae_jax")

S = TypeVar("S")

Sums = dict[str, jax.Array]
"""Of a batch, see `sums`; what was counted, not yet divided."""

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""Of a training picture, see `data.pipeline.View`."""

PROTOCOLS = ("linear_probe", "finetune")
INPUTS = {"image": ("image",), "text": ("text",), "both": ("image", "text")}
_REPORTS = 10  # progress lines; the last of these parts of a training is what its figures are of
_UNFETCHED = 50  # steps after which the host waits for the device, which bounds what is in flight


def check(config: ConfigDict) -> None:
    """Refuses an input that the model or the labelled data do not have.

    Raises:
        UserError: as said.
    """
    for name in PROTOCOLS:
        if name not in config.evals:
            continue
        wanted = INPUTS[config.eval[name].input]
        holders = {"data": config.data.modalities}
        holders |= {f"eval.{part}": open_labelled(config, part).modalities for part in ("train", "test")}
        for where, modalities in holders.items():
            if not set(wanted) <= set(modalities):
                raise UserError(
                    f"eval.{name}.input={config.eval[name].input!r} needs {' and '.join(wanted)}: {where} has only "
                    f"{', '.join(modalities)}"
                )


class Chosen:
    """A random choice of a source's examples, the same that `clean_batches` takes.

    Args:
        source: of more examples.
        examples: how many.
    """

    def __init__(self, source: Source, examples: int) -> None:
        self._source = source
        self.modalities, self.classes, self.fingerprint = source.modalities, source.classes, source.fingerprint
        order = Order(len(source), fold_seed("evaluations"))
        self._index = np.asarray(order.index(np.arange(examples)))

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._index)

    def read(self, indices: np.ndarray) -> list[Record]:
        """The source's."""
        return self._source.read(self._index[indices])


class Task:
    """The labelled data of one protocol and the length of its training.

    Args:
        setup: the run's parts.
        name: of the protocol; its fields are ``config.eval.<name>``.
        change: what is done to training pictures after crop and flip.

    Attributes:
        classes: how many.
        examples: training examples.
        batch_size: that of the config, at most all the examples, rounded up to what the mesh needs.
        steps: of training.
        options: the protocol's fields.
        groups: names of the objective's groups that are read.
    """

    def __init__(self, setup: Setup, name: str, change: Change | None = None) -> None:
        config = setup.config
        self.setup, self.name, self.options = setup, name, config.eval[name]
        self._change = change
        wanted = INPUTS[self.options.input]
        self.groups = tuple(group.name for group in setup.objective.groups if group.modality in wanted)
        source = open_labelled(config, "train")
        self.classes = len(source.classes)
        self.examples = min(len(source), config.eval.train_examples)
        self._train = source if self.examples == len(source) else Chosen(source, self.examples)
        self._test = open_labelled(config, "test")
        parts = batch_parts(setup.mesh)
        self.batch_size = -(-min(self.options.batch_size, self.examples) // parts) * parts
        self.steps = max(1, self._duration("duration"))
        if self.batch_size != self.options.batch_size:
            log.info(
                "%s: batches of %d, not of %d: there are %d training examples, on %d shards",
                *(name, self.batch_size, self.options.batch_size, self.examples, parts),
            )

    @property
    def warmup(self) -> int:
        """Steps, at most all of them."""
        return min(self._duration("warmup"), self.steps)

    def _duration(self, field: str) -> int:
        return steps(f"eval.{self.name}.{field}", self.options[field], self.batch_size, self.examples)

    def features(self, objective: Objective, params: Params, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        """What the head reads, `[B, D] float32`: CLS or the mean, of the protocol's input."""
        return pooled(objective, params, batch, rng)[f"{self.options.input}/{self.options.pooling}"]

    def train_batches(self) -> Iterator[dict[str, Any]]:
        """All steps' batches, cropped and flipped anew at each: ``groups``, ``label`` `[B]` and ``valid`` `[B]`."""
        config = self.setup.config.copy_and_resolve_references()
        for field in ("crop_scale", "crop_ratio", "flip"):
            config.data[field] = self.options[field]
        noted, seed = Noted(self._train), fold_seed(config.seed, self.name, "train")
        groups = tuple(
            dataclasses.replace(group, mask_ratio=0.0)
            for group in self.setup.objective.groups
            if group.name in self.groups
        )
        view = View(Order(self.examples, seed), seed, augment=True, change=self._change)
        batches = Batches(
            config,
            groups,
            Feed((noted,), (view,)),
            self.setup.tokenizer,
            batch_size=self.batch_size,
            rows=local_rows(self.setup.mesh, self.batch_size),
            stop_step=self.steps,
        )
        with contextlib.closing(iter(batches)) as found:
            for batch in found:
                yield self._on_mesh(batch, noted)

    def test_batches(self) -> Iterator[dict[str, Any]]:
        """Every test example once, unaugmented; ``real`` `[B]` is False for padding."""
        noted = Noted(self._test)
        examples = min(self.setup.config.eval.test_examples, len(self._test))
        for batch in clean_batches(self.setup, noted, examples):
            yield self._on_mesh(batch, noted, batch["example"]["position"] < examples)

    def _on_mesh(self, batch: dict[str, Any], noted: Noted, real: np.ndarray | None = None) -> dict[str, Any]:
        example = batch["example"]
        found = {
            "groups": {name: batch["groups"][name] for name in self.groups},
            "label": noted.label_of(example["index"]),
            "valid": example["valid"],
            "real": np.ones_like(example["valid"]) if real is None else real,
        }
        return put_batch(found, self.setup.mesh)


def sums(logits: jax.Array, label: jax.Array, batch: Batch, loss: jax.Array, weight: jax.Array) -> Sums:
    """What is counted of a batch.

    Args:
        logits: `[B, C] float32`.
        label: `[B] int32`, the right answer.
        batch: of `Task`.
        loss: `[B] float32`.
        weight: `[B] float32`, 1 for the examples that count.

    Returns:
        Sums ``loss``, ``correct``, ``top5``, ``count``, ``unlabelled`` and ``left_out``, and ``classes`` `[C]`, how
        often each is the right answer.
    """
    right = jnp.take_along_axis(logits, jnp.maximum(label, 0)[:, None], axis=1)
    return {
        "loss": jnp.sum(jnp.where(weight > 0, loss, 0.0) * weight),
        "correct": jnp.sum((jnp.argmax(logits, axis=1) == label) * weight),
        "top5": jnp.sum((jnp.sum(logits > right, axis=1) < 5) * weight),
        "count": jnp.sum(weight),
        "unlabelled": jnp.sum(batch["valid"] & (batch["label"] == UNLABELLED)),
        "left_out": jnp.sum(batch["real"] & ~batch["valid"]),
        "classes": jnp.sum(jax.nn.one_hot(label, logits.shape[1]) * weight[:, None], axis=0),
    }


def counted(batch: Batch) -> jax.Array:
    """`[B] float32`: 1 for examples with a picture that decodes and with a class."""
    return (batch["valid"] & (batch["label"] != UNLABELLED)).astype(jnp.float32)


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """`[B] float32`, of logits and probabilities `[B, C]`."""
    return -jnp.sum(target * jax.nn.log_softmax(logits), axis=1)


@dataclasses.dataclass(frozen=True)
class Count:
    """`Sums` of several batches, on the host.

    Attributes:
        loss: mean.
        accuracy: share.
        top5: share of the examples whose class is among the five likeliest.
        left_out: examples whose picture does not decode.
        classes: `[C]`, examples of each.
    """

    loss: float
    accuracy: float
    top5: float
    left_out: int
    classes: np.ndarray

    @classmethod
    def of(cls, found: list[dict[str, np.ndarray]], name: str) -> Count:
        """Adds up.

        Raises:
            UserError: an example has no class, or none counts.
        """
        total: dict[str, Any] = {key: np.sum([one[key] for one in found], axis=0, dtype=np.float64) for key in found[0]}
        if total["unlabelled"] or not total["count"]:
            usable, without = int(total["count"]), int(total["unlabelled"])
            raise UserError(f"{name}: {usable} labelled examples can be read, {without} without a class")
        loss, accuracy, top5 = (float(total[key] / total["count"]) for key in ("loss", "correct", "top5"))
        return cls(loss, accuracy, top5, int(total["left_out"]), total["classes"])


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training ended with.

    Attributes:
        state: after the last step.
        last: of the last tenth of the steps, by head.
        classes: `[C]`, how often each was seen.
        diverged: by head, the step at which its loss was found not finite.
    """

    state: Any
    last: dict[str, Count]
    classes: np.ndarray
    diverged: dict[str, int]


def train(task: Task, step: Callable[[S, Batch, np.int32], tuple[S, dict[str, Sums]]], state: S) -> Trained:
    """Runs all steps, or until the loss of every head is not finite.

    Args:
        task: what is trained on.
        step: of (state, batch, steps done) to the next state and `Sums` by head.
        state: before the first.

    Raises:
        UserError: an example has no class.
    """
    every = -(-task.steps // _REPORTS)
    waiting: list[dict[str, Sums]] = []
    window: list[dict[str, Any]] = []
    seen, last, diverged = np.zeros(task.classes), {}, dict[str, int]()
    for done, batch in enumerate(task.train_batches(), 1):
        state, figures = step(state, batch, np.int32(done - 1))
        waiting.append(figures)
        report = done % every == 0 or done == task.steps
        if report or len(waiting) == _UNFETCHED:
            window += fetch(waiting)
            waiting = []
        if report:
            last = {head: Count.of([one[head] for one in window], task.name) for head in figures}
            seen, window = seen + next(iter(last.values())).classes, []
            _report(task, done, last, diverged)
        if len(diverged) == len(figures):
            break
    _judge(task, last)
    return Trained(state, last, seen, diverged)


def _report(task: Task, done: int, last: Mapping[str, Count], diverged: dict[str, int]) -> None:
    told = ", ".join(f"{head}: loss {count.loss:.4f}, accuracy {count.accuracy:.3f}" for head, count in last.items())
    log.info("%s: step %d of %d; %s", task.name, done, task.steps, told)
    for head, count in last.items():
        if not math.isfinite(count.loss) and head not in diverged:
            diverged[head] = done
            log.warning(
                "%s: the loss of %s is %s at step %d: it has diverged; try a lower eval.%s.learning_rate (now %g)",
                *(task.name, head, count.loss, done, task.name, task.options.learning_rate),
            )


def _judge(task: Task, last: Mapping[str, Count]) -> None:
    guess = math.log(task.classes)
    for head, count in last.items():
        if count.loss > guess:
            log.warning(
                "%s: %s ends at a training loss of %.4f, no better than guessing (%.4f)",
                *(task.name, head, count.loss, guess),
            )


def test(task: Task, ask: Callable[[Batch], dict[str, Sums]]) -> dict[str, Count]:
    """Counts every test example once.

    Args:
        task: what is tested on.
        ask: `Sums` of a batch by head.

    Raises:
        UserError: an example has no class.
    """
    waiting: list[dict[str, Sums]] = []
    found: list[dict[str, Any]] = []
    for batch in task.test_batches():
        waiting.append(ask(batch))
        if len(waiting) == _UNFETCHED:
            found, waiting = found + fetch(waiting), []
    found += fetch(waiting)
    counts = {head: Count.of([one[head] for one in found], task.name) for head in found[0]}
    left_out = next(iter(counts.values())).left_out
    if left_out:
        log.warning("%s: %d test examples are left out: their pictures do not decode", task.name, left_out)
    return counts


def result(task: Task, trained: Trained, tested: Mapping[str, Count]) -> Result:
    """Figures and table; those of the first head have no head in their name."""
    heads = list(tested)
    classes = tested[heads[0]].classes
    majority = float(classes[np.argmax(trained.classes)] / classes.sum())
    scalars = {
        "majority": majority,
        "train_examples": float(task.examples),
        "test_examples": float(classes.sum()),
        "batch_size": float(task.batch_size),
        "steps": float(task.steps),
    }
    columns = ["accuracy", *(["top5_accuracy"] if task.classes > 5 else []), "train_accuracy", "train_loss"]
    lines = [f"| {task.options.input} | {' | '.join(columns).replace('_', ' ')} |", "|---" * (len(columns) + 1) + "|"]
    for head in heads:
        figures = _figures(trained, tested[head], head)
        said = f", diverged at step {trained.diverged[head]}" if head in trained.diverged else ""
        lines.append(f"| {head}{said} | {' | '.join(shown(figures, column) for column in columns)} |")
        before = "" if head == heads[0] else f"{head}/"
        scalars |= {before + key: value for key, value in figures.items() if key in (*columns, "diverged_at_step")}
    lines.append(f"| majority class | {majority:.3f}{' |' * len(columns)}")
    return Result(task.name, {f"{task.name}/{key}": value for key, value in scalars.items()}, "\n".join(lines))


def _figures(trained: Trained, tested: Count, head: str) -> Figures:
    figures = {"accuracy": tested.accuracy, "top5_accuracy": tested.top5}
    last = trained.last[head]
    if head in trained.diverged:  # then there is no loss to tell
        return figures | {"diverged_at_step": float(trained.diverged[head])}
    return figures | {"train_accuracy": last.accuracy, "train_loss": last.loss}
