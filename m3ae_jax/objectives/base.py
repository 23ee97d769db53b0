"""What an objective is: the groups of tokens it asks for, a loss on them, and what else it may be able to do.

An objective is one file, chosen in the config by name or import path. What all must have is `Objective`; what only
some can do (encode, restore, ...) is a protocol each, for which the loop and the evaluations ask by `isinstance`.
No code outside this folder contains an objective's name.

Legend: ``B`` examples, ``V`` visible and ``K`` target slots, ``D`` width, ``P`` numbers in a patch.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from m3ae_jax.config.schema import objective_class
from m3ae_jax.data.tokens import Group
from m3ae_jax.errors import UserError
from m3ae_jax.models.encoder import Encoded

Part = Mapping[str, Any]
"""The rows of a batch whose sources hold the same modalities: ``{"groups", "example"}``, see ``data/tokens.py``."""

Batch = Mapping[str, Part]
"""All parts, by name."""

Params = Any
"""A pytree of parameters, float32."""

Boxed = Any
"""A pytree whose leaves are boxed with their logical axis names (`flax.linen.with_logical_partitioning`)."""

Terms = dict[str, tuple[jax.Array, jax.Array]]
"""``{name: (sum, weight)}``, scalars float32. A weight depends on the batch alone."""

NOTHING_HIDDEN: Mapping[str, float] = types.MappingProxyType({})


@flax.struct.dataclass
class LossOutput:
    """What `Objective.loss` returns of a part.

    Attributes:
        terms: parts of the loss, each a sum and its weight, not yet divided.
        metrics: figures to report, in the same form.
        rows: what `Objective.update_extra` needs of each example, `[B, ...]` leaves.
        sums: what it needs added over all examples, arrays of any shape.
        per_example: `Terms` as `[B] float32` sums and weights, for figures by source and for replay.
    """

    terms: Terms
    metrics: Terms
    rows: Any = flax.struct.field(default_factory=dict)
    sums: Any = flax.struct.field(default_factory=dict)
    per_example: Any = flax.struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Load:
    """A checkpoint whose parameters go into a part of the state before the first step.

    Attributes:
        path: a run's folder, or one checkpoint in it.
        into: where in the state: ``params``, ``params/encoder``, ``extra/tokenizer``, ...
        source: which of the checkpoint's parameters, as ``encoder``; empty: all; ``extra/NAME``: what is beside them.
        field: of the config that names it, for messages.
        complete: refuse a checkpoint that lacks a leaf; else it keeps its fresh value, and that is logged.
        frozen: it stays a model of its own, computed as it was trained, whatever this run's fields say.
    """

    path: str
    into: str = "params"
    source: str = ""
    complete: bool = False
    field: str = "init_from"
    frozen: bool = False


class Objective(Protocol):
    """What every objective has; built as ``Objective(config, vocab_size)``. Inherit from it for the defaults.

    Attributes:
        groups: what the data pipeline must put into a batch.
        term_weights: factor of each loss term in the total.
        Fields: the dataclass of its own fields of the config; none if it has none. They are the group of the
            objective's name: that under which it is built in, or its `name`, or the class's name in lower case.
        couples_examples: whether an example's loss depends on the others of its batch (contrast, negatives); the
            batch is then not cut into micro-batches, unless `chunked`.
        chunked: whether the loss cuts a batch into ``config.micro_batches`` by itself.
        alarms: least and greatest value of some metrics; a run warns when one leaves them.
        model_extra: branches of `extra` that belong to the model besides its parameters, as a codebook; the protocols'
            methods get them among the parameters, under these names (`model_params`).
        stacks: paths of the parameters of its layer stacks, as ``encoder/blocks``, in the order of the forward pass.
    """

    groups: tuple[Group, ...]
    term_weights: Mapping[str, float]
    couples_examples: bool = False
    chunked: bool = False
    alarms: Mapping[str, tuple[float, float]] = types.MappingProxyType({})
    model_extra: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()

    def init(self, rng: jax.Array) -> Boxed:
        """Fresh parameters."""
        raise NotImplementedError

    def init_extra(self, params: Boxed, rng: jax.Array) -> Boxed:
        """State beside the parameters: a momentum teacher, a queue, a frozen tokenizer; ``{}`` for none.

        Args:
            params: the run's first parameters; what is taken over from them is copied.
            rng: of what is drawn.
        """
        return {}

    def loads(self) -> tuple[Load, ...]:
        """Checkpoints that go into the fresh state."""
        return ()

    def loss(self, params: Params, extra: Any, part: Part, rng: jax.Array | None, step: jax.Array) -> LossOutput:
        """Loss terms of a part of the batch; ``rng=None`` is deterministic."""
        raise NotImplementedError

    def update_extra(self, extra: Any, params: Params, rows: Mapping[str, Any], sums: Any, step: jax.Array) -> Any:
        """The next `extra`, after the optimizer; a skipped step keeps the old one.

        Args:
            extra: before the step.
            params: after it.
            rows: `LossOutput.rows` of each part.
            sums: `LossOutput.sums`, added over parts and micro-batches.
            step: steps done before.
        """
        return extra

    def view(self, inputs: Iterable[str], hidden: Mapping[str, float] = NOTHING_HIDDEN) -> tuple[Group, ...]:
        """Groups for downstream use.

        Args:
            inputs: names of the modalities that are given; what the objective does not know is left out.
            hidden: mask ratio of a modality; 0 where it is not named.
        """
        raise NotImplementedError


def model_params(objective: Objective, params: Params, extra: Any) -> Params:
    """What the protocols below take as parameters: `params`, and what of `extra` belongs to the model."""
    return {**params, **{name: extra[name] for name in objective.model_extra}}


@flax.struct.dataclass
class Restored:
    """What a model makes of the target tokens of a group.

    Attributes:
        value: in data space: `[B, K, P] uint8` pixels or `[B, K] int32` token ids.
        loss: `[B, K] float32`, as the training loss measures each token.
        correct: `[B, K] bool`, whether an id is right; None for pixels.
        own_statistics: whether a patch's pixels have the mean and deviation of the true one, not the model's.
    """

    value: jax.Array
    loss: jax.Array
    correct: jax.Array | None = None
    own_statistics: bool = flax.struct.field(pytree_node=False, default=False)


@runtime_checkable
class Encodes(Protocol):
    """Gives features of the visible tokens."""

    def encode(self, params: Params, part: Part, rng: jax.Array | None = None) -> Encoded:
        """Features of a part's visible tokens, of all its groups together; `rng` is of dropout."""


