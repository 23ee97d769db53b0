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
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.data import images
from m3ae_jax.data.pipeline import grid
from m3ae_jax.errors import UserError
from m3ae_jax.evals import Result
from m3ae_jax.evals.clean import clean_batches
from m3ae_jax.evals.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from m3ae_jax.evals.features import PIXELS, encoded, fresh_params, kept, pooled, shrunk
from m3ae_jax.evals.labelled import Noted, check_labels, open_labelled
from m3ae_jax.evals.linear import Classifier, swept
from m3ae_jax.objectives.base import Params, build
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

_SEED = 0  # of PGD's random starts
_REACH = 2.5  # steps of PGD together, in epsilons (arXiv 1706.06083, section 5)

Loss = Callable[[jax.Array], jax.Array]
"""Of pixels `[B, ...] float32` in [0, 1]: `[B]`, each of its own picture alone."""

Features = Callable[[Params, dict[str, Any], jax.Array], jax.Array]
"""Of parameters, the picture's token sets and its pixels `[B, L, P] float32` in [0, 1]: `[B, D] float32`."""


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

    found: jax.Array = jax.lax.fori_loop(0, steps, step, jnp.clip(pixels + epsilon * start, low, high))
    return found


def _slope(loss: Loss, pixels: jax.Array) -> jax.Array:
    return jax.grad(lambda x: jnp.sum(loss(x)))(pixels)


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Accuracy on ``eval.robustness.examples`` of ``eval.test``: clean, attacked, corrupted.

    Raises:
        UserError: there are no pictures, or an example has no label.
    """
    check_pictures(setup.config)
    train = encoded(setup, state, "train")
    victims = [
        Victim.of(setup, name, params, swept(train.features[kind], train.label, len(train.classes)))
        for name, kind, params in _probed(setup, state)
    ]
    right, label = _judged(setup, victims)
    accuracy = {key: float(hits.mean()) for key, hits in right.items()}
    for victim in victims:
        of_kinds = []
        for corruption in CORRUPTIONS:
            found = [accuracy.pop((victim.name, f"{corruption}/{severity}")) for severity in SEVERITIES]
            accuracy[victim.name, corruption] = float(np.mean(found))
            of_kinds.append(accuracy[victim.name, corruption])
        accuracy[victim.name, "corruptions"] = float(np.mean(of_kinds))
    scalars = {f"robustness/{name}/{condition}": value for (name, condition), value in accuracy.items()}
    always = float((label == np.bincount(train.label).argmax()).mean())
    counts = {"majority": always, "train_examples": float(len(train.label)), "test_examples": float(len(label))}
    scalars |= {f"robustness/{name}": value for name, value in counts.items()}
    return Result("robustness", scalars, _table(accuracy, [victim.name for victim in victims], always))


def check_pictures(config: ConfigDict) -> None:
    """Refuses a run on texts alone, and labelled texts.

    Raises:
        UserError: as said.
    """
    if "image" not in config.data.modalities:
        raise UserError(
            f"evals=('robustness',) attacks pictures: data.modalities={tuple(config.data.modalities)!r} has none"
        )
    for part in ("train", "test"):
        held = open_labelled(config, part).modalities
        if "image" not in held:
            raise UserError(f"evals=('robustness',) attacks pictures: eval.{part} holds only {', '.join(held)}")


def _probed(setup: Setup, state: TrainState) -> Iterator[tuple[str, str, Params]]:
    """Whose features are probed: a name, their kind, the parameters."""
    kind = f"image/{setup.config.eval.robustness.pooling}"
    yield "trained", f"trained/{kind}", state.params
    yield "untrained", f"untrained/{kind}", fresh_params(setup)
    yield PIXELS, PIXELS, {}


@dataclasses.dataclass(frozen=True)
class Victim:
    """A probe on features of pictures.

    Attributes:
        name: ``trained``, ``untrained`` or ``pixels``.
        right: of pictures on the devices (`_on_device`), `[B] bool`: which are told right.
        attacked: of such pictures and epsilon, the same by attack.
    """

    name: str
    right: Callable[[dict[str, Any]], jax.Array]
    attacked: Callable[[dict[str, Any], float], dict[str, jax.Array]]

    @staticmethod
    def of(setup: Setup, name: str, params: Params, probe: Classifier) -> Victim:
        """A probe on the features of an encoder, or on the shrunk pixels."""
        of = PIXELS if name == PIXELS else "encoder"
        programs = kept(setup, f"robustness/{of}", lambda: _programs(setup, of))
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
        found = jnp.argmax(logits(params, head, pictures, _unit(pictures)), axis=1)
        return found == pictures["label"]

    def attacked(
        params: Params, head: dict[str, jax.Array], pictures: dict[str, Any], epsilon: jax.Array
    ) -> dict[str, jax.Array]:
        label, pixels = pictures["label"], _unit(pictures)

        def loss(x: jax.Array) -> jax.Array:
            each = jax.nn.log_softmax(logits(params, head, pictures, x))
            return -jnp.take_along_axis(each, label[:, None], axis=1)[:, 0]

        moved = {
            "fgsm": fgsm(loss, pixels, epsilon),
            "pgd": pgd(loss, pixels, epsilon, _starts(pictures["position"], pixels.shape[1:]), steps),
        }
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
    config.model.compute_dtype, config.model.attention, config.model.remat = "float32", "xla", "full"
    objective = build(config, setup.tokenizer.vocab_size if setup.tokenizer else 0)
    name, pooling, data = _group(setup), config.eval.robustness.pooling, config.data

    def features(params: Params, group: dict[str, Any], pixels: jax.Array) -> jax.Array:
        repeats = pixels.shape[-1] // 3  # the last axis of a patch is the channel
        mean, std = (np.tile(np.float32(x), repeats) for x in (data.image_mean, data.image_std))
        visible = {**group["visible"], "value": (pixels - mean) / std}
        return pooled(objective, params, {"groups": {name: {**group, "visible": visible}}})[f"image/{pooling}"]

    return features


def _group(setup: Setup) -> str:
    return next(group.name for group in setup.objective.groups if group.modality == "image")


def _judged(setup: Setup, victims: list[Victim]) -> tuple[dict[tuple[str, str], np.ndarray], np.ndarray]:
    """Which examples are told right, `[n] bool` by victim and condition; and their labels, of those that decode."""
    noted, name = Noted(open_labelled(setup.config, "test")), _group(setup)
    examples = min(setup.config.eval.test_examples, setup.config.eval.robustness.examples)
    rows: list[dict[Any, np.ndarray]] = []
    for batch in clean_batches(setup, noted, examples):
        example = batch["example"]
        label, position = noted.label_of(example["index"]), example["position"].astype(np.int32)
        found: dict[Any, jax.Array] = put_batch({"valid": example["valid"], "label": label}, setup.mesh)
        for condition, group in _conditions(setup, batch["groups"][name], position):
            pictures = put_batch({"group": group, "label": label, "position": position}, setup.mesh)
            for victim in victims:
                found[victim.name, condition] = victim.right(pictures)
                for epsilon in setup.config.eval.robustness.epsilons if condition == "clean" else ():
                    for attack, right in victim.attacked(pictures, epsilon).items():
                        found[victim.name, f"{attack}/{epsilon:g}"] = right
        rows.append({key: fetch(x) for key, x in found.items()})
    whole = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    valid, label = whole.pop("valid"), whole.pop("label")
    check_labels(valid, label)
    return {key: hits[valid] for key, hits in whole.items()}, label[valid]


def _conditions(setup: Setup, group: dict[str, Any], position: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
    """The token sets of a batch's pictures, clean and with each corruption (``<corruption>/<severity>``)."""
    yield "clean", group
    patch, visible = setup.config.data.patch_size, group["visible"]
    whole = images.unpatchify(visible["value"], patch, grid(setup.config))
    with concurrent.futures.ThreadPoolExecutor(setup.config.data.threads or None) as pool:
        for corruption in CORRUPTIONS:
            for severity in SEVERITIES:
                asked = ([corruption] * len(whole), [severity] * len(whole), position.tolist())
                changed = np.stack(list(pool.map(corrupted, whole, *asked)))
                yield (
                    f"{corruption}/{severity}",
                    {**group, "visible": {**visible, "value": images.patchify(changed, patch)}},
                )


def _table(accuracy: dict[tuple[str, str], float], names: list[str], always: float) -> str:
    lines = [f"| accuracy on pictures | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for condition in [condition for name, condition in accuracy if name == names[0]]:
        attack, _, epsilon = condition.partition("/")
        told = f"{attack.upper()}, {epsilon}/255" if epsilon else condition.replace("_", " ")
        told = "mean of corruptions" if condition == "corruptions" else told
        lines.append(f"| {told} | {' | '.join(f'{accuracy[name, condition]:.3f}' for name in names)} |")
    lines.append(f"| majority class | {' | '.join(f'{always:.3f}' for _ in names)} |")
    return "\n".join(lines)
