"""The training state and the pure step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import m3ae_jax.train.guard as guards
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import Batch, Boxed, LossOutput, Objective, Terms
from m3ae_jax.objectives.batch import batch_loss, mean, token_counts, total_loss
from m3ae_jax.parallel.mesh import RULES, Rules, param_shardings, replicated
from m3ae_jax.train.guard import Guard


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
        step: steps done, a scalar int32.
        params: parameters, float32.
        opt_state: the optimizer's.
        extra: the objective's own, beside the parameters (``{}`` for most).
        guard: what decides on skipping a step.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any
    guard: Guard = flax.struct.field(default_factory=guards.fresh)


def abstract_state(
    objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, rules: Rules = RULES
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it (`jax.ShapeDtypeStruct` leaves).

    Raises:
        UserError: a parameter cannot be split as the rules say.
    """
    boxed, boxed_extra = jax.eval_shape(lambda: fresh_boxed(objective, seed))
    params, extra = (param_shardings(tree, mesh, rules) for tree in (boxed, boxed_extra))
    whole = replicated(mesh)
    state: Any = jax.eval_shape(lambda: _fresh(objective, optimizer, seed))
    shardings: Any = dataclasses.replace(
        state,
        step=whole,
        params=params,
        # Moments have the parameters' shapes and lie where they do.
        opt_state=optax.tree.map_params(
            optimizer, lambda _, place: place, state.opt_state, params, transform_non_params=lambda _: whole
        ),
        extra=extra,
        guard=jax.tree.map(lambda _: whole, state.guard),
    )
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, shardings)


def init_state(
    objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, rules: Rules = RULES
) -> TrainState:
    """A fresh state, born on the mesh with its shardings."""
    return jit_init(objective, optimizer, mesh, seed, rules)()


def jit_init(
    objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, rules: Rules = RULES
) -> Any:
    """What `init_state` calls, jitted."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(objective, optimizer, mesh, seed, rules))
    return jax.jit(lambda: _fresh(objective, optimizer, seed), out_shardings=shardings)


def fresh_boxed(objective: Objective, seed: int) -> tuple[Boxed, Boxed]:
    """Fresh parameters and the objective's own state, boxed with their logical axis names."""
    boxed = objective.init(jax.random.key(seed))
    return boxed, objective.init_extra(boxed, _extra_key(seed))


def _extra_key(seed: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), 1)


def _fresh(objective: Objective, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    boxed, boxed_extra = fresh_boxed(objective, seed)
    params = nn.unbox(boxed)
    return TrainState(jnp.int32(0), params, optimizer.init(params), _copied(boxed_extra))


def extra_of(objective: Objective, params: Any, abstract: TrainState, seed: int) -> Any:
    """The objective's own state for other parameters than fresh ones (`checkpoint.init_from`), in buffers of its own.

    Args:
        objective: whose state.
        params: on the mesh.
        abstract: of `abstract_state`.
        seed: of the run.
    """
    boxed = jax.eval_shape(objective.init, jax.random.key(seed))

    def make(params: Any) -> Any:
        return _copied(objective.init_extra(nn.meta.replace_boxed(boxed, params), _extra_key(seed)))

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, abstract.extra))(params)


def _copied(boxed: Boxed) -> Any:
    # A teacher that is the parameters' own buffers could not be donated beside them.
    return jax.tree.map(jnp.copy, nn.unbox(boxed))