def pool(encoded: Encoded, groups: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Features of whole examples: what the objective pools (``cls``), and the ``mean`` over the real tokens.

    Args:
        encoded: of `Encodes.encode`.
        groups: of the part that was encoded.

    Returns:
        ``{name: [B, D] float32}``; the mean is zero for an example without any token (no caption). Of groups of
        different widths the means stand side by side.
    """
    features = {name: x.astype(jnp.float32) for name, x in encoded.pooled.items()}
    if len({x.shape[-1] for x in encoded.tokens.values()}) > 1:
        alone = [Encoded({}, {name: encoded.tokens[name]}) for name in groups]
        means = [pool(one, {name: groups[name] for name in one.tokens})["mean"] for one in alone]
        return {**features, "mean": jnp.concatenate(means, axis=-1)}
    valid = jnp.concatenate([sets["visible"]["valid"] for sets in groups.values()], axis=1)
    tokens = jnp.concatenate([encoded.tokens[name].astype(jnp.float32) for name in groups], axis=1)
    total = jnp.sum(jnp.where(valid[..., None], tokens, 0.0), axis=1)
    return {**features, "mean": total / jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)}


@runtime_checkable
class Embeds(Protocol):
    """Puts pictures and captions into one space, where those that belong together are close."""

    def embed(self, params: Params, part: Part, rng: jax.Array | None = None) -> dict[str, jax.Array]:
        """Unit vectors `[B, d] float32` of the whole picture (``image``) and caption (``text``), if the part has them.

        Tokens that are hidden count too; `rng` is of dropout.
        """


@runtime_checkable
class Matches(Protocol):
    """Says whether a picture and a caption belong together, reading both."""

    def match(self, params: Params, part: Part) -> jax.Array:
        """Logits `[B] float32` of the pairs, the higher the better they fit; deterministic."""


@runtime_checkable
class Restores(Protocol):
    """Restores hidden tokens."""

    def restore(self, params: Params, part: Part) -> dict[str, Restored]:
        """Of each group that has targets; deterministic."""


@runtime_checkable
class Tokenizes(Protocol):
    """Turns pictures into ids of a visual vocabulary, one a patch, and back.

    Attributes:
        codes: how many ids there are.
    """

    codes: int

    def ids(self, params: Params, tokens: Mapping[str, Any]) -> jax.Array:
        """Ids `[B, K] int32` of a token set of uint8 patches, which are all of a picture, in any order."""

    def pixels(self, params: Params, ids: jax.Array, position: jax.Array) -> jax.Array:
        """Patches `[B, K, P] uint8` of all ids of a picture, at their positions `[B, K]`."""


@runtime_checkable
class Attends(Protocol):
    """Shows its encoder's attention.

    Attributes:
        attention_maps: layers and heads.
    """

    attention_maps: tuple[int, int]

    def attention(self, params: Params, part: Part, layer: int = -1) -> dict[str, dict[str, jax.Array]]:
        """How the encoder's tokens attend to each other in one layer, the mean of its heads, deterministic.

        Args:
            params: parameters.
            part: whose visible tokens are encoded.
            layer: of the encoder, from 0; negative from the end.

        Returns:
            ``{query: {key: [B, V, W] float32}}``, both ``cls`` (one slot) or a group. Over all keys a row sums to 1;
            a key that is padding has weight 0, and a query that is padding means nothing.
        """


@runtime_checkable
class Grounds(Protocol):
    """Says where in a picture a caption is."""

    def relevance(self, params: Params, part: Part, layer: int = -1) -> jax.Array:
        """How much each patch speaks for the pair, `[B, N] float32` from 0 on, patches in row-major order.

        Args:
            params: parameters.
            part: of pairs; what is hidden counts too.
            layer: whose attention is taken; -1: the usual one.
        """


@runtime_checkable
class FindsKeywords(Protocol):
    """Finds the words that matter in a caption, and recommends words for a picture."""

    def keywords(self, params: Params, part: Part) -> tuple[jax.Array, jax.Array]:
        """Of pairs, deterministic.

        Returns:
            `[B, V] bool`, the keywords of each caption; `[B, V] float32`, of each word of the vocabulary the
            probability that it is one, of the picture alone.
        """


@runtime_checkable
class Itemizes(Protocol):
    """Says what the parts of a step cost."""

    def products(self, rows: int) -> dict[str, float]:
        """Floating-point operations of an example's matrix products by part of the step, forward and backward.

        Args:
            rows: of the batch, with all of which an example is compared.
        """


@runtime_checkable
class Prior(Protocol):
    """Knows what a predictor that ignores the other tokens reaches."""

    def prior(self, train: Iterable[Part], validation: Iterable[Part]) -> dict[str, float]:
        """Loss terms on `validation` of statistics counted on `train`; both lie in host memory."""


def build(config: ConfigDict, vocab_size: int) -> Objective:
    """The objective that ``config.objective`` names.

    Args:
        config: the resolved config.
        vocab_size: token ids; 0 without text.

    Raises:
        UserError: as `config.schema.objective_class`, or what is named lacks a part of the contract.
    """
    kind = objective_class(config.objective)
    needed = [name for name in vars(Objective) if not name.startswith("_")]
    lacking = [name for name in needed if not hasattr(kind, name)]
    lacking += [name for name in ("init", "loss", "view") if getattr(kind, name, None) is getattr(Objective, name)]
    objective: Objective | None = None if lacking else kind(config, vocab_size)
    lacking += [name for name in ("groups", "term_weights") if objective and not hasattr(objective, name)]
    if objective is None or lacking:
        raise UserError(f"objective={config.objective!r} lacks {', '.join(lacking)}, see m3ae_jax.objectives.base")
    return objective
