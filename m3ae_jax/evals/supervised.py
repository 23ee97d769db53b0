"""What linear probe and fine-tuning share: labelled batches on the mesh, the loop over them, figures, the table.

Both train on ``eval.train`` by a recipe in ``config.eval.<name>`` and count ``eval.test`` once. Their state lives in
memory alone: an evaluation that is stopped starts anew. Nothing is chosen by the test examples: what is reported is
the state after the last step.

Legend: ``B`` examples of a batch, ``C`` classes, ``D`` width.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from m3ae_jax.config.durations import steps
from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.data.fields import check_crops
from m3ae_jax.data.order import Order, fold_seed
from m3ae_jax.data.pipeline import Feed, View
from m3ae_jax.errors import UserError
from m3ae_jax.evals.base import Result, amount, table
from m3ae_jax.evals.clean import clean_batches, with_labels
from m3ae_jax.evals.features import INPUTS, contents_of, pooled, shown, with_beside
from m3ae_jax.evals.labelled import UNLABELLED, LabelRecorder, common_classes, open_labelled
from m3ae_jax.evals.overlap import WITHOUT, note, overlap, unlabelled
from m3ae_jax.evals.verdict import Measured, compared, sentence
from m3ae_jax.objectives.base import Objective, Params, Part
from m3ae_jax.objectives.batch import abstract_part
from m3ae_jax.parallel.mesh import batch_parts, fetch, put_batch, put_whole_batch
from m3ae_jax.train.setup import Setup

log = logging.getLogger("m3ae_jax")

S = TypeVar("S")

Sums = dict[str, jax.Array]
"""Of a batch, see `sums`: what was counted, not yet divided."""

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""Of a training picture, see `data.pipeline.View`."""

PROTOCOLS = ("linear_probe", "finetune")
_REPORTS = 10  # progress lines; the last of these parts of a training is what its figures are of
_UNFETCHED = 50  # steps after which the host waits for the device, which bounds what is in flight


class Fields(FieldGroup):
    """What the protocols share."""

    input: str = setting("image", choices=tuple(INPUTS))
    """What the encoder reads."""
    pooling: str = setting("cls", choices=("cls", "mean"))
    """cls, or mean of the other tokens."""
    crop_scale: tuple[float, float] = setting((0.08, 1.0))
    """Of the training pictures, as data.crop_scale."""
    crop_ratio: tuple[float, float] = setting((3 / 4, 4 / 3))
    """Of the training pictures, as data.crop_ratio."""
    flip: bool = setting(True)
    """False where classes or captions speak of left and right."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Refuses crops that cannot work."""
        check_crops(config.eval[path.removeprefix("eval.")], path)


