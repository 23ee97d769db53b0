"""How well a linear probe on frozen features bears attacks on the pictures, and their common corruptions.

The probe of ``evals/probe.py`` is fitted on clean ``eval.train`` pictures; the attacker knows it and the encoder, and
moves each pixel value by at most epsilon, within [0, 1], so that the probe's cross-entropy grows:

- FGSM, one step of epsilon: arXiv 1412.6572, the equation in section 4.
- PGD, several smaller steps from a random start: arXiv 1706.06083, section 2.1; a step is 2.5 epsilon / steps, with
  which any point of the ball can be reached from any other.

Corruptions are those of ``evals/corruptions.py``. All pictures, clean ones too, are encoded in float32: in bfloat16 a
pixel's move by 1/255 is about one rounding step, and would hide the attack rather than withstand it.

Legend: ``B`` examples, ``L`` patches of a picture, ``P`` numbers in a patch, ``D`` features, ``C`` classes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import m3ae_jax.data.images as images
from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.data.sources.base import Source
from m3ae_jax.data.tokens import patch_grid
from m3ae_jax.errors import UserError
from m3ae_jax.evals.base import Result, table
from m3ae_jax.evals.clean import clean_batches, concatenated
from m3ae_jax.evals.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from m3ae_jax.evals.features import (
    PIXELS,
    Figures,
    beside,
    counted,
    encoded,
    fresh_params,
    majority,
    pooled,
    shared,
    shrunk,
    with_beside,
)
from m3ae_jax.evals.labelled import UNLABELLED, common_classes, open_labelled
from m3ae_jax.evals.linear import Classifier, swept
from m3ae_jax.evals.overlap import WITHOUT, note, overlap, read
from m3ae_jax.evals.restored import group_name
from m3ae_jax.evals.verdict import Measured, compared, sentence
from m3ae_jax.objectives.base import Params, build
from m3ae_jax.objectives.parts.pixels import normalize_unit
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

_SEED = 0  # of PGD's random starts
_REACH = 2.5  # steps of PGD together, in epsilons (arXiv 1706.06083, section 5)

Loss = Callable[[jax.Array], jax.Array]
"""Of pixels `[B, ...] float32` in [0, 1]: `[B]`, each of its own picture alone."""

Features = Callable[[Params, dict[str, Any], jax.Array], jax.Array]
"""Of parameters, the picture's token sets and its pixels `[B, L, P] float32` in [0, 1]: `[B, D] float32`."""


class RobustnessFields(FieldGroup):
    """Attacks on the pictures of ``eval.test``."""

    epsilons: tuple[float, ...] = setting((1.0, 2.0, 4.0, 8.0), low=0, high=255)
    """How far a pixel value may be moved, of 255."""
    pgd_steps: int = setting(10, low=1, high=10_000)
    """Steps of projected gradient ascent."""
    examples: int = setting(1000, low=1)
    """Examples at most: an attack costs as much as training on them."""
    pooling: str = setting("cls", choices=("cls", "mean"))
    """The features that are attacked: cls, or mean of the patches' tokens."""


def fgsm(loss: Loss, pixels: jax.Array, epsilon: jax.Array | float) -> jax.Array:
    """One step of the fast gradient sign method (arXiv 1412.6572, section 4).

    Args:
        loss: what is to grow.
        pixels: `[B, ...] float32` in [0, 1].
        epsilon: how far a value may move.

    Returns:
        As `pixels`.
    """
    return jnp.clip(pixels + epsilon * jnp.sign(_slope(loss, pixels)), 0.0, 1.0)


