"""Batches of several parts: their shapes, and an objective's loss over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from m3ae_jax.data.masking import RandomSubset
from m3ae_jax.data.mixture import cut_mixture
from m3ae_jax.data.tokens import EXAMPLE, Group, Modality, restricted
from m3ae_jax.objectives.base import NOTHING_HIDDEN, Batch, LossOutput, Objective, Params, Terms


def abstract_part(groups: Iterable[Group], rows: int) -> dict[str, Any]:
    """Shapes and dtypes of a part, as `jax.ShapeDtypeStruct` leaves.

    Args:
        groups: of an objective.
        rows: examples.
    """
    spec = {
        "groups": {group.name: group.spec(rows) for group in groups},
        "example": {name: jax.ShapeDtypeStruct((rows, *one.shape), one.dtype) for name, one in EXAMPLE.items()},
    }
    return jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), spec)


def zeros_part(groups: Iterable[Group], rows: int = 1) -> dict[str, Any]:
    """As `abstract_part`, filled with zeros: what a model's parameters are made with."""
    return jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), abstract_part(groups, rows))


def modality_groups(
    modalities: Mapping[str, Modality], inputs: Iterable[str], hidden: Mapping[str, float] = NOTHING_HIDDEN
) -> tuple[Group, ...]:
    """A group for each modality that is among the inputs, of its name; a random subset of its tokens is hidden.

    Args:
        modalities: by name.
        inputs: names.
        hidden: mask ratio of a modality; 0 where it is not named.
    """
    return tuple(
        Group(name, (modality,), RandomSubset(hidden.get(name, 0.0)))
        for name, modality in modalities.items()
        if name in inputs
    )


def clean(sets: Mapping[str, Any], *, shown: bool = False) -> dict[str, jax.Array]:
    """The tokens of a group, the visible ones before the targets, as one token set.

    Args:
        sets: ``visible`` and ``target``.
        shown: targets as the masker shows them (``input``), not as they are.
    """
    visible, target = dict(sets["visible"]), dict(sets["target"])
    target_input = target.pop("input", None)
    if shown and target_input is not None:
        visible["input"], target["input"] = visible["value"], target_input
    return {name: jnp.concatenate([visible[name], target[name]], axis=1) for name in visible}


def abstract_batch(config: ConfigDict, objective: Objective, batch_size: int, unit: int) -> dict[str, Any]:
    """As `abstract_part`, of all parts of a config's batch.

    Args:
        config: resolved; its data need not be there.
        objective: what it trains.
        batch_size: rows of all parts.
        unit: divides the rows of every part.
    """
    return {
        part.name: abstract_part(restricted(objective.groups, part.modalities), part.size)
        for part in cut_mixture(config, batch_size, unit)
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
    """`Objective.loss` of all parts of a batch: their terms, metrics and sums add up.

    Args:
        objective: its loss.
        params: parameters.
        extra: its own state.
        batch: its parts, by name; `rows` and `per_example` of the result are ``{name: of the part}``.
        rng: of dropout, or None.
        step: steps done.
        sources: how many there are, of each of which ``TERM/NUMBER`` is to be among the metrics; 0: none.
    """
    terms: Terms = {}
    metrics: Terms = {}
    rows: dict[str, Any] = {}
    sums: dict[str, Any] = {}
    per_example: dict[str, Terms] = {}
    for number, (name, part) in enumerate(sorted(batch.items())):
        key = rng if rng is None or len(batch) == 1 else jax.random.fold_in(rng, number)
        output = objective.loss(params, extra, part, key, step)
        rows[name], per_example[name] = output.rows, output.per_example
        _add(terms, output.terms)
        _add(metrics, {**output.metrics, **_by_source(output, part["example"]["source"], sources)})
        _add(sums, output.sums)
    return LossOutput(terms, metrics, rows, sums, per_example)


def _add(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        into[name] = jax.tree.map(jnp.add, into[name], value) if name in into else value


def _by_source(output: LossOutput, source: jax.Array, sources: int) -> Terms:
    terms: Terms = {}
    for name, (total, weight) in output.per_example.items():
        for number in range(sources):
            of_source = (source == number).astype(jnp.float32)
            terms[f"{name}/{number}"] = (jnp.sum(total * of_source), jnp.sum(weight * of_source))
    return terms


def token_counts(batch: Batch) -> Terms:
    """Real tokens of each group, ``tokens/<group>_visible`` and ``_target``; the weight is the examples."""
    counts: Terms = {}
    for _, part in sorted(batch.items()):
        for group, sets in part["groups"].items():
            for kind, tokens in sets.items():
                valid = tokens["valid"]
                count = (jnp.sum(valid, dtype=jnp.float32), jnp.float32(valid.shape[0]))
                _add(counts, {f"tokens/{group}_{kind}": count})
    return counts


def mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """``total / weight``; 0 where there is no weight, and then no gradient either."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def total_loss(terms: Terms, term_weights: Mapping[str, float]) -> jax.Array:
    """The weighted sum of the terms' means, a scalar float32."""
    return sum((term_weights[name] * mean(*term) for name, term in terms.items()), jnp.float32(0.0))


def row_total(values: jax.Array, valid: jax.Array, over: str) -> tuple[jax.Array, jax.Array]:
    """(sum, weight), `[B] float32`, of `[B, K]` values over valid slots.

    Args:
        values: of each slot.
        valid: `[B, K] bool`.
        over: ``token``: every valid slot counts the same; ``example``: every example that has one counts the same.
    """
    count = jnp.sum(valid, axis=-1, dtype=jnp.float32)
    total = jnp.sum(jnp.where(valid, values, 0.0), axis=-1, dtype=jnp.float32)
    if over == "token":
        return total, count
    return total / jnp.maximum(count, 1.0), (count > 0).astype(jnp.float32)


def summed(rows: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A term, of the sums and weights of each example."""
    return jnp.sum(rows[0]), jnp.sum(rows[1])
