"""What an objective is: the groups of tokens it asks for, and a loss on them.

An objective is one file, chosen in the config by name or import path. The training loop, the step and the
checkpointing contain no objective's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from m3ae_jax.data.mixture import cut_mixture
from m3ae_jax.data.pipeline import Group
from m3ae_jax.errors import UserError, one_of

Batch = Mapping[str, Any]
"""See ``data/pipeline.py``."""

Params = Any
"""A pytree of parameters, float32."""

Terms = dict[str, tuple[jax.Array, jax.Array]]
"""``{name: (sum, weight)}``, scalars float32. A weight depends on the batch alone."""

_BUILT_IN = {"m3ae": "m3ae_jax.objectives.m3ae:M3AE"}


@flax.struct.dataclass
class LossOutput:
    """What `Objective.loss` returns.

    Attributes:
        terms: parts of the loss, each a sum and its weight, not yet divided.
        metrics: figures to report, in the same form.
        aux: what `Objective.update_extra` needs, `[B, ...]` leaves.
        per_example: the terms as `[B] float32` sums and weights, for figures by source and for replay; of a mixture
            ``{part: terms}``.
    """

    terms: Terms
    metrics: Terms
    aux: Any = None
    per_example: dict[str, Any] = flax.struct.field(default_factory=dict)


class Objective(Protocol):
    """The interface of every objective; built as ``Objective(config, vocab_size)``.

    Attributes:
        groups: what the data pipeline must put into a batch.
        term_weights: factor of each loss term in the total.
        couples_examples: whether an example's loss depends on the others of its batch (contrast, negatives); the
            batch is then not cut into micro-batches.
    """

    groups: tuple[Group, ...]
    term_weights: dict[str, float]
    couples_examples: bool

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters, boxed with their logical axis names."""

    def init_extra(self, params: Params) -> Any:
        """State beside the parameters (a momentum teacher, a queue); ``{}`` for none."""

    def loss(self, params: Params, extra: Any, batch: Batch, rng: jax.Array | None, step: jax.Array) -> LossOutput:
        """Loss terms of a batch; ``rng=None`` is deterministic."""

    def update_extra(self, extra: Any, new_params: Params, aux: Any, step: jax.Array) -> Any:
        """The next `extra`, after the optimizer."""

    def targets(self, batch: Batch) -> dict[str, jax.Array]:
        """What is asked back, ``{group: [B, K, ...]}``."""

    def reconstruct(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Predictions for `targets`, deterministic: ``{group: [B, K, ...] float32}``."""

    def encode(self, params: Params, batch: Batch, rng: jax.Array | None = None) -> dict[str, jax.Array]:
        """Features of a batch's visible tokens: ``{"cls": [B, D], group: [B, V, D]}``; `rng` is of dropout."""

    def attention(self, params: Params, batch: Batch, layer: int = -1) -> dict[str, dict[str, jax.Array]]:
        """How the encoder's tokens attend to each other in one layer, the mean of its heads, deterministic.

        Args:
            params: parameters.
            batch: whose visible tokens are encoded.
            layer: of the encoder, from 0; negative from the end. All layers' weights exist at a time,
                `[layers, B, H, N, N] float32` of N tokens and CLS.

        Returns:
            ``{asking: {asked: [B, V, W] float32}}``, both ``cls`` (one slot) or a group. Over all that is asked a row
            sums to 1; padding is asked with 0, and what it asks means nothing.
        """


def build(config: ConfigDict, vocab_size: int) -> Objective:
    """The objective that ``config.objective`` names.

    Args:
        config: the resolved config.
        vocab_size: token ids; 0 without text.

    Raises:
        UserError: no such objective, or it cannot be imported.
    """
    path = _BUILT_IN.get(config.objective, config.objective)
    module, _, name = path.partition(":")
    if not name:
        raise UserError(
            one_of("objective", config.objective, _BUILT_IN) + ' (or an import path "package.module:Class")'
        )
    try:
        return getattr(importlib.import_module(module), name)(config, vocab_size)
    except (ImportError, AttributeError) as error:
        if config.objective in _BUILT_IN:
            raise
        raise UserError(f"objective={config.objective!r} cannot be imported: {error}") from None


def abstract_batch(groups: Iterable[Group], batch_size: int, patch_values: int) -> dict[str, Any]:
    """Shapes and dtypes of a batch's groups, as `jax.ShapeDtypeStruct` leaves.

    Args:
        groups: of an objective.
        batch_size: examples.
        patch_values: numbers in a patch.
    """

    def token_set(group: Group, slots: int) -> dict[str, jax.ShapeDtypeStruct]:
        image = group.modality == "image"
        value = (batch_size, slots, patch_values) if image else (batch_size, slots)
        return {
            "value": jax.ShapeDtypeStruct(value, jnp.uint8 if image else jnp.int32),
            "position": jax.ShapeDtypeStruct((batch_size, slots), jnp.int32),
            "valid": jax.ShapeDtypeStruct((batch_size, slots), jnp.bool),
        }

    of_groups = {g.name: {"visible": token_set(g, g.budget[0]), "target": token_set(g, g.budget[1])} for g in groups}
    return {"groups": of_groups, "example": {"source": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}}


def abstract_batches(config: ConfigDict, objective: Objective, batch_size: int, unit: int) -> dict[str, Any]:
    """As `abstract_batch`, of a config; with a mixture of sources ``{"parts": {name: batch}}``.

    Args:
        config: resolved; its data need not be there.
        objective: what it trains.
        batch_size: rows of all parts.
        unit: divides the rows of every part.
    """
    patch = 3 * config.data.patch_size**2
    parts = cut_mixture(config, batch_size, unit)
    if not parts:
        return abstract_batch(objective.groups, batch_size, patch)
    return {
        "parts": {
            part.name: abstract_batch([g for g in objective.groups if g.modality in part.modalities], part.size, patch)
            for part in parts
        }
    }


def batch_loss(
    objective: Objective,
    params: Params,
    extra: Any,
    batch: Batch,
    rng: jax.Array | None,
    step: jax.Array,
    sources: int = 0,
) -> LossOutput:
    """`Objective.loss` of a batch, or of all parts of a mixture's: their terms and metrics add up.

    Args:
        objective: its loss.
        params: parameters.
        extra: its own state.
        batch: a batch, or ``{"parts": {name: batch}}``; `aux` is then ``{name: aux}``, `per_example` likewise.
        rng: of dropout, or None.
        step: steps done.
        sources: how many there are, of each of which ``TERM/NUMBER`` is to be among the metrics; 0: none.
    """
    if "parts" not in batch:
        output = objective.loss(params, extra, batch, rng, step)
        by_source = _by_source(output, batch["example"]["source"], sources) if sources else {}
        return LossOutput(output.terms, {**output.metrics, **by_source}, output.aux, output.per_example)
    terms: Terms = {}
    metrics: Terms = {}
    aux, per_example = {}, {}
    for number, (name, part) in enumerate(sorted(batch["parts"].items())):
        of_part = None if rng is None else jax.random.fold_in(rng, number)
        output = batch_loss(objective, params, extra, part, of_part, step, sources)
        aux[name], per_example[name] = output.aux, output.per_example
        for into, of in ((terms, output.terms), (metrics, output.metrics)):
            for key, (total, weight) in of.items():
                before = into.get(key, (0.0, 0.0))
                into[key] = (before[0] + total, before[1] + weight)
    return LossOutput(terms, metrics, aux, per_example)


def _by_source(output: LossOutput, source: jax.Array, sources: int) -> Terms:
    found: Terms = {}
    for name, (total, weight) in output.per_example.items():
        for number in range(sources):
            mine = (source == number).astype(jnp.float32)
            found[f"{name}/{number}"] = (jnp.sum(total * mine), jnp.sum(weight * mine))
    return found


def token_counts(batch: Batch) -> Terms:
    """Real tokens of each group, ``tokens/<group>_visible`` and ``_target``; the weight is the examples."""
    counts: Terms = {}
    parts = [part for _, part in sorted(batch["parts"].items())] if "parts" in batch else [batch]
    for part in parts:
        for group, sets in part.get("groups", {}).items():
            for kind, tokens in sets.items():
                valid, name = tokens["valid"], f"tokens/{group}_{kind}"
                total, weight = counts.get(name, (jnp.float32(0.0), jnp.float32(0.0)))
                counts[name] = (total + jnp.sum(valid, dtype=jnp.float32), weight + valid.shape[0])
    return counts


def mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """``total / weight``; 0 where there is no weight, and then no gradient either."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def total_loss(terms: Terms, term_weights: Mapping[str, float]) -> jax.Array:
    """The weighted sum of the terms' means, a scalar float32."""
    return sum((term_weights[name] * mean(*term) for name, term in terms.items()), jnp.float32(0.0))