def check_inputs(config: ConfigDict) -> None:
    """Refuses an input that the model or the labelled data do not have.

    Raises:
        UserError: there is such an input.
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
        groups: the objective's view of the input.
    """

    def __init__(self, setup: Setup, name: str, change: Change | None = None) -> None:
        config = setup.config
        self.setup, self.name, self.options = setup, name, config.eval[name]
        self._change = change
        self.groups = setup.objective.view(INPUTS[self.options.input])
        self._train, self._test = open_labelled(config, "train"), open_labelled(config, "test")
        self.classes = len(common_classes(self._train.classes, self._test.classes))
        self.examples = min(len(self._train), config.eval.train_examples)
        self.batch_size = setup.eval_rows(self.examples, self.options.batch_size)
        self.steps = max(1, self._duration("duration"))
        if self.batch_size != self.options.batch_size:
            log.info(
                "%s: batches of %d, not of %d: there are %d training examples, on %d shards",
                *(name, self.batch_size, self.options.batch_size, self.examples, batch_parts(setup.mesh)),
            )

    @property
    def warmup(self) -> int:
        """Steps, at most all of them."""
        return min(self._duration("warmup"), self.steps)

    def _duration(self, field: str) -> int:
        return steps(f"eval.{self.name}.{field}", self.options[field], self.batch_size, self.examples)

    def features(self, objective: Objective, params: Params, batch: Part, rng: jax.Array | None = None) -> jax.Array:
        """What the head reads, `[B, D] float32`: CLS or the mean, of the protocol's input."""
        return pooled(objective, params, batch, rng)[f"{self.options.input}/{self.options.pooling}"]

    @property
    def abstract_part(self) -> dict[str, Any]:
        """Shapes and dtypes of one example."""
        return abstract_part(self.groups, 1)

    def width(self, params: Params) -> int:
        """``D``, the numbers of a feature."""
        shape = jax.eval_shape(lambda p, part: self.features(self.setup.objective, p, part), params, self.abstract_part)
        return int(shape.shape[1])

    def train_batches(self) -> Iterator[dict[str, Any]]:
        """All steps' batches, cropped and flipped anew at each: ``groups``, ``label`` `[B]` and ``valid`` `[B]`."""
        config = self.setup.config.copy_and_resolve_references()
        config.data.update({field: self.options[field] for field in ("crop_scale", "crop_ratio", "flip")})
        labels, seed = LabelRecorder(self._train, self.examples), fold_seed(config.seed, self.name, "train")
        view = View(Order(self.examples, seed), seed, augment=True, change=self._change)
        setup = dataclasses.replace(self.setup, config=config)
        batches = setup.batches(Feed((labels,), (view,)), self.groups, self.batch_size, 0, self.steps)
        yield from map(self._on_mesh, with_labels(batches, labels))

    @functools.cached_property
    def seen(self) -> np.ndarray:
        """Which test examples are training examples too, `[n] bool`, in the order of `test_batches`.

        Raises:
            UserError: all are, or as `evals.labelled.with_class`.
        """
        train, test = (contents_of(self.setup, part) for part in ("train", "test"))
        return overlap(self.setup, "test", test, {"train": train})

    @property
    def readable_seen(self) -> np.ndarray:
        """`seen` of the test examples alone that could be read and have a class."""
        return self.seen[contents_of(self.setup, "test").valid]

    def test_batches(self) -> Iterator[dict[str, Any]]:
        """Every test example once, unaugmented.

        ``real`` `[B]` is False for padding; ``seen`` `[B]` is there if any of the batch is a training example too, of
        whichever process.
        """
        start, examples = 0, self.setup.config.eval.test_examples
        for part in clean_batches(self.setup, self._test, examples):
            batch = self._on_mesh(part)
            size = len(batch["valid"])
            of_batch = np.pad(self.seen[start : start + size], (0, max(0, start + size - len(self.seen))))
            if of_batch.any():
                batch |= put_whole_batch({"seen": of_batch}, self.setup.mesh)
            start += size
            yield batch

    def _on_mesh(self, part: dict[str, Any]) -> dict[str, Any]:
        example, groups = part["example"], {group.name: part["groups"][group.name] for group in self.groups}
        real = example.get("real", np.ones_like(example["valid"]))
        batch = {"groups": groups, "label": example["label"], "valid": example["valid"], "real": real}
        on_mesh: dict[str, Any] = put_batch(batch, self.setup.mesh)
        return on_mesh


def counted(batch: Part) -> jax.Array:
    """`[B] float32`: 1 for examples with a picture that decodes and with a class."""
    return (batch["valid"] & (batch["label"] != UNLABELLED)).astype(jnp.float32)


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """`[B] float32`, of logits and probabilities `[B, C]`."""
    return -jnp.sum(target * jax.nn.log_softmax(logits), axis=1)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What is right for a batch.

    Attributes:
        target: `[B, C] float32`, probabilities.
        label: `[B] int32`, the likeliest class.
        weight: `[B] float32`, 1 for the examples that count.
    """

    target: jax.Array
    label: jax.Array
    weight: jax.Array

    @staticmethod
    def of(batch: Part, classes: int, smoothing: float = 0.0) -> Answers:
        """The classes of a batch of `Task`, of which a share is spread evenly over all `classes`."""
        target = optax.smooth_labels(jax.nn.one_hot(batch["label"], classes), smoothing)
        return Answers(target, batch["label"], counted(batch))


def sums(logits: jax.Array, batch: Part, answers: Answers) -> Sums:
    """What is counted of a batch.

    Args:
        logits: `[B, C] float32`.
        batch: of `Task`.
        answers: to it.

    Returns:
        Sums ``loss``, ``correct``, ``top5``, ``count`` and ``left_out``, and ``classes`` `[C]`, how often each is the
        right answer.
    """
    label, weight = answers.label, answers.weight
    right = jnp.take_along_axis(logits, jnp.maximum(label, 0)[:, None], axis=1)
    return {
        "loss": jnp.sum(jnp.where(weight > 0, cross_entropy(logits, answers.target), 0.0) * weight),
        "correct": jnp.sum((jnp.argmax(logits, axis=1) == label) * weight),
        "top5": jnp.sum((jnp.sum(logits > right, axis=1) < 5) * weight),
        "count": jnp.sum(weight),
        "left_out": jnp.sum(batch["real"] & ~batch["valid"]),
        "classes": jnp.sum(jax.nn.one_hot(label, logits.shape[1]) * weight[:, None], axis=0),
    }


Carry = tuple[Any, Any]
"""What is trained, and the optimizer's state."""