def pgd(loss: Loss, pixels: jax.Array, epsilon: jax.Array | float, start: jax.Array, steps: int) -> jax.Array:
    """Projected gradient ascent by signs (arXiv 1706.06083, section 2.1); the last point, not the best.

    Args:
        loss: what is to grow.
        pixels: `[B, ...] float32` in [0, 1].
        epsilon: how far a value may move.
        start: as `pixels`, in [-1, 1]: from where in the ball.
        steps: how many.

    Returns:
        As `pixels`.
    """
    low, high = jnp.maximum(pixels - epsilon, 0.0), jnp.minimum(pixels + epsilon, 1.0)

    def step(_: int, x: jax.Array) -> jax.Array:
        return jnp.clip(x + _REACH * epsilon / steps * jnp.sign(_slope(loss, x)), low, high)

    moved: jax.Array = jax.lax.fori_loop(0, steps, step, jnp.clip(pixels + epsilon * start, low, high))
    return moved


def _slope(loss: Loss, pixels: jax.Array) -> jax.Array:
    return jax.grad(lambda x: jnp.sum(loss(x)))(pixels)


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Accuracy on ``eval.robustness.examples`` of ``eval.test``: clean, attacked, corrupted.

    Raises:
        UserError: there are no pictures, most examples have no class, or all test examples are training examples.
    """
    check_pictures(setup.config)
    train, test = encoded(setup, state, "train"), open_labelled(setup.config, "test")
    tested = read(setup, "test", _examples(setup.config))
    seen = overlap(setup, "test", tested, {"train": train.contents})[tested.valid]
    classes = len(common_classes(train.classes, test.classes))
    kind = f"image/{setup.config.eval.robustness.pooling}"
    encoders = {f"trained/{kind}": state.params, f"untrained/{kind}": fresh_params(setup), PIXELS: {}}
    victims = [
        Victim.of(setup, features, params, swept(train.features[features], train.label, classes, group=train.group))
        for features, params in encoders.items()
    ]
    right, label = _judged(setup, test, victims)
    names = _accuracies(right, np.ones_like(seen))
    accuracy = beside(lambda which: _accuracies(right, which), seen, names)
    always = beside(lambda which: {"majority": majority(train.label, label[which])}, seen, ("majority",))
    scalars = {**accuracy, **always, "train_examples": float(len(train.label)), "test_examples": float(len(label))}
    text = _table(accuracy, with_beside({victim.name: victim.name for victim in victims}, seen), list(always.values()))
    said = sentence(_clauses(accuracy, [victim.name for victim in victims], always, seen))
    return Result.of("robustness", scalars | {"overlap": float(seen.sum())}, text + note(seen), said)


def _clauses(accuracy: Figures, victims: list[str], always: Figures, seen: np.ndarray) -> Iterator[str]:
    """Of the verdict: clean pictures, the strongest attack and the mean of the corruptions."""
    count, ending = counted(seen)
    floor = Measured.share("the majority class", always[f"majority{ending}"], count)
    prefix = f"{victims[0]}/"
    conditions = [name.removeprefix(prefix) for name in accuracy if name.startswith(prefix) and WITHOUT not in name]
    strongest = [condition for condition in conditions if condition.startswith("pgd/")][-1:]  # none without epsilons
    for condition in ("clean", *strongest, "corruptions"):
        shares = [Measured.share(name, accuracy[f"{name}/{condition}{ending}"], count) for name in victims]
        yield compared(_title(condition), shares[:1], [*shares[1:], floor])


def _examples(config: ConfigDict) -> int:
    return int(min(config.eval.test_examples, config.eval.robustness.examples))


def _accuracies(right: Mapping[tuple[str, str], np.ndarray], which: np.ndarray) -> Figures:
    """Accuracies on some of the test examples, ``<victim>/<condition>``; of a corruption the mean over severities.

    Args:
        right: of `_judged`.
        which: `[n] bool`, the examples that count.
    """
    accuracy = {f"{name}/{condition}": float(hits[which].mean()) for (name, condition), hits in right.items()}
    for name in dict.fromkeys(name for name, _ in right):
        for corruption in CORRUPTIONS:
            by_severity = [accuracy.pop(f"{name}/{corruption}/{severity}") for severity in SEVERITIES]
            accuracy[f"{name}/{corruption}"] = float(np.mean(by_severity))
        accuracy[f"{name}/corruptions"] = float(np.mean([accuracy[f"{name}/{one}"] for one in CORRUPTIONS]))
    return accuracy


def check_pictures(config: ConfigDict) -> None:
    """Refuses a run on texts alone, and labelled texts.

    Raises:
        UserError: the run, or the labelled data, hold no pictures.
    """
    if "image" not in config.data.modalities:
        raise UserError(
            f"evals=('robustness',) attacks pictures: data.modalities={tuple(config.data.modalities)!r} has none"
        )
    for part in ("train", "test"):
        held = open_labelled(config, part).modalities
        if "image" not in held:
            raise UserError(f"evals=('robustness',) attacks pictures: eval.{part} holds only {', '.join(held)}")


@dataclasses.dataclass(frozen=True)
class Victim:
    """A probe on features of pictures.

    Attributes:
        name: ``trained``, ``untrained`` or ``pixels``.
        right: of pictures on the devices (`_on_device`), `[B] bool`: which are classified right.
        attacked: of such pictures and epsilon, the same by attack.
    """

    name: str
    right: Callable[[dict[str, Any]], jax.Array]
    attacked: Callable[[dict[str, Any], float], dict[str, jax.Array]]

    @staticmethod
    def of(setup: Setup, kind: str, params: Params, probe: Classifier) -> Victim:
        """A probe on a kind of features: of an encoder, or the shrunk pixels."""
        name = kind.partition("/")[0]
        of = PIXELS if name == PIXELS else "encoder"
        programs = shared(setup, f"robustness/{of}", lambda: _programs(setup, of))
        scale = probe.scale
        columns = {"mean": scale.mean, "deviation": scale.deviation, "weight": probe.weight, "bias": probe.bias}
        head = {key: np.asarray(value, np.float32) for key, value in columns.items()}
        return Victim(
            name,
            lambda pictures: programs["right"](params, head, pictures),
            lambda pictures, epsilon: programs["attacked"](params, head, pictures, np.float32(epsilon / 255)),
        )


def _programs(setup: Setup, of: str) -> dict[str, Callable[..., Any]]:
    """``right`` and ``attacked``, compiled, of all probes on such features."""
    features: Features = (lambda _, group, pixels: shrunk(setup, pixels)) if of == PIXELS else _of_encoder(setup)
    steps = setup.config.eval.robustness.pgd_steps

    def logits(params: Params, head: dict[str, jax.Array], pictures: dict[str, Any], pixels: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            x = features(params, pictures["group"], pixels)
            return (x - head["mean"]) / head["deviation"] @ head["weight"] + head["bias"]

    def right(params: Params, head: dict[str, jax.Array], pictures: dict[str, Any]) -> jax.Array:
        return jnp.argmax(logits(params, head, pictures, _unit(pictures)), axis=1) == pictures["label"]

    def attacked(
        params: Params, head: dict[str, jax.Array], pictures: dict[str, Any], epsilon: jax.Array
    ) -> dict[str, jax.Array]:
        label, pixels = pictures["label"], _unit(pictures)

        def loss(x: jax.Array) -> jax.Array:
            each = jax.nn.log_softmax(logits(params, head, pictures, x))
            return -jnp.take_along_axis(each, label[:, None], axis=1)[:, 0]

        start = _starts(pictures["position"], pixels.shape[1:])
        moved = {"fgsm": fgsm(loss, pixels, epsilon), "pgd": pgd(loss, pixels, epsilon, start, steps)}
        return {k: jnp.argmax(logits(params, head, pictures, x), axis=1) == label for k, x in moved.items()}

    return {"right": setup.jit(right), "attacked": setup.jit(attacked)}


def _unit(pictures: dict[str, Any]) -> jax.Array:
    """Pixels in [0, 1]."""
    pixels: jax.Array = pictures["group"]["visible"]["value"].astype(jnp.float32) / 255.0
    return pixels


def _starts(position: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform in [-1, 1], `[B, *shape]`: of each example its own, whatever batch it is in."""
    key = jax.random.key(_SEED)
    draw = jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p), shape, minval=-1.0, maxval=1.0))
    return draw(position)


