"""An objective of a file of one's own, with everything that the contract knows; docs/new_objective.md explains it.

A linear map of the visible pixels' mean is pulled towards a momentum teacher's of the whole picture, away from the
other pictures of the batch and from a queue of earlier ones (arXiv 1911.05722, in small). Legend: ``B`` examples, ``P``
numbers in a patch, ``D`` width, ``Q`` queue, ``C`` codes.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.data.masking import RandomSubset
from m3ae_jax.data.tokens import Group, modality_table
from m3ae_jax.objectives.base import NOTHING_HIDDEN, LossOutput, Objective
from m3ae_jax.objectives.parts.pixels import normalize_pixels


class Toy(Objective):
    """See `objectives.base.Objective` for the methods' contract."""

    class Fields(FieldGroup):
        """The toy's own fields, ``config.toy``."""

        width: int = setting(16, low=8)
        """Of the features."""
        queue: int = setting(32, low=1)
        """Earlier pictures that are compared with."""
        momentum: float = setting(0.9, low=0.0, high=1.0)
        """Of the teacher."""

    term_weights = {"contrast_loss": 1.0}  # noqa: RUF012
    couples_examples = True

    def __init__(self, config, vocab_size):
        self._config, self._options = config, config.toy
        self._image = modality_table(config, vocab_size)["image"]
        self.groups = self.view(("image",), {"image": 0.5})

    def view(self, inputs, hidden=NOTHING_HIDDEN):
        if "image" not in inputs:
            return ()
        return (Group("image", (self._image,), RandomSubset(hidden.get("image", 0.0))),)

    def init(self, rng):
        initializer = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("patch", "embed"))
        return {"encoder": {"kernel": initializer(rng, (self._image.features, self._options.width))}}

    def init_extra(self, params, rng):
        codes = nn.with_logical_partitioning(nn.initializers.normal(), ("embed", None))
        queue = nn.initializers.normal()(rng, (self._options.queue, self._options.width))
        return {
            "teacher": params["encoder"],
            "queue": nn.LogicallyPartitioned(_unit(queue), (None, "embed")),
            "frozen": {"kernel": codes(rng, (self._options.width, 8))},
            "usage": jnp.zeros(8),
        }

    def loss(self, params, extra, part, rng, step):
        del rng, step
        sets, valid = part["groups"]["image"], part["example"]["valid"]
        student = self._features(params["encoder"], sets["visible"])
        teacher = jax.lax.stop_gradient(self._features(extra["teacher"], sets["visible"], sets["target"]))
        keys = jnp.concatenate([teacher, extra["queue"]])
        same = part["example"]["image_id"][:, None] == part["example"]["image_id"]
        never = (same | ~valid) & ~jnp.eye(len(valid), dtype=bool)  # equal pictures and padding are no negatives
        logits = jnp.where(jnp.pad(never, ((0, 0), (0, len(extra["queue"])))), -1e9, student @ keys.T / 0.2)
        loss = -jnp.diagonal(jax.nn.log_softmax(logits)) * valid
        usage = jax.nn.one_hot(jnp.argmax(teacher @ extra["frozen"]["kernel"], axis=1), 8) * valid[:, None]
        term = (loss, valid.astype(jnp.float32))
        summed = {"contrast_loss": tuple(jnp.sum(x) for x in term)}
        return LossOutput(summed, {}, {"teacher": teacher}, {"usage": usage.sum(0)}, {"contrast_loss": term})

    def update_extra(self, extra, params, rows, sums, step):
        del step
        m, newest = self._options.momentum, jnp.concatenate([of["teacher"] for of in rows.values()])
        return extra | {
            "teacher": jax.tree.map(lambda old, new: m * old + (1 - m) * new, extra["teacher"], params["encoder"]),
            "queue": jnp.concatenate([newest, extra["queue"]])[: self._options.queue],
            "usage": extra["usage"] + sums["usage"],
        }

    def _features(self, weights, *sets):
        """Of the mean of all valid patches in the sets, `[B, D]`."""
        pixels = jnp.concatenate([normalize_pixels(tokens["value"], self._config) for tokens in sets], axis=1)
        valid = jnp.concatenate([tokens["valid"] for tokens in sets], axis=1)[..., None]
        return _unit(jnp.sum(pixels * valid, axis=1) / jnp.maximum(valid.sum(1), 1) @ weights["kernel"])


def _unit(x):
    return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