def descend(
    solver: optax.GradientTransformation, carry: Carry, logits_of: Callable[[Any], jax.Array], answers: Answers
) -> tuple[Carry, jax.Array]:
    """One step of the optimizer on the mean cross-entropy of the examples that count.

    Args:
        solver: the optimizer.
        carry: before the step.
        logits_of: of what is trained, `[B, C]`.
        answers: the right ones.

    Returns:
        The next carry, and the logits before the step.
    """
    params, opt_state = carry

    def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(params)
        loss = jnp.sum(cross_entropy(logits, answers.target) * answers.weight)
        return loss / jnp.maximum(jnp.sum(answers.weight), 1.0), logits

    grads, logits = jax.grad(loss_of, has_aux=True)(params)
    updates, opt_state = solver.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), logits


@dataclasses.dataclass(frozen=True)
class Count:
    """`Sums` of several batches, on the host.

    Attributes:
        loss: mean.
        accuracy: share.
        top5: share of the examples whose class is among the five likeliest.
        left_out: examples whose picture does not decode.
        classes: `[C]`, examples of each.
        without: of the test examples that are no training examples; None if all are such, or none is.
    """

    loss: float
    accuracy: float
    top5: float
    left_out: int
    classes: np.ndarray
    without: Count | None = None

    @classmethod
    def of(cls, batches: Sequence[dict[str, np.ndarray]], seen: Sequence[dict[str, np.ndarray]]) -> Count:
        """Adds up.

        Args:
            batches: `Sums` of each.
            seen: of test batches, `Sums` of those examples alone that are training examples too.
        """
        total = _added(batches)
        found = cls._divided(total)
        if not seen:
            return found
        others = jax.tree.map(np.subtract, total, _added(seen))
        return dataclasses.replace(found, without=cls._divided(others)) if others["count"] else found

    @classmethod
    def _divided(cls, total: dict[str, Any]) -> Count:
        count = max(total["count"], 1.0)  # of a few training batches perhaps not one example has a class
        loss, accuracy, top5 = (float(total[key] / count) for key in ("loss", "correct", "top5"))
        return cls(loss, accuracy, top5, int(total["left_out"]), total["classes"])