def _of_encoder(setup: Setup) -> Features:
    config = setup.config.copy_and_resolve_references()
    # Fused kernels know no float32; and the backward pass of a whole batch of whole pictures needs the room.
    config.compute.dtype, config.compute.attention, config.compute.remat = "float32", "xla", "full"
    objective = build(config, setup.tokenizer.vocab_size if setup.tokenizer else 0)
    name, pooling = group_name(setup, "image"), config.eval.robustness.pooling

    def features(params: Params, group: dict[str, Any], pixels: jax.Array) -> jax.Array:
        visible = {**group["visible"], "value": normalize_unit(pixels, config)}
        return pooled(objective, params, {"groups": {name: {**group, "visible": visible}}})[f"image/{pooling}"]

    return features


def _judged(
    setup: Setup, source: Source, victims: list[Victim]
) -> tuple[dict[tuple[str, str], np.ndarray], np.ndarray]:
    """Which examples that decode are classified right, `[n] bool` by victim and condition; and their labels."""
    options, name, batches = setup.config.eval.robustness, group_name(setup, "image"), []
    for part in clean_batches(setup, source, _examples(setup.config)):
        example = put_batch({key: part["example"][key] for key in ("valid", "label", "position")}, setup.mesh)
        right: dict[tuple[str, str], jax.Array] = {}
        for condition, group in _conditions(setup, part["groups"][name], part["example"]["position"]):
            pictures = {"group": put_batch(group, setup.mesh), **example}
            for victim in victims:
                right[victim.name, condition] = victim.right(pictures)
                for epsilon in options.epsilons if condition == "clean" else ():
                    for attack, withstood in victim.attacked(pictures, epsilon).items():
                        right[victim.name, f"{attack}/{epsilon:g}"] = withstood
        batches.append({**fetch(example), "right": {key: fetch(hits) for key, hits in right.items()}})
    whole = concatenated(batches)
    valid, label = whole["valid"], whole["label"]
    valid &= label != UNLABELLED  # told where its features are encoded
    return {key: whole["right"][key][valid] for key in right}, label[valid]