def check_micro_batches(objective: Objective, micro_batches: int) -> None:
    """Refuses micro-batches for an objective whose examples are compared with each other.

    Raises:
        UserError: as said.
    """
    if micro_batches > 1 and objective.couples_examples and not objective.chunked:
        raise UserError(
            f"micro_batches={micro_batches}: the objective {type(objective).__name__} compares the examples of a "
            "batch with each other, so it cannot be cut: set micro_batches=1"
        )


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    seed: int,
    micro_batches: int = 1,
    sources: tuple[str, ...] = (),
    spike: float | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step: (state, batch) to (state, metrics). Pure; jit it with the state donated.

    Args:
        objective: its loss.
        optimizer: its update, which takes ``fine`` as that of `train.optimizer.optimizer`.
        seed: of dropout.
        micro_batches: parts that a batch is cut into, computed one after the other; loss and gradient are the
            whole batch's.
        sources: names of a mixture's; the metrics then have each loss term of each of them, ``TERM/NAME``.
        spike: as of `guard.judge`; a step that is not fine changes `step` and `guard` alone, and the metric
            ``skipped`` is the verdict. None: no step is judged.

    Raises:
        UserError: as `check_micro_batches`.
    """
    check_micro_batches(objective, micro_batches)
    gradient = step_gradient(objective, seed, micro_batches, len(sources))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, output = gradient(state, batch)
        terms = {**output.terms, **output.metrics, **token_counts(batch)}
        metrics = {_named(name, sources): mean(*term) for name, term in terms.items()}
        metrics["loss"] = total_loss(output.terms, objective.term_weights)
        metrics |= norms("gradient_norm", grads)
        guard, fine = state.guard, None
        if spike is not None:
            verdict = guards.judge(guard, metrics["loss"], metrics["gradient_norm"], spike)
            guard = guards.after(guard, metrics["loss"], verdict)
            metrics["skipped"], fine = verdict, verdict == guards.FINE
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, fine=fine)
        params = optax.apply_updates(state.params, updates)
        changed = params, objective.update_extra(state.extra, params, output.rows, output.sums, state.step)
        if fine is not None:
            changed = jax.tree.map(lambda new, old: jnp.where(fine, new, old), changed, (state.params, state.extra))
        params, extra = changed
        metrics |= norms("parameter_norm", params)
        return TrainState(state.step + 1, params, opt_state, extra, guard), metrics

    return step


def step_gradient(
    objective: Objective, seed: int, micro_batches: int, sources: int
) -> Callable[[TrainState, Batch], tuple[Any, LossOutput]]:
    """Gradient and loss of a step; the arguments are `train_step`'s, but for the number of sources."""

    def loss_of(
        params: Any, state: TrainState, batch: Batch, rng: jax.Array | None, weights: Any = None
    ) -> tuple[jax.Array, LossOutput]:
        """The loss of a batch, or with the `weights` of the whole batch a micro-batch's share of it."""
        output = batch_loss(objective, params, state.extra, batch, rng, state.step, sources)
        terms = output.terms
        if weights is not None:
            terms = {name: (total, weights[name]) for name, (total, _) in terms.items()}
        return total_loss(terms, objective.term_weights), output

    gradient = jax.grad(loss_of, has_aux=True)

    def accumulated(state: TrainState, batch: Batch, rng: jax.Array) -> tuple[Any, LossOutput]:
        micro = jax.tree.map(lambda x: _cut(x, micro_batches), batch)

        def weights_of(part: Batch) -> dict[str, jax.Array]:
            terms = loss_of(state.params, state, part, None)[1].terms
            return {name: weight for name, (_, weight) in terms.items()}

        # Weights depend on the batch alone, so the compiler drops the rest of the loss here.
        weights = jax.tree.map(lambda x: x.sum(0), jax.lax.map(weights_of, micro))

        def add(total: Any, item: tuple[jax.Array, Batch]) -> tuple[Any, LossOutput]:
            index, part = item
            grads, output = gradient(state.params, state, part, jax.random.fold_in(rng, index), weights)
            return jax.tree.map(jnp.add, total, grads), output

        start = jax.tree.map(jnp.zeros_like, state.params)
        grads, output = jax.lax.scan(add, start, (jnp.arange(micro_batches), micro))
        terms, metrics, sums = jax.tree.map(lambda x: x.sum(0), (output.terms, output.metrics, output.sums))
        rows, per_example = jax.tree.map(_join, (output.rows, output.per_example))
        return grads, LossOutput(terms, metrics, rows, sums, per_example)

    def of_step(state: TrainState, batch: Batch) -> tuple[Any, LossOutput]:
        # One key a step: a resumed run draws what an unbroken one would have drawn.
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        if micro_batches > 1 and not objective.chunked:
            return accumulated(state, batch, rng)
        return gradient(state.params, state, batch, rng)

    return of_step


def _cut(x: jax.Array, parts: int) -> jax.Array:
    """`[B, ...]` as `[parts, B / parts, ...]`; every parts-th row, so that each device cuts its own rows."""
    return jnp.moveaxis(x.reshape(len(x) // parts, parts, *x.shape[1:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """Undoes `_cut`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def norms(name: str, tree: Any) -> dict[str, jax.Array]:
    """Euclidean norms of a pytree like the parameters: `name` of all, ``NAME/GROUP`` of each entry at its top."""
    squares = {group: optax.tree.norm(part, squared=True) for group, part in tree.items()}
    groups = {f"{name}/{group}": jnp.sqrt(square) for group, square in squares.items()}
    return {name: jnp.sqrt(sum(squares.values(), jnp.float32(0.0))), **groups}


def jit_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    seed: int,
    micro_batches: int,
    abstract: TrainState,
    mesh: Mesh,
    sources: tuple[str, ...] = (),
    spike: float | None = None,
) -> Any:
    """`train_step`, jitted: the old state is given up, and the new one lies where `abstract_state` says."""
    step = train_step(objective, optimizer, seed, micro_batches, sources, spike)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def _named(metric: str, sources: tuple[str, ...]) -> str:
    """``TERM/NUMBER`` with the source's name."""
    term, slash, number = metric.partition("/")
    return f"{term}/{sources[int(number)]}" if slash and sources and number.isdigit() else metric


def eval_step(objective: Objective) -> Callable[[TrainState, Batch], Terms]:
    """The deterministic loss terms and metrics of a batch, as sums and weights."""

    def step(state: TrainState, batch: Batch) -> Terms:
        output = batch_loss(objective, state.params, state.extra, batch, None, state.step)
        return {**output.terms, **output.metrics}

    return step