def _added(batches: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    return {key: np.sum([batch[key] for batch in batches], axis=0, dtype=np.float64) for key in batches[0]}


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


def train(task: Task, step: Callable[[S, Part, np.int32], tuple[S, dict[str, Sums]]], state: S) -> Trained:
    """Runs all steps, or until the loss of every head is not finite.

    Before the first it tells of test examples that are training examples too.

    Args:
        task: what is trained on.
        step: of (state, batch, steps done) to the next state and `Sums` by head.
        state: before the first.

    Raises:
        UserError: most examples have no class, or all test examples are training examples.
    """
    if task.seen.any():
        log.warning("%s: %s", task.name, note(task.readable_seen).strip())
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
            last = {head: Count.of([one[head] for one in window], ()) for head in figures}
            seen, window = seen + next(iter(last.values())).classes, []
            _report(task, done, last, diverged)
        if len(diverged) == len(figures):
            break
    guess = math.log(task.classes)
    for head, count in last.items():
        if count.loss > guess:
            log.warning(
                "%s: %s ends at a training loss of %.4f, no better than guessing (%.4f)",
                *(task.name, head, count.loss, guess),
            )
    return Trained(state, last, seen, diverged)


def _report(task: Task, done: int, last: Mapping[str, Count], diverged: dict[str, int]) -> None:
    by_head = ", ".join(f"{head}: loss {count.loss:.4f}, accuracy {count.accuracy:.3f}" for head, count in last.items())
    log.info("%s: step %d of %d; %s", task.name, done, task.steps, by_head)
    for head, count in last.items():
        if not math.isfinite(count.loss) and head not in diverged:
            diverged[head] = done
            log.warning(
                "%s: the loss of %s is %s at step %d: it has diverged; try a lower eval.%s.learning_rate (now %g)",
                *(task.name, head, count.loss, done, task.name, task.options.learning_rate),
            )


def test(task: Task, count: Callable[[Part], dict[str, Sums]]) -> dict[str, Count]:
    """Counts every test example once.

    Args:
        task: what is tested on.
        count: `Sums` of a batch by head.
    """

    def both(batch: Part) -> dict[str, dict[str, Sums]]:
        every = {name: value for name, value in batch.items() if name != "seen"}
        figures = {"all": count(every)}
        if "seen" in batch:
            figures["seen"] = count({**every, "valid": batch["valid"] & batch["seen"]})
        return figures

    batches: list[Any] = list(_fetched(map(both, task.test_batches())))
    counts = {}
    for head in batches[0]["all"]:
        every, seen = ([batch[of][head] for batch in batches if of in batch] for of in ("all", "seen"))
        counts[head] = Count.of(every, seen)
    left_out = next(iter(counts.values())).left_out
    if left_out:
        log.warning("%s: left out: %s whose picture does not decode", task.name, amount(left_out, "test example"))
    return counts


def _fetched(values: Iterable[S]) -> Iterator[S]:
    """Pytrees of arrays in host memory; so many of them at a time are in flight."""
    iterator = iter(values)
    while waiting := list(itertools.islice(iterator, _UNFETCHED)):
        yield from fetch(waiting)


def result(task: Task, trained: Trained, tested: Mapping[str, Count]) -> Result:
    """Figures and table; those of the first head have no head in their name."""
    heads = list(tested)
    classes, seen = tested[heads[0]].classes, task.readable_seen
    majority = {"majority": _majority(trained, tested[heads[0]])}
    if without := tested[heads[0]].without:
        majority[f"majority/{WITHOUT}"] = _majority(trained, without)
    train, test = (contents_of(task.setup, part) for part in ("train", "test"))
    scalars = {
        **majority,
        "train_examples": float(task.examples - train.unlabelled),
        "test_examples": float(classes.sum()),
        "batch_size": float(task.batch_size),
        "steps": float(task.steps),
        "overlap": float(seen.sum()),
        **unlabelled(train, test),
    }
    measured = ("accuracy", *(("top5_accuracy",) if task.classes > 5 else ()))
    columns = with_beside({name: name.replace("_", " ") for name in measured}, seen)
    columns |= {"train_accuracy": "train accuracy", "train_loss": "train loss"}
    rows = []
    for head, count in tested.items():
        last, ending = trained.last[head], ""
        figures = {"accuracy": count.accuracy, "top5_accuracy": count.top5}
        if count.without:
            figures |= {f"accuracy/{WITHOUT}": count.without.accuracy, f"top5_accuracy/{WITHOUT}": count.without.top5}
        if head in trained.diverged:  # then it has no loss
            figures["diverged_at_step"] = float(trained.diverged[head])
            ending = f", diverged at step {trained.diverged[head]}"
        else:
            figures |= {"train_accuracy": last.accuracy, "train_loss": last.loss}
        rows.append([head + ending, *(shown(figures, column) for column in columns)])
        before = "" if head == heads[0] else f"{head}/"
        scalars |= {before + key: value for key, value in figures.items() if key in (*columns, "diverged_at_step")}
    guessed = [f"{value:.3f}" for value in majority.values()]
    rows.append(["majority class", *guessed, *[""] * (len(columns) - len(guessed))])
    text = table([task.options.input, *columns.values()], rows) + note(seen)
    return Result.of(task.name, scalars, text, _verdict(task.options.input, tested, majority))


def _verdict(read: str, tested: Mapping[str, Count], majority: Mapping[str, float]) -> str:
    """What accuracy the first head reached, beside the others' and the majority class's."""
    counts = {head: count.without or count for head, count in tested.items()}
    examples = float(next(iter(counts.values())).classes.sum())
    shares = [Measured.share(head, count.accuracy, examples) for head, count in counts.items()]
    floor = Measured.share("the majority class", list(majority.values())[-1], examples)
    return sentence([compared(read, shares[:1], [*shares[1:], floor])])


def _majority(trained: Trained, tested: Count) -> float:
    """Accuracy of always saying the class that was trained on most often."""
    return float(tested.classes[np.argmax(trained.classes)] / tested.classes.sum())