def _conditions(setup: Setup, group: dict[str, Any], position: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
    """The token sets of a batch's pictures, clean and with each corruption (``<corruption>/<severity>``)."""
    yield "clean", group
    patch, visible = setup.config.data.patch_size, group["visible"]
    whole = images.unpatchify(visible["value"], patch, patch_grid(setup.config))
    with concurrent.futures.ThreadPoolExecutor(setup.config.data.threads or None) as pool:
        for corruption in CORRUPTIONS:
            for severity in SEVERITIES:
                arguments = ([corruption] * len(whole), [severity] * len(whole), position.tolist())
                patches = images.patchify(np.stack(list(pool.map(corrupted, whole, *arguments))), patch)
                yield f"{corruption}/{severity}", {**group, "visible": {**visible, "value": patches}}


def _table(accuracy: Figures, columns: Mapping[str, str], always: list[float]) -> str:
    """A row for each condition.

    Args:
        accuracy: of `_accuracies`, with what `beside` adds.
        columns: heads of the columns by victim, of `with_beside`.
        always: accuracy of the majority class, of each column of a victim.
    """
    first, rows = next(iter(columns)), []
    names = [name.partition("/")[2] for name in accuracy if name.startswith(f"{first}/") and WITHOUT not in name]
    for condition in names:
        parts = (column.partition("/") for column in columns)
        rows.append(
            [_title(condition), *(f"{accuracy[f'{name}/{condition}{slash}{more}']:.3f}" for name, slash, more in parts)]
        )
    rows.append(["majority class", *(f"{always[i % len(always)]:.3f}" for i in range(len(columns)))])
    return table(["accuracy on pictures", *columns.values()], rows)


def _title(condition: str) -> str:
    attack, _, epsilon = condition.partition("/")
    if epsilon:
        return f"{attack.upper()}, {epsilon}/255"
    return "mean of corruptions" if condition == "corruptions" else condition.replace("_", " ")
